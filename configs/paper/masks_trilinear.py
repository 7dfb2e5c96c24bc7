"""Masks of the mask loss brought to the feature grid by 'trilinear', not grown.

    hirescam train configs/paper/masks_trilinear.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import AxialNet

config = small_set(AxialNet(dtype="bfloat16"), 1 / 3, mask_method="trilinear")
