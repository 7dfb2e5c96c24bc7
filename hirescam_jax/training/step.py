"""The train step: one compiled program a batch.

int16 volumes, findings, region masks
  -> flips and rotations -> window -> features -> logits and HiResCAM maps
  -> classification loss + lambda * mask loss -> gradient -> update

The functions know nothing of data sets, files or loops; `on_mesh` puts them on any devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import SGD, Config
from hirescam_jax.devices import mesh
from hirescam_jax.devices.layout import Layout
from hirescam_jax.devices.mesh import DATA, DEPTH, WHOLE
from hirescam_jax.explanations.cam import hirescam
from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss
from hirescam_jax.models.contract import (
    attention_scale,
    features_of,
    has_slices,
    head_of,
    initial_variables,
    own_parameters,
    training_features,
)
from hirescam_jax.training.augment import augment

Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes."""

    step: Any  # int32 scalar, or its description where nothing is computed yet
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    config: Config,
    optimizer: Any,
    depth: tuple[int, int] | None = None,
) -> tuple[TrainState, Metrics]:
    """One update from a batch of int16 volumes [B, D, H, W], findings [B, K, R], regions
    [B, R, d, h, w] and index [B]. All randomness is a function of (config.seed, step, index).

    On a mesh (`on_mesh`) these are a device's own part, (D, d) of whole volumes are `depth`, and
    the result is that of one device with the whole batch.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    with volumes_of(batch, depth):
        volume = config.preprocess.normalize(batch["volume"])
        params = own_parameters(config.model, state.variables, volume, key)
    gradient = jax.grad(partial(batch_loss, config=config, depth=depth), has_aux=True)

    def micro_step(carry, part):
        grads, batch_stats = carry
        micro_key, micro_batch = part
        new, (batch_stats, metrics) = gradient(params, batch_stats, micro_batch, micro_key)
        return (jax.tree.map(jnp.add, grads, new), batch_stats), metrics

    count = config.micro_batches
    if count == 1:
        grads, (batch_stats, metrics) = gradient(params, state.batch_stats, batch, key)
    else:
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
        micro_batches = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        start = (jax.tree.map(jnp.zeros_like, params), state.batch_stats)
        (grads, batch_stats), metrics = jax.lax.scan(micro_step, start, (keys, micro_batches))
        grads, metrics = jax.tree.map(lambda x: x / count, (grads, jax.tree.map(sum, metrics)))
    grads = mesh.total_of_parts(grads, DATA, DEPTH)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {**mesh.total(metrics, DATA), "grad_norm": optax.tree.norm(grads)}
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, metrics


def batch_loss(
    params: Any,
    batch_stats: Any,
    batch: dict[str, Array],
    key: Array,
    *,
    config: Config,
    depth: tuple[int, int] | None,
) -> tuple[Array, tuple[Any, Metrics]]:
    """This device's share of the mean loss of a batch, new BatchNorm statistics, and metrics."""
    model, variables = config.model, {"params": params, "batch_stats": batch_stats}
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])
    volume, regions = augment(config.preprocess, keys, batch["volume"], batch["regions"], depth)
    volume = config.preprocess.normalize(volume)
    with volumes_of(batch, depth):
        features, batch_stats = training_features(model, variables, volume, key)
        head = head_of(model, {"params": params}, dropout=key)
        class_loss = classification_loss(head(features), labels_of(batch["findings"]))
        attention_loss = jnp.zeros_like(class_loss)
        if config.mask_weight > 0:
            maps = hirescam(head, features) * attention_scale(model, features)
            attention_loss = forbidden_attention(maps, batch["findings"], regions)
    loss = class_loss + config.mask_weight * attention_loss
    metrics = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
    share = jax.tree.map(lambda x: x / mesh.parts(DATA), metrics)
    return share["loss"], (batch_stats, share)


def volumes_of(batch: dict[str, Array], depth: tuple[int, int] | None) -> Any:
    """`mesh.volume_of` this batch."""
    size, _, cells, *_ = batch["regions"].shape
    return mesh.volume_of(size, cells, depth[1] if depth else cells)


