"""The store: every bit comes back, whatever is damaged is named, and ArrayRecord can read it."""

import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from hirescam_jax.cli import main as cli
from hirescam_jax.data.organs.feature_grid import to_feature_grid
from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig
from hirescam_jax.data.pipeline import eval_batches, make_batch, open_split, patients_of
from hirescam_jax.data.specs import StoreData
from hirescam_jax.data.store import codec
from hirescam_jax.data.store.codec import Encoded, Record, encode
from hirescam_jax.data.store.shards import read_at, write_shard
from hirescam_jax.data.store.store import Store, grid_affine, write_store
from hirescam_jax.devices.layout import Share
from hirescam_jax.errors import UserError
from hirescam_jax.reports.store_page import HU_EDGES, _thumbnail, inspect_store
from tests.web_page import Page

GRID = (2, 3, 3)
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
def store(tmp_path):
    whole = list(cases(5))
    write_store(
        tmp_path / "store",
        labels=LABELS,
        regions=REGIONS,
        shape=SHAPE,
        spacing_mm=(2.5, 1.5, 1.25),
        splits={"train": whole[:3], "val": whole[3:4], "test": whole[4:]},
    )
    return tmp_path / "store"


def record(shape=(9, 21, 34), regions=3, seed=0) -> Record:
    rng = np.random.default_rng(seed)
    masks = np.zeros((regions, *shape), bool)
    masks[0, 2:7, 3:18, 5:30] = rng.random((5, 15, 25)) < 0.05
    masks[1] = True
    return Record(
        id="study",
        patient="Jörg",
        volume=rng.integers(-(2**15), 2**15, shape).astype(np.int16),
        findings=rng.integers(0, 2, (4, regions)).astype(np.uint8),
        masks=masks,
        affine=rng.normal(size=(4, 4)),
        source={"path": "a/b.nii.gz", "shape": [1, 2, 3]},
    )


# -- a record -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 21, 34), (1, 1, 1), (2, 3, 8), (5, 64, 9)])
def test_every_bit_of_a_record_comes_back(shape):
    rng = np.random.default_rng(1)
    masks = rng.random((2, *shape)) < 0.3
    wanted = Record(
        "a",
        "p",
        rng.integers(-(2**15), 2**15, shape).astype(np.int16),
        rng.integers(0, 2, (3, 2)).astype(np.uint8),
        masks,
        rng.normal(size=(4, 4)),
        {"path": "x"},
    )
    data = encode(wanted)
    assert data == encode(wanted)
    found = Encoded(data)
    np.testing.assert_array_equal(found.volume(), wanted.volume)
    np.testing.assert_array_equal(found.findings, wanted.findings)
    np.testing.assert_array_equal(found.masks(), masks)
    np.testing.assert_array_equal(found.affine, wanted.affine)
    assert (found.id, found.header["patient"], found.header["source"]) == ("a", "p", {"path": "x"})


def test_decodes_into_a_given_array():
    wanted = record()
    out = np.zeros(wanted.volume.shape, np.int16)
    assert Encoded(encode(wanted)).volume(out) is out
    np.testing.assert_array_equal(out, wanted.volume)
    with pytest.raises(ValueError, match="out must be int16"):
        Encoded(encode(wanted)).volume(np.zeros((2, 2, 2), np.int16))


@pytest.mark.parametrize("frame_bytes", [1, 3000, 2**20])
def test_slices_are_those_of_the_whole(monkeypatch, frame_bytes):
    """Frames of one slice, of three and of all nine."""
    monkeypatch.setattr(codec, "FRAME_BYTES", frame_bytes)
    wanted = record()
    encoded = Encoded(encode(wanted))
    for start, stop in itertools.combinations_with_replacement(range(10), 2):
        found = encoded.volume(slices=slice(start, stop))
        np.testing.assert_array_equal(found, wanted.volume[start:stop])
        out = np.zeros((stop - start, 21, 34), np.int16)
        assert encoded.volume(out, slice(start, stop)) is out
        np.testing.assert_array_equal(out, wanted.volume[start:stop])


