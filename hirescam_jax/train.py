"""Training. The whole of it happens in `train_step`: one compiled program a batch.

int16 volumes, findings, region masks
  -> flips and rotations -> window -> features -> logits and HiResCAM maps
  -> classification loss + lambda * mask loss -> gradient -> update
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hirescam_jax import checkpoint, distributed, sharding
from hirescam_jax.cam import hirescam
from hirescam_jax.config import SGD, Config
from hirescam_jax.data.pipeline import Source, eval_batches, open_split, train_batches
from hirescam_jax.errors import Preempted, UserError
from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss
from hirescam_jax.preemption import Preemption
from hirescam_jax.preprocess import augment
from hirescam_jax.progress import Log, progress
from hirescam_jax.sharding import DATA, DEPTH, WHOLE, Layout

Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes."""

    step: Array
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
    params = over_layers(sharding.own, config.model, state.params)
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
    grads = over_layers(sharding.total, config.model, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {**sharding.total(metrics, DATA), "grad_norm": optax.tree.norm(grads)}
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
    model: Any = config.model
    cells = depth[1] if depth else None
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])
    volume, regions = augment(config.preprocess, keys, batch["volume"], batch["regions"], depth)
    features, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        config.preprocess.normalize(volume),
        True,
        cells,
        method="features",
        mutable=["batch_stats"],
    )

    def head(features):
        rngs = {"dropout": key}
        return model.apply({"params": params}, features, True, cells, method="head", rngs=rngs)

    class_loss = classification_loss(head(features), labels_of(batch["findings"]))
    attention_loss = jnp.zeros_like(class_loss)
    if config.mask_weight > 0:
        maps = hirescam(head, features) * attention_scale(model, features, cells)
        attention_loss = forbidden_attention(maps, batch["findings"], regions, cells)
    loss = class_loss + config.mask_weight * attention_loss
    metrics = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
    share = jax.tree.map(lambda x: x / sharding.parts(DATA), metrics)
    return share["loss"], (updates.get("batch_stats", batch_stats), share)


def forbidden_attention(
    attention: Array, findings: Array, regions: Array, cells: int | None
) -> Array:
    """The mask loss; what is padding along the depth is never forbidden."""
    allowed = allowed_of(findings, regions)
    real = sharding.real_cells(regions.shape[2], cells)
    if real is not None:
        allowed |= ~real[:, None, None]
    split = sharding.split_axes(DEPTH)
    return mask_loss(attention, allowed, axis_name=split[0] if split else None)


def attention_scale(model: Any, features: Array, cells: int | None) -> float:
    """The model's attention scale for the grid of a whole volume."""
    depth = cells or features.shape[1] * sharding.parts(DEPTH)
    return model.attention_scale((depth, *features.shape[2:-1]))


