"""Every command and every Python block of the READMEs runs, at small sizes, or is at least parsed.

Nothing escapes: a command that is only parsed is in `PARSED` with the reason, or its program in
`PROGRAMS`; what a block stands for that is neither shell nor Python is in `LANGUAGES`; everything
else is run, in the order of its README. To add to a README, write it; if it needs a file that no
earlier command makes, put that into `files_for`, and a name of a Python block into `names_for`.
"""

import contextlib
import dataclasses
import inspect
import json
import pkgutil
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hirescam_jax
from hirescam_jax import AxialNet, MobileNetV2, ResNetClassifier, load_run, to_torch, write_weights
from hirescam_jax.cli import main as cli
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.pipeline import InMemory
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.experiments import demo
from hirescam_jax.experiments.demo import demo_config
from hirescam_jax.weights import state_dicts
from tests import readmes
from tests.data.readers.test_medmnist import medmnist
from tests.data.test_lesions import chest
from tests.processes import ROOT
from tests.readmes import blocks_of, commands_of, prose_of, quietly, spans_of
from tests.training.test_train import compilation_cache  # noqa: F401

MAIN, BENCHMARKS = "README.md", "benchmarks/README.md"
DATA, DEVICES, EVALUATION, EXPERIMENTS, EXPLANATIONS, INFERENCE, TRAINING, WEIGHTS = (
    f"hirescam_jax/{wing}/README.md"
    for wing in (
        *("data", "devices", "evaluation", "experiments"),
        *("explanations", "inference", "training", "weights"),
    )
)
READMES = [name for name in readmes.listed("*.md") if Path(name).name == "README.md"]
TEXTS = {name: (ROOT / name).read_text() for name in READMES}

# -- what is not run ------------------------------------------------------------------------------

MESH = "needs eight devices: tests/devices runs such meshes"
PUBLISHED = "of a published data set: tests/data/readers reads such files"
PARSED = {
    "hirescam train configs/paper_axialnet.py --data.path store --run runs/b --batch-size 2 "
    "--depth-devices 4": MESH,
    "hirescam train configs/paper_axialnet.py --data.path store --run runs/deep --batch-size 2 "
    "--depth-devices 4": MESH,
    "hirescam prepare rad-chestct RAD-ChestCT --out store --selection paper": PUBLISHED,
    "hirescam prepare ct-rate CT-RATE --tree plain --out store": PUBLISHED,
    "hirescam prepare dicom archive --table labels.csv --out store": PUBLISHED,
    "hirescam prepare rad-chestct RAD-ChestCT --out store --shard "
    "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT": PUBLISHED,
    "hirescam voc VOCdevkit/VOC2012 --weights mobilenet_v2-b0353104.pth --out voc": (
        "2 GB of photos: tests/experiments/test_voc.py runs it on a few"
    ),
}


def a_module(words: Sequence[str]) -> None:
    """`python -m`, of an environment or of this suite; or a script, which takes minutes."""
    if words[0] != "-m":
        readmes.check_script(words)


# Program -> what is checked instead of running it.
PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "python3": a_module,
    "python": a_module,
    "pip": readmes.check_pip,
    "huggingface-cli": lambda words: None,  # 20 TB
    "sbatch": lambda words: readmes.check_launch([w for w in words if not w.startswith("--nod")]),
    "paper.sh": lambda words: readmes.check_launch(["launch/paper.sh", *words]),
}
LANGUAGES: dict[str, Callable[[str], Any]] = {"json": json.loads, "csv": str, "text": str}

# -- how a command is made small ------------------------------------------------------------------

