"""One CT series of DICOM slices, checked slice by slice."""

import collections
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hirescam_jax.data.readers.tables import list_files
from hirescam_jax.data.volume import SPACING_RANGE_MM, Volume, check_hounsfield
from hirescam_jax.errors import UserError

NEEDED = (
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
)
SAME = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")
MAX_TILT_DEGREES = 0.1
MAX_SHEAR = 0.005  # sideways shift over slice spacing: 0.3 degrees
SPACING_TOLERANCE = 0.02  # of the spacing, and a hundredth of a millimetre


def read_dicom_series(folder: Path) -> Volume:
    """The one CT series of a folder, in Hounsfield units.

    voxels [columns, rows, slices], the slices sorted along their normal.

    Raises:
        UserError: one line that names the files, for anything that is not one whole series of
            evenly spaced, parallel, upright slices that can be decoded.
    """
    pydicom = import_pydicom()
    with warnings.catch_warnings():  # on values that break the standard; what matters is checked
        warnings.simplefilter("ignore")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: give the folder of the .dcm files")
        slices = [
            (file, _open(pydicom, file, stop_before_pixels=True))
            for file in list_files(folder)
            if is_dicom(file)
        ]
        if not slices:
            raise UserError(f"{folder}: no DICOM files in it: check the path")
        try:
            _check_one_series(folder, slices)
            order, affine = _geometry(folder, slices)
        except (TypeError, ValueError, AttributeError) as error:  # a tag that is no number
            raise UserError(f"{folder}: a tag cannot be read ({error}): export it again") from error
        voxels = _voxels(pydicom, [slices[i][0] for i in order])
    volume = Volume(voxels, affine, folder)
    check_hounsfield(volume)
    return volume


def _check_one_series(folder: Path, slices: list[tuple[Path, Any]]) -> None:
    scouts = [file for file, head in slices if "LOCALIZER" in tag(head, "ImageType", ())]
    if scouts:
        raise UserError(
            f"{folder}: {len(scouts)} of {len(slices)} files are localizers (scouts), such as "
            f"{scouts[0].name}: move them to another folder"
        )
    for file, head in slices:
        if tag(head, "Modality", "CT") != "CT":
            raise UserError(f"{file}: Modality is {head.Modality}, not CT: move it elsewhere")
    series = collections.Counter(str(tag(head, "SeriesInstanceUID", "")) for _, head in slices)
    if len(series) > 1:
        names = {str(tag(h, "SeriesInstanceUID", "")): f for f, h in reversed(slices)}
        some = ", ".join(f"{n} files like {names[uid].name}" for uid, n in series.most_common(3))
        raise UserError(
            f"{folder}: mixes {len(series)} series ({some}): give each SeriesInstanceUID a folder"
        )
    for file, head in slices:
        if int(tag(head, "NumberOfFrames", 1)) > 1:
            raise UserError(f"{file}: is a multi-frame file: convert the scan with dcm2niix")
        for name in NEEDED:
            if tag(head, name, None) is None:
                raise UserError(f"{file}: has no {name}: export the series again, with all tags")
        for name in SAME:
            first, other = (np.array(h[name].value, float) for h in (slices[0][1], head))
            if first.shape != other.shape or np.abs(first - other).max() > 1e-4:
                raise UserError(
                    f"{file}: {name} is {other.tolist()}, in {slices[0][0].name} it is "
                    f"{first.tolist()}: move the odd files elsewhere"
                )
    if len(slices) < 2:
        raise UserError(f"{folder}: has only one slice, {slices[0][0].name}: copy the whole series")


