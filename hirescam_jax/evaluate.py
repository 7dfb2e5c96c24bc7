"""Evaluation: how well a run predicts and where it looks, volume by volume, on all devices."""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from hirescam_jax import sharding
from hirescam_jax.cam import METHODS, normalize_map
from hirescam_jax.checkpoint import Run
from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import Source, eval_batches, patients_of
from hirescam_jax.errors import UserError
from hirescam_jax.losses import allowed_of, labels_of
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    centre_blob,
    energy_inside,
    map_average_precision,
    organ_iou,
    organ_prior,
    otsu_threshold,
    overlap,
    pointing_game,
    random_maps,
    rank_accuracy,
)
from hirescam_jax.progress import progress
from hirescam_jax.sharding import DATA, DEPTH, Layout
from hirescam_jax.step import open_layout
from hirescam_jax.summary import (
    Predictions,
    aligned,
    choose_thresholds,
    evaluate,
    interval_text,
    table,
)

__all__ = [
    "Predictions",
    "aligned",
    "choose_thresholds",
    "evaluate",
    "evaluate_run",
    "explain_step",
    "interval_text",
    "predict",
    "table",
]

BASELINE_CELLS = 2**25  # of all labels' maps that the baselines hold at once


def predict_step(
    variables: Any, batch: dict[str, Array], *, config: Config, layout: Layout
) -> dict[str, Any]:
    """Logits, labels, masks, and the measures of both map methods for a batch, in one program."""
    logits, maps = explain_step(variables, batch["volume"], config=config, layout=layout)
    masks = {n: batch[n][:, :, : layout.cells] for n in ("regions", "lesions") if n in batch}
    allowed = allowed_of(batch["findings"], masks["regions"])
    return {
        "logits": logits,
        "labels": labels_of(batch["findings"]),
        "findings": batch["findings"],
        "masks": masks,
        "measures": {n: map_measures(m, allowed, masks.get("lesions")) for n, m in maps.items()},
    }


def map_measures(maps: Array, allowed: Array, lesions: Array | None) -> dict[str, Array]:
    """OrganIoU [B, K, T] of raw maps; where there are lesions also IoU with them at the same
    thresholds and at Otsu's, and where the evidence lies, [B, K]."""
    shown = normalize_map(maps)
    measures = {"organ_iou": organ_iou(shown, allowed, ORGAN_IOU_THRESHOLDS)}
    if lesions is not None:
        measures |= {
            "iou": overlap(shown, lesions, ORGAN_IOU_THRESHOLDS).iou,
            "otsu_iou": overlap(shown, lesions, otsu_threshold(shown)[..., None]).iou[..., 0],
            "pointing": pointing_game(maps, lesions),
            "energy": energy_inside(maps, lesions),
            "rank_accuracy": rank_accuracy(maps, lesions),
            "average_precision": map_average_precision(maps, lesions),
        }
    return measures


@jax.jit
def baseline_step(
    prior: Any, findings: Any, regions: Any, lesions: Any, index: Any
) -> dict[str, dict[str, Array]]:
    """`map_measures` of maps that no model made."""
    allowed = allowed_of(findings, regions)
    measured = {
        name: map_measures(maps, allowed, lesions)
        for name, maps in baseline_maps(jnp.nan_to_num(prior), index).items()
    }
    known = ~jnp.isnan(prior).any(axis=tuple(range(1, prior.ndim)))

    def of_known(value: Array) -> Array:
        return jnp.where(known.reshape(-1, *[1] * (value.ndim - 2)), value, jnp.nan)

    return {**measured, "organ_prior": jax.tree.map(of_known, measured["organ_prior"])}


def baseline_maps(prior: Array, index: Array | np.ndarray) -> dict[str, Array]:
    """Maps [B, K, d, h, w] for the volumes of these numbers [B] in their split."""
    shape = (len(index), *prior.shape)
    return {
        "organ_prior": jnp.broadcast_to(prior, shape),
        "centre_blob": centre_blob(shape),
        "random": random_maps(shape, index=index),
    }


