"""Autoencoders small enough for exact products at every step: data, network, objective and directions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.autoencoders.curves import curves
from experiments.autoencoders.run import network
from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.statements import Repeated
from laplace_kf.operators import DAMPINGS, Matrix
from laplace_kf.optim.inverse import INVERSES
from laplace_kf.structures.base import Statistics

__all__ = [
    "LIKELIHOOD",
    "AutoencoderConfig",
    "coefficients",
    "inverse",
    "load",
    "objective",
    "slope",
    "vector",
    "weights_at",
]

LIKELIHOOD = "bernoulli"
SETS = ("mnist", "curves")


@dataclass
class AutoencoderConfig(Repeated):
    """Settings of the experiments on autoencoders.

    Args:
        images: ``mnist`` or ``curves``.
        count: training images.
        side: of the images, scaled down from 28.
        widths: of the encoder behind the image; the decoder mirrors it. Published: 1000, 500, 250, 30 (MNIST).
        l2: coefficient of the regulariser.
    """

    repeats: int = 1
    images: str = "mnist"
    count: int = 1000
    side: int = 14
    widths: list[int] = field(default_factory=lambda: [50, 25, 10])
    l2: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("images", self.images, self.images in SETS, " or ".join(SETS))
        require("count", self.count, 1 <= self.count <= 60_000, "from 1 to 60000")
        require("side", self.side, 4 <= self.side <= 28, "from 4 to 28")
        require("widths", self.widths, self.widths and min(self.widths) >= 1, "positive numbers")
        require("l2", self.l2, self.l2 >= 0, "at least 0")

    def size(self) -> str:
        """How the settings compare with the published ones."""
        if (self.images, self.count, self.side, self.widths) == ("mnist", 60_000, 28, [1000, 500, 250, 30]):
            return "The published network and images."
        shape = "-".join(str(width) for width in [self.side**2, *self.widths])
        return (
            f"Not the published size (784-1000-500-250-30 and mirrored, 60000 images): {shape} and mirrored, "
            f"{self.count} images of {self.images}."
        )


def load(config: AutoencoderConfig, seed: int) -> tuple[nn.Sequential, Tensor]:
    """The network, sparsely initialised, and images ``(N, side²)`` in [0, 1]."""
    if config.images == "curves":
        images = curves(config.count, training.generator(seed))
    else:
        images = data.images("mnist", "train")[0][: config.count].flatten(1)
    small = nn.functional.interpolate(images.reshape(-1, 1, 28, 28), size=config.side, mode="area").flatten(1)
    return network([config.side**2, *config.widths], seed), small


def vector(model: nn.Module) -> Tensor:
    """All weights, ``(P,)``."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@torch.no_grad()
def weights_at(model: nn.Module, flat: Tensor) -> None:
    """Puts ``flat (P,)`` into the model."""
    nn.utils.vector_to_parameters(flat, model.parameters())


@torch.no_grad()
def objective(model: nn.Module, images: Tensor, l2: float) -> float:
    """Cross-entropy summed over pixels, averaged over images ``(N, D)``, plus ``l2/2 ‖θ‖²``."""
    loss = nn.functional.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)
    return float(loss + l2 / 2 * vector(model).square().sum())


def slope(model: nn.Module, images: Tensor, l2: float) -> Tensor:
    """Gradient of :func:`objective`, ``(P,)``."""
    loss = nn.functional.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in found]) + l2 * vector(model)


def inverse(statistics: Statistics, k: float, damping: str, kind: str = "block_diagonal") -> Matrix:
    """The damped inverse of the factors, as the optimisers make it (methods 5)."""
    return INVERSES[kind].build(statistics, k, DAMPINGS[damping])


def coefficients(
    model: nn.Module, images: Tensor, gradient: Tensor, directions: list[Tensor], damping: float
) -> Tensor:
    """Minimum of the exact quadratic model over the span of directions, ``(K,)`` (methods 6.2)."""
    form = lk.diagnostics.quadratic_form
    rows = [
        [float(form(model, LIKELIHOOD, (images, images), u, v)) + damping * float(u @ v) for v in directions]
        for u in directions
    ]
    right = torch.tensor([-float(gradient @ u) for u in directions], dtype=torch.float64)
    return torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), right[:, None]).solution[:, 0]
