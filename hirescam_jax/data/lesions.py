"""Synthetic lesions in real organs: a data set whose truth is known to the voxel.

Real CTs go in, and out comes a plain folder of NIfTI files (`NiftiFolder`) with copies of them.
In each copy the scan differs a little, and seeded lesions lie in the lungs and the mediastinum,
with their masks and findings. Prepare it, train on it and explain it as you would your own data:
the maps must land on the lesions in the scanner's space. If they do not, something is wrong in
the pipeline, and it takes no radiologist to see it.

The lesions are plausible, not diagnostic. What a scan shows of its own is not labelled.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Bool, Float, Int16, Integer, UInt8
from nibabel import orientations
from scipy import ndimage as scipy_ndimage
from scipy.spatial.transform import Rotation

from hirescam_jax.data.auto_regions import CHEST_REGIONS
from hirescam_jax.data.grid import MIN_HU, MODEL_AXES
from hirescam_jax.data.lesion_shapes import PAINTERS, Scan, scan_noise
from hirescam_jax.data.region_sources import AutoRegions, RegionSource
from hirescam_jax.data.study import SPLITS, Study
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError
from hirescam_jax.progress import progress

ndimage: Any = scipy_ndimage  # its stubs call every result a number

# Label -> the organs in which it is placed.
LESIONS: dict[str, tuple[str, ...]] = {
    "nodule": CHEST_REGIONS[:2],
    "ground_glass": CHEST_REGIONS[:2],
    "consolidation": CHEST_REGIONS[:2],
    "pleural_effusion": CHEST_REGIONS[:2],
    "calcification": CHEST_REGIONS[2:],
}
LABELS = tuple(LESIONS)
# How many there are in an organ that has them: from, to.
COUNTS = {
    "nodule": (1, 4),
    "ground_glass": (2, 4),
    "consolidation": (1, 2),
    "pleural_effusion": (1, 1),
    "calcification": (2, 4),
}

README = """Real CTs with synthetic lesions, made by `hirescam lesions`.

<id>.nii.gz                CT in Hounsfield units
findings.csv               id, patient, split, one column a label, and label@region columns
masks/<id>_lesions.nii.gz  1 + number of the label: {labels}
masks/<id>_regions.nii.gz  1 + number of the region: {regions}
masks/lesions.csv          each lesion: centre in RAS mm, volume, size
regions.json               for `hirescam prepare nifti THIS --regions THIS/masks
                           --region-suffix _regions --region-map THIS/regions.json`

{note}
Findings of the scans themselves are not labelled. This folder checks a pipeline: it says nothing
of how well a model reads patients.
"""
SHARED = """There are {copies} copies of each of {cts} CTs. Each copy counts as a patient of its own
(column patient), so train, val and test hold other lesions in the SAME {cts} bodies. Scores on the
test split say that lesions are found in known bodies, and nothing about new patients."""
APART = """There are {copies} copies of each of {cts} CTs. All copies of a CT are one patient, and
the split column is empty: `hirescam prepare` splits by patient, so a split holds bodies that the
others do not."""


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One lesion that was placed.

    label, region: what and where.
    centre_mm: of its mask, x, y, z in RAS.
    volume_ml: voxels at its edge count by the part that is lesion.
    size_mm: as drawn; nodule: diameter of the ball of its volume, pleural effusion: greatest
        depth from front to back, others: extent.
    """

    label: str
    region: str
    centre_mm: tuple[float, float, float]
    volume_ml: float
    size_mm: float


@dataclasses.dataclass(frozen=True, eq=False)
class LesionSet:
    """A CT with lesions and the truth about them.

    volume: int16 Hounsfield units on the grid of the input.
    regions: the names of the organs, in the order of `findings`.
    findings: [K, R] over LABELS and `regions`: 1 where one or more were placed.
    lesion_map: 1 + number of the label where at least half of a voxel is lesion, else 0.
    lesions: each one, in the order of painting.
    """

    volume: Volume
    regions: tuple[str, ...]
    findings: UInt8[np.ndarray, "K R"]
    lesion_map: UInt8[np.ndarray, "i j k"]
    lesions: tuple[Lesion, ...]

    def mask(self, label: str) -> Bool[np.ndarray, "i j k"]:
        return self.lesion_map == 1 + LABELS.index(label)


