"""The measures: explicit loops, scikit-learn, and the statistics of the bootstrap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    auroc,
    average_precision,
    bootstrap,
    brier_score,
    calibration_error_of_bins,
    calibration_error_within_chance,
    calibration_interval,
    delong,
    delong_test,
    energy_inside,
    expected_calibration_error,
    intervals,
    nan_mean,
    organ_iou,
    pointing_game,
    reliability,
)
from tests.rounding import assert_same_but_for_rounding

GRIDS = [(9,), (5, 4), (4, 3, 2)]


# -- OrganIoU -------------------------------------------------------------------------------------


def test_the_53_thresholds():
    fine = [0.004, 0.008, 0.012, 0.016]
    coarse = [hundredths / 100 for hundredths in range(2, 99, 2)]
    assert len(fine + coarse) == 53
    np.testing.assert_allclose(ORGAN_IOU_THRESHOLDS, fine + coarse, rtol=1e-12)


def organ_iou_by_loop(maps, allowed, thresholds):
    result = np.zeros((*maps.shape[:2], len(thresholds)))
    for b, k, t in np.ndindex(result.shape):
        inside = outside = 0
        for cell in np.ndindex(maps.shape[2:]):
            if maps[(b, k, *cell)] > thresholds[t]:
                inside += bool(allowed[(b, k, *cell)])
                outside += not allowed[(b, k, *cell)]
        result[b, k, t] = inside / (inside + outside) if inside + outside else 0
        if allowed[b, k].all() or not allowed[b, k].any():
            result[b, k, t] = np.nan
    return result


@pytest.mark.parametrize("grid", GRIDS)
def test_organ_iou_by_loop(grid):
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.normal(size=(2, 3, *grid)), jnp.float32)
    raw = raw.at[0, 0].set(-1)  # nothing above any threshold
    maps = normalize_map(raw)
    allowed = rng.random(maps.shape) < 0.4
    allowed[0, 0, 0], allowed[1, 1], allowed[1, 2] = True, False, True
    thresholds = ORGAN_IOU_THRESHOLDS.astype(np.float32)
    result = np.asarray(jax.jit(organ_iou)(maps, jnp.asarray(allowed), jnp.asarray(thresholds)))
    assert result.shape == (2, 3, 53)
    expected = organ_iou_by_loop(np.asarray(maps), allowed, thresholds)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert not result[0, 0].any()


def test_organ_iou_of_perfect_empty_and_wrong_maps():
    allowed = jnp.asarray([[[[1, 1], [0, 0]]]])
    thresholds = jnp.asarray([0.0, 0.5, 0.999])
    inside = allowed.astype(jnp.float32)
    np.testing.assert_array_equal(organ_iou(inside, allowed, thresholds), [[[1, 1, 1]]])
    np.testing.assert_array_equal(organ_iou(inside * 0, allowed, thresholds), [[[0, 0, 0]]])
    np.testing.assert_array_equal(organ_iou(1 - inside, allowed, thresholds), [[[0, 0, 0]]])
    half = jnp.asarray([[[[1.0, 0.2], [0.6, 0.0]]]])
    np.testing.assert_allclose(organ_iou(half, allowed, thresholds), [[[2 / 3, 1 / 2, 1]]])


def test_threshold_itself_is_not_above_it():
    maps, allowed = jnp.asarray([[[0.5, 1.0]]]), jnp.asarray([[[True, False]]])
    np.testing.assert_array_equal(organ_iou(maps, allowed, jnp.asarray([0.49, 0.5])), [[[0.5, 0]]])


def test_organ_iou_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="must agree"):
        organ_iou(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4)), jnp.asarray([0.5]))


@pytest.mark.parametrize("grid", [(4, 5), (3, 4, 5)])
def test_energy_by_loop(grid):
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(2, 3, *grid)), rng.random((2, 3, *grid)) < 0.3
    found = energy_inside(maps, masks)
    for b, k in np.ndindex(2, 3):
        inside = sum(max(v, 0) for v in maps[b, k][masks[b, k]])
        outside = sum(max(v, 0) for v in maps[b, k][~masks[b, k]])
        np.testing.assert_allclose(found[b, k], inside / (inside + outside))


def test_uniform_and_perfect_maps_in_closed_form():
    masks = np.zeros((1, 2, 4, 5), bool)
    masks[0, 0, 1:3, 1:4] = True  # 6 of 20 cells
    masks[0, 1, 0, 0] = True
    for measure in (pointing_game, energy_inside):
        np.testing.assert_allclose(measure(np.ones(masks.shape), masks), [[6 / 20, 1 / 20]])
        np.testing.assert_array_equal(measure(masks.astype(np.float32), masks), [[1, 1]])
        np.testing.assert_array_equal(measure(1 - masks.astype(np.float32), masks), [[0, 0]])
        # Without positive evidence a map points nowhere.
        np.testing.assert_array_equal(measure(masks - 1.0, masks), [[0, 0]])
        with pytest.raises(ValueError, match="must agree"):
            measure(np.ones((1, 1, 4, 5)), masks)


def test_pointing_game_of_random_points_is_the_share_of_the_mask():
    rng = np.random.default_rng(0)
    masks = np.zeros((4000, 1, 6, 10), bool)
    masks[..., :3, :4] = True  # 12 of 60 cells
    hits = pointing_game(rng.random(masks.shape), masks)
    assert set(np.unique(hits)) == {0.0, 1.0}
    assert abs(hits.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 4000)


# -- AUROC and average precision ------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 40, 5, 2, 1], ids=lambda n: f"{n or 'no'}_ties")
def test_auroc_and_average_precision_are_scikit_learns(levels):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth = rng.random((6, 3, 50)) < 0.3
    scores = rng.normal(size=truth.shape) + truth
    if levels:
        scores = np.floor(levels * (scores - scores.min()) / (np.ptp(scores) + 1e-9))
    roc, ap = auroc(scores, truth), average_precision(scores, truth)
    assert roc.shape == ap.shape == (6, 3)
    for row in np.ndindex(6, 3):
        np.testing.assert_allclose(roc[row], sklearn.roc_auc_score(truth[row], scores[row]), 1e-12)
        np.testing.assert_allclose(
            ap[row], sklearn.average_precision_score(truth[row], scores[row]), 1e-12
        )


def test_auroc_by_pairs():
    rng = np.random.default_rng(1)
    truth, scores = rng.random(30) < 0.4, rng.integers(0, 6, 30).astype(float)
    pairs = [(p > n) + (p == n) / 2 for p in scores[truth] for n in scores[~truth]]
    np.testing.assert_allclose(auroc(scores, truth), np.mean(pairs), rtol=1e-12)


def test_missing_classes_give_nan():
    scores = np.asarray([[0.1, 0.5, 0.9]] * 3)
    truth = np.asarray([[0, 0, 0], [1, 1, 1], [0, 0, 1]], bool)
    np.testing.assert_array_equal(auroc(scores, truth), [np.nan, np.nan, 1])
    np.testing.assert_array_equal(average_precision(scores, truth), [np.nan, 1, 1])


def test_nan_mean():
    values = np.asarray([[1, np.nan, 3], [np.nan, np.nan, np.nan], [2, 4, 9]])
    np.testing.assert_array_equal(nan_mean(values), [2, np.nan, 5])
    np.testing.assert_array_equal(nan_mean(values, axis=0), [1.5, 4, 6])


# -- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(loc=3, scale=2, size=400)
    value, low, high = bootstrap(
        lambda cases: values[cases].mean(-1, keepdims=True), 400, resamples=20_000
    )
    np.testing.assert_allclose(value, values.mean(), rtol=1e-12)
    error = values.std() / 20  # the bootstrap's own standard error: no degree of freedom lost
    # Monte-Carlo error of the 2.5 % quantile of 20,000 draws: 0.019 standard errors.
    np.testing.assert_allclose((low - value) / error, -1.96, atol=0.08)
    np.testing.assert_allclose((high - value) / error, 1.96, atol=0.08)


def test_bootstrap_intervals_cover_the_true_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        values = rng.normal(size=60)
        _, low, high = bootstrap(
            lambda c, v=values: v[c].mean(-1, keepdims=True), 60, resamples=400, seed=seed
        )
        covered += low[0] <= 0 <= high[0]
    assert 0.90 <= covered / 300 <= 0.985  # 95 % less what a percentile interval of 60 cases loses


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).normal(size=50)

    def run(seed):
        return bootstrap(
            lambda cases: values[cases].mean(-1, keepdims=True), 50, resamples=200, seed=seed
        )

    assert run(1) == run(1)
    assert run(1)[1:] != run(2)[1:]
    assert run(1)[0] == run(2)[0]


def test_bootstrap_leaves_undefined_resamples_out():
    truth = np.zeros((3, 12), bool)
    truth[0, :2] = True  # absent from (5/6)^12 = 11 % of the resamples; row 1 from all
    truth[2, [2, 8, 9]] = True
    scores = np.linspace(1, 0, 12)

    def statistic(cases):
        return np.stack([auroc(scores[cases], row[cases]) for row in truth], axis=-1)

    value, low, high = bootstrap(statistic, 12, resamples=500)
    # Perfect in all of them, which tells nothing of the spread.
    np.testing.assert_array_equal([value[0], low[0], high[0]], [1, np.nan, np.nan])
    assert np.isnan([value[1], low[1], high[1]]).all()
    assert 0 <= low[2] < value[2] < high[2] <= 1


def test_bootstrap_of_one_patient_has_no_interval():
    values = np.arange(5.0)
    for groups, count in ((["a"] * 5, 5), (None, 1)):
        value, *ends = bootstrap(
            lambda c: values[c].mean(-1, keepdims=True), count, groups=groups, resamples=10
        )
        assert value == [values[:count].mean()]
        assert np.isnan(ends).all()


def test_basic_bootstrap_of_a_biased_statistic():
    """The variance without the lost degree of freedom, n / (n - 1) of which is the target."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)

    def both(cases):
        return np.stack([values[cases].mean(-1), values[cases].var(-1, ddof=1)], -1)

    target = np.array([np.nan, values.var()])
    value, low, high = bootstrap(both, 40, resamples=4000, target=target)
    _, low_0, high_0 = bootstrap(both, 40, resamples=4000)
    assert (low[0], high[0]) == (low_0[0], high_0[0])
    np.testing.assert_allclose(low[1], value[1] + values.var() - high_0[1])
    np.testing.assert_allclose(high[1], value[1] + values.var() - low_0[1])


