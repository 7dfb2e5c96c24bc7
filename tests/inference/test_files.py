"""Explaining files: where maps and pictures land, tables, batches, and what bad input leaves."""

import csv
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

import hirescam_jax.inference.files as explain_files_module
from hirescam_jax.config import Config, Preprocess
from hirescam_jax.data.grid import feature_affine, from_features, to_grid
from hirescam_jax.data.volume import Volume, read_ct
from hirescam_jax.errors import UserError
from hirescam_jax.inference.files import explain_files
from hirescam_jax.models import AxialNet
from hirescam_jax.reports.pictures import label_picture, place
from hirescam_jax.runs.run import Header, Run
from tests.rounding import assert_same_but_for_rounding

CT = "ct/tcga_34_2605_ct.nii.gz"  # 512x512x61
SMALL_CT = "ct/acil_ct64_ct.nii.gz"  # 64x64x79

LABELS = ("nodule", "pleural effusion", "emphysema", "a/b")
LPS = np.array([[-5.0, 0, 0, 60], [0, -5, 0, 50], [0, 0, 6, -300], [0, 0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [9, -12, 15], degrees=True).as_matrix() * [4, 4.5, 5]
OBLIQUE[:3, 3] = [-70, -60, 100]


class Detector(AxialNet):
    """A network that sees brightness: its features are the means of blocks of the volume.

    Label 0 scores what is bright, so its map must peak where the volume is brightest.
    """

    def features(self, volumes: jax.Array, train: bool = False) -> jax.Array:
        batch, *shape = volumes.shape
        blocks = [n for size in shape for n in (size // 4, 4)]
        # From [-mean, 1 - mean] back to [0, 1].
        return volumes.reshape(batch, *blocks).mean(axis=(2, 4, 6))[..., None] + Preprocess().mean


def run_of(model: AxialNet, variables: Any, shape=(24, 32, 32), spacing=(6.0, 5.0, 5.0)) -> Run:
    header = Header(Config(model=model), LABELS, (), shape, spacing)
    return Run(Path("run"), header, variables, 0)


def with_spacing(run: Run, spacing: tuple[float, float, float]) -> Run:
    header = dataclasses.replace(run.header, spacing_mm=spacing)
    return dataclasses.replace(run, header=header)


def detector_run(bias=(0.3, 0.1, 0.2, -0.5), shape=(24, 32, 32)) -> Run:
    cells = shape[1] // 4 * shape[2] // 4
    kernel = np.tile(np.float32([1, -1, 0.5, 0]) / cells, (cells, 1))
    params = {"fc": {"kernel": jnp.asarray(kernel), "bias": jnp.array(bias)}}
    return run_of(Detector(num_labels=len(LABELS)), {"params": params}, shape)


@pytest.fixture(scope="module")
def run() -> Run:
    """A tiny AxialNet with random weights."""
    model = AxialNet(
        num_labels=len(LABELS),
        blocks=(1, 1),
        widths=(4, 8),
        stem="small",
        conv_widths=(4,),
        conv_padding="SAME",
    )
    variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 24, 32, 32)))
    return run_of(model, variables)


def scan(path: Path, seed: int = 0, shape=(28, 30, 24), affine: np.ndarray = LPS) -> Path:
    rng = np.random.default_rng(seed)
    voxels = np.where(rng.random(shape) > 0.4, 60 * rng.normal(size=shape), -900)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), affine), path)
    return path


def stored_as(image: nibabel.Nifti1Image, axes: str, path: Path) -> Path:
    orientations = nibabel.orientations
    transform = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(axes))
    )
    nibabel.save(image.as_reoriented(transform), path)
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "probabilities.csv").open() as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is written


