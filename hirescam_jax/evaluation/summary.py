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
    calibration_error_of_bins,
    calibration_error_within_chance,
    delong,
    reliability,
)
from hirescam_jax.metrics.bootstrap import (
    MIN_GROUPS,
    Resampled,
    draws,
    group_numbers,
    groups_in,
    intervals,
    mean_of,
    null,
    resampled_means,
    resampled_ranks,
    within_unit,
)

BINS = 10  # of equal width, for the calibration


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


def named_thresholds(labels: Sequence[str], chosen: np.ndarray) -> dict[str, float | None]:
    """{label: threshold} of indices as `choose_thresholds` gives them; None for -1."""
    numbers = ORGAN_IOU_THRESHOLDS[chosen].tolist()
    return {
        label: number if index >= 0 else None
        for label, number, index in zip(labels, numbers, chosen, strict=True)
    }


def _best(scores_NKT: np.ndarray) -> np.ndarray:
    return np.nan_to_num(best_threshold(scores_NKT), nan=-1).astype(int)


def at_thresholds(labels: Sequence[str], validation: Predictions, test: Predictions) -> Measured:
    """The measures of each volume and label of `test` at the thresholds that are best on
    `validation`."""
    found = Measured({}, {})

    def at_best(key: Any, chosen: np.ndarray, on_test: np.ndarray) -> np.ndarray:
        found.thresholds[key] = named_thresholds(labels, chosen)
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
    negative ones). It is over the same labels in all resamples: in one that happens to have no
    positive of a label, the label keeps its value on all volumes.

    A label has an interval with five positive patients (and negative ones) and more, a mean where
    more than half of its labels have one. Those of fewer than ten are too narrow, and those of
    average precision are corrected for its bias, or left out where that is too large: how well they
    cover stands in `hirescam_jax.metrics.bootstrap`.

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
        "grid": [d, h, w] of the maps, null without maps.
        "positives": {label: volumes}. "positive_patients": {label: patients}.
        "auroc": a measure, and "delong": {label: {"low", "high", "standard_error"}}: intervals by
            DeLong's variance, by patient; an interval with as many patients as above.
        "average_precision": a measure.
        "calibration": {"bins": M, "expected_calibration_error": measure, "brier": measure,
            "reliability": {label: {"count", "probability", "frequency"}}}: lists of M bins of equal
            width over [0, 1], null in empty bins. The error is debiased
            (`hirescam_jax.metrics.calibration_error_of_bins`), with the plain one under "plug_in":
            {label: number or null}, and its interval as `calibration_interval`'s.
        "organ_iou": {method: a measure, and "thresholds": {label: number or null}, "pairs" of
            volume and label that it is over, "undefined_pairs": with a finding, but without a
            measure, and "regions": {region: interval and "pairs"}}: by the region in which the
            finding is; {} without `regions`. Methods: "hirescam" and "gradcam", then the baselines
            "organ_prior", "centre_blob", "random" (`hirescam_jax.metrics.baselines`).
        "lesions": null where the data has none, else {method: {"iou", "dice", "otsu_iou",
            "otsu_dice", "pointing", "energy", "rank_accuracy", "average_precision"}}: measures
            against the lesions on the feature grid, with "pairs" and "undefined_pairs" (a lesion
            without a cell, say). "iou" has its own "thresholds", which "dice" shares; it is a mean
            over volumes of each one's own.
        "completeness": null without maps, else {"mean", "worst"} over all volumes and labels of
            |sum of the HiResCAM map + bias - logit|.

        `evaluate_run` and `hirescam evaluate` put more beside them.

    Raises:
        ValueError: patients of another length, predictions of other labels, a split without
            volumes, or a score that is not a finite number.
    """
    _check(labels, validation, test)
    numbers = group_numbers(len(test.labels), patients)
    times = draws(numbers, resamples, seed)
    maps = at_thresholds(labels, validation, test)
    probabilities = expit(test.logits.astype(np.float64))
    present = test.labels.any(axis=0)
    positive_patients = groups_in(test.labels, numbers)

    def of_present(found: Resampled) -> Resampled:
        value = np.where(present, found.value, np.nan)
        return found._replace(value=value, groups=np.minimum(found.groups, positive_patients))

    def measure(found: Resampled) -> dict[str, Any]:
        """Means and intervals of labels; of those alone that are present."""
        found = of_present(found)
        return {
            "mean": intervals(mean_of(found, found.in_mean))[0],
            "defined": int(found.in_mean.sum()),
            "labels": dict(zip(labels, intervals(found), strict=True)),
        }

    def of_values(values: np.ndarray) -> dict[str, Any]:
        return measure(resampled_means(values, times, numbers))

    def of_pairs(values: np.ndarray) -> dict[str, Any]:
        pairs = int((~np.isnan(values)).sum())
        counts = {"pairs": pairs, "undefined_pairs": int(test.labels.sum()) - pairs}
        return {**of_values(values), **counts}

    def of_map(name: str) -> dict[str, Any]:
        values = maps.values[name]
        organs = {}
        if test.findings is not None and regions:
            organs = _by_region(values, test.findings, regions, times, numbers)
        return {**of_pairs(values), "thresholds": maps.thresholds[name], "regions": organs}

    aurocs, precisions = resampled_ranks(test.logits, test.labels, times, numbers)
    lesions: dict[str, dict[str, Any]] = {}
    for key, values in maps.values.items():
        if isinstance(key, tuple):
            lesions.setdefault(key[0], {})[key[1]] = of_pairs(values)
    for name, of_lesions in lesions.items():
        of_lesions["iou"]["thresholds"] = maps.thresholds[name, "iou"]
    precision = measure(precisions)
    error, sums = _calibration_error(probabilities, test.labels, times)
    plug_in = np.where(present, calibration_error_of_bins(*sums).plug_in, np.nan)
    residuals = test.residuals
    return {
        "volumes": len(test.labels),
        "patients": int(numbers.max()) + 1,
        "grid": None if test.prior is None else list(test.prior.shape[1:]),
        "positives": dict(zip(labels, test.labels.sum(0).tolist(), strict=True)),
        "positive_patients": dict(zip(labels, positive_patients.tolist(), strict=True)),
        "auroc": {**measure(aurocs), "delong": _delong(labels, test, numbers)},
        "average_precision": _cut(precision),
        "calibration": {
            "bins": BINS,
            "expected_calibration_error": {
                **_from_chance(_cut(measure(error)), of_present(error).in_mean, sums),
                "plug_in": dict(zip(labels, map(null, plug_in), strict=True)),
            },
            "brier": of_values((probabilities - test.labels) ** 2),
            "reliability": _reliability(labels, probabilities, test.labels),
        },
        "organ_iou": {name: of_map(name) for name in test.organ_iou},
        "lesions": lesions or None,
        "completeness": residuals
        if residuals is None
        else {"mean": float(residuals.mean()), "worst": float(residuals.max())},
    }


def _by_region(
    values: np.ndarray,
    findings: np.ndarray,
    regions: Sequence[str],
    times: np.ndarray,
    numbers: np.ndarray,
) -> dict[str, Any]:
    """Means over the pairs of volume and label whose finding is in a region."""
    counts = (findings > 0) * ~np.isnan(values)[..., None]
    sums = (counts * np.nan_to_num(values)[..., None]).sum(1)
    counts = counts.sum(1).astype(float)
    found = intervals(resampled_means(sums, times, numbers, counts))
    pairs = counts.sum(0).astype(int).tolist()
    named = zip(regions, found, pairs, strict=True)
    return {region: {**interval, "pairs": count} for region, interval, count in named}


def _calibration_error(
    probabilities: np.ndarray, truth: np.ndarray, times: np.ndarray
) -> tuple[Resampled, list[np.ndarray]]:
    """The debiased expected calibration error, and the sums of the bins [K, M]. Sums over the drawn
    volumes are products of matrices; the resamples are turned around, for a basic interval."""
    num_labels = truth.shape[1]
    in_bin_NKM = bin_of(probabilities, BINS)[..., None] == np.arange(BINS)
    weights = np.ones(truth.shape), probabilities, truth
    columns = [(in_bin_NKM * w[..., None]).reshape(len(truth), -1) for w in weights]

    def sums(t: np.ndarray) -> list[np.ndarray]:
        return [(c.T @ t).reshape(num_labels, BINS, -1).swapaxes(1, 2) for c in columns]

    of_all = sums(np.ones((len(truth), 1)))
    found = calibration_error_of_bins(*of_all)
    drawn = calibration_error_of_bins(*sums(times.astype(float)))
    around = found.debiased + found.plug_in - drawn.debiased
    groups = np.full(num_labels, len(truth))
    return Resampled(found.debiased[:, 0], around, groups), [part[:, 0] for part in of_all]


def _from_chance(
    measure: dict[str, Any], in_mean: np.ndarray, sums: Sequence[np.ndarray]
) -> dict[str, Any]:
    """With intervals from 0 where the error is `calibration_error_within_chance`."""

    def from_chance(interval: dict[str, float | None], chosen: Any) -> dict[str, float | None]:
        if interval["low"] and calibration_error_within_chance(*(part[chosen] for part in sums)):
            return {**interval, "low": 0.0}
        return interval

    named = enumerate(measure["labels"].items())
    of_labels = {label: from_chance(interval, [k]) for k, (label, interval) in named}
    return {**measure, "mean": from_chance(measure["mean"], in_mean), "labels": of_labels}


def _cut(measure: dict[str, Any]) -> dict[str, Any]:
    """With all figures in [0, 1]: a debiased error can be a little below 0, and an interval that is
    moved for its bias can end outside."""
    of_labels = {label: within_unit(interval) for label, interval in measure["labels"].items()}
    return {**measure, "mean": within_unit(measure["mean"]), "labels": of_labels}


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
    found = {}
    for k, label in enumerate(labels):
        one = delong(test.logits[None, :, k], test.labels[:, k], groups)
        (low,), (high,) = one.interval()
        error = float(np.sqrt(one.covariance[0, 0]))
        if min(one.positives, one.negatives) < MIN_GROUPS:
            low = high = np.nan
        found[label] = {"low": null(low), "high": null(high), "standard_error": null(error)}
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
            "probability": [null(p) for p in table.probability],
            "frequency": [null(f) for f in table.frequency],
        }
        for label, table in tables.items()
    }


def _dice(iou: np.ndarray) -> np.ndarray:
    return 2 * iou / (1 + iou)
