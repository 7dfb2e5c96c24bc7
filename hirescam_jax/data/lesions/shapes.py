"""The synthetic lesions of `hirescam_jax.data.lesions`: where each fits, its shape and density.

Everything is measured in millimetres of the patient, with the scan in the model's axes [D, H, W]
(down, back, to the patient's left), so the storage order and the size of the voxels do not matter.

A lesion fills a share of the air of every voxel that it covers with tissue. Vessels shine through
a share below 1, and at the edge the coverage is that of a voxel which is partly lesion.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage as scipy_ndimage

ndimage: Any = scipy_ndimage  # its stubs call every result a number

COARSE_MM = 3.0  # places are sought on a grid of about this size
Box = tuple[slice, slice, slice]
# Millimetres from a centre, (x, y, z) in RAS, -> signed distance in mm, below 0 inside.
Shape = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(eq=False)
class Scan:
    """A CT in the model's axes, while lesions are painted into it.

    hu: Hounsfield units, changed by painting.
    axes: [3, 3], steps of the three indices in RAS mm.
    free: where the next lesion may lie: the organ without earlier lesions.
    noise_hu: standard deviation of the scan's own noise in soft tissue.
    """

    hu: Float[np.ndarray, "D H W"]
    axes: Float[np.ndarray, "3 3"]
    free: Bool[np.ndarray, "D H W"]
    noise_hu: float

    @property
    def spacing(self) -> np.ndarray:
        return np.linalg.norm(self.axes, axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Painted:
    """A lesion in a scan.

    box: the part of the volume that it changed.
    coverage: [box], 0 to 1, the part of each voxel that is lesion.
    size_mm: what `lesions.csv` says of its size.
    """

    box: Box
    coverage: Float[np.ndarray, "d h w"]
    size_mm: float


Painter = Callable[[Scan, np.random.Generator], Painted | None]


def nodule(scan: Scan, rng: np.random.Generator) -> Painted | None:
    """A round or lobulated solid nodule, in some with spicules; size: diameter of the ball of its
    volume, 8 to 30 mm (and two voxels at least)."""
    least = max(8.0, 2.0 * scan.spacing.max())
    wanted = rng.uniform(least, max(30.0, least))
    spiculated = rng.random() < 0.3
    directions = rng.normal(size=(18 if spiculated else 9, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    heights = rng.uniform(0.10, 0.34, len(directions))
    sharpness = 30.0 if spiculated else 7.0
    place = _place(scan, rng, 0.62 * wanted, 0.62 * least, airy=True)
    if place is None:
        return None
    centre, room = place
    diameter = min(wanted, room / 0.62)

    def relief(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        length = np.maximum(np.sqrt(x * x + y * y + z * z), 1e-6)
        out = np.ones_like(length)
        for (a, b, c), height in zip(directions, heights, strict=True):
            out += height * np.exp(sharpness * ((a * x + b * y + c * z) / length - 1))
        return out

    # Points even on the sphere, to give the lobulated ball the volume of a round one.
    i = np.arange(2000)
    z = (2 * i + 1) / len(i) - 1
    ring, turn = np.sqrt(1 - z * z), np.pi * (1 + 5**0.5) * i
    ball = diameter / 2 / np.cbrt((relief(ring * np.cos(turn), ring * np.sin(turn), z) ** 3).mean())

    def shape(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.sqrt(x * x + y * y + z * z) - ball * relief(x, y, z)

    reach = ball * 1.9 + 2
    box, coverage = cover(scan, centre, (reach,) * 3, shape, edge_mm=1.5)
    tissue = rng.uniform(15, 60) + 12 * smooth_noise(scan, box, rng, 2.5)
    return _fill(scan, rng, box, coverage, tissue, 1.0, diameter)


def ground_glass(scan: Scan, rng: np.random.Generator) -> Painted | None:
    """Hazy patches in which vessels stay visible; size: extent in mm."""
    extent = rng.uniform(35, 70)
    place = _place(scan, rng, 16.0, 6.0, airy=True)
    if place is None:
        return None
    shape = _clump(rng, int(rng.integers(7, 12)), extent / 2, (0.22, 0.42))
    box, coverage = cover(scan, place[0], (extent * 0.75,) * 3, shape, 7.0, rng, 4.0)
    share = rng.uniform(0.32, 0.5) * np.clip(1 + 0.22 * smooth_noise(scan, box, rng, 3.0), 0.4, 1.5)
    return _fill(scan, rng, box, coverage, rng.uniform(10, 40), share, extent)


def consolidation(scan: Scan, rng: np.random.Generator) -> Painted | None:
    """Airless lung with a frayed edge and open bronchi; it may reach the pleura. Size: extent."""
    extent = rng.uniform(40, 80)
    place = _place(scan, rng, 12.0, 6.0, airy=True)
    if place is None:
        return None
    shape = _clump(rng, int(rng.integers(8, 13)), extent / 2, (0.34, 0.55))
    box, coverage = cover(scan, place[0], (extent * 0.8,) * 3, shape, 5.0, rng, 4.5)
    bronchi = _bronchi(scan, rng, place[0], box, extent)
    tissue = rng.uniform(15, 50) + 14 * smooth_noise(scan, box, rng, 3.0)
    share = np.clip(0.95 + 0.03 * smooth_noise(scan, box, rng, 3.0), 0.8, 1) * (1 - 0.8 * bronchi)
    return _fill(scan, rng, box, coverage, tissue, share, extent)


def pleural_effusion(scan: Scan, rng: np.random.Generator) -> Painted | None:
    """Free fluid behind and below the lung of a patient who lies on the back, with a level that
    climbs along the pleura; size: greatest depth of the layer."""
    lung_ml = scan.free.sum() * np.prod(scan.spacing) / 1e3
    wanted_ml = min(rng.uniform(120, 600), lung_ml * rng.uniform(0.10, 0.25))
    box = _box_of(scan.free)
    if box is None:
        return None
    free = scan.free[box]
    _, y, z = _positions(scan.axes, [np.arange(n) for n in free.shape])
    inner = ndimage.gaussian_filter(free.astype(np.float32), 9.0 / scan.spacing, mode="constant")
    height = y + rng.uniform(0.16, 0.30) * z - 26 * np.maximum(0.9 - inner, 0)
    height = height + 1.2 * smooth_noise(scan, box, rng, 12.0)
    inside = np.sort(height[free])
    level = inside[min(int(wanted_ml / lung_ml * len(inside)), len(inside) - 1)]
    edge = max(2.0, abs(scan.axes[1]).max())
    coverage = np.clip(0.5 + (level - height) / edge, 0, 1).astype(np.float32) * free
    wet = (coverage >= 0.5).sum(1)  # voxels in each column from front to back
    tissue = rng.uniform(2, 18) + 3 * smooth_noise(scan, box, rng, 4.0)
    return _fill(scan, rng, box, coverage, tissue, 1.0, float(wet.max() * scan.spacing[1]))


def calcification(scan: Scan, rng: np.random.Generator) -> Painted | None:
    """A chain of dense plaques, as in a coronary artery, or some calcified lymph nodes close to
    each other; size: extent."""
    chain = rng.random() < 0.6
    place = _place(scan, rng, 9.0, 4.0, airy=False, low=chain)
    if place is None:
        return None
    count = int(rng.integers(4, 8)) if chain else int(rng.integers(2, 5))
    radii = rng.uniform(2.0, 3.6, count) if chain else rng.uniform(3.0, 5.5, count)
    if chain:
        heading = rng.normal(size=3)
        steps = []
        for radius in radii:
            heading = heading / np.linalg.norm(heading) + 0.35 * rng.normal(size=3)
            steps.append(heading / np.linalg.norm(heading) * radius * rng.uniform(1.2, 2.4))
        points = np.cumsum(steps, axis=0)
        points -= points.mean(0)
    else:
        points = rng.normal(size=(count, 3)) * 5.0
    reach = np.abs(points).max(0) + radii.max() + 2
    extent = float(np.max(np.ptp(points, axis=0)) + 2 * radii.mean())
    shape = _balls(points, radii, 1.0)
    box, coverage = cover(scan, place[0], tuple(reach), shape, 1.5, rng, 0.5)
    density = rng.uniform(550, 1000) + 90 * smooth_noise(scan, box, rng, 1.5)
    return _fill(scan, rng, box, coverage, np.maximum(density, 300), 1.0, extent)


# In the order in which they are painted: the large ones first, which find less room.
PAINTERS: dict[str, Painter] = {
    "pleural_effusion": pleural_effusion,
    "consolidation": consolidation,
    "ground_glass": ground_glass,
    "nodule": nodule,
    "calcification": calcification,
}


def cover(
    scan: Scan,
    centre: np.ndarray,
    reach_mm: tuple[float, ...],
    shape: Shape,
    edge_mm: float,
    rng: np.random.Generator | None = None,
    fray_mm: float = 0.0,
) -> tuple[Box, Float[np.ndarray, "d h w"]]:
    """How much of every voxel around `centre` a shape covers, from points a millimetre apart.

    Args:
        centre: index in the scan.
        reach_mm: half the extent of the shape along x, y, z.
        edge_mm: over which the coverage falls from 1 to 0.
        rng, fray_mm: displace the surface by smooth noise of this size.
    """
    inverse = np.linalg.inv(scan.axes)
    half = np.abs(inverse) @ (np.asarray(reach_mm) + fray_mm * 2 + edge_mm)
    low = np.maximum(np.floor(centre - half), 0).astype(int)
    high = np.minimum(np.ceil(centre + half) + 1, scan.hu.shape).astype(int)
    box: Box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    fray = fray_mm * smooth_noise(scan, box, rng, 3.5) if rng is not None else np.float32(0)
    counts = np.clip(np.ceil(scan.spacing - 1e-6), 1, 5).astype(int)
    total = np.zeros(tuple(high - low), np.float32)
    for part in np.ndindex(*counts):
        shift = (np.array(part) + 0.5) / counts - 0.5
        index = [
            np.arange(a, b) + s - c for a, b, s, c in zip(low, high, shift, centre, strict=True)
        ]
        total += np.clip(0.5 - (shape(*_positions(scan.axes, index)) + fray) / edge_mm, 0, 1)
    return box, total / np.prod(counts)


def smooth_noise(
    scan: Scan, box: Box, rng: np.random.Generator, sigma_mm: float
) -> Float[np.ndarray, "d h w"]:
    """Gaussian noise with mean 0 and standard deviation 1, smooth over `sigma_mm`."""
    noise = rng.standard_normal([s.stop - s.start for s in box], np.float32)
    noise = ndimage.gaussian_filter(noise, sigma_mm / scan.spacing, mode="wrap")
    return noise / max(float(noise.std()), 1e-6)


def scan_noise(hu: Float[np.ndarray, "D H W"], body: Bool[np.ndarray, "D H W"]) -> float:
    """Standard deviation of the noise, from neighbours in soft tissue within a slice."""
    tissue = body & (hu > -20) & (hu < 120)
    pairs = tissue[:, :, 2:] & tissue[:, :, :-2]
    if pairs.sum() < 100:
        return 10.0
    difference = (hu[:, :, 2:] - hu[:, :, :-2])[pairs]
    return float(np.clip(1.4826 * np.median(abs(difference)) / np.sqrt(2), 3, 40))


def _fill(
    scan: Scan,
    rng: np.random.Generator,
    box: Box,
    coverage: np.ndarray,
    tissue: Any,
    share: Any,
    size_mm: float,
) -> Painted | None:
    """Paints `share` of `tissue` with the scan's noise, as far as the place is free."""
    coverage = np.where(scan.free[box] & (coverage > 0.01), coverage, 0).astype(np.float32)
    changed = coverage > 0
    if not (coverage >= 0.5).any():
        return None
    old = scan.hu[box]
    noise = scan.noise_hu * smooth_noise(scan, box, rng, 0.45)
    new = old + coverage * share * (tissue + noise - old)
    # What is denser than the tissue (a vessel with contrast, bone) stays, where some air stays.
    new = np.where((np.asarray(share) < 0.7) & (old > tissue), old, new)
    scan.hu[box] = np.where(changed, new, old)
    return Painted(box, coverage, size_mm)