def add_lesions(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"] | Integer[np.ndarray, "i j k"]],
    seed: int | Sequence[int],
    *,
    findings: Bool[np.ndarray, "K R"] | Integer[np.ndarray, "K R"] | None = None,
    chance: float = 0.4,
) -> LesionSet:
    """Places lesions in organs: a pure function of its arguments.

    No voxel outside the organs changes, and none in which no part of a lesion lies. Lesions do
    not overlap. The same scan stored in another axis order gets the same lesions.

    Args:
        volume: a CT in Hounsfield units, of any orientation and spacing.
        regions: name -> mask on the grid of the volume; the names of LESIONS are used.
        seed: one number or some.
        findings: [K, R] over LABELS and `regions`, what to place; drawn if None. What finds no
            room in its organ is left out, and is 0 in the result.
        chance: of each label, where findings are drawn; of those in a lung a fifth is in both.

    Raises:
        UserError: masks on another grid, or findings that do not fit.
    """
    names = tuple(regions)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    wanted = _drawn_findings(names, seeds, chance) if findings is None else np.asarray(findings)
    _check(volume, regions, wanted)
    turn = _turn(volume.affine)
    hu_DHW = orientations.apply_orientation(volume.voxels, turn).astype(np.float32)
    masks = {
        name: orientations.apply_orientation(np.asarray(mask) != 0, turn)
        for name, mask in regions.items()
    }
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.voxels.shape)
    # Files keep the axes in float32: less than a micrometre is rounding.
    axes = np.round(affine[:3, :3], 6)
    noise = scan_noise(hu_DHW, masks.get(CHEST_REGIONS[2], np.zeros(hu_DHW.shape, bool)))
    map_DHW = np.zeros(hu_DHW.shape, np.uint8)
    taken = np.zeros(hu_DHW.shape, bool)
    placed = np.zeros(wanted.shape, np.uint8)
    lesions = []
    for label, paint in PAINTERS.items():
        k = LABELS.index(label)
        for r in np.flatnonzero(wanted[k]):
            rng = np.random.default_rng([*seeds, k, int(r)])
            for _ in range(rng.integers(*COUNTS[label], endpoint=True)):
                scan = Scan(hu_DHW, axes, masks[names[r]] & ~taken, noise)
                painted = paint(scan, rng)
                if painted is None:
                    continue
                mask = painted.coverage >= 0.5
                placed[k, r] = 1
                map_DHW[painted.box][mask] = 1 + k
                taken[painted.box] |= painted.coverage > 0
                index = np.argwhere(mask).mean(0) + [s.start for s in painted.box]
                x, y, z = (affine[:3, :3] @ index + affine[:3, 3]).tolist()
                ml = float(painted.coverage.sum() * abs(np.linalg.det(axes)) / 1e3)
                lesions.append(Lesion(label, names[r], (x, y, z), ml, painted.size_mm))
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(MODEL_AXES), orientations.io_orientation(volume.affine)
    )
    old = np.rint(volume.voxels)
    new = np.where(
        orientations.apply_orientation(taken, back),
        np.maximum(np.rint(orientations.apply_orientation(hu_DHW, back)), MIN_HU),
        old,
    )
    return LesionSet(
        dataclasses.replace(volume, voxels=_int16(new)),
        names,
        placed,
        np.ascontiguousarray(orientations.apply_orientation(map_DHW, back)),
        tuple(lesions),
    )


