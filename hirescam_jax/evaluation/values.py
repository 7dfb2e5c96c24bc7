"""What an evaluation measured in each volume, in a file beside it, so that runs can be compared
volume by volume.

evaluation_test.npz, evaluation_validation.npz, plain arrays (no pickles):
  labels      [K] names                     logits     [N, K]
  patients    [N] names                     truth      [N, K] bool
  content     digest of the split           residuals  [N, K] of HiResCAM maps, where there are maps
  organ_iou/METHOD [N, K], at the thresholds of the validation split; NaN where not defined
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.summary import Predictions, at_thresholds
from hirescam_jax.files import atomic_file

IOU = "organ_iou/"


class Values(NamedTuple):
    """The arrays of a file; organ_iou: by method."""

    labels: tuple[str, ...]
    patients: np.ndarray
    content: str
    logits: np.ndarray
    truth: np.ndarray
    organ_iou: dict[str, np.ndarray]
    residuals: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        validation: Predictions,
        test: Predictions,
        patients: Sequence[str] | None,
        content: str,
    ) -> "Values":
        """Of a split, at the thresholds of the validation split; without patients each volume is
        one."""
        names = patients or [f"{number:06d}" for number in range(len(test.labels))]
        measured = at_thresholds(labels, validation, test).values
        iou = {name: measured[name].astype(np.float32) for name in test.organ_iou}
        arrays = np.array(names, str), content, test.logits, test.labels, iou, test.residuals
        return cls(tuple(labels), *arrays)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {
            "labels": np.array(self.labels, str),
            "patients": self.patients,
            "content": np.array(self.content),
            "logits": self.logits,
            "truth": self.truth,
            **{IOU + name: value for name, value in self.organ_iou.items()},
        }
        if self.residuals is not None:
            arrays["residuals"] = self.residuals
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Values":
        """Raises UserError: no such file, or a damaged one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            iou = {n[len(IOU) :]: value for n, value in arrays.items() if n.startswith(IOU)}
            found = cls(
                tuple(map(str, arrays["labels"])),
                arrays["patients"],
                str(arrays["content"]),
                arrays["logits"],
                arrays["truth"].astype(bool),
                iou,
                arrays.get("residuals"),
            )
            shape = len(found.patients), len(found.labels)
            for array in (found.logits, found.truth, *iou.values()):
                if array.shape != shape:
                    raise ValueError(f"an array of {array.shape}, not {shape}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = "not there" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"{path}: {reason}: run `hirescam evaluate` again") from error
        return found
