"""Finished runs -> the papers' tables: overall, a label a row and an organ a row; against lesions;
the ways of bringing masks to the grid; and the differences between the runs.

Each as CSV (all figures, for programs), Markdown and LaTeX (for people and papers).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hirescam_jax.config import measured_alike, wherever_trained
from hirescam_jax.differences import difference_tables
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.run import Header
from hirescam_jax.summary_text import LESION_MEASURES, MAP_NAMES
from hirescam_jax.table_text import MISSING, Interval, Table
from hirescam_jax.values import Values

EVALUATION = "evaluation.json"
KINDS = ("models", "labels", "organs", "lesions", "masks", "differences", "differences_labels")
IN_SAMPLE = (
    "The thresholds of the maps are chosen on this split: its OrganIoU is in-sample, and higher "
    "than on other volumes."
)
OTHER_VOLUMES = "‡ Measured on other volumes than the first model."


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column.

    get: an evaluation -> the measure's {"mean": ..., "labels": ..., ...}, or None.
    better: 1 if more is better, -1 if less, 0 if neither.
    map: the model's map that it is of, if any.
    """

    name: str
    get: Callable[[dict[str, Any]], dict[str, Any] | None]
    better: int = 1
    map: str = ""


def _organ_iou(name: str) -> Measure:
    own = name in ("hirescam", "gradcam")
    title = f"OrganIoU {MAP_NAMES[name]}"
    return Measure(title, lambda e: e["organ_iou"].get(name), int(own), name if own else "")


