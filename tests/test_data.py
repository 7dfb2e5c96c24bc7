"""The pipeline's order, the prepared folder, and masks on the feature grid."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from hirescam_jax.config import FolderData, PhantomData
from hirescam_jax.data.folder import Folder, write_folder
from hirescam_jax.data.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import InMemory, eval_batches, open_split, train_batches
from hirescam_jax.data.regions import to_feature_grid
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
    whole = indices(take(train_batches(Counter(size), batch, seed=3), 12))
    for step in (1, 2, 5, 11):
        tail = train_batches(Counter(size), batch, seed=3, start_step=step)
        assert indices(take(tail, 12 - step)) == whole[step:]


def test_order_is_a_function_of_the_seed():
    first, again, other = (
        indices(take(train_batches(Counter(20), 4, seed=seed), 10)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 3)])
def test_every_epoch_holds_every_item_once(size, batch):
    batches = take(train_batches(Counter(size), batch, seed=0), 3 * size)
    order = list(itertools.chain(*indices(batches)))
    epochs = [order[i : i + size] for i in range(0, len(order), size)]
    assert len(epochs) == 3 * batch
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_batch_holds_its_items_arrays():
    source = Counter(9)
    (batch,) = take(train_batches(source, 4, seed=0), 1)
    for i, index in enumerate(batch["index"]):
        for name, value in source[index].items():
            np.testing.assert_array_equal(batch[name][i], value)
            assert batch[name].dtype == value.dtype


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_of_the_processes_make_the_global_batch(monkeypatch, processes):
    whole = indices(take(train_batches(Counter(10), 4, seed=1), 7))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        parts.append(indices(take(train_batches(Counter(10), 4, seed=1), 7)))
        later = indices(take(train_batches(Counter(10), 4, seed=1, start_step=5), 2))
        assert later == parts[-1][5:]
    for step, batch in enumerate(whole):
        assert [len(part[step]) for part in parts] == [4 // processes] * processes
        assert sorted(itertools.chain(*(part[step] for part in parts))) == sorted(batch)


WORKERS = """
import itertools, jax, numpy as np
from hirescam_jax.data.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import eval_batches, train_batches

source = Phantom(PhantomConfig(shape=(6, 12, 12)), "train", 7, (2, 3, 3))
for plain, worked in (
    [train_batches(source, 3, seed=2, start_step=1, workers=n) for n in (0, 1)],
    [eval_batches(source, 3, workers=n) for n in (0, 1)],
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
    batches = list(eval_batches(Counter(size), batch))
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


# -- prepared folder ------------------------------------------------------------------------------

LABELS, REGIONS, SHAPE = ("nodule", "edema", "stent"), ("lung", "heart"), (4, 6, 6)


def cases(count: int):
    for i in range(count):
        rng = np.random.default_rng(i)
        yield (
            f"case_{i}",
            rng.integers(-1024, 3071, SHAPE).astype(np.int16),
            (rng.random((3, 2)) < 0.5).astype(np.uint8),
            rng.random((2, *SHAPE)) < 0.5,
        )


@pytest.fixture
def folder(tmp_path):
    whole = list(cases(5))
    write_folder(
        tmp_path / "prepared",
        labels=LABELS,
        regions=REGIONS,
        shape=SHAPE,
        spacing_mm=(2.5, 1.5, 1.25),
        splits={"train": whole[:3], "val": whole[3:4], "test": whole[4:]},
    )
    return tmp_path / "prepared"


def test_folder_there_and_back(folder):
    source = open_split(FolderData(str(folder)), "train", GRID)
    assert len(source) == 3
    assert (source.labels, source.regions) == (LABELS, REGIONS)
    assert (source.shape, source.spacing_mm) == (SHAPE, (2.5, 1.5, 1.25))
    for i, (_, volume, findings, masks) in enumerate(cases(3)):
        item = source[np.int64(i)]
        np.testing.assert_array_equal(item["volume"], volume)
        np.testing.assert_array_equal(item["findings"], findings)
        np.testing.assert_array_equal(item["regions"], masks[:, ::2, ::2, ::2])
        assert item["index"] == i
        kinds = {name: array.dtype.name for name, array in item.items()}
        assert kinds == {
            "volume": "int16",
            "findings": "uint8",
            "regions": "uint8",
            "index": "int32",
        }
    assert [len(Folder(folder, s, GRID)) for s in ("val", "test")] == [1, 1]
    np.testing.assert_array_equal(Folder(folder, "test", GRID)[0]["volume"], list(cases(5))[4][1])


def test_folder_feeds_the_pipeline(folder):
    batches = list(eval_batches(Folder(folder, "train", GRID), 2))
    assert indices(batches) == [[0, 1], [2, 0]]
    assert batches[0]["volume"].shape == (2, *SHAPE)


def test_folder_that_exists_is_not_overwritten(folder):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UserError, match="exists"):
        write_folder(
            folder, labels=(), regions=(), shape=SHAPE, spacing_mm=(1.0, 1.0, 1.0), splits={}
        )
    assert sorted(p.name for p in folder.iterdir()) == before


