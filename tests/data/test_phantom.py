"""The phantom: same patient every time, truth that is true, tissues that look like tissues."""

import dataclasses
import pickle

import numpy as np
import pytest
from scipy import ndimage

from hirescam_jax.data.phantom.anatomy import REGIONS, Anatomy
from hirescam_jax.data.phantom.canvas import Canvas
from hirescam_jax.data.phantom.findings import LABELS
from hirescam_jax.data.phantom.marks import MARKS
from hirescam_jax.data.phantom.phantom import (
    Person,
    Phantom,
    PhantomConfig,
    draw_found,
    draw_marks_present,
    render,
)

GRID = (12, 8, 7)
SHAPE, SPACING = (48, 64, 64), (6.25, 5.625, 5.625)


def phantom(split: str = "train", size: int = 1000, **config) -> Phantom:
    return Phantom(PhantomConfig(**config), split, size, GRID)


def healthy(index: int = 0, **patient) -> Person:
    """A patient without findings and marks, with some properties of the body given."""
    person = phantom().person(index)
    return dataclasses.replace(
        person,
        patient=dataclasses.replace(person.patient, **patient),
        found=np.zeros_like(person.found),
        marks=dict.fromkeys(MARKS, False),
    )


# -- the source -----------------------------------------------------------------------------------


def test_item_has_the_promised_arrays():
    item = phantom()[np.int64(3)]
    assert {name: (array.shape, array.dtype.name) for name, array in item.items()} == {
        "volume": (SHAPE, "int16"),
        "findings": ((len(LABELS), len(REGIONS)), "uint8"),
        "regions": ((len(REGIONS), *GRID), "uint8"),
        "index": ((), "int32"),
    }
    assert item["index"] == 3
    assert item["volume"].min() >= -1024
    assert item["volume"].max() <= 3071
    assert set(np.unique(item["regions"])) == {0, 1}
    assert len(phantom(size=7)) == 7


def test_same_patient_in_any_order_and_any_process():
    source = phantom()
    copy = pickle.loads(pickle.dumps(source))
    first = [source[i] for i in (4, 1)]
    again = [copy[i] for i in (1, 4)][::-1]
    for a, b in zip(first, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_splits_seeds_and_indices_are_other_patients():
    volumes = [
        phantom("train")[0],
        phantom("train")[1],
        phantom("val")[0],
        phantom("test")[0],
        phantom("train", seed=1)[0],
    ]
    for i, a in enumerate(volumes):
        for b in volumes[:i]:
            assert (a["volume"] != b["volume"]).mean() > 0.5


def test_size_does_not_change_a_patient():
    a, b = phantom(size=3)[2], phantom(size=1000)[2]
    np.testing.assert_array_equal(a["volume"], b["volume"])


@pytest.mark.parametrize(
    ("split", "size", "grid", "config"),
    [
        ("training", 3, GRID, {}),
        ("train", -1, GRID, {}),
        ("train", 3, (0, 8, 8), {}),
        ("train", 3, GRID, {"shape": (48, 64, 0)}),
        ("train", 3, GRID, {"seed": -1}),
        ("train", 3, GRID, {"confounding": 1.5}),
    ],
)
def test_impossible_settings_are_refused(split, size, grid, config):
    with pytest.raises(ValueError, match=r"must|need") as caught:
        Phantom(PhantomConfig(**config), split, size, grid)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [3, -1])
def test_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=rf"index {index} is outside the 3 patients"):
        phantom(size=3)[index]


# -- truth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(12))
def test_lesions_lie_in_the_regions_that_the_findings_name(index):
    case = phantom().case(index)
    assert case.regions.sum(0).max() == 1, "regions overlap"
    assert all(region.sum() > 200 for region in case.regions)
    voxels = np.einsum("kdhw,rdhw->kr", case.lesions.astype(np.int32), case.regions)
    np.testing.assert_array_equal(voxels > 0, case.findings > 0)
    np.testing.assert_array_equal(voxels.sum(1), case.lesions.sum((1, 2, 3)))


