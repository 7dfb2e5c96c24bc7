"""Label maps and masks of organs, brought to the grid of a volume."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8

from hirescam_jax.data.volume import Volume, read_nifti
from hirescam_jax.errors import UserError

# A label map on another grid must hold at least this share of the CT's voxel centres.
MIN_COVERAGE = 0.5

# Positions closer to a border between two voxels than this are on it: affines are rounded.
_TIE = 1e-4


def read_label_map(path: Path) -> Volume:
    """Reads a label map: whole numbers of 0 and above, whatever type they are stored in.

    Raises:
        UserError: as `read_nifti`; also for other numbers.
    """
    volume = read_nifti(path)
    voxels = volume.voxels
    low, high = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iu" or bool((voxels == np.rint(voxels)).all())
    if low < 0 or high > 65535 or not whole:
        raise UserError(
            f"{path}: values {low:g} to {high:g} are no label map, which has whole numbers from 0 "
            "up: is this the CT, or a map of probabilities?"
        )
    small = voxels.astype(np.uint8 if high < 256 else np.uint16, copy=False)
    return dataclasses.replace(volume, voxels=small)


def masks_to_grid(
    masks: Bool[np.ndarray, "R i j k"] | Integer[np.ndarray, "R i j k"],
    affine: Float[np.ndarray, "4 4"],
    grid_affine: Float[np.ndarray, "4 4"],
    shape: Sequence[int],
) -> UInt8[np.ndarray, "R D H W"]:
    """Brings masks to another grid: every cell takes the voxel that its centre lies in.

    Args:
        masks: bool or {0, 1}, on the grid of `affine`.
        affine: their indices -> RAS millimetres.
        grid_affine: indices of the other grid -> RAS millimetres.
        shape: of the other grid.

    Returns:
        uint8; 0 outside the masks' own grid.
    """
    out = np.empty((len(masks), *shape), np.uint8)
    for r, mask in enumerate(masks):
        out[r] = nearest(mask, affine, grid_affine, shape)
    return out


def nearest(
    values: Shaped[np.ndarray, "a b c"],
    affine: Float[np.ndarray, "4 4"],
    grid_affine: Float[np.ndarray, "4 4"],
    shape: Sequence[int],
) -> Shaped[np.ndarray, "i j k"]:
    """The value of the voxel in which each cell's centre lies, 0 outside; the dtype is kept.

    A centre on the border between two voxels belongs to the one with the lower index in the
    other grid, so that the same scan stored the other way round gives the same.
    """
    index_map = np.linalg.solve(affine, grid_affine)
    matrix, offset = index_map[:3, :3], index_map[:3, 3]
    # Less than a hundredth of a voxel from one end of the grid to the other is rounding.
    matrix = np.where(abs(matrix) * np.asarray(shape) < 1e-2, 0, matrix)
    size = values.shape
    out = np.zeros(tuple(shape), values.dtype)
    if (np.count_nonzero(matrix, axis=1) == 1).all() and (np.count_nonzero(matrix, 0) == 1).all():
        order = abs(matrix).argmax(1)  # the axis of the grid along which each axis of values runs
        targets, sources = [slice(0)] * 3, []
        for axis, along in enumerate(order):
            position = matrix[axis, along] * np.arange(shape[along]) + offset[axis]
            index, inside = _voxel(position, matrix[axis], size[axis])
            kept = np.nonzero(inside)[0]
            if not len(kept):
                return out
            targets[along] = slice(int(kept[0]), int(kept[-1]) + 1)
            sources.append(index[kept])
        picked = values
        for axis, source in enumerate(sources):
            picked = _take(picked, source, axis)
        out[tuple(targets)] = picked.transpose(np.argsort(order))
        return out
    for start in range(0, shape[0], 8):  # slab by slab: the coordinates are three numbers a voxel
        stop = min(start + 8, shape[0])
        grid = np.ogrid[start:stop, : shape[1], : shape[2]]
        where, all_inside = [], np.ones((1, 1, 1), bool)
        for row, shift, n in zip(matrix, offset, size, strict=True):
            position = shift + sum(m * g for m, g in zip(row, grid, strict=True))
            index, inside = _voxel(position, row, n)
            where.append(index)
            all_inside = all_inside & inside
        out[start:stop] = np.where(all_inside, values[tuple(where)], 0)
    return out


def _voxel(position: np.ndarray, row: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the voxel at a position along one axis, and whether it is inside."""
    sign = np.sign(row[abs(row).argmax()])
    index = np.floor(position + 0.5 - _TIE * sign).astype(np.intp)
    inside = (position >= -0.5 - 10 * _TIE) & (position <= size - 0.5 + 10 * _TIE)
    return np.clip(index, 0, size - 1), inside


def _take(values: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """`values.take`, as a view where the index is a plain run."""
    step = np.diff(index)
    if len(index) > 1 and step[0] in (1, -1) and (step == step[0]).all():
        end = int(index[-1] + step[0])
        run = slice(int(index[0]), None if end < 0 else end, int(step[0]))
        return values[(slice(None),) * axis + (run,)]
    return values.take(index, axis)


def _on_grid(labels: Volume, volume: Volume) -> np.ndarray:
    """A label map on the CT's grid.

    Raises:
        UserError: it lies elsewhere.
    """
    shape = volume.voxels.shape
    if labels.voxels.shape == shape and np.allclose(labels.affine, volume.affine, atol=1e-3):
        return labels.voxels
    index = np.meshgrid(*(np.linspace(0, n - 1, 24) for n in shape), indexing="ij")
    points = np.stack([*(i.ravel() for i in index), np.ones(index[0].size)])
    position = (np.linalg.solve(labels.affine, volume.affine) @ points)[:3].T
    inside = (position >= -0.5 - _TIE) & (position <= np.array(labels.voxels.shape) - 0.5 + _TIE)
    covered = float(inside.all(1).mean())
    if covered < MIN_COVERAGE:
        raise UserError(
            f"{labels.path}: covers {covered:.0%} of the CT {volume.path}, expected at least "
            f"{MIN_COVERAGE:.0%}: is it of another scan, or its affine lost?"
        )
    return nearest(labels.voxels, labels.affine, volume.affine, shape)