def test_outputs_of_one_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = scan(tmp_path / "patient 1.nii.gz")
    (result,) = explain_files(run, [path], tmp_path / "out", labels=["a/b", "pleural effusion"])
    folder = tmp_path / "out" / "patient 1"
    assert {p.name for p in folder.iterdir()} == {
        "probabilities.csv",
        "a_b_hirescam.nii.gz",
        "a_b_hirescam.png",
        "pleural_effusion_hirescam.nii.gz",
        "pleural_effusion_hirescam.png",
    }
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["patient 1"]

    rows = rows_of(folder)
    assert [row["label"] for row in rows] == list(LABELS)
    for k, row in enumerate(rows):
        probability, logit = float(row["probability"]), float(row["logit"])
        assert probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
        assert logit == pytest.approx(float(result.logits[k]), rel=1e-5)
        assert float(row["completeness_residual"]) <= 1e-4

    image = nibabel.load(folder / "a_b_hirescam.nii.gz")
    original = nibabel.load(path)
    assert image.shape == original.shape
    np.testing.assert_array_equal(image.affine, original.affine)
    assert image.get_fdata().any()
    printed = capsys.readouterr().out
    assert "a/b" in printed
    assert "pleural effusion" in printed
    assert f"{result.probabilities[1]:.3f}" in printed
    assert "2 more labels" in printed


def test_probabilities_are_those_of_the_model(run: Run, tmp_path: Path):
    path = scan(tmp_path / "a.nii")
    (result,) = explain_files(run, [path], tmp_path / "out", pictures=False)
    volume_DHW, _ = to_grid(read_ct(path), run.spacing_mm, run.shape)
    logits = run.model.apply(run.variables, run.normalize(jnp.asarray(volume_DHW))[None])
    np.testing.assert_allclose(result.logits, logits[0], atol=1e-5)


def test_the_feature_map_is_complete_and_in_place(run: Run, tmp_path: Path):
    path = scan(tmp_path / "a.nii", affine=OBLIQUE)
    explain_files(run, [path], tmp_path / "out", labels=["nodule"], grid="features", pictures=False)
    image = nibabel.load(tmp_path / "out" / "a" / "nodule_hirescam_features.nii.gz")
    assert image.shape == (8, 8, 8)  # 24 slices in threes; 32 voxels, two strides of 2
    row = rows_of(tmp_path / "out" / "a")[0]
    bias = run.variables["params"]["fc"]["bias"][0]
    assert image.get_fdata().sum() + bias == pytest.approx(float(row["logit"]), abs=1e-4)

    assert nibabel.aff2axcodes(image.affine) == ("I", "P", "L")
    np.testing.assert_allclose(image.header.get_zooms(), (18, 20, 20), rtol=1e-6)
    centre = apply_affine(OBLIQUE, (np.array((28, 30, 24)) - 1) / 2)
    np.testing.assert_allclose(apply_affine(image.affine, (3.5,) * 3), centre, atol=1e-4)


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ((-3.0, 2.0, -1.0, 4.0), ["a_b", "pleural_effusion"]),
        ((-3.0, -2.0, -1.0, -4.0), ["emphysema"]),
    ],
    ids=["predicted", "none predicted"],
)
def test_labels_by_default(tmp_path: Path, bias: tuple[float, ...], names: list[str]):
    run = detector_run(bias)
    path = scan(tmp_path / "a.nii")
    (result,) = explain_files(run, [path], tmp_path / "out", pictures=False)
    maps = {p.name for p in (tmp_path / "out" / "a").glob("*.nii.gz")}
    assert maps == {f"{name}_hirescam.nii.gz" for name in names}
    order = [LABELS[k].replace(" ", "_").replace("/", "_") for k in result.explained]
    assert order == names


def test_grad_cam_is_another_map(run: Run, tmp_path: Path):
    path = scan(tmp_path / "a.nii")
    for method in ("hirescam", "gradcam"):
        explain_files(run, [path], tmp_path / method, labels=["nodule"], method=method)
    files = [tmp_path / m / "a" / f"nodule_{m}" for m in ("hirescam", "gradcam")]
    hirescam, gradcam = (nibabel.load(f"{f}.nii.gz").get_fdata() for f in files)
    assert abs(hirescam - gradcam).max() > 1e-3 * abs(hirescam).max()
    assert all(Path(f"{f}.png").stat().st_size > 10_000 for f in files)


