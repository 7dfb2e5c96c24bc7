"""The command: help, bad input in one line with exit code 2, and the phantom as files."""

import csv
import json

import nibabel
import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig

TINY_CONFIG = """
from hirescam_jax.config import Config, PhantomData, SGD
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet
from hirescam_jax.config import Preprocess

config = Config(
    model=AxialNet(blocks=(1,), widths=(4,), stem="small", conv_widths=()),
    data=PhantomData(PhantomConfig(shape=(6, 16, 16)), train_size=2, val_size=2, test_size=2),
    optimizer=SGD(learning_rate=0.01),
    batch_size=2,
    epochs=1,
)
"""


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail: exit code 2, nothing but a message on standard error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert caught.value.code == 2
        assert output.out == ""
        assert "Traceback" not in output.err
        return output.err

    return run


@pytest.fixture
def fails_in_one_line(fails):
    def run(*arguments) -> str:
        message = fails(*arguments)
        assert message.startswith("hirescam: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY_CONFIG)
    return path


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_names_every_command(capsys, arguments):
    cli.main(arguments)
    printed = capsys.readouterr().out
    for name in (*cli.COMMANDS, "train"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize("command", [*cli.COMMANDS, "train"])
def test_help_of_each_command(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"hirescam {command}" in capsys.readouterr().out


# -- bad input ------------------------------------------------------------------------------------


def test_unknown_command(fails_in_one_line):
    message = fails_in_one_line("explian", "run")
    assert "no command 'explian' (did you mean 'explain'?)" in message
    assert "one of: compare, demo," in fails_in_one_line("zzz")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["phantom", "--out", "x", "--shpae", "1", "2", "3"], "--shape"),
        (["evaluate", "run", "--checkpiont", "best"], "--checkpoint"),
        (["explain", "run", "--input", "a.nii", "--out", "x", "--methd", "gradcam"], "--method"),
        (["train", "--run", "x", "--bacth-size", "3"], "--batch-size"),
        (["train", "--run", "x", "--model.num-label", "3"], "--model.num-labels"),
    ],
)
def test_misspelt_option(fails, arguments, meant):
    assert meant in fails(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["phantom", "--out", "x", "--size", "many"],
        ["phantom", "--out", "x", "--split", "training"],
        ["evaluate", "run", "--checkpoint", "first"],
        ["train", "--run", "x", "--epochs", "three"],
        ["train", "--run", "x", "--model.stem", "large"],
        ["phantom"],
        ["train"],
    ],
    ids=" ".join,
)
def test_bad_or_missing_value_of_an_option(fails, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert fails(*arguments)
    assert not list(tmp_path.iterdir())


def test_missing_run_folder(fails_in_one_line, tmp_path):
    run = tmp_path / "none"
    for arguments in (
        ["evaluate", run],
        ["explain", run, "--input", "a.nii", "--out", tmp_path / "out"],
    ):
        message = fails_in_one_line(*arguments)
        assert f"{run}: not a run folder" in message
    assert not list(tmp_path.iterdir())


def test_damaged_run(fails_in_one_line, tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1')
    assert f"{tmp_path / 'run.json'}: not readable as JSON" in fails_in_one_line(
        "evaluate", tmp_path
    )


def test_missing_and_bad_configs(fails_in_one_line, tmp_path):
    message = fails_in_one_line("train", tmp_path / "none.py", "--run", tmp_path / "run")
    assert f"{tmp_path / 'none.py'}: no such config file" in message
    (tmp_path / "bad.py").write_text("confg = 3")
    message = fails_in_one_line("train", tmp_path / "bad.py", "--run", tmp_path / "run")
    assert "must define `config = " in message
    assert not (tmp_path / "run").exists()


def test_unknown_label(fails_in_one_line, config, tmp_path):
    message = fails_in_one_line("train", config, "--run", tmp_path / "run", "--labels", "nodul")
    assert "config.labels: 'nodul' unknown (did you mean 'nodule'?)" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.phantom.confounding", "3"], "confounding"),
        (["--data.phantom.shape", "7", "16", "16"], "config.model does not fit volumes"),
        (["--data.phantom.shape", "6", "16", "12"], "preprocess.rotate"),
        (["--batch-size", "8"], "config.batch_size = 8 exceeds the 2 training volumes"),
        (["--batch-size", "0"], "batch_size"),
        (["--epochs", "0"], "epochs"),
        (["--data.train-size", "-1"], "size"),
        (["--data.val-size", "0"], "val_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_work(fails_in_one_line, config, tmp_path, options, message):
    run = tmp_path / "run"
    assert message in fails_in_one_line("train", config, "--run", run, *options)
    assert not run.exists()


def test_folder_that_exists(fails_in_one_line, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for arguments in (
        ["train", config, "--run", tmp_path / "out"],
        ["phantom", "--out", tmp_path / "out"],
        ["demo", "--out", tmp_path / "out"],
    ):
        assert f"{tmp_path / 'out'}: exists" in fails_in_one_line(*arguments)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("command", ["train", "phantom", "demo"])
def test_folder_that_cannot_be_made(fails_in_one_line, config, tmp_path, command):
    (tmp_path / "file").write_text("not a folder")
    target = tmp_path / "file" / "out"
    arguments = [command, config, "--run"] if command == "train" else [command, "--out"]
    assert str(tmp_path / "file") in fails_in_one_line(*arguments, target)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_interruption(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hirescam_jax.data.phantom.export.export", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["phantom", "--out", str(tmp_path / "out")])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "hirescam: interrupted\n"


def test_full_disk(monkeypatch, fails_in_one_line, tmp_path):
    import errno
    import os

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out" / "x.nii.gz"))

    monkeypatch.setattr("nibabel.save", full)
    message = fails_in_one_line("phantom", "--out", tmp_path / "out", "--shape", "6", "12", "12")
    assert "x.nii.gz: No space left on device" in message


# -- what works -----------------------------------------------------------------------------------


def test_phantom_files(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--size", "2", "--split", "val", "--seed", "3", "--shape", "12", "16", "14"]
    cli.main(["phantom", "--out", str(out), *options])
    names = [f"phantom_val_{i:04d}" for i in range(2)]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == sorted(
        [f"{n}.nii.gz" for n in names]
        + [f"masks/{n}_{kind}.nii.gz" for n in names for kind in ("lesions", "regions")]
        + ["findings.csv"]
    )
    source = Phantom(PhantomConfig(shape=(12, 16, 14), seed=3), "val", 2, (1, 1, 1))
    with (out / "findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i, name in enumerate(names):
        case = source.case(i)
        image = nibabel.load(out / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), case.volume)
        assert image.get_data_dtype() == np.int16
        assert nibabel.aff2axcodes(image.affine) == ("I", "P", "L")
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.header.get_zooms(), (300 / 12, 360 / 16, 360 / 14), 1e-6)
        regions = np.asarray(nibabel.load(out / "masks" / f"{name}_regions.nii.gz").dataobj)
        lesions = np.asarray(nibabel.load(out / "masks" / f"{name}_lesions.nii.gz").dataobj)
        for r in range(len(source.regions)):
            np.testing.assert_array_equal(regions == r + 1, case.regions[r])
        np.testing.assert_array_equal(lesions > 0, case.lesions.any(0))
        assert rows[i]["id"] == name
        for k, label in enumerate(source.labels):
            assert int(rows[i][label]) == case.findings[k].any()
            for r, region in enumerate(source.regions):
                assert int(rows[i][f"{label}@{region}"]) == case.findings[k, r]


def test_phantoms_right_lung_is_at_positive_x(tmp_path):
    """NIfTI's world is RAS: x grows towards the patient's right, z towards the head."""
    cli.main(
        ["phantom", "--out", str(tmp_path / "out"), "--size", "1", "--shape", "24", "24", "24"]
    )
    image = nibabel.load(tmp_path / "out" / "masks" / "phantom_test_0000_regions.nii.gz")
    regions = np.asarray(image.dataobj)
    names = Phantom.regions
    centre = {
        name: nibabel.affines.apply_affine(
            image.affine, np.argwhere(regions == names.index(name) + 1).mean(0)
        )
        for name in ("right_lung", "left_lung", "heart")
    }
    assert centre["right_lung"][0] > 20
    assert centre["left_lung"][0] < -20
    assert centre["heart"][0] < 0  # on the left


@pytest.mark.slow
def test_train_and_evaluate(config, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--seed", "4", "--preprocess.rotate", "0", "--labels", "nodule", "emphysema"]
    cli.main(["train", str(config), "--run", str(run), *options])
    assert f"{run}: best epoch ends at step 1" in capsys.readouterr().out
    header = json.loads((run / "run.json").read_text())
    assert header["labels"] == ["nodule", "emphysema"]
    assert (header["config"]["seed"], header["config"]["preprocess"]["rotate"]) == (4, 0)
    assert header["config"]["optimizer"]["learning_rate"] == 0.01

    cli.main(["train", str(config), "--run", str(run), *options, "--resume", "--epochs", "2"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 * 2

    cli.main(["evaluate", str(run), "--checkpoint", "latest"])
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert str(run / "evaluation.json") in printed
    result = json.loads((run / "evaluation.json").read_text())
    assert (result["step"], result["volumes"]) == (2, 2)
    baselines = {"organ_prior", "centre_blob", "random"}
    assert set(result["organ_iou"]) == {"hirescam", "gradcam", *baselines}
