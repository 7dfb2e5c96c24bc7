"""AxialNet with the mask loss, as in the paper (arXiv 2011.08891, Section 4).

    hirescam train configs/paper_axialnet.py --run runs/paper --data.path /data/prepared

405 x 420 x 420 voxels, batch 1 a device, SGD with momentum 0.99, at most 100 epochs, early stop
after 15 without a lower validation loss. The store must hold volumes of that size. Needs an
accelerator: one step is about 5 TFLOP.
"""

from hirescam_jax.config import SGD, Config, Preprocess
from hirescam_jax.data.specs import StoreData
from hirescam_jax.models import AxialNet

config = Config(
    model=AxialNet(dtype="bfloat16"),
    data=StoreData(path="prepared"),
    preprocess=Preprocess(hu_min=-1000.0, hu_max=800.0, mean=0.449, flip=0.5, rotate=0.5),
    optimizer=SGD(learning_rate=1e-3, momentum=0.99, weight_decay=1e-7),
    mask_weight=1 / 3,
    batch_size=1,
    epochs=100,
    patience=15,
)
