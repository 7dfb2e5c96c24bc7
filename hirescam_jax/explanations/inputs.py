"""Attributions of a whole model to its input, in the form of the map family.

    method(model, inputs, labels=None, **options) -> maps [B, L, *grid]

`model` is a function from inputs [B, *grid, C] to logits [B, K]; a volume without channels gets an
axis for them:

    model = lambda x: net.apply(variables, x[..., 0])
    maps = integrated_gradients(model, volumes[..., None], labels=[3])

Signed and raw, summed over channels. Here a map is as large as the input and its gradient passes
through the whole model, so choose labels. Errors are those of `hirescam`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hirescam_jax.explanations.cam import hirescam
from hirescam_jax.explanations.gradients import (
    MAX_GRADIENT_BYTES,
    Head,
    Labels,
    check_call,
    checked_features,
    gradient_maps,
    in_chunks,
    known_labels_only,
    label_grid,
)


def input_gradient(
    model: Head,
    inputs: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """The gradient of a logit with respect to the input, summed over channels, signed (Simonyan et
    al. 2014, arXiv 1312.6034, who take its absolute value and the maximum over channels)."""

    def channel_sum(gradient: Array, inputs: Array) -> Array:
        return jnp.broadcast_to(gradient, inputs.shape).sum(axis=-1)

    return gradient_maps(channel_sum, model, inputs, labels, max_gradient_bytes)


def gradient_x_input(
    model: Head,
    inputs: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """The gradient times the input, summed over channels (Shrikumar et al. 2016, arXiv 1605.01713):
    HiResCAM with the whole model as the head and the input as the features."""
    return hirescam(model, inputs, labels, max_gradient_bytes=max_gradient_bytes)


def integrated_gradients(
    model: Head,
    inputs: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    baseline: float | Array = 0.0,
    steps: int = 50,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, equation 1).

    (x - x0) times the mean of the gradient on the straight line from the baseline x0 to x, by
    Gauss-Legendre quadrature, one step at a time. A map sums to logit(x) - logit(x0) as precisely
    as the steps resolve the gradient.

    Args:
        baseline: a number, or an array that broadcasts to the inputs.
        steps: points on the line, at least 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    inputs = checked_features(inputs)
    start = jnp.broadcast_to(jnp.asarray(baseline, inputs.dtype), inputs.shape)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    nodes, weights = (nodes + 1) / 2, weights / 2

    def channel_sum(gradient: Array, _: Array) -> Array:
        return jnp.sum(gradient * (inputs - start), axis=-1)

    def step(point: tuple[Array, Array]) -> Array:
        node, weight = point
        at = start + node * (inputs - start)
        return weight * gradient_maps(channel_sum, model, at, labels, max_gradient_bytes)

    points = jnp.asarray(nodes, inputs.dtype), jnp.asarray(weights, inputs.dtype)
    return _sum_over(step, points)


def smoothgrad(
    model: Head,
    inputs: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    key: Array,
    std: float,
    samples: int = 16,
    method: Callable[..., Array] = input_gradient,
    **options: Any,
) -> Float[Array, "B L *grid"]:
    """SmoothGrad: the mean of a method's maps over noisy copies of the input (Smilkov et al. 2017,
    arXiv 1706.03825), one copy at a time.

    Args:
        key: of the noise.
        std: of the Gaussian noise, in the units of the input (the paper: 10 to 20 % of its range).
        samples: noisy copies, at least 1.
        method: any function of this form, of `cam_family` or `cam` too; `options` are its own.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    inputs = checked_features(inputs)

    def sample(key: Array) -> Array:
        noise = std * jax.random.normal(key, inputs.shape, inputs.dtype)
        return method(model, inputs + noise, labels, **options) / samples

    return _sum_over(sample, jax.random.split(key, samples))


def occlusion(
    model: Head,
    inputs: Float[Array, "B *grid C"],
    labels: Labels = None,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    baseline: float | Array = 0.0,
    max_gradient_bytes: int = MAX_GRADIENT_BYTES,
) -> Float[Array, "B L *grid"]:
    """Occlusion: how much a logit drops when a window is covered (Zeiler & Fergus 2014, arXiv
    1311.2901). A voxel has the mean of the drops of the windows that hold it.

    Args:
        window: its size along each spatial axis, or one for all; all channels are covered.
        stride: between windows, at most the window's size; default the window's size.
        baseline: what covers it, a number or an array that broadcasts to the inputs.
        max_gradient_bytes: the windows are taken in chunks whose inputs fit in this.

    Raises:
        ValueError: as `hirescam`, or a window or stride that does not fit the grid.
    """
    inputs = checked_features(inputs)
    grid, stride = inputs.shape[1:-1], window if stride is None else stride
    window, stride = (
        (size,) * len(grid) if isinstance(size, int) else tuple(size) for size in (window, stride)
    )
    fits = len(window) == len(stride) == len(grid) and all(
        1 <= s <= w <= n for s, w, n in zip(stride, window, grid, strict=True)
    )
    if not fits:
        raise ValueError(
            f"window {window} and stride {stride} must have 1 <= stride <= window <= "
            f"size along each axis of the grid {grid}"
        )
    logits = model(inputs)
    num_labels = check_call(model, inputs, logits, labels)
    labels_BL = label_grid(labels, inputs.shape[0], num_labels)
    # Along each axis [windows, voxels]: what each window covers. The last may reach over the edge.
    covers = []
    for size, width, step in zip(grid, window, stride, strict=True):
        first = np.arange(-(-(size - width) // step) + 1)[:, None] * step
        covers.append((first <= np.arange(size)) & (np.arange(size) < first + width))
    counts = [len(cover) for cover in covers]

    def drop(index: Array) -> Array:
        covered = jnp.ones((), bool)
        for cover, i in zip(covers, jnp.unravel_index(index, counts), strict=True):
            covered = covered[..., None] & jnp.asarray(cover)[i]
        without = model(jnp.where(covered[..., None], baseline, inputs).astype(inputs.dtype))
        return jnp.take_along_axis(logits - without, labels_BL, axis=1)

    inputs_bytes = inputs.size * inputs.dtype.itemsize
    drops = in_chunks(drop, jnp.arange(math.prod(counts)), inputs_bytes, max_gradient_bytes)
    maps = jnp.moveaxis(drops.reshape(*counts, *drops.shape[1:]), (-2, -1), (0, 1))
    for cover in covers:  # the first axis of windows becomes the last one of voxels
        shares = jnp.asarray(cover / cover.sum(axis=0), maps.dtype)
        maps = jnp.tensordot(maps, shares, axes=((2,), (0,)), precision="highest")
    return known_labels_only(maps, labels, num_labels)


def _sum_over(function: Callable[[Any], Array], items: Any) -> Array:
    """The sum of `function` of each item, of which one is held at a time."""
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], items))

    def add(total: Array, item: Any) -> tuple[Array, None]:
        return total + function(item), None

    return jax.lax.scan(add, jnp.zeros(first.shape, first.dtype), items)[0]
