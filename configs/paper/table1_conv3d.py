"""Table 1, 3DConv: strided 3D convolutions and three FC layers, from random weights.

    hirescam train configs/paper/table1_conv3d.py --run runs/NAME

`--reduced` makes it a minute on phantom CTs. Its head is not affine: its maps have no guarantee.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import Conv3DNet

config = small_set(Conv3DNet(dtype="bfloat16"), weights="")
