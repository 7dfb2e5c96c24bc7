"""How fast volumes come from a store to the device, stage by stage, and beside MONAI.

    python benchmarks/feeding.py --ct CT.nii.gz             # all cores
    python benchmarks/feeding.py --ct CT.nii.gz --cores 1

Prepares copies of one real CT at the paper's 405 x 420 x 420 voxels of 0.8 mm and reads them back
from the page cache, so that the disk has no say. "bound" is Blosc alone, decoding the same voxels
in as many threads as there are cores. Batches are decoded in place; "copied" makes them by np.stack
instead. Where MONAI is installed (pip install monai) it reads the
same CT in two ways: the original file with its transforms, and its PersistentDataset, a cache of
the transformed tensors. Both with DataLoader, one worker process a core.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GRID = (135, 6, 6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ct", type=Path, required=True, help="a chest CT (NIfTI)")
    parser.add_argument("--cores", type=int, help="use so many; default all")
    parser.add_argument("--volumes", type=int, default=6, help="copies in the store")
    parser.add_argument("--fed", type=int, default=8, help="volumes a measurement of a pipeline")
    parser.add_argument("--batches", type=int, nargs="*", default=(2, 4), metavar="B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-monai", action="store_true", help="skip the comparison with MONAI")
    parser.add_argument("--shape", type=int, nargs=3, default=(405, 420, 420), metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.cores:  # before any library counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    folder = Path(tempfile.mkdtemp(prefix="feeding"))
    try:
        run(args, folder)
    finally:
        shutil.rmtree(folder)


def run(args: argparse.Namespace, folder: Path) -> None:
    import jax
    import numpy as np
    from common import Timing, interleave, machine_line, ratio, write_results

    from hirescam_jax.data.pipeline import make_batch, train_batches
    from hirescam_jax.data.store.store import Store
    from hirescam_jax.devices.layout import Share

    cores = len(os.sched_getaffinity(0))
    shape = tuple(args.shape)
    store_path, seconds = prepare(args.ct, folder, args.volumes, shape)
    store = Store(store_path, "train", GRID)
    encoded = store._encoded(0)
    out = np.empty(shape, np.int16)
    threads = ThreadPoolExecutor(cores)
    buffers = [np.empty(shape, np.int16) for _ in range(cores)]

    def bound() -> None:
        list(threads.map(encoded.volume, buffers))

    def items() -> None:
        list(threads.map(store.read, range(cores), buffers))

    programs: dict[str, Callable[[], Any]] = {
        "read and checksum": lambda: store._encoded(0),
        "decompress": lambda: encoded.volume(out),
        "masks": lambda: encoded.regions(GRID),
        "one volume": lambda: store.read(0, out),
        "transfer": lambda: jax.device_put(out),
        "bound": bound,
        "store": items,
    }

    def copied(size: int) -> Any:
        return np.stack([store[i % len(store)]["volume"] for i in range(size)])

    def in_place(size: int) -> Any:
        return make_batch(store, [i % len(store) for i in range(size)])["volume"]

    volumes = dict.fromkeys(programs, 1) | {"bound": cores, "store": cores}
    for size in args.batches:
        for name, program in (("batch of {}", in_place), ("batch of {}, copied", copied)):
            programs[name.format(size)] = functools.partial(program, size)
            volumes[name.format(size)] = size
    times: dict[str, Timing] = interleave(programs, 3 * args.repeats)
    rates = {name: volumes[name] / timing.median for name, timing in times.items()}

    def pipeline(size: int) -> Iterator[Any]:
        for batch in train_batches(store, Share.whole(size), seed=0):
            yield jax.device_put(batch["volume"])

    feeds: dict[str, Callable[[], Iterator[Any]]] = {
        "pipeline" if size == 1 else f"pipeline, batch {size}": functools.partial(pipeline, size)
        for size in (1, *args.batches)
    }
    disk = {"store": sum(f.stat().st_size for f in store_path.iterdir()) / args.volumes}
    if importlib.util.find_spec("monai") and not args.no_monai:
        feeds |= monai_feeds(args.ct, folder, shape, cores)
        cached = list((folder / "cache").rglob("*.pt"))
        disk["MONAI PersistentDataset"] = sum(f.stat().st_size for f in cached) / len(cached)
    seconds_each: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in range(args.repeats):
        for name, feed in feeds.items():
            seconds_each[name].append(seconds_a_volume(feed(), args.fed))
    for name, values in seconds_each.items():
        times[name] = Timing(tuple(values))
        rates[name] = 1 / times[name].median

    print(machine_line())
    print(f"{args.ct.name} at {shape}, prepared in {seconds:.1f} s a volume on {cores} cores")
    raw = 2 * float(np.prod(shape)) / 1e6
    for name, rate in rates.items():
        print(f"  {name:<26}{rate:8.2f} volumes/s {rate * raw:8.0f} MB/s  {times[name]}")
    for name, size in disk.items():
        print(f"  {name}: {size / 1e6:.0f} MB a volume on disk, voxels are {raw:.0f} MB")
    ratios = {"store / bound": rates["store"] / rates["bound"]}
    for size in args.batches:
        name = f"batch of {size}"
        ratios[f"{name}: copied / in place"] = ratio(times[f"{name}, copied"], times[name])
    for name in ("MONAI files", "MONAI PersistentDataset"):
        if name in rates:
            ratios[f"pipeline / {name}"] = rates["pipeline"] / rates[name]
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    write_results(
        args.json,
        {
            "shape": shape,
            "cores": cores,
            "volumes_per_second": rates,
            "disk_bytes_per_volume": disk,
            "prepare_seconds_per_volume": seconds,
            "times": {name: timing.summary() for name, timing in times.items()},
            "ratios": ratios,
        },
        sys.argv,
    )


def prepare(ct: Path, folder: Path, count: int, shape: tuple[int, ...]) -> tuple[Path, float]:
    """A store of `count` copies of a CT with its organ regions; seconds a volume."""
    from hirescam_jax.data.organs.sources import AutoRegions
    from hirescam_jax.data.prepare.prepare import prepare as prepare_store
    from hirescam_jax.data.readers import NiftiFolder

    raw = folder / "raw"
    raw.mkdir()
    for i in range(count):
        os.symlink(ct.resolve(), raw / f"v{i}.nii.gz")
    places = "nodule@right_lung,nodule@left_lung,nodule@heart_mediastinum"
    rows = [f"v{i},train,1,0,0" for i in range(count)]
    (raw / "table.csv").write_text("\n".join([f"id,split,{places}", *rows]) + "\n")
    reader = NiftiFolder(raw)
    start = time.perf_counter()
    source = AutoRegions(reader.regions)
    prepare_store(reader, source, folder / "store", spacing_mm=(0.8,) * 3, shape=shape)
    return folder / "store", (time.perf_counter() - start) / count


def seconds_a_volume(feed: Iterator[Any], count: int) -> float:
    """Of `count` volumes or a few more, after the first ones, which find the pipeline empty."""
    import jax

    size = len(jax.block_until_ready(next(feed)))
    for _ in range(4):
        jax.block_until_ready(next(feed))
    batches = -(-count // size)
    start = time.perf_counter()
    for _ in range(batches):
        jax.block_until_ready(next(feed))
    return (time.perf_counter() - start) / (batches * size)


def monai_feeds(
    ct: Path, folder: Path, shape: tuple[int, ...], cores: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Batches of one volume, as MONAI's tutorials build them."""
    import numpy as np

    data, transforms = (importlib.import_module(f"monai.{name}") for name in ("data", "transforms"))

    prepared = transforms.Compose(
        [
            transforms.LoadImaged("image"),
            transforms.EnsureChannelFirstd("image"),
            transforms.Orientationd("image", axcodes="LPS", labels=None),
            transforms.Spacingd("image", pixdim=(0.8,) * 3, mode="bilinear"),
            transforms.ScaleIntensityRanged("image", -1000, 800, 0, 1, clip=True),
            transforms.ResizeWithPadOrCropd("image", shape[::-1]),
            transforms.CastToTyped("image", dtype=np.float32),
        ]
    )
    samples = [{"image": str(ct)}] * 1000
    files = data.Dataset(samples, prepared)
    persistent = data.PersistentDataset(samples, prepared, cache_dir=folder / "cache")
    persistent[0]

    def batches(dataset: Any) -> Iterator[Any]:
        for batch in data.DataLoader(dataset, batch_size=1, num_workers=cores):
            yield batch["image"]

    return {
        "MONAI files": lambda: batches(files),
        "MONAI PersistentDataset": lambda: batches(persistent),
    }


if __name__ == "__main__":
    main()
