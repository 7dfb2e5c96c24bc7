"""Where the time of a training goes, how well the devices are used, and traces of single steps."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hirescam_jax.progress import say

# Dense bfloat16 FLOP/s of a device as its maker states them.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Of a device, by its name; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


PARTS = ("input", "device", "checkpoint")  # of the time of the steps


class Watch:
    """Adds up what the parts of an epoch take; flops: of a step on one device.

    with watch("input"): ...       named parts; the rest is Python between them
    with watch("validation"): ...  does not count
    watch.figures(steps, volumes)  of the time since the last call
    """

    def __init__(self, flops: float):
        self.flops = flops
        self.device = jax.local_devices()[0]
        self.peak = peak_flops(self.device.device_kind)
        self._start_again()

    def _start_again(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys((*PARTS, "validation"), 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin

    def figures(self, steps: int, volumes: int) -> dict[str, float]:
        """Per step in seconds, and what follows from it; begins anew.

        step_seconds, of which input_seconds (waiting for data and copying it to the devices),
        device_seconds (starting the step and waiting for the devices) and checkpoint_seconds;
        volumes_per_second; flop_utilisation: a device's FLOPs over its peak (where that is known);
        device_gib: most memory used so far (where the device tells).
        """
        elapsed = time.perf_counter() - self.start - self.seconds["validation"]
        count = max(steps, 1)
        figures = {"step_seconds": elapsed / count, "volumes_per_second": volumes / elapsed}
        figures |= {f"{part}_seconds": self.seconds[part] / count for part in PARTS}
        if self.peak:
            figures["flop_utilisation"] = self.flops * steps / elapsed / self.peak
        memory = self.device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            figures["device_gib"] = memory["peak_bytes_in_use"] / 2**30
        self._start_again()
        return figures


class Trace:
    """A profile of `steps` steps, from the third of this process on, when all is compiled; for
    TensorBoard or xprof, in `profile/PROCESS` of the run folder."""

    def __init__(self, run_dir: Path, first_step: int, steps: int):
        self.folder = run_dir / "profile" / str(jax.process_index())
        self.begin, self.end = first_step + 2, first_step + 2 + steps
        self.running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._stop()

    def before(self, step: int, pending: Any) -> None:
        """To be called before each step, with results of the step before, which is waited for."""
        if step == self.begin < self.end:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif step == self.end and self.running:
            jax.block_until_ready(pending)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        say(f"a trace of steps {self.begin} to {self.end - 1} is in {self.folder}")