def vary(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"] | Integer[np.ndarray, "i j k"]],
    seed: int | Sequence[int],
) -> tuple[Volume, dict[str, Bool[np.ndarray, "a b c"]]]:
    """The same body once more, as if scanned on another day: a pure function of its arguments.

    It is turned by some degrees and is up to 5 % larger or smaller along each axis. This is said
    in the affine alone, so that no voxel is interpolated and the noise stays the scan's own. Up to
    12 mm at each border are cut off, never in an organ. The contrast is up to 2 % different, and
    there is some noise more. Left stays left.

    Args:
        volume: a CT in Hounsfield units.
        regions: name -> mask on its grid.
        seed: one number or some.

    Returns:
        The volume, int16, and its masks.
    """
    rng = np.random.default_rng([seed] if isinstance(seed, int) else list(seed))
    turn = _turn(volume.affine)
    shape = np.array(volume.voxels.shape)
    order = np.argsort(turn[:, 0])  # axis of the file that runs along each of the model's
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    inside = np.any([np.asarray(mask) != 0 for mask in regions.values()], axis=0)
    low, high = np.zeros(3, int), shape.copy()
    zoom = np.ones(3)
    for axis in order.tolist():
        rows = np.flatnonzero(inside.any(tuple(a for a in range(3) if a != axis)))
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, int(shape[axis]))
        room = [first, int(shape[axis]) - last]
        cut = [min(int(rng.uniform(0, 12) / spacing[axis]), n) for n in _along(turn, axis, room)]
        cut = _along(turn, axis, cut)
        low[axis], high[axis] = cut[0], shape[axis] - cut[1]
        zoom[axis] = rng.uniform(0.95, 1.05)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))

    x, y, z = rng.uniform(-1, 1, 3) * (4, 4, 6)
    rotation = Rotation.from_euler("xyz", [x, y, z], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation @ volume.affine[:3, :3] @ np.diag(zoom)
    middle = (shape - 1) / 2
    centre = volume.affine[:3, :3] @ middle + volume.affine[:3, 3]
    affine[:3, 3] = centre + affine[:3, :3] @ (low - middle)

    gain, sigma = rng.uniform(0.98, 1.02), rng.uniform(0, 12)
    hu_DHW = orientations.apply_orientation(volume.voxels[part], turn).astype(np.float32)
    noise = rng.standard_normal(hu_DHW.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0.5, 0.5), mode="wrap")
    new = (hu_DHW + 1000) * gain - 1000 + noise * (sigma / noise.std())
    new = np.where(hu_DHW > MIN_HU, np.clip(new, MIN_HU, None), hu_DHW)  # padding stays
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(MODEL_AXES), orientations.io_orientation(volume.affine)
    )
    voxels = _int16(np.rint(orientations.apply_orientation(new, back)))
    masks = {name: np.asarray(mask)[part] != 0 for name, mask in regions.items()}
    return Volume(voxels, affine, volume.path), masks


