"""The papers' experiments: what their configs say, their shapes at full size, and small runs."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.cli.main import main
from hirescam_jax.config import SGD, Config
from hirescam_jax.data.pipeline import make_batch
from hirescam_jax.data.specs import StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.experiments.papers import check_made_with, reduced
from hirescam_jax.losses import allowed_of
from hirescam_jax.models import AxialNet, BodyConv, Conv3DNet, CTNet
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.runs.config_files import check_types, load_config
from hirescam_jax.runs.run import Header
from hirescam_jax.runs.setup import open_data
from tests.processes import ROOT, environment

EXPERIMENTS = sorted((ROOT / "configs" / "paper").glob("*.py"))
PAPER_SHAPE = (405, 420, 420)


def names(pattern: str) -> list[str]:
    return [path.stem for path in EXPERIMENTS if path.match(f"{pattern}.py")]


def config_of(name: str) -> Any:
    return load_config(ROOT / "configs" / "paper" / f"{name}.py")


def test_there_is_a_config_for_each_experiment():
    assert len(names("table1_*")) == 8  # the seven, and AxialNet with one FC over all slices
    assert len(names("masks_*")) == 3 * 2
    assert names("whole_*") == ["whole_baseline", "whole_mask_loss"]
    assert len(EXPERIMENTS) == 16


@pytest.mark.parametrize("name", names("*"))
def test_set_up_is_the_papers(name: str):
    config = config_of(name)
    assert config.optimizer == SGD(1e-3, 0.99, 1e-7)
    assert (config.batch_size, config.epochs, config.patience) == (1, 100, 15)
    assert (config.preprocess.hu_min, config.preprocess.hu_max) == (-1000, 800)
    assert (config.preprocess.mean, config.preprocess.flip, config.preprocess.rotate) == (
        0.449,
        0.5,
        0.5,
    )
    sizes = (config.data.train_size, config.data.val_size)
    assert sizes == ((0, 0) if name.startswith("whole") else (2000, 1000))
    with_mask_loss = name.startswith("masks") or name == "whole_mask_loss"
    assert config.mask_weight == (1 / 3 if with_mask_loss else 0)
    from_imagenet = name not in ("table1_conv3d", "table1_axialnet_random_init")
    assert bool(config.weights) == from_imagenet


@pytest.mark.parametrize(
    ("name", "grid", "channels"),
    [
        ("table1_axialnet", (135, 6, 6), 16),
        ("table1_axialnet_no_convs", (135, 14, 14), 512),
        ("table1_bodyconv", (5, 5, 5), 16),
        ("table1_conv3d", (5, 5, 5), 64),
        ("table1_ctnet", (18, 5, 5), 16),
    ],
)
def test_features_at_full_size(name: str, grid: tuple[int, ...], channels: int):
    model = config_of(name).model
    volume = jax.ShapeDtypeStruct((1, *PAPER_SHAPE), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), volume)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, volume)
    assert features.shape == (1, *grid, channels)


def test_what_each_experiment_is_about_survives_the_reduction():
    small = {name: reduced(config_of(name)) for name in names("*")}
    models = {name: config.model for name, config in small.items()}
    kinds = {name: type(model) for name, model in models.items()}
    assert kinds["table1_bodyconv"] is BodyConv
    assert kinds["table1_conv3d"] is Conv3DNet
    assert kinds["table1_ctnet"] is CTNet
    assert [models[f"table1_axialnet{s}"].pool for s in ("", "_max", "_dense")] == [
        "mean",
        "max",
        "dense",
    ]
    assert models["table1_axialnet_no_convs"].conv_widths == ()
    assert models["table1_axialnet"].conv_widths != ()
    masks = {(c.data.mask_method, c.data.dilate) for n, c in small.items() if n[:5] == "masks"}
    assert len(masks) == 6
    # All on the same volumes.
    assert len({(c.data.phantom, c.data.test_size) for c in small.values()}) == 1
    assert small["whole_baseline"].mask_weight == 0 < small["whole_mask_loss"].mask_weight
    for config in small.values():
        check_types(config, "reduced")
        assert min(feature_grid(config.model, config.data.phantom.shape)) >= 1
        assert config.weights == ""


def test_few_organs_of_reduced_experiments_have_no_cell_of_their_own():
    """Or OrganIoU would be over other findings in each network."""
    for name in ("table1_axialnet", "table1_axialnet_no_convs", "table1_bodyconv", "table1_conv3d"):
        config: Any = reduced(config_of(name))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_size=48))
        batch = make_batch(open_data(config, "test"), list(range(48)))
        given = jnp.asarray(batch["findings"]), jnp.asarray(batch["regions"])
        allowed = np.asarray(allowed_of(*given))
        allowed = allowed[batch["findings"].any(-1)].reshape(-1, *allowed.shape[2:])
        inside = allowed.mean(axis=(1, 2, 3))
        assert np.mean((inside == 0) | (inside == 1)) < 0.05, name


def test_a_config_of_ones_own_is_reduced_too():
    small = reduced(Config(model=AxialNet(blocks=(3, 4, 6, 3), pool="max"), data=StoreData("x")))
    assert isinstance(small.model, AxialNet)
    assert small.model.pool == "max"


def test_runs_of_other_options_are_told_apart(tmp_path: Path):
    config = config_of("masks_area")
    model = config.model.clone(num_labels=3)  # as its data has them
    saved = dataclasses.replace(config, model=model, workers=7)
    header = Header(saved, ("a", "b", "c"), ("r",), PAPER_SHAPE, (1.0, 1.0, 1.0))
    (tmp_path / "run.json").write_text(header.to_json())
    check_made_with(tmp_path, config)
    for other, field in (
        (reduced(config), "config.model"),
        (dataclasses.replace(config, epochs=3), r"config.epochs \(100, not 3\)"),
        (config_of("masks_area_dilated"), "config.data"),
    ):
        with pytest.raises(UserError, match=f"was made with another {field}") as caught:
            check_made_with(tmp_path, other)
        assert "\n" not in str(caught.value)


TINY = [
    *("--data.train-size", "16", "--data.val-size", "16", "--data.test-size", "16"),
    *("--epochs", "1"),
]


@pytest.mark.long
def test_all_experiments_and_their_tables(tmp_path: Path):
    """Train, evaluate and tabulate each experiment, reduced, by the launch script."""
    command = [ROOT / "launch" / "paper.sh", tmp_path, "--reduced", *TINY]
    (tmp_path / "bin").mkdir()
    hirescam = tmp_path / "bin" / "hirescam"
    hirescam.write_text(f'#!/bin/sh\nexec {sys.executable} -m hirescam_jax.cli "$@"\n')
    hirescam.chmod(0o755)
    # Most experiments share their programs.
    path = environment(
        PATH=f"{hirescam.parent}:{os.environ['PATH']}",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    subprocess.run(command, env=path, check=True, stdout=subprocess.DEVNULL)
    rows = list(csv.DictReader((tmp_path / "tables" / "models.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == names("*")
    assert {row["head"] for row in rows} == {"exact", "complete", "none"}
    tables = {path.stem for path in (tmp_path / "tables").glob("*.csv")}
    assert {"models", "models_validation", "masks", "differences"} <= tables
    masks = list(csv.DictReader((tmp_path / "tables" / "masks.csv").read_text().splitlines()))
    assert {row["masks by"] for row in masks} == {"nearest", "area", "trilinear"}
    assert all(row["OrganIoU HiResCAM, dilated"] for row in masks)
    for row in rows:
        assert 0 <= float(row["AUROC"]) <= 1
        # So few volumes have no label with positives enough for an interval.
        assert row["AUROC low"] == row["AUROC high"] == ""
    # Finished runs are left alone.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/evaluation.json")}
    command[2:2] = ["--only", "masks_*"]
    subprocess.run(command, env=path, check=True, stdout=subprocess.DEVNULL)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # Those that were made with other options are not put into one table with these.
    others = subprocess.run([*command, "--epochs", "2"], env=path, capture_output=True, text=True)
    assert others.returncode == 2
    assert "was made with another config.epochs (1, not 2)" in others.stderr


def test_reduced_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fields that are given besides hold for the small experiment."""
    config = ROOT / "configs" / "paper" / "table1_axialnet_max.py"
    got: list[Config] = []

    def train(config: Config, run_dir: Path, **_: Any) -> Any:
        got.append(config)
        return type("Run", (), {"step": 0})

    monkeypatch.setattr("hirescam_jax.training.loop.train", train)
    main(["train", str(config), "--run", str(tmp_path / "run"), "--reduced", "--epochs", "3"])
    expected = reduced(config_of("table1_axialnet_max"))
    assert got == [dataclasses.replace(expected, epochs=3)]