NARROW = "--model.blocks 1 --model.widths 4 --model.stem small --model.conv-widths 4"
NARROW += " --model.conv-padding SAME --model.dtype float32"
FEW = "--data.train-size 16 --data.val-size 8 --data.test-size 8 --data.phantom.shape 24 24 24"
# What is added to the commands that begin so, or have this option.
SMALL = {
    "train configs/paper/": f"{FEW} --epochs 1",
    "train configs/paper_axialnet.py": f"{NARROW} --epochs 1",
    "train configs/lesions_axialnet.py": f"{NARROW} --epochs 1 --batch-size 2",
    "convert axialnet.pth": NARROW,
    "--dry-run": "--memory-gib 1e-4",
    "compare": "--volumes 4",
    "phantom": "--shape 24 24 24",
    "prepare": "--spacing 12.5 15 15 --shape 24 24 24 --workers 0",
    "lesions": "--copies 10 --workers 0",
}


def small_demo(seed: int = 0) -> Any:
    """The demo's config, and that of phantom_axialnet.py, with few small patients."""
    config: Any = demo_config(seed)
    phantom = PhantomConfig(shape=(24, 24, 24), seed=seed)
    data = PhantomData(phantom, train_size=16, val_size=8, test_size=8)
    model = config.model.clone(blocks=(1,), widths=(8,), conv_widths=(8,))
    return dataclasses.replace(config, model=model, data=data, epochs=1)


# -- what a README starts from --------------------------------------------------------------------

# Of what the first README leaves: see `newcomer`.
LEFT = {
    MAIN: (),
    BENCHMARKS: (),
    DATA: ("store", "scans"),
    DEVICES: ("store",),
    EVALUATION: ("runs",),
    EXPERIMENTS: (),
    EXPLANATIONS: ("hirescam_demo",),
    INFERENCE: ("hirescam_demo", "chest.nii.gz", "runs", "store"),
    TRAINING: ("store",),
    WEIGHTS: ("store",),
    "launch/README.md": (),
}


def files_for(name: str, folder: Path, newcomer: Path) -> None:
    """Puts into the folder what the README's commands read and none of them has made."""
    for part in ("configs", "launch", "benchmarks"):
        (folder / part).symlink_to(ROOT / part)
    for part in LEFT[name]:
        copy = shutil.copytree if (newcomer / part).is_dir() else shutil.copy
        copy(newcomer / part, folder / part)
    if name == MAIN:
        quietly(["phantom", "--out", "scans", "--size", "12", "--shape", "24", "24", "24"])
        lines = (folder / "scans" / "findings.csv").read_text().splitlines()
        splits = ["split", *["train"] * 8, *["val"] * 2, *["test"] * 2]
        table = "\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True))
        (folder / "scans" / "findings.csv").write_text(table)
        shutil.copy(folder / "scans" / "phantom_test_0003.nii.gz", folder / "chest.nii.gz")
    if name == DATA:
        shutil.move(
            folder / "scans" / "phantom_test_0001.nii.gz", folder / "scans" / "scan_1.nii.gz"
        )
        table = folder / "scans" / "findings.csv"
        table.write_text(table.read_text().replace("phantom_test_0001,", "scan_1,"))
        medmnist(folder / "adrenalmnist3d.npz")
        (folder / "cts").mkdir()
        scan, _ = chest((6.0, 6.0, 6.0))
        readmes.save(folder / "cts" / "one.nii.gz", scan.voxels, scan.affine)
    if name == WEIGHTS:
        narrow = {"blocks": (1,), "widths": (4,)}
        (folder / "my_config.py").write_text(
            "from hirescam_jax.config import Config\nfrom hirescam_jax.experiments.demo import "
            "demo_config\nimport dataclasses\nconfig = demo_config()\nmodel = config.model.clone("
            f"stem='imagenet', **{narrow})\nconfig = dataclasses.replace(config, model=model)"
        )
        photos, ct = (64, 64, 3), (24, 24, 24)
        save_random("resnet18-f37072fd.pth", ResNetClassifier(**narrow), photos)
        save_random("mobilenet_v2-b0353104.pth", MobileNetV2(), photos)
        labels = len(json.loads((folder / "store" / "store.json").read_text())["labels"])
        model = AxialNet(labels, (1,), (4,), "small", (4,), "SAME")
        save_random("axialnet.pth", model, ct)


