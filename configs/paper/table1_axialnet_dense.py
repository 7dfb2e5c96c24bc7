"""AxialNet with one fully connected layer over the features of all slices (3D FC).

    hirescam train configs/paper/table1_axialnet_dense.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import AxialNet

config = small_set(AxialNet(pool="dense", dtype="bfloat16"))
