"""AxialNet: a 2D ResNet on every slab of three slices, a linear score a slab, pooled over slabs."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from hirescam_jax.models.heads import DepthDense, depth_max, depth_mean
from hirescam_jax.models.layers import Conv, wide
from hirescam_jax.models.resnet import ResNet


class AxialNet(nn.Module):
    """The paper's network (arXiv 2011.08891). The defaults are its full size.

    Input: normalised volumes [B, D, H, W]; each `channels` neighbouring slices become the channels
    of one image, so D must be a multiple of `channels` (405 x 420 x 420 gives 135 images). Images
    that are stacked already, [B, S, H, W, channels], are taken as they are.

    `features`: A [B, S, h, w, C] (135 x 6 x 6 x 16 at full size), float32.
    `head`: logits [B, K]; one fully connected layer a slice, then the mean (or the max) over the
    slices; or one layer over all slices. Each is affine on the slices it selects, so HiResCAM is
    exact.

    Attributes:
        num_labels: K; `hirescam train` takes it from the data.
        blocks: residual blocks in each stage of the ResNet; ResNet-34 and 50 have (3, 4, 6, 3).
        widths: channels of each stage; "bottleneck" gives out four times as many.
        stem: the ResNet's first layers, see `ResNet`.
        conv_widths: widths of the 3x3 convolutions behind it; empty for none (an ablation).
        conv_padding: "VALID" as in the paper, or "SAME".
        channels: slices that make one image.
        pool: "mean" or "max" over the slices; "dense" for one layer over the features of all slices
            (an ablation), which fits volumes of one depth only.
        dtype: compute dtype of the backbone; the head is float32.
        remat: keep less for the gradient and compute it again, a block at a time: slower by about
            the time of a forward pass, with a fraction of the memory.
        block: "basic" for ResNet-18 and 34, "bottleneck" for ResNet-50 and deeper.
    """

    num_labels: int = 80
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "small"] = "imagenet"
    conv_widths: tuple[int, ...] = (64, 32, 16, 16)
    conv_padding: Literal["VALID", "SAME"] = "VALID"
    channels: int = 3
    pool: Literal["mean", "max", "dense"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    block: Literal["basic", "bottleneck"] = "basic"

    @property
    def depth_unit(self) -> int:
        """Slices that make one feature cell along the depth; cells do not overlap."""
        return self.channels

    def setup(self):
        if self.pool not in ("mean", "max", "dense"):
            raise ValueError(f"pool must be 'mean', 'max' or 'dense', got {self.pool!r}")
        dtype = jnp.dtype(self.dtype)
        self.resnet = ResNet(self.blocks, self.widths, self.stem, dtype, self.remat, self.block)
        self.convs = [
            Conv(width, 3, padding=self.conv_padding, use_bias=True, dtype=dtype)
            for width in self.conv_widths
        ]
        one_slice = nn.Dense(self.num_labels, precision="highest")
        self.fc: Any = DepthDense(self.num_labels) if self.pool == "dense" else one_slice

    def features(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        """Volumes [B, D, H, W] or [B, S, H, W, channels] -> features [B, S, h, w, C], float32."""
        if volumes.ndim == 4:
            volumes = stack_slices(volumes, self.channels)
        images = volumes.reshape(-1, *volumes.shape[2:])
        x = self.resnet(images.astype(self.dtype), train)
        for layer in self.convs:
            x = nn.relu(layer(x))
        return wide(x.reshape(*volumes.shape[:2], *x.shape[1:]))

    def head(self, features: Float[Array, "B S h w C"], train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        if self.pool == "dense":
            return self.fc(features)
        if self.pool == "max":
            return depth_max(self.fc(_flat(features)))
        # A linear layer and a mean commute; this order costs one slice instead of S.
        return self.fc(_flat(depth_mean(features)))

    def attention_scale(self, grid: Sequence[int]) -> float:
        """What turns HiResCAM into a slice's own attention: the mean over slices is undone."""
        return float(grid[0]) if self.pool == "mean" else 1.0

    def __call__(self, volumes: Float[Array, "B *dims"], train: bool = False) -> Array:
        return self.head(self.features(volumes, train), train)


def stack_slices(volumes: Float[Array, "B D H W"], channels: int) -> Float[Array, "B S H W C"]:
    """Makes each `channels` neighbouring slices the channels of one image.

    Raises:
        ValueError: D is not a multiple of `channels`.
    """
    batch, depth, height, width = volumes.shape
    if depth % channels:
        raise ValueError(f"{depth} slices do not divide into images of {channels} slices")
    volumes = volumes.reshape(batch, depth // channels, channels, height, width)
    return jnp.moveaxis(volumes, 2, -1)


def _flat(features: Float[Array, "*batch h w C"]) -> Float[Array, "*batch F"]:
    return features.reshape(*features.shape[:-3], -1)
