"""Synthetic lesions in real organs: their truth is known to the voxel.

In a copy of a CT the scan differs a little, and seeded lesions lie in the lungs and the
mediastinum. They are plausible, not diagnostic. `lesion_folder` makes a data set of such copies.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int16, Integer, UInt8
from nibabel import orientations
from scipy import ndimage as scipy_ndimage
from scipy.spatial.transform import Rotation

from hirescam_jax.data.grid import MIN_HU, MODEL_AXES
from hirescam_jax.data.lesions.shapes import PAINTERS, Scan, scan_noise
from hirescam_jax.data.organs.chest import CHEST_REGIONS
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError

ndimage: Any = scipy_ndimage  # its stubs call every result a number

# Label -> the organs in which it is placed.
LESIONS: dict[str, tuple[str, ...]] = {
    "nodule": CHEST_REGIONS[:2],
    "ground_glass": CHEST_REGIONS[:2],
    "consolidation": CHEST_REGIONS[:2],
    "pleural_effusion": CHEST_REGIONS[:2],
    "calcification": CHEST_REGIONS[2:],
}
LABELS = tuple(LESIONS)
# How many there are in an organ that has them: from, to.
COUNTS = {
    "nodule": (1, 4),
    "ground_glass": (2, 4),
    "consolidation": (1, 2),
    "pleural_effusion": (1, 1),
    "calcification": (2, 4),
}


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One lesion that was placed.

    label, region: what and where.
    centre_mm: of its mask, x, y, z in RAS.
    volume_ml: voxels at its edge count by the part that is lesion.
    size_mm: as drawn; nodule: diameter of the ball of its volume, pleural effusion: greatest
        depth from front to back, others: extent.
    """

    label: str
    region: str
    centre_mm: tuple[float, float, float]
    volume_ml: float
    size_mm: float


@dataclasses.dataclass(frozen=True, eq=False)
class LesionSet:
    """A CT with lesions and the truth about them.

    volume: int16 Hounsfield units on the grid of the input.
    regions: the names of the organs, in the order of `findings`.
    findings: [K, R] over LABELS and `regions`: 1 where one or more were placed.
    lesion_map: 1 + number of the label where at least half of a voxel is lesion, else 0.
    lesions: each one, in the order of painting.
    """

    volume: Volume
    regions: tuple[str, ...]
    findings: UInt8[np.ndarray, "K R"]
    lesion_map: UInt8[np.ndarray, "i j k"]
    lesions: tuple[Lesion, ...]

    def mask(self, label: str) -> Bool[np.ndarray, "i j k"]:
        return self.lesion_map == 1 + LABELS.index(label)


def add_lesions(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"] | Integer[np.ndarray, "i j k"]],
    seed: int | Sequence[int],
    *,
    findings: Bool[np.ndarray, "K R"] | Integer[np.ndarray, "K R"] | None = None,
    chance: float = 0.4,
    labels: Sequence[str] = LABELS,
) -> LesionSet:
    """Places lesions in organs: a pure function of its arguments.

    No voxel outside the organs changes, and none in which no part of a lesion lies. Lesions do
    not overlap. The same scan stored in another axis order gets the same lesions.

    Args:
        volume: a CT in Hounsfield units, of any orientation and spacing.
        regions: name -> mask on the grid of the volume; the names of LESIONS are used.
        seed: one number or some.
        findings: [K, R] over LABELS and `regions`, what to place; drawn if None. What finds no
            room in its organ is left out, and is 0 in the result.
        chance: of each label, where findings are drawn; of those in a lung a fifth is in both.
        labels: those that are drawn.

    Raises:
        UserError: masks on another grid, or findings that do not fit.
    """
    names = tuple(regions)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    wanted = (
        _drawn_findings(names, seeds, chance, labels) if findings is None else np.asarray(findings)
    )
    _check(volume, regions, wanted)
    turn = _turn(volume.affine)
    hu_DHW = orientations.apply_orientation(volume.voxels, turn).astype(np.float32)
    masks = {
        name: orientations.apply_orientation(np.asarray(mask) != 0, turn)
        for name, mask in regions.items()
    }
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.voxels.shape)
    # Files keep the axes in float32: less than a micrometre is rounding.
    axes = np.round(affine[:3, :3], 6)
    noise = scan_noise(hu_DHW, masks.get(CHEST_REGIONS[2], np.zeros(hu_DHW.shape, bool)))
    map_DHW = np.zeros(hu_DHW.shape, np.uint8)
    taken = np.zeros(hu_DHW.shape, bool)
    placed = np.zeros(wanted.shape, np.uint8)
    lesions = []
    for label, paint in PAINTERS.items():
        k = LABELS.index(label)
        for r in np.flatnonzero(wanted[k]):
            rng = np.random.default_rng([*seeds, k, int(r)])
            for _ in range(rng.integers(*COUNTS[label], endpoint=True)):
                scan = Scan(hu_DHW, axes, masks[names[r]] & ~taken, noise)
                painted = paint(scan, rng)
                if painted is None:
                    continue
                mask = painted.coverage >= 0.5
                placed[k, r] = 1
                map_DHW[painted.box][mask] = 1 + k
                taken[painted.box] |= painted.coverage > 0
                index = np.argwhere(mask).mean(0) + [s.start for s in painted.box]
                x, y, z = (affine[:3, :3] @ index + affine[:3, 3]).tolist()
                ml = float(painted.coverage.sum() * abs(np.linalg.det(axes)) / 1e3)
                lesions.append(Lesion(label, names[r], (x, y, z), ml, painted.size_mm))
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(MODEL_AXES), orientations.io_orientation(volume.affine)
    )
    old = np.rint(volume.voxels)
    new = np.where(
        orientations.apply_orientation(taken, back),
        np.maximum(np.rint(orientations.apply_orientation(hu_DHW, back)), MIN_HU),
        old,
    )
    return LesionSet(
        dataclasses.replace(volume, voxels=_int16(new)),
        names,
        placed,
        np.ascontiguousarray(orientations.apply_orientation(map_DHW, back)),
        tuple(lesions),
    )


