"""Organ masks: found in real CTs and phantoms, read from label maps, brought to other grids."""

import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hirescam_jax.data.organs.chest import coarse_regions, segment_chest
from hirescam_jax.data.organs.label_maps import masks_to_grid, nearest, read_label_map
from hirescam_jax.data.organs.sources import AutoRegions, LabelMapRegions, TotalSegmentatorRegions
from hirescam_jax.data.organs.totalsegmentator import CLASSES, DEFAULT_REGIONS, check_mapping
from hirescam_jax.data.phantom.phantom import Phantom, PhantomConfig
from hirescam_jax.data.study import ANYWHERE, Study
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError

RAS = np.diag([2.0, 2.5, 3.0, 1.0])
RAS[:3, 3] = [-20, -30, 40]


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((found & truth).sum()) / max(float(found.sum() + truth.sum()), 1.0)


def reoriented(array: np.ndarray, affine: np.ndarray, axes: str) -> nibabel.Nifti1Image:
    """The same voxels stored with another order and direction of the axes, by nibabel."""
    image = nibabel.Nifti1Image(array, affine)
    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
    )
    return image.as_reoriented(transform)


def study(id: str = "a", files: tuple[Path, ...] = ()) -> Study:
    return Study(id, id, None, files, np.zeros((1, 1), np.uint8))


