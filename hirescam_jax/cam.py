"""HiResCAM and Grad-CAM: from a head and its features to signed maps, for all labels at once.

A head is any function from features [B, *grid, C] to logits [B, K] that treats the examples of
the batch independently (so: no BatchNorm inside it). Both maps need only the gradient of a logit
with respect to the features, which `jax.vjp` through the head gives; the backbone is never
differentiated. Everything here is pure and works under `jit`, `vmap` and `grad`.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from hirescam_jax.compiling import compiler_options

Head: TypeAlias = Callable[[Array], Array]
Labels: TypeAlias = Sequence[int] | np.ndarray | Array | None

# Gradients of several labels are held at once only while they fit in this many bytes.
MAX_GRADIENT_BYTES = 256 * 2**20


class Explanation(NamedTuple):
    """What `explain` returns.

    logits [B, K]: the model's scores, all labels.
    maps [B, L, *grid]: signed maps of the L chosen labels.
    residual [B, L]: |sum of the map + bias - logit|, with bias = the head's output on all-zero
        features. Zero up to rounding is a proof that the map accounts for the whole score, which
        HiResCAM guarantees for an affine head; elsewhere it is the part left unexplained.
    """

    logits: Float[Array, "B K"]
    maps: Float[Array, "B L *grid"]
    residual: Float[Array, "B L"]


def hirescam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """HiResCAM: the gradient of a logit times the features, summed over channels, signed.

    maps[b, l] = sum_c d logit[b, labels[l]] / d features[b, ..., c] * features[b, ..., c]
    (Draelos & Carin 2020, arXiv 2011.08891). If the head is affine, sum(maps[b, l]) plus the bias
    of the label is its logit exactly.

    Args:
        head: features [B, *grid, C] -> logits [B, K]; must not mix examples of the batch.
        features: float array; bfloat16 and float16 are computed in float32.
        labels: None for all K labels, [L] for the same labels of every example, or [B, L].
        max_gradient_bytes: the labels are taken in chunks whose gradients fit in this.

    Returns:
        Maps [B, K, *grid] for labels=None, otherwise [B, L, *grid].

    Raises:
        ValueError: features without a spatial axis, a head that does not return [B, K], or a
            label that is out of range.
    """

    def channel_sum(gradient: Array, features: Array) -> Array:
        if gradient.shape[0] < features.shape[0]:
            # One gradient serves the batch: a matrix product, which the sum below is not.
            return jnp.einsum("b...c,...c->b...", features, gradient[0], precision="highest")
        return jnp.sum(gradient * features, axis=-1)

    return _maps(channel_sum, head, features, labels, max_gradient_bytes)


def gradcam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
    axis_name: str | None = None,
    positions: int | None = None,
) -> Float[Array, "B L *grid"]:
    """Grad-CAM in any number of spatial axes: the gradient is averaged over positions first.

    maps[b, l] = sum_c mean_grid(d logit / d features[..., c]) * features[b, ..., c], without the
    final ReLU (Selvaraju et al. 2017, arXiv 1610.02391). The average is what can make it point to
    places that the model did not use. Arguments, result and errors are those of `hirescam`; where
    the grid is split over a mapped axis (`jax.shard_map`), `axis_name` is that axis, and
    `positions` the size of the whole grid.
    """

    def channel_sum(gradient: Array, features: Array) -> Array:
        axes = tuple(range(1, gradient.ndim - 1))
        if axis_name is None:
            weights = jnp.mean(gradient, axis=axes)
        else:
            weights = jax.lax.psum(gradient.sum(axis=axes), axis_name) / positions
        weights = jnp.broadcast_to(weights, (features.shape[0], weights.shape[1]))
        return jnp.einsum("b...c,bc->b...", features, weights, precision="highest")

    return _maps(channel_sum, head, features, labels, max_gradient_bytes)


METHODS = {"hirescam": hirescam, "gradcam": gradcam}


def normalize_map(maps: Float[Array, "*batch"], spatial_axes: int | None = None) -> Array:
    """Maps for display and OrganIoU: ReLU, subtract the minimum, divide by the maximum, per map.

    Args:
        maps: [B, L, *grid]; with `spatial_axes` = n the last n axes are one map, and any number
            of axes may stand before them.
        spatial_axes: number of spatial axes; default all but the first two.

    Returns:
        Same shape, in [0, 1]. A map that is constant after the ReLU (all zero, say) becomes zero.
    """
    first = 2 if spatial_axes is None else maps.ndim - spatial_axes
    axes = tuple(range(first, maps.ndim))
    maps = jax.nn.relu(maps)
    maps = maps - maps.min(axis=axes, keepdims=True)
    peak = maps.max(axis=axes, keepdims=True)
    return jnp.where(peak > 0, maps / jnp.where(peak > 0, peak, 1), 0)


def completeness_residual(
    head: Head,
    features: Float[Array, "B *grid C"],
    logits: Float[Array, "B K"],
    maps: Float[Array, "B L *grid"],
    labels: Labels = None,
) -> Float[Array, "B L"]:
    """|sum of the map + bias - logit| with bias = head(0): zero for HiResCAM of an affine head."""
    bias = head(jnp.zeros_like(_at_least_float32(features[:1])))
    labels_BL = _label_grid(labels, features.shape[0], logits.shape[1])
    total = maps.sum(axis=tuple(range(2, maps.ndim))) + bias[0][labels_BL]
    return jnp.abs(total - jnp.take_along_axis(logits, labels_BL, axis=1))


def explain(
    model: Any,
    variables: Any,
    volumes: Float[Array, "B *volume"],
    labels: Labels = None,
    method: str = "hirescam",
) -> Explanation:
    """One forward pass and the maps of all (or the chosen) labels of a batch, in one program.

    Args:
        model: a Flax module with methods `features` (volumes -> [B, *grid, C]) and `head`
            (features -> logits [B, K]), as all models of this package are.
        variables: its variables, `{"params": ..., "batch_stats": ...}`.
        volumes: what `model.features` takes (for AxialNet: normalised volumes [B, D, H, W]).
        labels: None (all), [L] or [B, L].
        method: "hirescam" or "gradcam".

    Raises:
        ValueError: an unknown method, or as `hirescam`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if labels is not None and not isinstance(labels, Tracer):
        labels = np.asarray(labels)
        num_labels = jax.eval_shape(model.apply, variables, volumes).shape[1]
        _check_labels(labels, volumes.shape[0], num_labels)
    leaves = jax.tree.leaves((variables, volumes, labels))
    inside = any(isinstance(leaf, Tracer) for leaf in leaves)  # the outer jit has its own options
    program = _explain if inside else _explain_program()
    return program(model, variables, volumes, labels, method)


