"""The layers that the networks share: convolutions and the ResNet-18 backbone."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

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
        **kw,
    )


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with BatchNorm and a shortcut."""

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        def norm(name: str):
            return _batch_norm(train, self.dtype, name)

        y = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(norm("bn1")(y))
        y = norm("bn2")(conv(self.width, 3, dtype=self.dtype, name="conv2")(y))
        if x.shape != y.shape:
            x = conv(self.width, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet of basic blocks without its pooling and classifier (He et al. 2015).

    The defaults are ResNet-18. `stem` is "imagenet" (7x7 stride 2, max-pool stride 2; total
    stride 32) or "small" (3x3 stride 2, no pool; total stride 2^len(widths)) for small images.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")
        kernel = 7 if self.stem == "imagenet" else 3
        x = conv(self.widths[0], kernel, 2, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(_batch_norm(train, self.dtype, "bn1")(x))
        if self.stem == "imagenet":
            x = max_pool(x)
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = BasicBlock(width, stride, self.dtype, name=name)(x, train)
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


def _batch_norm(train: bool, dtype: DTypeLike, name: str) -> nn.BatchNorm:
    # PyTorch's momentum 0.1 is 0.9 here. Statistics stay in float32 whatever the compute dtype.
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


class Conv3D(nn.Module):
    """A VALID 3D convolution with bias: `kernel` [k, k, k, C, F] and `bias` [F]."""

    features: int
    kernel: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*(self.kernel,) * 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv3d(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype)


def conv3d(
    x: Float[Array, "B D H W C"], kernel: Float[Array, "kd kh kw C F"], stride: int
) -> Float[Array, "B d h w F"]:
    """VALID 3D convolution, the faster way on each backend (both agree up to rounding)."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: conv3d_by_planes(x, kernel, stride),
        default=lambda x, kernel: conv3d_direct(x, kernel, stride),
    )


def conv3d_direct(x: Array, kernel: Array, stride: int) -> Array:
    """One 3D convolution: what GPUs and TPUs are good at."""
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 3, "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def conv3d_by_planes(x: Array, kernel: Array, stride: int) -> Array:
    """The same as a sum of 2D convolutions, one a plane of the kernel.

    XLA's CPU backend has no fast gradient of a 3D convolution, but it has one in 2D.
    """
    batch, depth = x.shape[:2]
    out_depth = (depth - kernel.shape[0]) // stride + 1

    def plane(offset: int) -> Array:
        planes = x[:, offset : offset + (out_depth - 1) * stride + 1 : stride]
        return lax.conv_general_dilated(
            planes.reshape(batch * out_depth, *x.shape[2:]),
            kernel[offset],
            (stride,) * 2,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    total = sum((plane(offset) for offset in range(1, kernel.shape[0])), start=plane(0))
    return total.reshape(batch, out_depth, *total.shape[1:])