def save_random(file: str, model: Any, shape: tuple[int, ...]) -> None:
    size = shape[:2] if isinstance(model, ResNetClassifier | MobileNetV2) else shape
    write_weights(file, to_torch(model, random_variables(model, shape), size))


def random_variables(model: Any, shape: tuple[int, ...]) -> Any:
    """Positive ones, as variances must be, without compiling anything."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return jax.tree.map(lambda x: (0.01 + rng.random(x.shape) / 10).astype(np.float32), shapes)


def names_for(name: str) -> dict[str, Any]:
    """What the README's Python blocks speak of and do not define."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    features, scans = random(2, 4, 6, 6, 8), 300 * random(2, 24, 24, 24)
    of_head = {"features": features, "W": random(8, 20), "b": random(20)}
    allowed = random(2, 20, 4, 6, 6) > 0
    if name == MAIN:
        return {**of_head, "allowed": allowed, "volumes": scans, "classification": 0.7, "scale": 4}
    if name == EXPLANATIONS:
        # The paper's network on one image of the least size: one cell is left of it.
        variables = random_variables(AxialNet(num_labels=80), (3, 288, 288))
        return {
            **of_head,
            "variables": variables,
            "volumes": random(1, 3, 288, 288),
            "scans": scans,
        }
    scores, truth, patients = rng.normal(size=40), np.arange(40) % 2, np.arange(40) // 4
    return {
        INFERENCE: {"volumes": scans},
        WEIGHTS: {"images": random(1, 64, 64, 3)},
        BENCHMARKS: {"f": jnp.sin},
        EVALUATION: {
            **{"maps": random(2, 20, 4, 6, 6), "allowed": allowed},
            **{"scores": scores, "truth": truth, "patients": patients},
        },
    }.get(name, {})


# -- running them ---------------------------------------------------------------------------------


def follow(name: str, folder: Path, newcomer: Path) -> None:
    """Does what a README says, from its first block to its last, in the folder."""
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "demo_config", small_demo)
        patched.setattr(demo, "InMemory", lambda source, workers, progress: InMemory(source, 0))
        patched.setattr(state_dicts, "TORCHVISION_FILE", re.compile("(?!)"))  # no file has its hash
        files_for(name, folder, newcomer)
        names = names_for(name)
        for block in blocks_of(TEXTS[name]):
            place = f"{name}, line {block.line}"
            if block.language == "sh":
                for words in commands_of(block.text):
                    run_command(words, place)
            elif block.language == "python":
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    exec(compile("\n" * (block.line - 1) + block.text, ROOT / name, "exec"), names)
            else:
                LANGUAGES[block.language](block.text)


