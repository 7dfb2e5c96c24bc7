"""Pointing game and energy of written maps against masks of lesions."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.localize import localize, read_patients, without_map
from hirescam_jax.inference.nifti import TABLE

AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])
SHAPE = (8, 10, 6)
IDS = {"nodule": [1, 3], "pleural effusion": [2]}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def spot(index: tuple[int, int, int], value: float = 1.0) -> np.ndarray:
    map_ijk = np.full(SHAPE, -0.5, np.float32)
    map_ijk[index] = value
    return map_ijk


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two volumes whose lesions lie at (2, 3, 1) and (5, 6, 4); the second map misses its own."""
    explained, masks = tmp_path / "explained", tmp_path / "masks"
    for name, lesion, number, map_ijk in (
        ("a", (2, 3, 1), 1, spot((2, 3, 1), 3.0) + spot((5, 6, 4), 1.5)),
        ("b", (5, 6, 4), 3, spot((2, 3, 1), 2.0)),
    ):
        folder = explained / name
        save(folder / "nodule_hirescam.nii.gz", map_ijk)
        save(folder / "pleural_effusion_hirescam.nii.gz", map_ijk)  # a label without lesions
        (folder / TABLE).write_text("label,probability\nnodule,0.9\npleural effusion,0.1\n")
        lesions, organs = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        lesions[lesion] = number
        organs[:4], organs[4:] = 1, 2  # two halves of 240 voxels
        save(masks / f"{name}_lesions.nii.gz", lesions)
        save(masks / f"{name}_regions.nii.gz", organs)
    return explained, masks


def test_measures_and_baselines_by_hand(folders: tuple[Path, Path]):
    found = {case.id: case for case in localize(*folders, IDS)}
    assert list(found) == ["a", "b"]
    a, b = found["a"], found["b"]
    assert (a.label, a.hit, b.hit) == ("nodule", 1.0, 0.0)
    # a: 3 - 0.5 at its lesion, 1.5 - 0.5 elsewhere, nothing positive in the rest.
    assert a.energy == pytest.approx(2.5 / 3.5)
    assert b.energy == 0
    assert (a.other_hit, a.other_energy) == (1.0, 1.0)  # b's map shines at a's lesion
    assert b.other_hit == 0
    assert b.other_energy == pytest.approx(1.0 / 3.5)
    for case in (a, b):
        assert case.organ == pytest.approx(1 / 240)
        assert case.chance == pytest.approx(1 / 480)


def test_tolerance_is_in_millimetres(folders: tuple[Path, Path]):
    explained, masks = folders
    save(explained / "b" / "nodule_hirescam.nii.gz", spot((5, 6, 3)))  # 4 mm beside the lesion
    hits = [
        {case.id: case.hit for case in localize(explained, masks, IDS, tolerance_mm=mm)}["b"]
        for mm in (0.0, 3.9, 4.0)
    ]
    assert hits == [0.0, 0.0, 1.0]
    near = {case.id: case for case in localize(explained, masks, IDS, tolerance_mm=2.0)}["b"]
    assert near.chance == pytest.approx(5 / 480)  # the lesion and its four neighbours in the slice


def test_another_volumes_map_is_stretched(folders: tuple[Path, Path]):
    explained, masks = folders
    wide = np.repeat(spot((2, 3, 1), 3.0), 2, axis=1)
    lesions = np.repeat(np.where(spot((2, 3, 1)) > 0, np.uint8(1), np.uint8(0)), 2, axis=1)
    for name in ("nodule", "pleural_effusion"):
        save(explained / "b" / f"{name}_hirescam.nii.gz", wide)
    save(masks / "b_lesions.nii.gz", lesions)
    save(masks / "b_regions.nii.gz", np.ones_like(lesions))
    a, b = localize(explained, masks, IDS)
    assert (a.other_hit, a.other_energy) == (1.0, 1.0)
    assert b.other_energy == a.energy


