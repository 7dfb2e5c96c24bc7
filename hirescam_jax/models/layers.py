"""The layers that the networks share: convolutions, BatchNorm and the ResNet backbone."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from hirescam_jax.devices import mesh as sharding
from hirescam_jax.devices.mesh import DATA, DEPTH
from hirescam_jax.models.cpu_conv import conv2d_input_gradient, conv2d_kernel_gradient, conv2d_small

# He et al. 2015, fan-out: what torchvision initialises ResNet with.
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def conv(features: int, kernel: int, stride: int = 1, *, padding: int | str | None = None, **kw):
    """A 2D convolution with PyTorch's symmetric padding (kernel // 2 unless told)."""
    pad = kernel // 2 if padding is None else padding
    kw.setdefault("use_bias", False)
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=pad if isinstance(pad, str) else [(pad, pad)] * 2,
        kernel_init=he_fan_out,
        conv_general_dilated=_conv2d,
        **kw,
    )


def _conv2d(x, kernel, strides, padding, *, dimension_numbers, **options):
    """`lax.conv_general_dilated` for `nn.Conv`, on CPU with faster gradients and small images."""
    plain = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dimension_numbers,
        **options,
    )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    window, image = math.prod(kernel.shape[:2]), math.prod(x.shape[1:3])
    swapped = window > image > 1  # what XLA does then, see `cpu_conv`
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    unusual = options.get("feature_group_count", 1) > 1 or any(d != 1 for d in dilations)
    if unusual or (kernel.size <= x.size and not swapped):
        return plain(x, kernel)

    def forward(x: Array, kernel: Array) -> Array:
        if not swapped:
            return plain(x, kernel)
        small = partial(conv2d_small, strides=strides, padding=padding)
        return lax.platform_dependent(x, kernel, cpu=small, default=plain)

    convolve = jax.custom_vjp(forward)

    def backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
        x, kernel = saved

        def by_kernel(x: Array, grad: Array) -> Array:
            return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](grad)[0]

        def by_input(kernel: Array, grad: Array) -> Array:
            return jax.vjp(lambda x: plain(x, kernel), x)[1](grad)[0]

        grad_x = lax.platform_dependent(
            kernel,
            grad,
            cpu=lambda kernel, grad: conv2d_input_gradient(x.shape, kernel, grad, strides, padding),
            default=by_input,
        )
        # What the product gathers is larger than the kernel then.
        if grad.size >= kernel.shape[-1] ** 2 and not swapped:
            return grad_x, by_kernel(x, grad)
        grad_kernel = lax.platform_dependent(
            x,
            grad,
            cpu=lambda x, grad: conv2d_kernel_gradient(kernel.shape, x, grad, strides, padding),
            default=by_kernel,
        )
        return grad_x, grad_kernel

    convolve.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return convolve(x, kernel)


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with BatchNorm and a shortcut."""

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        def norm(name: str):
            return partial(BatchNorm(self.dtype, name=name), train=train)

        y = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(norm("bn1")(y))
        y = norm("bn2")(conv(self.width, 3, dtype=self.dtype, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = conv(self.width, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block: 1x1, 3x3 and 1x1 convolutions to four times `width` channels.

    The stride is on the 3x3 convolution, as torchvision has it ("ResNet v1.5"); in the paper it is
    on the first 1x1.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        def norm(name: str):
            return partial(BatchNorm(self.dtype, name=name), train=train)

        outputs = 4 * self.width
        y = nn.relu(norm("bn1")(conv(self.width, 1, dtype=self.dtype, name="conv1")(x)))
        y = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv2")(y)
        y = conv(outputs, 1, dtype=self.dtype, name="conv3")(nn.relu(norm("bn2")(y)))
        y = norm("bn3")(y)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = conv(outputs, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """ResNet without its pooling and classifier (He et al. 2015).

    The defaults are ResNet-18; ResNet-34 has `blocks` (3, 4, 6, 3), ResNet-50 the same of `block`
    "bottleneck", which gives out four times `widths`. `stem` is "imagenet" (7x7 stride 2, max-pool
    stride 2; total stride 32) or "small" (3x3 stride 2, no pool; total stride 2^len(widths)).
    `remat` keeps only the input of each block for the gradient and computes the rest again.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    block: str = "basic"

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be 'basic' or 'bottleneck', got {self.block!r}")
        kernel = 7 if self.stem == "imagenet" else 3
        x = conv(self.widths[0], kernel, 2, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(self.dtype, name="bn1")(x, train))
        if self.stem == "imagenet":
            x = max_pool(x)
        block: Any = BLOCKS[self.block]
        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = block(width, stride, self.dtype, name=name)(x, train)
        return x


