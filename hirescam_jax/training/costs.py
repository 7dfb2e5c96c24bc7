"""What a compiled step costs, read from the program itself: arithmetic, memory, communication."""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from hirescam_jax.config import Config, check_sizes
from hirescam_jax.data.pipeline import open_split
from hirescam_jax.devices import mesh
from hirescam_jax.devices.layout import Layout
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training.step import batch_loss, compile_train_step, init_state, make_optimizer

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices in a compiled program.

    Attributes:
        kind: one of `KINDS`.
        arrays: what each device gives: (dtype, shape) of each array.
        devices: in a group that exchanges.
        name: of the operation in the source.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    name: str

    @property
    def payload(self) -> int:
        """Bytes that each device gives."""
        return sum(_itemsize(dtype) * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes a device sends at least: a ring all-reduce passes on everything almost twice."""
        if self.kind == "collective-permute":
            return self.payload
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (self.devices - 1) / self.devices


def collectives(program: str) -> list[Collective]:
    """All exchanges in an optimised HLO text (`compiled.as_text()`), but those of a device with
    itself."""
    found = []
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = [
            (dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", match["type"]))
        ]
        if match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[:1]  # operand, result and flags
        name = re.search(r'op_name="([^"]*)"', line)
        one = Collective(match["kind"], tuple(arrays), _group(line), name[1] if name else "")
        if one.devices > 1:
            found.append(one)
    return found


def _group(line: str) -> int:
    """Devices in a group; for a permutation, 1 if each sends to itself alone."""
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", line):
        moves = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return 2 if any(a != b for a, b in moves) else 1
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if first := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(first[1].split(","))
    return jax.device_count()


def _itemsize(dtype: str) -> int:
    bits = _BITS.search(dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Of one train step on one device.

    flops: of the forward pass and the gradients of its share of the batch (`step_flops`).
    bytes_accessed: XLA's count, as if there were no cache. XLA counts the body of a loop once, so
        with micro-batches this is that of one of them, times their number.
    memory: most bytes at once, as XLA plans it: state, batch and temporaries.
    temporary: the part of them that only lives during the step.
    exchanges: between devices; of those inside the loop over micro-batches, one turn.
    """

    flops: float
    bytes_accessed: float
    memory: int
    temporary: int
    exchanges: tuple[Collective, ...]


def step_flops(config: Config, layout: Layout, labels: int, regions: int) -> float:
    """Operations of a train step on one device: XLA's count for the loss of one volume and its
    gradients, times a device's share of the volumes.

    It is that of the program as it is written. In a compiled one XLA counts a loop over
    micro-batches once, and convolutions that are calls of a GPU's library not at all.
    """
    init = partial(init_state, config, make_optimizer(config, 1), tuple(layout.shape))
    state = jax.eval_shape(init)
    batch = {
        "volume": jax.ShapeDtypeStruct((1, *layout.shape), np.int16),
        "findings": jax.ShapeDtypeStruct((1, labels, regions), np.uint8),
        "regions": jax.ShapeDtypeStruct((1, regions, *layout.grid), np.uint8),
        "index": jax.ShapeDtypeStruct((1,), np.int32),
    }
    gradient = jax.jit(jax.grad(partial(batch_loss, config=config, depth=None), has_aux=True))
    key = jax.eval_shape(jax.random.key, 0)
    lowered = gradient.lower(state.params, state.batch_stats, batch, key)
    analysis: Any = lowered.cost_analysis() or {}
    return float(analysis.get("flops", 0.0)) * layout.batch_size / layout.mesh.size


def step_cost(config: Config, layout: Layout, labels: int, regions: int) -> StepCost:
    """Compiles the train step of a config for a mesh, without data, and without running it."""
    config = dataclasses.replace(config, model=config.model.clone(num_labels=labels))
    optimizer = make_optimizer(config, 1000)
    compiled = compile_train_step(config, optimizer, layout, labels, regions)
    part = compiled
    if config.micro_batches > 1:
        size = config.batch_size // config.micro_batches
        alone = dataclasses.replace(config, batch_size=size, micro_batches=1)
        smaller = dataclasses.replace(layout, batch_size=size, micro_batches=1)
        part = compile_train_step(alone, optimizer, smaller, labels, regions)
    analysis: Any = part.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return StepCost(
        flops=step_flops(config, layout, labels, regions),
        bytes_accessed=analysis.get("bytes accessed", 0.0) * config.micro_batches,
        memory=int(memory.temp_size_in_bytes + outside - memory.alias_size_in_bytes),
        temporary=int(memory.temp_size_in_bytes),
        exchanges=tuple(collectives(compiled.as_text())),
    )


def largest_batch(memory_of: Callable[[int], int], step: int, limit: float) -> int:
    """The largest multiple of `step` whose memory fits; 0 if one `step` does not.

    Memory is nearly a straight line of the batch, so a few programs tell: the line through two
    points gives a guess, which is compiled, and corrected until its neighbour does not fit.
    """
    known = {step: memory_of(step)}
    if known[step] > limit:
        return 0
    known[2 * step] = memory_of(2 * step)
    while True:
        low, high = sorted(known)[-2:]
        slope = max(1.0, (known[high] - known[low]) / (high - low))
        fitting = max(b for b, m in known.items() if m <= limit)
        above = [b for b, m in known.items() if m > limit]
        guess = int((low + (limit - known[low]) / slope) // step * step)
        guess = max(guess, fitting + step)
        if above:
            guess = min(guess, min(above) - step)
        if guess <= fitting or guess in known:
            return fitting
        known[guess] = memory_of(guess)


def dry_run(config: Config, memory_gib: float) -> str:
    """What a train step costs a device, as text; and the largest batch for `memory_gib` GiB.

    Nothing of the data is read but its header. Memory is the plan of the compiler of the devices
    that are here; another kind of device has another plan.

    Raises:
        UserError: as `hirescam train` does, before it starts.
    """
    check_sizes(config)
    source = open_split(config.data, "train", (1, 1, 1), config.labels)
    shape, counts = tuple(source.shape), (len(source.labels), len(source.regions))
    layout = open_layout(config, shape)
    cost = step_cost(config, layout, *counts)
    devices = " x ".join(f"{size} {name}" for name, size in layout.mesh.shape.items())
    kind = layout.mesh.devices.flat[0].device_kind
    size = " x ".join(map(str, shape))
    sent = sum(exchange.sent for exchange in cost.exchanges)
    lines = [
        f"one train step: batch {config.batch_size} of {size} voxels, {counts[0]} labels, on "
        f"{devices} ({kind})",
        "each device:",
        f"  arithmetic     {_scaled(cost.flops)}FLOP",
        f"  bytes          {_scaled(cost.bytes_accessed)}B read and written, were there no cache",
        f"  memory         {_scaled(cost.memory)}B, {_scaled(cost.temporary)}B of it temporary",
        f"  communication  {_scaled(sent)}B sent in {len(cost.exchanges)} exchanges",
    ]
    for one in sorted(cost.exchanges, key=lambda e: -e.sent)[:3]:
        lines.append(f"    {one.kind} of {_scaled(one.payload)}B among {one.devices} devices")

    def memory_of(batch: int) -> int:
        bigger = dataclasses.replace(config, batch_size=batch)
        return step_cost(bigger, open_layout(bigger, shape), *counts).memory

    unit = layout.mesh.shape[mesh.DATA] * config.micro_batches
    best = largest_batch(memory_of, unit, memory_gib * 2**30)
    verdict = f"{best}" if best else f"none (a batch of {unit} does not fit)"
    lines.append(f"largest batch in {memory_gib:g} GiB a device: {verdict}")
    return "\n".join(lines)


def _scaled(value: float) -> str:
    """1234567 -> "1.23 M", for a unit to follow."""
    exponent = min(max(int(math.log10(max(value, 1)) // 3), 0), 5)
    return f"{value / 1000**exponent:.3g} {('', 'k', 'M', 'G', 'T', 'P')[exponent]}"
