"""The pipeline's order, and masks on the feature grid."""

import dataclasses
import itertools
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from hirescam_jax.data.organs.feature_grid import to_feature_grid
from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import InMemory, eval_batches, make_batch, open_split, train_batches
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.devices.layout import Share
from hirescam_jax.errors import UserError

GRID = (2, 3, 3)
TINY = PhantomConfig(shape=(6, 12, 12))


@dataclasses.dataclass
class Counter:
    """A source whose item i is full of i."""

    size: int
    labels: tuple[str, ...] = ("a", "b")
    regions: tuple[str, ...] = ("left", "right")
    shape: tuple[int, int, int] = (2, 2, 2)
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {
            "volume": np.full(self.shape, index, np.int16),
            "findings": np.full((2, 2), index % 2, np.uint8),
            "regions": np.full((2, 1, 1, 1), index, np.uint8),
            "index": np.int32(index),
        }


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def indices(batches) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


# -- training order -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (8, 4), (5, 1)])
def test_batches_from_a_step_are_the_tail_of_all(size, batch):
    whole = indices(take(train_batches(Counter(size), Share.whole(batch), seed=3), 12))
    for step in (1, 2, 5, 11):
        tail = train_batches(Counter(size), Share.whole(batch), seed=3, start_step=step)
        assert indices(take(tail, 12 - step)) == whole[step:]


def test_order_is_a_function_of_the_seed():
    first, again, other = (
        indices(take(train_batches(Counter(20), Share.whole(4), seed=seed), 10))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 3)])
def test_every_epoch_holds_every_item_once(size, batch):
    batches = take(train_batches(Counter(size), Share.whole(batch), seed=0), 3 * size)
    order = list(itertools.chain(*indices(batches)))
    epochs = [order[i : i + size] for i in range(0, len(order), size)]
    assert len(epochs) == 3 * batch
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_batch_holds_its_items_arrays():
    source = Counter(9)
    (batch,) = take(train_batches(source, Share.whole(4), seed=0), 1)
    for i, index in enumerate(batch["index"]):
        for name, value in source[index].items():
            np.testing.assert_array_equal(batch[name][i], value)
            assert batch[name].dtype == value.dtype


@pytest.mark.parametrize("rows", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)]])
def test_shares_of_the_processes_make_the_global_batch(rows):
    whole = indices(take(train_batches(Counter(10), Share.whole(4), seed=1), 7))
    for mine in rows:
        share = Share(4, mine)
        part = indices(take(train_batches(Counter(10), share, seed=1), 7))
        assert part == [[batch[row] for row in mine] for batch in whole]
        assert indices(take(train_batches(Counter(10), share, seed=1, start_step=5), 2)) == part[5:]


def test_shares_of_an_evaluation_count_every_item_once():
    batches = [list(eval_batches(Counter(7), Share(4, mine))) for mine in [(0, 1), (2, 3)]]
    counted = [i for part in batches for b in part for i in b["index"][b["weight"] > 0].tolist()]
    assert sorted(counted) == list(range(7))


def test_share_of_the_slices_is_padded():
    source = Phantom(TINY, "train", 1, GRID)
    whole, parts = source[0], []
    for cell in range(3):  # three devices for two cells of three slices
        share = Share(1, (0,), (3 * cell, 3 * cell + 3), (cell, cell + 1))
        part = make_batch(source, [0], share)
        assert part["volume"].shape == (1, 3, 12, 12)
        parts.append({name: value[0] for name, value in part.items()})
    for name, axis in (("volume", 0), ("regions", 1)):
        joined = np.concatenate([part[name] for part in parts], axis)
        size = whole[name].shape[axis]
        np.testing.assert_array_equal(np.take(joined, range(size), axis), whole[name])
        assert not np.take(joined, range(size, joined.shape[axis]), axis).any()


