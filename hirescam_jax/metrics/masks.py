"""Maps against masks: where the evidence lies, and where it should.

Maps are [B, K, *grid] with any number of spatial axes. `void` (bool, the shape of the masks) marks
cells that count neither as hit nor as miss, as PASCAL VOC's 255 does. A map whose mask has no cell
left is NaN: there is nothing to find, which is not a miss. So is a map with a NaN in a cell that
counts. Maps of integers or bool are taken as floats. Everything works under `jit`, where masks
cannot be looked at, so that what is neither 0 nor 1 in them is only refused outside.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from hirescam_jax.metrics.arrays import floating, namespace

# The paper's 53 thresholds: .004 .008 .012 .016, and .02 to .98 by .02 (arXiv 2111.12215).
ORGAN_IOU_THRESHOLDS = np.concatenate([np.arange(1, 5) / 250, np.arange(1, 50) / 50])


class Overlap(NamedTuple):
    """Of binarised maps and masks, [B, K, T]: |both| / |either|, and 2 |both| / (sum of sizes)."""

    iou: Float[Array, "B K T"]
    dice: Float[Array, "B K T"]


def organ_iou(
    maps: Array | np.ndarray,
    allowed: Array | np.ndarray,
    thresholds: Any,
    *,
    void: Array | np.ndarray | None = None,
    authors_zero_without_outside: bool = False,
) -> Float[Array, "B K T"]:
    """OrganIoU: the share of the attended cells that lie in the allowed organ.

    A = cells of the map above the threshold inside the allowed region, B = those outside;
    OrganIoU = A / (A + B), and 0 where nothing is above the threshold (arXiv 2111.12215). NaN, to
    be left out of means, where no map could be right or none wrong: an allowed region without a
    cell (an absent label, an organ that is not in the volume), or one that is the whole grid (a
    finding that may be anywhere), of which every map would have 1.

    Args:
        maps: [B, K, *grid], normalised (`normalize_map`), in [0, 1].
        allowed: [B, K, *grid], bool or {0, 1}.
        thresholds: [T], or a number (T = 1); NaN at one that is NaN.
        void: cells that are left out of A and of B.
        authors_zero_without_outside: 0 where B = 0, as in the authors' public code, by which a
            map wholly inside its organ scores worst; 0 too for a region without a cell, and for the
            whole grid. Only to compare with figures made so.

    Raises:
        ValueError: shapes that differ, thresholds of another one, a cell of `allowed` that is not 0
            or 1, or a void that leaves nothing.
    """
    maps, inside, counted = _cells(floating(maps), allowed, void, "allowed")
    thresholds = jnp.atleast_1d(floating(thresholds).astype(maps.dtype))
    if thresholds.ndim > 1:
        raise ValueError(f"thresholds {thresholds.shape}: give [T], or a number")
    return _organ_iou(maps, inside, counted, thresholds, authors_zero_without_outside)


@partial(jax.jit, static_argnums=4)
def _organ_iou(
    maps: Array, inside: Array, counted: Array, thresholds: Array, authors: bool
) -> Array:
    known = _known(maps, counted)
    if not authors:
        known &= inside.any(-1) & (counted & ~inside).any(-1)

    def at(threshold: Array) -> Array:
        above = (maps > threshold) & counted
        hits, all_above = (above & inside).sum(-1), above.sum(-1)
        if authors:
            hits = jnp.where(hits == all_above, 0, hits)
        value = hits / jnp.maximum(all_above, 1)
        return jnp.where(known & ~jnp.isnan(threshold), value, jnp.nan)

    return jnp.moveaxis(jax.lax.map(at, thresholds), 0, -1).astype(maps.dtype)


def overlap(
    maps: Array | np.ndarray,
    masks: Array | np.ndarray,
    thresholds: Any,
    void: Array | np.ndarray | None = None,
) -> Overlap:
    """IoU (Jaccard) and Dice of the cells above a threshold and the mask.

    Args:
        maps: [B, K, *grid], raw or normalised.
        masks: [B, K, *grid], bool or {0, 1}: where the object is.
        thresholds: [T] or a number (T = 1) for all, or [B, K, T], such as
            `otsu_threshold(maps)[..., None]`; NaN at one that is NaN. One that is to be reported is
            chosen on other data: `best_threshold` of a validation split.

    Raises:
        ValueError: shapes that differ, thresholds of another one, a cell of a mask that is not 0 or
            1, or a void that leaves nothing.
    """
    maps, inside, counted = _cells(floating(maps), masks, void)
    thresholds = jnp.atleast_1d(floating(thresholds).astype(maps.dtype))
    if thresholds.ndim > 1 and thresholds.shape[:-1] != maps.shape[:2]:
        raise ValueError(
            f"thresholds {thresholds.shape}: give [T], a number, or [B, K, T] with [B, K] of the "
            f"maps, {maps.shape[:2]}"
        )
    each = jnp.broadcast_to(thresholds, (*maps.shape[:2], thresholds.shape[-1]))
    return _overlap(maps, inside, counted, each)


@jax.jit
def _overlap(maps: Array, inside: Array, counted: Array, each: Array) -> Overlap:
    size = inside.sum(-1)
    known = (size > 0) & _known(maps, counted)

    def at(threshold_BK: Array) -> tuple[Array, Array]:
        above = (maps > threshold_BK[..., None]) & counted
        return (above & inside).sum(-1), above.sum(-1)

    each = jnp.moveaxis(each, -1, 0)
    both, above = jax.lax.map(at, each)
    known &= ~jnp.isnan(each)
    iou = jnp.where(known, both / jnp.maximum(above + size - both, 1), jnp.nan)
    dice = jnp.where(known, 2 * both / jnp.maximum(above + size, 1), jnp.nan)
    return Overlap(jnp.moveaxis(iou, 0, -1), jnp.moveaxis(dice, 0, -1))


def best_threshold(scores: Float[np.ndarray, "N K T"]) -> Float[np.ndarray, "K"]:
    """Per label the number (as a float) of the threshold with the best mean over the volumes in
    which it is defined; NaN where it never is, so that no threshold was chosen. On validation, to
    be frozen for the test."""
    defined = ~np.isnan(scores)
    total = np.where(defined, scores, 0).sum(0)
    mean_KT = np.where(defined.any(0), total / np.maximum(defined.sum(0), 1), -1)
    return np.where(defined.any((0, 2)), np.argmax(mean_KT, axis=-1), np.nan)


def otsu_threshold(
    maps: Array | np.ndarray,
    void: Array | np.ndarray | None = None,
    bins: int = 256,
) -> Float[Array, "B K"]:
    """Otsu's threshold of each map: it splits the histogram so that the variance between the two
    parts is largest (N. Otsu, IEEE Trans. SMC 1979); the centre of the last bin of the lower part.

    Args:
        maps: [B, K, *grid].
        void: cells that are left out of the histogram.
        bins: of equal width between the least and the greatest value of the map.
    """
    maps, _, counted = _cells(floating(maps), np.ones(maps.shape, bool), void)
    return _otsu(maps, counted, bins)


@partial(jax.jit, static_argnums=2)
def _otsu(maps: Array, counted: Array, bins: int) -> Array:
    def of_one(values: Array, counted: Array) -> Array:
        low = jnp.min(jnp.where(counted, values, jnp.inf))
        high = jnp.max(jnp.where(counted, values, -jnp.inf))
        edges = low + (high - low) * jnp.arange(1, bins) / bins
        values = jnp.sort(jnp.where(counted, values, jnp.inf))
        below = jnp.searchsorted(values, edges, side="left")
        counts = jnp.diff(jnp.concatenate([jnp.zeros(1, int), below, counted.sum()[None]]))
        # Bin numbers for values: the split is the same, and their sums are exact in float32.
        number = jnp.arange(bins)
        lower = jnp.cumsum(counts)
        upper = lower[-1] - lower
        sum_lower = jnp.cumsum((counts * number).astype(maps.dtype))
        means = sum_lower / jnp.maximum(lower, 1)
        others = (sum_lower[-1] - sum_lower) / jnp.maximum(upper, 1)
        share = lower / jnp.maximum(lower[-1], 1)
        between = share * (1 - share) * (means - others) ** 2
        split = jnp.argmax(between[:-1])
        return jnp.where(high > low, low + (high - low) * (split + 0.5) / bins, high)

    return jnp.where(_known(maps, counted), jax.vmap(jax.vmap(of_one))(maps, counted), jnp.nan)


def pointing_game(
    maps: Array | np.ndarray, masks: Array | np.ndarray, void: Array | np.ndarray | None = None
) -> Any:
    """1 where the strongest evidence lies in the mask, else 0.

    "Hit" of J. Zhang et al., Top-down Neural Attention by Excitation Backprop (IJCV 2018), whose
    accuracy is its mean over the images of a class. Several equal maxima count by their part that
    lies inside; a map without positive evidence points nowhere and counts 0. Grow the mask for a
    tolerance.

    Args:
        maps: [B, K, *grid], raw or normalised; NumPy arrays are computed by NumPy.
        masks: [B, K, *grid], bool or {0, 1}: where the object is.
        void: cells that cannot be pointed to.

    Returns:
        [B, K], NaN where the mask is empty or the map is NaN.

    Raises:
        ValueError: shapes that differ, a cell of a mask that is not 0 or 1, or a void that leaves
            nothing.
    """
    xp = namespace(maps, masks, void)
    maps, inside, counted = _cells(floating(maps, xp), masks, void)
    highest = xp.where(counted, maps, -xp.inf).max(axis=-1, keepdims=True)
    points = (maps == highest) & (highest > 0) & counted
    hit = (points & inside).sum(axis=-1) / xp.maximum(points.sum(axis=-1), 1)
    return xp.where(inside.any(axis=-1) & _known(maps, counted), hit, xp.nan)


def energy_inside(
    maps: Array | np.ndarray, masks: Array | np.ndarray, void: Array | np.ndarray | None = None
) -> Any:
    """The part of the positive evidence that lies in the mask.

    The energy-based pointing game of H. Wang et al., Score-CAM (CVPR Workshops 2020), with a mask
    for their box; 0 for a map without positive evidence. Arguments, result and errors as
    `pointing_game`.
    """
    xp = namespace(maps, masks, void)
    maps, inside, counted = _cells(floating(maps, xp), masks, void)
    evidence = xp.where(counted, xp.maximum(maps, 0), 0)
    if xp is np:
        evidence = evidence.astype(np.float64)
    total = evidence.sum(axis=-1)
    share = (evidence * inside).sum(axis=-1) / xp.where(total > 0, total, 1)
    return xp.where(inside.any(axis=-1) & _known(maps, counted), share, xp.nan)


def rank_accuracy(
    maps: Array | np.ndarray, masks: Array | np.ndarray, void: Array | np.ndarray | None = None
) -> Float[Array, "B K"]:
    """Relevance rank accuracy: of the n strongest cells, n being the size of the mask, the part
    that lies in it (L. Arras et al., CLEVR-XAI, Information Fusion 2022).

    Equal values at the n-th place count by their part inside. Arguments, result and errors as
    `pointing_game`.
    """
    maps, inside, counted = _cells(floating(maps), masks, void)
    return _rank_accuracy(maps, inside, counted)


@jax.jit
def _rank_accuracy(maps: Array, inside: Array, counted: Array) -> Array:
    falling, _ = _falling(maps, inside, counted)
    size = inside.sum(-1, keepdims=True)
    last = -jnp.take_along_axis(falling, jnp.maximum(size - 1, 0), axis=-1)
    above, ties = (maps > last) & counted, (maps == last) & counted
    share = (size[..., 0] - above.sum(-1)) / jnp.maximum(ties.sum(-1), 1)
    hits = (above & inside).sum(-1) + share * (ties & inside).sum(-1)
    known = (size[..., 0] > 0) & _known(maps, counted)
    return jnp.where(known, hits / jnp.maximum(size[..., 0], 1), jnp.nan)


def map_average_precision(
    maps: Array | np.ndarray, masks: Array | np.ndarray, void: Array | np.ndarray | None = None
) -> Float[Array, "B K"]:
    """Average precision of the cells' values as scores for lying in the mask.

    Precision at each threshold times the recall gained, equal values together. A random map has
    about the mask's share of the grid. Arguments, result and errors as `pointing_game`.
    """
    maps, inside, counted = _cells(floating(maps), masks, void)
    return _average_precision(maps, inside, counted)


@jax.jit
def _average_precision(maps: Array, inside: Array, counted: Array) -> Array:
    falling, inside = _falling(maps, inside, counted)
    hits = jnp.cumsum(inside, axis=-1)
    # Within a run of equal values the precision that counts is the one at its end.
    places = jnp.arange(maps.shape[-1])
    changes = falling[..., 1:] != falling[..., :-1]
    ends = jnp.where(changes, places[:-1], maps.shape[-1] - 1)
    ends = jnp.concatenate([ends, jnp.full_like(ends[..., :1], maps.shape[-1] - 1)], axis=-1)
    end = jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)
    precision = jnp.take_along_axis(hits, end, axis=-1) / (end + 1)
    found = hits[..., -1]
    total = jnp.where(inside, precision, 0).sum(-1)
    known = (found > 0) & _known(maps, counted)
    return jnp.where(known, total / jnp.maximum(found, 1), jnp.nan)


def _falling(maps: Array, inside: Array, counted: Array) -> tuple[Array, Array]:
    """The negative values from the strongest on, what is void behind, and which lie inside."""
    keys = jnp.where(counted, -maps, jnp.inf)
    falling, inside = jax.lax.sort((keys, inside), num_keys=1)
    return falling, inside


def _cells(maps: Any, masks: Any, void: Any, name: str = "masks") -> tuple[Any, Any, Any]:
    """Maps, what of the masks is not void, and what is not void, as [B, K, cells]; the last two
    bool."""
    xp = namespace(maps, masks, void)
    maps, masks = xp.asarray(maps), xp.asarray(masks)
    _check(maps, masks, void, name)
    shape = (*maps.shape[:2], -1)
    counted = xp.ones(maps.shape, bool) if void is None else xp.asarray(void) == 0
    return (
        maps.reshape(shape),
        ((masks != 0) & counted).reshape(shape),
        counted.reshape(shape),
    )


def _known(maps: Any, counted: Any) -> Any:
    """[B, K]: whether no cell that counts is NaN."""
    xp = namespace(maps)
    return ~(xp.isnan(maps) & counted).any(axis=-1)


def _check(maps: Any, masks: Any, void: Any, name: str) -> None:
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and {name} {masks.shape} must agree")
    if maps.ndim < 3:
        raise ValueError(f"maps must be [B, K, *grid] with a spatial axis, got {maps.shape}")
    if masks.dtype != bool and not isinstance(masks, Tracer):
        cells = np.asarray(masks)
        wrong = (cells != 0) & (cells != 1)  # NaN too
        if void is not None and not isinstance(void, Tracer) and void.shape == cells.shape:
            wrong &= np.asarray(void) == 0
        if wrong.any():
            raise ValueError(
                f"{name} have a cell of {cells[wrong][0]}: give bool, or 0 outside and 1 inside, "
                "and mark cells that do not count (255 of VOC) with `void`"
            )
    if void is None:
        return
    if void.shape != maps.shape:
        raise ValueError(f"maps {maps.shape} and void {void.shape} must agree")
    if not isinstance(void, Tracer):
        nothing = (np.asarray(void) != 0).reshape(*maps.shape[:2], -1).all(-1)
        if nothing.any():
            b, k = map(int, np.argwhere(nothing)[0])
            raise ValueError(f"void covers all of map [{b}, {k}]: leave that map out")
