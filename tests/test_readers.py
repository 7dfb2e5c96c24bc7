"""Readers of published data sets, on files in their real layout; orientation by nibabel."""

import contextlib
import csv
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

from hirescam_jax.data.grid import MODEL_AXES, to_grid
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.data.phantom_export import export
from hirescam_jax.data.readers import CTRate, DicomFolder, MedMNIST, NiftiFolder, RadChestCT
from hirescam_jax.data.readers.ct_rate import LABEL_REGIONS
from hirescam_jax.data.readers.dicom_series import read_dicom_series
from hirescam_jax.data.readers.rad_chestct_labels import LOCATIONS, PAPER_LABELS
from hirescam_jax.data.study import ANYWHERE
from hirescam_jax.errors import UserError

LPS = np.diag([-1.0, -1, 1, 1])


def thorax(shape: tuple[int, ...] = (12, 14, 16), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    inside = rng.random(shape) > 0.4
    return np.where(inside, 40 + 60 * rng.normal(size=shape), -900.0).astype(np.int16)


def write_csv(path: Path, header: list[str], *rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    return path


def reasons(reader: Any) -> dict[str, str]:
    assert len({r.id for r in reader.rejects} & {s.id for s in reader.studies}) == 0
    assert not any("\n" in r.reason for r in reader.rejects)
    return {r.id: r.reason for r in reader.rejects}


def study(reader: Any, key: str) -> Any:
    return next(s for s in reader.studies if s.id == key)


def found(reader: Any, key: str) -> dict[str, set[str]]:
    """label -> regions, of one study."""
    marks = study(reader, key).findings
    assert marks.shape == (len(reader.labels), len(reader.regions))
    assert marks.dtype == np.uint8
    return {
        label: {region for r, region in enumerate(reader.regions) if marks[k, r]}
        for k, label in enumerate(reader.labels)
        if marks[k].any()
    }


@contextlib.contextmanager
def fails(message: str, *paths: Path | str) -> Iterator[None]:
    """A UserError of one line with these words and paths."""
    with pytest.raises(UserError, match=message) as error:
        yield
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for path in paths:
        assert str(path) in text


# A folder of NIfTI


def nifti_folder(path: Path, header: list[str], *rows: list[object]) -> Path:
    for row in rows:
        if row and row[0]:
            save_nifti(path / f"{row[0]}.nii.gz", thorax())
    return write_csv(path / "labels.csv", header, *rows)


def test_nifti_folder_of_the_phantom(tmp_path: Path):
    export(tmp_path / "set", PhantomConfig(shape=(16, 20, 20)), "train", 3)
    reader = NiftiFolder(tmp_path / "set", tmp_path / "set" / "findings.csv")
    assert reader.rejects == []
    assert reader.regions == ("right_lung", "left_lung", "heart", "great_vessels", "mediastinum")
    assert len(reader.studies) == 3
    with (tmp_path / "set" / "findings.csv").open() as file:
        for row, item in zip(csv.DictReader(file), reader.studies, strict=True):
            assert item.id == row["id"] == item.patient
            for k, label in enumerate(reader.labels):
                places = [int(row[f"{label}@{region}"]) for region in reader.regions]
                assert item.findings[k].tolist() == places
            volume = reader.read(item)
            file_image = nibabel.load(tmp_path / "set" / f"{item.id}.nii.gz")
            np.testing.assert_array_equal(volume.voxels, np.asarray(file_image.dataobj))
            np.testing.assert_array_equal(volume.affine, file_image.affine)
    assert sum(item.findings.sum() for item in reader.studies) > 3


def test_nifti_folder_columns(tmp_path: Path):
    header = ["id", "nodule", "nodule@left_lung", "mass", "split", "patient", "edema@heart"]
    nifti_folder(
        tmp_path,
        header,
        ["a", 1, 1, 0, "train", "p1", 0],
        ["b", 1, 0, 1, "train", "p1", 1],
        ["c", 0, 0, "1.0", "", "p2", 0],
        ["d", 0, 0, 0, "test", "p3", 0],
    )
    (tmp_path / "notes.txt").write_text("no volume")
    reader = NiftiFolder(tmp_path, label_regions={"mass": ["right_lung", "left_lung"]})
    assert reader.rejects == []
    assert reader.labels == ("nodule", "mass", "edema")
    assert reader.regions == ("left_lung", "heart", "right_lung", ANYWHERE)
    assert found(reader, "a") == {"nodule": {"left_lung"}}
    lungs = {"left_lung", "right_lung"}
    assert found(reader, "b") == {"nodule": {ANYWHERE}, "mass": lungs, "edema": {"heart"}}
    assert found(reader, "c") == {"mass": lungs}
    assert found(reader, "d") == {}
    assert [(s.patient, s.split) for s in reader.studies] == [
        ("p1", "train"),
        ("p1", "train"),
        ("p2", None),
        ("p3", "test"),
    ]
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read(again.studies[0]).voxels, thorax())


def test_bad_rows_are_rejects_that_name_row_and_column(tmp_path: Path):
    table = nifti_folder(
        tmp_path,
        ["id", "nodule", "nodule@heart", "split", "patient"],
        ["good", 1, 1, "", "p0"],
        ["twice", 1, 1, "", "p1"],
        ["twice", 0, 0, "", "p1"],
        ["maybe", 2, 0, "", "p2"],
        ["empty", "", 0, "", "p3"],
        ["contradiction", 0, 1, "", "p4"],
        ["wrong_split", 1, 1, "valid", "p5"],
        ["short", 1],
        ["long", 1, 1, "", "p6", 1],
        ["novolume", 1, 1, "", "p7"],
        ["parted_1", 1, 1, "train", "p8"],
        ["parted_2", 1, 1, "test", "p8"],
        ["both", 1, 1, "", "p9"],
    )
    with table.open("a") as file:
        file.write("../escape,1,1,,p10\n,1,1,,p11\n\n")
    (tmp_path / "novolume.nii.gz").unlink()
    save_nifti(tmp_path / "both.nii", thorax())
    save_nifti(tmp_path / "unlabelled.nii.gz", thorax())
    reader = NiftiFolder(tmp_path, table)
    assert [s.id for s in reader.studies] == ["good"]
    why = reasons(reader)
    expected = {
        "twice": "row 4: duplicate id 'twice', row 3 has it too",
        "maybe": "row 5: column 'nodule' holds '2', not 0 or 1",
        "empty": "row 6: column 'nodule' holds '', not 0 or 1",
        "contradiction": "row 7: 'nodule@heart' is 1 but 'nodule' is 0",
        "wrong_split": "row 8: split 'valid' is unknown: write train, val or test",
        "short": "row 9: 2 entries, the header has 5",
        "long": "row 10: 6 entries, the header has 5",
        "novolume": "novolume.nii.gz is missing",
        "parted_1": "patient 'p8' is in the splits test and train",
        "parted_2": "patient 'p8'",
        "both": "both.nii is there too",
        "../escape": "cannot name a file",
        "row 16": "cannot name a file",
        "unlabelled": f"no row 'unlabelled' in {table}",
    }
    assert set(why) == set(expected)
    for key, words in expected.items():
        assert words in why[key]
        assert str(tmp_path) in why[key]


def test_bad_tables_as_a_whole(tmp_path: Path):
    table = tmp_path / "labels.csv"
    with fails("no such folder", tmp_path / "none"):
        NiftiFolder(tmp_path / "none")
    with fails("0 CSV files", tmp_path):
        NiftiFolder(tmp_path)
    with fails("no such table", table):
        NiftiFolder(tmp_path, table)
    for text, words in (
        ("", "empty"),
        ("name,nodule\na,1\n", "no column 'id'"),
        ("id;nodule\na;1\n", "no column 'id'"),
        ("id,nodule,nodule\na,1,0\n", "2 columns are named 'nodule'"),
        ("id,patient\na,p\n", "no label"),
        ("id,nodule@\na,1\n", "'nodule@': name it"),
    ):
        table.write_text(text)
        with fails(words, table):
            NiftiFolder(tmp_path, table)
    table.write_bytes(b"id,nodule\n\xff\xfe,1\n")
    with fails("UTF-8", table):
        NiftiFolder(tmp_path, table)
    table.write_text("id,nodule\na,1\n")
    with fails("label_regions: 'nodul': no such column"):
        NiftiFolder(tmp_path, table, {"nodul": ["heart"]})
    assert reasons(NiftiFolder(tmp_path, table)).keys() == {"a"}


def test_a_table_saved_by_excel(tmp_path: Path):
    save_nifti(tmp_path / "a.nii", thorax())
    (tmp_path / "t.csv").write_bytes("\ufeffid, nodule\r\na, 1\r\n".encode())
    reader = NiftiFolder(tmp_path)
    assert reader.regions == (ANYWHERE,)
    assert found(reader, "a") == {"nodule": {ANYWHERE}}


# RAD-ChestCT

RAD_TABLE = "img{}_Abnormality_and_Location_Labels.csv"
MARKED = [
    "nodule*right_upper",
    "nodule*right_lung",
    "nodule*left_lung",
    "nodule*lung",
    "nodule*liver",
    "nodule*right",
    "cardiomegaly*heart",
    "calcification*aorta",
    "calcification*svc",
    "lymphadenopathy*hilum",
    "pneumonia*airways",
    "pneumonia*left_lung",
]


def rad_chestct(path: Path, rows: dict[str, list[str]], columns: list[str] = MARKED) -> Path:
    """The public layout; id -> its positive columns."""
    path.mkdir(parents=True, exist_ok=True)
    for part, prefix in (("train", "trn"), ("valid", "val"), ("test", "tst")):
        chosen = {key: found for key, found in rows.items() if key.startswith(prefix)}
        table = [[key, *(int(c in positive) for c in columns)] for key, positive in chosen.items()]
        write_csv(path / RAD_TABLE.format(part), ["NoteAcc_DEID", *columns], *table)
    header = ["VolumeAcc_DEID", "NoteAcc_DEID", "MRN_DEID", "orig_slope", "orig_inter"]
    table = [[f"{key}.npz", key, f"mrn_{key[-1]}", 1, -1024] for key in rows]
    write_csv(path / "CT_Scan_Metadata_Complete_35747.csv", header, *table)
    for i, key in enumerate(rows):
        np.savez_compressed(path / f"{key}.npz", ct=thorax(seed=i))
    return path


def test_rad_chestct_findings_by_region(tmp_path: Path):
    rad_chestct(
        tmp_path,
        {
            "trn00001": ["nodule*right_upper", "nodule*right_lung", "nodule*lung", "nodule*right"],
            "trn00002": ["nodule*lung", "cardiomegaly*heart", "calcification*svc"],
            "val00003": ["nodule*liver", "pneumonia*airways", "lymphadenopathy*hilum"],
            "tst00004": ["nodule*left_lung", "nodule*lung", "pneumonia*left_lung"],
        },
    )
    reader = RadChestCT(tmp_path)
    assert reader.rejects == []
    assert reader.regions == ("right_lung", "left_lung", "heart_mediastinum", ANYWHERE)
    assert reader.labels == (
        "great_vessel_calcification",
        "mediastinum_lymphadenopathy",
        "heart_cardiomegaly",
        "lung_nodule",
        "lung_pneumonia",
        "other_nodule",
    )
    middle, lungs = {"heart_mediastinum"}, {"right_lung", "left_lung"}
    assert found(reader, "trn00001") == {"lung_nodule": {"right_lung"}}
    assert found(reader, "trn00002") == {
        "lung_nodule": lungs,
        "heart_cardiomegaly": middle,
        "great_vessel_calcification": middle,
    }
    assert found(reader, "val00003") == {
        "other_nodule": {ANYWHERE},
        "lung_pneumonia": lungs,
        "mediastinum_lymphadenopathy": middle,
    }
    assert found(reader, "tst00004") == {
        "lung_nodule": {"left_lung"},
        "lung_pneumonia": {"left_lung"},
    }
    assert [(s.patient, s.split) for s in reader.studies] == [
        ("mrn_1", "train"),
        ("mrn_2", "train"),
        ("mrn_3", "val"),
        ("mrn_4", "test"),
    ]


def test_rad_chestct_is_oriented_as_published(tmp_path: Path):
    """Axes: superior to inferior, anterior to posterior, right to left, 0.8 mm."""
    rad_chestct(tmp_path, {"trn00001": ["nodule*lung"]})
    voxels = np.full((20, 20, 20), -1000, np.int16)
    voxels[:5, 5:10, :4] = 500  # top, in front of the middle, patient right
    np.savez_compressed(tmp_path / "trn00001.npz", ct=voxels)
    reader = RadChestCT(tmp_path)
    volume = reader.read(reader.studies[0])
    assert nibabel.aff2axcodes(volume.affine) == ("I", "P", "L") == MODEL_AXES
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(volume.affine), 0.8)
    centre = apply_affine(volume.affine, [9.5, 9.5, 9.5])
    x, y, z = apply_affine(volume.affine, [2, 7, 1.5]) - centre
    assert x > 0  # nibabel's RAS: to the right
    assert y > 0
    assert z > 0
    same, _ = to_grid(volume, (0.8,) * 3, (20, 20, 20))
    np.testing.assert_array_equal(same, voxels)


