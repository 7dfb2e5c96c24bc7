"""Table 1, AxialNet without its four convolutions: the FC takes 14 x 14 x 512 features a slice.

    hirescam train configs/paper/table1_axialnet_no_convs.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import AxialNet

config = small_set(AxialNet(conv_widths=(), dtype="bfloat16"))
