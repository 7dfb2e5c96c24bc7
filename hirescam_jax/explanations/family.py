"""The relatives of HiResCAM that see only a head and its features, in one form.

    method(head, features, labels=None, **options) -> maps [B, L, *grid]

Signed and raw: the ReLU and the scaling with which each paper ends are `normalize_map`, for
display.
Head, features and labels are those of `hirescam`, and so are the errors: any number of spatial
axes, bfloat16 computed in float32, pure functions that may be jitted and mapped.

None of them but CAM promises that a map accounts for the score; `head_verdict` tells what
HiResCAM promises for a head. Where the grid is split over a mapped axis (`jax.shard_map`), methods
that sum over the grid take `axis_name`, that axis, and `positions`, the size of the whole grid.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hirescam_jax.explanations.gradients import (
    MAX_GRADIENT_BYTES,
    Head,
    Labels,
    at_least_float32,
    check_call,
    check_logits,
    checked_features,
    gradient_maps,
    in_chunks,
    known_labels_only,
    label_grid,
)
from hirescam_jax.explanations.independence import check_independent
from hirescam_jax.explanations.verdict import head_verdict


def class_activation_map(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """CAM: the classifier's weights times the features (Zhou et al. 2016, arXiv 1512.04150).

    maps[b, l] = sum_c w_lc features[b, ..., c], for a head that is an average (or a sum) over the
    positions and one linear layer, whose weights are found from the head itself; w includes the
    1/N of an average, so that a map and the bias sum to the logit. For such heads, and no others,
    it is also HiResCAM and Grad-CAM. The head is checked when this is traced: call it under
    `jax.jit` where it is called often.

    Raises:
        ValueError: any other head, which has no such weights.
    """
    verdict = head_verdict(head, checked_features(features).shape)
    if verdict.low_precision:
        raise ValueError(
            "CAM needs a head whose weights are as they are used, and this one computes in low "
            "precision: compute it in float32"
        )
    if verdict.kind != "equal":
        raise ValueError(
            "CAM needs a head of global pooling (average or sum) and one linear layer, and this "
            "one is not: take hirescam, which is exact for every affine head"
        )

    def channel_sum(gradient: Array, features: Array) -> Array:
        weights = gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])[:, 0]
        return _weighted(features, weights)

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


def gradcam_plusplus(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
    axis_name: str | None = None,
    positions: int | None = None,
) -> Float[Array, "B L *grid"]:
    """Grad-CAM++ (Chattopadhay et al. 2018, arXiv 1710.11063, equations 7, 10 and 19).

    The weight of a channel is sum_p alpha_p ReLU(g_p) with g the gradient of the logit S and, for a
    score exp(S), alpha_p = g_p^2 / (2 g_p^2 + g_p^3 sum_q A_q) = 1 / (2 + g_p sum_q A_q); this
    inner ReLU is part of the definition and kept. Meant for features that are not negative: where
    the denominator vanishes, alpha is 0.
    """
    del positions

    def channel_sum(gradient: Array, features: Array) -> Array:
        below = 2 + gradient * _expanded(_grid_sum(features, axis_name), gradient)
        alpha = jnp.where(below != 0, 1 / jnp.where(below != 0, below, 1), 0)
        return _weighted(features, _grid_sum(alpha * jax.nn.relu(gradient), axis_name))

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


def xgradcam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
    axis_name: str | None = None,
    positions: int | None = None,
) -> Float[Array, "B L *grid"]:
    """XGrad-CAM: the gradient averaged with the features as weights (Fu et al. 2020, arXiv
    2008.02312, equation 8).

    The weight of a channel is sum_p g_p A_p / sum_p A_p, 0 where the channel sums to 0. Where none
    does, a map sums to what HiResCAM's does, but not at the same places. Features that are centred
    over the positions, as by InstanceNorm, have sums that are rounding alone, and so are the maps.
    """
    del positions

    def channel_sum(gradient: Array, features: Array) -> Array:
        total = _grid_sum(features, axis_name)
        weights = _grid_sum(gradient * features, axis_name)
        weights = jnp.where(total != 0, weights / jnp.where(total != 0, total, 1), 0)
        return _weighted(features, weights)

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


def layercam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """LayerCAM: HiResCAM with the ReLU of the gradient, sum_c ReLU(g_c) A_c (Jiang et al. 2021,
    doi 10.1109/TIP.2021.3089943, equations 5 and 6). This inner ReLU is part of the definition and
    kept: what speaks against a label is left out, and the sum is not the score.
    """

    def channel_sum(gradient: Array, features: Array) -> Array:
        return jnp.sum(jax.nn.relu(gradient) * features, axis=-1)

    return gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)


def eigencam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    axis_name: str | None = None,
    positions: int | None = None,
) -> Float[Array, "B L *grid"]:
    """Eigen-CAM: the features projected on their first principal component (Muhammad & Yeasin
    2020, arXiv 2008.00299). It does not depend on the label: all L maps are the same.

    The features are centred over the positions first, as in the well-known implementation in
    PyTorch. The sign of a component is arbitrary; here it is the one with which the map correlates
    positively with the mean of the channels. Its gradient is NaN where all features are equal.
    """
    features = checked_features(features)
    num_labels = check_call(head, features, jax.eval_shape(head, features), labels)
    count = positions or features[0, ..., 0].size
    total = _grid_sum(features, axis_name)
    product = jnp.einsum("b...c,b...e->bce", features, features, precision="highest")
    product = product if axis_name is None else jax.lax.psum(product, axis_name)
    mean = total / count
    # Not divided by the count: the component is the same. Padding of a split grid is zero.
    covariance = product - count * mean[:, :, None] * mean[:, None, :]
    component = jnp.linalg.eigh(covariance)[1][..., -1]
    # The covariance of the map with the mean of the channels.
    sign = jnp.sign(jnp.einsum("bc,bce->b", component, covariance, precision="highest"))
    component = component * jnp.where(sign == 0, 1, sign)[:, None]
    maps = _weighted(features - _expanded(mean, features), component)
    shape = (*label_grid(labels, len(maps), num_labels).shape, *maps.shape[1:])
    return known_labels_only(jnp.broadcast_to(maps[:, None], shape), labels, num_labels)


def ablationcam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """Ablation-CAM: a channel weighs by how much the logit drops without it (Desai & Ramaswamy
    2020, WACV, equation 3), which takes C passes through the head.

    The paper divides the drop by the logit, one number for the whole map that would turn its sign
    where the logit is negative; here the weight is the drop itself.

    Args:
        max_gradient_bytes: the channels are taken in chunks whose features fit in this.
    """
    features = checked_features(features)
    logits = head(features)
    num_labels = check_call(head, features, logits, labels)
    labels_BL = label_grid(labels, features.shape[0], num_labels)
    channels = jnp.arange(features.shape[-1])

    def drop(channel: Array) -> Array:
        without = head(jnp.where(channels == channel, 0, features))
        return jnp.take_along_axis(logits - without, labels_BL, axis=1)

    features_bytes = features.size * features.dtype.itemsize
    weights_CBL = in_chunks(drop, channels, features_bytes, max_gradient_bytes)
    maps = jnp.einsum("b...c,cbl->bl...", features, weights_CBL, precision="highest")
    return known_labels_only(maps, labels, num_labels)


def scorecam(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    model: Callable[[Array], Array],
    inputs: Array,
) -> Float[Array, "B L *grid"]:
    """Score-CAM: a channel weighs by the score of the input that it masks (Wang et al. 2020, arXiv
    1910.01279, algorithm 1), which takes C passes through the whole model, one at a time.

    Each channel is enlarged to the input's grid (linear, half-pixel centres), scaled to [0, 1] and
    multiplied with the input; the weights are the softmax over channels of the model's logits.

    Args:
        head: only its number of labels matters.
        model: inputs -> logits [B, K] of the same labels.
        inputs: [B, *input grid] or [B, *input grid, channels], with as many spatial axes as the
            features: what the features were computed from.

    Raises:
        ValueError: as `hirescam`, for the head and for the model; inputs of another form.
    """
    features = checked_features(features)
    batch = features.shape[0]
    num_labels = check_call(head, features, jax.eval_shape(head, features), labels)
    axes = features.ndim - 2
    if inputs.ndim not in (axes + 1, axes + 2) or inputs.shape[0] != batch:
        raise ValueError(
            f"inputs must be [{batch}, *grid] or [{batch}, *grid, channels] with {axes} spatial "
            f"axes, got {inputs.shape}"
        )
    scored = check_logits(jax.eval_shape(model, inputs), features)
    if scored != num_labels:
        raise ValueError(f"model has {scored} labels and head {num_labels}: they must be the same")
    check_independent(lambda x: model(x.astype(inputs.dtype)), at_least_float32(inputs))
    labels_BL = label_grid(labels, batch, num_labels)
    grid = tuple(range(1, axes + 1))

    def score(channel: Array) -> Array:
        shape = inputs.shape[: axes + 1]
        mask = jax.image.resize(features[..., channel], shape, "linear", antialias=False)
        mask = mask - mask.min(axis=grid, keepdims=True)
        peak = mask.max(axis=grid, keepdims=True)
        mask = jnp.where(peak > 0, mask / jnp.where(peak > 0, peak, 1), 0)
        masked = inputs * mask.reshape(*shape, *(1,) * (inputs.ndim - len(shape)))
        logits = at_least_float32(model(masked.astype(inputs.dtype)))
        return jnp.take_along_axis(logits, labels_BL, axis=1)

    scores_CBL = jax.lax.map(score, jnp.arange(features.shape[-1]))
    weights_CBL = jax.nn.softmax(scores_CBL, axis=0)
    maps = jnp.einsum("b...c,cbl->bl...", features, weights_CBL, precision="highest")
    return known_labels_only(maps, labels, num_labels)


def guided_attention(
    head: Head,
    features: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    model: Any,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """The attention that the mask loss guides: HiResCAM times the model's `attention_scale`.

    For AxialNet with a mean over slices this is the map of a slice's own score, on whose scale the
    loss asks for values below 0 outside the organs; the place of everything is HiResCAM's.

    Args:
        model: one with `attention_scale(grid)`, as all of this package; another's is 1.
    """

    def channel_sum(gradient: Array, features: Array) -> Array:
        return jnp.sum(gradient * features, axis=-1)

    maps = gradient_maps(channel_sum, head, features, labels, max_gradient_bytes)
    scale = getattr(model, "attention_scale", None)
    return maps * scale(maps.shape[2:]) if scale else maps


def _weighted(features: Array, weights: Array) -> Array:
    """[B, *grid, C] and weights [B or 1, C] -> [B, *grid]."""
    weights = jnp.broadcast_to(weights, (features.shape[0], weights.shape[1]))
    return jnp.einsum("b...c,bc->b...", features, weights, precision="highest")


def _grid_sum(x: Array, axis_name: str | None) -> Array:
    """[B, *grid, C] -> [B, C], over the whole grid."""
    total = x.sum(axis=tuple(range(1, x.ndim - 1)))
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _expanded(x: Array, like: Array) -> Array:
    """[B, C] -> [B, 1, ..., 1, C]."""
    return x.reshape(x.shape[0], *(1,) * (like.ndim - 2), x.shape[-1])
