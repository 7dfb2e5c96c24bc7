"""Maps of a whole store: the right ones, in one array store, also after interruptions, on other
meshes and in several processes."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.config import Config
from hirescam_jax.data.grid import feature_affine
from hirescam_jax.data.specs import StoreData
from hirescam_jax.data.store.store import Store, write_store
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.resume import Kept
from hirescam_jax.inference.store import explain_store
from hirescam_jax.inference.zarr import MapWriter, open_maps
from hirescam_jax.models import AxialNet
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.runs.checkpoints import Saver
from hirescam_jax.runs.run import Header, Run, load_run
from hirescam_jax.training.step import init_state, make_optimizer
from tests.processes import environment
from tests.processes import run as run_processes
from tests.rounding import assert_same_but_for_rounding
from tests.training.test_train import compilation_cache  # noqa: F401

LABELS = ("nodule", "pleural effusion", "a/b")
REGIONS = ("left_lung", "right_lung")
SHAPE, SPACING = (15, 32, 32), (3.0, 2.0, 2.5)
COUNTS = {"val": 3, "test": 5}
MODEL = AxialNet(3, (1,), (4,), "small", (3,), "SAME")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store and a run with random weights, saved as after a training."""
    folder = tmp_path_factory.mktemp("explained")
    rng = np.random.default_rng(0)

    def volumes(split: str):
        for i in range(COUNTS[split]):
            volume = rng.integers(-1000, 800, SHAPE, dtype=np.int16)
            findings = (rng.random((len(LABELS), len(REGIONS))) < 0.4).astype(np.uint8)
            masks = (rng.random((len(REGIONS), *SHAPE)) < 0.5).astype(np.uint8)
            yield f"{split}_{i}", volume, findings, masks

    store = folder / "store"
    write_store(
        store,
        labels=LABELS,
        regions=REGIONS,
        shape=SHAPE,
        spacing_mm=SPACING,
        splits={split: volumes(split) for split in COUNTS},
    )
    config = Config(model=MODEL, data=StoreData(str(store)), batch_size=2)
    header = Header.of(config, Store(store, "test", feature_grid(MODEL, SHAPE)))
    init = partial(init_state, config, make_optimizer(config, 1), SHAPE)
    state = jax.jit(init)()
    with Saver(folder / "run", header, resume=False) as saver:
        saver.restore(state)
        saver.save(1, state, {"loss": 1.0})
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Run:
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def whole(folder, run) -> Path:
    """The maps that nobody disturbed."""
    assert explain_store(run, folder / "store", "test", folder / "whole.zarr") == 5
    return folder / "whole.zarr"


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def same_files(path: Path, other: Path) -> None:
    ours, theirs = files(path), files(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


# -- what is written ------------------------------------------------------------------------------


def test_maps_by_hand(folder, run, whole):
    """Features of one volume at a time; maps, scores and residuals from them in float64."""
    maps, store = open_maps(whole), Store(folder / "store", "test", (1, 1, 1))
    assert (maps.labels, maps.ids) == (LABELS, tuple(f"test_{i}" for i in range(5)))
    assert (maps.method, maps.step, maps.spacing_mm) == ("hirescam", 1, SPACING)
    assert maps.run == str(folder / "run")
    assert len(maps) == len(maps.maps) == 5
    assert maps.done[:].all()
    d, h, w = feature_grid(MODEL, SHAPE)
    assert maps.maps.shape == (5, 3, d, h, w)
    fc = jax.tree.map(np.float64, run.variables["params"]["fc"])
    features_of = jax.jit(lambda v, x: run.model.apply(v, x, method="features"))
    for i in range(5):
        volume = np.clip(store[i]["volume"].astype(np.float32), -1000, 800)
        volume = (volume + 1000) / 1800 - 0.449
        features = np.float64(features_of(run.variables, jnp.asarray(volume[None]))[0])
        kernel = fc["kernel"].reshape(h, w, -1, 3)
        expected = np.einsum("shwc,hwck->kshw", features, kernel) / d
        scale = np.abs(expected).max()
        np.testing.assert_allclose(maps.maps[i], expected, atol=1e-5 * scale, rtol=1e-4)
        logits = expected.sum((1, 2, 3)) + fc["bias"]
        np.testing.assert_allclose(maps.logits[i], logits, rtol=1e-4, atol=1e-5)
        assert maps.residuals[i].max() < 1e-5
        expected = feature_affine(store.affine(i), SHAPE, (d, h, w))
        np.testing.assert_array_equal(maps.affines[i], expected)


def test_files_are_zarr_with_a_volume_a_chunk(whole):
    """Read without TensorStore: little-endian float32, then a checksum of four bytes."""
    maps = open_maps(whole)
    metadata = json.loads((whole / "maps" / "zarr.json").read_text())
    assert (metadata["zarr_format"], metadata["node_type"]) == (3, "array")
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [1, *maps.maps.shape[1:]]
    assert json.loads((whole / "zarr.json").read_text())["node_type"] == "group"
    chunk = (whole / "maps" / "c.3.0.0.0.0").read_bytes()
    values = np.frombuffer(chunk[:-4], "<f4").reshape(maps.maps.shape[1:])
    np.testing.assert_array_equal(maps.maps[3], values)


def test_labels_and_method(folder, run, whole, tmp_path):
    explain_store(run, folder / "store", "test", tmp_path / "a", labels=("a/b", "nodule"))
    chosen, every = open_maps(tmp_path / "a"), open_maps(whole)
    assert chosen.labels == ("a/b", "nodule")
    # The program with all labels' maps and that with two: the score is the sum of its map, over
    # three channels in each cell, behind four convolutions with BatchNorm.
    terms = 9 * 3 + 3 * 9 * 4 + 3 * 4 + 3 * int(np.prod(every.maps.shape[2:]))
    scale = np.abs(every.maps[:]).sum((2, 3, 4)).max()
    expected = every.logits[:][:, [2, 0]]
    assert_same_but_for_rounding(chosen.logits[:], expected, terms=terms, scale=scale)
    np.testing.assert_allclose(chosen.maps[:], every.maps[:][:, [2, 0]], rtol=1e-5, atol=1e-7)
    explain_store(run, folder / "store", "val", tmp_path / "g", method="gradcam")
    assert open_maps(tmp_path / "g").method == "gradcam"
    assert open_maps(tmp_path / "g").residuals[:].max() > 1e-3  # it does not account for the score


def test_nifti(folder, run, whole, tmp_path):
    arguments = (run, folder / "store", "test", tmp_path / "out")
    explain_store(*arguments, format="nifti")
    maps = open_maps(whole)
    for i, name in enumerate(maps.ids):
        for k, label in enumerate(("nodule", "pleural_effusion", "a_b")):
            path = tmp_path / "out" / name / f"{label}_hirescam_features.nii.gz"
            image = nibabel.load(path)
            np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), maps.maps[i][k])
            np.testing.assert_allclose(image.affine, maps.affines[i], rtol=1e-6, atol=1e-5)
        assert (tmp_path / "out" / name / "probabilities.csv").read_text().count("\n") == 4
    shutil.rmtree(tmp_path / "out" / "test_3")
    before = files(tmp_path / "out")
    assert explain_store(*arguments, format="nifti") == 1
    assert {n: b for n, b in files(tmp_path / "out").items() if "test_3" not in n} == before
    with pytest.raises(UserError, match="another method"):
        explain_store(*arguments, format="nifti", method="gradcam")


