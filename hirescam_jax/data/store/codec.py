"""One volume as the bytes of one record, and back, at the speed of memory.

Voxels are kept without loss by Blosc (bits of equal weight side by side, then LZ4): of what was
tried on chest CTs at 0.8 mm it is the smallest that one core decodes at more than 2 GB/s. A few
slices at a time make a frame that decodes alone, so that part of a volume costs its part of the
time. A region mask is one bit a voxel inside its bounding box, so that bringing it to the feature
grid touches a few megabytes.

    record = magic, length of the header, header (JSON), findings, masks of the regions, frames
"""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int16, Shaped, UInt8
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]

from hirescam_jax.data.organs.feature_grid import Method, to_feature_grid

# One thread a call: the pipeline has its own, and the bytes do not depend on who finished first.
blosc.use_threads = False

MAGIC = b"HIRESCAM"
LEVEL = 9
MAX_BYTES = 2**31 - 2**16  # of one array, by Blosc
FRAME_BYTES = 2**20  # of voxels, at least: smaller frames decode more slowly
_BLOSC_HEADER = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One prepared volume.

    volume: Hounsfield units on the model's grid.
    findings: 1 where label k was found in region r.
    masks: of the regions, on the model's grid.
    affine: indices of [D, H, W] -> RAS millimetres.
    source: where it came from: `path`, `shape` and `affine` of the scan, and what else is known.
    """

    id: str
    patient: str
    volume: Int16[np.ndarray, "D H W"]
    findings: UInt8[np.ndarray, "K R"]
    masks: Bool[np.ndarray, "R D H W"] | UInt8[np.ndarray, "R D H W"]
    affine: Float[np.ndarray, "4 4"]
    source: dict[str, Any]


def encode(record: Record) -> bytes:
    """The bytes of a record: the same for the same content."""
    boxes, masks = [], []
    for mask in record.masks:
        box = _bounding_box(mask != 0)
        packed = np.packbits(mask[box] != 0, axis=2)
        boxes.append([[s.start, s.stop] for s in box])
        masks.append(_compress(packed, blosc.NOSHUFFLE) if packed.size else b"")
    volume = np.ascontiguousarray(record.volume)
    step = -(-FRAME_BYTES // volume[:1].nbytes) if volume.size else 1
    frames = [
        _compress(volume[start : start + step], blosc.BITSHUFFLE)
        for start in range(0, len(volume), step)
    ]
    header = {
        "id": record.id,
        "patient": record.patient,
        "shape": list(record.volume.shape),
        "findings": list(record.findings.shape),
        "boxes": boxes,
        "mask_bytes": [len(mask) for mask in masks],
        "frame_slices": step,
        "frame_bytes": [len(frame) for frame in frames],
        "affine": record.affine.tolist(),
        "source": record.source,
    }
    text = json.dumps(header, sort_keys=True).encode()
    findings = np.ascontiguousarray(record.findings).tobytes()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, findings, *masks, *frames])


class Encoded:
    """The bytes of a record, taken apart; voxels and masks are decoded when asked for.

    Raises:
        ValueError, EOFError: bytes that are no record, or whose lengths do not fit together.
    """

    def __init__(self, data: Any):
        view = memoryview(data).cast("B")
        self.header, self.findings, end = read_head(view)
        self.shape: tuple[int, ...] = tuple(self.header["shape"])
        parts = []
        for size in [*self.header["mask_bytes"], *self.header["frame_bytes"]]:
            parts.append(view[end : end + size])
            end += size
        if end != len(view):
            raise ValueError("its length is not the sum of its parts'")
        count = len(self.header["mask_bytes"])
        self._masks, self._frames = parts[:count], parts[count:]
        self._step: int = self.header["frame_slices"]
        if len(self._frames) != -(-self.shape[0] // self._step):
            raise ValueError("its frames do not make its volume")

    @property
    def id(self) -> str:
        return self.header["id"]

    @property
    def affine(self) -> Float[np.ndarray, "4 4"]:
        return np.array(self.header["affine"], np.float64)

    def volume(
        self, out: np.ndarray | None = None, slices: slice = slice(None)
    ) -> Int16[np.ndarray, "D H W"]:
        """The voxels of some neighbouring `slices`, decoded into `out` where one is given.

        Raises:
            ValueError: `out` is of another shape or type, or the frames are damaged.
        """
        start, stop, _ = slices.indices(self.shape[0])
        shape = (max(stop - start, 0), *self.shape[1:])
        out = np.empty(shape, np.int16) if out is None else out
        if out.shape != shape or out.dtype != np.int16 or not out.flags.c_contiguous:
            raise ValueError(f"out must be int16 {shape}, not {out.dtype} {out.shape}")
        for begin in range(start - start % self._step, stop, self._step):
            end = min(begin + self._step, self.shape[0])
            frame = self._frames[begin // self._step]
            if start <= begin and end <= stop:
                _decompress(frame, out[begin - start : end - start])
            else:  # begins or ends outside of what is wanted
                whole = _decompress(frame, np.empty((end - begin, *shape[1:]), np.int16))
                first, last = max(begin, start), min(end, stop)
                out[first - start : last - start] = whole[first - begin : last - begin]
        return out

    def masks(self) -> UInt8[np.ndarray, "R D H W"]:
        """The masks of all regions on the grid of the volume."""
        out = np.zeros((len(self._masks), *self.shape), np.uint8)
        for mask, box, packed in zip(out, self.header["boxes"], self._masks, strict=True):
            if packed:
                mask[tuple(slice(*s) for s in box)] = _unpack(self._packed(box, packed), box)
        return out

    def regions(
        self, grid: tuple[int, int, int], method: Method = "nearest", dilate: bool = False
    ) -> UInt8[np.ndarray, "R d h w"]:
        """`to_feature_grid` of the masks, without unpacking them."""
        small = np.zeros((len(self._masks), *grid), np.uint8)
        touched = [_touched(n, cells, method) for n, cells in zip(self.shape, grid, strict=True)]
        for mask, box, packed in zip(small, self.header["boxes"], self._masks, strict=True):
            if packed:
                mask[...] = _sample(self._packed(box, packed), box, touched)
        return to_feature_grid(small, grid, dilate=True) if dilate else small

    def _packed(self, box: list[list[int]], data: memoryview) -> UInt8[np.ndarray, "a b c"]:
        d, h, w = (stop - start for start, stop in box)
        return _decompress(data, np.empty((d, h, -(-w // 8)), np.uint8))


def read_head(data: Any) -> tuple[dict[str, Any], UInt8[np.ndarray, "K R"], int]:
    """Header, findings and the length of both, from the first bytes of a record.

    Raises:
        EOFError: they are too few.
        ValueError: they are not of a record.
    """
    view = memoryview(data)
    start = len(MAGIC) + 4
    if view[: len(MAGIC)] != MAGIC:
        raise ValueError("no record of a prepared volume")
    end = start + int.from_bytes(view[len(MAGIC) : start], "little")
    if end > len(view):
        raise EOFError
    header = json.loads(bytes(view[start:end]))
    size = int(np.prod(header["findings"]))
    if end + size > len(view):
        raise EOFError
    findings = np.frombuffer(view[end : end + size], np.uint8).reshape(header["findings"])
    return header, findings.copy(), end + size


def _sample(
    packed: UInt8[np.ndarray, "a b c"],
    box: list[list[int]],
    touched: list[Bool[np.ndarray, "_ _"]],
) -> Bool[np.ndarray, "d h w"]:
    """Which cells touch a voxel of the mask: axis by axis, the last one last, eight at a time."""
    rows = [t[:, start:stop] for t, (start, stop) in zip(touched, box, strict=True)]
    for axis in (0, 1):
        packed = np.moveaxis(_union(np.moveaxis(packed, axis, 0), rows[axis]), 0, axis)
    inside = _unpack(packed, box).astype(np.float32) @ rows[2].T.astype(np.float32)
    return inside > 0


def _union(
    bits: UInt8[np.ndarray, "n _ _"], rows: Bool[np.ndarray, "m n"]
) -> UInt8[np.ndarray, "m _ _"]:
    """Row by row the union of the slices that the row marks."""
    out = np.zeros((len(rows), *bits.shape[1:]), np.uint8)
    # The k-th slice of every row at once: rows mark one or two slices, or a handful.
    for k in range(int(rows.sum(axis=1).max(initial=0))):
        cells = np.flatnonzero(rows.sum(axis=1) > k)
        slices = rows[cells].argmax(axis=1) + k  # the slices of a row are neighbours
        out[cells] |= bits[slices]
    return out


@functools.lru_cache(maxsize=32)
def _touched(size: int, cells: int, method: Method) -> Bool[np.ndarray, "cells size"]:
    """Which voxels of an axis each cell looks at: its answer to every voxel alone."""
    alone = np.eye(size, dtype=bool).reshape(size, size, 1, 1)
    return to_feature_grid(alone, (cells, 1, 1), method)[:, :, 0, 0].T != 0


def _bounding_box(mask: Bool[np.ndarray, "D H W"]) -> tuple[slice, slice, slice]:
    box = []
    for axis in range(3):
        marked = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(marked[0]), int(marked[-1]) + 1) if marked.size else slice(0, 0))
    return box[0], box[1], box[2]


def _unpack(packed: UInt8[np.ndarray, "a b c"], box: list[list[int]]) -> np.ndarray:
    return np.unpackbits(packed, axis=2, count=box[2][1] - box[2][0])


def _compress(array: np.ndarray, shuffle: int) -> bytes:
    if array.nbytes > MAX_BYTES:
        raise ValueError(f"an array of {array.nbytes} bytes is too large, at most {MAX_BYTES}")
    return blosc.compress(array, b"lz4", LEVEL, shuffle)


def _decompress(data: memoryview, out: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Blosc trusts the lengths in its header, so they are compared first."""
    size, compressed = (int.from_bytes(data[i : i + 4], "little") for i in (4, 12))
    if len(data) < _BLOSC_HEADER or (size, compressed) != (out.nbytes, len(data)):
        raise ValueError("the lengths of a compressed array do not fit")
    blosc.decompress(data, out)
    return out
