"""How processes find each other, and what they are told on the command line."""

import argparse
import contextlib
import dataclasses
import select
import socket
import time
from collections.abc import Sequence
from typing import NoReturn

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
