"""Runs of several processes: how they start, agree on what they do, and end.

Under SLURM (srun with several tasks), in a Kubernetes Job or JobSet with indexed completion and on
TPU pods JAX finds out where it is; elsewhere `--coordinator HOST:PORT --num-processes N
--process-id I` tell it. A process that is on its own starts nothing.

Before JAX starts, all processes meet at the coordinator's port: JAX's own start ends a process that
waits in vain with an abort, from which Python cannot say who is missing.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from hirescam_jax.devices.rendezvous import Launch, meet
from hirescam_jax.errors import UserError


def start(launch: Launch, *, preemptible: bool = False) -> None:
    """Joins the other processes of this run, if there are any. To be called before JAX is used.

    Args:
        preemptible: SIGTERM is a notice to all processes (see `preemption`) and does not end one.

    Raises:
        StartError: the others do not come within `launch.start_timeout`.
    """
    place, devices = (launch.coordinator, launch.num_processes, launch.process_id), None
    if launch.coordinator is None:
        if not _in_cluster(os.environ):
            return
        place, devices = _detect(launch.start_timeout)
    coordinator, count, number = place
    if coordinator is None or count is None or number is None:
        raise UserError(
            "this cluster does not tell where the other processes are: give --coordinator, "
            "--num-processes and --process-id"
        )
    if count == 1:
        return
    begin = time.monotonic()
    meet(coordinator, count, number, launch.start_timeout)
    left = launch.start_timeout - int(time.monotonic() - begin)
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        coordinator,
        count,
        number,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(30, left),
        heartbeat_timeout_seconds=launch.heartbeat_timeout,
        # At the end all wait for the one that writes the results.
        shutdown_timeout_seconds=3600,
    )


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several by its surroundings. A job that merely runs in an
    allocation (salloc, the batch script itself, srun with one task) is on its own."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def _detect(timeout: int) -> tuple[Any, list[int] | None]:
    """Coordinator, number of processes, this one's number; and its devices. As
    `jax.distributed.initialize()` without arguments finds them."""
    from jax._src.clusters import ClusterEnv

    try:
        *place, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(f"no other processes found in this cluster: {error}") from error
    return tuple(place), None if devices is None else list(devices)


# -- during the run -------------------------------------------------------------------------------


def agree(facts: Mapping[str, str]) -> None:
    """Compares what the processes are about to do, by hashes.

    Args:
        facts: what must be the same, by the name under which a user knows it; the same names in
            the same order in all processes of one version of this program.

    Raises:
        UserError: in all processes, naming the first fact that differs and a process of each kind.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    names = list(facts)
    texts = ["\n".join(names), *facts.values()]
    mine = np.array([list(hashlib.sha256(text.encode()).digest()) for text in texts], np.uint8)
    # Row 0, of the names, has the same shape everywhere: a differing count cannot be gathered.
    titles_P = process_allgather(mine[:1])
    _compare(titles_P, ["the version of hirescam_jax"], [f"{len(names)} facts"])
    _compare(process_allgather(mine[1:]), names, list(facts.values()))


def _compare(hashes_PNh: np.ndarray, names: list[str], values: list[str]) -> None:
    for i, name in enumerate(names):
        other = (hashes_PNh[:, i] != hashes_PNh[0, i]).any(axis=-1)
        if other.any():
            number = int(np.argmax(other))
            value = values[i] if len(values[i]) < 80 else f"{values[i][:76]} ..."
            jax.distributed.shutdown()  # all leave together, so none is taken for dead
            raise UserError(
                f"the processes disagree: {name} of process {number} is not that of process 0 "
                f"(here: {value})"
            )


def on_first(task: Callable[[], Any]) -> Any:
    """Runs `task` in process 0. All get its result, which JSON must hold, or raise its UserError;
    the others wait for it."""
    if jax.process_count() == 1:
        return task()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    told, error = b"", None
    if jax.process_index() == 0:
        try:
            told = json.dumps({"result": task()}).encode()
        except UserError as caught:
            told, error = json.dumps({"error": str(caught)}).encode(), caught
    length = int(broadcast_one_to_all(np.int32(len(told))))
    padded = np.frombuffer(told.ljust(length), np.uint8)[:length]
    answer = json.loads(bytes(broadcast_one_to_all(padded)))
    if "error" in answer:
        raise UserError(answer["error"]) from error
    return answer["result"]


def in_any(flag: bool) -> bool:
    """Whether it is so in any of the processes."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.array(flag)).any())


def leave(code: int) -> NoReturn:
    """Ends this process after an error.

    With others still at work it must not wait for them, as JAX does at a normal exit: they notice
    that a process is gone, and end too. The coordinator stays a moment longer, so that those that
    fail for the same reason can say so.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(3)
    os._exit(code)


def peer_lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone away."""
    # Not the libraries' names, which their complaints about this process bear too.
    signs = ("closed by peer", "reset by peer", "heartbeat", "another task", "ncclremoteerror")
    text = str(error).lower()
    return jax.distributed.is_initialized() and any(sign in text for sign in signs)
