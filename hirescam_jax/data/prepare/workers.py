"""One volume prepared, and many of them at once: a process a core, bounded in memory."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from hirescam_jax.data.grid import to_grid
from hirescam_jax.data.organs.label_maps import masks_to_grid
from hirescam_jax.data.organs.sources import RegionSource
from hirescam_jax.data.store.codec import Record, encode
from hirescam_jax.data.study import ANYWHERE, Reader, Reject, Study
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prepared:
    data: bytes
    sources: dict[str, str]
    fallback: str | None


@dataclasses.dataclass(frozen=True)
class Job:
    """Prepares one study. Nothing that is wrong with it gets out, but as a reject."""

    reader: Reader
    region_source: RegionSource | None
    spacing_mm: tuple[float, ...]
    shape: tuple[int, ...]
    worker_gib: float

    def __call__(self, study: Study) -> Prepared | Reject:
        try:
            return self._prepare(study)
        except UserError as error:
            reason = str(error)
        except MemoryError:
            reason = (
                f"{_name(study)}: needs more than {self.worker_gib:g} GiB: raise --worker-gib and "
                "lower --workers, or give a smaller volume"
            )
        except Exception as error:
            reason = f"{_name(study)}: {type(error).__name__}: {error}"
        return Reject(study.id, " ".join(reason.split()))

    def _prepare(self, study: Study) -> Prepared:
        volume = self.reader.read(study)
        voxels, affine = to_grid(volume, self.spacing_mm, self.shape)
        masks, fallback = self._masks(study, volume, affine)
        source = {
            "path": str(volume.path),
            "shape": list(volume.voxels.shape),
            "affine": volume.affine.tolist(),
        }
        record = Record(study.id, study.patient, voxels, study.findings, masks, affine, source)
        sources = {str(path): _sha256(path) for path in study.files}
        return Prepared(encode(record), sources, fallback)

    def _masks(
        self, study: Study, volume: Volume, affine: np.ndarray
    ) -> tuple[np.ndarray, str | None]:
        """In the order of the reader's regions. ANYWHERE also holds what lies around the scan."""
        regions = self.reader.regions
        masks = np.ones((len(regions), *self.shape), np.uint8)
        rows = [r for r, name in enumerate(regions) if name != ANYWHERE]
        if not rows or self.region_source is None:
            return masks, None
        found = self.region_source.masks(study, volume)
        chosen = [self.region_source.regions.index(regions[r]) for r in rows]
        for row, mask in zip(rows, chosen, strict=True):
            one = found.masks[mask : mask + 1]
            masks[row] = masks_to_grid(one, volume.affine, affine, self.shape)[0]
        return masks, (found.note or "coarse") if found.fallback else None


@functools.lru_cache(maxsize=4)
def _sha256(path: Path) -> str:
    """Of a file; of a folder, of the names and hashes of what is in it."""
    if path.is_dir():
        whole = hashlib.sha256()
        for inner in sorted(p for p in path.iterdir() if p.is_file()):
            whole.update(f"{inner.name}\0{_sha256(inner)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(study: Study) -> str:
    return str(study.files[0]) if study.files else study.id


# -- many volumes, in processes -------------------------------------------------------------------


class Workers:
    """Runs a job over studies, in order, two a process under way."""

    def __init__(self, job: Job, workers: int):
        self.job, self.workers = job, workers
        self.pool = self._start(workers) if workers else None
        self.threads = one_thread_each()

    def __enter__(self) -> "Workers":
        self.threads.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.threads.__exit__(None, None, None)

    def map(self, studies: Sequence[Study]) -> Iterator[tuple[Study, Prepared | Reject]]:
        """The outcome of each study, in order."""
        if not self.workers:
            for study in studies:
                yield study, self.job(study)
            return
        pending: collections.deque[tuple[Study, Future, ProcessPoolExecutor]] = collections.deque()
        for study in studies:
            pending.append((study, *self._submit(study)))
            if len(pending) == 2 * self.workers:
                yield self._outcome(*pending.popleft())
        while pending:
            yield self._outcome(*pending.popleft())

    def _submit(self, study: Study) -> tuple[Future, ProcessPoolExecutor]:
        assert self.pool is not None
        try:
            return self.pool.submit(_run, study), self.pool
        except BrokenProcessPool:
            self.pool = self._start(self.workers)
            return self.pool.submit(_run, study), self.pool

    def _outcome(
        self, study: Study, future: Future, pool: ProcessPoolExecutor
    ) -> tuple[Study, Prepared | Reject]:
        """Where a process died, all studies under way are tried again, one at a time."""
        try:
            return study, future.result()
        except BrokenProcessPool:
            if pool is self.pool:
                self.pool = self._start(self.workers)
        try:
            with self._start(1) as alone:
                return study, alone.submit(_run, study).result()
        except BrokenProcessPool:
            reason = (
                f"{_name(study)}: its process was killed: the memory is too small (lower "
                "--workers), or the file crashes its reader"
            )
            return study, Reject(study.id, reason)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(self.job,))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started in here get one thread for linear algebra, unless the user says more.

    One process a core leaves none to spare: threads that wait for one another cost up to ten times.
    """
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    missing = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def follow_parent() -> None:
    """In a new process: an interruption is the main process' business, and when that is killed
    this one ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_job: Callable[[Study], Prepared | Reject] | None = None


def _begin(job: Job) -> None:
    """In a new process: bounded memory."""
    global _job
    _job = job
    follow_parent()
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit = pages * resource.getpagesize() + int(job.worker_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _run(study: Study) -> Prepared | Reject:
    assert _job is not None
    return _job(study)
