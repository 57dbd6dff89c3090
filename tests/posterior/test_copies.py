"""``copy.deepcopy`` of a posterior, at any time: a posterior of its own, around a model of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import laplace_kf as lk
from tests.cases import normal, rng


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_copy_predicts_the_same_and_goes_its_own_way(structure: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = normal(20, 3), torch.arange(20) % 3
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit((x, y))
    posterior.tune((x, y), generator=rng())
    posterior.ood_score(x, "leverage")
    posterior.penalty()
    twin = copy.deepcopy(posterior)
    for ask in (
        lambda p: p.predict(x, "linearized", generator=rng()).probs,
        lambda p: p.functional_covariance(x),
        lambda p: p.ood_score(x, "leverage"),
        lambda p: p.ood_score(x),
    ):
        assert torch.equal(ask(posterior), ask(twin))
    before = posterior.ood_score(x, "leverage")
    with torch.no_grad():
        for weight in twin.model.parameters():
            weight.zero_()
    twin.prior_precision = 100.0
    assert all(bool(weight.any()) for weight in model.parameters()) and posterior.prior_precision != 100.0
    assert torch.equal(posterior.ood_score(x, "leverage"), before)
