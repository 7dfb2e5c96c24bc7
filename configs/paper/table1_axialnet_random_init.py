"""Table 1, AxialNet from random weights in place of those from ImageNet.

    hirescam train configs/paper/table1_axialnet_random_init.py --run runs/NAME

About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import AxialNet

config = small_set(AxialNet(dtype="bfloat16"), weights="")