def test_bootstrap_of_a_scalar():
    values = np.arange(5.0)
    value, low, high = bootstrap(lambda cases: values[cases].mean(-1), 5, resamples=50)
    assert (np.shape(value), np.shape(low), np.shape(high)) == ((), (), ())
    assert low < value == 2 < high
    undefined = bootstrap(lambda cases: np.full(len(cases), np.nan), 5, resamples=20)
    assert np.isnan(undefined).all()


def test_bootstrap_of_groups_draws_whole_groups():
    """Each case twice, in a group of its own: the same draws as of single cases."""
    values = np.random.default_rng(0).normal(size=50)
    alone = bootstrap(lambda c: values[c].mean(-1, keepdims=True), 50, resamples=300)
    twice = np.repeat(values, 2)
    order = np.random.default_rng(1).permutation(100)
    groups = np.array([f"patient {i // 2:02d}" for i in order])
    together = bootstrap(
        lambda c: twice[order][c].mean(-1, keepdims=True), 100, resamples=300, groups=groups
    )
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    apart = bootstrap(lambda c: twice[c].mean(-1, keepdims=True), 100, resamples=300)
    # Taken as 100 independent cases, the interval is too narrow by the root of two.
    width = [float(high[0] - low[0]) for _, low, high in (together, apart)]
    assert 1.2 < width[0] / width[1] < 1.65
    with pytest.raises(ValueError, match="99 entries for 100 cases"):
        bootstrap(lambda c: twice[c].mean(-1), 100, groups=groups[:99])


