"""What the measures of maps do with their arrays first."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*arrays: Any) -> Any:
    """jax.numpy where one of them is JAX's, else NumPy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def floating(array: Any, xp: Any = jnp) -> Any:
    """As floats of at least 32 bits: integers wrap when they are negated, and would cut thresholds
    and fills to whole numbers."""
    array = xp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
