"""The table of findings of `NiftiFolder` and `DicomFolder`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hirescam_jax.data.readers.tables import Table, keep_patients_whole, pair, read_table
from hirescam_jax.data.study import ANYWHERE, SPLITS, Reject, Study
from hirescam_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """A table of findings by region, as `read_findings` reads it."""

    path: Path
    labels: tuple[str, ...]
    regions: tuple[str, ...]
    table: Table
    findings: dict[str, UInt8[np.ndarray, "K R"]]


def read_findings(path: Path, label_regions: Mapping[str, Sequence[str]]) -> Findings:
    """Reads the table of `NiftiFolder` and `DicomFolder`: id, one column a label, optional
    `label@region`, `patient` and `split` columns.

    A label that is 1 in no region of its row was found in the `label_regions` of the label, or
    ANYWHERE. Rejects go to `table.rejects`.

    Raises:
        UserError: as `read_table`; no label at all; a label of `label_regions` without a column.
    """
    table = read_table(path, "id", optional=("patient", "split"), binary=lambda column: True)
    places: dict[str, tuple[str, str]] = {}
    for column in table.binary_columns:
        label, at, region = column.partition("@")
        if not label or (at and not region):
            raise UserError(f"{path}: column '{column}': name it label or label@region")
        if at:
            places[column] = (label, region)
    labels = tuple(
        dict.fromkeys(c if c not in places else places[c][0] for c in table.binary_columns)
    )
    if not labels:
        raise UserError(f"{path}: no label: add one column of 0 and 1 a label")
    for label, names in label_regions.items():
        if label not in labels or isinstance(names, str):
            what = "no such column" if label not in labels else "its regions are no list"
            raise UserError(
                f"{path}: label_regions: '{label}': {what} (labels: {', '.join(labels)})"
            )
    named = [region for _, region in places.values()]
    named += [region for names in label_regions.values() for region in names]
    regions = (*dict.fromkeys(region for region in named if region != ANYWHERE), ANYWHERE)
    findings = {}
    for key, row in list(table.rows.items()):
        marks = dict(zip(table.binary_columns, row.binary.tolist(), strict=True))
        found = np.zeros((len(labels), len(regions)), np.uint8)
        reason = ""
        for column, (label, region) in places.items():
            found[labels.index(label), regions.index(region)] |= marks[column]
            if marks[column] and marks.get(label) == 0:
                reason = f"'{column}' is 1 but '{label}' is 0: correct one of them"
        for k, label in enumerate(labels):
            if marks.get(label) and not found[k].any():
                for region in label_regions.get(label) or (ANYWHERE,):
                    found[k, regions.index(region)] = 1
        split = row.text.get("split", "")
        if split not in ("", *SPLITS):
            reason = f"split '{split}' is unknown: write train, val or test, or nothing"
        if reason:
            del table.rows[key]
            table.rejects.append(Reject(key, f"{path}: row {row.line}: {reason}"))
        else:
            findings[key] = found
    needed = ANYWHERE in named or any(found[:, -1].any() for found in findings.values())
    if len(regions) > 1 and not needed:
        regions = regions[:-1]
        findings = {key: found[:, :-1] for key, found in findings.items()}
    return Findings(path, labels, regions, table, findings)


def studies_of(
    findings: Findings,
    files: Mapping[str, tuple[Path, ...]],
    expected: Callable[[str], str],
    patient_of: Callable[[str], str] = lambda key: key,
) -> tuple[list[Study], list[Reject]]:
    """The studies of a table of findings, and the rejects.

    Args:
        findings: of `read_findings`.
        files: id -> what its voxels are read from.
        expected: id -> what a missing file would be called.
        patient_of: id -> patient, where the table does not say.
    """
    table = findings.table
    ids, rejects = pair(table, {key: paths[0] for key, paths in files.items()}, expected)
    studies = []
    for key in ids:
        text = table.rows[key].text
        patient = text.get("patient") or patient_of(key)
        split = text.get("split") or None
        studies.append(Study(key, patient, split, files[key], findings.findings[key]))
    studies, parted = keep_patients_whole(studies, findings.path)
    return studies, rejects + parted
