"""Grad-CAM against HiResCAM on photos: PASCAL VOC 2012, one backbone, two heads.

Behind a global average the two are the same map. Behind a layer that weighs each position by itself
(flatten) they are not, and only HiResCAM accounts for the score.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from hirescam_jax.cam import gradcam, hirescam, normalize_map
from hirescam_jax.compiling import compiler_options
from hirescam_jax.data.voc import CLASSES, VOC, VOID
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.losses import classification_loss
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    auroc,
    average_precision,
    centre_blob,
    energy_inside,
    map_average_precision,
    nan_mean,
    overlap,
    pointing_game,
    random_maps,
    rank_accuracy,
)
from hirescam_jax.models import MobileNetV2
from hirescam_jax.progress import progress, say
from hirescam_jax.summary import aligned
from hirescam_jax.verdict import HeadVerdict, head_verdict
from hirescam_jax.weights import from_torch, read_weights

HEADS = ("gap", "flatten")
MAPS = ("hirescam", "gradcam", "centre_blob", "random")
MEASURES = {
    "iou": "IoU",
    "pointing": "pointing",
    "energy": "energy",
    "rank_accuracy": "ranks",
    "average_precision": "AP",
}
# What torchvision's weights were trained with.
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CHUNK = 16  # pairs of an image and a class that are measured at once


class Maps(NamedTuple):
    """Of the P pairs of an image and a class that it has: raw maps on the feature grid."""

    image: np.ndarray  # [P], its number
    label: np.ndarray  # [P]
    hirescam: np.ndarray  # [P, h, w]
    gradcam: np.ndarray  # [P, h, w]
    logits: np.ndarray  # [N, 20]
    truth: np.ndarray  # [N, 20]


def compare(
    path: Path,
    out: Path,
    *,
    weights: Path | None = None,
    size: int = 224,
    epochs: int = 30,
    batch_size: int = 16,
    finetune: bool = False,
    seed: int = 0,
    model: MobileNetV2 | None = None,
) -> dict[str, Any]:
    """Trains both heads on the train set and compares their maps on the class masks of val.

    Args:
        path: VOCdevkit/VOC2012.
        out: a new folder for metrics.json and pictures.png.
        weights: torchvision's MobileNetV2 (.pth, .safetensors); random without.
        size: edge of the square images, a multiple of 32.
        epochs: of the training; finetune: of the whole network with flips. Otherwise the backbone's
            features are computed once and only the heads are trained.
        model: another MobileNetV2, for tests.

    Returns:
        What metrics.json holds: {"settings", "heads": {head: {"verdict", "auroc",
        "average_precision", "maps": {map: {measure: number}}, "thresholds": {map: number},
        "difference": {...}}}}. Measures are means over the pairs of an image and a class that it
        has, void left out; "iou" at the threshold that was best on the train set. Differences
        between HiResCAM and Grad-CAM, on the raw maps: "relative_l1" and "correlation" (means over
        pairs), "other_peak" and "other_sign" (shares of pairs, of cells), and "largest", relative
        to the largest value of a HiResCAM map.

    Raises:
        UserError: bad data, weights of another network, a folder that exists.
    """
    if size < 32 or size % 32:
        raise UserError(f"--size {size}: must be a multiple of 32")
    if epochs < 1 or batch_size < 1:
        raise UserError(f"--epochs {epochs}, --batch-size {batch_size}: must be at least 1")
    sources = {name: VOC(path, name, size) for name in ("train", "val")}
    model = (model or MobileNetV2()).clone(num_labels=len(CLASSES))
    start = _start(model, weights, size, seed)
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder with --out")
    items = {name: _loaded(source, name) for name, source in sources.items()}
    result: dict[str, Any] = {
        "settings": {
            "size": size,
            "epochs": epochs,
            "finetune": finetune,
            "images": {name: len(source) for name, source in sources.items()},
        },
        "heads": {},
    }
    shown = None
    for name in HEADS:
        head: Any = model.clone(classifier=name)
        variables = train_head(
            head, start, items["train"], epochs, batch_size, finetune, seed, title=f"{name} head"
        )
        maps = {split: explain_split(head, variables, items[split], batch_size) for split in items}
        verdict = head_verdict(
            partial(head.apply, variables, method="head"), (1, *_feature_shape(head, size))
        )
        result["heads"][name] = summarize(maps, items, verdict)
        shown = maps["val"]  # of the flatten head, which comes last
    out.mkdir(parents=True)
    with atomic_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    assert shown is not None
    draw(out / "pictures.png", items["val"], shown)
    return result


def train_head(
    model: Any,
    start: dict[str, Any],
    items: dict[str, np.ndarray],
    epochs: int,
    batch_size: int,
    finetune: bool,
    seed: int,
    title: str = "train",
) -> dict[str, Any]:
    """Multilabel training from the backbone of `start`; the variables."""
    size = items["image"].shape[1]
    init = jax.jit(partial(model.init, jax.random.key(seed)))
    variables = {**init(jnp.zeros((1, size, size, 3)))}
    variables["params"] = {**variables["params"], "mobilenet": start["params"]["mobilenet"]}
    variables["batch_stats"] = start["batch_stats"]
    inputs = items["image"] if finetune else features_of(model, variables, items["image"])
    count = len(inputs)
    batch_size = min(batch_size, count)
    optimizer = optax.adamw(1e-4 if finetune else 1e-3, weight_decay=1e-2)
    trained = variables["params"] if finetune else {"fc": variables["params"]["fc"]}
    state = optimizer.init(trained)

    def loss(trained: Any, stats: Any, inputs: Array, labels: Array, key: Array) -> Any:
        params = {**variables["params"], **trained}
        own = {"params": params, "batch_stats": stats}
        rngs = {"dropout": key}
        features, changed = inputs, {"batch_stats": stats}
        if finetune:
            flip = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(inputs), 1, 1, 1))
            images = normalize(jnp.where(flip, inputs[:, :, ::-1], inputs))
            features, changed = model.apply(
                own, images, True, method="features", mutable=["batch_stats"]
            )
        logits = model.apply(own, features, True, method="head", rngs=rngs)
        return classification_loss(logits, labels), changed["batch_stats"]

    @partial(jax.jit, compiler_options=compiler_options())
    def step(trained: Any, stats: Any, state: Any, inputs: Array, labels: Array, key: Array) -> Any:
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, stats, inputs, labels, key
        )
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), stats, state, value

    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
    stats, value = variables["batch_stats"], None
    batches = order.batch(batch_size, drop_remainder=True)
    for number in progress(range(len(batches)), title, "step"):
        rows = np.asarray(batches[number])
        key = jax.random.fold_in(jax.random.key(seed), number)
        batch = inputs[rows], items["labels"][rows]
        trained, stats, state, value = step(trained, stats, state, *batch, key)
    if value is None or not np.isfinite(value):
        raise UserError(f"the loss is {value}: the training diverged")
    return {"params": {**variables["params"], **trained}, "batch_stats": stats}


def features_of(model: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    """Features [N, h, w, C] of images uint8 [N, S, S, 3], 16 at a time."""
    program = _features(model)
    return np.concatenate(
        [np.asarray(program(variables, images[i : i + 16])) for i in range(0, len(images), 16)]
    )


def _features(model: Any) -> Callable[..., Array]:
    def features(variables: Any, images: Array) -> Array:
        return model.apply(variables, normalize(images), method="features")

    return jax.jit(features, compiler_options=compiler_options())


def explain_split(
    model: Any, variables: Any, items: dict[str, np.ndarray], batch_size: int
) -> Maps:
    """Both maps of every class of every image, of which those are kept that an image has."""
    head: Any = partial(model.apply, variables, method="head")

    @partial(jax.jit, compiler_options=compiler_options())
    def program(features: Array) -> Any:
        return head(features), hirescam(head, features), gradcam(head, features)

    features = features_of(model, variables, items["image"])
    parts = [program(features[i : i + batch_size]) for i in range(0, len(features), batch_size)]
    logits, exact, averaged = (np.concatenate(part) for part in zip(*parts, strict=True))
    # A class whose object has no pixel at this size has nothing to be compared with.
    seen = (items["mask"][:, None] == np.arange(1, 21)[:, None, None]).any((2, 3))
    index, label = np.nonzero(items["labels"].astype(bool) & seen)
    return Maps(
        index, label, exact[index, label], averaged[index, label], logits, items["labels"] > 0
    )


def summarize(
    maps: dict[str, Maps], items: dict[str, dict[str, np.ndarray]], verdict: HeadVerdict
) -> dict[str, Any]:
    """The part of metrics.json for one head."""
    measured = {split: measure(maps[split], items[split]["mask"]) for split in maps}
    figures: dict[str, dict[str, float]] = {}
    thresholds = {}
    for row, name in enumerate(MAPS):
        best = int(measured["train"]["iou"][:, row].mean(0).argmax())
        thresholds[name] = float(ORGAN_IOU_THRESHOLDS[best])
        values = {key: value[:, row] for key, value in measured["val"].items()}
        values["iou"] = values["iou"][:, best]
        figures[name] = {key: float(nan_mean(values[key])) for key in MEASURES}
    val = maps["val"]
    scores, truth = val.logits.T, val.truth.T
    return {
        "verdict": {"kind": verdict.kind, "text": verdict.text},
        "auroc": _number(nan_mean(auroc(scores, truth))),
        "average_precision": _number(nan_mean(average_precision(scores, truth))),
        "pairs": len(val.image),
        "maps": figures,
        "thresholds": thresholds,
        "difference": difference(val),
    }


def measure(maps: Maps, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure [P, 4] of HiResCAM, Grad-CAM, centre blob and random map against the masks of
    the pairs' classes, "iou" [P, 4, T]; void is left out."""
    size, count = masks.shape[-1], len(maps.image)
    blob = centre_blob((1, 1, size, size))[0, 0]
    results = []
    for begin in range(0, count, CHUNK):
        rows = np.resize(np.arange(begin, min(begin + CHUNK, count)), CHUNK)  # one shape
        index, label = maps.image[rows], maps.label[rows]
        chance = random_maps(
            (CHUNK, 1, *maps.hirescam.shape[1:]), index=index, labels=label[:, None]
        )
        small = np.stack([maps.hirescam[rows], maps.gradcam[rows], chance[:, 0]], axis=1)
        result = _measure(small, blob, masks[index], label)
        results.append(jax.device_get(result))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


