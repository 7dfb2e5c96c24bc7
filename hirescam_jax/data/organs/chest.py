"""Lungs and mediastinum from the CT alone: thresholds and morphology, no training, no weights.

What is said of sizes and places below is in millimetres, on a small isotropic copy of the scan in
the model's axes [D, H, W] (down, back, to the patient's left). The same scan therefore gives the
same masks in whichever order its voxels are stored, and left and right come from the affine.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int16
from scipy import ndimage as scipy_ndimage

from hirescam_jax.data.grid import resample, to_grid
from hirescam_jax.data.organs.mediastinum import SPACE, STEP, largest, tissue_between
from hirescam_jax.data.volume import Volume

ndimage: Any = scipy_ndimage  # its stubs call every result a number

CHEST_REGIONS = ("right_lung", "left_lung", "heart_mediastinum")

AIR_HU = -400  # below it is lung, airway, gas or the air around
# Litres. Wide enough for a collapsed lung beside an emphysematous one; a lung base is below.
LUNG_LITRES = (0.3, 6.5)
MEDIASTINUM_LITRES = (0.1, 4.0)
MIN_LUNG_RATIO = 0.12
LUNG_HU = (-970.0, -400.0)  # mean; bowel gas is below, what is mostly tissue above

# In the plane of a slice, and in space.
_PLANE = np.zeros((3, 3, 3), bool)
_PLANE[1] = ndimage.generate_binary_structure(2, 1)
_WIDE_PLANE = np.zeros((3, 3, 3), bool)
_WIDE_PLANE[1] = True


@dataclasses.dataclass(frozen=True, eq=False)
class ChestMasks:
    """What `segment_chest` found.

    masks: [3, i, j, k] in the order of CHEST_REGIONS, on the volume's own grid, disjoint unless
        they are the fallback.
    litres: of right lung, left lung and mediastinum, as segmented.
    quality: None, or why the segmentation was not usable.
    fallback: the masks are the coarse boxes of `coarse_regions`.
    """

    masks: Bool[np.ndarray, "R i j k"]
    litres: tuple[float, float, float]
    quality: str | None

    @property
    def fallback(self) -> bool:
        return self.quality is not None


def segment_chest(volume: Volume) -> ChestMasks:
    """Finds both lungs and the tissue between them, checks them, or falls back to boxes.

    Airways and hilar vessels count as mediastinum up to the bend of the lung's inner surface.
    Nodules, vessels and cavities inside a lung belong to it, and so do dents up to 40 mm wide at
    the chest wall; a large effusion or consolidation along the wall looks like the wall itself
    and is left out. Label maps do better there.

    Args:
        volume: a CT in Hounsfield units, of any orientation and spacing.
    """
    extent = _extent_mm(volume)
    shape = tuple(int(n) for n in np.maximum(np.ceil(extent / STEP - 1e-6), 1))
    hu_DHW, affine = to_grid(volume, (STEP,) * 3, shape)
    masks_DHW, problem = _segment(hu_DHW)
    litres = [float(mask.sum()) * STEP**3 / 1e6 for mask in masks_DHW]
    problem = problem or _check(hu_DHW, masks_DHW, litres)
    if problem is None:
        size = volume.voxels.shape
        # Disjoint masks stay disjoint: of weights that sum to 1 at most one is above a half.
        masks = np.stack([_enlarge(mask, affine, volume, size) for mask in masks_DHW])
    else:
        masks = coarse_regions(volume)
    return ChestMasks(masks, (litres[0], litres[1], litres[2]), problem)


def coarse_regions(volume: Volume) -> Bool[np.ndarray, "R i j k"]:
    """The paper's stand-in for a segmentation that is not usable, in the order of CHEST_REGIONS:
    the patient's right half of the volume, the left half, and the middle two thirds, by the
    affine, whichever way the voxels are stored."""
    shape = volume.voxels.shape
    centre = volume.affine[:3, :3] @ ((np.array(shape) - 1) / 2)  # origin left out: it cancels
    index = np.ogrid[: shape[0], : shape[1], : shape[2]]
    row = np.where(abs(volume.affine[0, :3]) > 1e-6, volume.affine[0, :3], 0)
    x = sum(a * i for a, i in zip(row, index, strict=True)) - centre[0]
    half = _extent_mm(volume)[2] / 2
    masks = np.empty((3, *shape), bool)
    masks[0], masks[1], masks[2] = x >= 0, x < 0, abs(x) <= half * 2 / 3
    return masks


def _extent_mm(volume: Volume) -> Float[np.ndarray, "3"]:
    """Edges of the box along the world's axes that holds the volume, along D, H, W."""
    return (abs(volume.affine[:3, :3]) @ np.array(volume.voxels.shape))[::-1]