def save(path: Path, labels: np.ndarray, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(labels, affine)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    return path


def ct(shape: tuple[int, ...] = (20, 22, 18), affine: np.ndarray = RAS) -> Volume:
    return Volume(np.full(shape, -1000, np.int16), affine, Path("ct.nii.gz"))


def phantom(index: int, shape: tuple[int, int, int] = (60, 80, 80)) -> tuple[Volume, np.ndarray]:
    """A made-up chest and its true [right lung, left lung, heart and mediastinum]."""
    case = Phantom(PhantomConfig(shape=shape), "test", index + 1, (1, 1, 1)).case(index)
    truth = np.stack([*case.regions[:2], case.regions[2:].any(0)])
    return Volume(case.volume, case.affine, Path("phantom")), truth


def made_chest(
    touch: bool = False, shift: tuple[float, float] = (0, 0), turn: float = 0
) -> tuple[Volume, np.ndarray]:
    """Two lungs of known shape in a body with a spine, on [x, y, z] in RAS, 3 mm.

    With `touch` the lungs meet in front, as at the anterior junction line, without any wall.
    """
    shape = (140, 130, 90)
    affine = np.diag([3.0, 3, 3, 1])
    x, y, z = (3.0 * (i - n / 2) for i, n in zip(np.indices(shape), shape, strict=True))
    angle = np.deg2rad(turn)
    x, y = x - shift[0], y - shift[1]
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    hu = np.full(shape, -1000.0)
    hu[(x / 165) ** 2 + (y / 115) ** 2 < 1] = 40
    lungs = []
    for side, width in ((1, 66), (-1, 60)):
        middle = 52 if touch else 72
        lung = ((x - side * middle) / width) ** 2 + (y / 85) ** 2 + (z / 115) ** 2 < 1
        heart = ((x + 15) / 48) ** 2 + ((y - 12) / 40) ** 2 + ((z + 25) / 50) ** 2 < 1
        spine = (x / 20) ** 2 + ((y + 55) / 20) ** 2 < 1
        middle_wall = (abs(x) < 14) & (y < 35 if touch else True)
        side_of = x > 0 if side > 0 else x <= 0
        lungs.append(lung & ~heart & ~spine & ~middle_wall & side_of)
        hu[lungs[-1]] = -850
    hu[(x / 18) ** 2 + ((y + 55) / 18) ** 2 < 1] = 350
    hu += np.random.default_rng(0).normal(0, 15, shape)
    return Volume(hu.astype(np.int16), affine, Path("made")), np.stack(lungs)


# Found in the CT


@pytest.mark.slow
def test_the_whole_real_ct(real_data: Path):
    volume = read_ct(real_data / "ct" / "tcga_34_2605_ct3mm.nii.gz")
    image = nibabel.load(real_data / "ct" / "tcga_34_2605_lungs_mediastinum.nii.gz")
    reference = np.asarray(image.dataobj)
    chest = segment_chest(volume)
    assert chest.quality is None
    # The reference is a threshold of its own: it holds the airways in the lungs and the spine in
    # the mediastinum, so agreement with it has a ceiling.
    assert dice(chest.masks[0], reference == 1) > 0.94
    assert dice(chest.masks[1], reference == 2) > 0.97
    inside = (chest.masks[2] & (reference == 3)).sum() / chest.masks[2].sum()
    assert inside > 0.85
    assert chest.masks.sum(0).max() == 1

    full = read_ct(real_data / "ct" / "tcga_34_2605_ct.nii.gz")
    masks = segment_chest(full).masks
    assert masks.shape == (3, 512, 512, 61)
    small = masks_to_grid(masks, full.affine, volume.affine, volume.voxels.shape)
    same = [dice(a, b) for a, b in zip(small.astype(bool), chest.masks, strict=True)]
    assert min(same[:2]) > 0.94  # another resampling, hence not 1
    assert same[2] > 0.9


def test_lungs_of_a_labelled_real_ct(real_data: Path):
    volume = read_ct(real_data / "ct" / "acil_ct64_ct.nii.gz")
    labels = np.asarray(nibabel.load(real_data / "ct" / "acil_ct64_lungthirds.nii.gz").dataobj)
    chest = segment_chest(volume)
    assert chest.quality is None
    # The labels run on into the chest wall at both edges of the picture: hence no more.
    assert dice(chest.masks[0], (labels >= 12) & (labels <= 14)) > 0.94
    assert dice(chest.masks[1], (labels >= 9) & (labels <= 11)) > 0.93
    assert not (chest.masks[0] & (labels >= 9) & (labels <= 11)).sum() > 50
    heart = volume.voxels[chest.masks[2]]
    assert (heart > -100).mean() > 0.85
    assert 0.5 < chest.litres[2] < 1.3


@pytest.mark.parametrize("axes", ["RAS", "SAR", "PIL"])
def test_the_storage_order_of_a_real_ct_does_not_matter(real_data: Path, axes: str):
    volume = read_ct(real_data / "ct" / "acil_ct64_ct.nii.gz")
    other = reoriented(volume.voxels, volume.affine, axes)
    assert nibabel.aff2axcodes(other.affine) == tuple(axes)
    found = segment_chest(Volume(np.asarray(other.dataobj), other.affine, volume.path))
    for mask, expected in zip(found.masks, segment_chest(volume).masks, strict=True):
        assert mask.any()
        back = reoriented(expected.astype(np.uint8), volume.affine, axes)
        np.testing.assert_array_equal(mask, np.asarray(back.dataobj) != 0)


@pytest.mark.parametrize("name", ["totalseg_abdomen_ct", "totalseg_upper_abdomen_sm_ct"])
def test_an_abdomen_is_flagged_and_gets_boxes(real_data: Path, name: str):
    volume = read_ct(real_data / "ct" / f"{name}.nii.gz")
    chest = segment_chest(volume)
    assert chest.fallback
    assert "lung" in str(chest.quality)
    np.testing.assert_array_equal(chest.masks, coarse_regions(volume))
    answer = AutoRegions(("left_lung", ANYWHERE)).masks(study(), volume)
    assert answer.fallback
    assert str(chest.quality) in str(answer.note)
    np.testing.assert_array_equal(answer.masks[0], chest.masks[1])
    assert answer.masks[1].all()


@pytest.mark.slow
def test_phantoms_against_their_exact_truth():
    healthy = 0
    for index in range(6):
        volume, truth = phantom(index)
        chest = segment_chest(volume)
        if chest.fallback:
            continue
        scores = [dice(found, true) for found, true in zip(chest.masks, truth, strict=True)]
        # Effusions and consolidations hide lung; right is never left all the same.
        assert min(scores[:2]) > 0.7
        assert (chest.masks[0] & truth[1]).sum() < 0.02 * truth[1].sum()
        assert (chest.masks[1] & truth[0]).sum() < 0.02 * truth[0].sum()
        healthy += min(scores[:2]) > 0.94 and scores[2] > 0.7
    assert healthy >= 3


@pytest.mark.parametrize("touch", [False, True])
def test_lungs_that_touch_are_parted(touch: bool):
    volume, lungs = made_chest(touch)
    pieces, _ = ndimage.label(volume.voxels < -600)
    touching = pieces[tuple(np.argwhere(lungs[0])[999])] == pieces[tuple(np.argwhere(lungs[1])[9])]
    assert touching == touch  # the test's own premise
    chest = segment_chest(volume)
    assert chest.quality is None
    assert dice(chest.masks[0], lungs[0]) > 0.95
    assert dice(chest.masks[1], lungs[1]) > 0.95
    assert not (chest.masks[0] & chest.masks[1]).any()


@pytest.mark.parametrize(
    ("shift", "turn"),
    [((45.0, -20.0), 0.0), ((-45.0, 20.0), 0.0), ((0.0, 0.0), 30.0), ((20, 0), -30)],
)
def test_a_shifted_or_turned_patient_keeps_left_and_right(shift: tuple[float, float], turn: float):
    volume, lungs = made_chest(shift=shift, turn=turn)
    chest = segment_chest(volume)
    assert chest.quality is None
    assert dice(chest.masks[0], lungs[0]) > 0.95
    assert dice(chest.masks[1], lungs[1]) > 0.95
    # Between the lungs and never in them; the middle of the scan has no say.
    assert (chest.masks[2] & lungs.any(0)).sum() < 0.02 * chest.masks[2].sum()


def test_a_mirrored_scan_has_its_sides_exchanged():
    """The sides come from the affine: with x turned round, the larger right lung is the left."""
    volume, lungs = made_chest()
    mirrored = segment_chest(Volume(volume.voxels, np.diag([-3.0, 3, 3, 1]), volume.path))
    assert mirrored.quality is None
    assert dice(mirrored.masks[0], lungs[1]) > 0.95
    assert dice(mirrored.masks[1], lungs[0]) > 0.95


def _noise() -> np.ndarray:
    return np.random.default_rng(0).normal(-300, 400, (60, 60, 40)).astype(np.int16)


def _one_lung() -> np.ndarray:
    volume, lungs = made_chest()
    return np.where(lungs[1], 30, volume.voxels).astype(np.int16)


@pytest.mark.parametrize(
    "voxels",
    [
        np.full((30, 30, 30), -1000, np.int16),
        np.full((80, 80, 60), 40, np.int16),
        np.full((2, 3, 2), -1000, np.int16),
        _noise(),
        _one_lung(),
    ],
    ids=["air", "water", "tiny", "noise", "one lung"],
)
def test_nonsense_is_flagged(voxels: np.ndarray):
    volume = Volume(voxels, np.diag([3.0, 3, 3, 1]), Path("x"))
    chest = segment_chest(volume)
    assert chest.fallback
    assert chest.quality
    assert chest.masks.shape == (3, *voxels.shape)
    assert (chest.masks[0] ^ chest.masks[1]).all()


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAR", "PIL", "IPL"])
def test_coarse_boxes_follow_the_affine(axes: str):
    """On the model's axes they are halves and the middle two thirds of W, however stored."""
    image = reoriented(np.zeros((36, 8, 10), np.uint8), np.diag([-2.0, 3, 4, 1]), axes)
    masks = coarse_regions(Volume(np.asarray(image.dataobj), image.affine, Path("x")))
    back = [
        np.asarray(reoriented(m.astype(np.uint8), image.affine, "IPL").dataobj) != 0 for m in masks
    ]
    w = np.broadcast_to(np.arange(36), (10, 8, 36))
    np.testing.assert_array_equal(back[0], w < 18)
    np.testing.assert_array_equal(back[1], w >= 18)
    np.testing.assert_array_equal(back[2], (w >= 6) & (w < 30))


def test_the_same_scan_gives_the_same_masks():
    volume, _ = made_chest()
    np.testing.assert_array_equal(segment_chest(volume).masks, segment_chest(volume).masks)


# TotalSegmentator's classes


def test_the_published_table():
    assert len(CLASSES) == 117
    assert sorted(CLASSES.values()) == list(range(1, 118))
    known = {"spleen": 1, "lung_upper_lobe_left": 10, "lung_lower_lobe_right": 14, "trachea": 16}
    known |= {"heart": 51, "aorta": 52, "pulmonary_vein": 53, "superior_vena_cava": 62}
    known |= {"inferior_vena_cava": 63, "costal_cartilages": 117}
    assert {name: CLASSES[name] for name in known} == known
    check_mapping(DEFAULT_REGIONS)
    assert [CLASSES[name] for name in DEFAULT_REGIONS["right_lung"]] == [12, 13, 14]
    assert [CLASSES[name] for name in DEFAULT_REGIONS["left_lung"]] == [10, 11]


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"heart": ["hart"]}, "did you mean 'heart'"),
        ({"lung": ["lung_upper_lobe_lef"]}, "'lung_upper_lobe_left'"),
        ({"heart": "heart"}, "give a list"),
        ({"heart": []}, "give a list"),
    ],
)
def test_misspelt_classes_are_refused(tmp_path: Path, mapping: dict, words: str):
    with pytest.raises(UserError, match=words):
        TotalSegmentatorRegions(tmp_path, mapping)


