"""PASCAL VOC: the reader on a tree written here, both heads, and their maps."""

import json
import re
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from hirescam_jax.cli import main as cli
from hirescam_jax.errors import UserError
from hirescam_jax.experiments.voc import compare as voc
from hirescam_jax.experiments.voc.compare import prediction_scores
from hirescam_jax.experiments.voc.maps import (
    PairMaps,
    Pairs,
    agreement,
    differences,
    measured,
    pair_maps,
)
from hirescam_jax.experiments.voc.page import lines_of, tables_of
from hirescam_jax.experiments.voc.photos import CLASSES, PADDING, VOC, VOID
from hirescam_jax.experiments.voc.training import BACKBONE
from hirescam_jax.metrics import auroc, average_precision
from hirescam_jax.models import MobileNetV2
from hirescam_jax.weights.pytorch import from_torch, read_weights, to_torch, write_weights
from tests.web_page import Page

CAT, DOG, PERSON = (CLASSES.index(name) for name in ("cat", "dog", "person"))
COLORS = {CAT: (230, 40, 30), DOG: (30, 60, 230)}
SIZE = 64
TINY = MobileNetV2(stages=((1, 8, 1, 2), (2, 16, 1, 2)), stem_width=12, last_width=48)


def write_photo(
    root: Path, name: str, size: tuple[int, int], patches: dict[int, tuple[int, int]], seed: int
) -> None:
    """Grey noise with a 16 x 16 patch of each class's colour at (row, column), its mask with a
    void border of two pixels, and its annotation."""
    width, height = size
    photo = np.random.default_rng(seed).integers(90, 160, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    objects = ""
    for label, (row, column) in patches.items():
        area = np.zeros((height, width), bool)
        area[row : row + 16, column : column + 16] = True
        photo[area] = COLORS[label]
        mask[area] = label + 1
        mask[ndimage.binary_dilation(area, iterations=2) & ~area] = VOID
        objects += f"<object><name>{CLASSES[label]}</name><difficult>0</difficult></object>"
    save(root, name, photo, mask)
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")


def save(root: Path, name: str, photo: np.ndarray, mask: np.ndarray) -> None:
    Image.fromarray(photo).save(root / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
    picture = Image.fromarray(mask, "L").convert("P")
    picture.putdata(mask.ravel())
    picture.save(root / "SegmentationClass" / f"{name}.png")


def folders(root: Path) -> Path:
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir()
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """VOCdevkit/VOC2012 with 32 photos to train on and 12 to measure."""
    root = folders(tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2012")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 12)):
        names = [f"{split}_{i:03d}" for i in range(count)]
        for i, name in enumerate(names):
            row, left, right = rng.integers(2, 22), rng.integers(2, 14), rng.integers(32, 46)
            sides = [int(left), int(right)] if rng.random() < 0.5 else [int(right), int(left)]
            labels = ([CAT], [DOG], [CAT, DOG], [])[i % 4]
            patches = {label: (int(row), sides[j]) for j, label in enumerate(labels)}
            write_photo(root, name, (64, 40), patches, int(rng.integers(10**6)))
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A backbone with random weights, and a classifier of seven outputs that nobody needs."""
    model = TINY.clone(num_labels=7)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 3)))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_weights(path, to_torch(model, variables, (SIZE, SIZE)))
    return path


# -- the reader -----------------------------------------------------------------------------------


def test_photo_and_mask_are_centred_and_padded(tree):
    source = VOC(tree, "train", SIZE)
    item = source[2]
    name = source.names[2]
    photo = np.array(Image.open(tree / "JPEGImages" / f"{name}.jpg"))
    mask = np.array(Image.open(tree / "SegmentationClass" / f"{name}.png"))
    assert set(np.unique(mask)) == {0, CAT + 1, DOG + 1, VOID}
    # 64 x 40 in a square of 64: nothing is scaled, and 12 rows of padding at each end.
    assert item["image"].dtype == item["mask"].dtype == item["labels"].dtype == np.uint8
    np.testing.assert_array_equal(item["image"][12:52], photo)
    np.testing.assert_array_equal(item["mask"][12:52], mask)
    for part in (slice(0, 12), slice(52, 64)):
        assert (item["image"][part] == PADDING).all()
        assert (item["mask"][part] == VOID).all()
    assert np.flatnonzero(item["labels"]).tolist() == [CAT, DOG]
    assert item["index"] == 2
    double = VOC(tree, "train", 2 * SIZE)[2]
    np.testing.assert_array_equal(double["mask"][24:104], np.kron(mask, np.ones((2, 2), np.uint8)))


def test_a_portrait_is_padded_left_and_right(tmp_path):
    root = folders(tmp_path)
    write_photo(root, "a", (30, 70), {DOG: (40, 10)}, 0)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    item = VOC(root, "train", 70)[0]
    assert (item["mask"][:, :20] == VOID).all()
    assert (item["mask"][:, 50:] == VOID).all()
    assert (item["mask"][40:56, 30:46] == DOG + 1).all()
    assert (item["image"][:, :20] == PADDING).all()


def test_grain_reads_it_in_batches(tree):
    source = VOC(tree.parents[1], "val", SIZE)  # the folder around VOCdevkit
    batches = list(grain.MapDataset.source(source).batch(6).to_iter_dataset())
    assert [batch["image"].shape for batch in batches] == [(6, SIZE, SIZE, 3)] * 2
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(12))


def test_labels_of_annotations_and_of_masks(tmp_path):
    root = folders(tmp_path)
    write_photo(root, "a", (64, 40), {CAT: (4, 4)}, 0)
    write_photo(root, "b", (64, 40), {DOG: (4, 4)}, 1)
    # A difficult dog, a person of whom a head is a part, and the cat is not mentioned.
    (root / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>dog</name><difficult>1</difficult></object><object>"
        "<part><name>head</name></part><name>person</name></object></annotation>"
    )
    (root / "Annotations" / "b.xml").unlink()
    # Main has photos without masks too, and a second column in the files of one class.
    Image.new("RGB", (50, 50)).save(root / "JPEGImages" / "c.jpg")
    (root / "Annotations" / "c.xml").write_text(
        "<annotation><object><name>cat</name></object></annotation>"
    )
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("a -1\nb -1\nc  1\n")
    source = VOC(root, "Main/cat_train", SIZE)
    labels = [source[i]["labels"] for i in range(3)]
    assert [np.flatnonzero(one == 1).tolist() for one in labels] == [[PERSON], [DOG], [CAT]]
    assert [np.flatnonzero(one == VOID).tolist() for one in labels] == [[DOG], [], []]
    assert (source[2]["mask"] == VOID).all()
    assert Pairs.of(
        np.stack([source[i]["labels"] for i in range(3)]),
        np.stack([source[i]["mask"] for i in range(3)]),
    ).photo.tolist() == [1]


def test_split_without_image_sets(tmp_path):
    root = tmp_path
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir()
    for i in range(8):
        write_photo(root, f"p{i}", (64, 40), {CAT: (4, 4)}, i)
    for i in (6, 7):  # the augmented masks count too, the official ones come first
        file = root / "SegmentationClass" / f"p{i}.png"
        file.rename(root / "SegmentationClassAug" / file.name)
    Image.new("L", (64, 40)).save(root / "SegmentationClassAug" / "p0.png")
    Image.new("RGB", (64, 40)).save(root / "JPEGImages" / "no_mask.jpg")
    train, val = VOC(root, "train", SIZE), VOC(root, "val", SIZE)
    assert len(val) == 2
    assert sorted(train.names + val.names) == [f"p{i}" for i in range(8)]
    assert train.names == VOC(root, "train", SIZE).names
    assert train.names != VOC(root, "train", SIZE, seed=1).names
    source = train if "p0" in train.names else val
    assert CAT + 1 in source[source.names.index("p0")]["mask"]


def broken() -> dict:
    """Ways to spoil a tree, and what the error says."""

    def photo_cut(root: Path) -> None:
        file = root / "JPEGImages" / "a.jpg"
        file.write_bytes(file.read_bytes()[:600])

    def mask_no_png(root: Path) -> None:
        (root / "SegmentationClass" / "a.png").write_text("no picture")

    def mask_crc(root: Path) -> None:
        file = root / "SegmentationClass" / "a.png"
        data = bytearray(file.read_bytes())
        data[30] ^= 255
        file.write_bytes(data)

    def mask_of(array: np.ndarray):
        return lambda root: Image.fromarray(array).save(root / "SegmentationClass" / "a.png")

    def text(file: str, content: str):
        return lambda root: (root / file).write_text(content)

    def gone(file: str):
        return lambda root: (root / file).unlink()

    xml, listed = "Annotations/a.xml", "ImageSets/Segmentation/train.txt"
    named = "<annotation><object><name>{}</name></object></annotation>"
    return {
        "photo cut off": (photo_cut, r"a\.jpg: cannot be read .*copy it anew"),
        "mask no picture": (mask_no_png, r"a\.png: cannot be read \(no image\)"),
        "mask damaged": (mask_crc, r"a\.png: cannot be read"),
        "mask of another size": (
            mask_of(np.zeros((40, 63), np.uint8)),
            r"a\.png: 63 x 40 pixels, but its photo has 64 x 40",
        ),
        "mask of colours": (mask_of(np.zeros((40, 64, 3), np.uint8)), r"a\.png: mode RGB"),
        "class of no name": (mask_of(np.full((40, 64), 21, np.uint8)), r"a\.png: class 21"),
        "class 254": (mask_of(np.full((40, 64), 254, np.uint8)), r"a\.png: class 254"),
        "no mask": (gone("SegmentationClass/a.png"), r"SegmentationClass/a\.png: no such file"),
        "no photo": (gone("JPEGImages/a.jpg"), r"JPEGImages/a\.jpg: no such file, but .*train"),
        "unknown object": (
            text(xml, named.format("cta")),
            r"a\.xml: object 1: name 'cta' .*did you mean 'cat'",
        ),
        "no XML": (text(xml, "<annotation>"), r"a\.xml: no XML"),
        "empty set": (text(listed, "\n"), r"train\.txt: lists no photo"),
        "no such set": (gone(listed), r"no image set 'train' \(did you mean 'trainval'"),
    }


@pytest.mark.parametrize("name", broken())
def test_bad_input_is_named(tmp_path, name):
    root = folders(tmp_path)
    write_photo(root, "a", (64, 40), {CAT: (4, 4)}, 0)
    for image_set in ("train", "trainval"):
        (root / "ImageSets" / "Segmentation" / f"{image_set}.txt").write_text("a\n")
    spoil, message = broken()[name]
    assert VOC(root, "train", SIZE)[0]["labels"][CAT] == 1
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        VOC(root, "train", SIZE)[0]
    assert "\n" not in str(caught.value)


def test_missing_folders_are_named(tmp_path, tree, weights):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        VOC(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="has no folder JPEGImages: give VOCdevkit/VOC2012"):
        VOC(tmp_path, "train")
    with pytest.raises(UserError, match="all photos of train are in train"):
        voc.run_voc(tree, weights, tmp_path / "o", size=SIZE, train_set="train", val_set="train")


def test_command_line_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["voc", str(tmp_path), "--weights", "w.pth", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "JPEGImages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_leave_out_what_is_difficult_and_undefined():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    labels[:, 2], labels[:, 3] = 1, 0  # in all photos, in none
    logits = rng.normal(size=(60, 4)) + labels
    labels[:20, 0] = VOID
    found = prediction_scores(logits, labels)
    counted = labels[20:, 0]
    first = [f(logits[20:, 0], counted) for f in (auroc, average_precision)]
    second = [f(logits[:, 1], labels[:, 1]) for f in (auroc, average_precision)]
    assert found["auroc"]["classes"] == 2
    assert found["auroc"]["value"] == pytest.approx((first[0] + second[0]) / 2)
    assert found["average_precision"]["classes"] == 3
    assert found["average_precision"]["value"] == pytest.approx((first[1] + second[1] + 1) / 3)
    for measure in found.values():
        assert 0 < measure["low"] < measure["value"] < measure["high"] < 1


# -- the maps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tree, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    result = voc.run_voc(tree, weights, out, size=SIZE, epochs=50, faithful=3, backbone=TINY)
    return result, out


def test_heads_learn_and_say_what_they_guarantee(run):
    heads = run[0]["heads"]
    assert {name: head["verdict"]["kind"] for name, head in heads.items()} == {
        "gap": "equal",
        "flatten": "exact",
    }
    for head in heads.values():
        auroc = head["predictions"]["auroc"]
        assert auroc["value"] > 0.9
        if auroc["value"] < 1:  # a perfect score has no spread
            assert 0 <= auroc["low"] <= auroc["value"] <= auroc["high"] <= 1
        for name in ("auroc", "average_precision"):
            assert head["predictions"][name]["classes"] == 2
        assert head["residuals"]["hirescam"] < 1e-4
    assert heads["flatten"]["residuals"]["gradcam"] > 0.1


def test_predicted_pairs_have_baselines_gain_and_intervals(run):
    for head in run[0]["heads"].values():
        assert 0 < head["predictions"]["pairs"] <= 12
        for figures in (head, head["predicted"], head["faithfulness"]):
            assert list(figures["maps"]) == ["hirescam", "gradcam", "centre_blob", "random"]
            for name, gain in figures["gain"].items():
                hires, grad = (figures["maps"][m][name]["value"] for m in ("hirescam", "gradcam"))
                assert gain["value"] == pytest.approx(hires - grad, abs=1e-6)
        found = [p for p in head["pairs"] if p["probability"] >= 0.5]
        for name in ("iou", "dice", "otsu_iou", "otsu_dice", "energy"):
            interval = head["predicted"]["maps"]["gradcam"][name]
            mean = np.mean([pair[f"{name}_gradcam"] for pair in found])
            assert interval["value"] == pytest.approx(mean)
            assert interval["low"] <= interval["value"] <= interval["high"]
        assert head["faithfulness"]["pairs"] == 3
        for areas in head["faithfulness"]["maps"].values():
            assert 0 < areas["insertion"]["value"] < 1
            assert 0 < areas["deletion"]["value"] < 1


def test_thresholds_are_of_photos_that_are_not_trained_on(run, tree):
    data = run[0]["data"]
    assert (data["train"]["photos"], data["tune"]["photos"]) == (26, 6)
    whole, rest = VOC(tree, "train", SIZE), VOC(tree, "train", SIZE)
    tune = rest.split_off(0.2, seed=3)
    assert len(tune) == 6
    assert sorted(tune.names + rest.names) == sorted(whole.names)
    again = VOC(tree, "train", SIZE)
    assert again.split_off(0.2, seed=3).names == tune.names
    assert tune[0]["image"].shape == (SIZE, SIZE, 3)


def test_maps_agree_on_the_global_average_and_differ_on_the_flattened_head(run):
    gap, flatten = (run[0]["heads"][name] for name in ("gap", "flatten"))
    assert gap["agreement"]["at_rounding"]
    assert gap["agreement"]["hirescam_gradcam"] <= 1e-6
    assert gap["agreement"]["hirescam_cam64"] <= 2e-6
    assert gap["difference"]["relative_l1"] <= 1e-6
    assert gap["difference"]["correlation"] == pytest.approx(1, abs=1e-9)
    assert gap["difference"]["peak_moved"] == 0
    assert flatten["difference"]["relative_l1"] > 0.2
    assert flatten["difference"]["correlation"] < 0.9
    assert "agreement" not in flatten


def test_maps_of_learned_colours_lie_on_them(run):
    """The cats are red and the dogs blue: nothing else tells them."""
    maps = run[0]["heads"]["gap"]["maps"]
    for measure in ("iou", "pointing_game", "energy", "rank_accuracy", "average_precision"):
        assert maps["hirescam"][measure]["value"] > 1.5 * maps["random"][measure]["value"]
    assert maps["hirescam"]["pointing_game"]["value"] >= 0.4  # by chance 0.1


def test_files(run):
    result, out = run
    stored = json.loads((out / "metrics.json").read_text())
    gains = (r["heads"]["flatten"]["gain"]["iou"]["value"] for r in (stored, result))
    assert next(gains) == next(gains)
    assert stored["data"]["val"] == {
        "source": "ImageSets/Segmentation/val.txt",
        "photos": 12,
        "pairs": 12,
    }
    found = stored["heads"]["flatten"]["pairs"]
    assert sorted((pair["photo"], pair["class"]) for pair in found)[:4] == [
        *[(0, "cat"), (1, "dog"), (2, "cat"), (2, "dog")]
    ]
    means = {m: np.mean([pair[f"{m}_gradcam"] for pair in found]) for m in ("iou", "energy")}
    for measure, mean in means.items():
        stored_mean = stored["heads"]["flatten"]["maps"]["gradcam"][measure]["value"]
        assert stored_mean == pytest.approx(mean)
    page = (out / "voc.html").read_text()
    pictures = sorted((out / "pictures").glob("*.png"))
    assert len(pictures) == page.count("data:image/png;base64,") == 12
    predicted = [p for p in found if p["probability"] >= 0.5]
    worst = max(predicted, key=lambda p: p["relative_l1"])
    assert pictures[0].name == f"01_val_{worst['photo']:03d}_{worst['class']}.png"
    assert "float32 rounding" in page
    assert not re.search(r"nan|inf\b", page.split("<h2>Where")[0])
    shown = Page(page)
    assert [alt.partition(":")[0] for alt, _ in shown.images] == [file.stem for file in pictures]
    for rows in tables_of(result).values():
        for row in rows:
            assert " ".join(map(str.strip, row)) in shown.text
    for line in lines_of(result):
        assert " ".join(line.split()) in shown.text


def test_the_same_folder_is_not_written_again(run, tree, weights):
    with pytest.raises(UserError, match="exists; choose another folder with --out"):
        voc.run_voc(tree, weights, run[1], size=SIZE, backbone=TINY)


def test_measures_of_maps_that_are_known(tree):
    source = VOC(tree, "val", SIZE)
    masks = np.stack([source[i]["mask"] for i in range(3)])
    pairs = Pairs(np.array([0, 1, 2, 2]), np.array([CAT, DOG, CAT, DOG]))
    inside = masks[pairs.photo] == pairs.label[:, None, None] + 1
    void = masks[pairs.photo] == VOID
    perfect = np.where(inside | void, 1.0, -1.0).astype(np.float32)  # what void says is no matter
    _, values = measured(perfect, pairs, masks, perfect, pairs, masks, "perfect")
    for value in values.values():
        np.testing.assert_allclose(value, 1, rtol=1e-6)
    loud = perfect.copy()
    loud[:, 0, 0] = 1000  # a corner of the padding
    assert masks[0, 0, 0] == VOID
    for name, value in measured(perfect, pairs, masks, loud, pairs, masks, "loud")[1].items():
        np.testing.assert_allclose(value, values[name], rtol=1e-6)
    _, values = measured(perfect, pairs, masks, -perfect, pairs, masks, "inverse")
    for name in ("iou", "dice", "pointing_game", "energy", "rank_accuracy"):
        np.testing.assert_array_equal(values[name], 0)
    # Everything that is not void: the object's share of it.
    everywhere = np.where(void, 0, 1).astype(np.float32)
    everywhere[:, 0, 0] = 0
    _, values = measured(perfect, pairs, masks, everywhere, pairs, masks, "everywhere")
    share = inside.sum((1, 2)) / (~void).sum((1, 2))
    for name in ("pointing_game", "energy", "rank_accuracy", "average_precision"):
        np.testing.assert_allclose(values[name], share, rtol=1e-6)
    # It shows nothing: constant where it counts.
    for name in ("iou", "dice", "otsu_iou", "otsu_dice"):
        np.testing.assert_array_equal(values[name], 0)


def test_overlap_of_photos_is_that_of_their_own_pixels():
    """By hand, of random maps on masks with void: at a threshold, and at scikit-image's Otsu."""
    filters = pytest.importorskip("skimage.filters")
    rng = np.random.default_rng(0)
    masks = rng.choice(np.array([0, CAT + 1, VOID], np.uint8), (3, 32, 32))
    pairs = Pairs(np.arange(3), np.full(3, CAT))
    maps = rng.normal(size=(3, 32, 32)).astype(np.float32)
    threshold, values = measured(maps, pairs, masks, maps, pairs, masks, "random")
    for i in range(3):
        counted = masks[i] != VOID
        own, mask = np.maximum(maps[i][counted], 0), masks[i][counted] == CAT + 1
        own = (own - own.min()) / np.ptp(own)
        for name, at in (("", threshold), ("otsu_", filters.threshold_otsu(own))):
            above = own > at
            iou = (above & mask).sum() / (above | mask).sum()
            dice = 2 * (above & mask).sum() / (above.sum() + mask.sum())
            np.testing.assert_allclose(values[f"{name}iou"][i], iou, rtol=1e-5)
            np.testing.assert_allclose(values[f"{name}dice"][i], dice, rtol=1e-5)


def test_maps_of_a_flattened_head_by_hand():
    """More photos than one batch has; the head is one matrix."""
    rng = np.random.default_rng(0)
    features = rng.random((19, 2, 3, 4)).astype(np.float32)
    kernel, bias = rng.normal(size=(24, 20)), rng.normal(size=20)
    model = TINY.clone(num_labels=20, classifier="flatten")
    variables = {"params": {"fc": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}}
    pairs = Pairs(np.array([0, 3, 3, 15, 16, 18]), np.array([19, 0, 7, 2, 2, 11]))
    maps = pair_maps(model, variables, features, pairs)
    weights = kernel.astype(np.float32).reshape(2, 3, 4, 20).astype(np.float64)
    for i, (photo, label) in enumerate(zip(*pairs, strict=True)):
        a, w = features[photo].astype(np.float64), weights[..., label]
        exact, averaged = (a * w).sum(-1), (a * w.mean((0, 1))).sum(-1)
        np.testing.assert_allclose(maps.hirescam[i], exact, atol=2e-6)
        np.testing.assert_allclose(maps.gradcam[i], averaged, atol=2e-6)
        np.testing.assert_allclose(maps.logit[i], exact.sum() + bias[label], atol=1e-5)
        off = abs(averaged.sum() - exact.sum())
        np.testing.assert_allclose(maps.gradcam_residual[i], off, atol=1e-5)


def made_up(hires: list, grad: list) -> PairMaps:
    maps = [np.array(m, np.float32).reshape(len(m), 1, -1) for m in (hires, grad)]
    return PairMaps(*maps, *np.zeros((3, len(hires)), np.float32))


def test_differences_by_hand():
    maps = made_up(
        [[2, -1, 1, 0], [1, 2, 3, 4], [0, 0, 0, 0]], [[-1, 1, 1, 0], [2, 4, 6, 8], [1] * 4]
    )
    apart = differences(maps)
    np.testing.assert_allclose(apart["relative_l1"], [5 / 4, 1, np.nan])
    # Centred: (1.5, -1.5, .5, -.5) and (-1.25, .75, .75, -.25).
    by_hand = (-1.875 - 1.125 + 0.375 + 0.125) / np.sqrt(5 * 2.75)
    np.testing.assert_allclose(apart["correlation"], [by_hand, 1, np.nan])
    assert apart["peak_moved"].tolist() == [True, False, False]
    assert apart["sign_changed"].tolist() == [0.5, 0, 0]


def test_agreement_finds_what_is_more_than_rounding():
    rng = np.random.default_rng(0)
    features = rng.random((2, 3, 3, 8)).astype(np.float32)
    kernel = rng.normal(size=(8, 20)).astype(np.float32)
    pairs = Pairs(np.array([0, 1]), np.array([4, 9]))
    exact = np.stack([features[i] @ (kernel[:, k] / 9) for i, k in zip(*pairs, strict=True)])
    zeros = np.zeros((3, 2), np.float32)
    assert agreement(kernel, features, PairMaps(exact, exact, *zeros), pairs)["at_rounding"]
    other = exact.copy()
    other[1, 0, 0] += 1e-4 * np.abs(exact[1]).max()
    found = agreement(kernel, features, PairMaps(exact, other, *zeros), pairs)
    assert not found["at_rounding"]
    assert found["hirescam_gradcam"] == pytest.approx(1e-4, rel=0.02)


# -- training of the whole network ----------------------------------------------------------------


@pytest.mark.long
def test_finetuning_trains_the_backbone_and_its_statistics(tree, weights, capsys):
    source = VOC(tree, "train", SIZE)
    start = from_torch(TINY.clone(num_labels=7), read_weights(weights), (SIZE, SIZE))
    model = TINY.clone(num_labels=len(CLASSES), classifier="flatten")
    after = voc.train_whole(model, start, source, epochs=6, batch_size=16, seed=0)
    for kind in ("params", "batch_stats"):
        before = jax.tree.leaves(start[kind][BACKBONE])
        now = jax.tree.leaves(after[kind][BACKBONE])
        assert all((a != b).any() for a, b in zip(before, now, strict=True))
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", capsys.readouterr().err).groups())
    assert last < 0.7 * first


# -- real photos ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(real_data) -> Path:
    if not (real_data / "voc" / "JPEGImages").is_dir():
        pytest.skip("no voc/ among the real data")
    return real_data / "voc"


def test_reads_real_photos(real):
    for split in ("train", "val"):
        source = VOC(real, split, 96)
        for i, name in enumerate(source.names[:6]):
            item = source[i]
            mask = np.array(Image.open(real / "SegmentationClassAug" / f"{name}.png"))
            assert set(np.unique(item["mask"])) <= {*np.unique(mask), VOID}
            classes = sorted({*np.unique(mask).tolist()} - {0, VOID})
            assert (np.flatnonzero(item["labels"]) + 1).tolist() == classes
            # The object keeps its share of the photo.
            rows = (item["mask"] != VOID).any(1).sum() * (item["mask"] != VOID).any(0).sum()
            share = (item["mask"] == classes[0]).sum() / rows
            assert share == pytest.approx((mask == classes[0]).mean(), abs=0.02)


@pytest.mark.long
def test_real_photos_and_weights(real, real_data, tmp_path):
    pytest.importorskip("torch")
    weights = real_data / "mobilenet_v2-b0353104.pth"
    result = voc.run_voc(real, weights, tmp_path / "out", size=96, epochs=2)
    assert result["heads"]["gap"]["agreement"]["at_rounding"]
    assert result["heads"]["flatten"]["difference"]["relative_l1"] > 0.2