def test_frames_without_wanted_slices_are_not_decompressed(monkeypatch):
    monkeypatch.setattr(codec, "FRAME_BYTES", 3000)  # three slices of 21 x 34 voxels
    data = bytearray(encode(record()))
    end = len(data) - len(Encoded(bytes(data))._frames[-1])
    size = len(Encoded(bytes(data))._frames[1])
    data[end - size : end] = bytes(size)
    broken = Encoded(bytes(data))
    for wanted in (slice(0, 3), slice(1, 2), slice(6, 9), slice(8, 9)):
        np.testing.assert_array_equal(broken.volume(slices=wanted), record().volume[wanted])
    for wanted in (slice(0, 4), slice(5, 7), slice(None)):
        with pytest.raises(ValueError, match="lengths of a compressed array"):
            broken.volume(slices=wanted)


@pytest.mark.parametrize("method", ["nearest", "area", "trilinear"])
@pytest.mark.parametrize("grid", [(9, 21, 34), (3, 6, 6), (4, 5, 3), (12, 30, 40), (1, 1, 1)])
@pytest.mark.parametrize("dilate", [False, True])
def test_regions_are_those_of_the_whole_masks(method, grid, dilate):
    wanted = record()
    found = Encoded(encode(wanted)).regions(grid, method, dilate)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, to_feature_grid(wanted.masks, grid, method, dilate))


def test_real_ct_is_kept_to_the_bit_and_smaller(real_data):
    from hirescam_jax.data.grid import to_grid
    from hirescam_jax.data.volume import read_ct

    scan = read_ct(real_data / "ct" / "tcga_34_2605_ct3mm.nii.gz")
    volume, affine = to_grid(scan, (3, 3, 3), (100, 120, 120))
    masks = (volume < -500)[None]
    data = encode(Record("a", "a", volume, np.zeros((0, 1), np.uint8), masks, affine, {}))
    np.testing.assert_array_equal(Encoded(data).volume(), volume)
    np.testing.assert_array_equal(Encoded(data).masks(), masks)
    assert len(data) < 0.55 * volume.nbytes


@pytest.mark.parametrize("cut", [0, 5, 11, 200, -1])
def test_cut_records_are_refused(cut):
    with pytest.raises((ValueError, EOFError)):
        Encoded(encode(record())[:cut]).volume()


def test_a_compressed_array_that_claims_another_size_is_refused():
    data = bytearray(encode(record()))
    position = len(data) - len(Encoded(bytes(data))._frames[-1])
    data[position + 4 : position + 8] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(ValueError, match="lengths of a compressed array"):
        Encoded(bytes(data)).volume()


# -- a shard --------------------------------------------------------------------------------------


def test_shard_is_an_array_record_file_and_read_by_place(tmp_path):
    """Sizes around the blocks of the format, and one above what a single call can read."""
    rng = np.random.default_rng(0)
    sizes = [1, 100, 65512, 65513, 65536, 3 * 65536, 2**20 + 7, 40 * 2**20, 5]
    records = [rng.bytes(size) for size in sizes]
    path = tmp_path / "x.array_record"
    places = write_shard(path, iter(records))
    assert [place.size for place in places] == sizes
    reader = ArrayRecordReader(str(path))
    assert reader.num_records() == len(records)
    with path.open("rb") as file:
        for i in (8, 3, 0, 7, 1, 2, 4, 5, 6):
            assert bytes(read_at(file.fileno(), places[i])) == records[i] == reader.read([i])[0]
    reader.close()


def test_shard_without_records(tmp_path):
    assert write_shard(tmp_path / "x.array_record", []) == []
    assert (tmp_path / "x.array_record").exists()


