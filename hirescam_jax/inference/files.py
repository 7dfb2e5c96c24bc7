"""Explains CT files: volumes in, maps in the scanner's own space, a table and pictures out."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hirescam_jax.data.grid import feature_affine, from_features, to_grid
from hirescam_jax.data.volume import Volume, open_nifti, read_ct, write_nifti
from hirescam_jax.errors import UserError
from hirescam_jax.explanations.explain import explain
from hirescam_jax.explanations.methods import METHODS, MethodName
from hirescam_jax.explanations.verdict import HeadVerdict
from hirescam_jax.files import atomic_folder, writing_pool
from hirescam_jax.inference.maps import label_indices, verdict_of
from hirescam_jax.inference.nifti import TABLE, map_file_names, write_table
from hirescam_jax.progress import progress, say
from hirescam_jax.reports.figures import save_png
from hirescam_jax.reports.pictures import label_picture, place
from hirescam_jax.runs.run import Run

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class FileExplanation:
    """What was found in one file.

    path: the input.
    labels: the K labels of the model.
    explained: indices of the labels whose maps were written.
    logits, probabilities: [K] float32.
    residuals: [K] float32, |sum of the map + bias - logit|: what the map leaves unexplained.
    maps: [K, d, h, w] float32, raw signed maps on the feature grid.
    affine: [4, 4] float64 of the feature grid, indices -> RAS millimetres.
    verdict: what the head of the model guarantees.
    """

    path: Path
    labels: tuple[str, ...]
    explained: tuple[int, ...]
    logits: Float[np.ndarray, " K"]
    probabilities: Float[np.ndarray, " K"]
    residuals: Float[np.ndarray, " K"]
    maps: Float[np.ndarray, "K d h w"]
    affine: Float[np.ndarray, "4 4"]
    verdict: HeadVerdict


def explain_files(
    run: Run,
    inputs: Sequence[Path],
    out: Path,
    *,
    labels: Sequence[str] = (),
    method: MethodName = "hirescam",
    grid: Literal["input", "features"] = "input",
    batch_size: int = 2,
    pictures: bool = True,
    overwrite: bool = False,
) -> list[FileExplanation]:
    """Explains CT files with a trained model and prints a table of the findings.

    For every file a folder `out/<name of the file>` is written, whole or not at all:
        probabilities.csv                  all labels: probability, logit, completeness residual,
                                           and what the method guarantees
        <label>_<method>.nii.gz            raw signed map, float32, on the grid of the input
        <label>_<method>_features.nii.gz   instead of it with grid="features": the native map
        <label>_<method>.png               the slices with the strongest attention

    Args:
        inputs: NIfTI files (.nii, .nii.gz) in Hounsfield units, and folders of them.
        out: output folder; made if missing.
        labels: the labels to explain; none for the predicted ones (probability at least 0.5), or
            the most probable one where none is predicted.
        batch_size: volumes in one compiled batch.
        overwrite: replace the outputs of an earlier call.

    Returns:
        One item for each file, in the order of the inputs.

    Raises:
        UserError: before any work, for an unknown label, outputs that exist, or inputs that share
            a name; at the end, for the files that could not be read (the others are done).
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is too small: give 1 or more")
    run.check_maps()
    wanted = label_indices(labels, run.labels)
    files = _input_files(inputs)
    folders = _output_folders(files, Path(out), overwrite)
    verdict = verdict_of(run, method)
    say(f"{METHODS[method].title} here: {verdict.short(method)}")

    failures: dict[Path, str] = {}
    ready = [path for path in files if _attempt(open_nifti, path, failures) is not None]
    batch_size = min(batch_size, len(ready))
    results = []
    for batch in _batches(progress(ready, "explain", "file"), batch_size, failures):
        for volume, result in zip(
            batch, _explain_batch(run, batch, batch_size, wanted, method, verdict), strict=True
        ):
            _write(folders[volume.path], volume, result, method, grid, pictures)
            results.append(result)
    for result in results:
        print(f"\n{_text_table(result, folders[result.path])}")
    if len(failures) == 1 == len(files):
        raise UserError(*failures.values())
    if failures:
        lines = "; ".join(failures.values())
        raise UserError(f"{len(failures)} of {len(files)} files were not explained: {lines}")
    return results


def _batches(
    paths: Iterable[Path], batch_size: int, failures: dict[Path, str]
) -> Iterator[list[Volume]]:
    """Reads the files and groups those that can be read; the last group may be smaller."""
    batch = []
    for path in paths:
        volume = _attempt(read_ct, path, failures)
        if volume is not None:
            batch.append(volume)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _attempt(read: Callable[[Path], T], path: Path, failures: dict[Path, str]) -> T | None:
    """What `read` returns; None if the file is bad, which is noted and said at once."""
    try:
        return read(path)
    except UserError as error:
        failures[path] = str(error)
        say(f"left out: {error}")
        return None


