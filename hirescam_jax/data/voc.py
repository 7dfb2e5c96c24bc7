"""PASCAL VOC 2012: photos, class labels and class masks, in the layout of VOCdevkit/VOC2012.

JPEGImages/ID.jpg        photos
SegmentationClass/ID.png class masks: 0 background, 1 to 20 classes, 255 void
                         (or SegmentationClassAug, of the same ids)
Annotations/ID.xml       objects; where there are none, the classes are those of the mask
ImageSets/Segmentation/train.txt, val.txt (or ImageSets/Main): ids, one a line
"""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

from hirescam_jax.errors import UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255
MASKS = ("SegmentationClass", "SegmentationClassAug")
SETS = ("Segmentation", "Main")


class VOC:
    """One image set, a random-access source for Grain.

    Args:
        path: the folder VOC2012, or the one that holds VOCdevkit.
        image_set: "train" or "val", or another list in ImageSets. Without ImageSets a quarter of
            the images that have a mask, chosen once for all, is "val", the rest "train".
        size: edge S of the square images.

    Raises:
        UserError: a folder or list that is missing, an image without photo or mask.
    """

    labels = CLASSES

    def __init__(self, path: str | Path, image_set: str, size: int):
        root = Path(path)
        self.path = next(
            (p for p in (root / "VOCdevkit" / "VOC2012", root / "VOC2012") if p.is_dir()), root
        )
        self.image_set, self.size = image_set, size
        if size < 1:
            raise UserError(f"size must be at least 1, got {size}")
        if not (self.path / "JPEGImages").is_dir():
            raise UserError(f"{root}: no JPEGImages in it: give the folder VOCdevkit/VOC2012")
        masks = next((self.path / name for name in MASKS if (self.path / name).is_dir()), None)
        if masks is None:
            raise UserError(f"{self.path}: neither {MASKS[0]} nor {MASKS[1]} in it")
        self.masks = masks
        self.ids = self._ids()
        for one in self.ids:
            for file in (self._photo(one), self._mask(one)):
                if not file.is_file():
                    raise UserError(f"{file}: missing, but in image set '{image_set}'")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """image uint8 [S, S, 3]: the photo with its longer side scaled to S, in the middle of grey;
        mask uint8 [S, S], VOID beside the photo; labels uint8 [20]; index.

        An object that the annotators call difficult is a label like any other.

        Raises:
            UserError: files that cannot be read, a mask of another size or with unknown classes.
        """
        one = self.ids[index]
        photo, mask = _open(self._photo(one)).convert("RGB"), _open(self._mask(one))
        if mask.mode not in ("P", "L"):
            raise UserError(f"{self._mask(one)}: not a mask of class ids (mode {mask.mode})")
        if photo.size != mask.size:
            raise UserError(f"{self._mask(one)}: {mask.size} pixels, its photo has {photo.size}")
        ids = np.unique(np.asarray(mask))
        unknown = ids[(ids > len(CLASSES)) & (ids != VOID)]
        if len(unknown):
            raise UserError(f"{self._mask(one)}: unknown class id {unknown[0]}: 0 to 20, or 255")
        scale = self.size / max(photo.size)
        width, height = (max(1, round(edge * scale)) for edge in photo.size)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        place = slice(top, top + height), slice(left, left + width)
        image = np.full((self.size, self.size, 3), 124, np.uint8)
        image[place] = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
        classes = np.full((self.size, self.size), VOID, np.uint8)
        classes[place] = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
        labels = self._labels(one, ids)
        return {"image": image, "mask": classes, "labels": labels, "index": np.int32(index)}

    def _labels(self, one: str, mask_ids: np.ndarray) -> np.ndarray:
        labels = np.zeros(len(CLASSES), np.uint8)
        file = self.path / "Annotations" / f"{one}.xml"
        if not file.is_file():
            labels[mask_ids[(mask_ids > 0) & (mask_ids != VOID)] - 1] = 1
            return labels
        try:
            names = [name.text for name in ElementTree.parse(file).iterfind("object/name")]
        except (ElementTree.ParseError, OSError) as error:
            raise UserError(f"{file}: not readable as XML ({error})") from error
        for name in names:
            if name not in CLASSES:
                raise UserError(f"{file}: object/name: unknown class {name!r}")
            labels[CLASSES.index(name)] = 1
        return labels

    def _ids(self) -> list[str]:
        lists = [self.path / "ImageSets" / kind / f"{self.image_set}.txt" for kind in SETS]
        for file in lists:
            if file.is_file():
                ids = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
                if not ids:
                    raise UserError(f"{file}: names no image")
                return ids
        if (self.path / "ImageSets").is_dir():
            raise UserError(f"{lists[0]}: no such image set")
        if self.image_set not in ("train", "val"):
            raise UserError(f"{self.path}: without ImageSets there are the sets train and val only")
        ids = sorted(file.stem for file in self.masks.glob("*.png"))
        order = np.random.default_rng(0).permutation(len(ids))
        chosen = order[: len(ids) // 4] if self.image_set == "val" else order[len(ids) // 4 :]
        if not len(chosen):
            raise UserError(f"{self.masks}: too few masks (*.png) for a set '{self.image_set}'")
        return [ids[i] for i in np.sort(chosen)]

    def _photo(self, one: str) -> Path:
        return self.path / "JPEGImages" / f"{one}.jpg"

    def _mask(self, one: str) -> Path:
        return self.masks / f"{one}.png"


def class_masks(mask: np.ndarray) -> np.ndarray:
    """Class ids [..., S, S] -> bool [..., 20, S, S]."""
    return mask[..., None, :, :] == np.arange(1, len(CLASSES) + 1)[:, None, None]


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not readable as an image ({error})") from error
    return image
