"""The bootstrap by counts against the plain one, which draws the cases themselves."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import norm

from hirescam_jax.metrics import auroc, average_precision, bootstrap, nan_mean
from hirescam_jax.metrics.intervals import (
    UNKNOWN,
    Resampled,
    draws,
    group_numbers,
    groups_in,
    intervals,
    mean_intervals,
    mean_of,
    precision_of_others,
    ranked,
    resampled_means,
    resampled_ranks,
)


def drawn_cases(times: np.ndarray) -> list[np.ndarray]:
    """The cases of each resample, one after the other."""
    return [np.repeat(np.arange(len(times)), column.astype(int)) for column in times.T]


@pytest.mark.parametrize("patients", [False, True])
def test_ranked_is_the_plain_measure_of_the_drawn_cases(patients):
    rng = np.random.default_rng(0)
    for prevalence in (0.05, 0.5):
        scores = np.round(rng.normal(size=60), 1)  # with ties
        truth = rng.random(60) < prevalence
        groups = rng.integers(0, 20, 60) if patients else None
        times = draws(group_numbers(60, groups), 40, seed=3)
        found = ranked(scores, truth, times)
        cases = drawn_cases(times)
        expected = [auroc(scores[i], truth[i]) for i in cases]
        np.testing.assert_allclose(found.auroc, expected, rtol=1e-12)
        expected = [average_precision(scores[i], truth[i]) for i in cases]
        np.testing.assert_allclose(found.average_precision, expected, rtol=1e-12)


def test_ranked_without_a_positive_or_a_negative():
    times = np.ones((5, 2), np.float32)
    none = ranked(np.arange(5.0), np.zeros(5, bool), times)
    assert np.isnan([*none.auroc, *none.average_precision]).all()
    every = ranked(np.arange(5.0), np.ones(5, bool), times)
    assert np.isnan(every.auroc).all()
    np.testing.assert_array_equal(every.average_precision, 1)


def test_intervals_are_those_of_the_plain_bootstrap():
    rng = np.random.default_rng(1)
    scores, truth = rng.normal(size=(30, 1)), rng.random((30, 1)) < 0.4
    values = np.where(truth, scores, np.nan)
    for patients in (None, rng.integers(0, 12, 30)):
        numbers = group_numbers(30, patients)
        aurocs, precisions = resampled_ranks(scores, truth, draws(numbers, 50, 7), numbers)
        for measure, plain in ((aurocs, auroc), (precisions, average_precision)):
            expected = bootstrap(
                lambda cases, plain=plain: plain(scores[cases, 0], truth[cases, 0]),
                30,
                50,
                7,
                groups=patients,
            )
            (found,) = intervals(measure)
            expected = np.array(expected, float)
            if plain is average_precision:  # moved, to have another mean
                cases = drawn_cases(draws(numbers, 50, 7))
                drawn = [plain(scores[i, 0], truth[i, 0]) for i in cases]
                middle = precision_of_others(scores[:, 0], truth[:, 0], numbers)
                expected[1:] += middle - np.mean(drawn)
            assert astuple(found) == pytest.approx(expected.tolist())
        expected = bootstrap(lambda cases: nan_mean(values[cases, 0]), 30, 50, 7, groups=patients)
        (found,) = intervals(resampled_means(values, draws(numbers, 50, 7), numbers))
        assert astuple(found) == pytest.approx([float(x) for x in expected])


def test_no_interval_of_too_few_groups_or_of_what_does_not_vary():
    drawn = np.array([[0.5, 0.6], [0.5, 0.5], [np.nan, np.nan]])
    measure = Resampled(np.array([0.55, 0.5, 0.5]), drawn, np.full(3, 5))
    lows = [interval.low for interval in intervals(measure)]
    assert lows == [pytest.approx(0.5025), None, None]
    lows = [interval.low for interval in intervals(measure._replace(groups=np.full(3, 4)))]
    assert lows == [None] * 3
    assert measure._replace(groups=np.array([1, 2, 3])).in_mean.tolist() == [False, True, True]
    # The value lies outside.
    (aside, *_) = intervals(measure._replace(value=np.array([0.502, 0.5, 0.5])))
    assert astuple(aside) == (pytest.approx(0.502), None, None)


def test_groups():
    numbers = group_numbers(4, ["b", "a", "b", "c"])
    np.testing.assert_array_equal(numbers, [1, 0, 1, 2])
    mask = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], bool)
    np.testing.assert_array_equal(groups_in(mask, numbers), [2, 1])
    times = draws(numbers, 20, 0)
    np.testing.assert_array_equal(times[0], times[2])
    with pytest.raises(ValueError, match="3 entries for 4 volumes"):
        group_numbers(4, ["a"] * 3)


def test_mean_keeps_its_labels_in_every_resample():
    drawn = np.array([[0.8, 1.0], [np.nan, 0.3], [0.0, 0.0]])
    measure = Resampled(np.array([0.9, 0.1, 0.5]), drawn, np.array([9, 3, 7]))
    mean = mean_of(measure, np.array([True, True, False]))
    np.testing.assert_allclose(mean.value, [0.5])
    np.testing.assert_allclose(mean.drawn, [[0.45, 0.65]])
    # An interval where more than half of the labels have one.
    assert mean.groups.tolist() == [3]
    assert mean_of(measure, np.ones(3, bool)).groups.tolist() == [7]
    (nothing,) = intervals(mean_of(measure, np.zeros(3, bool)))
    assert nothing == UNKNOWN


def true_average_precision(prevalence: float, apart: float) -> float:
    """Of scores normal(0, 1), and normal(apart, 1) of positives: the mean precision at a positive's
    score."""
    at = np.linspace(-8, 8 + apart, 20001)
    found, wrong = prevalence * norm.sf(at, apart), (1 - prevalence) * norm.sf(at)
    return float(np.trapezoid(found / (found + wrong) * norm.pdf(at, apart), at))


@pytest.mark.parametrize(
    ("volumes", "prevalence", "apart"), [(192, 0.15, 1.0), (192, 0.05, 0.5), (500, 0.05, 1.0)]
)
def test_intervals_of_average_precision_cover_the_true_one(volumes, prevalence, apart):
    """Also of its mean, on which plain percentiles fail: the bias does not shrink as the noise."""
    rng = np.random.default_rng(0)
    true, numbers = true_average_precision(prevalence, apart), np.arange(volumes)
    covered = {"labels": [], "means": [], "plain means": []}
    for seed in range(60):
        truth = rng.random((volumes, 12)) < prevalence
        scores = rng.normal(size=truth.shape) + apart * truth
        times = draws(numbers, 200, seed)
        _, precision = resampled_ranks(scores, truth, times, numbers)
        mean = mean_of(precision, precision.in_mean)
        columns = zip(scores.T[:, None], truth.T, strict=True)
        plain = np.mean([ranked(s[0], y, times).average_precision for s, y in columns], axis=0)
        covered["plain means"].append(covers(*np.nanpercentile(plain, [2.5, 97.5]), true))
        for name, measure in (("labels", precision), ("means", mean)):
            found = (interval for interval in intervals(measure) if interval.low is not None)
            covered[name] += [covers(one.low, one.high, true) for one in found]
    share = {name: np.mean(of_name) for name, of_name in covered.items()}
    assert share["plain means"] < 0.75
    assert share["labels"] > 0.88
    assert share["means"] > 0.85


def covers(low: float, high: float, true: float) -> bool:
    return bool(low <= true <= high)


def test_mean_average_precision_of_many_rare_labels_has_no_interval():
    """Its bias is larger than its noise: the interval would not hold the value."""
    rng = np.random.default_rng(1)
    truth = rng.random((500, 60)) < 0.04
    scores = rng.normal(size=truth.shape) + truth
    numbers = np.arange(500)
    auroc, precision = resampled_ranks(scores, truth, draws(numbers, 100, 0), numbers)
    (found,) = intervals(mean_of(precision, precision.in_mean))
    assert found.value > true_average_precision(0.04, 1) + 0.01
    assert found.low is found.high is None
    (found,) = intervals(mean_of(auroc, auroc.in_mean))
    assert found.low < found.value < found.high < found.low + 0.04


def test_precision_of_others_by_hand():
    scores = np.array([4.0, 3.0, 3.0, 2.0, 1.0])
    truth = np.array([True, False, True, True, False])
    # Of three positives the two others count 3 / 2; above the first there is nothing.
    expected = np.mean([1, 1.5 / 2.5, 3 / 4])
    assert precision_of_others(scores, truth, np.arange(5)) == pytest.approx(expected)
    # The first and the last positive are of one patient: one other is left, and counts 3.
    patients = np.array([0, 1, 2, 0, 3])
    expected = np.mean([1, 1.5 / 2.5, 3 / 4])
    assert precision_of_others(scores, truth, patients) == pytest.approx(expected)
    # Every volume twice is no news.
    twice = (np.tile(part, 2) for part in (scores, truth, np.arange(5)))
    assert precision_of_others(*twice) == pytest.approx(expected)
    assert np.isnan(precision_of_others(scores, np.zeros(5, bool), patients))


def test_missing_labels_are_left_out():
    rng = np.random.default_rng(0)
    truth, missing = rng.random((2, 80, 3)) < 0.3
    scores = rng.normal(size=truth.shape)
    times = draws(np.arange(80), 30, 0)
    found = resampled_ranks(scores, truth, times, np.arange(80), missing)
    given = np.where(missing, np.nan, truth).T
    for measure, plain in zip(found, (auroc, average_precision), strict=True):
        np.testing.assert_allclose(measure.value, plain(scores.T, given))
    assert found[1].groups.tolist() == (truth & ~missing).sum(0).tolist()


def test_mean_intervals_are_of_five_groups_with_a_value_and_more():
    values = np.full((30, 3), np.nan)
    rng = np.random.default_rng(0)
    values[:8, 0], values[:4, 1] = rng.normal(size=8), rng.normal(size=4)
    columns = dict(zip("abc", values.T, strict=True))
    found = mean_intervals(columns, np.arange(30))
    assert found["a"].low < found["a"].value < found["a"].high
    assert astuple(found["b"]) == (pytest.approx(values[:4, 1].mean()), None, None)
    assert found["c"] == UNKNOWN
    # Eight values of four patients.
    assert mean_intervals(columns, np.arange(30) // 2)["a"].low is None
    assert mean_intervals({"a": values[:0, 0]}, [])["a"].value is None
