"""PASCAL VOC 2012 in its own layout: photos, the classes in them, and masks of the classes.

    VOC2012/JPEGImages/2007_000032.jpg
            Annotations/2007_000032.xml                 objects, with names
            SegmentationClass/2007_000032.png           0 background, 1 to 20, 255 void
            SegmentationClassAug/                       the same for more photos (Hariharan 2011)
            ImageSets/Segmentation/{train,val}.txt      names; ImageSets/Main/ for all photos

M. Everingham et al., The PASCAL Visual Object Classes Challenge: a Retrospective, IJCV 2015.
"""

import copy
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hirescam_jax.errors import UserError, nearest

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255
PADDING = (124, 116, 104)  # ImageNet's mean colour: 0 once an image is normalised
MASKS = ("SegmentationClass", "SegmentationClassAug")
VAL_SHARE = 0.25  # of the photos, where there are no ImageSets


class VOC:
    """One image set, random access: item -> image uint8 [S, S, 3], labels uint8 [20] in the order
    of `CLASSES` (0, 1, or 255 where it does not count), mask uint8 [S, S] (0 background, 1 to 20,
    255 void), and its own index.

    A photo's longer side is scaled to S; the rest of the square is padding, evenly on both sides:
    ImageNet's mean colour in the image, void in the mask.

    Labels are the objects of the photo's annotation. A class of which all objects are marked
    `difficult` is 255: neither present nor absent, as the challenge leaves such photos out of that
    class's score. A photo without annotation has the classes of its mask.

    Args:
        path: VOC2012, or the folder around it.
        image_set: "train", "val", ...: ImageSets/Segmentation/NAME.txt, or ImageSets/Main/NAME.txt
            where the former is missing; "Main/train" asks for the latter. All photos of a set of
            Segmentation have masks; in Main one without is all void. Without a folder ImageSets,
            "train" and "val" are a fixed random split of all photos that have a mask.
        size: S.
        seed: of that split.

    Raises:
        UserError: no such folder or image set; a photo or a mask that is missing. On access: a file
            that is broken, a mask of another size, a class that VOC has not.
    """

    labels = CLASSES

    def __init__(self, path: Path | str, image_set: str, size: int = 224, seed: int = 0):
        if size < 32:
            raise UserError(f"size: {size} is below 32 pixels, a network's one feature cell")
        self.path, self.size = _root(Path(path)), size
        self.masks: dict[str, Path] = {}
        for folder in reversed(MASKS):  # the official mask comes before the augmented one
            self.masks |= {file.stem: file for file in (self.path / folder).glob("*.png")}
        photos = {file.stem for file in (self.path / "JPEGImages").glob("*.jpg")}
        self.names, listed, self.source = self._names(image_set, photos, seed)
        for name in self.names:
            if name not in photos:
                raise UserError(f"{self._photo(name)}: no such file, but {listed} lists it")
            if name not in self.masks and "Main" not in self.source:
                raise UserError(
                    f"{self.path / MASKS[0] / name}.png: no such file, nor one in {MASKS[1]}, but "
                    f"{listed} lists it: add the mask, or take the name out"
                )

    def _names(
        self, image_set: str, photos: set[str], seed: int
    ) -> tuple[tuple[str, ...], Path, str]:
        """The names, the file or folder that has them, and where they come from in words."""
        sets = self.path / "ImageSets"
        if not sets.is_dir():
            names = np.array(sorted(photos & self.masks.keys()))
            if image_set not in ("train", "val"):
                raise UserError(
                    f"{sets}: missing, so that the image set must be 'train' or 'val', not "
                    f"'{image_set}'"
                )
            if len(names) < 2:
                raise UserError(f"{self.path}: fewer than 2 photos in JPEGImages have a mask")
            count = max(1, round(VAL_SHARE * len(names)))
            is_val = np.zeros(len(names), bool)
            is_val[np.random.default_rng(seed).permutation(len(names))[:count]] = True
            chosen = names[is_val == (image_set == "val")]
            return tuple(map(str, chosen)), self.path, f"random split, seed {seed}"
        files = [sets / f"{image_set}.txt"]
        if "/" not in image_set:
            files = [sets / part / f"{image_set}.txt" for part in ("Segmentation", "Main")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            known = [f.stem for f in sorted((sets / "Segmentation").glob("*.txt"))]
            known += [f"Main/{f.stem}" for f in sorted((sets / "Main").glob("*.txt"))]
            known = [name for name in known if name.split("_")[0].split("/")[-1] not in CLASSES]
            hint = nearest(image_set, known) if known else ": it has none at all"
            raise UserError(f"{sets}: no image set '{image_set}'{hint}")
        # A file of one class in Main has a second column.
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{file}: lists no photo")
        return tuple(names), file, f"ImageSets/{file.parent.name}/{file.name}"

    def without(self, names: Sequence[str]) -> int:
        """Leaves photos out; returns how many."""
        before, out = len(self.names), set(names)
        self.names = tuple(name for name in self.names if name not in out)
        return before - len(self.names)

    def split_off(self, share: float, seed: int) -> "VOC":
        """Takes a random part of the photos out, at least one; returns them as another set."""
        count = max(1, round(share * len(self.names)))
        order = np.random.default_rng(seed).permutation(len(self.names))
        chosen = {self.names[i] for i in order[:count]}
        other = copy.copy(self)
        other.names = tuple(name for name in self.names if name in chosen)
        self.without(other.names)
        return other

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        index = int(index)
        name = self.names[index]
        photo = _opened(self._photo(name)).convert("RGB")
        mask = self._mask(name, photo)
        labels = self._labels(name, mask)
        scale = self.size / max(photo.size)
        width, height = (max(1, round(n * scale)) for n in photo.size)
        shape, corner = (width, height), ((self.size - width) // 2, (self.size - height) // 2)
        image = Image.new("RGB", (self.size, self.size), PADDING)
        image.paste(photo.resize(shape, Image.Resampling.BILINEAR), corner)
        scaled = Image.new("L", (self.size, self.size), VOID)
        if mask is not None:
            scaled.paste(Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST), corner)
        return {
            "image": np.array(image),
            "labels": labels,
            "mask": np.array(scaled),
            "index": np.asarray(index),
        }

    def _photo(self, name: str) -> Path:
        return self.path / "JPEGImages" / f"{name}.jpg"

    def _mask(self, name: str, photo: Image.Image) -> np.ndarray | None:
        """uint8 [H, W] of the photo; None where there is none."""
        if name not in self.masks:
            return None
        file = self.masks[name]
        opened = _opened(file)
        if opened.mode not in ("P", "L"):
            raise UserError(
                f"{file}: mode {opened.mode}: a mask has one class number a pixel (modes P and L), "
                "not colours"
            )
        if opened.size != photo.size:
            raise UserError(
                f"{file}: {opened.size[0]} x {opened.size[1]} pixels, but its photo has "
                f"{photo.size[0]} x {photo.size[1]}: take the mask of this photo"
            )
        mask = np.array(opened)
        unknown = np.setdiff1d(mask, [*range(len(CLASSES) + 1), VOID])
        if len(unknown):
            raise UserError(
                f"{file}: class {unknown[0]}: VOC has 0 (background), 1 to {len(CLASSES)}, and "
                f"{VOID} (void)"
            )
        return mask

    def _labels(self, name: str, mask: np.ndarray | None) -> np.ndarray:
        labels = np.zeros(len(CLASSES), np.uint8)
        file = self.path / "Annotations" / f"{name}.xml"
        if file.is_file():
            for found, difficult in _objects(file).items():
                labels[CLASSES.index(found)] = VOID if difficult else 1
        elif mask is not None:
            present = np.unique(mask)
            labels[present[(present > 0) & (present != VOID)].astype(int) - 1] = 1
        else:
            raise UserError(f"{file}: no such file, and no mask either: nothing tells the classes")
        return labels


def _root(path: Path) -> Path:
    for folder in (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give VOCdevkit/VOC2012")
    raise UserError(f"{path}: has no folder JPEGImages: give VOCdevkit/VOC2012")


def _opened(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
        reason = "no image" if "cannot identify" in str(error) else str(error)
        raise UserError(f"{file}: cannot be read ({reason}): copy it anew") from error
    return image


def _objects(file: Path) -> dict[str, bool]:
    """The classes of an annotation's objects, and whether all of them are difficult."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no XML ({error}): copy it anew") from error
    found: dict[str, bool] = {}
    for number, entry in enumerate(root.findall("object"), start=1):
        name = (entry.findtext("name") or "").strip()
        if name not in CLASSES:
            hint = nearest(name, CLASSES)
            raise UserError(f"{file}: object {number}: name '{name}' is no class of VOC{hint}")
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        found[name] = found.get(name, True) and difficult
    return found
