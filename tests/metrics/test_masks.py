"""Maps against masks: explicit loops, scikit-learn and scikit-image; and maps without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.metrics import (
    best_threshold,
    centre_blob,
    energy_inside,
    map_average_precision,
    organ_iou,
    organ_prior,
    otsu_threshold,
    overlap,
    pointing_game,
    random_maps,
    rank_accuracy,
)
from hirescam_jax.metrics import masks as masks_module
from tests.rounding import assert_same_but_for_rounding

GRIDS = [(5, 6), (4, 3, 5)]
THRESHOLDS = np.array([0.0, 0.3, 0.7], np.float32)


def all_measures(maps, masks, void):
    """[B, K, columns]"""
    thresholds = jnp.asarray(THRESHOLDS)
    both = overlap(maps, masks, thresholds, void)
    columns = [pointing_game, energy_inside, rank_accuracy, map_average_precision]
    columns = [measure(maps, masks, void)[..., None] for measure in columns]
    organ = organ_iou(maps, masks, thresholds, void=void)
    return jnp.concatenate([*columns, organ, both.iou, both.dice], axis=-1)


def cases(grid, seed=0, levels=None):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, 3, *grid)).astype(np.float32)
    if levels:
        maps = np.round(maps * levels) / levels
    return maps, rng.random(maps.shape) < 0.4, rng.random(maps.shape) < 0.25


@pytest.mark.parametrize("levels", [None, 2], ids=["", "ties"])
@pytest.mark.parametrize("grid", GRIDS)
def test_measures_are_scikit_learns_on_the_cells_that_are_not_void(grid, levels):
    sklearn = pytest.importorskip("sklearn.metrics")
    maps, masks, void = cases(grid, levels=levels)
    found = np.asarray(jax.jit(all_measures)(maps, masks, void))
    for b, k in np.ndindex(2, 3):
        cells = ~void[b, k]
        values, mask = maps[b, k][cells].astype(np.float64), masks[b, k][cells]
        peak = values == values.max()
        size = mask.sum()
        last = np.sort(values)[::-1][size - 1]
        above, ties = values > last, values == last
        ranks = above[mask].sum() + (size - above.sum()) * ties[mask].sum() / ties.sum()
        expected = [
            peak[mask].sum() / peak.sum(),
            np.maximum(values, 0)[mask].sum() / np.maximum(values, 0).sum(),
            ranks / size,
            sklearn.average_precision_score(mask, values),
        ]
        binary = [values > t for t in THRESHOLDS]
        expected += [sklearn.precision_score(mask, x, zero_division=0) for x in binary]
        expected += [sklearn.jaccard_score(mask, x) for x in binary]
        expected += [sklearn.f1_score(mask, x) for x in binary]
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-5, atol=1e-7)


def test_nothing_void_is_no_void_and_numpy_is_jax():
    maps, masks, void = cases(GRIDS[1])
    program = jax.jit(all_measures)
    cells = int(np.prod(GRIDS[1]))  # sums of no more, and none of them cancels
    assert_same_but_for_rounding(
        program(maps, masks, None), program(maps, masks, void & False), terms=cells + 1
    )
    for measure in (pointing_game, energy_inside):
        by_numpy = measure(maps, masks, void)
        assert isinstance(by_numpy, np.ndarray)
        by_jax = measure(jnp.asarray(maps), masks, void)
        assert isinstance(by_jax, jax.Array)
        np.testing.assert_allclose(by_numpy, by_jax, rtol=1e-6)


def test_empty_masks_are_missing_and_not_missed():
    maps, masks, void = cases(GRIDS[0])
    masks[0, 1] &= False
    masks[1, 2] &= void[1, 2]  # all of it void
    masks[1, 2, 0, 0] = void[1, 2, 0, 0] = True
    found = np.asarray(jax.jit(all_measures)(maps, masks, void))
    missing = np.isnan(found)
    np.testing.assert_array_equal(missing.any(-1), [[0, 1, 0], [0, 0, 1]])
    assert missing[0, 1].all()
    assert missing[1, 2].all()


def test_organ_iou_where_no_map_could_be_right_or_none_wrong_is_missing():
    """Regions without a cell, of all cells, of all cells that are not void, and of some."""
    maps = np.random.default_rng(0).random((1, 4, 4, 5)).astype(np.float32)
    allowed = np.zeros(maps.shape, bool)
    allowed[0, 1:3] = allowed[0, 3, :2] = True
    void = np.zeros(maps.shape, bool)
    allowed[0, 2, 0], void[0, 2, 0] = False, True
    found = organ_iou(maps, allowed, [0.5], void=void)
    np.testing.assert_array_equal(np.isnan(found[0, :, 0]), [True, True, True, False])
    theirs = organ_iou(maps, allowed, [0.5], void=void, authors_zero_without_outside=True)
    np.testing.assert_array_equal(theirs[0, :3, 0], [0, 0, 0])


@pytest.mark.parametrize("values", [np.nan, "one"])
def test_a_map_with_nan_has_no_measure(values):
    maps, masks, void = cases(GRIDS[1])
    one = tuple(np.argwhere(~void[1, 2])[0])
    maps[1, 2][... if values is np.nan else one] = np.nan
    maps[0, 0][void[0, 0]] = np.nan  # void does not count
    found = np.isnan(np.asarray(jax.jit(all_measures)(maps, masks, void)))
    assert found[1, 2].all()
    found[1, 2] = False
    assert not found.any()
    assert np.isnan(pointing_game(maps, masks, void)[1, 2])
    assert np.isnan(energy_inside(maps, masks, void)[1, 2])
    assert np.isnan(otsu_threshold(maps, void)[1, 2])
    assert not np.isnan(otsu_threshold(maps, void)[0, 0])


def test_a_threshold_that_was_not_chosen_has_no_measure():
    maps, masks, _ = cases(GRIDS[0])
    for found in (organ_iou(maps, masks, [0.5, np.nan]), *overlap(maps, masks, [0.5, np.nan])):
        np.testing.assert_array_equal(np.isnan(found).all((0, 1)), [False, True])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, bool])
def test_maps_of_integers_are_measured_as_floats(dtype):
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 2 if dtype is bool else 200, (2, 3, 6, 7)).astype(dtype)
    masks, void = rng.random(maps.shape) < 0.3, rng.random(maps.shape) < 0.2
    wanted = all_measures(maps.astype(np.float32), masks, void)
    np.testing.assert_array_equal(all_measures(maps, masks, void), wanted)
    for measure in (pointing_game, energy_inside):
        wanted = measure(maps.astype(np.float64), masks, void)
        np.testing.assert_allclose(measure(maps, masks, void), wanted, rtol=1e-6)
    assert (np.asarray(organ_iou(maps, masks, [0.5])) > 0).any()


def test_otsu_of_bytes_is_scikit_images():
    filters = pytest.importorskip("skimage.filters")
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 40, 40)).astype(np.uint8)
    found = np.asarray(otsu_threshold(image))[0, 0]
    floats = image.astype(np.float32)
    np.testing.assert_allclose(found, filters.threshold_otsu(floats), rtol=1e-6)
    assert abs(found - filters.threshold_otsu(image)) < 1  # of whole numbers it is one of them


def test_organ_iou_is_compiled_once():
    maps, masks, _ = cases((3, 7))
    before = masks_module._organ_iou._cache_size()
    for _ in range(3):
        organ_iou(maps, masks, np.linspace(0, 1, 11))
    assert masks_module._organ_iou._cache_size() == before + 1


def test_perfect_and_uniform_maps_in_closed_form():
    masks = np.zeros((1, 1, 4, 5), bool)
    masks[0, 0, 1:3, 1:4] = True  # 6 of 20 cells
    perfect = masks.astype(np.float32)
    for measure in (rank_accuracy, map_average_precision):
        np.testing.assert_allclose(measure(perfect, masks), 1)
        np.testing.assert_allclose(measure(np.ones_like(perfect), masks), 6 / 20, rtol=1e-6)
    np.testing.assert_allclose(rank_accuracy(1 - perfect, masks), 0)
    ranks = np.arange(15, 21)  # the mask comes last: hits 1 to 6 at places 15 to 20
    np.testing.assert_allclose(
        map_average_precision(1 - perfect - 0.01 * np.arange(20).reshape(4, 5), masks),
        np.mean(np.arange(1, 7) / ranks),
        rtol=1e-6,
    )
    np.testing.assert_allclose(overlap(perfect, masks, [0.5]).iou, 1)
    half = overlap(np.ones_like(perfect), masks, [0.5])
    np.testing.assert_allclose(half.iou, 6 / 20, rtol=1e-6)
    np.testing.assert_allclose(half.dice, 12 / 26, rtol=1e-6)


def test_authors_organ_iou_is_zero_without_outside():
    allowed = jnp.asarray([[[[1, 1], [0, 0]]]])
    maps = jnp.asarray([[[[1.0, 0.2], [0.6, 0.0]]]])
    thresholds = jnp.asarray([0.0, 0.5, 0.7])
    np.testing.assert_allclose(organ_iou(maps, allowed, thresholds), [[[2 / 3, 1 / 2, 1]]])
    theirs = organ_iou(maps, allowed, thresholds, authors_zero_without_outside=True)
    np.testing.assert_allclose(theirs, [[[2 / 3, 1 / 2, 0]]])


# -- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(40, 30), (12, 9, 10)])
def test_otsu_binarises_as_scikit_image(grid):
    filters = pytest.importorskip("skimage.filters")
    rng = np.random.default_rng(0)
    maps = rng.gamma(2.0, size=(2, 2, *grid)) + 4 * (rng.random((2, 2, *grid)) < 0.3)
    maps = maps.astype(np.float32)
    found = np.asarray(jax.jit(otsu_threshold)(maps))
    for b, k in np.ndindex(2, 2):
        expected = filters.threshold_otsu(maps[b, k])
        np.testing.assert_array_equal(maps[b, k] > found[b, k], maps[b, k] > expected)
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-5)


def test_otsu_of_two_values_of_none_and_without_void():
    maps = np.zeros((1, 3, 4, 4), np.float32)
    maps[0, 0, :, 0] = 5
    maps[0, 2], maps[0, 2, 0, 0], maps[0, 2, 1, 1] = 1, 2, 1000
    void = np.zeros(maps.shape, bool)
    void[0, 2, 1, 1] = True
    found = np.asarray(otsu_threshold(maps, void))
    assert 0 <= found[0, 0] < 5
    assert not (maps[0, 1] > found[0, 1]).any()  # a constant map has no upper part
    assert 1 <= found[0, 2] < 2
    iou = overlap(maps[:, :1], maps[:, :1] > 0, found[:, :1, None]).iou
    np.testing.assert_array_equal(iou, [[[1]]])


def test_best_threshold_is_of_the_mean_over_defined_volumes():
    scores = np.array([[[0.1, 0.9], [np.nan] * 2], [[0.9, 0.2], [np.nan] * 2]])
    np.testing.assert_array_equal(best_threshold(scores), [1, np.nan])


# -- maps without a model -------------------------------------------------------------------------


def test_organ_prior_is_the_mean_over_volumes_that_have_the_label():
    masks = np.zeros((5, 3, 2, 4), bool)
    masks[0, 0, 0, :2] = masks[3, 0, 0, 0] = masks[4, 1, 1] = True
    expected = np.zeros((3, 2, 4))
    expected[0, 0, :2], expected[1, 1], expected[2] = [1, 0.5], 1, np.nan
    np.testing.assert_array_equal(organ_prior([masks]), expected)
    np.testing.assert_array_equal(organ_prior([masks[:1], masks[1:4], masks[4:]]), expected)
    with pytest.raises(ValueError, match="no masks"):
        organ_prior([])
    with pytest.raises(ValueError, match="must agree"):
        organ_prior([masks, masks[:, :2]])


@pytest.mark.parametrize("grid", [(5, 7), (4, 5, 6)])
def test_centre_blob_is_a_gaussian(grid):
    blob = np.asarray(centre_blob((2, 3, *grid), width=0.2))
    places = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / (0.2 * n) for n in grid), indexing="ij")
    expected = np.exp(-sum(p**2 for p in places) / 2)
    np.testing.assert_allclose(blob, np.broadcast_to(expected, blob.shape), rtol=1e-5)


def test_random_maps_are_uniform_and_the_same_in_any_batch():
    maps = np.asarray(random_maps((6, 2, 20, 25)))
    assert 0 <= maps.min() < maps.max() < 1
    assert abs(maps.mean() - 0.5) < 4 / np.sqrt(12 * maps.size)
    some = random_maps((2, 2, 20, 25), index=np.array([4, 1]))
    np.testing.assert_array_equal(some, maps[[4, 1]])
    assert (np.asarray(random_maps((6, 2, 20, 25), seed=1)) != maps).any()
    # Any organ gets its share of the grid.
    allowed = np.zeros(maps.shape, bool)
    allowed[..., :5] = True
    share = np.asarray(organ_iou(jnp.asarray(maps), allowed, jnp.asarray([0.5])))
    assert abs(share.mean() - 0.2) < 0.02


# -- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    maps, masks, void = cases(GRIDS[0])
    for measure in (pointing_game, energy_inside, rank_accuracy, map_average_precision):
        with pytest.raises(ValueError, match=r"maps \(2, 3, 5, 6\) and masks .* must agree"):
            measure(maps, masks[:, :2])
        with pytest.raises(ValueError, match=r"maps .* and void .* must agree"):
            measure(maps, masks, void[:1])
        with pytest.raises(ValueError, match="with a spatial axis"):
            measure(maps[..., 0, 0], masks[..., 0, 0])
    void[1, 2] = True
    with pytest.raises(ValueError, match=r"void covers all of map \[1, 2\]"):
        overlap(maps, masks, [0.5], void)
    with pytest.raises(ValueError, match=r"void covers all of map \[1, 2\]"):
        organ_iou(jnp.asarray(maps), masks, jnp.asarray([0.5]), void=void)


@pytest.mark.parametrize("value", [np.nan, 255, 0.5, -1])
def test_masks_of_other_values_are_refused_unless_void(value):
    """Cells of 255, which is void in VOC, would count as inside."""
    rng = np.random.default_rng(0)
    maps, masks = rng.random((1, 1, 4, 4)), (rng.random((1, 1, 4, 4)) < 0.5).astype(float)
    clean = masks.copy()
    masks[0, 0, 2] = value
    void = np.zeros(masks.shape, bool)
    void[0, 0, 2] = True
    line = "have a cell of .*: give bool, or 0 outside and 1 inside"
    for measure in (pointing_game, energy_inside, rank_accuracy, map_average_precision):
        for array in (np.asarray, jnp.asarray):
            with pytest.raises(ValueError, match=f"masks {line}"):
                measure(array(maps), array(masks))
        np.testing.assert_array_equal(measure(maps, masks, void), measure(maps, clean, void))
    with pytest.raises(ValueError, match=f"allowed {line}"):
        organ_iou(maps, masks, 0.5)
    with pytest.raises(ValueError, match=f"masks {line}"):
        overlap(maps, masks, 0.5)


def test_one_threshold_is_a_list_of_one():
    maps = np.random.default_rng(0).random((2, 3, 5, 5))
    masks = maps > 0.7
    np.testing.assert_array_equal(organ_iou(maps, masks, 0.5), organ_iou(maps, masks, [0.5]))
    found = overlap(maps, masks, 0.5)
    assert found.iou.shape == (2, 3, 1)
    np.testing.assert_array_equal(found.dice, overlap(maps, masks, [0.5]).dice)
    with pytest.raises(ValueError, match=r"thresholds \(2, 3\): give \[T\], or a number"):
        organ_iou(maps, masks, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"thresholds \(2, 4, 1\): give .* maps, \(2, 3\)"):
        overlap(maps, masks, np.zeros((2, 4, 1)))
