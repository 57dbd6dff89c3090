"""Small softmax classifiers for the tests, and their mean Gauss-Newton matrix by plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk

STRUCTURES = ("diag", "full")
DOUBLE = {"dtype": torch.float64}


def data(n: int = 6, inputs: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, inputs, generator=rng, **DOUBLE), torch.arange(n) % classes


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for k in range(len(widths) - 1):
            layers += [nn.Linear(widths[k], widths[k + 1], **DOUBLE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def seeded(module: type[nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args).double()


def dense(model: nn.Module, x: Any, names: list[str] | None = None) -> Tensor:
    """The mean Gauss-Newton matrix of a softmax classifier, one example at a time by plain autograd."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names or parameters]
    count = len(x[0]) if isinstance(x, tuple) else len(x)
    total: Any = 0
    for n in range(count):
        outputs = model(*(t[n : n + 1] for t in x)) if isinstance(x, tuple) else model(x[n : n + 1])
        rows = []
        for c in range(outputs.shape[1]):
            grads = torch.autograd.grad(outputs[0, c], weights, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in filled]))
        p = outputs[0].detach().softmax(-1)
        j = torch.stack(rows)
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return total / count


def agrees(model: nn.Module, x: Any, y: Tensor) -> None:
    truth = dense(model, x)
    for structure in STRUCTURES:
        found = lk.curvature.estimate(model, "categorical", (x, y), structure).mean()
        expected = truth if structure == "full" else torch.diag(truth.diagonal())
        torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-13)
