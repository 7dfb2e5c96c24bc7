"""The reader of CT-RATE, on files in their real layout."""

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

from hirescam_jax.data.readers import CTRate
from hirescam_jax.data.readers.ct_rate import LABEL_REGIONS
from hirescam_jax.data.study import ANYWHERE
from tests.data.readers.raw_files import (
    LPS,
    fails,
    found,
    reasons,
    save_nifti,
    study,
    thorax,
    write_csv,
)

CT_LABELS = list(LABEL_REGIONS)
CT_ROW = {
    "RescaleSlope": 1,
    "RescaleIntercept": -1024,
    "XYSpacing": "[0.7, 0.8]",
    "ZSpacing": 1.5,
    "ImagePositionPatient": "[-100.5, -90, 30.25]",
    "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
    "Columns": 12,
    "Rows": 14,
    "NumberofSlices": 16,
}
WRONG_HEADER = np.diag([1.0, 1, 9, 1])


def ct_rate(
    path: Path, rows: dict[str, list[str]], tree: str = "", **metadata: dict[str, object]
) -> Path:
    """id -> its positive labels; id -> what its row of metadata says otherwise."""
    root = path / "dataset"
    for part, table in (("train", "train"), ("valid", "validation")):
        chosen = {key: found for key, found in rows.items() if key.startswith(part)}
        labels = [[f"{k}.nii.gz", *(int(n in p) for n in CT_LABELS)] for k, p in chosen.items()]
        name = f"multi_abnormality_labels/{part}_predicted_labels.csv"
        write_csv(root / name, ["VolumeName", *CT_LABELS], *labels)
        found = [[f"{k}.nii.gz", *{**CT_ROW, **metadata.get(k, {})}.values()] for k in chosen]
        write_csv(root / "metadata" / f"{table}_metadata.csv", ["VolumeName", *CT_ROW], *found)
        for i, key in enumerate(chosen):
            scan, patient = key.rsplit("_", 1)[0], key.rsplit("_", 2)[0]
            file = root / f"{part}{tree}" / patient / scan / f"{key}.nii.gz"
            voxels = thorax(seed=i)
            if tree:
                save_nifti(file, voxels, LPS @ np.diag([0.7, 0.7, 1.5, 1]))
            else:
                save_nifti(file, voxels + np.int16(1024), WRONG_HEADER)
    return path


def test_ct_rate_plain(tmp_path: Path):
    ct_rate(
        tmp_path,
        {
            "train_1_a_1": ["Cardiomegaly", "Lung nodule"],
            "train_1_a_2": ["Cardiomegaly", "Lung nodule"],
            "train_20_b_1": [],
            "valid_1_a_1": ["Medical material"],
        },
        train_20_b_1={"RescaleSlope": 2, "RescaleIntercept": -1000.5},
    )
    reader = CTRate(tmp_path)
    assert reader.rejects == []
    assert list(reader.labels) == CT_LABELS
    assert [(s.id, s.patient, s.split) for s in reader.studies] == [
        ("train_1_a_1", "train_1", "train"),
        ("train_1_a_2", "train_1", "train"),
        ("train_20_b_1", "train_20", "train"),
        ("valid_1_a_1", "valid_1", "val"),
    ]
    assert found(reader, "train_1_a_1") == {
        "Cardiomegaly": {"heart_mediastinum"},
        "Lung nodule": {"right_lung", "left_lung"},
    }
    assert found(reader, "valid_1_a_1") == {"Medical material": {ANYWHERE}}
    assert found(CTRate(tmp_path, label_regions={"Cardiomegaly": ["heart"]}), "train_1_a_1") == {
        "Cardiomegaly": {"heart"},
        "Lung nodule": {"right_lung", "left_lung"},
    }

    volume = reader.read(reader.studies[0])
    np.testing.assert_array_equal(volume.voxels, thorax())
    assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
    # DICOM's LPS: the first voxel at (-100.5, -90, 30.25), so 100.5 mm to the right in RAS.
    np.testing.assert_allclose(apply_affine(volume.affine, [0, 0, 0]), [100.5, 90, 30.25])
    np.testing.assert_allclose(
        apply_affine(volume.affine, [10, 10, 10]), [100.5 - 7, 90 - 8, 30.25 + 15]
    )
    scaled = reader.read(study(reader, "train_20_b_1"))
    np.testing.assert_allclose(scaled.voxels, (thorax(seed=2) + 1024.0) * 2 - 1000.5)


def test_ct_rate_labels_are_those_of_the_real_tables(real_data: Path):
    with (real_data / "tables" / "ctclip_report_labels_val.csv").open() as file:
        assert next(csv.reader(file))[1:] == CT_LABELS