# Where maps land


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["axis-aligned", "oblique"])
@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAR"])
def test_the_map_peaks_at_the_sphere(tmp_path: Path, affine: np.ndarray, axes: str):
    shape = (40, 42, 36)
    sphere_mm = apply_affine(affine, (11, 29, 25))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance_mm = np.linalg.norm(apply_affine(affine, index) - sphere_mm, axis=-1)
    voxels = np.where(distance_mm < 14, 700, -900).astype(np.int16)
    path = stored_as(nibabel.Nifti1Image(voxels, affine), axes, tmp_path / "a.nii")

    run = detector_run(shape=(44, 48, 48))
    explain_files(run, [path], tmp_path / "out", labels=["nodule"], pictures=False)
    image = nibabel.load(tmp_path / "out" / "a" / "nodule_hirescam.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == tuple(axes)
    values = image.get_fdata()
    peak_mm = apply_affine(image.affine, np.unravel_index(values.argmax(), values.shape))
    voxel_mm = 6.0
    assert (abs(peak_mm - sphere_mm) <= np.array((20, 20, 24)) / 2 + voxel_mm / 2).all()


def same_at_the_same_places(
    run: Run, image: nibabel.Nifti1Image, tmp_path: Path, *orders: str
) -> None:
    paths = [stored_as(image, axes, tmp_path / f"{axes}.nii") for axes in orders]
    results = explain_files(run, paths, tmp_path / "out", labels=["nodule"], pictures=False)
    # The same voxels in other rows of a batch, which a program need not add up in one order: six
    # convolutions, those behind the first with 4, 4, 4, 8 and 8 channels, and a sum over four; the
    # score is that of its map, and a probability changes by at most a quarter of it.
    terms = 9 * (3 + 4 + 4 + 4 + 8 + 8) + 6 * 4 + 4
    scale = np.abs(results[0].maps).sum((1, 2, 3)).max() / 4
    for result in results[1:]:
        assert_same_but_for_rounding(result.maps, results[0].maps, terms=terms)
        assert_same_but_for_rounding(
            result.probabilities,
            results[0].probabilities,
            terms=terms + results[0].maps[0].size,
            scale=scale,
        )
    maps = [nibabel.load(tmp_path / "out" / axes / "nodule_hirescam.nii.gz") for axes in orders]
    values = [m.get_fdata(dtype=np.float32) for m in maps]
    index = np.random.default_rng(0).integers(0, values[0].shape, (5000, 3))
    expected = values[0][tuple(index.T)]
    assert (expected != 0).mean() > 0.2
    for axes, other, array in zip(orders, maps, values, strict=True):
        assert nibabel.aff2axcodes(other.affine) == tuple(axes)
        place_mm = apply_affine(maps[0].affine, index)
        there = apply_affine(np.linalg.inv(other.affine), place_mm)
        assert abs(there - there.round()).max() < 1e-3
        found = array[tuple(there.round().astype(int).T)]
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())


def test_the_storage_order_does_not_matter(run: Run, tmp_path: Path):
    image = nibabel.load(scan(tmp_path / "a.nii", affine=OBLIQUE))
    same_at_the_same_places(run, image, tmp_path, "LPS", "RAS", "SAR")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "orders"), [(SMALL_CT, ("LPS", "RAS", "SAR")), (CT, ("RAS", "SAR"))], ids=str
)
def test_the_storage_order_of_a_real_ct_does_not_matter(
    run: Run, real_data: Path, name: str, orders: tuple[str, ...], tmp_path: Path
):
    run = with_spacing(run, (13.0, 12.0, 12.0))
    same_at_the_same_places(run, nibabel.load(real_data / name), tmp_path, *orders)


# Pictures