def test_rad_chestct_counts(tmp_path: Path):
    rows = {
        f"trn{i:05d}": [
            *(["nodule*left_lung"] if i < 3 else []),
            *(["nodule*right_upper"] if i >= 3 else []),
            *(["pneumonia*left_lung"] if i < 5 else []),
            *(["calcification*aorta"] if i % 2 else ["calcification*svc"]),
            *(["cardiomegaly*heart"] if i < 4 else []),
        ]
        for i in range(6)
    }
    rows["val00009"] = ["lymphadenopathy*hilum"] * 9
    rad_chestct(tmp_path, rows)
    counts = {"lung": 3, "heart": 4, "great_vessel": 3, "mediastinum": 1}
    # pneumonia: never on the right. lymphadenopathy: never in training.
    reader = RadChestCT(tmp_path, selection="counts", min_counts=counts)
    assert reader.labels == ("great_vessel_calcification", "heart_cardiomegaly", "lung_nodule")
    assert reader.regions == ("right_lung", "left_lung", "heart_mediastinum")
    # The count is that of the most frequent location: 3 of aorta and 3 of svc are not 6.
    reader = RadChestCT(tmp_path, selection="counts", min_counts={**counts, "great_vessel": 4})
    assert reader.labels == ("heart_cardiomegaly", "lung_nodule")
    with fails("no label is positive often enough"):
        RadChestCT(tmp_path, selection="counts")
    (tmp_path / RAD_TABLE.format("train")).rename(tmp_path / "x.csv")
    (tmp_path / "val00009.npz").rename(tmp_path / "x")
    with fails("is missing: download it", RAD_TABLE.format("train")):
        RadChestCT(tmp_path, selection="counts")
    for file in tmp_path.glob("*.npz"):
        file.unlink()
    with fails("selection 'counts' needs the training table"):
        RadChestCT(tmp_path, selection="counts")
    with fails("no column for label 'great_vessel_aneurysm'", tmp_path):
        RadChestCT(tmp_path, selection="paper")


