"""Finished runs -> the papers' tables: overall, a label a row and an organ a row; against lesions;
the ways of bringing masks to the grid; and the differences between the runs.

Each as CSV (all figures, for programs), Markdown and LaTeX (for people and papers).
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.tables.cells import (
    IN_SAMPLE,
    MEASURES,
    OTHER_PAIRS,
    OTHER_VOLUMES,
    Measure,
    about,
    cell_of,
    grid_text,
    labels_of,
    labels_text,
    lesion_notes,
    lesion_rows,
    one_set_of_pairs,
    organ_pairs_text,
    others,
    pairs_text,
    positives_text,
    residual_cell,
)
from hirescam_jax.evaluation.tables.differences import difference_tables
from hirescam_jax.evaluation.tables.masks import mask_tables
from hirescam_jax.evaluation.text import LESION_MEASURES
from hirescam_jax.evaluation.values import Values
from hirescam_jax.files import atomic_file
from hirescam_jax.reports.tables import Interval, Table
from hirescam_jax.runs.run import Header

EVALUATION = "evaluation.json"
KINDS = ("models", "labels", "organs", "lesions", "masks", "differences", "differences_labels")
SUFFIXES = ("csv", "md", "tex")
# What holds for measures against lesions too.
LESION_NOTES = (IN_SAMPLE, OTHER_VOLUMES, OTHER_PAIRS)
POSITIVES = (
    "positives: patients with the label, of whom intervals are: none with fewer than five, and too "
    "narrow with fewer than ten."
)


def read_evaluations(runs: Sequence[Path], file: str = EVALUATION) -> dict[str, Any]:
    """The evaluations of run folders, by the folder's name.

    Raises:
        UserError: a folder without one, a file that is not one, two runs of one name, runs of
            other labels, or of other splits.
    """
    found: dict[str, Any] = {}
    for run in runs:
        path = run / file
        name = run.resolve().name
        if name in found:
            raise UserError(f"{run}: two runs are called '{name}': rename one of the folders")
        try:
            evaluation = json.loads(path.read_text(), parse_constant=_no_number)
            _check(evaluation)
            if evaluation.get("validation") is not None:
                _check(evaluation["validation"])
        except FileNotFoundError as error:
            raise UserError(f"{run}: no {file} in it: run `hirescam evaluate {run}`") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not an evaluation ({error}): run `hirescam evaluate {run}` again"
            ) from error
        found[name] = evaluation
    if not found:
        raise UserError("name at least one run folder")
    _check_alike(found)
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} in it")


def _check(evaluation: Any) -> None:
    """Raises one of many errors if the parts that tables are made of are not there."""
    if not isinstance(evaluation["volumes"], int):
        raise ValueError("volumes is no number")
    _ = grid_text(evaluation), pairs_text(evaluation), *lesion_rows("", evaluation)
    for measure in MEASURES:
        found = measure.get(evaluation)
        if found is None:
            continue
        cells = [found["mean"], *found["labels"].values(), *found.get("regions", {}).values()]
        for of_label in (evaluation.get("lesions") or {}).values():
            cells += [of_label[key]["mean"] for key in LESION_MEASURES]
        for cell in cells:
            for end in ("value", "low", "high"):
                if not (cell[end] is None or math.isfinite(cell[end])):
                    raise ValueError(f"{measure.name}: {end} is {cell[end]}")


def _check_alike(evaluations: Mapping[str, Any]) -> None:
    first, *others = evaluations
    for name in others:
        ours, theirs = (labels_of(evaluations[n]) for n in (first, name))
        for one, more, less in ((first, ours, theirs), (name, theirs, ours)):
            extra = [label for label in more if label not in less]
            if extra:
                shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
                raise UserError(
                    f"'{first}' and '{name}' have other labels ({shown}: only '{one}' has "
                    f"{'it' if len(extra) == 1 else 'them'}), so that their means cannot be "
                    "compared: tabulate runs with the same labels"
                )
        if _split(evaluations[first]) != _split(evaluations[name]):
            raise UserError(
                f"'{first}' was measured on the {_split(evaluations[first])} split, '{name}' on "
                f"the {_split(evaluations[name])} split: evaluate both with the same --split"
            )


def _split(evaluation: Any) -> str:
    return evaluation.get("split", "test")


def tabulate(runs: Sequence[Path], out: Path, against: str = "") -> str:
    """Writes `all_tables` to `out`; returns those of models, masks and differences as Markdown,
    and the files."""
    built = all_tables(runs, against)
    paths = write_tables(built, out)
    shown = [
        table.markdown()
        for name, table in built.items()
        if name in ("models", "differences") or name.startswith("masks")
    ]
    return "\n".join([*shown, *map(str, paths)])


def all_tables(runs: Sequence[Path], against: str = "") -> dict[str, Table]:
    """`tables` and `mask_tables` of run folders, and their differences from one of them, where
    their evaluations hold the values of each volume (`hirescam_jax.evaluation.tables.differences`).

    Raises:
        UserError: as `read_evaluations`; no run is called `against`, or it cannot be compared.
    """
    evaluations = read_evaluations(runs)
    paths = {run.resolve().name: run for run in runs}
    headers = {name: Header.read(p) for name, p in paths.items() if (p / "run.json").exists()}
    split = _split(next(iter(evaluations.values())))
    built = tables(evaluations) | mask_tables(evaluations, headers, split)
    files = {name: path / f"evaluation_{split}.npz" for name, path in paths.items()}
    missing = [str(files[name]) for name in files if not files[name].exists()]
    if missing and against:
        raise UserError(
            f"--against {against}: {missing[0]} is not there: run `hirescam evaluate` again"
        )
    if len(files) > 1 and not missing:
        values = {name: Values.load(file) for name, file in files.items()}
        for name, one in values.items():
            if one.content != evaluations[name].get("content"):
                raise UserError(
                    f"{files[name]}: is not of the evaluation beside it: run `hirescam evaluate "
                    f"{paths[name]}` again"
                )
        differences = difference_tables(values, against, split)
        # Only runs that were measured on the reference's volumes are in them.
        reference = against or next(iter(evaluations))
        ordered = {reference: evaluations[reference]} | evaluations
        alike = {name: e for name, e in ordered.items() if name not in others(ordered)}
        _, notes = about(alike, split)
        for name, table in differences.items():
            built[name] = dataclasses.replace(table, notes=(*table.notes, *notes))
    return built


def tables(evaluations: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of one evaluation each, by the name of their files.

    "models": a row a run; "labels": a row a label and run; "organs": a row an organ and run;
    "lesions": a row a run and map, where the data has lesions. The same of the validation split
    under "models_validation" and so on, where all runs have it.
    """
    split = _split(next(iter(evaluations.values())))
    built = _of_split(evaluations, split)
    inner = {name: _validation_of(e) for name, e in evaluations.items()}
    if all(inner.values()):
        of_validation = _of_split(inner, "validation").items()
        built |= {f"{name}_validation": table for name, table in of_validation}
    return built


