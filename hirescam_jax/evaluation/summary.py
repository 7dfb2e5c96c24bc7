"""From the measures of each volume to what is reported: thresholds, means, intervals."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from hirescam_jax.evaluation.result import (
    Calibration,
    CalibrationScores,
    Completeness,
    DeLongInterval,
    Evaluation,
    LabelScores,
    LesionScores,
    MapScores,
    OfPairs,
    RankScores,
    ReliabilityTable,
    Thresholds,
)
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    best_threshold,
    bin_of,
    calibration_error_of_bins,
    calibration_error_within_chance,
    delong,
    reliability,
)
from hirescam_jax.metrics.intervals import (
    MIN_GROUPS,
    Interval,
    Resampled,
    draws,
    group_numbers,
    groups_in,
    intervals,
    mean_of,
    null,
    resampled_means,
    resampled_ranks,
)

BINS = 10  # of equal width, for the calibration

Key = str | tuple[str, str]  # a method, for OrganIoU; or a method and a measure, against lesions


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

    thresholds: of OrganIoU and of "iou" against lesions, by label; None for a label without a
        measured map in the validation split.
    values: [N, K]; NaN where not defined.
    """

    thresholds: dict[Key, Thresholds]
    values: dict[Key, Float[np.ndarray, "N K"]]


def choose_thresholds(validation: Predictions) -> dict[str, np.ndarray]:
    """Per method and label the index of the threshold with the best mean OrganIoU; -1 where the
    validation split has no map of the label to measure."""
    return {name: _best(iou_NKT) for name, iou_NKT in validation.organ_iou.items()}


def named_thresholds(labels: Sequence[str], chosen: np.ndarray) -> Thresholds:
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

    def at_best(key: Key, chosen: np.ndarray, on_test: np.ndarray) -> np.ndarray:
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


