"""A small AxialNet on real CTs with synthetic lesions.

    hirescam train configs/lesions_axialnet.py --run runs/lesions --data.path lesions_store

A starting point that has not been tuned: on 84 training volumes it learns them by heart.
"""

from hirescam_jax.config import Adam, Config, StoreData
from hirescam_jax.models import AxialNet
from hirescam_jax.preprocess import Preprocess

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
