"""What a step costs, where its time goes, and traces: `--dry-run`, `Watch`, `--profile`."""

import dataclasses
import re

import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.config import Config, Preprocess
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.devices.layout import Layout
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training import watch
from hirescam_jax.training.costs import dry_run, step_cost, step_flops
from hirescam_jax.training.watch import Trace, Watch

SHAPE = (6, 32, 32)
LABELS, REGIONS = 4, 5
CONFIG = Config(
    model=AxialNet(LABELS, blocks=(1,), widths=(16,), stem="small", conv_widths=(8,)),
    data=PhantomData(PhantomConfig(shape=SHAPE), train_size=8, val_size=2, test_size=2),
    preprocess=Preprocess(flip=0.0, rotate=0.0),
    batch_size=4,
)


def multiplications() -> int:
    """Of the convolutions and the last layer for one volume, forward."""
    slices, cells = SHAPE[0] // 3, 16 * 16  # the stem halves the slices' sides
    stem = cells * 9 * 3 * 16
    block = 2 * cells * 9 * 16 * 16
    convs = 14 * 14 * 9 * 16 * 8
    fc = 14 * 14 * 8 * LABELS
    return slices * (stem + block + convs + fc)


def test_flops_are_those_of_the_layers():
    """Twice the multiplications (and additions) forward, and twice that backward, but that the
    stem needs no gradient by its input; norms, losses and maps are small beside them. XLA does
    not count products with padding, so a little may be missing."""
    flops = step_flops(CONFIG, open_layout(CONFIG, SHAPE), LABELS, REGIONS)
    expected = CONFIG.batch_size * 3 * 2 * multiplications()
    assert 0.85 < flops / expected < 1.25


def test_micro_batches_do_not_change_the_cost():
    def cost(micro_batches: int):
        config = dataclasses.replace(CONFIG, micro_batches=micro_batches)
        return step_cost(config, open_layout(config, SHAPE), LABELS, REGIONS)

    once, twice = cost(1), cost(2)
    assert twice.flops == once.flops
    assert twice.bytes_accessed == pytest.approx(once.bytes_accessed, rel=0.25)


def test_flops_are_shared_by_the_devices():
    layout = open_layout(CONFIG, SHAPE)
    whole = step_flops(CONFIG, layout, LABELS, REGIONS)

    class Four:
        size, shape = 4, {"data": 2, "depth": 2}

    of_four = object.__new__(Layout)
    for name, value in {**vars(layout), "mesh": Four}.items():
        object.__setattr__(of_four, name, value)
    assert step_flops(CONFIG, of_four, LABELS, REGIONS) == whole / 4


def test_dry_run(capsys, tmp_path):
    source = "from tests.training.test_costs import CONFIG as config\n"
    (tmp_path / "config.py").write_text(source)
    line = ["train", str(tmp_path / "config.py"), "--run", str(tmp_path / "run"), "--dry-run"]
    cli.main([*line, "--memory-gib", "0.0001"])
    said = capsys.readouterr().out
    assert "one train step: batch 4 of 6 x 32 x 32 voxels" in said
    flops = re.search(r"arithmetic +([\d.]+) ([kMG])FLOP", said)
    assert flops is not None
    assert float(flops[1]) > 0
    assert "largest batch in 0.0001 GiB a device: none (a batch of 1 does not fit)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["batch_size", "micro_batches"])
def test_dry_run_checks_what_a_training_does(name):
    with pytest.raises(UserError, match=rf"config\.{name} must be at least 1, got 0"):
        dry_run(dataclasses.replace(CONFIG, **{name: 0}), 80)


def test_where_the_time_goes(monkeypatch):
    """By a clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    one = Watch(flops=3e12)
    one.peak = 6e12

    def spend(part: str | None, seconds: float) -> None:
        if part is None:
            now[0] += seconds
        else:
            with one(part):
                now[0] += seconds

    for part, seconds in (("input", 1), ("device", 4), ("checkpoint", 2), (None, 1), ("input", 2)):
        spend(part, seconds)
    spend("validation", 50)
    figures = one.figures(steps=5, volumes=20)
    expected = {"step": 2.0, "input": 0.6, "device": 0.8, "checkpoint": 0.4}
    assert {f"{name}_seconds": value for name, value in expected.items()}.items() <= figures.items()
    assert figures["volumes_per_second"] == 2.0
    assert figures["flop_utilisation"] == pytest.approx(5 * 3e12 / 10 / 6e12)
    spend("device", 3)
    assert one.figures(1, 1)["step_seconds"] == 3.0  # it begins anew


@pytest.mark.parametrize("ended", [3, 9])
def test_a_trace_is_of_the_third_step_and_those_after(monkeypatch, capsys, tmp_path, ended):
    """Also where the training ends in the middle of it. Each process writes its own."""
    calls = []
    monkeypatch.setattr("jax.process_index", lambda: 0)
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(step))
    with Trace(tmp_path, first_step=1, steps=4) as trace:
        for step in range(1, ended + 1):
            trace.before(step, np.float32(0))
    assert calls == [tmp_path / "profile" / "0", min(ended, 7)]
    assert "trace of steps 3 to 6" in capsys.readouterr().err


def test_no_trace_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("jax.profiler.start_trace", lambda _: pytest.fail("started"))
    with Trace(tmp_path, first_step=0, steps=0) as trace:
        for step in range(5):
            trace.before(step, None)


@pytest.mark.long
def test_profile_writes_a_trace(tmp_path):
    (tmp_path / "config.py").write_text("from tests.training.test_costs import CONFIG as config\n")
    line = ["train", str(tmp_path / "config.py"), "--run", str(tmp_path / "run")]
    cli.main([*line, "--profile", "1", "--epochs", "1", "--batch-size", "2"])
    assert list((tmp_path / "run" / "profile" / "0").rglob("*.xplane.pb"))
