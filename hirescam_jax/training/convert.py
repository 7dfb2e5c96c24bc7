"""Weight files of networks for volumes to run folders, of those for images to files of Flax
variables, and back."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from hirescam_jax.config import Config
from hirescam_jax.errors import UserError, nearest
from hirescam_jax.files import atomic_folder
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.models.images import ARCHITECTURES
from hirescam_jax.runs.checkpoints import Saver
from hirescam_jax.runs.run import Header, load_run
from hirescam_jax.runs.setup import open_data
from hirescam_jax.training.step import TrainState, make_optimizer
from hirescam_jax.weights.names import layer_name
from hirescam_jax.weights.pytorch import (
    as_variables,
    check_suffix,
    from_torch,
    holds_variables,
    read_weights,
    to_torch,
    write_variables,
    write_weights,
)

IMAGE_SIZE = (224, 224)  # any will do: no tensor of theirs depends on it


def convert(
    source: Path,
    target: Path,
    config: Config | None = None,
    architecture: str = "",
    which: Literal["best", "latest"] = "best",
    overwrite: bool = False,
) -> int:
    """`weights_to_run`, `run_to_weights` or `convert_image_weights`, by what is given.

    Args:
        source: a run folder, or a weight file: of the config's model, or of the architecture.
        config: of the model and its data.
        architecture: of a network for images.
        which: of a run's weights.

    Returns:
        The number of tensors.

    Raises:
        UserError: config and architecture, or none of them for a file; and as the three functions.
    """
    if architecture and config is not None:
        raise UserError("convert: give --config or --architecture, not both")
    if architecture:
        return convert_image_weights(source, target, architecture, overwrite)
    if source.is_dir():
        return run_to_weights(source, target, which, overwrite)
    if config is None:
        raise UserError(
            "convert: give --config CONFIG.py, which says the model and its data, or, for a "
            "network for images, --architecture NAME"
        )
    return weights_to_run(source, target, config, overwrite)


def weights_to_run(source: Path, target: Path, config: Config, overwrite: bool = False) -> int:
    """A weight file -> a run folder at step 0, for `load_run`, `hirescam explain` and `evaluate`.

    Args:
        source: .pth, .pt or .safetensors, of the config's model.
        target: the folder; written whole or not at all.
        config: of the model and the data, which give the names of labels and regions and the shape
            of the volumes.
        overwrite: replace a run folder.

    Returns:
        The number of tensors.

    Raises:
        UserError: a target that exists, weights of another model, bad data.
    """
    if target.exists() and not (overwrite and (target / "run.json").is_file()):
        fix = "is no run folder: choose another" if overwrite else "exists: add --overwrite"
        raise UserError(f"{target}: {fix}")
    tensors = read_weights(source)
    data = open_data(config, "train")
    config = dataclasses.replace(config, model=config.model.clone(num_labels=len(data.labels)))
    feature_grid(config.model, tuple(data.shape))  # says what does not fit
    variables = from_torch(config.model, tensors, tuple(data.shape), str(source))
    optimizer = make_optimizer(config, 1)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )
    with atomic_folder(target) as temporary:
        temporary.rmdir()  # the saver makes it
        saver = Saver(temporary, Header.of(config, data), resume=False)
        state = saver.restore(jax.device_put(state))
        with saver:
            saver.save(0, state)
    return len(tensors)


def run_to_weights(
    run_dir: Path,
    target: Path,
    which: Literal["best", "latest"] = "best",
    overwrite: bool = False,
) -> int:
    """A run folder -> a weight file for the authors' PyTorch code, or for a later training; as
    .pth or .pt a checkpoint {"params": state dict}, as theirs are.

    Returns:
        The number of tensors.

    Raises:
        UserError: a target that exists or has no known suffix, a run that cannot be opened.
    """
    _check_target(target, overwrite)
    run = load_run(run_dir, which)
    tensors = to_torch(run.model, run.variables, run.shape)
    write_weights(target, tensors, key="params")
    return len(tensors)


def convert_image_weights(
    source: Path, target: Path, architecture: str, overwrite: bool = False
) -> int:
    """A weight file of torchvision's -> one of Flax variables (`weights.read_variables`), or back
    to torchvision's names.

    Args:
        architecture: one of `ARCHITECTURES`, with as many labels as the file has.

    Returns:
        The number of tensors.

    Raises:
        UserError: an unknown architecture, a target that exists or has no suffix for it, weights of
            another architecture.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"no architecture '{architecture}'{nearest(architecture, ARCHITECTURES)}")
    _check_target(target, overwrite)
    model, tensors = ARCHITECTURES[architecture], read_weights(source)
    back = holds_variables(tensors)
    bias = "params/fc/bias" if back else f"{layer_name(model, ('fc',))}.bias"
    if bias in tensors and tensors[bias].ndim == 1:
        model = model.clone(num_labels=len(tensors[bias]))
    if not back:
        return write_variables(target, from_torch(model, tensors, IMAGE_SIZE, str(source)))
    try:
        state = to_torch(model, as_variables(tensors), IMAGE_SIZE)
    except ValueError as error:
        raise UserError(f"{source}: not variables of {architecture}: {error}") from error
    write_weights(target, state)
    return len(tensors)


def _check_target(target: Path, overwrite: bool) -> None:
    check_suffix(target)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists: add --overwrite")
    if not target.parent.is_dir():
        raise UserError(f"{target}: {target.parent} is no folder: make it first")