# Label maps


def test_regions_are_unions_of_ids(tmp_path: Path):
    labels = np.random.default_rng(0).integers(0, 6, (20, 22, 18)).astype(np.uint8)
    save(tmp_path / "a_seg.nii.gz", labels)
    names = {"left": (1, "2"), "right": (5,), "both": (1, 2, 5)}
    source = LabelMapRegions(tmp_path, names, "_seg", ("both", ANYWHERE, "left"))
    source = pickle.loads(pickle.dumps(source))
    assert source.regions == ("both", ANYWHERE, "left")
    answer = source.masks(study(), ct())
    np.testing.assert_array_equal(answer.masks[0], np.isin(labels, (1, 2, 5)))
    assert answer.masks[1].all()
    np.testing.assert_array_equal(answer.masks[2], np.isin(labels, (1, 2)))
    assert (answer.note, answer.fallback) == (None, False)


def test_a_folder_that_mirrors_the_cts_is_found_but_never_the_ct_itself(tmp_path: Path):
    labels = np.ones((20, 22, 18), np.float32)
    labels[3] = 0
    image = save(tmp_path / "ct" / "train_1" / "train_1_a" / "train_1_a_2.nii.gz", labels)
    save(tmp_path / "seg" / "train_1" / "train_1_a" / "train_1_a_2.nii.gz", labels)
    source = LabelMapRegions(tmp_path / "seg", {"body": (1,)})
    np.testing.assert_array_equal(source.masks(study("x", (image,)), ct()).masks[0], labels)
    with pytest.raises(UserError, match="no such label map"):
        LabelMapRegions(tmp_path / "ct", {"body": (1,)}).masks(study("x", (image,)), ct())


