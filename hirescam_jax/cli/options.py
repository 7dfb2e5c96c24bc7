"""What the commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

from tyro.constructors import PrimitiveConstructorSpec

from hirescam_jax.errors import UserError

PROGRAM = "hirescam"


def names_of(text: str) -> list[str]:
    """The names in a text, with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError as error:
        raise UserError(f"--shard {text}: give i/n, such as 0/8") from error
    return number, count


def asks_for_help(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
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


def _run_folder(arguments: list[str]) -> Path:
    path = Path(arguments[0])
    if not (path / "run.json").is_file():
        raise UserError(f"{path}: not a run folder (no run.json in it)")
    return path


# Looked for while the options are read, so that a slip of the pen need not wait for JAX.
RunFolder: TypeAlias = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_run_folder,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
