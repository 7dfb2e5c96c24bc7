"""CT-RATE (Hugging Face): .nii.gz volumes, 18 labels, and the metadata that mends the headers."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from hirescam_jax.data.readers.tables import Table, pair, read_table
from hirescam_jax.data.study import ANYWHERE, Reject, Study
from hirescam_jax.data.volume import SPACING_RANGE_MM, Volume, check_hounsfield, read_ct, read_nifti
from hirescam_jax.errors import UserError

_LUNGS = ("right_lung", "left_lung")
_MIDDLE = ("heart_mediastinum",)

# The labels say what, not where: the organs in which each can be. Their order is the tables'.
LABEL_REGIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Medical material": (ANYWHERE,),
        "Arterial wall calcification": _MIDDLE,
        "Cardiomegaly": _MIDDLE,
        "Pericardial effusion": _MIDDLE,
        "Coronary artery wall calcification": _MIDDLE,
        "Hiatal hernia": _MIDDLE,
        "Lymphadenopathy": (ANYWHERE,),  # of the mediastinum, the hila, the armpits
        "Emphysema": _LUNGS,
        "Atelectasis": _LUNGS,
        "Lung nodule": _LUNGS,
        "Lung opacity": _LUNGS,
        "Pulmonary fibrotic sequela": _LUNGS,
        "Pleural effusion": _LUNGS,
        "Mosaic attenuation pattern": _LUNGS,
        "Peribronchial thickening": _LUNGS,
        "Consolidation": _LUNGS,
        "Bronchiectasis": _LUNGS,
        "Interlobular septal thickening": _LUNGS,
    }
)
SPLITS = {"train": "train", "valid": "val"}
TABLES = {
    "train": ("train_predicted_labels.csv", "train_metadata.csv"),
    "valid": ("valid_predicted_labels.csv", "validation_metadata.csv"),
}
SCALE = ("RescaleSlope", "RescaleIntercept")
PLACE = ("XYSpacing", "ZSpacing", "ImagePositionPatient", "ImageOrientationPatient")
SIZE = ("Columns", "Rows", "NumberofSlices")
NAME = re.compile(r"((?:train|valid)_\d+)_[a-z]+_\d+")


class CTRate:
    """CT-RATE as it is published: `dataset/train/train_1/train_1_a/train_1_a_1.nii.gz`, ...

    The data set has a training and a validation part, and no test part. They are given as "train"
    and "val"; set patients of the training part aside if you choose a model on the validation
    part and report on it too. The patient of train_1_a_1 is train_1.

    tree="plain" reads `train` and `valid`. Their files hold stored values and unreliable headers,
    so Hounsfield units, spacing, orientation and origin are built from the metadata tables, as the
    data set's own repair script does: the file's axes are columns, rows and slices, along the two
    directions of ImageOrientationPatient and their cross product, from ImagePositionPatient.
    tree="fixed" reads `train_fixed` and `valid_fixed`, and believes their headers.
    """

    def __init__(
        self,
        path: str | Path,
        tree: Literal["plain", "fixed"] = "plain",
        label_regions: Mapping[str, Sequence[str]] = LABEL_REGIONS,
    ):
        """Opens the data set.

        Args:
            path: the repository, or its folder `dataset`. A part that was not downloaded is
                left out.
            tree: which of the two trees.
            label_regions: label -> the regions where it can be; labels not named keep those of
                LABEL_REGIONS.

        Raises:
            UserError: a folder, table or column is missing; an unknown label.
        """
        path = Path(path)
        if tree not in ("plain", "fixed"):
            raise UserError(f"tree '{tree}' is unknown: choose plain or fixed")
        if unknown := [label for label in label_regions if label not in LABEL_REGIONS]:
            names = ", ".join(LABEL_REGIONS)
            raise UserError(f"label_regions: '{unknown[0]}' is no label of CT-RATE: {names}")
        if any(isinstance(regions, str) for regions in label_regions.values()):
            raise UserError("label_regions: give a list of regions for every label")
        root = path / "dataset" if (path / "dataset").is_dir() else path
        suffix = "_fixed" if tree == "fixed" else ""
        parts = [part for part in SPLITS if (root / f"{part}{suffix}").is_dir()]
        if not parts:
            raise UserError(
                f"{root}: no folder train{suffix} or valid{suffix}: check path and tree"
            )
        self.labels = tuple(LABEL_REGIONS)
        places = {**LABEL_REGIONS, **label_regions}
        named = dict.fromkeys(region for regions in places.values() for region in regions)
        self.regions = (*(r for r in named if r != ANYWHERE), *((ANYWHERE,) * (ANYWHERE in named)))
        allowed = np.zeros((len(self.labels), len(self.regions)), np.uint8)
        for k, label in enumerate(self.labels):
            allowed[k, [self.regions.index(region) for region in places[label]]] = 1

        self.studies: list[Study] = []
        self.rejects: list[Reject] = []
        self._metadata: dict[str, dict[str, str]] | None = {} if tree == "plain" else None
        for part in parts:
            labels, metadata = self._tables(root, part, plain=tree == "plain")
            folder = root / f"{part}{suffix}"
            files = {file.name.removesuffix(".nii.gz"): file for file in _volumes(folder)}
            ids, rejects = pair(labels, files, lambda key, folder=folder: f"{folder}: {key}.nii.gz")
            self.rejects += rejects
            columns = [labels.binary_columns.index(label) for label in self.labels]
            for key in ids:
                patient = NAME.fullmatch(key)
                if not patient:
                    reason = f"{files[key]}: not named train_1_a_1.nii.gz: rename it"
                    self.rejects.append(Reject(key, reason))
                elif metadata and key not in metadata.rows:
                    self.rejects.append(Reject(key, metadata.why_not(key)))
                else:
                    findings = labels.rows[key].binary[columns, None] * allowed
                    split = SPLITS[part]
                    self.studies.append(Study(key, patient[1], split, (files[key],), findings))
                    if metadata and self._metadata is not None:
                        self._metadata[key] = metadata.rows[key].text

    def read(self, study: Study) -> Volume:
        path = study.files[0]
        if self._metadata is None:
            return read_ct(path)
        return _mended(read_nifti(path), self._metadata[study.id])

    def _tables(self, root: Path, part: str, plain: bool) -> tuple[Table, Table | None]:
        label_name, metadata_name = TABLES[part]
        labels = read_table(
            root / "multi_abnormality_labels" / label_name,
            "VolumeName",
            binary=lambda column: column in LABEL_REGIONS,
            id_of=_without_suffix,
        )
        if missing := [label for label in self.labels if label not in labels.binary_columns]:
            raise UserError(f"{labels.path}: no column '{missing[0]}': download it again")
        if not plain:
            return labels, None
        metadata = read_table(
            root / "metadata" / metadata_name,
            "VolumeName",
            needed=(*SCALE, *PLACE),
            optional=SIZE,
            id_of=_without_suffix,
        )
        return labels, metadata


def _volumes(folder: Path) -> list[Path]:
    """<folder>/train_1/train_1_a/*.nii.gz"""
    return sorted(folder.glob("*/*/*.nii.gz"))


def _without_suffix(entry: str) -> str:
    return entry.removesuffix(".nii.gz")


def _mended(volume: Volume, row: Mapping[str, str]) -> Volume:
    """The volume in Hounsfield units and at its place, by its row of the metadata."""
    path = volume.path
    columns, rows, slices = (row.get(name, "") for name in SIZE)
    declared = tuple(int(n) if n.isdigit() else None for n in (columns, rows, slices))
    if any(n not in (None, size) for n, size in zip(declared, volume.voxels.shape, strict=True)):
        raise UserError(
            f"{path}: has shape {volume.voxels.shape}, the metadata say {', '.join(SIZE)} = "
            f"{columns}, {rows}, {slices}: download it again"
        )
    slope, intercept, z = (_numbers(path, row, name, 1)[0] for name in (*SCALE, "ZSpacing"))
    x, y = _numbers(path, row, "XYSpacing", 2)
    low, high = SPACING_RANGE_MM
    if not all(low <= size <= high for size in (x, y, z)):
        raise UserError(
            f"{path}: XYSpacing and ZSpacing give voxels of {x:g} x {y:g} x {z:g} mm, a chest CT "
            f"has {low:g} to {high:g} mm: correct the metadata"
        )
    orientation = _numbers(path, row, "ImageOrientationPatient", 6)
    along_x, along_y = orientation[:3], orientation[3:]
    lengths = along_x @ along_x, along_y @ along_y
    if abs(along_x @ along_y) > 1e-3 or not np.allclose(lengths, 1, atol=1e-2):
        raise UserError(f"{path}: ImageOrientationPatient is no pair of directions: correct it")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([along_x, along_y, np.cross(along_x, along_y)], 1) * [x, y, z]
    affine[:3, 3] = _numbers(path, row, "ImagePositionPatient", 3)
    affine[:2] *= -1  # DICOM's LPS to RAS
    voxels = volume.voxels
    if (slope, intercept) != (1, 0):
        voxels = voxels.astype(np.float32)
        voxels *= slope
        voxels += intercept
    mended = Volume(voxels, affine + 0.0, path)
    check_hounsfield(mended)
    if np.count_nonzero(voxels > -300) < 0.02 * voxels.size:
        raise UserError(
            f"{path}: hardly a voxel is denser than -300 after RescaleIntercept {intercept:g}: the "
            "file is in Hounsfield units already, set RescaleIntercept to 0 or use tree='fixed'"
        )
    return mended


def _numbers(path: Path, row: Mapping[str, str], name: str, count: int) -> np.ndarray:
    """The numbers of an entry such as "1.5" or "[0.7, 0.7]"."""
    try:
        values = np.atleast_1d(np.array(json.loads(row[name]), np.float64))
    except (ValueError, TypeError):
        values = np.zeros(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        what = "a number" if count == 1 else f"{count} numbers"
        raise UserError(f"{path}: the metadata's {name} is '{row[name]}', not {what}: correct it")
    return values