def over_layers(function: Callable, model: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Applies `sharding.own` or `total`: over both axes to parameters that each device uses on its
    own slices, over `data` alone to those that all along the depth use in the same way."""

    def of_one(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return function(leaf, DATA, *(() if model.behind_depth(name) else (DEPTH,)))

    return jax.tree_util.tree_map_with_path(of_one, tree)


def eval_step(
    variables: Any,
    batch: dict[str, Array],
    *,
    config: Config,
    depth: tuple[int, int] | None = None,
) -> Metrics:
    """Sums, over the real examples of a padded batch, of the losses as in `train_step`, without
    augmentation and with BatchNorm's running statistics."""
    model: Any = config.model
    cells = depth[1] if depth else None
    volume = config.preprocess.normalize(batch["volume"])
    features = model.apply(variables, volume, False, cells, method="features")

    def head(features):
        return model.apply(variables, features, False, cells, method="head")

    attention = hirescam(head, features) * attention_scale(model, features, cells)

    def of_each(loss: Callable[..., Array], *arrays: Array) -> Array:
        return jax.vmap(lambda *one: loss(*(a[None] for a in one)))(*arrays)

    penalty = partial(forbidden_attention, cells=cells)
    class_loss = of_each(classification_loss, head(features), labels_of(batch["findings"]))
    attention_loss = of_each(penalty, attention, batch["findings"], batch["regions"])
    loss = class_loss + config.mask_weight * attention_loss
    sums = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
    sums = {name: jnp.sum(value * batch["weight"]) for name, value in sums.items()}
    return sharding.total(sums, DATA)


def on_mesh(step: Callable, layout: Layout, **options: Any) -> Any:
    """`train_step` or `eval_step` compiled for batches that lie on a mesh (state, batch -> ...).

    One program on each device: it computes with the device's own volumes and slices.
    """
    part = partial(step, depth=(layout.shape[0], layout.cells), **options)

    def whole(state: Any, batch: dict[str, Array]) -> Any:
        specs = {name: sharding.SPECS[name] for name in batch}
        return sharding.split(part, layout.mesh, (WHOLE, specs), WHOLE)(state, batch)

    return jax.jit(whole, donate_argnums=0 if step is train_step else ())


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
    variables = config.model.init(jax.random.key(config.seed), jnp.zeros((1, *shape)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


def feature_grid(model: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(d, h, w) of the model's features for volumes of `shape`, without running it.

    Raises:
        UserError: volumes too small for the model.
    """
    volume = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), volume)
        features = jax.eval_shape(partial(model.apply, method="features"), variables, volume)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model does not fit volumes of {shape}: {error}") from error
    grid = features.shape[1:-1]
    if min(grid) < 1:
        raise UserError(f"config.model leaves no features of volumes of {shape}: grid {grid}")
    return grid


def open_layout(config: Config, shape: tuple[int, ...], *, evaluation: bool = False) -> Layout:
    """How the config's batches of volumes of `shape` lie on all devices of all processes; for
    evaluation, where a last batch is filled up anyway, raised to what the devices can share.

    Raises:
        UserError: a batch or a mesh that does not fit the devices.
    """
    mesh = sharding.make_mesh(config.depth_devices)
    grid, unit = feature_grid(config.model, shape), config.model.depth_unit
    if evaluation:
        devices = mesh.shape[DATA]
        return Layout(mesh, -(-config.batch_size // devices) * devices, shape, grid, unit)
    return Layout(mesh, config.batch_size, shape, grid, unit, config.micro_batches)


def open_data(config: Config, split: str) -> Source:
    """A split of the config's data with its masks on the feature grid of the config's model."""
    shape = open_split(config.data, split, (1, 1, 1)).shape
    return open_split(config.data, split, feature_grid(config.model, shape), config.labels)


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    sources: tuple[Source, Source] | None = None,
) -> checkpoint.Run:
    """Trains, validates each epoch, keeps the latest and the best checkpoint; returns the best.

    Args:
        run_dir: a new folder, or with `resume` that of an interrupted run.
        sources: training and validation data that are open already.

    Raises:
        UserError: a run folder that exists (or does not, with `resume`), a loss that is not a
            finite number, bad data.
        Preempted: SIGTERM or SIGUSR1 came; the run is saved, to be continued with `resume`.
    """
    least_of = {"batch_size": 1, "micro_batches": 1, "epochs": 1, "save_steps": 0}
    for name, least in least_of.items():
        if getattr(config, name) < least:
            raise UserError(f"config.{name} must be at least {least}, got {getattr(config, name)}")
    training, validation = sources or (open_data(config, "train"), open_data(config, "val"))
    model = config.model.clone(num_labels=len(training.labels))
    config = dataclasses.replace(config, model=model)
    layout = open_layout(config, tuple(training.shape))
    if len(training) < config.batch_size:
        raise UserError(
            f"config.batch_size = {config.batch_size} exceeds the {len(training)} training volumes"
        )
    if len(validation) == 0:
        raise UserError("the validation split is empty: raise config.data.val_size")
    if config.preprocess.rotate > 0 and training.shape[1] != training.shape[2]:
        raise UserError(
            f"volumes of {training.shape} cannot be rotated by 90 degrees: set "
            "config.preprocess.rotate to 0"
        )
    epoch_steps = len(training) // config.batch_size
    optimizer = make_optimizer(config, epoch_steps * config.epochs)
    header = checkpoint.Header.of(config, training)
    distributed.agree(header.facts(training=len(training), validation=len(validation)))
    saver = checkpoint.Saver(run_dir, header, resume=resume)

    init = partial(init_state, config, optimizer, tuple(training.shape))
    state = jax.jit(init, out_shardings=sharding.replicated(layout.mesh))()
    state = saver.restore(state)
    step = int(state.step)
    epoch = saver.epochs_done(step, epoch_steps)
    step_fn = on_mesh(train_step, layout, config=config, optimizer=optimizer)
    eval_layout = open_layout(config, layout.shape, evaluation=True)
    eval_fn = on_mesh(eval_step, eval_layout, config=config)
    batches = train_batches(
        training, layout.share, seed=config.seed, start_step=step, workers=config.workers
    )
    with Log(run_dir, step) as log, saver, Preemption() as stop:
        while epoch < config.epochs and epoch - saver.best_epoch(epoch_steps) < config.patience:
            first, start, pending = step, time.perf_counter(), None
            end = (epoch + 1) * epoch_steps
            for _ in progress(range(step, end), f"epoch {epoch + 1}/{config.epochs}", "step"):
                state, metrics = step_fn(state, layout.to_devices(next(batches)))
                # Reading the step before leaves the device busy with this one.
                pending = log.step(step, pending, metrics)
                step += 1
                if stop.reached():
                    break
                if config.save_steps and step % config.save_steps == 0 and step < end:
                    pending = log.step(step, pending, None)
                    saver.save(step, state)
            log.step(step, pending, None)
            seconds = time.perf_counter() - start
            losses = validate(eval_fn, state, validation, config, eval_layout, stop)
            saver.save(step, state, losses)
            if losses is None:
                saver.wait()
                raise Preempted(f"{run_dir}: stopped by a signal, saved at step {step}")
            log.epoch(step, epoch, losses, (step - first) * config.batch_size / seconds)
            epoch += 1
    return checkpoint.load_run(run_dir)


def validate(
    eval_fn: Callable,
    state: TrainState,
    source: Source,
    config: Config,
    layout: Layout,
    stop: Preemption,
) -> dict[str, float] | None:
    """Mean losses over a split; None if a signal stopped it."""
    totals: dict[str, Any] = {}
    for batch in eval_batches(source, layout.share, workers=config.workers):
        if stop.reached():
            return None
        sums = eval_fn(state.variables, layout.to_devices(batch))
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    losses = {name: float(total) / len(source) for name, total in totals.items()}
    if not math.isfinite(losses["loss"]):
        raise UserError(
            f"validation loss is {losses['loss']}: the training diverged; lower "
            "config.optimizer.learning_rate (the last good checkpoint is kept)"
        )
    return losses
