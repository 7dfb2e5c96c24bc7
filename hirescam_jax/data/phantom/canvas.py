"""Antialiased shapes on a slab of voxels: the drawing layer of the phantom.

Everything is drawn in the patient's own millimetres, (z, y, x) = (towards the feet, the back, the
patient's left), with the origin in the middle of the chest. A shape becomes coverage, the fraction
of each voxel that it fills, so that what is thinner than a voxel fades instead of vanishing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

Slices = tuple[slice, slice, slice]
Tube = tuple[np.ndarray, np.ndarray]  # balls: centres [N, 3] mm and radii [N] mm
_SMALL = 4  # voxels: balls that reach no farther are drawn many at once


@dataclasses.dataclass(frozen=True)
class Pose:
    """Patient to scanner: scale by `size`, turn by `angle` rad about z, move by `shift` mm."""

    size: float
    angle: float
    shift: tuple[float, float, float]  # z, y, x


@dataclasses.dataclass(frozen=True)
class Patch:
    """Coverage `alpha` in [0, 1], float32, of the voxels `where` of a slab."""

    where: Slices
    alpha: np.ndarray


@dataclasses.dataclass(frozen=True)
class Distance:
    """Signed distance `mm` to a surface, float32, negative inside, of the voxels `where`."""

    where: Slices
    mm: np.ndarray


class Canvas:
    """Slices [start, stop) of a volume of `shape` voxels with `spacing` mm, filled with air.

    hu       float32 [n, H, W], Hounsfield units, drawn in place
    z, y, x  float32 [n, 1, 1], [1, H, W], [1, H, W], patient coordinates of the voxels' centres, mm
    Y, X     float32 [1, H, 1], [1, 1, W], scanner coordinates, mm: for what does not turn along
    voxel    edge of a voxel in patient mm (geometric mean)
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        pose: Pose,
        start: int,
        stop: int,
    ):
        self.shape = (stop - start, shape[1], shape[2])
        self._spacing = np.asarray(spacing) / pose.size
        self.voxel = float(np.prod(self._spacing) ** (1 / 3))
        centre = (np.asarray(shape) - 1) / 2 - (start, 0, 0)
        scanner = [
            (np.arange(n) - middle) * step
            for n, middle, step in zip(self.shape, centre, spacing, strict=True)
        ]
        self.Y = scanner[1].astype(np.float32)[None, :, None]
        self.X = scanner[2].astype(np.float32)[None, None]
        z, y, x = ((c - t) / pose.size for c, t in zip(scanner, pose.shift, strict=True))
        self._cos, self._sin = math.cos(pose.angle), math.sin(pose.angle)
        self.z = z.astype(np.float32)[:, None, None]
        self.y = (self._cos * y[:, None] - self._sin * x).astype(np.float32)[None]
        self.x = (self._sin * y[:, None] + self._cos * x).astype(np.float32)[None]
        # patient mm -> index in this slab: a rotation, then a scaling of each axis
        turn = np.array([[1, 0, 0], [0, self._cos, self._sin], [0, -self._sin, self._cos]])
        self._to_index = turn / self._spacing[:, None]
        self._origin = np.asarray(pose.shift) / np.asarray(spacing) + centre
        self.hu = np.full(self.shape, -1000, np.float32)

    def box(self, centre: Sequence[float], half: Sequence[float]) -> Slices | None:
        """Voxels of the box centre +- half (mm) and one more; None if it misses the slab."""
        cos, sin = abs(self._cos), abs(self._sin)
        reach = half[0], cos * half[1] + sin * half[2], cos * half[2] + sin * half[1]
        middle = self._to_index @ np.asarray(centre, float) + self._origin
        cuts = []
        for place, extent, step, size in zip(
            middle.tolist(), reach, self._spacing.tolist(), self.shape, strict=True
        ):
            low = max(math.floor(place - extent / step) - 1, 0)
            high = min(math.ceil(place + extent / step) + 2, size)
            if low >= high:
                return None
            cuts.append(slice(low, high))
        return cuts[0], cuts[1], cuts[2]

    def coordinates(self, where: Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, y, x of the voxels `where`, ready to broadcast."""
        return self.z[where[0]], self.y[:, where[1], where[2]], self.x[:, where[1], where[2]]

    def select(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Flat places of the voxels of `mask` [n, H, W], and their z, y, x: each [N]."""
        places = np.flatnonzero(mask)
        row, column = np.divmod(places, self.shape[1] * self.shape[2])
        y, x = self.y.reshape(-1)[column], self.x.reshape(-1)[column]
        return places, self.z.reshape(-1)[row], y, x

    def cover(self, distance: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """Coverage of a shape from the signed distance to its surface (mm, negative inside).

        The edge is as wide as a voxel, or `softness` mm.
        """
        alpha = distance * np.float32(-1 / max(self.voxel, softness))
        alpha += np.float32(0.5)
        return np.minimum(np.maximum(alpha, 0, out=alpha), 1, out=alpha)

    def sheet(self, distance: np.ndarray, half: float) -> np.ndarray:
        """Coverage of a sheet 2 * `half` mm thick about the surface at signed `distance` mm."""
        fill = min(1.0, 2 * half / self.voxel)
        return fill * self.cover(np.abs(distance) - max(half, self.voxel / 2))

    def ellipsoid(
        self,
        centre: Sequence[float],
        radii: Sequence[float],
        axes: np.ndarray | None = None,
        softness: float = 0.0,
    ) -> Patch | None:
        """An ellipsoid; rows of `axes` [3, 3] are the directions (z, y, x) of its `radii`."""
        half = radii if axes is None else np.sqrt(np.square(radii) @ np.square(axes))
        where = self.box(centre, [h + softness for h in half])
        if where is None:
            return None
        distance = ellipsoid_distance(*self.coordinates(where), centre, radii, axes)
        return Patch(where, self.cover(distance, softness))

    def tube(self, tube: Tube, softness: float = 0.0) -> Patch | None:
        """Balls along a curve, or anywhere."""
        return self.thicken(self.distance(tube, softness / 2), 0.0, softness)

    def thicken(self, surface: Distance | None, by: float, softness: float = 0.0) -> Patch | None:
        """What `surface` encloses, `by` mm thicker all round: its `margin` has to be as large."""
        if surface is None:
            return None
        return Patch(surface.where, self.cover(surface.mm - np.float32(by), softness))

    def distance(self, tube: Tube, margin: float = 0.0) -> Distance | None:
        """Distance to the surface of the balls up to `margin` mm outside; None far from the slab.

        A ball thinner than a voxel is given distances that make it as wide as one, but fainter.
        """
        points, radii = _thin_out(tube, self.voxel)
        centre = points @ self._to_index.T + self._origin
        half = self.voxel / 2
        reach = (np.maximum(radii, half) + margin + half)[:, None] / self._spacing
        near = ((centre + reach >= 0) & (centre - reach <= np.array(self.shape) - 1)).all(1)
        if not near.any():
            return None
        centre, radii, reach = centre[near], radii[near], reach[near]
        # a margin round all balls, so that no small one needs to be cut at an edge
        steps = np.ceil(reach.max(1) - 1e-6).astype(int)
        nearest = np.rint(centre).astype(int)
        low = np.maximum((nearest - steps[:, None]).min(0), -2 * _SMALL)
        high = (nearest + steps[:, None]).max(0) + 1
        size = np.minimum(high, np.array(self.shape) + 2 * _SMALL) - low
        mm = np.full(size, 1000, np.float32)
        for i in np.flatnonzero(steps > _SMALL).tolist():
            self._stamp(mm, centre[i] - low, float(radii[i]), int(steps[i]))
        stride = np.array([size[1] * size[2], size[2], 1])
        base = (nearest - low) @ stride
        rest = ((nearest - centre) * self._spacing).astype(np.float32)
        drawn = np.maximum(radii, half).astype(np.float32)[:, None]
        fill = np.minimum(radii / half, 1).astype(np.float32)[:, None] ** 2
        for step in range(1, _SMALL + 1):
            members = np.flatnonzero(steps == step)
            offsets = np.indices((2 * step + 1,) * 3).reshape(3, -1).T - step
            apart = offsets * self._spacing
            limit = drawn[members].max(initial=0) + margin + 1.4 * self.voxel
            close = (apart**2).sum(1) < limit**2
            places, apart = offsets[close] @ stride, apart[close].astype(np.float32)
            for some in (members[i : i + 5000] for i in range(0, len(members), 5000)):
                square = (2 * rest[some]) @ apart.T
                square += (rest[some] ** 2).sum(1)[:, None]
                square += (apart**2).sum(1)
                value = np.sqrt(np.maximum(square, 0, out=square), out=square)
                value -= drawn[some] + np.float32(half)
                value += np.minimum(value, 0) * (fill[some] - 1)
                value += np.float32(half)
                where = base[some, None] + places
                np.minimum.at(mm.reshape(-1), where.reshape(-1), value.reshape(-1))
        begin, end = np.maximum(low, 0), np.minimum(low + size, self.shape)
        inner = tuple(slice(b, e) for b, e in zip(begin - low, end - low, strict=True))
        z, y, x = (slice(b, e) for b, e in zip(begin.tolist(), end.tolist(), strict=True))
        return Distance((z, y, x), mm[inner])

    def _stamp(self, mm: np.ndarray, centre: np.ndarray, radius: float, step: int) -> None:
        """One large ball, its centre at an index into `mm`."""
        block, squares = [], []
        for axis in range(3):
            nearest = round(float(centre[axis]))
            start, stop = max(nearest - step, 0), min(nearest + step + 1, mm.shape[axis])
            if start >= stop:
                return
            block.append(slice(start, stop))
            along = (np.arange(start, stop) - centre[axis]) * self._spacing[axis]
            squares.append((along**2).astype(np.float32))
        distance = squares[0][:, None, None] + (squares[1][:, None] + squares[2])
        distance = np.sqrt(distance, out=distance)
        distance -= np.float32(radius)
        target = mm[block[0], block[1], block[2]]
        np.minimum(target, distance, out=target)

    def paint(
        self, patch: Patch | None, hu: float | np.ndarray, within: np.ndarray | None = None
    ) -> None:
        """Blend `hu` over the volume by coverage, limited to the coverage `within` [n, H, W]."""
        if patch is None:
            return
        alpha = patch.alpha if within is None else patch.alpha * within[patch.where]
        block = self.hu[patch.where]
        change = hu - block
        change *= alpha
        block += change


def ellipsoid_distance(
    z: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
    centre: Sequence[float],
    radii: Sequence[float],
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """First-order signed distance to an ellipsoid, mm: exact on the surface, good near it."""
    z, y, x = z - float(centre[0]), y - float(centre[1]), x - float(centre[2])
    parts = [z, y, x]
    if axes is not None:
        parts = [float(a[0]) * z + (float(a[1]) * y + float(a[2]) * x) for a in axes]
    # the two in the plane first: without axes they are small arrays
    square = [(part / float(r)) ** 2 for part, r in zip(parts, radii, strict=True)]
    level = square[1] + square[2] + square[0]
    slope = square[1] / float(radii[1]) ** 2 + square[2] / float(radii[2]) ** 2
    slope = slope + square[0] / float(radii[0]) ** 2
    return (level - np.sqrt(level)) / np.sqrt(np.maximum(slope, 1e-8))


_SAMPLES = np.arange(40)[:, None] / 40
_CATMULL_ROM = (
    np.concatenate([_SAMPLES**0, _SAMPLES, _SAMPLES**2, _SAMPLES**3], 1)
    @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
    / 2
)


def curve(*knots: tuple[float, float, float, float]) -> Tube:
    """A smooth curve through knots (z, y, x, radius), mm, 40 points from each to the next."""
    rows = np.array(knots, np.float64)
    rows = np.concatenate([2 * rows[:1] - rows[1:2], rows, 2 * rows[-1:] - rows[-2:-1]])
    around = np.stack([rows[:-3], rows[1:-2], rows[2:-1], rows[3:]], 1)
    line = np.concatenate([(_CATMULL_ROM @ around).reshape(-1, 4), rows[-2:-1]])
    return line[:, :3], np.maximum(line[:, 3], 0.1)


def join(tubes: Iterable[Tube]) -> Tube:
    """Several tubes or clouds as one."""
    points, radii = zip(*tubes, strict=True)
    return np.concatenate(points), np.concatenate(radii)


def _thin_out(tube: Tube, voxel: float) -> Tube:
    """Drop the points that lie closer to the one before than the drawing can show."""
    points, radii = tube
    step = np.sqrt((np.diff(points, axis=0) ** 2).sum(1)) / np.maximum(
        0.35 * radii[1:], 0.6 * voxel
    )
    mark = np.floor(np.cumsum(np.minimum(step, 1)))
    keep = np.concatenate([[True], np.diff(mark, prepend=0.0) > 0])
    return points[keep], radii[keep]