# -- interruptions and what is in the way ---------------------------------------------------------


@pytest.mark.parametrize("volumes", [0, 3])
def test_an_interrupted_call_continues_to_the_same_bits(
    monkeypatch, folder, run, whole, tmp_path, volumes
):
    out, write = tmp_path / "maps.zarr", MapWriter.write
    written: list[int] = []

    def interrupted(self, place, *values):
        if place >= volumes:
            raise KeyboardInterrupt
        write(self, place, *values)

    with monkeypatch.context() as patch:
        patch.setattr(MapWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            explain_store(run, folder / "store", "test", out)
    assert open_maps(out).done[:].sum() <= volumes
    assert np.isnan(open_maps(out).maps[4]).all()

    def counted(self, place, *values):
        written.append(place)
        write(self, place, *values)

    monkeypatch.setattr(MapWriter, "write", counted)
    done = open_maps(out).done[:]
    assert explain_store(run, folder / "store", "test", out) == 5 - done.sum()
    assert sorted(written) == np.flatnonzero(~done).tolist()
    same_files(out, whole)
    assert explain_store(run, folder / "store", "test", out) == 0


def test_a_volume_that_was_cut_off_is_written_again(folder, run, whole, tmp_path):
    """Killed between a volume's maps and its mark: the mark is what counts."""
    out = tmp_path / "maps.zarr"
    shutil.copytree(whole, out)
    (out / "done" / "c.1").unlink()
    (out / "maps" / "c.1.0.0.0.0").write_bytes(b"cut")
    assert explain_store(run, folder / "store", "test", out) == 1
    same_files(out, whole)


def test_maps_of_something_else_are_kept(folder, run, whole, tmp_path):
    out = tmp_path / "maps.zarr"
    shutil.copytree(whole, out)
    other = jax.tree.map(lambda x: x + 1, run.variables)
    store = folder / "store"
    for message, change, options in (
        ("another run", {"variables": other}, {}),
        ("another step", {"step": 2}, {}),
        ("another method", {}, {"method": "gradcam"}),
        ("other labels", {}, {"labels": ("nodule",)}),
    ):
        changed = dataclasses.replace(run, **change)
        with pytest.raises(UserError, match=f"{re.escape(str(out))}: holds maps of {message}"):
            explain_store(changed, store, "test", out, **options)
    with pytest.raises(UserError, match="another store or split"):
        explain_store(run, store, "val", out)
    same_files(out, whole)
    assert explain_store(run, store, "val", out, overwrite=True) == 3
    assert open_maps(out).ids == ("val_0", "val_1", "val_2")
    assert explain_store(run, store, "test", out, overwrite=True) == 5
    same_files(out, whole)


def test_other_files_are_never_touched(folder, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("out", "file"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="exists and holds no such maps"):
                explain_store(run, folder / "store", "test", tmp_path / name, overwrite=overwrite)
    assert files(tmp_path) == {"out/thesis.tex": b"x", "file": b"x"}
    with pytest.raises(UserError, match="holds no maps of"):
        open_maps(tmp_path / "out")


def test_bad_input(folder, run, tmp_path):
    store, out = folder / "store", tmp_path / "out"
    with pytest.raises(UserError, match="split 'train' is missing or empty"):
        explain_store(run, store, "train", out)
    with pytest.raises(UserError, match="did you mean 'nodule'"):
        explain_store(run, store, "test", out, labels=("nodul",))
    with pytest.raises(UserError, match="batch size 0"):
        explain_store(run, store, "test", out, batch_size=0)
    header = dataclasses.replace(run.header, spacing_mm=(1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"spacing_mm \[3.0, 2.0, 2.5\].* trained on \[1.0"):
        explain_store(dataclasses.replace(run, header=header), store, "test", out)
    bad = jax.tree.map(lambda x: x * np.nan, run.variables)
    with pytest.raises(UserError, match="NaN or infinite scores for test_"):
        explain_store(dataclasses.replace(run, variables=bad), store, "test", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --input FILES or --store STORE"),
        (["--input", "x.nii", "--store", "y"], "give either --input FILES or --store STORE"),
        (["--store", "y", "--grid", "input"], "--grid input: a store holds volumes on the"),
        (["--input", "x.nii", "--format", "nifti"], "go with --store"),
        (["--store", "y"], "store.json: missing"),
    ],
)
def test_bad_command(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["explain", str(folder / "run"), "--out", str(tmp_path / "out"), *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from hirescam_jax.cli import main as cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_call_can_be_repeated(folder, whole, tmp_path):
    """Files that cannot grow beyond 2 kB: a volume's maps are larger, all else is smaller."""
    out = tmp_path / "maps.zarr"
    assert (whole / "maps" / "c.0.0.0.0.0").stat().st_size > 2000
    command = ["explain", folder / "run", "--store", folder / "store", "--out", out]
    script = [sys.executable, "-c", FULL, "2000", *map(str, command)]
    ended = subprocess.run(
        script, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path
    )
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert f"hirescam: {out}: cannot be written (" in ended.stderr
    assert "repeat the command" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not open_maps(out).done[:].any()
    cli.main([str(item) for item in command])
    same_files(out, whole)


# -- several devices and processes ----------------------------------------------------------------


def close(path: Path, other: Path) -> None:
    """The same arrays up to rounding; the names of all files, and the affines, exactly."""
    assert sorted(files(path)) == sorted(files(other))
    maps, expected = open_maps(path), open_maps(other)
    assert maps.done[:].all()
    np.testing.assert_array_equal(maps.affines[:], expected.affines[:])
    scale = np.abs(expected.maps[:]).max()
    np.testing.assert_allclose(maps.maps[:], expected.maps[:], rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(maps.logits[:], expected.logits[:], rtol=1e-5, atol=1e-6)
    assert maps.residuals[:].max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [pytest.param("2x2, depth 2", marks=pytest.mark.long), "2x1, depth 2"]
)
def test_processes_write_what_one_does(folder, whole, tmp_path, mesh):
    """Depth over the devices of one process, and over processes. An interruption on one mesh is
    continued on the other."""
    out, devices = tmp_path / "maps.zarr", int(mesh[2])
    command = ["explain", folder / "run", "--store", folder / "store", "--depth-devices", 2]
    ends = run_processes(2, [*command, "--out", out], devices=devices)
    assert str(out) in ends[0].out
    assert str(out) not in ends[1].out
    close(out, whole)
    for i in (0, 3):
        (out / "done" / f"c.{i}").unlink()
        (out / "maps" / f"c.{i}.0.0.0.0").unlink()
    cli.main([str(item) for item in (*command[:-2], "--out", out)])
    close(out, whole)


@pytest.mark.slow
@pytest.mark.long
def test_evaluation_on_processes_is_that_of_one(folder, tmp_path):
    """Three and five volumes in batches of two: each counts once."""
    command = ["evaluate", folder / "run", "--out"]
    cli.main([str(item) for item in (*command, tmp_path / "one.json")])
    ends = run_processes(2, [*command, tmp_path / "two.json", "--depth-devices", 2], devices=2)
    assert "two.json" in ends[0].out
    assert "two.json" not in ends[1].out
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one["volumes"] == two["volumes"] == 5
    for path, value in jax.tree_util.tree_leaves_with_path(two):
        expected = one
        for key in path:
            expected = expected[getattr(key, "key", getattr(key, "idx", None))]
        name = jax.tree_util.keystr(path)
        if "thresholds" in name or not isinstance(value, float):
            assert value == expected, name
        elif "completeness" in name:
            assert max(value, expected) < 1e-5, name  # rounding
        else:
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_evaluation_of_a_store_without_a_test_split(folder, tmp_path, capsys):
    for name in ("run", "store"):
        shutil.copytree(folder / name, tmp_path / name)
    run = tmp_path / "run"
    stored = json.loads((tmp_path / "store" / "store.json").read_text())
    del stored["splits"]["test"]
    (tmp_path / "store" / "store.json").write_text(json.dumps(stored))
    text = (run / "run.json").read_text().replace(str(folder / "store"), str(tmp_path / "store"))
    (run / "run.json").write_text(text)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(run)])
    assert "split 'test' is missing or empty; to measure the" in capsys.readouterr().err
    cli.main(["evaluate", str(run), "--split", "val"])
    result = json.loads((run / "evaluation.json").read_text())
    assert (result["split"], result["volumes"]) == ("validation", 3)
    assert "in-sample" in capsys.readouterr().out
    assert sorted(path.name for path in run.glob("*.npz")) == ["evaluation_validation.npz"]
    cli.main(["table", str(run), "--out", str(tmp_path / "tables")])
    assert "validation split, 3 volumes" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [False, True])
def test_an_interrupted_evaluation_continues(folder, tmp_path, monkeypatch, damage):
    """Two and three batches of the splits; the fourth is interrupted, a damaged one made again."""
    command = ["evaluate", str(folder / "run"), "--out"]
    cli.main([*command, str(tmp_path / "one.json")])
    saved: list[tuple[str, int]] = []
    save = Kept.save

    def counted(self, split, number, result, limit=None):
        if limit is not None and len(saved) == limit:
            raise KeyboardInterrupt
        save(self, split, number, result)
        saved.append((split, number))

    monkeypatch.setattr(Kept, "save", lambda *arguments: counted(*arguments, limit=3))
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, str(tmp_path / "two.json")])
    assert ended.value.code == 130
    assert not (tmp_path / "two.json").exists()
    parts = tmp_path / ".two_batches"
    assert len(list(parts.glob("*.npz"))) == 3
    if damage:
        (broken,) = parts.glob("validation*_000001.npz")
        broken.write_bytes(broken.read_bytes()[:-200])
    monkeypatch.setattr(Kept, "save", counted)
    first, saved[:] = list(saved), []
    cli.main([*command, str(tmp_path / "two.json")])
    assert len(saved) == (3 if damage else 2)
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert not parts.exists()
    assert len(set(first + saved)) == 5


def test_results_of_other_weights_are_not_continued(tmp_path):
    kept = Kept(tmp_path / "parts", {"step": "1"})
    kept.save("test", 0, {"a": np.arange(3), "b": {"c": np.ones(2, bool), "none": {}}})
    (again,) = Kept(tmp_path / "parts", {"step": "1"}).load("test")
    np.testing.assert_array_equal(again["a"], [0, 1, 2])
    np.testing.assert_array_equal(again["b"]["c"], [True, True])
    assert again["b"]["none"] == {}
    assert kept.load("val") == []
    assert Kept(tmp_path / "parts", {"step": "2"}).load("test") == []


def test_processes_that_are_given_files(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit):
        cli.main(["explain", str(folder / "run"), "--out", str(tmp_path), "--input", "x.nii"])
    assert "--input runs in one process" in capsys.readouterr().err
