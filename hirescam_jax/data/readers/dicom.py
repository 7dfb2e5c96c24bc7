"""DICOM: a tree of folders, one CT series each."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hirescam_jax.data.readers.dicom_series import import_pydicom, is_dicom, read_dicom_series, tag
from hirescam_jax.data.readers.findings import read_findings, studies_of
from hirescam_jax.data.readers.tables import list_files
from hirescam_jax.data.study import ANYWHERE, Reject, Study
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError


class DicomFolder:
    """A tree of folders, each with the .dcm files of one CT series.

    The id of a series is its folder's path in the tree, with _ for /. The table is that of
    `NiftiFolder` with these ids; without one there are no labels. A patient is the table's, else
    the PatientID of the files.
    """

    def __init__(
        self,
        path: str | Path,
        table: str | Path | None = None,
        label_regions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ):
        """Opens the tree.

        Raises:
            UserError: pydicom is missing, no folder, no DICOM file, a table that is wrong as a
                whole.
        """
        import_pydicom()
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder: check the path")
        self.labels: tuple[str, ...] = ()
        self.regions: tuple[str, ...] = (ANYWHERE,)
        self.studies: list[Study] = []
        self.rejects: list[Reject] = []
        named: dict[str, list[Path]] = {}
        for name, inner, _ in os.walk(self.path):
            inner[:] = sorted(entry for entry in inner if not entry.startswith("."))
            if any(is_dicom(file) for file in list_files(Path(name))):
                parts = Path(name).relative_to(self.path).parts or (self.path.resolve().name,)
                named.setdefault("_".join(parts), []).append(Path(name))
        if not named:
            raise UserError(f"{self.path}: no DICOM files in it: check the path")
        folders = {key: (found[0],) for key, found in named.items() if len(found) == 1}
        for key, found in named.items():
            if len(found) > 1:
                reason = f"{found[0]}: '{key}' would name {found[1]} too: rename one of them"
                self.rejects.append(Reject(key, reason))
        patients = {key: _patient(folder) or key for key, (folder,) in folders.items()}
        if table is None:
            nothing = np.zeros((0, 1), np.uint8)
            self.studies = [Study(k, patients[k], None, folders[k], nothing) for k in folders]
            return
        findings = read_findings(Path(table), label_regions)
        self.labels, self.regions = findings.labels, findings.regions
        self.studies, rejects = studies_of(
            findings, folders, lambda key: f"{self.path}: folder {key}", patients.__getitem__
        )
        ambiguous = {reject.id for reject in self.rejects}
        self.rejects += [reject for reject in rejects if reject.id not in ambiguous]

    def read(self, study: Study) -> Volume:
        return read_dicom_series(study.files[0])


def _patient(folder: Path) -> str:
    """The PatientID of the first file that has one; a damaged file is named by `read`."""
    for file in list_files(folder):
        if is_dicom(file):
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                head = import_pydicom().dcmread(
                    file, stop_before_pixels=True, specific_tags=["PatientID"]
                )
                if patient := tag(head, "PatientID", ""):
                    return str(patient)
    return ""