def explain_step(
    variables: Any,
    volume: Array,
    *,
    config: Config,
    layout: Layout,
    methods: Sequence[str] = tuple(METHODS),
    labels: Sequence[int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Logits [B, K] and raw signed maps [B, K, d, h, w] of int16 volumes [B, D, H, W] that lie on a
    mesh; each device explains its own volumes and slices. With `labels`, maps of those only."""
    model: Any = config.model

    def part(variables: Any, volume: Array) -> tuple[Array, dict[str, Array]]:
        volume, cells = config.preprocess.normalize(volume), layout.cells
        features = model.apply(variables, volume, False, cells, method="features")

        def head(features):
            return model.apply(variables, features, False, cells, method="head")

        maps = {}
        for name in methods:
            options = {}
            if name == "gradcam" and sharding.split_axes(DEPTH):  # it averages over the whole grid
                options = {"axis_name": DEPTH, "positions": math.prod(layout.grid)}
            maps[name] = METHODS[name](head, features, labels, **options)
        return head(features), maps

    specs = (sharding.WHOLE, sharding.SPECS["volume"]), (PartitionSpec(DATA), sharding.MAPS)
    logits, maps = sharding.split(part, layout.mesh, *specs)(variables, volume)
    return logits, {name: map_BKdhw[:, :, : layout.cells] for name, map_BKdhw in maps.items()}


@cache
def _predict_program(config: Config, layout: Layout) -> Any:
    program = partial(predict_step, config=config, layout=layout)
    everywhere = sharding.replicated(layout.mesh)
    return jax.jit(program, out_shardings=everywhere, compiler_options=compiler_options())


def predict(
    run: Run, source: Source, title: str = "evaluate", prior: np.ndarray | None = None
) -> Predictions:
    """Runs a model over a split, on all devices of all processes; each gets the whole result.

    Args:
        prior: the organ prior [K, d, h, w] of another split to measure (`Predictions.prior`); by
            default this split's own.
    """
    config = run.config
    layout = open_layout(config, tuple(source.shape), evaluation=True)
    variables = sharding.replicate(run.variables, layout.mesh)
    step = _predict_program(config, layout)
    results = []
    steps = range(-(-len(source) // layout.batch_size))
    batches = eval_batches(source, layout.share, workers=config.workers)
    for _ in progress(steps, title, "batch"):
        result = jax.device_get(step(variables, layout.to_devices(next(batches))))
        # The baselines need the masks of the whole split: bits.
        packed = {n: np.packbits(m.reshape(len(m), -1), 1) for n, m in result["masks"].items()}
        results.append({**result, "masks": packed})
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *results)
    labels, findings = whole["labels"], whole["findings"]

    def masks(name: str, numbers: np.ndarray) -> np.ndarray:
        shape = (len(source.regions if name == "regions" else source.labels), *layout.grid)
        bits = np.unpackbits(whole["masks"][name][numbers], axis=1, count=math.prod(shape))
        return bits.reshape(-1, *shape)

    size = max(1, min(64, BASELINE_CELLS // (len(source.labels) * math.prod(layout.grid))))
    chunks = np.split(np.arange(len(source)), range(size, len(source), size))
    if prior is None:
        prior = organ_prior(_allowed(findings[some], masks("regions", some)) for some in chunks)
    baselines = []
    for some in chunks:
        filled = np.resize(some, size)  # one shape, one program
        lesions = masks("lesions", filled) if "lesions" in whole["masks"] else None
        measures = baseline_step(prior, findings[filled], masks("regions", filled), lesions, filled)
        baselines.append(jax.tree.map(np.asarray, measures))
    baselines = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *baselines)

    def of_present(value: np.ndarray) -> np.ndarray:
        return np.where(labels.reshape(*labels.shape, *[1] * (value.ndim - 2)), value, np.nan)

    measures = jax.tree.map(of_present, {**whole["measures"], **baselines})
    iou = {name: of_map.pop("organ_iou") for name, of_map in measures.items()}
    lesions = measures if "lesions" in whole["masks"] else {}
    return Predictions(whole["logits"], labels, iou, lesions, findings, prior)


def _allowed(findings: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """`allowed_of` by NumPy: chunks of any size, not compiled for each."""
    flat = regions.reshape(*regions.shape[:2], -1).astype(np.float32)
    allowed = (findings > 0).astype(np.float32) @ flat > 0
    return allowed.reshape(*findings.shape[:2], *regions.shape[2:])


def evaluate_run(
    run: Run, validation: Source, test: Source, *, faithfulness: int = 0, sanity: int = 0
) -> dict[str, Any]:
    """`evaluate` of a run on two opened splits.

    Args:
        faithfulness, sanity: do these checks (`hirescam_jax.evaluate_checks`) on so many test
            volumes.

    Raises:
        UserError: the data's labels are not those of the run, or checks on more volumes than the
            test split has.
    """
    for source in (validation, test):
        if tuple(source.labels) != run.labels:
            raise UserError(f"{run.path}: trained on labels {run.labels}, data has {source.labels}")
    for name, number in (("faithfulness", faithfulness), ("sanity", sanity)):
        if not 0 <= number <= len(test):
            raise UserError(
                f"--{name} {number}: the test split has {len(test)} volumes: give at most as many"
            )
    on_validation = predict(run, validation, "validation split")
    on_test = predict(run, test, "test split", on_validation.prior)
    result = evaluate(
        run.labels,
        on_validation,
        on_test,
        regions=run.header.regions,
        patients=patients_of(test),
    )
    if faithfulness or sanity:
        from hirescam_jax import evaluate_checks

        if faithfulness:
            prior = np.asarray(on_validation.prior)
            result["faithfulness"] = evaluate_checks.faithfulness(run, test, prior, faithfulness)
        if sanity:
            result["sanity"] = evaluate_checks.sanity(run, test, sanity)
    return result