def _enlarge(
    mask_DHW: np.ndarray, affine: np.ndarray, volume: Volume, shape: tuple[int, ...]
) -> Bool[np.ndarray, "i j k"]:
    return resample(mask_DHW.astype(np.float32), affine, volume.affine, shape) > 0.5


def _check(hu_DHW: np.ndarray, masks: list[np.ndarray], litres: list[float]) -> str | None:
    for name, mask, found in zip(CHEST_REGIONS[:2], masks, litres, strict=False):
        low, high = LUNG_LITRES
        if not low <= found <= high:
            return f"{name} has {found:.2f} l, expected {low:g} to {high:g}"
        mean = float(hu_DHW[mask].mean())
        if not LUNG_HU[0] <= mean <= LUNG_HU[1]:
            return f"{name} has {mean:.0f} HU on average, expected {LUNG_HU[0]:g} to {LUNG_HU[1]:g}"
    if min(litres[:2]) < MIN_LUNG_RATIO * max(litres[:2]):
        return f"lungs of {litres[0]:.2f} and {litres[1]:.2f} l are too unequal"
    low, high = MEDIASTINUM_LITRES
    if not low <= litres[2] <= high:
        return f"heart_mediastinum has {litres[2]:.2f} l, expected {low:g} to {high:g}"
    return None


def _segment(hu_DHW: Int16[np.ndarray, "D H W"]) -> tuple[list[np.ndarray], str | None]:
    """Right lung, left lung, mediastinum on the small grid, and why not, if not."""
    nothing = [np.zeros(hu_DHW.shape, bool)] * 3
    body = _body(hu_DHW)
    if body.sum() * STEP**3 < 2e6:
        return nothing, "no body of at least 2 l in the scan"
    airway = ndimage.binary_dilation(_airway(hu_DHW, body), SPACE)
    air = body & (hu_DHW < AIR_HU) & ~airway
    sides = _two_lungs(hu_DHW, air, body)
    if sides is None:
        return nothing, "the two lungs were not found"
    right, left = (_fill(_close(side, 9.0) & body & ~airway) for side in sides)
    left &= ~right
    between = tissue_between(hu_DHW, right, left)
    # Masses and consolidations at the chest wall, which leave a wide dent in the lung.
    allowed = body & ~between & ~airway & (hu_DHW < 200)
    wide_right = _fill(right | (_close(right, 20.0) & allowed & ~left))
    wide_left = _fill(left | (_close(left, 20.0) & allowed & ~wide_right))
    wide_left &= ~wide_right
    between |= airway & body & between.any((1, 2), keepdims=True)
    return [wide_right, wide_left, between & ~wide_right & ~wide_left], None


def _body(hu_DHW: np.ndarray) -> np.ndarray:
    """The trunk with all the air in it: the largest piece, without table and clothes, its holes
    filled slice by slice (air that reaches the border of a slice is outside)."""
    trunk = largest(ndimage.binary_opening(hu_DHW > -300, _WIDE_PLANE))
    # What opening took from the trunk comes back: a chest wall may be thinner than two cells.
    trunk |= (hu_DHW > -500) & ndimage.binary_dilation(trunk, _WIDE_PLANE, iterations=2)
    outside, count = ndimage.label(~trunk, _PLANE)
    at_border = np.zeros(count + 1, bool)
    for edge in (outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]):
        at_border[np.unique(edge)] = True
    at_border[0] = False
    return ~at_border[outside]


