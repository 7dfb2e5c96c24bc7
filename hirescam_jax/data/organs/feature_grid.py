"""Organ masks on the feature grid."""

from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt8
from scipy import ndimage

Method = Literal["nearest", "area", "trilinear"]


def to_feature_grid(
    masks: Integer[np.ndarray, "R D H W"] | np.ndarray,
    grid: tuple[int, int, int],
    method: Method = "nearest",
    dilate: bool = False,
) -> UInt8[np.ndarray, "R d h w"]:
    """Brings region masks to the feature grid (arXiv 2111.12215).

    Args:
        masks: bool or {0, 1}.
        grid: (d, h, w).
        method: "nearest" takes the voxel floor(i * in / out), the paper's choice; "area" marks a
            cell that any masked voxel touches; "trilinear" one whose interpolated value at the
            cell's centre is not 0.
        dilate: afterwards grow the small mask by one cell in all 26 directions.
    """
    masks = np.asarray(masks)
    if method == "nearest":
        index = [
            np.arange(out) * size // out for size, out in zip(masks.shape[1:], grid, strict=True)
        ]
        small = masks[:, index[0][:, None, None], index[1][:, None], index[2]] != 0
    else:
        weights = _area_weights if method == "area" else _linear_weights
        small = masks.astype(np.float32)
        for axis, out in enumerate(grid, start=1):
            matrix = weights(masks.shape[axis], out)
            small = np.moveaxis(np.tensordot(matrix, small, (1, axis)), 0, axis)
        small = small > 0
    if dilate:
        small = ndimage.binary_dilation(small, np.ones((1, 3, 3, 3), bool))
    return small.astype(np.uint8)


def _area_weights(size: int, out: int) -> np.ndarray:
    """Row i marks the voxels floor(i * in / out) to ceil((i + 1) * in / out) of cell i."""
    cell, voxel = np.arange(out)[:, None], np.arange(size)
    inside = (voxel >= cell * size // out) & (voxel < -(-(cell + 1) * size // out))
    return inside.astype(np.float32)


def _linear_weights(size: int, out: int) -> np.ndarray:
    """Linear interpolation at the cells' centres, (i + 1/2) * in / out - 1/2, edges held."""
    centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)[:, None]
    return np.maximum(0, 1 - np.abs(centre - np.arange(size))).astype(np.float32)
