"""Plain float64 second-order steps from dense matrices; nothing of the package is imported.

Follows methods 6 literally: dense exact Gauss-Newton matrix, dense inverse of the damped Kronecker blocks, closed-form
step along one or two directions, Levenberg–Marquardt and greedy rules.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests import oracles
from tests.oracles import Block, Nll

Factors = Callable[[nn.Module, Tensor, Tensor], list[Block]]


def put(model: nn.Module, theta: Tensor) -> nn.Module:
    """A copy of the model with flat weights."""
    model, start = copy.deepcopy(model), 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(theta[start : start + p.numel()].view(p.shape))
            start += p.numel()
    return model


def mean_nll(model: nn.Module, x: Tensor, y: Tensor, nll: Nll) -> float:
    return -oracles.log_likelihood(model, x, y, nll) / len(y)


@torch.enable_grad()
def gradient(model: nn.Module, x: Tensor, y: Tensor, nll: Nll) -> Tensor:
    """Gradient of the mean of −log p, flat."""
    total = sum(nll(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(y))) / len(y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(model.parameters()))])


def damped_block(block: Block, k: float, damping: str) -> Tensor:
    """A block plus damping, dense, in its own order."""
    if block.values is not None:
        return torch.diag(block.values + k)
    a, g = block.A, block.G
    if damping == "exact":
        return torch.kron(g, a) + k * torch.eye(len(a) * len(g), dtype=a.dtype)
    omega = oracles.balance(block) if damping == "balanced" else 1.0
    root = math.sqrt(k)
    return torch.kron(
        g + root / omega * torch.eye(len(g), dtype=g.dtype), a + omega * root * torch.eye(len(a), dtype=a.dtype)
    )


def mix(old: list[Block] | None, new: list[Block], weight: float) -> list[Block]:
    """``weight · old + (1 − weight) · new``, factor by factor."""
    if old is None or weight == 0:
        return new
    pairs = zip(old, new, strict=True)
    return [
        Block(n.names, n.index, weight * o.A + (1 - weight) * n.A, weight * o.G + (1 - weight) * n.G) for o, n in pairs
    ]


@dataclass
class Reference:
    """The optimiser, one dense step at a time."""

    model: nn.Module
    nll: Nll
    factors: Factors
    tau: float
    zeta: float
    l2: float = 0.0
    damping: str = "balanced"
    momentum: bool = False
    ema: float = 0.0
    refresh: int = 1
    factors_every: int = 1
    tau_every: int = 5
    tau_factor: float = 0.95**5
    low: float = 0.75
    high: float = 0.75
    zeta_every: int = 20
    zeta_factor: float = 0.95**20
    gamma: bool = False
    step_number: int = 0
    measured: int = 0
    previous: Tensor | None = None
    kept: list[Block] | None = None
    inverse: Tensor | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    exact: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None  # of the model, x, y; default: computed anew

    def step(self, x: Tensor, y: Tensor) -> float:
        self.step_number += 1
        k = self.step_number
        theta = oracles.flat_parameters(self.model)
        loss = mean_nll(self.model, x, y, self.nll) + self.l2 / 2 * float(theta @ theta)
        g = gradient(self.model, x, y, self.nll) + self.l2 * theta
        exact = oracles.dense_ggn(self.model, x, y, self.nll) if self.exact is None else self.exact(self.model, x, y)
        eye = torch.eye(len(theta), dtype=theta.dtype)
        curved = exact + (self.tau + self.l2) * eye
        if k <= 3 or k % self.factors_every == 0:
            self.measured += 1
            self.kept = mix(self.kept, self.factors(self.model, x, y), min(1 - 1 / self.measured, self.ema))
        values = [self.zeta]
        if k % self.zeta_every == 0:
            f = self.zeta_factor
            if self.gamma:  # γ itself moves by the root
                values += [
                    (math.sqrt(self.zeta + self.l2) * r) ** 2 - self.l2 for r in (math.sqrt(f), 1 / math.sqrt(f))
                ]
            else:
                values += [self.zeta * f, self.zeta / f]
        fresh = k <= 3 or k % self.refresh == 0 or len(values) > 1
        best = None
        for zeta in values:
            inverse = self.inverse
            if fresh:
                damp = zeta + self.l2
                approx = oracles.assemble(self.kept, len(theta), lambda b, k=damp: damped_block(b, k, self.damping))
                inverse = torch.linalg.inv(approx)
            direction = -inverse @ g
            if self.momentum and self.previous is not None:
                u = torch.stack([direction, self.previous])
                c = -torch.linalg.solve(u @ curved @ u.T, u @ g)
                alpha, mu, delta = float(c[0]), float(c[1]), c @ u
            else:
                alpha = float(-(g @ direction) / (direction @ curved @ direction))
                mu, delta = 0.0, alpha * direction
            change = float(g @ delta + 0.5 * delta @ curved @ delta)
            if best is None or change < best[0]:
                best = change, zeta, delta, alpha, mu, inverse
        change, self.zeta, delta, alpha, mu, self.inverse = best
        self.previous = delta
        self.model = put(self.model, theta + delta)
        rho = math.nan
        if k % self.tau_every == 0:
            moved = theta + delta
            after = mean_nll(self.model, x, y, self.nll) + self.l2 / 2 * float(moved @ moved)
            rho = (after - loss) / change
            if rho > self.high:
                self.tau *= self.tau_factor
            elif rho < self.low:
                self.tau /= self.tau_factor
        self.log.append(
            {"tau": self.tau, "zeta": self.zeta, "alpha": alpha, "mu": mu, "rho": rho, "model_decrease": -change}
        )
        return loss


def kflr(nll: Nll) -> Factors:
    return lambda model, x, y: oracles.kron_blocks(model, x, y, oracles.output_hessian(nll))


def kfra(nll: Nll) -> Factors:
    return lambda model, x, y: oracles.kfra_factors(model, x, y, oracles.output_hessian(nll))


def net(widths: Sequence[int], activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def batch(n: int, inputs: int, classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=rng)
