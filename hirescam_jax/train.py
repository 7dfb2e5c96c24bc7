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

from hirescam_jax import checkpoint, sharding
from hirescam_jax.cam import hirescam
from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import SGD, Config
from hirescam_jax.data.pipeline import Source, eval_batches, open_split, train_batches
from hirescam_jax.errors import UserError
from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss
from hirescam_jax.preprocess import augment
from hirescam_jax.progress import Log, progress

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
    state: TrainState, batch: dict[str, Array], *, config: Config, optimizer: Any
) -> tuple[TrainState, Metrics]:
    """One update from a batch of int16 volumes [B, D, H, W], findings [B, K, R], regions
    [B, R, d, h, w] and index [B]. All randomness is a function of (config.seed, step, index)."""
    model: Any = config.model
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment_keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])
    volume, regions = augment(config.preprocess, augment_keys, batch["volume"], batch["regions"])
    volume = config.preprocess.normalize(volume)
    labels = labels_of(batch["findings"])
    allowed = allowed_of(batch["findings"], regions)

    def loss_fn(params):
        features, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            volume,
            train=True,
            method="features",
            mutable=["batch_stats"],
        )

        def head(features):
            rngs = {"dropout": key}
            return model.apply({"params": params}, features, True, method="head", rngs=rngs)

        class_loss = classification_loss(head(features), labels)
        attention_loss = jnp.zeros(())
        if config.mask_weight > 0:
            scale = model.attention_scale(features.shape[1:-1])
            attention_loss = mask_loss(hirescam(head, features) * scale, allowed)
        loss = class_loss + config.mask_weight * attention_loss
        metrics = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
        return loss, (updates.get("batch_stats", {}), metrics)

    grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, metrics


def eval_step(variables: Any, batch: dict[str, Array], *, config: Config) -> Metrics:
    """Sums, over the real examples of a padded batch, of the losses as in `train_step`, without
    augmentation and with BatchNorm's running statistics."""
    model: Any = config.model
    features = model.apply(
        variables, config.preprocess.normalize(batch["volume"]), method="features"
    )
    head = partial(model.apply, variables, method="head")
    attention = hirescam(head, features) * model.attention_scale(features.shape[1:-1])
    allowed = allowed_of(batch["findings"], batch["regions"])

    def of_each(loss: Callable[[Array, Array], Array], *arrays: Array) -> Array:
        return jax.vmap(lambda *one: loss(*(a[None] for a in one)))(*arrays)

    class_loss = of_each(classification_loss, head(features), labels_of(batch["findings"]))
    attention_loss = of_each(mask_loss, attention, allowed)
    loss = class_loss + config.mask_weight * attention_loss
    sums = {"loss": loss, "class_loss": class_loss, "mask_loss": attention_loss}
    return {name: jnp.sum(value * batch["weight"]) for name, value in sums.items()}


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
    """
    for name in ("batch_size", "epochs"):
        if getattr(config, name) < 1:
            raise UserError(f"config.{name} must be at least 1, got {getattr(config, name)}")
    training, validation = sources or (open_data(config, "train"), open_data(config, "val"))
    model = config.model.clone(num_labels=len(training.labels))
    config = dataclasses.replace(config, model=model)
    mesh = sharding.data_mesh(config.batch_size)
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
    total_steps = epoch_steps * config.epochs
    optimizer = make_optimizer(config, total_steps)
    header = checkpoint.Header.of(config, training)
    saver = checkpoint.Saver(run_dir, header, resume=resume)

    init = partial(init_state, config, optimizer, tuple(training.shape))
    state = jax.jit(init, out_shardings=sharding.replicated(mesh))()
    state = saver.restore(state)
    step = int(state.step)
    options = compiler_options()
    step_fn = jax.jit(
        partial(train_step, config=config, optimizer=optimizer),
        donate_argnums=0,
        compiler_options=options,
    )
    eval_fn = jax.jit(partial(eval_step, config=config), compiler_options=options)
    batches = train_batches(
        training,
        config.batch_size,
        seed=config.seed,
        start_step=step,
        workers=config.workers,
    )
    with Log(run_dir, step) as log, saver:
        while step < total_steps and saver.stale_epochs(epoch_steps) < config.patience:
            epoch, start, pending = step // epoch_steps, time.perf_counter(), None
            end = (epoch + 1) * epoch_steps
            for _ in progress(range(step, end), f"epoch {epoch + 1}/{config.epochs}", "step"):
                state, metrics = step_fn(state, sharding.to_devices(mesh, next(batches)))
                # Reading the step before leaves the device busy with this one.
                pending = log.step(step, pending, metrics)
                step += 1
            log.step(step, pending, None)
            seconds = time.perf_counter() - start
            losses = validate(eval_fn, state, validation, config, mesh)
            log.epoch(step, epoch, losses, epoch_steps * config.batch_size / seconds)
            saver.save(step, state, losses["loss"])
    return checkpoint.load_run(run_dir)


def validate(
    eval_fn: Callable, state: TrainState, source: Source, config: Config, mesh: Any
) -> dict[str, float]:
    """Mean losses over a split."""
    totals: dict[str, Any] = {}
    for batch in eval_batches(source, config.batch_size, workers=config.workers):
        sums = eval_fn(state.variables, sharding.to_devices(mesh, batch))
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    losses = {name: float(total) / len(source) for name, total in totals.items()}
    if not math.isfinite(losses["loss"]):
        raise UserError(
            f"validation loss is {losses['loss']}: the training diverged; lower "
            "config.optimizer.learning_rate (the last good checkpoint is kept)"
        )
    return losses
