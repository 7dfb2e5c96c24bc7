"""Reading, resampling and writing volumes, against nibabel's affines and closed forms."""

import errno
import gzip
import os
import resource
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from hirescam_jax.data.grid import feature_affine, from_features, resample, to_grid
from hirescam_jax.data.volume import (
    Volume,
    check_hounsfield,
    open_nifti,
    read_ct,
    read_nifti,
    write_nifti,
)
from hirescam_jax.errors import UserError

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [12, -8, 20], degrees=True).as_matrix() * [3, 2.5, 4]
OBLIQUE[:3, 3] = [-80, -60, 100]
LPS = np.array([[-3.0, 0, 0, 60], [0, -2.5, 0, 50], [0, 0, 4, -300], [0, 0, 0, 1]])


def thorax(shape: tuple[int, ...] = (20, 22, 18), seed: int = 0) -> np.ndarray:
    """Noise around air and soft tissue: plausible as Hounsfield units, nothing symmetric."""
    rng = np.random.default_rng(seed)
    inside = rng.random(shape) > 0.4
    return np.where(inside, 40 + 60 * rng.normal(size=shape), -900.0).astype(np.int16)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS, **header: object) -> Path:
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nibabel.save(image, path)
    if header:  # nibabel mends some of these when it saves, so they are written afterwards
        packed = path.name.endswith(".gz")
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        block = nibabel.Nifti1Header(data[:348], check=False)
        for name, value in header.items():
            block[name] = value
        data = block.binaryblock + data[348:]
        path.write_bytes(gzip.compress(data) if packed else data)
    return path


def stored_as(image: nibabel.Nifti1Image, axes: str, path: Path) -> Path:
    """The same scan with another order and direction of its axes, by nibabel."""
    orientations = nibabel.orientations
    transform = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(axes))
    )
    nibabel.save(image.as_reoriented(transform), path)
    return path


# Reading


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reads_any_dtype_with_its_scaling(tmp_path: Path, dtype: type, suffix: str):
    stored = np.arange(60).reshape(3, 4, 5).astype(dtype)
    path = save(tmp_path / f"ct{suffix}", stored)
    plain = read_nifti(path)
    assert plain.voxels.tolist() == stored.tolist()
    np.testing.assert_array_equal(plain.affine, LPS)

    path = save(tmp_path / f"scaled{suffix}", stored, scl_slope=2.5, scl_inter=-1024)
    scaled = read_nifti(path)
    np.testing.assert_allclose(scaled.voxels, stored * 2.5 - 1024, rtol=1e-6)


def test_reads_big_endian_and_squeezes_a_trailing_axis(tmp_path: Path):
    voxels = thorax((4, 5, 6))
    header = nibabel.Nifti1Header(endianness=">")
    image = nibabel.Nifti1Image(voxels[..., None].astype(">i2"), LPS, header)
    nibabel.save(image, tmp_path / "ct.nii")
    assert nibabel.load(tmp_path / "ct.nii").header.endianness == ">"
    volume = read_ct(tmp_path / "ct.nii")
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype.isnative


def _truncated_gz(path: Path) -> Path:
    whole = save(path, np.random.default_rng(0).integers(-1000, 400, (32, 32, 32), np.int16))
    whole.write_bytes(whole.read_bytes()[:9000])
    return path


def _truncated_plain(path: Path) -> Path:
    plain = save(path.with_name("scan.nii"), thorax())
    plain.write_bytes(plain.read_bytes()[:2000])
    return plain


def _damaged_gz(path: Path) -> Path:
    data = bytearray(save(path, thorax((32, 32, 32))).read_bytes())
    data[5000:5050] = bytes(50)
    path.write_bytes(bytes(data))
    return path


