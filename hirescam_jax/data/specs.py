"""What a config's `data` may be: phantom CTs, or a prepared store."""

import dataclasses

from hirescam_jax.data.organs.feature_grid import Method
from hirescam_jax.data.phantom.phantom import PhantomConfig


@dataclasses.dataclass(frozen=True)
class PhantomData:
    """The embedded procedural thorax CTs (`hirescam_jax.data.phantom`).

    mask_method, dilate: as for `StoreData`.
    """

    phantom: PhantomConfig = PhantomConfig()
    train_size: int = 800
    val_size: int = 200
    test_size: int = 200
    mask_method: Method = "nearest"
    dilate: bool = False


@dataclasses.dataclass(frozen=True)
class StoreData:
    """A store that `hirescam prepare` wrote (`hirescam_jax.data.store`).

    mask_method: how organ masks come to the feature grid; the paper's choice is "nearest".
    dilate: grow them there by one cell.
    train_size: use so many training volumes, chosen at random once for all; 0 uses all.
    val_size, test_size: the same for the other splits.
    """

    path: str
    mask_method: Method = "nearest"
    dilate: bool = False
    train_size: int = 0
    val_size: int = 0
    test_size: int = 0
