"""Intervals by the bootstrap over cases, or over groups of them (patients).

`bootstrap` takes any statistic. `resampled_ranks` and `resampled_means` know how often each case is
drawn (`draws`, of the same resamples), so that one sorting of the scores serves all of them:
seconds for a thousand resamples, thousands of volumes and all labels.

What the nominal 95 % cover, in simulations with a known truth:

- Few groups (patients). Means of 3, 5, 10 and 20 values: 0.74, 0.87, 0.91, 0.93; AUROC with 3, 5
  and 10 positives: 0.80, 0.85, 0.94. There is none below `MIN_GROUPS`, and those of fewer than
  ten are too narrow.
- Average precision is larger on a sample than in truth, for a positive counts itself among those
  found, and larger again on a resample. A label hardly shows it; the mean over many labels has less
  noise, but the same bias: percentiles cover 0.6 of 12 labels with 29 positives in 192 volumes, and
  none of 80 labels with 30 in 1000. So the resamples are moved to lie around what has less of it
  (`precision_of_others`): 0.88 to 0.95 of labels (0.82 of ten positives that are nearly all found),
  0.83 to 0.97 of means over labels, mostly 0.9 and more. Where such an interval would not hold the
  value itself there is too much bias for any: of the 80 labels it would cover 0.77. It is left out.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.sparse import csr_array

from hirescam_jax.metrics.predictions import nan_mean

Key = TypeVar("Key", bound=Hashable)

MIN_GROUPS = 5  # fewer tell too little of how a measure varies
MIN_IN_MEAN = 2  # groups (of each class) that a label needs to be in a mean over labels

# Indices that the bootstrap hands to its statistic at once: bounds the memory.
_DRAWN_AT_ONCE = 2**19
# Sums of the same numbers in another order differ by rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval; None for what is not defined, as in JSON."""

    value: float | None
    low: float | None
    high: float | None

    def within_unit(self) -> "Interval":
        """With the figures outside [0, 1] moved to its ends."""
        ends = (self.value, self.low, self.high)
        return Interval(*(None if v is None else min(max(v, 0.0), 1.0) for v in ends))


UNKNOWN = Interval(None, None, None)


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


