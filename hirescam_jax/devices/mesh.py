"""The device mesh, and where the arrays of a step live on it.

Two axes: over `data` the volumes of a batch are split, over `depth` the slices of each volume. The
steps run under `jax.shard_map`: each device computes with its own volumes and slices, and what must
be known of the others is asked for by name: `total` and `largest` here. Outside a `shard_map` those
axes do not exist and both return what they are given, so the networks are the same code everywhere.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

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


def largest(x: Array, *names: str) -> Array:
    """The maximum over the devices along these axes; without a gradient."""
    axes = split_axes(*names)
    x = lax.stop_gradient(x)
    return lax.pmax(x, axes) if axes else x


def own(tree: Any, *names: str) -> Any:
    """The same values as each device's own along these axes, so that a gradient by them is that of
    the device's part of the loss alone, to be summed once by `total`."""

    def one(x: Array) -> Array:
        missing = tuple(a for a in split_axes(*names) if a not in jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def real_cells(local: int, cells: int | None) -> Bool[Array, " d"] | None:
    """Which of this device's `local` cells along the depth are real and not padding.

    Args:
        cells: cells of the whole volume; None if none is padded.

    Returns:
        None where no device has any padding.
    """
    if cells is None or local * parts(DEPTH) == cells:
        return None
    return first_cell(local) + jnp.arange(local) < cells


def first_cell(local: int) -> Array | int:
    """Index in the whole volume of the first of this device's `local` cells along the depth."""
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


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process loads of each batch.

    batch_size: volumes of a batch, over all processes.
    rows: which of them, in the order of the process's devices.
    slices, cells: [first, last) of the slices of a volume, and of the feature cells along its
        depth, padding included; None for whole volumes.
    """

    batch_size: int
    rows: tuple[int, ...]
    slices: tuple[int, int] | None = None
    cells: tuple[int, int] | None = None

    @classmethod
    def whole(cls, batch_size: int) -> "Share":
        """All volumes of a batch, whole."""
        return cls(batch_size, tuple(range(batch_size)))

    def cut_regions(self, regions: np.ndarray) -> np.ndarray:
        """Masks [..., d, h, w] of a whole volume -> those of the process's cells, with zeros behind
        the last real one."""
        if self.cells is None:
            return regions
        first, last = self.cells
        part = regions[..., first:last, :, :]
        missing = last - first - part.shape[-3]
        return np.pad(part, [*[(0, 0)] * (part.ndim - 3), (0, missing), (0, 0), (0, 0)])


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch of volumes lies on a mesh.

    Slice counts that do not divide are padded: every device has the same number of feature cells
    along the depth, of which those behind the last real one are masked (`real_cells`).

    Attributes:
        mesh: axes (data, depth).
        batch_size: volumes of a batch, over all devices.
        shape: (D, H, W) of a volume.
        grid: (d, h, w) of its features.
        unit: slices that make one feature cell; a model's `depth_unit`.
        micro_batches: parts of a batch that are computed one after the other. Volume i of part a is
            the same on every mesh.

    Raises:
        UserError: a batch that does not divide over the devices and parts.
    """

    mesh: Mesh
    batch_size: int
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    unit: int
    micro_batches: int = 1

    def __post_init__(self) -> None:
        pieces = self.mesh.shape[DATA] * self.micro_batches
        if self.batch_size % pieces:
            parts = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
            raise UserError(
                f"config.batch_size = {self.batch_size} does not divide over "
                f"{self.mesh.shape[DATA]} devices{parts}: use a multiple of {pieces}, or "
                "more config.depth_devices"
            )

    @property
    def cells(self) -> int:
        """Feature cells along the depth of a whole volume."""
        return self.grid[0]

    @property
    def padded_cells(self) -> int:
        devices = self.mesh.shape[DEPTH]
        if devices == 1:
            return self.cells
        # Slices that are too few for a last cell are kept: a flip makes them the first ones.
        return -(-self.shape[0] // (self.unit * devices)) * devices

    @property
    def padded_shape(self) -> tuple[int, ...]:
        if self.mesh.shape[DEPTH] == 1:
            return tuple(self.shape)
        return (self.padded_cells * self.unit, *self.shape[1:])

    @cached_property
    def own_devices(self) -> tuple[range, range]:
        """This process's rows and columns of the mesh."""
        process = jax.process_index()
        mine = np.array([[d.process_index == process for d in row] for row in self.mesh.devices])
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        data, depth = (range(r[0], r[-1] + 1) for r in (rows, columns))
        if mine.sum() != len(data) * len(depth):
            raise UserError(
                f"config.depth_devices = {self.mesh.shape[DEPTH]} cuts the devices of process "
                f"{process} apart: use a divisor or a multiple of {jax.local_device_count()}"
            )
        return data, depth

    @cached_property
    def share(self) -> "Share":
        """What this process loads of a batch."""
        rows, columns = self.own_devices
        shape = (self.micro_batches, self.mesh.shape[DATA], -1)
        by_device = np.arange(self.batch_size).reshape(shape).swapaxes(0, 1)
        mine = tuple(by_device[list(rows)].reshape(-1).tolist())
        if self.mesh.shape[DEPTH] == 1:
            return Share(self.batch_size, mine)
        each = self.padded_cells // self.mesh.shape[DEPTH]
        cells = columns[0] * each, (columns[-1] + 1) * each
        return Share(self.batch_size, mine, (cells[0] * self.unit, cells[1] * self.unit), cells)

    def to_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's `share` of a batch -> global arrays."""
        return {name: self._to_devices(name, value) for name, value in batch.items()}

    def _to_devices(self, name: str, value: np.ndarray) -> jax.Array:
        shape = [self.batch_size, *value.shape[1:]]
        if name == "volume":
            shape[1] = self.padded_shape[0]
        elif name in ("regions", "lesions"):
            shape[2] = self.padded_cells
        sharding = NamedSharding(self.mesh, SPECS[name])
        return jax.make_array_from_process_local_data(sharding, value, tuple(shape))
