"""Signals that stop a training, checkpoints that are damaged: it continues exactly."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hirescam_jax.devices.preemption import Preemption
from hirescam_jax.errors import Preempted, StartError, UserError
from hirescam_jax.runs import integrity
from hirescam_jax.runs.integrity import checksums
from hirescam_jax.runs.run import load_run
from hirescam_jax.training.loop import train
from tests.processes import Done, Group, run
from tests.training.test_train import Cases, compilation_cache, config_of, losses_of, run_training  # noqa: F401


def same(run: Path, other: Path) -> None:
    """Two runs went the same way, bit for bit."""
    assert losses_of(run) == losses_of(other)
    for which in ("latest", "best"):
        runs = [load_run(path, which) for path in (run, other)]
        assert runs[0].step == runs[1].step
        jax.tree.map(np.testing.assert_array_equal, *(r.variables for r in runs))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training(config_of(), folder)
    return folder


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "step"),
    [
        (1, 1),
        pytest.param(2, 2, marks=pytest.mark.long),
        (4, 2),
        pytest.param(5, 3, marks=pytest.mark.long),
    ],
)
def test_a_stopped_training_continues_exactly(monkeypatch, tmp_path, whole, call, step):
    """An epoch asks four times: after each of two steps, and before two batches of validation."""
    folder, calls = tmp_path / "run", []

    def reached(_):
        calls.append(1)
        return len(calls) >= call

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "reached", reached)
        with pytest.raises(Preempted, match=rf"stopped by a signal, saved at step {step}"):
            run_training(config_of(), folder)
    assert steps_of(folder)[-1] == step
    if step == 2:  # the end of an epoch that waits for its validation: it is not written again
        saved = (folder / "checkpoints" / "2").stat().st_ino
        run_training(config_of(epochs=1), folder, resume=True)
        assert (folder / "checkpoints" / "2").stat().st_ino == saved
    run_training(config_of(), folder, resume=True)
    same(folder, whole)


def test_an_epoch_is_on_disk_while_it_is_validated(tmp_path, whole):
    folder = tmp_path / "run"

    class Killing(Cases):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 4:  # in the second epoch, where two batches of two are read too
                for _ in range(200):
                    if 4 in steps_of(folder):
                        raise KeyboardInterrupt
                    time.sleep(0.1)
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(), folder, sources=(Cases(5), Killing(3, seed=1)))
    assert [line[:2] for line in losses_of(folder)][-1] == (3, "train")
    run_training(config_of(), folder, resume=True)
    same(folder, whole)


def test_checkpoints_between_epochs_do_not_change_a_training(tmp_path, whole):
    run_training(config_of(save_steps=1), tmp_path / "run")
    same(tmp_path / "run", whole)
    best = load_run(whole).step
    assert steps_of(tmp_path / "run") == sorted({best, 5, 6})


@pytest.mark.slow
def test_patience_counts_epochs_whatever_is_saved_between(tmp_path):
    """The best epoch is the first; its checkpoint is long followed by others without a loss."""
    from hirescam_jax.config import SGD

    optimizer = SGD(learning_rate=0.3, momentum=0.9, weight_decay=0.0)
    config = config_of(optimizer=optimizer, epochs=30, patience=2, save_steps=1)
    best = run_training(config, tmp_path / "run", shift=600.0)
    validation = [line[2] for line in losses_of(tmp_path / "run") if line[1] == "val"]
    lowest = int(np.argmin(validation))
    assert len(validation) == lowest + 1 + 2 < 30
    assert best.step == 2 * (lowest + 1)


def test_a_training_that_is_stopped_reads_no_more_data(monkeypatch, tmp_path):
    class Unread(Cases):
        def __getitem__(self, index):
            raise AssertionError("read")

    def reached(self):
        self.noticed = True
        return True

    monkeypatch.setattr(Preemption, "reached", reached)
    with pytest.raises(Preempted, match="saved at step 1"):
        train(config_of(), tmp_path / "run", sources=(Cases(5), Unread(3)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_a_notice_however_many_come(number):
    got = []
    before = signal.signal(number, lambda *_: got.append(number))
    try:
        with Preemption() as stop:
            assert not stop.reached()
            for _ in range(3):
                os.kill(os.getpid(), number)
                assert stop.reached()
            assert got == []
        os.kill(os.getpid(), number)
        assert got == [number]
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption():
        pass
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_training_in_a_thread_has_no_handlers():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with Preemption() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.reached()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


# -- damage ---------------------------------------------------------------------------------------


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "a flipped bit of the weights": lambda c: [
        flip(p, 0.5) for p in (c / "variables").rglob("d/*") if p.is_file()
    ],
    "a flipped bit of the momentum": lambda c: flip(largest(c / "progress"), 0.4),
    "no data": lambda c: shutil.rmtree(c / "variables" / "d"),
    "no variables": lambda c: shutil.rmtree(c / "variables"),
    "no metadata": lambda c: (c / "progress" / "_METADATA").unlink(),
    "an empty file": lambda c: (c / "variables" / "manifest.ocdbt").write_bytes(b""),
    "cut metrics": lambda c: (c / "metrics" / "metrics").write_text('{"val_l'),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("no data", "cut metrics") else ())
        for name in DAMAGES
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(capsys, tmp_path, whole, damage):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    DAMAGES[damage](folder / "checkpoints" / "6")
    run_training(config_of(), folder, resume=True)
    said = capsys.readouterr().err
    assert f"warning: {folder / 'checkpoints' / '6'}: damaged" in said
    assert "continuing from step 4" in said
    assert len(list(folder.glob("damaged-6-*"))) == 1
    same(folder, whole)


FAILURES = {
    "an error of the system": OSError(errno.EIO, "Input/output error"),
    "TensorStore's word for it": ValueError("Error reading: [OS error 116: ESTALE]"),
}


@pytest.mark.parametrize(("failure", "times"), [*zip(FAILURES, (1, integrity.TRIES), strict=True)])
def test_storage_that_fails_is_no_damage(monkeypatch, tmp_path, whole, failure, times):
    folder, left = tmp_path / "run", [FAILURES[failure]] * times
    shutil.copytree(whole, folder)
    load = integrity.ocp.load_checkpointables

    def failing(*arguments):
        if left:
            raise RuntimeError("cannot load") from left.pop()
        return load(*arguments)

    monkeypatch.setattr(integrity.ocp, "load_checkpointables", failing)
    monkeypatch.setattr(integrity, "PAUSE_SECONDS", 0)
    if times < integrity.TRIES:
        run_training(config_of(), folder, resume=True)
        same(folder, whole)
    else:
        with pytest.raises(StartError, match=r"checkpoints/6: cannot be read .*: try again"):
            run_training(config_of(), folder, resume=True)
    assert steps_of(folder) == steps_of(whole)
    assert not list(folder.glob("damaged-*"))


def test_all_checkpoints_damaged(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    steps = steps_of(folder)
    for step in steps:
        shutil.rmtree(folder / "checkpoints" / str(step) / "variables")
    with pytest.raises(UserError, match=r"6: damaged.*, and so are those before it: \[4") as caught:
        run_training(config_of(), folder, resume=True)
    assert "\n" not in str(caught.value)
    assert steps_of(folder) == steps


def test_reading_damaged_weights(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    DAMAGES["a flipped bit of the weights"](folder / "checkpoints" / "6")
    with pytest.raises(UserError, match=r"checkpoints/6: damaged"):
        load_run(folder, "latest")


def test_reading_leaves_alone_what_is_being_written(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinished = folder / "checkpoints" / "7.orbax-checkpoint-tmp"
    unfinished.mkdir()
    load_run(folder, "latest")
    assert unfinished.is_dir()


def test_checksums_tell_any_change():
    rng = np.random.default_rng(0)
    tree = {"a": {"x": rng.normal(size=(3, 4)).astype(np.float32)}, "b": [np.int32(7), np.zeros(2)]}
    tree["b"][1] = tree["b"][1].astype(np.float16)
    on_device = jax.device_get(jax.jit(checksums)(tree))
    assert on_device == checksums(tree, np)
    for bit in range(32):
        bits = tree["a"]["x"].copy()
        bits.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
        changed = checksums({**tree, "a": {"x": bits}}, np)
        assert changed["a"] != on_device["a"]
        assert changed["b"] == on_device["b"]
    exchanged = tree["a"]["x"][::-1].copy()
    assert checksums({"a": {"x": exchanged}}, np)["a"] != on_device["a"]


# -- real processes -------------------------------------------------------------------------------

# A training that says how far it is, and saves for a while.
STANDING_IN = """
import sys, time
from pathlib import Path
import hirescam_jax.training.loop
from hirescam_jax.cli import main as cli
from hirescam_jax.errors import Preempted
from hirescam_jax.devices.preemption import Preemption

