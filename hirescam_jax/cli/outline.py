"""Dataclasses as their source spells them, made without importing it.

The help of a command tells the fields of a config, of the networks in it too, with defaults and
docstrings. All of that stands in a few classes' source; importing them brings JAX and Flax along,
which takes much longer than the rest of the help.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).parents[1]


def outlined(module: str, name: str) -> Any:
    """A class, function or constant of a module of this package, made from the source alone.

    Classes are frozen dataclasses of the same fields, defaults and docstring, without bases and
    methods. What they and functions name is made in the same way if it is this package's, and
    imported otherwise.

    Raises:
        KeyError: the module's source has no such name at its top.
    """
    return _outline(module).value(name)


@cache
def _outline(module: str) -> "_Outline":
    return _Outline(module)


class _Outline:
    """One module: its statements by the names they bind, and those that were executed so far."""

    def __init__(self, name: str) -> None:
        path = PACKAGE.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # Registered, with the file, so that `inspect` finds a class's source (tyro reads comments).
        self.module = ModuleType(f"outline of {name}")
        self.module.__file__ = str(path)
        sys.modules[self.module.__name__] = self.module
        self.statements = {
            bound: statement
            for statement in ast.parse(path.read_text(encoding="utf-8"), str(path)).body
            for bound in _bound(statement)
        }

    def value(self, name: str) -> Any:
        known = vars(self.module)
        if name not in known:
            self._execute(name, self.statements[name])
        return known[name]

    def _execute(self, name: str, statement: ast.stmt) -> None:
        known = vars(self.module)
        if isinstance(statement, ast.ImportFrom) and _own(statement.module):
            source = next(a.name for a in statement.names if (a.asname or a.name) == name)
            known[name] = outlined(str(statement.module), source)
            return
        if isinstance(statement, ast.ClassDef):
            statement = _fields_only(statement)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id != name and node.id in self.statements:
                self.value(node.id)
        code = compile(ast.Module([statement], []), str(self.module.__file__), "exec")
        exec(code, known)
        if isinstance(statement, ast.ClassDef):
            known[name] = dataclasses.dataclass(frozen=True)(known[name])


def _own(module: str | None) -> bool:
    return str(module).split(".")[0] == PACKAGE.name


def _fields_only(statement: ast.ClassDef) -> ast.ClassDef:
    """A class without decorators, bases and anything but its docstring and annotated fields."""
    docstring = ast.get_docstring(statement, clean=False) is not None
    body = statement.body[:docstring] + [s for s in statement.body if isinstance(s, ast.AnnAssign)]
    made = ast.ClassDef(statement.name, [], [], body or [ast.Pass()], [])
    return ast.fix_missing_locations(ast.copy_location(made, statement))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement binds, at the top of a module."""
    match statement:
        case ast.Import(names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
        case ast.ClassDef(name) | ast.FunctionDef(name):
            yield name
        case ast.Assign(targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(ast.Name(name)):
            yield name
