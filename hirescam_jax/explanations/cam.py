"""HiResCAM and Grad-CAM: from a head and its features to signed maps, for all labels at once.

A head is any function from features [B, *grid, C] to logits [B, K] that treats the examples of
the batch independently (so: no BatchNorm inside it; `independence` checks it). Both maps need only
the gradient of a logit with respect to the features, which `jax.vjp` through the head gives; the
backbone is never differentiated. Everything here is pure and works under `jit`, `vmap` and `grad`.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.explanations import family as cam_family
from hirescam_jax.explanations.gradients import (
    MAX_GRADIENT_BYTES,
    Head,
    Labels,
    at_least_float32,
    check_labels,
    gradient_maps,
    known_labels_only,
    label_grid,
)
from hirescam_jax.explanations.verdict import HeadVerdict, head_verdict


class Explanation(NamedTuple):
    """What `explain` returns.

    logits [B, K]: the model's scores, all labels.
    maps [B, L, *grid]: signed maps of the L chosen labels.
    residual [B, L]: |sum of the map + bias - logit|, with bias = the head's output on all-zero
        features. Zero up to rounding is a proof that the map accounts for the whole score, which
        HiResCAM guarantees for an affine head; elsewhere it is the part left unexplained.
    verdict: what the model's head guarantees for every volume, see `head_verdict`; None where the
        model's variables are traced, so that nothing can be tried.
    """

    logits: Float[Array, "B K"]
    maps: Float[Array, "B L *grid"]
    residual: Float[Array, "B L"]
    verdict: HeadVerdict | None = None


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


# What needs a head and its features only.
METHODS: dict[str, Callable[..., Array]] = {
    "hirescam": hirescam,
    "gradcam": gradcam,
    "gradcam_plusplus": cam_family.gradcam_plusplus,
    "xgradcam": cam_family.xgradcam,
    "layercam": cam_family.layercam,
    "eigencam": cam_family.eigencam,
    "ablationcam": cam_family.ablationcam,
    "cam": cam_family.class_activation_map,
}
# Of these, those that sum over the whole grid: with `axis_name` and `positions`.
EVALUATED = ("hirescam", "gradcam")  # of `METHODS`, by `hirescam evaluate`
OVER_GRID = ("gradcam", "gradcam_plusplus", "xgradcam", "eigencam")


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
        method: one of `METHODS`.

    Raises:
        ValueError: an unknown method, or as `hirescam`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if 0 in jnp.shape(volumes):
        raise ValueError(f"volumes are empty: got {jnp.shape(volumes)}")
    if labels is not None and not isinstance(labels, Tracer):
        labels = np.asarray(labels)
        num_labels = jax.eval_shape(model.apply, variables, volumes).shape[1]
        check_labels(labels, volumes.shape[0], num_labels)
    verdict = None
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(variables)):
        verdict = model_verdict(model, variables, jnp.shape(volumes))
    leaves = jax.tree.leaves((variables, volumes, labels))
    inside = any(isinstance(leaf, Tracer) for leaf in leaves)  # the outer jit has its own options
    program = _explain if inside else _explain_program(model)
    return program(model, variables, volumes, labels, method)._replace(verdict=verdict)


def model_verdict(model: Any, variables: Any, volumes_shape: tuple[int, ...]) -> HeadVerdict:
    """`head_verdict` of a model for volumes of a shape, with any values of its variables.

    Raises:
        ValueError: as `head_verdict`.
    """
    leaves, tree = jax.tree.flatten(variables)
    forms = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    find = _verdict_of_form if _hashable(model) else _verdict_of_form.__wrapped__
    return find(model, tree, forms, volumes_shape[1:])


@lru_cache(maxsize=64)
def _verdict_of_form(model: Any, tree: Any, forms: tuple, volume_shape: tuple) -> HeadVerdict:
    found = []

    def of_traced(variables: Any, volumes: Array) -> None:
        features = jax.eval_shape(partial(model.apply, method="features"), variables, volumes)
        found.append(head_verdict(partial(model.apply, variables, method="head"), features.shape))

    variables = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*form) for form in forms])
    jax.eval_shape(of_traced, variables, jax.ShapeDtypeStruct((1, *volume_shape), jnp.float32))
    return found[0]


def _hashable(model: Any) -> bool:
    """Not so for a module with an array among its attributes: nothing of it can be kept."""
    try:
        hash(model)
    except TypeError:
        return False
    return True


def _explain_program(model: Any) -> Callable[..., Explanation]:
    if _hashable(model):
        return _compiled_explain()
    program = jax.jit(
        partial(_explain, model), static_argnames="method", compiler_options=compiler_options()
    )
    return lambda _, variables, volumes, labels, method: program(
        variables, volumes, labels, method=method
    )


@cache
def _compiled_explain() -> Callable[..., Explanation]:
    return jax.jit(
        _explain, static_argnames=("model", "method"), compiler_options=compiler_options()
    )


def _explain(model: Any, variables: Any, volumes: Array, labels: Labels, method: str):
    features = at_least_float32(model.apply(variables, volumes, method="features"))
    head = partial(model.apply, variables, method="head")
    logits = head(features)
    maps = METHODS[method](head, features, labels)
    return Explanation(logits, maps, completeness_residual(head, features, logits, maps, labels))
