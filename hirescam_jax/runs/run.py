"""What a run folder tells of itself: `run.json`, and the weights to predict with."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import digest_of
from hirescam_jax.data.specs import StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.models.contract import Network, has_slices, initial_variables
from hirescam_jax.runs.config_files import from_json, to_json
from hirescam_jax.runs.integrity import load_patiently, saved_losses, step_folder

FORMAT = 1
# Training longer, more patiently or on other devices is the point of some resumptions.
FREE = ("depth_devices", "epochs", "patience", "save_steps", "workers")


@dataclasses.dataclass(frozen=True)
class Header:
    """What `run.json` holds.

    shape: (D, H, W) of the volumes; spacing_mm: their voxel edges.
    digests: of the contents of the training and validation volumes, by split; of some data sets
        only, and of no run of an older version.
    """

    config: Config
    labels: tuple[str, ...]
    regions: tuple[str, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, source: Any, validation: Any = None) -> "Header":
        """From a config and the data set that it is trained on."""
        digests = {"train": digest_of(source), "val": digest_of(validation)}
        return cls(
            config,
            tuple(source.labels),
            tuple(source.regions),
            tuple(source.shape),
            tuple(source.spacing_mm),
            {split: digest for split, digest in digests.items() if digest},
        )

    def facts(self, **sizes: int) -> dict[str, str]:
        """What all processes of a run must have in common, by name; sizes: of the splits."""
        fields = {spec.name: getattr(self.config, spec.name) for spec in dataclasses.fields(Config)}
        return {
            **{f"config.{n}": repr(v) for n, v in fields.items() if n != "workers"},
            **{n: repr(getattr(self, n)) for n in ("labels", "regions", "shape", "spacing_mm")},
            **{f"number of {name} volumes": str(size) for name, size in sizes.items()},
            "content of the volumes": repr(sorted(self.digests.items())),
        }

    def to_json(self) -> str:
        data = {"format": FORMAT, "config": json.loads(to_json(self.config))}
        for name in ("labels", "regions", "shape", "spacing_mm"):
            data[name] = list(getattr(self, name))
        data["digests"] = self.digests
        return json.dumps(data, indent=2)

    @classmethod
    def read(cls, run_dir: Path) -> "Header":
        """Raises UserError: no such run, or a damaged or unknown `run.json`."""
        path = run_dir / "run.json"
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise UserError(f"{path}: format {data['format']}, this version reads {FORMAT}")
            config = from_json(json.dumps(data["config"]), str(path))
            names = ("labels", "regions", "shape", "spacing_mm")
            rest: dict[str, Any] = {name: tuple(data[name]) for name in names}
            rest["digests"] = dict(data.get("digests", {}))
        except FileNotFoundError as error:
            raise UserError(f"{run_dir}: not a run folder (no run.json in it)") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: field {error} is missing or damaged") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from error
        return cls(config, **rest)

    def continued(self, run_dir: Path, wanted: "Header") -> "Header":
        """What `run.json` is to hold from now on, if this run is continued with `wanted`: the same
        data may lie elsewhere now.

        Raises:
            UserError: other data or another config.
        """
        check_same(run_dir, self, wanted)
        config = dataclasses.replace(self.config, data=wanted.config.data)
        return dataclasses.replace(self, config=config, digests=wanted.digests or self.digests)


def check_same(run_dir: Path, saved: Header, wanted: Header) -> None:
    for name in ("labels", "shape"):
        if getattr(saved, name) != getattr(wanted, name):
            raise UserError(
                f"{run_dir}: trained with {name} {getattr(saved, name)}, now "
                f"{getattr(wanted, name)}: resume with the same data"
            )
    known = saved.digests.keys() & wanted.digests.keys()
    for split in sorted(known):
        if saved.digests[split] != wanted.digests[split]:
            raise UserError(
                f"{run_dir}: was started with other volumes than are now in split '{split}' of "
                f"{wanted.config.data}: resume with the same data"
            )
    for spec in dataclasses.fields(Config):
        before, now = (getattr(h.config, spec.name) for h in (saved, wanted))
        if known and isinstance(before, StoreData) and isinstance(now, StoreData):
            before = dataclasses.replace(before, path=now.path)
        if spec.name not in FREE and before != now:
            raise UserError(
                f"{run_dir}: was started with config.{spec.name} = {before!r}, not {now!r}: "
                "resume with the same config"
            )


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
    def model(self) -> Network:
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
        if not has_slices(self.model):
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


def load_run(run_dir: str | Path, which: str = "best") -> Run:
    """Opens a finished or running run with its "best" or "latest" weights, on one device.

    Raises:
        UserError: no run folder, no checkpoint in it, or a checkpoint of another model.
    """
    run_dir = Path(run_dir)
    header = Header.read(run_dir)
    losses = saved_losses(run_dir)
    if not losses:
        raise UserError(f"{run_dir}: no checkpoint yet; train for at least one epoch")
    step = max(losses)
    validated = [saved for saved, loss in losses.items() if loss is not None]
    if which == "best" and validated:
        step = min(validated, key=lambda step: (losses[step], step))
    init = partial(initial_variables, header.config.model, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, *header.shape)))
    abstract = {
        name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.get(name, {}))
        for name in ("params", "batch_stats")
    }
    loaded = load_patiently(step_folder(run_dir, step), {"variables": abstract})
    loaded = jax.device_put(loaded, jax.local_devices()[0])
    return Run(run_dir, header, loaded["variables"], step)
