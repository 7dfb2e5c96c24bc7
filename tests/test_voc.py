"""PASCAL VOC in its real layout, and the comparison of Grad-CAM and HiResCAM on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hirescam_jax.data.voc import CLASSES, VOC, VOID, class_masks
from hirescam_jax.errors import UserError
from hirescam_jax.models import MobileNetV2
from hirescam_jax.voc import Maps, compare, difference, measure, table

CAT, DOG = CLASSES.index("cat") + 1, CLASSES.index("dog") + 1
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] * 85 + [224, 224, 192]


def photo_and_mask(rng: np.random.Generator, kinds: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """A grey photo 48 x 64 with a red square for a cat and a blue one for a dog, void around."""
    photo = rng.integers(90, 160, (48, 64, 3))
    mask = np.zeros((48, 64), np.uint8)
    for kind in kinds:
        # Cats to the left, dogs to the right.
        y, x = rng.integers(2, 20), rng.integers(2, 10) + (32 if kind == DOG else 0)
        mask[y - 1 : y + 25, x - 1 : x + 21] = VOID
        mask[y : y + 24, x : x + 20] = kind
        photo[y : y + 24, x : x + 20] = (230, 40, 40) if kind == CAT else (40, 40, 230)
    return photo.astype(np.uint8), mask


def write_voc(root: Path, count: int = 24, sets: bool = True, xml: bool = True) -> Path:
    rng = np.random.default_rng(0)
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    ids = [f"2007_{i:06d}" for i in range(count)]
    for i, one in enumerate(ids):
        kinds = ((CAT,), (DOG,), (CAT, DOG))[i % 3]
        photo, mask = photo_and_mask(rng, kinds)
        Image.fromarray(photo).save(folder / "JPEGImages" / f"{one}.jpg", quality=95)
        image = Image.fromarray(mask)
        image.putpalette(PALETTE)
        image.save(folder / "SegmentationClass" / f"{one}.png")
        if xml:
            objects = "".join(
                f"<object><name>{CLASSES[k - 1]}</name><difficult>0</difficult></object>"
                for k in kinds
            )
            (folder / "Annotations").mkdir(exist_ok=True)
            text = f"<annotation><filename>{one}.jpg</filename>{objects}</annotation>"
            (folder / "Annotations" / f"{one}.xml").write_text(text)
    if sets:
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(ids[: count * 2 // 3]) + "\n")
        (lists / "val.txt").write_text("\n".join(ids[count * 2 // 3 :]) + "\n")
    return folder


def test_items_in_the_real_layout(tmp_path: Path):
    folder = write_voc(tmp_path, 6)
    source = VOC(tmp_path, "train", 32)  # found inside VOCdevkit
    assert (len(source), len(VOC(folder, "val", 32))) == (4, 2)
    item = source[2]
    assert item["image"].shape == (32, 32, 3)
    assert item["image"].dtype == item["mask"].dtype == np.uint8
    # 48 x 64 becomes 24 x 32 in the middle, void above and below.
    assert (item["mask"][:4] == VOID).all()
    assert (item["mask"][28:] == VOID).all()
    found = np.flatnonzero(item["labels"]) + 1
    assert list(found) == [CAT, DOG]
    with Image.open(folder / "SegmentationClass" / "2007_000002.png") as mask:
        whole = np.asarray(mask)
    for kind in (CAT, DOG):
        share = (item["mask"] == kind).sum() / (32 * 24)
        assert share == pytest.approx((whole == kind).mean(), abs=0.03)
    masks = class_masks(item["mask"])
    assert masks.shape == (20, 32, 32)
    np.testing.assert_array_equal(np.flatnonzero(masks.any((1, 2))) + 1, found)


def test_without_lists_and_annotations(tmp_path: Path):
    folder = write_voc(tmp_path, 8, sets=False, xml=False)
    train, val = (VOC(folder, name, 32) for name in ("train", "val"))
    assert (len(train), len(val)) == (6, 2)
    assert not set(train.ids) & set(val.ids)
    for source in (train, val):
        for i, one in enumerate(source.ids):
            kinds = ([CAT], [DOG], [CAT, DOG])[int(one[-6:]) % 3]
            assert list(np.flatnonzero(source[i]["labels"]) + 1) == kinds


def _unknown_class(folder: Path) -> None:
    Image.fromarray(np.full((48, 64), 33, np.uint8)).save(
        folder / "SegmentationClass" / "2007_000000.png"
    )


def _other_size(folder: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(
        folder / "SegmentationClass" / "2007_000000.png"
    )


BAD = {
    "unknown class": (_unknown_class, "unknown class id 33"),
    "other size": (_other_size, r"\(9, 9\) pixels"),
    "broken photo": (
        lambda folder: (folder / "JPEGImages" / "2007_000000.jpg").write_bytes(b"no"),
        "not readable as an image",
    ),
    "broken XML": (
        lambda folder: (folder / "Annotations" / "2007_000000.xml").write_text("<a>"),
        "not readable as XML",
    ),
    "unknown name": (
        lambda folder: (folder / "Annotations" / "2007_000000.xml").write_text(
            "<annotation><object><name>unicorn</name></object></annotation>"
        ),
        "unknown class 'unicorn'",
    ),
    "no mask": (
        lambda folder: (folder / "SegmentationClass" / "2007_000000.png").unlink(),
        "2007_000000.png: missing",
    ),
    "no list": (
        lambda folder: (folder / "ImageSets" / "Segmentation" / "train.txt").unlink(),
        "no such image set",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data(tmp_path: Path, kind: str):
    damage, message = BAD[kind]
    folder = write_voc(tmp_path, 3)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        VOC(folder, "train", 32)[0]
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_voc(tmp_path: Path):
    with pytest.raises(UserError, match="no JPEGImages"):
        VOC(tmp_path, "train", 32)


def test_void_is_left_out_of_the_measures():
    """A map that is strongest on void points nowhere else than at the object inside."""
    mask = np.zeros((1, 32, 32), np.uint8)
    mask[0, 8:16, 8:16] = CAT
    mask[0, 20:28, 20:28] = VOID
    cells = np.zeros((1, 4, 4), np.float32)
    cells[0, 1, 1], cells[0, 2:, 2:] = 1, 5
    maps = Maps(
        np.array([0]), np.array([CAT - 1]), cells, -cells, np.zeros((1, 20)), np.ones((1, 20))
    )
    before = measure(maps, mask)
    assert before["pointing"][0, 0] == 0  # void covers only a part of the strong cells
    mask[0, 12:, 12:] = np.where(mask[0, 12:, 12:] == CAT, CAT, VOID)
    after = measure(maps, mask)
    assert after["pointing"][0, 0] == 1
    assert after["energy"][0, 0] > 4 * before["energy"][0, 0]
    assert after["pointing"][0, 1] == after["energy"][0, 1] == 0  # all negative


def test_differences_by_hand():
    exact = np.array([[[1.0, -1.0], [2.0, 0.0]]])
    averaged = np.array([[[1.0, 1.0], [0.0, 0.0]]])
    maps = Maps(np.array([0]), np.array([0]), exact, averaged, np.zeros(1), np.zeros(1))
    found = difference(maps)
    assert found["relative_l1"] == pytest.approx(4 / 4)
    assert found["largest"] == pytest.approx(2 / 2)
    assert found["other_peak"] == 1
    assert found["other_sign"] == pytest.approx(2 / 4)
    assert found["correlation"] == pytest.approx(np.corrcoef(exact.ravel(), averaged.ravel())[0, 1])


TINY = MobileNetV2(stages=((1, 8, 1, 2), (2, 16, 1, 2), (2, 24, 1, 2)), last_width=32, stem_width=8)


@pytest.mark.long
def test_comparison(tmp_path: Path):
    """A head on random features learns red from blue; only behind an average do the maps agree."""
    folder = write_voc(tmp_path, 36)
    options = {"size": 64, "epochs": 100, "batch_size": 8, "model": TINY}
    result = compare(folder, tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    with Image.open(tmp_path / "out" / "pictures.png") as picture:
        assert picture.width > 500
    gap, flatten = result["heads"]["gap"], result["heads"]["flatten"]
    assert (gap["verdict"]["kind"], flatten["verdict"]["kind"]) == ("equal", "exact")
    assert gap["difference"]["largest"] < 1e-5
    assert gap["difference"]["other_peak"] == 0
    assert gap["maps"]["hirescam"] == pytest.approx(gap["maps"]["gradcam"], abs=1e-3)
    assert flatten["difference"]["relative_l1"] > 0.1
    assert flatten["auroc"] > 0.9
    assert flatten["maps"]["hirescam"]["pointing"] > flatten["maps"]["random"]["pointing"]
    assert "exact" in table(result)
    with pytest.raises(UserError, match="exists"):
        compare(folder, tmp_path / "out", **options)


@pytest.mark.slow
def test_real_photos(real_data: Path):
    source = VOC(real_data / "voc", "val", 224)
    items = [source[i] for i in range(len(source))]
    assert len(items) == 12
    for item in items:
        seen = np.unique(item["mask"])
        kinds = seen[(seen > 0) & (seen != VOID)]
        assert len(kinds)
        assert set(kinds - 1) <= set(np.flatnonzero(item["labels"]))
