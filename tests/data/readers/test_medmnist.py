"""The reader of MedMNIST, on files in their real layout."""

from pathlib import Path

import nibabel
import numpy as np

from hirescam_jax.data.grid import MODEL_AXES, to_grid
from hirescam_jax.data.readers import MedMNIST
from hirescam_jax.data.study import ANYWHERE
from tests.data.readers.raw_files import fails, found, reasons, study


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
