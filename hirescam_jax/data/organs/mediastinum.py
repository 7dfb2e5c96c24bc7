"""The tissue between two lungs that are known: heart, great vessels and mediastinum.

All on the small isotropic copy of a scan that `auto_regions` works on.
"""

from typing import Any

import numpy as np
from scipy import ndimage as scipy_ndimage
from scipy.spatial import ConvexHull, QhullError

ndimage: Any = scipy_ndimage  # its stubs call every result a number

STEP = 3.0  # mm, of the small copy
SPACE = ndimage.generate_binary_structure(3, 1)


def tissue_between(hu_DHW: np.ndarray, right: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The tissue between the lungs, in front of the spine, slice by slice.

    Of the convex hull of both lungs it is what lies, row by row, to the left of the right lung
    and to the right of the left one. Where the lungs taper off downwards it widens no more: that
    would be liver and spleen, which come up beneath them.
    """
    between = np.zeros_like(right)
    areas = np.stack([mask.sum((1, 2)) for mask in (right, left)]).astype(float)
    if not areas.any(1).all():
        return between
    share = (areas / areas.max(1, keepdims=True)).min(0)
    widest = int(share.argmax())
    # From the top of the higher lung (0) to the bottom of the shorter one (1).
    top = int(areas.any(0).argmax())
    bottom = min(int(np.nonzero(row)[0][-1]) for row in areas)
    height = (np.arange(len(share)) - top) / max(bottom - top, 1)
    levels = np.nonzero((share >= 0.1) & ((share >= 0.5) | (height < 0.8)))[0]
    columns = np.arange(right.shape[2])
    middles = np.full(len(right), np.nan)
    for d in range(levels[0], levels[-1] + 1):
        if not (right[d].any() and left[d].any()):
            continue
        # Dents narrower than 27 mm are masses or vessels of the lung.
        inner_right = ndimage.grey_closing(np.where(right[d], columns, -1).max(1), 9)
        inner_left = ndimage.grey_opening(np.where(left[d], columns, len(columns)).min(1), 9)
        middles[d] = _middle(right[d], left[d])
        slab = _hull(right[d] | left[d]) & ~right[d] & ~left[d]
        slab &= (columns > inner_right[:, None]) & (columns < inner_left[:, None])
        if d > widest and between[d - 1].any():
            above = between[d - 1]
            tapering = share[d] < 0.8 and height[d] > 0.65
            slab &= above if tapering else ndimage.binary_dilation(above)
        between[d] = slab
    between &= ~_spine(hu_DHW, right | left, middles)
    between = ndimage.binary_opening(between, SPACE)
    return largest(between)


def _middle(right: np.ndarray, left: np.ndarray) -> float:
    """Column halfway between the lungs where they are closest to the spine: their hind half."""
    rows = np.nonzero(right.any(1) & left.any(1))[0]
    if not len(rows):
        return float("nan")
    rows = rows[len(rows) // 2 :]
    columns = np.arange(right.shape[1])
    inner_right = np.where(right[rows], columns, -1).max(1)
    inner_left = np.where(left[rows], columns, right.shape[1]).min(1)
    return float(np.median((inner_right + inner_left) / 2))


def _hull(mask: np.ndarray) -> np.ndarray:
    """Convex hull of a 2D mask, as a mask."""
    points = np.argwhere(mask)
    try:
        planes = ConvexHull(points).equations
    except (QhullError, ValueError):
        return mask
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    inside = np.ones(mask.shape, bool)
    for a, b, c in planes:
        inside &= a * rows + b * columns + c <= 1e-6
    return inside


def _spine(hu_DHW: np.ndarray, lungs: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """Vertebral bodies and all behind their front, from a smooth curve through their fronts.

    A front is the foremost bone in a narrow band behind the middle of the lungs; where the heart
    or the aorta in front shines with contrast, the curve through the other slices holds.
    """
    spine = np.zeros_like(lungs)
    levels, fronts = [], []
    for d in np.nonzero(np.isfinite(middles))[0]:
        rows = np.nonzero(lungs[d].any(1))[0]
        back, length = rows[-1], rows[-1] - rows[0]
        low = int(back - 0.6 * length)
        band = slice(max(int(middles[d] - 3), 0), int(middles[d] + 4))
        bone = (hu_DHW[d, low : back + 1, band] > 160).mean(1) > 0.4
        if bone.any():
            levels.append(d)
            fronts.append(low + int(bone.argmax()))
    if len(levels) < 8:
        return spine
    x, y = np.array(levels, float), np.array(fronts, float)
    x = (x - x.mean()) / max(np.ptp(x), 1)
    keep = np.ones(len(x), bool)
    curve = y
    for _ in range(8):
        curve = np.polyval(np.polyfit(x[keep], y[keep], 2), x)
        keep = (y > curve - 2) & (y < curve + 6)
        if keep.sum() < 8:
            keep = y >= np.median(y)
    rows, columns = np.ogrid[: lungs.shape[1], : lungs.shape[2]]
    radius = 18 / STEP
    centres = ndimage.gaussian_filter1d(_without_gaps(middles), 5, mode="nearest")
    depth = np.interp(np.arange(len(lungs)), levels, curve)
    for d in range(len(lungs)):
        centre = depth[d] + radius - 1
        body = (rows - centre) ** 2 + (columns - centres[d]) ** 2 <= radius**2
        spine[d] = body | (rows > centre)
    return spine


def _without_gaps(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    place = np.arange(len(values))
    return np.interp(place, place[known], values[known])


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask."""
    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces == sizes.argmax()
