"""One reader a published data set or file format."""

from hirescam_jax.data.readers.ct_rate import CTRate
from hirescam_jax.data.readers.dicom import DicomFolder
from hirescam_jax.data.readers.medmnist import MedMNIST
from hirescam_jax.data.readers.nifti_folder import NiftiFolder
from hirescam_jax.data.readers.rad_chestct import RadChestCT

READERS = {
    "rad-chestct": RadChestCT,
    "ct-rate": CTRate,
    "nifti": NiftiFolder,
    "dicom": DicomFolder,
    "medmnist": MedMNIST,
}
