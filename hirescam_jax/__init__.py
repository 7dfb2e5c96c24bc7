"""HiResCAM explanations and mask-loss training for 3D medical images, in JAX.

from hirescam_jax import hirescam
maps = hirescam(head, features)     # [B, K, *grid], signed, all labels at once
"""

from hirescam_jax.cam import Explanation, explain, gradcam, hirescam, normalize_map
from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS, organ_iou
from hirescam_jax.models import (
    VGG,
    AxialNet,
    BodyConv,
    Conv3DNet,
    CTNet,
    DenseNet,
    MobileNetV2,
    ResNetClassifier,
)
from hirescam_jax.weights import from_torch, read_weights, to_torch, write_weights

__all__ = [
    "ORGAN_IOU_THRESHOLDS",
    "VGG",
    "AxialNet",
    "BodyConv",
    "CTNet",
    "Conv3DNet",
    "DenseNet",
    "Explanation",
    "MobileNetV2",
    "ResNetClassifier",
    "allowed_of",
    "classification_loss",
    "explain",
    "from_torch",
    "gradcam",
    "hirescam",
    "labels_of",
    "mask_loss",
    "normalize_map",
    "organ_iou",
    "read_weights",
    "to_torch",
    "write_weights",
]
