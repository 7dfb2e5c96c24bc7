"""RAD-ChestCT (Zenodo 6406114): .npz volumes and the tables of abnormality x location."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hirescam_jax.data.readers.npz import read_npz
from hirescam_jax.data.readers.rad_chestct_labels import (
    MIN_COUNTS,
    Placing,
    Selection,
    select_labels,
)
from hirescam_jax.data.readers.tables import Table, keep_patients_whole, pair, read_table
from hirescam_jax.data.study import ANYWHERE, Reject, Study
from hirescam_jax.data.volume import Volume, check_hounsfield
from hirescam_jax.errors import UserError

LABEL_TABLES = {
    split: f"img{name}_Abnormality_and_Location_Labels.csv"
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test"))
}
METADATA = "CT_Scan_Metadata_Complete_35747.csv"
PREFIXES = {"trn": "train", "val": "val", "tst": "test"}
REGIONS = ("right_lung", "left_lung", "heart_mediastinum")
MAX_BYTES = 2 * 2**30  # unpacked: the largest scans have 0.4 GiB
SPACING_MM = 0.8
BOX = (  # lowest index and end of the lungs on each axis
    *("sup_axis0min", "inf_axis0max"),
    *("ant_axis1min", "pos_axis1max"),
    *("rig_axis2min", "lef_axis2max"),
)
SHAPE = ("shape0", "shape1", "shape2")


class RadChestCT:
    """RAD-ChestCT as it is published: `trn00001.npz`, ... and its CSV files.

    A label is organ and abnormality: lung_x, heart_x, great_vessel_x, mediastinum_x, and other_x
    with "all". A lung label keeps its side in the region; a lung finding without a side (only
    `x*lung` or `x*airways` is 1) is put in both lungs, other_x is found ANYWHERE. The split is the
    data set's own. The patient is MRN_DEID of the metadata table, or the scan without it.

    The voxels are Hounsfield units as stored: orig_slope and orig_inter, already applied by the
    authors, are left alone. Where a scan was in the room is not known: its first voxel is at 0.
    """

    def __init__(
        self,
        path: str | Path,
        tables: str | Path | None = None,
        selection: Selection = "all",
        crop_lungs: bool = False,
        min_counts: Mapping[str, int] = MIN_COUNTS,
    ):
        """Opens the data set.

        Args:
            path: folder of the .npz files.
            tables: folder of the CSV files, if it is another.
            selection: "paper" for its 80 labels; "counts" for its rule, applied to the training
                table at hand; "all" for every label that is positive once.
            crop_lungs: crop to the lungs' box of Extrema_*.csv.
            min_counts: organ -> least number of positive training scans, for "counts". As in the
                authors' code that of the organ's most frequent location, for a lung on each side.

        Raises:
            UserError: a folder, table or column is missing, or nothing is selected.
        """
        self.path = Path(path)
        folder = Path(tables or path)
        for needed in (self.path, folder):
            if not needed.is_dir():
                raise UserError(f"{needed}: no such folder: check the path")
        found = {split: folder / name for split, name in LABEL_TABLES.items()}
        found = {split: file for split, file in found.items() if file.exists()}
        if not found:
            raise UserError(f"{folder}: none of {', '.join(LABEL_TABLES.values())}: download them")
        label_tables = {
            split: read_table(file, "NoteAcc_DEID", binary=lambda name: True)
            for split, file in found.items()
        }
        self.rejects: list[Reject] = []
        files, patients = self._volumes(folder)
        groups = self._by_split(files, label_tables)
        self.labels = select_labels(label_tables, selection, min_counts)
        other = any(label.startswith("other_") for label in self.labels)
        self.regions = (*REGIONS, ANYWHERE) if other else REGIONS
        studies: list[Study] = []
        for split, group in groups.items():
            table = label_tables[split]
            ids, rejects = pair(table, group, lambda key: f"{self.path / key}.npz")
            named = {reject.id for reject in self.rejects}
            self.rejects += [reject for reject in rejects if reject.id not in named]
            to_findings = Placing(table.binary_columns, self.labels, len(self.regions))
            for key in ids:
                findings = to_findings(table.rows[key].binary)
                studies.append(Study(key, patients[key], split, (group[key],), findings))
        self.studies, parted = keep_patients_whole(studies, folder / METADATA)
        self.rejects += parted
        self._boxes = self._lung_boxes(folder) if crop_lungs else None

    def read(self, study: Study) -> Volume:
        path = study.files[0]
        voxels = read_npz(path, "ct", MAX_BYTES)
        if voxels.dtype.kind != "i" or voxels.dtype.itemsize < 2:
            raise UserError(f"{path}: 'ct' is {voxels.dtype}, not int16: download it again")
        if voxels.ndim != 3 or min(voxels.shape) < 2:
            raise UserError(f"{path}: 'ct' has shape {voxels.shape}, not 3 axes: download it again")
        if voxels.min() < -(2**15) or voxels.max() >= 2**15:
            values = f"{voxels.min()} to {voxels.max()}"
            raise UserError(f"{path}: 'ct' is not in Hounsfield units, values {values}")
        affine = np.zeros((4, 4))
        affine[[2, 1, 0], [0, 1, 2]] = -SPACING_MM  # to the inferior, posterior and left
        affine[3, 3] = 1
        if self._boxes is not None:
            box = _checked_box(self._boxes[path.stem], voxels.shape, path)
            voxels = voxels[tuple(slice(*edges) for edges in box)]
            affine[:3, 3] = affine[:3, :3] @ [start for start, _ in box]
        volume = Volume(voxels.astype(np.int16), affine, path)
        check_hounsfield(volume)
        return volume

    def _volumes(self, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
        """Note id -> file, and note id -> patient."""
        files: dict[str, Path] = {}
        patients: dict[str, str] = {}
        metadata = None
        if (folder / METADATA).exists():
            metadata = _by_volume(folder / METADATA, ("NoteAcc_DEID",), ("MRN_DEID",))
        for file in sorted(self.path.glob("*.npz")):
            row = metadata and metadata.rows.get(file.stem)
            if metadata and not row:
                self.rejects.append(Reject(file.stem, metadata.why_not(file.stem)))
                continue
            key = row.text["NoteAcc_DEID"] if row else file.stem
            if key in files:
                reason = f"{file}: NoteAcc_DEID '{key}' has {files[key].name} too: remove one"
                self.rejects.append(Reject(file.stem, reason))
                continue
            files[key] = file
            patients[key] = (row.text.get("MRN_DEID") if row else None) or key
        return files, patients

    def _by_split(
        self, files: dict[str, Path], tables: dict[str, Table]
    ) -> dict[str, dict[str, Path]]:
        groups: dict[str, dict[str, Path]] = {split: {} for split in tables}
        known = {key: split for split, table in tables.items() for key in table.rows}
        for key, file in files.items():
            split = PREFIXES.get(file.name[:3]) or known.get(key)
            if split is None:
                reason = f"{file}: no row '{key}' in any label table: add it, or remove the file"
                self.rejects.append(Reject(key, reason))
            elif split not in groups:
                raise UserError(f"{file}: its table {LABEL_TABLES[split]} is missing: download it")
            else:
                groups[split][key] = file
        return groups

    def _lung_boxes(self, folder: Path) -> dict[str, dict[str, str]]:
        """Name of the volume -> its row of the table of boxes."""
        found = sorted(folder.glob("Extrema_*.csv"))
        if len(found) != 1:
            raise UserError(f"{folder}: has {len(found)} Extrema_*.csv, one is needed to crop")
        table = _by_volume(found[0], (*BOX, *SHAPE), ())
        kept, boxes = [], {}
        for study in self.studies:
            row = table.rows.get(study.files[0].stem)
            if row:
                kept.append(study)
                boxes[study.files[0].stem] = row.text
            else:
                self.rejects.append(Reject(study.id, table.why_not(study.files[0].stem)))
        self.studies = kept
        return boxes


def _by_volume(path: Path, needed: tuple[str, ...], optional: tuple[str, ...]) -> Table:
    return read_table(
        path,
        "VolumeAcc_DEID",
        needed=needed,
        optional=optional,
        id_of=lambda entry: entry.removesuffix(".npz"),
    )


def _checked_box(
    text: Mapping[str, str], shape: tuple[int, ...], path: Path
) -> list[tuple[int, int]]:
    """The box as (start, stop) an axis; an edge that is not finite is that of the volume."""
    try:
        declared = tuple(int(float(text[name])) for name in SHAPE)
        edges = [float(text[name] or "nan") for name in BOX]
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: Extrema: an entry is no number ({error}): correct it") from error
    if declared != shape:
        raise UserError(f"{path}: has shape {shape}, Extrema says {declared}: download both again")
    box = []
    for axis, size in enumerate(shape):
        start, stop = edges[2 * axis], edges[2 * axis + 1]
        start = int(start) if math.isfinite(start) else 0
        stop = int(stop) if math.isfinite(stop) else size
        if not 0 <= start < stop - 1 < size:
            raise UserError(
                f"{path}: Extrema: {BOX[2 * axis]} {start} and {BOX[2 * axis + 1]} {stop} are no "
                f"box in {size} voxels: correct the row"
            )
        box.append((start, stop))
    return box
