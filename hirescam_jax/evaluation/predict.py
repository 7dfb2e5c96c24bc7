"""A split's predictions and its maps' measures, computed batch by batch on all devices."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import Source, eval_batches
from hirescam_jax.devices import mesh
from hirescam_jax.devices.layout import Layout
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.resume import Kept
from hirescam_jax.evaluation.summary import Predictions
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.inference.maps import explain_step, head_bias
from hirescam_jax.losses import allowed_of, labels_of
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    energy_inside,
    map_average_precision,
    organ_iou,
    organ_prior,
    otsu_threshold,
    overlap,
    pointing_game,
    rank_accuracy,
)
from hirescam_jax.metrics.baselines import BASELINES, baseline_maps
from hirescam_jax.models.contract import has_slices
from hirescam_jax.progress import progress
from hirescam_jax.runs.run import Run
from hirescam_jax.runs.setup import open_layout

CHUNK_CELLS = 2**25  # of masks that are held at once


def predict_step(
    variables: Any, batch: dict[str, Array], *, config: Config, layout: Layout
) -> dict[str, Any]:
    """Logits, labels, the sum of each HiResCAM map and OrganIoU of both map methods for a batch, in
    one program; with what is needed to measure more afterwards: the masks, and the maps where there
    are lesions. Of a model whose maps have no slices (CTNet) there are no maps."""
    methods = EVALUATED if has_slices(config.model) else ()
    volume = batch["volume"]
    logits, maps = explain_step(variables, volume, config=config, layout=layout, methods=methods)
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
        "totals": {n: m.sum(axis=(2, 3, 4)) for n, m in maps.items() if n == "hirescam"},
        "masks": masks,
        "maps": maps if "lesions" in masks else {},
    }


@jax.jit
def pairs_step(
    findings: Array, regions: Array, lesions: Array | None, baselines: Array, maps: Array | None
) -> dict[str, Array]:
    """What the model's pass did not measure, of P pairs of a volume and a label that it has.

    Args:
        findings: [P, 1, R]; regions: [P, R, d, h, w]; lesions: [P, 1, d, h, w] or None.
        baselines: [P, 3, d, h, w], NaN where one is missing.
        maps: [P, M, d, h, w], the model's; None without lesions.

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
    if lesions is None or maps is None:
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


@cache
def _predict_program(config: Config, layout: Layout) -> Callable[..., dict[str, Any]]:
    program = partial(predict_step, config=config, layout=layout)
    everywhere = mesh.replicated(layout.mesh)
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
    variables = mesh.replicate(run.variables, layout.mesh)
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
    wrong = np.argwhere(~np.isfinite(whole["logits"]))
    if len(wrong):
        n, k = wrong[0]
        raise UserError(
            f"{run.path}: at step {run.step} the score of '{run.labels[k]}' in volume {n} of the "
            f"{title} is {whole['logits'][n, k]}: train it again, or take another --checkpoint"
        )
    if not has_slices(config.model):  # no maps in the body, and no organs to compare them with
        return Predictions(whole["logits"], labels, {}, None, findings, None)
    residuals = np.abs(whole["totals"]["hirescam"] + head_bias(run) - whole["logits"])
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
        of_labels = prior[k][:, None]
        baselines = baseline_maps(of_labels.shape, n, k[:, None], of_labels)
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
        return Predictions(whole["logits"], labels, iou, None, findings, prior, residuals)
    for row, name in enumerate(BASELINES):
        iou[name] = of_all(of_pairs["organ_iou"][:, row])
    lesions = None
    if maps is not None:
        lesions = {
            name: {key: of_all(v[:, row]) for key, v in of_pairs.items() if key != "organ_iou"}
            for row, name in enumerate(methods)
        }
    return Predictions(whole["logits"], labels, iou, lesions, findings, prior, residuals)


def _allowed(findings: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """`allowed_of` by NumPy: chunks of any size, not compiled for each."""
    flat = regions.reshape(*regions.shape[:2], -1).astype(np.float32)
    allowed = (findings > 0).astype(np.float32) @ flat > 0
    return allowed.reshape(*findings.shape[:2], *regions.shape[2:])
