"""Classifiers of natural images: ResNet, VGG, DenseNet and MobileNetV2 as torchvision has them.

All take normalised images [B, H, W, 3] and have `features` and `head`, so that `hirescam` and
`explain` serve them as they serve the networks for volumes. The field `classifier` says what
follows the features:

"gap"      global average pooling and one fully connected layer (torchvision's, but for VGG):
           affine, so HiResCAM is exact, and equal to Grad-CAM and CAM
"flatten"  one fully connected layer over all positions, for images of one size: affine, so that
           HiResCAM is exact and Grad-CAM is not
"mlp"      VGG's own: average pooling to 7 x 7 and three fully connected layers; no guarantee
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hirescam_jax.models.heads import Dropout
from hirescam_jax.models.layers import BatchNorm, Conv, max_pool, wide
from hirescam_jax.models.resnet import ResNet

Images = Float[Array, "B H W C"]
Affine = Literal["gap", "flatten"]
Precision = Literal["float32", "bfloat16"]


class ResNetClassifier(nn.Module):
    """ResNet-18 by default; ResNet-34 and 50 as `models.resnet.ResNet` tells (He et al. 2015).

    `features`: [B, H / 32, W / 32, 512], float32; 2048 channels for ResNet-50.
    """

    num_labels: int = 1000
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["imagenet", "small"] = "imagenet"
    classifier: Affine = "gap"
    dtype: Precision = "float32"

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.resnet = ResNet(self.blocks, self.widths, self.stem, dtype, block=self.block)
        self.fc = _dense(self.num_labels)

    def features(self, images: Images, train: bool = False) -> Array:
        """Images [B, H, W, 3] -> features [B, h, w, C]."""
        return wide(self.resnet(images.astype(self.dtype), train))

    def head(self, features: Images, train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        return self.fc(_pooled(features, self.classifier))

    def attention_scale(self, grid: Sequence[int]) -> float:
        """What turns HiResCAM into a position's own attention: the average is undone."""
        return _attention_scale(self.classifier, grid)

    def __call__(self, images: Images, train: bool = False) -> Array:
        return self.head(self.features(images, train), train)


