"""HiResCAM explanations and mask-loss training for 3D medical images, in JAX.

from hirescam_jax import hirescam
maps = hirescam(head, features)     # [B, K, *grid], signed, all labels at once
"""

from hirescam_jax.cam import Explanation, explain, gradcam, hirescam, normalize_map
from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS, organ_iou
from hirescam_jax.models import AxialNet, Conv3DNet

__all__ = [
    "ORGAN_IOU_THRESHOLDS",
    "AxialNet",
    "Conv3DNet",
    "Explanation",
    "allowed_of",
    "classification_loss",
    "explain",
    "gradcam",
    "hirescam",
    "labels_of",
    "mask_loss",
    "normalize_map",
    "organ_iou",
]
