"""Arrays out of .npz files of unknown origin: checked before they are read."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from hirescam_jax.errors import UserError

# What a zip archive raises when it is truncated, damaged, encrypted or packed in an unknown way.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    SyntaxError,
    RuntimeError,
    MemoryError,
)


def read_npz(path: Path, key: str, max_bytes: int) -> np.ndarray:
    """One array of a .npz file.

    What it declares is checked against `max_bytes` before anything is decompressed, and nothing
    is ever unpickled.

    Raises:
        UserError: one line, for a file that is missing, truncated, damaged or too big, has no
            such array, or has one of Python objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if key not in names:
                found = ", ".join(names[:5]) or "nothing"
                raise UserError(
                    f"{path}: no array '{key}' (found: {found}): is this the right file?"
                )
            return _read_member(path, key, archive, archive.getinfo(f"{key}.npy"), max_bytes)
    except KeyError as error:
        raise UserError(f"{path}: '{key}' is no .npy array: save it with numpy.savez") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}): check its permissions") from error
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: '{key}' is truncated or damaged ({reason}): download it again"
        ) from error


def _read_member(
    path: Path, key: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int
) -> np.ndarray:
    if info.file_size > max_bytes:
        raise UserError(
            f"{path}: '{key}' unpacks to {info.file_size / 2**30:.1f} GiB, the bound is "
            f"{max_bytes / 2**30:.1f} GiB: is this the right file?"
        )
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise UserError(f"{path}: '{key}' holds Python objects: save it as an array of numbers")
        declared = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or declared != info.file_size - file.tell():
            raise UserError(
                f"{path}: '{key}' declares shape {shape} of {dtype}, {declared} bytes, but holds "
                f"{info.file_size - file.tell()}: download it again"
            )
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