class VGG(nn.Module):
    """VGG16 by default, without BatchNorm (Simonyan & Zisserman 2015).

    `features`: [B, H / 32, W / 32, 512], float32, behind the last max-pool.

    Attributes:
        widths: of the 3x3 convolutions; a 2x2 max-pool follows each group.
        hidden: of the fully connected layers before the last of "mlp".
        dropout: on them, in training.
    """

    num_labels: int = 1000
    widths: tuple[tuple[int, ...], ...] = (
        (64,) * 2,
        (128,) * 2,
        (256,) * 3,
        (512,) * 3,
        (512,) * 3,
    )
    classifier: Literal["mlp", "gap", "flatten"] = "mlp"
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5
    dtype: Precision = "float32"

    def setup(self):
        layer = partial(Conv, kernel=3, use_bias=True, dtype=jnp.dtype(self.dtype))
        self.convs = [layer(width) for group in self.widths for width in group]
        hidden = self.hidden if self.classifier == "mlp" else ()
        self.hiddens = [_dense(width) for width in hidden]
        self.fc = _dense(self.num_labels)
        self.drop = Dropout(self.dropout)

    def features(self, images: Images, train: bool = False) -> Array:
        """Images [B, H, W, 3] -> features [B, h, w, C]."""
        x, layers = images.astype(self.dtype), iter(self.convs)
        for group in self.widths:
            for _ in group:
                x = nn.relu(next(layers)(x))
            x = max_pool(x, window=2, padding=0)
        return wide(x)

    def head(self, features: Images, train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        if self.classifier != "mlp":
            return self.fc(_pooled(features, self.classifier))
        x = adaptive_average_pool(features, 7).reshape(features.shape[0], -1)
        for layer in self.hiddens:
            x = self.drop(nn.relu(layer(x)), train)
        return self.fc(x)

    def attention_scale(self, grid: Sequence[int]) -> float:
        """What turns HiResCAM into a position's own attention: the average is undone."""
        return _attention_scale(self.classifier, grid)

    def __call__(self, images: Images, train: bool = False) -> Array:
        return self.head(self.features(images, train), train)


class DenseNet(nn.Module):
    """DenseNet-121 by default (Huang et al. 2017).

    `features`: [B, H / 32, W / 32, 1024], float32, behind the last ReLU.

    Attributes:
        blocks: layers in each dense block.
        growth: channels that a layer adds.
        stem_width: channels of the first convolution.
        bottleneck: a layer's 1x1 convolution has so many times `growth` channels.
    """

    num_labels: int = 1000
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    stem_width: int = 64
    bottleneck: int = 4
    classifier: Affine = "gap"
    dtype: Precision = "float32"

    def setup(self):
        self.densenet = DenseNetBackbone(
            self.blocks, self.growth, self.stem_width, self.bottleneck, jnp.dtype(self.dtype)
        )
        self.fc = _dense(self.num_labels)

    def features(self, images: Images, train: bool = False) -> Array:
        """Images [B, H, W, 3] -> features [B, h, w, C]."""
        return wide(self.densenet(images.astype(self.dtype), train))

    def head(self, features: Images, train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        return self.fc(_pooled(features, self.classifier))

    def attention_scale(self, grid: Sequence[int]) -> float:
        """What turns HiResCAM into a position's own attention: the average is undone."""
        return _attention_scale(self.classifier, grid)

    def __call__(self, images: Images, train: bool = False) -> Array:
        return self.head(self.features(images, train), train)


class DenseNetBackbone(nn.Module):
    """`DenseNet` without its classifier."""

    blocks: tuple[int, ...]
    growth: int
    stem_width: int
    bottleneck: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Array:
        def norm_relu(x: Array, name: str) -> Array:
            return nn.relu(BatchNorm(self.dtype, name=name)(x, train))

        def convolve(x: Array, width: int, kernel: int, name: str, stride: int = 1) -> Array:
            return Conv(width, kernel, stride, dtype=self.dtype, name=name)(x)

        x = convolve(x, self.stem_width, 7, "conv0", 2)
        x = max_pool(norm_relu(x, "norm0"))
        for i, count in enumerate(self.blocks, start=1):
            if i > 1:
                x = norm_relu(x, f"transition{i - 1}_norm")
                x = convolve(x, x.shape[-1] // 2, 1, f"transition{i - 1}_conv")
                x = _pairs(x).mean((2, 4))
            for j in range(1, count + 1):
                layer = f"denseblock{i}_denselayer{j}"
                y = norm_relu(x, f"{layer}_norm1")
                y = convolve(y, self.bottleneck * self.growth, 1, f"{layer}_conv1")
                y = convolve(norm_relu(y, f"{layer}_norm2"), self.growth, 3, f"{layer}_conv2")
                x = jnp.concatenate([x, y], axis=-1)
        return norm_relu(x, "norm5")


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1 by default (Sandler et al. 2018).

    `features`: [B, H / 32, W / 32, 1280], float32.

    Attributes:
        stages: (expansion, channels, blocks, stride of the first block) of each.
        stem_width: channels of the first convolution.
        last_width: channels of the features.
        dropout: before the last layer, in training.
    """

    num_labels: int = 1000
    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stem_width: int = 32
    last_width: int = 1280
    dropout: float = 0.2
    classifier: Affine = "gap"
    dtype: Precision = "float32"

    def setup(self):
        self.mobilenet = MobileNetV2Backbone(
            self.stages, self.stem_width, self.last_width, jnp.dtype(self.dtype)
        )
        self.drop = Dropout(self.dropout)
        self.fc = _dense(self.num_labels)

    def features(self, images: Images, train: bool = False) -> Array:
        """Images [B, H, W, 3] -> features [B, h, w, C]."""
        return wide(self.mobilenet(images.astype(self.dtype), train))

    def head(self, features: Images, train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        return self.fc(self.drop(_pooled(features, self.classifier), train))

    def attention_scale(self, grid: Sequence[int]) -> float:
        """What turns HiResCAM into a position's own attention: the average is undone."""
        return _attention_scale(self.classifier, grid)

    def __call__(self, images: Images, train: bool = False) -> Array:
        return self.head(self.features(images, train), train)


class MobileNetV2Backbone(nn.Module):
    """`MobileNetV2` without its classifier."""

    stages: tuple[tuple[int, int, int, int], ...]
    stem_width: int
    last_width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Array:
        def convolve(x: Array, width: int, kernel: int, name: str, **options: Any) -> Array:
            x = Conv(width, kernel, dtype=self.dtype, name=f"{name}_conv", **options)(x)
            return BatchNorm(self.dtype, name=f"{name}_bn")(x, train)

        x = nn.relu6(convolve(x, self.stem_width, 3, "stem", stride=2))
        number = 0
        for expansion, width, count, first_stride in self.stages:
            for i in range(count):
                number += 1
                inputs, hidden = x.shape[-1], x.shape[-1] * expansion
                stride = first_stride if i == 0 else 1
                y = x
                if expansion > 1:
                    y = nn.relu6(convolve(y, hidden, 1, f"block{number}_expand"))
                options = {"stride": stride, "groups": hidden}
                y = nn.relu6(convolve(y, hidden, 3, f"block{number}_depthwise", **options))
                y = convolve(y, width, 1, f"block{number}_project")
                x = x + y if stride == 1 and inputs == width else y
        return nn.relu6(convolve(x, self.last_width, 1, "last"))


# Those that torchvision has weights for, by its names.
ARCHITECTURES = {
    "resnet18": ResNetClassifier(),
    "resnet34": ResNetClassifier(blocks=(3, 4, 6, 3)),
    "resnet50": ResNetClassifier(blocks=(3, 4, 6, 3), block="bottleneck"),
    "vgg16": VGG(),
    "densenet121": DenseNet(),
    "mobilenet_v2": MobileNetV2(),
}


def adaptive_average_pool(x: Images, size: int) -> Array:
    """[B, H, W, C] -> [B, size, size, C], as PyTorch's AdaptiveAvgPool2d: the mean over
    floor(i H / size) .. ceil((i + 1) H / size), which overlap or repeat where H does not divide."""

    def weights(length: int) -> np.ndarray:
        first = np.arange(size) * length // size
        last = -(-np.arange(1, size + 1) * length // size)
        places = np.arange(length)
        inside = (places >= first[:, None]) & (places < last[:, None])
        return (inside / (last - first)[:, None]).astype(np.float32)

    for axis in (1, 2):
        if x.shape[axis] != size:
            y = jnp.tensordot(weights(x.shape[axis]), x, (1, axis), precision="highest")
            x = jnp.moveaxis(y, 0, axis)
    return x


def _dense(width: int) -> nn.Dense:
    return nn.Dense(width, precision="highest")


def _pooled(features: Array, classifier: str) -> Array:
    """[B, h, w, C] -> [B, C] or [B, h * w * C]."""
    if classifier not in ("gap", "flatten"):
        raise ValueError(f"classifier must be 'gap' or 'flatten', got {classifier!r}")
    if classifier == "gap":
        return features.mean((1, 2))
    return features.reshape(features.shape[0], -1)


def _attention_scale(classifier: str, grid: Sequence[int]) -> float:
    return float(np.prod(grid)) if classifier == "gap" else 1.0


def _pairs(x: Images) -> Array:
    """[B, H, W, C] -> [B, h, 2, w, 2, C], for 2x2 pooling; an odd row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)