def test_folder_that_was_interrupted_does_not_read_as_whole(tmp_path):
    def broken():
        yield from cases(1)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(
            tmp_path / "half",
            labels=LABELS,
            regions=REGIONS,
            shape=SHAPE,
            spacing_mm=(1.0, 1.0, 1.0),
            splits={"train": broken()},
        )
    with pytest.raises(UserError, match="no prepared folder"):
        Folder(tmp_path / "half", "train", GRID)


def rewrite(folder, **changes):
    path = folder / "case_1.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def damage_missing(folder):
    (folder / "case_1.npz").unlink()


def damage_empty(folder):
    (folder / "case_1.npz").write_bytes(b"")


def damage_text(folder):
    (folder / "case_1.npz").write_text("no zip at all")


def damage_truncated(folder):
    path = folder / "case_1.npz"
    path.write_bytes(path.read_bytes()[:-200])


def damage_flipped_bytes(folder):
    path = folder / "case_1.npz"
    data = bytearray(path.read_bytes())
    for i in range(150, 400):
        data[i] ^= 0x5A
    path.write_bytes(bytes(data))


def damage_pickled(folder):
    rewrite(folder, volume=np.array([{"a": 1}], dtype=object))


def damage_volume_shape(folder):
    rewrite(folder, volume=np.zeros((4, 6, 5), np.int16))


def damage_regions_shape(folder):
    rewrite(folder, regions=np.zeros((1, *SHAPE), np.uint8))


def damage_findings_shape(folder):
    rewrite(folder, findings=np.zeros((3, 3), np.uint8))


def damage_no_findings(folder):
    rewrite(folder, findings=None)


def damage_plain_npy(folder):
    with (folder / "case_1.npz").open("wb") as file:
        np.save(file, np.zeros(SHAPE, np.int16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "listed in dataset.json but missing"),
        (damage_empty, "not a readable .npz"),
        (damage_text, "not a readable .npz"),
        (damage_truncated, "not a readable .npz"),
        (damage_flipped_bytes, "not a readable .npz"),
        (damage_pickled, "not a readable .npz"),
        (damage_plain_npy, "not a readable .npz"),
        (damage_volume_shape, "volume has shape (4, 6, 5), not (4, 6, 6)"),
        (damage_regions_shape, "regions has shape (1, 4, 6, 6), not (2, 4, 6, 6)"),
        (damage_findings_shape, "findings has shape (3, 3), not (3, 2)"),
        (damage_no_findings, "no array"),
    ],
)
def test_damaged_volumes(folder, damage, message):
    damage(folder)
    source = Folder(folder, "train", GRID)
    assert source[0]["index"] == 0
    with pytest.raises(UserError) as caught:
        source[1]
    assert str(folder / "case_1.npz") in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"format": None}, "format None, this version reads 1"),
        ({"labels": None}, "no field labels"),
        ({"splits": {"train": []}}, "split 'train' is missing or empty"),
        ({"splits": {"val": ["case_1"]}}, "split 'train' is missing or empty"),
    ],
)
def test_bad_headers(folder, change, message):
    path = folder / "dataset.json"
    header = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}))
    with pytest.raises(UserError) as caught:
        Folder(folder, "train", GRID)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1, "splits": 3}'])
def test_header_that_is_no_header(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        Folder(folder, "train", GRID)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no prepared folder"):
        Folder(tmp_path / "none", "train", GRID)


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
