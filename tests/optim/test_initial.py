"""Start weights of layers whose weight is in parts, lies on the other axis, or cannot be set (methods 7.10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from tests.cases import rng


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm = nn.Parameter(torch.ones(1, 9, 40)), nn.LayerNorm((4, 10))
        self.table, self.out = nn.Embedding(5, 40), nn.Linear(40, 6)


class Conv1D(nn.Module):
    """As in transformers: ``x @ weight + bias`` with a weight ``(I, O)``."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = 6, nn.Parameter(torch.ones(40, 6)), nn.Parameter(torch.ones(6))


def test_sparse_starts_of_weights_in_parts_and_on_the_other_axis() -> None:
    for normalised in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ):
        layer = lk.optim.sparse_init_(normalised(nn.Linear(40, 200)), 15, 3.0, rng())
        weight = layer(torch.eye(40)).T.detach() if normalised is nn.utils.weight_norm else layer.weight.detach()
        weight = weight - layer.bias.detach()[:, None] if normalised is nn.utils.weight_norm else weight
        assert bool(((weight != 0).sum(1) == 15).all())
        if "spectral" not in normalised.__name__:
            assert float(weight[weight != 0].std()) == pytest.approx(3.0, rel=0.1)
    for start in (lk.optim.sparse_init_, lk.optim.glorot_init_):
        model = start(Tokens(), generator=rng())
        assert bool((model.positions == 1).all()) and bool((model.norm.weight == 1).all())
        assert not bool(model.out.bias.any())
    column = lk.optim.sparse_init_(Conv1D(), 15, generator=rng())
    assert ((column.weight != 0).sum(0) == 15).all() and not bool(column.bias.any())


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Linear(3, 3, device="meta"),
                                  lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))])  # fmt: skip
def test_starts_of_weights_that_cannot_be_set_are_refused(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = model[0].weight.clone()
    for start in (lk.optim.sparse_init_, lk.optim.glorot_init_):
        with pytest.raises(lk.errors.UnsupportedLayer, match="module '1'"):
            start(model, generator=rng())
    assert torch.equal(model[0].weight, before)
