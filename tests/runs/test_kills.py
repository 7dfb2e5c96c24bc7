"""A training that is killed again and again ends as one that nobody disturbed, bit for bit."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hirescam_jax.runs.run import load_run
from tests.processes import environment
from tests.training.test_train import losses_of

KILLS = 50

# Importing takes seconds, so one interpreter that has imported all, and in which JAX has not
# started yet, forks the trainings.
FORKING = """
import os, random, select, signal, sys, time
from pathlib import Path
import jax, orbax.checkpoint, tensorboardX
from hirescam_jax.runs.checkpoints import Saver
from hirescam_jax.training.loop import train
from tests.training.test_train import Cases, config_of

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
config = config_of(epochs=20, save_steps=1, patience=20)

def start(run):
    listen, report = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        return child, listen
    save = Saver.save
    Saver.save = lambda *arguments: (os.write(report, b"."), save(*arguments))
    try:
        os.close(listen)
        sources = (Cases(5), Cases(3, seed=1))
        train(config, run, resume=(run / "run.json").exists(), sources=sources)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)

random.seed(0)
run, number, unfinished = folder / "0", 0, 0
for i in range(kills):
    child, listen = start(run)
    if i % 5:  # in its steps and their checkpoints; the others in its start
        select.select([listen], [], [], 60)
    time.sleep(random.uniform(0, 0.5))
    os.kill(child, signal.SIGKILL)
    os.close(listen)
    _, status = os.waitpid(child, 0)
    unfinished += bool(list(run.glob("checkpoints/*tmp*")))
    if not os.WIFSIGNALED(status):  # the machine was quick: start another
        assert status == 0
        number += 1
        run = folder / str(number)
child, _ = start(run)
assert os.waitpid(child, 0)[1] == 0
print(unfinished)
"""


def trained(folder: Path, kills: int, cache: Path) -> int:
    """Trains with so many kills; how many of them left an unfinished checkpoint behind."""
    more = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(folder), str(kills)],
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout, done.stderr)
    return int(done.stdout)


@pytest.mark.long
def test_fifty_kills(tmp_path):
    trained(tmp_path / "quiet", 0, tmp_path / "cache")
    unfinished = trained(tmp_path / "killed", KILLS, tmp_path / "cache")
    assert unfinished > 0, "no kill fell into the writing of a checkpoint"
    quiet = tmp_path / "quiet" / "0"
    for killed in (tmp_path / "killed").iterdir():
        assert losses_of(killed) == losses_of(quiet)
        for which in ("latest", "best"):
            runs = [load_run(run, which) for run in (quiet, killed)]
            assert runs[0].step == runs[1].step
            jax.tree.map(np.testing.assert_array_equal, *(run.variables for run in runs))
        assert not list(killed.glob("damaged-*"))
