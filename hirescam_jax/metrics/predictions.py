"""Measures of predictions: AUROC with DeLong's variance, average precision, calibration; and the
bootstrap. NumPy: their arrays are [cases, labels], which is little."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import norm, rankdata

# Indices that the bootstrap hands to its statistic at once: bounds the memory.
_DRAWN_AT_ONCE = 2**19


class DeLong(NamedTuple):
    """AUROC of R scores of the same cases: value [R], covariance [R, R]; NaN where it is not
    defined."""

    value: Float[np.ndarray, "R"]
    covariance: Float[np.ndarray, "R R"]

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Normal intervals [R], cut to [0, 1]."""
        half = norm.ppf((1 + level) / 2) * np.sqrt(np.diagonal(self.covariance))
        return np.clip(self.value - half, 0, 1), np.clip(self.value + half, 0, 1)


class PairedTest(NamedTuple):
    """difference: AUROC of the first less that of the second; z, and the two-sided p."""

    difference: float
    z: float
    p: float


class Reliability(NamedTuple):
    """Per bin of predicted probability: counts, mean probability, and the share that is positive
    (both NaN where the bin is empty). edges [M + 1], the rest [M]."""

    edges: np.ndarray
    counts: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray


def auroc(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Area under the ROC curve along the last axis: P(positive scores above negative), ties half.

    The Mann-Whitney statistic of the ranks. scores [..., N] float, truth [..., N] bool; returns
    [...], NaN where a class is missing.
    """
    truth = np.asarray(truth, bool)
    positives = truth.sum(-1)
    negatives = truth.shape[-1] - positives
    ranks = rankdata(scores, axis=-1)
    statistic = np.where(truth, ranks, 0).sum(-1) - positives * (positives + 1) / 2
    pairs = positives * negatives
    return np.where(pairs > 0, statistic / np.maximum(pairs, 1), np.nan)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision along the last axis: precision at each threshold times the recall gained.

    Equal scores share one threshold. scores [..., N] float, truth [..., N] bool; returns [...],
    NaN without a positive.
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    scores = np.take_along_axis(scores, order, -1)
    truth = np.take_along_axis(np.asarray(truth, bool), order, -1)
    hits = np.cumsum(truth, -1)
    precision = hits / np.arange(1, truth.shape[-1] + 1)
    # Within a run of equal scores the precision that counts is the one at the end of the run.
    ends = np.concatenate([np.diff(scores, axis=-1) != 0, np.ones((*scores.shape[:-1], 1))], -1) > 0
    position = np.where(ends, np.arange(truth.shape[-1]), truth.shape[-1])
    end_of_run = np.minimum.accumulate(position[..., ::-1], axis=-1)[..., ::-1]
    precision = np.take_along_axis(precision, end_of_run, -1)
    positives = hits[..., -1]
    total = np.where(truth, precision, 0).sum(-1)
    return np.where(positives > 0, total / np.maximum(positives, 1), np.nan)


def nan_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over the entries that are defined; NaN (without a warning) where none is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis)
    total = np.where(defined, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def delong(scores: Float[np.ndarray, "R N"], truth: np.ndarray) -> DeLong:
    """AUROC and its covariance by DeLong, DeLong & Clarke-Pearson (Biometrics 1988).

    With m positives and n negatives, V10 of a positive is the part of the negatives that it beats
    (ties half), V01 of a negative the part of the positives that beat it; the covariance of two
    scores is cov(V10) / m + cov(V01) / n. Both parts come from mid-ranks in O(N log N) (Sun & Xu,
    IEEE Signal Processing Letters 2014). The cases are taken as independent: for several volumes
    of a patient use `bootstrap` with groups.

    Args:
        scores: R models' scores of the same N cases.
        truth: [N] bool.

    Returns:
        NaN with no positive or no negative; the covariance also with only one of either.

    Raises:
        ValueError: scores and truth of other lengths.
    """
    truth = np.asarray(truth, bool)
    if truth.shape != scores.shape[1:]:
        raise ValueError(f"scores {scores.shape} and truth {truth.shape} must agree")
    positives, negatives = scores[:, truth], scores[:, ~truth]
    m, n = positives.shape[1], negatives.shape[1]
    undefined = np.full((len(scores), len(scores)), np.nan)
    if m == 0 or n == 0:
        return DeLong(undefined[0], undefined)
    together = rankdata(np.concatenate([positives, negatives], axis=1), axis=1)
    v10 = (together[:, :m] - rankdata(positives, axis=1)) / n
    v01 = 1 - (together[:, m:] - rankdata(negatives, axis=1)) / m
    value = v10.mean(axis=1)
    if m == 1 or n == 1:
        return DeLong(value, undefined)
    parts = [np.atleast_2d(np.cov(v)) / v.shape[1] for v in (v10, v01)]
    return DeLong(value, parts[0] + parts[1])


def delong_test(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> PairedTest:
    """Do two scores of the same cases differ in AUROC? DeLong's test of correlated ROC curves.

    Args:
        first, second: [N] float; truth: [N] bool.

    Returns:
        NaN where AUROC or its variance is not defined; p = 1 for scores of one order.
    """
    value, covariance = delong(np.stack([first, second]), truth)
    difference = float(value[0] - value[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    # Of equal orders it is zero up to rounding.
    if variance < 1e-12 and abs(difference) < 1e-12:
        return PairedTest(difference, 0.0, 1.0)
    z = difference / np.sqrt(variance) if variance > 0 else np.copysign(np.inf, difference)
    z = np.nan if np.isnan(variance) else float(z)
    return PairedTest(difference, z, float(2 * norm.sf(abs(z))))


def brier_score(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and truth along the last axis (Brier 1950)."""
    return np.asarray(np.mean((probabilities - np.asarray(truth, float)) ** 2, axis=-1))


def reliability(
    probabilities: Float[np.ndarray, "N"], truth: np.ndarray, bins: int = 10
) -> Reliability:
    """The reliability table of one label: probabilities in `bins` bins of equal width over [0, 1].

    A bin holds its lower edge, the last one also 1.

    Raises:
        ValueError: a probability outside [0, 1], or truth of another length.
    """
    truth = np.asarray(truth, bool)
    if truth.shape != probabilities.shape:
        raise ValueError(f"probabilities {probabilities.shape}, truth {truth.shape} must agree")
    number = bin_of(probabilities, bins)
    count = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, values, bins) for values in (probabilities, truth)]
    means = [np.where(count > 0, s / np.maximum(count, 1), np.nan) for s in sums]
    return Reliability(np.linspace(0, 1, bins + 1), count, *means)


