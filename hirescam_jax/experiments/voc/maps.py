"""Grad-CAM and HiResCAM of (photo, class) pairs: against the masks, and against each other."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.evaluation.result import plain
from hirescam_jax.experiments.voc.photos import CLASSES, VOID
from hirescam_jax.explanations.cam import completeness_residual, gradcam, hirescam
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    best_threshold,
    energy_inside,
    map_average_precision,
    otsu_threshold,
    overlap,
    pointing_game,
    rank_accuracy,
)
from hirescam_jax.metrics.baselines import baseline_maps
from hirescam_jax.metrics.intervals import mean_intervals
from hirescam_jax.progress import progress

METHODS = ("hirescam", "gradcam")
BASELINES = ("centre_blob", "random")
BINARY = ("iou", "dice", "otsu_iou", "otsu_dice")  # of the map above a threshold
MEASURES = (*BINARY, "pointing_game", "energy", "rank_accuracy", "average_precision")
PHOTOS_AT_ONCE, PAIRS_AT_ONCE = 16, 32


class Pairs(NamedTuple):
    """Numbers of photos [P] and of classes [P]: classes that are labelled and in the mask."""

    photo: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, masks: np.ndarray) -> "Pairs":
        """labels [N, 20], masks [N, S, S]."""
        inside = [
            np.bincount(mask.ravel(), minlength=VOID + 1)[1 : 1 + len(CLASSES)] > 0
            for mask in masks
        ]
        photo, label = np.nonzero((labels == 1) & np.array(inside))
        return cls(photo, label)


class PairMaps(NamedTuple):
    """Raw signed maps on the feature grid and the scores, of pairs.

    hirescam, gradcam [P, h, w]; logit [P]; hirescam_residual, gradcam_residual [P]: |sum of the
    map + bias - logit|.
    """

    hirescam: np.ndarray
    gradcam: np.ndarray
    logit: np.ndarray
    hirescam_residual: np.ndarray
    gradcam_residual: np.ndarray


def pair_maps(model: Any, variables: Any, features: np.ndarray, pairs: Pairs) -> PairMaps:
    """Both maps by `jax.vjp` through the head, all classes of a batch of photos at once; those of
    the pairs are kept."""
    program = jax.jit(partial(_all_maps, model), compiler_options=compiler_options())
    kept: list[list[np.ndarray]] = []
    firsts = range(0, len(features), PHOTOS_AT_ONCE)
    for first in progress(firsts, f"maps of {model.classifier}", "batch"):
        part = features[first : first + PHOTOS_AT_ONCE]
        padded = np.zeros((PHOTOS_AT_ONCE, *part.shape[1:]), part.dtype)  # one shape, one program
        padded[: len(part)] = part
        here = (pairs.photo >= first) & (pairs.photo < first + len(part))
        row, label = pairs.photo[here] - first, pairs.label[here]
        kept.append([np.asarray(x)[row, label] for x in program(variables, padded)])
    return PairMaps(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))


def _all_maps(model: Any, variables: Any, features: Array) -> tuple[Array, ...]:
    head = partial(model.apply, variables, method="head")
    logits, hires, grad = head(features), hirescam(head, features), gradcam(head, features)
    residuals = (completeness_residual(head, features, logits, maps) for maps in (hires, grad))
    return hires, grad, logits, *residuals


# -- against the masks ----------------------------------------------------------------------------


def enlarged(maps: Float[Array | np.ndarray, "P h w"], size: int) -> Float[Array, "P S S"]:
    """To the photo's square: linear, half-pixel centres."""
    return jax.image.resize(jnp.asarray(maps), (len(maps), size, size), "linear")


def shown(maps: Float[Array, "P K S S"], void: Array) -> Float[Array, "P K S S"]:
    """`normalize_map` by what is not void: a map's end in the padding is no part of the photo."""
    positive = jax.nn.relu(maps)
    low = jnp.where(void, jnp.inf, positive).min((2, 3), keepdims=True)
    peak = jnp.where(void, 0, positive).max((2, 3), keepdims=True) - low
    return jnp.where(peak > 0, (positive - low) / jnp.where(peak > 0, peak, 1), 0)