FULL = """
import os, resource, sys
from pathlib import Path
from hirescam_jax.data.store.shards import write_shard
from hirescam_jax.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
try:
    write_shard(Path(sys.argv[1]), (os.urandom(1_000_000) for _ in range(5)))
except UserError as error:
    print(error)
"""


def test_file_that_cannot_grow_leaves_nothing(tmp_path):
    path = tmp_path / "x.array_record"
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{path}: cannot be written (" in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted_shard_leaves_nothing(tmp_path):
    def broken():
        yield b"a"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.array_record", broken())
    assert not list(tmp_path.iterdir())


# -- a store --------------------------------------------------------------------------------------


def test_there_and_back(store):
    source = open_split(StoreData(str(store)), "train", GRID)
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
    assert [len(Store(store, s, GRID)) for s in ("val", "test")] == [1, 1]
    np.testing.assert_array_equal(Store(store, "test", GRID)[0]["volume"], list(cases(5))[4][1])


def test_random_access_is_order(store):
    source = Store(store, "train", GRID)
    assert source.ids == ["case_0", "case_1", "case_2"]
    whole = list(cases(3))
    for i in (2, 0, 1, 1, 2, 0):
        np.testing.assert_array_equal(source[i]["volume"], whole[i][1])
    with pytest.raises(IndexError):
        source[3]


def test_mask_method_and_dilation_are_the_configs(store):
    _, _, _, masks = next(cases(1))
    for method, dilate in itertools.product(("nearest", "area", "trilinear"), (False, True)):
        source = open_split(StoreData(str(store), method, dilate), "train", GRID)
        wanted = to_feature_grid(masks, GRID, method, dilate)
        np.testing.assert_array_equal(source[0]["regions"], wanted)


def test_record_and_affine(store):
    source = Store(store, "train", GRID)
    found = source.record(1)
    assert (found.id, found.patient) == ("case_1", "case_1")
    np.testing.assert_array_equal(found.masks, list(cases(2))[1][3])
    affine = grid_affine(SHAPE, (2.5, 1.5, 1.25))
    np.testing.assert_array_equal(source.affine(1), affine)
    centre = (np.asarray(SHAPE) - 1) / 2
    np.testing.assert_allclose(affine @ [*centre, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(affine @ [1, 0, 0, 0], [0, 0, -2.5, 0])  # downwards
    np.testing.assert_allclose(affine @ [0, 0, 1, 0], [-1.25, 0, 0, 0])  # to the left


def test_patients(store):
    source = open_split(StoreData(str(store)), "train", GRID)
    assert patients_of(source) == ["case_0", "case_1", "case_2"]
    chosen = open_split(StoreData(str(store)), "train", GRID, ("nodule",))
    assert patients_of(chosen) == patients_of(source)
    assert patients_of(Phantom(PhantomConfig(), "train", 2, GRID)) is None


def test_head_is_read_alone_however_long_it_is(tmp_path):
    labels = tuple(f"label_{i}" for i in range(3000))
    findings = np.random.default_rng(0).integers(0, 2, (3000, 2)).astype(np.uint8)
    volume, masks = np.zeros(SHAPE, np.int16), np.zeros((2, *SHAPE), np.uint8)
    masks[1, 1, 2:4, 3] = 1
    write_store(
        tmp_path / "store",
        labels=labels,
        regions=REGIONS,
        shape=SHAPE,
        spacing_mm=(1.0, 1.0, 1.0),
        splits={"train": [("x" * 20000, volume, findings, masks)]},
    )
    header, found = Store(tmp_path / "store", "train", GRID).head(0)
    assert header["id"] == "x" * 20000
    assert header["boxes"] == [[[0, 0]] * 3, [[1, 2], [2, 4], [3, 4]]]
    np.testing.assert_array_equal(found, findings)


def test_reads_into_a_given_array(store):
    out = np.zeros(SHAPE, np.int16)
    item = Store(store, "train", GRID).read(2, out)
    assert item["volume"] is out
    np.testing.assert_array_equal(out, list(cases(3))[2][1])


def test_reads_some_slices(store):
    source, whole = Store(store, "train", GRID), next(cases(1))
    item = source.read(0, slices=slice(1, 3))
    np.testing.assert_array_equal(item["volume"], whole[1][1:3])
    np.testing.assert_array_equal(item["regions"], source[0]["regions"])


def test_pickled_store_reads_on(store):
    source = Store(store, "train", GRID)
    first = source[0]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[0]["volume"], first["volume"])
    assert len(pickle.dumps(source)) < 5000


def test_threads_do_not_mix_their_volumes(store):
    source, whole = Store(store, "train", GRID), list(cases(3))
    wrong = []

    def read(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(source[i]["volume"], whole[i][1]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_are_closed(store):
    before = len(os.listdir("/proc/self/fd"))
    source = Store(store, "train", GRID)
    assert source[0]["index"] == 0
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_feeds_the_pipeline(store):
    batches = list(eval_batches(Store(store, "train", GRID), Share.whole(2)))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 0]]
    assert batches[0]["volume"].shape == (2, *SHAPE)


def test_padded_slices_of_a_share(store):
    """A third device has no slice of its own any more."""
    source = Store(store, "train", GRID)
    depth = SHAPE[0]
    whole = make_batch(source, [0, 1])
    parts = [
        make_batch(source, [0, 1], Share(2, (0, 1), (first, first + 3), (i, i + 1)))
        for i, first in enumerate(range(0, depth + 3, 3))
    ]
    volume = np.concatenate([part["volume"] for part in parts], axis=1)
    np.testing.assert_array_equal(volume[:, :depth], whole["volume"])
    assert not volume[:, depth:].any()
    regions = np.concatenate([part["regions"] for part in parts], axis=2)
    np.testing.assert_array_equal(regions[:, :, : GRID[0]], whole["regions"])
    assert not regions[:, :, GRID[0] :].any()


def test_chosen_labels_are_decoded_into_batches_too(store):
    source = open_split(StoreData(str(store)), "train", GRID, ("stent", "nodule"))
    (batch,) = eval_batches(source, Share.whole(3))
    whole = list(cases(3))
    np.testing.assert_array_equal(batch["volume"], [case[1] for case in whole])
    np.testing.assert_array_equal(batch["findings"], [case[2][[2, 0]] for case in whole])


WORKERS = """
import sys, jax, numpy as np
from itertools import islice
from hirescam_jax.data.pipeline import eval_batches, train_batches
from hirescam_jax.data.store.store import Store
from hirescam_jax.devices.layout import Share

source = Store(sys.argv[1], "train", (2, 3, 3))
for size in (1, 2):
    kept = []
    for plain, worked in (
        [train_batches(source, Share.whole(size), seed=2, workers=n) for n in (0, 2)],
        [eval_batches(source, Share.whole(size), workers=n) for n in (0, 2)],
    ):
        pairs = list(islice(zip(plain, worked), 6))  # kept, to be compared when all are made
        for a, b in pairs:
            jax.tree.map(np.testing.assert_array_equal, a, b)
        kept.append(len(pairs))
    print(*kept)
"""


@pytest.mark.slow
@pytest.mark.long
def test_worker_processes_hand_over_their_batches(store):
    """In an interpreter without executed annotations, which no worker process could be sent."""
    command = [sys.executable, "-c", WORKERS, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["6", "3", "6", "2"]


def test_store_that_exists_is_not_overwritten(store):
    before = sorted(p.name for p in store.iterdir())
    with pytest.raises(UserError, match="exists"):
        write_store(
            store, labels=(), regions=(), shape=SHAPE, spacing_mm=(1.0, 1.0, 1.0), splits={}
        )
    assert sorted(p.name for p in store.iterdir()) == before


def test_store_that_was_interrupted_does_not_read_as_whole(tmp_path):
    def broken():
        yield from cases(1)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_store(
            tmp_path / "half",
            labels=LABELS,
            regions=REGIONS,
            shape=SHAPE,
            spacing_mm=(1.0, 1.0, 1.0),
            splits={"train": broken()},
        )
    with pytest.raises(UserError, match="no whole store"):
        Store(tmp_path / "half", "train", GRID)


# -- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def shard(store):
    return store / "train-00000-of-00001.array_record"


def record_bytes(store, index: int) -> tuple[int, int]:
    """Where a record is in its (small) file: behind the header of the first block."""
    header = json.loads((store / "store.json").read_text())["splits"]["train"][0]
    return header["offsets"][index] + 24, header["sizes"][index]


@pytest.mark.parametrize("bit", [0, 7])
def test_each_flipped_bit_is_found_and_named(store, shard, bit):
    start, size = record_bytes(store, 1)
    whole = shard.read_bytes()
    for position in range(start, start + size, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        shard.write_bytes(damaged)
        source = Store(store, "train", GRID)
        assert source[0]["index"] == 0
        with pytest.raises(UserError) as caught:
            source[1]
        message = str(caught.value)
        assert f"{shard}: case_1: damaged, its checksum is not the one it was written" in message
        assert "\n" not in message


def test_missing_shard(store, shard):
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000.*: missing, but store\.json lists it"):
        Store(store, "train", GRID)[0]
    assert Store(store, "val", GRID)[0]["index"] == 0


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_cut_shard(store, shard, size):
    data = shard.read_bytes()
    start, _ = record_bytes(store, 2)
    shard.write_bytes(data[: min(size, start + 10)])
    with pytest.raises(UserError) as caught:
        Store(store, "train", GRID)[2]
    assert f"{shard}: case_2: damaged, " in str(caught.value)


def test_shard_that_is_a_folder(store, shard):
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match="case_0: cannot be read"):
        Store(store, "train", GRID)[0]


def test_record_of_other_labels(store):
    path = store / "store.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "labels": ["one"]}))
    with pytest.raises(UserError, match=r"case_0: damaged, its shapes .* are not those of store"):
        Store(store, "train", GRID)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1, this version reads 2"),
        ({"format": None}, "format None, this version reads 2"),
        ({"labels": None}, "no field labels"),
        ({"labels": "nodule"}, "no field labels, or not of its type"),
        ({"splits": {"train": []}}, "split 'train' is missing or empty"),
        ({"splits": {"val": []}}, "split 'train' is missing or empty"),
        ({"splits": {"train": [{"file": "x", "ids": []}]}}, "splits.train: damaged"),
        ({"splits": {"train": [3]}}, "splits.train: damaged"),
        ({"splits": {"train": 3}}, "splits.train: damaged"),
    ],
)
def test_bad_headers(store, change, message):
    path = store / "store.json"
    header = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}))
    with pytest.raises(UserError) as caught:
        Store(store, "train", GRID)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1, "splits": 3}'])
