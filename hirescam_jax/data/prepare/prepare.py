"""From raw volumes to a store: each is read, segmented, brought to the grid and written once.

All cores work, one process each. Shards are written one after the other, whole or not at all; the
same command continues after an interruption. A job array gives each job `shard=(i, n)`, and
whoever finds all shards finished joins their headers.

Memory: a process holds one volume at a time. For a 512 x 512 x 400 scan on the paper's grid that
is 3 GiB at its peak, and no process gets more than `worker_gib`: a volume that needs more is
rejected. The main process holds two encoded volumes a worker, about 70 MB each.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hirescam_jax.data.organs.sources import RegionSource
from hirescam_jax.data.prepare.plan import Shard, shards_of, split_studies
from hirescam_jax.data.prepare.workers import Job, Prepared, Workers
from hirescam_jax.data.store.shards import write_shard
from hirescam_jax.data.store.store import FORMAT, HEADER, ShardHeader, write_header
from hirescam_jax.data.study import ANYWHERE, SPLITS, Reader, Reject, Study
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.progress import progress

REJECTS = "rejects.csv"
_OURS = re.compile(r"(train|val|test)-\d{5}-of-\d{5}\.(array_record|json)")


@dataclasses.dataclass(frozen=True)
class Result:
    """What was prepared: volumes a split, what was left out, coarse region masks, whole or not."""

    counts: dict[str, int]
    rejects: list[Reject]
    fallbacks: int
    whole: bool

    def text(self, out: Path) -> str:
        """What is in the store at `out`, in a line or two."""
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        text = f"{out}: {counts}; {self.fallbacks} of them with coarse organ masks"
        if not self.whole:
            text += "\nother parts are still to be prepared; the last one makes the store whole"
        return text

    def left_out(self, out: Path) -> str:
        """How many volumes are not in the store at `out`, and where it says why; empty if none."""
        if not self.rejects:
            return ""
        first = self.rejects[0]
        where = f"see {out / REJECTS}" if self.whole else f"{first.id}: {first.reason}"
        return f"{len(self.rejects)} left out: {where}"


def prepare(
    reader: Reader,
    region_source: RegionSource | None,
    out: Path,
    *,
    spacing_mm: Sequence[float],
    shape: Sequence[int],
    split_seed: int = 0,
    split_fractions: Sequence[float] = (0.8, 0.1, 0.1),
    shards: int = 0,
    shard: tuple[int, int] | None = None,
    workers: int | None = None,
    worker_gib: float = 8.0,
    strict: bool = False,
    overwrite: bool = False,
) -> Result:
    """Prepares a data set, or continues where an interrupted run stopped.

    Args:
        region_source: gives the masks of the reader's regions; None if they are all ANYWHERE.
        out: folder of the store.
        spacing_mm, shape: of the grid, along D, H, W.
        split_seed, split_fractions: see `split_studies`.
        shards: files a split; 0 for one every 32 volumes.
        shard: (i, n) prepares the i-th of n parts of the files, i from 0.
        workers: processes; one a core if None, none but this one if 0.
        worker_gib: memory that a process may use.
        strict: stop at the first volume that cannot be prepared.
        overwrite: replace what `out` holds.

    Raises:
        UserError: `out` holds another store, the disk is full, a patient in two splits, a region
            without masks; with `strict` the first reject.
    """
    splits = split_studies(reader.studies, split_seed, split_fractions)
    _check(reader, region_source, shard, strict)
    plan = shards_of(splits, shards)
    key = _plan_key(reader, region_source, plan, spacing_mm, shape)
    first, step = shard or (0, 1)
    mine = plan[first::step]
    out.mkdir(parents=True, exist_ok=True)
    _clear(out, key, mine, overwrite)
    todo = [one for one in mine if _finished(out, one, key) is None]

    job = Job(reader, region_source, tuple(spacing_mm), tuple(shape), worker_gib)
    cores = len(os.sched_getaffinity(0))
    with Workers(job, cores if workers is None else workers) as pool:
        studies = [study for one in todo for study in one.studies]
        results = progress(pool.map(studies), "preparing", "volume", len(studies))
        with contextlib.closing(results):  # type: ignore[type-var]
            for one in todo:
                _write(out, one, key, results, strict)
            next(results, None)  # the bar ends

    provenance = {
        "hirescam_jax": importlib.metadata.version("hirescam_jax"),
        "plan": key,
        "reader": type(reader).__name__,
        "region_source": _plain(region_source),
        "split_seed": split_seed,
        "split_fractions": list(split_fractions),
    }
    return _join(out, reader, plan, mine, key, spacing_mm, shape, provenance)


# -- the folder -----------------------------------------------------------------------------------


def _check(
    reader: Reader,
    region_source: RegionSource | None,
    shard: tuple[int, int] | None,
    strict: bool,
) -> None:
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UserError(f"shard {shard[0]}/{shard[1]}: count from 0, such as 0/{max(1, shard[1])}")
    if strict and reader.rejects:
        reject = reader.rejects[0]
        raise UserError(f"{reject.id}: {reject.reason}")
    if not reader.studies:
        raise UserError(
            f"no volume with its labels was found, {len(reader.rejects)} without"
            + (f"; the first, {reader.rejects[0].reason}" if reader.rejects else "")
        )
    given = () if region_source is None else region_source.regions
    for region in reader.regions:
        if region != ANYWHERE and region not in given:
            raise UserError(
                f"findings are in region '{region}', and no masks of it are given: choose regions "
                f"with --regions ({', '.join(given) or 'none'} so far)"
            )


def _plan_key(
    reader: Reader,
    region_source: RegionSource | None,
    plan: list[Shard],
    spacing_mm: Sequence[float],
    shape: Sequence[int],
) -> str:
    """A hash of all that decides what the shards hold, but the content of the sources."""
    whole = hashlib.sha256()
    settings = {
        "format": FORMAT,
        "reader": type(reader).__name__,
        "labels": list(reader.labels),
        "regions": list(reader.regions),
        "region_source": _plain(region_source),
        "spacing_mm": [float(s) for s in spacing_mm],
        "shape": [int(n) for n in shape],
    }
    whole.update(json.dumps(settings, sort_keys=True).encode())
    for shard in plan:
        whole.update(f"\n{shard.file}".encode())
        for study in shard.studies:
            files = [str(path) for path in study.files]
            whole.update(json.dumps([study.id, study.patient, files]).encode())
            whole.update(np.ascontiguousarray(study.findings).tobytes())
    return whole.hexdigest()


def _plain(value: Any) -> Any:
    """An object as JSON: the name of its type and what it holds."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return {"type": type(value).__name__, **_plain(getattr(value, "__dict__", {}))}


