"""Evaluation: what is chosen on validation, what is left out, and the same numbers by hand."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.config import Config
from hirescam_jax.data import pipeline
from hirescam_jax.data.pipeline import chosen_volumes
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation import checks as evaluate_checks
from hirescam_jax.evaluation.checks import save_sanity_picture
from hirescam_jax.evaluation.evaluate import evaluate_run
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.result import Evaluation, RunEvaluation, plain
from hirescam_jax.evaluation.resume import Kept
from hirescam_jax.evaluation.summary import Predictions, choose_thresholds, summarise
from hirescam_jax.evaluation.text import LESION_MEASURES, faithfulness_table, label_table, table
from hirescam_jax.evaluation.values import Values
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    brier_score,
    calibration_interval,
    delong,
    expected_calibration_error,
    organ_iou,
    random_maps,
)
from hirescam_jax.metrics.intervals import UNKNOWN
from hirescam_jax.models import AxialNet, CTNet
from hirescam_jax.reports.text import MAP_NAMES
from hirescam_jax.runs.run import Header, Run

T = len(ORGAN_IOU_THRESHOLDS)


def predictions(seed: int, count: int = 40, **columns) -> Predictions:
    """Random scores and OrganIoU of labels "a", "b", "c"; NaN where a label is absent."""
    rng = np.random.default_rng(seed)
    labels = rng.random((count, 3)) < 0.4
    for k, column in columns.items():
        labels[:, "abc".index(k)] = column
    logits = rng.normal(size=(count, 3)) + labels
    iou = {
        name: np.where(labels[..., None], rng.random((count, 3, T)), np.nan)
        for name in ("hirescam", "gradcam")
    }
    return Predictions(logits, labels, iou)


def text_of(scores: Evaluation) -> str:
    return table(RunEvaluation(scores=scores))


# -- thresholds -----------------------------------------------------------------------------------


def test_thresholds_are_the_best_of_the_validation_mean():
    validation = predictions(0)
    chosen = choose_thresholds(validation)
    for name, iou in validation.organ_iou.items():
        for k in range(3):
            means = [iou[validation.labels[:, k], k, t].mean() for t in range(T)]
            assert chosen[name][k] == int(np.argmax(means))
    assert (chosen["hirescam"] != chosen["gradcam"]).any()


def test_a_label_that_validation_never_saw_has_no_threshold_and_no_organ_iou():
    validation, test = predictions(0, b=False), predictions(1)
    chosen = choose_thresholds(validation)
    assert chosen["hirescam"][1] == chosen["gradcam"][1] == -1
    result = summarise(("a", "b", "c"), validation, test, resamples=20)
    for measure in result.organ_iou.values():
        assert measure.thresholds["b"] is None
        assert measure.labels["b"] == UNKNOWN
        assert measure.defined == 2
        others = [measure.labels[label].value for label in "ac"]
        assert measure.mean.value == pytest.approx(np.mean(others))
        assert measure.undefined_pairs == test.labels[:, 1].sum()
    assert result.auroc.defined == 3
    assert f"{test.labels[:, 1].sum()} more have an organ" in text_of(result)


def test_test_split_does_not_move_the_thresholds():
    validation, test = predictions(0), predictions(1)
    for name in test.organ_iou:  # the test split would choose the last one
        test.organ_iou[name][..., -1] = np.where(test.labels, 1.0, np.nan)
    result = summarise(("a", "b", "c"), validation, test, resamples=20)
    chosen = choose_thresholds(validation)
    for name, measure in result.organ_iou.items():
        for k, label in enumerate("abc"):
            t = chosen[name][k]
            assert measure.thresholds[label] == pytest.approx(ORGAN_IOU_THRESHOLDS[t])
            iou = test.organ_iou[name][test.labels[:, k], k, t]
            assert measure.labels[label].value == pytest.approx(iou.mean())


# -- measures -------------------------------------------------------------------------------------


def test_measures_are_scikit_learns_and_means_are_over_labels():
    sklearn = pytest.importorskip("sklearn.metrics")
    test = predictions(1)
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=50)
    assert result.volumes == 40
    for name, score in (
        ("auroc", sklearn.roc_auc_score),
        ("average_precision", sklearn.average_precision_score),
    ):
        values = [score(test.labels[:, k], test.logits[:, k]) for k in range(3)]
        for label, value in zip("abc", values, strict=True):
            assert getattr(result, name).labels[label].value == pytest.approx(value)
        assert getattr(result, name).mean.value == pytest.approx(np.mean(values))
    for measure in (result.auroc, result.average_precision, *result.organ_iou.values()):
        for interval in (measure.mean, *measure.labels.values()):
            assert 0 <= interval.low < interval.value < interval.high <= 1


def test_organ_iou_is_over_true_positives_only():
    """Absent labels are NaN in predictions; were one counted, the mean would not be defined."""
    labels = np.zeros((4, 1), bool)
    labels[:2] = True
    iou = np.full((4, 1, T), np.nan)
    iou[:2] = np.array([0.2, 0.6])[:, None, None]
    split = Predictions(np.arange(4.0)[:, None], labels, {"hirescam": iou})
    result = summarise(("a",), split, split, resamples=20)
    assert result.organ_iou["hirescam"].mean.value == pytest.approx(0.4)


def test_label_without_positives_is_null_and_left_out_of_means():
    test = predictions(1, b=False)
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=30)
    for measure in (result.auroc, result.average_precision, *result.organ_iou.values()):
        assert measure.labels["b"] == UNKNOWN
        others = [measure.labels[label].value for label in "ac"]
        assert measure.mean.value == pytest.approx(np.mean(others))
    assert "NaN" not in json.dumps(plain(result), allow_nan=False)


def test_label_without_negatives_has_no_auroc():
    result = summarise(("a", "b", "c"), predictions(0), predictions(1, c=True), resamples=30)
    assert result.auroc.labels["c"].value is None
    assert result.average_precision.labels["c"].value == 1
    assert result.organ_iou["hirescam"].labels["c"].value > 0


def test_split_without_any_finding():
    test = predictions(1, a=False, b=False, c=False)
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=20)
    assert result.auroc.mean == UNKNOWN
    assert "n/a" in text_of(result)


def with_everything(seed: int, **columns) -> Predictions:
    """`predictions` with findings in two regions, and measures against lesions."""
    split = predictions(seed, **columns)
    rng = np.random.default_rng(seed + 100)
    findings = (rng.random((40, 3, 2)) < 0.6) | (np.arange(2) == rng.integers(2, size=(40, 3, 1)))
    findings &= split.labels[..., None]
    absent = np.where(split.labels, 1.0, np.nan)
    lesions = {}
    for name in split.organ_iou:
        of_map = {key: rng.random((40, 3)) * absent for key in ("otsu_iou", "energy")}
        lesions[name] = {"iou": rng.random((40, 3, T)) * absent[..., None], **of_map}
        lesions[name] |= {key: of_map["energy"] for key in LESION_MEASURES if "dice" not in key}
        lesions[name]["iou"] = rng.random((40, 3, T)) * absent[..., None]
    return split._replace(findings=findings.astype(np.uint8), lesions=lesions)


def test_lesions_and_organs_by_hand():
    validation, test = with_everything(0), with_everything(1)
    result = summarise(("a", "b", "c"), validation, test, resamples=30, regions=("left", "right"))
    for name in ("hirescam", "gradcam"):
        lesions = result.lesions[name]
        for k, label in enumerate("abc"):
            present = test.labels[:, k]
            chosen = np.nanmean(validation.lesions[name]["iou"][:, k], axis=0).argmax()
            assert lesions.iou.thresholds[label] == ORGAN_IOU_THRESHOLDS[chosen]
            iou = test.lesions[name]["iou"][present, k, chosen]
            assert lesions.iou.labels[label].value == pytest.approx(iou.mean())
            dice = 2 * iou / (1 + iou)
            assert lesions.dice.labels[label].value == pytest.approx(dice.mean())
            energy = test.lesions[name]["energy"][present, k].mean()
            assert lesions.energy.labels[label].value == pytest.approx(energy)
        chosen = choose_thresholds(validation)[name]
        for r, region in enumerate(("left", "right")):
            pairs = np.argwhere(test.findings[:, :, r])
            found = result.organ_iou[name].regions[region]
            values = [test.organ_iou[name][n, k, chosen[k]] for n, k in pairs]
            assert found.pairs == len(pairs)
            assert found.value == pytest.approx(np.mean(values))
            assert found.low < found.value < found.high
    assert "NaN" not in json.dumps(plain(result), allow_nan=False)


def test_calibration_is_that_of_the_measures():
    test = predictions(1, b=False)
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=30).calibration
    assert result.expected_calibration_error.defined == result.brier.defined == 2
    assert result.brier.labels["b"].value is None
    for k, label in ((0, "a"), (2, "c")):
        probabilities = 1 / (1 + np.exp(-test.logits[:, k]))
        given = probabilities, test.labels[:, k], result.bins
        found = result.expected_calibration_error
        plain = expected_calibration_error(*given)
        assert found.plug_in[label] == pytest.approx(plain)
        interval = calibration_interval(*given, resamples=30)
        assert dataclasses.astuple(found.labels[label]) == pytest.approx(interval)
        brier = brier_score(probabilities, test.labels[:, k])
        assert result.brier.labels[label].value == pytest.approx(brier)
        assert sum(result.reliability[label].count) == 40


def calibrated(seed: int) -> Predictions:
    """Labels that are drawn with the predicted probabilities."""
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(2, 4, size=(200, 3))
    labels = rng.random((200, 3)) < probabilities
    return Predictions(np.log(probabilities / (1 - probabilities)), labels, {})


def test_calibration_errors_lie_in_their_intervals_which_reach_the_true_one():
    covered = []
    for seed in range(10):
        split = calibrated(seed)
        result = summarise(("a", "b", "c"), split, split, resamples=100)
        error = result.calibration.expected_calibration_error
        for interval in (error.mean, *error.labels.values()):
            assert 0 <= interval.low <= interval.value <= interval.high
        covered += [interval.low == 0 for interval in error.labels.values()]
    assert np.mean(covered) > 0.7


def test_mean_is_over_the_same_labels_in_all_resamples():
    """A label with two positives, of which many resamples have none, is in the mean of all."""
    rng = np.random.default_rng(3)
    labels = np.zeros((60, 3), bool)
    labels[:30, :2] = labels[:2, 2] = True
    logits = np.concatenate(
        [rng.normal(size=(60, 2)) + 2.5 * labels[:, :2], np.arange(60.0)[:, None]], axis=1
    )
    split = Predictions(logits, labels, {})
    result = summarise(("common", "too", "rare"), split, split, resamples=500).auroc
    assert result.defined == 3
    common, too, rare = (result.labels[label].value for label in ("common", "too", "rare"))
    assert rare < 0.05 < 0.9 < min(common, too)
    assert result.mean.value == pytest.approx((common + too + rare) / 3)
    assert result.mean.high < 0.7
    # One of two labels is too rare for an interval: so is their mean.
    split = Predictions(logits[:, 1:], labels[:, 1:], {})
    result = summarise(("common", "rare"), split, split, resamples=50).auroc
    assert dataclasses.astuple(result.mean) == (pytest.approx((too + rare) / 2), None, None)


def test_label_with_one_positive_has_no_interval_and_is_in_no_mean():
    labels = np.zeros((60, 2), bool)
    labels[:30, 0] = labels[0, 1] = True
    logits = np.random.default_rng(3).normal(size=(60, 2)) + 2 * labels
    iou = np.where(labels[..., None], 0.5, np.nan) * np.ones(T)
    split = Predictions(logits, labels, {"hirescam": iou})
    result = summarise(("common", "rare"), split, split, resamples=50)
    assert result.positives == result.positive_patients == {"common": 30, "rare": 1}
    for measure in (result.auroc, result.organ_iou["hirescam"]):
        assert measure.defined == 1
        rare = measure.labels["rare"]
        assert rare.value is not None
        assert rare.low is rare.high is None
        assert measure.mean == measure.labels["common"]
    # Two volumes of one patient are no more than one.
    labels[1, 1] = True
    patients = ["p0", "p0", *map(str, range(58))]
    found = summarise(("common", "rare"), split, split, resamples=50, patients=patients)
    assert (found.positives["rare"], found.positive_patients["rare"]) == (2, 1)
    result = found.auroc
    assert result.labels["rare"].low is result.delong["rare"].low is None
    one = delong(split.logits[None, :, 0], split.labels[:, 0], patients)
    assert result.delong["common"].low == pytest.approx(one.interval()[0][0])


def test_pairs_without_a_measure_are_counted():
    test = predictions(1)
    n, k = np.argwhere(test.labels)[0]
    test.organ_iou["hirescam"][n, k] = np.nan  # an organ without a cell
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=20)
    measure = result.organ_iou["hirescam"]
    assert (measure.pairs, measure.undefined_pairs) == (test.labels.sum() - 1, 1)
    assert result.organ_iou["gradcam"].undefined_pairs == 0
    assert "1 more have an organ without a cell" in text_of(result)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: jax.tree.map(lambda part: part[:, :2], x), "test split: logits .40, 2."),
        (lambda x: jax.tree.map(lambda part: part[:0], x), "test split: has no volume"),
        (lambda x: x._replace(logits=x.logits * np.nan), "the score of 'a' in volume 0 is nan"),
    ],
)
def test_predictions_that_cannot_be_measured(change, line):
    with pytest.raises(ValueError, match=line):
        summarise(("a", "b", "c"), predictions(0), change(predictions(1)), resamples=5)


def test_delongs_intervals_stand_beside_the_bootstraps():
    test = predictions(1, b=False)
    result = summarise(("a", "b", "c"), predictions(0), test, resamples=400).auroc
    assert set(dataclasses.astuple(result.delong["b"])) == {None}
    for k, label in ((0, "a"), (2, "c")):
        one = delong(test.logits[None, :, k], test.labels[:, k])
        found = result.delong[label]
        assert found.standard_error == pytest.approx(one.covariance[0, 0] ** 0.5)
        # Two estimates of one interval.
        bootstrapped = result.labels[label]
        width = bootstrapped.high - bootstrapped.low
        assert found.high - found.low == pytest.approx(width, rel=0.25)


def test_volumes_of_a_patient_are_drawn_together():
    """Every volume twice: intervals as of the single ones, not narrower."""
    validation, test = predictions(0), predictions(1)
    alone = summarise(("a", "b", "c"), validation, test, resamples=50)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), test)
    patients = [f"p{i:02d}" for i in range(40)] * 2
    together = summarise(("a", "b", "c"), validation, twice, resamples=50, patients=patients)
    assert (together.volumes, together.patients) == (80, 40)
    for key in ("auroc", "average_precision"):
        for found, expected in zip(
            jax.tree.leaves(plain(getattr(together, key).labels)),
            jax.tree.leaves(plain(getattr(alone, key).labels)),
            strict=True,
        ):
            assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="39 entries for 40 volumes"):
        summarise(("a", "b", "c"), validation, test, patients=patients[:39])


# -- the table ------------------------------------------------------------------------------------


def test_table_of_labels():
    result = summarise(("a", "b", "c"), predictions(0), predictions(1, b=False), resamples=30)
    header, rule, *rows = label_table(result).splitlines()
    assert re.split(r" {2,}", header.strip()) == [
        "positives",
        "AUROC",
        "AP",
        "OrganIoU hirescam",
        "OrganIoU gradcam",
    ]
    assert set(rule) == {"-"}
    assert rows[0].startswith("mean of 2 of 3 labels  ")
    assert [row.split()[0] for row in rows[1:]] == ["a", "b", "c"]
    assert rows[2].split() == ["b", "0", "n/a", "n/a", "n/a", "n/a"]
    a = result.auroc.labels["a"]
    assert rows[1].split()[1:5] == [
        str(result.positives["a"]),
        f"{a.value:.3f}",
        f"[{a.low:.3f},",
        f"{a.high:.3f}]",
    ]
    assert max(map(len, (header, *rows))) == len(rule)
    assert text_of(result).startswith(label_table(result))


def test_means_over_other_numbers_of_labels_say_so():
    result = summarise(("a", "b", "c"), predictions(0), predictions(1, c=True), resamples=30)
    rows = label_table(result).splitlines()[2:]
    assert rows[0].split()[0] == "mean"
    assert re.split(r" {2,}", rows[1]) == ["of", *["2 of 3 labels"], *["3 of 3 labels"] * 3]


def test_table_of_maps_and_of_organs():
    splits = with_everything(0), with_everything(1, b=False)
    result = summarise(("a", "b", "c"), *splits, resamples=30, regions=("left", "right"))
    text = text_of(result)
    line = next(line for line in text.splitlines() if line.startswith("HiResCAM"))
    assert "maps, means over 2 of 3 labels  " in text
    assert "(2)" not in line
    energy = result.lesions["hirescam"].energy.mean.value
    assert line.split()[-3] == f"{energy:.3f}"
    left = next(line for line in text.splitlines() if line.startswith("left"))
    assert int(left.split()[1]) == result.organ_iou["hirescam"].regions["left"].pairs
    assert "bootstrap intervals over 40 patients (40 volumes)" in text


def test_means_against_lesions_over_fewer_labels_say_so():
    """IoU with lesions needs a threshold, which a label without a map in the validation split has
    not; where the lesions lie does not."""
    validation, test = with_everything(0, b=False), with_everything(1)
    for name in test.organ_iou:
        for values in (test.organ_iou[name], *test.lesions[name].values()):
            values[:] = np.where(np.isnan(values), np.nan, 0.1)
            values[:, 1] = np.where(np.isnan(values[:, 1]), np.nan, 0.9)
    n = np.flatnonzero(test.labels[:, 0])[0]
    for values in test.lesions["hirescam"].values():
        values[n, 0] = np.nan  # a lesion without a cell
    result = summarise(("a", "b", "c"), validation, test, resamples=20)
    found = result.lesions["hirescam"]
    pairs, of_b = int(test.labels.sum()), int(test.labels[:, 1].sum())
    assert (found.iou.defined, found.otsu_iou.defined) == (2, 3)
    assert found.iou.mean.value == pytest.approx(0.1)
    assert found.otsu_iou.mean.value == pytest.approx((0.1 + 0.9 + 0.1) / 3)
    assert (found.energy.pairs, found.energy.undefined_pairs) == (pairs - 1, 1)
    assert (found.dice.pairs, found.dice.undefined_pairs) == (
        pairs - of_b - 1,
        of_b + 1,
    )
    assert result.lesions["gradcam"].energy.undefined_pairs == 0
    text = text_of(result)
    assert "maps, means over 3 labels, (n): over n  " in text
    line = next(line for line in text.splitlines() if line.startswith("HiResCAM"))
    assert re.split(r" {2,}", line)[1:5] == ["0.100 (2)", "0.100 (2)", "0.182 (2)", "0.367"]
    assert f"Lesions: over {pairs - 1} pairs of a volume and a finding; 1 more have" in text


# -- a whole run ----------------------------------------------------------------------------------


class Cases:
    """Five random volumes in memory."""

    labels, regions = ("a", "b", "c"), ("left", "right")
    shape, spacing_mm = (6, 8, 8), (1.0, 1.0, 1.0)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        rng = np.random.default_rng(int(index))
        return {
            "volume": rng.integers(-1000, 800, self.shape).astype(np.int16),
            "findings": (rng.random((3, 2)) < 0.4).astype(np.uint8),
            "regions": (rng.random((2, 2, 4, 4)) < 0.5).astype(np.uint8),
            "lesions": (rng.random((3, 2, 4, 4)) < 0.2).astype(np.uint8),
            "index": np.int32(index),
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    model = AxialNet(3, (1,), (4,), "small", (3,), "SAME")
    config = Config(model=model, batch_size=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6, 8, 8)))
    return Run(tmp_path_factory.mktemp("run"), Header.of(config, Cases()), variables, 1)


def test_predictions_by_hand(run):
    """Batches of two over five volumes: the filling of the last batch leaves no trace."""
    result = predict(run, Cases())
    assert result.logits.shape == result.labels.shape == (5, 3)
    assert result.organ_iou["hirescam"].shape == (5, 3, T)
    fc = jax.tree.map(np.asarray, run.variables["params"]["fc"])
    for i in range(5):
        item = Cases()[i]
        volume = (np.clip(item["volume"].astype(np.float32), -1000, 800) + 1000) / 1800 - 0.449
        features = np.asarray(
            jax.jit(lambda v, x: run.model.apply(v, x, method="features"))(
                run.variables, jnp.asarray(volume[None])
            )
        )[0]
        logits = features.mean(0).reshape(-1) @ fc["kernel"] + fc["bias"]
        np.testing.assert_allclose(result.logits[i], logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(result.labels[i], item["findings"].any(1))
        weights = fc["kernel"].reshape(4, 4, 3, 3)
        for k in range(3):
            iou = {name: result.organ_iou[name][i, k] for name in ("hirescam", "gradcam")}
            if not item["findings"][k].any():
                assert np.isnan(iou["hirescam"]).all()
                assert np.isnan(iou["gradcam"]).all()
                continue
            allowed = item["regions"][item["findings"][k] > 0].any(0)
            lesion = item["lesions"][k] > 0
            maps = {
                "hirescam": np.einsum("shwc,hwc->shw", features, weights[..., k]),
                "gradcam": features @ weights[..., k].mean((0, 1)),
            }
            for name, values in maps.items():
                values = np.maximum(values, 0)
                values = (values - values.min()) / max(np.ptp(values), 1e-30)
                for t in range(0, T, 5):
                    above = values > ORGAN_IOU_THRESHOLDS[t]
                    expected = above[allowed].sum() / max(above.sum(), 1)
                    assert iou[name][t] == pytest.approx(expected, abs=1e-6)
                    either = (above | lesion).sum()
                    expected = (above & lesion).sum() / either
                    found = result.lesions[name]["iou"][i, k, t]
                    assert found == pytest.approx(expected, abs=1e-6)


def test_evaluate_run_refuses_other_labels(run):
    class Strangers(Cases):
        labels = ("a", "b", "d")

    with pytest.raises(UserError, match="trained on labels"):
        evaluate_run(run, Cases(), Strangers())


class Others(Cases):
    """Four others."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        return super().__getitem__(index + 10) | {"index": np.int32(index)}


