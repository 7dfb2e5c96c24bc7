"""The paper's networks in PyTorch, their layers named as in the authors' code, for comparison.

Each is made like one of ours and returns its features, channels last, and its logits. For images
there are torchvision's own networks.
"""

import importlib
import importlib.util
import itertools
import math
from functools import cache

import jax
import numpy as np
import pytest
import torch
from torch import nn

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
from hirescam_jax.models.contract import feature_grid

# Compiles faster; what little is computed here hardly runs slower.
FAST = {"xla_backend_optimization_level": 0}


def import_torchvision():
    """torchvision; the test is skipped without it.

    Its networks use none of its compiled operators. Those are missing where it was built for
    another PyTorch than is here (with CUDA, say); then those that importing asks for are declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor d, Tensor s, float t) -> Tensor")
        return importlib.import_module("torchvision")


class Basic(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


def shortcut(inputs, outputs, stride):
    if inputs == outputs and stride == 1:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def resnet(like) -> nn.Sequential:
    """The children of torchvision's ResNet but for its pooling and classifier."""
    imagenet = like.stem == "imagenet"
    kernel = 7 if imagenet else 3
    layers = [
        nn.Conv2d(like.channels, like.widths[0], kernel, 2, kernel // 2, bias=False),
        nn.BatchNorm2d(like.widths[0]),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity(),
    ]
    inputs, kind = like.widths[0], Basic if like.block == "basic" else Bottleneck
    for stage, (count, width) in enumerate(zip(like.blocks, like.widths, strict=True)):
        blocks = []
        for i in range(count):
            blocks.append(kind(inputs, width, 2 if stage and i == 0 else 1))
            inputs = width if like.block == "basic" else 4 * width
        layers.append(nn.Sequential(*blocks))
    return nn.Sequential(*layers)


def resnet_width(like) -> int:
    return like.widths[-1] * (1 if like.block == "basic" else 4)


def with_relu(layers) -> nn.Sequential:
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def classifier(inputs, like) -> nn.Sequential:
    layers = []
    for width in like.hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(like.dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, like.num_labels))


def images_of(volume, channels):
    """[B, D, H, W] -> [B * S, channels, H, W]."""
    return volume.reshape(-1, channels, *volume.shape[2:])


class TorchAxialNet(nn.Module):
    def __init__(self, like: AxialNet, grid):
        super().__init__()
        self.like = like
        self.features = resnet(like)
        widths = (resnet_width(like), *like.conv_widths)
        padding = 1 if like.conv_padding == "SAME" else 0
        pairs = itertools.pairwise(widths)
        if like.conv_widths:
            self.conv2d = with_relu([nn.Conv2d(a, b, 3, padding=padding) for a, b in pairs])
        kind, kernel = (nn.Conv3d, grid) if like.pool == "dense" else (nn.Conv2d, grid[1:])
        self.fc = kind(widths[-1], like.num_labels, kernel)

    def forward(self, volume):
        x = self.features(images_of(volume, self.like.channels))
        x = self.conv2d(x) if self.like.conv_widths else x
        features = x.movedim(1, -1).unflatten(0, (len(volume), -1))  # [B, S, h, w, C]
        if self.like.pool == "dense":
            return features, self.fc(features.movedim(-1, 1)).flatten(1)
        scores = self.fc(features.movedim(-1, 2).flatten(0, 1))
        scores = scores.reshape(len(volume), -1, self.like.num_labels)
        return features, scores.mean(1) if self.like.pool == "mean" else scores.amax(1)


class TorchBodyConv(nn.Module):
    """BodyConv, and CTNet: the first two axes of what the 3D convolutions take are exchanged."""

    def __init__(self, like: BodyConv | CTNet, grid, images):
        super().__init__()
        self.like = like
        self.features = resnet(like)
        inputs = resnet_width(like) if isinstance(like, BodyConv) else images
        pairs = list(itertools.pairwise((inputs, *like.conv_widths)))
        convs = [nn.Conv3d(a, b, 3, (3, 1, 1)) for a, b in pairs[:-1]]
        self.reducingconvs = with_relu([*convs, nn.Conv3d(*pairs[-1], (3, 2, 2), (3, 2, 2))])
        self.classifier = classifier(math.prod(grid) * like.conv_widths[-1], like)

    def forward(self, volume):
        x = self.features(images_of(volume, self.like.channels))
        x = x.reshape(len(volume), -1, *x.shape[1:])  # [B, S, C, h, w]
        if isinstance(self.like, BodyConv):
            x = x.transpose(1, 2)
        features = self.reducingconvs(x).movedim(1, -1)
        return features, self.classifier(features.movedim(-1, 1).flatten(1))


class TorchConv3DNet(nn.Module):
    def __init__(self, like: Conv3DNet, grid):
        super().__init__()
        convs = [nn.Conv3d(a, b, 3, 3) for a, b in itertools.pairwise((1, *like.widths))]
        narrow = itertools.pairwise((like.widths[-1], *like.narrow))
        self.reducingconvs = with_relu([*convs, *(nn.Conv3d(a, b, 1) for a, b in narrow)])
        channels = (*like.widths, *like.narrow)[-1]
        self.classifier = classifier(math.prod(grid) * channels, like)

    def forward(self, volume):
        features = self.reducingconvs(volume[:, None]).movedim(1, -1)
        return features, self.classifier(features.movedim(-1, 1).flatten(1))


