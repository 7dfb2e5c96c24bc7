"""The `hirescam` command. Each subcommand is one function here; it only starts things."""

import contextlib
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from hirescam_jax.cam import Method
from hirescam_jax.cli_data import (
    compare,
    inspect,
    lesions,
    localize,
    names_of,
    phantom,
    prepare,
    table,
    voc,
)
from hirescam_jax.errors import Preempted, StartError, UserError

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


DRY_RUN = "compile the step only: FLOPs, bytes, memory, communication, the largest batch"
REDUCED = "the same experiment, small: a narrow network on phantom CTs, a minute on two cores"
CHECK = "do nothing if the run was made with this config; otherwise say what differs"
PROFILE = "write a trace of so many steps to the run folder, from the third on"


def train(arguments: Sequence[str]) -> None:
    """hirescam train [CONFIG.py] --run DIR [--resume] [--FIELD VALUE ...]

    Without a config file the demo's small network and phantom CTs are the defaults.
    """
    from hirescam_jax import config as configs
    from hirescam_jax.demo import demo_config
    from hirescam_jax.train import train as run_train

    path = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    default = configs.load_config(path) if path else demo_config()
    if "--reduced" in arguments:
        from hirescam_jax.paper import reduced as make_reduced

        default = make_reduced(default)

    def command(
        run: Annotated[Path, tyro.conf.arg(help="folder of the run; new without --resume")],
        config: Annotated[configs.Config, tyro.conf.arg(name="")] = default,
        resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False,
        reduced: Annotated[bool, tyro.conf.arg(help=REDUCED)] = False,
        dry_run: Annotated[bool, tyro.conf.arg(help=DRY_RUN)] = False,
        memory_gib: Annotated[float, tyro.conf.arg(help="of a device, for --dry-run")] = 80.0,
        profile: Annotated[int, tyro.conf.arg(help=PROFILE)] = 0,
        check: Annotated[bool, tyro.conf.arg(help=CHECK)] = False,
    ) -> None:
        """Train a model; every field of the config can be overridden."""
        configs.check_types(config, str(path or "command line"))
        if check:
            from hirescam_jax.paper import check_made_with

            check_made_with(run, config)
            return
        if dry_run:
            from hirescam_jax.costs import dry_run as text

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
    from hirescam_jax import config as configs
    from hirescam_jax.convert import convert_image_weights, run_to_weights, weights_to_run

    path, rest = _take_option(arguments, "--config")
    default = configs.load_config(Path(path)) if path else configs.Config()

    def command(
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_SOURCE)],
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help=CONVERT_TARGET)],
        config: Annotated[configs.Config, tyro.conf.arg(name="")] = default,
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
            configs.check_types(config, path)
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


