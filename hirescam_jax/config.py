"""Typed configs: a plain Python file builds one `Config`; the command line overrides any field.

# my_config.py
from hirescam_jax.config import Config, PhantomData
config = Config(data=PhantomData(train_size=2000), epochs=20)
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hirescam_jax.data.specs import PhantomData, StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet, BodyConv, Conv3DNet, CTNet


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Window, scale and augmentation; the defaults are the paper's (arXiv 2011.08891).

    Attributes:
        hu_min: Hounsfield units are clipped to [hu_min, hu_max] and brought to [0, 1].
        hu_max: see hu_min.
        mean: subtracted afterwards (the grey mean of ImageNet).
        flip: probability of a flip along one random axis, in training.
        rotate: probability of an axial rotation by 90, 180 or 270 degrees, in training.
    """

    hu_min: float = -1000.0
    hu_max: float = 800.0
    mean: float = 0.449
    flip: float = 0.5
    rotate: float = 0.5

    def normalize(self, volume: Array) -> Float[Array, "*dims"]:
        """Hounsfield units (any dtype, any shape) -> float32, windowed, in [-mean, 1 - mean]."""
        volume = jnp.clip(volume.astype(jnp.float32), self.hu_min, self.hu_max)
        return (volume - self.hu_min) / (self.hu_max - self.hu_min) - self.mean


@dataclasses.dataclass(frozen=True)
class SGD:
    """The paper's optimiser: the weight decay is L2, added to the gradient before momentum."""

    learning_rate: float = 1e-3
    momentum: float = 0.99
    weight_decay: float = 1e-7


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW with a linear warm-up of a tenth of the training and a cosine decay to zero."""

    learning_rate: float = 2e-3
    weight_decay: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. The defaults are the paper's set-up.

    Attributes:
        model: the network.
        data: phantom CTs, or a prepared store.
        preprocess: window, scale and augmentation, done on the device.
        optimizer: and its learning rate.
        labels: train on these labels only; empty for all labels of the data.
        mask_weight: lambda of the mask loss; 0 trains without it.
        batch_size: volumes a step, over all devices and processes.
        micro_batches: compute a batch in so many parts, one after the other, with one update: less
            memory. BatchNorm sees a part at a time.
        depth_devices: devices that share the slices of one volume; the others split the batch.
        epochs: at most.
        save_steps: write a checkpoint every so many steps too; 0: after each epoch only.
        patience: stop after so many epochs without a lower validation loss.
        workers: data-loading processes; 0 loads in threads of the training process.
        seed: of the initial weights, the order of the data and the augmentation.
        weights: start from this file (.pth, .safetensors), of a whole model, or of a ResNet as in
            torchvision for the backbone, with the rest at random. Not needed to resume.
        permute_labels: train on findings that are shuffled between patients, by `seed`: a check of
            maps, which should look like nothing then (`hirescam compare`). The validation keeps its
            own, and its loss hardly falls: give `patience` as many epochs as you train, and compare
            the latest checkpoint.
    """

    model: AxialNet | Conv3DNet | BodyConv | CTNet = AxialNet()
    data: PhantomData | StoreData = PhantomData()
    preprocess: Preprocess = Preprocess()
    optimizer: SGD | Adam = SGD()
    labels: tuple[str, ...] = ()
    mask_weight: float = 1 / 3
    batch_size: int = 1
    micro_batches: int = 1
    depth_devices: int = 1
    epochs: int = 100
    save_steps: int = 0
    patience: int = 15
    workers: int = 0
    seed: int = 0
    weights: str = ""
    permute_labels: bool = False


def measured_alike(config: Config) -> Config:
    """For runs that are measured in the same way, however the masks of their mask loss were made:
    nearest and undilated ones."""
    data = dataclasses.replace(config.data, mask_method="nearest", dilate=False)
    return dataclasses.replace(config, data=data)


def wherever_trained(config: Config) -> Config:
    """Without what tells where and how often a run is computed and saved, not what comes out."""
    return dataclasses.replace(config, workers=0, depth_devices=1, save_steps=0)


def check_sizes(config: Config) -> None:
    """Raises UserError for a number that no training can have."""
    least_of = {"batch_size": 1, "micro_batches": 1, "epochs": 1, "save_steps": 0}
    for name, least in least_of.items():
        if getattr(config, name) < least:
            raise UserError(f"config.{name} must be at least {least}, got {getattr(config, name)}")
