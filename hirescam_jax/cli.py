"""The `hirescam` command. Each subcommand is one function here; it only starts things."""

import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hirescam_jax.errors import UserError

PROGRAM = "hirescam"


def demo(out: Path = Path("hirescam_demo"), seed: int = 0) -> None:
    """Train a small AxialNet on phantom CTs without and with the mask loss, and compare them.

    Args:
        out: a new folder for metrics.json, report.html and the two runs.
        seed: of the phantom, the initial weights and the order of the data.
    """
    from hirescam_jax.demo import demo as run_demo
    from hirescam_jax.demo import demo_config

    run_demo(out, demo_config(seed))


def train(arguments: Sequence[str]) -> None:
    """hirescam train [CONFIG.py] --run DIR [--resume] [--FIELD VALUE ...]

    Without a config file the demo's small network and phantom CTs are the defaults.
    """
    from hirescam_jax import config as configs
    from hirescam_jax.demo import demo_config
    from hirescam_jax.train import train as run_train

    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    default = configs.load_config(path) if path else demo_config()

    def command(
        run: Annotated[Path, tyro.conf.arg(help="folder of the run; new without --resume")],
        config: Annotated[configs.Config, tyro.conf.arg(name="")] = default,
        resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False,
    ) -> None:
        """Train a model; every field of the config can be overridden."""
        configs.check_types(config, str(path or "command line"))
        result = run_train(config, run, resume=resume)
        print(f"{run}: best epoch ends at step {result.step}")

    tyro.cli(
        command,
        prog=f"{PROGRAM} train [CONFIG.py]",
        args=list(arguments[1:] if path else arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )


def evaluate(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    checkpoint: Literal["best", "latest"] = "best",
) -> None:
    """Measure a run on its test split: AUROC, average precision, OrganIoU of both map methods.

    Args:
        run: folder of a run.
        out: the JSON file; default evaluation.json in the run's folder.
        checkpoint: which weights.
    """
    import json

    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.evaluate import evaluate_run, table
    from hirescam_jax.files import atomic_file
    from hirescam_jax.train import open_data

    opened = load_run(run, checkpoint)
    splits = [open_data(opened.config, split) for split in ("val", "test")]
    result = evaluate_run(opened, *splits)
    target = out or run / "evaluation.json"
    with atomic_file(target) as temporary:
        temporary.write_text(json.dumps({"step": opened.step, **result}, indent=2))
    print(table(result))
    print(target)


def explain(
    run: tyro.conf.Positional[Path],
    input: tuple[Path, ...],
    out: Path,
    labels: str = "",
    method: Literal["hirescam", "gradcam"] = "hirescam",
    grid: Literal["input", "features"] = "input",
    batch_size: int = 2,
    pictures: bool = True,
    overwrite: bool = False,
) -> None:
    """Explain CT volumes: maps as NIfTI in the scanner's own space, a table, and pictures.

    Args:
        run: folder of a run.
        input: NIfTI files in Hounsfield units, or folders of them.
        out: output folder; one folder a volume inside it.
        labels: names with commas between them; default those that the model predicts.
        method: HiResCAM, or Grad-CAM for comparison.
        grid: write the maps on the grid of the input, or on the native one of the features.
        batch_size: volumes explained at once.
        pictures: write a picture a label.
        overwrite: replace what is in `out`.
    """
    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.explain_files import explain_files

    names = [name.strip() for name in labels.split(",") if name.strip()]
    explain_files(
        load_run(run),
        input,
        out,
        labels=names,
        method=method,
        grid=grid,
        batch_size=batch_size,
        pictures=pictures,
        overwrite=overwrite,
    )


def phantom(
    out: Path,
    size: int = 4,
    split: Literal["train", "val", "test"] = "test",
    shape: tuple[int, int, int] = (100, 120, 120),
    seed: int = 0,
) -> None:
    """Write phantom CTs as NIfTI, with organ and lesion masks and a table of the findings.

    Args:
        out: a new folder.
        size: number of patients.
        split: in "train" and "val" the marks go with findings, in "test" they do not.
        shape: voxels from head to foot, front to back, right to left.
        seed: another seed is another population.
    """
    from hirescam_jax.data.phantom import PhantomConfig
    from hirescam_jax.data.phantom_export import export

    export(out, PhantomConfig(shape=shape, seed=seed), split, size)


COMMANDS = {"demo": demo, "evaluate": evaluate, "explain": explain, "phantom": phantom}
USAGE = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  demo       train on phantom CTs without and with the mask loss, and compare (4 minutes)
  train      train a model from a config
  evaluate   measure a run: AUROC, average precision, OrganIoU
  explain    explain CT volumes (NIfTI) with a run
  phantom    write phantom CTs as NIfTI

{PROGRAM} COMMAND --help tells the options of one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad input (one line says what), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(USAGE)
        return
    _quiet()
    try:
        if name == "train":
            train(rest)
        elif name in COMMANDS:
            tyro.cli(COMMANDS[name], prog=f"{PROGRAM} {name}", args=rest)
        else:
            from hirescam_jax.config import nearest

            raise UserError(f"no command '{name}'{nearest(name, [*COMMANDS, 'train'])}")
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        print(f"{PROGRAM}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _quiet() -> None:
    """Other libraries' chatter is not for the user of a command."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore")
