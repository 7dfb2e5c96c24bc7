"""Where the organ masks of a study come from: the CT itself, or label maps beside it.

Every source has the names of its regions and one method, `masks(study, volume)`, which answers on
the volume's own grid. Sources are small and picklable: worker processes call them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from hirescam_jax.data.organs.chest import CHEST_REGIONS, coarse_regions, segment_chest
from hirescam_jax.data.organs.label_maps import _on_grid, read_label_map
from hirescam_jax.data.organs.totalsegmentator import (
    CLASSES,
    DEFAULT_REGIONS,
    check_mapping,
    suggestion,
)
from hirescam_jax.data.study import ANYWHERE, Study
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError

# Region -> the chest masks (`CHEST_REGIONS`) whose union stands for it, where no label map tells
# more. As in the paper, all that is not lung lies in one mask of heart and mediastinum.
COARSE_REGIONS: dict[str, tuple[str, ...]] = {
    "right_lung": ("right_lung",),
    "left_lung": ("left_lung",),
    "lungs": ("right_lung", "left_lung"),
    "heart_mediastinum": ("heart_mediastinum",),
    "mediastinum": ("heart_mediastinum",),
    "heart": ("heart_mediastinum",),
    "great_vessels": ("heart_mediastinum",),
    "airways": ("heart_mediastinum",),
    "esophagus": ("heart_mediastinum",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class RegionMasks:
    """The organ masks of one study.

    masks: [R, i, j, k], {0, 1}, in the order of the source's regions, on the volume's own grid.
    note: None, or why some masks are a coarse stand-in.
    fallback: some masks are a coarse stand-in.
    """

    masks: UInt8[np.ndarray, "R i j k"]
    note: str | None = None
    fallback: bool = False


@runtime_checkable
class RegionSource(Protocol):
    """Gives the masks of its `regions`; UserError for a study whose masks cannot be used."""

    @property
    def regions(self) -> tuple[str, ...]: ...

    def masks(self, study: Study, volume: Volume) -> RegionMasks: ...


def region_source(
    names: Sequence[str],
    regions: str = "auto",
    mapping: Mapping[str, Sequence[Any]] | None = None,
    suffix: str = "",
) -> RegionSource:
    """What gives the masks of the regions `names`.

    Args:
        regions: "auto", for what can be found in the CT itself, or a folder of label maps.
        mapping: region -> TotalSegmentator's classes, or -> ids of any label map; None for
            TotalSegmentator's files and classes of the same names.
        suffix: of the label maps, between id and .nii.gz.

    Raises:
        UserError: regions that this source cannot give, no such folder, a mapping without label
            maps.
    """
    if regions == "auto":
        if mapping is not None or suffix:
            raise UserError("--region-map and --region-suffix need --regions FOLDER")
        return AutoRegions(names)
    if mapping is None:
        return TotalSegmentatorRegions(regions, suffix=suffix, regions=names)
    numbers = all(isinstance(item, int) for items in mapping.values() for item in items)
    kind = LabelMapRegions if numbers else TotalSegmentatorRegions
    return kind(regions, mapping, suffix, regions=names)


class AutoRegions:
    """Lungs and mediastinum found in the CT itself (`segment_chest`).

    Args:
        regions: names out of COARSE_REGIONS, or ANYWHERE.

    Raises:
        UserError: a region that cannot be found this way.
    """

    def __init__(self, regions: Sequence[str] = CHEST_REGIONS):
        self.regions = _known(regions, COARSE_REGIONS, "--regions auto")

    def masks(self, study: Study, volume: Volume) -> RegionMasks:
        """Masks of the volume; boxes with a note where its segmentation does not look right."""
        chest = segment_chest(volume)
        masks = np.stack([_coarse(name, chest.masks) for name in self.regions])
        note = f"segmentation not usable, coarse boxes: {chest.quality}" if chest.quality else None
        return RegionMasks(masks.astype(np.uint8), note, chest.fallback)


class LabelMapRegions:
    """Regions as unions of ids in one label map a study.

    The file is `<folder>/<study.id><suffix>.nii.gz` (or .nii), or lies in the folder as the CT
    lies in its own: `<folder>/train_1/train_1_a/<name of the CT><suffix>.nii.gz`.

    Args:
        folder: of the label maps.
        names: region -> ids.
        suffix: between the id and ".nii.gz", for example "_seg".
        regions: which of `names` to give, and their order; all by default. ANYWHERE may be there.

    Raises:
        UserError: no such folder, ids that are no positive integers, or an unknown region.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Mapping[str, Sequence[int | str]],
        suffix: str = "",
        regions: Sequence[str] | None = None,
    ):
        self.folder = _existing(Path(folder))
        self.suffix = suffix
        self.ids = {region: _ids(region, values) for region, values in names.items()}
        self.regions = _known(tuple(names) if regions is None else regions, names, "the names")

    def masks(self, study: Study, volume: Volume) -> RegionMasks:
        """Masks of the volume; a region that the label map leaves empty gets a coarse stand-in.

        Raises:
            UserError: no label map, not one of integers, or not in the place of the CT.
        """
        path = _find(self.folder, study, self.suffix)
        if path is None:
            raise UserError(f"{_expected(self.folder, study, self.suffix)}: no such label map")
        labels = _on_grid(read_label_map(path), volume)
        largest = max((id for ids in self.ids.values() for id in ids), default=0)
        table = np.zeros((len(self.regions), max(largest, int(labels.max())) + 1), np.uint8)
        for row, region in zip(table, self.regions, strict=True):
            row[list(self.ids.get(region, ()))] = 1
        masks = np.empty((len(self.regions), *labels.shape), np.uint8)
        for r, row in enumerate(table):
            masks[r] = row[labels]
        return _filled(masks, self.regions, volume, path)


