"""Measures of predictions: AUROC with DeLong's variance, average precision. NumPy: their arrays are
[cases, labels], which is little.

A label is 0 or 1; NaN is missing, as where nobody has looked, and is left out of that label's
measures. Anything else (-1 for "uncertain", say) is refused. A score of NaN makes its measures NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri


class DeLong(NamedTuple):
    """AUROC of R scores of the same cases: value [R], covariance [R, R]; NaN where it is not
    defined. positives, negatives: how many cases, or groups that have some, stand behind it."""

    value: Float[np.ndarray, "R"]
    covariance: Float[np.ndarray, "R R"]
    positives: int
    negatives: int

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Normal intervals [R], cut to [0, 1]; NaN where the variance is. Too narrow for few
        positives or negatives: 95 % cover 0.62 with 2 of them, 0.82 with 3, 0.84 with 5, 0.93 with
        10 (simulated).

        Where the variance is zero (no positive below a negative, or all scores equal) the normal
        interval would have no width. There it is Newcombe's method 5 (Statistics in Medicine 25,
        2006, 559-573): the AUROCs from which the value is at most z standard errors away, by
        Hanley & McNeil's variance at that AUROC with both numbers of cases as their mean.
        """
        z = float(ndtri((1 + level) / 2))
        variance = np.diagonal(self.covariance)
        half = z * np.sqrt(variance)
        low, high = np.clip(self.value - half, 0, 1), np.clip(self.value + half, 0, 1)
        for row in np.flatnonzero(variance <= _ROUNDING):
            value = float(self.value[row])
            low[row], high[row] = _newcombe(value, self.positives, self.negatives, z)
        return low, high


class PairedTest(NamedTuple):
    """difference: AUROC of the first less that of the second; z, and the two-sided p."""

    difference: float
    z: float
    p: float


# Variances below are zero but for rounding.
_ROUNDING = 1e-12


