"""HiResCAM explanations and mask-loss training for 3D medical images, in JAX.

from hirescam_jax import hirescam
maps = hirescam(head, features)     # [B, K, *grid], signed, all labels at once
"""

import sys

from hirescam_jax.explanations.cam import Explanation, explain, gradcam, hirescam, normalize_map
from hirescam_jax.explanations.family import (
    ablationcam,
    class_activation_map,
    eigencam,
    gradcam_plusplus,
    guided_attention,
    layercam,
    scorecam,
    xgradcam,
)
from hirescam_jax.explanations.inputs import (
    gradient_x_input,
    input_gradient,
    integrated_gradients,
    occlusion,
    smoothgrad,
)
from hirescam_jax.explanations.verdict import HeadVerdict, head_verdict
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
from hirescam_jax.moved import MovedModules
from hirescam_jax.weights.pytorch import from_torch, read_weights, to_torch, write_weights

sys.meta_path.append(MovedModules())

__all__ = [
    "ORGAN_IOU_THRESHOLDS",
    "VGG",
    "AxialNet",
    "BodyConv",
    "CTNet",
    "Conv3DNet",
    "DenseNet",
    "Explanation",
    "HeadVerdict",
    "MobileNetV2",
    "ResNetClassifier",
    "ablationcam",
    "allowed_of",
    "class_activation_map",
    "classification_loss",
    "eigencam",
    "explain",
    "from_torch",
    "gradcam",
    "gradcam_plusplus",
    "gradient_x_input",
    "guided_attention",
    "head_verdict",
    "hirescam",
    "input_gradient",
    "integrated_gradients",
    "labels_of",
    "layercam",
    "mask_loss",
    "normalize_map",
    "occlusion",
    "organ_iou",
    "read_weights",
    "scorecam",
    "smoothgrad",
    "to_torch",
    "write_weights",
    "xgradcam",
]