def test_header_that_is_no_header(store, text):
    (store / "store.json").write_text(text)
    with pytest.raises(UserError, match=r"store\.json"):
        Store(store, "train", GRID)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match="no whole store: prepare it first"):
        Store(tmp_path / "none", "train", GRID)


# -- inspection -----------------------------------------------------------------------------------


@pytest.fixture
def chests(tmp_path):
    """Five volumes of 12 x 20 x 16; the lung is missing in one, "b" comes only with "a"."""

    def volumes():
        for i in range(5):
            volume = np.full((12, 20, 16), -1000 + 300 * i, np.int16)
            masks = np.zeros((2, 12, 20, 16), np.uint8)
            masks[0, 1:4, 2:8, 9:15] = i != 3
            masks[1] = 1
            findings = np.array([[i < 3, 0], [0, i == 1], [0, 0]], np.uint8)
            yield f"case_{i}", volume, findings, masks

    whole = list(volumes())
    write_store(
        tmp_path / "chests",
        labels=("a", "b", "never"),
        regions=("lung", "anywhere"),
        shape=(12, 20, 16),
        spacing_mm=(2.0, 1.0, 1.0),
        splits={"train": whole[:3], "val": whole[3:]},
    )
    return tmp_path / "chests"


def test_summary(chests):
    summary = inspect_store(chests)
    assert (summary.counts, summary.total, summary.patients) == ({"train": 3, "val": 2}, 5, 5)
    assert {k: v.tolist() for k, v in summary.positives.items()} == {
        "train": [3, 1, 0],
        "val": [0, 0, 0],
    }
    assert summary.together.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert summary.found_in.tolist() == [[3, 0], [0, 1], [0, 0]]
    assert summary.missing.tolist() == [1, 0]
    assert summary.histogram.sum() == pytest.approx(1)
    filled = HU_EDGES[:-1][summary.histogram > 0]
    assert filled.tolist() == [-1010, -710, -410, -110, 190]
    assert summary.histogram.max() == pytest.approx(0.2)


