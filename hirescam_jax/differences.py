"""What one run gains over another on the same volumes, with paired intervals: both are measured in
the same resamples, by patient, so that what is hard for both does not widen the interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hirescam_jax.errors import UserError
from hirescam_jax.metrics import delong_test
from hirescam_jax.progress import progress
from hirescam_jax.resampling import (
    Resampled,
    draws,
    group_numbers,
    intervals,
    mean_of,
    resampled_means,
    resampled_ranks,
)
from hirescam_jax.summary_text import MAP_NAMES
from hirescam_jax.table_text import MISSING, Interval, Table
from hirescam_jax.values import Values

MAPS = ("hirescam", "gradcam")  # the model's
Row = tuple[tuple[str, ...], dict[str, Interval]]  # texts, and a cell a column


def difference_tables(
    values: Mapping[str, Values],
    against: str = "",
    split: str = "test",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Table]:
    """ "differences": a row a run, less the reference: means over the labels that both have;
    "differences_labels": a row a label and run, with the p of DeLong's paired test, by patient.

    Args:
        values: of each run, by its name.
        against: the reference; by default the first.

    Returns:
        {} where no run has the reference's volumes.

    Raises:
        UserError: no run is called `against`, or none has its volumes.
    """
    reference = against or next(iter(values))
    if reference not in values:
        raise UserError(f"--against {against}: no such run here: choose from {', '.join(values)}")
    first = values[reference]
    others = {
        name: _in_order(one, first.labels)
        for name, one in values.items()
        if name != reference and _same_volumes(one, first)
    }
    left_out = [name for name in values if name != reference and name not in others]
    if not others and against:
        raise UserError(f"--against {against}: no other run was measured on the same volumes")
    if not others:
        return {}
    numbers = group_numbers(len(first.patients), first.patients)
    times = draws(numbers, resamples, seed)
    before = _measures(first, times, numbers)
    overall: list[Row] = []
    of_labels: dict[str, list[Row]] = {label: [] for label in first.labels}
    for name, one in progress(others.items(), "differences", "run"):
        after = _measures(one, times, numbers)
        usual = int(_both(before["AUROC"], after["AUROC"]).sum())
        texts = name, f"{usual} of {len(first.labels)}"
        overall.append((texts, _overall(before, after, usual)))
        columns = {key: _by_label(before[key], after[key]) for key in before if key in after}
        for k, (label, rows) in enumerate(of_labels.items()):
            p = delong_test(one.logits[:, k], first.logits[:, k], first.truth[:, k], numbers).p
            test = {"AUROC p": _figure(p, ".2g")}
            rows.append(((label, name), {key: cells[k] for key, cells in columns.items()} | test))
    note = (
        f"less '{reference}', {split} split, {len(first.patients)} volumes; 95 % intervals of "
        f"resamples of {len(set(first.patients))} patients, the same for both"
    )
    notes = [f"Measured on other volumes, and so left out: {', '.join(left_out)}."] * bool(left_out)
    notes.append("OrganIoU of each run is at its own thresholds, of its validation split.")
    test_note = "p: DeLong's paired test of AUROC, by patient."
    return {
        "differences": _table(f"Means over labels {note}.", ("model", "labels"), overall, notes),
        "differences_labels": _table(
            f"By label {note}.",
            ("label", "model"),
            [row for rows in of_labels.values() for row in rows],
            [*notes, test_note],
        ),
    }


def _table(title: str, head: tuple[str, ...], rows: list[Row], notes: list[str]) -> Table:
    """Of rows that need not have the same columns: a network may have no maps."""
    names = tuple(dict.fromkeys(name for _, cells in rows for name in cells))
    filled = ((texts, tuple(cells.get(n, MISSING) for n in names)) for texts, cells in rows)
    return Table(title, head, names, tuple(filled), notes=tuple(notes)).without_empty()


def _same_volumes(one: Values, other: Values) -> bool:
    return one.content == other.content and np.array_equal(one.patients, other.patients)


def _in_order(values: Values, labels: Sequence[str]) -> Values:
    """The same with its labels in another order."""
    order = [values.labels.index(label) for label in labels]
    iou = {name: value[:, order] for name, value in values.organ_iou.items()}
    return values._replace(
        labels=tuple(labels),
        logits=values.logits[:, order],
        truth=values.truth[:, order],
        organ_iou=iou,
    )


def _measures(values: Values, times: np.ndarray, numbers: np.ndarray) -> dict[str, Resampled]:
    """AUROC and average precision, and OrganIoU of the model's maps."""
    ranks = resampled_ranks(values.logits, values.truth, times, numbers)
    found: dict[str, Resampled] = {"AUROC": ranks[0], "average precision": ranks[1]}
    for name in MAPS:
        if name in values.organ_iou:
            iou = resampled_means(values.organ_iou[name], times, numbers)
            found[f"OrganIoU {MAP_NAMES[name]}"] = iou
    return found


def _overall(
    before: Mapping[str, Resampled], after: Mapping[str, Resampled], usual: int
) -> dict[str, Interval]:
    cells: dict[str, Interval] = {}
    for name, old in before.items():
        if name not in after:
            continue
        both = _both(old, after[name])
        old, new = mean_of(old, both), mean_of(after[name], both)
        counts = {"labels": int(both.sum()), "usual": usual}
        cells[name] = _cell(new.value - old.value, new.drawn - old.drawn, "+.3f") | counts
        if name.startswith("OrganIoU"):
            with np.errstate(divide="ignore", invalid="ignore"):
                gains = new.value / old.value - 1, new.drawn / old.drawn - 1
            value, drawn = (np.where(np.isfinite(gain), gain, np.nan) for gain in gains)
            cells[f"{name}, relative"] = _cell(value, drawn, "+.1%") | counts
    return cells


def _both(before: Resampled, after: Resampled) -> np.ndarray:
    """[K], the labels of the mean."""
    undefined = np.isnan(before.value) | np.isnan(after.value)
    return before.known & after.known & ~undefined


def _by_label(before: Resampled, after: Resampled) -> list[Interval]:
    known = before.known & after.known
    cells = intervals(Resampled(after.value - before.value, after.drawn - before.drawn, known))
    return [{**cell, "form": "+.3f"} for cell in cells]


def _cell(value: np.ndarray, drawn: np.ndarray, form: str) -> Interval:
    (cell,) = intervals(Resampled(value, drawn, ~np.isnan(value)))
    return {**cell, "form": form}


def _figure(value: float, form: str) -> dict[str, Any]:
    return {"value": None if np.isnan(value) else value, "low": None, "high": None, "form": form}
