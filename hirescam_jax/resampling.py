"""The bootstrap by how often each case is drawn, so that one sorting of the scores serves all
resamples: seconds for a thousand of them, thousands of volumes and all labels."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

HELD = 2**23  # draws that are held at once


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


def draws(numbers: np.ndarray, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "N S"]]:
    """How often each of N cases is in each resample, some resamples at a time; all cases of a group
    are drawn together. The draws are those of `hirescam_jax.metrics.bootstrap`.

    Args:
        numbers: `group_numbers`.
    """
    count = int(numbers.max()) + 1
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    size = max(1, HELD // len(numbers))
    for begin in range(0, resamples, size):
        some = drawn[begin : begin + size]
        places = some + count * np.arange(len(some))[:, None]
        times_SG = np.bincount(places.reshape(-1), minlength=some.shape[0] * count)
        times_SG = times_SG.reshape(len(some), count).astype(np.float32)
        yield np.ascontiguousarray(times_SG.T)[numbers]


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


def means_over(
    value: Float[np.ndarray, "M K"], drawn: Float[np.ndarray, "M K S"], chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means over the chosen [M, K] labels, of the value [M] and in each resample [M, S]; NaN
    without any. A label that is not defined in a resample keeps its value there, so that the mean
    is always over the same labels."""
    number = np.where(chosen.sum(1) > 0, chosen.sum(1), np.nan)
    kept = np.where(np.isnan(drawn), value[..., None], drawn)
    means = (np.where(chosen[..., None], part, 0).sum(1) for part in (value[..., None], kept))
    of_value, of_draws = (mean / number[:, None] for mean in means)
    return of_value[:, 0], of_draws


def intervals(
    value: Float[np.ndarray, "C"],
    drawn: Float[np.ndarray, "C S"],
    known: Bool[np.ndarray, "C"],
    reflect: bool = False,
) -> list[dict[str, float | None]]:
    """{"value", "low", "high"} of each column: 95 % percentile intervals of the resamples in which
    it is defined. Null where it is not, where there is to be no interval (`known`), or where all
    resamples agree (a perfect score, say): they tell nothing of the spread then.

    Args:
        reflect: `reflected` instead.
    """
    low, high = np.full((2, len(value)), np.nan)
    known = known & ~np.isnan(value) & ~np.isnan(drawn).all(1)
    if known.any():
        ends = np.nanpercentile(drawn[known], [0, 2.5, 97.5, 100], axis=1)
        # Sums of the same numbers in another order differ by rounding.
        agree = ends[3] - ends[0] <= 1e-12
        low[known], high[known] = (np.where(agree, np.nan, end) for end in ends[1:3])
    if reflect:
        low, high = reflected(value, low, high)
    return [
        dict(zip(("value", "low", "high"), map(_null, numbers), strict=True))
        for numbers in zip(value, low, high, strict=True)
    ]


def reflected(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[Any, Any]:
    """The basic bootstrap interval 2 value - (high, low) of a measure that is never negative and
    that resampling makes larger, as it does a calibration error: chance gaps are taken for real
    ones, once by the data and again by each resample. (Davison & Hinkley, Bootstrap Methods and
    their Application, 1997, 5.2.) Cut at 0, and grown to hold the value."""
    below, above = 2 * value - high, 2 * value - low
    return np.clip(below, 0, value), np.maximum(above, value)


def _null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
