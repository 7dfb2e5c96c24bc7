"""Table 1, AxialNet: 2D ResNet-18, four convolutions, mean over the slices.

    hirescam train configs/paper/table1_axialnet.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import AxialNet

config = small_set(AxialNet(dtype="bfloat16"))
