"""The reader of DICOM, on files in their real layout."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

from hirescam_jax.data.readers import DicomFolder
from hirescam_jax.data.readers.dicom_series import read_dicom_series
from tests.data.readers.raw_files import fails, found, reasons, thorax, write_csv


def write_series(
    folder: Path,
    voxels: np.ndarray,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, ...] = (-40, -50, -60),
    step: tuple[float, ...] = (0, 0, 3),
    intercept: float = -1024,
    slices: range | list[int] | None = None,
    **tags: object,
) -> Path:
    """voxels [columns, rows, slices] in Hounsfield units, as one file a slice, shuffled names."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    for k in slices if slices is not None else range(voxels.shape[2]):
        name = f"{(k * 7) % 101:03d}.dcm"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset(str(folder / name), {}, file_meta=meta, preamble=bytes(128))
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.Modality, image.PatientID, image.SeriesInstanceUID = "CT", "someone", "1.2.3"
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.Columns, image.Rows = voxels.shape[:2]
        image.PixelSpacing = [0.75, 0.5]  # between rows, between columns
        image.ImageOrientationPatient = list(orientation)
        image.ImagePositionPatient = [float(o + k * s) for o, s in zip(origin, step, strict=True)]
        image.RescaleSlope, image.RescaleIntercept = 1, intercept
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 1
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.PixelData = (voxels[:, :, k] - intercept).astype("<i2").T.tobytes()
        for tag, value in tags.items():
            setattr(image, tag, value)
        image.save_as(folder / name)
    return folder


def edit(file: Path, **tags: object) -> None:
    import pydicom

    image = pydicom.dcmread(file)
    for tag, value in tags.items():
        if value is None:
            delattr(image, tag)
        else:
            setattr(image, tag, value)
    image.save_as(file)


def test_dicom_series_is_sorted_scaled_and_placed(tmp_path: Path):
    voxels = thorax()
    voxels[0, 0, 15] = 1234  # lowest column and row, uppermost slice
    volume = read_dicom_series(write_series(tmp_path / "s", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == np.int16
    assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(volume.affine), [0.5, 0.75, 3])
    # In DICOM's LPS it is at (-40, -50, -60 + 15 * 3): x is negative, so patient right.
    (place,) = np.argwhere(volume.voxels == 1234)
    np.testing.assert_allclose(apply_affine(volume.affine, place), [40, 50, -15])
    (downwards,) = [read_dicom_series(write_series(tmp_path / "d", voxels, step=(0, 0, -3)))]
    np.testing.assert_array_equal(downwards.voxels, voxels[:, :, ::-1])
    np.testing.assert_allclose(apply_affine(downwards.affine, [0, 0, 15]), [40, 50, -60])


def test_dicom_in_any_direction(tmp_path: Path):
    """Sagittal slices: columns to the back, rows to the feet, slices to the left."""
    sagittal = write_series(
        tmp_path / "s", thorax(), orientation=(0, 1, 0, 0, 0, -1), step=(-3, 0, 0)
    )
    volume = read_dicom_series(sagittal)
    assert nibabel.aff2axcodes(volume.affine) == ("P", "I", "R")
    angle = np.radians(20)
    oblique = (1.0, 0.0, 0.0, 0.0, np.cos(angle), np.sin(angle))
    along = tuple(float(n) for n in 3 * np.cross(oblique[:3], oblique[3:]))
    volume = read_dicom_series(write_series(tmp_path / "o", thorax(), oblique, step=along))
    axes = volume.affine[:3, :3] / nibabel.affines.voxel_sizes(volume.affine)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(axes[:, 1], [0, -np.cos(angle), np.sin(angle)], atol=1e-9)


def test_dicom_fractional_scaling(tmp_path: Path):
    stored = 2 * thorax() + 2049  # of half a unit each, from -1024
    folder = write_series(tmp_path / "s", stored - np.int16(1024), RescaleSlope=0.5)
    volume = read_dicom_series(folder)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, thorax() + 0.5)


def _compressed(folder: Path) -> None:
    import pydicom

    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        image.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        image.PixelData = pydicom.encaps.encapsulate([b"no decoder reads this"])
        image["PixelData"].VR = "OB"
        image.save_as(file)


def _copy(folder: Path) -> None:
    (folder / "copy.dcm").write_bytes((folder / "000.dcm").read_bytes())


def _second_series(folder: Path) -> None:
    write_series(folder, thorax(), slices=[13], SeriesInstanceUID="1.2.4")


def _cut(folder: Path) -> None:
    file = folder / "000.dcm"
    file.write_bytes(file.read_bytes()[:-50])


def _without(*names: str) -> Any:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def _edited(**tags: object) -> Any:
    return lambda folder: edit(folder / "007.dcm", **tags)


def _all_edited(**tags: object) -> Any:
    return lambda folder: [edit(file, **tags) for file in folder.iterdir()]


