"""Do written maps lie on known lesions? Pointing game and energy, beside what needs no model.

A check of a pipeline with `hirescam lesions`, or of a model where masks of lesions exist.
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from hirescam_jax.data.organs.label_maps import read_label_map
from hirescam_jax.data.volume import Volume, read_nifti
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file, read_names
from hirescam_jax.inference.nifti import TABLE, map_file_names
from hirescam_jax.metrics import energy_inside, nan_mean, pointing_game
from hirescam_jax.progress import progress

# An organ that holds less of a lesion only borders on it.
PART_OF_LESION = 0.05


@dataclasses.dataclass(frozen=True)
class Localized:
    """One map and the lesions of its label in that volume.

    hit, energy: `pointing_game` and `energy_inside` of the map.
    other_hit, other_energy: of the map of the same label in a volume of another patient, stretched
        to this one: what the usual place of such lesions gives. NaN where there is no other.
    organ: of a point anywhere in the organs that hold the lesions; NaN without organ masks.
    chance: of a point anywhere in the volume.
    """

    id: str
    label: str
    hit: float
    energy: float
    other_hit: float
    other_energy: float
    organ: float
    chance: float


def localize(
    explained: Path,
    masks: Path,
    label_ids: Mapping[str, Sequence[int]],
    *,
    method: str = "hirescam",
    suffix: str = "_lesions",
    organ_suffix: str = "_regions",
    tolerance_mm: float = 0.0,
    patients: Mapping[str, str] | None = None,
) -> list[Localized]:
    """Compares the maps in a folder of `hirescam explain` with masks of lesions.

    Measured are the pairs of volume and label that have both a map and a lesion. `hirescam explain`
    writes the maps of predicted labels only, unless labels are named: these are the true positives
    then, and `without_map` counts the others.

    Args:
        explained: holds `<id>/<label>_<method>.nii.gz`, on the grids of the inputs.
        masks: holds `<id><suffix>.nii.gz`, a label map of lesions on the same grid, and perhaps
            `<id><organ_suffix>.nii.gz`, one of organs.
        label_ids: label of the model -> numbers of its lesions.
        tolerance_mm: a point so near to a lesion is a hit; energy counts there too.
        patients: id of a volume -> its patient; by default each volume is another patient's.

    Raises:
        UserError: no explanations or no pair, a mask that is missing or on another grid, a volume
            that is not in `patients`.
    """
    folders = _folders(explained)
    if patients is not None:
        for folder in folders:
            if folder.name not in patients:
                raise UserError(f"{folder}: its patient is not known: add the id to the table")
    cases = [
        (folder, label, path)
        for folder in folders
        for label, path in _maps(folder, method).items()
        if label in label_ids and path.exists()
    ]
    alike, found = {}, []
    for folder, label, path in progress(cases, "localize", "map"):
        map_file = read_nifti(path)
        lesion_map = _on_grid(masks / f"{folder.name}{suffix}.nii.gz", map_file)
        lesions = np.isin(lesion_map, label_ids[label])
        if not lesions.any():
            continue
        near = _grown(lesions, map_file.affine, tolerance_mm)
        organ_path = masks / f"{folder.name}{organ_suffix}.nii.gz"
        organ = np.nan
        if organ_path.exists():
            organ = _organ_prior(near, lesions, _on_grid(organ_path, map_file))
        axes = nibabel.aff2axcodes(map_file.affine)
        alike.setdefault((label, axes), []).append((len(found), path, near))
        found.append(
            Localized(
                id=folder.name,
                label=label,
                **_measures(map_file.voxels, near),
                other_hit=np.nan,
                other_energy=np.nan,
                organ=organ,
                chance=float(near.mean()),
            )
        )
    if not found:
        raise UserError(
            f"{explained}: no map of a label that has lesions in its volume: explain those labels "
            f"(--labels {','.join(label_ids)})"
        )
    who = patients or {case.id: case.id for case in found}
    for same in alike.values():
        for place, (i, _, near) in enumerate(same):
            following = same[place + 1 :] + same[:place]
            paths = [path for j, path, _ in following if who[found[j].id] != who[found[i].id]]
            if paths:
                other = _measures(_stretched(read_nifti(paths[0]).voxels, near.shape), near)
                found[i] = dataclasses.replace(
                    found[i], other_hit=other["hit"], other_energy=other["energy"]
                )
    return found


def localize_files(
    explained: Path,
    masks: Path,
    label_map: Path,
    out: Path | None = None,
    *,
    method: str = "hirescam",
    suffix: str = "_lesions",
    organ_suffix: str = "_regions",
    tolerance_mm: float = 0.0,
    patients: Path | None = None,
) -> str:
    """`localize` with all its inputs as files, and the means of each label as text (`table`).

    Args:
        label_map: a JSON file, label -> numbers of its lesions.
        out: a new CSV file for all pairs of volume and label.
        patients: a CSV table for `read_patients`.

    Raises:
        UserError: `out` exists, a file that cannot be read, and as `localize`.
    """
    if out is not None and out.exists():
        raise UserError(f"{out}: exists; choose another file")
    label_ids = read_names(label_map)
    found = localize(
        explained,
        masks,
        label_ids,
        method=method,
        suffix=suffix,
        organ_suffix=organ_suffix,
        tolerance_mm=tolerance_mm,
        patients=None if patients is None else read_patients(patients),
    )
    without = without_map(explained, masks, label_ids, method=method, suffix=suffix)
    if out is not None:
        write_table(out, found)
    return table(found, without)


def without_map(
    explained: Path,
    masks: Path,
    label_ids: Mapping[str, Sequence[int]],
    *,
    method: str = "hirescam",
    suffix: str = "_lesions",
) -> dict[str, int]:
    """In how many explained volumes a label has a lesion and no map. A volume without a mask is
    taken to have no lesion.

    Args:
        explained, masks, label_ids, method, suffix: as `localize`'s.

    Raises:
        UserError: no explanations.
    """
    counts = dict.fromkeys(label_ids, 0)
    for folder in _folders(explained):
        mask = masks / f"{folder.name}{suffix}.nii.gz"
        maps = _maps(folder, method)
        missing = [label for label in label_ids if not (label in maps and maps[label].exists())]
        if missing and mask.exists():
            present = set(np.unique(read_label_map(mask).voxels).tolist())
            for label in missing:
                counts[label] += not present.isdisjoint(label_ids[label])
    return counts


def read_patients(path: Path) -> dict[str, str]:
    """id -> patient, of a CSV table with these columns (findings.csv, say).

    Raises:
        UserError: no such table, or one without these columns.
    """
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            missing = {"id", "patient"} - set(table.fieldnames or ())
            if missing:
                raise UserError(f"{path}: no column {' or '.join(sorted(missing))} in it")
            return {row["id"]: row["patient"] or row["id"] for row in table}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from error


def table(found: Sequence[Localized], without: Mapping[str, int] | None = None) -> str:
    """Means of each label for a person to read.

    Args:
        without: of each label the volumes with a lesion and no map (`without_map`).
    """
    without = without or {}
    columns = [f.name for f in dataclasses.fields(Localized)][2:]
    width = max(len(case.label) for case in found)
    heads = ("hits", "energy", "hits", "energy", "of organ", "of volume")
    width = max(width, *(len(label) for label, count in without.items() if count), len("label"))
    lines = [
        f"{'':{width}}                    its own map     another patient's     uniform map",
        f"{'label':{width}}  volumes  no map" + "".join(f"{head:>10}" for head in heads),
    ]
    for label in dict.fromkeys(case.label for case in found):
        rows = [[getattr(c, name) for name in columns] for c in found if c.label == label]
        means = nan_mean(np.asarray(rows, float), axis=0)
        cells = "".join(f"{'-' if np.isnan(v) else format(v, '.3f'):>10}" for v in means)
        lines.append(f"{label:{width}}  {len(rows):7}  {without.get(label, 0):6}{cells}")
    measured = {case.label for case in found}
    for label, count in without.items():
        if count and label not in measured:
            lines.append(f"{label:{width}}  {0:7}  {count:6}" + f"{'-':>10}" * len(heads))
    if any(without.values()):
        lines += [
            "",
            f"Left out: {sum(without.values())} pairs of a volume and a label that have a lesion, "
            "but no map. `hirescam explain` writes",
            "maps of predicted labels only, unless --labels names them: hits are then those of "
            "true positives.",
        ]
    return "\n".join(lines)


def write_table(path: Path, found: Sequence[Localized]) -> None:
    """One row a pair of volume and label, as CSV."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.DictWriter(
            file, [f.name for f in dataclasses.fields(Localized)], lineterminator="\n"
        )
        rows.writeheader()
        rows.writerows(dataclasses.asdict(case) for case in found)


