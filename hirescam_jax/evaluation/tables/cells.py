"""What the tables of runs are made of: measures of an evaluation as cells, and what is said below.

Means are set side by side only where they are over the same: other labels, volumes, pairs or grids
are marked, and none of them stands out as the best.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hirescam_jax.evaluation.text import LESION_MEASURES
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.reports.tables import MISSING, Interval
from hirescam_jax.reports.text import MAP_NAMES

IN_SAMPLE = (
    "The thresholds of the maps are chosen on this split, and its masks make the organ prior: "
    "OrganIoU, and IoU and Dice with lesions, are in-sample, and higher than on other volumes."
)
OTHER_VOLUMES = "‡ Measured on other volumes than the first."
OTHER_PAIRS = (
    "Not all maps are on the same grid and over the same pairs: between such runs their measures "
    "cannot be compared, and none stands out."
)
LESION_PAIRS = (
    "pairs: of a volume and a finding; those left out have a lesion without a cell, or no map. IoU "
    "and Dice need a threshold of the validation split, too."
)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column.

    get: an evaluation -> the measure's {"mean": ..., "labels": ..., ...}, or None.
    better: 1 if more is better, -1 if less, 0 if neither.
    map: the model's map that it is of, if any.
    """

    name: str
    get: Callable[[dict[str, Any]], dict[str, Any] | None]
    better: int = 1
    map: str = ""


def _organ_iou(name: str) -> Measure:
    own = name in EVALUATED
    title = f"OrganIoU {MAP_NAMES[name]}"
    return Measure(title, lambda e: e["organ_iou"].get(name), int(own), name if own else "")


MEASURES = (
    Measure("AUROC", lambda e: e["auroc"]),
    Measure("average precision", lambda e: e["average_precision"]),
    Measure(
        "calibration error",
        lambda e: e.get("calibration", {}).get("expected_calibration_error"),
        better=-1,
    ),
    *map(_organ_iou, MAP_NAMES),
)


def labels_of(evaluation: Any) -> list[str]:
    return list(evaluation["auroc"]["labels"])


# -- what is measured -----------------------------------------------------------------------------


def about(evaluations: Mapping[str, Any], split: str) -> tuple[str, tuple[str, ...]]:
    """Split, volumes and intervals, for a title; and the notes that its table needs."""
    volumes = {e["volumes"] for e in evaluations.values()}
    count = f"{volumes.pop()} volumes" if len(volumes) == 1 else "volumes differ between the runs"
    notes = [IN_SAMPLE] * (split == "validation")
    notes += [OTHER_VOLUMES] * bool(others(evaluations))
    notes += _undefined_pairs(evaluations)
    notes += [OTHER_PAIRS] * (not one_set_of_pairs(evaluations))
    return f"{split} split, {count}; 95 % intervals", tuple(notes)


def others(evaluations: Mapping[str, Any]) -> list[str]:
    """The runs that were measured on other volumes than the first."""
    first = next(iter(evaluations.values()))
    keys = ("content", "volumes")
    return [name for name, e in evaluations.items() if any(e.get(k) != first.get(k) for k in keys)]


def one_set_of_pairs(evaluations: Mapping[str, Any]) -> bool:
    """Whether OrganIoU of all runs with maps, on the first one's volumes, is over as many pairs, on
    the same grid."""
    apart = others(evaluations)
    found = {
        (grid_text(e), pairs_text(e))
        for name, e in evaluations.items()
        if name not in apart and e["organ_iou"].get("hirescam")
    }
    return len(found) < 2


def _undefined_pairs(evaluations: Mapping[str, Any]) -> Iterator[str]:
    by_count: dict[str, list[str]] = {}
    for name, e in evaluations.items():
        found = e["organ_iou"].get("hirescam") or {}
        if found.get("undefined_pairs"):
            count = f"{found['undefined_pairs']} of {found['pairs'] + found['undefined_pairs']}"
            by_count.setdefault(count, []).append(name)
    if by_count:
        texts = [f"{count} ({', '.join(names)})" for count, names in by_count.items()]
        yield (
            "Pairs of a volume and a finding without OrganIoU, as the organ has no cell of the "
            f"grid or all of them, or the label no threshold: {'; '.join(texts)}."
        )