def evaluate(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    checkpoint: Literal["best", "latest"] = "best",
    split: Literal["test", "val"] = "test",
    depth_devices: int | None = None,
    faithfulness: int = 0,
    sanity: int = 0,
) -> None:
    """Measure a run on its validation and test splits: AUROC, average precision, calibration, and
    its maps against organs and lesions, beside maps that no model made. Repeat the command to
    continue after an interruption.

    Args:
        run: folder of a run.
        out: the JSON file; default evaluation.json in the run's folder. Beside it go the values of
            each volume, of which `hirescam table` makes differences between runs.
        checkpoint: which weights.
        split: val for data without a test split (CT-RATE): the thresholds of the maps are chosen on
            the volumes that are reported.
        depth_devices: devices that share a volume; default as in training.
        faithfulness: insertion, deletion and ROAD of the maps on so many test volumes; each takes
            hundreds of passes of the model.
        sanity: randomise the layers one after the other, with the maps of so many test volumes;
            also a picture beside the JSON file.
    """
    import json

    from hirescam_jax import distributed, evaluate_checks
    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.config import measured_alike
    from hirescam_jax.data.pipeline import digest_of
    from hirescam_jax.evaluate import evaluate_run, table
    from hirescam_jax.files import atomic_file
    from hirescam_jax.kept import Kept
    from hirescam_jax.train import open_data
    from hirescam_jax.values import Values

    opened = load_run(run, checkpoint).on_mesh(depth_devices)
    config = measured_alike(opened.config)
    splits = {"val": open_data(config, "val", with_lesions=True)}
    if split == "test":
        try:
            splits["test"] = open_data(config, "test", with_lesions=True)
        except UserError as error:
            raise UserError(f"{error}; to measure the validation split: --split val") from error
    facts = {**opened.header.facts(**{n: len(s) for n, s in splits.items()}), "format": "2"}
    facts["step"] = str(opened.step)
    facts["content of the splits"] = str(list(map(digest_of, splits.values())))
    distributed.agree(facts)
    target = out or run / "evaluation.json"
    kept = Kept(target.with_name(f".{target.stem}_batches"), facts)
    values: dict[str, Values] = {}
    options: Any = {"faithfulness": faithfulness, "sanity": sanity, "kept": kept, "values": values}
    result = evaluate_run(opened, splits["val"], splits.get("test"), **options)

    def write() -> None:
        for name, of_split in values.items():
            of_split.save(target.with_name(f"{target.stem}_{name}.npz"))
        with atomic_file(target) as temporary:
            temporary.write_text(json.dumps({"step": opened.step, **result}, indent=2))
        print(table(result))
        if faithfulness:
            print(f"\n{evaluate_checks.faithfulness_table(result['faithfulness'])}")
        if sanity:
            picture = target.with_name(f"{target.stem}_sanity.png")
            evaluate_checks.save_sanity_picture(picture, result["sanity"])
            print(picture)
        print(target)

    distributed.on_first(write)
    kept.remove()


def explain(
    run: tyro.conf.Positional[Path],
    out: Path,
    input: tuple[Path, ...] = (),
    store: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    labels: str = "",
    method: Method = "hirescam",
    grid: Literal["input", "features"] | None = None,
    format: Literal["zarr", "nifti"] = "zarr",
    batch_size: int = 2,
    depth_devices: int | None = None,
    pictures: bool = True,
    overwrite: bool = False,
) -> None:
    """Explain CT volumes: files (--input), with maps as NIfTI in the scanner's own space, a table
    and pictures; or a split of a store (--store), with all maps in one Zarr array store, on any
    number of devices and processes. Repeat the command to continue after an interruption.

    Args:
        run: folder of a run.
        out: output folder; for files one folder a volume inside it.
        input: NIfTI files in Hounsfield units, or folders of them.
        store: folder of a store.
        split: of the store.
        labels: names with commas between them; default those that the model predicts for a file,
            and all for a store.
        method: HiResCAM; or another for comparison, which does not account for the score.
        grid: files: write the maps on the grid of the input (default), or on the native one of the
            features, which a store's are always on.
        format: of a store's maps; nifti writes a folder a volume.
        batch_size: volumes explained at once.
        depth_devices: a store: devices that share a volume; default as in training.
        pictures: files: write a picture a label.
        overwrite: replace what is in `out`.
    """
    import jax

    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.explain_files import explain_files
    from hirescam_jax.explain_store import explain_store

    if bool(input) == (store is not None):
        raise UserError("give either --input FILES or --store STORE")
    chosen = names_of(labels)
    common: Any = {"method": method, "batch_size": batch_size, "overwrite": overwrite}
    if store is not None:
        if grid == "input":
            raise UserError(
                "--grid input: a store holds volumes on the model's grid, so that their maps are "
                "on the feature grid: leave it out, or explain the files with --input"
            )
        opened = load_run(run).on_mesh(depth_devices)
        explain_store(opened, store, split, out, labels=chosen, format=format, **common)
        if jax.process_index() == 0:
            print(out)
        return
    if format != "zarr" or depth_devices is not None:
        raise UserError("--format and --depth-devices go with --store, not with --input")
    if jax.process_count() > 1:
        raise UserError("--input runs in one process: for several, prepare a store (--store)")
    common |= {"grid": grid or "input", "pictures": pictures}
    explain_files(load_run(run), input, out, labels=chosen, **common)


