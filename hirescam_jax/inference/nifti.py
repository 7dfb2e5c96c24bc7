"""Maps as a folder of NIfTI files a volume."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from hirescam_jax.data.volume import write_nifti
from hirescam_jax.files import atomic_file, atomic_folder

HEADER = "maps.json"  # of a folder of NIfTI maps


class NiftiWriter:
    """Writes `<id>/<label>_<method>_features.nii.gz` and a table for every volume, in folders that
    are there whole or not at all; maps.json tells what they are."""

    def __init__(self, path: Path, attributes: dict[str, Any]):
        self.path, self.attributes = path, {"format": "hirescam NIfTI maps 1", **attributes}
        self.folders = [path / name for name in map_file_names(attributes["ids"])]

    # Its methods are those of `MapWriter`.

    def saved(self) -> dict[str, Any] | None:
        try:
            attributes = json.loads((self.path / HEADER).read_text())
            return attributes if attributes["format"] == self.attributes["format"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        for name in map_file_names((self.saved() or self.attributes)["ids"]):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def start(self) -> list[bool]:
        with atomic_file(self.path / HEADER) as temporary:
            temporary.write_text(json.dumps(self.attributes, indent=1))
        return [folder.is_dir() for folder in self.folders]

    def write(
        self,
        place: int,
        maps: np.ndarray,
        logits: np.ndarray,
        residuals: np.ndarray,
        affine: np.ndarray,
    ) -> None:
        labels = self.attributes["labels"]
        with atomic_folder(self.folders[place]) as temporary:
            for name, map_dhw in zip(map_file_names(labels), maps, strict=True):
                file = f"{name}_{self.attributes['method']}_features.nii.gz"
                write_nifti(temporary / file, map_dhw, affine)
            write_table(temporary, labels, logits, residuals, self.attributes["guarantee"])


TABLE = "probabilities.csv"


def write_table(
    folder: Path,
    labels: Sequence[str],
    logits_K: Float[np.ndarray, " K"],
    residuals_K: Float[np.ndarray, " K"],
    guarantee: str,
) -> None:
    """The table of a volume's labels into its folder."""
    columns = np.asarray(jax.nn.sigmoid(logits_K)), logits_K, residuals_K
    with (folder / TABLE).open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["label", "probability", "logit", "completeness_residual", "guarantee"])
        for label, *values in zip(labels, *columns, strict=True):
            rows.writerow([label, *(f"{value:.7g}" for value in values), guarantee])


def map_file_names(labels: Sequence[str]) -> list[str]:
    """Labels as parts of the names of their maps' files, all different."""
    names = [re.sub(r"[^\w.+-]+", "_", label).strip("._") or "label" for label in labels]
    lower = [name.lower() for name in names]
    return [
        name if lower.count(name.lower()) == 1 else f"{name}_{k}" for k, name in enumerate(names)
    ]