def train(config, run, **_):
    print("started", flush=True)
    while not run.exists():
        time.sleep(0.02)
    with Preemption() as stop:
        print("training", flush=True)
        while not stop.reached():
            time.sleep(0.02)
        print("saving", flush=True)
        time.sleep(2)
    raise Preempted("saved")

hirescam_jax.training.loop.train = train
cli.main(sys.argv[1:])
"""


def said(group: Group, word: str, *numbers: int) -> None:
    for number in numbers:
        pipe = group.processes[number].stdout
        assert pipe is not None
        assert pipe.readline().strip() == word


@pytest.mark.slow
def test_a_signal_before_the_training(tmp_path):
    with Group(1, ["train", "--run", tmp_path / "go"], script=STANDING_IN) as group:
        said(group, "started", 0)
        group.send(0, signal.SIGUSR1)
        (end,) = group.wait()
    assert (end.code, end.err) == (75, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "early"),
    [pytest.param(1, False, marks=pytest.mark.long), pytest.param(2, True, marks=pytest.mark.long)],
)
def test_more_signals_do_not_disturb_the_saving(tmp_path, count, early):
    """With others, one that comes before the training stops it as soon as it has begun."""
    both, numbers = (signal.SIGTERM, signal.SIGUSR1), range(count)
    with Group(count, ["train", "--run", tmp_path / "go"], script=STANDING_IN) as group:
        said(group, "started", *numbers)
        if early:
            group.send(count - 1, signal.SIGUSR1)
        (tmp_path / "go").touch()
        said(group, "training", *numbers)
        if not early:
            group.send(0, signal.SIGTERM)
        said(group, "saving", *numbers)
        for _ in range(10):
            for number in numbers:
                for what in both:
                    group.send(number, what)
            time.sleep(0.05)
        ends = group.wait()
    assert [end.code for end in ends] == [75] * count, ends
    assert all("hirescam: saved" in end.err for end in ends)


CONFIG = """
from hirescam_jax.config import Config, PhantomData, SGD
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet
from hirescam_jax.config import Preprocess

