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
from hirescam_jax.cam import METHODS, OVER_GRID, normalize_map
from hirescam_jax.checkpoint import Run
from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import Source, eval_batches, patients_of
from hirescam_jax.errors import UserError
from hirescam_jax.kept import Kept
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

EVALUATED = ("hirescam", "gradcam")  # of `METHODS`

BASELINES = ("organ_prior", "centre_blob", "random")
CHUNK_CELLS = 2**25  # of masks that are held at once


def predict_step(
    variables: Any, batch: dict[str, Array], *, config: Config, layout: Layout
) -> dict[str, Any]:
    """Logits, labels and OrganIoU of both map methods for a batch, in one program; with what is
    needed to measure more afterwards: the masks, and the maps where there are lesions. Of a model
    whose maps have no slices (CTNet) there are no maps."""
    methods = EVALUATED if config.model.depth_unit is not None else ()
    options: Any = {"config": config, "layout": layout, "methods": methods}
    logits, maps = explain_step(variables, batch["volume"], **options)
    masks = {n: batch[n][:, :, : layout.cells] for n in ("regions", "lesions") if n in batch}
    allowed = allowed_of(batch["findings"], masks["regions"])
    return {
        "logits": logits,
        "labels": labels_of(batch["findings"]),
        "findings": batch["findings"],
        "organ_iou": {
            name: organ_iou(normalize_map(map_BKdhw), allowed, ORGAN_IOU_THRESHOLDS)
            for name, map_BKdhw in maps.items()
        },
        "masks": masks,
        "maps": maps if "lesions" in masks else {},
    }


