"""Are predicted probabilities the shares in which labels are present? Labels as `predictions`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from hirescam_jax.metrics.intervals import bootstrap
from hirescam_jax.metrics.predictions import known_labels


class Reliability(NamedTuple):
    """Per bin of predicted probability: counts, mean probability, and the share that is positive
    (both NaN where the bin is empty). edges [M + 1], the rest [M]."""

    edges: np.ndarray
    counts: np.ndarray
    probability: np.ndarray
    frequency: np.ndarray


class CalibrationError(NamedTuple):
    """plug_in: the expected calibration error; debiased: less what chance adds to it, [...]."""

    plug_in: np.ndarray
    debiased: np.ndarray


def brier_score(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and truth along the last axis (Brier 1950).

    probabilities [..., N] in [0, 1], truth [N] or [..., N] in {0, 1, NaN}; returns [...], NaN
    without a case.

    Raises:
        ValueError: shapes that do not fit, or a probability outside [0, 1].
    """
    probabilities = np.asarray(probabilities, float)
    truth, missing = known_labels(truth)
    if truth.shape not in (probabilities.shape, probabilities.shape[-1:]):
        raise ValueError(f"probabilities {probabilities.shape}, truth {truth.shape} must agree")
    known = np.broadcast_to(True if missing is None else ~missing, probabilities.shape)
    _check_range(probabilities[known])
    squares = (probabilities - truth) ** 2
    total, count = np.where(known, squares, 0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def reliability(
    probabilities: Float[np.ndarray, "N"], truth: np.ndarray, bins: int = 10
) -> Reliability:
    """The reliability table of one label: probabilities in `bins` bins of equal width over [0, 1].

    A bin holds its lower edge, the last one also 1. Missing labels are left out.

    Raises:
        ValueError: a probability outside [0, 1], or truth of another length.
    """
    probabilities, truth = _of_known(probabilities, truth)
    number = bin_of(probabilities, bins)
    count = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, values, bins) for values in (probabilities, truth)]
    means = [np.where(count > 0, s / np.maximum(count, 1), np.nan) for s in sums]
    return Reliability(np.linspace(0, 1, bins + 1), count, *means)


def _check_range(probabilities: np.ndarray) -> None:
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]: give sigmoid(logits)")