BAD_SERIES = {  # slice k is in the file (7 * k) % 101
    "mixed": (_second_series, "mixes 2 series .15 files like 000.dcm, 1 files like"),
    "tilted": (_all_edited(GantryDetectorTilt=15.5), "GantryDetectorTilt is 15.5 degrees"),
    "unequal": (_edited(ImagePositionPatient=[-40, -50, -58]), "unequal slice spacing .2 mm"),
    "missing": (_without("028.dcm", "035.dcm"), "2 slices are missing .9 mm between 021.dcm"),
    "duplicate": (_copy, "duplicate slices, 000.dcm and copy.dcm"),
    "scout": (_edited(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "1 of 16 files are local"),
    "scouts": (_all_edited(ImageType=["DERIVED", "PRIMARY", "LOCALIZER"]), "16 of 16 files"),
    "compressed": (_compressed, "compressed as JPEG 2000.*cannot be decoded here"),
    "cut": (_cut, "000.dcm: its voxels cannot be read"),
    "text": (lambda f: (f / "a.dcm").write_text("hello"), "a.dcm: not a readable DICOM file"),
    "empty": (lambda f: (f / "a.dcm").write_bytes(b""), "a.dcm: not a readable DICOM file"),
    "MR": (_all_edited(Modality="MR"), "Modality is MR, not CT"),
    "no slope": (_edited(RescaleSlope=None), "007.dcm: has no RescaleSlope"),
    "no position": (_edited(ImagePositionPatient=None), "007.dcm: has no ImagePositionPatient"),
    "odd spacing": (_edited(PixelSpacing=[0.75, 0.6]), r"007.dcm: PixelSpacing is .0.75, 0.6."),
    "absurd spacing": (_all_edited(PixelSpacing=[70, 70]), "70 x 70 x 3 mm"),
    "multi-frame": (_edited(NumberOfFrames=3), "007.dcm: is a multi-frame file"),
    "one slice": (_without(*(f"{7 * k % 101:03d}.dcm" for k in range(1, 16))), "only one slice"),
    "nothing": (_without(*(f"{7 * k % 101:03d}.dcm" for k in range(16))), "no DICOM files"),
    "raw values": (_all_edited(RescaleIntercept=0), "look shifted"),
}


@pytest.mark.parametrize("kind", BAD_SERIES)
def test_dicom_bad_series(tmp_path: Path, kind: str):
    folder = write_series(tmp_path / "series", thorax())
    change, words = BAD_SERIES[kind]
    change(folder)
    with fails(words, folder):
        read_dicom_series(folder)


def test_dicom_tilt_without_the_tag(tmp_path: Path):
    folder = write_series(tmp_path / "series", thorax(), step=(0, 0.6, 3))
    with fails(r"shift sideways, as of a gantry tilted by 11\.3 degrees", folder):
        read_dicom_series(folder)


def test_dicom_folder(tmp_path: Path):
    tree = tmp_path / "tree"
    write_series(tree / "p1" / "scan", thorax())
    write_series(tree / "p2" / "scan", thorax(seed=1), PatientID="other")
    write_series(tree / "p3" / "scan", thorax(), PatientID="other")
    write_series(tree / "p4", thorax())
    (tree / "p4" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tree / "notes").mkdir()
    (tree / "notes" / "readme.txt").write_text("no DICOM")
    alone = DicomFolder(tree)
    assert [s.id for s in alone.studies] == ["p1_scan", "p2_scan", "p3_scan", "p4"]
    assert [s.patient for s in alone.studies] == ["someone", "other", "other", "someone"]
    assert alone.labels == ()
    assert alone.studies[0].findings.shape == (0, 1)

    rows = [["p1_scan", 1, "train"], ["p2_scan", 0, "val"], ["p3_scan", 1, "test"], ["p9", 0, ""]]
    table = write_csv(tmp_path / "t.csv", ["id", "nodule", "split"], *rows)
    reader = DicomFolder(tree, table, {"nodule": ["left_lung"]})
    assert [s.id for s in reader.studies] == ["p1_scan"]
    assert found(reader, "p1_scan") == {"nodule": {"left_lung"}}
    why = reasons(reader)
    assert "patient 'other' is in the splits test and val" in why["p2_scan"]
    assert set(why) == {"p2_scan", "p3_scan", "p4", "p9"}
    volume = pickle.loads(pickle.dumps(reader)).read(reader.studies[0])
    np.testing.assert_array_equal(volume.voxels, thorax())
    write_series(tree / "p1_scan", thorax())
    reader = DicomFolder(tree, table)
    assert reader.studies == []
    assert f"'p1_scan' would name {tree / 'p1_scan'} too" in reasons(reader)["p1_scan"]
    assert len(reader.rejects) == 5
    with fails("no DICOM files", tree / "notes"):
        DicomFolder(tree / "notes")


def test_dicom_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with fails(r"pip install 'hirescam_jax\[dicom\]'"):
        DicomFolder(tmp_path)
    with fails(r"pip install 'hirescam_jax\[dicom\]'"):
        read_dicom_series(tmp_path)


def test_real_dicom_agrees_with_its_nifti(real_data: Path):
    """HIRESCAM_TEST_DICOM: the 61 .dcm files of TCGA-34-2605 (see the README of the data)."""
    folder = os.environ.get("HIRESCAM_TEST_DICOM")
    if not folder:
        pytest.skip("no real DICOM: set HIRESCAM_TEST_DICOM to the series of TCGA-34-2605")
    volume = read_dicom_series(Path(folder))
    image = nibabel.load(real_data / "ct" / "tcga_34_2605_ct.nii.gz")
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-4)
    # The NIfTI file has -1024 where the scanner pads its round field of view with -2048.
    np.testing.assert_array_equal(np.maximum(volume.voxels, -1024), np.asarray(image.dataobj))
