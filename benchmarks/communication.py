"""What the devices of a mesh tell each other in a train step, and what it means for scaling.

    python benchmarks/communication.py                    # the paper's AxialNet at full size
    python benchmarks/communication.py --model conv3d

Compiles the step for meshes of 8 virtual CPU devices, reads the exchanges from the optimised
program (nothing runs), and predicts 8, 64 and 256 devices. Exchanges are the same on every kind of
device, but for how many of them a compiler joins. Prints Markdown.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
from common import machine_line

from hirescam_jax.config import Config
from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training.costs import Collective, StepCost, step_cost
from hirescam_jax.training.watch import PEAK_FLOPS

SHAPE = (405, 420, 420)
MODELS = {"axialnet": AxialNet(), "conv3d": Conv3DNet()}
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
LABELS, REGIONS = 80, 5

# The device that a link joins, by its name in `PEAK_FLOPS`; bytes per second that a device sends at
# most (makers' figures); and seconds that an exchange takes however small it is (an assumption, the
# same for 8 and 256 devices; measure yours).
LINKS = {
    "NVLink 4 (H100), up to 8": ("H100", 450e9, 15e-6),
    "InfiniBand NDR, one port an H100": ("H100", 50e9, 30e-6),
    "TPU v5p ICI": ("TPU v5p", 600e9, 10e-6),
}
REACHED = 0.4  # of a device's peak FLOP/s (an assumption)


def name_of(exchange: Collective) -> str:
    """What an exchange is for, by its place in the source and its size."""
    if exchange.kind == "collective-permute":
        volume = any(dtype == "s16" for dtype, _ in exchange.arrays)
        return "flips along the depth: " + ("int16 slices" if volume else "masks")
    if "head" in exchange.name and exchange.payload < 1e6:
        return "sums over slices"
    if exchange.payload > 1e5 or any(len(shape) >= 4 for _, shape in exchange.arrays):
        return "gradients (some statistics with them)"
    return "statistics and losses"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.3g}" if value >= 1e4 else "<0.01"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="axialnet")
    parser.add_argument("--out", type=Path, help="write the Markdown to this file too")
    args = parser.parse_args()
    model = MODELS[args.model]
    lines = [f"{machine_line()}", ""]
    lines += [
        f"One train step of {args.model} at {' x '.join(map(str, SHAPE))}, {LABELS} labels, one "
        "volume a row of the mesh. MB that a device gives, and in brackets how many exchanges:",
        "",
    ]
    costs: dict[tuple[int, int], StepCost] = {}
    table: dict[str, dict[tuple[int, int], tuple[int, int]]] = {}
    for data, depth in MESHES:
        config = Config(model=model, batch_size=data, depth_devices=depth)
        costs[data, depth] = step_cost(config, open_layout(config, SHAPE), LABELS, REGIONS)
        payload, count = Counter[str](), Counter[str]()
        for exchange in costs[data, depth].exchanges:
            payload[name_of(exchange)] += exchange.payload
            count[name_of(exchange)] += 1
        for name in payload:
            table.setdefault(name, {})[data, depth] = payload[name], count[name]
    lines.append("| data x depth | " + " | ".join(f"{a} x {b}" for a, b in MESHES) + " |")
    lines.append("|---" * (len(MESHES) + 1) + "|")
    for name, row in table.items():
        cells = [f"{megabytes(row[m][0])} ({row[m][1]})" if m in row else "" for m in MESHES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    kinds = Counter(e.kind for cost in costs.values() for e in cost.exchanges)
    lines += ["", f"Kinds in all four programs: {', '.join(sorted(kinds))}.", ""]

    variables = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, *SHAPE)))
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    plain = costs[8, 1]
    exchanges = len(plain.exchanges)
    lines += [
        f"Scaling over `data`, one volume a device: {plain.flops / 1e12:.2f} TFLOP a device and "
        f"step, at {REACHED:.0%} of its peak. A ring passes on 2 (n - 1) / n of the "
        f"{gradients / 1e6:.1f} MB of gradients; each of {exchanges} exchanges waits its latency. "
        "efficiency = arithmetic / (arithmetic + bytes / bandwidth + latencies). This is an "
        "estimate: nothing overlaps with the arithmetic, which makes it too low; links reach their "
        "makers' bandwidth and latencies do not grow with the devices, which makes it too high.",
        "",
        "| devices | MB sent a device | " + " | ".join(LINKS) + " |",
        "|---" * (len(LINKS) + 2) + "|",
    ]
    for devices in (8, 64, 256):
        sent = 2 * (devices - 1) / devices * gradients
        cells = []
        for name, (device, bandwidth, latency) in LINKS.items():
            compute = plain.flops / (REACHED * PEAK_FLOPS[device])
            waiting = sent / bandwidth + exchanges * latency
            efficiency = compute / (compute + waiting)
            fits = devices <= 8 or "NVLink" not in name
            cells.append(f"{efficiency:.1%} (+{1000 * waiting:.2f} ms)" if fits else "")
        lines.append(f"| {devices} | {sent / 1e6:.1f} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
