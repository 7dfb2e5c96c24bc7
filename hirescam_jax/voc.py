"""Grad-CAM against HiResCAM on PASCAL VOC 2012, for two heads on the same features.

A MobileNetV2 learns which of the 20 classes a photo shows, once with a global-average head ("gap"),
for which the two maps are the same, and once with one fully connected layer over all positions
("flatten"), for which only HiResCAM accounts for the score. Then both maps of every class that a
validation photo shows are measured against the class's mask (void left out), and with each other.
Thresholds are chosen on photos of the training set that the heads do not see.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.data.voc import CLASSES, VOC, VOID
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file
from hirescam_jax.losses import classification_loss
from hirescam_jax.models import MobileNetV2
from hirescam_jax.progress import progress, say
from hirescam_jax.verdict import head_verdict
from hirescam_jax.voc_faithful import faithfulness
from hirescam_jax.voc_maps import Pairs, compare_maps, measure_baselines
from hirescam_jax.voc_predictions import prediction_scores
from hirescam_jax.voc_report import table, write_page
from hirescam_jax.weights import from_torch, read_weights

HEADS = ("gap", "flatten")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of torchvision
TUNE_SHARE = 0.2  # of the training photos: for the maps' thresholds, not trained on
BACKBONE = "mobilenet"  # its name in the variables


class Split(NamedTuple):
    """A split in memory: features float32 [N, h, w, C] (None where the backbone learns), labels
    uint8 [N, 20] and masks uint8 [N, S, S] as `VOC` has them."""

    features: np.ndarray | None
    labels: np.ndarray
    masks: np.ndarray


class State(NamedTuple):
    """What a step of training takes and returns."""

    params: Any
    batch_stats: Any
    opt_state: Any


def run_voc(
    path: Path,
    weights: Path,
    out: Path,
    *,
    size: int = 224,
    epochs: int = 20,
    finetune: bool = False,
    train_set: str = "train",
    val_set: str = "val",
    batch_size: int = 16,
    seed: int = 0,
    faithful: int = 10,
    backbone: MobileNetV2 | None = None,
) -> dict[str, Any]:
    """Trains both heads, compares their maps and writes metrics.json, voc.html and pictures.

    Without `finetune` the backbone is frozen: its features are computed once (0.25 MB a photo at
    224 pixels, kept in memory), and only the head learns. With it the whole network learns, with
    BatchNorm's statistics of each batch and with half of the photos mirrored.

    Args:
        weights: torchvision's MobileNetV2 (.pth, .safetensors), whatever its classifier.
        out: a folder that is new or empty.
        size: of the square that a photo is scaled into.
        train_set, val_set: see `VOC`. A photo that is in both is taken out of the training.
        faithful: insertion, deletion and ROAD on so many pairs that a head predicts.
        backbone: the architecture; MobileNetV2 by default.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: as `VOC`, `read_weights` and `from_torch`; `out` exists; nothing to train on, or
            nothing to measure.
    """
    if epochs < 1:
        raise UserError(f"epochs: {epochs}: at least 1 is needed")
    sources = {"train": VOC(path, train_set, size), "val": VOC(path, val_set, size)}
    left_out = sources["train"].without(sources["val"].names)
    if left_out:
        say(f"{left_out} photos of {train_set} are in {val_set} too: left out of the training")
    if not len(sources["train"]):
        raise UserError(f"{path}: all photos of {train_set} are in {val_set}: choose another set")
    if len(sources["train"]) < 2:
        raise UserError(f"{path}: {train_set} has one photo: one is needed for the thresholds too")
    sources["tune"] = sources["train"].split_off(TUNE_SHARE, seed)
    tensors = read_weights(weights)
    outputs = tensors.get("classifier.1.bias", np.zeros(1000)).shape[0]
    backbone = (backbone or MobileNetV2()).clone(num_labels=outputs, classifier="gap")
    start = from_torch(backbone, tensors, (size, size), str(weights))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)

    splits = {
        name: read_split(source, name, None if finetune else backbone, start)
        for name, source in sources.items()
    }
    pairs = {name: Pairs.of(split.labels, split.masks) for name, split in splits.items()}
    for name, found in pairs.items():
        if not len(found.photo):
            raise UserError(f"{path}: no photo of the {name} split shows a class in its mask")
    result: dict[str, Any] = {
        "data": {
            name: {
                "source": sources[name].source,
                "photos": len(sources[name]),
                "pairs": len(pairs[name].photo),
            }
            for name in sources
        },
        "settings": {
            **{"size": size, "epochs": epochs, "finetune": finetune},
            **{"batch_size": batch_size, "seed": seed, "weights": weights.name},
            "faithful": faithful,
            **{"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        },
        "heads": {},
    }
    baselines = None
    shown: dict[str, Any] = {}
    for head in HEADS:
        model = backbone.clone(num_labels=len(CLASSES), classifier=head)
        if finetune:
            variables = train_whole(
                model, start, sources["train"], epochs=epochs, batch_size=batch_size, seed=seed
            )
            seen = {
                name: read_split(source, f"{name}, {head}", model, variables)
                for name, source in sources.items()
            }
        else:
            seen = splits
            variables = train_head(
                model, seen["train"], epochs=epochs, batch_size=batch_size, seed=seed
            )
        features = seen["val"].features
        assert features is not None
        grid = features.shape[1:3]
        baselines = baselines or measure_baselines(
            grid, pairs["tune"], splits["tune"].masks, pairs["val"], splits["val"].masks
        )
        figures, maps = _examined(model, variables, seen, pairs, baselines)
        if faithful:
            whole = {**start, **variables, "params": {**start["params"], **variables["params"]}}

            def image(photo: int) -> Array:
                return normalized(jnp.asarray(sources["val"][photo]["image"])[None])

            figures["faithfulness"] = faithfulness(
                model, whole, image, maps, pairs["val"], faithful, seed
            )
        result["heads"][head], shown[head] = figures, maps
    with atomic_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(_plain(result), indent=2))
    write_page(out, result, shown, pairs["val"], sources["val"])
    print(table(result))
    print(out / "voc.html")
    return result


def _examined(
    model: MobileNetV2,
    variables: Any,
    splits: dict[str, Split],
    pairs: dict[str, Pairs],
    baselines: Any,
) -> tuple[dict[str, Any], Any]:
    """All figures of a head, and its maps of the validation pairs."""
    features = splits["val"].features
    assert features is not None
    apply_head: Any = partial(model.apply, variables, method="head")
    verdict = head_verdict(apply_head, (1, *features.shape[1:]))
    logits = np.concatenate(
        [np.asarray(apply_head(jnp.asarray(part))) for part in chunks(features, 64)]
    )
    maps, figures = compare_maps(model, variables, splits, pairs, baselines)
    return {
        "verdict": dataclasses.asdict(verdict),
        "predictions": {
            **prediction_scores(logits, splits["val"].labels),
            "pairs": int((maps.logit >= 0).sum()),
        },
        **figures,
    }, maps


# -- data -----------------------------------------------------------------------------------------


def normalized(images: Array) -> Float[Array, "B S S C"]:
    """uint8 [B, S, S, 3] -> float32, as torchvision's networks take them."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)


