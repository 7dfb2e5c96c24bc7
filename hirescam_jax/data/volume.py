"""A volume and its place in the patient: NIfTI files, read, checked and written.

World coordinates are RAS millimetres: x grows to the patient's right, y to the front (anterior),
z to the head (superior).
"""

import contextlib
import dataclasses
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

SPACING_RANGE_MM = (0.1, 30.0)
MAX_BYTES = 2**34  # of voxels: more is a damaged header, or a bomb
DEFLATE_MOST = 1040  # times its size that a gzip file can unpack to


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they are.

    voxels: [i, j, k] in the file's own order; integers as stored, or float32 (scaled, if the
        header says so).
    affine: [4, 4] float64, voxel index (i, j, k, 1) -> RAS millimetres.
    path: the file it came from, for messages.
    header: the file's header, if any: maps written on this grid keep its forms and units.
    """

    voxels: Shaped[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]
    path: Path
    header: nibabel.Nifti1Header | None = None


def open_nifti(path: Path) -> nibabel.Nifti1Image:
    """Opens a NIfTI file and checks all that can be known without its voxels.

    Raises:
        UserError: one line, for a file that is missing, no 3D NIfTI volume of real numbers, or
            that does not say where its voxels are.
    """
    _check_file(path)
    try:
        with _quiet_nibabel():
            image = nibabel.load(path, mmap=False)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable NIfTI file ({_first_line(error)}): copy the file again, or "
            "convert the scan with dcm2niix"
        ) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: not a NIfTI file: convert the scan with dcm2niix")
    dtype = np.dtype(image.get_data_dtype())
    if dtype.kind not in "iuf":
        kind = "complex" if dtype.kind == "c" else "colour" if dtype.names else str(dtype)
        raise UserError(f"{path}: datatype is {kind}: give the CT as integers or floats")
    _check_shape(path, image.shape)
    _check_affine(path, image)
    return image


@contextlib.contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """nibabel mends small mistakes of a header and logs them; what matters is an error here."""
    logger = imageglobals.logger
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def read_nifti(path: Path) -> Volume:
    """Reads a 3D NIfTI file of any orientation, spacing and real dtype.

    The header's scl_slope and scl_inter are applied. A fourth axis of length 1 is dropped.

    Raises:
        UserError: as `open_nifti`; also for a truncated file and for NaN or infinite voxels.
    """
    image = open_nifti(path)
    _check_size(path, image.shape, np.dtype(image.get_data_dtype()).itemsize)
    stored: Any = image.dataobj
    try:
        scaled = stored.slope != 1 or stored.inter != 0
        voxels = np.asarray(stored, np.float32 if scaled else None)
    except MemoryError as error:
        size = "x".join(map(str, image.shape))
        raise UserError(
            f"{path}: its {size} voxels need more memory than there is: use fewer processes, or "
            "cut the volume"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path}: truncated or damaged, the voxels end early ({_first_line(error)}): "
            "copy the file again"
        ) from error
    native = np.dtype(np.float32) if voxels.dtype.kind == "f" else voxels.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # what is too big for float32 becomes inf, refused below
        voxels = voxels.reshape(voxels.shape[:3]).astype(native, copy=False)
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels)) if native.kind == "f" else 0
    if bad:
        raise UserError(
            f"{path}: {bad} voxels are NaN or infinite: replace them, with -1024 outside the scan"
        )
    return Volume(voxels, np.asarray(image.affine, np.float64), path, image.header)


def read_ct(path: Path) -> Volume:
    """`read_nifti` for a CT: the values must be Hounsfield units.

    Raises:
        UserError: as `read_nifti` and `check_hounsfield`.
    """
    volume = read_nifti(path)
    check_hounsfield(volume)
    return volume


def check_hounsfield(volume: Volume) -> None:
    """Refuses values that cannot be Hounsfield units: there must be air and something denser.

    Raises:
        UserError: one line that says what the values look like and how to mend them.
    """
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    what = f"{volume.path}: voxels are not Hounsfield units, "
    values = f"values {low:g} to {high:g}"
    if low == high:
        raise UserError(f"{what}all are {low:g}: is this the CT?")
    if low >= -1 and high <= 1:
        raise UserError(f"{what}{values} look normalised: give the CT before any scaling")
    if low >= 0 and high <= 255:
        raise UserError(f"{what}{values} look like an 8-bit picture or a mask: give the CT itself")
    if low >= 0 and 1000 <= high < 2**16:
        raise UserError(f"{what}{values} look shifted: subtract 1024 or set scl_inter to -1024")
    if low > -300 or not 0 <= high <= 2**15:
        raise UserError(f"{what}{values}: expected air near -1000 and bone or metal below 32768")


def write_nifti(
    path: Path,
    values: Float[np.ndarray, "i j k"],
    affine: Float[np.ndarray, "4 4"],
    like: nibabel.Nifti1Header | None = None,
    *,
    same_grid: bool = False,
) -> None:
    """Writes a float32 NIfTI file, whole or not at all.

    Args:
        path: .nii or .nii.gz
        values: [i, j, k]
        affine: indices -> RAS millimetres.
        like: the header of the input: its units and the codes of its sform and qform are kept.
        same_grid: the values lie on the grid of `like`: its forms are kept to the bit.

    Raises:
        UserError: the file cannot be written; no part of it is left.
    """
    image = nibabel.Nifti1Image(np.asarray(values, np.float32), affine)
    header = image.header
    header["xyzt_units"] = 2 if like is None else like["xyzt_units"]  # 2: millimetres
    if like is None:
        header.set_sform(affine, code="scanner")
        header.set_qform(affine, code="scanner")
    elif same_grid:
        for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b"):
            header[field] = like[field]
        for field in ("quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[field] = like[field]
        header["pixdim"][:4] = like["pixdim"][:4]
    else:
        header.set_sform(affine, code=int(like["sform_code"]) or int(like["qform_code"]))
        header.set_qform(affine, code=int(like["qform_code"]))
    with atomic_file(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(image.dataobj, None, header), temporary)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give a .nii or .nii.gz file")
    if not path.exists():
        raise UserError(f"{path}: no such file: check the path")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: not named .nii or .nii.gz: convert the scan with dcm2niix")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it: change its mode or owner")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty: copy it again")


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    text = "x".join(map(str, shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        fix = "choose one volume of the series" if len(shape) > 3 else "give the whole volume"
        raise UserError(f"{path}: has {len(shape)} axes (dim {text}), a CT has 3: {fix}")
    if min(shape) < 2:
        raise UserError(f"{path}: has only one slice (dim {text}): give the whole volume")


def _check_size(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """That the voxels which the header declares can be in the file, before any is read."""
    declared, held = itemsize * math.prod(map(int, shape)), path.stat().st_size
    text = f"dim {'x'.join(map(str, shape))} makes {declared} bytes of voxels"
    if declared > MAX_BYTES:
        raise UserError(f"{path}: {text}, at most {MAX_BYTES} are read: is this one CT?")
    if declared > held * (DEFLATE_MOST if path.name.lower().endswith(".gz") else 1):
        raise UserError(
            f"{path}: truncated or damaged, {text}, more than its {held} bytes can hold: copy the "
            "file again"
        )


def _check_affine(path: Path, image: nibabel.Nifti1Image) -> None:
    with _quiet_nibabel(), ImageOpener(str(path)) as file:
        # As stored: nibabel replaces a spacing of 0 by 1 mm, which would be a guess.
        spacing = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    affine = np.asarray(image.affine, np.float64)
    sform_code, qform_code = (int(image.header[name]) for name in ("sform_code", "qform_code"))
    if sform_code <= 0 and qform_code <= 0:
        raise UserError(
            f"{path}: sform_code and qform_code are both 0, so nobody knows left from right: "
            "convert the scan again with dcm2niix"
        )
    form = "sform" if sform_code > 0 else "qform"
    if form == "qform" and not np.all(spacing):
        raise UserError(f"{path}: pixdim gives a spacing of 0 mm: convert it again with dcm2niix")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    volume = abs(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0
    if not volume > 1e-3 * np.prod(spacing):
        raise UserError(
            f"{path}: {form} is degenerate (not invertible): convert the scan again with dcm2niix"
        )
    low, high = SPACING_RANGE_MM
    if spacing.min() < low or spacing.max() > high:
        sizes = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(
            f"{path}: {form} gives voxels of {sizes} mm, a chest CT has {low:g} to {high:g} mm: "
            "correct the header (units in millimetres)"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