WORKERS = """
import itertools, jax, numpy as np
from hirescam_jax.data.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import eval_batches, train_batches
from hirescam_jax.devices.layout import Share

source = Phantom(PhantomConfig(shape=(6, 12, 12)), "train", 7, (2, 3, 3))
for plain, worked in (
    [train_batches(source, Share.whole(3), seed=2, start_step=1, workers=n) for n in (0, 1)],
    [eval_batches(source, Share.whole(3), workers=n) for n in (0, 1)],
):
    count = 0
    for a, b in itertools.islice(zip(plain, worked), 4):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        count += 1
    print(count)
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    """In an interpreter without executed annotations, which no worker process could be sent."""
    command = [sys.executable, "-c", WORKERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["4", "3"]


# -- evaluation order -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_evaluation_takes_every_item_once(size, batch):
    batches = list(eval_batches(Counter(size), Share.whole(batch)))
    assert len(batches) == math.ceil(size / batch)
    assert {len(b["index"]) for b in batches} == {batch}
    order = np.concatenate([b["index"] for b in batches])
    weight = np.concatenate([b["weight"] for b in batches])
    assert order[:size].tolist() == list(range(size))
    assert weight.tolist() == [1] * size + [0] * (len(batches) * batch - size)
    assert not order[size:].any()


# -- opening a split ------------------------------------------------------------------------------


def test_open_split_of_the_phantom():
    data = PhantomData(TINY, train_size=5, val_size=3, test_size=2)
    for split, size in (("train", 5), ("val", 3), ("test", 2)):
        source = open_split(data, split, GRID)
        assert len(source) == size
        jax.tree.map(np.testing.assert_array_equal, source[1], Phantom(TINY, split, size, GRID)[1])


def test_chosen_labels():
    data = PhantomData(TINY, train_size=2)
    every = open_split(data, "train", GRID)
    some = open_split(data, "train", GRID, ("pacemaker", "nodule"))
    assert some.labels == ("pacemaker", "nodule")
    assert (some.regions, some.shape, some.spacing_mm, len(some)) == (
        every.regions,
        every.shape,
        every.spacing_mm,
        2,
    )
    rows = [every.labels.index("pacemaker"), every.labels.index("nodule")]
    for i in range(2):
        np.testing.assert_array_equal(some[i]["findings"], every[i]["findings"][rows])
        np.testing.assert_array_equal(some[i]["volume"], every[i]["volume"])


def test_lesions_come_along_where_they_are_asked_for():
    data = PhantomData(TINY, train_size=3)
    labels = ("nodule", "cardiomegaly", "pacemaker")
    plain, source = (open_split(data, "train", GRID, labels, w) for w in (False, True))
    truth = Phantom(TINY, "train", 3, GRID)
    cells = [np.arange(n) * c // n for n, c in zip(TINY.shape, GRID, strict=True)]
    for i in range(3):
        item = dict(source[i])
        lesions = item.pop("lesions")
        jax.tree.map(np.testing.assert_array_equal, item, plain[i])
        expected = np.zeros((3, *GRID), np.uint8)
        for k, label in enumerate(labels):
            for d, h, w in np.argwhere(truth.case(i).lesions[truth.labels.index(label)]):
                expected[k, cells[0][d], cells[1][h], cells[2][w]] = 1
        np.testing.assert_array_equal(lesions, expected)
        # A lesion may be too small for any voxel, but none is without its finding.
        assert not (lesions.any((1, 2, 3)) & ~item["findings"].any(1)).any()


def test_lesions_are_cut_and_batched_as_the_regions_are():
    source = open_split(PhantomData(TINY, train_size=2), "train", GRID, (), True)
    whole = make_batch(source, [0, 1])
    share = Share(2, (1,), (0, 1), (1, GRID[0] + 1))  # with a cell of padding
    part = make_batch(source, [1], share)
    for name in ("regions", "lesions"):
        padded = np.pad(whole[name][1], [(0, 0), (0, 1), (0, 0), (0, 0)])[:, 1:]
        np.testing.assert_array_equal(part[name][0], padded)


def test_unknown_label_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'emphisema' unknown \(did you mean 'emphysema'\?\)"):
        open_split(PhantomData(TINY), "train", GRID, ("nodule", "emphisema"))


def test_in_memory_is_the_source_itself():
    source = Phantom(TINY, "val", 4, GRID)
    kept = InMemory(source, workers=0)
    assert len(kept) == 4
    assert (kept.labels, kept.regions) == (source.labels, source.regions)
    assert (kept.shape, kept.spacing_mm) == (source.shape, source.spacing_mm)
    for i in range(4):
        jax.tree.map(np.testing.assert_array_equal, kept[i], source[i])


# -- masks on the feature grid --------------------------------------------------------------------

SIZES = [
    ((9, 8, 7), (3, 4, 2)),
    ((5, 6, 7), (4, 5, 3)),
    ((3, 4, 2), (3, 4, 2)),
    ((2, 3, 3), (4, 7, 5)),
]


def some_masks(shape) -> np.ndarray:
    masks = np.random.default_rng(0).random((3, *shape)) < 0.15
    masks[2] = False
    return masks


@pytest.mark.parametrize(("shape", "grid"), SIZES)
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16])
def test_nearest_by_loop(shape, grid, dtype):
    masks = some_masks(shape)
    small = to_feature_grid(masks.astype(dtype), grid)
    assert (small.shape, small.dtype) == ((3, *grid), np.uint8)
    for r, *cell in np.ndindex(small.shape):
        voxel = tuple(math.floor(i * n / o) for i, n, o in zip(cell, shape, grid, strict=True))
        assert small[(r, *cell)] == masks[(r, *voxel)]


@pytest.mark.parametrize(("shape", "grid"), SIZES)
def test_area_by_loop(shape, grid):
    masks = some_masks(shape)
    small = to_feature_grid(masks, grid, "area")
    for r, *cell in np.ndindex(small.shape):
        block = tuple(
            slice(math.floor(i * n / o), math.ceil((i + 1) * n / o))
            for i, n, o in zip(cell, shape, grid, strict=True)
        )
        assert small[(r, *cell)] == masks[r][block].any()


@pytest.mark.parametrize(("shape", "grid"), SIZES)
def test_trilinear_by_loop(shape, grid):
    masks = some_masks(shape)
    small = to_feature_grid(masks, grid, "trilinear")
    for r, *cell in np.ndindex(small.shape):
        corners = []
        for i, n, o in zip(cell, shape, grid, strict=True):
            centre = min(max((2 * i + 1) * n - o, 0), 2 * o * (n - 1))  # in 1 / (2 o) voxels
            low, rest = divmod(centre, 2 * o)
            corners.append([low] if rest == 0 else [low, low + 1])
        expected = any(masks[(r, *corner)] for corner in itertools.product(*corners))
        assert small[(r, *cell)] == expected


@pytest.mark.parametrize(("method", "mode"), [("area", "area"), ("trilinear", "trilinear")])
@pytest.mark.parametrize(("shape", "grid"), SIZES)
def test_area_and_trilinear_are_torchs(method, mode, shape, grid):
    torch = pytest.importorskip("torch")
    masks = some_masks(shape)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(masks[None], dtype=torch.float64), grid, mode=mode
    )
    np.testing.assert_array_equal(to_feature_grid(masks, grid, method), wanted[0].numpy() > 1e-9)


@pytest.mark.parametrize("method", ["nearest", "area", "trilinear"])
def test_dilation_by_loop(method):
    masks = some_masks((9, 8, 7))
    small = to_feature_grid(masks, (4, 5, 3), method)
    grown = to_feature_grid(masks, (4, 5, 3), method, dilate=True)
    assert grown.dtype == np.uint8
    for r, d, h, w in np.ndindex(small.shape):
        around = small[r, max(d - 1, 0) : d + 2, max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2]
        assert grown[r, d, h, w] == around.any()
    assert not grown[2].any()
