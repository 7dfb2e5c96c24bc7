"""The demonstration: the same small AxialNet, without and with the mask loss, on the phantom.

In training some findings go together with marks outside the organs (an oxygen tube, ECG leads, the
table); in the test split they do not. Both networks can cheat; the mask loss makes it costly.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from hirescam_jax.config import Adam, Config, Preprocess
from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import InMemory, Source
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.result import Evaluation, plain
from hirescam_jax.evaluation.summary import summarise
from hirescam_jax.experiments.demo_page import TITLES, Comparison, write_report
from hirescam_jax.files import atomic_file, new_folder
from hirescam_jax.models import AxialNet
from hirescam_jax.progress import progress, say
from hirescam_jax.reports.text import aligned, interval_text
from hirescam_jax.runs.run import Run
from hirescam_jax.runs.setup import open_data
from hirescam_jax.training.loop import train

# The paper's lambda is 1/3 over hundreds of thousands of steps; in 800 steps a penalty that is
# averaged over all cells needs more weight to be felt.
VARIANTS = {"baseline": 0.0, "mask_loss": 1.5}


def demo_config(seed: int = 0) -> Config:
    """Small enough for two CPU cores: 48 x 48 x 48 voxels, 16 x 6 x 6 feature cells."""
    return Config(
        model=AxialNet(
            blocks=(1, 1, 1),
            widths=(8, 16, 32),
            stem="small",
            conv_widths=(32,),
            conv_padding="SAME",
        ),
        data=PhantomData(
            PhantomConfig(shape=(48, 48, 48), seed=seed),
            train_size=640,
            val_size=128,
            test_size=192,
        ),
        preprocess=Preprocess(flip=0.0, rotate=0.0),
        optimizer=Adam(learning_rate=4e-3),
        mask_weight=VARIANTS["mask_loss"],
        batch_size=8,
        epochs=10,
        seed=seed,
    )


def demo(out: Path, config: Config | None = None) -> dict[str, Any]:
    """Trains, evaluates and compares both variants; writes everything to `out`.

        metrics.json    {"baseline": ..., "mask_loss": ...}, each with `auroc` and
                        `organ_iou.hirescam` and `.gradcam`; `organ_iou_gain`, relative
        report.html     curves, table and pictures, self-contained
        baseline/, mask_loss/    the two run folders, ready for `hirescam explain`

    Returns:
        What metrics.json holds.

    Raises:
        UserError: `out` exists, or a config whose data cannot be.
    """
    config = config or demo_config()
    start = time.perf_counter()
    opened = {s: open_data(config, s, with_lesions=s != "train") for s in ("train", "val", "test")}
    new_folder(out)
    sources = {split: _drawn(source, split) for split, source in opened.items()}
    runs: dict[str, Run] = {}
    evaluations: dict[str, Evaluation] = {}
    for name, weight in VARIANTS.items():
        say(f"training {name.replace('_', ' ')} (lambda = {weight:.3g})")
        variant = dataclasses.replace(config, mask_weight=weight)
        runs[name] = train(variant, out / name, sources=(sources["train"], sources["val"]))
        validation = predict(runs[name], sources["val"], "validation split")
        test = predict(runs[name], sources["test"], "test split", validation.prior)
        regions = runs[name].header.regions
        evaluations[name] = summarise(runs[name].labels, validation, test, regions=regions)
    metrics = summary(evaluations)
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    with atomic_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps({**metrics, "details": plain(evaluations)}, indent=2))
    say("writing report.html")
    assert isinstance(config.data, PhantomData)
    patients = Phantom(config.data.phantom, "test", config.data.test_size, (1, 1, 1))
    write_report(out / "report.html", Comparison(runs, evaluations, metrics, patients))
    print(summary_table(evaluations))
    print(gain_line(metrics))
    print(f"{out / 'report.html'}")
    return metrics


def _drawn(source: Source, split: str) -> InMemory:
    """A split of the phantom, drawn once by all cores."""

    def bar(items: Any) -> Any:
        return progress(items, f"drawing {split} patients", "patient")

    return InMemory(source, workers=os.cpu_count() or 1, progress=bar)


def summary(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The figures that matter, without intervals and labels."""
    metrics: dict[str, Any] = {}
    for name, result in evaluations.items():
        metrics[name] = {
            "auroc": result.auroc.mean.value,
            "average_precision": result.average_precision.mean.value,
            "organ_iou": {m: scores.mean.value for m, scores in result.organ_iou.items()},
        }
    before, after = (metrics[name]["organ_iou"]["hirescam"] for name in VARIANTS)
    known = bool(before) and after is not None
    metrics["organ_iou_gain"] = after / before - 1 if known else None
    metrics["jax"] = jax.__version__
    return metrics


def gain_line(metrics: dict[str, Any]) -> str:
    """What the mask loss gains, and what it costs."""
    gain, aurocs = metrics["organ_iou_gain"], [metrics[name]["auroc"] for name in VARIANTS]
    text = "cannot be compared" if gain is None else f"{gain:+.0%}"
    cost = "cannot be compared" if None in aurocs else f"{aurocs[1] - aurocs[0]:+.3f}"
    return f"OrganIoU by HiResCAM {text} with the mask loss, AUROC {cost}"


def summary_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Both variants side by side, with 95 % intervals."""
    rows = [["test split, marks uninformative", "AUROC", "OrganIoU Grad-CAM", "OrganIoU HiResCAM"]]
    for name, result in evaluations.items():
        cells = result.auroc, result.organ_iou["gradcam"], result.organ_iou["hirescam"]
        rows.append([TITLES[name], *(interval_text(c.mean) for c in cells)])
    return aligned(rows)
