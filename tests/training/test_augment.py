"""Window, scale, flips and rotations: closed forms, NumPy, and the odds of the draws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.config import Preprocess
from hirescam_jax.training.augment import augment, flip_and_rotate

POSES = list(itertools.product((-1, 0, 1, 2), (0, 1, 2, 3)))


def pose_in_numpy(x: np.ndarray, axis: int, turns: int) -> np.ndarray:
    if axis >= 0:
        x = np.flip(x, axis - 3)
    return np.rot90(x, turns, axes=(-2, -1))


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_window_and_scale(dtype):
    volume = np.asarray([[-3000, -1024, -1000, -100], [0, 400, 800, 3071]], dtype)
    result = Preprocess().normalize(jnp.asarray(volume))
    assert result.dtype == jnp.float32
    expected = [[0, 0, 0, 0.5], [5 / 9, 7 / 9, 1, 1]]
    np.testing.assert_allclose(result, np.asarray(expected) - 0.449, rtol=1e-6, atol=1e-7)


def test_other_windows():
    result = Preprocess(hu_min=-160.0, hu_max=240.0, mean=0.0).normalize(
        jnp.asarray([-500, 40, 240])
    )
    np.testing.assert_allclose(result, [0, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(("axis", "turns"), POSES)
def test_flip_and_rotate_is_numpys(axis, turns):
    x = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    moved = jax.jit(flip_and_rotate)(jnp.asarray(x), jnp.asarray(axis), jnp.asarray(turns))
    np.testing.assert_array_equal(moved, pose_in_numpy(x, axis, turns))


@pytest.mark.parametrize(("axis", "turns"), [p for p in POSES if p[1] in (0, 2)])
def test_half_turns_need_no_square(axis, turns):
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    moved = flip_and_rotate(jnp.asarray(x), jnp.asarray(axis), jnp.asarray(turns))
    np.testing.assert_array_equal(moved, pose_in_numpy(x, axis, turns))


def keys_of(seeds) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.asarray(seeds))


def poses_drawn(settings: Preprocess, seeds) -> list[set[tuple[int, int]]]:
    """Which poses explain what each key did to a cube whose cells are all different."""
    cube = np.arange(8).reshape(2, 2, 2)
    count = len(seeds)
    volumes, regions = augment(
        settings,
        keys_of(seeds),
        jnp.tile(jnp.asarray(cube, jnp.int16), (count, 1, 1, 1)),
        jnp.tile(jnp.asarray(cube, jnp.uint8), (count, 1, 1, 1, 1)),
    )
    np.testing.assert_array_equal(volumes, regions[:, 0])
    by_content: dict[bytes, set] = {}
    for pose in POSES:
        by_content.setdefault(pose_in_numpy(cube, *pose).tobytes(), set()).add(pose)
    return [by_content[v.tobytes()] for v in np.asarray(volumes, cube.dtype)]


def test_volume_and_masks_move_together():
    """A volume that is made from its own mask, on a grid twice as fine."""
    rng = np.random.default_rng(0)
    regions = (rng.random((64, 2, 3, 4, 4)) < 0.5).astype(np.uint8)
    fine = regions.repeat(2, 2).repeat(2, 3).repeat(2, 4)
    volumes = (fine[:, 0] + 2 * fine[:, 1]).astype(np.int16)
    moved, masks = augment(
        Preprocess(flip=1.0, rotate=1.0),
        keys_of(range(64)),
        jnp.asarray(volumes),
        jnp.asarray(regions),
    )
    assert (moved.dtype, masks.dtype) == (jnp.int16, jnp.uint8)
    fine = np.asarray(masks).repeat(2, 2).repeat(2, 3).repeat(2, 4)
    np.testing.assert_array_equal(moved, fine[:, 0] + 2 * fine[:, 1])
    assert (np.asarray(moved) != volumes).any(axis=(1, 2, 3)).all()
    for before, after in zip(regions, np.asarray(masks), strict=True):
        assert any(np.array_equal(pose_in_numpy(before, *pose), after) for pose in POSES)


def assert_share(count: int, total: int, probability: float) -> None:
    """Within five standard deviations of a binomial draw."""
    deviation = math.sqrt(total * probability * (1 - probability))
    assert abs(count - total * probability) < 5 * deviation


def test_how_often_it_flips():
    total = 4000
    drawn = poses_drawn(Preprocess(rotate=0.0), range(total))
    assert_share(sum((-1, 0) in poses for poses in drawn), total, 1 / 2)
    for axis in range(3):
        assert_share(sum((axis, 0) in poses for poses in drawn), total, 1 / 6)


def test_how_often_it_rotates():
    total = 4000
    drawn = poses_drawn(Preprocess(flip=0.0), range(total))
    assert_share(sum((-1, 0) in poses for poses in drawn), total, 1 / 2)
    for turns in (1, 2, 3):
        assert_share(sum((-1, turns) in poses for poses in drawn), total, 1 / 6)


def test_flips_and_rotations_are_drawn_independently():
    """The odds of all sixteen draws, those that look alike taken together."""
    total = 4000
    drawn = poses_drawn(Preprocess(), range(total))
    seen = {frozenset(poses) for poses in drawn}
    assert len(seen) == 12  # a flip along a row and a half turn is a flip along a column, and so on
    for poses in seen:
        odds = sum(
            (3 if axis < 0 else 1) / 6 * (3 if turns == 0 else 1) / 6 for axis, turns in poses
        )
        assert_share(sum(d == poses for d in drawn), total, odds)


def test_example_depends_on_its_own_key_only():
    settings = Preprocess()
    together = poses_drawn(settings, [5, 11, 23, 42])
    assert poses_drawn(settings, [42, 23, 11, 5]) == together[::-1]
    assert poses_drawn(settings, [5, 5, 1, 5])[0::3] == [together[0]] * 2
    assert poses_drawn(settings, [11]) == [together[1]]


def test_nothing_is_drawn_when_nothing_is_asked():
    volumes = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    regions = jnp.arange(2 * 2 * 3 * 2 * 5).reshape(2, 2, 3, 2, 5)
    moved, masks = augment(Preprocess(flip=0.0, rotate=0.0), keys_of([0, 1]), volumes, regions)
    np.testing.assert_array_equal(moved, volumes)
    np.testing.assert_array_equal(masks, regions)


@pytest.mark.parametrize(
    ("volume", "grid"), [((3, 4, 5), (3, 4, 4)), ((3, 4, 4), (3, 4, 5))], ids=["volume", "grid"]
)
def test_rotations_of_what_is_not_square_are_refused(volume, grid):
    arrays = jnp.zeros((1, *volume), jnp.int16), jnp.zeros((1, 2, *grid), jnp.uint8)
    with pytest.raises(ValueError, match=r"set preprocess\.rotate to 0"):
        augment(Preprocess(), keys_of([0]), *arrays)
    moved, masks = augment(Preprocess(rotate=0.0), keys_of([0]), *arrays)
    assert (moved.shape, masks.shape) == ((1, *volume), (1, 2, *grid))
