"""The paper's 3DConv, narrowed, on phantom CTs of 81 x 108 x 108 voxels.

    hirescam train configs/phantom_conv3d.py --run runs/conv3d

Its head is not affine, so its HiResCAM maps carry no guarantee; `hirescam explain` reports what
they leave unexplained.
"""

from hirescam_jax.config import Adam, Config
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.models import Conv3DNet

config = Config(
    model=Conv3DNet(widths=(16, 32, 64), narrow=(32, 16), hidden=(64, 48)),
    data=PhantomData(PhantomConfig(shape=(81, 108, 108)), train_size=512),
    optimizer=Adam(),
    batch_size=8,
    epochs=10,
    workers=2,
)
