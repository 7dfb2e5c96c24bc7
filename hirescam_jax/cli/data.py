"""hirescam phantom, prepare, inspect, lesions."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from hirescam_jax.cli.options import PROGRAM, names_of, part_of


def phantom(
    out: Path,
    size: int = 4,
    split: Literal["train", "val", "test"] = "test",
    shape: tuple[int, int, int] = (100, 120, 120),
    seed: int = 0,
) -> None:
    """Write phantom CTs as NIfTI, with organ and lesion masks and a table of the findings.

    Args:
        out: a new folder.
        size: number of patients.
        split: in "train" and "val" the marks go with findings, in "test" they do not.
        shape: voxels from head to foot, front to back, right to left.
        seed: another seed is another population.
    """
    from hirescam_jax.data.phantom.export import export
    from hirescam_jax.data.phantom.phantom import PhantomConfig

    export(out, PhantomConfig(shape=shape, seed=seed), split, size)


def prepare(
    kind: tyro.conf.Positional[Literal["rad-chestct", "ct-rate", "nifti", "dicom", "medmnist"]],
    path: tyro.conf.Positional[Path],
    out: Path,
    regions: str = "auto",
    region_map: Path | None = None,
    region_suffix: str = "",
    spacing: tuple[float, float, float] = (0.8, 0.8, 0.8),
    shape: tuple[int, int, int] = (405, 420, 420),
    split_seed: int = 0,
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    shards: int = 0,
    shard: str = "",
    workers: int | None = None,
    worker_gib: float = 8.0,
    strict: bool = False,
    overwrite: bool = False,
    table: Path | None = None,
    label_regions: Path | None = None,
    tables: Path | None = None,
    selection: Literal["all", "counts", "paper"] | None = None,
    crop_lungs: bool = False,
    tree: Literal["plain", "fixed"] | None = None,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Turn volumes and their labels into a store for training. Repeat the command to continue
    after an interruption. Exit code 1: some volumes were left out, see rejects.csv.

    Args:
        kind: of data set or file.
        path: its folder (medmnist: the .npz file).
        out: folder of the store.
        regions: "auto" (found in the CT) or a folder of label maps, TotalSegmentator's by default.
        region_map: JSON, region -> TotalSegmentator classes, or -> ids of any label map.
        region_suffix: of the label maps, between id and .nii.gz.
        spacing: of the grid in mm, head to foot, front to back, right to left.
        shape: of the grid.
        split_seed: of the split by patients, where the data set has none.
        split_fractions: of train, val and test.
        shards: files a split; one for 32 volumes if 0.
        shard: "i/n" prepares part i of n, from 0, as one job of an array; the last one joins.
        workers: processes, one a core by default; 0 works in this one.
        worker_gib: memory that a process may use.
        strict: stop at the first volume that cannot be prepared.
        overwrite: replace what is in `out`.
        table: nifti, dicom: the CSV table of labels.
        label_regions: nifti, dicom, ct-rate: JSON, label -> regions in which it is found.
        tables: rad-chestct: folder of the CSV files, if it is another.
        selection: rad-chestct: all labels, the paper's 80, or by its minimum counts.
        crop_lungs: rad-chestct: keep the box around the lungs only.
        tree: ct-rate: which of its trees.
        classes: medmnist: names of its classes.
    """
    from hirescam_jax.data.organs.sources import region_source
    from hirescam_jax.data.prepare.prepare import prepare as run_prepare
    from hirescam_jax.data.readers import open_reader
    from hirescam_jax.files import read_names

    options = {
        "table": table,
        "label_regions": read_names(label_regions) if label_regions else None,
        "tables": tables,
        "selection": selection,
        "crop_lungs": crop_lungs or None,
        "tree": tree,
        "classes": classes,
    }
    reader = open_reader(kind, path, **{n: v for n, v in options.items() if v is not None})
    mapping = read_names(region_map) if region_map else None
    result = run_prepare(
        reader,
        region_source(reader.regions, regions, mapping, region_suffix),
        out,
        spacing_mm=spacing,
        shape=shape,
        split_seed=split_seed,
        split_fractions=split_fractions,
        shards=shards,
        shard=part_of(shard) if shard else None,
        workers=workers,
        worker_gib=worker_gib,
        strict=strict,
        overwrite=overwrite,
    )
    print(result.text(out))
    if result.rejects:
        print(f"{PROGRAM}: {result.left_out(out)}", file=sys.stderr)
        sys.exit(1)


def inspect(store: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Summarise a store: counts, labels, Hounsfield units, regions; pictures as a page.

    Args:
        store: folder of the store.
        out: an HTML file for the summary with pictures of volumes and masks.
    """
    from hirescam_jax.reports.store_page import inspect_store, text, write_page

    summary = inspect_store(store)
    print(text(summary))
    if out is not None:
        write_page(out, store, summary)
        print(out)


def lesions(
    cts: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    copies: int = 20,
    seed: int = 0,
    patient: Literal["copy", "ct"] = "copy",
    chance: float = 0.4,
    labels: str = "",
    workers: int | None = None,
) -> None:
    """Write copies of real CTs with synthetic lesions of known place: a check of a whole pipeline.

    Args:
        cts: chest CTs (NIfTI, Hounsfield units), or folders of them.
        out: a new folder, which `hirescam prepare nifti` reads; README.txt in it tells how.
        copies: of each CT.
        seed: another seed is another data set.
        patient: "copy" spreads the copies of a CT over train, val and test; "ct" keeps them
            together, which needs three CTs or more.
        chance: of each kind of lesion in each copy.
        labels: names with commas between them of the kinds to place; default all.
        workers: processes, one a core by default; 0 works in this one.
    """
    from hirescam_jax.data.lesions.folder import make_lesion_folder
    from hirescam_jax.data.lesions.lesions import LABELS

    make_lesion_folder(
        out,
        cts,
        copies=copies,
        seed=seed,
        patient=patient,
        chance=chance,
        labels=names_of(labels) or LABELS,
        workers=workers,
    )
    print(out)
