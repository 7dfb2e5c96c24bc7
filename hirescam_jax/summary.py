"""From the measures of each volume to what is reported: thresholds, means, intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    best_threshold,
    bin_of,
    delong,
    reliability,
)
from hirescam_jax.resampling import draws, group_numbers, groups_in, intervals, means_over, ranked

BINS = 10  # of equal width, for the calibration
MIN_PATIENTS = 2  # of each class: fewer tell nothing about how a measure varies


class Predictions(NamedTuple):
    """What is measured of each volume and label of a split; NaN where it is not defined.

    organ_iou: by method and baseline, at every threshold, of present labels.
    lesions: by method and baseline, then by measure: "iou" [N, K, T], the others [N, K]; None
        where the data has no lesions.
    findings: [N, K, R], label k found in region r.
    prior: [K, d, h, w], the organ prior that was measured, NaN for labels without one.
    residuals: [N, K], completeness residuals of the HiResCAM maps.
    """

    logits: Float[np.ndarray, "N K"]
    labels: Bool[np.ndarray, "N K"]
    organ_iou: dict[str, Float[np.ndarray, "N K T"]]
    lesions: dict[str, dict[str, np.ndarray]] | None = None
    findings: np.ndarray | None = None
    prior: np.ndarray | None = None
    residuals: np.ndarray | None = None


class Measured(NamedTuple):
    """Measures of maps at the chosen thresholds.

    thresholds: by method, or (method, "iou") against lesions, then by label; None for a label
        without a measured map in the validation split.
    values: by method, or (method, measure) against lesions, [N, K]; NaN where not defined.
    """

    thresholds: dict[Any, dict[str, float | None]]
    values: dict[Any, Float[np.ndarray, "N K"]]


def choose_thresholds(validation: Predictions) -> dict[str, np.ndarray]:
    """Per method and label the index of the threshold with the best mean OrganIoU; -1 where the
    validation split has no map of the label to measure."""
    return {name: _best(iou_NKT) for name, iou_NKT in validation.organ_iou.items()}


def _best(scores_NKT: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(scores_NKT).all(axis=(0, 2))
    return np.where(seen, np.nan_to_num(best_threshold(scores_NKT), nan=-1), -1).astype(int)


def at_thresholds(labels: Sequence[str], validation: Predictions, test: Predictions) -> Measured:
    """The measures of each volume and label of `test` at the thresholds that are best on
    `validation`."""
    found = Measured({}, {})

    def at_best(key: Any, chosen: np.ndarray, on_test: np.ndarray) -> np.ndarray:
        numbers = ORGAN_IOU_THRESHOLDS[chosen].tolist()
        found.thresholds[key] = {
            label: number if index >= 0 else None
            for label, number, index in zip(labels, numbers, chosen, strict=True)
        }
        values = np.take_along_axis(on_test, np.maximum(chosen, 0)[None, :, None], axis=2)[..., 0]
        return np.where(chosen >= 0, values, np.nan)

    for name, chosen in choose_thresholds(validation).items():
        found.values[name] = at_best(name, chosen, test.organ_iou[name])
    if test.lesions is None or validation.lesions is None:
        return found
    for name, of_map in test.lesions.items():
        iou = at_best((name, "iou"), _best(validation.lesions[name]["iou"]), of_map["iou"])
        dice = {"dice": _dice(iou), "otsu_dice": _dice(of_map["otsu_iou"])}
        measures = {**of_map, "iou": iou, **dice}
        found.values.update({(name, key): value for key, value in measures.items()})
    return found


def evaluate(
    labels: tuple[str, ...],
    validation: Predictions,
    test: Predictions,
    resamples: int = 1000,
    seed: int = 0,
    *,
    regions: Sequence[str] = (),
    patients: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All measures of a test split, with 95 % bootstrap intervals over its patients.

    Maps are binarised at the threshold that was best on the validation split, per label and
    method, frozen for the test; measures of maps are over the volumes in which the label is truly
    present. What is not defined is null: of a label without positives all of its measures, of one
    without negatives AUROC, of one without a threshold OrganIoU.

    A mean is over the labels that are defined and have two positive patients (and, for AUROC, two
    negative ones), with fewer of which there is no interval either. It is over the same labels in
    all resamples: in one that happens to have no positive of a label, the label keeps its value on
    all volumes.

    Args:
        validation: may be `test` itself: then the measures of maps are in-sample.
        regions: names of the findings' regions, for the breakdown by organ.
        patients: of each test volume; all volumes of a patient are drawn together. By default each
            volume stands alone.

    Returns:
        A tree for JSON. An *interval* is {"value", "low", "high"}, each a number or null. A
        *measure* is {"mean": interval, "defined": number of labels in the mean, "labels": {label:
        interval}} with one entry for every label.

        "volumes": of the test split. "patients": how many were resampled.
        "positives": {label: volumes}.
        "auroc": a measure, and "delong": {label: {"low", "high", "standard_error"}}: intervals by
            DeLong's variance; null where patients have several volumes, which it takes as
            independent.
        "average_precision": a measure.
        "calibration": {"bins": M, "expected_calibration_error": measure, "brier": measure,
            "reliability": {label: {"count", "probability", "frequency"}}}: lists of M bins of equal
            width over [0, 1], null in empty bins. The error's intervals are reflected
            (`hirescam_jax.resampling.reflected`).
        "organ_iou": {method: a measure, and "thresholds": {label: number or null}, "pairs" of
            volume and label that it is over, "undefined_pairs": with a finding, but without a
            measure, and "regions": {region: interval and "pairs"}}: by the region in which the
            finding is; {} without `regions`. Methods: "hirescam" and "gradcam", then the baselines
            "organ_prior", "centre_blob", "random" (`hirescam_jax.metrics.baselines`).
        "lesions": null where the data has none, else {method: {"iou", "dice", "otsu_iou",
            "otsu_dice", "pointing", "energy", "rank_accuracy", "average_precision"}}: measures
            against the lesions on the feature grid. "iou" has its own "thresholds", which "dice"
            shares; it is a mean over volumes of each one's own.
        "completeness": null without maps, else {"mean", "worst"} over all volumes and labels of
            |sum of the HiResCAM map + bias - logit|.

        `evaluate_run` and `hirescam evaluate` put more beside them.

    Raises:
        ValueError: patients of another length, predictions of other labels, a split without
            volumes, or a score that is not a finite number.
    """
    _check(labels, validation, test)
    count, num_labels = test.labels.shape
    groups = group_numbers(count, patients)
    maps = at_thresholds(labels, validation, test)
    probabilities = expit(test.logits.astype(np.float64))
    residual_NK = probabilities - test.labels
    without = np.where(test.labels.any(axis=0), 0.0, np.nan)  # added: null without positives
    rows = {"brier": residual_NK**2 + without, **maps.values}
    sums = [np.nan_to_num(value) for value in rows.values()]
    numbers = [(~np.isnan(value)).astype(float) for value in rows.values()]
    organs = list(test.organ_iou) if test.findings is not None and regions else []
    for name in organs:  # pairs of volume and label, by region
        found_NKR = (np.asarray(test.findings) > 0).astype(float)
        defined = found_NKR * ~np.isnan(rows[name])[..., None]
        numbers.append(defined.sum(1))
        sums.append((defined * np.nan_to_num(rows[name])[..., None]).sum(1))
    sums, numbers = np.concatenate(sums, axis=1), np.concatenate(numbers, axis=1)
    in_bin_NKM = bin_of(probabilities, BINS)[..., None] == np.arange(BINS)
    gaps = (residual_NK[..., None] * in_bin_NKM).reshape(count, -1)
    order = ["auroc", "average_precision", "expected_calibration_error", *rows]

    def statistic(times_NS: np.ndarray) -> np.ndarray:
        """Of each resample [S]: rows x labels, then maps x regions."""
        curves = [ranked(test.logits[:, k], test.labels[:, k], times_NS) for k in range(num_labels)]
        # Means over the drawn volumes are products of matrices.
        times_NS = times_NS.astype(float)
        number = numbers.T @ times_NS
        means = np.where(number > 0, sums.T @ times_NS / np.maximum(number, 1), np.nan)
        gap = np.abs(gaps.T @ times_NS).reshape(num_labels, BINS, -1).sum(1)
        error = gap / times_NS.sum(0) + without[:, None]
        aurocs, precisions = (np.stack(parts) for parts in zip(*curves, strict=True))
        return np.concatenate([aurocs, precisions, error, means])

    value = statistic(np.ones((count, 1), np.float32))[:, 0]
    drawn = [statistic(times) for times in draws(groups, resamples, seed)]
    drawn = np.concatenate(drawn, axis=1)
    # How many patients each row and label has values of: with fewer than two no interval.
    of_each = [np.minimum(groups_in(test.labels, groups), groups_in(~test.labels, groups))]
    of_each += [groups_in(test.labels, groups)] * 2
    of_each.append(groups_in(numbers > 0, groups))
    known = np.concatenate(of_each) >= MIN_PATIENTS
    known[: len(order) * num_labels] &= np.tile(of_each[1] >= MIN_PATIENTS, len(order))

    def by_label(columns: np.ndarray) -> np.ndarray:
        shape = (len(order), num_labels, *columns.shape[1:])
        return columns[: len(order) * num_labels].reshape(shape)

    in_mean = by_label(known & ~np.isnan(value))
    mean, mean_drawn = means_over(by_label(value), by_label(drawn), in_mean)
    errors = order.index("expected_calibration_error")
    columns = intervals(value, drawn, known)
    means = intervals(mean, mean_drawn, ~np.isnan(mean))
    place = errors * num_labels
    columns[place : place + num_labels] = intervals(
        *(x[place : place + num_labels] for x in (value, drawn, known)), reflect=True
    )
    means[errors : errors + 1] = intervals(
        *(x[errors : errors + 1] for x in (mean, mean_drawn, ~np.isnan(mean))), reflect=True
    )

    def measure(key: Any) -> dict[str, Any]:
        row = order.index(key)
        of_labels = columns[row * num_labels : (row + 1) * num_labels]
        return {
            "mean": means[row],
            "defined": int(in_mean[row].sum()),
            "labels": dict(zip(labels, of_labels, strict=True)),
        }

    def pairs(name: str) -> dict[str, int]:
        measured = int((~np.isnan(rows[name])).sum())
        return {"pairs": measured, "undefined_pairs": int(test.labels.sum()) - measured}

    lesions = {key[0]: {} for key in rows if isinstance(key, tuple)}
    for key in rows:
        if isinstance(key, tuple):
            lesions[key[0]][key[1]] = measure(key)
            if key[1] == "iou":
                lesions[key[0]]["iou"]["thresholds"] = maps.thresholds[key]
    result: dict[str, Any] = {
        "volumes": count,
        "patients": int(groups.max()) + 1,
        "positives": dict(zip(labels, test.labels.sum(0).tolist(), strict=True)),
        "auroc": {**measure("auroc"), "delong": _delong(labels, test, groups)},
        "average_precision": measure("average_precision"),
        "calibration": {
            "bins": BINS,
            "expected_calibration_error": measure("expected_calibration_error"),
            "brier": measure("brier"),
            "reliability": _reliability(labels, probabilities, test.labels),
        },
        "organ_iou": {
            name: {
                **measure(name),
                "thresholds": maps.thresholds[name],
                **pairs(name),
                "regions": {},
            }
            for name in test.organ_iou
        },
        "lesions": lesions or None,
        "completeness": None,
    }
    of_regions = iter(columns[len(order) * num_labels :])
    region_pairs = iter(numbers[:, len(rows) * num_labels :].sum(0).astype(int).tolist())
    for name in organs:
        result["organ_iou"][name]["regions"] = {
            region: {**next(of_regions), "pairs": next(region_pairs)} for region in regions
        }
    if test.residuals is not None:
        mean, worst = float(test.residuals.mean()), float(test.residuals.max())
        result["completeness"] = {"mean": mean, "worst": worst}
    return result


