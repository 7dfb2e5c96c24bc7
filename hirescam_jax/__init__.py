"""HiResCAM explanations and mask-loss training for 3D medical images, in JAX.

from hirescam_jax import hirescam
maps = hirescam(head, features)     # [B, K, *grid], signed, all labels at once

Names are imported when they are first used, so that importing the package costs nothing.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hirescam_jax.moved import MovedModules

if TYPE_CHECKING:
    from hirescam_jax.explanations.cam import gradcam, hirescam, normalize_map
    from hirescam_jax.explanations.explain import Explanation, explain
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
    from hirescam_jax.inference.zarr import open_maps
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
    from hirescam_jax.runs.run import load_run
    from hirescam_jax.weights import (
        from_torch,
        read_variables,
        read_weights,
        to_torch,
        write_weights,
    )
else:

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package."""
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "load_run",
    "mask_loss",
    "normalize_map",
    "occlusion",
    "open_maps",
    "organ_iou",
    "read_variables",
    "read_weights",
    "scorecam",
    "smoothgrad",
    "to_torch",
    "write_weights",
    "xgradcam",
]

_HOMES = {
    "AxialNet": "models",
    "BodyConv": "models",
    "CTNet": "models",
    "Conv3DNet": "models",
    "DenseNet": "models",
    "Explanation": "explanations.explain",
    "HeadVerdict": "explanations.verdict",
    "MobileNetV2": "models",
    "ORGAN_IOU_THRESHOLDS": "metrics",
    "ResNetClassifier": "models",
    "VGG": "models",
    "ablationcam": "explanations.family",
    "allowed_of": "losses",
    "class_activation_map": "explanations.family",
    "classification_loss": "losses",
    "eigencam": "explanations.family",
    "explain": "explanations.explain",
    "from_torch": "weights",
    "gradcam": "explanations.cam",
    "gradcam_plusplus": "explanations.family",
    "gradient_x_input": "explanations.inputs",
    "guided_attention": "explanations.family",
    "head_verdict": "explanations.verdict",
    "hirescam": "explanations.cam",
    "input_gradient": "explanations.inputs",
    "integrated_gradients": "explanations.inputs",
    "labels_of": "losses",
    "layercam": "explanations.family",
    "load_run": "runs.run",
    "mask_loss": "losses",
    "normalize_map": "explanations.cam",
    "occlusion": "explanations.inputs",
    "open_maps": "inference.zarr",
    "organ_iou": "metrics",
    "read_variables": "weights",
    "read_weights": "weights",
    "scorecam": "explanations.family",
    "smoothgrad": "explanations.inputs",
    "to_torch": "weights",
    "write_weights": "weights",
    "xgradcam": "explanations.family",
}
