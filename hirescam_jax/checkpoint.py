"""A run folder: what was trained, on what, and its Orbax checkpoints.

run.json         format version, config, labels, regions, grid
metrics.jsonl    a line a step and a line a validation
tensorboard/     the same for TensorBoard
checkpoints/     the latest one and the best one (lowest validation loss), by step
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import Array, Float

from hirescam_jax import config as configs
from hirescam_jax.config import Config
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """What `run.json` holds. shape is (D, H, W) of the volumes, spacing_mm their voxel edges."""

    config: Config
    labels: tuple[str, ...]
    regions: tuple[str, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]

    @classmethod
    def of(cls, config: Config, source: Any) -> "Header":
        """From a config and the data set that it is trained on."""
        return cls(
            config,
            tuple(source.labels),
            tuple(source.regions),
            tuple(source.shape),
            tuple(source.spacing_mm),
        )

    def to_json(self) -> str:
        data = {"format": FORMAT, "config": json.loads(configs.to_json(self.config))}
        for name in ("labels", "regions", "shape", "spacing_mm"):
            data[name] = list(getattr(self, name))
        return json.dumps(data, indent=2)

    @classmethod
    def read(cls, run_dir: Path) -> "Header":
        """Raises UserError: no such run, or a damaged or unknown `run.json`."""
        path = run_dir / "run.json"
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise UserError(f"{path}: format {data['format']}, this version reads {FORMAT}")
            config = configs.from_json(json.dumps(data["config"]), str(path))
            rest = [tuple(data[n]) for n in ("labels", "regions", "shape", "spacing_mm")]
        except FileNotFoundError as error:
            raise UserError(f"{run_dir}: not a run folder (no run.json in it)") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: field {error} is missing or damaged") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from error
        return cls(config, *rest)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model with everything needed to use it on new volumes."""

    path: Path
    header: Header
    variables: Any
    step: int

    @property
    def config(self) -> Config:
        return self.header.config

    @property
    def model(self) -> Any:
        return self.header.config.model

    @property
    def labels(self) -> tuple[str, ...]:
        return self.header.labels

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        return self.header.spacing_mm

    def normalize(self, volume: Array) -> Float[Array, "*dims"]:
        """Hounsfield units -> what the model takes."""
        return self.config.preprocess.normalize(volume)


class Saver:
    """Writes a run's checkpoints in the background, keeping the latest and the best.

    Raises:
        UserError: a new run in a folder that exists; a resumed one that does not exist, or whose
            config differs.
    """

    def __init__(self, run_dir: Path, header: Header, *, resume: bool):
        self.run_dir = run_dir
        if resume:
            _check_same(run_dir, Header.read(run_dir), header)
        elif run_dir.exists():
            raise UserError(f"{run_dir}: exists; choose another folder, or --resume to continue it")
        elif jax.process_index() == 0:
            try:
                run_dir.mkdir(parents=True)
                with atomic_file(run_dir / "run.json") as temporary:
                    temporary.write_text(header.to_json())
            except OSError as error:
                raise UserError(f"{run_dir}: cannot write the run ({error.strerror})") from error
        self.checkpointer = _open(run_dir)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext(), self._writing():
            self.checkpointer.close()

    def restore(self, state: Any) -> Any:
        """The latest checkpoint, in the shardings of `state`; without one `state` itself."""
        if self.checkpointer.latest is None:
            return state
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _parts(state)
        )
        loaded = _load(self.checkpointer, self.checkpointer.latest.step, abstract, self.run_dir)
        return state.replace(**loaded["variables"], **loaded["progress"])

    def save(self, step: int, state: Any, val_loss: float) -> None:
        """Starts to write; waits only for the write before this one, and raises its UserError."""
        with self._writing():
            self.checkpointer.save_checkpointables_async(
                step, _parts(state), force=True, metrics={"val_loss": float(val_loss)}
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore says ValueError for a full disk
            reason = "No space left on device" if "No space left" in str(error) else error
            raise UserError(
                f"{self.run_dir}: a checkpoint cannot be written ({reason}): free some space and "
                "continue with --resume; earlier checkpoints are whole"
            ) from error

    def stale_epochs(self, epoch_steps: int) -> int:
        """Epochs since the lowest validation loss."""
        losses = _losses(self.checkpointer)
        return (max(losses) - min(losses, key=losses.__getitem__)) // epoch_steps if losses else 0


def load_run(run_dir: Path, which: str = "best") -> Run:
    """Opens a finished or running run with its "best" or "latest" weights, on one device.

    Raises:
        UserError: no run folder, no checkpoint in it, or a checkpoint of another model.
    """
    run_dir = Path(run_dir)
    header = Header.read(run_dir)
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir}: no checkpoint yet; train for at least one epoch")
    with _open(run_dir) as checkpointer:
        saved = list(checkpointer.checkpoints)
        if not saved:
            raise UserError(f"{run_dir}: no checkpoint yet; train for at least one epoch")
        step, losses = saved[-1].step, _losses(checkpointer)
        if which == "best" and losses:
            step = min(losses, key=lambda step: (losses[step], step))
        init = partial(header.config.model.init, jax.random.key(0))
        shapes = jax.eval_shape(init, jnp.zeros((1, *header.shape)))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                shapes.get(name, {}),
            )
            for name in ("params", "batch_stats")
        }
        loaded = _load(checkpointer, step, {"variables": abstract}, run_dir)
    return Run(run_dir, header, loaded["variables"], step)


