"""The papers' table of how the masks of the mask loss come to the grid."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hirescam_jax.config import Config, measured_alike, wherever_trained
from hirescam_jax.evaluation.result import RunEvaluation
from hirescam_jax.evaluation.tables.cells import MEASURES, Measure, about, mean_cell, others
from hirescam_jax.reports.tables import MISSING, Cell, Table
from hirescam_jax.runs.config_files import to_json
from hirescam_jax.runs.run import Header

Way = tuple[str, bool]  # the method, and whether masks are dilated


def mask_tables(
    evaluations: Mapping[str, RunEvaluation], headers: Mapping[str, Header], split: str = "test"
) -> dict[str, Table]:
    """How the masks of the mask loss come to the grid, as in the paper: a row a method, and columns
    without and with dilation, of runs that differ in nothing else. "masks", and "masks_2" and so on
    where there are several sets of such runs (of two seeds, say), whose titles tell them apart.

    Args:
        headers: of the same runs.
        split: that the evaluations are of.
    """
    groups: dict[str, dict[Way, str]] = {}
    for name, header in headers.items():
        data = header.config.data
        rest = repr((_shared(header.config), header.labels, header.shape))
        groups.setdefault(rest, {}).setdefault((data.mask_method, data.dilate), name)
    found = [group for group in groups.values() if len(group) > 1]
    told = _differences([headers[next(iter(group.values()))].config for group in found])
    built = {}
    for number, (group, apart) in enumerate(zip(found, told, strict=True), 1):
        table = _of_group(group, evaluations, split, apart)
        if len(found) > 1:
            runs = f"Runs: {', '.join(group.values())}."
            table = dataclasses.replace(table, notes=(*table.notes, runs))
        built["masks" if number == 1 else f"masks_{number}"] = table
    return built


def _of_group(
    group: Mapping[Way, str], evaluations: Mapping[str, RunEvaluation], split: str, apart: str
) -> Table:
    own = {name: evaluations[name] for name in group.values()}
    note, notes = about(own, split)
    marked = others(own)
    shown = [measure for measure in MEASURES if measure.name == "AUROC" or measure.map]
    names = tuple(f"{m.name}, {w}" for m in shown for w in ("not dilated", "dilated"))

    def cell(method: str, dilate: bool, measure: Measure) -> Cell:
        name = group.get((method, dilate))
        if name is None:
            return MISSING
        return dataclasses.replace(mean_cell(own[name], measure), other=name in marked)

    rows = tuple(
        ((method,), tuple(cell(method, d, m) for m in shown for d in (False, True)))
        for method in dict.fromkeys(method for method, _ in group)
    )
    title = (
        f"Organ masks brought to the feature grid, by method and dilation{apart}; means over "
        f"labels, {note}."
    )
    return Table(title, ("masks by",), names, rows, notes=notes).without_empty()


def _shared(config: Config) -> Config:
    return measured_alike(wherever_trained(config))


def _differences(found: Sequence[Config]) -> list[str]:
    """Of each config what not all have, as "; seed 1"; "" where nothing differs. Fields of a part
    (the model, say) are compared with those of parts of the same kind."""
    flat = [_flat(json.loads(to_json(_shared(config)))) for config in found]

    def differs(fields: Mapping[str, str], name: str) -> bool:
        part = name.removesuffix(".type").rpartition(".")[0]
        kind = f"{part}.type".removeprefix(".")
        alike = [other for other in flat if other.get(kind) == fields[kind]]
        return any(other.get(name) != fields[name] for other in alike)

    return [
        "".join(f"; {n.removesuffix('.type')} {f[n]}" for n in f if differs(f, n)) for f in flat
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"data.path": text, ...} of a nested dict."""
    fields: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return fields
