"""Help and bad options are answered without JAX, and tell what the real classes would."""

import dataclasses
import json
import subprocess
import sys
import typing
from importlib import import_module

import pytest

from hirescam_jax import config
from hirescam_jax.cli import main as cli
from hirescam_jax.cli import training
from hirescam_jax.cli.outline import outlined
from hirescam_jax.explanations.methods import METHODS, MethodName

SLOW = ("jax", "flax", "orbax", "grain", "scipy.stats", "matplotlib")
ANSWER = f"""
import contextlib, io, json, sys
from hirescam_jax.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(arguments) or 0
        except SystemExit as end:
            code = end.code
    found.append([arguments, code, [name for name in {SLOW} if name in sys.modules]])
print(json.dumps(found))
"""


def test_help_and_bad_options_import_nothing_slow(tmp_path):
    helps = [["--help"], *([name, "--help"] for name in (*cli.COMMANDS, *cli.OWN_ARGUMENTS))]
    bad = [
        ["nonsense"],
        ["phantom"],
        ["evaluate", "nonsense"],
        ["evaluate", "nonsense", "--checkpiont", "best"],
        ["explain", "nonsense", "--input", "a.nii", "--out", "out"],
        ["compare", "nonsense", "nonsense"],
        ["demo", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "0"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, json.dumps(helps + bad)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    wanted = [[line, 0, []] for line in helps] + [[line, 2, []] for line in bad]
    assert json.loads(done.stdout) == wanted


@pytest.mark.parametrize("command", ["train", "convert"])
def test_help_is_that_of_the_real_config(command, capsys, monkeypatch):
    def printed() -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "120")
    from_source = printed()
    asked = []

    def real(module: str, name: str):
        asked.append(name)
        return getattr(import_module(module), name)

    monkeypatch.setattr(training, "outlined", real)
    assert from_source == printed()
    assert "Config" in asked
    for field in dataclasses.fields(config.Config):
        assert f"--{field.name.replace('_', '-')}" in from_source


def test_outlines_of_all_that_a_config_holds():
    """The help shows one member of each union; the others have outlines too."""

    def spell(kind: type) -> dict:
        hints = typing.get_type_hints(kind)
        fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}
        return {name: fields[name] for name in fields.keys() - {"parent", "name"}}

    def compare(real: type, made: type) -> None:
        assert (made.__name__, made.__doc__) == (real.__name__, real.__doc__)
        ours, theirs = spell(made), spell(real)
        assert ours.keys() == theirs.keys()
        for name, (hint, default) in ours.items():
            members = [typing.get_args(h) or (h,) for h in (theirs[name][0], hint)]
            for one, other in zip(*members, strict=True):
                if dataclasses.is_dataclass(one):
                    compare(one, other)
                else:
                    assert one == other
            if dataclasses.is_dataclass(default):
                assert type(default).__name__ == type(theirs[name][1]).__name__
            else:
                assert default == theirs[name][1]

    compare(config.Config, outlined("hirescam_jax.config", "Config"))


def test_outline_of_what_is_not_there():
    with pytest.raises(KeyError, match="Confg"):
        outlined("hirescam_jax.config", "Confg")


def test_names_of_the_methods():
    assert typing.get_args(MethodName) == tuple(METHODS)
