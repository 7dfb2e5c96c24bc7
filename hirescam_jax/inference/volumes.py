"""Explains what it is given: files, or a split of a store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from hirescam_jax.errors import UserError
from hirescam_jax.explanations.methods import MethodName
from hirescam_jax.inference.files import explain_files
from hirescam_jax.inference.store import explain_store
from hirescam_jax.runs.run import load_run


def explain_volumes(
    run_dir: Path,
    out: Path,
    files: Sequence[Path] = (),
    store: Path | None = None,
    split: str = "test",
    *,
    labels: Sequence[str] = (),
    method: MethodName = "hirescam",
    grid: Literal["input", "features"] | None = None,
    format: Literal["zarr", "nifti"] = "zarr",
    batch_size: int = 2,
    depth_devices: int | None = None,
    pictures: bool = True,
    overwrite: bool = False,
) -> None:
    """Opens a run and explains files (`explain_files`), or a store's split (`explain_store`).

    Args:
        files: NIfTI files or folders of them; or else
        store: the folder of a store.
        grid: of files only, None for that of the input.
        format, depth_devices: of a store only.
        others: as the two functions'.

    Raises:
        UserError: both or none of the two, or an option of the other one; and as both functions.
    """
    if bool(files) == (store is not None):
        raise UserError("give either --input FILES or --store STORE")
    if store is not None:
        if grid == "input":
            raise UserError(
                "--grid input: a store holds volumes on the model's grid, so that their maps are "
                "on the feature grid: leave it out, or explain the files with --input"
            )
        explain_store(
            load_run(run_dir).on_mesh(depth_devices),
            store,
            split,
            out,
            labels=labels,
            method=method,
            format=format,
            batch_size=batch_size,
            overwrite=overwrite,
        )
        if jax.process_index() == 0:
            print(out)
        return
    if format != "zarr" or depth_devices is not None:
        raise UserError("--format and --depth-devices go with --store, not with --input")
    if jax.process_count() > 1:
        raise UserError("--input runs in one process: for several, prepare a store (--store)")
    explain_files(
        load_run(run_dir),
        files,
        out,
        labels=labels,
        method=method,
        grid=grid or "input",
        batch_size=batch_size,
        pictures=pictures,
        overwrite=overwrite,
    )
