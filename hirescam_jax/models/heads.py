"""Layers of the heads: they know that the slices, or the batch, may lie on several devices.

What pools over the depth, the second axis, has the same result on all devices that share a volume.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hirescam_jax.devices import mesh
from hirescam_jax.devices.mesh import DATA, DEPTH


def depth_mean(x: Float[Array, "B d *rest"]) -> Float[Array, "B *rest"]:
    """The mean over the depth of whole volumes."""
    real = mesh.real(x.shape[1])
    if real is not None:
        # A product, so that a head is seen to be affine.
        x = x * real.reshape(-1, *[1] * (x.ndim - 2))
    return mesh.total(x.sum(axis=1), DEPTH) / mesh.whole(x.shape[1])


def depth_max(x: Float[Array, "B d *rest"]) -> Float[Array, "B *rest"]:
    """The maximum over the depth of whole volumes; equal places share the gradient."""
    real = mesh.real(x.shape[1])
    if real is not None:
        x = jnp.where(real.reshape(-1, *[1] * (x.ndim - 2)), x, -jnp.inf)
    if not mesh.split_axes(DEPTH):
        return x.max(axis=1)
    best = mesh.largest(x.max(axis=1), DEPTH)
    wins = x == best[:, None]
    score, count = mesh.total((jnp.where(wins, x, 0).sum(axis=1), wins.sum(axis=1)), DEPTH)
    return score / count


class DepthDense(nn.Module):
    """A fully connected layer over flattened features, whose depth may be split over devices.

    Variables are those of `nn.Dense` on [B, d * h * w * C].
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B d h w C"]) -> Float[Array, "B F"]:
        local, rows = x.shape[1], math.prod(x.shape[2:])
        whole = mesh.whole(local)
        shape = (whole * rows, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if mesh.split_axes(DEPTH):
            # Each device multiplies its own cells with their rows; those of padding are zero.
            padding = (local * mesh.parts(DEPTH) - whole) * rows
            kernel = jnp.pad(kernel, ((0, padding), (0, 0)))
            start = mesh.first(local) * rows
            kernel = lax.dynamic_slice_in_dim(kernel, start, local * rows)
        y = jnp.dot(x.reshape(x.shape[0], -1), kernel, precision="highest")
        return mesh.total(y, DEPTH) + bias


class Dropout(nn.Module):
    """Dropout that drops the same, however the batch is split over devices."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B F"], train: bool) -> Float[Array, "B F"]:
        if not train or self.rate == 0:
            return x
        batch, keep = x.shape[0], 1 - self.rate
        shape = (batch * mesh.parts(DATA), *x.shape[1:])
        kept = jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(keep), shape)
        if mesh.split_axes(DATA):
            kept = lax.dynamic_slice_in_dim(kept, lax.axis_index(DATA) * batch, batch)
        return jnp.where(kept, x / keep, 0)
