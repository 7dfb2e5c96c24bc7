"""What older versions wrote is read: a store, runs, evaluations and maps of before the modules
moved into folders (data/make_written_before.sh), and the names that users import."""

import csv
import hashlib
import importlib
import json
import pkgutil
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

import hirescam_jax
from hirescam_jax import load_run, open_maps
from hirescam_jax.data.store.store import Store
from tests.rounding import assert_same_but_for_rounding

ARCHIVE = Path(__file__).parent / "data" / "written_before.tar.xz"
LABELS = ("cardiomegaly", "pleural_effusion", "emphysema")
GRID = (2, 6, 6)
# Of the network's score: convolutions with BatchNorm of 27, 36, 36 and 36 products, then 6 x 6
# cells of 4 channels and a mean over 2 slices.
TERMS = 27 + 3 * 36 + 4 * 4 + 6 * 6 * 4 + 2

# What could be imported from the package then.
PUBLIC = [
    "ORGAN_IOU_THRESHOLDS",
    "VGG",
    "AxialNet",
    "BodyConv",
    "CTNet",
    "Conv3DNet",
    "DenseNet",
    "Explanation",
    "HeadVerdict",
    "MobileNetV2",
    "ResNetClassifier",
    "ablationcam",
    "allowed_of",
    "class_activation_map",
    "classification_loss",
    "eigencam",
    "explain",
    "from_torch",
    "gradcam",
    "gradcam_plusplus",
    "gradient_x_input",
    "guided_attention",
    "head_verdict",
    "hirescam",
    "input_gradient",
    "integrated_gradients",
    "labels_of",
    "layercam",
    "mask_loss",
    "normalize_map",
    "occlusion",
    "organ_iou",
    "read_weights",
    "scorecam",
    "smoothgrad",
    "to_torch",
    "write_weights",
    "xgradcam",
]
# What the config files of this repository imported then, of which users have copies.
OF_CONFIGS = {
    "hirescam_jax.config": ("Adam", "Config", "PhantomData", "SGD", "StoreData"),
    "hirescam_jax.data.phantom": ("PhantomConfig",),
    "hirescam_jax.demo": ("demo_config",),
    "hirescam_jax.models": ("AxialNet", "BodyConv", "CTNet", "Conv3DNet"),
    "hirescam_jax.paper": ("small_set", "whole_set"),
    "hirescam_jax.preprocess": ("Preprocess",),
}


def test_public_names():
    assert set(PUBLIC) <= set(hirescam_jax.__all__)
    assert all(hasattr(hirescam_jax, name) for name in hirescam_jax.__all__)


@pytest.mark.parametrize("module", OF_CONFIGS)
def test_what_config_files_import(module):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in OF_CONFIGS[module])


def hirescam(*arguments: object) -> None:
    """The command, wherever it is now."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    pkgutil.resolve_name(project["scripts"]["hirescam"])([str(item) for item in arguments])


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "written_before"


@pytest.fixture
def before(unpacked, tmp_path, monkeypatch) -> Path:
    """A copy in which a test may write; the working folder, since runs name their store by its
    path."""
    shutil.copytree(unpacked, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


@pytest.mark.parametrize("name", ["config", "conv3d", "bodyconv", "ctnet"])
def test_configs_are_those_of_their_runs(before, name):
    """Every class and field of a config, from its file and from the run's JSON."""
    hirescam("train", f"{name}.py", "--run", "run" if name == "config" else name, "--check")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_store_has_the_same_content(unpacked, split):
    recorded = json.loads((unpacked / "store_content.json").read_text())[split]
    store = Store(unpacked / "store", split, GRID)
    assert (store.digest, list(store.ids)) == (recorded["digest"], recorded["ids"])
    for i, wanted in enumerate(recorded["items"]):
        item = store[i]
        volume = item["volume"].astype("<i2").tobytes()
        assert hashlib.sha256(volume).hexdigest() == wanted["volume"]
        for name in ("findings", "regions"):
            assert "".join(map(str, item[name].ravel())) == wanted[name]


def test_a_run_explains_the_same(unpacked):
    run, maps = load_run(unpacked / "run"), open_maps(unpacked / "maps.zarr")
    assert (run.step, run.labels, run.spacing_mm) == (9, LABELS, (50.0, 30.0, 30.0))
    assert (maps.step, maps.labels, maps.method) == (run.step, LABELS, "hirescam")
    assert maps.guarantee == "exact"
    assert maps.done[:].all()
    store = Store(unpacked / "store", "test", GRID)
    assert maps.ids == tuple(store.ids)
    volumes = jnp.asarray(np.stack([store[i]["volume"] for i in range(len(store))]))
    found = hirescam_jax.explain(run.model, run.variables, run.normalize(volumes))
    assert_same_but_for_rounding(found.maps, maps.maps[:], terms=TERMS)
    scale = np.abs(maps.maps[:]).sum((2, 3, 4)).max()
    assert_same_but_for_rounding(found.logits, maps.logits[:], terms=TERMS, scale=scale)


def test_a_run_becomes_the_same_weights(before):
    """They are moved, and not computed with."""
    hirescam("convert", "run", "now.safetensors")
    found, expected = map(hirescam_jax.read_weights, ("now.safetensors", "run.safetensors"))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


LOSSES = ("loss", "class_loss", "mask_loss")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Losses by step and split; not the times."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{name: line[name] for name in ("step", "split", *LOSSES)} for line in lines]


