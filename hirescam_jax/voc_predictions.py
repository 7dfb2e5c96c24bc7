"""How well a network tells which classes photos show."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from hirescam_jax.data.voc import VOID
from hirescam_jax.resampling import draws, intervals, mean_of, resampled_ranks, within_unit

RESAMPLES = 1000


def prediction_scores(
    logits: Float[np.ndarray, "N K"], labels: UInt8[np.ndarray, "N K"]
) -> dict[str, Any]:
    """Means over classes of average precision and AUROC, with 95 % bootstrap intervals over photos
    (`hirescam_jax.resampling`).

    A mean is over the classes in two photos and more (and, for AUROC, not in two), the same ones in
    all resamples. A label of 255 is left out.

    Returns:
        {"average_precision", "auroc": {"value", "low", "high", and "classes" in the mean}}.
    """
    photos = np.arange(len(labels))
    measures = resampled_ranks(
        logits, labels == 1, draws(photos, RESAMPLES, 0), photos, labels == VOID
    )
    found = {}
    for name, measure in zip(("auroc", "average_precision"), measures, strict=True):
        (interval,) = intervals(mean_of(measure, measure.in_mean))
        found[name] = {**within_unit(interval), "classes": int(measure.in_mean.sum())}
    return found
