"""What a run says of its steps: JSON lines, TensorBoard."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.progress import say

events: Any = event_pb2  # its classes are made at run time


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
        if kept != lines:
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)
        # The plain writer: SummaryWriter's threads cannot report a full disk.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        (run_dir / "tensorboard").mkdir(exist_ok=True)
        self.board = RecordWriter(str(run_dir / "tensorboard" / name))
        self._event(0, file_version="brain.Event:2")
        start = events.SessionLog(status=events.SessionLog.START)  # hides what is run again
        self._event(start_step, session_log=start)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self.active:
            return
        for file in (self.file, self.board):
            quiet = contextlib.suppress(UserError) if kind else contextlib.nullcontext()
            with quiet, self._writing():
                file.close()

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

    def epoch(
        self, step: int, epoch: int, losses: dict[str, float], figures: dict[str, float]
    ) -> None:
        """Writes the validation losses after an epoch, and the `Watch`'s figures of it, as of its
        last step."""
        self._write(step - 1, "val", {**losses, **figures})
        shares = ", ".join(
            f"{part} {figures[f'{part}_seconds'] / figures['step_seconds']:.0%}"
            for part in ("input", "device", "checkpoint")
        )
        more = ""
        if "flop_utilisation" in figures:
            more += f", {figures['flop_utilisation']:.0%} of peak FLOP/s"
        if "device_gib" in figures:
            more += f", {figures['device_gib']:.1f} GiB"
        say(
            f"epoch {epoch + 1}: validation loss {losses['loss']:.4f} "
            f"(classification {losses['class_loss']:.4f}, mask {losses['mask_loss']:.4f}), "
            f"{figures['volumes_per_second']:.1f} volumes/s (waiting: {shares}){more}"
        )

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        if not self.active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._writing():
            self.file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
            for name, value in values.items():
                self._event(step, summary=scalar(f"{split}/{name}", value))
            if split == "val":
                self.board.flush()

    def _event(self, step: int, **what: Any) -> None:
        event = events.Event(wall_time=time.time(), step=step, **what)
        self.board.write(event.SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.file.name}: cannot be written ({error.strerror or error}): free some space "
                "and continue with --resume"
            ) from error


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut off by a crash
