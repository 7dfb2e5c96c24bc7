"""A table of intervals as CSV (all figures, for programs), Markdown and LaTeX (for people)."""

import csv
import dataclasses
import io
from collections.abc import Callable

from hirescam_jax.metrics.intervals import Interval
from hirescam_jax.reports.text import interval_text


@dataclasses.dataclass(frozen=True)
class Cell(Interval):
    """An interval in a table.

    form: format specification.
    holds: where it is of a map: whether that accounts for the score.
    labels: how many are in the mean; usual: in the others of its row.
    other: whether it is of other volumes.
    compared: whether it may be the best of its column.
    """

    form: str = ".3f"
    holds: bool | None = None
    labels: int | None = None
    usual: int | None = None
    other: bool = False
    compared: bool = True

    @property
    def text(self) -> str:
        """ "0.812 [0.790, 0.833]", or "–" where it is not defined."""
        text = interval_text(self, self.form, "–")
        if self.value is not None and self.labels != self.usual:
            text += f" ({self.labels} label{'s' * (self.labels != 1)})"
        return text

    @property
    def comparable(self) -> bool:
        """Whether it may be the best of its column: not a mean over fewer labels, nor of a map that
        need not account for the score."""
        alike = self.labels == self.usual and self.compared
        return self.value is not None and alike and not self.unsure

    @property
    def unsure(self) -> bool:
        return self.value is not None and self.holds is False


MISSING = Cell(None, None, None)

ENDS = ("value", "low", "high")
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
    rows: tuple[tuple[tuple[str, ...], tuple[Cell, ...]], ...]
    better: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def without_empty(self) -> "Table":
        """Without the columns that have no value or no text at all."""
        texts = [i for i in range(len(self.head)) if any(head[i] for head, _ in self.rows)]
        kept = [
            column
            for column in range(len(self.names))
            if any(cells[column].value is not None for _, cells in self.rows)
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
        parts = [
            [k for k in CSV_NAMES if k in ENDS or any(getattr(c, k) is not None for c in cells)]
            for cells in columns
        ]
        titles = [
            f"{name} {CSV_NAMES[key]}".strip()
            for name, keys in zip(self.names, parts, strict=True)
            for key in keys
        ]
        writer.writerow([*self.head, *titles])
        for head, cells in self.rows:
            named = zip(cells, parts, strict=True)
            figures = [getattr(cell, key) for cell, keys in named for key in keys]
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
        marked = any(cell.unsure for _, cells in self.rows for cell in cells)
        return [*self.notes, *[NO_GUARANTEE] * marked]

    def _cells(
        self, best_form: str, escape: Callable[[str], str] = str
    ) -> list[tuple[tuple[str, ...], list[str]]]:
        """Text of the cells; the best value of each column that is compared stands out."""
        best: list[float | None] = [None] * len(self.names)
        for column, sign in enumerate(self.better):
            compared = (cells[column] for _, cells in self.rows if cells[column].comparable)
            known = [sign * cell.value for cell in compared if sign and cell.value is not None]
            best[column] = sign * max(known) if len(known) > 1 else None

        def text(cell: Cell, top: float | None) -> str:
            plain = escape(cell.text)
            best_one = cell.comparable and _is(cell.value, top)
            shown = best_form.format(plain) if best_one else plain
            return shown + escape(MARK) * cell.unsure + escape(OTHER) * cell.other

        return [
            (head, [text(cell, top) for cell, top in zip(cells, best, strict=True)])
            for head, cells in self.rows
        ]


def _csv(figure: float | None) -> str:
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    return "" if figure is None else f"{figure:.6g}"


def _is(value: float | None, best: float | None) -> bool:
    return value is not None and best is not None and round(value, 3) == round(best, 3)


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


def _in(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]
