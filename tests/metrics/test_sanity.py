"""Similarity of maps by scikit-image and SciPy; randomisation of layers, leaf by leaf."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hirescam_jax.metrics import (
    cascading_randomization,
    layer_order,
    repeatability,
    similarity,
    spearman,
    ssim,
)
from hirescam_jax.models import AxialNet, Conv3DNet


def two(shape, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.random(shape).astype(np.float32)
    return first, (0.6 * first + 0.4 * rng.random(shape)).astype(np.float32)


@pytest.mark.parametrize("window", [7, 3])
@pytest.mark.parametrize("grid", [(15, 12), (9, 8, 10)])
def test_ssim_is_scikit_images(grid, window):
    metrics = pytest.importorskip("skimage.metrics")
    first, second = two((2, 2, *grid))
    found = ssim(first, second, data_range=1.3, window=window)
    for b, k in np.ndindex(2, 2):
        expected = metrics.structural_similarity(
            first[b, k].astype(np.float64),
            second[b, k].astype(np.float64),
            data_range=1.3,
            win_size=window,
        )
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-4)


def test_ssim_of_equal_maps_and_of_small_grids():
    first, second = two((1, 2, 6, 4, 5))
    np.testing.assert_allclose(ssim(first, first), 1, rtol=1e-6)
    np.testing.assert_array_equal(ssim(first, second), ssim(first, second, window=3))
    for window in (2, 4, 5):
        with pytest.raises(ValueError, match="window"):
            ssim(first, second, window=window)
    with pytest.raises(ValueError, match="window"):
        ssim(first[..., :2], second[..., :2])
    assert np.isnan(similarity(first[..., :2], second[..., :2]).ssim).all()


@pytest.mark.parametrize("levels", [None, 4], ids=["", "ties"])
def test_spearman_is_scipys(levels):
    first, second = two((2, 3, 5, 6, 4))
    if levels:
        first, second = np.round(first * levels), np.round(second * levels)
    found = spearman(first, second)
    for b, k in np.ndindex(2, 3):
        expected = stats.spearmanr(first[b, k].reshape(-1), second[b, k].reshape(-1)).statistic
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-4)


def test_spearman_of_a_constant_map_is_missing():
    first, second = two((1, 2, 5, 5))
    first[0, 0] = 3
    np.testing.assert_array_equal(np.isnan(spearman(first, second)), [[True, False]])
    np.testing.assert_allclose(spearman(second, -second), -1, rtol=1e-5)


def test_similarity_of_signs_and_absolute_values():
    first, _ = two((1, 1, 6, 7))
    first -= 0.5
    found = similarity(first, -first)
    np.testing.assert_allclose(found.spearman, -1, rtol=1e-5)
    np.testing.assert_allclose(found.spearman_absolute, 1, rtol=1e-5)
    assert float(found.ssim[0, 0]) < 0.1
    np.testing.assert_allclose(similarity(first, 3 * first).ssim, 1, rtol=1e-5)


def test_maps_that_show_nothing_are_not_alike():
    first, second = two((1, 3, 6, 7))
    first[0, 0] *= -1
    second[0, :2] *= -1
    found = similarity(first, second)
    np.testing.assert_array_equal(np.isnan(found.ssim), [[True, False, False]])
    assert found.ssim[0, 1] < 0.2
    assert not np.isnan(found.spearman).any()


def test_similarity_of_nan_is_missing_and_of_bytes_that_of_floats():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 1, 2, 16, 16)).astype(np.uint8)
    expected = metrics.structural_similarity(first[0, 1], second[0, 1], data_range=255)
    found = ssim(first, second, data_range=255)
    np.testing.assert_allclose(found[0, 1], expected, rtol=1e-4)
    floats = first.astype(np.float32), second.astype(np.float32)
    for found, wanted in zip(similarity(first, second), similarity(*floats), strict=True):
        np.testing.assert_array_equal(found, wanted)
    floats[0][0, 0, 3, 4] = np.nan
    for values in similarity(*floats):
        np.testing.assert_array_equal(np.isnan(values), [[True, False]])


def test_repeatability_is_the_mean_over_pairs():
    maps = [two((2, 2, 7, 8), seed)[1] - 0.4 for seed in range(3)]
    maps[1][0, 1] = 0  # constant: the one pair without it counts
    found = repeatability(maps)
    pairs = np.array([spearman(a, b) for a, b in combinations(maps, 2)])
    np.testing.assert_allclose(found.spearman[1], pairs[:, 1].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.spearman[0, 1], pairs[1, 0, 1], rtol=1e-5)
    with pytest.raises(ValueError, match="two models at least"):
        repeatability(maps[:1])
    with pytest.raises(ValueError, match="must agree"):
        repeatability([maps[0], maps[1][:, :1]])


# -- layers ---------------------------------------------------------------------------------------


def shapes_of(model, shape):
    volume = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), volume), volume


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_layers_from_the_output_back(remat):
    model = AxialNet(3, (1, 1), (4, 8), "small", (6, 5), "SAME", remat=remat)
    variables, volume = shapes_of(model, (6, 16, 16))
    order = layer_order(model.apply, variables, volume)
    assert order[:3] == ["fc", "convs_1", "convs_0"]
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    layers = {jax.tree_util.keystr(p[:-1], simple=True, separator="/") for p, _ in leaves}
    assert sorted(order) == sorted(layers)
    # The stem comes last, the second stage of the ResNet before the first.
    blocks = [name.rsplit("/", 1)[0] for name in order if name.count("/") == 2]
    assert list(dict.fromkeys(blocks)) == sorted(set(blocks), reverse=True)
    assert all(name.count("/") == 1 for name in order[-2:])
    assert order[-1].startswith("resnet/")


def test_layers_of_the_other_model():
    model = Conv3DNet(3, widths=(4, 6), narrow=(5,), hidden=(8, 6))
    order = layer_order(model.apply, *shapes_of(model, (27, 27, 27)))
    numbers = [name for name in order if name.rsplit("_", 1)[-1].isdigit()]
    for stem in {name.rsplit("_", 1)[0] for name in numbers}:
        same = [name for name in numbers if name.rsplit("_", 1)[0] == stem]
        assert same == sorted(same, reverse=True)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "batch_stats": {"body": {"norm": {"mean": rng.random(2)}}},
        "params": {
            "body": {"conv": {"kernel": rng.random(3)}, "norm": {"scale": rng.random(2)}},
            "fc": {"bias": rng.random(2), "kernel": rng.random(4)},
        },
    }


def test_layers_become_new_one_after_the_other():
    old, new = tree(0), tree(1)

    def is_new(variables):
        same = jax.tree.map(lambda x, a, b: (x is a, x is b), variables, old, new)
        flat = jax.tree_util.tree_flatten_with_path(same, is_leaf=lambda x: isinstance(x, tuple))[0]
        assert all(a != b for _, (a, b) in flat)
        return {jax.tree_util.keystr(p, simple=True, separator="/") for p, (_, b) in flat if b}

    steps = [
        (name, is_new(v)) for name, v in cascading_randomization(old, new, ["fc", "body/norm"])
    ]
    fc = {"params/fc/bias", "params/fc/kernel"}
    norm = {"params/body/norm/scale", "batch_stats/body/norm/mean"}
    assert steps == [("fc", fc), ("body/norm", fc | norm)]
    *_, (_, last) = cascading_randomization(old, new, ["fc", "body"])
    assert is_new(last) == fc | norm | {"params/body/conv/kernel"}


def test_unknown_layers_and_other_networks_are_refused():
    with pytest.raises(
        ValueError, match=r"no layer 'fd' in the variables: body/conv, body/norm, fc"
    ):
        list(cascading_randomization(tree(0), tree(1), ["fc", "fd"]))
    other = tree(1)
    del other["params"]["fc"]["bias"]
    with pytest.raises(ValueError, match="different networks"):
        list(cascading_randomization(tree(0), other, ["fc"]))
