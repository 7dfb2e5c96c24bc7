"""Real processes on loopback: meeting, agreeing, losing one."""

import os
import signal
import socket
import threading
import time

import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.devices import processes, rendezvous
from hirescam_jax.devices.rendezvous import Launch, parse_launch
from hirescam_jax.errors import StartError, UserError
from tests.devices.test_preemption import command
from tests.processes import Group, free_port, run

# -- who is on its own ----------------------------------------------------------------------------

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        (ALLOCATION, False),  # salloc, or the batch script itself
        ({**ALLOCATION, "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1
        ({**ALLOCATION, "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_only_one_of_several_tasks_joins(variables, several):
    assert processes._in_cluster(variables) == several


def test_slurms_places(monkeypatch):
    """What JAX makes of the variables of a task of srun: two nodes, two tasks on each."""
    task = {"SLURM_JOB_ID": "100", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4"}
    task |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    (coordinator, count, number), devices = processes._detect(1)
    assert coordinator is not None
    assert coordinator.startswith("gpu07:")
    assert (count, number, devices) == (4, 3, [1])


def test_a_process_on_its_own_starts_nothing(monkeypatch):
    for name, value in ALLOCATION.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: pytest.fail("started"))
    processes.start(Launch())
    processes.start(Launch("localhost:1", 1, 0))


# -- options --------------------------------------------------------------------------------------


def test_options_are_taken_from_anywhere():
    given = ["--process-id=1", "train", "c.py", "--coordinator", "h:1", "--run", "r"]
    launch, rest = parse_launch([*given, "--num-processes", "2"])
    assert launch == Launch("h:1", 2, 1)
    assert rest == ["train", "c.py", "--run", "r"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator h:1", "together"),
        ("--num-processes 2", "together"),
        ("--coordinator h:1 --num-processes 2 --process-id 2", "give 0 to 1"),
        ("--coordinator h:1 --num-processes two --process-id 0", "invalid int value: 'two'"),
        ("--coordinator h --num-processes 2 --process-id 0", "give HOST:PORT"),
        ("--coordinator h:99999 --num-processes 2 --process-id 0", "give HOST:PORT"),
        ("--start-timeout 0", "at least 1 second"),
    ],
)
@pytest.mark.parametrize("command", ["train --run x", "evaluate x", "explain x"])
def test_bad_options(capsys, command, options, message):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), *options.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("hirescam: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_command_of_one_process(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["phantom", "--coordinator", "h:1", "--num-processes", "2", "--process-id", "0"])
    assert caught.value.code == 2
    assert "'phantom' runs in one process" in capsys.readouterr().err


# -- meeting --------------------------------------------------------------------------------------


def meet_in_threads(count: int, numbers: list[int], timeout: float = 20) -> list[str]:
    """What `meet` says in each of `numbers`, "" where all have come; "again: " before what is worth
    another try."""
    coordinator, said = f"localhost:{free_port()}", [""] * len(numbers)

    def one(i: int) -> None:
        try:
            rendezvous.meet(coordinator, count, numbers[i], timeout)
        except UserError as error:
            said[i] = ("again: " if isinstance(error, StartError) else "") + str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_meeting():
    assert meet_in_threads(4, [3, 1, 2, 0]) == [""] * 4


def test_those_that_do_not_come_are_named_everywhere():
    said = meet_in_threads(5, [0, 1, 3], timeout=1)
    for line in said:
        assert "again: after 1 seconds processes 2, 4 of 5 had not started" in line


def test_no_coordinator():
    (said,) = meet_in_threads(2, [1], timeout=1)
    assert "again: no coordinator at localhost:" in said
    assert "after 1 seconds: is process 0 running" in said


def test_a_number_given_twice():
    said = meet_in_threads(4, [0, 1, 1], timeout=20)
    assert said == ["two processes have --process-id 1"] * 3


def test_strangers_at_the_port_are_ignored():
    port = free_port()
    host = threading.Thread(target=rendezvous.meet, args=(f"localhost:{port}", 2, 0, 20))
    host.start()
    for words in (b"GET / HTTP/1.1\r\n", b"hirescam 1 3\n", b"\xff\xfe\n"):
        for _ in range(100):
            try:
                stranger = socket.create_connection(("localhost", port))
                break
            except OSError:
                time.sleep(0.05)
        with stranger:
            stranger.sendall(words)
    rendezvous.meet(f"localhost:{port}", 2, 1, 20)
    host.join()


def test_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} cannot be opened .*in use"):
            rendezvous.meet(f"localhost:{port}", 2, 0, 5)


# -- agreeing, losing one -------------------------------------------------------------------------

AGREE = """
import sys
from tests.processes import start_from_arguments
(value,) = start_from_arguments()
import jax
assert jax.process_count() == 3 and jax.device_count() == 6
from hirescam_jax.cli import main as cli
from hirescam_jax.devices import processes, rendezvous
from hirescam_jax.errors import UserError
try:
    processes.agree({"config.seed": "0", "config.epochs": value, "labels": value})
except UserError as error:
    cli._end(str(error), 2)
print("agreed")
"""


@pytest.mark.slow
def test_processes_that_agree_and_that_do_not():
    ends = run(3, [], script=AGREE, devices=2, each={i: ["7"] for i in range(3)})
    assert [end.out.split()[-1] for end in ends] == ["agreed"] * 3
    values = {0: ["7"], 1: ["7"], 2: ["8"]}
    with Group(3, [], script=AGREE, devices=2, each=values) as group:
        ends = group.wait()
    for number, end in enumerate(ends):
        assert end.code == 2
        assert (
            "hirescam: the processes disagree: config.epochs of process 2 is not that of process 0 "
            f"(here: {values[number][0]})\n"
        ) in end.err
        assert "Traceback" not in end.err


UNSHARED = """
from pathlib import Path
from tests.processes import start_from_arguments
(folder,) = start_from_arguments()
from hirescam_jax.cli import main as cli
from hirescam_jax.runs import checkpoints as checkpoint
from hirescam_jax.runs.run import Header
from tests.training.test_train import Cases, config_of
checkpoint.SHARED_SECONDS = 1
def save(_):
    run = Path(folder) / "run"
    checkpoint.Saver(run, Header.of(config_of(), Cases(2)), resume=False)
cli._run = save
cli.main(["train"])
"""


@pytest.mark.long
def test_a_run_folder_that_is_not_shared(tmp_path):
    folders = [tmp_path / "of host 0", tmp_path / "of host 1"]
    with Group(2, [], script=UNSHARED, each={i: [folders[i]] for i in range(2)}) as group:
        ends = group.wait(60)
    for folder, end in zip(folders, ends, strict=True):
        assert end.code == 2
        assert f"hirescam: {folder / 'run'}: is not" in end.err
        assert "file system that all hosts share" in end.err


LOSE = """
import os, sys, time
from tests.processes import start_from_arguments
start_from_arguments()
import jax
from hirescam_jax.cli import main as cli
from hirescam_jax.devices import processes, rendezvous
def main(_):
    processes.on_first(lambda: 1)
    print("ready", flush=True)
    while True:
        processes.on_first(lambda: 1)
        time.sleep(0.05)
cli._run = main
cli.main(["train"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_end_when_a_process_is_lost(lost):
    with Group(2, [], script=LOSE) as group:
        pipe = group.processes[lost].stdout
        assert pipe is not None
        for line in pipe:
            if "ready" in line:
                break
        group.send(lost, signal.SIGKILL)
        ends = group.wait(60)  # kills what still runs then
    assert ends[lost].code == -signal.SIGKILL
    other = ends[1 - lost]
    # JAX ends the process from a thread of its own (SIGABRT) if it is the first to notice.
    assert other.code in (1, -signal.SIGABRT)
    assert "another process has ended, see its" in other.err or "another task died" in other.err


FAIL = """
import sys
from hirescam_jax.cli import main as cli
from hirescam_jax.data.phantom import Phantom

number, read, count = int(sys.argv[sys.argv.index("--process-id") + 1]), Phantom.__getitem__, []

def broken(self, index):
    count.append(index)
    if number == 1 and len(count) > 30:
        raise RuntimeError("NCCL and Gloo are words of this message")
    return read(self, index)

Phantom.__getitem__ = broken
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_unexpected_error_in_one_process_ends_all():
    script = LOSE.replace("time.sleep(0.05)", "assert jax.process_index() == 0, 'unexpected'")
    with Group(2, [], script=script) as group:
        other, end = group.wait(60)  # kills what still runs then
    assert end.code == 1
    assert "Traceback" in end.err
    assert "AssertionError: unexpected" in end.err
    assert other.code in (1, -signal.SIGABRT)
    assert "another process has ended, see its" in other.err or "another task died" in other.err


@pytest.mark.long
def test_an_unexpected_error_in_a_training_ends_all(tmp_path):
    """Each step is saved, so that a checkpoint is being written when it comes."""
    arguments = command(tmp_path, "run", "--save-steps", 1)
    with Group(2, arguments, script=FAIL) as group:
        other, end = group.wait(90)  # kills what still runs then
    assert end.code == 1
    assert "Traceback" in end.err
    assert "RuntimeError: NCCL and Gloo are words of this message" in end.err
    assert other.code in (1, -signal.SIGABRT)
    assert "another process has ended, see its" in other.err or "another task died" in other.err


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("NCCL operation ncclAllReduce failed: unhandled cuda error: out of memory", False),
        ("Gloo context initialization failed: no such interface", False),
        ("coordination service agent: invalid argument", False),
        ("NCCL operation failed: ncclRemoteError: a remote process exited", True),
        ("Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:37", True),
        ("Read error [10.0.0.1]:4: Connection reset by peer", True),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", True),
    ],
)
def test_only_errors_that_tell_of_another_process_are_put_down_to_it(monkeypatch, text, lost):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert processes.peer_lost(RuntimeError(text)) is lost


@pytest.mark.slow
def test_a_dead_coordinator_is_a_clear_error(tmp_path):
    arguments = ["train", "--run", tmp_path / "run"]
    with Group(2, arguments, only=[1], options=("--start-timeout", 2)) as group:
        (end,) = group.wait()
    assert end.code == 1  # another try may go better
    assert "no coordinator at localhost:" in end.err
    assert end.err.count("\n") == 1
    assert os.listdir(tmp_path) == []
