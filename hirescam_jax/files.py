"""Files that are written whole or not at all; lists of names that are read."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hirescam_jax.errors import UserError


def new_folder(path: Path) -> None:
    """Makes the folder, and those above it.

    Raises:
        UserError: it exists, or cannot be made.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{path}: exists; choose another folder") from error
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, and moves the file to `path` if all went well.

    Raises:
        UserError: an OSError on the way, such as a full disk.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_names(path: Path) -> dict[str, list[Any]]:
    """A JSON file of names -> lists.

    Raises:
        UserError: another file, or none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UserError(f'{path}: give {{"name": ["...", "..."], ...}}')
    return content


@contextlib.contextmanager
def writing_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose waiting work is dropped when something fails."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its place if all goes well."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    earlier = folder.with_name(f"{temporary.name}-earlier")
    new_parent = not folder.parent.exists()
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():  # the outputs of an earlier call, see _output_folders
            folder.rename(earlier)
        temporary.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(folder))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
        if new_parent:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                folder.parent.rmdir()


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(
        f"{path}: cannot be written ({reason}): free some space, or choose another output folder"
    )
