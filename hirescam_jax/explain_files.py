"""Explains CT files: volumes in, maps in the scanner's own space, a table and pictures out."""

import contextlib
import csv
import dataclasses
import difflib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hirescam_jax.cam import Explanation, explain
from hirescam_jax.checkpoint import Run
from hirescam_jax.data.grid import feature_affine, from_features, to_grid
from hirescam_jax.data.volume import Volume, atomic_file, open_nifti, read_ct, write_nifti
from hirescam_jax.errors import UserError
from hirescam_jax.pictures import save_label_picture
from hirescam_jax.progress import progress, say

TABLE = "probabilities.csv"
Method = Literal["hirescam", "gradcam"]
Grid = Literal["input", "features"]


@dataclasses.dataclass(frozen=True, eq=False)
class FileExplanation:
    """What was found in one file, and where it was written.

    path: the input.     folder: its outputs.     labels: the K labels of the model.
    explained: indices of the labels whose maps were written, most probable first.
    logits, probabilities [K] float32.
    residuals [K] float32: |sum of the map + bias - logit|, what the map leaves unexplained.
    maps_Kdhw: float32, raw signed maps on the feature grid, whose affine is `affine` [4, 4].
    """

    path: Path
    folder: Path
    labels: tuple[str, ...]
    explained: tuple[int, ...]
    logits: Float[np.ndarray, " K"]
    probabilities: Float[np.ndarray, " K"]
    residuals: Float[np.ndarray, " K"]
    maps_Kdhw: Float[np.ndarray, "K d h w"]
    affine: Float[np.ndarray, "4 4"]


def explain_files(
    run: Run,
    inputs: Sequence[Path],
    out: Path,
    *,
    labels: Sequence[str] = (),
    method: Method = "hirescam",
    grid: Grid = "input",
    batch_size: int = 2,
    pictures: bool = True,
    overwrite: bool = False,
) -> list[FileExplanation]:
    """Explains CT files with a trained model and prints a table of the findings.

    For every file a folder `out/<name of the file>` is written, whole or not at all:
        probabilities.csv             all labels: probability, logit, completeness residual
        <label>_<method>.nii.gz       raw signed map, float32, on the grid of the input
        <label>_<method>_features.nii.gz    instead, on the feature grid, with grid="features"
        <label>_<method>.png          the slices with the strongest attention

    Args:
        inputs: NIfTI files (.nii, .nii.gz) in Hounsfield units, and folders of them.
        out: output folder; made if missing.
        labels: the labels to explain; none for the predicted ones (probability at least 0.5), or
            the most probable one where none is predicted.
        batch_size: volumes in one compiled batch.
        overwrite: replace the outputs of an earlier call.

    Returns:
        One item a file, in the order of the inputs.

    Raises:
        UserError: before any work, for an unknown label, outputs that exist, or inputs that share
            a name; at the end, for files that could not be explained (the others are done).
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    wanted = _label_indices(labels, run.labels)
    files = _input_files(inputs)
    folders = _output_folders(files, Path(out), overwrite)

    failures: dict[Path, str] = {}
    for path in files:
        with _collected(failures, path, alone=len(files) == 1):
            open_nifti(path)
    ready = [path for path in files if path not in failures]
    if not ready:
        raise UserError(_summary(failures, len(files)))

    results = []
    for batch in _batches(ready, min(batch_size, len(ready)), failures):
        for volume, affine, explanation in _explain_batch(run, batch, min(batch_size, len(ready)), method):
            with _collected(failures, volume.path):
                result = _result(run, volume.path, folders[volume.path], affine, explanation, wanted)
            if volume.path not in failures:
                _write(result, volume, method, grid, pictures)
                results.append(result)
    for result in results:
        print(table(result))
    if failures:
        raise UserError(_summary(failures, len(files)))
    return results