def _validation_of(evaluation: Any) -> Any:
    inner = evaluation.get("validation")
    return inner and {**inner, "head": evaluation.get("head")}


def _of_split(evaluations: Mapping[str, Any], split: str) -> dict[str, Table]:
    names = tuple(measure.name for measure in MEASURES)
    note, notes = about(evaluations, split)
    apart = others(evaluations)
    shown = {name: f"{name} ‡" if name in apart else name for name in evaluations}
    comparable = one_set_of_pairs(evaluations)

    def mean(name: str, measure: Measure) -> Interval:
        compared = name not in apart and (comparable or not measure.map)
        return cell_of(evaluations[name], measure) | {"compared": compared}

    def keys(part: str) -> list[str]:
        found = [m.get(e) or {} for e in evaluations.values() for m in MEASURES]
        return list(dict.fromkeys(key for result in found for key in result.get(part, {})))

    models = Table(
        f"Means over labels, {note}.",
        ("model", "labels", "head", "grid", "pairs"),
        (*names, "unexplained score"),
        tuple(
            (
                (shown[n], labels_text(e), _kind(e), grid_text(e), pairs_text(e)),
                (*(mean(n, m) for m in MEASURES), residual_cell(e)),
            )
            for n, e in evaluations.items()
        ),
        (*(measure.better for measure in MEASURES), 0),
        notes,
    )
    built = {"models": models}
    for part, column, count in (
        ("labels", "label", ("positives", positives_text)),
        ("regions", "organ", ("pairs", organ_pairs_text)),
    ):
        rows = []
        for key in keys(part):
            for n, e in evaluations.items():
                cells = tuple(cell_of(e, m, part, key) for m in MEASURES)
                rows.append(((key, shown[n], count[1](e, key)), cells))
        if rows:
            said = (*notes, *[POSITIVES] * (part == "labels"))
            title = f"By {column}, {note}."
            table = Table(title, (column, "model", count[0]), names, tuple(rows), notes=said)
            built["labels" if part == "labels" else "organs"] = table
    lesions = [row for n, e in evaluations.items() for row in lesion_rows(shown[n], e)]
    if lesions:
        built["lesions"] = Table(
            f"Maps against lesions, means over labels, {note}.",
            ("model", "map", "labels", "pairs"),
            tuple(LESION_MEASURES.values()),
            tuple(lesions),
            notes=(*(n for n in notes if n in LESION_NOTES), *lesion_notes(evaluations)),
        )
    return {name: table.without_empty() for name, table in built.items()}


def _kind(evaluation: Any) -> str:
    return (evaluation.get("head") or {}).get("kind", "")


def write_tables(built: Mapping[str, Table], out: Path) -> list[Path]:
    """Writes each table as .csv, .md and .tex, and removes those of other runs that have no
    successor; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    stems = {*KINDS, *(f"{kind}_validation" for kind in KINDS)}
    stems |= {path.stem for path in out.glob("masks_[0-9]*.*")}
    for stem in stems - built.keys():
        for suffix in SUFFIXES:
            (out / f"{stem}.{suffix}").unlink(missing_ok=True)
    for name, table in built.items():
        for suffix, text in zip(
            SUFFIXES, (table.csv(), table.markdown(), table.latex()), strict=True
        ):
            path = out / f"{name}.{suffix}"
            with atomic_file(path) as temporary:
                temporary.write_text(text)
            written.append(path)
    return written