def test_both_splits_are_measured(run, tmp_path):
    values: dict[str, Values] = {}
    result = evaluate_run(run, Cases(), Others(), values=values)
    scores = {"test": result.scores, "validation": result.validation}
    validation, test = predict(run, Cases()), predict(run, Others())
    assert (result.split, result.scores.volumes, result.validation.volumes) == ("test", 4, 5)
    assert result.scores.content != result.validation.content
    assert result.head.kind == "exact"
    assert result.head.maps["hirescam"].holds
    assert not result.head.maps["gradcam"].holds
    assert result.scores.completeness.mean <= result.scores.completeness.worst < 1e-5
    for split, of_split in (("test", test), ("validation", validation)):
        chosen = choose_thresholds(validation)["hirescam"]
        iou = np.stack([of_split.organ_iou["hirescam"][:, k, chosen[k]] for k in range(3)], axis=1)
        iou[:, chosen < 0] = np.nan
        path = tmp_path / f"{split}.npz"
        values[split].save(path)
        found = Values.load(path)
        np.testing.assert_array_equal(found.organ_iou["hirescam"], iou)
        np.testing.assert_array_equal(found.logits, of_split.logits)
        np.testing.assert_array_equal(found.truth, of_split.labels)
        assert found.content == scores[split].content
        for k, label in enumerate("abc"):
            value = scores[split].organ_iou["hirescam"].labels[label].value
            if value is not None:
                assert value == pytest.approx(np.nanmean(iou[:, k]))
    text = table(result)
    assert "validation split (5 volumes" in text
    assert "Grad-CAM: no guarantee" in text


