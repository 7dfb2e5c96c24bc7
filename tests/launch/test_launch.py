"""The launch scripts: SLURM for real, the others as far as they go without their clusters."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devices.test_preemption import command, same
from tests.processes import ROOT, environment, free_port, run

LAUNCH = ROOT / "launch"


def arguments_to(folder: Path, name: str) -> dict[str, str]:
    """Puts a program `name` on the PATH that writes its arguments, one a line, to `name`.txt."""
    program = folder / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{folder / name}.txt"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("equals", [False, True])
def test_local_resumes_what_exists(tmp_path, exists, equals):
    run = tmp_path / "my run"
    if exists:
        run.mkdir()
        (run / "run.json").touch()
    given = ["config.py", *([f"--run={run}"] if equals else ["--run", str(run)]), "--seed", "3"]
    subprocess.run(
        [LAUNCH / "local.sh", *given], env=arguments_to(tmp_path, "hirescam"), check=True
    )
    got = (tmp_path / "hirescam.txt").read_text().splitlines()
    assert got == ["train", *given, *(["--resume"] if exists else [])]


@pytest.mark.parametrize(
    ("script", "again"),
    [
        ("exit 0", False),
        ("exit 1", False),
        ("exit 2", False),
        ("exit 75", True),
        ("kill -USR1 $$", True),  # before a training handles it
        ("kill -TERM $$", True),
        ("trap 'exit 75' USR1; kill -TERM $PPID; sleep 9 & wait", True),
        ("trap 'exit 134' USR1; kill -TERM $PPID; sleep 9 & wait", True),
        ("trap 'exit 2' USR1; kill -USR1 $PPID; sleep 9 & wait", False),
        ("trap 'exit 0' USR1; kill -USR1 $PPID; sleep 9 & wait", False),
    ],
)
def test_when_a_slurm_job_queues_itself_again(tmp_path, script, again):
    given = ["config.py", "--run", str(tmp_path / "run")]
    variables = arguments_to(tmp_path, "scontrol")
    srun = tmp_path / "srun"
    srun.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{srun}.txt"\n{script}\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [LAUNCH / "slurm.sbatch", *given],
        env={**variables, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6"},
        timeout=8,
    )
    asked = (tmp_path / "srun.txt").read_text().splitlines()
    assert "--cpus-per-task=6" in asked
    assert asked[-len(given) - 2 :] == ["hirescam", "train", *given]
    assert (tmp_path / "scontrol.txt").exists() == again
    if again:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "7"]
    assert done.returncode != 0 or "exit 0" in script


def test_a_part_of_an_array(tmp_path):
    variables = {"MIN": "3", "ID": "5", "COUNT": "4"}
    variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
    environment = {**arguments_to(tmp_path, "hirescam"), **variables, "SLURM_CPUS_PER_TASK": "6"}
    given = ["nifti", "a folder", "--out", "store"]
    subprocess.run([LAUNCH / "prepare_array.sbatch", *given], env=environment, check=True)
    got = (tmp_path / "hirescam.txt").read_text().splitlines()
    assert got == ["prepare", *given, "--shard", "2/4", "--workers", "6"]


PLACE = ["pod", "europe-west4-b", "v5litepod-64", "gs://b/code"]


def test_what_is_sent_for_a_tpu_pod():
    done = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--dry-run", *PLACE, "--", "c.py", "--run", "/mnt/my runs/x"],
        env={**os.environ, "SETUP": "sudo mount share /mnt"},
        capture_output=True,
        text=True,
        check=True,
    )
    create, ssh, delete = done.stdout.splitlines()
    assert create.startswith("gcloud compute tpus queued-resources create pod --node-id pod ")
    assert "--accelerator-type v5litepod-64" in create
    # What the shell on the hosts will be given.
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\0" {ssh}'], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert "--worker=all" in words
    script = words[words.index("--command") + 1]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert "hirescam train c.py --run /mnt/my\\ runs/x  $resume" in script
    assert script.index("sudo mount share /mnt") < script.index("[ -e /mnt/my\\ runs/x/run.json ]")
    assert "queued-resources delete pod" in delete


# What the cloud answers: the states of the slice, one after the other, and how the trainings end.
GCLOUD = """#!/usr/bin/env bash
next() {{ head -n 1 {0}/$1; sed -i 1d {0}/$1; }}
case "$*" in
  *describe*) state=$(next states); [[ $state != none ]] && echo "$state" ;;
  *ssh*) echo ssh >> {0}/done; exit "$(next ends)" ;;
  *) echo "$4" >> {0}/done ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "ends", "done", "code"),
    [
        ("none PROVISIONING ACTIVE", "0", "create ssh delete", 0),
        ("ACTIVE", "0", "ssh delete", 0),
        ("SUSPENDED none ACTIVE", "0", "delete create create ssh delete", 0),
        ("FAILED ACTIVE", "0", "delete create ssh delete", 0),
        # Preempted while it trains, which is seen a while later.
        (
            "ACTIVE SUSPENDING SUSPENDING SUSPENDED ACTIVE",
            "255 0",
            "ssh delete create ssh delete",
            0,
        ),
        ("ACTIVE ACTIVE", "2", "ssh delete", 2),
        ("none none none none none none", "", "create create create create create delete", 1),
    ],
)
def test_a_tpu_slice_is_asked_for_until_the_training_is_done(tmp_path, states, ends, done, code):
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "ends").write_text(ends.replace(" ", "\n") + "\n")
    for name, text in (("gcloud", GCLOUD.format(tmp_path)), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    ended = subprocess.run(
        [LAUNCH / "tpu_pod.sh", *PLACE, "--", "c.py", "--run", "/mnt/x"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=20,
    )
    assert ended.returncode == code
    assert (tmp_path / "done").read_text().split() == done.split()
    assert (tmp_path / "states").read_text().split() == []


def test_the_wheel_and_the_config_are_what_a_host_installs(tmp_path):
    """The script that the hosts are given, with programs that stand in for theirs."""
    script = "; ".join(
        [
            'gcloud() { touch hirescam_jax-0.1.0-py3-none-any.whl c.py; echo "gcloud $*"; }',
            'python3() { echo "python3 $*"; mkdir -p env/bin; ln -sf /bin/echo env/bin/hirescam; }',
        ]
    )
    dry = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--dry-run", *PLACE, "--", "c.py", f"--run={tmp_path}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[1]
    (tmp_path / "run.json").touch()
    said = subprocess.run(
        ["bash", "-c", f'{script}; words=({dry}); eval "${{words[-1]}}"'],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said == [
        "gcloud storage cp -r gs://b/code/* .",
        "python3 -m pip install -q --user uv",
        "python3 -m uv venv -q -p 3.12 env",
        "python3 -m uv pip install -q -p env jax[tpu] ./hirescam_jax-0.1.0-py3-none-any.whl",
        f"train c.py --run={tmp_path} --resume --start-timeout 1800",
    ]


def test_tpu_pod_needs_its_arguments():
    done = subprocess.run([LAUNCH / "tpu_pod.sh", "pod"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh [--dry-run] NAME ZONE TYPE" in done.stderr


def test_jobset_is_valid():
    """By the published schemas: the JobSet's own fields, and those of the Job in it."""
    validate = pytest.importorskip("kubernetes_validate").validate
    import jsonschema
    import yaml

    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(jobset, schema)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}}
    validate({**job, **replicated["template"]}, "1.33", strict=True)

    broken = json.loads(json.dumps(jobset))
    broken["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(broken, schema)

    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    script = container["command"][-1]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    name, job_name = jobset["metadata"]["name"], replicated["name"]
    assert f"--coordinator {name}-{job_name}-0-0.{name}:" in script
    assert f"--num-processes {spec['parallelism']} " in script
    assert spec["completions"] == spec["parallelism"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert 75 not in rule["onExitCodes"]["values"]


# -- SLURM ----------------------------------------------------------------------------------------

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine, of two CPUs; gives the environment for its commands."""
    key, spool = folder / "munge.key", folder / "spool"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    spool.mkdir()
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
JobRequeue=1
ReturnToService=2
StateSaveLocation={spool}
SlurmdSpoolDir={spool}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerParameters=sched_interval=2
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={socket.gethostname()} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    variables = environment(SLURM_CONF=str(folder / "slurm.conf"))
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}"]
        + [f"--{n}={folder}/munge.{n.split('-')[0]}" for n in ("socket", "pid-file", "log-file")]
        + [f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "daemons.log").open("w"))
        for line in commands:
            daemon = subprocess.Popen(line, env=variables, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            if line[0] == "munged":
                until(lambda: (folder / "munge.socket").exists(), 10, "munged")
        until(
            lambda: "idle" in answer(["sinfo", "-h", "-o", "%T"], variables), 20, "the node", folder
        )
        try:
            yield variables
        finally:
            answer(["scancel", "--user=root"], variables)
            until(lambda: not answer(["squeue", "-h"], variables).strip(), 60, "the last job")


def answer(line: list[str], variables: dict[str, str]) -> str:
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def until(true, seconds: float, what: str, folder: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            logs = [p.read_text()[-2000:] for p in folder.glob("*.log")] if folder else []
            pytest.fail("\n".join([f"waited {seconds} seconds for {what}", *logs]))
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.slurm
def test_a_preempted_slurm_job_requeues_itself_and_ends_alike(tmp_path):
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)})")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root here")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run(2, command(tmp_path, "whole"), cache=tmp_path / "cache")
    programs, output, folder = tmp_path / "bin", tmp_path / "job.log", tmp_path / "run"
    programs.mkdir()
    hirescam = programs / "hirescam"
    hirescam.write_text(f'#!/bin/sh\nexec {sys.executable} -m hirescam_jax.cli "$@"\n')
    hirescam.chmod(0o755)

    def said() -> str:
        return output.read_text() if output.exists() else ""

    with slurm(tmp_path) as variables:
        variables = {**variables, **cache, "PATH": f"{programs}:{variables['PATH']}"}
        size = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=5"]
        training = [str(item) for item in command(tmp_path, "run")[1:]]
        submitted = answer(
            ["sbatch", *size, f"--output={output}", LAUNCH / "slurm.sbatch", *training], variables
        )
        match = re.search(r"Submitted batch job (\d+)", submitted)
        assert match, submitted

        def job() -> str:
            return answer(["scontrol", "show", "job", match[1]], variables)

        metrics = folder / "metrics.jsonl"
        until(
            lambda: (metrics.exists() and metrics.read_text().count("\n") > 4) or "FAILED" in job(),
            60,
            "the first steps",
            tmp_path,
        )
        # As a preemption with GraceTime: to the tasks and to the script, which hands it on to them.
        answer(["scancel", "--signal=TERM", match[1]], variables)
        answer(["scancel", "--signal=TERM", "--batch", match[1]], variables)
        until(lambda: "Restarts=1" in job() or "FAILED" in job(), 60, "the requeue", tmp_path)
        assert "stopped by a signal, saved at step" in said(), said()
        stopped = metrics.read_text().count("\n")
        assert stopped < (tmp_path / "whole" / "metrics.jsonl").read_text().count("\n")
        until(lambda: re.search("JobState=(COMPLETED|FAILED)", job()), 90, "the end", tmp_path)
        assert "JobState=COMPLETED" in job(), said()
    same(folder, tmp_path / "whole")
