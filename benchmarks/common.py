"""What the benchmarks share: interleaved timing, the machine's two ceilings, the results file."""

import dataclasses
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Idle threads of one framework spin for a moment before they sleep; the next program waits it out.
REST_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one program, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def summary(self) -> dict[str, float]:
        low, high = self.quartiles
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "lower_quartile_s": low,
            "upper_quartile_s": high,
        }

    def __str__(self) -> str:
        low, high = (1000 * q for q in self.quartiles)
        least = 1000 * min(self.seconds)
        return f"{1000 * self.median:9.1f} ms  (min {least:.1f}, quartiles {low:.1f} to {high:.1f})"


def interleave(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times the programs in turns, each turn in another order, so that a busy machine slows all of
    them alike, and none has always the same one (whose threads and caches linger) before it.

    Each is called once before the clock starts: compilation, autotuning and caches are not timed.
    Results are waited for (a program on another framework has to wait for its own).
    """
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    order = random.Random(0)
    gc.disable()
    try:
        for _ in range(repeats):
            for name in order.sample([*programs], len(programs)):
                program = programs[name]
                time.sleep(REST_SECONDS)
                start = time.perf_counter()
                jax.block_until_ready(program())
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(upper: Timing, lower: Timing) -> float:
    """The median of the ratios of neighbouring repetitions: slow phases of the machine cancel."""
    return statistics.median(a / b for a, b in zip(upper.seconds, lower.seconds, strict=True))


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches at its best, measured: a large matmul and a large triad."""

    flops: float
    bandwidth: float

    def bounds(self, cost: Mapping[str, float]) -> tuple[float, float]:
        """Seconds that a program with this cost analysis takes at least: arithmetic, memory."""
        return cost.get("flops", 0) / self.flops, cost.get("bytes accessed", 0) / self.bandwidth


def measure_ceilings(dtype: str) -> Ceilings:
    """The best of several tries; sizes that leave the caches, small enough for any machine."""
    on_cpu = jax.default_backend() == "cpu"
    side = 2048 if on_cpu else 8192
    matrix = jnp.ones((side, side), jnp.dtype(dtype))
    matmul = jax.jit(lambda a, b: a @ b)
    length = 2**25 if on_cpu else 2**28
    vectors = [jnp.full(length, value, jnp.float32) for value in (1.0, 2.0)]
    triad = jax.jit(lambda a, b: a + 3.0 * b)
    times = interleave(
        {"matmul": lambda: matmul(matrix, matrix), "triad": lambda: triad(*vectors)}, 5
    )
    return Ceilings(
        flops=2 * side**3 / min(times["matmul"].seconds),
        bandwidth=3 * 4 * length / min(times["triad"].seconds),
    )


def cost(compiled: Any) -> dict[str, float]:
    """XLA's own count of operations and of bytes accessed."""
    analysis = compiled.cost_analysis()
    return dict(analysis[0] if isinstance(analysis, list) else analysis or {})


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program: temporaries alone, and at most in all.

    Donated arguments live where the outputs do, and count once.
    """
    stats = compiled.memory_analysis()
    temporary = int(stats.temp_size_in_bytes)
    outside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"temporary_bytes": temporary, "total_bytes": temporary + int(outside)}


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def machine() -> dict[str, str]:
    """The machine and the versions that a figure was measured on."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                     else os.cpu_count()),
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions,
    }  # fmt: skip


def machine_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def write_results(path: Path | None, results: Mapping[str, Any], command: Sequence[str]) -> None:
    """Writes the results with the machine, the versions and the command; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": " ".join(command), "machine": machine(), **results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {path}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
