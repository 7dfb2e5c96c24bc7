"""The bootstrap by counts against the plain one, which draws the cases themselves."""

import numpy as np
import pytest

from hirescam_jax.metrics import auroc, average_precision, bootstrap, nan_mean
from hirescam_jax.resampling import (
    Resampled,
    draws,
    group_numbers,
    groups_in,
    intervals,
    mean_of,
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
            assert list(found.values()) == pytest.approx([float(x) for x in expected])
        expected = bootstrap(lambda cases: nan_mean(values[cases, 0]), 30, 50, 7, groups=patients)
        (found,) = intervals(resampled_means(values, draws(numbers, 50, 7), numbers))
        assert list(found.values()) == pytest.approx([float(x) for x in expected])


def test_no_interval_of_too_few_groups_or_of_what_does_not_vary():
    drawn = np.array([[0.5, 0.6], [0.5, 0.5], [np.nan, np.nan]])
    measure = Resampled(np.full(3, 0.5), drawn, np.ones(3, bool))
    lows = [interval["low"] for interval in intervals(measure)]
    assert lows == [pytest.approx(0.5025), None, None]
    lows = [interval["low"] for interval in intervals(measure._replace(known=np.zeros(3, bool)))]
    assert lows == [None] * 3


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
    measure = Resampled(np.array([0.9, 0.1, 0.5]), drawn, np.ones(3, bool))
    mean = mean_of(measure, np.array([True, True, False]))
    np.testing.assert_allclose(mean.value, [0.5])
    np.testing.assert_allclose(mean.drawn, [[0.45, 0.65]])
    (nothing,) = intervals(mean_of(measure, np.zeros(3, bool)))
    assert nothing == {"value": None, "low": None, "high": None}