@partial(jax.jit, static_argnames="complete")
def _measured(maps: Array, masks: Array, label: Array, thresholds: Array, complete: bool):
    """maps [P, h, w], masks uint8 [P, S, S], label [P] -> IoU [P, T], and the other measures."""
    raw = enlarged(maps, masks.shape[-1])[:, None]
    masks = masks[:, None]
    inside, void = masks == label[:, None, None, None] + 1, masks == VOID
    scaled = shown(raw, void)
    best = overlap(scaled, inside, thresholds, void)
    if not complete:
        return best.iou[:, 0], {}
    otsu = overlap(scaled, inside, otsu_threshold(scaled, void)[..., None], void)
    values = {"dice": best.dice, "otsu_iou": otsu.iou, "otsu_dice": otsu.dice}
    measures = {
        "pointing_game": pointing_game,
        "energy": energy_inside,
        "rank_accuracy": rank_accuracy,
        "average_precision": map_average_precision,
    }
    values = {name: value[:, 0, 0] for name, value in values.items()}
    values |= {name: f(raw, inside, void)[:, 0] for name, f in measures.items()}
    return best.iou[:, 0], values


def _in_parts(
    maps: np.ndarray, pairs: Pairs, masks: np.ndarray, thresholds: np.ndarray, title: str
) -> Iterable[Any]:
    """`_measured` of all pairs in parts of one shape; the last is filled up with pair 0."""
    count, complete = len(maps), len(thresholds) == 1
    for first in progress(range(0, count, PAIRS_AT_ONCE), title, "part"):
        rows = np.arange(first, first + PAIRS_AT_ONCE)
        real = min(PAIRS_AT_ONCE, count - first)
        rows = np.where(rows < count, rows, 0)
        result = _measured(
            maps[rows], masks[pairs.photo[rows]], pairs.label[rows], thresholds, complete
        )
        yield jax.tree.map(lambda x, real=real: np.asarray(x)[:real], result)


def measured(
    tune_maps: np.ndarray,
    tune: Pairs,
    tune_masks: np.ndarray,
    val_maps: np.ndarray,
    val: Pairs,
    val_masks: np.ndarray,
    title: str,
) -> tuple[float, dict[str, np.ndarray]]:
    """The threshold of the best mean IoU over pairs of photos that nothing was trained on, and each
    measure [P] of the validation pairs.

    IoU and Dice are of the map as it is shown (`shown`, of the enlarged one), at that threshold and
    at Otsu's; the others take the enlarged raw map.
    """
    parts = _in_parts(tune_maps, tune, tune_masks, ORGAN_IOU_THRESHOLDS, f"{title}, threshold")
    iou_PT = np.concatenate([iou for iou, _ in parts])
    threshold = float(ORGAN_IOU_THRESHOLDS[int(best_threshold(iou_PT[:, None].astype(float))[0])])
    results = list(_in_parts(val_maps, val, val_masks, np.array([threshold]), title))
    values = {"iou": np.concatenate([iou[:, 0] for iou, _ in results])}
    for name in MEASURES[1:]:
        values[name] = np.concatenate([other[name] for _, other in results])
    return threshold, values


def measure_baselines(
    grid: tuple[int, ...],
    tune: Pairs,
    tune_masks: np.ndarray,
    val: Pairs,
    val_masks: np.ndarray,
) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """`measured` of the maps that no model made."""
    own, maps = baselines_of(grid, tune, 1), baselines_of(grid, val, 0)
    return {
        name: measured(
            own[name], tune, tune_masks, maps[name], val, val_masks, name.replace("_", " ")
        )
        for name in BASELINES
    }