@jax.jit
def _measure(small: Array, blob: Array, masks: Array, label: Array) -> dict[str, Array]:
    size = masks.shape[-1]
    large = jax.image.resize(small, (*small.shape[:2], size, size), "linear")
    blobs = jnp.broadcast_to(blob, (len(small), 1, size, size))
    maps = jnp.concatenate([large[:, :2], blobs, large[:, 2:]], axis=1)
    inside = jnp.broadcast_to(masks[:, None] == label[:, None, None, None] + 1, maps.shape)
    void = jnp.broadcast_to(masks[:, None] == VOID, maps.shape)
    return {
        "iou": overlap(normalize_map(maps), inside, ORGAN_IOU_THRESHOLDS, void).iou,
        "pointing": pointing_game(maps, inside, void),
        "energy": energy_inside(maps, inside, void),
        "rank_accuracy": rank_accuracy(maps, inside, void),
        "average_precision": map_average_precision(maps, inside, void),
    }


def difference(maps: Maps) -> dict[str, float | None]:
    """How far Grad-CAM is from HiResCAM, see `compare`."""
    exact = maps.hirescam.reshape(len(maps.image), -1).astype(np.float64)
    averaged = maps.gradcam.reshape(len(maps.image), -1).astype(np.float64)
    gap = np.abs(exact - averaged)
    centred = [m - m.mean(1, keepdims=True) for m in (exact, averaged)]
    norms = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    product = (centred[0] * centred[1]).sum(1)
    correlation = np.where(norms > 0, product / np.where(norms > 0, norms, 1), np.nan)
    peak = np.abs(exact).max()
    return {
        "relative_l1": float(relative_l1(maps).mean()),
        "correlation": _number(nan_mean(correlation)),
        "other_peak": float((exact.argmax(1) != averaged.argmax(1)).mean()),
        "other_sign": float((np.sign(exact) != np.sign(averaged)).mean()),
        "largest": float(gap.max() / peak) if peak else 0.0,
    }


