"""What happens to a volume on the device, inside the compiled step: window, scale, augment.

The pipeline ships int16 Hounsfield units and small masks; everything else is here, so that the
host only loads. Flips and rotations move a volume and its region masks together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from hirescam_jax.config import Preprocess
from hirescam_jax.devices import mesh
from hirescam_jax.devices.mesh import DEPTH


def augment(
    settings: Preprocess,
    key: Array,
    volume_BDHW: Integer[Array, "B D H W"],
    regions_BRdhw: Integer[Array, "B R d h w"],
    depth: tuple[int, int] | None = None,
) -> tuple[Integer[Array, "B D H W"], Integer[Array, "B R d h w"]]:
    """Flips and axial rotations, drawn for each example, of volumes and their masks alike.

    Args:
        key: keys [B], one an example.
        depth: where the slices are split over devices and padded, (D, d) of a whole volume.

    Raises:
        ValueError: rotations are asked for and H != W or h != w.
    """
    if settings.rotate > 0 and (
        volume_BDHW.shape[2] != volume_BDHW.shape[3]
        or regions_BRdhw.shape[3] != regions_BRdhw.shape[4]
    ):
        raise ValueError("rotations by 90 degrees need H = W: set preprocess.rotate to 0")

    def draw(key: Array) -> tuple[Array, Array]:
        flip_key, axis_key, rotate_key, turns_key = jax.random.split(key, 4)
        # With these dtypes 64-bit JAX draws the same.
        flip = jax.random.bernoulli(flip_key, jnp.float32(settings.flip))
        axis = jnp.where(flip, jax.random.randint(axis_key, (), 0, 3, jnp.int32), -1)
        rotate = jax.random.bernoulli(rotate_key, jnp.float32(settings.rotate))
        turns = jnp.where(rotate, jax.random.randint(turns_key, (), 1, 4, jnp.int32), 0)
        return axis, turns

    if settings.flip == 0 and settings.rotate == 0:
        return volume_BDHW, regions_BRdhw
    axis_B, turns_B = jax.vmap(draw)(key)
    if settings.flip > 0 and mesh.parts(DEPTH) > 1:
        # The slices are on other devices: parts are exchanged, whatever was drawn.
        sizes = [n * mesh.parts(DEPTH) for n in (volume_BDHW.shape[1], regions_BRdhw.shape[2])]
        slices, cells = depth or sizes
        turned = axis_B[:, None, None, None] == 0
        flipped = mesh.flip_depth(volume_BDHW, 1, slices)
        volume_BDHW = jnp.where(turned, flipped, volume_BDHW)
        flipped = mesh.flip_depth(regions_BRdhw, 2, cells)
        regions_BRdhw = jnp.where(turned[..., None], flipped, regions_BRdhw)
        axis_B = jnp.where(axis_B == 0, -1, axis_B)
    move = jax.vmap(flip_and_rotate)
    return move(volume_BDHW, axis_B, turns_B), move(regions_BRdhw, axis_B, turns_B)


def flip_and_rotate(x: Array, axis: Array, turns: Array) -> Array:
    """`jnp.flip` along one of the last three axes (-1: none), then `jnp.rot90` in the last two.

    One gather, so that the cost does not depend on what was drawn: under vmap a `lax.switch`
    would compute all of its branches.
    """
    depth, height, width = x.shape[-3:]
    d, h, w = jnp.arange(depth), jnp.arange(height)[:, None], jnp.arange(width)
    # Where each cell of the result comes from, backwards: first the rotation, then the flip.
    down, right = height - 1 - h, width - 1 - w
    turned = (turns == 1) | (turns == 3)
    row = jnp.where(turned, jnp.where(turns == 1, w, right), jnp.where(turns == 2, down, h))
    column = jnp.where(turned, jnp.where(turns == 1, down, h), jnp.where(turns == 2, right, w))
    d = jnp.where(axis == 0, depth - 1 - d, d)
    row = jnp.where(axis == 1, height - 1 - row, row)
    column = jnp.where(axis == 2, width - 1 - column, column)
    flat = x.reshape(*x.shape[:-2], height * width)
    source = (row * width + column).reshape(-1)
    moved = flat.at[..., d[:, None], source].get(mode="promise_in_bounds")
    return moved.reshape(x.shape)
