"""The reader of a folder of NIfTI, on files in their real layout."""

import csv
import pickle
from pathlib import Path

import nibabel
import numpy as np

from hirescam_jax.data.phantom.export import export
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.readers import NiftiFolder
from hirescam_jax.data.study import ANYWHERE
from tests.data.readers.raw_files import fails, found, reasons, save_nifti, thorax, write_csv


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