def _airway(hu_DHW: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Trachea and main bronchi: a dark disc near the middle of the neck or upper chest, followed
    down for as long as it stays narrow."""
    gas = body & (hu_DHW < -700)
    airway = np.zeros_like(body)
    middle = float(np.median(np.nonzero(body)[2]))
    cell = STEP**2
    tracked: np.ndarray | None = None
    areas: list[float] = []
    for d in range(len(gas)):
        if tracked is None:
            if d * STEP > 150:
                break
            tracked = _tracheal_disc(gas[d], hu_DHW[d], middle)
        else:
            reach = ndimage.binary_dilation(tracked, np.ones((3, 3), bool)) & body[d]
            limit = max(1.8 * float(np.median(areas)), 350.0)
            for wall in (-880, -920, -950):  # stricter where it leaks into the lung
                grown = reach & (hu_DHW[d] < wall)
                area = float(grown.sum()) * cell
                if area <= limit:
                    break
            if area > limit or area < 2 * cell:
                if len(areas) * STEP > 30:
                    break
                tracked = None  # it was no trachea
                airway[:] = False
                areas.clear()
                continue
            tracked = grown
        if tracked is not None:
            airway[d] = tracked
            areas.append(float(tracked.sum()) * cell)
    return airway if len(areas) * STEP > 30 else np.zeros_like(body)


def _tracheal_disc(gas: np.ndarray, hu: np.ndarray, middle: float) -> np.ndarray | None:
    pieces, count = ndimage.label(gas)
    best, best_distance = None, 45.0 / STEP
    for number in range(1, count + 1):
        piece = pieces == number
        area = float(piece.sum()) * STEP**2
        rows, columns = np.nonzero(piece)
        width = max(np.ptp(rows), np.ptp(columns)) + 1
        distance = abs(float(columns.mean()) - middle)
        round_enough = piece.sum() > 0.45 * width**2
        dark = float(hu[piece].min()) < -850
        if 50 <= area <= 700 and round_enough and dark and distance < best_distance:
            best, best_distance = piece, distance
    return best


def _two_lungs(
    hu_DHW: np.ndarray, air: np.ndarray, body: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Parts the air of the chest into right and left lung.

    Lungs that touch (the junction lines are thinner than a voxel) are cut by a stricter
    threshold and erosion until two large pieces stay, one on each side of the body; these flood
    what was taken away, so that the cut follows the brightest way between them.
    """
    depth = ndimage.distance_transform_edt(air) * STEP if air.any() else air
    for threshold, erosion_mm in (
        (-400, 0),
        (-500, 0),
        (-600, 0),
        (-500, 4),
        (-500, 7),
        (-400, 12),
    ):
        core = air & (hu_DHW < threshold) & (depth > erosion_mm)
        pair = _opposite_pieces(core, body)
        if pair is not None:
            return _grow(hu_DHW, air, depth, *pair)
    return None


def _opposite_pieces(core: np.ndarray, body: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The two largest pieces, right first, if they are large and on opposite sides of the body."""
    pieces, count = ndimage.label(core)
    if count < 2:
        return None
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    first = int(sizes.argmax())
    where = ndimage.find_objects(pieces)
    for second in np.argsort(-sizes, kind="stable")[1:4]:
        if sizes[second] * STEP**3 < 1e5 or sizes[second] < 0.05 * sizes[first]:
            return None
        centres = [
            np.array(ndimage.center_of_mass(pieces[where[n - 1]] == n))
            + [s.start for s in where[n - 1]]
            for n in (first, int(second))
        ]
        levels = slice(int(min(c[0] for c in centres)), int(max(c[0] for c in centres)) + 1)
        middle = float(np.nonzero(body[levels])[2].mean())
        right, left = sorted((0, 1), key=lambda n: centres[n][2])
        apart = (centres[left][2] - centres[right][2]) * STEP
        if apart > 50 and centres[right][2] < middle < centres[left][2]:
            numbers = (first, int(second))
            return pieces == numbers[right], pieces == numbers[left]
    return None


def _grow(
    hu_DHW: np.ndarray, air: np.ndarray, depth: np.ndarray, right: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gives the rest of the air that is joined to one of the two pieces to the nearer one, and
    further pieces of lung (a lobe cut off by a consolidation) to their side."""
    whole = air.copy()
    rest = whole & ~right & ~left
    if rest.any():
        box = ndimage.find_objects(whole.astype(np.int8))[0]
        # Bright and shallow places are flooded last: there the waters meet.
        height = np.clip((hu_DHW[box].astype(np.int32) + 1024) // 6, 0, 170)
        height = height + np.clip(80 - 6 * depth[box], 0, 80).astype(np.int32)
        markers = np.zeros(height.shape, np.int8)
        markers[right[box]], markers[left[box]], markers[~whole[box]] = 1, 2, -1
        flooded = ndimage.watershed_ift(height.astype(np.uint8), markers, SPACE)
        pieces, count = ndimage.label(whole[box])
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        joined = np.zeros(count + 1, bool)
        joined[np.unique(pieces[right[box] | left[box]])] = True
        # Not joined: kept if large and no mere gas, which is what the bowel holds.
        means = ndimage.mean(hu_DHW[box], pieces, np.arange(count + 1))
        lobes = (sizes * STEP**3 > 2e4) & (np.asarray(means) > -930)
        joined[1:] |= lobes[1:] & _between_levels(pieces, count, right[box] | left[box])
        keep = joined[pieces] & whole[box]
        loose = keep & (flooded != 1) & (flooded != 2)
        flooded[loose] = _nearer(right[box], left[box])[loose]
        right, left = np.zeros_like(air), np.zeros_like(air)
        right[box], left[box] = keep & (flooded == 1), keep & (flooded == 2)
    return right, left


def _between_levels(pieces: np.ndarray, count: int, lungs: np.ndarray) -> np.ndarray:
    """Per piece, whether its middle lies between the top and three quarters down the lungs."""
    levels = np.nonzero(lungs.any((1, 2)))[0]
    low = levels[0] + 0.75 * (levels[-1] - levels[0])
    centres = ndimage.center_of_mass(np.ones_like(pieces), pieces, np.arange(1, count + 1))
    return np.array([centre[0] < low for centre in centres], bool)


def _nearer(right: np.ndarray, left: np.ndarray) -> np.ndarray:
    far = ndimage.distance_transform_edt(~right) > ndimage.distance_transform_edt(~left)
    return np.where(far, 2, 1).astype(np.int8)


def _close(mask: np.ndarray, radius_mm: float) -> np.ndarray:
    """Closing by a ball: fills vessels, nodules and clefts narrower than its diameter."""
    radius = radius_mm / STEP
    pad = int(np.ceil(radius)) + 1
    box = ndimage.find_objects(mask.astype(np.int8))
    if not box:
        return mask
    inner = np.pad(mask[box[0]], pad)
    grown = ndimage.distance_transform_edt(~inner) <= radius
    closed = ndimage.distance_transform_edt(grown) > radius
    out = mask.copy()
    out[box[0]] |= closed[pad:-pad, pad:-pad, pad:-pad]
    return out


def _fill(mask: np.ndarray) -> np.ndarray:
    """Fills what is enclosed within a slice, and drops specks."""
    background, count = ndimage.label(~np.pad(mask, ((0, 0), (1, 1), (1, 1))), _PLANE)
    open_air = np.zeros(count + 1, bool)
    open_air[np.unique(background[:, 0])] = True
    filled = ~open_air[background][:, 1:-1, 1:-1]
    filled |= mask
    pieces, count = ndimage.label(filled)
    keep = np.bincount(pieces.ravel()) * STEP**3 > 5e3
    keep[0] = False
    return keep[pieces]
