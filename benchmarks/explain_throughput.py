"""How fast a store is explained: volumes/s of the whole, and of each of its parts alone.

    python benchmarks/explain_throughput.py                  # a small AxialNet input, any machine
    python benchmarks/explain_throughput.py --full           # 405 x 420 x 420, for accelerators

Parts, each measured alone over the whole split and in turn with the others:
    read         batches decoded from the store (page cache), not transferred
    compute      logits and maps of all labels of a batch that lies on the device
    write        maps of every volume into a Zarr group
    forward      logits alone of the same batch: what one could at best have without maps
    explain      `hirescam explain --store`, which does the three at the same time
    one batch    the same for a single batch: what a call costs however many volumes there are; the
                 rate of `explain` is that of the volumes beyond
The volumes are random, which costs the decoder more than a CT does.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Timing, interleave, machine_line, ratio, write_results
from explain_cost import axialnet

from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import eval_batches
from hirescam_jax.data.store.store import Store, write_store
from hirescam_jax.inference.maps import explain_program
from hirescam_jax.inference.store import explain_store
from hirescam_jax.inference.zarr import MapWriter
from hirescam_jax.runs.run import Header, Run
from hirescam_jax.runs.setup import open_layout

SPACING = (0.8, 0.8, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", type=int, nargs=3, default=(24, 128, 128), metavar="N")
    parser.add_argument("--full", action="store_true", help="the paper's 405 x 420 x 420")
    parser.add_argument("--volumes", type=int, default=16, help="in the store")
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store and the maps go; removed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="explaining", dir=args.folder))
    try:
        measure(args, folder)
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    shape = (405, 420, 420) if args.full else tuple(args.volume)
    if args.volumes <= args.batch:
        raise SystemExit("--volumes: give more than one batch")
    write_volumes(folder / "store", args.volumes, shape, args.labels, args.batch)
    model = axialnet(args.labels, shape[1], args.dtype)
    config = Config(model=model, batch_size=args.batch)
    layout = open_layout(config, shape, evaluation=True)
    store = Store(folder / "store", "test", (1, 1, 1))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    run = Run(folder / "run", Header.of(config, store), variables, 0)

    (batch, *_) = eval_batches(store, layout.share)
    volume = layout.to_devices({"volume": batch["volume"]})["volume"]
    program = explain_program(config, layout, "hirescam")
    forward = jax.jit(lambda variables, volume: model.apply(variables, run.normalize(volume)))
    logits, maps = jax.device_get(program(variables, volume))
    batches = -(-args.volumes // layout.batch_size)

    def repeated(program: Callable[..., Any]) -> None:
        for _ in range(batches):
            jax.block_until_ready(program(variables, volume))

    def read() -> None:
        for _ in eval_batches(store, layout.share):
            pass

    def write() -> None:
        shutil.rmtree(folder / "written", ignore_errors=True)
        facts = {"ids": store.ids, "labels": list(run.labels), "grid": list(layout.grid)}
        writer = MapWriter(folder / "written", facts)
        (folder / "written").mkdir()
        writer.start()
        for i in range(args.volumes):
            row = i % layout.batch_size
            writer.write(i, maps[row], logits[row], logits[row], np.eye(4))

    def explain(split: str) -> None:
        out = folder / "maps.zarr"
        explain_store(run, store.path, split, out, batch_size=args.batch, overwrite=True)

    programs: dict[str, Callable[[], None]] = {
        "read": read,
        "compute": partial(repeated, program),
        "write": write,
        "forward": partial(repeated, forward),
        "explain": partial(explain, "test"),
        "one batch": partial(explain, "val"),
    }
    # `explain` compiles anew in each call, as a command does; kept on disk that costs little.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    times = interleave(programs, args.repeats)
    beyond = [
        a - b for a, b in zip(times["explain"].seconds, times["one batch"].seconds, strict=True)
    ]
    scale = args.volumes / (args.volumes - args.batch)
    times["explain"] = Timing(tuple(seconds * scale for seconds in beyond))
    start = times.pop("one batch")
    rates = {name: args.volumes / timing.median for name, timing in times.items()}
    ratios = {
        f"{a} / {b}": ratio(times[a], times[b])
        for a, b in (("compute", "forward"), ("explain", "compute"), ("explain", "forward"))
    }
    print(machine_line())
    print(f"{args.volumes} volumes {shape}, batch {layout.batch_size}, {args.labels} labels")
    for name, timing in times.items():
        print(f"  {name:<10}{rates[name]:8.2f} volumes/s {timing}")
    print(f"  a call with one batch: {start}")
    size = maps[0].nbytes / 1e6
    print(f"maps of a volume: {size:.2f} MB")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    content = {
        "shape": shape,
        "volumes": args.volumes,
        "batch": layout.batch_size,
        "labels": args.labels,
        "dtype": args.dtype,
        "volumes_per_second": rates,
        "times": {n: timing.summary() for n, timing in {**times, "one batch": start}.items()},
        "ratios": ratios,
        "maps_megabytes_per_volume": size,
    }
    write_results(args.json, content, sys.argv)


def write_volumes(
    path: Path, count: int, shape: tuple[int, ...], labels: int, one_batch: int
) -> None:
    rng = np.random.default_rng(0)

    def volumes(count: int) -> Any:
        for i in range(count):
            volume = rng.integers(-1000, 800, shape, dtype=np.int16)
            findings = np.zeros((labels, 1), np.uint8)
            yield f"volume_{i}", volume, findings, np.zeros((1, *shape), np.uint8)

    write_store(
        path,
        labels=[f"label {k}" for k in range(labels)],
        regions=["body"],
        shape=shape,
        spacing_mm=SPACING,
        splits={"test": volumes(count), "val": volumes(one_batch)},
    )


if __name__ == "__main__":
    main()