def test_ct_rate_reads_the_real_metadata(real_data: Path, tmp_path: Path):
    """Real rows of the metadata, as they are, with volumes of our own."""
    with (real_data / "tables" / "ctrate_validation_metadata.csv").open() as file:
        rows = [row for _, row in zip(range(400), csv.DictReader(file), strict=False)]
    oblique = next(r for r in rows if "1.000000" in r["ImageOrientationPatient"])
    for row in (rows[0], oblique):
        key = row["VolumeName"].removesuffix(".nii.gz")
        ct_rate(tmp_path / key, {key: ["Emphysema"]})
        kept = [row[name] for name in CT_ROW if name not in ("Columns", "Rows", "NumberofSlices")]
        names = [n for n in CT_ROW if n not in ("Columns", "Rows", "NumberofSlices")]
        table = tmp_path / key / "dataset" / "metadata" / "validation_metadata.csv"
        write_csv(table, ["VolumeName", *names], [row["VolumeName"], *kept])
        reader = CTRate(tmp_path / key / "dataset")
        volume = reader.read(reader.studies[0])
        x, y = (float(n) for n in row["XYSpacing"].strip("[]").split(","))
        np.testing.assert_allclose(
            nibabel.affines.voxel_sizes(volume.affine), [x, y, float(row["ZSpacing"])]
        )
        assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")


def test_ct_rate_fixed_believes_the_header(tmp_path: Path):
    ct_rate(tmp_path, {"valid_7_a_1": ["Emphysema"]}, tree="_fixed")
    with fails("no folder train or valid", tmp_path / "dataset"):
        CTRate(tmp_path)
    (tmp_path / "dataset" / "metadata" / "validation_metadata.csv").unlink()
    reader = CTRate(tmp_path, tree="fixed")
    volume = reader.read(reader.studies[0])
    np.testing.assert_array_equal(volume.voxels, thorax())
    np.testing.assert_allclose(volume.affine, LPS @ np.diag([0.7, 0.7, 1.5, 1]), rtol=1e-6)
    file = reader.studies[0].files[0]
    save_nifti(file, thorax() + np.int16(1024))
    with fails("look shifted", file):
        reader.read(reader.studies[0])


BAD_METADATA = {
    "word": ({"RescaleSlope": "one"}, "RescaleSlope is 'one', not a number"),
    "nothing": ({"ZSpacing": ""}, "ZSpacing is ''"),
    "one spacing": ({"XYSpacing": "[0.7]"}, "XYSpacing is '\\[0.7\\]', not 2 numbers"),
    "absurd spacing": ({"ZSpacing": 700}, "0.7 x 0.8 x 700 mm"),
    "infinite": ({"ImagePositionPatient": "[Infinity, 0, 0]"}, "ImagePositionPatient"),
    "no directions": ({"ImageOrientationPatient": "[1, 0, 0, 1, 0, 0]"}, "pair of directions"),
    "short direction": ({"ImageOrientationPatient": "[0, 0, 0, 0, 1, 0]"}, "pair of directions"),
    "other size": ({"NumberofSlices": 17}, r"has shape \(12, 14, 16\), the metadata say"),
    "not applied": ({"RescaleIntercept": 0}, "look shifted"),
}


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_ct_rate_bad_metadata(tmp_path: Path, kind: str):
    entries, words = BAD_METADATA[kind]
    reader = CTRate(ct_rate(tmp_path, {"train_1_a_1": []}, train_1_a_1=entries))
    with fails(words, reader.studies[0].files[0]):
        reader.read(reader.studies[0])


def test_ct_rate_intercept_that_is_applied_already(tmp_path: Path):
    reader = CTRate(ct_rate(tmp_path, {"train_1_a_1": []}))
    voxels = thorax()
    voxels[0, 0, :2] = 2000  # metal
    file = save_nifti(reader.studies[0].files[0], voxels)
    with fails("in Hounsfield units already", file):
        reader.read(reader.studies[0])


def test_ct_rate_tables_and_volumes_that_do_not_match(tmp_path: Path):
    ct_rate(tmp_path, {f"train_{i}_a_1": ["Emphysema"] for i in range(5)})
    root = tmp_path / "dataset"
    volumes = root / "train"
    (volumes / "train_0" / "train_0_a" / "train_0_a_1.nii.gz").unlink()
    save_nifti(volumes / "train_9" / "train_9_a" / "train_9_a_1.nii.gz", thorax())
    metadata = root / "metadata" / "train_metadata.csv"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([*lines[:2], *lines[3:], lines[3]]))  # 1 missing, 2 twice
    reader = CTRate(tmp_path)
    assert [s.id for s in reader.studies] == ["train_3_a_1", "train_4_a_1"]
    why = reasons(reader)
    assert "train_0_a_1.nii.gz is missing" in why["train_0_a_1"]
    assert f"{metadata}: no row of 'train_1_a_1'" in why["train_1_a_1"]
    assert "duplicate VolumeName 'train_2_a_1'" in why["train_2_a_1"]
    assert "no row 'train_9_a_1'" in why["train_9_a_1"]
    with fails("label_regions: 'Cardiomegali' is no label"):
        CTRate(tmp_path, label_regions={"Cardiomegali": ["heart"]})
    labels = root / "multi_abnormality_labels" / "train_predicted_labels.csv"
    write_csv(labels, ["VolumeName", *CT_LABELS[1:]])
    with fails("no column 'Medical material'", labels):
        CTRate(tmp_path)
