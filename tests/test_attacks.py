"""Attacks against closed forms, and through every predictive."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.attacks import fgsm, targeted
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, ShapeMismatch
from laplace_kf.likelihoods import Categorical
from laplace_kf.predictive import mc_dropout

RULE = Categorical()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def linear() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)


def plain(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: RULE.predict(model(x)[None])


class TestAgainstClosedForms:
    def test_untargeted_step(self):
        model, x = linear()
        p = torch.softmax(model(x), 1).detach()
        top = p.argmax(1)
        gradient = model.weight[top] - p @ model.weight  # of log p_top
        ranges = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
        expected = (x - 0.1 * ranges * gradient.sign()).detach()
        found = fgsm(plain(model), x, 0.1, ranges)
        assert torch.allclose(found, expected, atol=1e-14)
        assert torch.equal(found[:, 2], x[:, 2])  # constant in the data
        assert not found.requires_grad
        clipped = fgsm(plain(model), x, 0.1, ranges, clip=(-0.5, 0.5))
        assert torch.allclose(clipped, expected.clamp(-0.5, 0.5), atol=1e-14)

    def test_targeted_steps(self):
        model, x = linear()
        at = x.clone()
        for _ in range(5):
            p = torch.softmax(model(at), 1).detach()
            gradient = model.weight[1] - p @ model.weight
            at = (at + 0.05 * gradient.sign()).detach()
        assert torch.allclose(targeted(plain(model), x, 1, 0.05, 5), at, atol=1e-14)
        assert torch.equal(targeted(plain(model), x, 1, 0.05, 0), x)
        each = torch.tensor([0, 1, 2, 0, 1, 2])
        mixed = targeted(plain(model), x, each, 0.05, 3)
        for n in range(6):
            assert torch.allclose(mixed[n : n + 1], targeted(plain(model), x[n : n + 1], int(each[n]), 0.05, 3))

    def test_a_single_probability(self):
        torch.manual_seed(0)
        model, x = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=torch.float64)
        rule = lk.likelihoods.Bernoulli()
        predict = lambda x: rule.predict(model(x)[None])  # noqa: E731
        towards = model.weight.detach().sign() * torch.where(model(x) > 0, -1.0, 1.0).detach()
        assert torch.allclose(fgsm(predict, x, 0.2), x + 0.2 * towards)
        assert torch.allclose(targeted(predict, x, 0, 0.1, 1), x - 0.1 * model.weight.detach().sign())

    def test_gradients_do_not_die_where_the_network_is_certain(self):
        model, x = linear()
        model.weight.data *= 300
        moved = fgsm(plain(model), x, 0.1)
        assert torch.isfinite(moved).all()


def fitted() -> tuple[lk.LaplacePosterior, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    model.zero_grad()
    return lk.LaplacePosterior(model, "categorical", prior_precision=1.0).fit((x, y)), x


@pytest.fixture(scope="module")
def posterior() -> tuple[lk.LaplacePosterior, Tensor]:
    return fitted()


def mean_field(posterior: lk.LaplacePosterior) -> Callable[[Tensor], Any]:
    """Reparameterised draws of independent weights, as a mean-field variational network predicts."""
    mean = posterior.mean
    draws = [
        {n: w + 0.05 * torch.randn(w.shape, generator=seeded(), dtype=w.dtype) for n, w in mean.items()}
        for _ in range(3)
    ]
    model = posterior.model
    return lambda x: RULE.predict(torch.stack([torch.func.functional_call(model, d, (x,)) for d in draws]))


PREDICTIVES: dict[str, Callable[[lk.LaplacePosterior], Callable[[Tensor], Any]]] = {
    **{
        m: lambda p, m=m: lambda x: p.predict(x, method=m, samples=8, generator=seeded())
        for m in ("mc", "linearized", "probit", "map")
    },
    "dropout": lambda p: mc_dropout(p.model, "categorical", 8, seeded()),
    "mean field": mean_field,
}


class TestThroughEveryPredictive:
    @pytest.mark.parametrize("name", PREDICTIVES)
    def test_attacks(self, name: str, posterior: tuple[lk.LaplacePosterior, Tensor]):
        owner, x = posterior
        if name == "mean field":
            owner.model.eval()
        predict = PREDICTIVES[name](owner)
        state = torch.get_rng_state()
        before = predict(x).probs.detach()
        top = before.argmax(1)
        index = torch.arange(len(x))
        moved = predict(fgsm(predict, x, 0.05)).probs[index, top]
        assert float((moved < before[index, top]).double().mean()) > 0.9
        assert bool(((fgsm(predict, x, 0.05) - x).abs() <= 0.05 + 1e-12).all())
        reached = predict(targeted(predict, x, 0, 0.05, 10)).probs[:, 0]
        assert float((reached > before[:, 0]).double().mean()) > 0.9
        assert all(p.grad is None for p in owner.model.parameters())
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("name", ["linearized", "probit", "mc"])
    def test_the_step_is_that_of_finite_differences(self, name: str, posterior: tuple[lk.LaplacePosterior, Tensor]):
        owner, x = posterior
        predict, x = PREDICTIVES[name](owner), x[:4]
        top = predict(x).probs.argmax(1)
        step = x - fgsm(predict, x, 1.0)
        for d in range(4):
            e = torch.zeros(4, dtype=torch.float64)
            e[d] = 1e-6
            with torch.no_grad():
                up, down = (predict(x + s * e).probs[torch.arange(4), top] for s in (1, -1))
            assert torch.equal((up - down).sign(), step[:, d].sign())

    def test_inside_no_grad_and_inference_mode(self, posterior: tuple[lk.LaplacePosterior, Tensor]):
        owner, x = posterior
        predict = PREDICTIVES["probit"](owner)
        expected = fgsm(predict, x, 0.1)
        with torch.no_grad():
            assert torch.equal(fgsm(predict, x, 0.1), expected)
        with torch.inference_mode():
            assert torch.equal(fgsm(predict, x, 0.1), expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "error", "said"),
        [
            (lambda f, x: fgsm(f, x, -0.1), IncompatiblePair, "epsilon"),
            (lambda f, x: fgsm(f, x, float("nan")), IncompatiblePair, "epsilon"),
            (lambda f, x: fgsm(f, x, 0.1, torch.ones(3)), ShapeMismatch, "ranges"),
            (lambda f, x: fgsm(f, x, 0.1, torch.ones(2, 6, 4)), ShapeMismatch, "ranges"),
            (lambda f, x: fgsm(f, x, 0.1, -1.0), IncompatiblePair, "ranges"),
            (lambda f, x: fgsm(f, x, 0.1, clip=(1.0, 0.0)), IncompatiblePair, "clip"),
            (lambda f, x: fgsm(f, x, 0.1, clip=0.5), ShapeMismatch, "clip"),
            (lambda f, x: fgsm(f, x.long(), 0.1), ShapeMismatch, "floating"),
            (lambda f, x: targeted(f, x, 3, 0.1, 1), ShapeMismatch, "class"),
            (lambda f, x: targeted(f, x, torch.zeros(5, dtype=torch.long), 0.1, 1), ShapeMismatch, "target"),
            (lambda f, x: targeted(f, x, 0.5, 0.1, 1), ShapeMismatch, "target"),
            (lambda f, x: targeted(f, x, 0, 0.1, 1.5), IncompatiblePair, "steps"),
        ],
    )
    def test_arguments(self, call: Callable[..., Tensor], error: type[LaplaceKFError], said: str):
        model, x = linear()
        with pytest.raises(error, match=said):
            call(plain(model), x)

    def test_predictions_that_cannot_be_attacked(self):
        model, x = linear()
        blind = torch.no_grad()(plain(model))
        with pytest.raises(IncompatiblePair, match="gradient"):
            fgsm(blind, x, 0.1)
        with pytest.raises(IncompatiblePair, match="regressions"):
            fgsm(lambda x: lk.likelihoods.Gaussian().predict(model(x)[None]), x, 0.1)
        with pytest.raises(IncompatiblePair, match="binary"):
            fgsm(lambda x: lk.likelihoods.Bernoulli().predict(model(x)[None]), x, 0.1)
        with pytest.raises(ShapeMismatch, match="predictions"):
            fgsm(lambda x: RULE.predict(model(x[:2])[None]), x, 0.1)
        assert partial(fgsm, plain(model))(x, 0.0).equal(x)
