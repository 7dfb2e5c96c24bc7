"""RAD-ChestCT's vocabulary: from abnormality x location columns to labels and regions."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from hirescam_jax.data.readers.tables import Table
from hirescam_jax.errors import UserError

Selection = Literal["all", "counts", "paper"]

RIGHT_LUNG = ("right_upper", "right_mid", "right_lower", "right_lung")
LEFT_LUNG = ("left_upper", "left_mid", "left_lower", "left_lung")
LOCATIONS = {  # organ -> location columns; every other location is "other"
    "great_vessel": ("aorta", "svc", "ivc", "pulmonary_artery", "pulmonary_vein"),
    "mediastinum": ("mediastinum", "hilum"),
    "heart": ("heart", "mitral_valve", "aortic_valve", "tricuspid_valve", "pulmonary_valve"),
    "lung": ("lung", "airways", *RIGHT_LUNG, *LEFT_LUNG),
}
ORGANS = (*LOCATIONS, "other")
ORGAN_OF = {location: organ for organ, found in LOCATIONS.items() for location in found}

# Columns that say how, not where: they place nothing.
_MODIFIERS = """right left anterior posterior superior inferior medial lateral interstitial
subpleural centrilobular"""
MODIFIERS = frozenset(_MODIFIERS.split())

# The abnormalities that the paper counts in each organ (arXiv 2111.12215 and its code).
_VESSEL = """atherosclerosis aneurysm calcification catheter_or_port clip dilation_or_ectasia plaque
postsurgical scarring scattered_calc stent staple suture"""
_MEDIASTINUM = "calcification cancer lesion lymphadenopathy mass nodule nodulegr1cm opacity"
_HEART = """cabg cardiomegaly coronary_artery_disease heart_failure heart_valve_replacement
pacemaker_or_defib pericardial_effusion pericardial_thickening sternotomy atherosclerosis
calcification catheter_or_port clip congestion density fibrosis plaque postsurgical scarring
scattered_calc staple stent suture transplant"""
_LUNG = """bandlike_or_linear groundglass honeycombing reticulation tree_in_bud airspace_disease
air_trapping aspiration atelectasis bronchial_wall_thickening bronchiectasis bronchiolectasis
bronchiolitis bronchitis emphysema hemothorax interstitial_lung_disease lung_resection
mucous_plugging pleural_effusion pleural_thickening pneumonia pneumonitis pneumothorax
pulmonary_edema septal_thickening tuberculosis calcification cancer catheter_or_port cavitation
clip congestion consolidation cyst debris density fibrosis granuloma infection infiltrate
inflammation lesion lucency lymphadenopathy mass nodule nodulegr1cm opacity plaque postsurgical
scarring scattered_calc scattered_nod secretion soft_tissue staple stent suture transplant
chest_tube tracheal_tube"""
CANDIDATES = {
    "great_vessel": frozenset(_VESSEL.split()),
    "mediastinum": frozenset(_MEDIASTINUM.split()),
    "heart": frozenset(_HEART.split()),
    "lung": frozenset(_LUNG.split()),
}

# Those of them that are too rare in the 25,355 training scans; the other 80 are the paper's labels.
_RARE = {
    "great_vessel": "clip plaque scarring stent staple suture",
    "mediastinum": "lesion nodulegr1cm",
    "heart": "clip congestion density fibrosis plaque scarring staple suture",
    "lung": """bronchiolitis bronchitis hemothorax pneumonitis tuberculosis congestion debris
    infiltrate secretion stent tracheal_tube""",
}
PAPER = {
    organ: tuple(sorted(CANDIDATES[organ] - set(rare.split()))) for organ, rare in _RARE.items()
}
PAPER_LABELS = tuple(f"{organ}_{name}" for organ, names in PAPER.items() for name in names)

MIN_COUNTS = {"lung": 125, "heart": 200, "great_vessel": 200, "mediastinum": 200}


def select_labels(
    tables: Mapping[str, Table], selection: Selection, min_counts: Mapping[str, int]
) -> tuple[str, ...]:
    """The labels of a selection, see `RadChestCT`."""
    if selection == "paper":
        for table in tables.values():
            columns = {_parts(column, table.path) for column in table.binary_columns}
            known = {f"{ORGAN_OF.get(location, 'other')}_{name}" for name, location in columns}
            if missing := [label for label in PAPER_LABELS if label not in known]:
                raise UserError(
                    f"{table.path}: no column for label '{missing[0]}': download it again"
                )
        return PAPER_LABELS
    if selection == "counts":
        if "train" not in tables:
            raise UserError(
                "selection 'counts' needs the training table: download imgtrain_Abnormality_and_"
                "Location_Labels.csv"
            )
        tables = {"train": tables["train"]}
    elif selection != "all":
        raise UserError(f"selection '{selection}' is unknown: choose all, counts or paper")
    counts: dict[tuple[str, str], int] = collections.Counter()
    for table in tables.values():
        total = np.zeros(len(table.binary_columns), np.int64)
        for row in table.rows.values():
            total += row.binary
        for column, count in zip(table.binary_columns, total.tolist(), strict=True):
            abnormality, location = _parts(column, table.path)
            counts[abnormality, location] += count
    best: dict[tuple[str, str], int] = collections.Counter()  # over the locations of an organ
    for (abnormality, location), count in counts.items():
        if location not in MODIFIERS:
            organ = ORGAN_OF.get(location, "other")
            best[organ, abnormality] = max(best[organ, abnormality], count)
    if selection == "all":
        chosen = {pair for pair, count in best.items() if count}
    else:
        for abnormality in CANDIDATES["lung"]:
            best["lung", abnormality] = min(
                max(counts.get((abnormality, location), 0) for location in side)
                for side in (RIGHT_LUNG, LEFT_LUNG)
            )
        chosen = {
            (organ, abnormality)
            for organ, candidates in CANDIDATES.items()
            for abnormality in candidates
            if best.get((organ, abnormality), 0) >= {**MIN_COUNTS, **min_counts}[organ]
        }
    if not chosen:
        paths = " ".join(str(table.path) for table in tables.values())
        raise UserError(f"{paths}: no label is positive often enough: choose another selection")
    order = sorted(chosen, key=lambda pair: (ORGANS.index(pair[0]), pair[1]))
    return tuple(f"{organ}_{abnormality}" for organ, abnormality in order)


class Placing:
    """From the 0/1 columns of a row to findings [K, R]."""

    def __init__(self, columns: tuple[str, ...], labels: tuple[str, ...], regions: int):
        self.shape = (len(labels), regions)
        # Column -> label and region; the region of a lung finding without a side is None.
        self.places: dict[int, tuple[int, int | None]] = {}
        numbers = {label: k for k, label in enumerate(labels)}
        for i, column in enumerate(columns):
            abnormality, location = _parts(column)
            organ = ORGAN_OF.get(location, "other")
            label = numbers.get(f"{organ}_{abnormality}")
            if label is None or location in MODIFIERS:
                continue
            if organ == "lung":
                region = 0 if location in RIGHT_LUNG else 1 if location in LEFT_LUNG else None
            else:
                region = 3 if organ == "other" else 2
            self.places[i] = (label, region)

    def __call__(self, row: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, "K R"]:
        found = np.zeros(self.shape, np.uint8)
        places = [self.places[i] for i in np.flatnonzero(row).tolist() if i in self.places]
        for label, region in places:
            if region is not None:
                found[label, region] = 1
        for label, region in places:
            if region is None and not found[label].any():
                found[label, :2] = 1
        return found


def _parts(column: str, path: Path | None = None) -> tuple[str, str]:
    abnormality, star, location = column.partition("*")
    if not (abnormality and star and location):
        raise UserError(f"{path}: column '{column}' is not abnormality*location: download it again")
    return abnormality, location
