"""What a long task says: a progress bar or plain lines, JSON lines, TensorBoard."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Iterates with a bar on a terminal, and with a plain line every ten seconds elsewhere.

    Where `total` or the length of `items` is known both tell how much time is left.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        bar = {"desc": title, "unit": unit, "total": total}
        yield from tqdm(items, leave=False, dynamic_ncols=True, **bar)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - last > 10:
            done = f"{title}: {count} {unit}s"
            if total:
                left = tqdm.format_interval((now - start) / max(count, 1) * (total - count))
                done = f"{title}: {count} of {total} {unit}s, {left} left"
            say(done)
            last = now
        yield item


def say(line: str) -> None:
    """A line to standard error that does not break a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)
