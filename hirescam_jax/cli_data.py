"""The commands of `hirescam` that make and look at data; `hirescam_jax.cli` has the others."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from hirescam_jax.cam import Method
from hirescam_jax.errors import UserError


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
    from hirescam_jax.data.phantom import PhantomConfig
    from hirescam_jax.data.phantom_export import export

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
    import inspect

    from hirescam_jax.data.prepare import prepare as run_prepare
    from hirescam_jax.data.readers import READERS

    options = {
        "table": table,
        "label_regions": _json(label_regions) if label_regions else None,
        "tables": tables,
        "selection": selection,
        "crop_lungs": crop_lungs or None,
        "tree": tree,
        "classes": classes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in inspect.signature(READERS[kind]).parameters:
            raise UserError(f"--{name.replace('_', '-')}: {kind} has no such option")
    reader = READERS[kind](path, **given)
    result = run_prepare(
        reader,
        _region_source(reader.regions, regions, region_map, region_suffix),
        out,
        spacing_mm=spacing,
        shape=shape,
        split_seed=split_seed,
        split_fractions=split_fractions,
        shards=shards,
        shard=_part(shard) if shard else None,
        workers=workers,
        worker_gib=worker_gib,
        strict=strict,
        overwrite=overwrite,
    )
    counts = ", ".join(f"{count} {split}" for split, count in result.counts.items())
    print(f"{out}: {counts}; {result.fallbacks} of them with coarse organ masks")
    if not result.whole:
        print("other parts are still to be prepared; the last one makes the store whole")
    if result.rejects:
        first = result.rejects[0]
        where = f"see {out / 'rejects.csv'}" if result.whole else f"{first.id}: {first.reason}"
        print(f"hirescam: {len(result.rejects)} left out: {where}", file=sys.stderr)
        sys.exit(1)


def names_of(text: str) -> list[str]:
    """Of a text with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _part(text: str) -> tuple[int, int]:
    try:
        number, count = map(int, text.split("/"))
    except ValueError as error:
        raise UserError(f"--shard {text}: give i/n, such as 0/8") from error
    return number, count


def _json(path: Path) -> Any:
    """A JSON file of names -> lists."""
    import json

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UserError(f'{path}: give {{"name": ["...", "..."], ...}}')
    return content


def _region_source(names: Sequence[str], regions: str, region_map: Path | None, suffix: str) -> Any:
    """What gives the masks of the regions `names`."""
    from hirescam_jax.data import region_sources as sources

    if regions == "auto":
        if region_map or suffix:
            raise UserError("--region-map and --region-suffix need --regions FOLDER")
        return sources.AutoRegions(names)
    if region_map is None:
        return sources.TotalSegmentatorRegions(regions, suffix=suffix, regions=names)
    mapping = _json(region_map)
    numbers = all(isinstance(item, int) for items in mapping.values() for item in items)
    kind = sources.LabelMapRegions if numbers else sources.TotalSegmentatorRegions
    return kind(regions, mapping, suffix, regions=names)