def grid_text(evaluation: Any) -> str:
    return "×".join(map(str, evaluation.get("grid") or ()))


def pairs_text(evaluation: Any) -> str:
    """ "287 of 288": how many pairs of a volume and a finding OrganIoU is over."""
    return _of_pairs(evaluation["organ_iou"].get("hirescam") or {})


def _of_pairs(found: Mapping[str, Any]) -> str:
    if "pairs" not in found:
        return ""
    return f"{found['pairs']} of {found['pairs'] + found['undefined_pairs']}"


def organ_pairs_text(evaluation: Any, organ: str) -> str:
    found = (evaluation["organ_iou"].get("hirescam") or {}).get("regions", {}).get(organ, {})
    return str(found.get("pairs", ""))


def labels_text(evaluation: Any) -> str:
    return f"{_defined(MEASURES[0].get(evaluation))} of {len(labels_of(evaluation))}"


def positives_text(evaluation: Any, label: str) -> str:
    """How many patients have the label; volumes, of an evaluation that does not tell."""
    found = evaluation.get("positive_patients") or evaluation.get("positives") or {}
    return str(found.get(label, ""))


def _defined(found: Mapping[str, Any] | None) -> int:
    """How many labels are in the mean."""
    found = found or {}
    known = sum(cell["value"] is not None for cell in found.get("labels", {}).values())
    return found.get("defined", known)


# -- cells ----------------------------------------------------------------------------------------


def cell_of(
    evaluation: Any, measure: Measure, part: str = "mean", key: str | None = None
) -> Interval:
    """Of the mean, or of a label or region `key` of `part`."""
    result = measure.get(evaluation)
    found = (result or {}).get(part, MISSING if key is None else {})
    cell = found if key is None else found.get(key, MISSING)
    cell = {end: cell[end] for end in ("value", "low", "high")}
    if key is None:
        cell |= {"labels": _defined(result), "usual": _defined(MEASURES[0].get(evaluation))}
    return cell | _guarantee(evaluation, measure.map)


def _guarantee(evaluation: Any, name: str) -> dict[str, bool]:
    maps = (evaluation.get("head") or {}).get("maps", {})
    return {"holds": bool(maps[name]["holds"])} if name in maps else {}


def residual_cell(evaluation: Any) -> Interval:
    found = evaluation.get("completeness")
    return MISSING if not found else MISSING | {"value": float(found["mean"]), "form": ".1e"}


Row = tuple[tuple[str, ...], tuple[Interval, ...]]


def lesion_notes(evaluations: Mapping[str, Any]) -> list[str]:
    """What to say of pairs where some have no measure."""
    found = [e.get("lesions") or {} for e in evaluations.values()]
    measures = [
        of_map[key] for maps in found for of_map in maps.values() for key in LESION_MEASURES
    ]
    return [LESION_PAIRS] * any(measure.get("undefined_pairs") for measure in measures)


def lesion_rows(name: str, evaluation: Any) -> Iterator[Row]:
    """A row a map: the run, the map, labels and pairs; then its measures against lesions."""
    found = evaluation.get("lesions") or {}
    counts = [_defined(of_map[key]) for of_map in found.values() for key in LESION_MEASURES]
    usual = max(counts, default=0)
    for of_map in [*MAP_NAMES, *(found.keys() - MAP_NAMES.keys())]:
        if of_map not in found:
            continue
        title = MAP_NAMES.get(of_map) or of_map
        measures = [found[of_map][key] for key in LESION_MEASURES]
        most = max(measures, key=lambda measure: measure.get("pairs", 0))
        labels = f"{usual} of {len(labels_of(evaluation))}"
        cells = (
            {end: measure["mean"][end] for end in ("value", "low", "high")}
            | {"labels": _defined(measure), "usual": usual}
            | _guarantee(evaluation, of_map)
            for measure in measures
        )
        yield (name, title, labels, _of_pairs(most)), tuple(cells)
