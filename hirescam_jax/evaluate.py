"""Evaluation: how well a run predicts and where it looks, volume by volume, on all devices."""

import hashlib
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hirescam_jax import sharding
from hirescam_jax.cam import METHODS, OVER_GRID, model_verdict, normalize_map
from hirescam_jax.checkpoint import Run
from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import Source, digest_of, eval_batches, findings_of, patients_of
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
from hirescam_jax.summary import Predictions, choose_thresholds, evaluate, named_thresholds
from hirescam_jax.summary_text import aligned, interval_text, table
from hirescam_jax.values import Values

__all__ = [
    "Predictions",
    "aligned",
    "choose_thresholds",
    "content_of",
    "evaluate",
    "evaluate_run",
    "explain_step",
    "interval_text",
    "named_thresholds",
    "predict",
    "table",
]

EVALUATED = ("hirescam", "gradcam")  # of `METHODS`

BASELINES = ("organ_prior", "centre_blob", "random")
CHUNK_CELLS = 2**25  # of masks that are held at once


def predict_step(
    variables: Any, batch: dict[str, Array], *, config: Config, layout: Layout
) -> dict[str, Any]:
    """Logits, labels, the sum of each HiResCAM map and OrganIoU of both map methods for a batch, in
    one program; with what is needed to measure more afterwards: the masks, and the maps where there
    are lesions. Of a model whose maps have no slices (CTNet) there are no maps."""
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
        "totals": {n: m.sum(axis=(2, 3, 4)) for n, m in maps.items() if n == "hirescam"},
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


def head_bias(run: Run) -> Float[np.ndarray, " K"]:
    """The head's output on all-zero features, from which completeness residuals are counted."""

    @jax.jit
    def program(variables: Any) -> Array:
        volume = jax.ShapeDtypeStruct((1, *run.shape), jnp.float32)
        features = jax.eval_shape(partial(run.model.apply, method="features"), variables, volume)
        zeros = jnp.zeros(features.shape, jnp.float32)
        return run.model.apply(variables, zeros, method="head")[0]

    return np.asarray(program(run.variables), np.float32)


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
    wrong = np.argwhere(~np.isfinite(whole["logits"]))
    if len(wrong):
        n, k = wrong[0]
        raise UserError(
            f"{run.path}: at step {run.step} the score of '{run.labels[k]}' in volume {n} of the "
            f"{title} is {whole['logits'][n, k]}: train it again, or take another --checkpoint"
        )
    if config.model.depth_unit is None:  # no maps in the body, and no organs to compare them with
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


def evaluate_run(
    run: Run,
    validation: Source,
    test: Source | None,
    *,
    faithfulness: int = 0,
    sanity: int = 0,
    kept: Kept | None = None,
    values: dict[str, Values] | None = None,
) -> dict[str, Any]:
    """`evaluate` of a run on opened splits.

    Args:
        test: None where the data has no test split.
        kept: continue from these results.
        faithfulness, sanity: do these checks (`hirescam_jax.evaluate_checks`) on so many test
            volumes.
        values: to be filled with the values of each volume, by split.

    Returns:
        What `evaluate` returns, of the test split, and beside it
        "split": "test", or "validation" without one;
        "content": a digest of the split's volumes, the same for runs that can be compared;
        "head": {"kind", "text": of its `head_verdict`, "maps": {method: {"holds": whether its maps
            account for the score, "text"}}};
        "validation": what `evaluate` returns, and "content", of the validation split. Its
            thresholds are chosen on the same maps, so that its OrganIoU is in-sample. Not with
            "split": "validation", where this holds for the whole.
        "faithfulness", "sanity": where asked for.

    Raises:
        UserError: the data's labels are not those of the run, scores that are not finite numbers,
            or checks on more volumes than the test split has.
    """
    splits = {"validation": validation} | ({"test": test} if test is not None else {})
    main = "test" if test is not None else "validation"
    for source in splits.values():
        if tuple(source.labels) != run.labels:
            raise UserError(f"{run.path}: trained on labels {run.labels}, data has {source.labels}")
    for name, number in (("faithfulness", faithfulness), ("sanity", sanity)):
        size = len(splits[main])
        if not 0 <= number <= size:
            raise UserError(
                f"--{name} {number}: the {main} split has {size} volumes: give at most as many"
            )
        if number and run.model.depth_unit is None:
            raise UserError(f"--{name}: {type(run.model).__name__} has no maps in the body")
    found: dict[str, Predictions] = {}
    results: dict[str, dict[str, Any]] = {}
    for split, source in splits.items():
        prior = found["validation"].prior if found else None
        found[split] = predict(run, source, f"{split} split", prior, kept)
    for split, source in splits.items():
        patients = patients_of(source)
        content = content_of(source, found[split])
        both = found["validation"], found[split]
        measures = evaluate(run.labels, *both, regions=run.header.regions, patients=patients)
        results[split] = {"content": content, **measures}
        if values is not None:
            values[split] = Values.of(run.labels, *both, patients, content)
    result = {"split": main, "head": _head(run), **results[main]}
    if test is not None:
        result["validation"] = results["validation"]
    if faithfulness or sanity:
        from hirescam_jax import evaluate_checks

        source = splits[main]
        if faithfulness:
            prior = np.asarray(found["validation"].prior)
            result["faithfulness"] = evaluate_checks.faithfulness(run, source, prior, faithfulness)
        if sanity:
            result["sanity"] = evaluate_checks.sanity(run, source, sanity)
    return result


def content_of(source: Source, found: Predictions | None = None) -> str:
    """A digest of what a split's volumes are: their names and voxels, where the source has a digest
    of them, and else their findings: of `found`, or read one by one."""
    own = digest_of(source).encode()
    if not own:
        numbers = range(len(source))
        findings = found.findings if found else [findings_of(source, i) for i in numbers]
        own = np.ascontiguousarray(findings).tobytes()
    return hashlib.sha256(own).hexdigest()[:16]


def _head(run: Run) -> dict[str, Any]:
    verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    maps = {
        name: {"holds": verdict.holds_for(name), "text": verdict.short(name)} for name in EVALUATED
    }
    return {"kind": verdict.kind, "text": verdict.text, "maps": maps}
