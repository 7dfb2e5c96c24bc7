"""An evaluation as text: what `hirescam evaluate` prints."""

from collections.abc import Collection, Iterator, Mapping

from hirescam_jax.evaluation.result import (
    Evaluation,
    Faithfulness,
    LabelScores,
    LesionScores,
    MapScores,
    RunEvaluation,
)
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.reports.text import MAP_NAMES, aligned, interval_text, map_name

LESION_MEASURES = {
    "iou": "IoU",
    "dice": "Dice",
    "otsu_iou": "IoU (Otsu)",
    "pointing": "pointing",
    "energy": "energy",
    "rank_accuracy": "ranks",
    "average_precision": "AP",
}
FAITHFULNESS = {"insertion": "insertion", "deletion": "deletion (low is good)", "road": "ROAD"}


def shown_lesions(of_map: LesionScores) -> list[MapScores]:
    """Those of `LESION_MEASURES`."""
    return [getattr(of_map, key) for key in LESION_MEASURES]


def table(result: RunEvaluation) -> str:
    """A label a row; a map a row; an organ a row; and what is to be said of them."""
    scores = result.scores
    parts = [label_table(scores)]
    if scores.organ_iou:
        parts.append(map_table(scores))
    if any(of_map.regions for of_map in scores.organ_iou.values()):
        parts.append(region_table(scores))
    parts.append("\n".join(_notes(result)))
    return "\n\n".join(parts)


def _notes(result: RunEvaluation) -> Iterator[str]:
    scores = result.scores
    if scores.calibration and scores.calibration.brier:
        error = scores.calibration.expected_calibration_error.mean
        yield (
            f"Calibration: expected error {interval_text(error)} in {scores.calibration.bins} "
            f"bins, Brier score {interval_text(scores.calibration.brier.mean)}"
        )
    for name, of_map in scores.organ_iou.items():
        if name in EVALUATED and of_map.undefined_pairs:
            yield (
                f"OrganIoU {map_name(name)}: over {of_map.pairs} pairs of a volume and a "
                f"finding; {of_map.undefined_pairs} more have an organ without a cell or of all "
                "cells, or a label without a threshold"
            )
    residual = scores.completeness
    if residual:
        yield (
            f"|sum of the HiResCAM map + bias - logit|: {residual.mean:.1e} in the mean, at "
            f"most {residual.worst:.1e}"
        )
    for name, guarantee in (result.head.maps if result.head else {}).items():
        yield f"{map_name(name)}: {guarantee.text}"
    lesions = (scores.lesions or {}).get("hirescam")
    if lesions and lesions.otsu_iou.undefined_pairs:
        yield (
            f"Lesions: over {lesions.otsu_iou.pairs} pairs of a volume and a finding; "
            f"{lesions.otsu_iou.undefined_pairs} more have a lesion without a cell"
        )
    in_sample = (
        "its thresholds and its organ prior are made of the same volumes, so that OrganIoU is "
        "in-sample"
    )
    if result.validation:
        other = result.validation
        means = {"AUROC": other.auroc, "OrganIoU HiResCAM": other.organ_iou.get("hirescam")}
        figures = [f"{name} {interval_text(m.mean)}" for name, m in means.items() if m]
        yield f"The validation split ({other.volumes} volumes; {in_sample}): {', '.join(figures)}"
    elif result.split == "validation":
        yield f"This is the validation split: {in_sample}"
    yield (
        f"In brackets: 95 % bootstrap intervals over {scores.patients} patients "
        f"({scores.volumes} volumes), too narrow for fewer than ten; none for labels with fewer "
        "than five positive patients (with fewer than two they are in no mean either), for means "
        "of mostly such labels, and where average precision has too much bias for one. "
        "Positives: patients with the label"
    )


