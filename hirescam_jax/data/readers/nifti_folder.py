"""A plain folder of NIfTI files with one CSV table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from hirescam_jax.data.readers.findings import read_findings, studies_of
from hirescam_jax.data.readers.tables import list_files
from hirescam_jax.data.study import Reject, Study
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError


class NiftiFolder:
    """`<id>.nii.gz` or `<id>.nii` files side by side, in Hounsfield units, and a CSV table.

    id             the name of the file without .nii.gz; one row a file
    <label>        one column a label: 1 where it is present, else 0
    label@region   optional: 1 where the label was found in this region
    patient        optional: studies of one patient stay in one split; else each id is a patient
    split          optional: train, val, test, or nothing
    """

    def __init__(
        self,
        path: str | Path,
        table: str | Path | None = None,
        label_regions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ):
        """Opens the folder.

        Args:
            path: the folder.
            table: the CSV file; without it the only one in the folder.
            label_regions: label -> its regions, for labels without `label@region` columns;
                where neither says it, a label is found ANYWHERE.

        Raises:
            UserError: no folder, no table, or a table that is wrong as a whole.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder: check the path")
        findings = read_findings(Path(table or _only_table(self.path)), label_regions)
        self.labels, self.regions = findings.labels, findings.regions
        files: dict[str, tuple[Path, ...]] = {}
        twice = []
        for file in list_files(self.path):
            key = file.name.removesuffix(".gz").removesuffix(".nii")
            if file.name not in (f"{key}.nii", f"{key}.nii.gz"):
                continue
            if key in files:
                twice.append(Reject(key, f"{file}: {key}.nii is there too: remove one of them"))
            files[key] = (file,)
        studies, rejects = studies_of(findings, files, lambda key: f"{self.path / key}.nii.gz")
        names = {reject.id for reject in twice}
        self.studies = [study for study in studies if study.id not in names]
        self.rejects = [reject for reject in rejects if reject.id not in names] + twice

    def read(self, study: Study) -> Volume:
        return read_ct(study.files[0])


def _only_table(path: Path) -> Path:
    tables = [file for file in list_files(path) if file.suffix == ".csv"]
    if len(tables) != 1:
        raise UserError(f"{path}: has {len(tables)} CSV files: say which table holds the labels")
    return tables[0]