def test_data_without_a_test_split(run):
    result = evaluate_run(run, Cases(), None)
    assert (result.split, result.scores.volumes) == ("validation", 5)
    assert result.validation is None
    assert "validation" not in json.loads(result.to_json())
    again = evaluate_run(run, Cases(), Cases())
    assert result.scores.organ_iou == again.validation.organ_iou
    assert result.scores.grid == (2, 4, 4)
    assert "its organ prior are made of the same volumes" in table(result)
    assert "in-sample" in table(result)


def test_findings_in_an_organ_without_a_cell(run):
    """No map could be right: they are counted, and in no mean."""

    class Cut(Cases):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item["regions"][1] = 0
            item["findings"][:, 0] = [1, 0, 0]
            return item

    result = evaluate_run(run, Cut(), None)
    findings = np.array([Cut()[i]["findings"] for i in range(5)])
    elsewhere = (findings[:, :, 1] > findings[:, :, 0]).sum()
    for measure in result.scores.organ_iou.values():
        assert (measure.pairs, measure.undefined_pairs) == (5, elsewhere)
        assert measure.defined == 1
        assert measure.labels["b"].value is None
        assert measure.regions["left"].pairs == 5


def test_weights_that_are_not_numbers(run):
    broken = jax.tree.map(lambda x: x * np.nan, run.variables)
    with pytest.raises(UserError, match=r"at step 1 the score of 'a' in volume 0 .* is nan: train"):
        evaluate_run(dataclasses.replace(run, variables=broken), Cases(), Cases())


