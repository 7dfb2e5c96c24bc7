"""A run folder: what was trained, on what, and its Orbax checkpoints.

run.json         format version, config, labels, regions, grid
metrics.jsonl    a line a step and a line a validation
tensorboard/     the same for TensorBoard
checkpoints/     the latest two and the best one (lowest validation loss), by step
damaged-*/       a checkpoint that could not be read when the run was resumed
"""

import contextlib
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import Array, Float

from hirescam_jax import config as configs
from hirescam_jax import distributed
from hirescam_jax.config import Config
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.progress import say

FORMAT = 1
# Training longer, more patiently or on other devices is the point of some resumptions.
FREE = ("depth_devices", "epochs", "patience", "save_steps", "workers")


class DamagedError(UserError):
    """A checkpoint that cannot be read."""


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

    def facts(self, **sizes: int) -> dict[str, str]:
        """What all processes of a run must have in common, by name; sizes: of the splits."""
        fields = {spec.name: getattr(self.config, spec.name) for spec in dataclasses.fields(Config)}
        return {
            **{f"config.{n}": repr(v) for n, v in fields.items() if n != "workers"},
            **{n: repr(getattr(self, n)) for n in ("labels", "regions", "shape", "spacing_mm")},
            **{f"number of {name} volumes": str(size) for name, size in sizes.items()},
        }

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

    def check_maps(self) -> None:
        """Raises UserError if the model's maps cannot be laid on a volume."""
        if self.model.depth_unit is None:
            raise UserError(
                f"{self.path}: the maps of {type(self.model).__name__} have no slices "
                "and cannot be laid on a volume; `hirescam_jax.explain` gives them on their own "
                "grid"
            )

    def on_mesh(self, depth_devices: int | None) -> "Run":
        """The same run, to be used with so many devices a volume; None for as many as it has."""
        if depth_devices is None:
            return self
        config = dataclasses.replace(self.config, depth_devices=depth_devices)
        return dataclasses.replace(self, header=dataclasses.replace(self.header, config=config))


class Saver:
    """Writes a run's checkpoints in the background, keeping the best and the latest two; `restore`
    comes first. All processes write their part; the first one looks after the folder.

    Raises:
        UserError: a new run in a folder that exists; a resumed one that does not exist, or whose
            config differs.
    """

    def __init__(self, run_dir: Path, header: Header, *, resume: bool):
        self.run_dir = run_dir

        def prepare() -> None:
            if resume:
                _check_same(run_dir, Header.read(run_dir), header)
            elif run_dir.exists():
                raise UserError(
                    f"{run_dir}: exists; choose another folder, or --resume to continue it"
                )
            try:
                (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
                if not resume:
                    with atomic_file(run_dir / "run.json") as temporary:
                        temporary.write_text(header.to_json())
            except OSError as error:
                raise UserError(f"{run_dir}: cannot write the run ({error.strerror})") from error

        distributed.on_first(prepare)
        self.checkpointer: Any = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext(), self._writing():
            self.checkpointer.close()

    def restore(self, state: Any) -> Any:
        """The latest checkpoint that is whole, in the shardings of `state`; without one `state`
        itself. Damaged ones are moved out of the way, with a warning.

        Raises:
            UserError: none of the checkpoints is whole.
        """
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _parts(state))
        loaded = _newest_whole(self.run_dir, shapes)
        self.checkpointer = _open(self.run_dir)
        if loaded is None:
            return state

        def place(old: Array, new: np.ndarray) -> Array:
            return jax.make_array_from_callback(old.shape, old.sharding, lambda part: new[part])

        parts = jax.tree.map(place, _parts(state), loaded)
        return state.replace(**parts["variables"], **parts["progress"])

    def save(self, step: int, state: Any, losses: dict[str, float] | None = None) -> None:
        """Starts to write; waits only for the write before this one, and raises its UserError.

        Args:
            losses: of the validation, if there was one after this step.
        """
        saved = {checkpoint.step for checkpoint in self.checkpointer.checkpoints}
        if step in saved and losses is None:
            return
        metrics = {"val_loss": float(losses["loss"]), "step": step} if losses else None
        parts = _parts(state)
        with self._writing():
            self.checkpointer.save_checkpointables_async(
                step,
                {**parts, "checksums": jax.jit(checksums)(parts)},
                force=True,
                overwrite=step in saved,  # by a signal, before its validation
                metrics=metrics,
            )

    def wait(self) -> None:
        """Returns once everything is on disk, or raises its UserError."""
        with self._writing():
            self.checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _quiet_orbax():
                yield
        except (OSError, ValueError) as error:  # TensorStore says ValueError for a full disk
            if distributed.peer_lost(error):
                raise
            reason = "No space left on device" if "No space left" in str(error) else error
            raise UserError(
                f"{self.run_dir}: a checkpoint cannot be written ({reason}): free some space and "
                "continue with --resume; earlier checkpoints are whole"
            ) from error

    def epochs_done(self, step: int, epoch_steps: int) -> int:
        """Epochs that are validated, for a training that stands at `step`."""
        waiting = step > 0 and step not in _losses(self.checkpointer)
        return (step - waiting) // epoch_steps

    def best_epoch(self, epoch_steps: int) -> int:
        """Epochs until the one with the lowest validation loss, the first of equals."""
        losses = _losses(self.checkpointer)
        return min(losses, key=losses.__getitem__) // epoch_steps if losses else 0


