"""From a volume to the model's grid, and from the feature grid back to the volume.

The model's grid is [D, H, W] = [superior->inferior, anterior->posterior, right->left] (so patient
right is at w = 0), aligned with the world's axes and centred on the volume. The feature grid
[d, h, w] divides it evenly.
"""

from collections.abc import Sequence

import nibabel
import numpy as np
from jaxtyping import Float, Int16, Shaped
from scipy import ndimage

from hirescam_jax.data.volume import Volume

MODEL_AXES = ("I", "P", "L")  # where the index grows to, along D, H and W
MIN_HU = -1024  # scanners pad their round field of view with -2000 or lower: it is air

# A point on the border belongs to the field of view, whichever way the rounding goes.
BORDER_TOLERANCE = 1e-3


def to_grid(
    volume: Volume, spacing_mm: Sequence[float], shape: Sequence[int]
) -> tuple[Int16[np.ndarray, "D H W"], Float[np.ndarray, "4 4"]]:
    """Brings a CT to the model's grid.

    The same scan gives the same bits in whichever axis order it is stored: it is reoriented
    without loss first, and the grid is laid out from its centre, so that the rounding of the
    file's origin has no say. Then a Gaussian against aliasing where the grid is coarser, and
    linear interpolation, which honours oblique affines.

    Args:
        volume: Hounsfield units.
        spacing_mm: of the grid, along D, H, W.
        shape: of the grid, (D, H, W).

    Returns:
        volume_DHW: Hounsfield units; outside the scan its minimum; nothing below -1024.
        affine: [4, 4] float64, indices of [D, H, W] -> RAS millimetres.
    """
    orientation = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(volume.affine),
        nibabel.orientations.axcodes2ornt(MODEL_AXES),
    )
    voxels_DHW = nibabel.orientations.apply_orientation(volume.voxels, orientation)
    flip_affine = nibabel.orientations.inv_ornt_aff(orientation, volume.voxels.shape)
    # Files keep the axes in float32, some as a quaternion: less than a micrometre is rounding.
    axes = np.round((volume.affine @ flip_affine)[:3, :3], 6)
    grid_axes = np.zeros((3, 3))
    grid_axes[[2, 1, 0], [0, 1, 2]] = -np.asarray(spacing_mm, np.float64)

    factor = np.asarray(spacing_mm) / np.linalg.norm(axes, axis=0)
    # The Gaussian whose width, added to that of a voxel, is that of a cell (both as full width at
    # half maximum; Cardoso et al. 2015).
    sigma = np.sqrt(np.maximum(factor**2 - 1, 0)) / (2 * np.sqrt(2 * np.log(2)))
    values_DHW = np.maximum(voxels_DHW, MIN_HU).astype(np.float32, order="C")
    air = float(values_DHW.min())

    matrix = np.linalg.solve(axes, grid_axes)
    grid_centre = (np.asarray(shape) - 1) / 2
    offset = (np.asarray(voxels_DHW.shape) - 1) / 2 - matrix @ grid_centre
    if _is_aligned(matrix):
        values_DHW = _sample_aligned(values_DHW, matrix, offset, tuple(shape), air, sigma)
    else:
        if sigma.any():
            values_DHW = ndimage.gaussian_filter(values_DHW, sigma, mode="nearest")
        values_DHW = _sample(values_DHW, matrix, offset, tuple(shape), air)

    affine = np.eye(4)
    affine[:3, :3] = grid_axes
    centre = volume.affine @ np.append((np.asarray(volume.voxels.shape) - 1) / 2, 1)
    affine[:3, 3] = centre[:3] - grid_axes @ grid_centre
    return np.rint(np.clip(values_DHW, MIN_HU, 2**15 - 1)).astype(np.int16), affine


def feature_affine(
    grid_affine: Float[np.ndarray, "4 4"], shape: Sequence[int], grid: Sequence[int]
) -> Float[np.ndarray, "4 4"]:
    """The affine of the feature grid, which divides the model's grid evenly.

    Cell c covers the voxels [c * n / m, (c + 1) * n / m) of an axis with n voxels and m cells.

    Args:
        grid_affine: indices of [D, H, W] -> RAS millimetres.
        shape: (D, H, W).
        grid: (d, h, w).

    Returns:
        [4, 4] float64, indices of [d, h, w] (centres of the cells) -> RAS millimetres.
    """
    ratio = np.asarray(shape, np.float64) / np.asarray(grid, np.float64)
    to_voxels = np.diag([*ratio, 1.0])
    to_voxels[:3, 3] = (ratio - 1) / 2
    return grid_affine @ to_voxels


def from_features(
    map_dhw: Float[np.ndarray, "d h w"], affine: Float[np.ndarray, "4 4"], volume: Volume
) -> Float[np.ndarray, "i j k"]:
    """A map on the input's own grid: its value at the place of every voxel's centre.

    Trilinear between the centres of the cells, constant from there to the border of the model's
    field of view, zero outside.

    Args:
        map_dhw: raw signed map on the feature grid.
        affine: of the feature grid (`feature_affine`).
        volume: the input.

    Returns:
        float32, in the shape of `volume.voxels`.
    """
    return resample(map_dhw, affine, volume.affine, volume.voxels.shape)