def test_another_patients_map(folders: tuple[Path, Path]):
    """c is a second scan of b's patient, and its map shines elsewhere."""
    explained, masks = folders
    save(explained / "c" / "nodule_hirescam.nii.gz", spot((0, 0, 0)))
    (explained / "c" / TABLE).write_text("label,probability\nnodule,0.9\n")
    lesions = np.where(spot((2, 3, 1)) > 0, np.uint8(1), np.uint8(0))
    save(masks / "c_lesions.nii.gz", lesions)
    # By default each volume is compared with the next one's map: b with c's.
    found = {case.id: case for case in localize(*folders, IDS)}
    assert (found["b"].other_hit, found["b"].other_energy) == (0.0, 0.0)
    who = {"a": "p0", "b": "p1", "c": "p1"}
    found = {case.id: case for case in localize(*folders, IDS, patients=who)}
    assert found["b"].other_energy == pytest.approx(1.0 / 3.5)  # a's
    assert found["c"].other_hit == 1.0
    found = localize(*folders, IDS, patients=dict.fromkeys("abc", "p0"))
    assert np.isnan([case.other_hit for case in found]).all()
    with pytest.raises(UserError, match=r"c: its patient is not known"):
        localize(*folders, IDS, patients={"a": "p0", "b": "p1"})


def test_lesions_without_a_map_are_counted(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    explained, masks = folders
    assert without_map(*folders, IDS) == {"nodule": 0, "pleural effusion": 0}
    (explained / "b" / "nodule_hirescam.nii.gz").unlink()  # the model did not predict it
    lesions = np.zeros(SHAPE, np.uint8)
    lesions[5, 6, 4], lesions[0, 0, 0] = 3, 2
    save(masks / "b_lesions.nii.gz", lesions)
    (explained / "b" / "pleural_effusion_hirescam.nii.gz").unlink()
    assert without_map(*folders, IDS) == {"nodule": 1, "pleural effusion": 1}
    assert [case.id for case in localize(*folders, IDS)] == ["a"]
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    (tmp_path / "findings.csv").write_text("id,patient,nodule\na,p0,1\nb,,1\n")
    assert read_patients(tmp_path / "findings.csv") == {"a": "p0", "b": "b"}
    command = ["localize", str(explained), "--masks", str(masks)]
    command += ["--label-map", str(tmp_path / "ids.json")]
    cli.main([*command, "--patients", str(tmp_path / "findings.csv")])
    lines = capsys.readouterr().out.splitlines()
    assert "another patient's" in lines[0]
    rows = {line[:16].strip(): line[16:].split() for line in lines}
    assert rows["nodule"][:3] == ["1", "1", "1.000"]
    assert rows["pleural effusion"] == ["0", "1", *"------"]
    assert lines[-2].startswith("Left out: 2 pairs of a volume and a label")
    assert "hits are then those of true positives" in lines[-1]
    with pytest.raises(SystemExit):
        cli.main([*command, "--patients", str(tmp_path / "ids.json")])
    assert "ids.json: no column id or patient in it" in capsys.readouterr().err


def test_one_volume_without_organs(folders: tuple[Path, Path]):
    explained, masks = folders
    (masks / "a_regions.nii.gz").unlink()
    (explained / "b" / TABLE).unlink()
    (case,) = localize(explained, masks, IDS)
    assert np.isnan([case.other_hit, case.other_energy, case.organ]).all()


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    explained, masks = folders
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    out = tmp_path / "out.csv"
    command = ["localize", str(explained), "--masks", str(masks), "--out", str(out)]
    command += ["--label-map", str(tmp_path / "ids.json")]
    cli.main(command)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nodule"))
    figures = ["0.500", "0.357", "0.500", "0.643", "0.004", "0.002"]
    assert row.split() == ["nodule", "2", "0", *figures]
    assert len(out.read_text().splitlines()) == 3
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "exists" in capsys.readouterr().err


def test_what_cannot_be_compared_is_named(folders: tuple[Path, Path], tmp_path: Path):
    explained, masks = folders
    with pytest.raises(UserError, match="no explanations"):
        localize(tmp_path, masks, IDS)
    with pytest.raises(UserError, match="--labels emphysema"):
        localize(explained, masks, {"emphysema": [7]})
    with pytest.raises(UserError, match=r"no map of a label"):
        localize(explained, masks, IDS, method="gradcam")
    save(masks / "b_lesions.nii.gz", np.ones(SHAPE, np.uint8), AFFINE + np.eye(4, k=3))
    with pytest.raises(UserError, match=r"b_lesions.nii.gz: its grid is not that of"):
        localize(explained, masks, IDS)
    (masks / "b_lesions.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b_lesions.nii.gz: no such file"):
        localize(explained, masks, IDS)
