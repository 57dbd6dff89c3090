"""What tuning costs is counted for modules that return a parameter, too (learned tokens)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.posterior.work import multiply_adds


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self) -> Tensor:
        return self.weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = Token(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x * self.token().expand(len(x), -1))
        return out


def test_products_are_counted() -> None:
    model = Model()
    for graph in (True, False):
        with torch.set_grad_enabled(graph), multiply_adds() as found:
            model(torch.randn(5, 4))
        assert found == [5 * 4 * 2]


def test_a_model_with_a_learned_token_is_tuned() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    posterior = lk.LaplacePosterior(Model(), "categorical").fit(x, y)
    posterior.tune((x, y), n_data=[6], prior_precision=[1.0, 2.0, 4.0])
    assert posterior.prior_precision in (1.0, 2.0, 4.0)