def test_case_is_the_item_at_full_resolution():
    source = phantom("val")
    item, case = source[5], source.case(5)
    np.testing.assert_array_equal(item["volume"], case.volume)
    np.testing.assert_array_equal(item["findings"], case.findings)
    wanted = np.zeros((len(REGIONS), *GRID), np.uint8)
    for d in range(GRID[0]):
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                source_voxel = d * 48 // GRID[0], h * 64 // GRID[1], w * 64 // GRID[2]
                wanted[:, d, h, w] = case.regions[:, *source_voxel]
    np.testing.assert_array_equal(item["regions"], wanted)
    assert wanted.any((1, 2, 3)).all()


def test_affine_points_to_the_patients_right_front_and_head():
    source = phantom()
    affine = source.case(0).affine
    centre = affine @ [*((np.array(SHAPE) - 1) / 2), 1]
    np.testing.assert_allclose(centre, [0, 0, 0, 1])
    np.testing.assert_allclose(affine[:3, :3] @ [1, 0, 0], [0, 0, -SPACING[0]])  # down
    np.testing.assert_allclose(affine[:3, :3] @ [0, 1, 0], [0, -SPACING[1], 0])  # back
    np.testing.assert_allclose(affine[:3, :3] @ [0, 0, 1], [-SPACING[2], 0, 0])  # left


def test_organs_lie_where_they_should():
    regions = phantom().case(2).regions
    middle = {name: np.argwhere(regions[r]).mean(0) for r, name in enumerate(REGIONS)}
    assert middle["right_lung"][2] < middle["heart"][2] < middle["left_lung"][2]
    assert middle["great_vessels"][0] < middle["heart"][0]
    assert middle["heart"][1] < middle["mediastinum"][1]


def test_resolutions_agree_on_the_volumes_of_regions():
    person = phantom().person(11)
    coarse = np.bincount(render(person, SHAPE, SPACING)[1].ravel()) * np.prod(SPACING)
    fine_shape, fine_spacing = (90, 120, 120), (300 / 90, 3.0, 3.0)
    fine = np.bincount(render(person, fine_shape, fine_spacing)[1].ravel()) * np.prod(fine_spacing)
    np.testing.assert_allclose(coarse[1:], fine[1:], rtol=0.06)  # a voxel's edge on small organs


def test_slabs_do_not_show(monkeypatch):
    person = healthy(noise_hu=0.0)
    whole, labels = render(person, SHAPE, SPACING)
    monkeypatch.setattr("hirescam_jax.data.phantom.phantom._SLAB_VOXELS", 7 * 64 * 64)
    parts, parts_labels = render(person, SHAPE, SPACING)
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert (labels != parts_labels).mean() < 1e-4


# -- looks ----------------------------------------------------------------------------------------


def test_tissues_have_their_hounsfield_units():
    person = healthy(3, female=False, fat_mm=24.0, contrast_hu=0.0)
    shape, spacing = (75, 120, 120), (4.0, 3.0, 3.0)
    volume, labels = render(person, shape, spacing)
    canvas = Canvas(shape, spacing, person.patient.pose, 0, shape[0])
    anatomy = Anatomy(person.patient)
    z, y, x = canvas.z, canvas.y, canvas.x
    body = anatomy.body_mm(z, y, x)
    in_front = (y < 0) & (np.abs(x) < 80) & (z > 20) & (z < 60)
    lungs = ndimage.binary_erosion((labels == 1) | (labels == 2), iterations=2)
    heart = ndimage.binary_erosion(labels == 3, iterations=3)
    vertebra = (np.abs(x) < 8) & (np.abs(y - 62) < 6) & (z > -80) & (z < 80)
    ribs = np.abs(anatomy.cage_mm(z, y, x) - 5.5) < 2
    air = np.abs(canvas.Y + 172) + 0 * canvas.X + 0 * z < 5
    assert -900 < np.median(volume[lungs]) < -780
    assert -125 < np.median(volume[(body > -15) & (body < -6) & in_front]) < -85
    assert 30 < np.median(volume[heart]) < 60
    assert np.percentile(volume[vertebra], 60) > 150
    assert np.percentile(volume[ribs & (z > -80) & (z < 60) & (y > 0)], 75) > 200
    assert np.median(volume[air]) < -985