def load_run(run_dir: Path, which: str = "best") -> Run:
    """Opens a finished or running run with its "best" or "latest" weights, on one device.

    Raises:
        UserError: no run folder, no checkpoint in it, or a checkpoint of another model.
    """
    run_dir = Path(run_dir)
    header = Header.read(run_dir)
    losses = _saved_losses(run_dir)
    if not losses:
        raise UserError(f"{run_dir}: no checkpoint yet; train for at least one epoch")
    step = max(losses)
    validated = [saved for saved, loss in losses.items() if loss is not None]
    if which == "best" and validated:
        step = min(validated, key=lambda step: (losses[step], step))
    init = partial(header.config.model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, *header.shape)))
    abstract = {
        name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.get(name, {}))
        for name in ("params", "batch_stats")
    }
    loaded = _load_whole(_folder(run_dir, step), {"variables": abstract})
    loaded = jax.device_put(loaded, jax.local_devices()[0])
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


def checksums(tree: dict[str, Any], xp: Any = jnp) -> dict[str, Any]:
    """A number for the bits of each entry of a dict of trees, by `xp` = jax.numpy or numpy: flipped
    and exchanged values change it. Sums of integers, so devices and their order do not matter."""

    def one(x: Any) -> Any:
        bits = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
        places = xp.arange(bits.size, dtype="uint32") * xp.uint32(2) + xp.uint32(1)
        return xp.sum(bits * places, dtype="uint32")

    def total(part: Any) -> Any:
        sums = [one(leaf) for leaf in jax.tree.leaves(part)]
        return one(xp.stack([*sums, xp.zeros_like(xp.uint32(0))]))

    return {name: total(part) for name, part in tree.items()}


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / str(step)


def _saved_losses(run_dir: Path) -> dict[int, float | None]:
    """The checkpoints' steps, and their validation losses as far as they have one."""
    folders = (run_dir / "checkpoints").glob("*")
    return {int(f.name): _loss(f) for f in folders if f.name.isdecimal() and f.is_dir()}


def _loss(folder: Path) -> float | None:
    path = folder / "metrics" / "metrics"
    try:
        return json.loads(path.read_text())["val_loss"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder}: damaged (metrics: {error})") from error


def _newest_whole(run_dir: Path, shapes: Any) -> Any:
    """The newest checkpoint that all processes can read to the bit; damaged ones are moved away.
    None if there is none at all."""

    def saved_steps() -> list[int]:
        folders = (run_dir / "checkpoints").glob("*")
        return sorted((int(f.name) for f in folders if f.name.isdecimal()), reverse=True)

    steps, loaded, damaged = distributed.on_first(saved_steps), None, {}
    for step in steps:
        folder, error = _folder(run_dir, step), ""
        try:
            _loss(folder)
            loaded = _load_whole(folder, shapes)
        except DamagedError as caught:
            error = str(caught)
        if not distributed.in_any(bool(error)):
            break
        damaged[step] = error or f"{folder}: damaged, as another process read it"
    if len(damaged) == len(steps) > 0:
        others = f", and so are those before it: {steps[1:]}" if steps[1:] else ""
        raise UserError(f"{damaged[steps[0]]}{others}: start again in another folder")

    def move() -> None:
        for step, error in damaged.items():
            aside = run_dir / f"damaged-{step}-{time.time_ns()}"
            _folder(run_dir, step).rename(aside)
            whole = steps[len(damaged)]
            say(f"warning: {error}; moved to {aside.name}, continuing from step {whole}")

    distributed.on_first(move)
    return loaded


def _load_whole(folder: Path, shapes: Any) -> Any:
    """Arrays in memory with the checksums they were saved with.

    Each process reads for itself, but all must read equally often: Orbax counts its operations,
    and a later save waits for processes with the same count.
    """
    context, number = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = number
    context.multiprocessing.active_processes = {number}
    context.multiprocessing.barrier_sync_key_prefix = f"alone{number}"
    sums: dict[str, Any] = {}
    if (folder / "checksums").exists():
        parts = ("variables", "progress")
        sums = {"checksums": {name: np.zeros((), np.uint32) for name in parts}}
    with context:
        loaded = _load(folder, {**shapes, **sums})
    expected = loaded.pop("checksums", None)
    for name, value in checksums(loaded, np).items() if expected else ():
        if value != expected[name]:
            raise DamagedError(f"{folder}: damaged (the {name} are not those that were saved)")
    return loaded


def _open(run_dir: Path) -> ocp.training.Checkpointer:
    policies: Any = ocp.training.preservation_policies
    keep = policies.AnyPreservationPolicy(
        [
            # Two, so that there is one to fall back to.
            policies.LatestN(2),
            policies.BestN(
                get_metric_fn=lambda metrics: (-metrics["val_loss"], -metrics["step"]),
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


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Where one array of many cannot be read or written, Orbax leaves the others to end in an event
    loop that is closed by then: not for the user, who is told what went wrong."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        time.sleep(0.5)
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before


def _load(folder: Path, abstract: Any) -> Any:
    with _quiet_orbax():
        return _load_or_say_why(folder, abstract)


def _load_or_say_why(folder: Path, abstract: Any) -> Any:
    try:
        saved: Any = ocp.checkpointables_metadata(str(folder.absolute())).metadata
        for name, tree in abstract.items():
            if saved[name] is None:
                raise DamagedError(f"{folder}: damaged ({name} cannot be read)")
            _check_shapes(saved[name], tree, f"{folder}: {name}")
        return ocp.load_checkpointables(str(folder.absolute()), abstract)
    except UserError:
        raise
    except Exception as error:  # damaged files make Orbax raise whatever it likes
        line = " ".join(str(error).split())
        raise DamagedError(f"{folder}: damaged, or not of this program ({line[:200]})") from error


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
    for spec in dataclasses.fields(Config):
        before, now = (getattr(h.config, spec.name) for h in (saved, wanted))
        if spec.name not in FREE and before != now:
            raise UserError(
                f"{run_dir}: was started with config.{spec.name} = {before!r}, not {now!r}: "
                "resume with the same config"
            )