@cache
def _explain_program() -> Callable[..., Explanation]:
    return jax.jit(
        _explain, static_argnames=("model", "method"), compiler_options=compiler_options()
    )


def _explain(model: Any, variables: Any, volumes: Array, labels: Labels, method: str):
    features = _at_least_float32(model.apply(variables, volumes, method="features"))
    head = partial(model.apply, variables, method="head")
    logits = head(features)
    maps = METHODS[method](head, features, labels)
    return Explanation(logits, maps, completeness_residual(head, features, logits, maps, labels))


def _maps(
    channel_sum: Callable[[Array, Array], Array],
    head: Head,
    features: Array,
    labels: Labels,
    max_gradient_bytes: int,
) -> Array:
    """Pulls one-hot cotangents through the head, as many labels at a time as memory allows."""
    features = jnp.asarray(features)
    if features.ndim < 3:
        raise ValueError(
            f"features must be [B, *grid, C] with at least one spatial axis, got {features.shape}"
        )
    features = _at_least_float32(features)
    logits, pull_back = jax.vjp(head, features)
    if logits.ndim != 2 or logits.shape[0] != features.shape[0]:
        raise ValueError(
            f"head must return logits [B, K] with B = {features.shape[0]}, got {logits.shape}"
        )
    batch, num_labels = logits.shape
    _check_labels(labels, batch, num_labels)
    labels_LB = _label_grid(labels, batch, num_labels).T
    same_labels = labels is None or np.ndim(labels) == 1
    if batch > 1 and same_labels and _is_affine(head, features):
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
    chunk = max(1, max_gradient_bytes // gradient_bytes)
    if chunk >= labels_LB.shape[0]:
        maps_LB = jax.vmap(one_label)(labels_LB)
    else:
        maps_LB = jax.lax.map(one_label, labels_LB, batch_size=chunk if chunk > 1 else None)
    return jnp.moveaxis(maps_LB, 0, 1)


def _is_affine(head: Head, features: Array) -> bool:
    """Whether the traced gradient of the head is free of the features (if so, it is affine).

    Conservative: an operation counts as using all of its inputs for all of its outputs, and a head
    that draws random numbers (dropout) treats each example differently.
    """

    def gradient(features: Array, cotangent: Array) -> Array:
        return jax.vjp(head, features)[1](cotangent)[0]

    example = features[:1]
    try:
        logits = jax.eval_shape(head, example)
    except (TypeError, ValueError):  # a head that holds data of the whole batch
        return False
    if logits.shape[0] != 1:
        return False
    traced = jax.make_jaxpr(gradient)(example, jnp.zeros_like(logits)).jaxpr
    if any(name in str(traced) for name in ("random", "threefry")):
        return False
    needed = set(map(id, traced.outvars))
    for equation in reversed(traced.eqns):
        if needed.intersection(map(id, equation.outvars)):
            needed.update(map(id, equation.invars))
    return id(traced.invars[0]) not in needed


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _label_grid(labels: Labels, batch: int, num_labels: int) -> Int[Array, "B L"]:
    if labels is None:
        labels = jnp.arange(num_labels)
    labels = jnp.asarray(labels)
    return jnp.broadcast_to(labels, (batch, labels.shape[-1]))


def _check_labels(labels: Labels, batch: int, num_labels: int) -> None:
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
