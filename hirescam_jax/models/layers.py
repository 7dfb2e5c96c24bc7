"""The layers that the networks share: convolutions and the ResNet-18 backbone."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
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
        conv_general_dilated=conv2d,
        **kw,
    )


def conv2d(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "kh kw C F"],
    strides: tuple[int, int],
    padding: Any,
    **kw: Any,
) -> Float[Array, "N h w F"]:
    """`lax.conv_general_dilated` for `nn.Conv`, with the faster gradient on CPU."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _conv2d(x, kernel, tuple(strides), tuple(tuple(p) for p in padding))


def conv2d_direct(x: Array, kernel: Array, strides: tuple, pads: tuple) -> Array:
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_conv2d = jax.custom_vjp(conv2d_direct, nondiff_argnums=(2, 3))


def _conv2d_forward(x: Array, kernel: Array, strides: tuple, pads: tuple) -> tuple:
    return conv2d_direct(x, kernel, strides, pads), (x, kernel)


def _conv2d_backward(strides: tuple, pads: tuple, saved: tuple, grad: Array) -> tuple:
    x, kernel = saved
    pull_x = jax.vjp(lambda x: conv2d_direct(x, kernel, strides, pads), x)[1]

    def direct(x: Array, grad: Array) -> Array:
        return jax.vjp(lambda k: conv2d_direct(x, k, strides, pads), kernel)[1](grad)[0]

    # Scanning over the batch would gather it where it is split over several devices.
    on_cpu = direct if jax.device_count() > 1 else partial(_kernel_grad, kernel, strides, pads)
    return pull_x(grad)[0], lax.platform_dependent(x, grad, cpu=on_cpu, default=direct)


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _kernel_grad(kernel: Array, strides: tuple, pads: tuple, x: Array, grad: Array) -> Array:
    """A kernel's gradient as a sum, a few images at a time, of (patches)^T (gradients).

    XLA's own form on CPU turns the batch into the innermost axis: transposes of the whole
    activations, with everything that feeds them computed again in that order.
    """
    batch, height, width, features = grad.shape
    rows, columns, channels = kernel.shape[:3]
    patch_bytes = height * width * kernel[..., 0].size * 4
    chunk = max(c for c in range(1, 9) if batch % c == 0 and (c == 1 or c * patch_bytes < 2**23))
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))

    def add(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        x, grad = images
        taps = [
            x[:, i : i + (height - 1) * strides[0] + 1 : strides[0],
              j : j + (width - 1) * strides[1] + 1 : strides[1]]
            for i in range(rows)
            for j in range(columns)
        ]  # fmt: skip
        patches = jnp.concatenate(taps, -1).reshape(-1, rows * columns * channels)
        grad = grad.reshape(-1, features)
        return total + jnp.matmul(patches.T, grad, preferred_element_type=jnp.float32), None

    xs, grads = (a.reshape(batch // chunk, chunk, *a.shape[1:]) for a in (x, grad))
    start = jnp.zeros((rows * columns * channels, features), jnp.float32)
    return lax.scan(add, start, (xs, grads))[0].reshape(kernel.shape).astype(kernel.dtype)


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
            pads: Any = ((1, 1), (1, 1))  # Flax's annotation knows only names
            x = nn.max_pool(x, (3, 3), (2, 2), padding=pads)
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = BasicBlock(width, stride, self.dtype, name=name)(x, train)
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
