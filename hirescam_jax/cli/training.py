"""hirescam demo, train, convert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hirescam_jax.cli.options import PROGRAM
from hirescam_jax.errors import UserError


def demo(out: Path = Path("hirescam_demo"), seed: int = 0) -> None:
    """Train a small AxialNet on phantom CTs without and with the mask loss, and compare them.

    Args:
        out: a new folder for metrics.json, report.html and the two runs.
        seed: of the phantom, the initial weights and the order of the data.
    """
    from hirescam_jax.experiments.demo import demo as run_demo
    from hirescam_jax.experiments.demo import demo_config

    run_demo(out, demo_config(seed))


DRY_RUN = "compile the step only: FLOPs, bytes, memory, communication, the largest batch"
REDUCED = "the same experiment, small: a narrow network on phantom CTs, a minute on two cores"
CHECK = "do nothing if the run was made with this config; otherwise say what differs"
PROFILE = "write a trace of so many steps to the run folder, from the third on"


def train(arguments: Sequence[str]) -> None:
    """hirescam train [CONFIG.py] --run DIR [--resume] [--FIELD VALUE ...]

    Without a config file the demo's small network and phantom CTs are the defaults.
    """
    from hirescam_jax.config import Config
    from hirescam_jax.experiments.demo import demo_config
    from hirescam_jax.runs.config_files import check_types, load_config
    from hirescam_jax.training.loop import train as run_train

    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    default = load_config(path) if path else demo_config()
    if "--reduced" in arguments:
        from hirescam_jax.experiments.papers import reduced as make_reduced

        default = make_reduced(default)

    def command(
        run: Annotated[Path, tyro.conf.arg(help="folder of the run; new without --resume")],
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
        resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False,
        reduced: Annotated[bool, tyro.conf.arg(help=REDUCED)] = False,
        dry_run: Annotated[bool, tyro.conf.arg(help=DRY_RUN)] = False,
        memory_gib: Annotated[float, tyro.conf.arg(help="of a device, for --dry-run")] = 80.0,
        profile: Annotated[int, tyro.conf.arg(help=PROFILE)] = 0,
        check: Annotated[bool, tyro.conf.arg(help=CHECK)] = False,
    ) -> None:
        """Train a model; every field of the config can be overridden."""
        check_types(config, str(path or "command line"))
        if check:
            from hirescam_jax.experiments.papers import check_made_with

            check_made_with(run, config)
            return
        if dry_run:
            from hirescam_jax.training.costs import dry_run as text

            print(text(config, memory_gib))
            return
        result = run_train(config, run, resume=resume, profile_steps=profile)
        print(f"{run}: best epoch ends at step {result.step}")

    tyro.cli(
        command,
        prog=f"{PROGRAM} train [CONFIG.py]",
        args=list(arguments[1:] if path else arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )


def convert(arguments: Sequence[str]) -> None:
    """hirescam convert SOURCE TARGET [--config CONFIG.py] [--FIELD VALUE ...] [--overwrite], or
    hirescam convert SOURCE TARGET --architecture NAME [--overwrite]"""
    from hirescam_jax.config import Config
    from hirescam_jax.runs.config_files import check_types, load_config
    from hirescam_jax.training.convert import convert_image_weights, run_to_weights, weights_to_run

    path, rest = _take_option(arguments, "--config")
    default = load_config(Path(path)) if path else Config()

    def command(
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_SOURCE)],
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_TARGET)],
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
        checkpoint: Annotated[Literal["best", "latest"], tyro.conf.arg(help="of a run")] = "best",
        architecture: Annotated[str, tyro.conf.arg(help=ARCHITECTURE)] = "",
        overwrite: Annotated[bool, tyro.conf.arg(help="replace TARGET")] = False,
    ) -> None:
        """PyTorch weights to a run folder (which needs --config CONFIG.py, of the model and its
        data, whose fields can be overridden), or a run folder to PyTorch weights. With
        --architecture: weights of a network for images to Flax variables, or back."""
        if architecture and path:
            raise UserError("convert: give --config or --architecture, not both")
        if architecture:
            count = convert_image_weights(source, target, architecture, overwrite)
        elif source.is_dir():
            count = run_to_weights(source, target, checkpoint, overwrite)
        elif path is None:
            raise UserError(
                "convert: give --config CONFIG.py, which says the model and its data, or, for a "
                "network for images, --architecture NAME"
            )
        else:
            check_types(config, path)
            count = weights_to_run(source, target, config, overwrite)
        print(f"{target}: {count} tensors of {source}")

    tyro.cli(
        command,
        prog=f"{PROGRAM} convert [--config CONFIG.py]",
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )


CONVERT_SOURCE = "a weight file (.pth, .safetensors), or the folder of a run"
CONVERT_TARGET = "a new run folder, or a weight file (.pth, .pt, .safetensors)"
ARCHITECTURE = (
    "of torchvision's: resnet18, resnet34, resnet50, vgg16, densenet121 or mobilenet_v2; makes "
    "a .safetensors file of Flax variables, and of such a file torchvision's weights"
)


def _take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option, None without it, and the other arguments."""
    rest, value = list(arguments), None
    for i, argument in enumerate(rest):
        if argument == name and i + 1 < len(rest):
            value = rest[i + 1]
            del rest[i : i + 2]
            break
        if argument.startswith(f"{name}="):
            value = rest.pop(i).partition("=")[2]
            break
    return value, rest
