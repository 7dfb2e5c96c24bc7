"""What a long task says: a progress bar or plain lines, JSON lines, TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from hirescam_jax.errors import UserError

T = TypeVar("T")


def progress(items: Iterable[T], title: str, unit: str) -> Iterator[T]:
    """Iterates with a bar on a terminal, and with a plain line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, unit=unit, leave=False, dynamic_ncols=True)
        return
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > 10:
            say(f"{title}: {count}{f' of {total}' if total else ''} {unit}s")
            last = time.monotonic()
        yield item


def say(line: str) -> None:
    """A line to standard error that does not break a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


class Log:
    """`metrics.jsonl` and TensorBoard of a run; only the first process writes.

    A resumed run drops the lines of steps that are run again.
    """

    def __init__(self, run_dir: Path, start_step: int):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) < start_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.file.close()
            self.board.close()

    def step(self, step: int, pending: Any, metrics: Any) -> Any:
        """Writes the metrics of the step before `step`; returns this step's for the next call.

        Raises:
            UserError: the loss of the step before is not a finite number.
        """
        if pending is not None:
            values = {name: float(value) for name, value in jax.device_get(pending).items()}
            self._write(step - 1, "train", values)
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"the loss of step {step - 1} is {values['loss']}: lower "
                    "config.optimizer.learning_rate or look at the data of that step "
                    "(the last good checkpoint is kept)"
                )
        return metrics

    def epoch(self, step: int, epoch: int, losses: dict[str, float], rate: float) -> None:
        """Writes the validation losses after an epoch, as of its last step."""
        self._write(step - 1, "val", {**losses, "volumes_per_second": rate})
        say(
            f"epoch {epoch + 1}: validation loss {losses['loss']:.4f} "
            f"(classification {losses['class_loss']:.4f}, mask {losses['mask_loss']:.4f}), "
            f"{rate:.1f} volumes/s"
        )

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        if not self.active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut off by a crash