def bin_of(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """Bin number of each probability, as `reliability` counts."""
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]: give sigmoid(logits)")
    return np.minimum((probabilities * bins).astype(int), bins - 1)


def expected_calibration_error(
    probabilities: Float[np.ndarray, "N"], truth: np.ndarray, bins: int = 10
) -> float:
    """Mean over the cases of |mean probability - share of positives| of the case's bin.

    Of one label's probability of being present, in bins of equal width (Naeini et al., AAAI 2015;
    Guo et al., ICML 2017, whose confidence is that of the predicted class instead).
    """
    table = reliability(probabilities, truth, bins)
    gap = np.where(table.counts > 0, np.abs(table.probability - table.frequency), 0)
    return float((table.counts * gap).sum() / max(table.counts.sum(), 1))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_cases: int,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap over the cases of a split, or over groups of them.

    Args:
        statistic: case indices [S, N] -> values [S, ...], vectorised over the S resamples.
        groups: [num_cases], what each case belongs to (its patient): groups are drawn, each with
            all of its cases, so that resamples differ in size and come singly (S = 1).

    Returns:
        value, low, high: each [...]; the statistic on all cases, and its 2.5 and 97.5 percentiles
        over the resamples in which it is defined.

    Raises:
        ValueError: groups of another length.
    """
    if groups is not None and len(groups) != num_cases:
        raise ValueError(f"groups has {len(groups)} entries for {num_cases} cases: give one each")
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(num_cases)[None])[0]
    number = np.arange(num_cases) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(number.max()) + 1 if num_cases else 0
    if count == num_cases:
        chunk = max(1, _DRAWN_AT_ONCE // max(num_cases, 1))
        cases = rng.integers(num_cases, size=(resamples, num_cases))
        draws = [statistic(cases[i : i + chunk]) for i in range(0, resamples, chunk)]
    else:
        members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
        drawn = rng.integers(count, size=(resamples, count))
        draws = [statistic(np.concatenate([members[g] for g in row])[None]) for row in drawn]
    draws = np.concatenate(draws)
    # nanpercentile warns where a column has no value at all.
    undefined = np.isnan(draws).all(axis=0)
    low, high = np.nanpercentile(np.where(undefined, 0.0, draws), [2.5, 97.5], axis=0)
    return np.asarray(value), np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
