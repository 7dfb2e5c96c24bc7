"""MedMNIST 3D: thousands of small volumes in one .npz file."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hirescam_jax.data.readers.npz import read_npz
from hirescam_jax.data.study import ANYWHERE, SPLITS, Reject, Study
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError

MAX_BYTES = 4 * 2**30  # of one array: 64^3 voxels of the largest set are 0.5 GiB
HU_RANGE = (-1000, 800)
# To the inferior, posterior and left, as the model's axes.
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])


class MedMNIST:
    """One MedMNIST v2 3D file: {train,val,test}_images uint8 [N, D, H, W] and _labels [N, L].

    Every class is a label; a set of several labels a volume ([N, L > 1], 0 or 1) keeps them. The
    place of a finding is unknown: it is ANYWHERE. Each volume is its own patient.

    The files say nothing of space or units. The affine is 1 mm in the order of the model's axes,
    and the grey values 0 to 255 become -1000 to 800 HU linearly, the paper's window: after it
    the values are grey / 255. They are no measured Hounsfield units.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None):
        """Opens the file; the images are read later, one split at a time.

        Args:
            path: such as adrenalmnist3d.npz
            classes: names of the classes in the data set's order; class_0, class_1, ... if None.

        Raises:
            UserError: no such file, an array missing or of a wrong shape, wrong `classes`.
        """
        self.path = Path(path)
        self.regions = (ANYWHERE,)
        targets = {split: read_npz(self.path, f"{split}_labels", MAX_BYTES) for split in SPLITS}
        for split, found in targets.items():
            if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
                raise UserError(
                    f"{self.path}: '{split}_labels' is {found.dtype} {found.shape}: expected "
                    "integers [volumes, labels]"
                )
        widths = {found.shape[1] for found in targets.values()}
        if len(widths) > 1:
            raise UserError(f"{self.path}: the splits have {widths} labels: download it again")
        single = widths == {1}
        count = 1 + max(int(t.max()) for t in targets.values()) if single else widths.pop()
        self.labels = tuple(classes or (f"class_{i}" for i in range(count)))
        if len(self.labels) != count:
            raise UserError(f"{self.path}: has {count} classes, not {len(self.labels)}: name each")
        self.studies: list[Study] = []
        self.rejects: list[Reject] = []
        for split, found in targets.items():
            rows = (found == np.arange(count)) if single else found
            width = len(str(len(rows) - 1))
            for i, row in enumerate(rows):
                key = f"{split}_{i:0{width}d}"
                if (np.sum(row) != 1) if single else not np.isin(row, (0, 1)).all():
                    values = found[i].tolist()
                    reason = f"{self.path}: '{split}_labels' row {i} holds {values}: correct it"
                    self.rejects.append(Reject(key, reason))
                else:
                    findings = row.astype(np.uint8)[:, None]
                    self.studies.append(Study(key, key, split, (self.path,), findings))

    def read(self, study: Study) -> Volume:
        split, number = study.id.rsplit("_", 1)
        images = _images(self.path, split)
        if int(number) >= len(images):
            raise UserError(
                f"{self.path}: '{split}_images' has {len(images)} volumes, none for label "
                f"{number}: download it again"
            )
        grey = images[int(number)]
        if grey.min() == grey.max():
            raise UserError(f"{self.path}: '{split}_images' {number} is constant: leave it out")
        low, high = HU_RANGE
        voxels = np.rint(grey * ((high - low) / 255) + low).astype(np.int16)
        return Volume(voxels, AFFINE, self.path)


@functools.lru_cache(maxsize=1)
def _images(path: Path, split: str) -> np.ndarray:
    """The volumes of a split, kept for the next call: reading one means unpacking all."""
    images = read_npz(path, f"{split}_images", MAX_BYTES)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(
            f"{path}: '{split}_images' is {images.dtype} {images.shape}: expected uint8 "
            "[volumes, D, H, W]"
        )
    return images
