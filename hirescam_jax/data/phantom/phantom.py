"""An endless supply of made-up chest CTs with exact truth: the data set that comes along.

Every patient is a pure function of (seed, split, index): a body of random size, build and sex, up
to twelve findings, each inside its organ, and marks outside all organs that go with the findings
in training and validation but not in the test split. Nothing is stored; the same patient can be
drawn on any grid.
"""

from __future__ import annotations

import dataclasses
import operator

import numpy as np

from hirescam_jax.data.organs.feature_grid import Method, to_feature_grid
from hirescam_jax.data.phantom.anatomy import REGIONS, Patient, draw_patient
from hirescam_jax.data.phantom.canvas import Canvas
from hirescam_jax.data.phantom.chest import draw_chest
from hirescam_jax.data.phantom.findings import (
    LABELS,
    LUNG_LABELS,
    PLACES,
    Findings,
    FindingsPainter,
    change_anatomy,
    draw_findings,
)
from hirescam_jax.data.phantom.marks import MARKS, draw_marks, draw_table

__all__ = ["LABELS", "MARKS", "REGIONS", "SPLITS", "Phantom", "PhantomCase", "PhantomConfig"]

SPLITS = ("train", "val", "test")
PREVALENCE = {
    "nodule": 0.32,
    "consolidation": 0.28,
    "ground_glass": 0.28,
    "emphysema": 0.28,
    "fibrosis": 0.22,
    "pleural_effusion": 0.32,
    "cardiomegaly": 0.30,
    "coronary_calcification": 0.36,
    "pacemaker": 0.22,
    "pericardial_effusion": 0.22,
    "aortic_aneurysm": 0.25,
    "lymphadenopathy": 0.30,
}
BOTH_LUNGS = {  # share of the patients with a lung finding who have it on both sides
    "nodule": 0.15,
    "consolidation": 0.2,
    "ground_glass": 0.5,
    "emphysema": 0.7,
    "fibrosis": 0.7,
    "pleural_effusion": 0.4,
}
_SLAB_VOXELS = 3_000_000  # drawn at once: bounds the memory, and keeps the work in the cache


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Grid and population of a phantom data set.

    shape        voxels (D, H, W): down, back, to the patient's left
    field_mm     edges of the field of view, mm; the spacing is field_mm / shape
    seed         another seed is another population
    confounding  c in [0, 1]: in train and val a mark is present with probability (1 + c) / 2 in
                 patients who have a finding that it goes with (see MARKS) and (1 - c) / 2 in all
                 others; in test with probability 1 / 2 in everybody
    """

    shape: tuple[int, int, int] = (48, 64, 64)
    field_mm: tuple[float, float, float] = (300.0, 360.0, 360.0)
    seed: int = 0
    confounding: float = 0.8


@dataclasses.dataclass(frozen=True)
class PhantomCase:
    """One patient at full resolution.

    volume    int16 [D, H, W], Hounsfield units in [-1024, 3071]
    affine    float64 [4, 4], voxel (d, h, w, 1) -> world mm, RAS (x grows towards the patient's
              right, y to the front, z to the head); the world's origin is the volume's centre
    findings  uint8 [K, R], 1 where label k is found in region r
    regions   bool [R, D, H, W], disjoint
    lesions   bool [K, D, H, W], inside the regions that `findings` names
    marks     whether each confounding mark is present
    """

    volume: np.ndarray
    affine: np.ndarray
    findings: np.ndarray
    regions: np.ndarray
    lesions: np.ndarray
    marks: dict[str, bool]


@dataclasses.dataclass(frozen=True)
class Person:
    """All that is random about one patient, in mm: nothing here depends on the grid."""

    patient: Patient
    findings: Findings
    found: np.ndarray  # uint8 [K, R]
    marks: dict[str, bool]
    noise_seed: tuple[int, ...]


def draw_found(rng: np.random.Generator) -> np.ndarray:
    """Which finding is where, uint8 [K, R]; findings that share a mark tend to come together."""
    found = np.zeros((len(LABELS), len(REGIONS)), np.uint8)
    for labels in MARKS.values():
        rate = 2.0 if rng.random() < 0.4 else 1 / 3  # the mean over both is 1
        for label in labels:
            present = rng.random() < rate * PREVALENCE[label]
            both, right = rng.random(), rng.random() < 0.5
            k = LABELS.index(label)
            if present and label in LUNG_LABELS:
                found[k, :2] = 1 if both < BOTH_LUNGS[label] else (right, not right)
            elif present:
                found[k, REGIONS.index(PLACES[label])] = 1
    return found


def draw_marks_present(
    rng: np.random.Generator, found: np.ndarray, confounding: float
) -> dict[str, bool]:
    """Which marks are present, given the findings [K, R] and how firmly they go together."""
    marks = {}
    for mark, labels in MARKS.items():
        ill = any(found[LABELS.index(label)].any() for label in labels)
        marks[mark] = bool(rng.random() < 0.5 + (0.5 if ill else -0.5) * confounding)
    return marks


def draw_person(config: PhantomConfig, split: str, index: int) -> Person:
    """The patient `index` of a split; of the config, only seed and confounding matter."""
    key = (config.seed, SPLITS.index(split), index)
    found_rng, mark_rng, patient_rng, finding_rng = (
        np.random.default_rng((*key, i)) for i in range(4)
    )
    found = draw_found(found_rng)
    marks = draw_marks_present(mark_rng, found, 0.0 if split == "test" else config.confounding)
    patient = draw_patient(patient_rng)
    return Person(patient, draw_findings(finding_rng, patient), found, marks, (*key, 4))


def render(
    person: Person,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    lesions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a person.

    Args:
      person: whom.
      shape: voxels (D, H, W).
      spacing: their edges, mm.
      lesions: bool [K, D, H, W], all False, to be filled in.

    Returns:
      volume int16 [D, H, W], HU; labels uint8 [D, H, W], 0 or 1 + place in REGIONS.
    """
    present = frozenset(label for label, row in zip(LABELS, person.found, strict=True) if row.any())
    anatomy, masses = change_anatomy(person.patient, person.findings, present)
    noise = np.random.default_rng(person.noise_seed)
    volume = np.empty(shape, np.int16)
    labels = np.empty(shape, np.uint8)
    thick = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        stop = min(start + thick, shape[0])
        canvas = Canvas(shape, spacing, person.patient.pose, start, stop)
        scene = draw_chest(canvas, anatomy, person.marks["arms_down"], masses)
        masks = (
            None if lesions is None else {k: lesions[i, start:stop] for i, k in enumerate(LABELS)}
        )
        FindingsPainter(scene, person.findings, masks).draw(person.found)
        draw_table(canvas, anatomy, person.marks["flat_table"])
        draw_marks(canvas, anatomy, person.marks)
        canvas.hu += _noise(noise, canvas.shape, person.patient)
        volume[start:stop] = np.clip(canvas.hu, -1024, 3071).round()
        labels[start:stop] = scene.labels
    return volume, labels


