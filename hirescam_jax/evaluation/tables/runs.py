"""Finished runs -> the papers' tables: overall, a label a row and an organ a row; against lesions;
the ways of bringing masks to the grid; and the differences between the runs.

Each as CSV (all figures, for programs), Markdown and LaTeX (for people and papers).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.result import RunEvaluation
from hirescam_jax.evaluation.tables.cells import (
    IN_SAMPLE,
    MEASURES,
    OTHER_PAIRS,
    OTHER_VOLUMES,
    Measure,
    about,
    cell_of,
    grid_text,
    labels_text,
    lesion_notes,
    lesion_rows,
    mean_cell,
    measures_of,
    one_set_of_pairs,
    organ_pairs_text,
    others,
    pairs_text,
    regions_of,
    residual_cell,
)
from hirescam_jax.evaluation.tables.differences import difference_tables
from hirescam_jax.evaluation.tables.masks import mask_tables
from hirescam_jax.evaluation.text import LESION_MEASURES, positives_text
from hirescam_jax.evaluation.values import Values
from hirescam_jax.files import atomic_file
from hirescam_jax.reports.tables import Cell, Table
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


def read_evaluations(runs: Sequence[Path], file: str = EVALUATION) -> dict[str, RunEvaluation]:
    """The evaluations of run folders, by the folder's name.

    Raises:
        UserError: a folder without one, a file that is not one, two runs of one name, runs of
            other labels, or of other splits.
    """
    found: dict[str, RunEvaluation] = {}
    for run in runs:
        name = run.resolve().name
        if name in found:
            raise UserError(f"{run}: two runs are called '{name}': rename one of the folders")
        found[name] = RunEvaluation.load(run / file)
    if not found:
        raise UserError("name at least one run folder")
    _check_alike(found)
    return found


def _check_alike(evaluations: Mapping[str, RunEvaluation]) -> None:
    first, *others = evaluations
    for name in others:
        ours, theirs = (evaluations[n].scores.auroc.labels for n in (first, name))
        for one, more, less in ((first, ours, theirs), (name, theirs, ours)):
            extra = [label for label in more if label not in less]
            if extra:
                shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
                raise UserError(
                    f"'{first}' and '{name}' have other labels ({shown}: only '{one}' has "
                    f"{'it' if len(extra) == 1 else 'them'}), so that their means cannot be "
                    "compared: tabulate runs with the same labels"
                )
        splits = evaluations[first].split, evaluations[name].split
        if splits[0] != splits[1]:
            raise UserError(
                f"'{first}' was measured on the {splits[0]} split, '{name}' on the {splits[1]} "
                "split: evaluate both with the same --split"
            )


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
    split = next(iter(evaluations.values())).split
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
            if one.content != evaluations[name].scores.content:
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


def tables(evaluations: Mapping[str, RunEvaluation]) -> dict[str, Table]:
    """The tables of one evaluation each, by the name of their files.

    "models": a row a run; "labels": a row a label and run; "organs": a row an organ and run;
    "lesions": a row a run and map, where the data has lesions. The same of the validation split
    under "models_validation" and so on, where all runs have it.
    """
    split = next(iter(evaluations.values())).split
    built = _of_split(evaluations, split)
    inner = {
        name: dataclasses.replace(e, split="validation", scores=e.validation)
        for name, e in evaluations.items()
        if e.validation
    }
    if len(inner) == len(evaluations):
        of_validation = _of_split(inner, "validation").items()
        built |= {f"{name}_validation": table for name, table in of_validation}
    return built


def _of_split(evaluations: Mapping[str, RunEvaluation], split: str) -> dict[str, Table]:
    names = tuple(measure.name for measure in MEASURES)
    note, notes = about(evaluations, split)
    apart = others(evaluations)
    shown = {name: f"{name} ‡" if name in apart else name for name in evaluations}
    comparable = one_set_of_pairs(evaluations)

    def mean(name: str, measure: Measure) -> Cell:
        compared = name not in apart and (comparable or not measure.map)
        return dataclasses.replace(mean_cell(evaluations[name], measure), compared=compared)

    rows = []
    for n, e in evaluations.items():
        kind = e.head.kind if e.head else ""
        texts = (shown[n], labels_text(e), kind, grid_text(e), pairs_text(e))
        rows.append((texts, (*(mean(n, m) for m in MEASURES), residual_cell(e))))
    models = Table(
        f"Means over labels, {note}.",
        ("model", "labels", "head", "grid", "pairs"),
        (*names, "unexplained score"),
        tuple(rows),
        (*(measure.better for measure in MEASURES), 0),
        notes,
    )
    built = {"models": models}
    measured = [scores for e in evaluations.values() for scores in measures_of(e)]
    rows = []
    for label in dict.fromkeys(label for scores in measured for label in scores.labels):
        for n, e in evaluations.items():
            found = ((m, m.get(e.scores)) for m in MEASURES)
            cells = tuple(cell_of(e, m, scores and scores.labels.get(label)) for m, scores in found)
            rows.append(((label, shown[n], positives_text(e.scores, label)), cells))
    if rows:
        head = ("label", "model", "positives")
        said = (*notes, POSITIVES)
        built["labels"] = Table(f"By label, {note}.", head, names, tuple(rows), notes=said)
    rows = []
    for organ in dict.fromkeys(organ for scores in measured for organ in regions_of(scores)):
        for n, e in evaluations.items():
            found = ((m, regions_of(m.get(e.scores))) for m in MEASURES)
            cells = tuple(cell_of(e, m, regions.get(organ)) for m, regions in found)
            rows.append(((organ, shown[n], organ_pairs_text(e, organ)), cells))
    if rows:
        head = ("organ", "model", "pairs")
        built["organs"] = Table(f"By organ, {note}.", head, names, tuple(rows), notes=notes)
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