def test_bootstrap_in_parts_is_the_same(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap(lambda c: values[c].mean(-1), 30, resamples=100)
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 30 * 7)
    parts = bootstrap(lambda c: values[c].mean(-1), 30, resamples=100)
    # Means of 30 values; an end lies between two of them: a difference, a product and a sum.
    scale = np.abs(values).max()
    assert_same_but_for_rounding(parts, whole, terms=30 + 1 + 3, scale=scale)


# -- DeLong ---------------------------------------------------------------------------------------


def delong_by_pairs(scores, truth):
    """The definition (DeLong et al. 1988): all pairs of a positive and a negative."""
    psi = []
    for row in scores:
        x, y = row[truth][:, None], row[~truth][None, :]
        psi.append((x > y) + 0.5 * (x == y))
    psi = np.array(psi)
    value, v10, v01 = psi.mean((1, 2)), psi.mean(2), psi.mean(1)
    m, n = psi.shape[1:]
    s10 = (v10 - value[:, None]) @ (v10 - value[:, None]).T / (m - 1)
    s01 = (v01 - value[:, None]) @ (v01 - value[:, None]).T / (n - 1)
    return value, s10 / m + s01 / n


@pytest.mark.parametrize("levels", [None, 3], ids=["", "ties"])
def test_delong_by_its_definition(levels):
    rng = np.random.default_rng(0)
    truth = rng.random(70) < 0.35
    scores = rng.normal(size=(3, 70)) + 0.8 * truth + 0.7 * rng.normal(size=70)
    if levels:
        scores = np.round(scores * levels) / levels
    found = delong(scores, truth)
    value, covariance = delong_by_pairs(scores, truth)
    np.testing.assert_allclose(found.value, value, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)
    np.testing.assert_allclose(found.value, auroc(scores, np.tile(truth, (3, 1))), rtol=1e-12)
    low, high = found.interval()
    np.testing.assert_allclose(high - low, 2 * 1.959964 * np.sqrt(np.diag(covariance)), rtol=1e-6)
    test = delong_test(scores[0], scores[1], truth)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    np.testing.assert_allclose(test.z, (value[0] - value[1]) / np.sqrt(variance), rtol=1e-9)
    np.testing.assert_allclose(test.p, 2 * stats.norm.sf(abs(test.z)), rtol=1e-9)


