"""The page that compares two trainings: curves, table, and the same patients side by side."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from hirescam_jax.data.phantom.phantom import Phantom, PhantomCase, PhantomConfig
from hirescam_jax.evaluation.result import Evaluation
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.explain import explain, model_verdict
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.reports import pages
from hirescam_jax.reports.figures import (
    ACCENT,
    INK,
    MUTED,
    charts,
    draw_ct,
    figure_of,
    overlay_colors,
)
from hirescam_jax.reports.text import MAP_NAMES
from hirescam_jax.runs.run import Run

TITLES = {"baseline": "without mask loss", "mask_loss": "with mask loss"}
COLORS = {"baseline": MUTED, "mask_loss": ACCENT}
ORGAN, LESION = "#4be3ff", "#ffffff"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both runs, their evaluations, the summary, and the phantom patients of the test split."""

    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]
    metrics: dict[str, Any]
    patients: Phantom


def write_report(path: Path, comparison: Comparison, examples: int = 6) -> None:
    """Writes one self-contained HTML page (no network), with `examples` patients."""
    first = next(iter(comparison.runs.values()))
    pages.write_page(
        path,
        "report.html",
        metrics=comparison.metrics,
        rows=_rows(comparison.evaluations),
        maps=_map_rows(comparison.evaluations),
        curves=pages.chart(_curves(comparison.runs), "Losses of both trainings by epoch"),
        bars=pages.chart(_bars(comparison.evaluations), "OrganIoU of both trainings by finding"),
        examples=_examples(comparison, examples),
        guarantees=_guarantees(first),
        volumes={s: getattr(first.config.data, f"{s}_size", 0) for s in ("train", "val", "test")},
        shape=first.shape,
        seed=first.config.seed,
        organ=ORGAN,
        lesion=LESION,
    )


def _guarantees(run: Run) -> list[dict[str, Any]]:
    """What each method's maps guarantee; the head of both trainings is of one kind."""
    verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    return [
        {"method": METHODS[m].title, "text": verdict.short(m), "holds": verdict.holds_for(m)}
        for m in EVALUATED
    ]


