"""What the READMEs say, taken apart: blocks, commands, links; and commands that are only parsed."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import nibabel
import numpy as np
import pytest
import tyro

from hirescam_jax.cli import main as cli
from tests.processes import ROOT

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


OF_RUNS = ("evaluate", "explain", "compare", "table")


class Block(NamedTuple):
    """A fenced block; line: of its first line, from 1 on."""

    language: str
    text: str
    line: int


def listed(pattern: str) -> list[str]:
    """The repository's files of this name, and those that git does not know yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:  # not a checkout
        names = (str(path.relative_to(ROOT)) for path in ROOT.rglob(pattern))
        return sorted(n for n in names if not any(p.startswith(".") for p in Path(n).parts[:-1]))
    return sorted(set(found.stdout.split()))


def blocks_of(text: str) -> list[Block]:
    """Fenced blocks. Raises ValueError for a fence that is not closed."""
    blocks, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.strip()
        if opened is not None:
            if fence == "```":
                blocks.append(Block(opened[0], "\n".join(opened[1]), opened[2]))
                opened = None
            else:
                opened[1].append(line)
        elif fence.startswith("```"):
            opened = (fence[3:].strip(), [], number + 1)
    if opened is not None:
        raise ValueError(f"line {opened[2] - 1}: the fence is not closed")
    return blocks


def prose_of(text: str) -> str:
    """The text without its fenced blocks."""
    return "\n\n".join(text.split("```")[::2])


def spans_of(text: str) -> list[str]:
    """What stands between single backticks; a line break is a space."""
    return [" ".join(span.split()) for span in SPAN.findall(prose_of(text))]


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments; `&&` stands between two."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            place = words.index("&&")
            commands.append(words[:place])
            words = words[place + 1 :]
        if words:
            commands.append(words)
    return commands


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#{1,6} (.+?)\s*$", prose_of(text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(name: str) -> Iterator[str]:
    """Relative links of a Markdown file to what is not there."""
    path = ROOT / name
    for link in LINK.findall(prose_of(path.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        if not place.exists() or not place.is_relative_to(ROOT):
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors_of(place.read_text()):
            yield f"{link}: no such heading"


# -- parsed, not run ------------------------------------------------------------------------------


class ParsedError(Exception):
    """Raised in place of what a script would do with its options."""


def check_hirescam(words: Sequence[str]) -> None:
    """The command's own parser takes these words; nothing is done. Words that may be the folder of
    a run are made one in the working folder, since parsers look."""
    real, calls = tyro.cli, []
    first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    for word in words[1:first_option] if words[0] in OF_RUNS else ():
        Path(word).mkdir(parents=True, exist_ok=True)
        (Path(word) / "run.json").touch()

    def parse(function: Any, **options: Any) -> Any:
        @functools.wraps(function)
        def nothing(*_: Any, **__: Any) -> None:
            calls.append(function)

        return real(nothing, **options)

    output = io.StringIO()
    with patch.object(tyro, "cli", parse), contextlib.redirect_stderr(output):
        try:
            quietly(list(words))
        except SystemExit as error:
            pytest.fail(
                f"hirescam {shlex.join(words)}: exit code {error.code}\n{output.getvalue()}"
            )
    assert calls, f"hirescam {shlex.join(words)}: was not parsed"


def check_script(words: Sequence[str]) -> None:
    """`python SCRIPT.py OPTIONS`: the script is there, and its own parser takes the options."""

    def parse(self: ArgumentParser, *given: Any, **options: Any) -> None:
        ArgumentParser.parse_known_args(self, *given, **options)
        raise ParsedError

    def parse_fields(kind: Any, **options: Any) -> None:
        real(kind, args=list(words[1:]), **options)
        raise ParsedError

    script, real = ROOT / words[0], tyro.cli
    with (
        patch.object(ArgumentParser, "parse_args", parse),
        patch.object(tyro, "cli", parse_fields),
        patch.object(sys, "argv", list(words)),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
        patch.dict("os.environ"),
        pytest.raises(ParsedError),
    ):
        runpy.run_path(str(script), run_name="__main__")


def check_launch(words: Sequence[str]) -> None:
    """A script of launch/: it is there, it is valid, and `hirescam` takes what it passes on."""
    script, rest = ROOT / words[0], list(words[1:])
    if script.suffix == ".yaml":
        assert script.is_file(), words[0]
        return
    subprocess.run(["bash", "-n", script], check=True)
    if script.name == "prepare_array.sbatch":
        check_hirescam(["prepare", *rest])
    elif script.name == "paper.sh":
        configs = "*"
        if rest[1] == "--only":
            configs = rest[2]
            del rest[1:3]
        found = sorted((ROOT / "configs" / "paper").glob(f"{configs}.py"))
        assert found, f"no experiment is called {configs}"
        check_hirescam(["train", str(found[0]), "--run", rest[0], *rest[1:]])
    elif script.name == "tpu_pod.sh":
        del rest[: rest.index("--") + 1]
        check_hirescam(["train", *rest[1:]])  # CONFIG.py is a name for any
    else:
        check_hirescam(["train", *rest])


def check_pip(words: Sequence[str]) -> None:
    """The extras are those of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install"
    for extra in re.findall(r"\[(.+?)\]", " ".join(words)):
        assert extra in project["optional-dependencies"], extra


def quietly(arguments: Sequence[str]) -> None:
    """`hirescam ARGUMENTS` in this process; its own filter of warnings ends with it."""

    with warnings.catch_warnings():
        cli.main(list(arguments))


@functools.cache
def help_of(command: str) -> str:
    """What `hirescam COMMAND --help` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        quietly([command, "--help"])
    return output.getvalue()


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