def resample(
    values: Shaped[np.ndarray, "a b c"],
    values_affine: Float[np.ndarray, "4 4"],
    affine: Float[np.ndarray, "4 4"],
    shape: tuple[int, ...],
    outside: float = 0.0,
) -> Float[np.ndarray, "i j k"]:
    """Linear interpolation of one grid at the points of another; both affines lead to millimetres.

    Every cell reaches half a cell beyond its centre; further away the result is `outside`.

    Returns:
        float32 [i, j, k] = `shape`.
    """
    index_map = np.linalg.solve(values_affine, affine)
    return _sample(values, index_map[:3, :3], index_map[:3, 3], shape, outside)


def _sample(
    values: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, ...],
    outside: float,
) -> np.ndarray:
    """values at matrix @ index + offset for every index of `shape`; see `resample`."""
    if _is_aligned(matrix):
        return _sample_aligned(values, matrix, offset, shape, outside)
    out = ndimage.affine_transform(
        values,
        matrix,
        offset,  # pyright: ignore[reportArgumentType]  (scipy's stub knows only a number)
        shape,
        np.float32,
        order=1,
        mode="nearest",
    )
    # Slab by slab, since the coordinates of an oblique grid are three numbers a voxel.
    for start in range(0, shape[0], 16):
        slab = out[start : start + 16]
        index = np.ogrid[start : start + len(slab), : shape[1], : shape[2]]
        inside = np.ones((1, 1, 1), bool)
        for row, shift, size in zip(matrix, offset, values.shape, strict=True):
            position = shift + sum(m * i for m, i in zip(row, index, strict=True) if m != 0)
            inside = inside & (position >= -0.5 - BORDER_TOLERANCE)
            inside = inside & (position <= size - 0.5 + BORDER_TOLERANCE)
        np.copyto(slab, np.float32(outside), where=~inside)
    return out


def _is_aligned(matrix: np.ndarray) -> bool:
    """Whether each axis of the values runs along one of the grid."""
    return all((np.count_nonzero(matrix, axis=axis) == 1).all() for axis in (0, 1))


def _sample_aligned(
    values: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, ...],
    outside: float,
    sigma: np.ndarray | None = None,
) -> np.ndarray:
    """`_sample` axis by axis, of the values after a Gaussian of `sigma` voxels if it is given."""
    order = [int(np.flatnonzero(matrix[:, axis])[0]) for axis in range(3)]
    values = values.transpose(order)
    lows, weights, outer = [], [], []
    for axis, (row, size) in enumerate(zip(order, shape, strict=True)):
        last = values.shape[axis] - 1
        position = offset[row] + matrix[row, axis] * np.arange(size)
        edge = 0.5 + BORDER_TOLERANCE
        outer.append((position < -edge) | (position > last + edge))
        position = np.clip(position, 0, last)
        lows.append(np.minimum(position.astype(np.intp), max(last - 1, 0)))
        weights.append((position - lows[-1]).astype(np.float32))
    for axis in sorted(range(3), key=lambda axis: shape[axis] / values.shape[axis]):
        kernel = _gaussian(0.0 if sigma is None else sigma[order[axis]])
        if len(kernel) > 1:  # at the points of the grid only
            operator = _smoothing(kernel, lows[axis], weights[axis], values.shape[axis])
            values = _along(operator, values, axis)
            lows[axis], weights[axis] = np.arange(shape[axis]), np.zeros(shape[axis], np.float32)
    out = np.empty(shape, np.float32)
    slabs = 8  # slices at a time stay in the cache
    for start in range(0, shape[0], slabs):
        slab, part = values, slice(start, start + slabs)
        for axis in range(3):
            here = part if axis == 0 else slice(None)
            slab = _blend(slab, lows[axis][here], weights[axis][here], axis)
        out[part] = slab
    for axis, beyond in enumerate(outer):
        np.moveaxis(out, axis, 0)[beyond] = outside
    return out


def _gaussian(sigma: float) -> np.ndarray:
    """Weights of a Gaussian, cut off at four sigma, as `ndimage.gaussian_filter` has them."""
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (sigma or 1.0)) ** 2)
    return kernel / kernel.sum()


def _smoothing(kernel: np.ndarray, low: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """float32 [points, size]: the kernel, then linear interpolation; the border goes on."""
    operator = np.zeros((len(low), size))
    rows = np.arange(len(low))
    radius = len(kernel) // 2
    for step, share in enumerate(kernel, start=-radius):
        for neighbour, part in ((low, 1.0 - weight), (low + 1, weight)):
            operator[rows, np.clip(neighbour + step, 0, size - 1)] += share * part
    return operator.astype(np.float32)


def _along(operator: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    """The operator [m, n] applied to an axis of n values."""
    if axis == 2:
        return values @ operator.T
    if axis == 1:
        return operator @ values
    return np.tensordot(operator, values, axes=1)


def _blend(values: np.ndarray, low: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """(1 - weight) * values[low] + weight * values[low + 1] along an axis, float32."""
    first = values.take(low, axis).astype(np.float32, copy=False)
    if weight.any():
        step = values.take(low + 1, axis) - first
        step *= weight.reshape([-1 if a == axis else 1 for a in range(3)])
        first += step
    return first