def _rows(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """AUROC and OrganIoU of both trainings: the means, then a row a label."""
    both = evaluations.values()
    found = [[e.auroc for e in both]]
    found += [[e.organ_iou[m] for e in both] for m in ("gradcam", "hirescam")]
    rows = [{"label": "mean", "measures": [[e.mean for e in pair] for pair in found]}]
    for label in found[0][0].labels:
        measures = [[e.labels[label] for e in pair] for pair in found]
        rows.append({"label": label.replace("_", " "), "measures": measures})
    return rows


def _map_rows(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """A row a map, those that no model made too: means over labels of both trainings."""
    before, after = evaluations.values()
    rows = []
    for name, title in MAP_NAMES.items():
        measures = [[e.organ_iou[name].mean for e in (before, after)]]
        lesions = [(e.lesions or {})[name] for e in (before, after)]
        measures += [[of.pointing.mean for of in lesions], [of.energy.mean for of in lesions]]
        measures += [[of.iou.mean for of in lesions]]
        rows.append({"title": title, "of_model": name in METHODS, "measures": measures})
    return rows


def _curves(runs: dict[str, Run]) -> Figure:
    """Losses by epoch, training and validation, of both runs."""
    figure, axes = charts(11, 2.9, 2)
    for ax, (key, title) in zip(
        axes, (("class_loss", "classification loss"), ("mask_loss", "mask loss")), strict=True
    ):
        for name, run in runs.items():
            lines = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
            ends = [line["step"] for line in lines if line["split"] == "val"]
            val = [line[key] for line in lines if line["split"] == "val"]
            steps = [line for line in lines if line["split"] == "train"]
            train, begin = [], -1
            for end in ends:
                inside = [line[key] for line in steps if begin < line["step"] <= end]
                train.append(np.mean(inside) if inside else np.nan)
                begin = end
            epochs = np.arange(1, len(ends) + 1)
            # Without the mask loss its training value is not computed.
            if key == "class_loss" or run.config.mask_weight > 0:
                ax.plot(epochs, train, ":", color=COLORS[name], lw=1.6)
            ax.plot(epochs, val, "-", color=COLORS[name], lw=2.2, label=TITLES[name])
        ax.set_title(title, loc="left", fontsize=11)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch   (solid: validation, dotted: training)", fontsize=9)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def _bars(evaluations: dict[str, Evaluation]) -> Figure:
    """OrganIoU by HiResCAM, a pair of bars a label, with intervals."""
    figure, (ax,) = charts(11, 3.0)
    labels = list(next(iter(evaluations.values())).auroc.labels)
    for i, (name, result) in enumerate(evaluations.items()):
        intervals = result.organ_iou["hirescam"].labels.values()
        # None becomes NaN.
        value, low, high = np.array([(i.value, i.low, i.high) for i in intervals], float).T
        x = np.arange(len(labels)) + (i - 0.5) * 0.38
        ax.bar(x, value, 0.36, color=COLORS[name], label=TITLES[name])
        ax.errorbar(x, value, [value - low, high - value], fmt="none", ecolor="black", lw=1)
    names = [label.replace("_", "\n", 1).replace("_", " ") for label in labels]
    ax.set_xticks(np.arange(len(labels)), names, fontsize=8)
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_ylim(0, 1)
    ax.set_title("OrganIoU by HiResCAM, test split, 95 % intervals", loc="left", fontsize=11)
    ax.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.tight_layout()
    return figure


def _examples(comparison: Comparison, count: int) -> list[dict[str, Any]]:
    """Patients in which a label is truly present, a different label each, chosen by order alone."""
    patients, runs = comparison.patients, comparison.runs
    chosen: list[tuple[int, int]] = []
    # Spread over the organs: every second label first, then the rest.
    order = [*range(0, len(patients.labels), 2), *range(1, len(patients.labels), 2)]
    for label in order:
        for index in range(len(patients)):
            if len(chosen) < count and index not in [i for i, _ in chosen]:
                found = patients.person(index).found
                if found[label].any():
                    chosen.append((index, label))
                    break
    examples = []
    for index, label in chosen:
        case = patients.case(index)
        results = {}
        for name, run in runs.items():
            volume = run.normalize(jnp.asarray(case.volume[None]))
            for method in ("gradcam", "hirescam"):
                found = explain(run.model, run.variables, volume, [label], method)
                heat = np.asarray(normalize_map(found.maps)[0, 0])
                probability = float(1 / (1 + np.exp(-float(found.logits[0, label]))))
                results[name, method] = (heat, probability)
        marks = [mark.replace("_", " ") for mark, present in case.marks.items() if present]
        sharp = dataclasses.replace(patients.config, shape=_finer(patients.config))
        sharp_case = Phantom(sharp, "test", len(patients), (1, 1, 1)).case(index)
        examples.append(
            {
                "label": patients.labels[label].replace("_", " "),
                "index": index,
                "marks": marks,
                "picture": pages.picture(_panel(sharp_case, label, results)),
            }
        )
    return examples


def _finer(config: PhantomConfig) -> tuple[int, int, int]:
    """The same field of view in voxels of about 2 mm, for a picture that a reader can judge."""
    d, h, w = (round(extent / 2.0) for extent in config.field_mm)
    return d, h, w


def _panel(case: PhantomCase, label: int, results: dict[tuple[str, str], Any]) -> Figure:
    """The lesion's axial slice five times: CT, then each training and method in colour."""
    lesion = case.lesions[label]
    d = int(lesion.sum(axis=(1, 2)).argmax())
    allowed = np.asarray(case.regions[case.findings[label] > 0].any(axis=0))
    figure = figure_of(14.2, 3.4)
    axes = figure.subplots(1, 5)
    figure.subplots_adjust(0, 0, 1, 0.84, 0.01, 0)
    titles = ["CT", *(f"{TITLES[n]}\n{METHODS[m].title}" for n, m in results)]
    for ax, title, result in zip(axes, titles, [None, *results.values()], strict=True):
        draw_ct(ax, case.volume[d])
        if result is not None:
            heat = _slice_of(result[0], case.volume.shape, d)
            ax.imshow(heat, overlay_colors(), vmin=0, vmax=1)
            title += f"   p = {result[1]:.2f}"
        ax.contour(allowed[d], [0.5], colors=ORGAN, linewidths=1.1)
        ax.contour(lesion[d], [0.5], colors=LESION, linewidths=0.9, linestyles="dashed")
        ax.set_title(title, color=INK, fontsize=12)
    return figure


def _slice_of(map_dhw: np.ndarray, shape: tuple[int, ...], d: int) -> np.ndarray:
    """An axial slice of a feature map on a finer grid; both grids divide the same field evenly."""
    rows = [
        (np.asarray(index) + 0.5) * cells / size - 0.5
        for index, cells, size in zip(
            ([d], range(shape[1]), range(shape[2])), map_dhw.shape, shape, strict=True
        )
    ]
    points = np.meshgrid(*rows, indexing="ij")
    return ndimage.map_coordinates(map_dhw, points, order=1, mode="nearest")[0]
