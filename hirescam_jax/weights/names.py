"""What the tensors of our networks are called in PyTorch, and the order of their axes there.

The names are torchvision's for ResNet, VGG, DenseNet and MobileNetV2, and for AxialNet, BodyConv,
CTNet and 3DConv those of the authors' code (github rachellea/hirescam, explainable-ct-ai and
ct-net-models). A ResNet with the small stem, which torchvision has not, is named as if its max-pool
were there.

Convolutions are [out, in, *kernel] in PyTorch and [*kernel, in, out] here, linear layers are
transposed, and one behind convolutions takes [C, d, h, w] flattened there and [d, h, w, C] here.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from hirescam_jax.models import (
    VGG,
    AxialNet,
    BodyConv,
    Conv3DNet,
    CTNet,
    DenseNet,
    MobileNetV2,
    ResNetClassifier,
)

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
IMAGE_NETWORKS = VGG | ResNetClassifier | DenseNet | MobileNetV2


class Slot(NamedTuple):
    """Where a tensor of PyTorch belongs.

    path: in the variables; shape: there.
    grid: of the features that a fully connected layer takes flattened, [*grid, C].
    as_conv: the authors write that layer as a convolution as large as the grid.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    as_conv: bool = False

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Ours -> PyTorch's order of axes."""
        if self.path[-1] != "kernel":
            return array
        if self.grid is not None:
            array = array.reshape(*self.grid, -1, array.shape[-1])
        array = np.moveaxis(array, (-1, -2), (0, 1))
        if self.grid is not None and not self.as_conv:
            array = array.reshape(array.shape[0], -1)
        return array

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """PyTorch's -> our order of axes."""
        if self.path[-1] != "kernel":
            return array
        if self.grid is not None:
            array = array.reshape(array.shape[0], -1, *self.grid)
        return np.moveaxis(array, (0, 1), (-1, -2)).reshape(self.shape)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.to_torch(np.broadcast_to(np.float32(0), self.shape)).shape


def slots_of(model: Any, shape: tuple[int, ...]) -> dict[str, Slot]:
    """The tensors of a model in PyTorch, by name.

    Raises:
        ValueError: no `shape` (D, H, W), or (H, W) for images, that the model can take.
        TypeError: no network of `hirescam_jax.models`.
    """
    layer_name(model, ("fc",))  # TypeError for any other object
    variables, positions = _shapes(model, shape)
    name, grid = _flat_layer(model, positions)
    slots = {}
    leaves: Any = flatten_dict(variables)
    for path, leaf in leaves.items():
        slot = Slot(path, leaf.shape)
        if path[1:] == (name, "kernel"):
            slot = Slot(path, leaf.shape, grid, isinstance(model, AxialNet))
        slots[tensor_name(layer_name(model, path[1:-1]), path[-1])] = slot
    return dict(sorted(slots.items(), key=lambda item: _in_order(item[0])))


def _shapes(model: Any, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """The shapes of a model's variables, and the grid of its features."""
    images, kind = isinstance(model, IMAGE_NETWORKS), type(model).__name__
    axes = ("H", "W") if images else ("D", "H", "W")
    if len(shape) != len(axes) or min(shape) < 1:
        raise ValueError(f"{kind}: shape must be ({', '.join(axes)}), got {shape}")
    example = jax.ShapeDtypeStruct((1, *shape, 3) if images else (1, *shape), jnp.float32)

    def features_of(model: Any, example: Any) -> Any:
        features = model.features(example)
        model.head(features)
        return features

    init = partial(model.init_with_output, method=features_of)
    try:
        features, variables = jax.eval_shape(init, jax.random.key(0), example)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, ZeroDivisionError):
            reason = "its layers leave no cell of it"
        raise ValueError(f"{kind} does not fit shape {shape}: {reason}") from error
    grid = features.shape[1:-1]
    if min(grid) < 1:
        raise ValueError(f"{kind} does not fit shape {shape}: its features have the grid {grid}")
    return variables, grid


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names as PyTorch does: by numbers, weights before biases."""
    *layer, leaf = name.split(".")
    numbered = [(int(part), "") if part.isdecimal() else (-1, part) for part in layer]
    return [*numbered, (list(LEAVES.values()).index(leaf), leaf)]


def _flat_layer(model: Any, grid: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The fully connected layer that takes features with their positions, and those positions;
    ("", ()) where there is none. grid: of the features."""
    if isinstance(model, AxialNet):
        return "fc", grid if model.pool == "dense" else grid[1:]
    if isinstance(model, VGG) and model.classifier == "mlp":
        return "hiddens_0" if model.hidden else "fc", (7, 7)
    if isinstance(model, BodyConv | CTNet | Conv3DNet):
        return "hiddens_0" if model.hidden else "fc", grid
    return ("fc", grid) if model.classifier == "flatten" else ("", ())