def baselines_of(grid: tuple[int, ...], pairs: Pairs, seed: int) -> dict[str, np.ndarray]:
    """A blob at the centre and random maps, [P, h, w] on the feature grid."""
    shape = (len(pairs.photo), 1, *grid)
    maps = baseline_maps(shape, pairs.photo, pairs.label[:, None], seed=seed)
    return {name: map_P1hw[:, 0] for name, map_P1hw in maps.items()}


# -- against each other ---------------------------------------------------------------------------


def differences(maps: PairMaps) -> dict[str, np.ndarray]:
    """How far the two maps of each pair [P] lie apart, raw on the feature grid.

    relative_l1: sum |HiResCAM - Grad-CAM| / sum |HiResCAM|.
    correlation: Pearson's over the cells; NaN for a constant map.
    peak_moved: whether the two strongest cells are different ones.
    sign_changed: share of the cells in which one map is positive and the other negative.
    """
    hires, grad = (m.reshape(len(m), -1).astype(np.float64) for m in maps[:2])
    size = np.abs(hires).sum(-1)
    apart = np.abs(hires - grad).sum(-1)
    centred = [m - m.mean(-1, keepdims=True) for m in (hires, grad)]
    norms = np.prod([np.linalg.norm(m, axis=-1) for m in centred], axis=0)
    product = (centred[0] * centred[1]).sum(-1)
    return {
        "relative_l1": np.where(size > 0, apart / np.where(size > 0, size, 1), np.nan),
        "correlation": np.where(norms > 0, product / np.where(norms > 0, norms, 1), np.nan),
        "peak_moved": hires.argmax(-1) != grad.argmax(-1),
        "sign_changed": (hires * grad < 0).mean(-1),
    }


def agreement(kernel: np.ndarray, features: np.ndarray, maps: PairMaps, pairs: Pairs) -> dict:
    """How exactly the two maps agree where they are the same by theory: a global-average head.

    Both are compared with CAM in float64, sum_c w_kc A_c / N, computed from the weights without
    automatic differentiation. `rounding` is what float32 may cost in a sum over C channels of
    terms with N summed gradients: sqrt(C + N) machine epsilons times the sum of the terms' sizes
    (Higham & Mary, SIAM J. Sci. Comput. 2019), at most over the pairs and relative to the largest
    value of the pair's map, as the differences are.
    """
    cells = int(np.prod(features.shape[1:-1]))
    unit = float(np.sqrt(features.shape[-1] + cells) * np.finfo(np.float32).eps)
    weights = kernel.astype(np.float64)[:, pairs.label].T / cells
    worst = {"hirescam_gradcam": 0.0, "hirescam_cam64": 0.0, "gradcam_cam64": 0.0, "rounding": 0.0}
    at_rounding = True
    for i, photo in enumerate(pairs.photo):
        terms = features[photo].astype(np.float64) * weights[i]
        cam = terms.sum(-1)
        peak = max(float(np.abs(cam).max()), float(np.finfo(np.float32).tiny))
        limit = unit * float(np.abs(terms).sum(-1).max())
        apart = {
            "hirescam_gradcam": np.abs(maps.hirescam[i] - maps.gradcam[i]).max(),
            "hirescam_cam64": np.abs(maps.hirescam[i] - cam).max(),
            "gradcam_cam64": np.abs(maps.gradcam[i] - cam).max(),
        }
        at_rounding &= all(value <= limit for value in apart.values())
        for name, value in {**apart, "rounding": limit}.items():
            worst[name] = max(worst[name], float(value) / peak)
    return {**worst, "at_rounding": at_rounding}