config = Config(
    model=AxialNet(blocks=(1,), widths=(4,), stem="small", conv_widths=()),
    data=PhantomData(PhantomConfig(shape=(6, 16, 16)), train_size=160, val_size=4, test_size=4),
    optimizer=SGD(learning_rate=0.01),
    batch_size=4,
    epochs=4,
)
"""


def command(folder: Path, name: str, *more: object) -> list[object]:
    (folder / "config.py").write_text(CONFIG)
    return ["train", folder / "config.py", "--run", folder / name, *more]


def stopped(group: Group, run: Path, number: int, what: signal.Signals) -> list[Done]:
    """Sends a signal once some steps are done."""
    while not (run / "metrics.jsonl").exists() or len(losses_of_lines(run)) < 4:
        assert all(process.poll() is None for process in group.processes.values())
        time.sleep(0.02)
    group.send(number, what)
    return group.wait()


def losses_of_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_and_fewer_continue(tmp_path):
    """Four processes, of which one is told to stop, then two of which the other is, then one."""
    more = {"cache": tmp_path / "cache"}
    run(1, command(tmp_path, "whole"), **more)
    folder, ends = tmp_path / "run", []
    with Group(4, command(tmp_path, "run"), **more) as group:
        ends.append(stopped(group, folder, 2, signal.SIGTERM))
    before = len(losses_of_lines(folder))
    with Group(2, command(tmp_path, "run", "--resume"), **more) as group:
        while len(losses_of_lines(folder)) < before + 4:
            assert all(process.poll() is None for process in group.processes.values())
            time.sleep(0.02)
        group.send(1, signal.SIGUSR1)
        ends.append(group.wait())
    for codes in ends:
        assert [end.code for end in codes] == [75] * len(codes), codes
        (message,) = {end.err.splitlines()[-1] for end in codes}
        assert "stopped by a signal, saved at step" in message
    steps = [load_run(tmp_path / name, "latest").step for name in ("whole", "run")]
    assert steps[1] < steps[0] == 160
    run(1, command(tmp_path, "run", "--resume"), **more)
    for name in ("params", "batch_stats"):
        parts = [load_run(tmp_path / n, "latest").variables[name] for n in ("whole", "run")]
        # Sums over the batch in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *parts)
    lines = [json.loads(line) for line in losses_of_lines(folder)]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(160))


DYING = """
import os, signal, sys
from hirescam_jax.cli import main as cli
from hirescam_jax.runs.checkpoints import Saver
own = sys.argv[sys.argv.index("--process-id") + 1]
number, last = sys.argv.pop(1).split(",")
save = Saver.save
def dying(self, step, *rest):
    save(self, step, *rest)
    if own == number and step == int(last):  # while it is written
        os.kill(os.getpid(), signal.SIGKILL)
Saver.save = dying
cli.main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_process_that_is_killed_while_all_save(tmp_path):
    """First one, then the other: each time the other ends too, and all continue exactly."""
    more = {"cache": tmp_path / "cache"}
    run(2, command(tmp_path, "whole", "--epochs", 1), **more)
    line = command(tmp_path, "run", "--epochs", 1, "--save-steps", 1)
    for number, step in ((1, 5), (0, 9)):
        with Group(2, [f"{number},{step}", *line], script=DYING, **more) as group:
            ends = group.wait(90)  # kills what still runs then
        assert ends[number].code == -signal.SIGKILL
        assert ends[1 - number].code in (1, -signal.SIGABRT), ends
        assert max(steps_of(tmp_path / "run")) in (step - 1, step)
        line = command(tmp_path, "run", "--epochs", 1, "--save-steps", 1, "--resume")
    run(2, line, **more)
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.long
def test_processes_that_fail_alike_all_say_so(tmp_path):
    (tmp_path / "run").mkdir()
    with Group(2, command(tmp_path, "run")) as group:
        ends = group.wait()
    for end in ends:
        assert end.code == 2
        assert "exists; choose another folder, or --resume to continue it" in end.err
