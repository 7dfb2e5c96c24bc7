"""2D convolutions and their gradients as single matrix products, for CPUs.

XLA's gradients of a convolution by its input and by its kernel are convolutions again, around which
it turns or transposes the kernel. Where that is large and the images are small, as in the last
stage of a ResNet, this takes longer than the arithmetic. And where an image is smaller than the
kernel's window, XLA lets the two change places, for which it has no fast program on CPU. See
`layers._conv2d` for their use.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv2d_input_gradient(
    shape: Sequence[int],
    kernel: Float[Array, "kh kw C F"],
    grad: Float[Array, "N h w F"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "N H W C"]:
    """The gradient of a 2D convolution by its input, of shape [N, H, W, C].

    One matrix product for all taps of the kernel, which are then added where they belong.
    """
    kh, kw, channels, features = kernel.shape
    taps = grad.reshape(-1, features) @ kernel.reshape(-1, features).T
    taps = taps.reshape(*grad.shape[:3], kh, kw, channels)

    def place(axis: int, tap: int) -> tuple[int, int, int]:
        low, stride = tap - padding[axis][0], strides[axis]
        last = low + (grad.shape[1 + axis] - 1) * stride
        return low, shape[1 + axis] - 1 - last, stride - 1

    def placed(i: int, j: int) -> Array:
        config = ((0, 0, 0), place(0, i), place(1, j), (0, 0, 0))
        return lax.pad(taps[:, :, :, i, j], jnp.zeros((), taps.dtype), config)

    rest = [(i, j) for i in range(kh) for j in range(kw)][1:]
    return sum((placed(i, j) for i, j in rest), start=placed(0, 0))


def conv2d_kernel_gradient(
    shape: Sequence[int],
    x: Float[Array, "N H W C"],
    grad: Float[Array, "N h w F"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "kh kw C F"]:
    """The gradient of a 2D convolution by its kernel, of shape [kh, kw, C, F].

    One product of what the kernel saw at each place with the gradient there; it needs N h w kh kw C
    values of memory.
    """
    return (_seen(x, shape, strides, padding).T @ grad.reshape(-1, shape[-1])).reshape(shape)


def conv2d_small(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "kh kw C F"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "N h w F"]:
    """The convolution itself; memory as for the gradient by the kernel."""
    height, width = _out_size(x, kernel.shape, strides, padding)
    product = _seen(x, kernel.shape, strides, padding) @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(x.shape[0], height, width, kernel.shape[-1])


def _seen(
    x: Array, shape: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Array:
    """What the kernel sees at each place: [N h w, kh kw C]."""
    kh, kw, channels, _ = shape
    height, width = _out_size(x, shape, strides, padding)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def tap(i: int, j: int) -> Array:
        stop = (i + (height - 1) * strides[0] + 1, j + (width - 1) * strides[1] + 1)
        return lax.slice(padded, (0, i, j, 0), (x.shape[0], *stop, channels), (1, *strides, 1))

    patches = jnp.concatenate([tap(i, j) for i in range(kh) for j in range(kw)], axis=-1)
    return patches.reshape(-1, kh * kw * channels)


def _out_size(
    x: Array, shape: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> list[int]:
    sizes = zip(x.shape[1:3], shape[:2], strides, padding, strict=True)
    return [(size + sum(pad) - taps) // stride + 1 for size, taps, stride, pad in sizes]
