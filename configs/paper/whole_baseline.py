"""All the data, AxialNet without the mask loss.

    hirescam train configs/paper/whole_baseline.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import whole_set
from hirescam_jax.models import AxialNet

config = whole_set(AxialNet(dtype="bfloat16"), mask_weight=0.0)
