"""Finished runs -> the paper's tables: overall, a label a row and an organ a row.

Each as CSV (all figures, for programs), Markdown and LaTeX (for people and papers).
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

Interval = dict[str, Any]  # {"value", "low", "high"}, each None where it is not defined
MISSING: Interval = {"value": None, "low": None, "high": None}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column. get: an evaluation -> the measure's {"mean": ..., "labels": ..., ...}, or None."""

    name: str
    get: Callable[[dict[str, Any]], dict[str, Any] | None]


MEASURES = (
    Measure("AUROC", lambda e: e["auroc"]),
    Measure("average precision", lambda e: e["average_precision"]),
    Measure("OrganIoU HiResCAM", lambda e: e["organ_iou"].get("hirescam")),
    Measure("OrganIoU Grad-CAM", lambda e: e["organ_iou"].get("gradcam")),
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of intervals. names: of the columns; rows: (what it is about, its intervals)."""

    title: str
    head: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Interval, ...]], ...]

    def csv(self) -> str:
        """A column each for a measure's value and the ends of its interval; empty if missing."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        ends = [f"{name} {end}".strip() for name in self.names for end in ("", "low", "high")]
        writer.writerow([*self.head, *ends])
        for head, cells in self.rows:
            figures = [cell[end] for cell in cells for end in ("value", "low", "high")]
            writer.writerow([*head, *("" if f is None else f"{f:.6g}" for f in figures)])
        return out.getvalue()

    def markdown(self) -> str:
        lines = [[*self.head, *self.names], ["---"] * len(self.head) + ["--:"] * len(self.names)]
        for head, cells in self._cells("**{}**"):
            lines.append([*(text.replace("|", "\\|") for text in head), *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.title}\n\n{table}\n"

    def latex(self) -> str:
        """A booktabs `table`."""
        lines = [" & ".join(map(_tex, [*self.head, *self.names])) + r" \\", r"\midrule"]
        for head, cells in self._cells(r"\textbf{{{}}}"):
            lines.append(" & ".join([*map(_tex, head), *cells]) + r" \\")
        columns = "l" * len(self.head) + "r" * len(self.names)
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                rf"  \caption{{{_tex(self.title)}}}",
                rf"  \begin{{tabular}}{{{columns}}}",
                r"    \toprule",
                *("    " + line for line in lines),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def _cells(self, best_form: str) -> list[tuple[tuple[str, ...], list[str]]]:
        """Text of the cells; of runs that are compared, the best value of each column stands
        out."""
        best = []
        for column in zip(*(cells for _, cells in self.rows), strict=True):
            values = [cell["value"] for cell in column if cell["value"] is not None]
            best.append(max(values) if len(values) > 1 and self.head == ("model",) else None)
        return [
            (
                head,
                [
                    best_form.format(_text(cell)) if _is(cell["value"], top) else _text(cell)
                    for cell, top in zip(cells, best, strict=True)
                ],
            )
            for head, cells in self.rows
        ]


def read_evaluations(runs: Sequence[Path], file: str = "evaluation.json") -> dict[str, Any]:
    """The evaluations of run folders, by the folder's name.

    Raises:
        UserError: a folder without one, a file that is not one, two runs of one name.
    """
    found: dict[str, Any] = {}
    for run in runs:
        path = run / file
        name = run.resolve().name
        if name in found:
            raise UserError(f"{run}: two runs are called '{name}': rename one of the folders")
        try:
            evaluation = json.loads(path.read_text())
            for measure in MEASURES:
                measure.get(evaluation)
        except FileNotFoundError as error:
            raise UserError(f"{run}: no {file} in it: run `hirescam evaluate {run}`") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not an evaluation ({error}): run `hirescam evaluate {run}` again"
            ) from error
        found[name] = evaluation
    if not found:
        raise UserError("name at least one run folder")
    return found


def tables(evaluations: dict[str, Any], split: str = "test") -> dict[str, Table]:
    """{"models": a row a run, "labels": a row a label and run, "organs": a row an organ and run}

    Under all but the first stands the name of the run too.
    """
    names = tuple(measure.name for measure in MEASURES)

    def cells(evaluation: dict[str, Any], part: str, key: str | None) -> tuple[Interval, ...]:
        results = [measure.get(evaluation) for measure in MEASURES]
        return tuple(
            ((r or {}).get(part, MISSING) if key is None else (r or {}).get(part, {}).get(key))
            or MISSING
            for r in results
        )

    def keys(part: str) -> list[str]:
        found = [m.get(e) or {} for e in evaluations.values() for m in MEASURES]
        return list(dict.fromkeys(key for result in found for key in result.get(part, {})))

    volumes = {e["volumes"] for e in evaluations.values()}
    count = f"{volumes.pop()} volumes" if len(volumes) == 1 else "volumes differ between the runs"
    note = f"{split} split, {count}; 95 % intervals"
    built = {
        "models": Table(
            f"Mean over labels, {note}.",
            ("model",),
            names,
            tuple(((name,), cells(e, "mean", None)) for name, e in evaluations.items()),
        )
    }
    for title, part, row in (("labels", "labels", "label"), ("organs", "regions", "organ")):
        rows = tuple(
            ((key, name), cells(e, part, key))
            for key in keys(part)
            for name, e in evaluations.items()
        )
        if rows:
            built[title] = Table(f"By {row}, {note}.", (row, "model"), names, rows)
    return built


def write_tables(evaluations: dict[str, Any], out: Path) -> list[Path]:
    """Writes models, labels and organs as .csv, .md and .tex; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables(evaluations).items():
        for suffix, text in (
            ("csv", table.csv()),
            ("md", table.markdown()),
            ("tex", table.latex()),
        ):
            path = out / f"{name}.{suffix}"
            with atomic_file(path) as temporary:
                temporary.write_text(text)
            written.append(path)
    return written


def _text(interval: Interval) -> str:
    if interval["value"] is None:
        return "–"
    if interval.get("low") is None:
        return f"{interval['value']:.3f}"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _is(value: float | None, best: float | None) -> bool:
    return value is not None and best is not None and round(value, 3) == round(best, 3)


def _tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&")):
        text = text.replace(plain, escaped)
    return text
