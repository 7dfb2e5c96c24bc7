"""The wings of the package: which may import which, read from the imports of every file."""

import ast
import itertools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hirescam_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
INSIDE = FILES.keys() - {PACKAGE}  # which takes the public names from everywhere

# A wing -> the only wings and files of the package that it may import, or those that it must not.
ONLY = {"metrics": {"metrics"}, "explanations": {"explanations", "compiling"}}
NEVER = {
    "models": {"data", "config", "runs", "explanations"},
    "data": {"config", "models", "runs", "training"},
    "reports": {"runs", "config", "devices"},
    "inference": {"training", "evaluation"},
    "evaluation": {"training"},
    "training": {"evaluation"},
}
# What only these may import.
BY = {"experiments": {"experiments", "cli"}, "cli": {"cli"}}


def imports_of(path: Path) -> Iterator[str]:
    """Every file of the package that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: name the package in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            if name:
                yield name


def wing(module: str) -> str:
    """The folder, or the single file, directly below the package."""
    return module.split(".")[1] if "." in module else ""


ARROWS = {module: set(imports_of(FILES[module])) - {module} for module in INSIDE}


def test_every_file_is_read():
    assert len(FILES) > 80
    assert "hirescam_jax.explanations.cam" in ARROWS["hirescam_jax.training.step"]


@pytest.mark.parametrize("module", sorted(INSIDE))
def test_imports_only_what_its_wing_may(module):
    own = wing(module)
    for imported in sorted(ARROWS[module]):
        other = wing(imported)
        if not other:  # the package itself: its names come from everywhere
            raise AssertionError(f"{module} imports {PACKAGE}: name the file that has it")
        assert other in ONLY.get(own, {other}), f"{module} imports {imported}"
        assert other not in NEVER.get(own, ()), f"{module} imports {imported}"
        assert own in BY.get(other, {own}), f"{module} imports {imported}"


def test_data_knows_of_the_devices_only_what_a_process_loads():
    allowed = {"hirescam_jax.devices.layout"}
    for module in INSIDE:
        if wing(module) == "data":
            used = {name for name in ARROWS[module] if wing(name) == "devices"}
            assert used <= allowed, module


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_no_circle_between_files():
    assert_no_circle(ARROWS)


def test_no_circle_between_wings():
    wings: dict[str, set[str]] = {}
    for module, imported in ARROWS.items():
        wings.setdefault(wing(module), set()).update(map(wing, imported))
    assert_no_circle({name: others - {name} for name, others in wings.items()})


def test_a_circle_is_found():
    with pytest.raises(AssertionError, match=r"a -> b -> a|b -> a -> b"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_is_one_idea(module):
    assert len(FILES[module].read_text().splitlines()) <= 400


def test_no_prefix_stands_for_a_folder():
    for folder in {path.parent for path in FILES.values()}:
        names = sorted(path.stem for path in folder.glob("*.py") if path.stem[0] != "_")
        heads = [name.split("_")[0] for name in names]
        for head, group in itertools.groupby(heads):
            assert len(list(group)) < 3, f"{folder}: {head}_*"


def test_each_wing_says_what_lives_there():
    for module, path in FILES.items():
        if path.name == "__init__.py" and module != PACKAGE:
            text = ast.get_docstring(ast.parse(path.read_text()))
            assert text, module
            if len(list(path.parent.glob("*.py"))) > 3 and module.count(".") == 1:
                assert "read this first" in text or "to read first" in text, module


def test_the_readme_has_the_wings_in_order():
    rows = re.findall(
        r"^\| \[(\w+)/\]\(hirescam_jax/\w+\) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert set(rows) == {name for name in map(wing, FILES) if (ROOT / PACKAGE / name).is_dir()} - {
        ""
    }
    for module in INSIDE:
        for other in map(wing, ARROWS[module]):
            if {wing(module), other} <= set(rows):
                assert rows.index(other) <= rows.index(wing(module)), f"{module} imports {other}"