def inspect(store: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Summarise a store: counts, labels, Hounsfield units, regions; pictures as a page.

    Args:
        store: folder of the store.
        out: an HTML file for the summary with pictures of volumes and masks.
    """
    from hirescam_jax.data.inspect_store import inspect_store, text, write_page

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
    from hirescam_jax.data.lesion_folder import make_lesion_folder
    from hirescam_jax.data.lesions import LABELS

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


def localize(
    explained: tyro.conf.Positional[Path],
    masks: Path,
    label_map: Path,
    out: Path | None = None,
    method: Method = "hirescam",
    suffix: str = "_lesions",
    organ_suffix: str = "_regions",
    tolerance_mm: float = 0.0,
    patients: Path | None = None,
) -> None:
    """Compare written maps with masks of lesions: pointing game and energy, beside the maps of
    other patients and uniform maps of the organ and of the whole volume.

    `hirescam explain` writes maps of the labels that the model predicts, unless --labels names
    others: hits are then those of true positives, and the table counts the lesions without a map.

    Args:
        explained: folder of `hirescam explain --grid input`.
        masks: folder of label maps <id>SUFFIX.nii.gz on the grids of the CTs.
        label_map: JSON, label -> its numbers in those; `hirescam lesions` writes lesions.json.
        out: a CSV file of all pairs of volume and label.
        method: of the maps.
        suffix: of the masks of lesions, between id and .nii.gz.
        organ_suffix: of the masks of organs, where there are any.
        tolerance_mm: so near to a lesion counts as on it.
        patients: CSV table with columns id and patient (findings.csv, say), so that the other map
            is another patient's; by default each volume is.
    """
    from hirescam_jax import localize as localization

    if out is not None and out.exists():
        raise UserError(f"{out}: exists; choose another file")
    place: Any = {"method": method, "suffix": suffix}
    given = explained, masks, _json(label_map)
    found = localization.localize(
        *given,
        **place,
        organ_suffix=organ_suffix,
        tolerance_mm=tolerance_mm,
        patients=None if patients is None else localization.read_patients(patients),
    )
    print(localization.table(found, localization.without_map(*given, **place)))
    if out is not None:
        localization.write_table(out, found)
        print(out)


def table(
    runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("tables"), against: str = ""
) -> None:
    """Turn the evaluations of runs (`hirescam evaluate RUN`) into tables of models, labels, organs
    and lesions, of test and validation split, and of the differences between the runs, each as CSV,
    Markdown and LaTeX.

    Args:
        runs: folders of runs, in the order of the rows.
        out: folder of the tables.
        against: name of the run that the others are compared with; default the first.
    """
    from hirescam_jax.table import all_tables, write_tables

    built = all_tables(runs, against)
    paths = write_tables(built, out)
    for name, made in built.items():
        if name in ("models", "differences") or name.startswith("masks"):
            print(made.markdown())
    for path in paths:
        print(path)


def compare(
    run_a: tyro.conf.Positional[Path],
    run_b: tyro.conf.Positional[Path],
    volumes: int = 20,
    out: Path | None = None,
    checkpoint: Literal["best", "latest"] = "best",
) -> None:
    """How alike the maps of two runs are: SSIM, rank correlation and OrganIoU on the same test
    volumes. Of trainings with two seeds: repeatability; of one on its labels and one with
    --permute-labels: label randomisation. The thresholds of OrganIoU are those of each run's
    evaluation.json (`hirescam evaluate`), or else found on its whole validation split.

    Args:
        run_a: folder of a run.
        run_b: of another one, of the same network and data.
        volumes: how many, a random choice.
        out: the JSON file; default compare_RUN_B.json in the folder of run_a.
        checkpoint: which weights.
    """
    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.compare import compare as run_compare
    from hirescam_jax.compare import table, write

    result = run_compare([load_run(run, checkpoint) for run in (run_a, run_b)], volumes)
    target = out or run_a / f"compare_{run_b.resolve().name}.json"
    write(target, result)
    print(table(result))
    print(target)


def voc(
    path: tyro.conf.Positional[Path],
    weights: Path,
    out: Path,
    size: int = 224,
    epochs: int = 20,
    finetune: bool = False,
    train_set: str = "train",
    val_set: str = "val",
    seed: int = 0,
    faithful: int = 10,
) -> None:
    """Grad-CAM against HiResCAM on PASCAL VOC 2012: train two heads on MobileNetV2 (a global
    average and a fully connected one), and measure both maps with the class masks.

    Args:
        path: VOCdevkit/VOC2012.
        weights: torchvision's MobileNetV2 (.pth, .safetensors).
        out: a new folder for metrics.json, voc.html and pictures.
        size: pixels of the square that a photo is scaled into.
        epochs: of training.
        finetune: train the backbone too, on flipped photos; otherwise its features are computed
            once.
        train_set: a file of ImageSets/Segmentation, or Main/NAME for one of ImageSets/Main.
        val_set: the same; its photos are never trained on.
        seed: of the heads' weights, the order of the photos and those for the thresholds.
        faithful: insertion, deletion and ROAD on so many pairs that a head predicts; each takes
            170 passes of the network.
    """
    from hirescam_jax.voc import run_voc

    run_voc(
        path,
        weights,
        out,
        size=size,
        epochs=epochs,
        finetune=finetune,
        train_set=train_set,
        val_set=val_set,
        seed=seed,
        faithful=faithful,
    )