def forbidden_attention(attention: Array, findings: Array, regions: Array) -> Array:
    """The mask loss; what is padding along the depth is never forbidden."""
    allowed = allowed_of(findings, regions)
    real = mesh.real(regions.shape[2])
    if real is not None:
        allowed |= ~real[:, None, None]
    split = mesh.split_axes(DEPTH)
    return mask_loss(attention, allowed, axis_name=split[0] if split else None)


def eval_step(
    variables: Any,
    batch: dict[str, Array],
    *,
    config: Config,
    depth: tuple[int, int] | None = None,
) -> Metrics:
    """Sums, over the real examples of a padded batch, of the losses as in `train_step`, without
    augmentation and with BatchNorm's running statistics."""
    model, volume = config.model, config.preprocess.normalize(batch["volume"])
    findings, regions = batch["findings"], batch["regions"]

    def of_each(loss: Callable[..., Array], *arrays: Array) -> Array:
        return jax.vmap(lambda *one: loss(*(a[None] for a in one)))(*arrays)

    with volumes_of(batch, depth):
        features = features_of(model, variables, volume)
        head = head_of(model, variables)
        attention = hirescam(head, features) * attention_scale(model, features)
        class_loss = of_each(classification_loss, head(features), labels_of(findings))
        attention_loss = of_each(forbidden_attention, attention, findings, regions)
    if not has_slices(model):
        attention_loss = jnp.zeros_like(attention_loss)  # no slices on which a mask could lie
    loss = class_loss + config.mask_weight * attention_loss
    sums = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
    sums = {name: jnp.sum(value * batch["weight"]) for name, value in sums.items()}
    return mesh.total(sums, DATA)


def on_mesh(step: Callable, layout: Layout, **options: Any) -> Any:
    """`train_step` or `eval_step` compiled for batches that lie on a mesh (state, batch -> ...).

    One program on each device: it computes with the device's own volumes and slices.
    """
    part = partial(step, depth=(layout.shape[0], layout.cells), **options)

    def whole(state: Any, batch: dict[str, Array]) -> Any:
        specs = {name: mesh.SPECS[name] for name in batch}
        return mesh.split(part, layout.mesh, (WHOLE, specs), WHOLE)(state, batch)

    donated = 0 if step is train_step else ()
    return jax.jit(whole, donate_argnums=donated, compiler_options=compiler_options())


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """The config's optimiser for a training of `steps` steps."""
    settings = config.optimizer
    if isinstance(settings, SGD):
        return optax.chain(
            optax.add_decayed_weights(settings.weight_decay),
            optax.sgd(settings.learning_rate, settings.momentum),
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, steps // 10), max(2, steps)
    )
    return optax.adamw(schedule, weight_decay=settings.weight_decay)


def init_state(config: Config, optimizer: Any, shape: tuple[int, ...]) -> TrainState:
    """The initial state for volumes of `shape` (D, H, W), a function of `config.seed`."""
    variables = initial_variables(config.model, jax.random.key(config.seed), jnp.zeros((1, *shape)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


def compile_train_step(
    config: Config, optimizer: Any, layout: Layout, labels: int, regions: int
) -> Any:
    """The compiled `train_step` (state, batch -> state, metrics), for which no data is needed."""
    everywhere = mesh.replicated(layout.mesh)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(partial(init_state, config, optimizer, tuple(layout.shape))),
    )
    size = layout.batch_size
    shapes = {
        "volume": ((size, *layout.padded_shape), np.int16),
        "findings": ((size, labels, regions), np.uint8),
        "regions": ((size, regions, layout.padded_cells, *layout.grid[1:]), np.uint8),
        "index": ((size,), np.int32),
    }
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(layout.mesh, mesh.SPECS[name])
        )
        for name, (shape, dtype) in shapes.items()
    }
    step = on_mesh(train_step, layout, config=config, optimizer=optimizer)
    return step.lower(state, batch).compile()