def test_an_empty_region_gets_a_stand_in(tmp_path: Path):
    save(tmp_path / "a.nii.gz", np.ones((20, 22, 18), np.uint8))
    source = LabelMapRegions(tmp_path, {"left_lung": (7,), "tail": (8,), "body": (1,)})
    answer = source.masks(study(), ct())
    assert answer.fallback
    assert "left_lung, tail" in str(answer.note)
    np.testing.assert_array_equal(answer.masks[0], coarse_regions(ct())[1])
    assert answer.masks[1].all()


def test_totalsegmentator_as_one_file_or_one_a_class(real_data: Path, tmp_path: Path):
    name = real_data / "ct" / "totalseg_abdomen_seg117.nii.gz"
    labels = read_label_map(name)
    volume = read_ct(real_data / "ct" / "totalseg_abdomen_ct.nii.gz")
    save(tmp_path / "a.nii.gz", labels.voxels, labels.affine)
    regions = ("right_lung", "left_lung", "lungs")
    answer = TotalSegmentatorRegions(tmp_path, regions=regions).masks(study("a"), volume)
    np.testing.assert_array_equal(answer.masks[0], np.isin(labels.voxels, (12, 13, 14)))
    np.testing.assert_array_equal(answer.masks[1], np.isin(labels.voxels, (10, 11)))
    assert answer.masks.any((1, 2, 3)).all()
    x = [apply_affine(labels.affine, np.argwhere(mask)).mean(0)[0] for mask in answer.masks]
    assert x[0] > x[2] > x[1]  # RAS: the patient's right is where x is larger

    for organ in DEFAULT_REGIONS["lungs"]:
        mask = (labels.voxels == CLASSES[organ]).astype(np.uint8)
        save(tmp_path / "b" / f"{organ}.nii.gz", mask, labels.affine)
    source = TotalSegmentatorRegions(tmp_path, regions=regions)
    np.testing.assert_array_equal(source.masks(study("b"), volume).masks, answer.masks)
    (tmp_path / "b" / "lung_upper_lobe_left.nii.gz").unlink()
    with pytest.raises(UserError, match=r"lung_upper_lobe_left.nii.gz: missing"):
        source.masks(study("b"), volume)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: AutoRegions(("left_lunge",)), "did you mean 'left_lung'"),
        (lambda p: AutoRegions(("spleen",)), "which has right_lung"),
        (lambda p: LabelMapRegions(p, {"heart": (1,)}, regions=("hart",)), "did you mean 'heart'"),
        (lambda p: LabelMapRegions(p, {"heart": ("one",)}), "ids from 1"),
        (lambda p: LabelMapRegions(p, {"heart": (0,)}), "ids from 1"),
        (lambda p: LabelMapRegions(p, {"heart": "12"}), "ids from 1"),
        (lambda p: LabelMapRegions(p / "no", {"heart": (1,)}), "no such folder"),
        (lambda p: TotalSegmentatorRegions(p, regions=("airway",)), "did you mean 'airways'"),
    ],
)
def test_what_a_source_cannot_give_is_refused(tmp_path: Path, make, words: str):
    with pytest.raises(UserError, match=words) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_no_label_map_is_refused(tmp_path: Path):
    labels = np.zeros((20, 22, 18), np.float32)
    for value in (0.5, -3.0, 1e6):
        labels[2, 3, 4] = value
        save(tmp_path / "a.nii.gz", labels)
        with pytest.raises(UserError, match="no label map"):
            LabelMapRegions(tmp_path, {"heart": (1,)}).masks(study(), ct())


