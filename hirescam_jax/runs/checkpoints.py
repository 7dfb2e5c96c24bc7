"""A run folder: what was trained, on what, and its Orbax checkpoints.

run.json         format version, config, labels, regions, grid, digests of the data
metrics.jsonl    a line a step and a line a validation
tensorboard/     the same for TensorBoard
checkpoints/     the latest two and the best one (lowest validation loss), by step
damaged-*/       a checkpoint that was not as it had been saved when the run was resumed
diverged-*/      a checkpoint whose validation loss was not a finite number
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import Array

from hirescam_jax.devices import processes
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.runs.integrity import (
    checksums,
    newest_whole,
    quiet_orbax,
    saved_losses,
    step_folder,
    write_loss,
)
from hirescam_jax.runs.run import Header

# A network file system may show a new file to other hosts a while later.
SHARED_SECONDS = 60.0


class Saver:
    """Writes a run's checkpoints in the background, keeping the best and the latest two; `restore`
    comes first. All processes write their part; the first one looks after the folder.

    Raises:
        UserError: a new run in a folder that exists; a resumed one that does not exist, or whose
            config or data differ; a folder that not all processes see.
    """

    def __init__(self, run_dir: Path, header: Header, *, resume: bool):
        self.run_dir = run_dir

        def prepare() -> None:
            saved, wanted = None, header
            if resume:
                saved = Header.read(run_dir)
                wanted = saved.continued(run_dir, header)
            elif run_dir.exists():
                raise UserError(
                    f"{run_dir}: exists; choose another folder, or --resume to continue it"
                )
            try:
                (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
                if wanted != saved:
                    with atomic_file(run_dir / "run.json") as temporary:
                        temporary.write_text(wanted.to_json())
            except OSError as error:
                raise UserError(f"{run_dir}: cannot write the run ({error.strerror})") from error

        processes.on_first(prepare)
        self._check_shared()
        self.checkpointer: Any = None
        self.losses: dict[int, float] = {}  # of the validated checkpoints, by step

    def _check_shared(self) -> None:
        if jax.process_count() == 1:
            return
        path, deadline = self.run_dir / "run.json", time.monotonic() + SHARED_SECONDS
        while not (seen := path.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if processes.in_any(not seen):
            where = "is not what process 0 has" if not seen else "is not seen by all processes"
            raise UserError(
                f"{self.run_dir}: {where}: give a folder on a file system that all hosts share"
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext(), self._writing():
            self.checkpointer.close()

    def restore(self, state: Any) -> Any:
        """The latest checkpoint that is whole, in the shardings of `state`; without one `state`
        itself. Damaged ones are moved out of the way, with a warning.

        Raises:
            UserError: none of the checkpoints is whole.
        """
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _parts(state))
        loaded = newest_whole(self.run_dir, shapes)
        found = processes.on_first(lambda: list(saved_losses(self.run_dir).items()))
        self.losses.update((step, loss) for step, loss in found if loss is not None)
        self.checkpointer = ocp.training.Checkpointer(
            str((self.run_dir / "checkpoints").absolute()),
            preservation_policy=Keep(self.losses),
            cleanup_tmp_directories=True,
        )
        if loaded is None:
            return state

        def place(old: Array, new: np.ndarray) -> Array:
            return jax.make_array_from_callback(old.shape, old.sharding, lambda part: new[part])

        parts = jax.tree.map(place, _parts(state), loaded)
        return state.replace(**parts["variables"], **parts["progress"])

    def save(self, step: int, state: Any, losses: dict[str, float] | None = None) -> None:
        """Starts to write, where the step is not saved yet; waits only for the write before this
        one, and raises its UserError.

        Args:
            losses: of the validation, if there was one after this step. They are added once the
                checkpoint is whole, which is waited for.
        """
        parts = _parts(state)
        if step not in {checkpoint.step for checkpoint in self.checkpointer.checkpoints}:
            with self._writing():
                self.checkpointer.save_checkpointables_async(
                    step, {**parts, "checksums": jax.jit(checksums)(parts)}, force=True
                )
        if losses is not None:
            self.wait()
            loss = float(losses["loss"])
            processes.on_first(partial(write_loss, self.run_dir, step, loss))
            self.losses[step] = loss

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint of a training that has diverged out of the way."""
        self.wait()

        def move() -> None:
            aside = self.run_dir / f"diverged-{step}-{time.time_ns()}"
            step_folder(self.run_dir, step).rename(aside)

        processes.on_first(move)

    def wait(self) -> None:
        """Returns once everything is on disk, or raises its UserError."""
        with self._writing():
            self.checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with quiet_orbax():
                yield
        except (OSError, ValueError) as error:  # TensorStore says ValueError for a full disk
            if processes.peer_lost(error):
                raise
            reason = "No space left on device" if "No space left" in str(error) else error
            raise UserError(
                f"{self.run_dir}: a checkpoint cannot be written ({reason}): free some space and "
                "continue with --resume; earlier checkpoints are whole"
            ) from error

    def epochs_done(self, step: int, epoch_steps: int) -> int:
        """Epochs that are validated, for a training that stands at `step`."""
        waiting = step > 0 and step not in self.losses
        return (step - waiting) // epoch_steps

    def best_epoch(self, epoch_steps: int) -> int:
        """Epochs until the one with the lowest validation loss, the first of equals."""
        return _best(self.losses) // epoch_steps


def _parts(state: Any) -> dict[str, Any]:
    """A training state as it is saved: the variables apart, for those who only want to predict."""
    return {
        "variables": state.variables,
        "progress": {"step": state.step, "opt_state": state.opt_state},
    }


@dataclasses.dataclass
class Keep:
    """Orbax's rule for what is kept: the latest two, so that there is one to fall back to, and the
    best. A checkpoint that is best no longer goes when the next one is written."""

    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-2:], _best(self.losses)}
        return [step in kept for step in steps]


def _best(losses: dict[int, float]) -> int:
    """The step with the lowest loss, the first of equals; 0 without any."""
    return min(losses, key=lambda step: (losses[step], step), default=0)