def test_rad_chestct_paper_labels(tmp_path: Path):
    names = ["lung_", "heart_", "great_vessel_", "mediastinum_"]
    assert [sum(label.startswith(n) for label in PAPER_LABELS) for n in names] == [51, 16, 7, 6]
    columns = []
    for label in PAPER_LABELS:
        organ = next(organ for organ in LOCATIONS if label.startswith(organ + "_"))
        columns += [f"{label[len(organ) + 1 :]}*{location}" for location in LOCATIONS[organ]]
    rad_chestct(tmp_path, {"trn00001": ["stent*heart", "fracture*rib"]}, [*columns, "fracture*rib"])
    reader = RadChestCT(tmp_path, selection="paper")
    assert reader.labels == PAPER_LABELS
    assert found(reader, "trn00001") == {"heart_stent": {"heart_mediastinum"}}


def test_rad_chestct_lung_box(tmp_path: Path):
    rad_chestct(tmp_path, {"trn00001": ["nodule*lung"], "trn00002": [], "trn00003": []})
    header = "VolumeAcc_DEID sup_axis0min inf_axis0max ant_axis1min pos_axis1max rig_axis2min"
    header += " lef_axis2max shape0 shape1 shape2"
    write_csv(
        tmp_path / "Extrema_5747.csv",
        header.split(),
        ["trn00001.npz", 2, 9, 3.0, "inf", "nan", 15, 12, 14, 16],
        ["trn00002.npz", 2, 9, 3, 10, 1, 15, 99, 14, 16],
    )
    with fails("has 2 Extrema"):
        write_csv(tmp_path / "Extrema_2.csv", header.split())
        RadChestCT(tmp_path, crop_lungs=True)
    (tmp_path / "Extrema_2.csv").unlink()
    whole, cropped = RadChestCT(tmp_path), RadChestCT(tmp_path, crop_lungs=True)
    assert (
        reasons(cropped)["trn00003"] == f"{tmp_path}/Extrema_5747.csv: no row of 'trn00003': add it"
    )
    before, after = (r.read(study(r, "trn00001")) for r in (whole, cropped))
    np.testing.assert_array_equal(after.voxels, before.voxels[2:9, 3:, :15])
    here, there = (apply_affine(v.affine, i) for v, i in ((after, [0, 0, 0]), (before, [2, 3, 0])))
    np.testing.assert_allclose(here, there)
    with fails(r"Extrema says \(99, 14, 16\)", tmp_path / "trn00002.npz"):
        cropped.read(study(cropped, "trn00002"))


