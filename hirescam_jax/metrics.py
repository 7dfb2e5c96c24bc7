"""Measures of predictions (AUROC, average precision) and of maps (OrganIoU, pointing game)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import rankdata

# The paper's 53 thresholds: .004 .008 .012 .016, and .02 to .98 by .02 (arXiv 2111.12215).
ORGAN_IOU_THRESHOLDS = np.concatenate([np.arange(1, 5) / 250, np.arange(1, 50) / 50])


class Interval(NamedTuple):
    """A point estimate with its bootstrap 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def organ_iou(
    maps: Float[Array, "B K *grid"], allowed: Array, thresholds: Float[Array | np.ndarray, "T"]
) -> Float[Array, "B K T"]:
    """OrganIoU: the share of the attended cells that lie in the allowed organ.

    A = cells of the map above the threshold inside the allowed region, B = those outside;
    OrganIoU = A / (A + B), and 0 where nothing is above the threshold (arXiv 2111.12215).

    Args:
        maps: normalised maps (`normalize_map`), in [0, 1].
        allowed: [B, K, *grid], bool or {0, 1}.
        thresholds: [T].

    Raises:
        ValueError: maps and allowed differ in shape.
    """
    if maps.shape != allowed.shape:
        raise ValueError(f"maps {maps.shape} and allowed {allowed.shape} must agree")
    axes = tuple(range(2, maps.ndim))
    inside = jnp.asarray(allowed).astype(bool)

    def at(threshold: Array) -> Array:
        above = maps > threshold
        return jnp.sum(above & inside, axis=axes) / jnp.maximum(jnp.sum(above, axis=axes), 1)

    return jnp.moveaxis(jax.lax.map(at, jnp.asarray(thresholds, maps.dtype)), 0, -1)


def pointing_game(maps: np.ndarray, masks: np.ndarray) -> Float[np.ndarray, "B K"]:
    """1 where the strongest evidence lies in the mask, else 0.

    "Hit" of J. Zhang et al., Top-down Neural Attention by Excitation Backprop (IJCV 2018), whose
    accuracy is its mean over the images of a class. Several equal maxima count by their part that
    lies inside; a map without positive evidence points nowhere and counts 0. Grow the mask for a
    tolerance.

    Args:
        maps: [B, K, *grid], raw or normalised.
        masks: [B, K, *grid], bool or {0, 1}: where the object is.

    Raises:
        ValueError: maps and masks differ in shape.
    """
    maps, inside = _maps_and_masks(maps, masks)
    highest = maps.max(axis=-1, keepdims=True)
    points = (maps == highest) & (highest > 0)
    return (points & inside).sum(axis=-1) / np.maximum(points.sum(axis=-1), 1)


def energy_inside(maps: np.ndarray, masks: np.ndarray) -> Float[np.ndarray, "B K"]:
    """The part of the positive evidence that lies in the mask.

    The energy-based pointing game of H. Wang et al., Score-CAM (CVPR Workshops 2020), with a mask
    for their box; 0 for a map without positive evidence. Arguments and errors as `pointing_game`.
    """
    maps, inside = _maps_and_masks(maps, masks)
    evidence = np.maximum(maps, 0).astype(np.float64)
    total = evidence.sum(axis=-1)
    return (evidence * inside).sum(axis=-1) / np.where(total > 0, total, 1)


def _maps_and_masks(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as [B, K, cells]."""
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} must agree")
    return maps.reshape(*maps.shape[:2], -1), masks.reshape(*maps.shape[:2], -1) != 0


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


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_cases: int,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap over the cases of a split.

    Args:
        statistic: case indices [S, N] -> values [S, ...], vectorised over the S resamples.

    Returns:
        value, low, high: each [...]; the statistic on all cases, and its 2.5 and 97.5 percentiles
        over the resamples in which it is defined.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(num_cases)[None])[0]
    draws = statistic(rng.integers(num_cases, size=(resamples, num_cases)))
    # nanpercentile warns where a column has no value at all.
    undefined = np.isnan(draws).all(axis=0)
    low, high = np.nanpercentile(np.where(undefined, 0.0, draws), [2.5, 97.5], axis=0)
    return np.asarray(value), np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
