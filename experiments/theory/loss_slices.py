"""E13: the loss surface of a network of ReLU units has no smooth maxima.

Slices of the squared error of a two-layer network: through the first layer, through the second, and through one
direction of each. Grid points that are above all their neighbours by more than rounding would be maxima; the slice
through the second layer is convex; every diagonal block of the Hessian is positive semi-definite, which those of tanh
units need not be.

Source: Botev 2020, 3.4.2, figure 3.1; Botev et al. 2017, appendix E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports import plots, private_rng
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "maxima", "run"]


@dataclass
class Config(Repeated):
    """Settings of E13.

    Args:
        points: of the grid along each axis.
        limit: of the coordinates.
        count: examples.
        inputs, hidden, outputs: widths.
    """

    points: int = 51
    limit: float = 4.0
    count: int = 40
    inputs: int = 4
    hidden: int = 6
    outputs: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require("points", self.points, self.points >= 5, "at least 5")
        for name in ("limit", "count", "inputs", "hidden", "outputs"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")


STATEMENTS = (
    Statement("no strict maxima inside the slices through the first layer", "maxima, W1", 0, 0),
    Statement("nor through the second layer", "maxima, W2", 0, 0),
    Statement("nor through both", "maxima, W1 and W2", 0, 0),
    Statement("the slice through the second layer is convex (smallest second difference)", "curvature, W2", -1e-9),
    Statement("the slice through both is not (smallest second difference)", "curvature, W1 and W2", most=-1e-9),
    Statement("all diagonal blocks of every example's Hessian are positive semi-definite (smallest eigenvalue)",
              "smallest, ReLU", -1e-9),
    Statement("which tanh units do not promise (smallest eigenvalue)", "smallest, tanh", most=-1e-9),
)  # fmt: skip


def maxima(surface: Tensor) -> int:
    """Grid points inside ``surface (A, B)`` that lie above all eight neighbours by more than rounding."""
    middle = surface[1:-1, 1:-1]
    rows, columns = surface.shape
    others = [surface[i : rows - 2 + i, j : columns - 2 + j] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return int((middle > torch.stack(others).amax(0) + 1e-9 * surface.abs().max()).sum())


def _smallest_difference(surface: Tensor) -> float:
    """Smallest second difference along rows, columns and both diagonals, relative to the range of the surface."""
    skew = [surface[2:, 2:] - 2 * surface[1:-1, 1:-1] + surface[:-2, :-2],
            surface[2:, :-2] - 2 * surface[1:-1, 1:-1] + surface[:-2, 2:]]  # fmt: skip
    straight = [surface.diff(n=2, dim=0), surface.diff(n=2, dim=1)]
    return min(float(part.min()) for part in [*skew, *straight]) / float(surface.max() - surface.min())


def run(config: Config) -> Report:
    """Three slices, the Hessian's blocks, and pictures of the first seed."""
    surfaces: dict[str, Tensor] = {}
    axis = torch.linspace(-config.limit, config.limit, config.points, dtype=torch.float64)

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        x = torch.randn(config.count, config.inputs, generator=rng, dtype=torch.float64)
        y = torch.randn(config.count, config.outputs, generator=rng, dtype=torch.float64)
        found: dict[str, float] = {}
        for unit in (nn.ReLU, nn.Tanh):
            with private_rng(seed):
                model = nn.Sequential(
                    nn.Linear(config.inputs, config.hidden, bias=False), unit(),
                    nn.Linear(config.hidden, config.outputs, bias=False),
                ).double()  # fmt: skip
            blocks = lk.diagnostics.blocks(model, "gaussian", (x, y))
            found[f"smallest, {'ReLU' if unit is nn.ReLU else 'tanh'}"] = min(
                float(blocks[name].smallest) for name in ("0", "2")
            )
            if unit is nn.ReLU:
                network, layers = model, [module for module in model if isinstance(module, nn.Linear)]
        first, size = layers[0].weight.numel(), sum(p.numel() for p in network.parameters())
        for name, (one, two) in {
            "W1": (slice(0, first), slice(0, first)), "W2": (slice(first, size), slice(first, size)),
            "W1 and W2": (slice(0, first), slice(first, size)),
        }.items():  # fmt: skip
            u, v = torch.zeros(2, size, dtype=torch.float64)
            u[one] = torch.randn(u[one].shape, generator=rng, dtype=torch.float64)
            v[two] = torch.randn(v[two].shape, generator=rng, dtype=torch.float64)
            moved = [layers[0].weight.detach().clone(), layers[1].weight.detach().clone()]
            with torch.no_grad():  # the moved layers start at 0: W = x U + y V
                for layer, part in ((layers[0], "W1"), (layers[1], "W2")):
                    layer.weight.mul_(0.0 if part in name else 1.0)
            surface = lk.diagnostics.loss_surface(network, "gaussian", (x, y), u, v, axis, axis)
            with torch.no_grad():
                layers[0].weight.copy_(moved[0])
                layers[1].weight.copy_(moved[1])
            surfaces.setdefault(name, surface)
            found[f"maxima, {name}"] = maxima(surface)
            found[f"curvature, {name}"] = _smallest_difference(surface)
        return found

    def pictures() -> Sequence[Picture]:
        figure, axes = plots.panels(1, 3, width=3.6, height=3.4)
        for panel, (name, surface) in zip(axes, surfaces.items(), strict=True):
            panel.contour(axis.numpy(), axis.numpy(), surface.log().T.numpy(), 25, linewidths=0.7)
            panel.set(title=name, xlabel="x", ylabel="y")
        return [Picture("slices", figure, f"Log of the loss on the three slices, seed {config.seed}.")]

    return judged(
        "E13: loss surface of a ReLU network",
        f"{config.inputs}-{config.hidden}-{config.outputs} ReLU units, squared error, {config.count} random examples, "
        f"grids of {config.points} by {config.points}.",
        config,
        measure,
        STATEMENTS,
        size="Of our own size: the papers show a picture of one network.",
        pictures=pictures,
    )
