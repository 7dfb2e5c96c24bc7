"""Real processes on this machine for tests: a script or a command, N times, joined by JAX."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    """How a process ended: exit code (negative: by that signal) and what it printed."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """CPU only, `devices` virtual ones, this checkout's code and tests, no cluster around."""
    dropped = ("SLURM_", "KUBERNETES_", "JAX_", "XLA_", "OMPI_", "TPU_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **{name: value for name, value in kept.items() if "_proxy" not in name.lower()},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **more,
    }


class Group:
    """`count` processes of `python -m hirescam_jax.cli ARGUMENTS`, or of `python -c SCRIPT
    ARGUMENTS`, started at once; a script finds its place by `start_from_arguments`.

    Args:
        devices: virtual CPU devices of each.
        each: arguments of single processes, by number, after the common ones.
        only: start these numbers only.
        cache: compiled programs are kept here, which makes a second group faster.
        options: more options of the start, as `hirescam_jax.devices.processes` takes them.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[object],
        *,
        script: str | None = None,
        devices: int = 1,
        each: dict[int, Sequence[object]] | None = None,
        only: Sequence[int] | None = None,
        cache: Path | None = None,
        options: Sequence[object] = ("--start-timeout", 60, "--heartbeat-timeout", 10),
    ):
        more = {}
        if cache is not None:
            more = {
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        base = [sys.executable, "-m", "hirescam_jax.cli"]
        if script is not None:
            base = [sys.executable, "-c", script]
        coordinator = f"localhost:{free_port()}"
        self.processes: dict[int, subprocess.Popen] = {}
        self.outputs: dict[int, list[str]] = {}
        for number in range(count) if only is None else only:
            command = [*base, *arguments, *(each or {}).get(number, ())]
            if count > 1:
                command += ["--coordinator", coordinator, "--num-processes", count]
                command += ["--process-id", number, *options]
            self.processes[number] = subprocess.Popen(
                [str(item) for item in command],
                env=environment(devices, **more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()

    def send(self, number: int, what: signal.Signals) -> None:
        self.processes[number].send_signal(what)

    def wait(self, timeout: float = 120) -> list[Done]:
        """All processes' ends, in the order of their numbers; those still running after `timeout`
        seconds are killed."""
        deadline = time.monotonic() + timeout
        ends: dict[int, Done] = {}

        def one(number: int, process: subprocess.Popen) -> None:
            try:
                out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            ends[number] = Done(process.returncode, out, err)

        threads = [threading.Thread(target=one, args=item) for item in self.processes.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [ends[number] for number in self.processes]


def run(count: int, arguments: Sequence[object], timeout: float = 120, **options) -> list[Done]:
    """Starts a `Group`, waits for it and checks that all went well."""
    with Group(count, arguments, **options) as group:
        ends = group.wait(timeout)
    for number, end in enumerate(ends):
        assert end.code == 0, f"process {number} ended with {end.code}:\n{end.err[-3000:]}"
    return ends


def start_from_arguments() -> list[str]:
    """For a script of a `Group`: joins the others; returns the script's own arguments."""
    from hirescam_jax.devices import processes, rendezvous

    launch, rest = rendezvous.parse_launch(sys.argv[1:])
    processes.start(launch, preemptible=True)
    return rest
