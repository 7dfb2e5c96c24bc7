"""Weights of PyTorch networks, both ways (`torch_names` tells whose names), and their files.

Here they are float32: from there float16 and bfloat16 come without loss, float64 rounded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.weights.names import (
    IMAGE_NETWORKS,
    Slot,
    owner_of,
    resnet_layer,
    slots_of,
    tensor_name,
)
from hirescam_jax.weights.state_dicts import COUNTER, Tensors, load, need_torch, plain_tensors

CLASSIFIERS = ("fc.", "classifier.")  # what begins the names of torchvision's last layers
SUFFIXES = (".pth", ".pt", ".safetensors")


def from_torch(
    model: Any, state_dict: Mapping[str, Any], shape: tuple[int, ...], where: str = "state dict"
) -> dict[str, Any]:
    """A state dict of PyTorch -> the variables {"params": ..., "batch_stats": ...} of `model`.

    Args:
        model: a network of `hirescam_jax.models`.
        state_dict: tensors or arrays by name; also inside a checkpoint under "params" or
            "state_dict", and with "module." (DataParallel) or "model." (PyTorch Lightning) before
            each name.
        shape: (D, H, W) of the volumes, or (H, W) of the images, that the model is for.
        where: names the source in errors.

    Raises:
        UserError: tensors that are missing, not of this model, of another shape, or refused by
            `plain_tensors`.
        ValueError: a `shape` that the model cannot take.
    """
    slots = slots_of(model, shape)
    tensors = plain_tensors(state_dict, where)
    _check(type(model).__name__, slots, tensors, where)
    return _variables(slots, tensors)


def to_torch(model: Any, variables: Mapping[str, Any], shape: tuple[int, ...]) -> Tensors:
    """The inverse of `from_torch`: a state dict for `load_state_dict` (as NumPy arrays, float32).

    BatchNorm's counters `num_batches_tracked` are 0.

    Raises:
        ValueError: variables of another model or for another `shape`.
    """
    slots = slots_of(model, shape)
    leaves = _leaves(variables)
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    wanted = {slot.path: slot.shape for slot in slots.values()}
    for path in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(path) != shapes.get(path):
            raise ValueError(
                f"{'/'.join(path)} has shape {shapes.get(path)}, {type(model).__name__} for "
                f"{shape} needs {wanted.get(path)}"
            )
    tensors: Tensors = {}
    for name, slot in slots.items():
        array = np.asarray(leaves[slot.path], np.float32)
        tensors[name] = np.ascontiguousarray(slot.to_torch(array))
        if name.endswith("running_var"):
            tensors[name.replace("running_var", COUNTER)] = np.zeros((), np.int64)
    return tensors


def start_weights(
    path: str | Path, model: Any, shape: tuple[int, ...], backbone: bool = False
) -> tuple[dict[str, Any], str]:
    """What a training starts from: all variables of `model`, or those of its backbone, and a line
    that says which. What is not among them keeps its initial values.

    Args:
        backbone: leave out the file's classifier, whose labels are other ones. From torchvision's
            ResNet a network for volumes takes the backbone in any case.

    Raises:
        UserError: as `read_weights` and `from_torch`.
    """
    kind, tensors = type(model).__name__, read_weights(path)
    images = isinstance(model, IMAGE_NETWORKS)
    if not backbone and (images or owner_of(tensors) != "torchvision's ResNet"):
        return from_torch(model, tensors, shape, str(path)), f"{path}: starts the whole {kind}"
    slots = _backbone(model, shape)
    if not slots:
        raise UserError(f"{path}: starts a ResNet, which {kind} has not")
    left = {name: tensors[name] for name in tensors if name.startswith(CLASSIFIERS)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    _check(f"{kind}'s backbone", slots, tensors, str(path))
    out = f"; its {' and '.join(map(_described, left.items()))} are left out" if left else ""
    line = f"{path}: starts the backbone of {kind}{out}; the rest starts at random"
    return _variables(slots, tensors), line


def _backbone(model: Any, shape: tuple[int, ...]) -> dict[str, Slot]:
    """The tensors before the classifier, by torchvision's names; none where it has no such part."""
    slots = slots_of(model, shape)
    if isinstance(model, IMAGE_NETWORKS):
        return {name: slot for name, slot in slots.items() if not name.startswith(CLASSIFIERS)}
    return {
        tensor_name(resnet_layer(slot.path[2:-1]), slot.path[-1]): slot
        for slot in slots.values()
        if slot.path[1] == "resnet"
    }


