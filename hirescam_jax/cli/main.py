"""The `hirescam` command. Each subcommand is one function, which only starts things.

Help and bad options are answered at once: functions import what they start when they are called,
and JAX waits until the options are read.
"""

import contextlib
import functools
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from hirescam_jax.cli.data import inspect, lesions, phantom, prepare
from hirescam_jax.cli.options import PROGRAM, asks_for_help
from hirescam_jax.cli.results import compare, evaluate, explain, localize, table, voc
from hirescam_jax.cli.training import convert, demo, train
from hirescam_jax.devices.rendezvous import Launch, parse_launch
from hirescam_jax.errors import Preempted, StartError, UserError, nearest

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

  demo       train on phantom CTs without and with the mask loss, and compare (2 minutes)
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
    warnings.filterwarnings("ignore")  # other libraries' chatter is not for the user of a command
    try:
        _run(arguments)
    except UserError as error:
        _end(str(error), 1 if isinstance(error, StartError) else 2)
    except Preempted as error:
        from hirescam_jax.devices import preemption

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

        from hirescam_jax.devices import processes

        if not processes.peer_lost(error):
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()  # a normal end would wait for those that wait for this process
            processes.leave(1)
        line = " ".join(str(error).split())
        _end(f"another process has ended, see its output ({line[:200]}): continue with --resume", 1)


def _run(arguments: Sequence[str]) -> None:
    launch, rest = parse_launch(arguments)
    name, rest = (rest[0], rest[1:]) if rest else ("", [])
    if name not in COMMANDS and name not in OWN_ARGUMENTS:
        raise UserError(f"no command '{name}'{nearest(name, [*COMMANDS, *OWN_ARGUMENTS])}")
    if name not in DISTRIBUTED and launch.coordinator is not None:
        raise UserError(f"--coordinator: '{name}' runs in one process")
    if name in COMMANDS:
        command = _after(functools.partial(_start, name, launch), COMMANDS[name])
        tyro.cli(command, prog=f"{PROGRAM} {name}", args=list(rest))
    elif asks_for_help(rest):
        OWN_ARGUMENTS[name](rest)
    else:  # their options are known when the config file, which may use JAX, has been run
        with _unsaved() if name == "train" else contextlib.nullcontext():
            _start(name, launch)
            OWN_ARGUMENTS[name](rest)


def _after(start: Callable[[], None], command: Callable[..., None]) -> Callable[..., None]:
    """A command of the same options that starts first."""

    @functools.wraps(command)
    def started(*args: Any, **kwargs: Any) -> None:
        start()
        command(*args, **kwargs)

    return started


def _start(name: str, launch: Launch) -> None:
    """What comes before a command's own work."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # what Orbax logs in full it raises too
    if name in COMPUTING:
        from hirescam_jax.compiling import reuse_memory
        from hirescam_jax.devices import processes

        if name in DISTRIBUTED:
            processes.start(launch, preemptible=name == "train")
        reuse_memory()


def _unsaved() -> contextlib.AbstractContextManager[None]:
    from hirescam_jax.devices import preemption

    return preemption.before_training()


def _end(message: str, code: int) -> NoReturn:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    if "jax" not in sys.modules:  # this process has met no other
        sys.exit(code)
    from hirescam_jax.devices import processes

    processes.leave(code)
