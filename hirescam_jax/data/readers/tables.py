"""CSV tables: one row a study; a bad row is a reject, a bad table a UserError."""

import collections
import csv
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hirescam_jax.data.study import Reject, Study
from hirescam_jax.errors import UserError

BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """line: where it ends in the file. text: its other columns. binary: its 0/1 columns."""

    line: int
    text: dict[str, str]
    binary: UInt8[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table without its bad rows, which are in `rejects`."""

    path: Path
    binary_columns: tuple[str, ...]
    rows: dict[str, Row]
    rejects: list[Reject]

    def why_not(self, key: str) -> str:
        """Why there is no row of this id."""
        reasons = (reject.reason for reject in self.rejects if reject.id == key)
        return next(reasons, f"{self.path}: no row of '{key}': add it")


def read_table(
    path: Path,
    id_column: str,
    *,
    needed: Sequence[str] = (),
    optional: Sequence[str] = (),
    binary: Callable[[str], bool] = lambda column: False,
    id_of: Callable[[str], str] = lambda entry: entry,
) -> Table:
    """Reads a CSV file with a header.

    Args:
        path: UTF-8, commas.
        id_column: holds the ids, each once.
        needed: further columns of text to keep.
        optional: columns of text to keep where the table has them.
        binary: whether a column of this name holds the 0 and 1 of a label.
        id_of: from an entry of the id column to the id.

    Raises:
        UserError: the file or a needed column is missing, a column is there twice, it is no text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _parse(path, file, id_column, needed, optional, binary, id_of)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such table: check the path, or download it") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: give a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV text ({error}): save it as CSV in UTF-8") from error


def _parse(
    path: Path,
    file: Iterable[str],
    id_column: str,
    needed: Sequence[str],
    optional: Sequence[str],
    binary: Callable[[str], bool],
    id_of: Callable[[str], str],
) -> Table:
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    if not header:
        raise UserError(f"{path}: the table is empty: it needs a header with '{id_column}'")
    for name in (id_column, *needed):
        if name not in header:
            found = ", ".join(header[:8]) + (", ..." if len(header) > 8 else "")
            raise UserError(f"{path}: no column '{name}' (found: {found}): add or rename it")
    for name, count in collections.Counter(header).items():
        if count > 1:
            raise UserError(f"{path}: {count} columns are named '{name}': remove all but one")
    id_index = header.index(id_column)
    kept = {name: header.index(name) for name in (*needed, *optional) if name in header}
    columns = {
        name: i
        for i, name in enumerate(header)
        if i != id_index and name not in kept and binary(name)
    }
    rows: dict[str, Row] = {}
    rejects: dict[str, Reject] = {}

    def reject(key: str, line: int, reason: str) -> None:
        rejects.setdefault(key, Reject(key, f"{path}: row {line}: {reason}"))

    for cells in reader:
        line = reader.line_num
        if not any(cells):
            continue
        key = id_of(cells[id_index].strip()) if len(cells) > id_index else ""
        if not is_id(key):
            reject(key or f"row {line}", line, f"{id_column} '{key}' cannot name a file: rename it")
        elif key in rows or key in rejects:
            first = f"row {rows.pop(key).line}" if key in rows else "a row above"
            reject(key, line, f"duplicate {id_column} '{key}', {first} has it too: keep one")
        elif len(cells) != len(header):
            count = f"{len(cells)} entries, the header has {len(header)}"
            reject(key, line, f"{count}: correct the commas")
        else:
            values = [BINARY.get(cells[i].strip(), 2) for i in columns.values()]
            if 2 in values:
                column = list(columns)[values.index(2)]
                entry = cells[columns[column]].strip()
                reject(key, line, f"column '{column}' holds '{entry}', not 0 or 1: correct it")
            else:
                text = {name: cells[i].strip() for name, i in kept.items()}
                rows[key] = Row(line, text, np.array(values, np.uint8))
    return Table(path, tuple(columns), rows, list(rejects.values()))


def is_id(text: str) -> bool:
    """Whether it can name a file, so no slashes and no leading dot."""
    return re.fullmatch(r"[^./\\\0\n\r][^/\\\0\n\r]*", text) is not None and len(text) < 200


def pair(
    table: Table, files: Mapping[str, Path], expected: Callable[[str], str]
) -> tuple[list[str], list[Reject]]:
    """The ids that have a row and a file, in the table's order, and rejects for all others.

    Args:
        table: of labels.
        files: id -> its volume.
        expected: id -> what the missing file would be called, for the message.
    """
    rejects = list(table.rejects)
    for key, row in table.rows.items():
        if key not in files:
            missing = f"{expected(key)} is missing: download it, or remove the row"
            rejects.append(Reject(key, f"{table.path}: row {row.line}: {missing}"))
    named = {reject.id for reject in rejects}
    for key in sorted(set(files) - set(table.rows) - named):
        rejects.append(Reject(key, f"{files[key]}: no row '{key}' in {table.path}: add its labels"))
    return [key for key in table.rows if key in files], rejects


def list_files(folder: Path) -> list[Path]:
    """The files of a folder in order, without hidden ones."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: {reason}: give a folder that can be read") from error


def keep_patients_whole(studies: Sequence[Study], path: Path) -> tuple[list[Study], list[Reject]]:
    """Rejects the studies of patients whose studies are said to lie in different splits."""
    splits = collections.defaultdict[str, set[str | None]](set)
    for study in studies:
        splits[study.patient].add(study.split)
    parted = {patient for patient, found in splits.items() if len(found) > 1}
    rejects = [
        Reject(
            s.id,
            f"{path}: patient '{s.patient}' is in the splits "
            f"{' and '.join(sorted(str(split) for split in splits[s.patient]))}: choose one",
        )
        for s in studies
        if s.patient in parted
    ]
    return [s for s in studies if s.patient not in parted], rejects