def torch_model(like, grid, shape) -> nn.Module:
    """The network for volumes of `shape` (D, H, W), whose features have `grid`."""
    if isinstance(like, AxialNet):
        return TorchAxialNet(like, grid)
    if isinstance(like, Conv3DNet):
        return TorchConv3DNet(like, grid)
    return TorchBodyConv(like, grid, shape[0] // like.channels)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draws weights of a tame size, with every bias, scale and running statistic moved."""
    rng = np.random.default_rng(seed)
    for name, tensor in net.state_dict().items():
        x = rng.normal(size=tuple(tensor.shape))
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.ndim > 1:
            x *= math.sqrt(2 / math.prod(tensor.shape[1:]))
        elif name.endswith(("running_var", "weight")):
            x = np.exp(0.2 * x)
        else:
            x *= 0.2
        tensor.copy_(torch.as_tensor(x))
    return net


# Small ones of each, with (D, H, W) of their volumes. Where a layer takes flattened features their
# axes have different lengths, so that no exchange goes unnoticed.
SMALL_RESNET = {"blocks": (1, 1), "widths": (4, 6), "stem": "small"}
PAPER = {
    "axialnet": (
        AxialNet(3, (2, 1), (4, 6), "imagenet", conv_widths=(5, 4)),
        (6, 64, 80),  # 2 x 4 x 6
    ),
    "axialnet-max": (AxialNet(3, **SMALL_RESNET, conv_widths=(5,), pool="max"), (9, 20, 24)),
    "axialnet-dense": (
        AxialNet(3, (1, 2), (2, 3), "small", (), pool="dense", block="bottleneck"),
        (6, 12, 16),  # 2 x 3 x 4
    ),
    "axialnet-bottleneck": (
        AxialNet(3, (1, 1), (4, 3), "imagenet", (5,), block="bottleneck"),
        (6, 64, 80),  # 2 x 4 x 5
    ),
    "bodyconv": (
        BodyConv(3, **SMALL_RESNET, conv_widths=(4, 3), channels=2, hidden=(8, 7), dropout=0.0),
        (36, 32, 40),  # 2 x 3 x 4
    ),
    "ctnet": (
        CTNet(3, (1, 1), (4, 18), "small", (4, 3), channels=2, hidden=(8, 7), dropout=0.0),
        (6, 32, 40),  # 2 x 3 x 4
    ),
    "conv3d": (
        Conv3DNet(3, widths=(4, 6), narrow=(5, 3), hidden=(8, 7), dropout=0.0),
        (20, 27, 36),  # 2 x 3 x 4
    ),
}


@cache
def paper_net(name):
    """(our model, its PyTorch network, shape of the volumes)."""
    model, shape = PAPER[name]
    return model, randomise(torch_model(model, feature_grid(model, shape), shape)), shape


MOBILE_STAGES = ((1, 4, 1, 1), (6, 6, 2, 2))
DENSE_CHANNELS = (6 + 2 * 4) // 2 + 3 * 4
DENSE = DenseNet(5, (2, 3), 4, 6, 2)
IMAGE_NETS = {  # with (H, W) of the images
    "resnet-basic": (ResNetClassifier(5, (1,) * 4), (64, 96)),
    "resnet-bottleneck": (ResNetClassifier(5, (1,) * 4, block="bottleneck"), (64, 96)),
    "vgg": (VGG(5, ((4,), (6, 6)), hidden=(8, 7)), (36, 44)),  # 9 x 11 features, pooled to 7 x 7
    "densenet": (DENSE, (48, 64)),
    "densenet-flatten": (DENSE.clone(classifier="flatten"), (24, 32)),  # 3 x 4
    "mobilenet": (MobileNetV2(5, MOBILE_STAGES), (32, 48)),
}


def torchvision_net(name) -> nn.Module:
    """torchvision's own network like that of `IMAGE_NETS`."""
    nets = import_torchvision().models
    if name.startswith("resnet"):
        kinds = {
            "resnet-basic": nets.resnet.BasicBlock,
            "resnet-bottleneck": nets.resnet.Bottleneck,
        }
        return nets.resnet.ResNet(kinds[name], [1, 1, 1, 1], num_classes=5)
    if name == "vgg":
        with torch.device("meta"):  # its own classifier takes half a gigabyte
            net = nets.vgg.VGG(nn.Identity(), 5, init_weights=False)
        net.features = nets.vgg.make_layers([4, "M", 6, 6, "M"])
        layers = [nn.Linear(6 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 7), nn.ReLU()]
        net.classifier = nn.Sequential(*layers, nn.Dropout(), nn.Linear(7, 5))
        return net
    if name == "mobilenet":
        stages = [list(stage) for stage in MOBILE_STAGES]
        return nets.MobileNetV2(5, inverted_residual_setting=stages, round_nearest=2)
    net = nets.DenseNet(4, (2, 3), 6, 2, num_classes=5)
    if name == "densenet-flatten":
        net.classifier = nn.Linear(DENSE_CHANNELS * 3 * 4, 5)
        net.forward = lambda x: net.classifier(net.features(x).relu().flatten(1))
    return net


def torchvision_features(name, net) -> nn.Module:
    """What comes before the pooling, [B, C, h, w]."""
    if name.startswith("resnet"):
        return nn.Sequential(*list(net.children())[:-2])
    return nn.Sequential(net.features, nn.ReLU()) if name.startswith("densenet") else net.features


def assert_same_trees(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
