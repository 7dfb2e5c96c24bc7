"""Typed configs: a plain Python file builds one `Config`; the command line overrides any field.

# my_config.py
from hirescam_jax.config import Config, PhantomData
config = Config(data=PhantomData(train_size=2000), epochs=20)
"""

import dataclasses
import difflib
import inspect
import json
import runpy
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
from beartype.door import is_bearable

from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.data.regions import Method
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet, BodyConv, Conv3DNet, CTNet
from hirescam_jax.preprocess import Preprocess


@dataclasses.dataclass(frozen=True)
class PhantomData:
    """The embedded procedural thorax CTs (`hirescam_jax.data.phantom`).

    mask_method, dilate: as for `StoreData`.
    """

    phantom: PhantomConfig = PhantomConfig()
    train_size: int = 800
    val_size: int = 200
    test_size: int = 200
    mask_method: Method = "nearest"
    dilate: bool = False


@dataclasses.dataclass(frozen=True)
class StoreData:
    """A store that `hirescam prepare` wrote (`hirescam_jax.data.store`).

    mask_method: how organ masks come to the feature grid; the paper's choice is "nearest".
    dilate: grow them there by one cell.
    train_size: use so many training volumes, chosen at random once for all; 0 uses all.
    val_size, test_size: the same for the other splits.
    """

    path: str
    mask_method: Method = "nearest"
    dilate: bool = False
    train_size: int = 0
    val_size: int = 0
    test_size: int = 0


@dataclasses.dataclass(frozen=True)
class SGD:
    """The paper's optimiser: the weight decay is L2, added to the gradient before momentum."""

    learning_rate: float = 1e-3
    momentum: float = 0.99
    weight_decay: float = 1e-7


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW with a linear warm-up of a tenth of the training and a cosine decay to zero."""

    learning_rate: float = 2e-3
    weight_decay: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. The defaults are the paper's set-up.

    Attributes:
        model: the network.
        data: phantom CTs, or a prepared store.
        preprocess: window, scale and augmentation, done on the device.
        optimizer: and its learning rate.
        labels: train on these labels only; empty for all labels of the data.
        mask_weight: lambda of the mask loss; 0 trains without it.
        batch_size: volumes a step, over all devices and processes.
        micro_batches: compute a batch in so many parts, one after the other, with one update: less
            memory. BatchNorm sees a part at a time.
        depth_devices: devices that share the slices of one volume; the others split the batch.
        epochs: at most.
        save_steps: write a checkpoint every so many steps too; 0: after each epoch only.
        patience: stop after so many epochs without a lower validation loss.
        workers: data-loading processes; 0 loads in threads of the training process.
        seed: of the initial weights, the order of the data and the augmentation.
        weights: start from this file (.pth, .safetensors), of a whole model, or of a ResNet as in
            torchvision for the backbone, with the rest at random. Not needed to resume.
        permute_labels: train on findings that are shuffled between patients, by `seed`: a check of
            maps, which should look like nothing then (`hirescam compare`). The validation keeps its
            own, and its loss hardly falls: give `patience` as many epochs as you train, and compare
            the latest checkpoint.
    """

    model: AxialNet | Conv3DNet | BodyConv | CTNet = AxialNet()
    data: PhantomData | StoreData = PhantomData()
    preprocess: Preprocess = Preprocess()
    optimizer: SGD | Adam = SGD()
    labels: tuple[str, ...] = ()
    mask_weight: float = 1 / 3
    batch_size: int = 1
    micro_batches: int = 1
    depth_devices: int = 1
    epochs: int = 100
    save_steps: int = 0
    patience: int = 15
    workers: int = 0
    seed: int = 0
    weights: str = ""
    permute_labels: bool = False


def measured_alike(config: Config) -> Config:
    """For runs that are measured in the same way, however the masks of their mask loss were made:
    nearest and undilated ones."""
    data = dataclasses.replace(config.data, mask_method="nearest", dilate=False)
    return dataclasses.replace(config, data=data)


def wherever_trained(config: Config) -> Config:
    """Without what tells where and how often a run is computed and saved, not what comes out."""
    return dataclasses.replace(config, workers=0, depth_devices=1, save_steps=0)


