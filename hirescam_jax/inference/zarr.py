"""Maps of many volumes in one Zarr v3 group, written and read through TensorStore.

zarr.json     the group; its attributes tell labels, ids, method, of which run the maps are, and
              what the method guarantees
maps          [N, L, d, h, w] float32, raw and signed, on the feature grid; a volume a chunk
logits        [N, L] float32, and residuals: |sum of the map + bias - logit|
affines       [N, 4, 4] float64, indices of [d, h, w] -> RAS millimetres of the scan
done          [N] bool, true once all else of a volume is on the disk

What is not done reads as NaN. No two volumes share a chunk, so that processes need not wait for
each other.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float

from hirescam_jax.errors import UserError
from hirescam_jax.files import atomic_file

FORMAT = "hirescam maps 1"
HEADER = "zarr.json"
ARRAYS = ("done", "maps", "logits", "residuals", "affines")  # `done` goes first when all go


class StoredArray:
    """An array on the disk: an index or a slice of it is read into NumPy. A chunk that is not what
    was written fails its checksum: ValueError."""

    def __init__(self, array: Any):
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self._array[key].read().result())


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """What `hirescam explain --store` wrote: `maps[i]` [L, d, h, w] is read when it is asked for.

    labels, ids: names of the L labels and of the N volumes.
    method, run, step: by which method, and of which weights.
    guarantee: what holds for these maps, in a few words; empty if an older version wrote them.
    spacing_mm: of the voxels of [D, H, W]; a feature cell's are in `affines`.
    maps, logits, residuals, affines, done: as in the file, see the module.
    """

    labels: tuple[str, ...]
    ids: tuple[str, ...]
    method: str
    guarantee: str
    run: str
    step: int
    spacing_mm: tuple[float, ...]
    maps: StoredArray
    logits: StoredArray
    residuals: StoredArray
    affines: StoredArray
    done: StoredArray

    def __len__(self) -> int:
        return len(self.ids)


def open_maps(path: str | Path) -> Maps:
    """Opens the maps that `hirescam explain --store` wrote, finished or not.

    Raises:
        UserError: no such maps, or damaged ones.
    """
    path = Path(path)
    attributes = read_attributes(path)
    if attributes is None:
        raise UserError(f"{path}: holds no maps of `hirescam explain --store`: check the path")
    return Maps(
        labels=tuple(attributes["labels"]),
        ids=tuple(attributes["ids"]),
        method=attributes["method"],
        guarantee=attributes.get("guarantee", ""),
        run=attributes["run"],
        step=attributes["step"],
        spacing_mm=tuple(attributes["spacing_mm"]),
        **{name: StoredArray(array) for name, array in _open(path, attributes, False).items()},
    )


def read_attributes(path: Path) -> dict[str, Any] | None:
    """Of the group at `path`; None where nothing of this program is."""
    try:
        attributes = json.loads((path / HEADER).read_text())["attributes"]
        return attributes if attributes["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class MapWriter:
    """Writes the maps of volumes into a group, from any number of processes and threads.

    Args:
        path: of the group.
        attributes: what `open_maps` reads, and whatever else is to be kept.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]):
        self.path, self.attributes = path, {"format": FORMAT, **attributes}
        self._arrays: dict[str, Any] = {}

    def saved(self) -> dict[str, Any] | None:
        """The attributes of what is at the path already; None if that is nothing of ours."""
        return read_attributes(self.path)

    def clear(self) -> None:
        """Removes an earlier call's arrays, and nothing else."""
        for name in ARRAYS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def start(self) -> list[bool]:
        """Makes what is missing; by one process, before any `write`. Returns what is done."""
        group = {"zarr_format": 3, "node_type": "group", "attributes": self.attributes}
        with atomic_file(self.path / HEADER) as temporary:
            temporary.write_text(json.dumps(group, indent=1))
        done = _open(self.path, self.attributes, True)["done"]
        with _writing(self.path):
            return np.asarray(done.read().result()).tolist()

    def write(
        self,
        place: int,
        maps: Float[np.ndarray, "L d h w"],
        logits: Float[np.ndarray, " L"],
        residuals: Float[np.ndarray, " L"],
        affine: Float[np.ndarray, "4 4"],
    ) -> None:
        """Volume `place`, which counts as done when this returns.

        Raises:
            UserError: it cannot be written; the volumes before are kept.
        """
        arrays = self._arrays = self._arrays or _open(self.path, self.attributes, False)
        values = {"maps": maps, "logits": logits, "residuals": residuals, "affines": affine}
        with _writing(self.path):
            for task in [arrays[name][place].write(value) for name, value in values.items()]:
                task.result()
            arrays["done"][place].write(True).result()


def _open(path: Path, attributes: dict[str, Any], create: bool) -> dict[str, Any]:
    volumes, labels = len(attributes["ids"]), len(attributes["labels"])
    axes = {
        "maps": (("volume", "label", "d", "h", "w"), (labels, *attributes["grid"])),
        "logits": (("volume", "label"), (labels,)),
        "residuals": (("volume", "label"), (labels,)),
        "affines": (("volume", "row", "column"), (4, 4)),
        "done": (("volume",), ()),
    }
    types = {"affines": ("float64", "NaN"), "done": ("bool", False)}
    arrays = {}
    for name, (dimensions, rest) in axes.items():
        data_type, fill = types.get(name, ("float32", "NaN"))
        codecs: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        metadata = {
            "shape": [volumes, *rest],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *rest]}},
            # One file a chunk in one folder, and not five folders a volume.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "data_type": data_type,
            "fill_value": fill,
            "codecs": [*codecs, {"name": "crc32c"}],  # maps are noise to a compressor
            "dimension_names": list(dimensions),
        }
        store = {"driver": "file", "path": f"{(path / name).absolute()}/"}
        spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata}
        with _writing(path, "cannot be " + ("made" if create else "opened")):
            arrays[name] = tensorstore.open(spec, open=True, create=create).result()
    return arrays


@contextlib.contextmanager
def _writing(path: Path, what: str = "cannot be written") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore says all with a ValueError
        line = " ".join(str(error).split()).split(" [source locations")[0]
        line = "No space left on device" if "No space left" in line else line
        raise UserError(
            f"{path}: {what} ({line[:300]}): free some space or mend it, and repeat the command, "
            "which continues"
        ) from error
