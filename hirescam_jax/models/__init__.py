"""The networks: Linen modules with `features` and `head`, and __call__ = head(features(x))."""

from hirescam_jax.models.axialnet import AxialNet
from hirescam_jax.models.conv3d import Conv3DNet

__all__ = ["AxialNet", "Conv3DNet"]