def bin_of(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """Bin number of each probability, as `reliability` counts."""
    _check_range(probabilities)
    return np.minimum((probabilities * bins).astype(int), bins - 1)


def expected_calibration_error(
    probabilities: Float[np.ndarray, "N"],
    truth: np.ndarray,
    bins: int = 10,
    *,
    debiased: bool = False,
) -> float:
    """Mean over the cases of |mean probability - share of positives| of the case's bin.

    Of one label's probability of being present, in bins of equal width (Naeini et al., AAAI 2015;
    Guo et al., ICML 2017, whose confidence is that of the predicted class instead). NaN without a
    case.

    Args:
        debiased: as `calibration_error_of_bins`, and not below 0.
    """
    error = calibration_error_of_bins(*_sums(*_of_known(probabilities, truth), bins))
    return float(np.maximum(error.debiased, 0) if debiased else error.plug_in)


def calibration_error_of_bins(
    count: Float[np.ndarray, "*batch M"],
    probability: Float[np.ndarray, "*batch M"],
    positives: Float[np.ndarray, "*batch M"],
) -> CalibrationError:
    """The expected calibration error from the sums of M bins, with and without its bias.

    |mean probability - share of positives| of a bin is above 0 by chance alone, and the more so
    the fewer cases a bin has. The share is about normal with variance f (1 - f) / count, so that
    what chance adds can be estimated as the mean that the gap has with such noise added once more
    (closed form: a folded normal), less the gap, and is subtracted (A. Kumar, P. Liang & T. Ma,
    Verified Uncertainty Calibration, NeurIPS 2019, who draw that noise).

    For intervals of the debiased error bootstrap it, unclipped, with the plug-in error of all cases
    as `target`: a resample is drawn from the cases, whose own error is the plug-in one
    (`calibration_interval` does it).

    Args:
        count, probability, positives: cases in each bin, and sums of their probabilities and of
            their labels.

    Returns:
        [*batch] each; NaN without a case. The debiased one can be a little below 0.
    """
    filled = np.maximum(count, 1)
    frequency = positives / filled
    gap = np.abs(probability / filled - frequency)
    spread = np.sqrt(frequency * (1 - frequency) / filled)
    scaled = (gap / np.where(spread > 0, spread, 1)).astype(float)
    density = np.exp(-(scaled**2) / 2) / np.sqrt(2 * np.pi)
    folded = 2 * spread * density + gap * (2 * ndtr(scaled) - 1)
    noisy = np.where(spread > 0, folded, gap)
    total = count.sum(-1)
    means = [(count * g).sum(-1) / np.maximum(total, 1) for g in (gap, 2 * gap - noisy)]
    return CalibrationError(*(np.where(total > 0, mean, np.nan) for mean in means))


def calibration_error_within_chance(
    count: Float[np.ndarray, "K M"],
    probability: Float[np.ndarray, "K M"],
    positives: Float[np.ndarray, "K M"],
) -> bool:
    """Whether the mean plug-in error of K labels is one that calibrated probabilities may have.

    If the probabilities p of a bin are right, its mean gap is about normal around 0 with variance
    p (1 - p) / count, and |gap| has the moments of a half normal. The bins of all labels are taken
    as independent, and their mean as normal; "may" is up to its upper 97.5 %. (Simulated: 95.4 to
    97.3 % of calibrated samples lie below, with 60 to 1000 cases.)

    Arguments as `calibration_error_of_bins`.
    """
    plug_in = calibration_error_of_bins(count, probability, positives).plug_in.mean()
    mean = probability / np.maximum(count, 1)
    total = np.maximum(count.sum(-1, keepdims=True), 1)
    variance = mean * (1 - mean) * count / total**2 / len(count) ** 2
    by_chance = np.sqrt(2 / np.pi * variance).sum()
    spread = np.sqrt((1 - 2 / np.pi) * variance.sum())
    return bool(plug_in <= by_chance + ndtri(0.975) * spread)


def calibration_interval(
    probabilities: Float[np.ndarray, "N"],
    truth: np.ndarray,
    bins: int = 10,
    *,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence | np.ndarray | None = None,
) -> tuple[float, float, float]:
    """The debiased expected calibration error of one label, and its 95 % bootstrap interval.

    Its low end is 0 where the error is `calibration_error_within_chance`: the bootstrap alone would
    exclude 0, the truth, for 13 to 33 % of calibrated samples of 60 to 1000 cases, and for nearly
    all of the means over labels; so it is 2 to 4 %. Where the true error is not 0 the interval
    covers it in 0.9 to 0.95, of rare labels (0.03 of 192 cases) in 0.86.

    Args:
        groups: [N], as `bootstrap`; others as `expected_calibration_error`.

    Returns:
        value, low, high, in [0, 1]; NaN where it is not defined.
    """
    known = known_labels(truth)[1]
    if known is not None:
        groups = None if groups is None else np.asarray(groups)[~known]
    probabilities, truth = _of_known(probabilities, truth)

    def statistic(cases_SN: np.ndarray) -> np.ndarray:
        rows = [_sums(probabilities[row], truth[row], bins) for row in cases_SN]
        sums = (np.stack(parts) for parts in zip(*rows, strict=True))
        return calibration_error_of_bins(*sums).debiased

    sums = _sums(probabilities, truth, bins)
    target = calibration_error_of_bins(*sums).plug_in
    found = bootstrap(statistic, len(truth), resamples, seed, groups, target)
    value, low, high = (float(np.clip(x, 0, 1)) for x in found)
    if calibration_error_within_chance(*(part[None] for part in sums)):
        low = min(low, 0.0)  # NaN stays
    return value, low, high


def _sums(
    probabilities: np.ndarray, truth: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = bin_of(probabilities, bins)
    weights = np.ones(len(number)), probabilities, truth
    count, probability, positives = (np.bincount(number, w, bins).astype(float) for w in weights)
    return count, probability, positives


def _of_known(probabilities: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cases whose label is not missing."""
    probabilities = np.asarray(probabilities)
    truth, missing = known_labels(truth)
    if truth.shape != probabilities.shape:
        raise ValueError(f"probabilities {probabilities.shape}, truth {truth.shape} must agree")
    return (probabilities, truth) if missing is None else (probabilities[~missing], truth[~missing])
