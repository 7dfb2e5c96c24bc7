"""From the measures of each volume to what is reported: thresholds, means, intervals, tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    auroc,
    average_precision,
    best_threshold,
    bin_of,
    bootstrap,
    delong,
    nan_mean,
    reliability,
)

BINS = 10  # of equal width, for the calibration

# As tables call them. The first two are maps of the model.
MAP_NAMES = {
    "hirescam": "HiResCAM",
    "gradcam": "Grad-CAM",
    "organ_prior": "organ prior",
    "centre_blob": "centre blob",
    "random": "random map",
}
LESION_MEASURES = {
    "iou": "IoU",
    "dice": "Dice",
    "otsu_iou": "IoU (Otsu)",
    "pointing": "pointing",
    "energy": "energy",
    "rank_accuracy": "ranks",
    "average_precision": "AP",
}


class Predictions(NamedTuple):
    """What is measured of each volume and label of a split; NaN where it is not defined.

    organ_iou: by method and baseline, at every threshold, of present labels.
    lesions: by method and baseline, then by measure: "iou" [N, K, T], the others [N, K]; None
        where the data has no lesions.
    findings: [N, K, R], label k found in region r.
    prior: [K, d, h, w], the organ prior that was measured, NaN for labels without one.
    """

    logits: Float[np.ndarray, "N K"]
    labels: Bool[np.ndarray, "N K"]
    organ_iou: dict[str, Float[np.ndarray, "N K T"]]
    lesions: dict[str, dict[str, np.ndarray]] | None = None
    findings: np.ndarray | None = None
    prior: np.ndarray | None = None


def choose_thresholds(validation: Predictions) -> dict[str, np.ndarray]:
    """Per method and label the index of the threshold with the best mean OrganIoU; -1 where the
    validation split has no map of the label to measure."""
    return {name: _best(iou_NKT) for name, iou_NKT in validation.organ_iou.items()}


def _best(scores_NKT: np.ndarray) -> np.ndarray:
    return np.nan_to_num(best_threshold(scores_NKT), nan=-1).astype(int)


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
    present. What is not defined is null (a label without positives: all of its measures; one
    without negatives: AUROC), and left out of means, which say over how many labels they are.

    Args:
        regions: names of the findings' regions, for the breakdown by organ.
        patients: of each test volume; all volumes of a patient are drawn together. By default each
            volume stands alone.

    Returns:
        A tree for JSON. An *interval* is {"value", "low", "high"}, each a number or null. A
        *measure* is {"mean": interval, "defined": number of labels in the mean, "labels": {label:
        interval}} with one entry for every label.

        "volumes": of the test split. "patients": how many were resampled.
        "auroc": a measure, and "delong": {label: {"low", "high", "standard_error"}}: intervals by
            DeLong's variance, which takes volumes as independent.
        "average_precision": a measure.
        "calibration": {"bins": M, "expected_calibration_error": measure, "brier": measure,
            "reliability": {label: {"count", "probability", "frequency"}}}: lists of M bins of equal
            width over [0, 1], null in empty bins.
        "organ_iou": {method: a measure, and "thresholds": {label: number}, and "regions": {region:
            interval and "pairs"}}: by the region in which the finding is, over so many pairs of
            volume and label; {} without `regions`. Methods: "hirescam" and "gradcam", then the
            baselines "organ_prior", "centre_blob", "random" (`hirescam_jax.metrics.baselines`).
        "lesions": null where the data has none, else {method: {"iou", "dice", "otsu_iou",
            "otsu_dice", "pointing", "energy", "rank_accuracy", "average_precision"}}: measures
            against the lesions on the feature grid. "iou" has its own "thresholds", which "dice"
            shares; it is a mean over volumes of each one's own.

        `hirescam evaluate` puts "step" before, and behind where asked for "faithfulness" and
        "sanity" (`hirescam_jax.evaluate_checks`).

    Raises:
        ValueError: patients of another length.
    """
    count, num_labels = test.labels.shape
    lesions = {} if test.lesions is None or validation.lesions is None else test.lesions
    if patients is not None and len(patients) != count:
        raise ValueError(f"patients has {len(patients)} entries for {count} volumes: give one each")
    probabilities = expit(test.logits.astype(np.float64))
    residual_NK = probabilities - test.labels
    without = np.where(test.labels.any(axis=0), 0.0, np.nan)  # added: null without positives
    rows: dict[Any, np.ndarray] = {"brier": residual_NK**2 + without}
    thresholds: dict[Any, dict[str, float | None]] = {}

    def at_best(key: Any, on_validation: np.ndarray, on_test: np.ndarray) -> np.ndarray:
        chosen = _best(on_validation)
        values = np.where(chosen >= 0, ORGAN_IOU_THRESHOLDS[chosen], np.nan)
        thresholds[key] = dict(zip(labels, map(_null, values), strict=True))
        on_test = np.take_along_axis(on_test, chosen[None, :, None], axis=2)[..., 0]
        return np.where(chosen >= 0, on_test, np.nan)

    for name, iou_NKT in test.organ_iou.items():
        rows[name] = at_best(name, validation.organ_iou[name], iou_NKT)
    for name, of_map in lesions.items():
        known = (validation.lesions or {})[name]["iou"]
        iou = at_best((name, "iou"), known, of_map["iou"])
        dice = {"dice": _dice(iou), "otsu_dice": _dice(of_map["otsu_iou"])}
        rows |= {(name, key): v for key, v in {**of_map, "iou": iou, **dice}.items()}

    sums = [np.nan_to_num(value) for value in rows.values()]
    numbers = [(~np.isnan(value)).astype(float) for value in rows.values()]
    if test.findings is not None:  # pairs of volume and label, by region
        found_NKR = (test.findings > 0).astype(float)
        for name in test.organ_iou:
            defined = found_NKR * ~np.isnan(rows[name])[..., None]
            numbers.append(defined.sum(1))
            sums.append((defined * np.nan_to_num(rows[name])[..., None]).sum(1))
    sums, numbers = np.concatenate(sums, axis=1), np.concatenate(numbers, axis=1)
    in_bin_NKM = bin_of(probabilities, BINS)[..., None] == np.arange(BINS)
    gaps = (residual_NK[..., None] * in_bin_NKM).reshape(count, -1)
    ranked = ["auroc", "average_precision", "expected_calibration_error"]
    order = [*ranked, *rows]

    def statistic(cases_SN: np.ndarray) -> np.ndarray:
        scores = np.moveaxis(test.logits[cases_SN], 2, 1)
        truth = np.moveaxis(test.labels[cases_SN], 2, 1)
        # How often each volume was drawn: means over the drawn ones are products of matrices.
        draws = len(cases_SN)
        places = cases_SN + count * np.arange(draws)[:, None]
        times_SN = np.bincount(places.reshape(-1), minlength=draws * count).reshape(draws, count)
        times_SN = times_SN.astype(float)
        number = times_SN @ numbers
        means = np.where(number > 0, times_SN @ sums / np.maximum(number, 1), np.nan)
        gap = np.abs(times_SN @ gaps).reshape(draws, num_labels, BINS).sum(-1)
        error = gap / times_SN.sum(1, keepdims=True) + without
        parts = [auroc(scores, truth), average_precision(scores, truth), error, means]
        columns = np.concatenate(parts, axis=1)
        of_labels = columns[:, : len(order) * num_labels].reshape(draws, -1, num_labels)
        return np.concatenate([nan_mean(of_labels), columns], axis=1)

    value, low, high = bootstrap(statistic, count, resamples, seed, groups=patients)
    intervals = [
        {"value": _null(v), "low": _null(lo), "high": _null(hi)}
        for v, lo, hi in zip(value, low, high, strict=True)
    ]
    means, columns = intervals[: len(order)], intervals[len(order) :]

    def measure(key: Any) -> dict[str, Any]:
        row = order.index(key)
        of_labels = columns[row * num_labels : (row + 1) * num_labels]
        return {
            "mean": means[row],
            "defined": sum(interval["value"] is not None for interval in of_labels),
            "labels": dict(zip(labels, of_labels, strict=True)),
        }

    result: dict[str, Any] = {
        "volumes": count,
        "patients": count if patients is None else len(set(patients)),
        "auroc": {**measure("auroc"), "delong": _delong(labels, test)},
        "average_precision": measure("average_precision"),
        "calibration": {
            "bins": BINS,
            "expected_calibration_error": measure("expected_calibration_error"),
            "brier": measure("brier"),
            "reliability": _reliability(labels, probabilities, test.labels),
        },
        "organ_iou": {
            name: {**measure(name), "thresholds": thresholds[name], "regions": {}}
            for name in test.organ_iou
        },
        "lesions": {
            name: {key: measure((name, key)) for key in [*of_map, "dice", "otsu_dice"]}
            for name, of_map in lesions.items()
        }
        or None,
    }
    for name in lesions:
        result["lesions"][name]["iou"]["thresholds"] = thresholds[name, "iou"]
    if test.findings is not None and regions:
        of_regions = iter(columns[len(order) * num_labels :])
        pairs = numbers[:, len(rows) * num_labels :].sum(0).astype(int).tolist()
        for name in test.organ_iou:
            result["organ_iou"][name]["regions"] = {
                region: {**next(of_regions), "pairs": pairs.pop(0)} for region in regions
            }
    return result