def compare_maps(
    model: Any,
    variables: Any,
    splits: dict[str, Any],
    pairs: dict[str, Pairs],
    baselines: dict[str, tuple[float, dict[str, np.ndarray]]],
) -> tuple[PairMaps, dict[str, Any]]:
    """Both maps of the validation pairs, and all their figures.

    Returns:
        The maps, and a dict: `thresholds` and `residuals` by method; `maps`, the measures of each
        method and of `baselines`, and `gain`, those of HiResCAM less those of Grad-CAM, with 95 %
        bootstrap intervals over photos, null for fewer than five; `predicted`, both again over the
        pairs that are predicted; `difference` (means of `differences`), `by_class`, `pairs` (each
        of them), and for a global-average head `agreement`.
    """
    tune, val = pairs["tune"], pairs["val"]
    tune_maps = pair_maps(model, variables, splits["tune"].features, tune)
    maps = pair_maps(model, variables, splits["val"].features, val)
    thresholds = {name: threshold for name, (threshold, _) in baselines.items()}
    values = {}
    for method in METHODS:
        thresholds[method], values[method] = measured(
            getattr(tune_maps, method),
            tune,
            splits["tune"].masks,
            getattr(maps, method),
            val,
            splits["val"].masks,
            f"{model.classifier}, {method}",
        )
    everything = {**values, **{name: of_map for name, (_, of_map) in baselines.items()}}

    def means(rows: np.ndarray) -> dict[str, Any]:
        photos = val.photo[rows]
        chosen = {m: {n: v[rows] for n, v in of.items()} for m, of in everything.items()}
        hires, grad = chosen["hirescam"], chosen["gradcam"]
        return {
            "maps": {m: plain(mean_intervals(of_map, photos)) for m, of_map in chosen.items()},
            "gain": plain(mean_intervals({n: hires[n] - grad[n] for n in MEASURES}, photos)),
        }

    figures: dict[str, Any] = {
        "thresholds": thresholds,
        "residuals": {m: float(getattr(maps, f"{m}_residual").max()) for m in METHODS},
        **means(np.arange(len(val.photo))),
        "predicted": means(np.flatnonzero(maps.logit >= 0)),  # probability of 1/2 and more
    }
    apart = differences(maps)
    figures["difference"] = {name: float(np.nanmean(value)) for name, value in apart.items()}
    where = _where(maps, val, splits["val"].masks)
    figures["difference"] |= {f"l1_in_{name}": float(np.mean(v)) for name, v in where.items()}
    figures["by_class"] = {
        name: {
            "pairs": int((val.label == k).sum()),
            **{f"iou_{m}": float(values[m]["iou"][val.label == k].mean()) for m in METHODS},
            "relative_l1": float(apart["relative_l1"][val.label == k].mean()),
        }
        for k, name in enumerate(CLASSES)
        if (val.label == k).any()
    }
    figures["pairs"] = [
        {
            "photo": int(val.photo[i]),
            "class": CLASSES[val.label[i]],
            "probability": float(1 / (1 + np.exp(-np.float64(maps.logit[i])))),
            **{name: value[i].item() for name, value in apart.items()},
            **{f"{name}_{m}": float(values[m][name][i]) for m in METHODS for name in MEASURES},
        }
        for i in range(len(val.photo))
    ]
    if model.classifier == "gap":
        kernel = np.asarray(variables["params"]["fc"]["kernel"])
        figures["agreement"] = agreement(kernel, splits["val"].features, maps, val)
    return maps, figures


def _where(maps: PairMaps, pairs: Pairs, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Which share [P] of |HiResCAM - Grad-CAM| lies in the object, in the rest of the photo, and
    in void (the padding among it)."""
    shares = {name: np.zeros(len(pairs.photo)) for name in ("object", "rest", "void")}
    for i, (photo, label) in enumerate(zip(*pairs, strict=True)):
        mask = masks[photo]
        apart = np.abs(np.asarray(enlarged((maps.hirescam - maps.gradcam)[i][None], len(mask)))[0])
        total = max(float(apart.sum()), float(np.finfo(np.float32).tiny))
        shares["object"][i] = apart[mask == label + 1].sum() / total
        shares["void"][i] = apart[mask == VOID].sum() / total
        shares["rest"][i] = 1 - shares["object"][i] - shares["void"][i]
    return shares