MEASURES = (
    Measure("AUROC", lambda e: e["auroc"]),
    Measure("average precision", lambda e: e["average_precision"]),
    Measure(
        "calibration error",
        lambda e: e.get("calibration", {}).get("expected_calibration_error"),
        better=-1,
    ),
    *map(_organ_iou, MAP_NAMES),
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
        ours, theirs = (_labels(evaluations[n]) for n in (first, name))
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


def _labels(evaluation: Any) -> list[str]:
    return list(evaluation["auroc"]["labels"])


def _split(evaluation: Any) -> str:
    return evaluation.get("split", "test")


def all_tables(runs: Sequence[Path], against: str = "") -> dict[str, Table]:
    """`tables` and `mask_tables` of run folders, and their differences from one of them, where
    their evaluations hold the values of each volume (`hirescam_jax.differences`).

    Raises:
        UserError: as `read_evaluations`; no run is called `against`, or it cannot be compared.
    """
    evaluations = read_evaluations(runs)
    paths = {run.resolve().name: run for run in runs}
    headers = {name: Header.read(p) for name, p in paths.items() if (p / "run.json").exists()}
    built = tables(evaluations) | mask_tables(evaluations, headers)
    split = _split(next(iter(evaluations.values())))
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
        built |= difference_tables(values, against, split)
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
    first = next(iter(evaluations.values()))
    shown = {n: n if _same_volumes(e, first) else f"{n} ‡" for n, e in evaluations.items()}
    notes = (
        *[IN_SAMPLE] * (split == "validation"),
        *[OTHER_VOLUMES] * (shown.keys() != set(shown.values())),
    )
    notes += tuple(_undefined(first))
    volumes = {e["volumes"] for e in evaluations.values()}
    count = f"{volumes.pop()} volumes" if len(volumes) == 1 else "volumes differ between the runs"
    note = f"{split} split, {count}; 95 % intervals"

    def keys(part: str) -> list[str]:
        found = [m.get(e) or {} for e in evaluations.values() for m in MEASURES]
        return list(dict.fromkeys(key for result in found for key in result.get(part, {})))

    models = Table(
        f"Means over labels, {note}.",
        ("model", "labels", "head"),
        (*names, "unexplained score"),
        tuple(
            (
                (shown[name], _of_labels(e), (e.get("head") or {}).get("kind", "")),
                (*(_cell(e, m, "mean") for m in MEASURES), _residual(e)),
            )
            for name, e in evaluations.items()
        ),
        (*(measure.better for measure in MEASURES), 0),
        notes,
    )
    built = {"models": models}
    for title, part, head in (
        ("labels", "labels", ("label", "model")),
        ("organs", "regions", ("organ", "model", "pairs")),
    ):
        rows = []
        for key in keys(part):
            for name, e in evaluations.items():
                texts = [key, shown[name], *[_pairs(e, key)] * (title == "organs")]
                rows.append((tuple(texts), tuple(_cell(e, m, part, key) for m in MEASURES)))
        if rows:
            text = f"By {head[0]}, {note}."
            built[title] = Table(text, head, names, tuple(rows), notes=notes)
    lesions = _lesions(evaluations, shown)
    if lesions:
        text = f"Maps against lesions, means over labels, {note}."
        columns = tuple(LESION_MEASURES.values())
        built["lesions"] = Table(text, ("model", "map"), columns, lesions, notes=notes)
    return {name: table.without_empty() for name, table in built.items()}


def _undefined(evaluation: Any) -> Iterator[str]:
    found = evaluation["organ_iou"].get("hirescam") or {}
    if found.get("undefined_pairs"):
        yield (
            f"OrganIoU is over {found['pairs']} pairs of a volume and a finding; "
            f"{found['undefined_pairs']} more have an organ without a cell or of all cells, or a "
            "label without a threshold (of the first model's HiResCAM maps)."
        )


def _same_volumes(evaluation: Any, first: Any) -> bool:
    return all(evaluation.get(key) == first.get(key) for key in ("content", "volumes"))


def _cell(evaluation: Any, measure: Measure, part: str, key: str | None = None) -> Interval:
    found = (measure.get(evaluation) or {}).get(part, MISSING if key is None else {})
    cell = found if key is None else found.get(key, MISSING)
    cell = {end: cell[end] for end in ("value", "low", "high")}
    if key is None:
        usual = _defined(evaluation, MEASURES[0])
        cell |= {"labels": _defined(evaluation, measure), "usual": usual}
    return cell | _guarantee(evaluation, measure.map)


def _guarantee(evaluation: Any, name: str) -> dict[str, bool]:
    maps = (evaluation.get("head") or {}).get("maps", {})
    return {"holds": bool(maps[name]["holds"])} if name in maps else {}


def _residual(evaluation: Any) -> Interval:
    found = evaluation.get("completeness")
    return MISSING if not found else MISSING | {"value": float(found["mean"]), "form": ".1e"}


def _pairs(evaluation: Any, organ: str) -> str:
    found = (evaluation["organ_iou"].get("hirescam") or {}).get("regions", {}).get(organ, {})
    return str(found.get("pairs", ""))


def _of_labels(evaluation: Any) -> str:
    return f"{_defined(evaluation, MEASURES[0])} of {len(_labels(evaluation))}"


def _defined(evaluation: Any, measure: Measure) -> int:
    """How many labels are in the mean."""
    found = measure.get(evaluation) or {"labels": {}}
    known = sum(cell["value"] is not None for cell in found["labels"].values())
    return found.get("defined", known)


def _lesions(evaluations: Mapping[str, Any], shown: Mapping[str, str]) -> tuple:
    rows = []
    for name, evaluation in evaluations.items():
        found = evaluation.get("lesions") or {}
        for of_map in [*MAP_NAMES, *(found.keys() - MAP_NAMES.keys())]:
            if of_map not in found:
                continue
            measures = found[of_map]
            cells = (
                {end: measures[key]["mean"][end] for end in ("value", "low", "high")}
                | _guarantee(evaluation, of_map)
                for key in LESION_MEASURES
            )
            rows.append(((shown[name], MAP_NAMES.get(of_map, of_map)), tuple(cells)))
    return tuple(rows)


def mask_tables(evaluations: Mapping[str, Any], headers: Mapping[str, Header]) -> dict[str, Table]:
    """How the masks of the mask loss come to the grid, as in the paper: a row a method, and columns
    without and with dilation, of runs that differ in nothing else.

    Args:
        headers: of the same runs.
    """
    groups: dict[Any, dict[tuple[str, bool], str]] = {}
    for name, header in headers.items():
        data = header.config.data
        rest = repr((measured_alike(wherever_trained(header.config)), header.labels, header.shape))
        groups.setdefault(rest, {}).setdefault((data.mask_method, data.dilate), name)
    found = [group for group in groups.values() if len(group) > 1]
    shown = [measure for measure in MEASURES if measure.name == "AUROC" or measure.map]
    built = {}
    for number, group in enumerate(found, 1):
        names = tuple(f"{m.name}, {w}" for m in shown for w in ("not dilated", "dilated"))

        def cell(method: str, dilate: bool, measure: Measure, group: Any = group) -> Interval:
            name = group.get((method, dilate))
            return MISSING if name is None else _cell(evaluations[name], measure, "mean")

        rows = tuple(
            ((method,), tuple(cell(method, d, m) for m in shown for d in (False, True)))
            for method in dict.fromkeys(method for method, _ in group)
        )
        title = (
            "Organ masks brought to the feature grid, by method and dilation; means over labels."
        )
        table = Table(title, ("masks by",), names, rows).without_empty()
        built["masks" if number == 1 else f"masks_{number}"] = table
    return built


def write_tables(built: Mapping[str, Table], out: Path) -> list[Path]:
    """Writes each table as .csv, .md and .tex, and removes those of other runs that have no
    successor; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for stem in {*KINDS, *(f"{kind}_validation" for kind in KINDS)} - built.keys():
        for suffix in ("csv", "md", "tex"):
            (out / f"{stem}.{suffix}").unlink(missing_ok=True)
    for name, table in built.items():
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
