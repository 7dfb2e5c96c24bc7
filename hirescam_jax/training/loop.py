"""Training: the loop around the step, in which everything happens on the devices."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hirescam_jax.config import Config, check_sizes
from hirescam_jax.data.pipeline import Source, eval_batches, train_batches
from hirescam_jax.devices import mesh, processes
from hirescam_jax.devices.layout import Layout
from hirescam_jax.devices.preemption import Preemption
from hirescam_jax.errors import Preempted, UserError
from hirescam_jax.progress import progress, say
from hirescam_jax.runs.checkpoints import Saver
from hirescam_jax.runs.log import Log
from hirescam_jax.runs.run import Header, Run, load_run
from hirescam_jax.runs.setup import open_data, open_layout
from hirescam_jax.training.costs import step_flops
from hirescam_jax.training.step import (
    TrainState,
    compile_train_step,
    eval_step,
    init_state,
    make_optimizer,
    on_mesh,
)
from hirescam_jax.training.watch import Trace, Watch
from hirescam_jax.weights.pytorch import start_weights


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    profile_steps: int = 0,
    sources: tuple[Source, Source] | None = None,
) -> Run:
    """Trains, validates each epoch, keeps the latest and the best checkpoint; returns the best.

    Args:
        run_dir: a new folder, or with `resume` that of an interrupted run.
        profile_steps: write a trace of so many steps to the run folder.
        sources: training and validation data that are open already.

    Raises:
        UserError: a run folder that exists (or does not, with `resume`), a loss that is not a
            finite number, bad data.
        Preempted: SIGTERM or SIGUSR1 came; the run is saved, to be continued with `resume`.
    """
    check_sizes(config)
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
    header = Header.of(config, training, validation)
    # A run that is resumed has its own weights, and does without the file.
    start = {} if resume else start_of(config, layout.shape)
    facts = header.facts(training=len(training), validation=len(validation))
    processes.agree({**facts, "the content of config.weights": _digest(start)})
    saver = Saver(run_dir, header, resume=resume)

    init = partial(init_state, config, optimizer, tuple(training.shape))
    fresh = jax.jit(init, out_shardings=mesh.replicated(layout.mesh))()
    state = saver.restore(fresh)
    if state is fresh:
        start = start or start_of(config, layout.shape)
        state = with_weights(fresh, start, layout)
    step = int(state.step)
    epoch = saver.epochs_done(step, epoch_steps)
    counts = len(training.labels), len(training.regions)
    step_fn = compile_train_step(config, optimizer, layout, *counts)
    eval_layout = open_layout(config, layout.shape, evaluation=True)
    eval_fn = on_mesh(eval_step, eval_layout, config=config)
    batches = train_batches(
        training, layout.share, seed=config.seed, start_step=step, workers=config.workers
    )
    watch = Watch(step_flops(config, layout, *counts))
    trace = Trace(run_dir, step, profile_steps)
    with Log(run_dir, step) as log, Preemption() as stop, saver, trace:
        while epoch < config.epochs and epoch - saver.best_epoch(epoch_steps) < config.patience:
            first, end, pending = step, (epoch + 1) * epoch_steps, None
            for _ in progress(range(step, end), f"epoch {epoch + 1}/{config.epochs}", "step"):
                with watch("input"):
                    batch = layout.to_devices(next(batches))
                trace.before(step, pending)
                with watch("device"):
                    state, metrics = step_fn(state, batch)
                    # Reading the step before leaves the device busy with this one.
                    pending = log.step(step, pending, metrics)
                step += 1
                if stop.reached():
                    break
                if config.save_steps and step % config.save_steps == 0 and step < end:
                    pending = log.step(step, pending, None)
                    with watch("checkpoint"):
                        saver.save(step, state)
            with watch("device"):
                log.step(step, pending, None)
            with watch("checkpoint"):
                saver.save(step, state)  # written during the validation
            with watch("validation"):
                losses = validate(eval_fn, state, validation, config, eval_layout, stop)
            if losses is None:
                saver.wait()
                raise Preempted(f"{run_dir}: stopped by a signal, saved at step {step}")
            if not math.isfinite(losses["loss"]):
                saver.set_aside(step)
                raise UserError(
                    f"validation loss is {losses['loss']}: the training diverged; lower "
                    "config.optimizer.learning_rate (the last good checkpoint is kept)"
                )
            with watch("checkpoint"):
                saver.save(step, state, losses)
            figures = watch.figures(step - first, (step - first) * config.batch_size)
            log.epoch(step, epoch, losses, figures)
            epoch += 1
    return load_run(run_dir)


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
    batches = eval_batches(source, layout.share, workers=config.workers)
    for _ in range(-(-len(source) // layout.batch_size)):
        if stop.reached():
            return None
        sums = eval_fn(state.variables, layout.to_devices(next(batches)))
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    return {name: float(total) / len(source) for name, total in totals.items()}


def start_of(config: Config, shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables in the file of `config.weights`, all of the model's or those of its backbone;
    none without a file."""
    if not config.weights:
        return {}
    variables, line = start_weights(config.weights, config.model, shape)
    say(line)
    return variables


def with_weights(state: TrainState, start: dict[str, Any], layout: Layout) -> TrainState:
    """The initial state with the variables of `start_of` in the place of its own."""
    own = mesh.replicate(start, layout.mesh)
    return state.replace(
        params={**state.params, **own.get("params", {})},
        batch_stats={**state.batch_stats, **own.get("batch_stats", {})},
    )


def _digest(tree: Any) -> str:
    """Of the bits of all arrays in a tree."""
    return sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()
