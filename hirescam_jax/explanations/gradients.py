"""What all map methods share: gradients of many labels through a head, in bounded memory.

A head is any function from features [B, *grid, C] to logits [B, K] that treats the examples of the
batch independently.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from hirescam_jax.explanations.independence import check_independent, treats_alike

Head: TypeAlias = Callable[[Array], Array]
Labels: TypeAlias = Sequence[int] | np.ndarray | Array | None

# Gradients of several labels are held at once only while they fit in this many bytes.
MAX_GRADIENT_BYTES = 256 * 2**20


def gradient_maps(
    channel_sum: Callable[[Array, Array], Array],
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """Pulls one-hot cotangents through the head, as many labels at a time as memory allows.

    Args:
        channel_sum: (gradient of one label, features [B, *grid, C]) -> its maps [B, *grid]. The
            gradient is [B, *grid, C], or [1, *grid, C] where it is the same for every example.
        head, features, labels, max_gradient_bytes: as in `hirescam`.

    Raises:
        ValueError: as `hirescam`.
    """
    features = checked_features(features)
    logits, pull_back = jax.vjp(head, features)
    num_labels = check_call(head, features, logits, labels)
    batch = features.shape[0]
    labels_LB = label_grid(labels, batch, num_labels).T
    same_labels = labels is None or np.ndim(labels) == 1
    if batch > 1 and same_labels and has_one_gradient(head, features, logits):
        # The gradient is the same for every example: one pulls it back for all.
        _, pull_back = jax.vjp(head, features[:1])
        labels_LB = labels_LB[:, :1]

    def one_label(label_B: Int[Array, "B"]) -> Array:
        # Made of the logits, so that under `shard_map` it is split over devices as they are.
        chosen = jnp.arange(num_labels) == label_B[:, None]
        cotangent = jnp.where(chosen, jnp.ones_like(logits), jnp.zeros_like(logits))
        (gradient,) = pull_back(cotangent[: labels_LB.shape[1]])
        return channel_sum(gradient, features)

    gradient_bytes = features[:1].size * labels_LB.shape[1] * features.dtype.itemsize
    maps_LB = in_chunks(one_label, labels_LB, gradient_bytes, max_gradient_bytes)
    return known_labels_only(jnp.moveaxis(maps_LB, 0, 1), labels, num_labels)


def in_chunks(function: Callable, items: Array, bytes_each: int, max_bytes: int) -> Array:
    """`function` of each row of `items`, as many at a time as fit in `max_bytes`; at least one."""
    chunk = max(1, max_bytes // bytes_each)
    if chunk >= items.shape[0]:
        return jax.vmap(function)(items)
    return jax.lax.map(function, items, batch_size=chunk if chunk > 1 else None)


def is_affine(head: Head, features: Any) -> bool:
    """Whether the gradient of the head is free of the features.

    Then it is affine, up to parts without a gradient. Conservative: an operation is taken to use
    all of its inputs for all of its outputs, whatever their values.
    """

    def gradient(features: Array) -> Array:
        logits, pull_back = jax.vjp(head, features)
        return pull_back(jnp.ones_like(logits))[0]

    # Of many batches it is the same for all, which `vmap` refuses to return where it may differ.
    same = jax.vmap(gradient, out_axes=None)
    try:
        jax.eval_shape(lambda features: same(features[None]), features)
    except (ValueError, NotImplementedError):
        return False
    return True


def has_one_gradient(head: Head, features: Any, logits: Any) -> bool:
    """Whether the gradient of the head is also the same for every example of a batch.

    Not so, or not known to be so: a head that has data of its own for each example (numbers that it
    counts, holds or draws, as in dropout), or one that takes no batch of one.
    """
    if not is_affine(head, features) or not treats_alike(jax.make_jaxpr(head)(features)):
        return False
    try:
        alone = jax.eval_shape(head, features[:1])
    except (TypeError, ValueError, OverflowError):
        return False
    return alone.shape == (1, logits.shape[1])


def checked_features(features: Array) -> Array:
    """In float32 at least.

    Raises:
        ValueError: no spatial axis, or no example, position or channel.
    """
    features = jnp.asarray(features)
    if features.ndim < 3:
        raise ValueError(
            f"features must be [B, *grid, C] with at least one spatial axis, got {features.shape}"
        )
    if features.size == 0:
        raise ValueError(f"features are empty: got {features.shape} for [B, *grid, C]")
    return at_least_float32(features)


def check_call(head: Head, features: Array, logits: Any, labels: Labels) -> int:
    """What every method checks of a head, its logits and the labels; returns K.

    Raises:
        ValueError: logits that are not floats [B, K], labels that are not [L] or [B, L] or out of
            range, a head that mixes the examples.
    """
    num_labels = check_logits(logits, features)
    check_labels(labels, features.shape[0], num_labels)
    check_independent(head, features)
    return num_labels


def check_logits(logits: Any, features: Array) -> int:
    """Returns K."""
    wanted = f"head must return logits [B, K] with B = {features.shape[0]}"
    if not hasattr(logits, "shape"):
        raise ValueError(f"{wanted}, got a {type(logits).__name__}")
    if logits.ndim != 2 or logits.shape[0] != features.shape[0]:
        raise ValueError(f"{wanted}, got {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"head must return real floating-point logits, got {logits.dtype}")
    return logits.shape[1]


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def label_grid(labels: Labels, batch: int, num_labels: int) -> Int[Array, "B L"]:
    if labels is None:
        labels = jnp.arange(num_labels)
    labels = jnp.asarray(labels)
    return jnp.broadcast_to(labels, (batch, labels.shape[-1]))


def check_labels(labels: Labels, batch: int, num_labels: int) -> None:
    if labels is None:
        return
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if labels.size == 0:
        raise ValueError("no labels are given: take None for all of them")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if (labels.shape != (batch, *labels.shape[1:]) and labels.ndim != 1) or labels.ndim > 2:
        raise ValueError(f"labels must be [L] or [B, L] with B = {batch}, got {labels.shape}")
    if isinstance(labels, Tracer):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} is out of range: the head has {num_labels} labels")


def known_labels_only(values_BL: Array, labels: Labels, num_labels: int) -> Array:
    """NaN for traced labels that are out of range (others were refused); values are [B, L, ...]."""
    if not isinstance(labels, Tracer):
        return values_BL
    labels_BL = label_grid(labels, values_BL.shape[0], num_labels)
    known = (labels_BL >= 0) & (labels_BL < num_labels)
    return jnp.where(known.reshape(known.shape + (1,) * (values_BL.ndim - 2)), values_BL, jnp.nan)