# -- files ----------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> Tensors:
    """The tensors of a .safetensors file, or of one that `torch.save` wrote (.pth, .pt, or none of
    these names), as float32 arrays; what stands beside a state dict in it is left out.

    Raises:
        UserError: no such file, a damaged one, one that holds Python objects (whose code is not
            run), tensors refused by `plain_tensors`, or PyTorch is needed and missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    return plain_tensors(load(path), str(path))


def write_weights(path: str | Path, tensors: Mapping[str, np.ndarray], key: str = "") -> None:
    """Writes a .safetensors, .pth or .pt file, whole or not at all; one that exists is replaced.

    Args:
        tensors: bfloat16 is written as float32.
        key: .pth and .pt: put the state dict under this name, as the authors' code has it
            ("params").

    Raises:
        UserError: another suffix, PyTorch is missing, a full disk.
    """
    path = Path(path)
    check_suffix(path)
    tensors = {
        name: np.asarray(array, np.float32 if array.dtype.name == "bfloat16" else None, order="C")
        for name, array in tensors.items()
    }
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        content = save(tensors)
    else:
        import io

        torch = need_torch(path)
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        buffer = io.BytesIO()
        torch.save({key: state} if key else state, buffer)
        content = buffer.getvalue()
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def check_suffix(path: Path) -> None:
    """Raises UserError for a name that says no format of weights."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are written as one of {', '.join(SUFFIXES)}")


# -- Flax variables -------------------------------------------------------------------------------


def write_variables(path: str | Path, variables: Mapping[str, Any]) -> int:
    """Writes variables {"params": ..., "batch_stats": ...} as a .safetensors file: each array, in
    its own order of axes, under its path, such as "params/resnet/conv1/kernel".

    Returns:
        The number of arrays.

    Raises:
        UserError: another suffix, a full disk.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: Flax variables are written as .safetensors")
    arrays = {"/".join(place): np.asarray(leaf) for place, leaf in _leaves(variables).items()}
    write_weights(path, arrays)
    return len(arrays)


def read_variables(path: str | Path) -> dict[str, Any]:
    """The variables, float32, in a file of `write_variables`.

    Raises:
        UserError: as `read_weights`; a file with PyTorch's names.
    """
    tensors = read_weights(path)
    if not holds_variables(tensors):
        raise UserError(
            f"{path}: holds no Flax variables but '{next(iter(tensors))}': make them by "
            "`hirescam convert`, or take read_weights and from_torch"
        )
    return as_variables(tensors)


def holds_variables(tensors: Tensors) -> bool:
    """Whether the names are those of `write_variables`."""
    return any(name.startswith("params/") for name in tensors)


def as_variables(tensors: Tensors) -> dict[str, Any]:
    """The variables in the tensors of `read_weights` from a file of `write_variables`."""
    return jax.tree.map(jnp.asarray, unflatten_dict(tensors, sep="/"))


def _leaves(variables: Mapping[str, Any]) -> Any:
    return flatten_dict({name: dict(tree) for name, tree in variables.items()})


# -- checks ---------------------------------------------------------------------------------------


def _variables(slots: dict[str, Slot], tensors: Tensors) -> dict[str, Any]:
    flat = {slot.path: slot.from_torch(tensors[name]) for name, slot in slots.items()}
    return jax.tree.map(jnp.asarray, unflatten_dict(flat))


def _check(kind: str, slots: dict[str, Slot], tensors: Tensors, where: str) -> None:
    """Raises UserError unless the tensors are those of the slots."""
    if holds_variables(tensors):
        raise UserError(f"{where}: holds Flax variables: use read_variables, or convert it back")
    shapes = {name: slot.torch_shape for name, slot in slots.items()}
    missing = [(name, shape) for name, shape in shapes.items() if name not in tensors]
    extra = [(name, tensor) for name, tensor in tensors.items() if name not in shapes]
    wrong = [
        f"{name} has shape {tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if not (missing or extra or wrong):
        return
    other, owner = "", owner_of(tensors)
    if owner and owner != owner_of(shapes) and kind not in owner:
        other = f" but of another architecture, {owner}"
    elif 2 * len(missing) > len(shapes):
        other = " but of another architecture"
    parts = [
        _first_of("missing", [_described(item) for item in missing]),
        _first_of("not known", [_described(item) for item in extra]),
        _first_of("", wrong),
    ]
    raise UserError(f"{where}: not weights of {kind}{other}: {'; '.join(filter(None, parts))}")


def _described(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name} {value if isinstance(value, tuple) else value.shape}"


def _first_of(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{title} {', '.join(items[:3])}{more}".strip()