def test_delong_by_hand():
    """Positives 3 and 1, negatives 2 and 0: 3 of 4 pairs; V10 = 1, 1/2, V01 = 1/2, 1."""
    found = delong(np.array([[3.0, 1, 2, 0]]), np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(found.value, [0.75])
    np.testing.assert_allclose(found.covariance, [[0.125 / 2 + 0.125 / 2]])
    low, high = found.interval()
    assert (low, high) == (pytest.approx(0.75 - 1.959964 * 0.125**0.5), 1)


def test_delong_variance_is_that_of_repeated_experiments():
    rng = np.random.default_rng(0)
    truth = np.arange(90) < 30
    found = [delong((rng.normal(size=90) + truth)[None], truth) for _ in range(2000)]
    values = np.array([one.value[0] for one in found])
    expected = np.mean([one.covariance[0, 0] for one in found])
    # The standard error of a variance of 2,000 draws is 3.2 %.
    np.testing.assert_allclose(values.var(), expected, rtol=0.13)
    true = stats.norm.cdf(1 / np.sqrt(2))
    covered = [one.interval()[0][0] <= true <= one.interval()[1][0] for one in found]
    assert 0.92 <= np.mean(covered) <= 0.97


def test_delong_test_keeps_its_level_and_finds_a_difference():
    rng = np.random.default_rng(0)
    truth = np.arange(80) < 40
    p = []
    for _ in range(500):
        common = rng.normal(size=80) + truth
        p.append(delong_test(*(common + 0.6 * rng.normal(size=(2, 80))), truth).p)
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 500)
    better = delong_test(truth + rng.normal(size=80) / 3, rng.normal(size=80), truth)
    assert better.difference > 0.3
    assert better.p < 1e-4


def test_delong_without_variance_is_newcombes_interval():
    """All positives above all negatives. The ends solve his equation; the bounds of two and two
    cases are far from those of two hundred."""

    def excess(at, value, m, n):
        others = (m + n) / 2 - 1
        factor = 1 + others * (1 - at) / (2 - at) + others * at / (1 + at)
        return (value - at) ** 2 - 1.959964**2 * at * (1 - at) * factor / (m * n)

    for m, n in ((2, 2), (3, 9), (100, 100)):
        truth = np.arange(m + n) >= n
        for scores, value in ((np.arange(m + n), 1), (np.ones(m + n), 0.5), (-np.arange(m + n), 0)):
            one = delong(scores[None].astype(float), truth)
            (low,), (high,) = one.interval()
            assert one.value == [value]
            assert one.covariance == pytest.approx(0, abs=1e-15)
            assert low <= value <= high
            for end in {low, high} - {0.0, 1.0}:
                assert excess(end, value, m, n) == pytest.approx(0, abs=1e-6)
        assert high - low == pytest.approx({2: 0.614, 3: 0.379, 100: 0.0196}[m], abs=1e-3)


