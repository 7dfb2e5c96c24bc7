"""Explains a split of a store on all devices of all processes, and goes on where it was stopped."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from hirescam_jax.data.grid import feature_affine
from hirescam_jax.data.pipeline import eval_batches
from hirescam_jax.data.store.store import Store
from hirescam_jax.devices import mesh, processes
from hirescam_jax.devices.layout import Layout
from hirescam_jax.errors import UserError
from hirescam_jax.explanations.methods import METHODS, MethodName
from hirescam_jax.files import writing_pool
from hirescam_jax.inference.maps import (
    explain_program,
    head_bias,
    label_indices,
    own_rows,
    verdict_of,
)
from hirescam_jax.inference.nifti import NiftiWriter
from hirescam_jax.inference.zarr import MapWriter
from hirescam_jax.progress import progress, say
from hirescam_jax.runs.integrity import checksums
from hirescam_jax.runs.run import Run
from hirescam_jax.runs.setup import open_layout

WRITERS = 4

# What must be the same for an interrupted call to be continued, and how a user knows it.
SAME = {
    "labels": "other labels",
    "method": "another method",
    "step": "another step",
    "model": "another run",
    "data": "another store or split",
    "grid": "another feature grid",
}

T = TypeVar("T")


Writer: TypeAlias = MapWriter | NiftiWriter


def explain_store(
    run: Run,
    store: Path,
    split: str,
    out: Path,
    *,
    labels: Sequence[str] = (),
    method: MethodName = "hirescam",
    format: Literal["zarr", "nifti"] = "zarr",
    batch_size: int = 2,
    overwrite: bool = False,
) -> int:
    """Writes the raw signed maps of a split on the feature grid: to a Zarr group
    (`hirescam_jax.inference.zarr`), or as NIfTI files and a table in a folder a volume.

    Each process writes the volumes of its own devices. A call that was interrupted is continued by
    the same call, by whole batches, so that the result is the same to the bit; on another mesh or
    with another batch size to rounding.

    Args:
        labels: those to explain, in this order; none for all.
        batch_size: volumes at once on all devices; raised to what the devices can share.
        overwrite: replace the maps of an earlier call.

    Returns:
        How many volumes were explained now.

    Raises:
        UserError: a store that does not fit the run, no such split, an unknown label, or an `out`
            that holds something else; a full disk: repeat the call when there is space.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is too small: give 1 or more")
    run.check_maps()
    chosen = label_indices(labels, run.labels) or tuple(range(len(run.labels)))
    config = dataclasses.replace(run.config, batch_size=batch_size)
    layout = open_layout(config, run.shape, evaluation=True)
    source = Store(store, split, (1, 1, 1))  # the masks are not needed
    for name in ("shape", "spacing_mm"):
        ours, theirs = getattr(run, name), getattr(source, name)
        if tuple(ours) != tuple(theirs):
            raise UserError(
                f"{store}: its volumes have {name} {list(theirs)}, {run.path} was trained on "
                f"{list(ours)}: prepare the volumes on that grid"
            )
    if METHODS[method].of_pooling and config.depth_devices > 1:
        raise UserError(
            f"--method {method}: looks at whole volumes, so use --depth-devices 1, or --method "
            "gradcam, which is the same map for a head that has one"
        )
    verdict = verdict_of(run, method)
    say(f"{METHODS[method].title} here: {verdict.short(method)}")
    attributes = _attributes(run, source, split, chosen, method, layout.grid)
    # Without its figures, whose last digits may differ from machine to machine.
    attributes["verdict"] = {"kind": verdict.kind, "text": verdict.text}
    attributes["guarantee"] = verdict.short(method)
    processes.agree(
        {name: json.dumps(attributes[name]) for name in SAME}
        | {"format": format, "batch size": str(batch_size)}
    )
    kind = {"zarr": MapWriter, "nifti": NiftiWriter}[format]
    writer: Writer = kind(Path(out), attributes)
    done = processes.on_first(partial(_begin, writer, overwrite))
    missing = len(done) - sum(done)
    if 0 < missing < len(done):
        say(f"{out}: {sum(done)} of {len(done)} volumes are done, continuing")
    start = time.monotonic()
    written = _explain(run, source, layout, chosen, method, writer, done) if missing else iter(())
    for _ in progress(written, "explain", "volume", missing):
        pass
    processes.on_first(lambda: None)  # all have written
    seconds = time.monotonic() - start
    say(f"{missing} volumes in {seconds:.1f} s, {missing / max(seconds, 1e-9):.2f} volumes/s")
    return missing