def _place(
    scan: Scan,
    rng: np.random.Generator,
    wanted_mm: float,
    least_mm: float,
    *,
    airy: bool,
    low: bool = False,
) -> tuple[np.ndarray, float] | None:
    """A voxel `wanted_mm` from the border of what is free, or the deepest that is `least_mm` from
    it, and how far it is.

    Args:
        airy: prefer healthy lung; else the place must be soft tissue.
        low: in the lower two thirds and the front half of the organ, where the heart is.
    """
    box = _box_of(scan.free)
    if box is None:
        return None
    step = np.maximum((COARSE_MM / scan.spacing).astype(int), 1)
    picked = tuple(slice(b.start, b.stop, int(s)) for b, s in zip(box, step, strict=True))
    size = step * scan.spacing
    depth = ndimage.distance_transform_edt(np.pad(scan.free[picked], 1), size)
    depth = depth[1:-1, 1:-1, 1:-1] - size.max() / 2
    if depth.max() < least_mm:
        return None
    around = ndimage.gaussian_filter(scan.hu[picked], 4.0 / size)
    good = around < -700 if airy else (around > -40) & (around < 300)
    if not airy:
        depth = np.where(good, depth, -np.inf)
    if low:
        d, h, _ = np.nonzero(depth > 0)
        if len(d):
            where = np.zeros_like(good)
            where[int(np.quantile(d, 0.4)) :, : int(np.quantile(h, 0.6)) + 1] = True
            good &= where
    for allowed in (good, np.ones_like(good)):
        room = min(wanted_mm, float(np.where(allowed, depth, -np.inf).max()))
        if room >= least_mm:
            places = np.argwhere(allowed & (depth >= room))
            index = places[rng.integers(len(places))]
            return index * step + [b.start for b in box], room
    return None