def _drawn_groups(count: int, resamples: int, seed: int) -> Integer[np.ndarray, "S G"]:
    """The numbers of the groups in each resample."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def draws(numbers: np.ndarray, resamples: int, seed: int) -> Float[np.ndarray, "N S"]:
    """How often each of N cases is in each resample; all cases of a group are drawn together.

    Args:
        numbers: `group_numbers`.
    """
    count = int(numbers.max()) + 1
    drawn = _drawn_groups(count, resamples, seed)
    places = drawn + count * np.arange(resamples)[:, None]
    times_SG = np.bincount(places.reshape(-1), minlength=drawn.size).reshape(drawn.shape)
    return np.ascontiguousarray(times_SG.T.astype(np.float32))[numbers]


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_cases: int,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence | np.ndarray | None = None,
    target: np.ndarray | float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % bootstrap intervals over the cases of a split, or over groups of them.

    They are too narrow for few cases or groups: of means they cover 0.84 to 0.87 with 5 and 0.91 to
    0.94 with 10, and would cover half with 2. What counts is how many carry the information, the
    positives for a measure of positives; of these the bootstrap knows nothing.

    They are percentile intervals. A statistic that is biased is larger (or smaller) on resamples
    than on the cases, so that its percentiles may not even hold its value. For such a one give its
    `target`: what, of the cases themselves, the statistic estimates when it is given resamples
    (`calibration_error_of_bins` has an example). Its interval is basic: the errors of the
    resamples, statistic - target, around the value (A. C. Davison & D. V. Hinkley, Bootstrap
    Methods and their Application, 1997, 5.2).

    Args:
        statistic: case indices [S, N] -> values [S, ...], vectorised over the S resamples.
        groups: [num_cases], what each case belongs to (its patient): groups are drawn, each with
            all of its cases, so that resamples differ in size and come singly (S = 1).
        target: [...] or scalar; NaN for the values whose intervals are percentiles.

    Returns:
        value, low, high: each [...]; the statistic on all cases, and its interval from the
        resamples in which it is defined. The interval is NaN where there are fewer than five
        groups to draw from (`MIN_GROUPS`), or where all resamples agree (one positive case, a
        perfect score): they tell nothing of the spread then.

    Raises:
        ValueError: groups of another length.
    """
    if groups is not None and len(groups) != num_cases:
        raise ValueError(f"groups has {len(groups)} entries for {num_cases} cases: give one each")
    value = np.asarray(statistic(np.arange(num_cases)[None])[0])
    numbers = group_numbers(num_cases, groups)
    count = int(numbers.max()) + 1 if num_cases else 0
    if count < MIN_GROUPS:
        unknown = np.full(value.shape, np.nan)
        return value, unknown, unknown
    drawn = _drawn_groups(count, resamples, seed)
    if count == num_cases:
        chunk = max(1, _DRAWN_AT_ONCE // num_cases)
        parts = [statistic(drawn[i : i + chunk]) for i in range(0, resamples, chunk)]
    else:
        members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
        parts = [statistic(np.concatenate([members[g] for g in row])[None]) for row in drawn]
    columns = np.concatenate(parts).reshape(resamples, -1).T
    low, high = (end.reshape(value.shape) for end in _percentiles(value.reshape(-1), columns))
    if target is None:
        return value, low, high
    basic = ~np.isnan(target)
    middle = value + np.where(basic, target, 0)
    return value, np.where(basic, middle - high, low), np.where(basic, middle - low, high)


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
    """Columns of a measure: on all cases, and in each resample, NaN where not defined; and how many
    groups stand behind it, of AUROC the positive or the negative ones, whichever are fewer."""

    value: Float[np.ndarray, "C"]
    drawn: Float[np.ndarray, "C S"]
    groups: Integer[np.ndarray, "C"]

    @property
    def in_mean(self) -> Bool[np.ndarray, "C"]:
        """Which columns a mean over columns may take."""
        return (self.groups >= MIN_IN_MEAN) & ~np.isnan(self.value)


def resampled_ranks(
    scores: Float[np.ndarray, "N K"],
    truth: Bool[np.ndarray, "N K"],
    times: Float[np.ndarray, "N S"],
    numbers: np.ndarray,
    missing: Bool[np.ndarray, "N K"] | None = None,
) -> tuple[Resampled, Resampled]:
    """AUROC and average precision of each label. The resamples of average precision are moved to
    have the mean `precision_of_others`, for intervals; not turned around, as those of a basic
    interval, which puts the long side of a skewed measure on the wrong end.

    Args:
        missing: labels that nobody knows, left out of that label's measures.
    """
    known = np.ones(truth.shape, bool) if missing is None else ~missing
    columns = [
        [ranked(scores[m, k], truth[m, k], t[m]) for k, m in enumerate(known.T)]
        for t in (_once(times), times)
    ]
    (auroc, precision), (aurocs, precisions) = (
        (np.stack(parts) for parts in zip(*of_labels, strict=True)) for of_labels in columns
    )
    positive, negative = (groups_in(mask & known, numbers) for mask in (truth, ~truth))
    middle = [
        precision_of_others(scores[m, k], truth[m, k], numbers[m]) for k, m in enumerate(known.T)
    ]
    precisions += (middle - nan_mean(precisions))[:, None]
    return (
        Resampled(auroc[:, 0], aurocs, np.minimum(positive, negative)),
        Resampled(precision[:, 0], precisions, positive),
    )


def precision_of_others(
    scores: Float[np.ndarray, "N"], truth: Bool[np.ndarray, "N"], numbers: np.ndarray
) -> float:
    """Average precision with less bias: the mean over the positives of the precision at their score
    that is found without the positives of their own group, the others counting so much more. 1
    where nothing else is found; NaN without a positive."""
    positives, group = scores[truth], numbers[truth]
    if not len(positives):
        return np.nan

    def not_below(sorted_scores: np.ndarray) -> np.ndarray:
        return len(sorted_scores) - np.searchsorted(sorted_scores, positives)

    wrong, hits = not_below(np.sort(scores[~truth])), not_below(np.sort(positives))
    # Those of the own group that are not below: keys sort by group, then by score.
    step = len(positives) + 1
    keys = group * step + np.unique(positives, return_inverse=True)[1]
    ends = np.searchsorted(np.sort(keys), [(group + 1) * step, keys])
    others = len(positives) - np.bincount(group)[group]
    hits = (hits - (ends[0] - ends[1])) * len(positives) / np.maximum(others, 1)
    return float(np.where(hits + wrong > 0, hits / np.maximum(hits + wrong, 1e-9), 1).mean())


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
    return Resampled(found[0][:, 0], found[1], groups_in(counts > 0, numbers))


def _once(times: np.ndarray) -> np.ndarray:
    """All cases, as they are."""
    return np.ones((len(times), 1), times.dtype)


def mean_of(measure: Resampled, chosen: Bool[np.ndarray, "C"]) -> Resampled:
    """The mean over the chosen columns, as one column; NaN without any. A column that is not
    defined in a resample keeps its value there, so that the mean is always over the same ones.

    Its groups are the lower median of theirs: it has an interval where more than half of them do.
    """
    if not chosen.any():
        nothing = np.full((1, measure.drawn.shape[1]), np.nan)
        return Resampled(nothing[:, 0], nothing, np.zeros(1, int))
    value, drawn = measure.value[chosen], measure.drawn[chosen]
    kept = np.where(np.isnan(drawn), value[:, None], drawn)
    groups = np.sort(measure.groups[chosen])[(len(value) - 1) // 2]
    return Resampled(value.mean(0, keepdims=True), kept.mean(0, keepdims=True), groups[None])


def _percentiles(
    value: Float[np.ndarray, "C"], drawn: Float[np.ndarray, "C S"]
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Both ends of the 95 % percentile intervals of columns, of the resamples in which each is
    defined; NaN where it is in none, or where all agree, which tells nothing of the spread."""
    low, high = np.full((2, len(value)), np.nan)
    known = ~np.isnan(drawn).all(1)
    if known.any():
        ends = np.nanpercentile(drawn[known], [0, 2.5, 97.5, 100], axis=1)
        size = np.maximum(1, np.abs(np.nan_to_num(value[known])))
        vary = ends[3] - ends[0] > _ROUNDING * size
        low[known], high[known] = np.where(vary, ends[1:3], np.nan)
    return low, high


def intervals(measure: Resampled) -> list[Interval]:
    """Of each column, by percentiles of the resamples in which it is defined. None where it is not,
    where fewer than `MIN_GROUPS` groups stand behind it, where all resamples agree (a perfect
    score, say), or where the interval would not hold the value (a measure of much bias)."""
    value, drawn, groups = measure
    low, high = _percentiles(value, drawn)
    outside = (value < low - _ROUNDING) | (value > high + _ROUNDING)
    left_out = (groups < MIN_GROUPS) | np.isnan(value) | outside
    low, high = (np.where(left_out, np.nan, end) for end in (low, high))
    return [Interval(*map(null, column)) for column in zip(value, low, high, strict=True)]


def mean_intervals(
    values: Mapping[Key, np.ndarray], groups: Sequence | np.ndarray, resamples: int = 1000
) -> dict[Key, Interval]:
    """Means of columns [N] that may have NaN, with `intervals`; groups of cases are drawn."""
    columns = np.stack([*values.values()], axis=-1).astype(float)
    if not len(columns):
        return dict.fromkeys(values, UNKNOWN)
    numbers = group_numbers(len(columns), groups)
    found = intervals(resampled_means(columns, draws(numbers, resamples, 0), numbers))
    return dict(zip(values, found, strict=True))


def null(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)
