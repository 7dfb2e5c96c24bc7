"""The page that compares two trainings: curves, table, and the same patients side by side."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from hirescam_jax.data.phantom.phantom import Phantom, PhantomCase, PhantomConfig
from hirescam_jax.evaluation.result import Evaluation
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.explain import explain, model_verdict
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.files import atomic_file
from hirescam_jax.reports.pictures import WINDOW_HU, overlay_colors
from hirescam_jax.reports.text import MAP_NAMES
from hirescam_jax.runs.run import Run

TITLES = {"baseline": "without mask loss", "mask_loss": "with mask loss"}
COLORS = {"baseline": "#8a8f98", "mask_loss": "#0b6e99"}
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
    environment = Environment(
        loader=PackageLoader("hirescam_jax.reports"), autoescape=select_autoescape(["html"])
    )
    first = next(iter(comparison.runs.values()))
    page = environment.get_template("report.html").render(
        metrics=comparison.metrics,
        titles=TITLES,
        rows=_rows(comparison.evaluations),
        maps=_map_rows(comparison.evaluations),
        summary=comparison.evaluations,
        curves=_svg(_curves(comparison.runs)),
        bars=_svg(_bars(comparison.evaluations)),
        examples=_examples(comparison, examples),
        guarantees=_guarantees(first),
        volumes={s: getattr(first.config.data, f"{s}_size", 0) for s in ("train", "val", "test")},
        shape=first.shape,
        spacing=first.spacing_mm,
        seed=first.config.seed,
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page)


def _guarantees(run: Run) -> list[dict[str, Any]]:
    """What each method's maps guarantee; the head of both trainings is of one kind."""
    verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    return [
        {"method": METHODS[m].title, "text": verdict.short(m), "holds": verdict.holds_for(m)}
        for m in EVALUATED
    ]


def _rows(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """A row a label: AUROC and OrganIoU by HiResCAM of both trainings."""
    before, after = evaluations.values()
    rows = []
    for label in before.auroc.labels:
        rows.append(
            {
                "label": label.replace("_", " "),
                "auroc": [e.auroc.labels[label] for e in (before, after)],
                "gradcam": [e.organ_iou["gradcam"].labels[label] for e in (before, after)],
                "hirescam": [e.organ_iou["hirescam"].labels[label] for e in (before, after)],
            }
        )
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
    figure, axes = _figure(9.6, 2.9, 2)
    for ax, (key, title) in zip(
        axes, (("class_loss", "classification loss"), ("mask_loss", "mask loss")), strict=True
    ):
        for name, run in runs.items():
            lines = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
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
        ax.set_xlabel("epoch   (solid: validation, dotted: training)", fontsize=9)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def _bars(evaluations: dict[str, Evaluation]) -> Figure:
    """OrganIoU by HiResCAM, a pair of bars a label, with intervals."""
    figure, (ax,) = _figure(9.6, 3.0, 1)
    labels = list(next(iter(evaluations.values())).auroc.labels)
    for i, (name, result) in enumerate(evaluations.items()):
        intervals = result.organ_iou["hirescam"].labels.values()
        # None becomes NaN.
        value, low, high = np.array([(i.value, i.low, i.high) for i in intervals], float).T
        x = np.arange(len(labels)) + (i - 0.5) * 0.38
        ax.bar(x, value, 0.36, color=COLORS[name], label=TITLES[name])
        ax.errorbar(x, value, [value - low, high - value], fmt="none", ecolor="#333", lw=1)
    names = [label.replace("_", "\n", 1).replace("_", " ") for label in labels]
    ax.set_xticks(np.arange(len(labels)), names, fontsize=8)
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
                "picture": _png(_panel(sharp_case, label, results)),
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
    figure = Figure(figsize=(14.2, 3.2), facecolor="#000000")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 5)
    figure.subplots_adjust(0, 0, 1, 0.88, 0.01, 0)
    titles = ["CT", *(f"{METHODS[m].title}, {TITLES[n]}" for n, m in results)]
    for ax, title, result in zip(axes, titles, [None, *results.values()], strict=True):
        ax.imshow(case.volume[d], "gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
        if result is not None:
            heat = _slice_of(result[0], case.volume.shape, d)
            ax.imshow(heat, overlay_colors(), vmin=0, vmax=1)
            title += f"   p = {result[1]:.2f}"
        ax.contour(allowed[d], [0.5], colors=ORGAN, linewidths=1.1)
        ax.contour(lesion[d], [0.5], colors=LESION, linewidths=0.9, linestyles="dashed")
        ax.set_title(title, color="#e8e8e8", fontsize=9.5)
        ax.set_axis_off()
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


def _figure(width: float, height: float, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e7eb", lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return figure, axes


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor=figure.get_facecolor())
    return base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