def test_summary_in_words(chests, capsys):
    cli.main(["inspect", str(chests)])
    words = capsys.readouterr().out
    assert f"{chests}: 5 volumes (3 train, 2 val) of 5 patients" in words
    rows = {line.split()[0]: line.split()[1:] for line in words.splitlines() if line.strip()}
    assert rows["a"] == ["3", "0", "60.0%", "b", "(33%)"]
    assert rows["b"] == ["1", "0", "20.0%", "a", "(100%)"]
    assert rows["never"] == ["0", "0", "0.0%"]
    assert rows["lung"] == ["1", "3"]
    assert rows["anywhere"] == ["0", "1"]


def test_page(chests, tmp_path):
    cli.main(["inspect", str(chests), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 5
    for i in range(5):
        assert f"<b>case_{i}</b>" in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*', page) == []
    found = Page(page)
    assert (len(found.images), found.tags["svg"]) == (5, 2)
    for words in ("5 volumes on a grid of 12 × 20 × 16 voxels", "a 3 0 60.0 % b (33%)", "lung 1 3"):
        assert words in found.text


def test_outlines_lie_where_the_masks_are(chests):
    """A black volume: all that is coloured is the outline of the mask, in each plane."""
    source = Store(chests, "train", (1, 1, 1))
    black = dataclasses.replace(source.record(0), volume=np.full((12, 20, 16), -1100, np.int16))
    header = {"regions": ["lung", "anywhere"], "spacing_mm": [2.0, 1.0, 1.0]}
    figure = _thumbnail(black, header, {"lung": "#ff0000"})
    figure.set_dpi(200)
    canvas = figure.canvas
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., 0] > 128
    height = len(picture)
    # d, h, w of the mask's borders, as shares of the volume.
    box = {"d": (1 / 12, 4 / 12), "h": (2 / 20, 8 / 20), "w": (9 / 16, 15 / 16)}
    for ax, (down, across) in zip(figure.axes, ("hw", "dw", "dh"), strict=True):
        (left, low), (right, high) = ax.transAxes.transform([(0, 0), (1, 1)])
        part = picture[round(height - high) : round(height - low), round(left) : round(right)]
        for axis, name in enumerate((down, across)):
            marked = np.flatnonzero(part.any(axis=1 - axis)) / part.shape[axis]
            np.testing.assert_allclose((marked[0], marked[-1]), box[name], atol=0.02)


def test_store_without_volumes(chests, tmp_path):
    write_store(
        tmp_path / "none", labels=(), regions=(), shape=SHAPE, spacing_mm=(1, 1, 1), splits={}
    )
    with pytest.raises(UserError, match="holds no volumes"):
        inspect_store(tmp_path / "none")