def test_rad_chestct_tables_and_volumes_that_do_not_match(tmp_path: Path):
    rad_chestct(tmp_path, {f"trn0000{i}": ["nodule*lung"] for i in range(5)})
    (tmp_path / "trn00000.npz").unlink()
    np.savez(tmp_path / "trn00007.npz", ct=thorax())
    table = tmp_path / RAD_TABLE.format("train")
    lines = table.read_text().splitlines()
    lines[2] = lines[2][:-1] + "0.5"  # trn00001
    del lines[3]  # trn00002
    table.write_text("\n".join(lines))
    reader = RadChestCT(tmp_path)
    assert [s.id for s in reader.studies] == ["trn00003", "trn00004"]
    why = reasons(reader)
    assert "trn00000.npz is missing" in why["trn00000"]
    assert "row 3: column 'pneumonia*left_lung' holds '0.5'" in why["trn00001"]
    assert "no row 'trn00002'" in why["trn00002"]
    assert "no row of 'trn00007'" in why["trn00007"]
    (tmp_path / "CT_Scan_Metadata_Complete_35747.csv").unlink()
    without = RadChestCT(tmp_path)
    assert {s.patient for s in without.studies} == {"trn00003", "trn00004"}
    table.rename(tmp_path / "elsewhere.csv")
    with fails("is missing: download it", RAD_TABLE.format("train")):
        RadChestCT(tmp_path)
    with fails("none of img", tmp_path):
        RadChestCT(tmp_path, tables=write_csv(tmp_path / "empty" / "a.csv", []).parent)
    write_csv(table, ["NoteAcc_DEID", "nodule"], ["trn00003", 1])
    with fails("column 'nodule' is not abnormality.location", table):
        RadChestCT(tmp_path)


