"""One reader a published data set or file format."""

import inspect
from pathlib import Path
from typing import Any

from hirescam_jax.data.readers.ct_rate import CTRate
from hirescam_jax.data.readers.dicom import DicomFolder
from hirescam_jax.data.readers.medmnist import MedMNIST
from hirescam_jax.data.readers.nifti_folder import NiftiFolder
from hirescam_jax.data.readers.rad_chestct import RadChestCT
from hirescam_jax.data.study import Reader
from hirescam_jax.errors import UserError

READERS = {
    "rad-chestct": RadChestCT,
    "ct-rate": CTRate,
    "nifti": NiftiFolder,
    "dicom": DicomFolder,
    "medmnist": MedMNIST,
}


def open_reader(kind: str, path: Path, **options: Any) -> Reader:
    """A data set of one of the `READERS`.

    Raises:
        UserError: an option that this reader does not have, or data that it cannot open.
    """
    for name in options:
        if name not in inspect.signature(READERS[kind]).parameters:
            raise UserError(f"--{name.replace('_', '-')}: {kind} has no such option")
    return READERS[kind](path, **options)