def _check(labels: Sequence[str], validation: Predictions, test: Predictions) -> None:
    for name, split in (("validation", validation), ("test", test)):
        if split.labels.shape[1:] != (len(labels),) or split.logits.shape != split.labels.shape:
            raise ValueError(
                f"{name} split: logits {split.logits.shape} and labels {split.labels.shape} must "
                f"both be [volumes, {len(labels)}], for labels {', '.join(labels)}"
            )
        if not len(split.labels):
            raise ValueError(f"{name} split: has no volume, so that nothing can be measured")
        wrong = np.argwhere(~np.isfinite(split.logits))
        if len(wrong):
            n, k = wrong[0]
            raise ValueError(
                f"{name} split: the score of '{labels[k]}' in volume {n} is {split.logits[n, k]}"
            )


def _delong(
    labels: Sequence[str], test: Predictions, groups: np.ndarray
) -> dict[str, dict[str, float | None]]:
    if len(np.unique(groups)) < len(groups):
        nothing = {"low": None, "high": None, "standard_error": None}
        return {label: dict(nothing) for label in labels}
    found = {}
    for k, label in enumerate(labels):
        one = delong(test.logits[None, :, k], test.labels[:, k])
        (low,), (high,) = one.interval()
        error = float(np.sqrt(one.covariance[0, 0]))
        found[label] = {"low": _null(low), "high": _null(high), "standard_error": _null(error)}
    return found


def _reliability(
    labels: Sequence[str], probabilities: np.ndarray, truth: np.ndarray
) -> dict[str, dict[str, list]]:
    tables = {
        label: reliability(probabilities[:, k], truth[:, k], BINS) for k, label in enumerate(labels)
    }
    return {
        label: {
            "count": table.counts.tolist(),
            "probability": [_null(p) for p in table.probability],
            "frequency": [_null(f) for f in table.frequency],
        }
        for label, table in tables.items()
    }


def _dice(iou: np.ndarray) -> np.ndarray:
    return 2 * iou / (1 + iou)


def _null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