def _delong(labels: Sequence[str], test: Predictions) -> dict[str, dict[str, float | None]]:
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


def table(result: dict[str, Any]) -> str:
    """An evaluation as text: a label a row; a map a row; an organ a row."""
    parts = [label_table(result)]
    if result["organ_iou"]:
        parts.append(map_table(result))
    if any(of_map["regions"] for of_map in result["organ_iou"].values()):
        parts.append(region_table(result))
    calibration = result["calibration"]
    error, brier = (calibration[n]["mean"] for n in ("expected_calibration_error", "brier"))
    parts.append(
        f"Calibration: expected error {interval_text(error)} in {calibration['bins']} bins, "
        f"Brier score {interval_text(brier)}\nIn brackets: 95 % bootstrap intervals over "
        f"{result['patients']} patients ({result['volumes']} volumes)"
    )
    return "\n\n".join(parts)


def label_table(result: dict[str, Any]) -> str:
    """AUROC, average precision and OrganIoU of the model's maps, a label a row."""
    columns = {"AUROC": result["auroc"], "AP": result["average_precision"]}
    for name, of_map in result["organ_iou"].items():
        if name in ("hirescam", "gradcam"):
            columns[f"OrganIoU {name}"] = of_map
    labels = result["auroc"]["labels"]
    rows = [["", *columns]]
    rows.append([_mean_of(columns.values()), *(interval_text(c["mean"]) for c in columns.values())])
    if len({c["defined"] for c in columns.values()}) > 1:
        of = [f"{c['defined']} of {len(labels)} labels" for c in columns.values()]
        rows.append(["of", *of])
    for label in labels:
        rows.append([label, *(interval_text(c["labels"][label]) for c in columns.values())])
    return aligned(rows)