def relative_l1(maps: Maps) -> np.ndarray:
    """Per pair, sum |HiResCAM - Grad-CAM| / sum |HiResCAM|."""
    size = np.abs(maps.hirescam).sum((1, 2))
    return np.abs(maps.hirescam - maps.gradcam).sum((1, 2)) / np.where(size > 0, size, 1)


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    parts = []
    for name, head in result["heads"].items():
        rows = [[f"{name} head, {head['pairs']} objects", *MEASURES.values()]]
        rows += [
            [title, *(f"{head['maps'][key][m]:.3f}" for m in MEASURES)]
            for key, title in zip(
                MAPS, ("HiResCAM", "Grad-CAM", "centre blob", "random map"), strict=True
            )
        ]
        gap = head["difference"]
        line = (
            f"HiResCAM and Grad-CAM differ by {gap['relative_l1']:.2g} of the map (largest "
            f"{gap['largest']:.1g}); their peak lies elsewhere in {gap['other_peak']:.0%} of the "
            f"objects, their sign differs in {gap['other_sign']:.0%} of the cells"
        )
        parts.append("\n".join([aligned(rows), line, head["verdict"]["text"]]))
    return "\n\n".join(parts)


def draw(path: Path, items: dict[str, np.ndarray], maps: Maps, count: int = 8) -> None:
    """The objects on which the two maps differ most, an object a row: the photo with the outline of
    the object, Grad-CAM, HiResCAM, and HiResCAM minus Grad-CAM; one scale a row, blue for the
    class, red against it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gaps = relative_l1(maps)
    worst = np.argsort(-gaps, kind="stable")[:count]
    figure = Figure(figsize=(10.4, 2.75 * len(worst) + 0.7), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(worst), 4, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.5 / figure.get_figheight(), 0.03, 0.12)
    size = items["image"].shape[1]
    for row, pair in zip(axes, worst, strict=True):
        photo, mask = items["image"][maps.image[pair]], items["mask"][maps.image[pair]]
        inside = mask == maps.label[pair] + 1
        exact, averaged = maps.hirescam[pair], maps.gradcam[pair]
        peak = max(float(np.abs(exact).max()), float(np.abs(averaged).max()), 1e-12)
        grey = photo.mean(-1)
        for column, small in enumerate((None, averaged, exact, exact - averaged)):
            ax = row[column]
            ax.set_axis_off()
            if small is None:
                ax.imshow(photo)
            else:
                ax.imshow(grey, "Greys_r", vmin=-60, vmax=300)
                large = np.asarray(jax.image.resize(small, (size, size), "linear"))
                weight = np.clip(np.abs(large) / peak * 1.5, 0, 0.8)
                ax.imshow(large, "RdBu", vmin=-peak, vmax=peak, alpha=weight)
            ax.contour(inside, [0.5], colors="white", linewidths=2.4)
            ax.contour(inside, [0.5], colors="black", linewidths=1.0)
        name = CLASSES[maps.label[pair]]
        title = {"fontsize": 9.5, "loc": "left"}
        row[0].set_title(
            f"{name}, score {maps.logits[maps.image[pair], maps.label[pair]]:.1f}", **title
        )
        row[1].set_title("Grad-CAM", **title)
        row[2].set_title("HiResCAM", **title)
        row[3].set_title(f"difference: {gaps[pair]:.0%} of HiResCAM", **title)
    head = (
        "Where Grad-CAM and HiResCAM differ most (flatten head; blue: for the class, red: against)"
    )
    figure.text(0.012, 1 - 0.2 / figure.get_figheight(), head, fontsize=11, weight="bold")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def normalize(images: Array) -> Array:
    """uint8 RGB -> what torchvision's networks take."""
    return ((images.astype(jnp.float32) / 255 - MEAN) / STD).astype(jnp.float32)


def _loaded(source: VOC, name: str) -> dict[str, np.ndarray]:
    """A split in memory, read once by Grain's threads."""
    dataset = grain.MapDataset.source(source).to_iter_dataset()  # type: ignore[arg-type]
    bar = progress(dataset, f"reading {name}", "image", total=len(source))
    items = list(bar)
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


def _start(model: MobileNetV2, weights: Path | None, size: int, seed: int) -> dict[str, Any]:
    """Variables of the backbone; the classifier in a weight file is of other classes."""
    if weights is None:
        say("no --weights: the backbone is random, its maps mean nothing")
        init = jax.jit(partial(model.init, jax.random.key(seed)))
        return init(jnp.zeros((1, size, size, 3)))
    tensors = read_weights(weights)
    labels = len(tensors.get("classifier.1.bias", ())) or 1000
    original = model.clone(num_labels=labels, classifier="gap")
    return from_torch(original, tensors, (size, size, 3), str(weights))


def _feature_shape(model: MobileNetV2, size: int) -> tuple[int, ...]:
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.eval_shape(partial(model.apply, method="features"), variables, image).shape[1:]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