def _bomb(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (2**11, 2**11, 2**9)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("ct.npy")
        archive.writestr(info, header.getvalue())
        info.file_size = 2**32 - 2  # what the directory declares


def _declares_more(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (2**20, 2**20, 2**20)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ct.npy", header.getvalue() + bytes(1000))


def _truncated(path: Path) -> None:
    np.savez_compressed(path, ct=thorax())
    path.write_bytes(path.read_bytes()[:900])


def _flipped(path: Path) -> None:
    np.savez(path, ct=thorax())
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(bytes(data))


def _constant(path: Path) -> None:
    np.savez(path, ct=np.full((9, 9, 9), -1000, np.int16))


def _with_nan(path: Path) -> None:
    voxels = thorax().astype(np.float32)
    voxels[0, 0, 0] = np.nan
    np.savez(path, ct=voxels)


BAD_NPZ = {
    "bomb": (_bomb, r"unpacks to 4\.0 GiB, the bound is 2\.0 GiB"),
    "header": (_declares_more, "declares shape"),
    "truncated": (_truncated, "truncated or damaged"),
    "flipped bit": (_flipped, "truncated or damaged"),
    "no zip": (lambda p: p.write_text("hello"), "truncated or damaged"),
    "missing": (lambda p: p.unlink(missing_ok=True), "no such file"),
    "wrong key": (lambda p: np.savez(p, volume=thorax()), r"no array 'ct' \(found: volume\)"),
    "objects": (lambda p: np.savez(p, ct=np.array([1, "a", None], object)), "Python objects"),
    "NaN": (_with_nan, "'ct' is float32, not int16"),
    "bytes": (lambda p: np.savez(p, ct=np.zeros((9, 9, 9), np.uint8)), "'ct' is uint8"),
    "2D": (lambda p: np.savez(p, ct=thorax((9, 9))), "not 3 axes"),
    "4D": (lambda p: np.savez(p, ct=thorax((9, 9, 9, 2))), "not 3 axes"),
    "constant": (_constant, "all are -1000"),
    "no air": (lambda p: np.savez(p, ct=thorax() + np.int16(1000)), "not Hounsfield"),
    "no int16": (lambda p: np.savez(p, ct=thorax().astype(np.int32) * 999), "not in Hounsfield"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_rad_chestct_bad_volumes(tmp_path: Path, kind: str):
    rad_chestct(tmp_path, {"trn00001": ["nodule*lung"]})
    reader = RadChestCT(tmp_path)
    make, words = BAD_NPZ[kind]
    make(tmp_path / "trn00001.npz")
    with fails(words, tmp_path / "trn00001.npz"):
        reader.read(reader.studies[0])


def test_the_authors_made_up_volumes_in_the_public_layout(real_data: Path, tmp_path: Path):
    source = real_data / "radchestct_fake"
    with (source / "all_identifiers.csv").open() as file:
        people = list(csv.DictReader(file))
    parts = {"imgtrain": "trn", "imgvalid": "val", "imgtest": "tst"}
    files, rows = {}, {}
    for i, person in enumerate(people):
        key = f"{parts[person['Subset_Assigned'].split('_')[0]]}{i:05d}"
        files[key] = source / f"{person['Accession']}.npz"
        rows[key] = ["nodule*lung"]
    rad_chestct(tmp_path, rows)
    for key, file in files.items():
        (tmp_path / f"{key}.npz").write_bytes(file.read_bytes())
    reader = RadChestCT(tmp_path)
    assert {s.split for s in reader.studies} == {"train", "val", "test"}
    assert len(reader.studies) == len(people)
    for item in reader.studies:
        volume = reader.read(item)
        assert volume.voxels.dtype == np.int16
        np.testing.assert_array_equal(volume.voxels, np.load(files[item.id])["ct"])


# CT-RATE

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


# DICOM


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


# MedMNIST


def medmnist(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 12), ("val", 3), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 6, 6, 6), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(size) % 3)[:, None].astype(np.uint8)
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def test_medmnist(tmp_path: Path):
    file = medmnist(tmp_path / "organmnist3d.npz")
    reader = MedMNIST(file, ["liver", "kidney", "femur"])
    assert reader.regions == (ANYWHERE,)
    assert [s.split for s in reader.studies] == ["train"] * 12 + ["val"] * 3 + ["test"] * 4
    assert len({s.id for s in reader.studies}) == 19
    assert found(reader, "train_04") == {"kidney": {ANYWHERE}}
    assert MedMNIST(file).labels == ("class_0", "class_1", "class_2")
    with np.load(file) as arrays:
        for item, grey in zip(reader.studies[12:15], arrays["val_images"], strict=True):
            volume = reader.read(item)
            window = (volume.voxels.astype(float) + 1000) / 1800
            np.testing.assert_allclose(window, grey / 255, atol=0.5 / 1800 + 1e-9)
    assert nibabel.aff2axcodes(volume.affine) == MODEL_AXES
    same, _ = to_grid(volume, (1, 1, 1), (6, 6, 6))
    np.testing.assert_array_equal(same, volume.voxels)


def test_medmnist_with_several_labels(tmp_path: Path):
    many = {
        f"{split}_labels": np.eye(n, 2, dtype=np.uint8)
        for split, n in (("train", 12), ("val", 3), ("test", 4))
    }
    many["val_labels"][1, 0] = 7
    reader = MedMNIST(medmnist(tmp_path / "a.npz", **many))
    assert found(reader, "train_01") == {"class_1": {ANYWHERE}}
    assert found(reader, "train_05") == {}
    assert "'val_labels' row 1 holds [7, 1]" in reasons(reader)["val_1"]


def test_medmnist_bad_files(tmp_path: Path):
    with fails("no such file", tmp_path / "none.npz"):
        MedMNIST(tmp_path / "none.npz")
    with fails("has 3 classes, not 1"):
        MedMNIST(medmnist(tmp_path / "a.npz"), ["liver"])
    with fails(r"'val_labels' is float64 \(3,\)", tmp_path / "b.npz"):
        MedMNIST(medmnist(tmp_path / "b.npz", val_labels=np.zeros(3)))
    np.savez(tmp_path / "c.npz", train_images=np.zeros(3))
    with fails("no array 'train_labels'", tmp_path / "c.npz"):
        MedMNIST(tmp_path / "c.npz")
    for name, images, words in (
        ("d", np.zeros((3, 6, 6), np.uint8), r"'val_images' is uint8 \(3, 6, 6\)"),
        ("e", np.zeros((3, 6, 6, 6), np.float32), "'val_images' is float32"),
        ("f", np.zeros((1, 6, 6, 6), np.uint8), "none for label 2"),
        ("g", np.zeros((3, 6, 6, 6), np.uint8), "2 is constant"),
    ):
        reader = MedMNIST(medmnist(tmp_path / f"{name}.npz", val_images=images))
        with fails(words, tmp_path / f"{name}.npz"):
            reader.read(study(reader, "val_2"))


def test_medmnist_real_file(real_data: Path):
    reader = MedMNIST(real_data / "adrenalmnist3d.npz", ["normal", "hyperplasia"])
    assert len(reader.studies) == 1188 + 98 + 298
    assert reader.rejects == []
    volume = reader.read(study(reader, "test_007"))
    with np.load(real_data / "adrenalmnist3d.npz") as arrays:
        np.testing.assert_array_equal(volume.voxels == 800, arrays["test_images"][7] == 255)
        positive = int(arrays["train_labels"].sum())
    total = sum(int(s.findings[1, 0]) for s in reader.studies if s.split == "train")
    assert total == positive
