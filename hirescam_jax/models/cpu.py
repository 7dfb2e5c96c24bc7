"""What CPUs compute in another way than other devices: convolutions, their gradients, max-pools.

`layers` asks here for a faster function, which takes the place of XLA's own only where a program is
lowered for CPU. Each is made of ordinary operations, so that every kind of derivative works, and
keeps its arguments alone for the gradient (`jax.checkpoint`), as XLA's own does: other devices'
programs hold nothing of them.

XLA's gradients of a convolution by its input and by its kernel are convolutions again, around which
it turns or transposes the kernel. Where that is large and the images are small, as in the last
stage of a ResNet, this takes longer than the arithmetic. Where an image is smaller than the
kernel's window, XLA lets the two change places, for which it has no fast program on CPU. In 3D it
has no fast gradient at all.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Sizes = Sequence[int]
Padding = Sequence[tuple[int, int]]
Convolution = Callable[[Array, Array], Array]

# The compiler may still keep more.
keep_arguments = partial(jax.checkpoint, prevent_cse=False)


def faster_convolution(
    plain: Convolution, x: Sizes, kernel: Sizes, strides: Sizes, padding: Padding
) -> Convolution | None:
    """What to do instead of a `plain` convolution of arrays of these shapes; None: nothing."""
    if len(strides) == 3:
        return keep_arguments(lambda x, kernel: convolution_by_planes(x, kernel, strides, padding))
    if len(strides) != 2:
        return None
    window, image = math.prod(kernel[:2]), math.prod(x[1:3])
    swapped = window > image > 1
    if math.prod(kernel) <= math.prod(x) and not swapped:
        return None

    def product(x: Array, kernel: Array) -> Array:
        return convolution_by_product(x, kernel, strides, padding)

    if swapped:
        return keep_arguments(product)
    # What the product gathers is larger than the kernel then.
    places = x[0] * math.prod(output_size(x, kernel, strides, padding))
    by_kernel = plain if places >= kernel[-1] else product
    return keep_arguments(_with_derivatives(plain, product, by_kernel))


def _with_derivatives(
    function: Convolution, by_input: Convolution, by_kernel: Convolution
) -> Convolution:
    """The convolution `function`, with derivatives of two others, which are equal to it."""
    convolve = jax.custom_jvp(function)

    def rule(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        (x, kernel), (dx, dkernel) = primals, tangents
        parts = []
        if not isinstance(dx, SymbolicZero):
            parts.append(by_input(dx, kernel))
        if not isinstance(dkernel, SymbolicZero):
            parts.append(by_kernel(x, dkernel))
        return convolve(x, kernel), sum(parts[1:], start=parts[0])

    convolve.defjvp(rule, symbolic_zeros=True)
    return convolve


def convolution_by_product(
    x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C F"], strides: Sizes, padding: Padding
) -> Float[Array, "N h w F"]:
    """A 2D convolution as one matrix product of what the kernel sees at each place, which takes
    N h w kh kw C values of memory; so are its gradients."""
    kh, kw, channels, features = kernel.shape
    height, width = output_size(x.shape, kernel.shape, strides, padding)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def tap(i: int, j: int) -> Array:
        stop = (i + (height - 1) * strides[0] + 1, j + (width - 1) * strides[1] + 1)
        return lax.slice(padded, (0, i, j, 0), (x.shape[0], *stop, channels), (1, *strides, 1))

    seen = jnp.concatenate([tap(i, j) for i in range(kh) for j in range(kw)], axis=-1)
    product = seen.reshape(-1, kh * kw * channels) @ kernel.reshape(-1, features)
    return product.reshape(x.shape[0], height, width, features)


def convolution_by_planes(
    x: Float[Array, "B D H W C"],
    kernel: Float[Array, "kd kh kw C F"],
    strides: Sizes,
    padding: Padding,
) -> Float[Array, "B d h w F"]:
    """A 3D convolution as a sum of 2D convolutions, one a plane of the kernel."""
    (along, *across), (ends, *sides) = strides, padding
    x = jnp.pad(x, ((0, 0), ends, *[(0, 0)] * 3))
    batch, depth = x.shape[:2]
    out_depth = (depth - kernel.shape[0]) // along + 1

    def plane(offset: int) -> Array:
        planes = x[:, offset : offset + (out_depth - 1) * along + 1 : along]
        return lax.conv_general_dilated(
            planes.reshape(batch * out_depth, *x.shape[2:]),
            kernel[offset],
            across,
            sides,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    total = sum((plane(offset) for offset in range(1, kernel.shape[0])), start=plane(0))
    return total.reshape(batch, out_depth, *total.shape[1:])


def output_size(x: Sizes, kernel: Sizes, strides: Sizes, padding: Padding) -> list[int]:
    """The grid of a convolution of arrays of these shapes."""
    sizes = zip(x[1:-1], kernel[:-2], strides, padding, strict=True)
    return [(size + sum(pad) - taps) // stride + 1 for size, taps, stride, pad in sizes]


def max_pool_by_slices(x: Float[Array, "N H W C"], window: int, padding: int) -> Array:
    """With a stride of 2, as maxima of slices, rows first, since XLA's gradient of a window is a
    serial scatter. Padding with 0 is neutral behind a ReLU."""
    x = jnp.pad(x, ((0, 0), *[(padding, padding)] * 2, (0, 0)))
    for axis in (1, 2):
        count = (x.shape[axis] - window) // 2 + 1
        taps = [lax.slice_in_dim(x, i, i + 2 * count - 1, 2, axis) for i in range(window)]
        x = reduce(jnp.maximum, taps)
    return x
