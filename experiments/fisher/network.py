"""The network of E7 to E9, and the Fisher matrices of its middle layers (Martens 2016, figure 6.1).

256-20-20-20-20-20-10 tanh units on MNIST, scaled down to 16 by 16, trained by a few iterations of K-FAC on all
images at once. The Fisher of the middle four layers, 1680 by 1680, is exact: the expectation over labels is the
softmax's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.statements import Repeated
from laplace_kf.diagnostics import Structure
from laplace_kf.operators import DAMPINGS
from laplace_kf.optim import sparse_init_
from laplace_kf.optim.inverse import damped_block

__all__ = ["SIDE", "Damped", "Setup", "Trained", "damped", "digits", "parts", "train"]

SIDE = 16
PUBLISHED = {"training error": 0.05, "training error, 22 iterations": 0.0, "total error": 2894.4, "bound": 4134.6}
"""Of the network of figure 6.1."""


@dataclass
class Setup(Repeated):
    """Settings that E7, E8 and E9 share.

    Args:
        images: training images, the first ones; all of them are one minibatch.
        error: the Fisher is looked at once the error on the training images is this low; published: 5 %.
        most: iterations of K-FAC at most until then; published: 7.
        width: of the hidden layers.
        l2: weight decay of K-FAC.
        fisher_images: images over which the Fisher is taken, the first ones.
    """

    images: int = 10_000
    error: float = 0.05
    most: int = 60
    width: int = 20
    l2: float = 1e-5
    fisher_images: int = 2_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require("images", self.images, 1 <= self.images <= 60_000, "from 1 to 60000")
        require("fisher_images", self.fisher_images, 1 <= self.fisher_images <= self.images, "from 1 to images")
        for name in ("most", "width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("error", self.error, 0 < self.error < 1, "between 0 and 1")
        require("l2", self.l2, self.l2 >= 0, "at least 0")


def digits(count: int) -> tuple[Tensor, Tensor]:
    """The first MNIST training images, ``(N, 256)`` float64 in [0, 1], and labels."""
    x, y = data.images("mnist", "train")
    small = nn.functional.interpolate(
        x[:count, None].double() if x.dim() == 3 else x[:count].double(), size=SIDE, mode="area"
    )
    return small.flatten(1), y[:count]


@dataclass
class Trained:
    """A network after the iterations: its error on the training images, the loss before each, γ of the last step."""

    model: nn.Sequential
    images: tuple[Tensor, Tensor]
    error: float
    losses: list[float]
    gamma: float
    middle: list[str] = field(default_factory=list)


def train(config: Setup, seed: int) -> Trained:
    """The network, sparsely initialised, after iterations of K-FAC on all images until the error is low enough."""
    widths = [SIDE**2, *[config.width] * 5, 10]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out).double(), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    rng = training.generator(seed)
    sparse_init_(model, generator=rng)
    x, y = digits(config.images)
    optimizer = lk.optim.kfac(model, "categorical", l2=config.l2, search_start=True, generator=rng)
    losses: list[float] = []
    wrong = 1.0
    while len(losses) < config.most and wrong > config.error:
        losses.append(float(optimizer.step(x, y)))
        wrong = float((training.outputs(model, x).argmax(-1) != y).double().mean())
    middle = [f"{2 * layer}.{kind}" for layer in range(1, 5) for kind in ("weight", "bias")]
    gamma = (float(optimizer.diagnostics["zeta"]) + config.l2) ** 0.5
    return Trained(model, (x[: config.fisher_images], y[: config.fisher_images]), wrong, losses, gamma, middle)


def parts(structure: Structure, matrix: Tensor) -> list[list[Tensor]]:
    """The blocks of a matrix, by layers."""
    sizes = list(structure.sizes.values())
    return [list(row.split(sizes, 1)) for row in matrix.split(sizes)]


@dataclass(frozen=True)
class Damped:
    """``F̃`` with factored Tikhonov damping in its diagonal blocks, its two approximations, and the three inverses."""

    whole: Tensor
    diagonal: Tensor
    tridiagonal: Tensor
    inverse: Tensor
    diagonal_inverse: Tensor
    tridiagonal_inverse: Tensor


def damped(found: Trained, structure: Structure) -> Damped:
    """All six, from the factors of the middle layers with the γ of the last step.

    The block-tridiagonal inverse is written out as in Martens 2016, 6.4.3: ``Ξᵀ Λ Ξ`` with
    ``Ψ_i = F̃_(i,i+1) F̃_(i+1,i+1)⁻¹`` and ``Σ_i = F̃_(i,i) − Ψ_i F̃_(i+1,i+1) Ψ_iᵀ``.
    """
    statistics = lk.curvature.estimate(found.model, "categorical", batched(found.images), "kron", "exact", found.middle)
    like = structure.kronecker
    blocks = [damped_block(block, like.new_tensor(found.gamma**2), DAMPINGS["balanced"]).dense().to(like)  # type: ignore[arg-type]
              for _, block in statistics.mean().entries]  # fmt: skip
    cells = parts(structure, structure.kronecker.clone())
    count = len(blocks)
    for i, block in enumerate(blocks):
        cells[i][i] = block
    whole = torch.cat([torch.cat(row, 1) for row in cells])
    diagonal = torch.block_diag(*blocks)
    eyes = [torch.eye(len(block), dtype=like.dtype) for block in blocks]
    psi = [torch.linalg.solve(blocks[i + 1], cells[i][i + 1].T).T for i in range(count - 1)]
    sigma = [blocks[i] - psi[i] @ blocks[i + 1] @ psi[i].T for i in range(count - 1)] + [blocks[-1]]
    rows = [
        [eyes[i] if i == j else -psi[i] if j == i + 1 else torch.zeros_like(cells[i][j]) for j in range(count)]
        for i in range(count)
    ]
    xi = torch.cat([torch.cat(row, 1) for row in rows])
    inner = torch.block_diag(*[torch.linalg.inv(one) for one in sigma])
    tridiagonal_inverse = xi.T @ inner @ xi
    return Damped(
        whole, diagonal, torch.linalg.inv(tridiagonal_inverse), torch.linalg.inv(whole), torch.linalg.inv(diagonal),
        tridiagonal_inverse,
    )  # fmt: skip


def batched(images: tuple[Tensor, Tensor], size: int = 1000) -> list[tuple[Tensor, Tensor]]:
    """Minibatches of images ``(N, 256)`` and labels, which bound the memory of curvature passes."""
    return list(zip(images[0].split(size), images[1].split(size), strict=True))
