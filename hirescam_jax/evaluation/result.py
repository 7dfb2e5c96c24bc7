"""What an evaluation is: the tree of evaluation.json, with the same names.

`plain` makes the tree for JSON, `read` builds it again. What is not defined is None, null in a
file. A field with a default may be missing in a file, of an older version; those of `left_out` are
not written where they are None.
"""

import dataclasses
import json
import math
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hirescam_jax.errors import UserError
from hirescam_jax.metrics.intervals import Interval


def left_out() -> Any:
    """A field that is not in a file where it is None."""
    return dataclasses.field(default=None, metadata={"left out": True})


Thresholds = dict[str, float | None]  # by label; None where no map of it could be measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelScores:
    """A measure by label; each interval is 95 %, of a bootstrap by patient.

    mean: over the labels that are defined and have two positive patients (and, for AUROC, two
        negative ones), the same ones in all resamples.
    defined: how many labels are in the mean.
    labels: an entry for every label.
    """

    mean: Interval
    defined: int | None = None
    labels: dict[str, Interval]

    @property
    def count(self) -> int:
        """`defined`; of an older file, which does not tell, the labels with a value."""
        known = sum(interval.value is not None for interval in self.labels.values())
        return known if self.defined is None else self.defined


@dataclasses.dataclass(frozen=True)
class DeLongInterval:
    """By DeLong's variance, by patient; None where there are too few."""

    low: float | None
    high: float | None
    standard_error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankScores(LabelScores):
    """AUROC."""

    delong: dict[str, DeLongInterval] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationScores(LabelScores):
    """The expected calibration error, debiased (`hirescam_jax.metrics.calibration_error_of_bins`),
    with intervals as `calibration_interval`'s; plug_in: the plain one of each label."""

    plug_in: dict[str, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class OfPairs(Interval):
    """With how many pairs of a volume and a label it is over."""

    pairs: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapScores(LabelScores):
    """A measure of a map, over the volumes in which the label is truly present.

    pairs: of volume and label that it is over; undefined_pairs: with a finding, but no measure.
    thresholds: of the map, best on the validation split and frozen for the test.
    regions: OrganIoU by the region in which the finding is; {} without names of regions.
    """

    pairs: int | None = None
    undefined_pairs: int | None = None
    thresholds: Thresholds | None = left_out()
    regions: dict[str, OfPairs] | None = left_out()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LesionScores:
    """A map against the lesions on the feature grid. iou has its own thresholds, which dice shares;
    both, and those at Otsu's threshold, are means over volumes of each one's own."""

    average_precision: MapScores
    energy: MapScores
    iou: MapScores
    otsu_iou: MapScores
    pointing: MapScores
    rank_accuracy: MapScores
    dice: MapScores
    otsu_dice: MapScores


@dataclasses.dataclass(frozen=True)
class ReliabilityTable:
    """Of M bins of equal width over [0, 1], None in empty bins."""

    count: tuple[int, ...]
    probability: tuple[float | None, ...]
    frequency: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    bins: int | None = None
    expected_calibration_error: CalibrationScores
    brier: LabelScores | None = None
    reliability: dict[str, ReliabilityTable] | None = None


@dataclasses.dataclass(frozen=True)
class Completeness:
    """Over all volumes and labels, of |sum of the HiResCAM map + bias - logit|."""

    mean: float
    worst: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A split, measured.

    content: a digest of the split's volumes, the same for runs that can be compared.
    patients: how many were resampled.
    grid: (d, h, w) of the maps; None without maps.
    positives, positive_patients: volumes and patients with each label.
    organ_iou: by method: "hirescam" and "gradcam", then the baselines "organ_prior",
        "centre_blob", "random" (`hirescam_jax.metrics.baselines`); {} without maps.
    lesions: by method; None where the data has none.
    completeness: None without maps.
    """

    content: str | None = left_out()
    volumes: int
    patients: int | None = None
    grid: tuple[int, ...] | None = None
    positives: dict[str, int] | None = None
    positive_patients: dict[str, int] | None = None
    auroc: RankScores
    average_precision: LabelScores
    calibration: Calibration | None = None
    organ_iou: dict[str, MapScores]
    lesions: dict[str, LesionScores] | None = None
    completeness: Completeness | None = None


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """Whether a method's maps account for the score, and in words."""

    holds: bool
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Head:
    """The head's `HeadVerdict`; maps: by method."""

    kind: str
    text: str = ""
    maps: dict[str, Guarantee] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapFaithfulness:
    """Of one kind of map: areas under the curves, and ROAD's combined score.

    pairs of an area: fewer than all where a baseline has no map of a label.
    curves: mean scores at 0, 1 / steps, ... 1 of the cells, over the same pairs; road_most_first,
        road_least_first: at `Faithfulness.fractions`; None where there is no pair.
    """

    insertion: OfPairs
    deletion: OfPairs
    road: OfPairs
    insertion_curve: tuple[float, ...] | None = None
    deletion_curve: tuple[float, ...] | None = None
    road_most_first: tuple[float, ...] | None = None
    road_least_first: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Insertion, deletion and ROAD, for every label that a volume truly has.

    pairs: of volume and label. fractions: of the cells that ROAD removes. blur_voxels: standard
    deviation of where insertion starts. methods: by method and baseline.
    """

    volumes: int
    patients: int | None = None
    pairs: int
    steps: int
    fractions: tuple[float, ...]
    blur_voxels: float
    methods: dict[str, MapFaithfulness]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sanity:
    """How alike maps stay to the trained network's while its layers are made as new.

    maps: of a method, one a volume and label. layers: names in their order. methods: by method,
    "ssim", "spearman" and "spearman_absolute", the mean after each layer, None where nothing is
    defined. defined: how many of the maps are in each mean: one that became constant has no
    correlation.
    """

    volumes: int
    maps: int = 0
    layers: tuple[str, ...]
    methods: dict[str, dict[str, tuple[float | None, ...]]]
    defined: dict[str, dict[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEvaluation:
    """A run, measured: evaluation.json.

    step: of the weights. split: "test", or "validation" of data without a test split.
    scores: of that split, at the thresholds that are best on the validation split.
    validation: the same of the validation split. Its thresholds are chosen on the same maps, so
        that its OrganIoU is in-sample. None with split "validation", where this holds for `scores`.
    faithfulness, sanity: where asked for.
    """

    step: int | None = None
    split: str = "test"
    head: Head | None = None
    scores: Evaluation = dataclasses.field(metadata={"inline": True})  # in the same object
    validation: Evaluation | None = left_out()
    faithfulness: Faithfulness | None = left_out()
    sanity: Sanity | None = left_out()

    def to_json(self) -> str:
        return json.dumps(plain(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RunEvaluation":
        """Raises ValueError, with the field's name, where it is none."""
        return read(json.loads(text, parse_constant=_no_number), cls)

    @classmethod
    def load(cls, path: Path) -> "RunEvaluation":
        """Raises UserError: no such file, or one that is no evaluation."""
        again = f"run `hirescam evaluate {path.parent}`"
        try:
            return cls.from_json(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{path.parent}: no {path.name} in it: {again}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not an evaluation ({error}): {again} again") from error


# -- JSON -----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """What `json.dumps` takes: dataclasses as dicts, NumPy's numbers as Python's; null for NaN."""
    if dataclasses.is_dataclass(value):
        tree: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if "inline" in field.metadata:
                tree |= plain(item)
            elif item is not None or "left out" not in field.metadata:
                tree[field.name] = plain(item)
        return tree
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


Kind = typing.TypeVar("Kind")


def read(tree: object, kind: type[Kind]) -> Kind:
    """A dataclass of `plain`'s tree; what it does not know is left out.

    Raises:
        ValueError: a field that is missing or of another kind, by its name.
    """
    return _read(tree, kind, "")


# By what a field's type may be; a bool is no number.
_LEAVES = {int: "number", float: "number", str: "text", bool: "true or false"}


def _read(tree: object, hint: Any, name: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if tree is None and types.NoneType in kinds:
        return None
    kind, where = kinds[0], name or "the file"
    part, inner = typing.get_origin(kind), typing.get_args(kind)
    if part is tuple:
        if not isinstance(tree, list):
            raise ValueError(f"{where} is no list")
        return tuple(_read(item, inner[0], f"{name}[{i}]") for i, item in enumerate(tree))
    if kind in _LEAVES:
        accepted = (int, float) if kind is float else kind
        fits = isinstance(tree, accepted) and (kind is bool or not isinstance(tree, bool))
        if not fits or (isinstance(tree, float) and not math.isfinite(tree)):
            raise ValueError(f"{where} is no {_LEAVES[kind]}")
        return tree
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is no object")
    if part is dict:
        return {key: _read(item, inner[1], f"{name}.{key}") for key, item in tree.items()}
    found = {}
    for field in dataclasses.fields(kind):
        own = _hints(kind)[field.name]
        place = f"{name}.{field.name}".removeprefix(".")
        if "inline" in field.metadata:
            found[field.name] = _read(tree, own, name)
        elif field.name in tree:
            found[field.name] = _read(tree[field.name], own, place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**found)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} in it")
