"""The networks that fits and steps are compared on: dense, convolutional, residual, attention; random data."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETWORKS", "Problem"]


class Problem(NamedTuple):
    """A network and its data: minibatches ``(x (N, ...), y)`` and the name of the likelihood."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    likelihood: str

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean training loss, 0-dim."""
        outputs = self.model(x)
        if self.likelihood == "categorical":
            return F.cross_entropy(outputs, y)
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, y)
        return F.mse_loss(outputs, y)

    def epoch(self) -> None:
        """Forward and backward over all minibatches, no step: the unit of cost."""
        for x, y in self.batches:
            self.model.zero_grad(set_to_none=True)
            self.loss(x, y).backward()
        self.model.zero_grad(set_to_none=True)


def _cut(model: nn.Module, x: Tensor, y: Tensor, batch: int, likelihood: str) -> Problem:
    return Problem(model, [(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)], likelihood)


def _dense(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers[:-1])


def wide() -> Problem:
    """784-1024-1024-10."""
    model = _dense([784, 1024, 1024, 10], nn.ReLU)
    return _cut(model, torch.rand(1250, 784), torch.randint(10, (1250,)), 250, "categorical")


def lenet() -> Problem:
    """Two convolutions (20 and 50 channels, 5 x 5) and two dense layers on 3 x 32 x 32."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1250, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip
    return _cut(model, torch.randn(300, 3, 32, 32), torch.randint(10, (300,)), 100, "categorical")


def tiny() -> Problem:
    """1-7-7-1 on 20 points."""
    x = 8 * torch.rand(20, 1) - 4
    return _cut(_dense([1, 7, 7, 1], nn.Tanh), x, x**3 / 20 + 0.15 * torch.randn(20, 1), 20, "gaussian")


def autoencoder() -> Problem:
    """784-1000-500-250-30 and back, 784 Bernoulli outputs."""
    model = _dense([784, 1000, 500, 250, 30, 250, 500, 1000, 784], nn.Tanh)
    return _cut(model, torch.rand(500, 784), torch.rand(500, 784).round(), 250, "bernoulli")


class _Block(nn.Module):
    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and inp == out
        beside = (nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.beside = nn.Identity() if same else nn.Sequential(*beside)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(h)) + self.beside(x))


class _Residual(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, inp = [], width
        for stage, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
            for place in range(2):
                blocks.append(_Block(inp, out, 2 if stage and not place else 1))
                inp = out
        self.blocks, self.last = nn.Sequential(*blocks), nn.Linear(inp, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.blocks(F.relu(self.norm(self.first(x)))).mean((2, 3)))
        return out


def residual() -> Problem:
    """ResNet-18 of width 32, 100 classes, in eval mode, its normalisation frozen."""
    model = _Residual(32, 100).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return _cut(model, torch.randn(64, 3, 32, 32), torch.randint(100, (64,)), 32, "categorical")


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        z = self.norm1(x)
        q, k, v = (part(z).view(n, t, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        p = (q @ k.mT / math.sqrt(d // self.heads)).softmax(-1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(n, t, d))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class _Transformer(nn.Module):
    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.first = nn.Linear(32, width)
        self.register_buffer("place", 0.02 * torch.randn(positions, width))
        self.layers, self.last = nn.Sequential(*[_Layer(width, 4) for _ in range(4)]), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layers(self.first(x) + self.place).mean(1))
        return out


def transformer() -> Problem:
    """Four layers of width 128 on 64 positions, its normalisation frozen."""
    model = _Transformer(128, 64)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    return _cut(model, torch.randn(96, 64, 32), torch.randint(10, (96,)), 32, "categorical")


NETWORKS: dict[str, Callable[[], Problem]] = {
    "wide": wide, "lenet": lenet, "tiny": tiny, "autoencoder": autoencoder, "residual": residual,
    "transformer": transformer,
}  # fmt: skip