# Other grids


@pytest.mark.parametrize("axes", ["LPS", "SAR", "IPL"])
def test_a_label_map_stored_the_other_way_round(tmp_path: Path, axes: str):
    labels = np.random.default_rng(0).integers(0, 3, (20, 22, 18)).astype(np.uint8)
    image = reoriented(labels, RAS, axes)
    save(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    answer = LabelMapRegions(tmp_path, {"one": (1,)}).masks(study(), ct())
    np.testing.assert_array_equal(answer.masks[0], labels == 1)


def test_a_label_map_elsewhere_is_refused(tmp_path: Path):
    far = RAS.copy()
    labels = np.ones((20, 22, 18), np.uint8)
    source = LabelMapRegions(tmp_path, {"one": (1,)})
    far[0, 3] += 0.4 * 20 * 2.0
    save(tmp_path / "a.nii.gz", labels, far)
    answer = source.masks(study(), ct())  # six tenths are covered
    np.testing.assert_array_equal(answer.masks[0, :8], 0)
    np.testing.assert_array_equal(answer.masks[0, 8:], 1)
    for distance in (0.3, 5.0):
        far[0, 3] += distance * 20 * 2.0
        save(tmp_path / "a.nii.gz", labels, far)
        with pytest.raises(UserError, match=r"covers \d+% of the CT") as error:
            source.masks(study(), ct())
        assert str(tmp_path / "a.nii.gz") in str(error.value)


def _by_hand(values: np.ndarray, affine: np.ndarray, grid_affine: np.ndarray, index: np.ndarray):
    position = apply_affine(np.linalg.inv(affine) @ grid_affine, index)
    voxel = np.rint(position).astype(int)
    if (voxel < 0).any() or (voxel >= values.shape).any():
        return 0
    return values[tuple(voxel)]


def _turned() -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [10, -15, 25], degrees=True).as_matrix()
    affine[:3, :3] = turn * [1.7, 2.1, 2.9]
    affine[:3, 3] = [-18, -34, 38]
    return affine


