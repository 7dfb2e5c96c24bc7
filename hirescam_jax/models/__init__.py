"""The networks: Linen modules with `features` and `head`, and __call__ = head(features(x))."""

from hirescam_jax.models.axialnet import AxialNet
from hirescam_jax.models.bodyconv import BodyConv, CTNet
from hirescam_jax.models.conv3d import Conv3DNet
from hirescam_jax.models.images import VGG, DenseNet, MobileNetV2, ResNetClassifier

__all__ = [
    "VGG",
    "AxialNet",
    "BodyConv",
    "CTNet",
    "Conv3DNet",
    "DenseNet",
    "MobileNetV2",
    "ResNetClassifier",
]