def _parts(state: Any) -> dict[str, Any]:
    """A training state as it is saved: the variables apart, for those who only want to predict."""
    return {
        "variables": state.variables,
        "progress": {"step": state.step, "opt_state": state.opt_state},
    }


def _losses(checkpointer: Any) -> dict[int, float]:
    """Validation loss of each checkpoint, by step."""
    return {c.step: c.metrics["val_loss"] for c in checkpointer.checkpoints if c.metrics}


def _open(run_dir: Path) -> ocp.training.Checkpointer:
    policies: Any = ocp.training.preservation_policies
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(1),
            policies.BestN(
                get_metric_fn=lambda metrics: -metrics["val_loss"],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    return ocp.training.Checkpointer(
        str((run_dir / "checkpoints").absolute()),
        preservation_policy=keep,
        cleanup_tmp_directories=True,
    )


def _load(checkpointer: ocp.training.Checkpointer, step: int, abstract: Any, run_dir: Path) -> Any:
    where = run_dir / "checkpoints" / str(step)
    try:
        saved = checkpointer.checkpointables_metadata(step).metadata
        for name, tree in abstract.items():
            _check_shapes(saved[name], tree, f"{where}: {name}")
        return checkpointer.load_checkpointables(step, abstract)
    except (ValueError, KeyError, TypeError, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{where}: damaged, or not of this program ({line[:200]})") from error


def _check_shapes(saved: Any, wanted: Any, where: str) -> None:
    """Names the first array by which a checkpoint differs from the model."""
    shapes, expected = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (_plain(saved), _plain(wanted))
    )
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            raise UserError(
                f"{where}{name} has shape {shapes.get(name)}, not {expected.get(name)}: "
                "it is of another model than run.json describes"
            )


def _plain(tree: Any) -> Any:
    """The tree with every container as a dict, which is how a checkpoint describes itself."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, list | tuple):
        tree = {str(i): item for i, item in enumerate(tree)}
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _check_same(run_dir: Path, saved: Header, wanted: Header) -> None:
    for name in ("labels", "shape"):
        if getattr(saved, name) != getattr(wanted, name):
            raise UserError(
                f"{run_dir}: trained with {name} {getattr(saved, name)}, now "
                f"{getattr(wanted, name)}: resume with the same data"
            )
    # Training longer or more patiently is the point of some resumptions.
    free = {"epochs", "patience", "workers"}
    for spec in dataclasses.fields(Config):
        before, now = (getattr(h.config, spec.name) for h in (saved, wanted))
        if spec.name not in free and before != now:
            raise UserError(
                f"{run_dir}: was started with config.{spec.name} = {before!r}, not {now!r}: "
                "resume with the same config"
            )
