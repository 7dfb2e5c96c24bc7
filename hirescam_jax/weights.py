"""Weights of PyTorch networks, both ways and without loss (`torch_names` tells whose names)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.models import ResNetClassifier
from hirescam_jax.torch_names import Slot, resnet_layer, slots_of, tensor_name

COUNTER = "num_batches_tracked"  # of BatchNorm; without use at PyTorch's default momentum
# Where training scripts keep the state dict among other things; the authors' is "params".
WRAPPERS = ("params", "state_dict", "model_state_dict", "model")
SUFFIXES = (".pth", ".pt", ".safetensors")
Tensors = dict[str, np.ndarray]


def from_torch(
    model: Any, state_dict: Mapping[str, Any], shape: tuple[int, ...], where: str = "state dict"
) -> dict[str, Any]:
    """A state dict of PyTorch -> the variables {"params": ..., "batch_stats": ...} of `model`.

    Args:
        model: a network of `hirescam_jax.models`.
        state_dict: tensors or arrays by name; also inside a checkpoint under "params" or
            "state_dict", and with DataParallel's "module." before each name.
        shape: (D, H, W) of the volumes, or (H, W) of the images, that the model is for.
        where: names the source in errors.

    Raises:
        UserError: tensors that are missing, not of this model, or of another shape.
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
    leaves = flatten_dict({name: dict(tree) for name, tree in variables.items()})
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
        tensors[name] = np.ascontiguousarray(slot.to_torch(np.asarray(leaves[slot.path])))
        if name.endswith("running_var"):
            tensors[name.replace("running_var", COUNTER)] = np.zeros((), np.int64)
    return tensors


def start_weights(
    path: str, model: Any, shape: tuple[int, ...]
) -> tuple[dict[str, Any], str]:
    """What a training starts from: all variables of `model`, or, from torchvision's ResNet, those
    of its backbone; and a line that says which.

    Raises:
        UserError: as `read_weights` and `from_torch`.
    """
    tensors = read_weights(Path(path))
    if isinstance(model, ResNetClassifier) or not _is_torchvision_resnet(tensors):
        variables = from_torch(model, tensors, shape, path)
        return variables, f"{path}: starts the whole {type(model).__name__}"
    slots = {
        tensor_name(resnet_layer(slot.path[2:-1]), slot.path[-1]): slot
        for slot in slots_of(model, shape).values()
        if slot.path[1] == "resnet"
    }
    if not slots:
        raise UserError(f"{path}: torchvision's ResNet, of which {type(model).__name__} has no part")
    left = {name: tensors[name] for name in tensors if name.startswith("fc.")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    _check(f"{type(model).__name__}'s ResNet", slots, tensors, path)
    out = f"; its {' and '.join(map(_described, left.items()))} are left out" if left else ""
    line = f"{path}: torchvision's ResNet, starts the backbone{out}; the rest starts at random"
    return _variables(slots, tensors), line


# -- files ----------------------------------------------------------------------------------------


def read_weights(path: Path) -> Tensors:
    """The tensors of a .safetensors file, or of one that `torch.save` wrote (.pth, .pt, or none of
    these names), as float32 arrays; what stands beside a state dict in it is left out.

    Raises:
        UserError: no such file, a damaged one, one that holds Python objects (never run here), or
            PyTorch is needed and missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    return plain_tensors(read(path), str(path))


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as safetensors ({_line(error)})") from error


def _read_torch(path: Path) -> Any:
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds for damaged files
        reason = _line(error)
        if "weights_only" in reason or "Weights only" in reason:
            reason = "it holds other Python objects than tensors: save the model's state_dict()"
        raise UserError(f"{path}: not readable as PyTorch weights ({reason})") from error


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], key: str = "") -> None:
    """Writes a .safetensors, .pth or .pt file, whole or not at all; one that exists is replaced.

    Args:
        key: .pth and .pt: put the state dict under this name, as the authors' code has it
            ("params").

    Raises:
        UserError: another suffix, PyTorch is missing, a full disk.
    """
    check_suffix(path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        content = save(dict(tensors))
    else:
        import io

        torch = _torch(path)
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


def _torch(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path}: this format needs PyTorch: pip install 'hirescam_jax[torch]', or use a "
            ".safetensors file"
        ) from error
    return torch


def plain_tensors(state_dict: Mapping[str, Any], where: str) -> Tensors:
    """The float32 arrays in a state dict or a checkpoint around one, by their names without
    DataParallel's prefix; without BatchNorm's counters.

    Raises:
        UserError: something in it is no tensor.
    """
    if isinstance(state_dict, Mapping):
        inner = [state_dict[name] for name in WRAPPERS if isinstance(state_dict.get(name), Mapping)]
        state_dict = inner[0] if inner else state_dict
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise UserError(f"{where}: holds no state dict (tensors by name)")
    prefix = "module." if all(str(name).startswith("module.") for name in state_dict) else ""
    tensors = {}
    for name, value in state_dict.items():
        name = str(name).removeprefix(prefix)
        if name.endswith(COUNTER):
            continue
        if hasattr(value, "detach"):  # a tensor of PyTorch
            value = value.detach().cpu().float().numpy()
        array = np.asarray(value)
        if not jnp.issubdtype(array.dtype, jnp.number):
            raise UserError(f"{where}: '{name}' is no tensor: give the state dict alone")
        tensors[name] = array.astype(np.float32)
    return tensors


# -- checks ---------------------------------------------------------------------------------------


def _variables(slots: dict[str, Slot], tensors: Tensors) -> dict[str, Any]:
    flat = {slot.path: slot.from_torch(tensors[name]) for name, slot in slots.items()}
    return jax.tree.map(jnp.asarray, unflatten_dict(flat))


def _is_torchvision_resnet(tensors: Iterable[str]) -> bool:
    return {"conv1.weight", "layer1.0.conv1.weight"} <= set(tensors)


# A tensor that tells whose weights they are; the first that is there.
SIGNS = (
    ("layer1.0.conv1.weight", "torchvision's ResNet"),
    ("features.denseblock1.denselayer1.conv1.weight", "torchvision's DenseNet"),
    ("features.1.conv.0.0.weight", "torchvision's MobileNetV2"),
    ("conv2d.0.weight", "AxialNet"),
    ("reducingconvs.10.weight", "3DConv"),
    ("reducingconvs.0.weight", "BodyConv or CTNet"),
    ("classifier.6.weight", "torchvision's VGG"),
)


def _check(kind: str, slots: dict[str, Slot], tensors: Tensors, where: str) -> None:
    """Raises UserError unless the tensors are those of the slots."""
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
    other = ""
    if 2 * len(missing) > len(shapes):
        looks = [owner for sign, owner in SIGNS if sign in tensors]
        other = " but of another architecture" + (f", as of {looks[0]}" if looks else "")
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


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