def picture_of_a_spot(tmp_path: Path, axes: str) -> tuple[Any, np.ndarray]:
    """A CT with a map whose peak is in the patient's right, front, upper part."""
    image = nibabel.load(scan(tmp_path / "a.nii", shape=(30, 32, 34)))
    volume = read_ct(stored_as(image, axes, tmp_path / f"{axes}.nii"))
    _, affine = to_grid(volume, (6.0, 5.0, 5.0), (32, 32, 32))
    map_dhw = np.zeros((8, 8, 8), np.float32)
    map_dhw[2, 1, 2] = 3.0  # near the top, the front, the patient's right
    cells = feature_affine(affine, (32, 32, 32), map_dhw.shape)
    return label_picture(
        volume, map_dhw, cells, label="nodule", probability=0.9, method="hirescam"
    ), apply_affine(cells, (2, 1, 2))


@pytest.mark.parametrize("axes", ["LPS", "SAR"])
def test_the_overlay_sits_at_the_peak_in_radiological_convention(tmp_path: Path, axes: str):
    figure, peak_mm = picture_of_a_spot(tmp_path, axes)
    for ax, (across, down) in zip(figure.axes[:3], ((0, 1), (0, 2), (1, 2)), strict=True):
        _, overlay = ax.images
        row, column = np.unravel_index(overlay.get_array().argmax(), overlay.get_array().shape)
        left, right, bottom, top = overlay.get_extent()
        rows, columns = overlay.get_array().shape
        # Patient right (or front) on the left, head (or front) at the top.
        assert left > right
        assert top > bottom
        assert column < columns / 2
        assert row < rows / 2
        x = left + (column + 0.5) / columns * (right - left)
        y = top + (row + 0.5) / rows * (bottom - top)
        assert abs(x - peak_mm[across]) < 5
        assert abs(y - peak_mm[down]) < 5
        # True proportions: a millimetre is as long in both directions.
        assert (left - right) / columns == pytest.approx((top - bottom) / rows, rel=1e-6)
    letters = [t.get_text() for t in figure.axes[0].texts]
    assert letters == ["R", "L", "A", "P"]


def test_the_ct_in_the_picture_is_not_mirrored(tmp_path: Path):
    voxels = np.full((30, 30, 30), -1000, np.int16)
    voxels[4:26, 4:26, 4:26] = 40
    voxels[18:24, 18:24, 18:24] = 1000  # RAS: right, front, top
    volume = Volume(voxels, np.diag([4.0, 4, 4, 1]), tmp_path / "a.nii")
    map_dhw = np.zeros((30, 30, 30), np.float32)
    _, affine = to_grid(volume, (4.0, 4.0, 4.0), (30, 30, 30))
    index = np.round(apply_affine(np.linalg.inv(affine), (83, 83, 83))).astype(int)
    map_dhw[tuple(index)] = 1
    figure = label_picture(volume, map_dhw, affine, label="x", probability=0.5, method="gradcam")
    for ax in figure.axes[:3]:
        ct = np.asarray(ax.images[0].get_array())
        rows, columns = np.nonzero(ct > 900)
        assert len(rows) > 10
        assert rows.mean() < 0.4 * ct.shape[0]
        assert columns.mean() < 0.4 * ct.shape[1]


def test_a_map_without_positive_evidence_has_a_picture_too(tmp_path: Path):
    volume = read_ct(scan(tmp_path / "a.nii"))
    _, affine = to_grid(volume, (6.0, 5.0, 5.0), (8, 8, 8))
    map_dhw = np.full((8, 8, 8), -1.0, np.float32)
    figure = label_picture(volume, map_dhw, affine, label="x", probability=0.0, method="hirescam")
    assert any("no positive evidence" in t.get_text() for t in figure.texts)
    assert np.asarray(figure.axes[0].images[1].get_array()).max() == 0


def test_places_are_named_for_the_patient():
    assert place([12.4, -30.0, -7.0]) == "R 12  P 30  I 7"
    assert place([-12.4, 30.0, 7.0]) == "L 12  A 30  S 7"