@pytest.mark.slow
def test_a_training_goes_on(before):
    """With the optimiser's state and the order of the data: as it would have gone on then."""
    hirescam("train", "config.py", "--run", "run", "--resume", "--epochs", 4)
    found, expected = lines_of(before / "run/metrics.jsonl"), lines_of(before / "longer.jsonl")
    old = len(lines_of(before / "baseline/metrics.jsonl"))
    assert found[:old] == expected[:old]
    assert len(found) == len(expected) == old + 4  # three steps and a validation
    for one, other in zip(found, expected, strict=True):
        assert (one["step"], one["split"]) == (other["step"], other["split"])
    # Each step goes once through the network and once back. Where a gradient is rounding alone,
    # Adam makes a whole step of it, but only in front of BatchNorm, which takes it out again.
    for one, other in zip(found[old:], expected[old:], strict=True):
        losses = (np.float32([line[name] for name in LOSSES]) for line in (one, other))
        assert_same_but_for_rounding(*losses, terms=TERMS * (1 + 2 * 3))


def assert_same_json(found: Any, expected: Any, where: str = "") -> None:
    """The same form, words and numbers; figures up to what rounding makes of them."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name in expected:
            assert_same_json(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_json(one, other, f"{where}/{i}")
    elif isinstance(expected, float):
        # Of probabilities, counts and means of both: they change by no more than the scores do.
        scale = max(1, abs(expected))
        assert_same_but_for_rounding(
            np.float32(found), np.float32(expected), terms=TERMS, scale=scale
        )
    else:
        assert found == expected, where


@pytest.mark.slow
def test_an_evaluation_finds_the_same(before):
    hirescam("evaluate", "run", "--out", "now.json")
    found, expected = (json.loads(Path(p).read_text()) for p in ("now.json", "run/evaluation.json"))
    for name in ("faithfulness", "sanity"):  # which were asked for, then
        assert expected.pop(name)
        found.pop(name, None)
    for result in (found, expected):  # what a head guarantees is the word; of the rest not a digit
        result["head"] = result["head"]["kind"]
    assert_same_json(found, expected)
    for split in ("test", "validation"):
        with np.load(f"now_{split}.npz") as one, np.load(f"run/evaluation_{split}.npz") as other:
            assert one.files == other.files
            for name in one.files:
                if other[name].dtype.kind == "f":
                    scale = max(1, np.nanmax(np.abs(other[name])))
                    same = {"terms": TERMS, "scale": scale, "dtype": np.float32}
                    assert_same_but_for_rounding(one[name], other[name], **same)
                else:
                    np.testing.assert_array_equal(one[name], other[name])


def rows_of(path: Path) -> list[list[Any]]:
    """A CSV file, its numbers as such."""

    def cell(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [[cell(text) for text in row] for row in csv.reader(file)]


def assert_same_tables(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.glob("*.csv"))
    assert names
    assert sorted(path.name for path in folder.glob("*.csv")) == names
    for name in names:
        found, wanted = rows_of(folder / name), rows_of(expected / name)
        assert_same_json(found, wanted, name)


def test_evaluations_become_the_same_tables(before):
    """From the files that were written then; with faithfulness and sanity in one of them."""
    hirescam("table", "run", "baseline", "--out", "tables_now")
    assert_same_tables(before / "tables_now", before / "tables")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zarr", "nifti"])
def test_maps_go_on(before, format):
    """A call that was interrupted then is continued, by what it lacks: the first volume."""
    expected = open_maps(before / "maps.zarr").maps[:]
    if format == "zarr":
        for array in ("done", "maps"):
            next((before / "maps.zarr" / array).glob("c.0*")).unlink()
        assert open_maps(before / "maps.zarr").done[:].tolist() == [False] + [True] * 22
        hirescam("explain", "run", "--store", "store", "--out", "maps.zarr")
        found = open_maps(before / "maps.zarr")
        assert found.done[:].all()
        assert_same_but_for_rounding(found.maps[0], expected[0], terms=TERMS)
        np.testing.assert_array_equal(found.maps[2:], expected[2:])
        return
    first, *others = sorted(path for path in (before / "maps_nifti").iterdir() if path.is_dir())
    file = next(first.glob("*.nii.gz")).relative_to(before)
    wanted = nibabel.load(file).get_fdata(dtype=np.float32)
    kept = {path: path.stat().st_mtime_ns for path in others}
    shutil.rmtree(first)
    options = ("--split", "train", "--labels", "emphysema", "--format", "nifti")
    hirescam("explain", "run", "--store", "store", "--out", "maps_nifti", *options)
    found = nibabel.load(file).get_fdata(dtype=np.float32)
    assert_same_but_for_rounding(found, wanted, terms=TERMS)
    assert kept == {path: path.stat().st_mtime_ns for path in others}


@pytest.mark.slow
def test_files_are_explained_the_same(before):
    options = ("--no-pictures", "--labels", "emphysema,pleural_effusion")
    hirescam("explain", "run", "--input", "files", "--out", "explained_now", *options)
    old = sorted(path.relative_to("explained") for path in Path("explained").rglob("*.*"))
    assert old == sorted(p.relative_to("explained_now") for p in Path("explained_now").rglob("*.*"))
    assert len(old) == 2 * 3
    for name in old:
        files = Path("explained_now") / name, Path("explained") / name
        if name.suffix == ".csv":
            assert_same_json(*map(rows_of, files), str(name))
            continue
        found, expected = map(nibabel.load, files)
        np.testing.assert_array_equal(found.affine, expected.affine)
        values = (image.get_fdata(dtype=np.float32) for image in (found, expected))
        assert_same_but_for_rounding(*values, terms=TERMS + 8)  # and between eight cells


def test_written_maps_are_localised_the_same(before):
    places = ("--masks", "files/masks", "--label-map", "lesions.json")
    hirescam("localize", "explained", *places, "--out", "now.csv")
    assert_same_json(rows_of(before / "now.csv"), rows_of(before / "localized.csv"))