COMMANDS = {
    "compare": compare,
    "demo": demo,
    "evaluate": evaluate,
    "explain": explain,
    "inspect": inspect,
    "lesions": lesions,
    "localize": localize,
    "phantom": phantom,
    "prepare": prepare,
    "table": table,
    "voc": voc,
}
USAGE = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  demo       train on phantom CTs without and with the mask loss, and compare (4 minutes)
  prepare    turn CT volumes and labels into a store for training
  inspect    summarise a store
  train      train a model from a config
  evaluate   measure a run: predictions, calibration, maps against organs and lesions
  compare    how alike the maps of two runs are: other seeds, permuted labels
  explain    explain CT volumes (NIfTI), or a store, with a run
  convert    PyTorch weights to a run folder or to Flax variables, and back
  phantom    write phantom CTs as NIfTI
  lesions    write copies of real CTs with synthetic lesions, to check a pipeline
  localize   compare written maps with masks of lesions
  table      turn evaluations of several runs into tables (CSV, Markdown, LaTeX)
  voc        Grad-CAM against HiResCAM on PASCAL VOC 2012's class masks

{PROGRAM} COMMAND --help tells the options of one.

train, evaluate and explain run on several processes too, which find each other under SLURM, in
Kubernetes and on TPU pods; elsewhere each of N is given
  --coordinator HOST:PORT --num-processes N --process-id I
  --start-timeout SECONDS      wait for the others at start (default 300)
  --heartbeat-timeout SECONDS  one that is silent for so long counts as dead (default 100)"""

# Those whose options are the fields of a config file.
OWN_ARGUMENTS = {"train": train, "convert": convert}
# Those that run on several processes.
DISTRIBUTED = ("train", "evaluate", "explain")
COMPUTING = (*DISTRIBUTED, "demo", "voc")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 done but for some volumes, ended with another process or
    without the others' start, 2 bad input (one line says what), 75 stopped by a signal and saved:
    run again with --resume, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    _quiet()
    try:
        _run(arguments)
    except UserError as error:
        _end(str(error), 1 if isinstance(error, StartError) else 2)
    except Preempted as error:
        from hirescam_jax import preemption

        preemption.ignore()
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(preemption.STOPPED)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}", 2)
    except Exception as error:
        import jax

        from hirescam_jax import distributed

        if not distributed.peer_lost(error):
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()  # a normal end would wait for those that wait for this process
            distributed.leave(1)
        line = " ".join(str(error).split())
        _end(f"another process has ended, see its output ({line[:200]}): continue with --resume", 1)


def _run(arguments: Sequence[str]) -> None:
    from hirescam_jax import distributed, preemption
    from hirescam_jax.compiling import reuse_memory

    launch, rest = distributed.parse_launch(arguments)
    name, rest = (rest[0], rest[1:]) if rest else ("", [])
    if name not in DISTRIBUTED and launch.coordinator is not None:
        raise UserError(f"--coordinator: '{name}' runs in one process")
    with preemption.before_training() if name == "train" else contextlib.nullcontext():
        if name in COMPUTING and not {"-h", "--help"} & set(rest):
            if name in DISTRIBUTED:
                distributed.start(launch, preemptible=name == "train")
            reuse_memory()
        _call(name, rest)


def _call(name: str, rest: Sequence[str]) -> None:
    if name in OWN_ARGUMENTS:
        OWN_ARGUMENTS[name](rest)
    elif name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"{PROGRAM} {name}", args=list(rest))
    else:
        from hirescam_jax.config import nearest

        raise UserError(f"no command '{name}'{nearest(name, [*COMMANDS, *OWN_ARGUMENTS])}")


def _end(message: str, code: int) -> NoReturn:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    from hirescam_jax import distributed

    distributed.leave(code)


def _quiet() -> None:
    """Other libraries' chatter is not for the user of a command."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # what Orbax logs in full it raises too
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