def _clump(rng: np.random.Generator, count: int, reach: float, radii: tuple[float, float]) -> Shape:
    """Balls that overlap, within `reach` mm of the centre; radii are parts of it."""
    sizes = rng.uniform(*radii, count) * reach
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    points = directions * ((reach - sizes) * rng.random(count) ** 0.5)[:, None]
    points[0] = 0
    return _balls(points, sizes, 0.12 * reach)


def _balls(points: np.ndarray, radii: np.ndarray, blend_mm: float) -> Shape:
    """Their union, with rounded grooves between them."""

    def shape(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        total: Any = np.float32(0)
        for (a, b, c), radius in zip(points.astype(np.float32), radii, strict=True):
            distance = np.sqrt((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) - np.float32(radius)
            total = total + np.exp(np.minimum(-distance / blend_mm, 60))
        return -blend_mm * np.log(np.maximum(total, 1e-30))

    return shape


def _bronchi(
    scan: Scan, rng: np.random.Generator, centre: np.ndarray, box: Box, extent: float
) -> np.ndarray:
    """Air in a fan of tubes that leave one point, 0 to 1."""
    index = [np.arange(s.start, s.stop) - c for s, c in zip(box, centre, strict=True)]
    x, y, z = _positions(scan.axes, index)
    root = rng.normal(size=3)
    root *= 0.4 * extent / np.linalg.norm(root)
    air = np.zeros(x.shape, np.float32)
    for _ in range(int(rng.integers(6, 11))):
        heading = -root / np.linalg.norm(root) + 0.55 * rng.normal(size=3)
        heading /= np.linalg.norm(heading)
        radius = rng.uniform(1.0, 1.8)
        a, b, c = x - root[0], y - root[1], z - root[2]
        along = np.clip(a * heading[0] + b * heading[1] + c * heading[2], 0, 0.8 * extent)
        away = np.sqrt(sum((v - along * h) ** 2 for v, h in zip((a, b, c), heading, strict=True)))
        radius = radius * (1 - 0.6 * along / (0.8 * extent))
        # A tube thinner than a voxel darkens it by the part that it fills.
        width = np.maximum(radius, scan.spacing.mean() / 2)
        air = np.maximum(air, np.clip(1.3 - away / width, 0, 1) * np.minimum(radius / width, 1))
    return air


def _positions(axes: np.ndarray, index: list[np.ndarray]) -> list[np.ndarray]:
    """x, y, z in mm, [d, h, w] each, of the grid of three index ranges."""
    d, h, w = np.ix_(*(i.astype(np.float32) for i in index))
    return [
        np.float32(row[0]) * d + np.float32(row[1]) * h + np.float32(row[2]) * w for row in axes
    ]


def _box_of(mask: Shaped[np.ndarray, "d h w"]) -> Box | None:
    boxes = ndimage.find_objects(mask.astype(np.int8))
    return boxes[0] if boxes else None
