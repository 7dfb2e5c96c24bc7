"""From a data set to batches, with Grain: shuffled and endless for training, in order otherwise.

What a training batch holds is a pure function of (seed, step): a resumed run, also on another
number of processes, continues with exactly the volumes that an uninterrupted one would have seen.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from hirescam_jax.config import PhantomData, StoreData, nearest
from hirescam_jax.data.phantom import Phantom
from hirescam_jax.data.store import Store
from hirescam_jax.errors import UserError
from hirescam_jax.sharding import Share

# Stands for "without end": Grain cannot cut its own endless repetition into batches of one.
EPOCHS = 1_000_000

Batch = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """A random-access split: item -> volume int16 [D, H, W], findings uint8 [K, R], regions uint8
    [R, d, h, w] on the feature grid, and its own index."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def regions(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def spacing_mm(self) -> tuple[float, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Batch: ...


def open_split(
    data: PhantomData | StoreData,
    split: str,
    grid: tuple[int, int, int],
    labels: tuple[str, ...] = (),
) -> Source:
    """One split ("train", "val" or "test") of a data set, its masks on the feature grid.

    Args:
        labels: keep these labels only, in this order; empty for all.

    Raises:
        UserError: as the readers do, or a label that the data set has not.
    """
    if isinstance(data, PhantomData):
        try:
            source = Phantom(data.phantom, split, getattr(data, f"{split}_size"), grid)
        except ValueError as error:
            raise UserError(f"config.data: {error}") from error
    else:
        source = Store(data.path, split, grid, data.mask_method, data.dilate)
    return ChosenLabels(source, labels) if labels else source


class ChosenLabels:
    """A source with some of its labels."""

    def __init__(self, source: Source, labels: tuple[str, ...]):
        for label in labels:
            if label not in source.labels:
                raise UserError(f"config.labels: '{label}' unknown{nearest(label, source.labels)}")
        self.source, self.labels = source, labels
        self.regions, self.shape = source.regions, source.shape
        self.spacing_mm = source.spacing_mm
        self.rows = [source.labels.index(label) for label in labels]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Batch:
        item = dict(self.source[index])
        item["findings"] = item["findings"][self.rows]
        return item


class InMemory:
    """A source whose items are made once, by `workers` processes, and kept."""

    def __init__(self, source: Source, workers: int, progress: Any = iter):
        self.labels, self.regions = source.labels, source.regions
        self.shape, self.spacing_mm = source.shape, source.spacing_mm
        dataset = grain.MapDataset.source(source)  # type: ignore[arg-type]
        # Workers hand over views of shared memory, which must be copied to be kept.
        self.items = [
            {name: np.array(value) for name, value in item.items()}
            for item in progress(_read(dataset, workers))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Batch:
        return self.items[index]


def train_batches(
    source: Source, share: Share, *, seed: int, start_step: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """This process's part of every batch from `start_step` on, without end.

    The global batch of step t is items [t * B, (t + 1) * B) of an endless sequence that is
    shuffled anew each epoch; of these a process reads the rows, and of their slices those, that
    its own devices have.
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(EPOCHS)
    steps = order.batch(share.batch_size)[start_step:]

    def load(items: np.ndarray) -> Batch:
        return _stack([share.cut(source[i]) for i in items[list(share.rows)]])

    return iter(_read(steps.map(load), workers))


def eval_batches(source: Source, share: Share, *, workers: int = 0) -> Iterator[Batch]:
    """Every item once, in order: this process's part of the batches, as in `train_batches`. The
    last batch is filled up with item 0, whose `weight` is 0."""

    def load(items: np.ndarray) -> Batch:
        mine = items[list(share.rows)]
        batch = _stack([share.cut(source[i if i < len(source) else 0]) for i in mine])
        return {**batch, "weight": np.float32(mine < len(source))}

    padded = -(-len(source) // share.batch_size) * share.batch_size
    return iter(_read(grain.MapDataset.range(padded).batch(share.batch_size).map(load), workers))


def _stack(items: Sequence[Batch]) -> Batch:
    """One array of each field; a batch of one is a view, since a volume takes a while to copy."""
    if len(items) == 1:
        return {name: np.asarray(value)[None] for name, value in items[0].items()}
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


def _read(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    threads = grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=4)
    items = dataset.to_iter_dataset(threads)
    if workers:
        _parse_absl_flags()
        items = items.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return items


def _parse_absl_flags() -> None:
    """Grain's worker processes read absl flags, which must have been parsed once."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["hirescam"], known_only=True)
