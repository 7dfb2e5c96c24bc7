"""The device mesh, and where the arrays of a step live on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hirescam_jax.errors import UserError


def data_mesh(batch_size: int) -> Mesh:
    """All devices of all processes along one axis, `data`, over which a batch is split.

    Raises:
        UserError: the batch does not divide over the devices.
    """
    devices = np.asarray(jax.devices())
    if batch_size % devices.size:
        raise UserError(
            f"config.batch_size = {batch_size} does not divide over {devices.size} devices: "
            f"use a multiple of {devices.size}"
        )
    return Mesh(devices, ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch -> global arrays, split along the first axis."""
    sharding = over_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
