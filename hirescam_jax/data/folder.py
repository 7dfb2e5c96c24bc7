"""A prepared data set as a plain folder: `dataset.json` and one .npz a volume.

dataset.json   {"format": 1, "labels": [...], "regions": [...], "spacing_mm": [d, h, w],
                "shape": [D, H, W], "splits": {"train": [ids], "val": [...], "test": [...]}}
<id>.npz       volume   int16 [D, H, W], Hounsfield units, axes superior -> inferior,
                        anterior -> posterior, right -> left
               findings uint8 [K, R], 1 where label k was found in region r
               regions  uint8 [R, D, H, W], organ masks
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hirescam_jax.data.regions import to_feature_grid
from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

FORMAT = 1


class Folder:
    """One split of a prepared folder, a random-access source for Grain.

    Raises:
        UserError: no such folder or split, a damaged or newer `dataset.json`.
    """

    def __init__(self, path: str | Path, split: str, grid: tuple[int, int, int]):
        self.path = Path(path)
        self.grid = grid
        header = self._header()
        self.labels = tuple(header["labels"])
        self.regions = tuple(header["regions"])
        self.shape = tuple(header["shape"])
        self.spacing_mm = tuple(header["spacing_mm"])
        if not header["splits"].get(split):
            raise UserError(f"{self.path / 'dataset.json'}: split '{split}' is missing or empty")
        self.ids = header["splits"][split]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """volume int16 [D, H, W], findings uint8 [K, R], regions uint8 [R, d, h, w], index."""
        path = self.path / f"{self.ids[index]}.npz"
        shapes = {
            "volume": self.shape,
            "findings": (len(self.labels), len(self.regions)),
            "regions": (len(self.regions), *self.shape),
        }
        arrays = {}
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                for name, shape in shapes.items():
                    arrays[name] = file[name]
                    if arrays[name].shape != shape:
                        raise UserError(
                            f"{path}: {name} has shape {arrays[name].shape}, not {shape}"
                        )
        except FileNotFoundError as error:
            raise UserError(f"{path}: listed in dataset.json but missing") from error
        except KeyError as error:
            raise UserError(f"{path}: no array {error}") from error
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: not a readable .npz ({error})") from error
        return {
            "volume": arrays["volume"].astype(np.int16, copy=False),
            "findings": arrays["findings"].astype(np.uint8, copy=False),
            "regions": to_feature_grid(arrays["regions"], self.grid),
            "index": np.int32(index),
        }

    def _header(self) -> dict[str, Any]:
        path = self.path / "dataset.json"
        try:
            header = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{path}: missing, so this is no prepared folder") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from error
        if not isinstance(header, dict):
            raise UserError(f"{path}: holds no JSON object")
        if header.get("format") != FORMAT:
            raise UserError(f"{path}: format {header.get('format')}, this version reads {FORMAT}")
        missing = {"labels", "regions", "shape", "spacing_mm", "splits"} - set(header)
        if missing:
            raise UserError(f"{path}: no field {sorted(missing)[0]}")
        return header


def write_folder(
    path: Path,
    *,
    labels: Sequence[str],
    regions: Sequence[str],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    splits: dict[str, Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]]],
) -> None:
    """Writes a prepared folder; `splits` gives (id, volume, findings, regions) of each volume.

    The header comes last, so an interrupted folder never reads as whole.

    Raises:
        UserError: the folder exists.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{path}: exists; choose another folder or remove it") from error
    ids: dict[str, list[str]] = {}
    for split, items in splits.items():
        ids[split] = []
        for name, volume, findings, masks in items:
            np.savez_compressed(
                path / f"{name}.npz",
                volume=volume,
                findings=findings.astype(np.uint8),
                regions=masks.astype(np.uint8),
            )
            ids[split].append(name)
    header = {
        "format": FORMAT,
        "labels": list(labels),
        "regions": list(regions),
        "shape": [int(n) for n in shape],
        "spacing_mm": [float(s) for s in spacing_mm],
        "splits": ids,
    }
    with atomic_file(path / "dataset.json") as temporary:
        temporary.write_text(json.dumps(header, indent=2))