def test_delong_test_of_opposite_orders_says_nothing():
    order, truth = np.arange(4.0), np.array([0, 0, 1, 1])
    found = delong_test(order, -order, truth)
    assert found.difference == 1
    assert np.isnan([found.z, found.p]).all()


def patients_cases(seed, patients=60, volumes=3):
    """Volumes of patients, of whom some have the label in part of their volumes only."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), volumes)
    truth = np.repeat(rng.random(patients) < 0.4, volumes) ^ (rng.random(len(groups)) < 0.1)
    own = np.repeat(rng.normal(size=(2, patients)), volumes, axis=1)
    return own + 0.3 * rng.normal(size=own.shape) + 1.2 * truth, truth, groups


def test_delong_of_groups_is_obuchowskis():
    """By its definition, group by group; of single cases it is DeLong's."""
    scores, truth, groups = patients_cases(0)
    found = delong(scores, truth, groups)
    psi = [(r[truth][:, None] > r[~truth]) + 0.5 * (r[truth][:, None] == r[~truth]) for r in scores]
    value = np.mean(psi, axis=(1, 2))
    m, n = truth.sum(), (~truth).sum()
    terms = []
    for group in np.unique(groups):
        x, y = groups[truth] == group, groups[~truth] == group
        terms.append(
            [
                [p[x].mean(1).sum() - x.sum() * v, p[:, y].mean(0).sum() - y.sum() * v]
                for p, v in zip(psi, value, strict=True)
            ]
        )
    terms = np.array(terms)  # [groups, scores, positives and negatives]
    with_positives = len(np.unique(groups[truth]))
    with_negatives = len(np.unique(groups[~truth]))
    for r, s in np.ndindex(2, 2):
        (x_r, y_r), (x_s, y_s) = terms[:, r].T, terms[:, s].T
        s10 = with_positives / ((with_positives - 1) * m) * (x_r * x_s).sum()
        s01 = with_negatives / ((with_negatives - 1) * n) * (y_r * y_s).sum()
        s11 = len(terms) / (len(terms) - 1) * ((x_r * y_s).sum() + (y_r * x_s).sum())
        expected = s10 / m + s01 / n + s11 / (m * n)
        np.testing.assert_allclose(found.covariance[r, s], expected, rtol=1e-10)
    alone = delong(scores, truth, np.random.default_rng(0).permutation(len(truth)))
    np.testing.assert_allclose(alone.covariance, delong(scores, truth).covariance, rtol=1e-10)
    with pytest.raises(ValueError, match="179 entries for 180 cases"):
        delong(scores, truth, groups[:-1])


def test_delong_of_groups_is_the_variance_of_repeated_experiments():
    found = [delong(s[:1], t, g) for s, t, g in map(patients_cases, range(1500))]
    values = np.array([one.value[0] for one in found])
    variances = np.array([one.covariance[0, 0] for one in found])
    # The standard error of a variance of 1,500 draws is 3.7 %.
    np.testing.assert_allclose(values.var(), variances.mean(), rtol=0.15)
    ends = np.array([one.interval() for one in found])[..., 0]
    covered = (ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])
    assert 0.91 <= covered.mean() <= 0.97


def test_delong_where_it_is_not_defined():
    scores = np.array([[0.1, 0.5, 0.9]])
    assert np.isnan(delong(scores, np.zeros(3, bool)).value).all()
    one = delong(scores, np.array([0, 0, 1], bool))
    assert one.value == [1]
    assert np.isnan(one.covariance).all()
    assert np.isnan(one.interval()).all()
    of_one_patient = delong(np.arange(4.0)[None], np.array([0, 0, 1, 1]), ["a", "b", "c", "c"])
    assert np.isnan(of_one_patient.covariance).all()
    assert delong_test(scores[0], scores[0] * 2, np.array([0, 1, 1], bool)).difference == 0
    truth = np.arange(20) % 3 == 0
    order = np.random.default_rng(0).normal(size=20)
    assert delong_test(order, 5 * order, truth) == (0, 0, 1)
    with pytest.raises(ValueError, match="must agree"):
        delong(scores, np.zeros(4, bool))
    of_lists = delong([[0.1, 0.4, 0.3, 0.8]], [0, 1, 0, 1])
    assert of_lists.value.tolist() == [1]


