"""Measures, one file a question; they import nothing of the rest of the package.

predictions.py    are the predictions right? AUROC with DeLong's variance, average precision
calibration.py    are their probabilities?
intervals.py      how sure is that? the bootstrap, by patient
masks.py          does a map lie where it should? OrganIoU (read this first), IoU, Dice, pointing
faithfulness.py   does the model use what the map shows? insertion and deletion, ROAD
sanity.py         does the map depend on the model, and come out again? randomisation, similarity
baselines.py      maps that no model made

What is not defined (a label without positives, an empty mask, a map that is NaN) is NaN: missing,
and never 0.
"""

from hirescam_jax.metrics.baselines import centre_blob, organ_prior, random_maps
from hirescam_jax.metrics.calibration import (
    CalibrationError,
    Reliability,
    bin_of,
    brier_score,
    calibration_error_of_bins,
    calibration_error_within_chance,
    calibration_interval,
    expected_calibration_error,
    reliability,
)
from hirescam_jax.metrics.faithfulness import (
    Curve,
    Road,
    blur,
    deletion,
    insertion,
    linear_imputation,
    road,
)
from hirescam_jax.metrics.intervals import bootstrap
from hirescam_jax.metrics.masks import (
    ORGAN_IOU_THRESHOLDS,
    Overlap,
    best_threshold,
    energy_inside,
    map_average_precision,
    organ_iou,
    otsu_threshold,
    overlap,
    pointing_game,
    rank_accuracy,
)
from hirescam_jax.metrics.predictions import (
    DeLong,
    PairedTest,
    auroc,
    average_precision,
    delong,
    delong_test,
    nan_mean,
)
from hirescam_jax.metrics.sanity import (
    Similarity,
    cascading_randomization,
    layer_order,
    repeatability,
    similarity,
    spearman,
    ssim,
)

__all__ = [
    "ORGAN_IOU_THRESHOLDS",
    "CalibrationError",
    "Curve",
    "DeLong",
    "Overlap",
    "PairedTest",
    "Reliability",
    "Road",
    "Similarity",
    "auroc",
    "average_precision",
    "best_threshold",
    "bin_of",
    "blur",
    "bootstrap",
    "brier_score",
    "calibration_error_of_bins",
    "calibration_error_within_chance",
    "calibration_interval",
    "cascading_randomization",
    "centre_blob",
    "deletion",
    "delong",
    "delong_test",
    "energy_inside",
    "expected_calibration_error",
    "insertion",
    "layer_order",
    "linear_imputation",
    "map_average_precision",
    "nan_mean",
    "organ_iou",
    "organ_prior",
    "otsu_threshold",
    "overlap",
    "pointing_game",
    "random_maps",
    "rank_accuracy",
    "reliability",
    "repeatability",
    "road",
    "similarity",
    "spearman",
    "ssim",
]
