"""PyTorch weights, both ways.

pytorch.py      files and networks; read this first
names.py        which of their arrays is which of ours
state_dicts.py  reading and writing the files
"""

from hirescam_jax.weights.pytorch import (
    from_torch,
    read_variables,
    read_weights,
    to_torch,
    write_weights,
)

__all__ = ["from_torch", "read_variables", "read_weights", "to_torch", "write_weights"]