def _explain_batch(
    run: Run,
    batch: list[Volume],
    batch_size: int,
    wanted: tuple[int, ...],
    method: str,
    verdict: HeadVerdict,
) -> list[FileExplanation]:
    """All maps of a batch, which is filled up to `batch_size` so that one program serves all."""
    grids = [to_grid(volume, run.spacing_mm, run.shape) for volume in batch]
    volumes_DHW = [volume_DHW for volume_DHW, _ in grids]
    volumes_BDHW = np.stack(volumes_DHW + volumes_DHW[-1:] * (batch_size - len(batch)))
    volumes = run.normalize(jnp.asarray(volumes_BDHW))
    explanation = explain(run.model, run.variables, volumes, method=method)
    logits_BK, maps_BKdhw, residuals_BK, _ = jax.device_get(explanation)
    if not np.isfinite(logits_BK).all():
        raise UserError(f"{run.path}: the model gives NaN or infinite scores: train it again")
    results = []
    for i, (volume, (_, affine)) in enumerate(zip(batch, grids, strict=True)):
        probabilities_K = np.asarray(jax.nn.sigmoid(logits_BK[i]))
        result = FileExplanation(
            path=volume.path,
            labels=run.labels,
            explained=wanted or _predicted(probabilities_K),
            logits=logits_BK[i],
            probabilities=probabilities_K,
            residuals=residuals_BK[i],
            maps=maps_BKdhw[i],
            affine=feature_affine(affine, run.shape, maps_BKdhw.shape[2:]),
            verdict=verdict,
        )
        results.append(result)
    return results


def _predicted(probabilities_K: np.ndarray) -> tuple[int, ...]:
    """The labels with probability >= 0.5, most probable first; at least the first of all."""
    order = np.argsort(-probabilities_K, kind="stable")
    count = max(1, int((probabilities_K >= 0.5).sum()))
    return tuple(int(k) for k in order[:count])


def _write(
    folder: Path, volume: Volume, result: FileExplanation, method: str, grid: str, pictures: bool
) -> None:
    names = map_file_names(result.labels)

    def write_map(folder: Path, k: int) -> None:
        name, map_dhw = f"{names[k]}_{method}", result.maps[k]
        if grid == "features":
            write_nifti(folder / f"{name}_features.nii.gz", map_dhw, result.affine, volume.header)
            return
        map_ijk = from_features(map_dhw, result.affine, volume)
        path = folder / f"{name}.nii.gz"
        write_nifti(path, map_ijk, volume.affine, volume.header, same_grid=True)

    # Resampling and compression leave Python, so threads help; a few, for the sake of memory.
    writers = min(4, os.cpu_count() or 1)
    with atomic_folder(folder) as temporary, writing_pool(writers) as pool:
        maps = [pool.submit(write_map, temporary, k) for k in result.explained]
        guarantee = result.verdict.short(method)
        write_table(temporary, result.labels, result.logits, result.residuals, guarantee)
        for k in result.explained if pictures else ():
            figure = label_picture(
                volume,
                result.maps[k],
                result.affine,
                label=result.labels[k],
                probability=float(result.probabilities[k]),
                method=method,
                verdict=result.verdict,
            )
            save_png(temporary / f"{names[k]}_{method}.png", figure)
        for written in maps:
            written.result()


def _text_table(result: FileExplanation, folder: Path) -> str:
    """The explained labels for a person to read; the file has all."""
    width = max(len("label"), *(len(result.labels[k]) for k in result.explained))
    lines = [
        f"{result.path} -> {folder}",
        f"  {'label':{width}}  probability   logit  residual  strongest evidence (mm)",
    ]
    for k in result.explained:
        map_dhw = result.maps[k]
        where = "none"
        if map_dhw.max() > 0:
            index = np.unravel_index(map_dhw.argmax(), map_dhw.shape)
            where = place(result.affine @ [*index, 1])
        lines.append(
            f"  {result.labels[k]:{width}}  {result.probabilities[k]:11.3f}  "
            f"{result.logits[k]:6.2f}  {result.residuals[k]:8.1e}  {where}"
        )
    rest = len(result.labels) - len(result.explained)
    return "\n".join(lines + [f"  and {rest} more labels in {TABLE}"] * (rest > 0))


def _input_files(inputs: Sequence[Path]) -> list[Path]:
    files = []
    for path in map(Path, inputs):
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in path.iterdir() if _is_nifti(p) and not p.name.startswith(".")]
        if not inside:
            raise UserError(f"{path}: no .nii or .nii.gz file in this folder: check the path")
        files += sorted(inside)
    if not files:
        raise UserError("no input: give one or more NIfTI files or folders with --input")
    return files


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _output_folders(files: Sequence[Path], out: Path, overwrite: bool) -> dict[Path, Path]:
    """Where the outputs of each file go; nothing of value is in the way."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file: choose a folder for the output")
    folders: dict[Path, Path] = {}
    for path in files:
        folder = out / re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        for other, taken in folders.items():
            if taken == folder:
                raise UserError(
                    f"{path}: its outputs would replace those of {other}: rename it, or explain "
                    "it into another output folder"
                )
        if folder.exists() and not overwrite:
            raise UserError(f"{folder}: exists: choose another output folder, or --overwrite")
        if folder.exists() and not (folder / TABLE).is_file():
            raise UserError(
                f"{folder}: exists and holds no earlier explanation (no {TABLE}), so it is not "
                "overwritten: choose another output folder"
            )
        folders[path] = folder
    return folders
