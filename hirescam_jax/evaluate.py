"""Evaluation: how well a run predicts (AUROC, average precision) and where it looks (OrganIoU)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from hirescam_jax import sharding
from hirescam_jax.cam import METHODS, OVER_GRID, normalize_map
from hirescam_jax.checkpoint import Run
from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import Source, eval_batches
from hirescam_jax.errors import UserError
from hirescam_jax.losses import allowed_of, labels_of
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    auroc,
    average_precision,
    bootstrap,
    nan_mean,
    organ_iou,
)
from hirescam_jax.progress import progress
from hirescam_jax.sharding import DATA, DEPTH, Layout
from hirescam_jax.step import open_layout

EVALUATED = ("hirescam", "gradcam")  # of `METHODS`


class Predictions(NamedTuple):
    """A split's scores, truth and, by method, OrganIoU at every threshold (NaN: label absent)."""

    logits: Float[np.ndarray, "N K"]
    labels: Bool[np.ndarray, "N K"]
    organ_iou: dict[str, Float[np.ndarray, "N K T"]]


def predict_step(
    variables: Any, batch: dict[str, Array], *, config: Config, layout: Layout
) -> dict[str, Any]:
    """Logits, labels and OrganIoU of both map methods for a batch, in one program; of none for a
    model whose maps have no slices (CTNet)."""
    methods = tuple(METHODS) if config.model.depth_unit is not None else ()
    options: Any = {"config": config, "layout": layout, "methods": methods}
    logits, maps = explain_step(variables, batch["volume"], **options)
    regions = batch["regions"][:, :, : layout.cells]
    allowed = allowed_of(batch["findings"], regions)
    return {
        "logits": logits,
        "labels": labels_of(batch["findings"]),
        "organ_iou": {
            name: organ_iou(normalize_map(map_BKdhw), allowed, ORGAN_IOU_THRESHOLDS)
            for name, map_BKdhw in maps.items()
        },
    }


def explain_step(
    variables: Any,
    volume: Array,
    *,
    config: Config,
    layout: Layout,
    methods: Sequence[str] = EVALUATED,
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
            if name in OVER_GRID and sharding.split_axes(DEPTH):
                options = {"axis_name": DEPTH, "positions": math.prod(layout.grid)}
            maps[name] = METHODS[name](head, features, labels, **options)
        return head(features), maps

    specs = (sharding.WHOLE, sharding.SPECS["volume"]), (PartitionSpec(DATA), sharding.MAPS)
    logits, maps = sharding.split(part, layout.mesh, *specs)(variables, volume)
    return logits, {name: map_BKdhw[:, :, : layout.cells] for name, map_BKdhw in maps.items()}


def predict(run: Run, source: Source, title: str = "evaluate") -> Predictions:
    """Runs a model over a split, on all devices of all processes; each gets the whole result."""
    config = run.config
    layout = open_layout(config, tuple(source.shape), evaluation=True)
    everywhere = sharding.replicated(layout.mesh)
    variables = sharding.replicate(run.variables, layout.mesh)
    program = partial(predict_step, config=config, layout=layout)
    step = jax.jit(program, out_shardings=everywhere, compiler_options=compiler_options())
    results = []
    steps = range(-(-len(source) // layout.batch_size))
    batches = eval_batches(source, layout.share, workers=config.workers)
    for _ in progress(steps, title, "batch"):
        results.append(jax.device_get(step(variables, layout.to_devices(next(batches)))))
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *results)
    present = whole["labels"][..., None]
    iou = {n: np.where(present, value, np.nan) for n, value in whole["organ_iou"].items()}
    return Predictions(whole["logits"], whole["labels"], iou)


def choose_thresholds(validation: Predictions) -> dict[str, np.ndarray]:
    """Per method and label the index of the threshold with the best mean OrganIoU; the first where
    the label never occurs."""
    chosen = {}
    for name, iou_NKT in validation.organ_iou.items():
        mean_KT = nan_mean(iou_NKT, axis=0)
        chosen[name] = np.argmax(np.where(np.isnan(mean_KT), -1, mean_KT), axis=-1)
    return chosen


def evaluate(
    labels: tuple[str, ...],
    validation: Predictions,
    test: Predictions,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of a test split, with 95 % bootstrap intervals over its volumes.

    OrganIoU is taken at the threshold that was best on the validation split, per label and
    method, over the volumes in which the label is truly present. A mean is over the labels for
    which the measure is defined; a label without positives (or negatives) is null.

    Returns:
        {"volumes", "auroc", "average_precision", "organ_iou": {method: ...}}, each measure as
        {"mean": interval, "labels": {label: interval}}, interval = {"value", "low", "high"}.
    """
    thresholds = choose_thresholds(validation)
    names = list(test.organ_iou)
    at_chosen = {
        name: np.take_along_axis(iou, thresholds[name][None, :, None], axis=2)[..., 0]
        for name, iou in test.organ_iou.items()
    }

    def statistic(cases_SN: np.ndarray) -> np.ndarray:
        scores = np.moveaxis(test.logits[cases_SN], 2, 1)
        truth = np.moveaxis(test.labels[cases_SN], 2, 1)
        per_label = [auroc(scores, truth), average_precision(scores, truth)]
        per_label += [nan_mean(at_chosen[name][cases_SN], axis=1) for name in names]
        values = np.stack(per_label, axis=1)  # [S, measure, K]
        return np.concatenate([nan_mean(values)[..., None], values], axis=-1)

    value, low, high = bootstrap(statistic, len(test.labels), resamples, seed)

    def measure(row: int) -> dict[str, Any]:
        columns = [
            {"value": _null(v), "low": _null(lo), "high": _null(hi)}
            for v, lo, hi in zip(value[row], low[row], high[row], strict=True)
        ]
        return {"mean": columns[0], "labels": dict(zip(labels, columns[1:], strict=True))}

    result: dict[str, Any] = {"volumes": len(test.labels)}
    result["auroc"], result["average_precision"] = measure(0), measure(1)
    result["organ_iou"] = {}
    for row, name in enumerate(names, start=2):
        chosen = {
            label: float(ORGAN_IOU_THRESHOLDS[t])
            for label, t in zip(labels, thresholds[name], strict=True)
        }
        result["organ_iou"][name] = {**measure(row), "thresholds": chosen}
    return result


def evaluate_run(run: Run, validation: Source, test: Source) -> dict[str, Any]:
    """`evaluate` of a run on two opened splits.

    Raises:
        UserError: the data's labels are not those of the run.
    """
    for source in (validation, test):
        if tuple(source.labels) != run.labels:
            raise UserError(f"{run.path}: trained on labels {run.labels}, data has {source.labels}")
    return evaluate(
        run.labels, predict(run, validation, "validation split"), predict(run, test, "test split")
    )


def table(result: dict[str, Any]) -> str:
    """An evaluation as lines of text, a label a row."""
    columns = {
        "AUROC": result["auroc"],
        "AP": result["average_precision"],
        **{f"OrganIoU {name}": value for name, value in result["organ_iou"].items()},
    }
    rows = [["", *columns], ["mean", *(interval_text(c["mean"]) for c in columns.values())]]
    for label in result["auroc"]["labels"]:
        rows.append([label, *(interval_text(c["labels"][label]) for c in columns.values())])
    return aligned(rows)


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
