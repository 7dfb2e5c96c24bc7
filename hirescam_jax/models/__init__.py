"""The networks: Linen modules with `features` and `head`, and __call__ = head(features(x)).

contract.py  what a network is, and how the rest of the package calls it; read this first
axialnet.py, bodyconv.py, conv3d.py  the papers' networks of volumes: a new one goes beside them
images.py    networks of images
resnet.py    ResNet's blocks
layers.py    the one convolution, max-pool and BatchNorm; cpu.py has what is tuned for CPUs
heads.py     what pools over the slices
"""

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