def _geometry(folder: Path, slices: list[tuple[Path, Any]]) -> tuple[list[int], np.ndarray]:
    """The order of the slices along their normal, and [4, 4] indices -> RAS millimetres."""
    head = slices[0][1]
    tilts = [abs(float(tag(h, "GantryDetectorTilt", 0) or 0)) for _, h in slices]
    if max(tilts) > MAX_TILT_DEGREES:
        raise UserError(
            f"{folder}: the gantry is tilted, GantryDetectorTilt is {max(tilts):g} degrees: "
            "straighten it with dcm2niix"
        )
    along_row, along_column = np.array(head.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise UserError(f"{folder}: ImageOrientationPatient is no pair of directions")
    positions = np.array([np.array(h.ImagePositionPatient, float) for _, h in slices])
    if not np.isfinite(positions).all():
        raise UserError(f"{folder}: an ImagePositionPatient is not finite: export it again")
    depths = positions @ normal
    order = np.argsort(depths, kind="stable").tolist()
    names = [slices[i][0].name for i in order]
    steps = np.diff(depths[order])
    if (same := np.flatnonzero(steps < 1e-3)).size:
        i = int(same[0])
        raise UserError(
            f"{folder}: duplicate slices, {names[i]} and {names[i + 1]} are at the same place "
            f"({same.size} in all): remove the copies, or split the phases"
        )
    spacing = float(np.median(steps))
    tolerance = SPACING_TOLERANCE * spacing + 0.01
    if (odd := np.flatnonzero(np.abs(steps - spacing) > tolerance)).size:
        i = int(odd[0])
        gap = f"{steps[i]:g} mm between {names[i]} and {names[i + 1]}, else {spacing:g} mm"
        multiple = np.abs(steps / spacing - np.round(steps / spacing)) * spacing
        if (multiple < tolerance * np.round(steps / spacing)).all():
            lost = int((np.round(steps / spacing) - 1).sum())
            raise UserError(f"{folder}: {lost} slices are missing ({gap}): copy the series again")
        raise UserError(f"{folder}: unequal slice spacing ({gap}): resample it with dcm2niix")
    step = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
    shear = np.linalg.norm(step - normal * (step @ normal)) / spacing
    if shear > MAX_SHEAR:
        angle = np.degrees(np.arctan(shear))
        raise UserError(
            f"{folder}: the slices shift sideways, as of a gantry tilted by {angle:.1f} degrees: "
            "straighten it with dcm2niix"
        )
    row_step, column_step = (float(size) for size in head.PixelSpacing)
    low, high = SPACING_RANGE_MM
    if not all(low <= size <= high for size in (row_step, column_step, spacing)):
        sizes = f"{column_step:g} x {row_step:g} x {spacing:g}"
        raise UserError(f"{folder}: PixelSpacing and slice spacing give voxels of {sizes} mm")
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_step
    affine[:3, 1] = along_column * row_step
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    affine[:2] *= -1  # DICOM's LPS to RAS
    return order, affine + 0.0


def _voxels(pydicom: Any, files: list[Path]) -> np.ndarray:
    """[columns, rows, slices]; int16 where slope and intercept leave whole numbers."""
    planes = []
    for file in files:
        image = _open(pydicom, file)
        syntax = getattr(image.file_meta, "TransferSyntaxUID", None)
        try:
            stored = image.pixel_array
        except Exception as error:  # every decoder has errors of its own
            name = getattr(syntax, "name", syntax)
            if syntax is not None and syntax.is_compressed:
                raise UserError(
                    f"{file}: compressed as {name}, which cannot be decoded here: pip install "
                    "pylibjpeg[all], or decompress the series with gdcmconv --raw"
                ) from error
            raise UserError(
                f"{file}: its voxels cannot be read ({_first_line(error)}): copy it again"
            ) from error
        if stored.ndim != 2:
            raise UserError(f"{file}: has shape {stored.shape}, not one grey slice: not a CT?")
        slope, intercept = float(image.RescaleSlope), float(image.RescaleIntercept)
        if not np.isfinite([slope, intercept]).all():
            raise UserError(f"{file}: RescaleSlope or RescaleIntercept is not finite: export again")
        plane = stored * np.float64(slope) + np.float64(intercept)
        whole = slope.is_integer() and intercept.is_integer()
        fits = whole and plane.min() >= -(2**15) and plane.max() < 2**15
        planes.append(plane.astype(np.int16 if fits else np.float32))
    return np.stack(planes).transpose(2, 1, 0)


def _open(pydicom: Any, file: Path, **options: Any) -> Any:
    try:
        return pydicom.dcmread(file, **options)
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(
            f"{file}: not a readable DICOM file ({_first_line(error)}): copy it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def import_pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise UserError(
            "DICOM needs the package pydicom: pip install 'hirescam_jax[dicom]'"
        ) from error
    return pydicom


def is_dicom(file: Path) -> bool:
    """Whether it is named .dcm or has DICOM's preamble. The index file DICOMDIR is none."""
    if file.suffix.lower() == ".dcm" or file.name.upper() == "DICOMDIR":
        return file.name.upper() != "DICOMDIR"
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def tag(head: Any, name: str, default: Any) -> Any:
    value = head.get(name)
    return default if value is None or value == "" else value
