"""Runs of several processes: how they start, agree on what they do, and end.

Under SLURM (srun with several tasks), in a Kubernetes Job or JobSet with indexed completion and on
TPU pods JAX finds out where it is; elsewhere `--coordinator HOST:PORT --num-processes N
--process-id I` tell it. A process that is on its own starts nothing.

Before JAX starts, all processes meet at the coordinator's port: JAX's own start ends a process that
waits in vain with an abort, from which Python cannot say who is missing.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from hirescam_jax.errors import StartError, UserError


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the command line says about the processes; None: found out from the cluster.

    start_timeout: seconds to wait for the others at start.
    heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    heartbeat_timeout: int = 100


def parse_launch(arguments: Sequence[str]) -> tuple[Launch, list[str]]:
    """Takes the options of a start out of a command line.

    Raises:
        UserError: only some of the three, or values that do not fit.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    for spec in dataclasses.fields(Launch)[1:]:
        name = "--" + spec.name.replace("_", "-")
        parser.add_argument(name, type=int, default=spec.default)
    known, rest = parser.parse_known_args(list(arguments))
    launch = Launch(**vars(known))
    three = (launch.coordinator, launch.num_processes, launch.process_id)
    if any(value is not None for value in three):
        if launch.coordinator is None or launch.num_processes is None or launch.process_id is None:
            raise UserError("give --coordinator, --num-processes and --process-id together")
        if not 0 <= launch.process_id < launch.num_processes:
            raise UserError(
                f"--process-id {launch.process_id}: give 0 to {launch.num_processes - 1}, "
                f"one number a process (--num-processes {launch.num_processes})"
            )
        _address(launch.coordinator)
    for name in ("start_timeout", "heartbeat_timeout"):
        if getattr(launch, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: give at least 1 second")
    return launch, rest


def start(launch: Launch, *, preemptible: bool = False) -> None:
    """Joins the other processes of this run, if there are any. To be called before JAX is used.

    Args:
        preemptible: SIGTERM is a notice to all processes (see `preemption`) and does not end one.

    Raises:
        StartError: the others do not come within `launch.start_timeout`.
    """
    place, devices = (launch.coordinator, launch.num_processes, launch.process_id), None
    if launch.coordinator is None:
        if not _in_cluster(os.environ):
            return
        place, devices = _detect(launch.start_timeout)
    coordinator, count, number = place
    if coordinator is None or count is None or number is None:
        raise UserError(
            "this cluster does not tell where the other processes are: give --coordinator, "
            "--num-processes and --process-id"
        )
    if count == 1:
        return
    begin = time.monotonic()
    meet(coordinator, count, number, launch.start_timeout)
    left = launch.start_timeout - int(time.monotonic() - begin)
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        coordinator,
        count,
        number,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(30, left),
        heartbeat_timeout_seconds=launch.heartbeat_timeout,
        # At the end all wait for the one that writes the results.
        shutdown_timeout_seconds=3600,
    )


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several by its surroundings. A job that merely runs in an
    allocation (salloc, the batch script itself, srun with one task) is on its own."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def _detect(timeout: int) -> tuple[Any, list[int] | None]:
    """Coordinator, number of processes, this one's number; and its devices. As
    `jax.distributed.initialize()` without arguments finds them."""
    from jax._src.clusters import ClusterEnv

    try:
        *place, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(f"no other processes found in this cluster: {error}") from error
    return tuple(place), None if devices is None else list(devices)


# -- meeting before the start ---------------------------------------------------------------------


def meet(coordinator: str, count: int, number: int, timeout: float) -> None:
    """Returns in all `count` processes once all have called it.

    Raises:
        StartError: not all of them came in time; it names those that are missing.
        UserError: two of them have the same number, or the port cannot be opened.
    """
    deadline = time.monotonic() + timeout
    if number == 0:
        _host(coordinator, count, timeout, deadline)
    else:
        _join(coordinator, count, number, timeout, deadline)


def _host(coordinator: str, count: int, timeout: float, deadline: float) -> None:
    _, port = _address(coordinator)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=dual, backlog=min(count, 4096)
        )
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: port {port} cannot be opened ({error.strerror}): "
            "choose another"
        ) from error
    guests: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as stack:
        while len(guests) < count - 1 and (left := deadline - time.monotonic()) > 0:
            if not select.select([server], [], [], left)[0]:
                break
            guest = stack.enter_context(server.accept()[0])
            number = _greeting(guest, count)
            if number in guests:
                answer = f"two processes have --process-id {number}"
                _tell([guest, *guests.values()], f"wrong {answer}")
                raise UserError(answer)
            if number is not None:
                guests[number] = guest
        missing = sorted(set(range(1, count)) - set(guests))
        answer = ""
        if missing:
            answer = f"after {timeout:g} seconds {_spell(missing)} of {count} had not started"
        _tell(list(guests.values()), f"late {answer}" if missing else "go")
        if missing:
            raise StartError(f"{answer}: see their output")


