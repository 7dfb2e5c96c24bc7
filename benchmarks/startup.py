"""How long the help of each command and `import hirescam_jax` take, against `import jax`.

    python benchmarks/startup.py                      # wall time, ten turns
    python benchmarks/startup.py --repeats 20 --json results/startup.json

Each is a fresh Python process, whose files are in the page cache; beside them an empty one.
Targets: help at most 0.6 times `python -c "import jax"`, the package's import at most 1.5 times.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import interleave, machine_line, ratio, write_results

from hirescam_jax.cli.main import COMMANDS, OWN_ARGUMENTS

JAX = "import jax"


def programs() -> dict[str, Callable[[], object]]:
    """A process each, by what it does."""
    code = {"nothing": "", JAX: JAX, "import hirescam_jax": "import hirescam_jax"}
    helps = ["--help", *(f"{name} --help" for name in sorted({*COMMANDS, *OWN_ARGUMENTS}))]
    arguments = {name: ["-c", text] for name, text in code.items()}
    arguments |= {f"hirescam {line}": ["-m", "hirescam_jax.cli", *line.split()] for line in helps}
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    return {name: partial(run, [sys.executable, *given]) for name, given in arguments.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    print(machine_line())
    times = interleave(programs(), args.repeats)
    ratios = {name: ratio(timing, times[JAX]) for name, timing in times.items()}
    for name, timing in times.items():
        print(f"  {name:<26}{timing}  {ratios[name]:6.2f} x {JAX}")
    write_results(
        args.json,
        {
            "times": {name: timing.summary() for name, timing in times.items()},
            "over_import_jax": ratios,
        },
        sys.argv,
    )


if __name__ == "__main__":
    main()