@pytest.mark.slow
@pytest.mark.long
def test_a_blob_in_the_tumour_of_a_real_ct_is_drawn_there(real_data: Path):
    volume = read_ct(real_data / CT)
    _, affine = to_grid(volume, (8.0, 6.0, 6.0), (40, 64, 64))
    cells = feature_affine(affine, (40, 64, 64), (20, 32, 32))
    index = np.stack(np.meshgrid(*map(np.arange, (20, 32, 32)), indexing="ij"), -1)
    tumour_mm = (38, -62, -93)  # a cavitary mass of the right lung
    distance = np.linalg.norm(apply_affine(cells, index) - tumour_mm, axis=-1)
    map_dhw = np.exp(-(distance**2) / 2 / 15**2).astype(np.float32)
    map_ijk = from_features(map_dhw, cells, volume)
    peak = np.unravel_index(map_ijk.argmax(), map_ijk.shape)
    assert np.linalg.norm(apply_affine(volume.affine, peak) - tumour_mm) < 12
    strong = map_ijk > 0.8
    inside = volume.voxels[strong]
    assert np.median(inside) > -300  # the mass, not the lung around it
    figure = label_picture(volume, map_dhw, cells, label="x", probability=1.0, method="hirescam")
    overlay = np.asarray(figure.axes[0].images[1].get_array())
    ct = np.asarray(figure.axes[0].images[0].get_array())
    assert np.median(ct[overlay > 0.8]) > -300


# Many files