def _attributes(
    run: Run, source: Store, split: str, chosen: Sequence[int], method: str, grid: Sequence[int]
) -> dict[str, Any]:
    """What is kept beside the maps; of these `SAME` is compared."""
    sums = [int(x) for x in jax.tree.leaves(checksums(jax.device_get(run.variables), np))]
    return {
        "labels": [run.labels[k] for k in chosen],
        "method": method,
        "run": str(run.path),
        "step": run.step,
        "model": _digest([repr(run.config.model), repr(run.config.preprocess), sums]),
        "store": str(source.path),
        "split": split,
        "data": source.digest,
        "grid": list(grid),
        "shape": list(run.shape),
        "spacing_mm": list(run.spacing_mm),
        "ids": source.ids,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _begin(writer: Writer, overwrite: bool) -> list[bool]:
    """Prepares `writer`, if nothing else is in its way. Returns which volumes are done."""
    path, saved = writer.path, writer.saved()
    if saved is None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists and holds no such maps: choose another output")
    if saved is not None and overwrite:
        writer.clear()
    elif saved is not None:
        for name, what in SAME.items():
            if saved.get(name) != writer.attributes[name]:
                raise UserError(
                    f"{path}: holds maps of {what} (run {saved.get('run')}, step "
                    f"{saved.get('step')}, {saved.get('method')}, split {saved.get('split')} of "
                    f"{saved.get('store')}): choose another output, or --overwrite"
                )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror or error})") from error
    return writer.start()


def _explain(
    run: Run,
    source: Store,
    layout: Layout,
    chosen: Sequence[int],
    method: str,
    writer: Writer,
    done: Sequence[bool],
) -> Iterator[int]:
    """The place of each missing volume of all processes, when this process has written its own of
    that batch. Reading, computing and writing of successive batches go on at the same time."""
    config, size = run.config, layout.batch_size
    steps = range(-(-len(source) // size))
    pending = [t for t in steps if not all(done[t * size : (t + 1) * size])]
    variables = mesh.replicate(run.variables, layout.mesh)
    program = explain_program(config, layout, method, chosen)
    bias_L = head_bias(run)[list(chosen)]

    def computed() -> Iterator[tuple[int, tuple[Array, Array]]]:
        batches = eval_batches(source, layout.share, workers=config.workers, steps=pending)
        for t, batch in zip(pending, batches, strict=True):
            yield t, program(variables, layout.to_devices({"volume": batch["volume"]})["volume"])

    def write(place: int, logits_L: np.ndarray, maps_Ldhw: np.ndarray) -> None:
        if not np.isfinite(logits_L).all():
            raise UserError(
                f"{run.path}: the model gives NaN or infinite scores for {source.ids[place]}: "
                "train it again"
            )
        total_L = maps_Ldhw.sum(axis=(1, 2, 3), dtype=np.float64)
        residuals_L = np.abs(total_L + bias_L - logits_L).astype(np.float32)
        affine = feature_affine(source.affine(place), run.shape, layout.grid)
        writer.write(place, maps_Ldhw, logits_L, residuals_L, affine)

    with writing_pool(WRITERS) as pool:

        def submitted() -> Iterator[tuple[int, list[Future]]]:
            for t, results in _one_behind(computed()):
                rows = [(t * size + row, *values) for row, *values in own_rows(*results)]
                mine = [row for row in rows if row[0] < len(done) and not done[row[0]]]
                yield t, [pool.submit(write, *row) for row in mine]

        for t, tasks in _one_behind(submitted()):
            for task in tasks:
                task.result()
            batch = range(t * size, min((t + 1) * size, len(done)))
            yield from (place for place in batch if not done[place])


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each once the next is there: its computation has begun by then."""
    earlier: list[T] = []
    for item in items:
        yield from earlier
        earlier = [item]
    yield from earlier
