"""What all map methods share: gradients of many labels through a head, in bounded memory.

A head is any function from features [B, *grid, C] to logits [B, K] that treats the examples of the
batch independently. This is also where a head that mixes them is found out.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

Head: TypeAlias = Callable[[Array], Array]
Labels: TypeAlias = Sequence[int] | np.ndarray | Array | None

# Gradients of several labels are held at once only while they fit in this many bytes.
MAX_GRADIENT_BYTES = 256 * 2**20

MIXES = (
    "the head mixes the examples of a batch: the gradient of one example's logit reaches another's "
    "features. Take BatchNorm (in training mode) or whatever else works across the batch out of "
    "the head, into the features"
)

# Batch sizes with which heads are traced; primes, so that a batch is recognised in a shape.
TRACED_BATCHES = (29, 31, 37, 41)


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
    batch, num_labels = check_logits(logits, features)
    check_labels(labels, batch, num_labels)
    labels_LB = label_grid(labels, batch, num_labels).T
    same_labels = labels is None or np.ndim(labels) == 1
    if batch > 1 and is_affine(head, features, logits) and same_labels:
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
    return jnp.moveaxis(maps_LB, 0, 1)


def in_chunks(function: Callable, items: Array, bytes_each: int, max_bytes: int) -> Array:
    """`function` of each row of `items`, as many at a time as fit in `max_bytes`; at least one."""
    chunk = max(1, max_bytes // bytes_each)
    if chunk >= items.shape[0]:
        return jax.vmap(function)(items)
    return jax.lax.map(function, items, batch_size=chunk if chunk > 1 else None)


def is_affine(head: Head, features: Any, logits: Any) -> bool:
    """Whether the traced gradient of the head is free of the features (if so, it is affine).

    Conservative: an operation counts as using all of its inputs for all of its outputs, and a head
    that draws random numbers (dropout) treats each example differently. A head that holds data of
    the whole batch counts as not affine.

    Raises:
        ValueError: the head mixes the examples. Seen are sums over the batch (BatchNorm, a mean,
            attention between examples); `head_verdict` sees every kind.
    """
    suspect, traced = False, None
    for batch in [n for n in TRACED_BATCHES if features[0].size % n][:2]:
        traced = _traced_gradient(head, features, logits, batch)
        if traced is None:
            return False
        if not _sums_over_batch(traced, [False, True], batch):
            break
        if suspect:  # with both, so no other axis was taken for the batch
            raise ValueError(MIXES)
        suspect = True
    if traced is None or any(name in str(traced) for name in ("random", "threefry")):
        return False
    needed = set(map(id, traced.outvars))
    for equation in reversed(traced.eqns):
        if needed.intersection(map(id, equation.outvars)):
            needed.update(map(id, equation.invars))
    return id(traced.invars[0]) not in needed


def _traced_gradient(head: Head, features: Any, logits: Any, batch: int) -> Any:
    """The program (features [1, *grid, C], cotangent [1, K]) -> gradient of a head at so many
    examples; None for a head that takes no other batch than its own."""

    def gradient(features: Array, cotangent: Array) -> Array:
        features = jnp.broadcast_to(features, (batch, *features.shape[1:]))
        logits, pull_back = jax.vjp(head, features)
        if logits.shape[0] != batch:
            raise ValueError("a head that holds data of the whole batch")
        return pull_back(jnp.broadcast_to(cotangent, logits.shape))[0]

    try:
        return jax.make_jaxpr(gradient)(features[:1], logits[:1]).jaxpr
    except (TypeError, ValueError, OverflowError):
        return None


def _sums_over_batch(jaxpr: Any, dependent: Sequence[bool], batch: int) -> bool:
    """Whether a value that depends on the marked inputs is summed over the batch.

    The cotangent passes through linear operations only. An example's logit that depends on another
    through a sum, a mean or a maximum is a broadcast over the batch, the transpose of a sum.
    """

    def axes(variable: Any) -> int:
        size, count = getattr(variable.aval, "size", 1), 0
        while size and size % batch == 0:
            size, count = size // batch, count + 1
        return count

    known = {id(v) for v, marked in zip(jaxpr.invars, dependent, strict=True) if marked}
    for equation in jaxpr.eqns:
        marked = [id(v) in known for v in equation.invars]
        if not any(marked):
            continue
        known.update(map(id, equation.outvars))
        inner = [
            getattr(value, "jaxpr", value)
            for value in equation.params.values()
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if len(inner) == 1 and len(inner[0].invars) == len(marked):
            if _sums_over_batch(inner[0], marked, batch):
                return True
        elif equation.primitive.name in ("reduce_sum", "dot_general"):
            before = max(axes(v) for v, m in zip(equation.invars, marked, strict=True) if m)
            if axes(equation.outvars[0]) < before:
                return True
    return False


def checked_features(features: Array) -> Array:
    """In float32 at least.

    Raises:
        ValueError: no spatial axis.
    """
    features = jnp.asarray(features)
    if features.ndim < 3:
        raise ValueError(
            f"features must be [B, *grid, C] with at least one spatial axis, got {features.shape}"
        )
    return at_least_float32(features)


def check_logits(logits: Any, features: Array) -> tuple[int, int]:
    """Returns B and K."""
    if logits.ndim != 2 or logits.shape[0] != features.shape[0]:
        raise ValueError(
            f"head must return logits [B, K] with B = {features.shape[0]}, got {logits.shape}"
        )
    return logits.shape[0], logits.shape[1]


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
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if (labels.shape != (batch, *labels.shape[1:]) and labels.ndim != 1) or labels.ndim > 2:
        raise ValueError(f"labels must be [L] or [B, L] with B = {batch}, got {labels.shape}")
    if isinstance(labels, Tracer) or labels.size == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} is out of range: the head has {num_labels} labels")