def tensor_name(layer: str, leaf: str) -> str:
    return f"{layer}.{LEAVES[leaf]}"


def current_name(name: str) -> str:
    """torchvision's name of today for one of its files from before 2018, in which DenseNet's
    norm1, conv1, norm2 and conv2 are called norm.1, ... (as torchvision renames them too)."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


# A tensor that tells whose weights they are; the first that is there.
SIGNS = (
    ("layer1.0.conv1.weight", "torchvision's ResNet"),
    ("features.denseblock1.denselayer1.conv1.weight", "torchvision's DenseNet"),
    ("features.1.conv.0.0.weight", "torchvision's MobileNetV2"),
    ("conv2d.0.weight", "AxialNet"),
    ("reducingconvs.10.weight", "3DConv"),
    ("reducingconvs.0.weight", "BodyConv or CTNet"),
    ("classifier.6.weight", "torchvision's VGG"),
)


def owner_of(names: Iterable[str]) -> str:
    """The architecture that has tensors of these names; empty where none is known to have."""
    found = set(names)
    return next((owner for sign, owner in SIGNS if sign in found), "")


def layer_name(model: Any, path: tuple[str, ...]) -> str:
    """The name in PyTorch of the layer at `path` of a model's variables."""
    first = path[0]
    kind, _, number = first.rpartition("_")
    index = int(number) if number.isdecimal() else 0
    match model:
        case AxialNet() | BodyConv() | CTNet() | Conv3DNet() if first == "resnet":
            return f"features.{resnet_layer(path[1:], in_sequence=True)}"
        case AxialNet():
            return {"convs": f"conv2d.{2 * index}"}.get(kind, first)
        case BodyConv() | CTNet() | Conv3DNet():
            before = len(model.widths) if kind == "narrows" else 0
            if kind in ("convs", "narrows"):
                return f"reducingconvs.{2 * (before + index)}"
            return f"classifier.{3 * (index if kind == 'hiddens' else len(model.hidden))}"
        case ResNetClassifier():
            return resnet_layer(path[1:]) if first == "resnet" else first
        case VGG():
            if kind == "convs":
                ends = np.cumsum([len(group) for group in model.widths])
                return f"features.{2 * index + int((ends <= index).sum())}"
            if model.classifier != "mlp":
                return "classifier"
            return f"classifier.{3 * (index if kind == 'hiddens' else len(model.hidden))}"
        case DenseNet():
            return "classifier" if first == "fc" else f"features.{path[1].replace('_', '.')}"
        case MobileNetV2():
            return (
                "classifier.1" if first == "fc" else f"features.{_mobilenet_layer(model, path[1])}"
            )
    raise TypeError(f"{type(model).__name__} is no network of hirescam_jax.models")


def resnet_layer(path: tuple[str, ...], in_sequence: bool = False) -> str:
    """A layer of our ResNet in torchvision's, or in the sequence of its children (0 conv1, 1 bn1,
    2 ReLU, 3 max-pool, 4 layer1, ...) that the authors keep."""
    first, *rest = path
    if not rest:
        return {"conv1": "0", "bn1": "1"}[first] if in_sequence else first
    stage, block = first.removeprefix("layer").split("_")
    outer = str(int(stage) + 3) if in_sequence else f"layer{stage}"
    inner = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
    return f"{outer}.{block}.{inner.get(rest[0], rest[0])}"


def _mobilenet_layer(model: MobileNetV2, name: str) -> str:
    """A layer of our MobileNetV2 within torchvision's `features`."""
    block, *_, part, kind = name.split("_") if "block" in name else ("", *name.split("_"))
    norm = int(kind == "bn")
    if not block:
        last = 1 + sum(stage[2] for stage in model.stages)
        return f"{0 if part == 'stem' else last}.{norm}"
    number = int(block.removeprefix("block"))
    expansions = [stage[0] for stage in model.stages for _ in range(stage[2])]
    first = int(expansions[number - 1] > 1)  # of depthwise and project
    places = {"expand": f"0.{norm}", "depthwise": f"{first}.{norm}", "project": first + 1 + norm}
    return f"{number}.conv.{places[part]}"
