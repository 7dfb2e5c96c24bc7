"""Insertion, deletion and ROAD: explicit loops, closed forms, and SciPy's direct sparse solver."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import ndimage, sparse
from scipy.special import expit

from hirescam_jax.metrics import blur, deletion, insertion, linear_imputation, road

SHAPES = [(6, 8), (4, 6, 5)]


def linear(weights_vK, volumes):
    return volumes.reshape(len(volumes), -1) @ weights_vK - 0.3


def problem(shape, batch=2, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    volumes = rng.normal(size=(batch, *shape)).astype(np.float32)
    weights = rng.normal(size=(np.prod(shape), labels)).astype(np.float32) / 4
    maps = rng.normal(size=(batch, labels, *shape)).astype(np.float32)
    return Partial(linear, jnp.asarray(weights)), weights, volumes, maps


def curve_by_loop(first, last, map_, weights, label, steps):
    """Cells of `last` are put into `first`, the strongest first, one by one."""
    order = np.argsort(-map_.reshape(-1), kind="stable")
    counts = np.round(np.arange(steps + 1) * (order.size / steps))
    scores, current = [], first.reshape(-1).astype(np.float64).copy()
    for place in range(order.size + 1):
        scores += [expit(current @ weights[:, label] - 0.3)] * int((counts == place).sum())
        if place < order.size:
            current[order[place]] = last.reshape(-1)[order[place]]
    return np.array(scores)


@pytest.mark.parametrize("shape", SHAPES)
def test_curves_by_loop(shape):
    sklearn = pytest.importorskip("sklearn.metrics")
    model, weights, volumes, maps = problem(shape)
    steps = 7
    labels = np.array([[2, 0, 1], [0, 0, 2]])
    taken = deletion(model, volumes, maps, labels, fill=0.5, steps=steps, chunk=3)
    put = insertion(model, volumes, maps, labels, start=volumes * 0 - 1, steps=steps, chunk=3)
    np.testing.assert_allclose(taken.fractions, np.arange(8) / 7, rtol=1e-6)
    for b, i in np.ndindex(2, 3):
        rest = maps[b, i], weights, labels[b, i], steps
        whole, nothing = volumes[b], np.full(shape, 0.5)
        scores = curve_by_loop(whole, nothing, *rest)
        np.testing.assert_allclose(taken.scores[b, i], scores, rtol=1e-5)
        area = sklearn.auc(np.arange(8) / 7, scores)
        np.testing.assert_allclose(taken.area[b, i], area, rtol=1e-5)
        scores = curve_by_loop(np.full(shape, -1.0), whole, *rest)
        np.testing.assert_allclose(put.scores[b, i], scores, rtol=1e-5)


def test_the_exact_map_of_a_linear_model_is_the_best_there_is():
    """Taking the largest contributions first is optimal: no other map has less area."""
    model, weights, volumes, maps = problem(SHAPES[0])
    exact = volumes[:, None] * weights.T.reshape(1, 3, *SHAPES[0])
    best, other = (deletion(model, volumes, m).area for m in (exact, maps))
    worst = deletion(model, volumes, -exact).area
    assert (np.asarray(best) < np.asarray(other)).all()
    assert (np.asarray(other) < np.asarray(worst)).all()


def test_coarse_maps_are_interpolated_and_channels_go_together():
    rng = np.random.default_rng(0)
    volumes = rng.normal(size=(1, 6, 8, 3)).astype(np.float32)
    coarse = rng.normal(size=(1, 1, 3, 2)).astype(np.float32)
    weights = rng.normal(size=(volumes.size, 1)).astype(np.float32) / 4
    found = deletion(Partial(linear, jnp.asarray(weights)), volumes, coarse, steps=6)
    fine = ndimage.zoom(coarse[0, 0], (2, 4), order=1, mode="nearest", grid_mode=True)
    order = np.argsort(-fine.reshape(-1), kind="stable")
    current, expected = volumes[0].reshape(-1, 3).copy(), []
    for count in range(0, 49, 8):
        current[order[:count]] = 0
        expected.append(expit(current.reshape(-1) @ weights[:, 0] - 0.3))
    np.testing.assert_allclose(found.scores[0, 0], expected, rtol=1e-5)


def test_a_map_without_an_order_tells_nothing_of_where_the_model_looks():
    """Constant maps; the model looks at the first slice, or at the last."""
    volumes = np.abs(np.random.default_rng(0).normal(size=(1, 10, 8, 8))).astype(np.float32)
    maps = np.zeros((1, 1, 10, 8, 8), np.float32)
    areas, keys = [], jax.random.split(jax.random.key(0), 3)
    for slices in (slice(0, 1), slice(-1, None)):
        weights = np.zeros((10, 8, 8, 1), np.float32)
        weights[slices] = 0.2
        model = Partial(lambda w, v: v.reshape(len(v), -1) @ w, weights.reshape(-1, 1))
        of_keys = [float(deletion(model, volumes, maps, key=key).area[0, 0]) for key in keys]
        areas.append(of_keys)
        assert len(set(of_keys)) == 3
        again = float(deletion(model, volumes, maps, key=keys[0]).area[0, 0])
        assert again == of_keys[0]
    np.testing.assert_allclose(areas[0], areas[1], atol=0.06)  # by position: 0.54 and 0.99
    np.testing.assert_allclose(np.mean(areas[0]), np.mean(areas[1]), atol=0.03)


def test_a_map_with_nan_has_no_scores():
    model, _, volumes, maps = problem(SHAPES[0])
    maps[1, 2, 0, 0] = np.nan
    found = [deletion(model, volumes, maps).area, insertion(model, volumes, maps).area]
    found.append(road(model, volumes, maps, key=jax.random.key(0), fractions=(0.5,)).combined)
    for values in found:
        expected = np.zeros((2, 3), bool)
        expected[1, 2] = True
        np.testing.assert_array_equal(np.isnan(values), expected)


def test_volumes_of_integers_are_taken_as_floats():
    model, _, volumes, maps = problem(SHAPES[0])
    volumes = np.round(3 * volumes).astype(np.int16)
    floats = volumes.astype(np.float32)
    key = jax.random.key(0)
    for f in (
        lambda v: deletion(model, v, maps, fill=0.5).scores,
        lambda v: insertion(model, v, maps, start=floats / 2).scores,
        lambda v: road(model, v, maps, key=key, fractions=(0.5,)).combined,
        lambda v: linear_imputation(v, maps[:, 0] > 0),
        lambda v: blur(jnp.asarray(v), 1.0, 2),
    ):
        np.testing.assert_array_equal(f(volumes), f(floats))


def test_chunks_change_nothing():
    model, _, volumes, maps = problem(SHAPES[0])
    curves = [deletion(model, volumes, maps, chunk=chunk).scores for chunk in (1, 5, 100)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


# -- imputation -----------------------------------------------------------------------------------


def imputed_directly(volume, removed):
    """Each removed cell as the weighted mean of its neighbours, by SciPy's sparse LU, float64."""
    number = np.full(volume.shape, -1)
    number[removed] = np.arange(removed.sum())
    rows, columns, values = [], [], []
    right = np.zeros(removed.sum())
    for cell in zip(*np.nonzero(removed), strict=True):
        total = 0.0
        for step in itertools.product((-1, 0, 1), repeat=volume.ndim):
            axes = np.abs(step).sum()
            there = tuple(np.add(cell, step))
            if axes == 0 or any(not 0 <= i < n for i, n in zip(there, volume.shape, strict=True)):
                continue
            weight = 0.5 ** (axes - 1)
            total += weight
            if removed[there]:
                rows.append(number[cell])
                columns.append(number[there])
                values.append(-weight)
            else:
                right[number[cell]] += weight * volume[there]
        rows.append(number[cell])
        columns.append(number[cell])
        values.append(total)
    system = sparse.csc_matrix((values, (rows, columns)))
    result = volume.astype(np.float64)
    result[removed] = sparse.linalg.spsolve(system, right)
    return result


