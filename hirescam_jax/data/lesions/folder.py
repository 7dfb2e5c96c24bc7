"""A data set of CTs with synthetic lesions: a check of a whole pipeline whose truth is known.

Real CTs go in, and out comes a plain folder of NIfTI files (`NiftiFolder`) with copies of them,
the masks of lesions and organs, and the findings. Prepare it, train on it and explain it as you
would your own data: the maps must land on the lesions in the scanner's space. If they do not,
something is wrong in the pipeline, and it takes no radiologist to see it.

What a scan shows of its own is not labelled.
"""

import csv
import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage as scipy_ndimage

from hirescam_jax.data.lesions.lesions import LABELS, Lesion, LesionSet, make_copy
from hirescam_jax.data.organs.chest import CHEST_REGIONS
from hirescam_jax.data.organs.sources import AutoRegions, RegionSource
from hirescam_jax.data.prepare.workers import follow_parent, one_thread_each
from hirescam_jax.data.study import SPLITS, Study
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError, nearest
from hirescam_jax.files import atomic_file
from hirescam_jax.progress import progress

ndimage: Any = scipy_ndimage  # its stubs call every result a number

README = """Real CTs with synthetic lesions, made by `hirescam lesions`.

<id>.nii.gz                CT in Hounsfield units
findings.csv               id, patient, split, one column a label, and label@region columns
masks/<id>_lesions.nii.gz  1 + number of the label: {labels}
masks/<id>_regions.nii.gz  1 + number of the region: {regions}
masks/lesions.csv          each lesion: centre in RAS mm, volume, size
regions.json               for `hirescam prepare nifti THIS --regions THIS/masks
                           --region-suffix _regions --region-map THIS/regions.json`
lesions.json               for `hirescam localize EXPLAINED --masks THIS/masks
                           --label-map THIS/lesions.json`

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
    labels: Sequence[str] = LABELS,
    workers: int | None = None,
) -> None:
    """Writes a folder of CTs with lesions that `NiftiFolder` reads.

        <id>.nii.gz                  CT, int16 Hounsfield units
        findings.csv                 id, patient, split, <label>..., <label>@<region>...
        masks/<id>_lesions.nii.gz    1 + number of the label
        masks/<id>_regions.nii.gz    1 + number of the region
        masks/lesions.csv            each lesion: centre in mm, volume, size
        regions.json, lesions.json, README.txt

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
        chance: of each kind of lesion.
        labels: the kinds to place; the findings have columns for all.
        workers: processes, each with one CT in memory; one a core if None, none but this one if 0.

    Raises:
        UserError: `out` exists, no CT, two of the same name, one whose organs are not found,
            numbers that cannot be, or a process that was killed.
    """
    files = _files(cts)
    source = source or AutoRegions(CHEST_REGIONS)
    if tuple(source.regions) != CHEST_REGIONS:
        raise UserError(f"regions must be {', '.join(CHEST_REGIONS)}, not {source.regions}")
    if copies < 1 or not 0 <= chance <= 1:
        raise UserError(f"copies {copies}, chance {chance:g}: give 1 or more, and 0 to 1")
    for label in labels:
        if label not in LABELS:
            raise UserError(f"lesion '{label}' unknown{nearest(label, LABELS)}")
    if min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise UserError(f"split {split}: give three parts of 1, for train, val and test")
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder")
    bounds = np.rint(np.cumsum(split) * copies)
    rows, table = [], []
    with tempfile.TemporaryDirectory() as folder, _mapper(workers) as run:
        find = functools.partial(_find_organs, source=source, folder=Path(folder))
        list(progress(run(find, files.items()), "finding organs", "CT", len(files)))
        (out / "masks").mkdir(parents=True)
        jobs = [(name, path, copy) for name, path in files.items() for copy in range(copies)]
        write = functools.partial(
            _write_copy, out=out, folder=Path(folder), seed=seed, chance=chance, labels=labels
        )
        made = zip(jobs, run(write, jobs), strict=True)
        for job, (columns, lesions) in progress(made, "placing lesions", "volume", len(jobs)):
            name, _, copy = job
            key = _key(name, copy)
            part = SPLITS[int(np.searchsorted(bounds, copy, side="right"))]
            who = (
                {"patient": key, "split": part}
                if patient == "copy"
                else {"patient": name, "split": ""}
            )
            rows.append({"id": key, **who, **columns})
            table += [{"id": key, **lesion} for lesion in lesions]
    _write_csv(out / "masks" / "lesions.csv", table)
    ids = {name: [number] for number, name in enumerate(CHEST_REGIONS, start=1)}
    (out / "regions.json").write_text(json.dumps(ids, indent=2) + "\n")
    lesion_ids = {name: [number] for number, name in enumerate(LABELS, start=1)}
    (out / "lesions.json").write_text(json.dumps(lesion_ids, indent=2) + "\n")
    note = (SHARED if patient == "copy" else APART).format(copies=copies, cts=len(files))
    numbered = [
        ", ".join(f"{i} {name}" for i, name in enumerate(names, start=1))
        for names in (LABELS, CHEST_REGIONS)
    ]
    (out / "README.txt").write_text(
        README.format(labels=numbered[0], regions=numbered[1], note=note)
    )
    _write_csv(out / "findings.csv", rows)


@contextmanager
def _mapper(workers: int | None) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A `map` over processes that keeps the order."""
    if workers == 0:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(workers or cores, context, initializer=follow_parent)
    try:
        with one_thread_each():
            yield pool.map
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed: the memory is too small (lower --workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _find_organs(item: tuple[str, Path], source: RegionSource, folder: Path) -> None:
    """Keeps the masks of one CT in `folder`, packed."""
    name, path = item
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
    np.save(folder / f"{name}.npy", np.packbits([right, left, between], axis=-1))


@functools.lru_cache(maxsize=1)
def _chest(path: Path, packed: Path) -> tuple[Volume, dict[str, Bool[np.ndarray, "i j k"]]]:
    """A CT and its organs; the copies of one CT follow each other."""
    volume = read_ct(path)
    bits = np.load(packed, allow_pickle=False)
    masks = np.unpackbits(bits, axis=-1, count=volume.voxels.shape[-1]).astype(bool)
    return volume, dict(zip(CHEST_REGIONS, masks, strict=True))


def _write_copy(
    item: tuple[str, Path, int],
    out: Path,
    folder: Path,
    seed: int,
    chance: float,
    labels: Sequence[str],
) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Writes the files of one copy; returns its columns of the findings, and its lesions."""
    name, path, copy = item
    volume, organs = _chest(path, folder / f"{name}.npy")
    lesion_set, masks = make_copy(volume, organs, seed, name, copy, chance, labels)
    region_map = np.zeros(lesion_set.lesion_map.shape, np.uint8)
    for number, mask in enumerate(masks.values(), start=1):
        region_map[mask & (region_map == 0)] = number
    key, affine = _key(name, copy), lesion_set.volume.affine
    _save(out / f"{key}.nii.gz", lesion_set.volume.voxels, affine)
    _save(out / "masks" / f"{key}_lesions.nii.gz", lesion_set.lesion_map, affine)
    _save(out / "masks" / f"{key}_regions.nii.gz", region_map, affine)
    return _columns(lesion_set), [_lesion_row(lesion) for lesion in lesion_set.lesions]


def _key(name: str, copy: int) -> str:
    return f"{name}_{copy:03d}"


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
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _save(path: Path, array: np.ndarray, affine: Float[np.ndarray, "4 4"]) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary:
        nibabel.save(image, temporary)