@pytest.mark.parametrize("label", LABELS)
def test_finding_can_be_seen(label):
    """At the coarsest grid, the same patient with and without the finding differs in its lesion."""
    least = {"emphysema": 70, "ground_glass": 90, "aortic_aneurysm": 80, "cardiomegaly": 100}
    row = LABELS.index(label)
    source = phantom()
    index = next(i for i in range(200) if source.person(i).found[row].any())
    person = source.person(index)
    without = person.found.copy()
    without[row] = 0
    volume, _ = render(dataclasses.replace(person, found=without), SHAPE, SPACING)
    lesions = np.zeros((len(LABELS), *SHAPE), bool)
    changed, _ = render(person, SHAPE, SPACING, lesions)
    difference = np.abs(changed.astype(int) - volume)[lesions[row]]
    assert difference.mean() > least.get(label, 140)


@pytest.mark.parametrize("mark", MARKS)
def test_mark_can_be_seen_and_lies_outside_the_organs(mark):
    person = healthy(1)
    without, labels = render(person, SHAPE, SPACING)
    marked = dataclasses.replace(person, marks={**person.marks, mark: True})
    volume, marked_labels = render(marked, SHAPE, SPACING)
    difference = np.abs(volume.astype(int) - without)
    np.testing.assert_array_equal(labels, marked_labels)
    assert (difference > 300).sum() >= 40
    assert difference[ndimage.binary_erosion(labels > 0)].max() == 0


# -- statistics: of the parameters alone, within what chance allows --------------------------------


def draw_many(confounding: float, count: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N, K] and marks [N, M] of many patients."""
    rng = np.random.default_rng(5)
    found = [draw_found(rng) for _ in range(count)]
    marks = [list(draw_marks_present(rng, f, confounding).values()) for f in found]
    return np.array([f.any(1) for f in found]), np.array(marks)


def close(share: np.ndarray, wanted: float) -> bool:
    """The share of True does not contradict a probability: within 5 standard deviations."""
    return abs(share.mean() - wanted) < 5 * np.sqrt(0.25 / len(share))


def test_every_finding_is_neither_rare_nor_common():
    labels, _ = draw_many(0.8)
    assert (labels.mean(0) > 0.15).all()
    assert (labels.mean(0) < 0.42).all()
    assert {label for labels in MARKS.values() for label in labels} == set(LABELS)


@pytest.mark.parametrize("confounding", [0.0, 0.8, 1.0])
def test_marks_go_with_their_findings_as_strongly_as_asked(confounding):
    labels, marks = draw_many(confounding)
    for m, with_labels in enumerate(MARKS.values()):
        ill = labels[:, [LABELS.index(label) for label in with_labels]].any(1)
        assert close(marks[ill, m], 0.5 + confounding / 2)
        assert close(marks[~ill, m], 0.5 - confounding / 2)


@pytest.mark.parametrize(("split", "linked"), [("train", True), ("val", True), ("test", False)])
def test_marks_go_with_findings_in_training_but_not_in_the_test(split, linked):
    source = phantom(split)
    people = [source.person(i) for i in range(250)]
    agree = []
    for mark, labels in MARKS.items():
        rows = [LABELS.index(label) for label in labels]
        agree += [person.found[rows].any() == person.marks[mark] for person in people]
    assert close(np.array(agree), 0.9 if linked else 0.5)


def test_lung_findings_are_on_either_or_both_sides():
    rng = np.random.default_rng(0)
    found = np.array([draw_found(rng)[:6, :2] for _ in range(600)])
    right, left = found[..., 0] > 0, found[..., 1] > 0
    assert ((right & ~left).sum(0) > 5).all()
    assert ((left & ~right).sum(0) > 5).all()
    assert ((right & left).sum(0) > 5).all()
