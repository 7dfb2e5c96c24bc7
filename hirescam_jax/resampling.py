"""The bootstrap by how often each case is drawn, so that one sorting of the scores serves all
resamples: seconds for a thousand of them, thousands of volumes and all labels."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from hirescam_jax.metrics import bootstrap, nan_mean

Key = TypeVar("Key", bound=Hashable)

MIN_GROUPS = 2  # of each class: fewer tell nothing about how a measure varies


class Ranked(NamedTuple):
    """AUROC and average precision of one label in S resamples; NaN where they are not defined."""

    auroc: Float[np.ndarray, "S"]
    average_precision: Float[np.ndarray, "S"]


def group_numbers(count: int, groups: Sequence | np.ndarray | None) -> np.ndarray:
    """The number [count] of each case's group (its patient), from 0 on; by default its own."""
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"patients has {len(groups)} entries for {count} volumes: give one each")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def groups_in(mask: Bool[np.ndarray, "N C"], numbers: np.ndarray) -> np.ndarray:
    """How many groups have a True, in each column [C]."""
    member = csr_array((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    return ((member @ mask.astype(float)) > 0).sum(0)


def draws(numbers: np.ndarray, resamples: int, seed: int) -> Float[np.ndarray, "N S"]:
    """How often each of N cases is in each resample; all cases of a group are drawn together. The
    draws are those of `hirescam_jax.metrics.bootstrap`.

    Args:
        numbers: `group_numbers`.
    """
    count = int(numbers.max()) + 1
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    places = drawn + count * np.arange(resamples)[:, None]
    times_SG = np.bincount(places.reshape(-1), minlength=drawn.size).reshape(drawn.shape)
    return np.ascontiguousarray(times_SG.T.astype(np.float32))[numbers]


def ranked(
    scores: Float[np.ndarray, "N"], truth: Bool[np.ndarray, "N"], times: Float[np.ndarray, "N S"]
) -> Ranked:
    """`metrics.auroc` and `metrics.average_precision` of cases that are drawn so many times.

    Both need, at the score of each positive, the negatives below it (AUROC, ties half) or not below
    it (the others among the predicted positives, of average precision).
    """
    order = np.argsort(scores, kind="stable")
    scores, truth = scores[order], truth[order]
    positives = np.flatnonzero(truth)
    resamples = times.shape[1]
    if not len(positives):
        nothing = np.full(resamples, np.nan)
        return Ranked(nothing, nothing)
    first = np.searchsorted(scores, scores[positives], "left")
    last = np.searchsorted(scores, scores[positives], "right")
    # Sums of the negatives between the places that are asked for, then those up to each.
    bounds = np.unique(np.concatenate([[0], first, last, [len(scores)]]))
    negative = order[~truth]
    starts = np.concatenate([[0], np.cumsum(~truth)])[bounds]
    shape = len(bounds) - 1, len(scores)
    between = csr_array((np.ones(len(negative), np.float32), negative, starts), shape) @ times
    below = np.concatenate([np.zeros((1, resamples)), np.cumsum(between, axis=0, dtype=float)])
    own = times[order[positives]].astype(float)
    below_first = below[np.searchsorted(bounds, first)]
    below_last = below[np.searchsorted(bounds, last)]
    negatives, total = below[-1], own.sum(0)
    pairs = total * negatives
    beaten = (own * (below_first + below_last)).sum(0) / 2
    auroc = np.where(pairs > 0, beaten / np.maximum(pairs, 1), np.nan)
    # Positives not below a score: all but those before the first of its run.
    before = np.concatenate([np.zeros((1, resamples)), np.cumsum(own, axis=0)])
    hits = total - before[np.searchsorted(scores[positives], scores[positives], "left")]
    predicted = hits + negatives - below_first
    precision = hits / np.maximum(predicted, 1)
    average = (own * precision).sum(0) / np.maximum(total, 1)
    return Ranked(auroc, np.where(total > 0, average, np.nan))


class Resampled(NamedTuple):
    """Columns of a measure: on all cases, and in each resample, NaN where not defined; and whether
    enough groups stand behind it for an interval."""

    value: Float[np.ndarray, "C"]
    drawn: Float[np.ndarray, "C S"]
    known: Bool[np.ndarray, "C"]


def resampled_ranks(
    scores: Float[np.ndarray, "N K"],
    truth: Bool[np.ndarray, "N K"],
    times: Float[np.ndarray, "N S"],
    numbers: np.ndarray,
) -> tuple[Resampled, Resampled]:
    """AUROC and average precision of each label."""
    columns = [
        [ranked(scores[:, k], truth[:, k], t) for k in range(scores.shape[1])]
        for t in (_once(times), times)
    ]
    (auroc, precision), (aurocs, precisions) = (
        (np.stack(parts) for parts in zip(*of_labels, strict=True)) for of_labels in columns
    )
    positive, negative = (groups_in(mask, numbers) >= MIN_GROUPS for mask in (truth, ~truth))
    return (
        Resampled(auroc[:, 0], aurocs, positive & negative),
        Resampled(precision[:, 0], precisions, positive),
    )


def resampled_means(
    values: Float[np.ndarray, "N C"],
    times: Float[np.ndarray, "N S"],
    numbers: np.ndarray,
    counts: Float[np.ndarray, "N C"] | None = None,
) -> Resampled:
    """Means of the values that are not NaN; with `counts`, values are sums of so many."""
    if counts is None:
        counts = (~np.isnan(values)).astype(float)
        values = np.nan_to_num(values)
    found = []
    for t in (_once(times), times):
        t = t.astype(float)
        number, total = counts.T @ t, values.astype(float).T @ t
        found.append(np.where(number > 0, total / np.maximum(number, 1), np.nan))
    known = groups_in(counts > 0, numbers) >= MIN_GROUPS
    return Resampled(found[0][:, 0], found[1], known)


def _once(times: np.ndarray) -> np.ndarray:
    """All cases, as they are."""
    return np.ones((len(times), 1), times.dtype)


def mean_of(measure: Resampled, chosen: Bool[np.ndarray, "C"]) -> Resampled:
    """The mean over the chosen columns, as one column; NaN without any. A column that is not
    defined in a resample keeps its value there, so that the mean is always over the same ones."""
    if not chosen.any():
        nothing = np.full((1, measure.drawn.shape[1]), np.nan)
        return Resampled(nothing[:, 0], nothing, chosen[:1])
    value, drawn = measure.value[chosen], measure.drawn[chosen]
    kept = np.where(np.isnan(drawn), value[:, None], drawn)
    return Resampled(value.mean(0, keepdims=True), kept.mean(0, keepdims=True), np.array([True]))


def intervals(measure: Resampled) -> list[dict[str, float | None]]:
    """{"value", "low", "high"} of each column: 95 % percentile intervals of the resamples in which
    it is defined. Null where it is not, where too few groups stand behind it, or where all
    resamples agree (a perfect score, say): they tell nothing of the spread then."""
    value, drawn, known = measure
    low, high = np.full((2, len(value)), np.nan)
    known = known & ~np.isnan(value) & ~np.isnan(drawn).all(1)
    if known.any():
        ends = np.nanpercentile(drawn[known], [0, 2.5, 97.5, 100], axis=1)
        # Sums of the same numbers in another order differ by rounding.
        agree = ends[3] - ends[0] <= 1e-12
        low[known], high[known] = (np.where(agree, np.nan, end) for end in ends[1:3])
    return [as_interval(*column) for column in zip(value, low, high, strict=True)]


def mean_intervals(values: Mapping[Key, np.ndarray], groups: np.ndarray) -> dict[Key, dict]:
    """Means of columns [N] with intervals by `metrics.bootstrap`, groups of cases drawn."""
    columns = np.stack([*values.values()], axis=-1).astype(float)
    drawn = bootstrap(lambda cases: nan_mean(columns[cases], axis=1), len(columns), groups=groups)
    return {key: as_interval(*ends) for key, *ends in zip(values, *drawn, strict=True)}


def as_interval(value: float, low: float, high: float) -> dict[str, float | None]:
    return {"value": null(value), "low": null(low), "high": null(high)}


def null(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)