def read_split(source: VOC, name: str, model: MobileNetV2 | None, variables: Any) -> Split:
    """Labels and masks of a split, and with a model its features."""

    @partial(jax.jit, compiler_options=compiler_options())
    def features_of(variables: Any, images: Array) -> Array:
        network: Any = model
        return network.apply(variables, normalized(images), method="features")

    batch = 16
    dataset = grain.MapDataset.source(source)  # type: ignore[arg-type]
    batches = dataset.batch(batch).to_iter_dataset(grain.ReadOptions(2, 4))
    title = f"reading {name}" if model is None else f"features of {name}"
    parts: dict[str, list] = {"features": [], "labels": [], "mask": []}
    for item in progress(batches, title, "batch", total=-(-len(source) // batch)):
        parts["labels"].append(item["labels"])
        parts["mask"].append(item["mask"])
        if model is not None:
            images = item["image"]
            filled = np.zeros((batch, *images.shape[1:]), np.uint8)  # one shape, one program
            filled[: len(images)] = images
            parts["features"].append(np.asarray(features_of(variables, filled))[: len(images)])
    features, labels, masks = (np.concatenate(p) if p else None for p in parts.values())
    assert labels is not None
    assert masks is not None
    return Split(features, labels, masks)


def chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Parts of at most `size` along the first axis."""
    for first in range(0, len(array), size):
        yield array[first : first + size]


# -- training -------------------------------------------------------------------------------------


def train_head(
    model: MobileNetV2, split: Split, *, epochs: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Trains the head alone, on features that are there; returns the head's variables."""
    features, labels = split.features, split.labels
    assert features is not None
    params = _fresh_head(model, features.shape[1:], seed)

    def load(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return features[items], labels[items]

    steps, batches = _endless(len(labels), load, epochs, batch_size, seed)
    optimizer = _optimizer(params, steps)
    state = State(params, {}, optimizer.init(params))
    state = _train(model, optimizer, state, batches, steps, seed, finetune=False)
    return {"params": state.params}


def train_whole(
    model: MobileNetV2, start: Any, source: VOC, *, epochs: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Trains backbone and head from the backbone's variables `start`."""
    images = jax.ShapeDtypeStruct((1, source.size, source.size, 3), jnp.float32)
    features: Any = jax.eval_shape(partial(model.apply, method="features"), start, images)
    params = {
        BACKBONE: start["params"][BACKBONE],
        **_fresh_head(model, features.shape[1:], seed),
    }

    def load(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        read = [source[i] for i in items]
        return tuple(np.stack([item[name] for item in read]) for name in ("image", "labels"))  # type: ignore[return-value]

    steps, batches = _endless(len(source), load, epochs, batch_size, seed)
    optimizer = _optimizer(params, steps)
    state = State(params, start["batch_stats"], optimizer.init(params))
    state = _train(model, optimizer, state, batches, steps, seed, finetune=True)
    return {"params": state.params, "batch_stats": state.batch_stats}


def _fresh_head(model: MobileNetV2, shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Random parameters of the head for features [B, *shape]."""
    variables: Any = model.init(jax.random.key(seed), jnp.zeros((1, *shape)), method="head")
    return variables["params"]


def _endless(
    count: int, load: Any, epochs: int, batch_size: int, seed: int
) -> tuple[int, Iterator[tuple[np.ndarray, np.ndarray]]]:
    """The number of steps, and their batches: shuffled anew each epoch, all of one size."""
    batch_size = min(batch_size, count)
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
    dataset = order.batch(batch_size, drop_remainder=True)
    read = dataset.map(load).to_iter_dataset(grain.ReadOptions(2, 4))
    return len(dataset), iter(read)


def _optimizer(params: Any, steps: int) -> Any:
    """AdamW with a cosine to zero.

    A step of Adam changes all weights by the same, and so a score by that times the sum of the
    head's inputs: their number, 1280 or 49 times as many, divides the head's rate. A pretrained
    backbone takes small steps.
    """
    inputs = params["fc"]["kernel"].shape[0]

    def adamw(rate: float) -> Any:
        return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-2)

    kinds = {name: "backbone" if name == BACKBONE else "head" for name in params}
    return optax.multi_transform({"head": adamw(4 / inputs), "backbone": adamw(3e-4)}, kinds)


def _train(
    model: MobileNetV2,
    optimizer: Any,
    state: State,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    steps: int,
    seed: int,
    finetune: bool,
) -> State:
    """All steps. The loss of the step before is looked at, never the current one's."""
    step = jax.jit(
        partial(train_step, model, optimizer, finetune), compiler_options=compiler_options()
    )
    key = jax.random.key(seed)
    losses: list[Any] = []
    for number, (inputs, labels) in enumerate(
        progress(batches, f"training {model.classifier}", "step", total=steps)
    ):
        state, loss = step(state, inputs, labels, jax.random.fold_in(key, number))
        losses.append(loss)
        if number and not math.isfinite(float(losses[-2])):
            break
    first, last = float(losses[0]), float(losses[-1])
    if not math.isfinite(last):
        raise UserError(
            f"the loss of the {model.classifier} head became {last}: are --weights of this network?"
        )
    say(f"{model.classifier}: loss {first:.3f} -> {last:.3f} in {len(losses)} steps")
    return state


def train_step(
    model: MobileNetV2,
    optimizer: Any,
    finetune: bool,
    state: State,
    inputs: Array | np.ndarray,
    labels: Array | np.ndarray,
    key: Array,
) -> tuple[State, Float[Array, ""]]:
    """One update by binary cross-entropy over all classes that count; one program.

    Args:
        inputs: features [B, h, w, C], or with `finetune` photos uint8 [B, S, S, 3], of which each
            is mirrored with probability 1/2.
        labels: [B, 20] in {0, 1}, or 255 for a class that does not count.
    """
    flip_key, dropout_key = jax.random.split(key)
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    if finetune:
        flip_B = jax.random.bernoulli(flip_key, 0.5, inputs.shape[:1])
        inputs = jnp.where(flip_B[:, None, None, None], inputs[:, :, ::-1], inputs)
        inputs = normalized(inputs)

    def loss_of(params: Any) -> tuple[Array, Any]:
        logits, changed = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            True,
            method=None if finetune else "head",
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        loss = classification_loss(logits, labels == 1, labels != VOID)
        return loss, changed.get("batch_stats", {})

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


def _plain(value: Any) -> Any:
    """For JSON: what is not defined is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