def make_lesion_folder(
    out: Path,
    cts: Sequence[Path],
    *,
    copies: int = 20,
    seed: int = 0,
    source: RegionSource | None = None,
    patient: Literal["copy", "ct"] = "copy",
    split: tuple[float, float, float] = (0.7, 0.15, 0.15),
    chance: float = 0.4,
) -> None:
    """Writes a folder of CTs with lesions that `NiftiFolder` reads.

        <id>.nii.gz                  CT, int16 Hounsfield units
        findings.csv                 id, patient, split, <label>..., <label>@<region>...
        masks/<id>_lesions.nii.gz    1 + number of the label
        masks/<id>_regions.nii.gz    1 + number of the region
        masks/lesions.csv            each lesion: centre in mm, volume, size
        regions.json, README.txt

    With a few CTs the honest use is patient="copy": train, val and test hold other lesions in the
    same bodies, which checks a pipeline and says nothing about new patients. With patient="ct"
    (from three CTs on) the split column is empty and `hirescam prepare` keeps all copies of a CT
    in one split.

    Args:
        out: a new folder.
        cts: NIfTI files in Hounsfield units, and folders of them.
        copies: of each CT.
        seed: another seed is another data set; copy i of a CT depends on nothing but the seed,
            the name of its file and i.
        source: gives the masks of CHEST_REGIONS; found in the CTs by default.
        patient: what counts as a patient.
        split: parts of train, val and test of the copies of each CT, with patient="copy".
        chance: of each lesion.

    Raises:
        UserError: `out` exists, no CT, two of the same name, one whose organs are not found, or
            numbers that cannot be.
    """
    files = _files(cts)
    source = source or AutoRegions(CHEST_REGIONS)
    if tuple(source.regions) != CHEST_REGIONS:
        raise UserError(f"regions must be {', '.join(CHEST_REGIONS)}, not {source.regions}")
    if copies < 1 or not 0 <= chance <= 1:
        raise UserError(f"copies {copies}, chance {chance:g}: give 1 or more, and 0 to 1")
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise UserError(f"split {split}: give three parts of 1, for train, val and test")
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder")
    chests = {}
    for name, path in progress(list(files.items()), "finding organs", "CT"):
        chests[name] = _organs(name, path, source)
    (out / "masks").mkdir(parents=True)

    bounds = np.rint(np.cumsum(split) * copies)
    rows, table = [], []
    jobs = [(name, copy) for name in files for copy in range(copies)]
    for name, copy in progress(jobs, "placing lesions", "volume"):
        volume, organs = chests[name]
        lesion_set, masks = make_copy(volume, organs, seed, name, copy, chance)
        key = f"{name}_{copy:03d}"
        region_map = np.zeros(lesion_set.lesion_map.shape, np.uint8)
        for number, mask in enumerate(masks.values(), start=1):
            region_map[mask & (region_map == 0)] = number
        affine = lesion_set.volume.affine
        _save(out / f"{key}.nii.gz", lesion_set.volume.voxels, affine)
        _save(out / "masks" / f"{key}_lesions.nii.gz", lesion_set.lesion_map, affine)
        _save(out / "masks" / f"{key}_regions.nii.gz", region_map, affine)
        part = SPLITS[int(np.searchsorted(bounds, copy, side="right"))]
        who = (
            {"patient": key, "split": part} if patient == "copy" else {"patient": name, "split": ""}
        )
        rows.append({"id": key, **who, **_columns(lesion_set)})
        table += [{"id": key, **_lesion_row(lesion)} for lesion in lesion_set.lesions]
    _write_csv(out / "masks" / "lesions.csv", table)
    ids = {name: [number] for number, name in enumerate(CHEST_REGIONS, start=1)}
    (out / "regions.json").write_text(json.dumps(ids, indent=2) + "\n")
    note = (SHARED if patient == "copy" else APART).format(copies=copies, cts=len(files))
    numbered = [
        ", ".join(f"{i} {name}" for i, name in enumerate(names, start=1))
        for names in (LABELS, CHEST_REGIONS)
    ]
    (out / "README.txt").write_text(
        README.format(labels=numbered[0], regions=numbered[1], note=note)
    )
    _write_csv(out / "findings.csv", rows)


