"""A small AxialNet on real CTs with synthetic lesions.

    hirescam train configs/lesions_axialnet.py --run runs/lesions --data.path lesions_store

With 560 training volumes of 48 x 64 x 64 voxels of 6 mm it learns effusions, ground glass and
consolidations, and where they are; nodules and calcifications are too small for that spacing.
hirescam_jax/data/README.md has the figures and the commands that make the data.
"""

from hirescam_jax.config import Adam, Config, Preprocess
from hirescam_jax.data.specs import StoreData
from hirescam_jax.models import AxialNet

config = Config(
    model=AxialNet(
        blocks=(1, 1, 1),
        widths=(8, 16, 32),
        stem="small",
        conv_widths=(32,),
        conv_padding="SAME",
    ),
    data=StoreData(path="lesions_store"),
    preprocess=Preprocess(flip=0.5, rotate=0.0),
    optimizer=Adam(learning_rate=4e-3),
    mask_weight=3.0,
    batch_size=8,
    epochs=20,
)
