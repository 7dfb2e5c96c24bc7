"""All the data, AxialNet with the mask loss (arXiv 2111.12215): the paper's main result.

    hirescam train configs/paper/whole_mask_loss.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
The store must hold volumes of 405 x 420 x 420 voxels. SGD with momentum 0.99, batch 1, at most 100
epochs, early stop after 15 without a lower validation loss.
"""

from hirescam_jax.experiments.papers import whole_set
from hirescam_jax.models import AxialNet

config = whole_set(AxialNet(dtype="bfloat16"), mask_weight=1 / 3)