def label_table(scores: Evaluation) -> str:
    """Patients with the label, AUROC, average precision and OrganIoU of the model's maps, a label
    a row."""
    columns: dict[str, LabelScores] = {"AUROC": scores.auroc, "AP": scores.average_precision}
    for name, of_map in scores.organ_iou.items():
        if name in EVALUATED:
            columns[f"OrganIoU {name}"] = of_map
    labels = scores.auroc.labels
    rows = [["", "positives", *columns]]
    means = [interval_text(c.mean) for c in columns.values()]
    rows.append([_mean_of(columns.values()), "", *means])
    if len({c.count for c in columns.values()}) > 1:
        of = [f"{c.count} of {len(labels)} labels" for c in columns.values()]
        rows.append(["of", "", *of])
    for label in labels:
        cells = [interval_text(c.labels[label]) for c in columns.values()]
        rows.append([label, positives_text(scores, label), *cells])
    return aligned(rows)


def positives_text(scores: Evaluation, label: str) -> str:
    """How many patients have the label; volumes, of an evaluation that does not tell."""
    found = scores.positive_patients or scores.positives or {}
    return str(found.get(label, ""))


def map_table(scores: Evaluation) -> str:
    """Means over the labels, a map a row: those of the model, then those that no model made. A mean
    over fewer labels than most has their number behind it."""
    lesions = scores.lesions or {}
    shown = {
        name: [of_map, *(shown_lesions(lesions[name]) if lesions else [])]
        for name, of_map in _ordered(scores.organ_iou).items()
    }
    counts = [measure.count for measures in shown.values() for measure in measures]
    most, total = max(counts), len(scores.auroc.labels)
    of = f"{most} of {total} labels" if most < total else f"{total} labels"
    fewer = ", (n): over n" if min(counts) < most else ""
    rows = [[f"maps, means over {of}{fewer}", "OrganIoU"]]
    if lesions:
        rows[0] += [f"lesions: {next(iter(LESION_MEASURES.values()))}"]
        rows[0] += list(LESION_MEASURES.values())[1:]
    for name, (of_map, *against_lesions) in shown.items():
        means = [m.mean.value for m in against_lesions]
        cells = [interval_text(of_map.mean)]
        cells += ["n/a" if mean is None else f"{mean:.3f}" for mean in means]
        defined = [measure.count for measure in shown[name]]
        cells = [c + f" ({n})" * (n < most) for c, n in zip(cells, defined, strict=True)]
        rows.append([map_name(name), *cells])
    return aligned(rows)


def region_table(scores: Evaluation) -> str:
    """OrganIoU by the organ in which the finding is."""
    maps = _ordered(scores.organ_iou).items()
    shown = {name: of_map.regions for name, of_map in maps if of_map.regions}
    rows = [["OrganIoU by organ", "pairs", *(map_name(name) for name in shown)]]
    for region, first in next(iter(shown.values())).items():
        cells = [interval_text(of_map[region]) for of_map in shown.values()]
        rows.append([region, str(first.pairs), *cells])
    return aligned(rows)


def faithfulness_table(result: Faithfulness) -> str:
    """A map a row; a mean over fewer findings than the header says has their number behind it."""
    of = f"{result.volumes} volumes of {result.patients} patients"
    rows = [[f"{result.pairs} findings in {of}", *FAITHFULNESS.values()]]
    for name, of_map in result.methods.items():
        areas = of_map.insertion, of_map.deletion, of_map.road
        cells = [interval_text(a) + f" ({a.pairs})" * (a.pairs != result.pairs) for a in areas]
        rows.append([map_name(name), *cells])
    return aligned(rows)


def _ordered(maps: Mapping[str, MapScores]) -> dict[str, MapScores]:
    """The model's maps, then those that no model made."""
    order = [*MAP_NAMES]
    return dict(sorted(maps.items(), key=lambda item: order.index(item[0])))


def _mean_of(measures: Collection[LabelScores]) -> str:
    """ "mean of 9 of 10 labels", or "mean" where all count, or not the same of each measure."""
    counts = {(m.count, len(m.labels)) for m in measures}
    defined, total = next(iter(counts))
    return (
        f"mean of {defined} of {total} labels" if len(counts) == 1 and defined < total else "mean"
    )
