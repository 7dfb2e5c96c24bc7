"""hirescam evaluate, explain, localize, table, compare, voc."""

from pathlib import Path
from typing import Literal

import tyro

from hirescam_jax.cli.options import RunFolder, names_of
from hirescam_jax.explanations.methods import MethodName


def evaluate(
    run: tyro.conf.Positional[RunFolder],
    out: Path | None = None,
    checkpoint: Literal["best", "latest"] = "best",
    split: Literal["test", "val"] = "test",
    depth_devices: int | None = None,
    faithfulness: int = 0,
    sanity: int = 0,
) -> None:
    """Measure a run on its validation and test splits: AUROC, average precision, calibration, and
    its maps against organs and lesions, beside maps that no model made. Repeat the command to
    continue after an interruption.

    Args:
        run: folder of a run.
        out: the JSON file; default evaluation.json in the run's folder. Beside it go the values of
            each volume, of which `hirescam table` makes differences between runs.
        checkpoint: which weights.
        split: val for data without a test split (CT-RATE): the thresholds of the maps are chosen on
            the volumes that are reported.
        depth_devices: devices that share a volume; default as in training.
        faithfulness: insertion, deletion and ROAD of the maps on so many test volumes; each takes
            hundreds of passes of the model.
        sanity: randomise the layers one after the other, with the maps of so many test volumes;
            also a picture beside the JSON file.
    """
    from hirescam_jax.evaluation.evaluate import evaluate_to_file
    from hirescam_jax.runs.run import load_run

    opened = load_run(run, checkpoint).on_mesh(depth_devices)
    target = out or run / "evaluation.json"
    evaluate_to_file(opened, target, split=split, faithfulness=faithfulness, sanity=sanity)


def explain(
    run: tyro.conf.Positional[RunFolder],
    out: Path,
    input: tuple[Path, ...] = (),
    store: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    labels: str = "",
    method: MethodName = "hirescam",
    grid: Literal["input", "features"] | None = None,
    format: Literal["zarr", "nifti"] = "zarr",
    batch_size: int = 2,
    depth_devices: int | None = None,
    pictures: bool = True,
    overwrite: bool = False,
) -> None:
    """Explain CT volumes: files (--input), with maps as NIfTI in the scanner's own space, a table
    and pictures; or a split of a store (--store), with all maps in one Zarr array store, on any
    number of devices and processes. Repeat the command to continue after an interruption.

    Args:
        run: folder of a run.
        out: output folder; for files one folder a volume inside it.
        input: NIfTI files in Hounsfield units, or folders of them.
        store: folder of a store.
        split: of the store.
        labels: names with commas between them; default those that the model predicts for a file,
            and all for a store.
        method: HiResCAM; or another for comparison, which does not account for the score.
        grid: files: write the maps on the grid of the input (default), or on the native one of the
            features, which a store's are always on.
        format: of a store's maps; nifti writes a folder a volume.
        batch_size: volumes explained at once.
        depth_devices: a store: devices that share a volume; default as in training.
        pictures: files: write a picture a label.
        overwrite: replace what is in `out`.
    """
    from hirescam_jax.inference.volumes import explain_volumes

    explain_volumes(
        run,
        out,
        input,
        store,
        split,
        labels=names_of(labels),
        method=method,
        grid=grid,
        format=format,
        batch_size=batch_size,
        depth_devices=depth_devices,
        pictures=pictures,
        overwrite=overwrite,
    )


def localize(
    explained: tyro.conf.Positional[Path],
    masks: Path,
    label_map: Path,
    out: Path | None = None,
    method: MethodName = "hirescam",
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
    from hirescam_jax.evaluation.localize import localize_files

    text = localize_files(
        explained,
        masks,
        label_map,
        out,
        method=method,
        suffix=suffix,
        organ_suffix=organ_suffix,
        tolerance_mm=tolerance_mm,
        patients=patients,
    )
    print(text)
    if out is not None:
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
    from hirescam_jax.evaluation.tables.runs import tabulate

    print(tabulate(runs, out, against))


def compare(
    run_a: tyro.conf.Positional[RunFolder],
    run_b: tyro.conf.Positional[RunFolder],
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
    from hirescam_jax.evaluation.compare import compare_folders

    print(compare_folders(run_a, run_b, volumes, out, checkpoint))


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
    from hirescam_jax.experiments.voc.compare import run_voc

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
