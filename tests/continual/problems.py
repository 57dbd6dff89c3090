"""Three small tasks for one network, the dense curvature of each by the oracles, and a count of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracles
from tests.cases import CATEGORICAL, build, labels, mlp, normal

LAM = 0.7
N = 12


def network() -> nn.Module:
    return build(lambda: mlp(3, 4, 3))


def task(k: int) -> tuple[Tensor, Tensor]:
    return (1 + k) * normal(N, 3, seed=10 * k) + k, labels(3, N, seed=10 * k)


def moved(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """What training would do to the weights."""
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter += size * normal(*parameter.shape, seed=100 * seed + k)


def dense_kron(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    size = sum(p.numel() for p in model.parameters())
    return oracles.assemble(oracles.kron_blocks(model, x, y, CATEGORICAL.curvature), size)


def dense_diag(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.diag(oracles.diag_ggn(model, x, y, CATEGORICAL.nll))


def dense_full(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return oracles.dense_ggn(model, x, y, CATEGORICAL.nll)


DENSE: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "kron": dense_kron,
    "diag": dense_diag,
    "full": dense_full,
}


class Products(TorchDispatchMode):
    """The shapes ``(rows, inner, columns)`` of all matrix products, in whatever form they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in str(func) for part in ("mm", "matmul")):
            left, right = (args[-2], args[-1]) if len(args) < 3 else args[1:3]
            self.shapes.append((*left.shape[-2:], right.shape[-1]))
        return func(*args, **(kwargs or {}))
