"""What the mask loss costs in a train step, and what the step costs in PyTorch.

    python benchmarks/train_step_cost.py            # AxialNet (ResNet-18) on 24 x 128 x 128
    python benchmarks/train_step_cost.py --demo     # the demo's small network and batch
    python benchmarks/train_step_cost.py --full     # 405 x 420 x 420, for accelerators

The step is the program that `hirescam train` runs, with its state donated: augmentation, window,
forward, losses, gradient, update and metrics. The targets are, with the mask loss against without,
at most 1.05 x the time and 1.05 x the memory. Where PyTorch is installed the step without mask
loss is compared with its eager equivalent: the same network, batch, augmentation, classification
loss and kind of optimiser, convolutions in channels-last order.
"""

import argparse
import dataclasses
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Timing, interleave, machine_line, memory, mib, ratio, write_results
from explain_cost import axialnet

from hirescam_jax.compiling import compiler_options, reuse_memory
from hirescam_jax.config import Config
from hirescam_jax.data.phantom.findings import LABELS
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.devices.mesh import replicated
from hirescam_jax.experiments.demo import demo_config
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training.step import compile_train_step, init_state, make_optimizer

TARGET = 1.05
REGIONS = 5


class Step:
    """A compiled train step with the state that it updates."""

    def __init__(self, config: Config, batch: dict[str, np.ndarray]):
        optimizer = make_optimizer(config, 1000)
        layout = open_layout(config, batch["volume"].shape[1:])
        self.batch = layout.to_devices(batch)
        init = partial(init_state, config, optimizer, layout.shape)
        self.state = jax.jit(init, out_shardings=replicated(layout.mesh))()
        self.compiled = compile_train_step(
            config, optimizer, layout, batch["findings"].shape[1], REGIONS
        )

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def random_batch(config: Config, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A batch as the pipeline delivers it; timing does not depend on what is seen."""
    rng = np.random.default_rng(0)
    size, labels = config.batch_size, config.model.num_labels
    grid = feature_grid(config.model, shape)
    return {
        "volume": rng.integers(-1000, 1000, (size, *shape), dtype=np.int16),
        "findings": (rng.random((size, labels, REGIONS)) < 0.1).astype(np.uint8),
        "regions": (rng.random((size, REGIONS, *grid)) < 0.3).astype(np.uint8),
        "index": np.arange(size, dtype=np.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", type=int, nargs=3, default=(24, 128, 128), metavar="N")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--full", action="store_true", help="the paper's 405 x 420 x 420")
    preset.add_argument("--demo", action="store_true", help="network and batch of the demo")
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true", help="skip PyTorch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    reuse_memory()  # as the commands do
    if args.demo:
        config = demo_config()
        model = config.model.clone(num_labels=len(LABELS))
        config = dataclasses.replace(config, model=model)
        assert isinstance(config.data, PhantomData)
        shape: tuple[int, ...] = config.data.phantom.shape
    else:
        shape = (405, 420, 420) if args.full else tuple(args.volume)
        model = axialnet(args.labels, shape[1], args.dtype)
        config = Config(model=model, batch_size=args.batch)
    batch = random_batch(config, shape)

    print(machine_line())
    print(
        f"AxialNet {config.model.widths}, {config.model.num_labels} labels, "
        f"batch {config.batch_size}, {shape}, {config.model.dtype}"
    )
    steps = {
        "plain step": Step(dataclasses.replace(config, mask_weight=0.0), batch),
        "mask-loss step": Step(config, batch),
    }
    used = {name: memory(step.compiled) for name, step in steps.items()}
    measured = device_peaks(steps)
    volume = config.preprocess.normalize(jax.device_put(batch["volume"]))
    # The plain and the mask-loss step donate their states; the forward pass has its own.
    variables = jax.jit(config.model.init)(jax.random.key(0), volume)
    apply = jax.jit(config.model.apply, compiler_options=compiler_options())
    forward = apply.lower(variables, volume).compile()
    programs: dict[str, Any] = {**steps, "forward": lambda: forward(variables, volume)}
    if importlib.util.find_spec("torch") and not args.no_torch:
        from torch_axialnet import TorchRun

        grid = feature_grid(config.model, shape)
        torch_run = TorchRun(config, grid, jax.default_backend() == "gpu")
        torch_batch = {name: torch_run.tensor(value) for name, value in batch.items()}
        torch_volume = torch_run.tensor(np.asarray(volume))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert torch_run.parameters() == parameters, (torch_run.parameters(), parameters)
        programs["torch step"] = lambda: torch_run.train_step(torch_batch)
        programs["torch forward"] = lambda: torch_run.forward(torch_volume)

    times: dict[str, Timing] = interleave(programs, args.repeats)
    for name, timing in times.items():
        print(f"  {name:<15}{timing}")
    plain, masked = "plain step", "mask-loss step"
    for name in (plain, masked):
        peak = f", peak on the device {mib(measured[name])}" if name in measured else ""
        print(
            f"  {name:<15}temporaries {mib(used[name]['temporary_bytes'])}, "
            f"with state, batch and results {mib(used[name]['total_bytes'])}{peak}"
        )
    ratios = {
        "mask loss, time": ratio(times[masked], times[plain]),
        "mask loss, memory": used[masked]["total_bytes"] / used[plain]["total_bytes"],
    }
    targets = dict(ratios)
    if "torch step" in times:
        ratios["plain step / torch step"] = ratio(times[plain], times["torch step"])
        ratios["forward / torch forward"] = ratio(times["forward"], times["torch forward"])
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    for name, value in targets.items():
        print(f"target {name} <= {TARGET}: {'met' if value <= TARGET else 'MISSED'}")
    write_results(
        args.json,
        {
            "volume": shape,
            "labels": config.model.num_labels,
            "batch": config.batch_size,
            "dtype": config.model.dtype,
            "widths": config.model.widths,
            "times": {name: timing.summary() for name, timing in times.items()},
            "memory": used,
            "device_peak_bytes": measured,
            "ratios": ratios,
        },
        sys.argv,
    )


def device_peaks(steps: dict[str, Step]) -> dict[str, int]:
    """The device's own high-water mark after each step; empty where it keeps none (CPU).

    The mark never falls, so only the first step's is its own unless the next one is higher.
    """
    peaks = {}
    for name, step in steps.items():
        jax.block_until_ready(step())
        stats = jax.devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            peaks[name] = int(stats["peak_bytes_in_use"])
    return peaks


if __name__ == "__main__":
    main()
