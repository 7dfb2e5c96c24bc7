"""Grad-CAM against HiResCAM on PASCAL VOC 2012, for two heads on the same features.

A MobileNetV2 learns which of the 20 classes a photo shows, once with a global-average head ("gap"),
for which the two maps are the same, and once with one fully connected layer over all positions
("flatten"), for which only HiResCAM accounts for the score. Then both maps of every class that a
validation photo shows are measured against the class's mask (void left out), and with each other.
Thresholds are chosen on photos of the training set that the heads do not see.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.result import plain
from hirescam_jax.experiments.voc.faithful import faithfulness
from hirescam_jax.experiments.voc.maps import Pairs, compare_maps, measure_baselines
from hirescam_jax.experiments.voc.page import table, write_page
from hirescam_jax.experiments.voc.photos import CLASSES, VOC, VOID
from hirescam_jax.experiments.voc.training import (
    Split,
    chunks,
    normalized,
    read_split,
    train_head,
    train_whole,
)
from hirescam_jax.explanations.verdict import head_verdict
from hirescam_jax.files import atomic_file
from hirescam_jax.metrics.intervals import draws, intervals, mean_of, resampled_ranks
from hirescam_jax.models import MobileNetV2
from hirescam_jax.progress import say
from hirescam_jax.weights.pytorch import from_torch, read_weights

RESAMPLES = 1000


def prediction_scores(
    logits: Float[np.ndarray, "N K"], labels: UInt8[np.ndarray, "N K"]
) -> dict[str, Any]:
    """Means over classes of average precision and AUROC, with 95 % bootstrap intervals over photos
    (`hirescam_jax.metrics.intervals`).

    A mean is over the classes in two photos and more (and, for AUROC, not in two), the same ones in
    all resamples. A label of 255 is left out.

    Returns:
        {"average_precision", "auroc": {"value", "low", "high", and "classes" in the mean}}.
    """
    photos = np.arange(len(labels))
    measures = resampled_ranks(
        logits, labels == 1, draws(photos, RESAMPLES, 0), photos, labels == VOID
    )
    found = {}
    for name, measure in zip(("auroc", "average_precision"), measures, strict=True):
        (interval,) = intervals(mean_of(measure, measure.in_mean))
        found[name] = {**plain(interval.within_unit()), "classes": int(measure.in_mean.sum())}
    return found


HEADS = ("gap", "flatten")
TUNE_SHARE = 0.2  # of the training photos: for the maps' thresholds, not trained on


def run_voc(
    path: Path,
    weights: Path,
    out: Path,
    *,
    size: int = 224,
    epochs: int = 20,
    finetune: bool = False,
    train_set: str = "train",
    val_set: str = "val",
    batch_size: int = 16,
    seed: int = 0,
    faithful: int = 10,
    backbone: MobileNetV2 | None = None,
) -> dict[str, Any]:
    """Trains both heads, compares their maps and writes metrics.json, voc.html and pictures.

    Without `finetune` the backbone is frozen: its features are computed once (0.25 MB a photo at
    224 pixels, kept in memory), and only the head learns. With it the whole network learns, with
    BatchNorm's statistics of each batch and with half of the photos mirrored.

    Args:
        weights: torchvision's MobileNetV2 (.pth, .safetensors), whatever its classifier.
        out: a folder that is new or empty.
        size: of the square that a photo is scaled into.
        train_set, val_set: see `VOC`. A photo that is in both is taken out of the training.
        faithful: insertion, deletion and ROAD on so many pairs that a head predicts.
        backbone: the architecture; MobileNetV2 by default.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: as `VOC`, `read_weights` and `from_torch`; `out` exists; nothing to train on, or
            nothing to measure.
    """
    if epochs < 1:
        raise UserError(f"epochs: {epochs}: at least 1 is needed")
    sources = {"train": VOC(path, train_set, size), "val": VOC(path, val_set, size)}
    left_out = sources["train"].without(sources["val"].names)
    if left_out:
        say(f"{left_out} photos of {train_set} are in {val_set} too: left out of the training")
    if not len(sources["train"]):
        raise UserError(f"{path}: all photos of {train_set} are in {val_set}: choose another set")
    if len(sources["train"]) < 2:
        raise UserError(f"{path}: {train_set} has one photo: one is needed for the thresholds too")
    sources["tune"] = sources["train"].split_off(TUNE_SHARE, seed)
    tensors = read_weights(weights)
    outputs = tensors.get("classifier.1.bias", np.zeros(1000)).shape[0]
    backbone = (backbone or MobileNetV2()).clone(num_labels=outputs, classifier="gap")
    start = from_torch(backbone, tensors, (size, size), str(weights))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)

    splits = {
        name: read_split(source, name, None if finetune else backbone, start)
        for name, source in sources.items()
    }
    pairs = {name: Pairs.of(split.labels, split.masks) for name, split in splits.items()}
    for name, found in pairs.items():
        if not len(found.photo):
            raise UserError(f"{path}: no photo of the {name} split shows a class in its mask")
    result: dict[str, Any] = {
        "data": {
            name: {
                "source": sources[name].source,
                "photos": len(sources[name]),
                "pairs": len(pairs[name].photo),
            }
            for name in sources
        },
        "settings": {
            **{"size": size, "epochs": epochs, "finetune": finetune},
            **{"batch_size": batch_size, "seed": seed, "weights": weights.name},
            "faithful": faithful,
            **{"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        },
        "heads": {},
    }
    baselines = None
    shown: dict[str, Any] = {}
    for head in HEADS:
        model = backbone.clone(num_labels=len(CLASSES), classifier=head)
        if finetune:
            variables = train_whole(
                model, start, sources["train"], epochs=epochs, batch_size=batch_size, seed=seed
            )
            seen = {
                name: read_split(source, f"{name}, {head}", model, variables)
                for name, source in sources.items()
            }
        else:
            seen = splits
            variables = train_head(
                model, seen["train"], epochs=epochs, batch_size=batch_size, seed=seed
            )
        features = seen["val"].features
        assert features is not None
        grid = features.shape[1:3]
        baselines = baselines or measure_baselines(
            grid, pairs["tune"], splits["tune"].masks, pairs["val"], splits["val"].masks
        )
        figures, maps = _examined(model, variables, seen, pairs, baselines)
        if faithful:
            whole = {**start, **variables, "params": {**start["params"], **variables["params"]}}

            def image(photo: int) -> Array:
                return normalized(jnp.asarray(sources["val"][photo]["image"])[None])

            figures["faithfulness"] = faithfulness(
                model, whole, image, maps, pairs["val"], faithful, seed
            )
        result["heads"][head], shown[head] = figures, maps
    with atomic_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(plain(result), indent=2))
    write_page(out, result, shown, pairs["val"], sources["val"])
    print(table(result))
    print(out / "voc.html")
    return result


def _examined(
    model: MobileNetV2,
    variables: Any,
    splits: dict[str, Split],
    pairs: dict[str, Pairs],
    baselines: Any,
) -> tuple[dict[str, Any], Any]:
    """All figures of a head, and its maps of the validation pairs."""
    features = splits["val"].features
    assert features is not None
    apply_head: Any = partial(model.apply, variables, method="head")
    verdict = head_verdict(apply_head, (1, *features.shape[1:]))
    logits = np.concatenate(
        [np.asarray(apply_head(jnp.asarray(part))) for part in chunks(features, 64)]
    )
    maps, figures = compare_maps(model, variables, splits, pairs, baselines)
    return {
        "verdict": dataclasses.asdict(verdict),
        "predictions": {
            **prediction_scores(logits, splits["val"].labels),
            "pairs": int((maps.logit >= 0).sum()),
        },
        **figures,
    }, maps
