"""Being asked to stop: a scheduler's signal ends the training at the same step in all processes.

Schedulers may send several signals at once (SLURM to each task and to the batch script, which hands
them on), and send SIGKILL when they lose patience: no signal after the first one does anything.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # EX_TEMPFAIL: run again with --resume


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """Until a training's `Preemption` is entered, and after it was left, a signal ends the process
    with code 75: there is nothing to save. Among others it tells them, who stop together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(*_: object) -> None:
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler by now
        else:
            os._exit(STOPPED)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ignore() -> None:
    """For the way out of a training that is saved: another signal must not change its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Preemption:
    """While it is entered, SIGTERM and SIGUSR1 (to any of the processes) ask to stop."""

    def __init__(self) -> None:
        self.noticed, self.calls = False, 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        if jax.distributed.is_initialized():
            # JAX's own handler of SIGTERM, in its C++, tells the other processes.
            self._handle(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        else:
            for number in SIGNALS:
                self._handle(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def reached(self) -> bool:
        """Whether to stop here. All processes call it equally often and get the same answers:
        they agree on the next call that none of them has made yet."""
        if not self.noticed and jax.distributed.is_initialized():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self.calls += 1
            self.noticed = reached_preemption_sync_point(self.calls)
        return self.noticed

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        self.before[number] = signal.signal(number, handler)

    def _notice(self, *_: object) -> None:
        self.noticed = True
