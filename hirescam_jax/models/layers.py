"""What networks are made of: convolutions, max-pooling and BatchNorm, the same on every device.

This is the one door to what is tuned for a kind of device (`cpu`). It is chosen by the platform for
which a program is lowered, so that networks need not know of it, and other platforms' programs hold
nothing of it.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from hirescam_jax.devices import mesh
from hirescam_jax.devices.mesh import DATA, DEPTH
from hirescam_jax.models import cpu

# He et al. 2015, fan-out: what torchvision initialises ResNet with.
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
he_normal = nn.initializers.he_normal()

LAYOUTS = {2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
Padding = int | str | Sequence[tuple[int, int]]


class Conv(nn.Module):
    """A convolution over 2 or 3 spatial axes: `kernel` [*window, C / groups, F], and `bias` [F].

    Attributes:
        features: F.
        kernel, stride: of all axes, or of each.
        padding: as for `convolution`; None for half of the kernel, as PyTorch's networks have it.
        groups: parts of the channels that are convolved apart.
    """

    features: int
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | str | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = he_fan_out
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N *grid C"]) -> Float[Array, "N *out F"]:
        window = _of_each(self.kernel, x.ndim - 2)
        shape = (*window, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        half = [(size // 2, size // 2) for size in window]
        padding = half if self.padding is None else self.padding
        y = convolution(x.astype(self.dtype), kernel, self.stride, padding, self.groups)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += bias.astype(self.dtype)
        return y


# As the papers' 3D networks have it.
Conv3D = partial(Conv, padding="VALID", use_bias=True, kernel_init=he_normal)


def convolution(
    x: Float[Array, "N *grid C"],
    kernel: Float[Array, "*window c F"],
    stride: int | Sequence[int] = 1,
    padding: Padding = "VALID",
    groups: int = 1,
) -> Float[Array, "N *out F"]:
    """Cross-correlation over 2 or 3 spatial axes.

    Args:
        stride: of all axes, or of each.
        padding: "VALID", "SAME", zeros on both sides of every axis, or of each: (before, behind).
        groups: see `Conv`.
    """
    strides = _of_each(stride, x.ndim - 2)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * len(strides)
    plain = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=LAYOUTS[len(strides)],
        feature_group_count=groups,
    )
    if groups > 1:
        return plain(x, kernel)
    faster = cpu.faster_convolution(plain, x.shape, kernel.shape, strides, padding)
    if faster is None:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=faster, default=plain)


def max_pool(x: Float[Array, "N H W C"], window: int = 3, padding: int = 1) -> Array:
    """The maximum of each window x window places, with a stride of 2 -> [N, h, w, C].

    What is pooled comes from a ReLU: padding counts as 0 or as nothing, and equal values may share
    a gradient.
    """
    slices = cpu.keep_arguments(partial(cpu.max_pool_by_slices, window=window, padding=padding))
    plain = partial(max_pool_by_window, window=window, padding=padding)
    return lax.platform_dependent(x, cpu=slices, default=plain)


def max_pool_by_window(x: Array, window: int, padding: int) -> Array:
    """XLA's own."""
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    least = np.array(-np.inf, x.dtype)
    return lax.reduce_window(x, least, lax.max, (1, window, window, 1), (1, 2, 2, 1), pads)


def _of_each(sizes: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (sizes,) * axes if isinstance(sizes, int) else tuple(sizes)


Channels = Float[Array, " C"]
BN_EPSILON = 1e-5  # PyTorch's


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015), as PyTorch has it.

    Variables are those of `nn.BatchNorm`; its running variance is the biased one, this one
    PyTorch's. Statistics are float32 at least, whatever the compute dtype, and under `shard_map`
    those of the whole batch, over all devices and without padding (`mesh.real_examples`).
    """

    dtype: DTypeLike = jnp.float32
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "N *grid C"], train: bool) -> Float[Array, "N *grid C"]:
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(channels))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(channels))
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if not train:
            factor = scale * lax.rsqrt(var.value + BN_EPSILON)
            return ((x - mean.value) * factor + bias).astype(self.dtype)
        scale, bias = mesh.own((scale, bias), DATA, DEPTH)
        y, batch_mean, batch_var, count = normalize_batch(
            x, scale, bias, mesh.real_examples(x.shape)
        )
        if not self.is_initializing():
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
            mean.value += self.momentum * (batch_mean - mean.value)
            var.value += self.momentum * (unbiased - var.value)
        return y.astype(self.dtype)


@jax.custom_vjp
def normalize_batch(
    x: Float[Array, "N *grid C"],
    scale: Channels,
    bias: Channels,
    real: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "N *grid C"], Channels, Channels, Float[Array, ""]]:
    """(x normalised over the batch, mean, biased variance, values a channel); no gradient through
    the last three. The batch is that of all devices, but for what is not `real` [N or 1, ...].

    The gradient by hand takes two sums in one pass and keeps only x; the traced one keeps more
    arrays of x's size and passes over them more often.
    """
    return _normalize_forward(x, scale, bias, real)[0]


def _normalize_forward(x: Array, scale: Array, bias: Array, real: Array | None) -> tuple:
    x_wide, axes = wide(x), tuple(range(x.ndim - 1))
    counted = _where_real(real, x_wide)
    count = jnp.asarray(x.size // x.shape[-1] * mesh.parts(DATA, DEPTH), x_wide.dtype)
    if real is not None:
        each = x.size // (x.shape[-1] * real.size)
        count = mesh.total(real.sum(dtype=x_wide.dtype) * each, DATA, DEPTH)
    sums = mesh.total((counted.sum(axes), (counted * x_wide).sum(axes)), DATA, DEPTH)
    mean, square = (s / count for s in sums)
    var = jnp.maximum(square - mean * mean, 0)
    inverse = lax.rsqrt(var + BN_EPSILON)
    y = ((x_wide - mean) * (scale * inverse) + bias).astype(x.dtype)
    return (y, mean, var, count), (x, scale, mean, inverse, real, count)


def _normalize_backward(saved: tuple, cotangents: tuple) -> tuple:
    x, scale, mean, inverse, real, count = saved
    grad, centred = wide(cotangents[0]), wide(x) - mean
    axes = tuple(range(x.ndim - 1))
    # What is not real has no gradient from above; these are the device's own parts of the sums.
    sums = (grad.sum(axes), (grad * centred).sum(axes))
    grad_sum, product_sum = mesh.total(sums, DATA, DEPTH)
    spread = centred * (inverse * inverse * product_sum / count)
    grad_x = _where_real(real, (grad - grad_sum / count - spread) * (scale * inverse))
    return grad_x.astype(x.dtype), sums[1] * inverse, sums[0], None


def _where_real(real: Array | None, x: Array) -> Array:
    return x if real is None else jnp.where(real, x, 0)


def wide(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


normalize_batch.defvjp(_normalize_forward, _normalize_backward)