def known_labels(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels as bool, and which of them are missing; None where none is.

    Raises:
        ValueError: a label that is not 0, 1 or NaN.
    """
    truth = np.asarray(truth)
    if truth.dtype == bool:
        return truth, None
    missing = np.isnan(truth)
    wrong = ~(missing | (truth == 0) | (truth == 1))
    if wrong.any():
        raise ValueError(
            f"label {truth[wrong][0]}: labels are 0 or 1, or NaN where they are missing"
        )
    return truth == 1, missing if missing.any() else None


def auroc(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Area under the ROC curve along the last axis: P(positive scores above negative), ties half.

    The Mann-Whitney statistic of the ranks. scores [..., N] float, truth [..., N] in {0, 1, NaN};
    returns [...], NaN where a class is missing.
    """
    from scipy.stats import rankdata  # slow to import

    scores, truth, count, undefined = _ranked(scores, truth)
    positives = truth.sum(-1)
    negatives = count - positives
    ranks = rankdata(scores, axis=-1, nan_policy="omit")
    statistic = np.where(truth, ranks, 0).sum(-1) - positives * (positives + 1) / 2
    pairs = positives * negatives
    return np.where((pairs > 0) & ~undefined, statistic / np.maximum(pairs, 1), np.nan)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision along the last axis: precision at each threshold times the recall gained.

    Equal scores share one threshold. scores [..., N] float, truth [..., N] in {0, 1, NaN}; returns
    [...], NaN without a positive.
    """
    scores, truth, _, undefined = _ranked(scores, truth)
    order = np.argsort(-scores, axis=-1, kind="stable")
    scores = np.take_along_axis(scores, order, -1)
    truth = np.take_along_axis(truth, order, -1)
    hits = np.cumsum(truth, -1)
    precision = hits / np.arange(1, truth.shape[-1] + 1)
    # Within a run of equal scores the precision that counts is the one at the end of the run.
    ends = np.concatenate([np.diff(scores, axis=-1) != 0, np.ones((*scores.shape[:-1], 1))], -1) > 0
    position = np.where(ends, np.arange(truth.shape[-1]), truth.shape[-1])
    end_of_run = np.minimum.accumulate(position[..., ::-1], axis=-1)[..., ::-1]
    precision = np.take_along_axis(precision, end_of_run, -1)
    positives = hits[..., -1]
    total = np.where(truth, precision, 0).sum(-1)
    return np.where((positives > 0) & ~undefined, total / np.maximum(positives, 1), np.nan)


def _ranked(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Scores as floats, NaN (which sorts last) where the label is missing, the labels as bool and
    false there, how many are not, and whether one of these has no score."""
    scores = np.asarray(scores)
    scores = scores.astype(np.promote_types(scores.dtype, np.float32))
    truth, missing = known_labels(truth)
    if truth.shape[-1:] != scores.shape[-1:]:
        raise ValueError(f"scores {scores.shape} and truth {truth.shape} must agree")
    truth = np.broadcast_to(truth, scores.shape)
    if missing is None:
        return scores, truth, scores.shape[-1], np.isnan(scores).any(-1)
    missing = np.broadcast_to(missing, scores.shape)
    undefined = (np.isnan(scores) & ~missing).any(-1)
    return np.where(missing, np.nan, scores), truth, (~missing).sum(-1), undefined


def nan_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over the entries that are defined; NaN (without a warning) where none is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis)
    total = np.where(defined, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def delong(
    scores: Float[np.ndarray, "R N"] | Sequence,
    truth: np.ndarray | Sequence,
    groups: Sequence | np.ndarray | None = None,
) -> DeLong:
    """AUROC and its covariance by DeLong, DeLong & Clarke-Pearson (Biometrics 1988), or of grouped
    cases by Obuchowski (Biometrics 1997).

    With m positives and n negatives, V10 of a positive is the part of the negatives that it beats
    (ties half), V01 of a negative the part of the positives that beat it; the covariance of two
    scores is cov(V10) / m + cov(V01) / n. Both parts come from mid-ranks in O(N log N) (Sun & Xu,
    IEEE Signal Processing Letters 2014).

    The cases are taken as independent. With `groups` only the groups are: V10 and V01 less the
    AUROC are summed within each, and the sums take the place of the cases, with the covariance
    between a group's positives and its negatives. Groups of one case give DeLong's covariance.

    Args:
        scores: R models' scores of the same N cases.
        truth: [N] in {0, 1, NaN}.
        groups: [N], what each case belongs to (its patient).

    Returns:
        NaN with no positive or no negative; the covariance also with only one of either, or only
        one group that has some.

    Raises:
        ValueError: scores, truth and groups of other lengths; a label that is not 0, 1 or NaN.
    """
    from scipy.stats import rankdata  # slow to import

    scores = np.asarray(scores)
    truth, missing = known_labels(np.asarray(truth))
    if truth.shape != scores.shape[1:]:
        raise ValueError(f"scores {scores.shape} and truth {truth.shape} must agree")
    if groups is not None and len(groups) != len(truth):
        raise ValueError(f"groups has {len(groups)} entries for {len(truth)} cases: give one each")
    names = np.arange(len(truth)) if groups is None else np.asarray(groups)
    if missing is not None:
        scores, truth, names = scores[:, ~missing], truth[~missing], names[~missing]
    positives, negatives = scores[:, truth], scores[:, ~truth]
    m, n = positives.shape[1], negatives.shape[1]
    group = np.unique(names, return_inverse=True)[1]
    counts = len(np.unique(group[truth])), len(np.unique(group[~truth]))
    undefined = np.full((len(scores), len(scores)), np.nan)
    if m == 0 or n == 0:
        return DeLong(undefined[0], undefined, *counts)
    together = rankdata(np.concatenate([positives, negatives], axis=1), axis=1)
    v10 = (together[:, :m] - rankdata(positives, axis=1)) / n
    v01 = 1 - (together[:, m:] - rankdata(negatives, axis=1)) / m
    value = v10.mean(axis=1)
    if min(counts) < 2:
        return DeLong(value, undefined, *counts)
    all_groups, sums = int(group.max()) + 1, []
    for parts, members in ((v10, group[truth]), (v01, group[~truth])):
        rows = [np.bincount(members, row, all_groups) for row in parts - value[:, None]]
        sums.append(np.stack(rows) / parts.shape[1])
    correction = [count / (count - 1) for count in counts]
    own = [c * s @ s.T for c, s in zip(correction, sums, strict=True)]
    both = all_groups / (all_groups - 1) * sums[0] @ sums[1].T
    return DeLong(value, own[0] + own[1] + both + both.T, *counts)


def _newcombe(value: float, positives: int, negatives: int, z: float) -> tuple[float, float]:
    """Both ends of Newcombe's interval of method 5, for a value that is 0, 1 or between."""
    from scipy.optimize import brentq  # slow to import

    others = (positives + negatives) / 2 - 1

    def excess(at: float) -> float:
        """Squared distance less z squared variances; negative inside the interval."""
        spread = 1 + others * (1 - at) / (2 - at) + others * at / (1 + at)
        return (value - at) ** 2 - z**2 * at * (1 - at) * spread / (positives * negatives)

    def root(low: float, high: float) -> float:
        return float(brentq(excess, low, high))  # type: ignore[arg-type]

    # At 0 and 1 the value itself is a root; just beside it the excess is negative.
    near = 1e-9
    low = root(0.0, min(value, 1 - near)) if value > 0 else 0.0
    high = root(max(value, near), 1.0) if value < 1 else 1.0
    return low, high


def delong_test(
    first: np.ndarray,
    second: np.ndarray,
    truth: np.ndarray,
    groups: Sequence | np.ndarray | None = None,
) -> PairedTest:
    """Do two scores of the same cases differ in AUROC? DeLong's test of correlated ROC curves.

    Args:
        first, second: [N] float; truth and groups as `delong`.

    Returns:
        NaN where AUROC or its variance is not defined, or where two AUROCs differ without any
        variance (both orders perfect, say, one of them upside down); p = 1 for scores of one order.
    """
    value, covariance, *_ = delong(np.stack([first, second]), truth, groups)
    difference = float(value[0] - value[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance <= _ROUNDING:
        same = abs(difference) <= _ROUNDING
        return PairedTest(difference, 0.0 if same else np.nan, 1.0 if same else np.nan)
    z = float(difference / np.sqrt(variance))
    return PairedTest(difference, z, float(2 * ndtr(-abs(z))))
