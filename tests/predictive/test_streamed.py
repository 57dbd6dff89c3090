"""Mean probabilities of drawn logits a few draws at a time: the numbers of all draws at once, or the general way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from laplace_kf.likelihoods import categorical
from laplace_kf.likelihoods.normal import GaussianOutputs
from laplace_kf.outputs.spread import SharedBasis, Spread
from tests.cases import rng


def outputs(
    samples: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, basis: bool = True
) -> GaussianOutputs:
    mean = scale * torch.randn(3, 2, 70, generator=rng(0), dtype=dtype)
    vectors = torch.randn(70, 70, generator=rng(1), dtype=dtype) / 8 if basis else None
    spread = SharedBasis(torch.rand(3, 2, 70, generator=rng(2), dtype=dtype), vectors)
    return GaussianOutputs(mean, spread.variance(), spread, (3, 2, 70), samples, rng(3))


def general(of: GaussianOutputs) -> tuple[Tensor, Tensor]:
    """By plain loops over the draws: logarithms of mean probabilities, and mean entropies."""
    logs = [draw.log_softmax(-1) for draw in of.draws]
    mean = torch.stack(logs).logsumexp(0) - math.log(len(logs))
    return mean, sum((-(p.exp() * p).sum(-1) for p in logs), torch.zeros((), dtype=mean.dtype)) / len(logs)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(categorical, "STREAMED", 0)
    monkeypatch.setattr(categorical, "BLOCK", 2500)  # six draws


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("samples", [2, 7, 24])
def test_blocks_of_draws_are_all_draws(samples: int, basis: bool) -> None:
    of = outputs(samples, basis=basis)
    blocks = list(of.draw_blocks(2500))
    assert sum(map(len, blocks)) == samples and max(map(len, blocks)) <= 6
    rows = {tuple(draw.flatten().tolist()) for draw in of.draws}
    assert rows == {tuple(draw.flatten().tolist()) for block in blocks for draw in block}
    found, wanted = categorical._streamed(of), general(of)
    assert found is not None
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) < 1e-12


@pytest.mark.usefixtures("small")
def test_the_prediction_is_the_general_one_and_went_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = categorical.Categorical()
    called: list[int] = []
    original = categorical._streamed
    monkeypatch.setattr(categorical, "_streamed", lambda of: called.append(1) or original(of))
    monkeypatch.setattr(categorical, "_mean_and_entropy", lambda log_p: pytest.fail("all draws at once"))
    of = outputs(9, scale=3.0)
    found = likelihood.predict_gaussian(of.mean, of.variance, of.covariance, "mc", 9, rng(3))
    assert called
    monkeypatch.undo()
    wanted = likelihood.predict(of.draws)
    y = torch.randint(0, 70, (3, 2), generator=rng(5))
    for name in ("probs", "entropy", "mutual_information", "position_entropy"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-11, atol=1e-12), name
    assert torch.allclose(found.log_prob(y), wanted.log_prob(y), rtol=1e-12)
    assert torch.allclose(found.distribution.probs, wanted.distribution.probs, rtol=1e-11)


@pytest.mark.usefixtures("small")
def test_the_general_way_where_it_says_more() -> None:
    """Probabilities next to 0, masked classes, NaN, gradients, half precision, few draws."""

    def other(**changed: Any) -> GaussianOutputs:
        of = outputs(6, scale=0.5)
        return GaussianOutputs(**{**{name: getattr(of, name) for name in of.__dataclass_fields__}, **changed})

    assert categorical._streamed(other()) is not None
    mean = outputs(6, scale=0.5).mean
    for value in (-2000.0, -float("inf"), float("nan")):
        changed = mean.clone()
        changed[0, 0, 3] = value
        assert categorical._streamed(other(mean=changed)) is None
    spread = other().covariance
    assert isinstance(spread, Spread)
    assert categorical._streamed(other(mean=mean.clone().requires_grad_())) is None
    grown = SharedBasis(outputs(6).variance.clone().requires_grad_(), None)
    assert grown.differentiable and not spread.differentiable
    assert categorical._streamed(other(covariance=grown)) is None
    assert categorical._streamed(other(covariance=spread.covariance())) is None
    assert categorical._streamed(other(samples=1)) is None
    half = other(mean=mean.half(), covariance=spread.to(mean.half()))
    assert categorical._streamed(half) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categorical, "STREAMED", 2**18)
        assert categorical._streamed(other()) is None