def load_config(path: Path) -> Config:
    """Runs a config file and returns its `config`.

    Raises:
        UserError: no such file, Python errors in it (a misspelt field with the nearest valid
            name), no `config` in it, or a value of the wrong type.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except TypeError as error:
        raise UserError(f"{path}: {error}{_nearest_argument(error)}") from error
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: must define `config = hirescam_jax.config.Config(...)`")
    check_types(config, str(path))
    return config


def check_types(value: Any, where: str, field: str = "config") -> None:
    """Raises UserError for the first field, at any depth, whose value has not the declared type."""
    for spec, hint in _fields(type(value)):
        item, name = getattr(value, spec.name), f"{field}.{spec.name}"
        if dataclasses.is_dataclass(item) and is_bearable(item, hint):
            check_types(item, where, name)
        elif not _fits(item, hint):
            # A network's own text has many lines.
            got = type(item).__name__ if isinstance(item, nn.Module) else repr(item)
            raise UserError(f"{where}: {name} must be {_spell(hint)}, got {got}")


def check_sizes(config: Config) -> None:
    """Raises UserError for a number that no training can have."""
    least_of = {"batch_size": 1, "micro_batches": 1, "epochs": 1, "save_steps": 0}
    for name, least in least_of.items():
        if getattr(config, name) < least:
            raise UserError(f"config.{name} must be at least {least}, got {getattr(config, name)}")


def to_json(config: Config) -> str:
    """The config as indented JSON; a union's member is named by `type`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            items = {
                spec.name: plain(getattr(value, spec.name)) for spec, _ in _fields(type(value))
            }
            return {"type": type(value).__name__, **items}
        return list(value) if isinstance(value, tuple) else value

    return json.dumps(plain(config), indent=2)


def from_json(text: str, where: str) -> Config:
    """The inverse of `to_json`. `where` names the file in errors (UserError)."""

    def build(value: Any, hint: Any, field: str) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if not isinstance(value, dict):
            return value
        members = {member.__name__: member for member in _members(hint)}
        kind = members.get(value.get("type", ""))
        if kind is None:
            raise UserError(f"{where}: {field}.type must be one of {', '.join(members)}")
        hints = {spec.name: hint for spec, hint in _fields(kind)}
        for name in value:
            if name != "type" and name not in hints:
                raise UserError(f"{where}: unknown field {field}.{name}{nearest(name, hints)}")
        kwargs = {n: build(v, hints[n], f"{field}.{n}") for n, v in value.items() if n != "type"}
        try:
            return kind(**kwargs)
        except TypeError as error:
            raise UserError(f"{where}: {field}: {error}") from error

    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    config = build(data, Config, "config")
    if not isinstance(config, Config):
        raise UserError(f"{where}: holds no config")
    check_types(config, where)
    return config


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)', or the list of valid names where none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (one of: {', '.join(names)})"


def _fields(kind: type) -> list[tuple[dataclasses.Field, Any]]:
    """Fields with their resolved types; a Linen module's own `parent` and `name` are left out."""
    hints = typing.get_type_hints(kind)
    hidden = {"parent", "name"} if issubclass(kind, nn.Module) else set()
    return [(f, hints[f.name]) for f in dataclasses.fields(kind) if f.name not in hidden]


def _fits(item: Any, hint: Any) -> bool:
    if isinstance(item, bool) and hint in (int, float):
        return False
    if isinstance(item, tuple) and typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(item)
        return len(item) == len(kinds) and all(map(_fits, item, kinds))
    return is_bearable(item, hint) or (hint is float and isinstance(item, int))


def _members(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(member.__name__ for member in _members(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _nearest_argument(error: TypeError) -> str:
    """For "X.__init__() got an unexpected keyword argument 'y'": the name that was meant."""
    parts = str(error).split("'")
    if "unexpected keyword argument" not in str(error) or len(parts) < 2:
        return ""
    owner = str(error).split(".")[0]
    kinds = [k for k in vars(inspect.getmodule(load_config)).values() if isinstance(k, type)]
    for kind in kinds:
        if kind.__name__ == owner and dataclasses.is_dataclass(kind):
            return nearest(parts[1], [spec.name for spec, _ in _fields(kind)])
    return ""