def _content(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


def _saved(voxels: np.ndarray, affine: np.ndarray = LPS, **header: object):
    return lambda path: save(path, voxels, affine, **header)


def _with(value: float) -> np.ndarray:
    voxels = thorax().astype(np.float32)
    voxels[3, 4, 5] = value
    return voxels


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _minc_like(path: Path) -> Path:
    nibabel.save(nibabel.MGHImage(thorax().astype(np.float32), LPS), path.with_name("ct.mgz"))
    return path.with_name("ct.mgz")


RGB = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
FLAT = LPS.copy()
FLAT[:3, 2] = FLAT[:3, 1]
ZERO = np.diag([0.0, 0, 0, 1])
NAN_AFFINE = LPS.copy()
NAN_AFFINE[0, 3] = np.nan

# kind -> (makes the file and returns its path, words that the message must hold)
BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "no such file"),
    "folder": (_folder, "is a folder"),
    "empty": (_content(b""), "is empty"),
    "text": (_content(b"this is not an image\n" * 100), "NIfTI"),
    "gzipped text": (_content(gzip.compress(b"hello\n" * 1000)), "NIfTI"),
    "few bytes": (_content(gzip.compress(b"\x5c\x01\x00\x00")[:12]), "NIfTI"),
    "other format": (_minc_like, ".nii"),
    "truncated gz": (_truncated_gz, "truncated"),
    "truncated plain": (_truncated_plain, "truncated"),
    "damaged gz": (_damaged_gz, "damaged"),
    "a bomb": (_saved(thorax(), dim=[3, 3000, 3000, 3000, 1, 1, 1, 1]), "is this one CT"),
    "dim beyond the file": (_saved(thorax(), dim=[3, 900, 900, 900, 1, 1, 1, 1]), "truncated"),
    "2D": (_saved(thorax((20, 20))), "2 axes"),
    "4D": (_saved(thorax((5, 6, 7, 3))), "4 axes"),
    "one slice": (_saved(thorax((20, 20, 1))), "one slice"),
    "NaN": (_saved(_with(np.nan)), "NaN"),
    "infinite": (_saved(_with(-np.inf)), "infinite"),
    "huge float64": (_saved(_with(1.0).astype(np.float64) * 1e300), "infinite"),
    "complex": (_saved(thorax().astype(np.complex64)), "complex"),
    "colour": (_saved(RGB), "colour"),
    "no place": (_saved(thorax(), sform_code=0, qform_code=0), "sform_code and qform_code"),
    "singular sform": (_saved(thorax(), qform_code=0, srow_y=LPS[0]), "degenerate"),
    "zero sform": (_saved(thorax(), srow_x=0, srow_y=0, srow_z=0), "degenerate"),
    "NaN in sform": (_saved(thorax(), srow_x=[-3, 0, 0, np.nan]), "degenerate"),
    "zero spacing": (_saved(thorax(), sform_code=0, pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), "pixdim"),
    "bad quaternion": (_saved(thorax(), sform_code=0, quatern_b=3.0, quatern_c=3.0), "dcm2niix"),
    "metres": (_saved(thorax(), np.diag([0.003, 0.003, 0.004, 1])), "0.003 x 0.003 x 0.004 mm"),
    "micrometres": (_saved(thorax(), np.diag([3000.0, 3000, 4000, 1])), "millimetres"),
    "constant": (_saved(np.full((9, 9, 9), -1000, np.int16)), "all are -1000"),
    "8 bit": (_saved((thorax() // 8 + 120).clip(0, 255).astype(np.uint8)), "8-bit"),
    "mask": (_saved((thorax() > 0).astype(np.uint8) * 14), "8-bit picture or a mask"),
    "scaled to [0, 1]": (_saved(((thorax() + 1000) / 1500).astype(np.float32)), "normalised"),
    "shifted": (_saved((thorax() + 1024).astype(np.uint16)), "subtract 1024"),
    "no air": (_saved(thorax().clip(-200, 400)), "air"),
    "only air": (_saved(thorax().clip(-1000, -500)), "not Hounsfield"),
    "too big": (_saved(thorax().astype(np.float32) * 1000), "not Hounsfield"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_one_clear_line(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]):
    make, words = BAD_FILES[kind]
    path = make(tmp_path / "scan.nii.gz")
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        read_ct(path)
    message = str(error.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400
    assert capfd.readouterr() == ("", "")


def test_too_little_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / "scan.nii.gz", thorax())

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nibabel.arrayproxy.ArrayProxy.__array__", full)
    with pytest.raises(UserError, match=r"20x22x18 voxels need more memory"):
        read_ct(path)


def test_the_header_check_needs_no_voxels(tmp_path: Path):
    path = _truncated_plain(tmp_path / "scan.nii.gz")
    assert open_nifti(path).shape == (20, 22, 18)
    bad = save(tmp_path / "bad.nii", thorax(), sform_code=0, qform_code=0)
    bad.write_bytes(bad.read_bytes()[:360])
    with pytest.raises(UserError, match="qform_code"):
        open_nifti(bad)


@pytest.mark.parametrize("name", ["tcga_34_2605_ct", "acil_ct64_ct", "totalseg_abdomen_ct"])
def test_real_cts_are_hounsfield_units(real_data: Path, name: str):
    volume = read_nifti(real_data / "ct" / f"{name}.nii.gz")
    check_hounsfield(volume)
    assert volume.voxels.min() < -900
    assert volume.voxels.shape == nibabel.load(volume.path).shape


# To the model's grid


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["axis-aligned", "oblique"])
def test_a_ramp_in_world_coordinates_is_reproduced(affine: np.ndarray):
    """HU = a x + b y + c z + d in mm stays that on the model's grid, whatever the affine."""
    shape = (60, 64, 50)
    slope = np.array([1.7, -2.1, 1.3])
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    voxels = ((apply_affine(affine, index) - centre) @ slope).astype(np.float32)
    for spacing in ((4.0, 4.0, 4.0), (2.0, 2.2, 1.9)):  # coarser (with a Gaussian), then finer
        volume_DHW, grid_affine = to_grid(
            Volume(voxels, affine, Path("ramp.nii")), spacing, (14, 12, 13)
        )
        index = np.stack(np.meshgrid(*map(np.arange, (14, 12, 13)), indexing="ij"), -1)
        expected = (apply_affine(grid_affine, index) - centre) @ slope
        np.testing.assert_allclose(volume_DHW, expected, atol=0.51)  # half a unit of rounding


def test_the_grid_is_where_it_is_said_to_be():
    voxels = thorax((40, 44, 36))
    _, affine = to_grid(Volume(voxels, OBLIQUE, Path("ct.nii")), (6.0, 5.0, 4.0), (10, 12, 14))
    assert nibabel.aff2axcodes(affine) == ("I", "P", "L")
    np.testing.assert_array_equal(affine[:3, :3], [[0, 0, -4], [0, -5, 0], [-6, 0, 0]])
    centre = apply_affine(OBLIQUE, (np.array(voxels.shape) - 1) / 2)
    np.testing.assert_allclose(apply_affine(affine, [4.5, 5.5, 6.5]), centre, atol=1e-9)


def test_patient_right_is_at_the_start_of_w():
    """A bright block at the patient's right (+x in RAS), front (+y) and top (+z)."""
    voxels = np.full((20, 20, 20), -1000, np.int16)
    voxels[15:, 15:, 15:] = 500
    volume_DHW, _ = to_grid(
        Volume(voxels, np.diag([2.0, 2, 2, 1]), Path("x")), (2.0,) * 3, (20,) * 3
    )
    assert (volume_DHW[:5, :5, :5] == 500).all()
    assert (volume_DHW == 500).sum() == 125


def test_outside_is_air_and_padding_is_clipped():
    voxels = thorax((10, 10, 10))
    volume_DHW, _ = to_grid(Volume(voxels, LPS, Path("x")), (4.0, 4.0, 4.0), (30, 30, 30))
    assert volume_DHW[0, 0, 0] == volume_DHW[-1, -1, -1] == voxels.min()
    voxels[0] = -3024
    volume_DHW, _ = to_grid(Volume(voxels, LPS, Path("x")), (4.0, 4.0, 4.0), (30, 30, 30))
    assert volume_DHW.min() == -1024


def test_coarser_grids_do_not_alias():
    """A pattern finer than the grid averages out instead of becoming a false coarse one."""
    i = np.arange(120)
    voxels = np.broadcast_to(np.where(i % 2, 300, -500)[:, None, None], (120, 40, 40))
    volume = Volume(voxels.astype(np.int16), np.diag([1.0, 3, 3, 1]), Path("x"))
    volume_DHW, _ = to_grid(volume, (3.0, 3.0, 5.0), (40, 40, 20))
    inner = volume_DHW[:, :, 3:-3].astype(float)
    assert abs(inner.mean() + 100) < 1
    assert np.ptp(inner) < 20


def test_coarser_grids_are_a_gaussian_and_linear_interpolation(real_data: Path):
    """Against scipy, which smooths every voxel before the points are looked up."""
    volume = read_ct(real_data / "ct" / "tcga_34_2605_ct3mm.nii.gz")
    spacing, shape = (6.0, 7.0, 4.5), (40, 50, 80)
    volume_DHW, affine = to_grid(volume, spacing, shape)
    values = np.maximum(volume.voxels, -1024).astype(np.float64)
    size = np.linalg.norm(volume.affine[:3, :3], axis=0)
    factor = np.asarray(spacing)[::-1] / size  # the scan lies along x, y, z
    sigma = np.sqrt(factor**2 - 1) / (2 * np.sqrt(2 * np.log(2)))
    smooth = ndimage.gaussian_filter(values, sigma, mode="nearest")
    index = np.linalg.inv(volume.affine) @ affine
    points = np.indices(shape).reshape(3, -1)
    expected = ndimage.map_coordinates(
        smooth, index[:3, :3] @ points + index[:3, 3:], order=1, mode="nearest"
    ).reshape(shape)
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(volume_DHW[inner], expected[inner], atol=0.51)


def orientations_agree(image: nibabel.Nifti1Image, folder: Path, spacing, shape) -> None:
    reference, affine = to_grid(
        read_ct(stored_as(image, "LPS", folder / "LPS.nii")), spacing, shape
    )
    assert len(np.unique(reference)) > 100
    for axes in ("RAS", "SAR", "PIL"):
        volume = read_ct(stored_as(image, axes, folder / f"{axes}.nii"))
        assert nibabel.aff2axcodes(volume.affine) == tuple(axes)
        other, other_affine = to_grid(volume, spacing, shape)
        np.testing.assert_array_equal(other, reference)
        np.testing.assert_allclose(other_affine, affine, atol=1e-3)  # float32 in the file


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["axis-aligned", "oblique"])
def test_the_storage_order_does_not_matter(tmp_path: Path, affine: np.ndarray):
    affine = affine * [[1.0137], [1.0137], [1.0137], [1]]  # numbers that float32 has to round
    image = nibabel.Nifti1Image(thorax((40, 33, 28)), affine)
    orientations_agree(image, tmp_path, (5.1, 4.3, 4.7), (20, 22, 24))


def test_the_storage_order_of_a_real_ct_does_not_matter(real_data: Path, tmp_path: Path):
    image = nibabel.load(real_data / "ct" / "acil_ct64_ct.nii.gz")
    orientations_agree(image, tmp_path, (7.5, 6.5, 6.5), (40, 48, 48))


# From the features back to the input


def test_feature_cells_divide_the_grid_evenly():
    grid_affine = np.array([[0, 0, -2, 80], [0, -2.5, 0, 9], [-3, 0, 0, 7], [0, 0, 0, 1.0]])
    affine = feature_affine(grid_affine, (405, 420, 422), (135, 6, 7))
    for axis, (n, m) in enumerate(((405, 135), (420, 6), (422, 7))):
        for c in (0, 1, m - 1):
            index = np.zeros(3)
            index[axis] = c
            cell = np.zeros(3)
            # The centre of the voxels' edges, [c n/m - 1/2, (c + 1) n/m - 1/2].
            cell[axis] = (c + 0.5) * n / m - 0.5
            other = [a for a in range(3) if a != axis]
            cell[other] = np.array((405 / 135, 420 / 6, 422 / 7))[other] / 2 - 0.5
            np.testing.assert_allclose(
                apply_affine(affine, index), apply_affine(grid_affine, cell), atol=1e-9
            )


def _trilinear(map_dhw: np.ndarray, position: np.ndarray) -> float:
    """By hand: linear between centres, constant to the border, zero beyond."""
    if (position < -0.5).any() or (position > np.array(map_dhw.shape) - 0.5).any():
        return 0.0
    position = np.clip(position, 0, np.array(map_dhw.shape) - 1)
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        cell = np.minimum(np.floor(position) + corner, np.array(map_dhw.shape) - 1).astype(int)
        weight = np.prod(np.where(corner, position % 1, 1 - position % 1))
        total += weight * map_dhw[tuple(cell)]
    return total


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["axis-aligned", "oblique"])
def test_maps_return_to_the_input_by_physical_position(affine: np.ndarray):
    rng = np.random.default_rng(1)
    volume = Volume(thorax(), affine, Path("x"))
    _, grid_affine = to_grid(volume, (5.0, 4.0, 3.0), (12, 10, 14))
    map_dhw = rng.normal(size=(4, 1, 5)).astype(np.float32)
    map_affine = feature_affine(grid_affine, (12, 10, 14), map_dhw.shape)
    map_ijk = from_features(map_dhw, map_affine, volume)
    assert map_ijk.shape == volume.voxels.shape
    assert map_ijk.dtype == np.float32
    to_cell = np.linalg.inv(map_affine) @ affine
    outside = 0
    for index in rng.integers(0, volume.voxels.shape, (400, 3)):
        position = apply_affine(to_cell, index)
        if (abs(position + 0.5) < 2e-3).any() or (
            abs(position - np.array(map_dhw.shape) + 0.5) < 2e-3
        ).any():
            continue  # on the border, which is taken to be inside
        expected = _trilinear(map_dhw, position)
        outside += expected == 0
        assert map_ijk[tuple(index)] == pytest.approx(expected, abs=1e-5)
    assert 20 < outside < 380  # both kinds were there