def test_interrupted_without_maps(tmp_path):
    """CTNet has no maps in the body: what is kept of a batch has empty parts."""

    class Small(Cases):
        shape = (6, 12, 12)

    model = CTNet(3, (1,), (18,), "small", conv_widths=(4, 3), channels=2, hidden=(8,))
    config = Config(model=model, batch_size=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 12, 12)))
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)
    run = Run(tmp_path, Header.of(config, Small()), variables, 1)
    folder = tmp_path / "kept"
    whole = predict(run, Small(), kept=Kept(folder, {}))
    max(folder.glob("*.npz")).unlink()
    again = predict(run, Small(), kept=Kept(folder, {}))
    assert again.organ_iou == {}
    np.testing.assert_array_equal(again.logits, whole.logits)
    result = summarise(("a", "b", "c"), again, again, resamples=5)
    assert result.organ_iou == {}
    assert result.completeness is result.grid is None
    assert "OrganIoU" not in text_of(result)


def test_baselines_by_hand(run):
    result = predict(run, Cases())
    items = [Cases()[i] for i in range(5)]
    allowed = np.array([(x["findings"] > 0) @ x["regions"].reshape(2, -1) > 0 for x in items])
    allowed = allowed.reshape(5, 3, 2, 4, 4)
    present = np.array([x["findings"].any(1) for x in items])
    assert result.prior is not None
    np.testing.assert_array_equal(result.findings, [x["findings"] for x in items])
    for k in range(3):
        if present[:, k].any():
            with_label = allowed[:, k].any((1, 2, 3))
            np.testing.assert_allclose(result.prior[k], allowed[with_label, k].mean(0), rtol=1e-6)
    maps = random_maps((5, 3, 2, 4, 4))
    maps = (maps - maps.min((2, 3, 4), keepdims=True)) / np.ptp(maps, (2, 3, 4), keepdims=True)
    maps = jnp.asarray(maps)
    expected = np.where(present[..., None], organ_iou(maps, allowed, ORGAN_IOU_THRESHOLDS), np.nan)
    np.testing.assert_allclose(result.organ_iou["random"], expected, rtol=1e-5)
    other = np.random.default_rng(0).random((3, 2, 4, 4))
    other[1] = np.nan  # of a label that the other split has not
    measured = predict(run, Cases(), prior=other).organ_iou["organ_prior"]
    assert np.isnan(measured[:, 1]).all()
    shown = (other - other.min((1, 2, 3), keepdims=True)) / np.ptp(other, (1, 2, 3), keepdims=True)
    for n, k in np.argwhere(present & (np.arange(3) != 1)):
        above = shown[k] > ORGAN_IOU_THRESHOLDS[20]
        assert measured[n, k, 20] == pytest.approx((above & allowed[n, k]).sum() / above.sum())