def baseline_maps(
    prior: np.ndarray, index: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Maps that no model made, like `prior` [B, L, d, h, w], of volumes with these numbers [B] in
    their split and of labels [B, L]."""
    return {
        "organ_prior": prior.astype(np.float32),
        "centre_blob": centre_blob(prior.shape),
        "random": random_maps(prior.shape, index=index, labels=labels),
    }


@jax.jit
def pairs_step(findings: Any, regions: Any, lesions: Any, baselines: Any, maps: Any) -> Any:
    """What the model's pass did not measure, of P pairs of a volume and a label that it has.

    Args:
        findings: [P, 1, R]; regions: [P, R, d, h, w]; lesions: [P, 1, d, h, w] or None.
        baselines: [P, 3, d, h, w], NaN where one is missing; maps: [P, M, d, h, w], the model's.

    Returns:
        "organ_iou" [P, 3, T] of the baselines; with lesions also IoU with them [P, M + 3, T] at
        the same thresholds and [P, M + 3] at Otsu's, and where the evidence lies [P, M + 3].
    """

    def of_known(maps: Array, value: Array) -> Array:
        missing = jnp.isnan(maps).any(axis=(2, 3, 4))
        return jnp.where(missing.reshape(*missing.shape, *[1] * (value.ndim - 2)), jnp.nan, value)

    allowed = jnp.broadcast_to(allowed_of(findings, regions), baselines.shape)
    iou = organ_iou(normalize_map(baselines), allowed, ORGAN_IOU_THRESHOLDS)
    measures = {"organ_iou": of_known(baselines, iou)}
    if lesions is None:
        return measures
    maps = jnp.concatenate([maps, baselines], axis=1)
    lesions = jnp.broadcast_to(lesions, maps.shape)
    shown = normalize_map(maps)
    against_lesions = {
        "iou": overlap(shown, lesions, ORGAN_IOU_THRESHOLDS).iou,
        "otsu_iou": overlap(shown, lesions, otsu_threshold(shown)[..., None]).iou[..., 0],
        "pointing": pointing_game(maps, lesions),
        "energy": energy_inside(maps, lesions),
        "rank_accuracy": rank_accuracy(maps, lesions),
        "average_precision": map_average_precision(maps, lesions),
    }
    return measures | {name: of_known(maps, value) for name, value in against_lesions.items()}


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


@cache
def _predict_program(config: Config, layout: Layout) -> Any:
    program = partial(predict_step, config=config, layout=layout)
    everywhere = sharding.replicated(layout.mesh)
    return jax.jit(program, out_shardings=everywhere, compiler_options=compiler_options())


def predict(
    run: Run,
    source: Source,
    title: str = "evaluate",
    prior: np.ndarray | None = None,
    kept: Kept | None = None,
) -> Predictions:
    """Runs a model over a split, on all devices of all processes; each gets the whole result.

    Args:
        prior: the organ prior [K, d, h, w] of another split to measure (`Predictions.prior`); by
            default this split's own.
        kept: results of batches that are done already, under `title`; new ones are added.
    """
    config = run.config
    layout = open_layout(config, tuple(source.shape), evaluation=True)
    variables = sharding.replicate(run.variables, layout.mesh)
    # Of the config only what the maps depend on: runs that differ in their training share it.
    step = _predict_program(Config(config.model, preprocess=config.preprocess), layout)
    name = f"{title}_by_{layout.batch_size}".replace(" ", "_")
    results = kept.load(name) if kept else []
    steps = range(len(results), -(-len(source) // layout.batch_size))
    batches = eval_batches(source, layout.share, workers=config.workers, steps=steps)
    for number in progress(steps, title, "batch"):
        result = jax.device_get(step(variables, layout.to_devices(next(batches))))
        # For what is measured afterwards: bits, and the maps of labels that are present.
        packed = {n: np.packbits(m.reshape(len(m), -1), 1) for n, m in result["masks"].items()}
        present = result["labels"][: len(source) - number * layout.batch_size]
        own = [m[: len(present)][present] for m in result.pop("maps").values()]
        kept_maps = {"maps": np.stack(own, axis=1)} if own else {}
        result = {"volumes": {**result, "masks": packed}, **kept_maps}
        if kept:
            kept.save(name, number, result)
        results.append(result)
    maps = [result["maps"] for result in results if "maps" in result]
    results = [result["volumes"] for result in results]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *results)
    labels, findings = whole["labels"], whole["findings"]
    if config.model.depth_unit is None:  # no maps in the body, and no organs to compare them with
        return Predictions(whole["logits"], labels, {}, None, findings, None)
    pairs = np.argwhere(labels)
    maps = np.concatenate(maps) if maps else None

    def masks(name: str, volumes: np.ndarray) -> np.ndarray:
        shape = (len(source.regions if name == "regions" else source.labels), *layout.grid)
        bits = np.unpackbits(whole["masks"][name][volumes], axis=1, count=math.prod(shape))
        return bits.reshape(-1, *shape)

    def chunks(count: int, cells: int) -> list[np.ndarray]:
        size = max(1, min(64, CHUNK_CELLS // cells))
        return np.split(np.arange(count), range(size, count, size))

    cells = math.prod(layout.grid)
    if prior is None:
        size = max(1, CHUNK_CELLS // (cells * labels.shape[1]))
        numbers = np.split(np.arange(len(source)), range(size, len(source), size))
        prior = organ_prior(_allowed(findings[some], masks("regions", some)) for some in numbers)
    size = max(1, min(64, CHUNK_CELLS // (cells * findings.shape[2])))
    measured = []
    for begin in range(0, len(pairs), size):
        some = np.resize(np.arange(begin, min(begin + size, len(pairs))), size)  # one shape
        n, k = pairs[some].T
        lesions = own = None
        if maps is not None:
            lesions, own = masks("lesions", n)[np.arange(size), k][:, None], maps[some]
        baselines = baseline_maps(prior[k][:, None], n, k[:, None])
        baselines = np.concatenate([*baselines.values()], axis=1)
        inputs = findings[n, k][:, None], masks("regions", n), lesions, baselines, own
        measured.append(jax.device_get(pairs_step(*inputs)))
    of_pairs = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pairs)], *measured)

    def of_all(values: np.ndarray) -> np.ndarray:
        full = np.full((*labels.shape, *values.shape[1:]), np.nan, np.float32)
        full[labels] = values
        return full

    iou = {n: np.where(labels[..., None], v, np.nan) for n, v in whole["organ_iou"].items()}
    methods = [*iou, *BASELINES]
    if not len(pairs):
        nothing = np.full_like(next(iter(iou.values())), np.nan)
        iou |= dict.fromkeys(BASELINES, nothing)
        return Predictions(whole["logits"], labels, iou, None, findings, prior)
    for row, name in enumerate(BASELINES):
        iou[name] = of_all(of_pairs["organ_iou"][:, row])
    lesions = None
    if maps is not None:
        lesions = {
            name: {key: of_all(v[:, row]) for key, v in of_pairs.items() if key != "organ_iou"}
            for row, name in enumerate(methods)
        }
    return Predictions(whole["logits"], labels, iou, lesions, findings, prior)


def _allowed(findings: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """`allowed_of` by NumPy: chunks of any size, not compiled for each."""
    flat = regions.reshape(*regions.shape[:2], -1).astype(np.float32)
    allowed = (findings > 0).astype(np.float32) @ flat > 0
    return allowed.reshape(*findings.shape[:2], *regions.shape[2:])


def evaluate_run(
    run: Run,
    validation: Source,
    test: Source,
    *,
    faithfulness: int = 0,
    sanity: int = 0,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """`evaluate` of a run on two opened splits.

    Args:
        kept: continue from these results.
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
        if number and run.model.depth_unit is None:
            raise UserError(f"--{name}: {type(run.model).__name__} has no maps in the body")
    on_validation = predict(run, validation, "validation split", kept=kept)
    on_test = predict(run, test, "test split", on_validation.prior, kept)
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
