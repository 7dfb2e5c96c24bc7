"""Training of the two heads on photos."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.errors import UserError
from hirescam_jax.experiments.voc.photos import VOC, VOID
from hirescam_jax.losses import classification_loss
from hirescam_jax.models import MobileNetV2
from hirescam_jax.progress import progress, say

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of torchvision
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
