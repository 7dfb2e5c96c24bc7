"""What a reader of a data set gives: its labels, its studies, and the voxels of one."""

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from hirescam_jax.data.volume import Volume

# The region of a finding whose place is not known: the whole volume, so nothing is forbidden.
ANYWHERE = "anywhere"

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """One volume of a data set, not yet read.

    id: unique in the data set, usable as a file name.
    patient: splits never part the studies of one patient.
    split: "train", "val" or "test" where the data set has its own split, else None.
    files: what its voxels are read from.
    findings: [K, R], 1 where the reader's label k was found in its region r.
    """

    id: str
    patient: str
    split: str | None
    files: tuple[Path, ...]
    findings: UInt8[np.ndarray, "K R"]


@dataclasses.dataclass(frozen=True)
class Reject:
    """A study that is left out, and why (one line that names file, field and fix)."""

    id: str
    reason: str


@runtime_checkable
class Reader(Protocol):
    """A data set in its published layout. Readers are small and picklable: worker processes call
    `read`. Opening one raises UserError for a missing folder or table; what is wrong with single
    studies (an id without a volume, a label that is not 0 or 1) goes to `rejects`."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def regions(self) -> tuple[str, ...]: ...

    @property
    def studies(self) -> list[Study]: ...

    @property
    def rejects(self) -> list[Reject]: ...

    def read(self, study: Study) -> Volume:
        """Its voxels in Hounsfield units and their place. UserError if it cannot be read."""
        ...
