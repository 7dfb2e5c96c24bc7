"""Evaluation: what is chosen on validation, what is left out, and the same numbers by hand."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.checkpoint import Header, Run
from hirescam_jax.config import Config
from hirescam_jax.errors import UserError
from hirescam_jax.evaluate import (
    Predictions,
    choose_thresholds,
    evaluate,
    evaluate_run,
    predict,
    table,
)
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS
from hirescam_jax.models import AxialNet

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


# -- thresholds -----------------------------------------------------------------------------------


def test_thresholds_are_the_best_of_the_validation_mean():
    validation = predictions(0)
    chosen = choose_thresholds(validation)
    for name, iou in validation.organ_iou.items():
        for k in range(3):
            means = [iou[validation.labels[:, k], k, t].mean() for t in range(T)]
            assert chosen[name][k] == int(np.argmax(means))
    assert (chosen["hirescam"] != chosen["gradcam"]).any()


def test_threshold_of_a_label_that_validation_never_saw_is_the_first():
    chosen = choose_thresholds(predictions(0, b=False))
    assert chosen["hirescam"][1] == chosen["gradcam"][1] == 0


def test_test_split_does_not_move_the_thresholds():
    validation, test = predictions(0), predictions(1)
    for name in test.organ_iou:  # the test split would choose the last one
        test.organ_iou[name][..., -1] = np.where(test.labels, 1.0, np.nan)
    result = evaluate(("a", "b", "c"), validation, test, resamples=20)
    chosen = choose_thresholds(validation)
    for name, measure in result["organ_iou"].items():
        for k, label in enumerate("abc"):
            t = chosen[name][k]
            assert measure["thresholds"][label] == pytest.approx(ORGAN_IOU_THRESHOLDS[t])
            iou = test.organ_iou[name][test.labels[:, k], k, t]
            assert measure["labels"][label]["value"] == pytest.approx(iou.mean())


# -- measures -------------------------------------------------------------------------------------


def test_measures_are_scikit_learns_and_means_are_over_labels():
    sklearn = pytest.importorskip("sklearn.metrics")
    test = predictions(1)
    result = evaluate(("a", "b", "c"), predictions(0), test, resamples=50)
    assert result["volumes"] == 40
    for name, score in (
        ("auroc", sklearn.roc_auc_score),
        ("average_precision", sklearn.average_precision_score),
    ):
        values = [score(test.labels[:, k], test.logits[:, k]) for k in range(3)]
        for label, value in zip("abc", values, strict=True):
            assert result[name]["labels"][label]["value"] == pytest.approx(value)
        assert result[name]["mean"]["value"] == pytest.approx(np.mean(values))
    for measure in (result["auroc"], result["average_precision"], *result["organ_iou"].values()):
        for interval in (measure["mean"], *measure["labels"].values()):
            assert 0 <= interval["low"] < interval["value"] < interval["high"] <= 1


def test_organ_iou_is_over_true_positives_only():
    """Absent labels are NaN in predictions; were one counted, the mean would not be defined."""
    labels = np.zeros((4, 1), bool)
    labels[:2] = True
    iou = np.full((4, 1, T), np.nan)
    iou[:2] = np.array([0.2, 0.6])[:, None, None]
    split = Predictions(np.arange(4.0)[:, None], labels, {"hirescam": iou})
    result = evaluate(("a",), split, split, resamples=20)
    assert result["organ_iou"]["hirescam"]["mean"]["value"] == pytest.approx(0.4)


def test_label_without_positives_is_null_and_left_out_of_means():
    test = predictions(1, b=False)
    result = evaluate(("a", "b", "c"), predictions(0), test, resamples=30)
    for measure in (result["auroc"], result["average_precision"], *result["organ_iou"].values()):
        assert measure["labels"]["b"] == {"value": None, "low": None, "high": None}
        others = [measure["labels"][label]["value"] for label in "ac"]
        assert measure["mean"]["value"] == pytest.approx(np.mean(others))
    assert "NaN" not in json.dumps(result, allow_nan=False)


def test_label_without_negatives_has_no_auroc():
    result = evaluate(("a", "b", "c"), predictions(0), predictions(1, c=True), resamples=30)
    assert result["auroc"]["labels"]["c"]["value"] is None
    assert result["average_precision"]["labels"]["c"]["value"] == 1
    assert result["organ_iou"]["hirescam"]["labels"]["c"]["value"] > 0


def test_split_without_any_finding():
    test = predictions(1, a=False, b=False, c=False)
    result = evaluate(("a", "b", "c"), predictions(0), test, resamples=20)
    assert result["auroc"]["mean"] == {"value": None, "low": None, "high": None}
    assert "n/a" in table(result)


# -- the table ------------------------------------------------------------------------------------


def test_table():
    result = evaluate(("a", "b", "c"), predictions(0), predictions(1, b=False), resamples=30)
    header, rule, *rows = table(result).splitlines()
    assert re.split(r" {2,}", header.strip()) == [
        "AUROC",
        "AP",
        "OrganIoU hirescam",
        "OrganIoU gradcam",
    ]
    assert set(rule) == {"-"}
    assert [row.split()[0] for row in rows] == ["mean", "a", "b", "c"]
    assert rows[2].split() == ["b", "n/a", "n/a", "n/a", "n/a"]
    a = result["auroc"]["labels"]["a"]
    assert rows[1].split()[1:4] == [
        f"{a['value']:.3f}",
        f"[{a['low']:.3f},",
        f"{a['high']:.3f}]",
    ]
    assert max(map(len, (header, *rows))) == len(rule)


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


def test_evaluate_run_refuses_other_labels(run):
    class Others(Cases):
        labels = ("a", "b", "d")

    with pytest.raises(UserError, match="trained on labels"):
        evaluate_run(run, Cases(), Others())
