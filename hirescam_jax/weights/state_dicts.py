"""The state dicts in files of PyTorch and safetensors, as plain float32 arrays by name."""

import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hirescam_jax.errors import UserError
from hirescam_jax.weights.names import current_name

COUNTER = "num_batches_tracked"  # of BatchNorm; without use at PyTorch's default momentum
# Where training scripts keep the state dict among other things; the authors' is "params".
WRAPPERS = ("params", "state_dict", "model_state_dict", "model")
# What DataParallel, PyTorch Lightning and torch.compile write before all names.
PREFIXES = ("module.", "model.", "_orig_mod.")
FLOATS = ("float16", "bfloat16", "float32", "float64")
TORCHVISION_FILE = re.compile(
    r"(?:resnet\d+|densenet\d+|vgg\d+(?:_bn)?|mobilenet_v2)-([0-9a-f]{8})\.pth"
)
Tensors = dict[str, np.ndarray]


def load(path: Path) -> Any:
    """What a .safetensors file, or one of `torch.save`, holds: tensors by name, or what is around.

    Raises:
        UserError: a damaged file, one that holds Python objects (whose code is not run), types that
            NumPy has not, or PyTorch is needed and missing.
    """
    return (_load_safetensors if path.suffix == ".safetensors" else _load_torch)(path)


def _load_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, kind in kinds.items():
            if kind.startswith(("F8_", "F6_", "F4")):  # which NumPy has not
                raise _no_floats(str(path), name, kind)
        return load_file(path)
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not readable as safetensors: damaged or truncated ({_line(error)})"
        ) from error


def _load_torch(path: Path) -> Any:
    torch = need_torch(path)
    unreadable = f"{path}: not readable as PyTorch weights"
    if problem := _problem_of_archive(path) or _problem_of_name(path):
        raise UserError(f"{unreadable}: {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles; what matters is raised too
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # PyTorch raises many kinds for damaged files
        reason = "damaged or truncated, or not written by torch.save"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (
                f"it holds other Python objects than tensors ({found[1]}): save the model's "
                "state_dict()"
            )
        raise UserError(f"{unreadable}: {reason}") from error


def _problem_of_archive(path: Path) -> str:
    """What is wrong with a file of the newer format; PyTorch does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "it is TorchScript: save the model's state_dict()"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        if not zipfile.is_zipfile(path):
            return ""
        return "damaged or truncated"
    return f"damaged: the checksum of its part '{damaged}' is wrong" if damaged else ""


def _problem_of_name(path: Path) -> str:
    """torchvision's files carry the start of their own hash in their name."""
    found = TORCHVISION_FILE.fullmatch(path.name)
    if not found or not path.is_file():
        return ""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(found[1]):
        return ""
    return f"damaged, or not the file of this name: its SHA-256 starts with {digest[:8]}"


def need_torch(path: Path) -> Any:
    """PyTorch; raises UserError, which names the file, where it is missing."""
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
    `PREFIXES`; without BatchNorm's counters.

    Raises:
        UserError: something in it is no tensor of floating-point numbers, holds NaN or infinite
            ones, or is a negative variance.
    """
    named = _state_dict(state_dict, where)

    def counts(name: str) -> bool:
        # One without statistics is no BatchNorm's: it stays, to be named as unknown.
        return name.endswith(COUNTER) and name.replace(COUNTER, "running_var") in named

    return {name: _plain(where, name, named[name]) for name in named if not counts(name)}


def _state_dict(found: Any, where: str) -> dict[str, Any]:
    """The state dict in a checkpoint, by torchvision's names of today."""
    if isinstance(found, Mapping):
        inner = [found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        found = next(filter(None, inner), inner[0] if inner else found)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{where}: holds no state dict (tensors by name)")
    named = {str(name): value for name, value in found.items()}
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in named)), ""):
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return {current_name(name): value for name, value in named.items()}


def _plain(where: str, name: str, value: Any) -> np.ndarray:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise UserError(f"{where}: '{name}' is no tensor: give the state dict alone")
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in FLOATS and not name.endswith(COUNTER):
        raise _no_floats(where, name, kind)
    if hasattr(value, "detach"):  # a tensor of PyTorch
        if value.is_meta:
            raise UserError(f"{where}: '{name}' is on the meta device, without data: load it first")
        if str(value.layout) != "torch.strided":
            raise UserError(f"{where}: '{name}' is sparse: save what its to_dense() gives")
        value = value.detach().cpu().float().numpy()
    with np.errstate(over="ignore"):
        array = np.asarray(value).astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{where}: '{name}' holds NaN, or what is infinite in float32")
    if name.endswith(("running_var", "/var")) and (array < 0).any():
        raise UserError(f"{where}: '{name}' is negative ({array.min():g}), but is a variance")
    return array


def _no_floats(where: str, name: str, kind: str) -> UserError:
    return UserError(f"{where}: '{name}' has numbers of type {kind}, not of {', '.join(FLOATS)}")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