# -- missing labels -------------------------------------------------------------------------------


def test_missing_labels_are_left_out():
    rng = np.random.default_rng(0)
    truth = (rng.random((3, 40)) < 0.4).astype(float)
    truth[1, rng.random(40) < 0.3] = np.nan
    truth[2] = np.nan
    scores = np.round(rng.random((3, 40)) * 12) / 12
    scores[1, np.flatnonzero(np.isnan(truth[1]))[0]] = np.nan  # it does not count
    known = ~np.isnan(truth[1])
    groups = np.arange(40) // 2
    for measure in (auroc, average_precision, brier_score):
        found = measure(scores, truth)
        for row, kept in ((0, slice(None)), (1, known)):
            expected = measure(scores[row, kept], truth[row, kept] > 0)
            np.testing.assert_allclose(found[row], expected, rtol=1e-12)
        assert np.isnan(found[2])
    table = reliability(scores[1], truth[1])
    for part, expected in zip(table, reliability(scores[1, known], truth[1, known]), strict=True):
        np.testing.assert_array_equal(part, expected)
    error = expected_calibration_error(scores[1], truth[1])
    assert error == expected_calibration_error(scores[1, known], truth[1, known])
    found = delong(scores[1:2], truth[1], groups)
    expected = delong(scores[1:2, known], truth[1, known] > 0, groups[known])
    np.testing.assert_array_equal(found.covariance, expected.covariance)
    assert np.isnan(expected_calibration_error(scores[0], truth[2]))


def test_other_labels_are_refused():
    scores, truth = np.linspace(0, 1, 5), np.array([0, 1, -1, 0, 1])
    measures = (auroc, average_precision, brier_score, reliability, expected_calibration_error)
    for measure in (*measures, lambda s, t: delong(s[None], t)):
        with pytest.raises(ValueError, match=r"label -1: labels are 0 or 1, or NaN where they are"):
            measure(scores, truth)
    with pytest.raises(ValueError, match="must agree"):
        auroc(scores, truth[:2] > 0)