class TotalSegmentatorRegions:
    """Regions from TotalSegmentator v2, task "total".

    Either one label map a study (`--ml`), found as by `LabelMapRegions`, or a folder a study with
    one binary file a class: `<folder>/<study.id>/heart.nii.gz`.

    Args:
        folder: of the label maps.
        mapping: region -> class names.
        suffix: between the id and ".nii.gz".
        regions: which of `mapping` to give, and their order; all by default. ANYWHERE may be there.

    Raises:
        UserError: no such folder, a class that TotalSegmentator does not have, or a region that
            the mapping does not have.
    """

    def __init__(
        self,
        folder: str | Path,
        mapping: Mapping[str, Sequence[str]] = DEFAULT_REGIONS,
        suffix: str = "",
        regions: Sequence[str] | None = None,
    ):
        check_mapping(mapping)
        self.mapping = {region: tuple(names) for region, names in mapping.items()}
        ids = {region: [CLASSES[name] for name in names] for region, names in mapping.items()}
        self.label_maps = LabelMapRegions(folder, ids, suffix, regions)
        self.regions = self.label_maps.regions

    def masks(self, study: Study, volume: Volume) -> RegionMasks:
        """As `LabelMapRegions.masks`.

        Raises:
            UserError: also for a class file that is missing from a study's folder.
        """
        label_maps = self.label_maps
        folder = label_maps.folder / f"{study.id}{label_maps.suffix}"
        if _find(label_maps.folder, study, label_maps.suffix) or not folder.is_dir():
            return label_maps.masks(study, volume)
        masks = np.zeros((len(self.regions), *volume.voxels.shape), np.uint8)
        users: dict[str, list[int]] = {}
        for r, region in enumerate(self.regions):
            for name in self.mapping.get(region, ()):
                users.setdefault(name, []).append(r)
        for name, rows in users.items():
            path = folder / f"{name}.nii.gz"
            if not path.is_file():
                raise UserError(f"{path}: missing: run TotalSegmentator's task 'total' again")
            mask = _on_grid(read_label_map(path), volume) != 0
            for r in rows:
                masks[r] |= mask
        return _filled(masks, self.regions, volume, folder)


def _filled(masks: np.ndarray, regions: tuple[str, ...], volume: Volume, path: Path) -> RegionMasks:
    """All ones for ANYWHERE; for a region without a voxel the paper's boxes, or everywhere: where
    a finding was reported, something must be allowed."""
    empty = []
    boxes = None
    for mask, region in zip(masks, regions, strict=True):
        if region == ANYWHERE:
            mask[:] = 1
        elif not mask.any():
            empty.append(region)
            if region not in COARSE_REGIONS:
                mask[:] = 1
                continue
            if boxes is None:
                boxes = coarse_regions(volume)
            mask[:] = _coarse(region, boxes)
    note = f"{path}: empty, coarse boxes instead: {', '.join(empty)}" if empty else None
    return RegionMasks(masks, note, bool(empty))


def _coarse(region: str, chest: np.ndarray) -> np.ndarray:
    """The union of the chest masks that stands for a region."""
    if region == ANYWHERE:
        return np.ones(chest.shape[1:], bool)
    parts = [CHEST_REGIONS.index(name) for name in COARSE_REGIONS[region]]
    return np.logical_or.reduce(chest[parts])


def _known(regions: Sequence[str], names: Iterable[str], what: str) -> tuple[str, ...]:
    names = list(names)
    for region in regions:
        if region != ANYWHERE and region not in names:
            raise UserError(
                f"region '{region}': not in {what}, which has {', '.join(names)}"
                f"{suggestion(region, names)}"
            )
    return tuple(regions)


def _ids(region: str, values: Sequence[int | str]) -> tuple[int, ...]:
    try:
        ids = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        ids = ()
    if not ids or min(ids) < 1 or max(ids) > 65535 or isinstance(values, str):
        raise UserError(f"region '{region}': give a list of label map ids from 1, not {values!r}")
    return ids


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of label maps")
    return folder


def _expected(folder: Path, study: Study, suffix: str) -> Path:
    return folder / f"{study.id}{suffix}.nii.gz"


def _find(folder: Path, study: Study, suffix: str) -> Path | None:
    """The study's label map: named by its id, or lying as the CT does. Never the CT itself."""
    candidates = [_expected(folder, study, suffix)]
    if study.files:
        ct = study.files[0]
        stem = ct.name.removesuffix(".gz").removesuffix(".nii")
        parents = [part for part in ct.parent.parts if part != ct.anchor]
        for depth in range(min(4, len(parents)) + 1):
            tail = parents[len(parents) - depth :]
            candidates.append(folder.joinpath(*tail, f"{stem}{suffix}.nii.gz"))
    for candidate in candidates:
        for path in (candidate, candidate.with_suffix("")):
            if path.is_file() and not any(path.samefile(f) for f in study.files if f.exists()):
                return path
    return None
