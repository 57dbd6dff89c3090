"""Checks of layer rules that are remembered: by the form of a pass, never for one that may hide something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.tape import Tracer
from tests.tape.test_known import Twice, checks  # noqa: F401

N, T, D = 4, 5, 6


class Attention(nn.Module):
    """Tokens through one attention block with normalisation, a learned token and a relative bias."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, D, **options)  # type: ignore[arg-type]
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.table = nn.Parameter(torch.randn(4, 1))
        self.register_buffer("index", torch.randint(0, 4, ((T + 1) ** 2,)))
        self.qkv, self.norm, self.head = nn.Linear(D, 3 * D), nn.LayerNorm(D), nn.Linear(D, 3)
        self.extra: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embedding(x)], 1)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        bias = self.table[self.index].view(1, T + 1, T + 1)
        h = h + ((q @ k.mT) / D**0.5 + bias).softmax(-1) @ v
        return self.head(self.extra(h)[:, 0])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 9, (N, T), generator=torch.Generator().manual_seed(seed)), torch.arange(N) % 3


def test_attention_is_checked_once_for_all_fits(checks: list[list[str]]) -> None:  # noqa: F811
    model = Attention()
    for seed in range(3):
        Tracer(model, None).observe(batch(seed))
    assert len(checks) == 1


def with_own_function(model: Attention) -> None:
    model.extra = lambda h: Twice.apply(h.reshape(-1, D), model.norm.bias).view(h.shape)


def with_gradient(model: Attention) -> None:
    model.extra = lambda h: h + torch.autograd.grad(model.norm(h).sin().sum(), h, create_graph=True)[0]


def with_dropout(model: Attention) -> None:
    model.extra = lambda h: F.dropout(h, 0.5, training=True)


def with_layer(model: Attention) -> None:
    model.norm = nn.LayerNorm(D, elementwise_affine=False)  # type: ignore[assignment]


CHANGES = [with_own_function, with_gradient, with_dropout, with_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:layer rule")
def test_a_changed_model_is_checked_again(change: Callable[[Attention], None], checks: list[list[str]]) -> None:  # noqa: F811
    model = Attention()
    Tracer(model, None).observe(batch())
    change(model)
    Tracer(model, None).observe(batch())
    assert len(checks) == 2


@pytest.mark.parametrize("change", CHANGES[:3], ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:layer rule")
def test_what_may_hide_something_is_checked_every_time(
    change: Callable[[Attention], None],
    checks: list[list[str]],  # noqa: F811
) -> None:
    model = Attention()
    change(model)
    for _ in range(2):
        Tracer(model, None).observe(batch())
    assert len(checks) == 2


def test_a_table_that_is_written_into_is_checked_every_time(checks: list[list[str]]) -> None:  # noqa: F811
    model = Attention(max_norm=1.0)
    for _ in range(2):
        Tracer(model, None).observe(batch())
    assert len(checks) == 2


def test_a_gradient_of_zero_shows_nothing_and_is_not_remembered(checks: list[list[str]]) -> None:  # noqa: F811
    model = Attention()
    nn.init.zeros_(model.head.weight)
    for _ in range(2):
        Tracer(model, None).observe(batch())
    assert len(checks) == 2
    nn.init.ones_(model.head.weight)
    for _ in range(2):
        Tracer(model, None).observe(batch())
    assert len(checks) == 3