def test_resampling_agrees_with_nibabel(tmp_path: Path):
    from nibabel.processing import resample_from_to

    values = np.random.default_rng(2).normal(size=(9, 8, 7)).astype(np.float32)
    target = np.linalg.inv(rotation_4x4(5)) @ np.diag([1.5, 2, 2.5, 1])
    target[:3, 3] = apply_affine(OBLIQUE, [2, 2, 2])
    expected = resample_from_to(
        nibabel.Nifti1Image(values, OBLIQUE), ((6, 5, 4), target), order=1, cval=np.nan
    ).get_fdata()
    found = resample(values, OBLIQUE, target, (6, 5, 4))
    inside = np.isfinite(expected)
    assert inside.sum() > 20
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)


def rotation_4x4(degrees: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    return affine


# Writing


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (2, 0), (0, 3), (4, 1)])
def test_written_maps_keep_the_place_and_codes_of_the_input(tmp_path: Path, sform: int, qform: int):
    path = save(tmp_path / "ct.nii.gz", thorax(), OBLIQUE, sform_code=sform, qform_code=qform)
    volume = read_ct(path)
    values = np.random.default_rng(0).normal(size=volume.voxels.shape).astype(np.float32)
    write_nifti(tmp_path / "map.nii.gz", values, volume.affine, volume.header, same_grid=True)
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), values)
    np.testing.assert_array_equal(image.affine, volume.affine)
    assert image.get_data_dtype() == np.float32
    assert (image.header["sform_code"], image.header["qform_code"]) == (sform, qform)
    assert image.header.get_xyzt_units() == nibabel.load(path).header.get_xyzt_units()

    _, affine = to_grid(volume, (6.0, 5.0, 4.0), (10, 12, 14))
    write_nifti(tmp_path / "grid.nii", values, affine, volume.header)
    np.testing.assert_allclose(nibabel.load(tmp_path / "grid.nii").affine, affine, atol=1e-4)
    write_nifti(tmp_path / "alone.nii", values, affine)
    np.testing.assert_allclose(nibabel.load(tmp_path / "alone.nii").affine, affine, atol=1e-4)


def test_a_full_disk_leaves_nothing(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a disk of 100 kB
        with pytest.raises(UserError, match=os.strerror(errno.EFBIG)) as error:
            write_nifti(tmp_path / "map.nii.gz", values, LPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "map.nii.gz") in str(error.value)
    assert list(tmp_path.iterdir()) == []