def test_the_batch_size_does_not_matter(run: Run, tmp_path: Path, monkeypatch: Any):
    shapes = []
    original = explain_files_module.explain

    def recorded(model: Any, variables: Any, volumes: jax.Array, **kw: Any) -> Any:
        shapes.append(volumes.shape)
        return original(model, variables, volumes, **kw)

    monkeypatch.setattr(explain_files_module, "explain", recorded)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        scan(folder / f"{i}.nii.gz", seed=i, shape=(20 + i, 24, 22))
    one = explain_files(run, [folder], tmp_path / "one", batch_size=1, pictures=False)
    assert shapes == [(1, *run.shape)] * 4
    shapes.clear()
    three = explain_files(run, [folder], tmp_path / "three", batch_size=3, pictures=False)
    assert shapes == [(3, *run.shape)] * 2  # the last one is filled up: one program
    assert (
        [r.path.name for r in one]
        == [r.path.name for r in three]
        == [f"{i}.nii.gz" for i in range(4)]
    )
    assert len({float(r.logits[0]) for r in one}) == 4
    for a, b in zip(one, three, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
        np.testing.assert_allclose(a.maps, b.maps, atol=1e-6)


def test_one_bad_file_does_not_stop_the_others(run: Run, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "acd":
        scan(folder / f"{name}.nii.gz")
    (folder / "b.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:3000])  # voxels end
    (folder / "e.nii").write_bytes(b"")  # found by its header already
    (folder / "readme.txt").write_text("not an input")
    with pytest.raises(UserError) as error:
        explain_files(run, [folder], tmp_path / "out", labels=["nodule"], pictures=False)
    message = str(error.value)
    assert "2 of 5 files" in message
    assert "b.nii.gz" in message
    assert "e.nii" in message
    assert "\n" not in message
    done = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert done == ["a", "c", "d"]
    assert all((tmp_path / "out" / n / "nodule_hirescam.nii.gz").exists() for n in done)


# Bad input


def _existing(tmp_path: Path, run: Run) -> dict[str, Any]:
    explain_files(run, [scan(tmp_path / "a.nii")], tmp_path / "out", pictures=False)
    return {}


def _foreign(tmp_path: Path, run: Run) -> dict[str, Any]:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "thesis.txt").write_text("precious")
    return {"overwrite": True}


def _same_name(tmp_path: Path, run: Run) -> dict[str, Any]:
    (tmp_path / "b").mkdir()
    return {"inputs": [tmp_path / "a.nii", scan(tmp_path / "b" / "a.nii.gz")]}


def _out_is_a_file(tmp_path: Path, run: Run) -> dict[str, Any]:
    (tmp_path / "out").write_text("x")
    return {}


def _empty_folder(tmp_path: Path, run: Run) -> dict[str, Any]:
    (tmp_path / "empty").mkdir()
    return {"inputs": [tmp_path / "empty"]}


def _truncated(tmp_path: Path, run: Run) -> dict[str, Any]:
    path = scan(tmp_path / "cut.nii")
    path.write_bytes(path.read_bytes()[:5000])
    return {"inputs": [path]}


BAD_CALLS = {
    "unknown label": (lambda tmp_path, run: {"labels": ["nodul"]}, "did you mean 'nodule'"),
    "outputs exist": (_existing, "--overwrite"),
    "a folder of something else": (_foreign, "holds no earlier explanation"),
    "same name": (_same_name, "rename it"),
    "out is a file": (_out_is_a_file, "is a file"),
    "no NIfTI in folder": (_empty_folder, "no .nii"),
    "missing": (lambda tmp_path, run: {"inputs": [tmp_path / "no.nii"]}, "no such file"),
    "truncated": (_truncated, "truncated"),
    "no input": (lambda tmp_path, run: {"inputs": []}, "no input"),
    "batch size": (lambda tmp_path, run: {"batch_size": 0}, "batch size 0"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_bad_calls_write_nothing(run: Run, tmp_path: Path, kind: str):
    scan(tmp_path / "a.nii")
    make, words = BAD_CALLS[kind]
    arguments = {"inputs": [tmp_path / "a.nii"], "out": tmp_path / "out", "pictures": False}
    arguments |= make(tmp_path, run)
    before = contents(tmp_path)
    folders = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        explain_files(run, **arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders


def test_overwrite_replaces_an_earlier_explanation(run: Run, tmp_path: Path):
    path, out = scan(tmp_path / "a.nii"), tmp_path / "out"
    explain_files(run, [path], out, labels=["nodule"], pictures=False)
    explain_files(run, [path], out, labels=["emphysema"], pictures=False, overwrite=True)
    assert sorted(contents(out)) == ["a/emphysema_hirescam.nii.gz", "a/probabilities.csv"]


@pytest.mark.parametrize("fails", ["write_nifti", "save_png"])
def test_a_failing_disk_leaves_nothing_half_written(
    run: Run, tmp_path: Path, monkeypatch: Any, fails: str
):
    path, out = scan(tmp_path / "a.nii"), tmp_path / "out"

    def fail(target: Path, *args: Any, **kw: Any) -> None:
        target.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(explain_files_module, fails, fail)
    with pytest.raises(UserError, match="No space left on device") as error:
        explain_files(run, [path], out, labels=["nodule"])
    assert str(out / "a") in str(error.value)
    assert not out.exists()


def test_a_failing_disk_keeps_the_earlier_explanation(run: Run, tmp_path: Path, monkeypatch: Any):
    path, out = scan(tmp_path / "a.nii"), tmp_path / "out"
    explain_files(run, [path], out, labels=["nodule"], pictures=False)
    before = contents(out)

    def fail(target: Path, *args: Any, **kw: Any) -> None:
        raise UserError(f"{target}: cannot be written")

    monkeypatch.setattr(explain_files_module, "write_nifti", fail)
    with pytest.raises(UserError, match=str(out / "a" / "nodule")):
        explain_files(run, [path], out, labels=["nodule"], pictures=False, overwrite=True)
    assert contents(out) == before
    assert [p.name for p in out.iterdir()] == ["a"]


def test_a_model_that_gives_nan_writes_nothing(tmp_path: Path):
    run = detector_run(bias=(jnp.nan,) * 4)
    with pytest.raises(UserError, match="NaN"):
        explain_files(run, [scan(tmp_path / "a.nii")], tmp_path / "out", pictures=False)
    assert not (tmp_path / "out").exists()
