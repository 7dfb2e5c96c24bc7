"""How batches of volumes lie on a mesh, and what each process loads of them."""

import dataclasses
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hirescam_jax.devices.mesh import DATA, DEPTH, SPECS
from hirescam_jax.errors import UserError


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
    along the depth, of which those behind the last real one are masked (`real`).

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