def _greeting(guest: socket.socket, count: int) -> int | None:
    """The number with which a process reports; None for anything else that knocks at the port."""
    guest.settimeout(5)
    try:
        word, number, of = guest.makefile("r").readline(100).split()
    except (OSError, ValueError):
        return None
    fits = word == "hirescam" and of == str(count) and number.isdecimal()
    return int(number) if fits and 0 < int(number) < count else None


def _tell(guests: list[socket.socket], answer: str) -> None:
    for guest in guests:
        with contextlib.suppress(OSError):
            guest.sendall(f"{answer}\n".encode())
    # The guests hang up first, so that this port is free at once for JAX.
    for guest in guests:
        with contextlib.suppress(OSError):
            guest.recv(1)


def _join(coordinator: str, count: int, number: int, timeout: float, deadline: float) -> None:
    answer = ""
    while not answer and (left := deadline - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(_address(coordinator), timeout=left) as connection,
        ):
            connection.sendall(f"hirescam {number} {count}\n".encode())
            # The coordinator's clock may have started later than this one.
            connection.settimeout(timeout + 5)
            answer = connection.makefile("r").readline().strip()
        if not answer:
            time.sleep(min(0.2, left))
    if not answer:
        raise StartError(
            f"no coordinator at {coordinator} after {timeout:g} seconds: is process 0 running, "
            "and can this host reach that address and port?"
        )
    word, _, reason = answer.partition(" ")
    if word != "go":
        raise (StartError if word == "late" else UserError)(reason)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator}: give HOST:PORT, such as node1:8476")
    return host.strip("[]"), int(port)


def _spell(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


# -- during the run -------------------------------------------------------------------------------


def agree(facts: Mapping[str, str]) -> None:
    """Compares what the processes are about to do, by hashes.

    Args:
        facts: what must be the same, by the name under which a user knows it; the same names in
            the same order in all processes of one version of this program.

    Raises:
        UserError: in all processes, naming the first fact that differs and a process of each kind.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    names = list(facts)
    texts = ["\n".join(names), *facts.values()]
    mine = np.array([list(hashlib.sha256(text.encode()).digest()) for text in texts], np.uint8)
    # Row 0, of the names, has the same shape everywhere: a differing count cannot be gathered.
    titles_P = process_allgather(mine[:1])
    _compare(titles_P, ["the version of hirescam_jax"], [f"{len(names)} facts"])
    _compare(process_allgather(mine[1:]), names, list(facts.values()))


def _compare(hashes_PNh: np.ndarray, names: list[str], values: list[str]) -> None:
    for i, name in enumerate(names):
        other = (hashes_PNh[:, i] != hashes_PNh[0, i]).any(axis=-1)
        if other.any():
            number = int(np.argmax(other))
            value = values[i] if len(values[i]) < 80 else f"{values[i][:76]} ..."
            jax.distributed.shutdown()  # all leave together, so none is taken for dead
            raise UserError(
                f"the processes disagree: {name} of process {number} is not that of process 0 "
                f"(here: {value})"
            )


def on_first(task: Callable[[], Any]) -> Any:
    """Runs `task` in process 0. All get its result, which JSON must hold, or raise its UserError;
    the others wait for it."""
    if jax.process_count() == 1:
        return task()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    told, error = b"", None
    if jax.process_index() == 0:
        try:
            told = json.dumps({"result": task()}).encode()
        except UserError as caught:
            told, error = json.dumps({"error": str(caught)}).encode(), caught
    length = int(broadcast_one_to_all(np.int32(len(told))))
    padded = np.frombuffer(told.ljust(length), np.uint8)[:length]
    answer = json.loads(bytes(broadcast_one_to_all(padded)))
    if "error" in answer:
        raise UserError(answer["error"]) from error
    return answer["result"]


def in_any(flag: bool) -> bool:
    """Whether it is so in any of the processes."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.array(flag)).any())


def leave(code: int) -> NoReturn:
    """Ends this process after an error.

    With others still at work it must not wait for them, as JAX does at a normal exit: they notice
    that a process is gone, and end too. The coordinator stays a moment longer, so that those that
    fail for the same reason can say so.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(3)
    os._exit(code)


def peer_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone away."""
    # Not the libraries' names, which their complaints about this process bear too.
    signs = ("closed by peer", "reset by peer", "heartbeat", "another task", "ncclremoteerror")
    text = str(error).lower()
    return jax.distributed.is_initialized() and any(sign in text for sign in signs)
