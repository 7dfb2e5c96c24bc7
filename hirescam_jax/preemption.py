"""Being asked to stop: a scheduler's signal ends the training at the same step in all processes."""

import os
import signal
import threading
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """While it is entered, SIGTERM and SIGUSR1 (to any of the processes) ask to stop.

    A second signal, after the first was seen, does what it did before: SIGTERM ends the process.
    """

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
        self._restore()

    def reached(self) -> bool:
        """Whether to stop here. All processes call it equally often and get the same answers:
        they agree on the next call that none of them has made yet."""
        if not self.noticed and jax.distributed.is_initialized():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self.calls += 1
            self.noticed = reached_preemption_sync_point(self.calls)
            if self.noticed and self.before:
                self._restore()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self.noticed

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        self.before[number] = signal.signal(number, handler)

    def _notice(self, *_: object) -> None:
        self.noticed = True
        self._restore()

    def _restore(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())
