"""A sample is one function: samples over inputs against dense Jacobians and the joint covariance."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.predictive import draw_seeds, functions, suffix, weight_noise
from tests import oracles
from tests.cases import Case, labels, normal, rng, tagged
from tests.checks import close


def regression(**options: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    x = normal(50, 2, seed=1)
    posterior = lk.LaplacePosterior(model, "gaussian", **options)
    return model, posterior.fit((x, torch.stack([x.sum(1), x[:, 0]], 1))), x[:3]


def correlations(covariance: Tensor) -> Tensor:
    spread = covariance.diagonal().sqrt()
    return covariance / spread / spread[:, None]


WAYS = [("linearized", {}), ("linearized", {"link": "mc"}), ("probit", {})]


@pytest.mark.pairs(structure=["diag", "kron", "full"], parameters=["all", "last_layer"], way=WAYS)
def test_correlations_are_those_of_the_posterior(structure: str, parameters: str, way: tuple[str, Any]) -> None:
    method, options = way
    _, posterior, x = regression(structure=structure, parameters=parameters)
    truth = posterior.functional_covariance(x, joint=True)
    found = posterior.predict(x, method=method, samples=2500, generator=rng(1), keep_samples=True, **options)
    drawn = found.samples.flatten(1)
    close(correlations(torch.cov(drawn.T)), correlations(truth), 0.08)
    close(drawn.var(0) / truth.diagonal(), torch.ones(6).double(), 0.12)
    assert not found.independent_samples
    kept = posterior.predict(x, method=method, samples=20, generator=rng(1), keep_samples=True, **options)
    plain = posterior.predict(x, method=method, samples=20, generator=rng(1), **options)
    close(kept.mean, plain.mean)  # what is predicted does not depend on what is kept


@pytest.mark.parametrize("case", tagged("core"), ids=lambda case: case.name)
@pytest.mark.parametrize("way", ["_forward_mode", "_two_backward"])
def test_a_sample_is_a_jacobian_times_one_weight_draw(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, by both kinds of derivative, for every kind of layer."""
    problem = case.make()
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood.build(lk), structure="diag", prior_precision=0.7)
    posterior.fit([problem.batch()])
    if way == "_two_backward":
        monkeypatch.setattr(functions, "_forward_mode", _without)
    monkeypatch.setattr(functions, "_from_covariance", _without)
    found = posterior.predict(problem.x, method="linearized", samples=3, generator=rng(1), keep_samples=True).samples
    seed = draw_seeds(1, rng(1))[0]
    seeds = draw_seeds(3, torch.Generator().manual_seed(seed))
    jacobian = oracles.jacobian(problem.model, problem.x, problem.n, problem.names)  # (N, C', P)
    outputs = torch.cat(oracles.outputs(problem.model, problem.x, problem.n))
    for k in range(3):
        noise = weight_noise(posterior.precision, seeds[k])
        flat = torch.cat([noise[name].reshape(-1) for name in problem.names])
        close(found[k].flatten(1), outputs.flatten(1) + jacobian.flatten(2) @ flat, 1e-8)


def _without(*_: Any) -> Any:
    raise NotImplementedError


def test_without_any_derivative_the_joint_covariance_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    _, posterior, x = regression()
    truth = posterior.functional_covariance(x, joint=True)
    monkeypatch.setattr(functions, "_forward_mode", _without)
    monkeypatch.setattr(functions, "_two_backward", _without)
    found = posterior.predict(x, method="linearized", samples=2500, generator=rng(1), keep_samples=True)
    close(correlations(torch.cov(found.samples.flatten(1).T)), correlations(truth), 0.08)


def test_a_head_is_drawn_without_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, posterior, x = regression(parameters="last_layer")
    passes: list[int] = []
    forward = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, h: (passes.append(1), forward(self, h))[1])
    posterior.predict(x, method="map")  # looks once at a network that it does not know any more
    passes.clear()
    posterior.predict(x, method="linearized", samples=50, generator=rng(1), keep_samples=True)
    assert len(passes) <= 1
    assert "cut" in suffix.verdicts(model).values()


def test_activations_say_that_they_are_independent() -> None:
    _, posterior, x = regression()
    x = torch.cat([x[:1], x[:1] + 0.01])
    options: dict[str, Any] = {"method": "mc", "samples": 4000, "generator": rng(1), "keep_samples": True}
    truth = correlations(posterior.functional_covariance(x, joint=True))
    apart = posterior.predict(x, space="activations", **options)
    assert apart.independent_samples
    assert correlations(torch.cov(apart.samples.flatten(1).T))[0, 2].abs() < 0.06
    assert truth[0, 2] > 0.9
    for space in ("auto", "weights"):
        together = posterior.predict(x, space=space, **options)
        assert not together.independent_samples
        assert (correlations(torch.cov(together.samples.flatten(1).T)) - truth).abs().max() < 0.3


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("method", ["map", "probit", "linearized", "mc"])
def test_mutual_information_exists_for_every_method(likelihood: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double(), normal(30, 2, seed=1)
    y = labels(3, 30) if likelihood == "categorical" else labels(2, 30, 3).double()
    posterior = lk.LaplacePosterior(model, likelihood).fit((x, y))
    found = posterior.predict(x[:4], method=method, samples=500, generator=rng(0))
    information = found.mutual_information
    assert information.shape == (4,)
    if method == "map":
        close(information, torch.zeros(4).double(), 1e-12)
        return
    assert (information > 0).all()
    close(pickle.loads(pickle.dumps(found)).mutual_information, information)
    if method == "probit" and likelihood == "bernoulli":  # outputs count one by one: the draws are exact
        spread = posterior.functional_covariance(x[:4], diagonal_only=True).sqrt()
        p = (model(x[:4]) + spread * torch.randn(20000, 4, 3, generator=rng(3)).double()).sigmoid()
        binary = lambda q: -(q * q.log() + (1 - q) * (1 - q).log()).sum(-1)  # noqa: E731
        close(information, (binary(p.mean(0)) - binary(p).mean(0)).detach(), 0.03)
