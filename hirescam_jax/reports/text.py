"""Texts that tables and pages share: aligned columns, intervals, names of maps."""

from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.metrics.intervals import Interval

# As tables call them. The first are maps of the model.
MAP_NAMES = {
    **{name: METHODS[name].title for name in EVALUATED},
    "organ_prior": "organ prior",
    "centre_blob": "centre blob",
    "random": "random map",
}


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as a table: a rule below the first, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def interval_text(interval: Interval, form: str = ".3f", missing: str = "n/a") -> str:
    """ "0.812 [0.790, 0.833]"; `missing` where the measure is not defined."""
    if interval.value is None:
        return missing
    if interval.low is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def map_name(name: str) -> str:
    """As tables call it."""
    return MAP_NAMES.get(name) or name
