"""The reader of RAD-ChestCT, on files in their real layout."""

import csv
import io
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

from hirescam_jax.data.grid import MODEL_AXES, to_grid
from hirescam_jax.data.readers import RadChestCT
from hirescam_jax.data.readers.rad_chestct_labels import LOCATIONS, PAPER_LABELS
from hirescam_jax.data.study import ANYWHERE
from tests.data.readers.raw_files import fails, found, reasons, study, thorax, write_csv

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
