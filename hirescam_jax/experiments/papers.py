"""The experiments of the HiResCAM papers (arXiv 2011.08891, 2111.12215) as configs.

`configs/paper/` has a file for each; all share one set-up: SGD with momentum 0.99, batch 1, at most
100 epochs, early stop after 15 epochs without a lower validation loss. `reduced` makes the same
experiment small enough for a laptop.
"""

import dataclasses
from pathlib import Path
from typing import Any

from hirescam_jax.config import Adam, Config, Preprocess, wherever_trained
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData, StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet, BodyConv, Conv3DNet
from hirescam_jax.runs.run import Header

# Table 1 and the comparison of mask sizes use a part of the data.
SMALL_TRAIN, SMALL_VAL = 2000, 1000
STORE = "prepared"
# What torchvision calls ResNet18_Weights.IMAGENET1K_V1; looked for in the working folder.
IMAGENET = "resnet18-f37072fd.pth"
REDUCED_SHAPE = (48, 48, 48)  # (D, H, W)


def small_set(
    model: Any, mask_weight: float = 0.0, *, weights: str = IMAGENET, **data: Any
) -> Config:
    """An experiment on 2,000 training and 1,000 validation volumes; `data`: fields of StoreData."""
    part = StoreData(STORE, train_size=SMALL_TRAIN, val_size=SMALL_VAL, **data)
    return Config(model=model, data=part, mask_weight=mask_weight, weights=weights)


def whole_set(model: Any, mask_weight: float) -> Config:
    """An experiment on all volumes: 25,355 for training, 2,085 validation, 7,209 test."""
    return Config(model=model, data=StoreData(STORE), mask_weight=mask_weight, weights=IMAGENET)


def reduced(config: Config) -> Config:
    """The same experiment in a minute on two cores: a narrow network of the same kind on phantom
    CTs, with an optimiser that learns in 800 steps.

    What the experiment is about (kind of network, pooling, convolutions, mask loss or not, how
    the masks come to the grid) stays; a mask loss is weighed as in the demo.
    """
    data: Any = config.data
    return dataclasses.replace(
        config,
        model=_narrow(config.model),
        data=PhantomData(
            PhantomConfig(shape=REDUCED_SHAPE),
            train_size=640,
            val_size=128,
            test_size=192,
            mask_method=data.mask_method,
            dilate=data.dilate,
        ),
        preprocess=Preprocess(flip=0.0, rotate=0.0),
        optimizer=Adam(learning_rate=4e-3),
        mask_weight=1.5 if config.mask_weight else 0.0,
        weights="",
        batch_size=8,
        epochs=10,
    )


def check_made_with(run: Path, config: Config) -> None:
    """Raises UserError if a run was made with another config: it does not belong into one table
    with runs of this one. How many labels there are, the data says."""
    saved = Header.read(run).config
    model: Any = config.model
    wanted = dataclasses.replace(config, model=model.clone(num_labels=saved.model.num_labels))
    for spec in dataclasses.fields(Config):
        before, now = (getattr(wherever_trained(c), spec.name) for c in (saved, wanted))
        if before != now:
            texts = (" ".join(repr(value).split()) for value in (before, now))
            made, asked = (text if len(text) < 60 else text[:57] + "..." for text in texts)
            raise UserError(
                f"{run}: was made with another config.{spec.name} ({made}, not {asked}): give the "
                "options that it was made with, or choose another folder"
            )


def _narrow(model: Any) -> Any:
    """A narrow network of the same kind, for volumes of `REDUCED_SHAPE`."""
    narrow_resnet = {"blocks": (1, 1, 1), "widths": (8, 16, 32), "stem": "small"}
    few_hidden = {"hidden": (32, 24), "dtype": "float32"}
    if isinstance(model, AxialNet):
        convs = (32,) if model.conv_widths else ()
        return model.clone(**narrow_resnet, conv_widths=convs, conv_padding="SAME", dtype="float32")
    if isinstance(model, Conv3DNet):
        return model.clone(widths=(16, 32), narrow=(32, 16), **few_hidden)
    if isinstance(model, BodyConv):
        # Cells of 6 x 8 x 8 voxels: with its usual 27 slices few organs have a cell of their own.
        small = model.clone(blocks=(1, 1), widths=(8, 32), stem="small", conv_widths=(16,))
        return small.clone(channels=2, **few_hidden)
    return model.clone(**narrow_resnet, conv_widths=(16, 8), **few_hidden)