@pytest.mark.parametrize("shape", [(40, 31), (14, 12, 13)])
def test_imputation_is_the_direct_solution(shape):
    rng = np.random.default_rng(0)
    volumes = ndimage.gaussian_filter(
        rng.normal(size=(4, *shape)), 1, axes=range(1, len(shape) + 1)
    )
    volumes = (volumes / volumes.std()).astype(np.float32)
    removed = rng.random(volumes.shape) < np.array([0.1, 0.5, 0.95, 0.0]).reshape(
        -1, *[1] * len(shape)
    )
    removed[3, 2:-1, 1:-2] = True  # one large hole
    found = jax.jit(linear_imputation)(volumes, removed)
    for b in range(4):
        expected = imputed_directly(volumes[b], removed[b])
        # The volumes' standard deviation is 1; the tolerance is of the residual.
        np.testing.assert_allclose(found[b], expected, atol=2e-4, rtol=0)
    np.testing.assert_array_equal(np.asarray(found)[~removed], volumes[~removed])


def test_imputation_gives_a_ramp_back():
    """A linear function is its neighbours' mean, whatever the weights."""
    ramp = np.indices((9, 10, 8)).transpose(1, 2, 3, 0) @ np.array([[1.0, 0.3], [-2, 0], [0.5, 1]])
    removed = np.zeros((1, 9, 10, 8), bool)
    removed[:, 2:-1, 1:-2, 3:5] = True
    hole = np.where(removed[..., None], 0, ramp[None]).astype(np.float32)
    np.testing.assert_allclose(linear_imputation(hole, removed)[0], ramp, atol=2e-4)


