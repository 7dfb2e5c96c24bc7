"""Phantom patients as files: NIfTI volumes with their masks, and a table of the findings."""

import csv
from pathlib import Path

import nibabel
import numpy as np

from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig
from hirescam_jax.errors import UserError
from hirescam_jax.files import new_folder
from hirescam_jax.progress import progress


def export(out: Path, config: PhantomConfig, split: str, size: int) -> None:
    """Writes `<id>.nii.gz` (CT, int16 Hounsfield units), `masks/<id>_regions.nii.gz` (1 + number
    of the region), `masks/<id>_lesions.nii.gz` (1 + number of the label) and `findings.csv`.

    Raises:
        UserError: `out` exists, or a size, shape or seed that cannot be.
    """
    try:
        phantom = Phantom(config, split, size, (1, 1, 1))
    except ValueError as error:
        raise UserError(str(error)) from error
    new_folder(out)
    (out / "masks").mkdir()
    rows = []
    for i in progress(range(size), "drawing patients", "patient"):
        case = phantom.case(i)
        name = f"phantom_{split}_{i:04d}"
        _save(out / f"{name}.nii.gz", case.volume, case.affine)
        for kind, masks in (("regions", case.regions), ("lesions", case.lesions)):
            numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None, None]
            _save(out / "masks" / f"{name}_{kind}.nii.gz", (masks * numbers).max(0), case.affine)
        places = {
            f"{label}@{region}": int(case.findings[k, r])
            for k, label in enumerate(phantom.labels)
            for r, region in enumerate(phantom.regions)
        }
        present = dict(zip(phantom.labels, case.findings.max(1).tolist(), strict=True))
        rows.append({"id": name, **present, **places})
    with (out / "findings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"])
        writer.writeheader()
        writer.writerows(rows)


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