def test_scores_that_are_nan_have_no_measure():
    scores = np.array([[0.1, np.nan, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    truth = np.array([0, 1, 0, 1])
    np.testing.assert_array_equal(np.isnan(auroc(scores, truth)), [True, False])
    np.testing.assert_array_equal(np.isnan(average_precision(scores, truth)), [True, False])
    np.testing.assert_array_equal(np.isnan(delong(scores, truth).value), [True, False])


# -- calibration ----------------------------------------------------------------------------------


def test_calibration_is_scikit_learns():
    calibration = pytest.importorskip("sklearn.calibration")
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    probabilities = rng.beta(2, 3, size=300)
    probabilities[:2] = 0, 1
    truth = rng.random(300) < probabilities**2
    table = reliability(probabilities, truth, bins=8)
    frequency, mean = calibration.calibration_curve(truth, probabilities, n_bins=8)
    full = table.counts > 0
    np.testing.assert_allclose(table.frequency[full], frequency, rtol=1e-12)
    np.testing.assert_allclose(table.probability[full], mean, rtol=1e-12)
    assert table.counts.sum() == 300
    error = expected_calibration_error(probabilities, truth, bins=8)
    expected = np.sum(table.counts[full] * np.abs(frequency - mean)) / 300
    np.testing.assert_allclose(error, expected, rtol=1e-12)
    score = sklearn.brier_score_loss(truth, probabilities)
    np.testing.assert_allclose(brier_score(probabilities, truth), score, rtol=1e-12)


def test_calibration_in_closed_form():
    probabilities = np.repeat([0.25, 0.75], 8)
    truth = np.r_[np.arange(8) < 2, np.arange(8) < 6]
    assert expected_calibration_error(probabilities, truth) == 0
    assert expected_calibration_error(probabilities, ~truth) == 0.5
    assert expected_calibration_error(np.ones(4), np.zeros(4, bool)) == 1
    table = reliability(probabilities, truth, bins=4)
    np.testing.assert_array_equal(table.counts, [0, 8, 0, 8])
    np.testing.assert_array_equal(table.frequency, [np.nan, 0.25, np.nan, 0.75])
    with pytest.raises(ValueError, match="sigmoid"):
        reliability(np.array([0.5, 1.5]), np.array([True, False]))
    with pytest.raises(ValueError, match="must agree"):
        reliability(np.array([0.5]), np.array([True, False]))


def test_brier_score_refuses_what_is_no_probability():
    two = np.array([[0.5, 1], [1, 1]])
    np.testing.assert_allclose(brier_score(two, np.array([0, 1])), [1 / 8, 1 / 2])
    for wrong in ([3.0, -1.0], [0.5, np.nan]):
        with pytest.raises(ValueError, match="sigmoid"):
            brier_score(np.array(wrong), np.array([0, 1]))
    assert brier_score(np.array([0.5, np.nan]), np.array([0, np.nan])) == 0.25
    with pytest.raises(ValueError, match=r"probabilities \(3,\), truth \(2, 1\) must agree"):
        brier_score(np.array([0.3, 0.1, 0.2]), np.array([[0], [1]]))


def test_debiased_calibration_error_is_less_biased_and_lies_in_its_interval():
    """Models whose true error is 0, and 0.03 in every bin. The percentiles of the plug-in error
    hold neither in any of these data sets."""
    for shift in (0.0, 0.03):
        plug_in, debiased, inside, covered = [], [], 0, 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            probabilities = rng.uniform(0.12, 0.88, 200)
            truth = rng.random(200) < probabilities + shift
            plug_in.append(expected_calibration_error(probabilities, truth))
            debiased.append(expected_calibration_error(probabilities, truth, debiased=True))
            value, low, high = calibration_interval(probabilities, truth, resamples=100, seed=seed)
            assert value == pytest.approx(debiased[-1])
            inside += low <= value <= high
            covered += low <= shift <= high
        assert abs(np.mean(debiased) - shift) < 0.65 * abs(np.mean(plug_in) - shift)
        assert inside == 40
        assert covered >= 36


def test_chance_level_is_what_calibrated_samples_stay_below():
    """The upper 97.5 % of plug-in errors of calibrated probabilities; also of the mean of labels,
    which is far above 0 with little noise. A model that is wrong by 0.1 is above."""
    within = {1: [], 8: []}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sums = [bin_sums(rng, 120, 0.0) for _ in range(8)]
        for labels, found in within.items():
            some = (np.stack(part) for part in zip(*sums[:labels], strict=True))
            found.append(calibration_error_within_chance(*some))
    for found in within.values():
        assert 0.94 <= np.mean(found) <= 0.995
    wrong = [bin_sums(np.random.default_rng(seed), 1000, 0.1) for seed in range(20)]
    assert not any(calibration_error_within_chance(*(p[None] for p in sums)) for sums in wrong)


def bin_sums(rng: np.random.Generator, cases: int, shift: float) -> list[np.ndarray]:
    """Count, sums of probabilities and of labels of ten bins."""
    probabilities = rng.beta(2, 4, cases)
    truth = rng.random(cases) < probabilities + shift
    number = np.minimum((probabilities * 10).astype(int), 9)
    weights = np.ones(cases), probabilities, truth
    return [np.bincount(number, weight, 10).astype(float) for weight in weights]


def test_debiased_calibration_error_by_drawn_noise():
    count = np.array([30.0, 10, 0, 60])
    probability, positives = np.array([3.0, 4, 0, 54]), np.array([5.0, 4, 0, 50])
    found = calibration_error_of_bins(count, probability, positives)
    share = positives / np.maximum(count, 1)
    gap = np.abs(probability / np.maximum(count, 1) - share)
    noise = np.random.default_rng(0).normal(size=(400_000, 4))
    noise *= np.sqrt(share * (1 - share) / np.maximum(count, 1))
    drawn = ((np.abs(gap + noise)) * count).sum(1).mean() / 100
    np.testing.assert_allclose(found.plug_in, (gap * count).sum() / 100, rtol=1e-12)
    np.testing.assert_allclose(found.debiased, 2 * found.plug_in - drawn, atol=2e-4)