def make_copy(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"]],
    seed: int,
    name: str,
    copy: int,
    chance: float = 0.4,
) -> tuple[LesionSet, dict[str, Bool[np.ndarray, "a b c"]]]:
    """Copy number `copy` of the CT called `name`: varied, then with lesions; and its organs."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    varied, masks = vary(volume, regions, (seed, word, copy, 0))
    return add_lesions(varied, masks, (seed, word, copy, 1), chance=chance), masks


def _drawn_findings(
    names: tuple[str, ...], seeds: list[int], chance: float
) -> UInt8[np.ndarray, "K R"]:
    findings = np.zeros((len(LABELS), len(names)), np.uint8)
    rng = np.random.default_rng([*seeds, len(LABELS)])
    for k, places in enumerate(LESIONS.values()):
        present, both, side = rng.random(3)
        known = [names.index(place) for place in places if place in names]
        if known and present < chance:
            findings[k, known if both < 0.2 else known[int(side * len(known))]] = 1
    return findings


def _check(volume: Volume, regions: Mapping[str, np.ndarray], findings: np.ndarray) -> None:
    for name, mask in regions.items():
        if mask.shape != volume.voxels.shape:
            raise UserError(f"mask of {name}: {mask.shape}, the CT has {volume.voxels.shape}")
    if findings.shape != (len(LABELS), len(regions)):
        raise UserError(f"findings {findings.shape}: expected {(len(LABELS), len(regions))}")
    for (label, places), row in zip(LESIONS.items(), findings, strict=True):
        for name, found in zip(regions, row, strict=True):
            if found and name not in places:
                raise UserError(f"{label} is placed in {' or '.join(places)}, not in {name}")


def _organs(
    name: str, path: Path, source: RegionSource
) -> tuple[Volume, dict[str, Bool[np.ndarray, "i j k"]]]:
    volume = read_ct(path)
    study = Study(name, name, None, (path,), np.zeros((1, 1), np.uint8))
    found = source.masks(study, volume)
    if found.fallback:
        raise UserError(f"{path}: {found.note}: leave this CT out, or give label maps")
    right, left, between = (mask != 0 for mask in found.masks)
    # Fluid must not leave air at the chest wall: lungs reach as far as the air does.
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    for lung, other in ((right, left), (left, right)):
        depth = ndimage.distance_transform_edt(~lung, spacing)
        lung |= (depth < max(5.0, 1.5 * spacing.max())) & (volume.voxels < -200) & ~other & ~between
    return volume, dict(zip(CHEST_REGIONS, (right, left, between), strict=True))


def _files(cts: Sequence[Path]) -> dict[str, Path]:
    """id -> file."""
    files: dict[str, Path] = {}
    for path in cts:
        inside = sorted([*path.glob("*.nii"), *path.glob("*.nii.gz")]) if path.is_dir() else [path]
        for file in inside:
            name = file.name.removesuffix(".gz").removesuffix(".nii")
            if name in files:
                raise UserError(f"{file}: {files[name]} has the same name: rename one of them")
            files[name] = file
    if not files:
        raise UserError("no CT: give NIfTI files, or folders of them")
    return files


def _columns(lesion_set: LesionSet) -> dict[str, int]:
    found = lesion_set.findings
    columns = {label: int(found[k].any()) for k, label in enumerate(LABELS)}
    for k, label in enumerate(LABELS):
        for r, region in enumerate(lesion_set.regions):
            columns[f"{label}@{region}"] = int(found[k, r])
    return columns


def _lesion_row(lesion: Lesion) -> dict[str, str]:
    centre = {f"{axis}_mm": f"{v:.1f}" for axis, v in zip("xyz", lesion.centre_mm, strict=True)}
    sizes = {"volume_ml": f"{lesion.volume_ml:.2f}", "size_mm": f"{lesion.size_mm:.1f}"}
    return {"label": lesion.label, "region": lesion.region, **centre, **sizes}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _save(path: Path, array: np.ndarray, affine: Float[np.ndarray, "4 4"]) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _int16(values: np.ndarray) -> Int16[np.ndarray, "i j k"]:
    return np.ascontiguousarray(np.clip(values, -(2**15), 2**15 - 1).astype(np.int16))


def _turn(affine: Float[np.ndarray, "4 4"]) -> np.ndarray:
    """From the file's axes to the model's, without loss."""
    return orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(MODEL_AXES)
    )


def _along(turn: np.ndarray, axis: int, pair: list[int]) -> list[int]:
    """(at the low end of a file's axis, at its high end), or the model's order: its own inverse."""
    return pair if turn[axis, 1] > 0 else pair[::-1]