@pytest.mark.parametrize(
    "grid_affine",
    [
        np.array([[0, 0, -1.3, 17.1], [0, -1.9, 0, 20.3], [-2.3, 0, 0, 99.7], [0, 0, 0, 1.0]]),
        np.array([[0, 5.1, 0, -33.3], [0, 0, 2.5, -30.2], [3.3, 0, 0, 30.25], [0, 0, 0, 1.0]]),
        _turned(),
    ],
    ids=["finer", "wider", "oblique"],
)
def test_every_cell_takes_the_voxel_it_lies_in(grid_affine: np.ndarray):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (2, 20, 22, 18)).astype(np.uint8)
    values = rng.integers(1, 60000, (20, 22, 18)).astype(np.uint16)
    shape = (21, 24, 23)
    small = masks_to_grid(masks, RAS, grid_affine, shape)
    picked = nearest(values, RAS, grid_affine, shape)
    assert small.dtype == np.uint8
    assert picked.dtype == np.uint16
    outside = 0
    for index in rng.integers(0, shape, (600, 3)):
        assert picked[tuple(index)] == _by_hand(values, RAS, grid_affine, index)
        outside += picked[tuple(index)] == 0
        for mask, found in zip(masks, small, strict=True):
            assert found[tuple(index)] == _by_hand(mask, RAS, grid_affine, index)
    assert 10 < outside < 590  # both kinds were there


@pytest.mark.parametrize("axes", ["LPS", "SAR", "PIL"])
def test_masks_land_in_the_same_places_however_stored(axes: str):
    """Also with every second centre on a border: cells half as large as voxels and shifted."""
    masks = np.random.default_rng(0).integers(0, 2, (1, 20, 22, 18)).astype(np.uint8)
    grid_affine = np.array([[0, 0, -1, 19], [0, -1.25, 0, 22.5], [-1.5, 0, 0, 91], [0, 0, 0, 1.0]])
    expected = masks_to_grid(masks, RAS, grid_affine, (36, 44, 40))
    assert 0.4 < expected.mean() < 0.6
    image = reoriented(masks[0], RAS, axes)
    stored = np.asarray(image.dataobj)[None]
    found = masks_to_grid(stored, image.affine, grid_affine, (36, 44, 40))
    np.testing.assert_array_equal(found, expected)


def test_masks_go_there_and_back():
    """To the model's axes at the same spacing and back: nothing is lost."""
    masks = np.random.default_rng(0).integers(0, 2, (3, 20, 22, 18)).astype(np.uint8)
    model = np.array([[0, 0, -2, 18], [0, -2.5, 0, 22.5], [-3, 0, 0, 91], [0, 0, 0, 1.0]])
    there = masks_to_grid(masks, RAS, model, (18, 22, 20))
    np.testing.assert_array_equal(there, masks.transpose(0, 3, 2, 1)[:, ::-1, ::-1, ::-1])
    np.testing.assert_array_equal(masks_to_grid(there, model, RAS, (20, 22, 18)), masks)