def test_imputation_is_the_authors_in_2d():
    """An independent port of the authors' imputer, in Quantus."""
    quantus = pytest.importorskip("quantus.functions.perturb_func")
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 12, 15)).astype(np.float32)
    removed = rng.random((12, 15)) < 0.6
    theirs = quantus.noisy_linear_imputation(arr=image, indices=np.flatnonzero(removed), noise=0.0)
    ours = linear_imputation(np.moveaxis(image, 0, -1)[None], removed[None])[0]
    np.testing.assert_allclose(np.moveaxis(ours, -1, 0), theirs.reshape(image.shape), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_road_by_hand(shape):
    model, weights, volumes, maps = problem(shape)
    fractions = (0.2, 0.5)
    found = road(
        model, volumes, maps[:, :2], [1, 2], key=jax.random.key(0), fractions=fractions, noise=0.0
    )
    cells = int(np.prod(shape))
    for b, i, f in np.ndindex(2, 2, 2):
        order = np.argsort(-maps[b, i].reshape(-1), kind="stable")
        count = round(fractions[f] * cells)
        for chosen, scores in (
            (order[:count], found.most_first),
            (order[-count:], found.least_first),
        ):
            removed = np.zeros(cells, bool)
            removed[chosen] = True
            volume = imputed_directly(volumes[b], removed.reshape(shape))
            score = expit(volume.reshape(-1) @ weights[:, i + 1] - 0.3)
            np.testing.assert_allclose(scores[b, i, f], score, rtol=1e-4)
    difference = np.asarray(found.least_first) - np.asarray(found.most_first)
    np.testing.assert_allclose(found.combined, difference.mean(-1) / 2, rtol=1e-5, atol=1e-7)


def test_noise_of_road_is_on_removed_cells_alone():
    """A model that sums squares of the cells sees how many have noise."""
    volumes = jnp.ones((1, 40, 50))
    maps = jnp.asarray(np.random.default_rng(0).random((1, 1, 40, 50)), jnp.float32)

    def spread(volumes):
        return ((volumes - 1) ** 2).sum((1, 2))[:, None] / 2000

    found = road(Partial(spread), volumes, maps, key=jax.random.key(1), fractions=(0.5,), noise=0.3)
    variance = np.log(found.most_first / (1 - found.most_first))[0, 0, 0]
    # 1,000 of 2,000 cells with variance 0.09; the standard error of its mean is 4.5 %.
    np.testing.assert_allclose(variance, 0.5 * 0.09, rtol=4 * np.sqrt(2 / 1000))


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_is_scipys(shape):
    volumes = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    found = blur(jnp.asarray(volumes), 1.5, len(shape))
    radius = round(3 * 1.5)
    for b in range(2):
        expected = ndimage.gaussian_filter(volumes[b], 1.5, mode="nearest", radius=radius)
        np.testing.assert_allclose(found[b], expected, atol=1e-5)


def test_what_does_not_fit_is_refused():
    model, _, volumes, maps = problem(SHAPES[0])
    with pytest.raises(ValueError, match="do not fit volumes"):
        deletion(model, volumes, maps[:1])
    with pytest.raises(ValueError, match="do not fit volumes"):
        insertion(model, volumes, maps[..., None])
    with pytest.raises(ValueError, match=r"labels \(2,\) do not fit maps"):
        deletion(model, volumes, maps, [0, 1])
    with pytest.raises(ValueError, match="label 3 is out of range: the model has 3 labels"):
        deletion(model, volumes, maps, [0, 1, 3])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        deletion(model, volumes, maps, steps=0)
    with pytest.raises(ValueError, match="fractions must lie between 0 and 1"):
        road(model, volumes, maps, key=jax.random.key(0), fractions=(0.5, 1.0))
    with pytest.raises(ValueError, match="fractions is empty: give at least one"):
        road(model, volumes, maps, key=jax.random.key(0), fractions=())
    with pytest.raises(ValueError, match="must agree"):
        linear_imputation(volumes, np.zeros((2, 6, 7), bool))
