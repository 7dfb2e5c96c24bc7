"""Which study comes into which split and file."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hirescam_jax.data.store.store import shard_name
from hirescam_jax.data.study import SPLITS, Study
from hirescam_jax.errors import UserError

SHARD_VOLUMES = 32  # about 2 GB on the paper's grid


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """The studies that one file shall hold."""

    split: str
    file: str
    studies: list[Study]

    @property
    def header_file(self) -> str:
        return str(Path(self.file).with_suffix(".json"))


def split_studies(
    studies: Sequence[Study], seed: int, fractions: Sequence[float]
) -> dict[str, list[Study]]:
    """Studies by split, those of one patient together.

    A patient who is in a split of the data set's own stays there. The others are sorted by a hash
    of (seed, patient) and cut by the fractions; a split with a fraction gets one patient at least.

    Raises:
        UserError: the data set has one patient in two splits, or fractions that are none.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"split fractions {tuple(fractions)}: give three from 0 to 1 whose sum is 1, for "
            f"{', '.join(SPLITS)}"
        )
    split_of: dict[str, str] = {}
    for study in studies:
        if (
            study.split is not None
            and split_of.setdefault(study.patient, study.split) != study.split
        ):
            raise UserError(
                f"{study.id}: patient '{study.patient}' is in the splits "
                f"{split_of[study.patient]} and {study.split}: correct the table"
            )
    patients = sorted(
        {study.patient for study in studies} - set(split_of),
        key=lambda patient: hashlib.sha256(f"{seed}/{patient}".encode()).digest(),
    )
    sizes = [max(1, int(len(patients) * f)) if f > 0 else 0 for f in fractions]
    largest = int(np.argmax(fractions))
    sizes[largest] = max(0, len(patients) - sum(sizes) + sizes[largest])
    if sizes[largest] == 0:
        sizes = [len(patients) if i == largest else 0 for i in range(len(SPLITS))]
    names = [name for name, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
    split_of.update(zip(patients, names, strict=True))
    return {name: [s for s in studies if split_of[s.patient] == name] for name in SPLITS}


def shards_of(splits: dict[str, list[Study]], shards: int = 0) -> list[Shard]:
    """Neighbouring studies together, evenly."""
    plan = []
    for split, studies in splits.items():
        count = min(shards or -(-len(studies) // SHARD_VOLUMES), len(studies))
        bounds = [i * len(studies) // count for i in range(count + 1)] if count else []
        for i in range(count):
            part = studies[bounds[i] : bounds[i + 1]]
            plan.append(Shard(split, shard_name(split, i, count), part))
    return plan
