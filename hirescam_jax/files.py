"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hirescam_jax.errors import UserError


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
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free some space, or choose "
            "another output folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
