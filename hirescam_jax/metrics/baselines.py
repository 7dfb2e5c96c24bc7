"""Maps that no model made, to set beside those that one did.

The centre blob and the random map are floors: a map that does no better shows nothing. The organ
prior knows where each label's organs usually lie, which no classifier is told: it is a guide from
above for what "looks at the right organ" can mean, not a competitor.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
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


def centre_blob(shape: Sequence[int], width: float = 0.25) -> Float[Array, "B K *grid"]:
    """A Gaussian at the centre of the grid, the same for all.

    Args:
        shape: (B, K, *grid).
        width: standard deviation, as a part of each axis.
    """
    grid = tuple(shape[2:])
    exponent = jnp.zeros(grid)
    for axis, size in enumerate(grid):
        place = ((jnp.arange(size) + 0.5) / size - 0.5) / width
        exponent += place.reshape([-1 if i == axis else 1 for i in range(len(grid))]) ** 2
    return jnp.broadcast_to(jnp.exp(-exponent / 2), tuple(shape))


def random_maps(
    shape: Sequence[int],
    seed: int = 0,
    index: Int[Array | np.ndarray, "B"] | None = None,
    labels: Int[Array | np.ndarray, "B K"] | None = None,
) -> Float[Array, "B K *grid"]:
    """Independent uniform values in [0, 1).

    A map is a function of the seed and of its numbers, however volumes and labels are batched.

    Args:
        shape: (B, K, *grid).
        index: a number for each volume; 0 to B - 1 by default.
        labels: a number for each of its maps; 0 to K - 1 by default.
    """
    batch, count, *grid = shape
    index = jnp.arange(batch) if index is None else jnp.asarray(index)
    if labels is None:
        labels = jnp.broadcast_to(jnp.arange(count), (batch, count))

    def one(number: Array, label: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), label)
        return jax.random.uniform(key, tuple(grid))

    return jax.vmap(jax.vmap(one, (None, 0)))(index, jnp.asarray(labels))
