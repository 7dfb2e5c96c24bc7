"""3DConv: the paper's plain 3D network, the alternative without a slice-wise backbone."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from hirescam_jax.models.heads import DepthDense, Dropout
from hirescam_jax.models.layers import Conv3D, wide


class Conv3DNet(nn.Module):
    """Strided 3D convolutions and three fully connected layers (Table 1 of arXiv 2011.08891).

    Input: normalised volumes [B, D, H, W], one channel.
    `features`: A [B, d, h, w, C] (5 x 5 x 5 x 64 at 405 x 420 x 420), float32.
    `head`: logits [B, K] through ReLU layers; HiResCAM has no guarantee here, and `explain` reports
    what it leaves unexplained.

    Attributes:
        num_labels: K; `hirescam train` takes it from the data.
        widths: the 3x3x3 convolutions of stride 3.
        narrow: the 1x1x1 convolutions behind them.
        hidden: the fully connected layers before the last.
        dropout: on the hidden layers, in training.
        dtype: compute dtype of the convolutions, "float32" or "bfloat16"; the head is float32.
    """

    num_labels: int = 80
    widths: tuple[int, ...] = (64, 128, 256, 512)
    narrow: tuple[int, ...] = (128, 64)
    hidden: tuple[int, ...] = (128, 96)
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def depth_unit(self) -> int:
        """Slices that make one feature cell along the depth; cells do not overlap, since each
        convolution is as wide as its stride."""
        return 3 ** len(self.widths)

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.convs = [Conv3D(width, 3, 3, dtype=dtype) for width in self.widths]
        self.narrows = [Conv3D(width, 1, 1, dtype=dtype) for width in self.narrow]
        self.hiddens = [
            nn.Dense(width, precision="highest") if i else DepthDense(width)
            for i, width in enumerate(self.hidden)
        ]
        self.drop = Dropout(self.dropout)
        last = nn.Dense(self.num_labels, precision="highest")
        self.fc = last if self.hidden else DepthDense(self.num_labels)

    def features(self, volumes: Float[Array, "B D H W"], train: bool = False) -> Array:
        """Volumes [B, D, H, W] -> features [B, d, h, w, C], float32."""
        x = volumes[..., None].astype(self.dtype)
        for layer in (*self.convs, *self.narrows):
            x = nn.relu(layer(x))
        return wide(x)

    def head(self, features: Float[Array, "B d h w C"], train: bool = False) -> Array:
        """Features -> logits [B, K]."""
        layers: Any = (*self.hiddens, self.fc)
        x = layers[0](features)
        for layer in layers[1:]:
            x = layer(self.drop(nn.relu(x), train))
        return x

    def attention_scale(self, grid: Sequence[int]) -> float:
        """Nothing is averaged behind the features, so HiResCAM is the attention."""
        return 1.0

    def __call__(self, volumes: Float[Array, "B D H W"], train: bool = False) -> Array:
        return self.head(self.features(volumes, train), train)
