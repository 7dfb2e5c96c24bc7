"""A prepared data set: ArrayRecord shards and one header.

store.json                             format, labels, regions, shape, spacing, the volumes of each
                                       split with their place in the shards, provenance
train-00000-of-00004.array_record      records (`hirescam_jax.data.codec`), one a volume
train-00000-of-00004.json              what store.json is joined from: the header of one shard
rejects.csv                            volumes that were left out, and why

Volumes are int16 Hounsfield units [D, H, W], axes superior -> inferior, anterior -> posterior,
right -> left. The header comes last, so an interrupted store never reads as whole.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from hirescam_jax.data.organs.feature_grid import Method
from hirescam_jax.data.store.codec import Encoded, Record, encode, read_head
from hirescam_jax.data.store.shards import Place, read_at, read_part, write_shard
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file, new_folder

FORMAT = 2
HEADER = "store.json"
FIELDS = ("labels", "regions", "shape", "spacing_mm", "splits")
MEND = "copy it again, or remove it and run `hirescam prepare` again"


@dataclasses.dataclass(frozen=True)
class ShardHeader:
    """The volumes of one shard, in order: `ids`, and their places in the file, column by column.

    file_size: in bytes, to tell a whole file from a cut one.
    rejects: [id, reason, stamp of its files] of the volumes that were left out.
    fallbacks: id -> why its region masks are a coarse stand-in.
    sources: id -> {file: sha256}.
    plan: what the shard was prepared from (`hirescam_jax.data.prepare`).
    """

    file: str
    ids: list[str]
    offsets: list[int]
    sizes: list[int]
    checksums: list[str]
    file_size: int = 0
    plan: str = ""
    rejects: list[list[str]] = dataclasses.field(default_factory=list)
    fallbacks: dict[str, str] = dataclasses.field(default_factory=dict)
    sources: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, file: str, ids: list[str], places: list[Place], **rest: Any) -> "ShardHeader":
        return cls(
            file,
            ids,
            offsets=[place.offset for place in places],
            sizes=[place.size for place in places],
            checksums=[place.checksum for place in places],
            **rest,
        )


class Store:
    """One split of a store, a random-access source for Grain.

    Opening reads the header alone. Shards are opened when first read, by each process for itself.

    Args:
        size: so many volumes of the split, a random choice that is always the same; 0 for all.

    Raises:
        UserError: no such store or split, a damaged header or one of another format version, a
            `size` that the split has not.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        grid: tuple[int, int, int],
        method: Method = "nearest",
        dilate: bool = False,
        size: int = 0,
    ):
        self.path, self.grid = Path(path), grid
        self.method: Method = method
        self.dilate = dilate
        header = read_header(self.path)
        self.labels = tuple(header["labels"])
        self.regions = tuple(header["regions"])
        self.shape = tuple(header["shape"])
        self.spacing_mm = tuple(header["spacing_mm"])
        self.ids: list[str] = []
        self.places: list[tuple[str, Place]] = []
        try:
            for shard in header["splits"].get(split, []):
                self.ids += shard["ids"]
                columns = (shard[name] for name in ("offsets", "sizes", "checksums"))
                self.places += [
                    (shard["file"], Place(*place)) for place in zip(*columns, strict=True)
                ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / HEADER}: splits.{split}: damaged ({error})") from error
        if not self.ids or len(self.ids) != len(self.places):
            raise UserError(f"{self.path / HEADER}: split '{split}' is missing or empty")
        if not 0 <= size <= len(self.ids):
            raise UserError(
                f"{self.path / HEADER}: split '{split}' has {len(self.ids)} volumes: "
                f"config.data.{split}_size cannot be {size}"
            )
        if size:
            # A larger size keeps what a smaller one chose.
            chosen = np.sort(np.random.default_rng(0).permutation(len(self.ids))[:size])
            self.ids = [self.ids[i] for i in chosen]
            self.places = [self.places[i] for i in chosen]
        self._open()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        """Of the volumes' names and contents, in their order."""
        volumes = [
            [id, place.checksum] for id, (_, place) in zip(self.ids, self.places, strict=True)
        ]
        return hashlib.sha256(json.dumps(volumes).encode()).hexdigest()[:16]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """volume int16 [D, H, W], findings uint8 [K, R], regions uint8 [R, d, h, w], index."""
        return self.read(index)

    def read(
        self, index: Any, volume_out: np.ndarray | None = None, slices: slice = slice(None)
    ) -> dict[str, Any]:
        """As `store[index]`, but for voxels outside of `slices` (of D), which are not decoded.

        The voxels are decoded into `volume_out` where it is given; regions are those of the whole.
        """
        encoded = self._encoded(index)
        with self._naming(index):
            return {
                "volume": encoded.volume(volume_out, slices),
                "findings": encoded.findings,
                "regions": encoded.regions(self.grid, self.method, self.dilate),
                "index": np.int32(index),
            }

    def record(self, index: Any) -> Record:
        """All that is kept of a volume, the masks on its own grid."""
        encoded = self._encoded(index)
        with self._naming(index):
            return Record(
                id=encoded.id,
                patient=encoded.header["patient"],
                volume=encoded.volume(),
                findings=encoded.findings,
                masks=encoded.masks(),
                affine=encoded.affine,
                source=encoded.header["source"],
            )

    def head(self, index: Any) -> tuple[dict[str, Any], UInt8[np.ndarray, "K R"]]:
        """The header of a record (`codec.encode`) and its findings, without the rest of it."""
        name, place = self.places[index]
        size = 2**14
        with self._naming(index):
            while True:
                data = memoryview(bytearray(min(size, place.size)))
                read_part(self._file(name), place.offset, data)
                try:
                    header, findings, _ = read_head(data)
                    return header, findings
                except EOFError:
                    if size >= place.size:
                        raise ValueError("the record ends early") from None
                    size *= 16

    def patients(self) -> list[str]:
        """The patient of each volume, from the heads of the records."""
        return [str(self.head(index)[0]["patient"]) for index in range(len(self))]

    def affine(self, index: Any) -> Float[np.ndarray, "4 4"]:
        """Indices of a volume's [D, H, W] -> RAS millimetres of its scan."""
        return np.array(self.head(index)[0]["affine"], np.float64)

    def _encoded(self, index: Any) -> Encoded:
        name, place = self.places[index]
        with self._naming(index):
            buffer = getattr(self._local, "buffer", None)
            if buffer is None or len(buffer) < place.size:
                # Kept by each thread: fresh memory costs more than reading into it.
                buffer = self._local.buffer = np.empty(place.size * 9 // 8, np.uint8)
            encoded = Encoded(read_at(self._file(name), place, buffer))
            shapes = (encoded.shape, *encoded.header["findings"], len(encoded.header["boxes"]))
            if shapes != (self.shape, len(self.labels), *[len(self.regions)] * 2):
                raise ValueError(f"its shapes {shapes} are not those of {HEADER}")
            return encoded

    def _naming(self, index: Any) -> "_Naming":
        return _Naming(self.path / self.places[index][0], self.ids[index])

    def _file(self, name: str) -> int:
        if name not in self._files:
            with self._lock:
                if name not in self._files:
                    self._files[name] = os.open(self.path / name, os.O_RDONLY)
        return self._files[name]

    def _open(self) -> None:
        self._files: dict[str, int] = {}
        self._local, self._lock = threading.local(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_files", "_local", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


@dataclasses.dataclass(frozen=True)
class _Naming:
    """Names shard and volume in what goes wrong inside."""

    shard: Path
    id: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.shard}: missing, but {HEADER} lists it: {MEND}") from error
        if isinstance(error, OSError):
            raise UserError(f"{self.shard}: {self.id}: cannot be read ({error.strerror})")
        if isinstance(error, (ValueError, KeyError, TypeError, RuntimeError, EOFError)):
            raise UserError(f"{self.shard}: {self.id}: damaged, {error}: {MEND}") from error


def read_header(path: Path) -> dict[str, Any]:
    """store.json of a store.

    Raises:
        UserError: one line, for a store that is missing, incomplete, damaged or of another format.
    """
    file = path / HEADER
    try:
        header = json.loads(file.read_text())
    except FileNotFoundError as error:
        unfinished = next(path.glob("*-of-*"), None) if path.is_dir() else None
        fix = "finish it with the same `hirescam prepare`" if unfinished else "prepare it first"
        raise UserError(f"{file}: missing, so this is no whole store: {fix}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: holds no JSON object")
    if header.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {header.get('format')}, this version reads {FORMAT}: prepare the "
            "data again, or use the version of hirescam_jax that wrote it"
        )
    for name in FIELDS:
        if not isinstance(header.get(name), dict if name == "splits" else list):
            raise UserError(f"{file}: no field {name}, or not of its type: prepare the data again")
    return header


