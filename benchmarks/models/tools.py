"""Networks as training tools wrap them, and heads of other distributions."""

from __future__ import annotations

from collections.abc import Callable

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

    def fisher(z: Tensor, n: int) -> Tensor:  # of the log rate
        return torch.eye(1, dtype=z.dtype)

    return Problem(_mlp(1).eval(), batch, likelihood, curvature=fisher)


def _normal_head() -> Problem:
    def fisher(z: Tensor, n: int) -> Tensor:  # of the mean and the log of the standard deviation
        return torch.diag(torch.stack([(-2 * z[1]).exp(), torch.full_like(z[1], 2.0)]))

    likelihood = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Normal(z[..., 0], z[..., 1].exp()))
    return Problem(_mlp(2).eval(), (torch.randn(6, 4), torch.randn(6)), likelihood, curvature=fisher)


def _from_loss(outputs: int, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Problem:
    """A head whose loss has an indefinite Hessian: without its negative eigenvalues."""

    def clipped(z: Tensor, n: int) -> Tensor:
        at = y[n : n + 1].to(z.dtype)
        hessian = torch.autograd.functional.hessian(lambda v: loss(v[None], at)[0], z)
        assert isinstance(hessian, Tensor)
        values, vectors = torch.linalg.eigh(hessian)
        return (vectors * values.clamp_min(0)) @ vectors.T

    likelihood = lk.likelihoods.FromLoss(loss, curvature="clip")
    return Problem(_mlp(outputs).eval(), (torch.randn(6, 4), y), likelihood, curvature=clipped)


def _censored() -> Problem:
    def loss(z: Tensor, y: Tensor) -> Tensor:  # log scale and log shape; a time and whether the event was seen
        power = (y[:, 0].log() - z[:, 0]) * z[:, 1].exp()
        return power.exp() - y[:, 1] * (power + z[:, 1])

    return _from_loss(2, loss, torch.stack([torch.rand(6) + 0.1, (torch.arange(6) % 2).float()], 1))


def _mixture() -> Problem:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        weights, means, scales = z.unflatten(-1, (3, 2)).unbind(-2)
        normal = torch.distributions.Normal(means, scales.exp())
        return -(weights.log_softmax(-1) + normal.log_prob(y)).logsumexp(-1)

    return _from_loss(6, loss, torch.randn(6, 1))


_HEAD = "`FromDistribution(fn)` as the likelihood"
_LOSS = "`FromLoss(loss)` as the likelihood"
ROWS = [
    Row("lightning", "LightningModule", _lightning),
    Row("skorch", "NeuralNetClassifier", _skorch, "`net.module_`"),
    Row("gpytorch", "deep-kernel features", _features),
    Row("torch", "survival times, exponential", _survival, _HEAD),
    Row("torch", "survival times, censored, Weibull", _censored, _LOSS),
    Row("torch", "mean and scale head", _normal_head, _HEAD),
    Row("torch", "mixture density head", _mixture, _LOSS),
]