def map_table(result: dict[str, Any]) -> str:
    """Means over the labels, a map a row: those of the model, then those that no model made."""
    lesions = result["lesions"]
    rows = [["maps, means over labels", "OrganIoU"]]
    if lesions:
        rows[0] += [f"lesions: {next(iter(LESION_MEASURES.values()))}"]
        rows[0] += list(LESION_MEASURES.values())[1:]
    for name, of_map in _ordered(result["organ_iou"]):
        title = map_name(name)
        missing = len(of_map["labels"]) - of_map["defined"]
        if missing:
            title += f" ({of_map['defined']} of {len(of_map['labels'])} labels)"
        row = [title, interval_text(of_map["mean"])]
        if lesions:
            means = (lesions[name][key]["mean"]["value"] for key in LESION_MEASURES)
            row += ["n/a" if mean is None else f"{mean:.3f}" for mean in means]
        rows.append(row)
    return aligned(rows)


def region_table(result: dict[str, Any]) -> str:
    """OrganIoU by the organ in which the finding is."""
    maps = _ordered(result["organ_iou"])
    shown = {name: of_map["regions"] for name, of_map in maps if of_map["regions"]}
    rows = [["OrganIoU by organ", "pairs", *(map_name(name) for name in shown)]]
    for region, first in next(iter(shown.values())).items():
        cells = [interval_text(of_map[region]) for of_map in shown.values()]
        rows.append([region, str(first["pairs"]), *cells])
    return aligned(rows)


def _ordered(maps: dict[str, Any]) -> list[tuple[str, Any]]:
    """The model's maps, then those that no model made."""
    order = [*MAP_NAMES]
    return sorted(maps.items(), key=lambda item: order.index(item[0]))


def _mean_of(measures: Any) -> str:
    """ "mean of 9 of 10 labels", or "mean" where all count, or not the same of each measure."""
    counts = {(m["defined"], len(m["labels"])) for m in measures}
    defined, total = next(iter(counts))
    return (
        f"mean of {defined} of {total} labels" if len(counts) == 1 and defined < total else "mean"
    )


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as a table: a rule below the first, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def interval_text(interval: dict[str, float | None]) -> str:
    """ "0.812 [0.790, 0.833]", or "n/a" where the measure is not defined."""
    if interval["value"] is None:
        return "n/a"
    if interval["low"] is None:
        return f"{interval['value']:.3f}"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def map_name(name: str) -> str:
    """As tables call it."""
    return MAP_NAMES.get(name) or name