def test_checks_of_a_run(run, tmp_path):
    """On random weights every map is a guess, but the exact one of an affine head is no bad one."""
    result = evaluate_run(run, Cases(), Cases(), faithfulness=5, sanity=2)
    faithful, sane = result.faithfulness, result.sanity
    items = [Cases()[i] for i in range(5)]
    assert (faithful.volumes, faithful.patients) == (5, 5)
    assert faithful.pairs == sum(int(x["findings"].any(1).sum()) for x in items)
    assert list(faithful.methods) == list(MAP_NAMES)
    for measures in faithful.methods.values():
        curve = measures.deletion_curve
        assert measures.deletion.value == pytest.approx(np.trapezoid(curve, dx=1 / 16))
        assert len(measures.road_most_first) == len(faithful.fractions)
        combined = np.subtract(measures.road_least_first, measures.road_most_first).mean() / 2
        assert measures.road.value == pytest.approx(combined, abs=1e-6)
        assert 0 < measures.insertion.low <= measures.insertion.high < 1
    curves = [m.deletion_curve[0] for m in faithful.methods.values()]
    np.testing.assert_allclose(curves, curves[0], rtol=1e-5)  # the whole volume

    assert sane.layers[0] == "fc"
    for of_method in sane.methods.values():
        assert {len(values) for values in of_method.values()} == {len(sane.layers)}
        assert all(abs(v) < 0.999 for v in of_method["spearman"] if v is not None)
    assert sane.maps == 2 * 3
    for name, of_method in sane.defined.items():
        for kind, counts in of_method.items():
            values = sane.methods[name][kind]
            assert [count > 0 for count in counts] == [value is not None for value in values]
            assert all(0 <= count <= 6 for count in counts)
    assert "NaN" not in json.dumps(plain(result), allow_nan=False)
    save_sanity_picture(tmp_path / "sanity.png", sane)
    assert (tmp_path / "sanity.png").read_bytes()[:4] == b"\x89PNG"
    lines = faithfulness_table(faithful).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == list(MAP_NAMES.values())


