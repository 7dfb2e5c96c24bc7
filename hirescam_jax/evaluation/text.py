"""An evaluation as text: what `hirescam evaluate` prints."""

from collections.abc import Iterator
from typing import Any

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


def table(result: dict[str, Any]) -> str:
    """An evaluation as text: a label a row; a map a row; an organ a row."""
    parts = [label_table(result)]
    if result["organ_iou"]:
        parts.append(map_table(result))
    if any(of_map["regions"] for of_map in result["organ_iou"].values()):
        parts.append(region_table(result))
    parts.append("\n".join(_notes(result)))
    return "\n\n".join(parts)


def _notes(result: dict[str, Any]) -> Iterator[str]:
    calibration = result["calibration"]
    error, brier = (calibration[n]["mean"] for n in ("expected_calibration_error", "brier"))
    yield (
        f"Calibration: expected error {interval_text(error)} in {calibration['bins']} bins, "
        f"Brier score {interval_text(brier)}"
    )
    for name, of_map in result["organ_iou"].items():
        if name in EVALUATED and of_map["undefined_pairs"]:
            yield (
                f"OrganIoU {map_name(name)}: over {of_map['pairs']} pairs of a volume and a "
                f"finding; {of_map['undefined_pairs']} more have an organ without a cell or of all "
                "cells, or a label without a threshold"
            )
    residual = result["completeness"]
    if residual:
        yield (
            f"|sum of the HiResCAM map + bias - logit|: {residual['mean']:.1e} in the mean, at "
            f"most {residual['worst']:.1e}"
        )
    for name, of_map in result.get("head", {}).get("maps", {}).items():
        yield f"{map_name(name)}: {of_map['text']}"
    lesions = (result["lesions"] or {}).get("hirescam", {}).get("otsu_iou")
    if lesions and lesions["undefined_pairs"]:
        yield (
            f"Lesions: over {lesions['pairs']} pairs of a volume and a finding; "
            f"{lesions['undefined_pairs']} more have a lesion without a cell"
        )
    in_sample = (
        "its thresholds and its organ prior are made of the same volumes, so that OrganIoU is "
        "in-sample"
    )
    if "validation" in result:
        other = result["validation"]
        means = {"AUROC": other["auroc"], "OrganIoU HiResCAM": other["organ_iou"].get("hirescam")}
        figures = [f"{name} {interval_text(m['mean'])}" for name, m in means.items() if m]
        yield (
            f"The validation split ({other['volumes']} volumes; {in_sample}): {', '.join(figures)}"
        )
    elif result.get("split") == "validation":
        yield f"This is the validation split: {in_sample}"
    yield (
        f"In brackets: 95 % bootstrap intervals over {result['patients']} patients "
        f"({result['volumes']} volumes), too narrow for fewer than ten; none for labels with fewer "
        "than five positive patients (with fewer than two they are in no mean either), for means "
        "of mostly such labels, and where average precision has too much bias for one. "
        "Positives: patients with the label"
    )


def label_table(result: dict[str, Any]) -> str:
    """Patients with the label, AUROC, average precision and OrganIoU of the model's maps, a label
    a row."""
    columns = {"AUROC": result["auroc"], "AP": result["average_precision"]}
    for name, of_map in result["organ_iou"].items():
        if name in EVALUATED:
            columns[f"OrganIoU {name}"] = of_map
    labels = result["auroc"]["labels"]
    rows = [["", "positives", *columns]]
    means = [interval_text(c["mean"]) for c in columns.values()]
    rows.append([_mean_of(columns.values()), "", *means])
    if len({c["defined"] for c in columns.values()}) > 1:
        of = [f"{c['defined']} of {len(labels)} labels" for c in columns.values()]
        rows.append(["of", "", *of])
    for label in labels:
        cells = [interval_text(c["labels"][label]) for c in columns.values()]
        rows.append([label, str(result["positive_patients"][label]), *cells])
    return aligned(rows)


def map_table(result: dict[str, Any]) -> str:
    """Means over the labels, a map a row: those of the model, then those that no model made. A mean
    over fewer labels than most has their number behind it."""
    lesions = result["lesions"]
    shown = {
        name: [of_map, *(lesions[name][key] for key in LESION_MEASURES if lesions)]
        for name, of_map in _ordered(result["organ_iou"])
    }
    counts = [measure["defined"] for measures in shown.values() for measure in measures]
    most, total = max(counts), len(result["auroc"]["labels"])
    of = f"{most} of {total} labels" if most < total else f"{total} labels"
    fewer = ", (n): over n" if min(counts) < most else ""
    rows = [[f"maps, means over {of}{fewer}", "OrganIoU"]]
    if lesions:
        rows[0] += [f"lesions: {next(iter(LESION_MEASURES.values()))}"]
        rows[0] += list(LESION_MEASURES.values())[1:]
    for name, (of_map, *against_lesions) in shown.items():
        means = [m["mean"]["value"] for m in against_lesions]
        cells = [interval_text(of_map["mean"])]
        cells += ["n/a" if mean is None else f"{mean:.3f}" for mean in means]
        defined = [measure["defined"] for measure in shown[name]]
        cells = [c + f" ({n})" * (n < most) for c, n in zip(cells, defined, strict=True)]
        rows.append([map_name(name), *cells])
    return aligned(rows)


def region_table(result: dict[str, Any]) -> str:
    """OrganIoU by the organ in which the finding is."""
    maps = _ordered(result["organ_iou"])
    shown = {name: of_map["regions"] for name, of_map in maps if of_map["regions"]}
    rows = [["OrganIoU by organ", "pairs", *(map_name(name) for name in shown)]]
    for region, first in next(iter(shown.values())).items():
        cells = [interval_text(of_map[region]) for of_map in shown.values()]
        rows.append([region, str(first["pairs"]), *cells])
    return aligned(rows)


def _ordered(maps: dict[str, Any]) -> list[tuple[str, Any]]:
    """The model's maps, then those that no model made."""
    order = [*MAP_NAMES]
    return sorted(maps.items(), key=lambda item: order.index(item[0]))


def _mean_of(measures: Any) -> str:
    """ "mean of 9 of 10 labels", or "mean" where all count, or not the same of each measure."""
    counts = {(m["defined"], len(m["labels"])) for m in measures}
    defined, total = next(iter(counts))
    return (
        f"mean of {defined} of {total} labels" if len(counts) == 1 and defined < total else "mean"
    )
