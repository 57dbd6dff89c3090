"""Networks as training tools wrap them, and heads of other distributions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]


def _mlp(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.arange(6) % 3


def _lightning() -> Problem:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _mlp(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    return Problem(Module().eval(), _data())


def _skorch() -> Problem:
    import skorch

    x, y = _data()
    net = skorch.NeuralNetClassifier(_mlp(3), max_epochs=1, criterion=nn.CrossEntropyLoss, verbose=0, train_split=None)
    net.fit(x, y)
    module: nn.Module = net.module_
    return Problem(module.eval(), (x, y))


def _features() -> Problem:
    import gpytorch

    class Extractor(nn.Module):
        """Deep-kernel features, scaled to the grid as gpytorch's examples do, with a linear head."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = _mlp(2), nn.Linear(2, 1)
            self.scale_to_bounds = gpytorch.utils.grid.ScaleToBounds(-1.0, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.scale_to_bounds(self.features(x)))
            return out

    model = Extractor()
    model(torch.randn(50, 4))  # the bounds are running statistics
    return Problem(model.eval(), (torch.randn(6, 4), torch.randn(6, 1)), "gaussian")


def _survival() -> Problem:
    likelihood = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Exponential(z[..., 0].exp()))
    batch = (torch.randn(6, 4), torch.rand(6))

    def fisher(z: Tensor) -> Tensor:  # of the log rate
        return torch.eye(1, dtype=z.dtype)

    return Problem(_mlp(1).eval(), batch, likelihood, curvature=fisher)


def _normal_head() -> Problem:
    def fisher(z: Tensor) -> Tensor:  # of the mean and the log of the standard deviation
        return torch.diag(torch.stack([(-2 * z[1]).exp(), torch.full_like(z[1], 2.0)]))

    likelihood = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Normal(z[..., 0], z[..., 1].exp()))
    return Problem(_mlp(2).eval(), (torch.randn(6, 4), torch.randn(6)), likelihood, curvature=fisher)


_HEAD = "`FromDistribution(fn)` as the likelihood"
ROWS = [
    Row("lightning", "LightningModule", _lightning),
    Row("skorch", "NeuralNetClassifier", _skorch, "`net.module_`"),
    Row("gpytorch", "deep-kernel features", _features),
    Row("torch", "survival times, exponential", _survival, _HEAD),
    Row("torch", "mean and scale head", _normal_head, _HEAD),
]