def max_pool(x: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
    """3x3 max-pool of stride 2 and padding 1, as maxima of slices, rows first.

    The gradient of XLA's own window is a serial scatter on CPU. Padding with 0 is neutral, since
    what is pooled comes from a ReLU.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        count = (x.shape[axis] - 3) // 2 + 1
        taps = [lax.slice_in_dim(x, i, i + 2 * count - 1, 2, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(taps[0], taps[1]), taps[2])
    return x


Channels = Float[Array, " C"]
BN_EPSILON = 1e-5  # PyTorch's


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015), as PyTorch has it.

    Variables are those of `nn.BatchNorm`; its running variance is the biased one, this one
    PyTorch's. Statistics are float32 at least, whatever the compute dtype, and under `shard_map`
    those of the whole batch, over all devices and without padding (`sharding.real_examples`).
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
        scale, bias = sharding.own((scale, bias), DATA, DEPTH)
        y, batch_mean, batch_var, count = normalize_batch(
            x, scale, bias, sharding.real_examples(x.shape)
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
    count = jnp.asarray(x.size // x.shape[-1] * sharding.parts(DATA, DEPTH), x_wide.dtype)
    if real is not None:
        each = x.size // (x.shape[-1] * real.size)
        count = sharding.total(real.sum(dtype=x_wide.dtype) * each, DATA, DEPTH)
    sums = sharding.total((counted.sum(axes), (counted * x_wide).sum(axes)), DATA, DEPTH)
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
    grad_sum, product_sum = sharding.total(sums, DATA, DEPTH)
    spread = centred * (inverse * inverse * product_sum / count)
    grad_x = _where_real(real, (grad - grad_sum / count - spread) * (scale * inverse))
    return grad_x.astype(x.dtype), sums[1] * inverse, sums[0], None


def _where_real(real: Array | None, x: Array) -> Array:
    return x if real is None else jnp.where(real, x, 0)


def wide(x: Array) -> Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


class Conv3D(nn.Module):
    """A VALID 3D convolution with bias: `kernel` [kd, kh, kw, C, F] and `bias` [F].

    `kernel` and `stride` are (depth, height, width), or one number for all three.
    """

    features: int
    kernel: int | tuple[int, int, int]
    stride: int | tuple[int, int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*_three(self.kernel), x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv3d(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype)


def conv3d(
    x: Float[Array, "B D H W C"],
    kernel: Float[Array, "kd kh kw C F"],
    stride: int | tuple[int, int, int],
) -> Float[Array, "B d h w F"]:
    """VALID 3D convolution, the faster way on each backend (both agree up to rounding)."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: conv3d_by_planes(x, kernel, stride),
        default=lambda x, kernel: conv3d_direct(x, kernel, stride),
    )


def conv3d_direct(x: Array, kernel: Array, stride: int | tuple[int, int, int]) -> Array:
    """One 3D convolution: what GPUs and TPUs are good at."""
    return lax.conv_general_dilated(
        x, kernel, _three(stride), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def conv3d_by_planes(x: Array, kernel: Array, stride: int | tuple[int, int, int]) -> Array:
    """The same as a sum of 2D convolutions, one a plane of the kernel.

    XLA's CPU backend has no fast gradient of a 3D convolution, but it has one in 2D.
    """
    batch, depth = x.shape[:2]
    along, *across = _three(stride)
    out_depth = (depth - kernel.shape[0]) // along + 1

    def plane(offset: int) -> Array:
        planes = x[:, offset : offset + (out_depth - 1) * along + 1 : along]
        return lax.conv_general_dilated(
            planes.reshape(batch * out_depth, *x.shape[2:]),
            kernel[offset],
            across,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    total = sum((plane(offset) for offset in range(1, kernel.shape[0])), start=plane(0))
    return total.reshape(batch, out_depth, *total.shape[1:])


def _three(sizes: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (sizes, sizes, sizes) if isinstance(sizes, int) else sizes
