"""Table 1, CTNet: ResNet-18 features, 3D convolutions with the slices as channels, three FC.

    hirescam train configs/paper/table1_ctnet.py --run runs/NAME

Starts from torchvision's resnet18-f37072fd.pth and reads the store `prepared` (--weights,
--data.path). About 5 TFLOP a step; `--reduced` makes it a minute on phantom CTs.
Its feature map has no axis of slices, so no mask loss and no maps in the body.
"""

from hirescam_jax.experiments.papers import small_set
from hirescam_jax.models import CTNet

config = small_set(CTNet(dtype="bfloat16"))
