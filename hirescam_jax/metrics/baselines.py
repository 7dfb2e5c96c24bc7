"""Maps that no model made, to set beside those that one did.

The centre blob and the random map are floors: a map that does no better shows nothing. The organ
prior knows where each label's organs usually lie, which no classifier is told: it is a guide from
above for what "looks at the right organ" can mean, not a competitor.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Array, Float, Int


def organ_prior(
    batches: Iterable[Array | np.ndarray],
) -> Float[np.ndarray, "K *grid"]:
    """How often each cell is allowed for a label, over the volumes that have the label.

    The mean of the allowed masks (unions of the organs in which the label was found) of training
    or validation volumes; never of those that it will be measured on.

    Args:
        batches: masks [n, K, *grid], bool or {0, 1}; all false where a volume lacks the label.

    Returns:
        [K, *grid] in [0, 1]; NaN for a label that no volume has.

    Raises:
        ValueError: no batch, or shapes that differ.
    """
    total = count = None
    for batch in batches:
        masks = np.asarray(batch) != 0
        if total is not None and masks.shape[1:] != total.shape:
            raise ValueError(f"masks {masks.shape[1:]} and {total.shape} must agree")
        present = masks.reshape(*masks.shape[:2], -1).any(-1).sum(0)
        total = masks.sum(0) if total is None else total + masks.sum(0)
        count = present if count is None else count + present
    if total is None or count is None:
        raise ValueError("no masks to make a prior of")
    count = count.reshape(-1, *[1] * (total.ndim - 1))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def centre_blob(shape: Sequence[int], width: float = 0.25) -> Float[np.ndarray, "B K *grid"]:
    """A Gaussian at the centre of the grid, the same for all.

    Args:
        shape: (B, K, *grid).
        width: standard deviation, as a part of each axis.
    """
    grid = tuple(shape[2:])
    exponent = np.zeros(grid)
    for axis, size in enumerate(grid):
        place = ((np.arange(size) + 0.5) / size - 0.5) / width
        exponent += place.reshape([-1 if i == axis else 1 for i in range(len(grid))]) ** 2
    return np.broadcast_to(np.exp(-exponent / 2).astype(np.float32), tuple(shape))


def random_maps(
    shape: Sequence[int],
    seed: int = 0,
    index: Sequence[int] | np.ndarray | None = None,
    labels: Int[np.ndarray, "B K"] | None = None,
) -> Float[np.ndarray, "B K *grid"]:
    """Independent uniform values in [0, 1).

    A map is a function of the seed and of its numbers, however volumes and labels are batched.

    Args:
        shape: (B, K, *grid).
        index: a number for each volume; 0 to B - 1 by default.
        labels: a number for each of its maps; 0 to K - 1 by default.
    """
    batch, count, *grid = shape
    index = np.arange(batch) if index is None else np.asarray(index)
    if labels is None:
        labels = np.broadcast_to(np.arange(count), (batch, count))
    maps = np.empty(tuple(shape), np.float32)
    for b, k in np.ndindex(batch, count):
        rng = np.random.default_rng((seed, int(index[b]), int(labels[b, k])))
        maps[b, k] = rng.random(grid, np.float32)
    return maps


BASELINES = ("organ_prior", "centre_blob", "random")


def baseline_maps(
    shape: Sequence[int],
    index: np.ndarray,
    labels: Int[np.ndarray, "B K"],
    prior: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "B K *grid"]]:
    """Maps that no model made, by their name in `BASELINES`, of volumes with these numbers [B] in
    their split and of labels with these; arguments as `random_maps`.

    Args:
        prior: the organ prior of each map [B, K, *grid]; without one there is none.
    """
    own = {} if prior is None else {"organ_prior": prior.astype(np.float32)}
    blob, noise = centre_blob(shape), random_maps(shape, seed, index, labels)
    return {**own, "centre_blob": blob, "random": noise}
