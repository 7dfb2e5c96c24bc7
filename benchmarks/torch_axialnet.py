"""AxialNet in PyTorch, layer for layer, for comparison; needs `torch`.

Convolutions run in channels-last order, PyTorch's fastest on CPUs and GPUs alike.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from hirescam_jax.config import SGD, Config, Preprocess
from hirescam_jax.models import AxialNet


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class TorchAxialNet(nn.Module):
    """The network that `hirescam_jax.models.AxialNet` with the same fields is."""

    def __init__(self, like: AxialNet, grid: Sequence[int]):
        super().__init__()
        width = like.widths[0]
        kernel = 7 if like.stem == "imagenet" else 3
        layers: list[nn.Module] = [
            nn.Conv2d(like.channels, width, kernel, 2, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if like.stem == "imagenet":
            layers.append(nn.MaxPool2d(3, 2, 1))
        channels = width
        for stage, (count, width) in enumerate(zip(like.blocks, like.widths, strict=True)):
            for i in range(count):
                layers.append(Block(channels, width, 2 if stage > 0 and i == 0 else 1))
                channels = width
        padding = 1 if like.conv_padding == "SAME" else 0
        for width in like.conv_widths:
            layers += [nn.Conv2d(channels, width, 3, 1, padding), nn.ReLU(inplace=True)]
            channels = width
        self.channels, self.pool = like.channels, like.pool
        self.backbone = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * grid[1] * grid[2], like.num_labels)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def features(self, volume: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, S, C, h, w]."""
        batch, depth, height, width = volume.shape
        images = volume.reshape(-1, self.channels, height, width)
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.backbone(images)
        return x.reshape(batch, depth // self.channels, *x.shape[1:]).float()

    def head(self, features: Tensor) -> Tensor:
        """[B, S, C, h, w] -> logits [B, K]."""
        if self.pool == "mean":
            return self.fc(features.mean(1).flatten(1))
        return self.fc(features.flatten(2)).amax(1)

    def forward(self, volume: Tensor) -> Tensor:
        return self.head(self.features(volume))


class TorchRun:
    """The PyTorch side of a comparison: the network on its device, and what is timed of it."""

    def __init__(self, config: Config, grid: Sequence[int], on_gpu: bool):
        self.device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
        self.bfloat16 = config.model.dtype == "bfloat16"
        self.preprocess = config.preprocess
        assert isinstance(config.model, AxialNet)
        self.model = TorchAxialNet(config.model, grid).to(self.device)
        settings = config.optimizer
        if isinstance(settings, SGD):
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.model.parameters(),
                settings.learning_rate,
                settings.momentum,
                weight_decay=settings.weight_decay,
            )
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                settings.learning_rate,
                weight_decay=settings.weight_decay,
            )

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def forward(self, volume: Tensor) -> None:
        """Logits of normalised volumes, without a gradient."""
        self.model.eval()
        with torch.inference_mode(), self._precision():
            self.model(volume)
        self._wait()

    def train_step(self, batch: dict[str, Tensor]) -> None:
        """One update: augmentation, window, forward, classification loss, backward, optimiser."""
        self.model.train()
        volume = normalize(self.preprocess, flip_and_rotate(self.preprocess, batch["volume"]))
        labels = (batch["findings"] > 0).any(-1).float()
        with self._precision():
            logits = self.model(volume)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait()

    def explain_label(self, volume: Tensor, label: int) -> Tensor:
        """One label's HiResCAM as CAM libraries compute it: a forward pass, hooks, `backward()`."""
        self.model.eval()
        with self._precision():
            features = self.model.features(volume)
            features.retain_grad()
            score = self.model.head(features)[:, label].sum()
        self.model.zero_grad()
        score.backward()
        assert features.grad is not None
        cam = (features.grad * features.detach()).sum(2)
        self._wait()
        return cam

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def normalize(settings: Preprocess, volume: Tensor) -> Tensor:
    """`hirescam_jax.config.Preprocess.normalize`."""
    volume = volume.float().clamp(settings.hu_min, settings.hu_max)
    return (volume - settings.hu_min) / (settings.hu_max - settings.hu_min) - settings.mean


def flip_and_rotate(settings: Preprocess, volume: Tensor) -> Tensor:
    """The flips and rotations of `hirescam_jax.training.augment`, drawn on the host."""
    moved = []
    for one in volume:
        if torch.rand(()) < settings.flip:
            one = one.flip(int(torch.randint(3, ())))
        if torch.rand(()) < settings.rotate:
            one = one.rot90(int(torch.randint(1, 4, ())), (1, 2))
        moved.append(one)
    return torch.stack(moved)
