"""HiResCAM and Grad-CAM: from a head and its features to signed maps, for all labels at once.

A head is any function from features [B, *grid, C] to logits [B, K] that treats the examples of
the batch independently (so: no BatchNorm inside it; `independence` checks it). Both maps need only
the gradient of a logit with respect to the features, which `jax.vjp` through the head gives; the
backbone is never differentiated. Everything here is pure and works under `jit`, `vmap` and `grad`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hirescam_jax.explanations.gradients import (
    MAX_GRADIENT_BYTES,
    Head,
    Labels,
    at_least_float32,
    gradient_maps,
    known_labels_only,
    label_grid,
)


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
        labels: None for all K labels, [L] for the same labels of every example, or [B, L]. Where
            they are traced (an argument of a jitted function) and out of range, the maps are NaN.
        max_gradient_bytes: the labels are taken in chunks whose gradients fit in this.

    Returns:
        Maps [B, K, *grid] for labels=None, otherwise [B, L, *grid].

    Raises:
        ValueError: features without a spatial axis or without an example, a head that does not
            return [B, K] or that mixes the examples, no label, or one that is out of range.
    """

    def channel_sum(gradient: Array, features: Array) -> Array:
        if gradient.shape[0] < features.shape[0]:
            # One gradient serves the batch: a matrix product, which the sum below is not.
            return jnp.einsum("b...c,...c->b...", features, gradient[0], precision="highest")
        return jnp.sum(gradient * features, axis=-1)

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


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

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


def normalize_map(maps: Float[Array, "*batch"], spatial_axes: int | None = None) -> Array:
    """Maps for display and OrganIoU: ReLU, subtract the minimum, divide by the maximum, per map.

    Args:
        maps: [B, L, *grid]; with `spatial_axes` = n the last n axes are one map, and any number
            of axes may stand before them.
        spatial_axes: number of spatial axes; default all but the first two.

    Returns:
        Same shape, in [0, 1]. A map that is constant after the ReLU (all zero, say) becomes zero,
        one with a value that is not finite NaN.
    """
    first = 2 if spatial_axes is None else maps.ndim - spatial_axes
    axes = tuple(range(first, maps.ndim))
    finite = jnp.isfinite(maps).all(axis=axes, keepdims=True)
    maps = jax.nn.relu(maps)
    maps = maps - maps.min(axis=axes, keepdims=True)
    peak = maps.max(axis=axes, keepdims=True)
    return jnp.where(finite, maps / jnp.where(peak > 0, peak, 1), jnp.nan)


def completeness_residual(
    head: Head,
    features: Float[Array, "B *grid C"],
    logits: Float[Array, "B K"],
    maps: Float[Array, "B L *grid"],
    labels: Labels = None,
) -> Float[Array, "B L"]:
    """|sum of the map + bias - logit| with bias = head(0): zero for HiResCAM of an affine head.

    NaN for traced labels that are out of range.
    """
    bias = head(jnp.zeros_like(at_least_float32(features[:1])))
    labels_BL = label_grid(labels, features.shape[0], logits.shape[1])
    total = maps.sum(axis=tuple(range(2, maps.ndim))) + bias[0][labels_BL]
    residual = jnp.abs(total - jnp.take_along_axis(logits, labels_BL, axis=1))
    return known_labels_only(residual, labels, logits.shape[1])
