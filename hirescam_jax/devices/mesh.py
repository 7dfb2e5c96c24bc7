"""The device mesh, and where the arrays of a step live on it.

Two axes: over `data` the volumes of a batch are split, over `depth` the slices of each volume. The
steps run under `jax.shard_map`: each device computes with its own volumes and slices, and what must
be known of the others is asked for by name: `total` and `largest` here. Outside a `shard_map` those
axes do not exist and both return what they are given, so the networks are the same code everywhere.
How much of a device's part is padding is said once a step (`volume_of`).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from hirescam_jax.errors import UserError

DATA, DEPTH = "data", "depth"

WHOLE = PartitionSpec()  # on every device

# Where the axes of a batch's arrays are split; what is not named lies whole on every device.
SPECS = {
    "volume": PartitionSpec(DATA, DEPTH),
    "regions": PartitionSpec(DATA, None, DEPTH),
    "lesions": PartitionSpec(DATA, None, DEPTH),
    "findings": PartitionSpec(DATA),
    "index": PartitionSpec(DATA),
    "weight": PartitionSpec(DATA),
}
MAPS = PartitionSpec(DATA, None, DEPTH)  # [B, K, d, h, w]


def make_mesh(depth: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes as a mesh (data, depth) with `depth` devices a volume.

    They come process by process, so that each has whole rows, or a part of one. `jax.make_mesh`
    promises no order, and refuses several hosts of GPUs, which JAX takes for slices of a pod.

    Raises:
        UserError: `depth` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if depth < 1 or count % depth:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"config.depth_devices = {depth} does not divide the {count} devices: use one of "
            f"{fitting}"
        )
    grid = np.array(sorted(devices, key=lambda device: (device.process_index, device.id)))
    auto = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(grid.reshape(-1, depth), (DATA, DEPTH), axis_types=auto)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, WHOLE)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, such as a run's variables -> the same whole on every device of
    a mesh."""

    def one(x: Any) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])

    return jax.tree.map(one, tree)


def split(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device's own part of its arguments (`jax.shard_map`)."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def split_axes(*names: str) -> tuple[str, ...]:
    """Those of the axes over which the code that is being traced runs split."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in names if name in manual)


def parts(*names: str) -> int:
    """Devices along these axes; 1 outside of `split`."""
    return lax.axis_size(split_axes(*names)) if split_axes(*names) else 1


def total(x: Any, *names: str) -> Any:
    """The sum over the devices along these axes, of a tree; `x` itself outside of `split`."""
    axes = split_axes(*names)
    return lax.psum(own(x, *axes), axes) if axes else x


def total_of_parts(tree: Any, *names: str) -> Any:
    """The sum of each array over those of these axes along which, by its type, it varies."""

    def one(x: Array) -> Array:
        axes = tuple(a for a in split_axes(*names) if varies(x, a))
        return lax.psum(x, axes) if axes else x

    return jax.tree.map(one, tree)


def largest(x: Array, *names: str) -> Array:
    """The maximum over the devices along these axes; without a gradient."""
    axes = split_axes(*names)
    x = lax.stop_gradient(x)
    return lax.pmax(x, axes) if axes else x


def own(tree: Any, *names: str) -> Any:
    """The same values as each device's own along these axes, so that a gradient by them is that of
    the device's part of the loss alone, to be summed once by `total`."""

    def one(x: Array) -> Array:
        missing = tuple(a for a in split_axes(*names) if not varies(x, a))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def varies(x: Array, name: str) -> bool:
    """Whether the devices along an axis may have different values of `x`, by its type."""
    return name in jax.typeof(x).mat.varying


class _Volumes(NamedTuple):
    batch: int
    local: int
    cells: int


# Part of the key of JAX's caches: what is traced in one of these contexts is never used in another.
_volumes: Any = jax.make_user_context(None)


def volume_of(batch: int, local: int, cells: int) -> AbstractContextManager:
    """While this is entered, what is traced is of `batch` volumes on this device, each with `local`
    feature cells along the depth here, padding included, and `cells` real ones on all devices."""
    return _volumes(_Volumes(batch, local, cells))


def whole(local: int) -> int:
    """How many real places along the depth a whole volume has, of which this device holds `local`,
    padding included. Places are feature cells, or what each of them is made of.

    Raises:
        ValueError: the depth is split over devices, and there is no `volume_of`, or `local` is no
            multiple of its cells.
    """
    if parts(DEPTH) == 1:
        return local
    volumes = _told()
    if local % volumes.local:
        raise ValueError(
            f"{local} places along the depth, on a device that has {volumes.local} feature cells "
            "there: it cannot be told which of them are padding"
        )
    return local // volumes.local * volumes.cells


def real(local: int) -> Bool[Array, " d"] | None:
    """Which of this device's `local` places along the depth are real and not padding; None where no
    device has any padding. Raises as `whole`."""
    if parts(DEPTH) == 1 or _unpadded():
        return None
    return _mask(local)


def real_examples(shape: Sequence[int]) -> Bool[Array, "..."] | None:
    """Which parts of an array are real and not padding, as ones that broadcast to its shape: images
    [B * slices, h, w, C] or volumes [B, d, h, w, C]. None where no device has any padding.

    Raises:
        ValueError: it cannot be told, since the array is of another kind; or as `whole`.
    """
    if parts(DEPTH) == 1 or _unpadded():
        return None
    batch = _told().batch
    if len(shape) == 5 and shape[0] == batch:
        places, lead = shape[1], (1, shape[1])
    elif len(shape) == 4 and shape[0] % batch == 0:
        places, lead = shape[0] // batch, (shape[0],)
    else:
        raise ValueError(
            f"an array of shape {tuple(shape)} is neither images [B * slices, h, w, C] nor volumes "
            f"[B, d, h, w, C] with B = {batch}: it cannot be told which of it is padding"
        )
    mask = jnp.tile(_mask(places), math.prod(lead) // places)
    return mask.reshape(*lead, *[1] * (len(shape) - len(lead)))


def _mask(local: int) -> Bool[Array, " d"]:
    return first(local) + jnp.arange(local) < whole(local)


def _told() -> _Volumes:
    if _volumes.value is None:
        raise ValueError("the depth is split over devices: enter `mesh.volume_of` first")
    return _volumes.value


def _unpadded() -> bool:
    volumes = _volumes.value
    return volumes is not None and volumes.local * parts(DEPTH) == volumes.cells


def first(local: int) -> Array | int:
    """Index in the whole volume of the first of this device's `local` places along the depth."""
    return lax.axis_index(DEPTH) * local if split_axes(DEPTH) else 0


def flip_depth(x: Array, axis: int, length: int) -> Array:
    """The whole volume turned around along its depth, of which each device has a part.

    A device's new part was at most on two others, which send it (collective-permute).

    Args:
        x: this device's part.
        length: of the whole volume along `axis`; the padding behind it stays there.
    """
    if not split_axes(DEPTH):
        return jnp.flip(x, axis)
    devices, local = parts(DEPTH), x.shape[axis]

    def from_device(shift: int) -> Array:
        # Device i is to have what begins at length - (i + 1) * local, turned around.
        pairs = [(length // local - (i + 1) + shift, i) for i in range(devices)]
        return lax.ppermute(x, DEPTH, [p for p in pairs if 0 <= p[0] < devices])

    begin = length % local
    pair = from_device(0)
    if begin:
        pair = jnp.concatenate([pair, from_device(1)], axis)
        pair = lax.slice_in_dim(pair, begin, begin + local, axis=axis)
    return jnp.flip(pair, axis)
