"""BodyConv and CTNet: ResNet features of every slab of slices, then 3D convolutions over them.

They differ in what the 3D convolutions take for the depth: BodyConv the slices, CTNet the features.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hirescam_jax.models.axialnet import stack_slices
from hirescam_jax.models.heads import DepthDense, Dropout
from hirescam_jax.models.layers import Conv3D, wide
from hirescam_jax.models.resnet import ResNet


class BodyConv(nn.Module):
    """ResNet features as one volume, under 3D convolutions (Table 1 of arXiv 2011.08891; github
    rachellea/ct-net-models).

    Input: as `AxialNet` takes; 405 x 420 x 420 gives 135 images of three slices, whose features are
    a volume [B, 135, 14, 14, 512]. Images that are too few for a last cell (D is not a multiple of
    `depth_unit`) are left out, also of BatchNorm's statistics.
    `features`: A [B, d, h, w, C] (5 x 5 x 5 x 16 at full size), float32.
    `head`: logits [B, K] through ReLU layers; HiResCAM has no guarantee here, and `explain` reports
    what it leaves unexplained.

    Attributes:
        num_labels: K; `hirescam train` takes it from the data.
        blocks, widths, stem, block: the ResNet's, see `AxialNet`.
        conv_widths: the 3D convolutions, each three images deep with a stride of three; the last is
            2 x 2 with a stride of 2 in the plane, the others 3 x 3 with a stride of 1.
        channels: slices that make one image.
        hidden: the fully connected layers before the last.
        dropout: on the hidden layers, in training.
        dtype: compute dtype of the convolutions; the head is float32.
        remat: keep less of the ResNet for the gradient, see `AxialNet`.
    """

    num_labels: int = 80
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "small"] = "imagenet"
    conv_widths: tuple[int, ...] = (64, 32, 16)
    channels: int = 3
    hidden: tuple[int, ...] = (128, 96)
    dropout: float = 0.5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    block: Literal["basic", "bottleneck"] = "basic"

    @property
    def depth_unit(self) -> int:
        """Slices that make one feature cell along the depth; cells do not overlap, since each
        convolution is as deep as its stride."""
        return self.channels * 3 ** len(self.conv_widths)

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.resnet = ResNet(self.blocks, self.widths, self.stem, dtype, self.remat, self.block)
        self.convs = _convolutions(self.conv_widths, dtype)
        self.hiddens, self.fc = _dense_layers(self.hidden, self.num_labels)
        self.drop = Dropout(self.dropout)

    def features(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        """Volumes [B, D, H, W] or [B, S, H, W, channels] -> features [B, d, h, w, C], float32."""
        if volumes.ndim == 4:
            volumes = stack_slices(volumes, self.channels)
        unit = self.depth_unit // self.channels
        volumes = volumes[:, : volumes.shape[1] // unit * unit]
        images = volumes.reshape(-1, *volumes.shape[2:])
        x = self.resnet(images.astype(self.dtype), train)
        x = x.reshape(*volumes.shape[:2], *x.shape[1:])
        for layer in self.convs:
            x = nn.relu(layer(x))
        return wide(x)

    def head(self, features: Float[Array, "B d h w C"], train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        return _classify((*self.hiddens, self.fc), self.drop, features, train)

    def attention_scale(self, grid: Sequence[int]) -> float:
        """Nothing is averaged behind the features, so HiResCAM is the attention."""
        return 1.0

    def __call__(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        return self.head(self.features(volumes, train), train)


class CTNet(nn.Module):
    """ResNet features of all slices, under 3D convolutions over the features (Draelos et al. 2021;
    github rachellea/ct-net-models).

    Its 3D convolutions have the images for channels and the ResNet's features for depth: from
    405 x 420 x 420, [B, 135 channels, 512 x 14 x 14]. A volume of another depth is another network.
    `features`: A [B, f, h, w, C] (18 x 5 x 5 x 16 at full size), float32. **The first axis of this
    grid is not the slices**: each cell is of a block of 27 features and of all slices at once. So
    a HiResCAM map tells where in the plane, but not in which slice; masks of organs have no meaning
    on it, and the slices of a volume cannot lie on several devices. `has_slices` and `depth_unit`
    say so to training (`mask_weight` and `depth_devices`) and to `hirescam explain`.
    `head`: logits [B, K] through ReLU layers; HiResCAM has no guarantee here.

    Attributes: as `BodyConv`'s.
    """

    num_labels: int = 80
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "small"] = "imagenet"
    conv_widths: tuple[int, ...] = (64, 32, 16)
    channels: int = 3
    hidden: tuple[int, ...] = (128, 96)
    dropout: float = 0.5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    block: Literal["basic", "bottleneck"] = "basic"

    @property
    def depth_unit(self) -> None:
        """No slices make a feature cell of their own."""
        return None

    @property
    def has_slices(self) -> bool:
        """The first axis of the features' grid is not the depth."""
        return False

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.resnet = ResNet(self.blocks, self.widths, self.stem, dtype, self.remat, self.block)
        self.convs = _convolutions(self.conv_widths, dtype)
        self.hiddens, self.fc = _dense_layers(self.hidden, self.num_labels)
        self.drop = Dropout(self.dropout)

    def features(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        """Volumes [B, D, H, W] or [B, S, H, W, channels] -> features [B, f, h, w, C], float32."""
        if volumes.ndim == 4:
            volumes = stack_slices(volumes, self.channels)
        images = volumes.reshape(-1, *volumes.shape[2:])
        x = self.resnet(images.astype(self.dtype), train)
        x = x.reshape(*volumes.shape[:2], *x.shape[1:]).swapaxes(1, -1)
        for layer in self.convs:
            x = nn.relu(layer(x))
        return wide(x)

    def head(self, features: Float[Array, "B f h w C"], train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        return _classify((*self.hiddens, self.fc), self.drop, features, train)

    def attention_scale(self, grid: Sequence[int]) -> float:
        """Nothing is averaged behind the features."""
        return 1.0

    def __call__(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        return self.head(self.features(volumes, train), train)


def _convolutions(widths: tuple[int, ...], dtype: DTypeLike) -> list[Any]:
    inner = [Conv3D(width, 3, (3, 1, 1), dtype=dtype) for width in widths[:-1]]
    return [*inner, *(Conv3D(width, (3, 2, 2), (3, 2, 2), dtype=dtype) for width in widths[-1:])]


def _dense_layers(hidden: tuple[int, ...], num_labels: int) -> tuple[list[Any], Any]:
    """(hidden layers, the last one); the first of them all takes the features."""
    hiddens = [
        nn.Dense(width, precision="highest") if i else DepthDense(width)
        for i, width in enumerate(hidden)
    ]
    last = nn.Dense(num_labels, precision="highest") if hidden else DepthDense(num_labels)
    return hiddens, last


def _classify(layers: Sequence[Any], drop: Dropout, features: Array, train: bool) -> Array:
    x = layers[0](features)
    for layer in layers[1:]:
        x = layer(drop(nn.relu(x), train))
    return x