def _folders(explained: Path) -> list[Path]:
    folders = sorted(table.parent for table in explained.glob(f"*/{TABLE}"))
    if not folders:
        raise UserError(
            f"{explained}: holds no explanations (<id>/{TABLE}): run `hirescam explain`"
        )
    return folders


def _maps(folder: Path, method: str) -> dict[str, Path]:
    """By label the file of its map on the grid of the input, which need not have been written."""
    with (folder / TABLE).open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    paths = [folder / f"{name}_{method}.nii.gz" for name in map_file_names(labels)]
    return dict(zip(labels, paths, strict=True))


def _on_grid(path: Path, wanted: Volume) -> np.ndarray:
    labels = read_label_map(path)
    same = labels.voxels.shape == wanted.voxels.shape
    if not same or not np.allclose(labels.affine, wanted.affine, atol=1e-3):
        raise UserError(
            f"{path}: its grid is not that of {wanted.path}: give masks on the CT's grid"
        )
    return labels.voxels


def _grown(
    mask: Bool[np.ndarray, "i j k"], affine: Float[np.ndarray, "4 4"], distance_mm: float
) -> Bool[np.ndarray, "i j k"]:
    if distance_mm <= 0:
        return mask
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return np.asarray(ndimage.distance_transform_edt(~mask, spacing)) <= distance_mm


def _organ_prior(near: np.ndarray, lesions: np.ndarray, organs: np.ndarray) -> float:
    """The part of the organs with lesions that is lesion."""
    numbers, counts = np.unique(organs[lesions], return_counts=True)
    chosen = numbers[(numbers != 0) & (counts >= PART_OF_LESION * lesions.sum())]
    inside = np.isin(organs, chosen)
    return float(near[inside].mean()) if inside.any() else np.nan


def _stretched(map_ijk: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nearest voxels, by the part of each axis that lies before them."""
    rows = [
        ((np.arange(n) + 0.5) * size / n).astype(int)
        for n, size in zip(shape, map_ijk.shape, strict=True)
    ]
    return map_ijk[np.ix_(*rows)]


def _measures(map_ijk: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    maps, masks = map_ijk[None, None], mask[None, None]
    return {
        "hit": float(pointing_game(maps, masks)[0, 0]),
        "energy": float(energy_inside(maps, masks)[0, 0]),
    }