def write_header(
    path: Path,
    *,
    labels: Sequence[str],
    regions: Sequence[str],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    splits: dict[str, list[ShardHeader]],
    provenance: dict[str, Any],
    rejects: int = 0,
) -> None:
    """Joins the headers of all shards to store.json: the store is whole from here on."""
    kept = ("file", "ids", "offsets", "sizes", "checksums")
    shards = [shard for of_split in splits.values() for shard in of_split]
    header = {
        "format": FORMAT,
        "labels": list(labels),
        "regions": list(regions),
        "shape": [int(n) for n in shape],
        "spacing_mm": [float(s) for s in spacing_mm],
        "counts": {name: sum(len(s.ids) for s in of) for name, of in splits.items()},
        "region_fallbacks": sum(len(shard.fallbacks) for shard in shards),
        "rejects": rejects,
        "provenance": provenance,
        "splits": {
            name: [{column: getattr(shard, column) for column in kept} for shard in of_split]
            for name, of_split in splits.items()
        },
        "fallbacks": {id: note for shard in shards for id, note in shard.fallbacks.items()},
        "sources": {id: files for shard in shards for id, files in shard.sources.items()},
    }
    with atomic_file(path / HEADER) as temporary:
        temporary.write_text(json.dumps(header, indent=1))


def shard_name(split: str, number: int, count: int) -> str:
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def grid_affine(shape: Sequence[int], spacing_mm: Sequence[float]) -> Float[np.ndarray, "4 4"]:
    """Of a grid in the model's axes whose centre is the origin."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[[2, 1, 0], [0, 1, 2]] = -np.asarray(spacing_mm, np.float64)
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


def write_store(
    path: Path,
    *,
    labels: Sequence[str],
    regions: Sequence[str],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    splits: dict[str, Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]]],
) -> None:
    """Writes a store of volumes made in Python, one shard a split.

    Args:
        splits: (id, volume [D, H, W], findings [K, R], masks [R, D, H, W]) of each volume.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    new_folder(path)
    affine = grid_affine(shape, spacing_mm)
    headers: dict[str, list[ShardHeader]] = {}
    for split, items in splits.items():
        ids: list[str] = []

        def records(items: Any = items, ids: list[str] = ids) -> Iterator[bytes]:
            for name, volume, findings, masks in items:
                ids.append(name)
                arrays = (volume, findings.astype(np.uint8), masks.astype(np.uint8))
                yield encode(Record(name, name, *arrays, affine, {}))

        file = shard_name(split, 0, 1)
        places = write_shard(path / file, records())
        headers[split] = [ShardHeader.of(file, ids, places)]
    write_header(
        path,
        labels=labels,
        regions=regions,
        shape=shape,
        spacing_mm=spacing_mm,
        splits=headers,
        provenance={},
    )
