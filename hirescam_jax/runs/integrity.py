"""Checkpoints as they are read: whole to the bit, or named as damaged."""

import contextlib
import errno
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from hirescam_jax.devices import processes
from hirescam_jax.errors import StartError, UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.progress import say


class DamagedError(UserError):
    """A checkpoint that is not what was saved."""


class UnreadableError(StartError):
    """A checkpoint that may be whole, but the storage fails."""


# A shared file system that does not answer is given this long.
TRIES, PAUSE_SECONDS = 3, 5.0


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / str(step)


def saved_losses(run_dir: Path) -> dict[int, float | None]:
    """The checkpoints' steps, and their validation losses as far as they have one."""
    folders = (run_dir / "checkpoints").glob("*")
    return {int(f.name): _loss(f) for f in folders if f.name.isdecimal() and f.is_dir()}


def write_loss(run_dir: Path, step: int, loss: float) -> None:
    """Adds the validation loss to a checkpoint that is whole, as Orbax would have written it."""
    folder = step_folder(run_dir, step) / "metrics"
    folder.mkdir(exist_ok=True)
    with atomic_file(folder / "metrics") as temporary:
        temporary.write_text(json.dumps({"val_loss": loss, "step": step}))


def _loss(folder: Path) -> float | None:
    path = folder / "metrics" / "metrics"
    try:
        return json.loads(path.read_text())["val_loss"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder}: damaged (metrics: {error})") from error


def checksums(tree: dict[str, Any], xp: Any = jnp) -> dict[str, Any]:
    """A number for the bits of each entry of a dict of trees, by `xp` = jax.numpy or numpy: flipped
    and exchanged values change it. Sums of integers, so devices and their order do not matter."""

    def one(x: Any) -> Any:
        bits = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
        places = xp.arange(bits.size, dtype="uint32") * xp.uint32(2) + xp.uint32(1)
        return xp.sum(bits * places, dtype="uint32")

    def total(part: Any) -> Any:
        sums = [one(leaf) for leaf in jax.tree.leaves(part)]
        return one(xp.stack([*sums, xp.zeros_like(xp.uint32(0))]))

    return {name: total(part) for name, part in tree.items()}


def newest_whole(run_dir: Path, shapes: Any) -> Any:
    """The newest checkpoint that all processes can read to the bit; damaged ones are moved away.
    None if there is none at all.

    Raises:
        UserError: none of them is whole.
        UnreadableError: the storage fails, and did so again.
    """

    def saved_steps() -> list[int]:
        folders = (run_dir / "checkpoints").glob("*")
        return sorted((int(f.name) for f in folders if f.name.isdecimal()), reverse=True)

    steps, loaded, damaged = processes.on_first(saved_steps), None, {}
    for step in steps:
        folder, error = step_folder(run_dir, step), ""
        try:
            loaded = load_patiently(folder, shapes, processes.in_any)
        except DamagedError as caught:
            error = str(caught)
        if not processes.in_any(bool(error)):
            break
        damaged[step] = error or f"{folder}: damaged, as another process read it"
    if len(damaged) == len(steps) > 0:
        others = f", and so are those before it: {steps[1:]}" if steps[1:] else ""
        raise UserError(f"{damaged[steps[0]]}{others}: start again in another folder")

    def move() -> None:
        for step, error in damaged.items():
            aside = run_dir / f"damaged-{step}-{time.time_ns()}"
            step_folder(run_dir, step).rename(aside)
            whole = steps[len(damaged)]
            say(f"warning: {error}; moved to {aside.name}, continuing from step {whole}")

    processes.on_first(move)
    return loaded


def load_patiently(folder: Path, shapes: Any, in_any: Callable[[bool], bool] = bool) -> Any:
    """`load_whole`, again where the storage fails: that is no damage, and may pass.

    Args:
        in_any: tells whether it failed in any of the processes that read together. All must read
            equally often: Orbax counts its operations, and a later save waits for processes with
            the same count.
    """
    for last in [False] * (TRIES - 1) + [True]:
        loaded, error = None, None
        try:
            loaded = load_whole(folder, shapes)
        except (DamagedError, UnreadableError) as caught:
            error = caught
        failed = in_any(isinstance(error, UnreadableError))
        if failed and not last:
            time.sleep(PAUSE_SECONDS)
            continue
        if failed and not isinstance(error, UnreadableError):
            error = UnreadableError(f"{folder}: another process cannot read it: try again")
        if error is not None:
            raise error
        return loaded


def load_whole(folder: Path, shapes: Any) -> Any:
    """Arrays in memory with the checksums they were saved with; each process for itself.

    Raises:
        DamagedError, UnreadableError.
    """
    context, number = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = number
    context.multiprocessing.active_processes = {number}
    context.multiprocessing.barrier_sync_key_prefix = f"alone{number}"
    sums: dict[str, Any] = {}
    if (folder / "checksums").exists():
        parts = ("variables", "progress")
        sums = {"checksums": {name: np.zeros((), np.uint32) for name in parts}}
    with context, quiet_orbax():
        loaded = _load_or_say_why(folder, {**shapes, **sums})
    expected = loaded.pop("checksums", None)
    for name, value in checksums(loaded, np).items() if expected else ():
        if value != expected[name]:
            raise DamagedError(f"{folder}: damaged (the {name} are not those that were saved)")
    return loaded


def _load_or_say_why(folder: Path, abstract: Any) -> Any:
    try:
        _loss(folder)
        saved: Any = ocp.checkpointables_metadata(str(folder.absolute())).metadata
        for name, tree in abstract.items():
            if saved[name] is None:
                raise DamagedError(f"{folder}: damaged ({name} cannot be read)")
            _check_shapes(saved[name], tree, f"{folder}: {name}")
        return ocp.load_checkpointables(str(folder.absolute()), abstract)
    except UserError:
        raise
    except Exception as error:  # damaged files make Orbax raise whatever it likes
        line = " ".join(str(error).split())[:200]
        if _storage_failed(error):
            raise UnreadableError(f"{folder}: cannot be read ({line}): try again") from error
        raise DamagedError(f"{folder}: damaged, or not of this program ({line})") from error


def _storage_failed(error: BaseException | None) -> bool:
    """Whether the system has refused to read, for another reason than that there is no such file.
    TensorStore tells the number in its text."""
    while error is not None:
        number = re.search(r"\bOS error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else number and int(number[1])
        if code and code not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_shapes(saved: Any, wanted: Any, where: str) -> None:
    """Names the first array by which a checkpoint differs from the model."""
    shapes, expected = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (_plain(saved), _plain(wanted))
    )
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            raise UserError(
                f"{where}{name} has shape {shapes.get(name)}, not {expected.get(name)}: "
                "it is of another model than run.json describes"
            )


def _plain(tree: Any) -> Any:
    """The tree with every container as a dict, which is how a checkpoint describes itself."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif isinstance(tree, list | tuple):
        tree = {str(i): item for i, item in enumerate(tree)}
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Where one array of many cannot be read or written, Orbax leaves the others to end in an event
    loop that is closed by then: not for the user, who is told what went wrong."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        time.sleep(0.5)
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before
