"""From a data set to batches, with Grain: shuffled and endless for training, in order otherwise.

What a training batch holds is a pure function of (seed, step): a resumed run, also on another
number of processes, continues with exactly the volumes that an uninterrupted one would have seen.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from grain.multiprocessing import SharedMemoryArray

from hirescam_jax.data.phantom.phantom import Phantom
from hirescam_jax.data.specs import PhantomData, StoreData
from hirescam_jax.data.store.store import Store
from hirescam_jax.devices.layout import Share
from hirescam_jax.errors import UserError, nearest

# Stands for "without end": Grain cannot cut its own endless repetition into batches of one.
EPOCHS = 1_000_000

Batch = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """A random-access split: item -> volume int16 [D, H, W], findings uint8 [K, R], regions uint8
    [R, d, h, w] on the feature grid, and its own index; some also lesions uint8
    [K, d, h, w].

    A source that has `read(index, volume_out, slices)` decodes its volumes, or some slices of them,
    straight into a batch. One that has a `digest` tells by it what all its volumes hold."""

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
    with_lesions: bool = False,
) -> Source:
    """One split ("train", "val" or "test") of a data set, its masks on the feature grid.

    Args:
        labels: keep these labels only, in this order; empty for all.
        with_lesions: give the lesions too, on the feature grid, where the data set has them.

    Raises:
        UserError: as the readers do, or a label that the data set has not.
    """
    size = getattr(data, f"{split}_size", 0)
    if isinstance(data, PhantomData):
        try:
            source = Phantom(
                data.phantom, split, size, grid, data.mask_method, data.dilate, with_lesions
            )
        except ValueError as error:
            raise UserError(f"config.data: {error}") from error
    else:
        source = Store(data.path, split, grid, data.mask_method, data.dilate, size)
    return ChosenLabels(source, labels) if labels else source


def digest_of(source: Any) -> str:
    """The `digest` of a source; "" where it has none."""
    return getattr(source, "digest", "")


class ChosenLabels:
    """A source with some of its labels."""

    def __init__(self, source: Source, labels: tuple[str, ...]):
        for label in labels:
            if label not in source.labels:
                raise UserError(f"config.labels: '{label}' unknown{nearest(label, source.labels)}")
        self.source, self.labels = source, labels
        self.regions, self.shape = source.regions, source.shape
        self.spacing_mm, self.digest = source.spacing_mm, digest_of(source)
        self.rows = [source.labels.index(label) for label in labels]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Batch:
        return self._chosen(self.source[index])

    def read(self, index: Any, volume_out: np.ndarray, slices: slice) -> Batch:
        bounds = slices.start, slices.stop
        return self._chosen(_read_into(self.source, index, volume_out, bounds))

    def _chosen(self, item: Batch) -> Batch:
        chosen = {name: item[name][self.rows] for name in ("findings", "lesions") if name in item}
        return {**item, **chosen}


class PermutedLabels:
    """A source whose findings are those of other patients, as a random permutation has it: what a
    model learns from it has nothing to do with its volumes (label randomisation, Adebayo et al.,
    NeurIPS 2018). The volumes of a patient get those of one other, in turn. A patient may be its
    own other, as in any permutation."""

    def __init__(self, source: Source, seed: int):
        self.source, self.labels, self.regions = source, source.labels, source.regions
        self.shape, self.spacing_mm = source.shape, source.spacing_mm
        self.digest = digest_of(source)
        patients = patients_of(source) or [str(i) for i in range(len(source))]
        number = np.unique(patients, return_inverse=True)[1]
        volumes = [np.flatnonzero(number == n) for n in range(number.max() + 1)]
        others = np.random.default_rng(seed).permutation(len(volumes))
        self.other = np.empty(len(source), int)
        for own, other in zip(volumes, others, strict=True):
            self.other[own] = np.resize(volumes[other], len(own))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Batch:
        return self._permuted(index, self.source[index])

    def read(self, index: Any, volume_out: np.ndarray, slices: slice) -> Batch:
        bounds = slices.start, slices.stop
        return self._permuted(index, _read_into(self.source, index, volume_out, bounds))

    def _permuted(self, index: Any, item: Batch) -> Batch:
        return {**item, "findings": findings_of(self.source, int(self.other[int(index)]))}


def findings_of(source: Source, index: int) -> np.ndarray:
    """Findings [K, R] of a volume; of a store without reading its voxels."""
    if isinstance(source, ChosenLabels):
        return findings_of(source.source, index)[source.rows]
    return source.head(index)[1] if isinstance(source, Store) else source[index]["findings"]


def patients_of(source: Source) -> list[str] | None:
    """The patient of each volume; None where a data set has one volume a patient."""
    if isinstance(source, ChosenLabels | PermutedLabels):
        return patients_of(source.source)
    return source.patients() if isinstance(source, Store) else None


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
        return make_batch(source, items[list(share.rows)], share, shared=bool(workers))

    return iter(_read(steps.map(load), workers))


def eval_batches(
    source: Source, share: Share, *, workers: int = 0, steps: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every item once, in order: this process's part of the batches, as in `train_batches`. The
    last batch is filled up with item 0, whose `weight` is 0.

    Args:
        steps: these batches only, by number.
    """
    size = len(source)
    if steps is None:
        steps = range(-(-size // share.batch_size))

    def load(step: int) -> Batch:
        mine = step * share.batch_size + np.array(share.rows)
        real = mine < size
        batch = make_batch(source, np.where(real, mine, 0), share, shared=bool(workers))
        return {**batch, "weight": np.float32(real)}

    batches = grain.MapDataset.source(list(steps)).map(load)
    return iter(_read(batches, workers))


def make_batch(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    share: Share | None = None,
    shared: bool = False,
) -> Batch:
    """One array of each field. Volumes are decoded in their place in the batch: there may be a
    gigabyte of them, and copying takes half as long as decoding.

    Args:
        share: which slices; all of them by default.
        shared: in shared memory, which a worker process hands over without a copy.
    """
    slices = (share and share.slices) or (0, source.shape[0])
    allocate = SharedMemoryArray if shared else np.empty
    volumes = allocate((len(indices), slices[1] - slices[0], *source.shape[1:]), np.int16)
    items = [
        _read_into(source, index, np.asarray(volumes[row]), slices)
        for row, index in enumerate(indices)
    ]
    rest = {name: np.stack([item[name] for item in items]) for name in items[0]}
    if share is not None:
        masks = {n: share.cut_regions(rest[n]) for n in ("regions", "lesions") if n in rest}
        rest |= masks
    return {**rest, "volume": volumes}


def _read_into(
    source: Source, index: Any, volume_out: np.ndarray, slices: tuple[int, int]
) -> Batch:
    """An item without its volume, whose `slices` go into `volume_out`; zeros behind its end."""
    read = getattr(source, "read", None)
    real = max(min(slices[1], source.shape[0]) - slices[0], 0)
    wanted = slice(slices[0], slices[0] + real)
    item = read(index, volume_out[:real], wanted) if read else source[index]
    if not read:
        volume_out[:real] = item["volume"][wanted]
    volume_out[real:] = 0
    return {name: value for name, value in item.items() if name != "volume"}


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


def chosen_volumes(source: Source, count: int) -> np.ndarray:
    """Numbers of `count` volumes of a split, a random choice that a larger count adds to."""
    return np.sort(np.random.default_rng(0).permutation(len(source))[:count])


def groups_of(source: Source) -> np.ndarray:
    """The patient of each volume, for `bootstrap`; its own number where a data set has one volume a
    patient."""
    patients = patients_of(source)
    return np.arange(len(source)) if patients is None else np.array(patients)
