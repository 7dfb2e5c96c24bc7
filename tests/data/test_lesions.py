"""Synthetic lesions: reproducible, of the size they claim, in their organ, a readable data set."""

import csv
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel import orientations
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from hirescam_jax.data.lesions import lesions
from hirescam_jax.data.lesions.folder import SHARED, make_lesion_folder
from hirescam_jax.data.lesions.lesions import LABELS, LESIONS, LesionSet, add_lesions
from hirescam_jax.data.lesions.shapes import Scan, cover
from hirescam_jax.data.organs.chest import CHEST_REGIONS, segment_chest
from hirescam_jax.data.organs.sources import LabelMapRegions
from hirescam_jax.data.phantom.export import export
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.readers.nifti_folder import NiftiFolder
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError

CTS = ("ct/tcga_34_2605_ct3mm.nii.gz", "ct/acil_ct64_ct.nii.gz")
ALL = np.array([[region in LESIONS[label] for region in CHEST_REGIONS] for label in LABELS])


def chest(spacing=(2.0, 2.0, 2.5), rotation=(0.0, 0.0, 0.0)) -> tuple[Volume, dict[str, Any]]:
    """Two lungs and a heart of simple shape, with noise, axes RAS but for the rotation."""
    shape = tuple(int(n / s) for n, s in zip((260, 180, 200), spacing, strict=True))
    affine = np.eye(4)
    turned = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    affine[:3, :3] = turned @ np.diag(spacing)
    affine[:3, 3] = turned @ (-130.0, -90.0, -400.0)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(index * spacing - (130, 90, 100), -1, 0)

    def ball(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1

    masks = {
        "right_lung": ball(68, 0, 0, 48, 72, 88),
        "left_lung": ball(-68, 0, 0, 48, 72, 88),
        "heart_mediastinum": abs(x) < 18,
    }
    masks["heart_mediastinum"] &= (abs(y) < 60) & (abs(z) < 80)
    rng = np.random.default_rng(7)
    voxels = np.where(masks["right_lung"] | masks["left_lung"], -860, 40) + rng.normal(0, 9, shape)
    voxels[:, :2] = -1000
    return Volume(voxels.astype(np.int16), affine, Path("chest.nii")), masks


@pytest.fixture(scope="module")
def scene() -> tuple[Volume, dict[str, Any]]:
    return chest()


def stored_as(volume: Volume, axes: str, *arrays: np.ndarray) -> tuple[Volume, list[np.ndarray]]:
    """The same scan, and masks on its grid, in another axis order."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(volume.affine), orientations.axcodes2ornt(tuple(axes))
    )
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.voxels.shape)
    voxels, *rest = (orientations.apply_orientation(a, turn) for a in (volume.voxels, *arrays))
    return dataclasses.replace(volume, voxels=np.ascontiguousarray(voxels), affine=affine), rest


def only(label: str, region: str) -> np.ndarray:
    findings = np.zeros((len(LABELS), len(CHEST_REGIONS)), np.uint8)
    findings[LABELS.index(label), CHEST_REGIONS.index(region)] = 1
    return findings


def ml(result: LesionSet, label: str) -> float:
    return float(result.mask(label).sum() * abs(np.linalg.det(result.volume.affine)) / 1e3)


# One volume


def test_the_same_seed_gives_the_same_and_another_does_not(scene: Any):
    volume, masks = scene
    before = volume.voxels.copy()
    one, two, three = (add_lesions(volume, masks, seed, chance=0.9) for seed in ((3, 1), (3, 1), 4))
    np.testing.assert_array_equal(one.volume.voxels, two.volume.voxels)
    np.testing.assert_array_equal(one.lesion_map, two.lesion_map)
    assert one.lesions == two.lesions
    assert (one.volume.voxels != three.volume.voxels).any()
    np.testing.assert_array_equal(volume.voxels, before)


@pytest.mark.parametrize("seed", range(3))
def test_only_lesions_change_and_they_lie_in_their_organs(scene: Any, seed: int):
    volume, masks = scene
    result = add_lesions(volume, masks, seed, findings=ALL)
    np.testing.assert_array_equal(result.findings, ALL)
    changed = result.volume.voxels != volume.voxels
    found = result.lesion_map > 0
    assert changed[found].mean() > 0.99  # a change may round to nothing
    assert (changed & ~found).sum() < found.sum()  # the edges, less than half covered
    organs = np.any([*masks.values()], axis=0)
    assert not (changed & ~organs).any()
    for label, places in LESIONS.items():
        inside = np.any([masks[place] for place in places], axis=0)
        assert result.mask(label).any()
        assert not (result.mask(label) & ~inside).any()


@pytest.mark.long
def test_each_lesion_looks_as_its_name_says(scene: Any):
    volume, masks = scene
    expected = {
        "nodule": (-60, 100),
        "ground_glass": (-750, -450),
        "consolidation": (-250, 60),
        "pleural_effusion": (-60, 40),
        "calcification": (300, 1200),
    }
    for seed in range(3):
        result = add_lesions(volume, masks, seed, findings=ALL)
        for label, (low, high) in expected.items():
            assert low < np.median(result.volume.voxels[result.mask(label)]) < high, label


def test_no_lesion_changes_nothing(scene: Any):
    volume, masks = scene
    result = add_lesions(volume, masks, 0, chance=0.0)
    np.testing.assert_array_equal(result.volume.voxels, volume.voxels)
    assert not result.findings.any()
    assert not result.lesions


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 5.0), (3.0, 1.5, 2.0)])
def test_a_ball_has_its_volume_on_any_grid(spacing: tuple[float, float, float]):
    shape = tuple(int(60 / s) for s in spacing)
    axes = Rotation.from_euler("xyz", [10, -7, 20], degrees=True).as_matrix() @ np.diag(spacing)
    scan = Scan(np.zeros(shape, np.float32), axes, np.ones(shape, bool), 0.0)
    for diameter in (12.0, 25.0):
        _, coverage = cover(
            scan,
            (np.array(shape) - 1) / 2,
            (diameter / 2,) * 3,
            lambda x, y, z, d=diameter: np.sqrt(x * x + y * y + z * z) - d / 2,
            edge_mm=1.0,
        )
        found = float(coverage.sum()) * np.prod(spacing)
        assert found == pytest.approx(np.pi / 6 * diameter**3, rel=0.02)


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (1.2, 1.2, 4.0)])
def test_a_nodule_has_the_volume_of_the_ball_of_its_size(spacing: Any):
    volume, masks = chest(spacing)
    for seed in range(4):
        findings = only("nodule", CHEST_REGIONS[seed % 2])
        result = add_lesions(volume, masks, seed, findings=findings)
        points = apply_affine(volume.affine, np.argwhere(result.mask("nodule")))
        centres = np.array([lesion.centre_mm for lesion in result.lesions])
        distance = np.linalg.norm(points[:, None] - centres, axis=-1)
        for i, lesion in enumerate(result.lesions):
            assert 8 <= lesion.size_mm <= 30
            ball = np.pi / 6 * lesion.size_mm**3 / 1e3
            assert lesion.volume_ml == pytest.approx(ball, rel=0.05)
            assert distance[:, i].min() < lesion.size_mm / 2
            if lesion.size_mm > 4 * max(spacing):  # a mask of whole voxels can tell its volume
                mine = distance.argmin(1) == i
                voxel = np.prod(spacing) / 1e3
                assert mine.sum() * voxel == pytest.approx(ball, rel=0.1)


@pytest.mark.parametrize("rotation", [(0, 0, 0), (6, -4, 9)])
def test_the_side_is_the_patients(rotation: Any):
    volume, masks = chest(rotation=rotation)
    for sign, region in ((1, "right_lung"), (-1, "left_lung")):
        for label in LABELS[:4]:
            result = add_lesions(volume, masks, 5, findings=only(label, region))
            assert result.findings.sum() == 1
            points = apply_affine(volume.affine, np.argwhere(result.mask(label)))
            assert sign * points[:, 0].mean() > 25


def test_an_effusion_lies_behind_and_is_level_enough(scene: Any):
    volume, masks = scene
    result = add_lesions(volume, masks, 2, findings=only("pleural_effusion", "right_lung"))
    fluid = apply_affine(volume.affine, np.argwhere(result.mask("pleural_effusion")))
    lung = apply_affine(volume.affine, np.argwhere(masks["right_lung"]))
    assert np.median(fluid[:, 1]) < np.quantile(lung[:, 1], 0.25)
    assert 50 < ml(result, "pleural_effusion") < 620


@pytest.mark.parametrize("rotation", [(0, 0, 0), (6, -4, 9)])
@pytest.mark.parametrize("axes", ["LPS", "SAR", "IPL"])
def test_the_storage_order_does_not_matter(axes: str, rotation: Any):
    volume, masks = chest((2.0, 2.4, 4.0), rotation)
    turned, rest = stored_as(volume, axes, *masks.values())
    turned_masks = dict(zip(masks, rest, strict=True))
    for kind in (add_lesions, lesions.vary):
        one, other = kind(volume, masks, 1), kind(turned, turned_masks, 1)
        if isinstance(one, LesionSet):
            assert one.findings.any()
            np.testing.assert_array_equal(one.findings, other.findings)
            assert [lesion.label for lesion in one.lesions] == [x.label for x in other.lesions]
            one, other = (one.volume, [one.lesion_map]), (other.volume, [other.lesion_map])
        else:
            one, other = (one[0], [*one[1].values()]), (other[0], [*other[1].values()])
        expected, arrays = stored_as(one[0], axes, *one[1])
        np.testing.assert_array_equal(other[0].voxels, expected.voxels)
        np.testing.assert_allclose(other[0].affine, expected.affine, atol=1e-6)
        for array, want in zip(other[1], arrays, strict=True):
            np.testing.assert_array_equal(array, want)


def test_a_varied_scan_is_the_same_body_a_little_different(scene: Any):
    volume, masks = scene
    for seed in range(3):
        varied, moved = lesions.vary(volume, masks, seed)
        for name, mask in masks.items():
            assert moved[name].sum() == mask.sum()  # nothing of an organ is cut off
            zoom = abs(np.linalg.det(varied.affine) / np.linalg.det(volume.affine))
            assert 0.95**3 <= zoom <= 1.05**3
            here, there = (
                apply_affine(v.affine, np.argwhere(m)).mean(0)
                for v, m in ((volume, mask), (varied, moved[name]))
            )
            assert np.linalg.norm(here - there) < 20
        assert np.linalg.det(varied.affine) * np.linalg.det(volume.affine) > 0  # no mirror
        change = np.median(varied.voxels[moved["right_lung"]]) + 860
        assert abs(change) < 8


def test_an_organ_without_room_gets_no_lesion(scene: Any):
    volume, masks = scene
    small = {name: np.zeros_like(mask) for name, mask in masks.items()}
    small["right_lung"][60:62, 40:42, 40:42] = True
    result = add_lesions(volume, small, 0, findings=only("nodule", "right_lung"))
    assert not result.findings.any()
    np.testing.assert_array_equal(result.volume.voxels, volume.voxels)


def test_bad_arguments_are_named(scene: Any):
    volume, masks = scene
    with pytest.raises(UserError, match="heart_mediastinum"):
        add_lesions(volume, masks, 0, findings=only("nodule", "heart_mediastinum"))
    with pytest.raises(UserError, match="right_lung"):
        add_lesions(volume, {"right_lung": masks["right_lung"][1:]}, 0)
    with pytest.raises(UserError, match="expected"):
        add_lesions(volume, masks, 0, findings=np.zeros((2, 3), np.uint8))


# Folders


@pytest.fixture(scope="module")
def cts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], LabelMapRegions]:
    """Two simple chests as files, and their label maps."""
    folder = tmp_path_factory.mktemp("cts")
    for name, spacing in (("a", (4.0, 4.0, 5.0)), ("b", (3.5, 4.5, 4.0))):
        volume, masks = chest(spacing)
        nibabel.save(nibabel.Nifti1Image(volume.voxels, volume.affine), folder / f"{name}.nii.gz")
        (folder / "maps").mkdir(exist_ok=True)
        labels = sum(np.uint8(i) * m for i, m in enumerate(masks.values(), start=1))
        path = folder / "maps" / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.uint8(labels), volume.affine), path)
    ids = {name: [i] for i, name in enumerate(CHEST_REGIONS, start=1)}
    return [folder / "a.nii.gz", folder / "b.nii.gz"], LabelMapRegions(folder / "maps", ids)


def test_a_folder_is_read_with_the_same_findings(cts: Any, tmp_path: Path):
    files, source = cts
    out = tmp_path / "new"
    make_lesion_folder(
        out, files, copies=5, seed=3, source=source, split=(0.6, 0.2, 0.2), workers=0
    )
    reader = NiftiFolder(out)
    assert (reader.labels, reader.regions) == (LABELS, CHEST_REGIONS)
    assert not reader.rejects
    assert [s.id for s in reader.studies] == [f"{n}_{i:03d}" for n in "ab" for i in range(5)]
    assert [s.split for s in reader.studies] == ["train", "train", "train", "val", "test"] * 2
    assert len({s.patient for s in reader.studies}) == 10
    assert np.mean([s.findings.any() for s in reader.studies]) > 0
    with (out / "masks" / "lesions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for study in reader.studies:
        volume = reader.read(study)
        found, organs = (
            nibabel.load(out / "masks" / f"{study.id}_{kind}.nii.gz")
            for kind in ("lesions", "regions")
        )
        np.testing.assert_allclose(found.affine, volume.affine)
        found, organs = np.asarray(found.dataobj), np.asarray(organs.dataobj)
        for k, label in enumerate(LABELS):
            for r, region in enumerate(CHEST_REGIONS):
                here = (found == 1 + k) & (organs == 1 + r)
                assert here.any() == bool(study.findings[k, r])
                listed = [x for x in rows if x["id"] == study.id and x["label"] == label]
                assert (region in [x["region"] for x in listed]) == bool(study.findings[k, r])
    regions = LabelMapRegions(
        out / "masks", {n: [i + 1] for i, n in enumerate(CHEST_REGIONS)}, "_regions"
    )
    study = reader.studies[0]
    assert regions.masks(study, reader.read(study)).note is None


def test_a_copy_depends_on_nothing_but_its_number(cts: Any, tmp_path: Path):
    """Nor on the process that makes it."""
    files, source = cts
    make_lesion_folder(tmp_path / "few", files[1:], copies=2, seed=3, source=source, workers=0)
    make_lesion_folder(tmp_path / "many", files, copies=3, seed=3, source=source, workers=2)
    for i in range(2):
        few, many = (read_ct(tmp_path / f / f"b_{i:03d}.nii.gz") for f in ("few", "many"))
        np.testing.assert_array_equal(few.voxels, many.voxels)
        np.testing.assert_array_equal(few.affine, many.affine)


def test_some_kinds_of_lesions_are_those_of_all(scene: Any):
    volume, masks = scene
    every, some = (
        add_lesions(volume, masks, 5, chance=1.0, labels=labels)
        for labels in (LABELS, ("pleural_effusion",))
    )
    k = LABELS.index("pleural_effusion")
    assert some.findings[k].any()
    assert not np.delete(some.findings, k, axis=0).any()
    np.testing.assert_array_equal(some.findings[k], every.findings[k])


def test_copies_of_a_ct_can_be_one_patient(cts: Any, tmp_path: Path):
    files, source = cts
    make_lesion_folder(tmp_path / "x", files, copies=2, source=source, patient="ct", workers=0)
    studies = NiftiFolder(tmp_path / "x").studies
    assert [(s.patient, s.split) for s in studies] == [("a", None)] * 2 + [("b", None)] * 2
    assert "SAME" in SHARED
    assert "SAME" not in (tmp_path / "x" / "README.txt").read_text()


def test_a_file_that_cannot_be_written_is_named(cts: Any, tmp_path: Path, monkeypatch: Any):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nibabel.save", full)
    files, source = cts
    with pytest.raises(UserError, match=r"a_000.nii.gz: cannot be written \(No space left"):
        make_lesion_folder(tmp_path / "x", files, source=source, workers=0)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["masks"]


def test_nothing_is_overwritten(cts: Any, tmp_path: Path):
    files, source = cts
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match="exists"):
        make_lesion_folder(tmp_path / "thesis", files, source=source)
    assert not list((tmp_path / "thesis").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cts": []}, "no CT"),
        ({"copies": 0}, "copies 0"),
        ({"chance": 1.5}, "chance 1.5"),
        ({"labels": ["nodul"]}, r"'nodul' unknown \(did you mean 'nodule'\?\)"),
        ({"split": (0.5, 0.1, 0.1)}, "three parts"),
    ],
)
def test_bad_calls_write_nothing(cts: Any, tmp_path: Path, change: dict[str, Any], words: str):
    files, source = cts
    with pytest.raises(UserError, match=words):
        make_lesion_folder(tmp_path / "x", **{"cts": files, "source": source, **change})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_ct_whose_organs_are_not_found_is_refused(tmp_path: Path, workers: int):
    rng = np.random.default_rng(0)
    noise = rng.integers(-1000, 500, (20, 20, 20)).astype(np.int16)
    path = tmp_path / "noise.nii.gz"
    nibabel.save(nibabel.Nifti1Image(noise, np.diag([5.0, 5, 5, 1])), path)
    with pytest.raises(UserError, match=r"noise.nii.gz.*label maps"):
        make_lesion_folder(tmp_path / "x", [path], workers=workers)
    assert not (tmp_path / "x").exists()


# Real CTs


@pytest.mark.slow
@pytest.mark.parametrize("name", CTS)
def test_lesions_in_a_real_ct(real_data: Path, name: str):
    volume = read_ct(real_data / name)
    masks = dict(zip(CHEST_REGIONS, segment_chest(volume).masks, strict=True))
    result = add_lesions(volume, masks, 1, findings=ALL)
    np.testing.assert_array_equal(result.findings, ALL)
    changed = result.volume.voxels != volume.voxels
    assert not (changed & ~np.any([*masks.values()], axis=0)).any()
    for lesion in result.lesions:
        side = {"right_lung": 1, "left_lung": -1, "heart_mediastinum": 0}[lesion.region]
        middle = apply_affine(volume.affine, (np.array(volume.voxels.shape) - 1) / 2)[0]
        assert side * (lesion.centre_mm[0] - middle) >= 0
        assert lesion.volume_ml > 0.1
    turned, rest = stored_as(volume, "SAR", *masks.values())
    other = add_lesions(turned, dict(zip(masks, rest, strict=True)), 1, findings=ALL)
    expected, _ = stored_as(result.volume, "SAR")
    np.testing.assert_array_equal(other.volume.voxels, expected.voxels)


@pytest.mark.slow
def test_phantom_cts_can_have_them_too(tmp_path: Path):
    export(tmp_path / "p", PhantomConfig(shape=(80, 96, 96)), "test", 1)
    make_lesion_folder(tmp_path / "x", [tmp_path / "p"], copies=2, seed=1, chance=0.9, workers=0)
    assert len(NiftiFolder(tmp_path / "x").studies) == 2
