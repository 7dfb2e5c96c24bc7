"""Results of a long evaluation, kept batch by batch, so that an interrupted one continues."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from hirescam_jax.devices import processes
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

FACTS = "facts.txt"


class Kept:
    """A folder with one .npz a batch. Process 0 writes; all read, so all must see the folder.

    Args:
        folder: made when the first batch is done.
        facts: what the results depend on. Those of other facts are removed.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]):
        self.folder = folder
        self.facts = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()

        def prepare() -> None:
            file = folder / FACTS
            if folder.exists() and not (file.is_file() and file.read_text() == self.facts):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                temporary.write_text(self.facts)

        processes.on_first(prepare)

    def load(self, split: str) -> list[dict[str, Any]]:
        """The results of the first batches of a split, as far as there are any whole ones."""

        def count() -> int:
            number = 0
            while _readable(self._file(split, number)):
                number += 1
            return number

        return [self._read(split, number) for number in range(processes.on_first(count))]

    def save(self, split: str, number: int, result: dict[str, Any]) -> None:
        """Keeps a batch's result: arrays, also in dicts within, which may be empty."""
        if jax.process_index() > 0:
            return
        whole: Any = flatten_dict(result, sep="/", keep_empty_nodes=True)
        # A dict without entries, such as the maps of a model without any, is an array named "x/".
        arrays: dict[str, Any] = {n: v for n, v in whole.items() if v is not empty_node}
        arrays |= {f"{n}/": np.zeros(0) for n, v in whole.items() if v is empty_node}
        with atomic_file(self._file(split, number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def remove(self) -> None:
        """To be called when the whole is written elsewhere."""
        processes.on_first(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _file(self, split: str, number: int) -> Path:
        return self.folder / f"{split}_{number:06d}.npz"

    def _read(self, split: str, number: int) -> dict[str, Any]:
        try:
            with np.load(self._file(split, number), allow_pickle=False) as arrays:
                names = [n for n in arrays.files if not n.endswith("/")]
                empty = {n[:-1]: {} for n in arrays.files if n.endswith("/")}
                return unflatten_dict({**{n: arrays[n] for n in names}, **empty}, sep="/")
        except FileNotFoundError as error:
            raise UserError(
                f"{self._file(split, number)}: not seen by all processes: choose an output on "
                "storage that they share"
            ) from error


def _readable(path: Path) -> bool:
    """Whether a file was written whole; a damaged one is made again."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
