"""Antialiased shapes on a slab of voxels: the drawing layer of the phantom.

Everything is drawn in the patient's own millimetres, in the order (z, y, x) = (towards the feet, towards the back,
towards the patient's left), with the origin in the middle of the chest. Shapes become coverage, the fraction of a voxel
that they fill, so that a structure thinner than a voxel fades in proportion instead of vanishing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

Slices = tuple[slice, slice, slice]
Tube = tuple[np.ndarray, np.ndarray]  # centres [N, 3] mm, radii [N] mm


@dataclasses.dataclass(frozen=True)
class Pose:
    """Patient to scanner: scale by `size`, turn by `angle` radians about z, then move by `shift` (z, y, x) mm."""

    size: float
    angle: float
    shift: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Patch:
    """Coverage `alpha` in [0, 1], float32, of the voxels `where` of a slab."""

    where: Slices
    alpha: np.ndarray


class Canvas:
    """Slices [start, stop) of a volume of `shape` voxels with `spacing` mm, filled with air.

    hu       float32 [stop - start, H, W], Hounsfield units, drawn in place
    z, y, x  float32 [n, 1, 1], [1, H, W], [1, H, W]: patient coordinates of the voxel centres, mm
    Y, X     float32 [1, H, 1], [1, 1, W]: scanner coordinates, mm, for what does not turn with the patient
    voxel    edge of a voxel in patient mm (geometric mean)
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        pose: Pose,
        start: int = 0,
        stop: int | None = None,
    ):
        stop = shape[0] if stop is None else stop
        self.shape = (stop - start, shape[1], shape[2])
        self._spacing = np.asarray(spacing, np.float32) / pose.size
        self._origin = (np.asarray(shape, np.float64) - 1) / 2 - (start, 0, 0)  # index of scanner 0
        self._spacing_scanner = np.asarray(spacing, np.float64)
        self._pose = pose
        self.voxel = float(np.prod(self._spacing) ** (1 / 3))
        scanner = [(np.arange(n) - o) * s for n, o, s in zip(self.shape, self._origin, spacing, strict=True)]
        z, y, x = ((c - t) / pose.size for c, t in zip(scanner, pose.shift, strict=True))
        cos, sin = np.cos(pose.angle), np.sin(pose.angle)
        self.z = z.astype(np.float32)[:, None, None]
        self.y = (cos * y[:, None] - sin * x[None, :]).astype(np.float32)[None]
        self.x = (sin * y[:, None] + cos * x[None, :]).astype(np.float32)[None]
        self.Y = scanner[1].astype(np.float32)[None, :, None]
        self.X = scanner[2].astype(np.float32)[None, None, :]
        self.hu = np.full(self.shape, -1000, np.float32)

    def index(self, points: np.ndarray) -> np.ndarray:
        """Patient mm [N, 3] -> fractional voxel index in this slab [N, 3]."""
        cos, sin = np.cos(self._pose.angle), np.sin(self._pose.angle)
        z, y, x = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        turned = np.stack([z, cos * y + sin * x, cos * x - sin * y], -1)
        return (turned * self._pose.size + self._pose.shift) / self._spacing_scanner + self._origin

    def box(self, centre: Sequence[float], half: Sequence[float]) -> Slices | None:
        """Voxels of the patient-aligned box centre +- half (mm, one voxel of margin), None when it misses the slab."""
        cos, sin = abs(np.cos(self._pose.angle)), abs(np.sin(self._pose.angle))
        hz, hy, hx = half
        reach = np.array([hz, cos * hy + sin * hx, cos * hx + sin * hy]) / self._spacing + 1
        middle = self.index(np.asarray(centre)[None])[0]
        return self._clip(np.floor(middle - reach), np.ceil(middle + reach))

    def _clip(self, low: np.ndarray, high: np.ndarray) -> Slices | None:
        low = np.maximum(low, 0).astype(int)
        high = np.minimum(high + 1, self.shape).astype(int)
        if np.any(low >= high):
            return None
        return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])

    def coordinates(self, where: Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, y, x of the voxels `where`, ready to broadcast."""
        return self.z[where[0]], self.y[:, where[1], where[2]], self.x[:, where[1], where[2]]

    def cover(self, distance: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """Coverage of a shape from the signed distance to its surface (mm, negative inside)."""
        return np.clip(0.5 - distance / max(self.voxel, softness), 0, 1)

    def ellipsoid(
        self,
        centre: Sequence[float],
        radii: Sequence[float],
        axes: np.ndarray | None = None,
        softness: float = 0.0,
    ) -> Patch | None:
        """An ellipsoid; rows of `axes` [3, 3] are the directions (z, y, x) of its `radii`."""
        half = np.asarray(radii) if axes is None else np.sqrt((np.asarray(radii) ** 2) @ np.asarray(axes) ** 2)
        where = self.box(centre, half + softness)
        if where is None:
            return None
        z, y, x = self.coordinates(where)
        return Patch(where, self.cover(ellipsoid_distance(z, y, x, centre, radii, axes), softness))

    def sheet(self, distance: np.ndarray, half: float) -> np.ndarray:
        """Coverage of a sheet 2 * `half` mm thick about the surface at signed `distance` mm."""
        fill = min(1.0, 2 * half / self.voxel)
        return fill * self.cover(np.abs(distance) - max(half, self.voxel / 2))

    def tube(self, tube: Tube, widen: float = 0.0, softness: float = 0.0) -> Patch | None:
        """Balls on a curve, or anywhere; `widen` mm is added to their radii.

        A ball thinner than a voxel is drawn as wide as one and fainter instead.
        """
        points, radii = _thin_out(tube, self.voxel)
        centre = self.index(points)
        radii = radii + widen
        drawn = np.maximum(radii, self.voxel / 2)
        strength = np.clip(2 * radii / self.voxel, 0, 1) ** 2
        reach = (drawn + max(self.voxel, softness) / 2)[:, None] / self._spacing
        near = np.all((centre + reach >= 0) & (centre - reach <= np.array(self.shape) - 1), axis=1)
        if not near.any():
            return None
        centre, drawn, strength, reach = centre[near], drawn[near], strength[near], reach[near]
        # balls are added up in a box with a margin, so that none needs to be cut at its edge
        steps = np.ceil(reach.max(1) - 1e-6).astype(int)
        nearest = np.rint(centre).astype(int)
        low = (nearest - steps[:, None]).min(0)
        size = (nearest + steps[:, None]).max(0) + 1 - low
        alpha = np.zeros(size, np.float32)
        stride = np.array([size[1] * size[2], size[2], 1])
        base = (nearest - low) @ stride
        remainder = (nearest - centre) * self._spacing
        for step in np.unique(steps):
            members = np.flatnonzero(steps == step)
            grid = np.arange(-step, step + 1)
            offsets = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(-1, 3)
            apart = offsets * self._spacing
            limit = (drawn[members].max() + (max(self.voxel, softness) + self.voxel) / 2) ** 2
            close = (apart**2).sum(1) < limit + self.voxel**2
            offsets, apart = offsets[close], apart[close].astype(np.float32)
            chunk = max(1, 1_000_000 // len(offsets))
            for some in (members[i : i + chunk] for i in range(0, len(members), chunk)):
                rest = remainder[some].astype(np.float32)
                square = 2 * (rest @ apart.T)
                square += (rest**2).sum(1)[:, None]
                square += (apart**2).sum(1)
                distance = np.sqrt(np.maximum(square, 0, out=square), out=square)
                value = self.cover(distance - drawn[some, None].astype(np.float32), softness)
                value *= strength[some, None].astype(np.float32)
                places = base[some, None] + offsets @ stride
                np.maximum.at(alpha.reshape(-1), places.reshape(-1), value.reshape(-1))
        where = self._clip(low, low + size - 1)
        if where is None:
            return None
        return Patch(where, alpha[tuple(slice(w.start - o, w.stop - o) for w, o in zip(where, low))])

    def paint(self, patch: Patch | None, hu: float | np.ndarray, within: np.ndarray | None = None) -> None:
        """Blend `hu` over the volume by coverage; `within` [n, H, W] limits it to another shape's coverage."""
        if patch is None:
            return
        alpha = patch.alpha if within is None else patch.alpha * within[patch.where]
        block = self.hu[patch.where]
        block += alpha * (hu - block)


def ellipsoid_distance(
    z: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
    centre: Sequence[float],
    radii: Sequence[float],
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """First-order signed distance to an ellipsoid, mm: exact on the surface, good near it."""
    z, y, x = z - centre[0], y - centre[1], x - centre[2]
    if axes is None:
        parts = [z, y, x]
    else:
        parts = [float(a[0]) * z + (float(a[1]) * y + float(a[2]) * x) for a in axes]
    order = (parts[1] / radii[1]) ** 2 + (parts[2] / radii[2]) ** 2 + (parts[0] / radii[0]) ** 2
    if np.ptp(radii) < 1e-6:
        return np.sqrt(order) * radii[0] - radii[0]
    slope = (parts[1] / radii[1] ** 2) ** 2 + (parts[2] / radii[2] ** 2) ** 2 + (parts[0] / radii[0] ** 2) ** 2
    return (order - np.sqrt(order)) / np.sqrt(np.maximum(slope, 1e-8))


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
    step = np.sqrt((np.diff(points, axis=0) ** 2).sum(1)) / np.maximum(0.4 * radii[1:], 0.6 * voxel)
    mark = np.floor(np.cumsum(np.minimum(step, 1)))
    keep = np.concatenate([[True], np.diff(mark, prepend=0.0) > 0])
    return points[keep], radii[keep]