def run_command(words: list[str], place: str) -> None:
    program, rest = Path(words[0]).name, words[1:]
    text = " ".join([program, *rest])
    if program != "hirescam":
        assert program in PROGRAMS, f"{place}: nothing tells how to check '{text}'"
        PROGRAMS[program](rest)
    elif text in PARSED:
        readmes.check_hirescam(rest)
    else:
        line = " ".join(rest)
        own = [key for key in SMALL if line.startswith(key) or (key[0] == "-" and key in rest)]
        try:
            quietly([*rest, *" ".join(SMALL[key] for key in own).split()])
        except SystemExit as error:
            pytest.fail(f"{place}: '{text}' ended with exit code {error.code}")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has followed README.md to its end."""
    folder = tmp_path_factory.mktemp("newcomer")
    follow(MAIN, folder, folder)
    return folder


@pytest.mark.slow
def test_the_first_readme(newcomer: Path):
    """What README.md says that its commands leave behind."""
    files = ["hirescam_demo/metrics.json", "hirescam_demo/report.html", "store/store.json"]
    files += ["explained/chest/probabilities.csv", "store.html", "runs/one/evaluation.json"]
    assert [file for file in files if not (newcomer / file).is_file()] == []
    explained = {
        path.name.split("_hirescam")[-1] for path in (newcomer / "explained/chest").iterdir()
    }
    assert explained == {"probabilities.csv", ".nii.gz", ".png"}
    assert load_run(newcomer / "runs/two").config.mask_weight == 0


LONG = (DATA, EVALUATION, EXPERIMENTS, TRAINING, WEIGHTS)
OTHERS = [
    pytest.param(name, marks=pytest.mark.long if name in LONG else pytest.mark.slow, id=name)
    for name in READMES
    if name != MAIN
]


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_readme_says(name: str, newcomer: Path, tmp_path: Path):
    if name == WEIGHTS:
        pytest.importorskip("torch")
    follow(name, tmp_path, newcomer)


# -- parsing all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its own parser, also where the test that runs it is a long one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks_of(TEXTS[name]):
        assert block.language in ("sh", "python", *LANGUAGES), f"{name}, line {block.line}"
        for words in commands_of(block.text) if block.language == "sh" else ():
            program, rest = Path(words[0]).name, words[1:]
            if program == "hirescam" and rest[:2] != ["train", "my_config.py"]:
                readmes.check_hirescam(rest)
            elif program != "hirescam":
                PROGRAMS[program](rest)


def test_nothing_else_is_left_out():
    """What is only parsed still stands in a README, which is in the tables above; and no command
    hides in an indented block."""
    commands = {
        " ".join(words)
        for text in TEXTS.values()
        for block in blocks_of(text)
        if block.language == "sh"
        for words in commands_of(block.text)
    }
    assert PARSED.keys() <= commands
    assert LEFT.keys() == set(READMES)
    for name, text in TEXTS.items():
        assert not re.search(r"^( {4,}|\t)(hirescam|python3?|pip) ", prose_of(text), re.M), name


@pytest.fixture(scope="module")
def options() -> str:
    """The usage, every command's help and the benchmarks' and launch scripts' text."""
    texts = [cli.USAGE, *map(readmes.help_of, re.findall(r"^  (\w+) ", cli.USAGE, re.M))]
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("launch/*.s*")]
    return "\n".join([*texts, *(path.read_text() for path in scripts)])


# Options of other programs.
FOREIGN = {"--ml", "--task", "--dist", "--dry-run=server"}


@pytest.mark.parametrize("name", READMES)
def test_what_stands_between_backticks(name: str, options: str):
    """Options are those of some command, commands have them, files and names exist."""
    for span in spans_of(TEXTS[name]):
        words = span.split()
        if words[0] == "hirescam" and len(words) > 1:
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            known = cli.USAGE + readmes.help_of(words[1])
            assert [option for option in given if f"{option} " not in f"{known} "] == [], span
        elif words[0].startswith("--"):
            given = [word for word in words if word.startswith("--") and word not in FOREIGN]
            assert [option for option in given if option not in options] == [], span
        elif re.fullmatch(r"(benchmarks|configs|launch|tests|hirescam_jax|\.ci)/[\w./]+", words[0]):
            assert (ROOT / words[0]).exists(), span
        elif re.fullmatch(r"hirescam_jax(\.\w+)+(\(\))?", span):
            pkgutil.resolve_name(span.removesuffix("()"))


def test_the_methods_of_the_first_readme():
    """All that take a head or a model and labels, and nothing else."""
    (paragraph,) = re.findall(r"^Methods of the head: .+?\n\n", TEXTS[MAIN], re.M | re.S)
    functions = {name: getattr(hirescam_jax, name) for name in hirescam_jax.__all__}
    parameters = {
        n: list(inspect.signature(f).parameters) for n, f in functions.items() if callable(f)
    }
    forms = (["head", "features", "labels"], ["model", "inputs", "labels"])
    assert set(spans_of(paragraph)) == {n for n, p in parameters.items() if p[:3] in forms}


# -- links and figures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", readmes.listed("*.md"))
def test_links(name: str):
    assert list(readmes.broken_links(name)) == []


def test_the_first_readme_is_short():
    assert len(TEXTS[MAIN].splitlines()) <= 160