def summarise(
    labels: tuple[str, ...],
    validation: Predictions,
    test: Predictions,
    resamples: int = 1000,
    seed: int = 0,
    *,
    regions: Sequence[str] = (),
    patients: Sequence[str] | None = None,
) -> Evaluation:
    """All measures of a test split, with 95 % bootstrap intervals over its patients.

    Maps are binarised at the threshold that was best on the validation split, per label and
    method, frozen for the test; measures of maps are over the volumes in which the label is truly
    present. What is not defined is None: of a label without positives all of its measures, of one
    without negatives AUROC, of one without a threshold OrganIoU.

    A mean is over the labels that are defined and have two positive patients (and, for AUROC, two
    negative ones). It is over the same labels in all resamples: in one that happens to have no
    positive of a label, the label keeps its value on all volumes.

    A label has an interval with five positive patients (and negative ones) and more, a mean where
    more than half of its labels have one. Those of fewer than ten are too narrow, and those of
    average precision are corrected for its bias, or left out where that is too large: how well they
    cover stands in `hirescam_jax.metrics.intervals`.

    Args:
        validation: may be `test` itself: then the measures of maps are in-sample.
        regions: names of the findings' regions, for the breakdown by organ.
        patients: of each test volume; all volumes of a patient are drawn together. By default each
            volume stands alone.

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

    def measure(found: Resampled) -> LabelScores:
        """Means and intervals of labels; of those alone that are present."""
        found = of_present(found)
        return LabelScores(
            mean=intervals(mean_of(found, found.in_mean))[0],
            defined=int(found.in_mean.sum()),
            labels=dict(zip(labels, intervals(found), strict=True)),
        )

    def of_values(values: np.ndarray) -> LabelScores:
        return measure(resampled_means(values, times, numbers))

    def of_map(key: Key) -> MapScores:
        values = maps.values[key]
        pairs = int((~np.isnan(values)).sum())
        undefined = int(test.labels.sum()) - pairs
        thresholds = maps.thresholds.get(key)
        scores = vars(of_values(values))
        return MapScores(**scores, pairs=pairs, undefined_pairs=undefined, thresholds=thresholds)

    def organ_iou(name: str) -> MapScores:
        organs = {}
        if test.findings is not None and regions:
            organs = _by_region(maps.values[name], test.findings, regions, times, numbers)
        return dataclasses.replace(of_map(name), regions=organs)

    aurocs, precisions = resampled_ranks(test.logits, test.labels, times, numbers)
    lesions: dict[str, dict[str, MapScores]] = {}
    for key in maps.values:
        if isinstance(key, tuple):
            lesions.setdefault(key[0], {})[key[1]] = of_map(key)
    precision = measure(precisions)
    error, sums = _calibration_error(probabilities, test.labels, times)
    plug_in = np.where(present, calibration_error_of_bins(*sums).plug_in, np.nan)
    errors = _from_chance(_cut(measure(error)), of_present(error).in_mean, sums)
    residuals = test.residuals
    return Evaluation(
        volumes=len(test.labels),
        patients=int(numbers.max()) + 1,
        grid=None if test.prior is None else test.prior.shape[1:],
        positives=dict(zip(labels, test.labels.sum(0).tolist(), strict=True)),
        positive_patients=dict(zip(labels, positive_patients.tolist(), strict=True)),
        auroc=RankScores(**vars(measure(aurocs)), delong=_delong(labels, test, numbers)),
        average_precision=_cut(precision),
        calibration=Calibration(
            bins=BINS,
            expected_calibration_error=CalibrationScores(
                **vars(errors), plug_in=dict(zip(labels, map(null, plug_in), strict=True))
            ),
            brier=of_values((probabilities - test.labels) ** 2),
            reliability=_reliability(labels, probabilities, test.labels),
        ),
        organ_iou={name: organ_iou(name) for name in test.organ_iou},
        lesions={name: LesionScores(**of) for name, of in lesions.items()} or None,
        completeness=None
        if residuals is None
        else Completeness(float(residuals.mean()), float(residuals.max())),
    )


def _by_region(
    values: np.ndarray,
    findings: np.ndarray,
    regions: Sequence[str],
    times: np.ndarray,
    numbers: np.ndarray,
) -> dict[str, OfPairs]:
    """Means over the pairs of volume and label whose finding is in a region."""
    counts = (findings > 0) * ~np.isnan(values)[..., None]
    sums = (counts * np.nan_to_num(values)[..., None]).sum(1)
    counts = counts.sum(1).astype(float)
    found = intervals(resampled_means(sums, times, numbers, counts))
    pairs = counts.sum(0).astype(int).tolist()
    named = zip(regions, found, pairs, strict=True)
    return {region: OfPairs(**vars(interval), pairs=count) for region, interval, count in named}


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
    measure: LabelScores, in_mean: np.ndarray, sums: Sequence[np.ndarray]
) -> LabelScores:
    """With intervals from 0 where the error is `calibration_error_within_chance`."""

    def from_chance(interval: Interval, chosen: np.ndarray | list[int]) -> Interval:
        if interval.low and calibration_error_within_chance(*(part[chosen] for part in sums)):
            return dataclasses.replace(interval, low=0.0)
        return interval

    named = enumerate(measure.labels.items())
    of_labels = {label: from_chance(interval, [k]) for k, (label, interval) in named}
    mean = from_chance(measure.mean, in_mean)
    return dataclasses.replace(measure, mean=mean, labels=of_labels)


def _cut(measure: LabelScores) -> LabelScores:
    """With all figures in [0, 1]: a debiased error can be a little below 0, and an interval that is
    moved for its bias can end outside."""
    of_labels = {label: interval.within_unit() for label, interval in measure.labels.items()}
    return dataclasses.replace(measure, mean=measure.mean.within_unit(), labels=of_labels)


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
) -> dict[str, DeLongInterval]:
    found = {}
    for k, label in enumerate(labels):
        one = delong(test.logits[None, :, k], test.labels[:, k], groups)
        (low,), (high,) = one.interval()
        error = float(np.sqrt(one.covariance[0, 0]))
        if min(one.positives, one.negatives) < MIN_GROUPS:
            low = high = np.nan
        found[label] = DeLongInterval(null(low), null(high), null(error))
    return found


def _reliability(
    labels: Sequence[str], probabilities: np.ndarray, truth: np.ndarray
) -> dict[str, ReliabilityTable]:
    found = {}
    for k, label in enumerate(labels):
        table = reliability(probabilities[:, k], truth[:, k], BINS)
        shares = (tuple(map(null, part)) for part in (table.probability, table.frequency))
        found[label] = ReliabilityTable(tuple(table.counts.tolist()), *shares)
    return found


def _dice(iou: np.ndarray) -> np.ndarray:
    return 2 * iou / (1 + iou)
