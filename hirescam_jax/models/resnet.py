"""The ResNet backbone (He et al. 2015), for images [N, H, W, C]."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hirescam_jax.models.layers import BatchNorm, Conv, max_pool


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with BatchNorm and a shortcut."""

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        def norm(name: str):
            return partial(BatchNorm(self.dtype, name=name), train=train)

        y = Conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(norm("bn1")(y))
        y = norm("bn2")(Conv(self.width, 3, dtype=self.dtype, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = Conv(self.width, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block: 1x1, 3x3 and 1x1 convolutions to four times `width` channels.

    The stride is on the 3x3 convolution, as torchvision has it ("ResNet v1.5"); in the paper it is
    on the first 1x1.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        def norm(name: str):
            return partial(BatchNorm(self.dtype, name=name), train=train)

        outputs = 4 * self.width
        y = nn.relu(norm("bn1")(Conv(self.width, 1, dtype=self.dtype, name="conv1")(x)))
        y = Conv(self.width, 3, self.stride, dtype=self.dtype, name="conv2")(y)
        y = Conv(outputs, 1, dtype=self.dtype, name="conv3")(nn.relu(norm("bn2")(y)))
        y = norm("bn3")(y)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = Conv(outputs, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """ResNet without its pooling and classifier (He et al. 2015).

    The defaults are ResNet-18; ResNet-34 has `blocks` (3, 4, 6, 3), ResNet-50 the same of `block`
    "bottleneck", which gives out four times `widths`. `stem` is "imagenet" (7x7 stride 2, max-pool
    stride 2; total stride 32) or "small" (3x3 stride 2, no pool; total stride 2^len(widths)).
    `remat` keeps only the input of each block for the gradient and computes the rest again.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    block: str = "basic"

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"], train: bool) -> Float[Array, "N h w F"]:
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be 'basic' or 'bottleneck', got {self.block!r}")
        kernel = 7 if self.stem == "imagenet" else 3
        x = Conv(self.widths[0], kernel, 2, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(self.dtype, name="bn1")(x, train))
        if self.stem == "imagenet":
            x = max_pool(x)
        block: Any = BLOCKS[self.block]
        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = block(width, stride, self.dtype, name=name)(x, train)
        return x
