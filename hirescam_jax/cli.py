"""The `hirescam` command. Each subcommand is one function here; it only starts things."""

import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from hirescam_jax.errors import Preempted, UserError

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

    def command(
        run: Annotated[Path, tyro.conf.arg(help="folder of the run; new without --resume")],
        config: Annotated[configs.Config, tyro.conf.arg(name="")] = default,
        resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False,
        dry_run: Annotated[bool, tyro.conf.arg(help=DRY_RUN)] = False,
        memory_gib: Annotated[float, tyro.conf.arg(help="of a device, for --dry-run")] = 80.0,
        profile: Annotated[int, tyro.conf.arg(help=PROFILE)] = 0,
    ) -> None:
        """Train a model; every field of the config can be overridden."""
        configs.check_types(config, str(path or "command line"))
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


def evaluate(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    checkpoint: Literal["best", "latest"] = "best",
    depth_devices: int | None = None,
) -> None:
    """Measure a run on its test split: AUROC, average precision, OrganIoU of both map methods.

    Args:
        run: folder of a run.
        out: the JSON file; default evaluation.json in the run's folder.
        checkpoint: which weights.
        depth_devices: devices that share a volume; default as in training.
    """
    import json

    from hirescam_jax import distributed
    from hirescam_jax.checkpoint import load_run
    from hirescam_jax.evaluate import evaluate_run, table
    from hirescam_jax.files import atomic_file
    from hirescam_jax.train import open_data

    opened = load_run(run, checkpoint).on_mesh(depth_devices)
    splits = [open_data(opened.config, split) for split in ("val", "test")]
    sizes = {name: len(split) for name, split in zip(("val", "test"), splits, strict=True)}
    distributed.agree({**opened.header.facts(**sizes), "step": str(opened.step)})
    result = evaluate_run(opened, *splits)
    target = out or run / "evaluation.json"

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text(json.dumps({"step": opened.step, **result}, indent=2))
        print(table(result))
        print(target)

    distributed.on_first(write)