def _clear(out: Path, key: str, mine: list[Shard], overwrite: bool) -> None:
    """Makes sure that nothing of another store is in the folder."""
    files = [path for path in sorted(out.iterdir()) if _OURS.fullmatch(path.name)]
    others = [path for path in files if path.suffix == ".json" and _plan_in(path) != key]
    header = out / HEADER
    if overwrite:
        header.unlink(missing_ok=True)
        (out / REJECTS).unlink(missing_ok=True)
        own = {shard.file for shard in mine} | {shard.header_file for shard in mine}
        stems = {path.stem for path in others}
        for path in files:
            if path.stem in stems or path.name in own:
                path.unlink(missing_ok=True)
    elif others or (header.exists() and _plan_in(header) != key):
        raise UserError(
            f"{out}: holds another store, or one prepared with other options: choose another "
            "folder, or --overwrite"
        )
    for shard in mine:  # what a killed run was writing
        for path in [*out.glob(f".*-{shard.file}"), *out.glob(f".*-{shard.header_file}")]:
            path.unlink(missing_ok=True)


def _plan_in(path: Path) -> str | None:
    try:
        header = json.loads(path.read_text())
        return header["provenance"]["plan"] if path.name == HEADER else header["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(out: Path, shard: Shard, key: str) -> ShardHeader | None:
    """The header of a shard that is whole and of this plan, and has no reject whose files were
    changed since."""
    try:
        header = ShardHeader(**json.loads((out / shard.header_file).read_text()))
        if header.plan != key or (out / shard.file).stat().st_size != header.file_size:
            return None
    except (OSError, ValueError, TypeError):
        return None
    stamps = {study.id: _stamp(study) for study in shard.studies}
    if any(stamps.get(id) != stamp for id, _, stamp in header.rejects):
        return None
    return header


def _stamp(study: Study) -> str:
    """Changes when the files of a study do."""
    stamps = []
    for path in study.files:
        with contextlib.suppress(OSError):
            for one in [path, *(sorted(path.iterdir()) if path.is_dir() else [])]:
                stamps.append(f"{one.stat().st_size}@{one.stat().st_mtime_ns}")
    return hashlib.sha256(" ".join(stamps).encode()).hexdigest()[:16]


def _write(
    out: Path,
    shard: Shard,
    key: str,
    results: Iterator[tuple[Study, Prepared | Reject]],
    strict: bool,
) -> None:
    """One shard, then its header."""
    ids: list[str] = []
    rejects: list[list[str]] = []
    fallbacks: dict[str, str] = {}
    sources: dict[str, dict[str, str]] = {}

    def records() -> Iterator[bytes]:
        for _ in shard.studies:
            study, outcome = next(results)
            if isinstance(outcome, Reject):
                if strict:
                    raise UserError(f"{outcome.id}: {outcome.reason}")
                rejects.append([outcome.id, outcome.reason, _stamp(study)])
                continue
            ids.append(study.id)
            sources[study.id] = outcome.sources
            if outcome.fallback:
                fallbacks[study.id] = outcome.fallback
            yield outcome.data

    path = out / shard.file
    places = write_shard(path, records())
    header = ShardHeader.of(
        shard.file,
        ids,
        places,
        file_size=path.stat().st_size,
        plan=key,
        rejects=rejects,
        fallbacks=fallbacks,
        sources=sources,
    )
    with atomic_file(out / shard.header_file) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(header), indent=1))


def _join(
    out: Path,
    reader: Reader,
    plan: list[Shard],
    mine: list[Shard],
    key: str,
    spacing_mm: Sequence[float],
    shape: Sequence[int],
    provenance: dict[str, Any],
) -> Result:
    """Writes store.json and rejects.csv if all shards are finished."""
    headers = {shard.file: _finished(out, shard, key) for shard in plan}
    whole = all(headers.values())
    counts = {split: 0 for split in SPLITS}
    splits: dict[str, list[ShardHeader]] = {}
    rejects = list(reader.rejects)
    for shard in plan if whole else mine:
        header = headers[shard.file]
        if header is None:
            raise UserError(f"{out / shard.file}: changed while it was prepared: run it again")
        counts[shard.split] += len(header.ids)
        splits.setdefault(shard.split, []).append(header)
        rejects += [Reject(id, reason) for id, reason, _ in header.rejects]
    fallbacks = sum(len(header.fallbacks) for of in splits.values() for header in of)
    if whole:
        _write_rejects(out / REJECTS, rejects)
        write_header(
            out,
            labels=reader.labels,
            regions=reader.regions,
            shape=shape,
            spacing_mm=spacing_mm,
            splits=splits,
            provenance=provenance,
            rejects=len(rejects),
        )
    return Result(counts, rejects, fallbacks, whole)


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    if not rejects:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "reason"])
        writer.writerows([reject.id, reject.reason] for reject in rejects)
