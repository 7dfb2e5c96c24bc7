"""What one run gains over another on the same volumes, with paired intervals: both are measured in
the same resamples, by patient, so that what is hard for both does not widen the interval."""

from collections.abc import Mapping, Sequence

import numpy as np

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.values import Values
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.metrics import delong_test
from hirescam_jax.metrics.intervals import (
    Resampled,
    draws,
    group_numbers,
    intervals,
    mean_of,
    null,
    resampled_means,
    resampled_ranks,
)
from hirescam_jax.progress import progress
from hirescam_jax.reports.tables import MISSING, Cell, Table
from hirescam_jax.reports.text import MAP_NAMES

Row = tuple[tuple[str, ...], dict[str, Cell]]  # texts, and a cell a column


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
    ranks = _ranks(first, times, numbers)
    dropped: dict[str, str] = {}
    overall: list[Row] = []
    of_labels: dict[str, list[Row]] = {label: [] for label in first.labels}
    for name, one in progress(others.items(), "differences", "run"):
        old, new, dropped[name] = _same_pairs(first, one)
        before = ranks | _maps(old, times, numbers)
        after = _ranks(one, times, numbers) | _maps(new, times, numbers)
        usual = int(_both(before["AUROC"], after["AUROC"]).sum())
        texts = name, f"{usual} of {len(first.labels)}"
        overall.append((texts, _overall(before, after, usual)))
        columns = {n: _cells(_less(after[n], before[n]), "+.3f") for n in before}
        for k, (label, rows) in enumerate(of_labels.items()):
            p = delong_test(one.logits[:, k], first.logits[:, k], first.truth[:, k], numbers).p
            test = {"AUROC p": Cell(null(p), None, None, form=".2g")}
            rows.append(((label, name), {key: cells[k] for key, cells in columns.items()} | test))
    note = (
        f"less '{reference}', {split} split, {len(first.patients)} volumes; 95 % intervals of "
        f"resamples of {len(set(first.patients))} patients, the same for both"
    )
    notes = [f"Measured on other volumes, and so left out: {', '.join(left_out)}."] * bool(left_out)
    notes.append(
        "Intervals of labels with fewer than ten positive patients are too narrow; with fewer than "
        "five there is none."
    )
    notes.append("OrganIoU of each run is at its own thresholds, of its validation split.")
    notes += [f"{name}: {text}." for name, text in dropped.items() if text]
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


def _same_pairs(
    first: Values, other: Values
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """OrganIoU of the model's maps of both, NaN where either is: an organ may have no cell on one
    network's grid and some on another's. Also how many pairs that leaves out, in words."""
    maps = [name for name in EVALUATED if name in first.organ_iou and name in other.organ_iou]
    old, new = ({name: one.organ_iou[name] for name in maps} for one in (first, other))
    texts = []
    for name in maps:
        undefined = np.isnan(old[name]), np.isnan(new[name])
        either = undefined[0] | undefined[1]
        left_out, kept = int((undefined[0] ^ undefined[1]).sum()), int((~either).sum())
        if left_out:
            texts.append(
                f"OrganIoU {MAP_NAMES[name]} is over the {kept} pairs of a volume and a finding "
                f"for which both runs have one; {left_out} more have it for one run alone"
            )
        old[name], new[name] = (np.where(either, np.nan, of[name]) for of in (old, new))
    return old, new, "; ".join(texts)


def _ranks(values: Values, times: np.ndarray, numbers: np.ndarray) -> dict[str, Resampled]:
    auroc, precision = resampled_ranks(values.logits, values.truth, times, numbers)
    return {"AUROC": auroc, "average precision": precision}


def _maps(
    organ_iou: Mapping[str, np.ndarray], times: np.ndarray, numbers: np.ndarray
) -> dict[str, Resampled]:
    return {
        f"OrganIoU {MAP_NAMES[name]}": resampled_means(iou, times, numbers)
        for name, iou in organ_iou.items()
    }


def _overall(
    before: Mapping[str, Resampled], after: Mapping[str, Resampled], usual: int
) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, old in before.items():
        both = _both(old, after[name])
        old, new = mean_of(old, both), mean_of(after[name], both)
        labels = int(both.sum())
        (cells[name],) = _cells(_less(new, old), "+.3f", labels, usual)
        if name.startswith("OrganIoU"):
            with np.errstate(divide="ignore", invalid="ignore"):
                gains = new.value / old.value - 1, new.drawn / old.drawn - 1
            value, drawn = (np.where(np.isfinite(gain), gain, np.nan) for gain in gains)
            relative = Resampled(value, drawn, _less(new, old).groups)
            (cells[f"{name}, relative"],) = _cells(relative, "+.1%", labels, usual)
    return cells


def _both(before: Resampled, after: Resampled) -> np.ndarray:
    """[K], the labels of the mean."""
    return before.in_mean & after.in_mean


def _less(after: Resampled, before: Resampled) -> Resampled:
    groups = np.minimum(after.groups, before.groups)
    return Resampled(after.value - before.value, after.drawn - before.drawn, groups)


def _cells(
    measure: Resampled, form: str, labels: int | None = None, usual: int | None = None
) -> list[Cell]:
    found = intervals(measure)
    return [Cell(**vars(one), form=form, labels=labels, usual=usual) for one in found]