def explain(
    run: tyro.conf.Positional[Path],
    out: Path,
    input: tuple[Path, ...] = (),
    store: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    labels: str = "",
    method: Literal["hirescam", "gradcam"] = "hirescam",
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
        method: HiResCAM, or Grad-CAM for comparison.
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
    chosen = _names(labels)
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


def prepare(
    kind: tyro.conf.Positional[Literal["rad-chestct", "ct-rate", "nifti", "dicom", "medmnist"]],
    path: tyro.conf.Positional[Path],
    out: Path,
    regions: str = "auto",
    region_map: Path | None = None,
    region_suffix: str = "",
    spacing: tuple[float, float, float] = (0.8, 0.8, 0.8),
    shape: tuple[int, int, int] = (405, 420, 420),
    split_seed: int = 0,
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    shards: int = 0,
    shard: str = "",
    workers: int | None = None,
    worker_gib: float = 8.0,
    strict: bool = False,
    overwrite: bool = False,
    table: Path | None = None,
    label_regions: Path | None = None,
    tables: Path | None = None,
    selection: Literal["all", "counts", "paper"] | None = None,
    crop_lungs: bool = False,
    tree: Literal["plain", "fixed"] | None = None,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Turn volumes and their labels into a store for training. Repeat the command to continue
    after an interruption. Exit code 1: some volumes were left out, see rejects.csv.

    Args:
        kind: of data set or file.
        path: its folder (medmnist: the .npz file).
        out: folder of the store.
        regions: "auto" (found in the CT) or a folder of label maps, TotalSegmentator's by default.
        region_map: JSON, region -> TotalSegmentator classes, or -> ids of any label map.
        region_suffix: of the label maps, between id and .nii.gz.
        spacing: of the grid in mm, head to foot, front to back, right to left.
        shape: of the grid.
        split_seed: of the split by patients, where the data set has none.
        split_fractions: of train, val and test.
        shards: files a split; one for 32 volumes if 0.
        shard: "i/n" prepares part i of n, from 0, as one job of an array; the last one joins.
        workers: processes, one a core by default; 0 works in this one.
        worker_gib: memory that a process may use.
        strict: stop at the first volume that cannot be prepared.
        overwrite: replace what is in `out`.
        table: nifti, dicom: the CSV table of labels.
        label_regions: nifti, dicom, ct-rate: JSON, label -> regions in which it is found.
        tables: rad-chestct: folder of the CSV files, if it is another.
        selection: rad-chestct: all labels, the paper's 80, or by its minimum counts.
        crop_lungs: rad-chestct: keep the box around the lungs only.
        tree: ct-rate: which of its trees.
        classes: medmnist: names of its classes.
    """
    import inspect

    from hirescam_jax.data.prepare import prepare as run_prepare
    from hirescam_jax.data.readers import READERS

    options = {
        "table": table,
        "label_regions": _json(label_regions) if label_regions else None,
        "tables": tables,
        "selection": selection,
        "crop_lungs": crop_lungs or None,
        "tree": tree,
        "classes": classes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in inspect.signature(READERS[kind]).parameters:
            raise UserError(f"--{name.replace('_', '-')}: {kind} has no such option")
    reader = READERS[kind](path, **given)
    result = run_prepare(
        reader,
        _region_source(reader.regions, regions, region_map, region_suffix),
        out,
        spacing_mm=spacing,
        shape=shape,
        split_seed=split_seed,
        split_fractions=split_fractions,
        shards=shards,
        shard=_part(shard) if shard else None,
        workers=workers,
        worker_gib=worker_gib,
        strict=strict,
        overwrite=overwrite,
    )
    counts = ", ".join(f"{count} {split}" for split, count in result.counts.items())
    print(f"{out}: {counts}; {result.fallbacks} of them with coarse organ masks")
    if not result.whole:
        print("other parts are still to be prepared; the last one makes the store whole")
    if result.rejects:
        first = result.rejects[0]
        where = f"see {out / 'rejects.csv'}" if result.whole else f"{first.id}: {first.reason}"
        print(f"{PROGRAM}: {len(result.rejects)} left out: {where}", file=sys.stderr)
        sys.exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _part(text: str) -> tuple[int, int]:
    try:
        number, count = map(int, text.split("/"))
    except ValueError as error:
        raise UserError(f"--shard {text}: give i/n, such as 0/8") from error
    return number, count


def _json(path: Path) -> Any:
    """A JSON file of names -> lists."""
    import json

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UserError(f'{path}: give {{"name": ["...", "..."], ...}}')
    return content


def _region_source(names: Sequence[str], regions: str, region_map: Path | None, suffix: str) -> Any:
    """What gives the masks of the regions `names`."""
    from hirescam_jax.data import region_sources as sources

    if regions == "auto":
        if region_map or suffix:
            raise UserError("--region-map and --region-suffix need --regions FOLDER")
        return sources.AutoRegions(names)
    if region_map is None:
        return sources.TotalSegmentatorRegions(regions, suffix=suffix, regions=names)
    mapping = _json(region_map)
    numbers = all(isinstance(item, int) for items in mapping.values() for item in items)
    kind = sources.LabelMapRegions if numbers else sources.TotalSegmentatorRegions
    return kind(regions, mapping, suffix, regions=names)


def inspect(store: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Summarise a store: counts, labels, Hounsfield units, regions; pictures as a page.

    Args:
        store: folder of the store.
        out: an HTML file for the summary with pictures of volumes and masks.
    """
    from hirescam_jax.data.inspect_store import inspect_store, text, write_page

    summary = inspect_store(store)
    print(text(summary))
    if out is not None:
        write_page(out, store, summary)
        print(out)


def lesions(
    cts: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    copies: int = 20,
    seed: int = 0,
    patient: Literal["copy", "ct"] = "copy",
    chance: float = 0.4,
    labels: str = "",
    workers: int | None = None,
) -> None:
    """Write copies of real CTs with synthetic lesions of known place: a check of a whole pipeline.

    Args:
        cts: chest CTs (NIfTI, Hounsfield units), or folders of them.
        out: a new folder, which `hirescam prepare nifti` reads; README.txt in it tells how.
        copies: of each CT.
        seed: another seed is another data set.
        patient: "copy" spreads the copies of a CT over train, val and test; "ct" keeps them
            together, which needs three CTs or more.
        chance: of each kind of lesion in each copy.
        labels: names with commas between them of the kinds to place; default all.
        workers: processes, one a core by default; 0 works in this one.
    """
    from hirescam_jax.data.lesion_folder import make_lesion_folder
    from hirescam_jax.data.lesions import LABELS

    make_lesion_folder(
        out,
        cts,
        copies=copies,
        seed=seed,
        patient=patient,
        chance=chance,
        labels=_names(labels) or LABELS,
        workers=workers,
    )
    print(out)


def localize(
    explained: tyro.conf.Positional[Path],
    masks: Path,
    label_map: Path,
    out: Path | None = None,
    method: Literal["hirescam", "gradcam"] = "hirescam",
    suffix: str = "_lesions",
    organ_suffix: str = "_regions",
    tolerance_mm: float = 0.0,
) -> None:
    """Compare written maps with masks of lesions: pointing game and energy, beside the maps of
    other volumes and uniform maps of the organ and of the whole volume.

    Args:
        explained: folder of `hirescam explain --grid input`.
        masks: folder of label maps <id>SUFFIX.nii.gz on the grids of the CTs.
        label_map: JSON, label -> its numbers in those; `hirescam lesions` writes lesions.json.
        out: a CSV file of all pairs of volume and label.
        method: of the maps.
        suffix: of the masks of lesions, between id and .nii.gz.
        organ_suffix: of the masks of organs, where there are any.
        tolerance_mm: so near to a lesion counts as on it.
    """
    from hirescam_jax import localize as localization

    if out is not None and out.exists():
        raise UserError(f"{out}: exists; choose another file")
    found = localization.localize(
        explained,
        masks,
        _json(label_map),
        method=method,
        suffix=suffix,
        organ_suffix=organ_suffix,
        tolerance_mm=tolerance_mm,
    )
    print(localization.table(found))
    if out is not None:
        localization.write_table(out, found)
        print(out)


COMMANDS = {
    "demo": demo,
    "evaluate": evaluate,
    "explain": explain,
    "inspect": inspect,
    "lesions": lesions,
    "localize": localize,
    "phantom": phantom,
    "prepare": prepare,
}
USAGE = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  demo       train on phantom CTs without and with the mask loss, and compare (4 minutes)
  prepare    turn CT volumes and labels into a store for training
  inspect    summarise a store
  train      train a model from a config
  evaluate   measure a run: AUROC, average precision, OrganIoU
  explain    explain CT volumes (NIfTI), or a store, with a run
  phantom    write phantom CTs as NIfTI
  lesions    write copies of real CTs with synthetic lesions, to check a pipeline
  localize   compare written maps with masks of lesions

{PROGRAM} COMMAND --help tells the options of one.

train, evaluate and explain run on several processes too, which find each other under SLURM, in
Kubernetes and on TPU pods; elsewhere each of N is given
  --coordinator HOST:PORT --num-processes N --process-id I
  --start-timeout SECONDS      wait for the others at start (default 300)
  --heartbeat-timeout SECONDS  one that is silent for so long counts as dead (default 100)"""

# Those that run on several processes.
DISTRIBUTED = ("train", "evaluate", "explain")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 done but for some volumes or ended with another process,
    2 bad input (one line says what), 75 stopped by a signal and saved: run again with --resume,
    130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    _quiet()
    try:
        _run(arguments)
    except UserError as error:
        _end(str(error), 2)
    except Preempted as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(75)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}", 2)
    except Exception as error:
        from hirescam_jax import distributed

        if not distributed.peer_lost(error):
            raise
        line = " ".join(str(error).split())
        _end(f"another process has ended, see its output ({line[:200]}): continue with --resume", 1)


def _run(arguments: Sequence[str]) -> None:
    from hirescam_jax import distributed

    launch, rest = distributed.parse_launch(arguments)
    name, rest = (rest[0], rest[1:]) if rest else ("", [])
    if name not in DISTRIBUTED:
        if launch.coordinator is not None:
            raise UserError(f"--coordinator: '{name}' runs in one process")
    elif not {"-h", "--help"} & set(rest):
        distributed.start(launch, preemptible=name == "train")
    if name == "train":
        train(rest)
    elif name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"{PROGRAM} {name}", args=rest)
    else:
        from hirescam_jax.config import nearest

        raise UserError(f"no command '{name}'{nearest(name, [*COMMANDS, 'train'])}")


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
