"""A table of intervals as CSV (all figures, for programs), Markdown and LaTeX (for people)."""

import csv
import dataclasses
import io
from typing import Any

# {"value", "low", "high"}, each None where it is not defined. Also "form", a format specification;
# "holds", where the cell is of a map: whether it accounts for the score; "labels": how many are in
# the mean, and "usual": in the others of its row; "other": whether it is of other volumes; and
# "compared": whether it may be the best of its column.
Interval = dict[str, Any]
MISSING: Interval = {"value": None, "low": None, "high": None}

CSV_NAMES = {"value": "", "low": "low", "high": "high", "labels": "labels", "holds": "guaranteed"}
LONG = 40  # rows; more are not on one page
MARK, OTHER = "†", "‡"
NO_GUARANTEE = (
    f"{MARK} By this head the map need not account for the score: it may lie where the model did "
    "not look, in the organ or not."
)
TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MARK: r"$^\dagger$",
    OTHER: r"$^\ddagger$",
    "×": r"$\times$",
    **{character: f"\\{character}" for character in "#$%&_"},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of intervals.

    head: names of the columns of text, `names` of those of intervals.
    rows: (texts, intervals).
    better: of each interval's column 1 where the largest value is to stand out, -1 where the
        smallest, 0 for none; () for none at all.
    notes: lines below.
    """

    title: str
    head: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Interval, ...]], ...]
    better: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def without_empty(self) -> "Table":
        """Without the columns that have no value or no text at all."""
        texts = [i for i in range(len(self.head)) if any(head[i] for head, _ in self.rows)]
        kept = [
            column
            for column in range(len(self.names))
            if any(cells[column]["value"] is not None for _, cells in self.rows)
        ]
        return dataclasses.replace(
            self,
            head=tuple(self.head[i] for i in texts),
            names=tuple(self.names[column] for column in kept),
            rows=tuple(
                (tuple(head[i] for i in texts), tuple(cells[c] for c in kept))
                for head, cells in self.rows
            ),
            better=tuple(self.better[column] for column in kept) if self.better else (),
        )

    def csv(self) -> str:
        """A column each for a measure's value and the ends of its interval, empty if missing; for
        means over how many labels, and for maps whether they must account for the score."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        columns = list(zip(*(cells for _, cells in self.rows), strict=True))
        parts = [[k for k in CSV_NAMES if any(k in cell for cell in cells)] for cells in columns]
        titles = [
            f"{name} {CSV_NAMES[key]}".strip()
            for name, keys in zip(self.names, parts, strict=True)
            for key in keys
        ]
        writer.writerow([*self.head, *titles])
        for head, cells in self.rows:
            figures = [cell.get(k) for cell, keys in zip(cells, parts, strict=True) for k in keys]
            writer.writerow([*head, *map(_csv, figures)])
        return out.getvalue()

    def markdown(self) -> str:
        lines = [[*self.head, *self.names], ["---"] * len(self.head) + ["--:"] * len(self.names)]
        for head, cells in self._cells("**{}**"):
            lines.append([text.replace("|", "\\|") for text in (*head, *cells)])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([self.title, table, *self._notes()]) + "\n"

    def latex(self) -> str:
        """A booktabs `table`, or a `longtable` where it is longer than a page."""
        head = " & ".join(map(_tex, [*self.head, *self.names])) + r" \\"
        lines = [
            # A bracket at the start of a row would be an option of the one before.
            " & ".join([*map(_tex, head), *cells]).replace("[", "{[}", head[0][:1] == "[") + r" \\"
            for head, cells in self._cells(r"\textbf{{{}}}", _tex)
        ]
        columns = "l" * len(self.head) + "r" * len(self.names)
        caption = rf"\caption{{{_tex(' '.join([self.title, *self._notes()]))}}}"
        rule, end = r"\midrule", r"\bottomrule"
        if len(lines) > LONG:
            needs = "% needs \\usepackage{booktabs, longtable}"
            top = [rf"{caption} \\", r"\toprule", head, rule, r"\endfirsthead"]
            again = [r"\toprule", head, rule, r"\endhead", end, r"\endfoot"]
            inner = [*top, *again, *lines]
            parts = [rf"\begin{{longtable}}{{{columns}}}", *_in(inner), r"\end{longtable}"]
            return "\n".join([needs, "{\\scriptsize", *parts, "}", ""])
        inner = [r"\toprule", head, rule, *lines, end]
        parts = [
            r"\centering",
            caption,
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            *_in([rf"\begin{{tabular}}{{{columns}}}", *_in(inner), r"\end{tabular}}"]),
        ]
        needs = "% needs \\usepackage{booktabs, graphicx}"
        return "\n".join([needs, r"\begin{table}", *_in(parts), r"\end{table}", ""])

    def _notes(self) -> list[str]:
        marked = any(_unsure(cell) for _, cells in self.rows for cell in cells)
        return [*self.notes, *[NO_GUARANTEE] * marked]

    def _cells(self, best_form: str, escape: Any = str) -> list[tuple[tuple[str, ...], list[str]]]:
        """Text of the cells; the best value of each column that is compared stands out."""
        best: list[float | None] = [None] * len(self.names)
        for column, sign in enumerate(self.better):
            compared = [cells[column] for _, cells in self.rows if _comparable(cells[column])]
            known = [sign * cell["value"] for cell in compared if sign]
            best[column] = sign * max(known) if len(known) > 1 else None

        def text(cell: Interval, top: float | None) -> str:
            plain = escape(interval_text(cell))
            best_one = _comparable(cell) and _is(cell["value"], top)
            shown = best_form.format(plain) if best_one else plain
            shown += escape(MARK) * _unsure(cell)
            return shown + escape(OTHER) * bool(cell.get("other"))

        return [
            (head, [text(cell, top) for cell, top in zip(cells, best, strict=True)])
            for head, cells in self.rows
        ]


def interval_text(cell: Interval) -> str:
    """ "0.812 [0.790, 0.833]", or "–" where it is not defined."""
    if cell["value"] is None:
        return "–"
    form = cell.get("form", ".3f")
    text = f"{cell['value']:{form}}"
    if cell.get("low") is not None:
        text += f" [{cell['low']:{form}}, {cell['high']:{form}}]"
    if cell.get("labels") != cell.get("usual"):
        text += f" ({cell['labels']} label{'s' * (cell['labels'] != 1)})"
    return text


def _comparable(cell: Interval) -> bool:
    """Whether it may be the best of its column: not a mean over fewer labels, nor of a map that
    need not account for the score."""
    alike = cell.get("labels") == cell.get("usual") and cell.get("compared", True)
    return cell["value"] is not None and alike and not _unsure(cell)


def _csv(figure: float | None) -> str:
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    return "" if figure is None else f"{figure:.6g}"


def _unsure(cell: Interval) -> bool:
    return cell["value"] is not None and cell.get("holds") is False


def _is(value: float | None, best: float | None) -> bool:
    return value is not None and best is not None and round(value, 3) == round(best, 3)


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


def _in(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]
