"""hirescam demo, train, convert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hirescam_jax.cli.options import PROGRAM, asks_for_help, take_option
from hirescam_jax.cli.outline import outlined


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
    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    Config, default = _train_config(path, arguments)

    def command(
        run: Annotated[Path, tyro.conf.arg(help="folder of the run; new without --resume")],
        config: Annotated[Config, tyro.conf.arg(name="")] = default,  # type: ignore[valid-type]
        resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False,
        reduced: Annotated[bool, tyro.conf.arg(help=REDUCED)] = False,
        dry_run: Annotated[bool, tyro.conf.arg(help=DRY_RUN)] = False,
        memory_gib: Annotated[float, tyro.conf.arg(help="of a device, for --dry-run")] = 80.0,
        profile: Annotated[int, tyro.conf.arg(help=PROFILE)] = 0,
        check: Annotated[bool, tyro.conf.arg(help=CHECK)] = False,
    ) -> None:
        """Train a model; every field of the config can be overridden."""
        from hirescam_jax.runs.config_files import check_types

        check_types(config, str(path or "command line"))
        if check:
            from hirescam_jax.experiments.papers import check_made_with

            check_made_with(run, config)
        elif dry_run:
            from hirescam_jax.training.costs import dry_run as text

            print(text(config, memory_gib))
        else:
            from hirescam_jax.training.loop import train as run_train

            result = run_train(config, run, resume=resume, profile_steps=profile)
            print(f"{run}: best epoch ends at step {result.step}")

    tyro.cli(
        command,
        prog=f"{PROGRAM} train [CONFIG.py]",
        args=list(arguments[1:] if path else arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )


def _train_config(path: Path | None, arguments: Sequence[str]) -> tuple[Any, Any]:
    """`Config`, and the one whose fields are the defaults; outlines, if help is all that is asked
    for: the real ones import JAX."""
    if path is None and asks_for_help(arguments) and "--reduced" not in arguments:
        config = outlined("hirescam_jax.experiments.demo", "demo_config")()
        return outlined("hirescam_jax.config", "Config"), config
    from hirescam_jax.config import Config
    from hirescam_jax.experiments.demo import demo_config
    from hirescam_jax.runs.config_files import load_config

    config = load_config(path) if path else demo_config()
    if "--reduced" in arguments:
        from hirescam_jax.experiments.papers import reduced

        config = reduced(config)
    return Config, config


def convert(arguments: Sequence[str]) -> None:
    """hirescam convert SOURCE TARGET [--config CONFIG.py] [--FIELD VALUE ...] [--overwrite], or
    hirescam convert SOURCE TARGET --architecture NAME [--overwrite]"""
    path, rest = take_option(arguments, "--config")
    Config, default = _convert_config(path, rest)

    def command(
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_SOURCE)],
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_TARGET)],
        config: Annotated[Config, tyro.conf.arg(name="")] = default,  # type: ignore[valid-type]
        checkpoint: Annotated[Literal["best", "latest"], tyro.conf.arg(help="of a run")] = "best",
        architecture: Annotated[str, tyro.conf.arg(help=ARCHITECTURE)] = "",
        overwrite: Annotated[bool, tyro.conf.arg(help="replace TARGET")] = False,
    ) -> None:
        """PyTorch weights to a run folder (which needs --config CONFIG.py, of the model and its
        data, whose fields can be overridden), or a run folder to PyTorch weights. With
        --architecture: weights of a network for images to Flax variables, or back."""
        from hirescam_jax.runs.config_files import check_types
        from hirescam_jax.training.convert import convert as run_convert

        if path is not None:
            check_types(config, path)
        given = config if path is not None else None
        count = run_convert(source, target, given, architecture, checkpoint, overwrite)
        print(f"{target}: {count} tensors of {source}")

    tyro.cli(
        command,
        prog=f"{PROGRAM} convert [--config CONFIG.py]",
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _convert_config(path: str | None, arguments: Sequence[str]) -> tuple[Any, Any]:
    """As `_train_config`."""
    if path is None and asks_for_help(arguments):
        Config = outlined("hirescam_jax.config", "Config")
        return Config, Config()
    from hirescam_jax.config import Config
    from hirescam_jax.runs.config_files import load_config

    return Config, load_config(Path(path)) if path else Config()


CONVERT_SOURCE = "a weight file (.pth, .safetensors), or the folder of a run"
CONVERT_TARGET = "a new run folder, or a weight file (.pth, .pt, .safetensors)"
ARCHITECTURE = (
    "of torchvision's: resnet18, resnet34, resnet50, vgg16, densenet121 or mobilenet_v2; makes "
    "a .safetensors file of Flax variables, and of such a file torchvision's weights"
)
