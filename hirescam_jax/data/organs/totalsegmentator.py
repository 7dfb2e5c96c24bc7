"""The classes of TotalSegmentator v2, task "total", and the regions made of them."""

import difflib
from collections.abc import Iterable, Mapping

from hirescam_jax.errors import UserError

# Published names, in the order of their ids 1 to 117; 0 is background.
_NAMES = """
    spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right
    adrenal_gland_left lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right
    lung_middle_lobe_right lung_lower_lobe_right esophagus trachea thyroid_gland small_bowel
    duodenum colon urinary_bladder prostate kidney_cyst_left kidney_cyst_right sacrum vertebrae_S1
    vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11
    vertebrae_T10 vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4
    vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4
    vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein brachiocephalic_trunk
    subclavian_artery_right subclavian_artery_left common_carotid_artery_right
    common_carotid_artery_left brachiocephalic_vein_left brachiocephalic_vein_right
    atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein
    iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right humerus_left
    humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right
    hip_left hip_right spinal_cord gluteus_maximus_left gluteus_maximus_right gluteus_medius_left
    gluteus_medius_right gluteus_minimus_left gluteus_minimus_right autochthon_left
    autochthon_right iliopsoas_left iliopsoas_right brain skull rib_left_1 rib_left_2 rib_left_3
    rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 rib_left_10 rib_left_11
    rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6
    rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11 rib_right_12 sternum
    costal_cartilages
"""
CLASSES: dict[str, int] = {name: id for id, name in enumerate(_NAMES.split(), start=1)}

_RIGHT_LUNG = ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right")
_LEFT_LUNG = ("lung_upper_lobe_left", "lung_lower_lobe_left")
_HEART = ("heart", "atrial_appendage_left")
_GREAT_VESSELS = (
    "aorta",
    "pulmonary_vein",
    "brachiocephalic_trunk",
    "subclavian_artery_right",
    "subclavian_artery_left",
    "common_carotid_artery_right",
    "common_carotid_artery_left",
    "brachiocephalic_vein_left",
    "brachiocephalic_vein_right",
    "superior_vena_cava",
    "inferior_vena_cava",
)
_MEDIASTINUM = (*_HEART, *_GREAT_VESSELS, "esophagus", "trachea")

# Region -> the classes whose union it is. The pulmonary artery is no class of this task: it is
# part of none of them, so the mediastinum made of classes has a gap there.
DEFAULT_REGIONS: dict[str, tuple[str, ...]] = {
    "right_lung": _RIGHT_LUNG,
    "left_lung": _LEFT_LUNG,
    "lungs": (*_RIGHT_LUNG, *_LEFT_LUNG),
    "heart": _HEART,
    "great_vessels": _GREAT_VESSELS,
    "airways": ("trachea",),
    "esophagus": ("esophagus",),
    "mediastinum": _MEDIASTINUM,
    "heart_mediastinum": _MEDIASTINUM,
}


def check_mapping(mapping: Mapping[str, Iterable[str]]) -> None:
    """Refuses a mapping (region -> class names) that names a class which does not exist.

    Raises:
        UserError: one line with the nearest class names.
    """
    for region, names in mapping.items():
        if isinstance(names, str) or not tuple(names):
            raise UserError(
                f"region '{region}': give a list of TotalSegmentator class names, not {names!r}"
            )
        for name in names:
            if name not in CLASSES:
                raise UserError(
                    f"region '{region}': TotalSegmentator v2 has no class '{name}'"
                    f"{suggestion(name, CLASSES)}"
                )


def suggestion(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' with up to three near names, or nothing where none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=3)
    return f" (did you mean {' or '.join(repr(match) for match in close)}?)" if close else ""