def _noise(rng: np.random.Generator, shape: tuple[int, int, int], patient: Patient) -> np.ndarray:
    """Scanner noise, HU, float32, correlated between neighbours in the slice."""
    noise = rng.standard_normal(shape, np.float32)
    for axis in (1, 2):
        noise = noise + patient.noise_grain * np.roll(noise, 1, axis)
    return noise * np.float32(patient.noise_hu / (1 + patient.noise_grain**2))


class Phantom:
    """Random-access source of made-up chest CTs, for `grain.MapDataset.source`.

    Args:
      config: grid and population.
      split: "train", "val" or "test"; no patient is in two splits.
      size: number of patients.
      grid: (d, h, w), the feature grid.
      method, dilate: how the region masks come to it (`hirescam_jax.data.regions`).
      with_lesions: give the lesions too, on the feature grid.

    Raises:
      ValueError: an unknown split, a negative size or seed, an empty grid, a confounding
        outside [0, 1].
    """

    labels = LABELS
    regions = REGIONS

    def __init__(
        self,
        config: PhantomConfig,
        split: str,
        size: int,
        grid: tuple[int, int, int],
        method: Method = "nearest",
        dilate: bool = False,
        with_lesions: bool = False,
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if size < 0 or config.seed < 0:
            raise ValueError(f"size and seed must not be negative, got {size} and {config.seed}")
        if len(config.shape) != 3 or len(grid) != 3 or min(*config.shape, *grid) < 1:
            raise ValueError(
                f"shape and grid need three positive sizes, got {config.shape} and {grid}"
            )
        if not 0 <= config.confounding <= 1:
            raise ValueError(f"confounding must lie in [0, 1], got {config.confounding}")
        self.config, self.split, self.size, self.grid = config, split, size, grid
        self.method: Method = method
        self.dilate = dilate
        self.with_lesions = with_lesions

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (D, H, W)."""
        return self.config.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges (D, H, W), mm."""
        d, h, w = (f / n for f, n in zip(self.config.field_mm, self.config.shape, strict=True))
        return d, h, w

    def __len__(self) -> int:
        return self.size

    def person(self, index) -> Person:
        """What is random about patient `index`, undrawn."""
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(
                f"index {index} is outside the {self.size} patients of split {self.split!r}"
            )
        return draw_person(self.config, self.split, index)

    def __getitem__(self, index) -> dict[str, np.ndarray | np.int32]:
        """Patient `index` for training.

        Returns:
          volume int16 [D, H, W], HU; findings uint8 [K, R], 1 where label k is found in region r;
          regions uint8 [R, d, h, w], 1 inside; index int32;
          with `with_lesions` lesions uint8 [K, d, h, w], 1 in cells that hold a voxel of label k.

        Raises:
          IndexError: no such patient.
        """
        person = self.person(index)
        masks = np.zeros((len(LABELS), *self.config.shape), bool) if self.with_lesions else None
        volume, labels = render(person, self.config.shape, self.spacing_mm, masks)
        if self.method == "nearest":  # few voxels are looked at: pick them first
            sizes = zip(self.config.shape, self.grid, strict=True)
            labels = labels[np.ix_(*(np.arange(o) * n // o for n, o in sizes))]
        numbers = np.arange(1, len(REGIONS) + 1)[:, None, None, None]
        regions = to_feature_grid(labels == numbers, self.grid, self.method, self.dilate)
        item = {
            "volume": volume,
            "findings": person.found,
            "regions": regions,
            "index": np.int32(index),
        }
        if masks is not None:
            item["lesions"] = cells_with_any(masks, self.grid)
        return item

    def case(self, index) -> PhantomCase:
        """Patient `index` with everything that is known about it, at full resolution.

        Raises:
          IndexError: no such patient.
        """
        person = self.person(index)
        lesions = np.zeros((len(LABELS), *self.config.shape), bool)
        volume, labels = render(person, self.config.shape, self.spacing_mm, lesions)
        regions = np.stack([labels == r + 1 for r in range(len(REGIONS))])
        return PhantomCase(volume, self._affine(), person.found, regions, lesions, person.marks)

    def _affine(self) -> np.ndarray:
        d, h, w = self.spacing_mm
        affine = np.zeros((4, 4))
        affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = -w, -h, -d, 1
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(self.config.shape) - 1) / 2)
        return affine


def cells_with_any(masks: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Masks bool [K, D, H, W] -> uint8 [K, d, h, w], 1 in the cells that hold a voxel of the mask:
    a small lesion is never lost."""
    for axis, cells in enumerate(grid, start=1):
        size = masks.shape[axis]
        masks = np.logical_or.reduceat(masks, np.arange(cells) * size // cells, axis=axis)
    return masks.astype(np.uint8)
