"""What the tables of runs are made of: measures of an evaluation as cells, and what is said below.

Means are set side by side only where they are over the same: other labels, volumes, pairs or grids
are marked, and none of them stands out as the best.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from hirescam_jax.evaluation.result import Evaluation, LabelScores, MapScores, RunEvaluation
from hirescam_jax.evaluation.text import shown_lesions
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.metrics.intervals import UNKNOWN, Interval
from hirescam_jax.reports.tables import MISSING, Cell
from hirescam_jax.reports.text import MAP_NAMES, map_name

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

    get: a split's measure, or None.
    better: 1 if more is better, -1 if less, 0 if neither.
    map: the model's map that it is of, if any.
    """

    name: str
    get: Callable[[Evaluation], LabelScores | None]
    better: int = 1
    map: str = ""


def _organ_iou(name: str) -> Measure:
    own = name in EVALUATED
    title = f"OrganIoU {MAP_NAMES[name]}"
    return Measure(title, lambda e: e.organ_iou.get(name), int(own), name if own else "")


MEASURES = (
    Measure("AUROC", lambda e: e.auroc),
    Measure("average precision", lambda e: e.average_precision),
    Measure(
        "calibration error",
        lambda e: e.calibration and e.calibration.expected_calibration_error,
        better=-1,
    ),
    *map(_organ_iou, MAP_NAMES),
)


def measures_of(run: RunEvaluation) -> list[LabelScores]:
    """Those of `MEASURES` that the run has."""
    found = (measure.get(run.scores) for measure in MEASURES)
    return [scores for scores in found if scores]


def regions_of(scores: LabelScores | None) -> Mapping[str, Interval]:
    return scores.regions or {} if isinstance(scores, MapScores) else {}


# -- what is measured -----------------------------------------------------------------------------


def about(evaluations: Mapping[str, RunEvaluation], split: str) -> tuple[str, tuple[str, ...]]:
    """Split, volumes and intervals, for a title; and the notes that its table needs."""
    volumes = {e.scores.volumes for e in evaluations.values()}
    count = f"{volumes.pop()} volumes" if len(volumes) == 1 else "volumes differ between the runs"
    notes = [IN_SAMPLE] * (split == "validation")
    notes += [OTHER_VOLUMES] * bool(others(evaluations))
    notes += _undefined_pairs(evaluations)
    notes += [OTHER_PAIRS] * (not one_set_of_pairs(evaluations))
    return f"{split} split, {count}; 95 % intervals", tuple(notes)


def others(evaluations: Mapping[str, RunEvaluation]) -> list[str]:
    """The runs that were measured on other volumes than the first."""
    measured = {name: (e.scores.content, e.scores.volumes) for name, e in evaluations.items()}
    first = next(iter(measured.values()))
    return [name for name, volumes in measured.items() if volumes != first]


def one_set_of_pairs(evaluations: Mapping[str, RunEvaluation]) -> bool:
    """Whether OrganIoU of all runs with maps, on the first one's volumes, is over as many pairs, on
    the same grid."""
    apart = others(evaluations)
    found = {
        (grid_text(e), pairs_text(e))
        for name, e in evaluations.items()
        if name not in apart and _hirescam(e)
    }
    return len(found) < 2


def _hirescam(run: RunEvaluation) -> MapScores | None:
    return run.scores.organ_iou.get("hirescam")


def _undefined_pairs(evaluations: Mapping[str, RunEvaluation]) -> Iterator[str]:
    by_count: dict[str, list[str]] = {}
    for name, e in evaluations.items():
        found = _hirescam(e)
        if found and found.undefined_pairs:
            count = f"{found.undefined_pairs} of {(found.pairs or 0) + found.undefined_pairs}"
            by_count.setdefault(count, []).append(name)
    if by_count:
        texts = [f"{count} ({', '.join(names)})" for count, names in by_count.items()]
        yield (
            "Pairs of a volume and a finding without OrganIoU, as the organ has no cell of the "
            f"grid or all of them, or the label no threshold: {'; '.join(texts)}."
        )


def grid_text(run: RunEvaluation) -> str:
    return "×".join(map(str, run.scores.grid or ()))


def pairs_text(run: RunEvaluation) -> str:
    """ "287 of 288": how many pairs of a volume and a finding OrganIoU is over."""
    return _of_pairs(_hirescam(run))


def _of_pairs(found: MapScores | None) -> str:
    if not found or found.pairs is None:
        return ""
    return f"{found.pairs} of {found.pairs + (found.undefined_pairs or 0)}"


def organ_pairs_text(run: RunEvaluation, organ: str) -> str:
    found = _hirescam(run)
    region = (found.regions or {}).get(organ) if found else None
    return str(region.pairs) if region else ""


def labels_text(run: RunEvaluation) -> str:
    return f"{run.scores.auroc.count} of {len(run.scores.auroc.labels)}"


# -- cells ----------------------------------------------------------------------------------------


def mean_cell(run: RunEvaluation, measure: Measure) -> Cell:
    found = measure.get(run.scores)
    labels, usual = found.count if found else 0, run.scores.auroc.count
    mean = found.mean if found else UNKNOWN
    return Cell(**vars(mean), labels=labels, usual=usual, holds=_holds(run, measure.map))


def cell_of(run: RunEvaluation, measure: Measure, interval: Interval | None) -> Cell:
    """Of a label or a region."""
    ends = interval or UNKNOWN
    return Cell(ends.value, ends.low, ends.high, holds=_holds(run, measure.map))


def _holds(run: RunEvaluation, method: str) -> bool | None:
    guarantee = run.head.maps.get(method) if run.head else None
    return guarantee and guarantee.holds


def residual_cell(run: RunEvaluation) -> Cell:
    found = run.scores.completeness
    return Cell(found.mean, None, None, form=".1e") if found else MISSING


Row = tuple[tuple[str, ...], tuple[Cell, ...]]


def lesion_notes(evaluations: Mapping[str, RunEvaluation]) -> list[str]:
    """What to say of pairs where some have no measure."""
    maps = [of for e in evaluations.values() for of in (e.scores.lesions or {}).values()]
    undefined = (measure.undefined_pairs for of in maps for measure in shown_lesions(of))
    return [LESION_PAIRS] * any(undefined)


def lesion_rows(name: str, run: RunEvaluation) -> Iterator[Row]:
    """A row a map: the run, the map, labels and pairs; then its measures against lesions."""
    found = {method: shown_lesions(of) for method, of in (run.scores.lesions or {}).items()}
    usual = max((measure.count for of in found.values() for measure in of), default=0)
    for method in [*MAP_NAMES, *(found.keys() - MAP_NAMES.keys())]:
        if method not in found:
            continue
        measures = found[method]
        most = max(measures, key=lambda measure: measure.pairs or 0)
        labels = f"{usual} of {len(run.scores.auroc.labels)}"
        cells = (
            Cell(**vars(m.mean), labels=m.count, usual=usual, holds=_holds(run, method))
            for m in measures
        )
        yield (name, map_name(method), labels, _of_pairs(most)), tuple(cells)