def test_means_of_checks_tell_how_many_maps_they_are_over(run, monkeypatch, tmp_path):
    """A label without an organ prior; labels whose maps became constant."""
    prior = np.ones((3, 2, 4, 4))
    prior[..., 0] = 0
    prior[0] = np.nan
    items = [Cases()[i] for i in chosen_volumes(Cases(), 4)]
    present = np.array([x["findings"].any(1) for x in items])
    assert present[:, 0].any()
    faithful = evaluate_checks.faithfulness(run, Cases(), prior, 4)
    rest = int(present[:, 1:].sum())
    for name, measures in faithful.methods.items():
        expected = rest if name == "organ_prior" else int(present.sum())
        assert [getattr(measures, key).pairs for key in ("insertion", "deletion", "road")] == [
            expected
        ] * 3
    lines = faithfulness_table(faithful).splitlines()
    counted = [line.split("  ")[0] for line in lines if line.count(f" ({rest})") == 3]
    assert counted == ["organ prior"]

    def some(first, second):
        values = similarity(first, second)
        return values._replace(spearman=values.spearman.at[:, 0].set(np.nan))

    similarity = evaluate_checks.similarity
    whole = evaluate_checks.sanity(run, Cases(), 2).defined["hirescam"]["spearman"]
    monkeypatch.setattr(evaluate_checks, "similarity", some)
    sane = evaluate_checks.sanity(run, Cases(), 2)
    found = sane.defined["hirescam"]["spearman"]
    assert all(count <= min(before, 4) for count, before in zip(found, whole, strict=True))
    assert found[0] == 4 < sane.maps == 6
    save_sanity_picture(tmp_path / "sanity.png", sane)
    assert (tmp_path / "sanity.png").exists()


def test_checks_are_on_a_random_choice_and_by_patient(run, monkeypatch):
    class Many(Cases):
        def __len__(self) -> int:
            return 200

    chosen = chosen_volumes(Many(), 30)
    assert len(set(chosen)) == 30
    assert 60 < np.mean(chosen) < 140
    assert set(chosen_volumes(Many(), 10)) < set(chosen)

    prior = np.ones((3, 2, 4, 4))
    monkeypatch.setattr(pipeline, "patients_of", lambda source: ["one"] * len(source))
    result = evaluate_checks.faithfulness(run, Cases(), prior, 2)
    assert result.patients == 1
    for measures in result.methods.values():
        for name in ("insertion", "deletion", "road"):
            assert getattr(measures, name).value is not None
            assert getattr(measures, name).low is getattr(measures, name).high is None


def test_checks_on_more_volumes_than_there_are(run):
    with pytest.raises(UserError, match="--sanity 6: the test split has 5 volumes"):
        evaluate_run(run, Cases(), Cases(), sanity=6)
    with pytest.raises(UserError, match="--faithfulness -1"):
        evaluate_run(run, Cases(), Cases(), faithfulness=-1)
