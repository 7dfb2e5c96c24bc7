"""Configs as files: Python that builds one `Config`, the JSON of a run; both are checked."""

import dataclasses
import json
import runpy
import types
import typing
from pathlib import Path
from typing import Any

import flax.linen as nn
from beartype.door import is_bearable

from hirescam_jax import config as configs
from hirescam_jax.config import Config
from hirescam_jax.data import specs
from hirescam_jax.errors import UserError, nearest


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
    kinds = [k for module in (configs, specs) for k in vars(module).values() if isinstance(k, type)]
    for kind in kinds:
        if kind.__name__ == owner and dataclasses.is_dataclass(kind):
            return nearest(parts[1], [spec.name for spec, _ in _fields(kind)])
    return ""
