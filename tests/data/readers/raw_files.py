"""Files in the layouts of published data sets, and what readers make of them."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from hirescam_jax.errors import UserError

LPS = np.diag([-1.0, -1, 1, 1])


def thorax(shape: tuple[int, ...] = (12, 14, 16), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    inside = rng.random(shape) > 0.4
    return np.where(inside, 40 + 60 * rng.normal(size=shape), -900.0).astype(np.int16)


def write_csv(path: Path, header: list[str], *rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    return path


def reasons(reader: Any) -> dict[str, str]:
    assert len({r.id for r in reader.rejects} & {s.id for s in reader.studies}) == 0
    assert not any("\n" in r.reason for r in reader.rejects)
    return {r.id: r.reason for r in reader.rejects}


def study(reader: Any, key: str) -> Any:
    return next(s for s in reader.studies if s.id == key)


def found(reader: Any, key: str) -> dict[str, set[str]]:
    """label -> regions, of one study."""
    marks = study(reader, key).findings
    assert marks.shape == (len(reader.labels), len(reader.regions))
    assert marks.dtype == np.uint8
    return {
        label: {region for r, region in enumerate(reader.regions) if marks[k, r]}
        for k, label in enumerate(reader.labels)
        if marks[k].any()
    }


@contextlib.contextmanager
def fails(message: str, *paths: Path | str) -> Iterator[None]:
    """A UserError of one line with these words and paths."""
    with pytest.raises(UserError, match=message) as error:
        yield
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for path in paths:
        assert str(path) in text
