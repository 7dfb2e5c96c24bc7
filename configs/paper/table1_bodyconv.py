"""Table 1, BodyConv: ResNet-18 features as a volume, 3D convolutions, three FC layers.

    hirescam train configs/paper/table1_bodyconv.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
Its head is not affine: its maps have no guarantee.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import BodyConv

config = small_set(BodyConv(dtype="bfloat16"))
