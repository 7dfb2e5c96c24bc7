"""Shards: ArrayRecord files, written whole or not at all and read by place.

Any ArrayRecord reader can read them. Ours does not use one, since the library copies a record
several times on its way (0.3 GB/s for volumes). A record lies in its file in one piece, but for 24
bytes at the start of every 64 KiB block (Riegeli's framing), so it is read straight into place,
and its own checksum is compared.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8

from hirescam_jax.files import atomic_file

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 65536, 24, 40
_BODY = BLOCK - BLOCK_HEADER
_MAX_PIECES = 1024  # of one preadv


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record lies: its offset, not counting block headers, its size and checksum."""

    offset: int
    size: int
    checksum: str


def write_shard(path: Path, records: Iterable[bytes]) -> list[Place]:
    """Writes an ArrayRecord file, reads it back, and moves it to `path`.

    Raises:
        UserError: it cannot be written, such as on a full disk; nothing is left at `path`.
    """
    with atomic_file(path) as temporary:
        sizes, checksums = [], []
        with _as_os_error():
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for data in records:
            with _as_os_error():
                writer.write(data)
            sizes.append(len(data))
            checksums.append(checksum(data))
        with _as_os_error():
            writer.close()
        places = _places(temporary, sizes, checksums)
        with temporary.open("rb") as file:
            for place in places:
                read_at(file.fileno(), place)
            os.fsync(file.fileno())
    return places


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """The library makes a RuntimeError of it."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(None, str(error).split(";")[0]) from error


def read_at(file: int, place: Place, buffer: UInt8[np.ndarray, "_"] | None = None) -> memoryview:
    """A record's bytes, read into the beginning of `buffer` if that is given and long enough.

    Raises:
        ValueError: the file ends early, or the checksum is another.
        OSError: it cannot be read.
    """
    if buffer is None or len(buffer) < place.size:
        buffer = np.empty(place.size, np.uint8)
    data = buffer[: place.size].data
    read_part(file, place.offset, data)
    if checksum(data) != place.checksum:
        raise ValueError("its checksum is not the one it was written with")
    return data


def checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _places(path: Path, sizes: list[int], checksums: list[str]) -> list[Place]:
    """A chunk a record: a header with the size of what follows, which ends with the record."""
    places, offset = [], CHUNK_HEADER  # behind the file's signature
    with path.open("rb") as file:
        for size, check in zip(sizes, checksums, strict=True):
            header = bytearray(CHUNK_HEADER)
            read_part(file.fileno(), offset, memoryview(header))
            offset += CHUNK_HEADER + int.from_bytes(header[8:16], "little")
            places.append(Place(offset - size, size, check))
    return places


def read_part(file: int, offset: int, out: memoryview) -> None:
    """Fills `out` from an offset on, unchecked.

    Raises:
        ValueError: the file ends early.
        OSError: it cannot be read.
    """
    skipped = memoryview(bytearray(BLOCK_HEADER))
    block, within = divmod(offset, _BODY)
    position = block * BLOCK + BLOCK_HEADER + within
    done = min(len(out), _BODY - within)
    pieces = [out[:done]]
    while done < len(out):
        size = min(len(out) - done, _BODY)
        pieces += [skipped, out[done : done + size]]
        done += size
    for start in range(0, len(pieces), _MAX_PIECES):
        part = pieces[start : start + _MAX_PIECES]
        wanted = sum(map(len, part))
        if os.preadv(file, part, position) != wanted:
            raise ValueError("the file ends early")
        position += wanted