def vary(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"] | Integer[np.ndarray, "i j k"]],
    seed: int | Sequence[int],
) -> tuple[Volume, dict[str, Bool[np.ndarray, "a b c"]]]:
    """The same body once more, as if scanned on another day: a pure function of its arguments.

    It is turned by some degrees and is up to 5 % larger or smaller along each axis. This is said
    in the affine alone, so that no voxel is interpolated and the noise stays the scan's own. Up to
    12 mm at each border are cut off, never in an organ. The contrast is up to 2 % different, and
    there is some noise more. Left stays left.

    Args:
        volume: a CT in Hounsfield units.
        regions: name -> mask on its grid.
        seed: one number or some.

    Returns:
        The volume, int16, and its masks.
    """
    rng = np.random.default_rng([seed] if isinstance(seed, int) else list(seed))
    turn = _turn(volume.affine)
    shape = np.array(volume.voxels.shape)
    order = np.argsort(turn[:, 0])  # axis of the file that runs along each of the model's
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    inside = np.any([np.asarray(mask) != 0 for mask in regions.values()], axis=0)
    low, high = np.zeros(3, int), shape.copy()
    zoom = np.ones(3)
    for axis in order.tolist():
        rows = np.flatnonzero(inside.any(tuple(a for a in range(3) if a != axis)))
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, int(shape[axis]))
        room = [first, int(shape[axis]) - last]
        cut = [min(int(rng.uniform(0, 12) / spacing[axis]), n) for n in _along(turn, axis, room)]
        cut = _along(turn, axis, cut)
        low[axis], high[axis] = cut[0], shape[axis] - cut[1]
        zoom[axis] = rng.uniform(0.95, 1.05)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))

    x, y, z = rng.uniform(-1, 1, 3) * (4, 4, 6)
    rotation = Rotation.from_euler("xyz", [x, y, z], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation @ volume.affine[:3, :3] @ np.diag(zoom)
    middle = (shape - 1) / 2
    centre = volume.affine[:3, :3] @ middle + volume.affine[:3, 3]
    affine[:3, 3] = centre + affine[:3, :3] @ (low - middle)

    gain, sigma = rng.uniform(0.98, 1.02), rng.uniform(0, 12)
    hu_DHW = orientations.apply_orientation(volume.voxels[part], turn).astype(np.float32)
    noise = rng.standard_normal(hu_DHW.shape, np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0.5, 0.5), mode="wrap")
    new = (hu_DHW + 1000) * gain - 1000 + noise * (sigma / noise.std())
    new = np.where(hu_DHW > MIN_HU, np.clip(new, MIN_HU, None), hu_DHW)  # padding stays
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(MODEL_AXES), orientations.io_orientation(volume.affine)
    )
    voxels = _int16(np.rint(orientations.apply_orientation(new, back)))
    masks = {name: np.asarray(mask)[part] != 0 for name, mask in regions.items()}
    return Volume(voxels, affine, volume.path), masks


def make_copy(
    volume: Volume,
    regions: Mapping[str, Bool[np.ndarray, "i j k"]],
    seed: int,
    name: str,
    copy: int,
    chance: float = 0.4,
    labels: Sequence[str] = LABELS,
) -> tuple[LesionSet, dict[str, Bool[np.ndarray, "a b c"]]]:
    """Copy number `copy` of the CT called `name`: varied, then with lesions; and its organs."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    varied, masks = vary(volume, regions, (seed, word, copy, 0))
    seeds = (seed, word, copy, 1)
    return add_lesions(varied, masks, seeds, chance=chance, labels=labels), masks


def _drawn_findings(
    names: tuple[str, ...], seeds: list[int], chance: float, labels: Sequence[str]
) -> UInt8[np.ndarray, "K R"]:
    findings = np.zeros((len(LABELS), len(names)), np.uint8)
    rng = np.random.default_rng([*seeds, len(LABELS)])
    for k, (label, places) in enumerate(LESIONS.items()):
        present, both, side = rng.random(3)
        known = [names.index(place) for place in places if place in names]
        if known and present < chance and label in labels:
            findings[k, known if both < 0.2 else known[int(side * len(known))]] = 1
    return findings


def _check(volume: Volume, regions: Mapping[str, np.ndarray], findings: np.ndarray) -> None:
    for name, mask in regions.items():
        if mask.shape != volume.voxels.shape:
            raise UserError(f"mask of {name}: {mask.shape}, the CT has {volume.voxels.shape}")
    if findings.shape != (len(LABELS), len(regions)):
        raise UserError(f"findings {findings.shape}: expected {(len(LABELS), len(regions))}")
    for (label, places), row in zip(LESIONS.items(), findings, strict=True):
        for name, found in zip(regions, row, strict=True):
            if found and name not in places:
                raise UserError(f"{label} is placed in {' or '.join(places)}, not in {name}")


def _int16(values: np.ndarray) -> Int16[np.ndarray, "i j k"]:
    return np.ascontiguousarray(np.clip(values, -(2**15), 2**15 - 1).astype(np.int16))


def _turn(affine: Float[np.ndarray, "4 4"]) -> np.ndarray:
    """From the file's axes to the model's, without loss."""
    return orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(MODEL_AXES)
    )


def _along(turn: np.ndarray, axis: int, pair: list[int]) -> list[int]:
    """(at the low end of a file's axis, at its high end), or the model's order: its own inverse."""
    return pair if turn[axis, 1] > 0 else pair[::-1]
