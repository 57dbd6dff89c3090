"""What the penalty costs, and that it is differentiable in all it depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import linalg
from laplace_kf.operators import curvature, kept_terms, kronecker, kronecker_factors
from tests import oracles
from tests.cases import labels, normal
from tests.checks import close
from tests.continual.problems import DENSE, LAM, N, Products, moved, network, task

STRUCTURES: list[tuple[str, dict[str, Any]]] = [
    ("kron", {}),
    ("diag", {}),
    ("full", {}),
    ("ekfac", {}),
    ("lowrank", {"rank": 4}),
    ("layer", {}),
    ("isotropic", {}),
]
COLLAPSING = [("kron", "sum"), ("kron", "project"), ("kron", "project_kl"), ("ekfac", "project"), ("diag", "sum")]


def chained(structure: str, terms: str, count: int, prior: Any = LAM, **options: Any) -> lk.LaplacePosterior:
    model = network()
    posterior = lk.LaplacePosterior(model, "categorical", structure, prior_precision=prior, **options).fit(task(0))
    for k in range(1, count):
        moved(model, k)
        posterior = posterior.update(task(k), 2.0, terms)
    moved(model, 9)
    return posterior


def gradient_of(value: Tensor, model: nn.Module, **options: Any) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), **options)
    return torch.cat([g.reshape(-1) for g in found])


@pytest.mark.pairs(kind=STRUCTURES, prior=[LAM, 0.0, {"*weight": 0.5, "*bias": 4.0}], count=[1, 2, 4])
def test_value_gradient_and_second_derivative(kind: tuple[str, Any], prior: Any, count: int) -> None:
    """All three against the dense precision, by autograd of the dense form."""
    structure, options = kind
    posterior = chained(structure, "keep", count, prior, **options)
    model, dense = posterior.model, posterior.precision.dense()
    if structure in DENSE and count == 1:
        centre = network()  # where the first task was learned
        spread = [torch.full((p.numel(),), prior["*bias" if "bias" in n else "*weight"] if isinstance(prior, dict)
                             else prior, dtype=torch.float64) for n, p in model.named_parameters()]  # fmt: skip
        close(dense, N * DENSE[structure](centre, *task(0)) + torch.diag(torch.cat(spread)), 1e-9)
    theta = oracles.flat_parameters(model).requires_grad_()
    mean = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
    wanted = oracles.penalty(dense, theta, mean)
    (gradient,) = torch.autograd.grad(wanted, theta)
    found = posterior.penalty()
    close(found, wanted, 1e-9)
    close(gradient_of(3 * found, model, retain_graph=True), 3 * gradient, 1e-9)
    direction = normal(31, seed=5)
    slope = gradient_of(found, model, create_graph=True) @ direction
    close(gradient_of(slope, model), dense @ direction, 1e-9)


@pytest.mark.parametrize(("structure", "terms"), COLLAPSING)
def test_collapsed_terms(structure: str, terms: str) -> None:
    posterior = chained(structure, terms, 3)
    mean = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
    shift = oracles.flat_parameters(posterior.model) - mean
    dense = posterior.precision.dense()
    found = posterior.penalty()
    close(found, shift @ dense @ shift / 2, 1e-9)
    close(gradient_of(found, posterior.model), dense @ shift, 1e-9)


@pytest.mark.parametrize("damping", ["factored", "balanced"])
def test_other_dampings(damping: str) -> None:
    model = network()
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision=LAM, damping=damping).fit(task(0))
    before = oracles.flat_parameters(model)
    moved(model, 1)
    shift = oracles.flat_parameters(model) - before
    dense = posterior.precision.dense()
    close(posterior.penalty(), shift @ dense @ shift / 2)
    close(gradient_of(posterior.penalty(), model), dense @ shift)


def test_it_follows_the_settings() -> None:
    posterior = chained("kron", "keep", 3)
    first = posterior.penalty()
    shift = oracles.flat_parameters(posterior.model) - torch.cat([v.reshape(-1) for v in posterior.mean.values()])
    before = posterior.n_data * posterior.curvature.dense()
    posterior.n_data, posterior.prior_precision = 2 * posterior.n_data, 5.0
    wanted = shift @ (2 * before + 5 * torch.eye(31, dtype=torch.float64)) @ shift / 2
    close(posterior.penalty(), wanted)
    posterior.n_data, posterior.prior_precision = posterior.n_data / 2, LAM
    close(posterior.penalty(), first)


def test_it_is_differentiable_in_the_prior_and_the_noise() -> None:
    posterior = chained("kron", "keep", 3)
    shift = oracles.flat_parameters(posterior.model) - torch.cat([v.reshape(-1) for v in posterior.mean.values()])
    lam = torch.tensor(LAM, dtype=torch.float64, requires_grad=True)
    posterior.prior_precision = lam
    value = posterior.penalty()
    (slope,) = torch.autograd.grad(value, lam, retain_graph=True)
    close(slope, shift @ shift / 2)
    close(gradient_of(value, posterior.model), posterior.precision.dense().detach() @ shift)

    model = nn.Linear(3, 2).double()
    likelihood = lk.likelihoods.Gaussian(scale=torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    regression = lk.LaplacePosterior(model, likelihood, prior_precision=0.0).fit((normal(N, 3), normal(N, 2)))
    moved(model, 1)
    assert isinstance(likelihood.scale, Tensor)
    value = regression.penalty()
    (slope,) = torch.autograd.grad(value, likelihood.scale)
    close(slope, -2 * value.detach() / 0.5)  # the precision goes with 1 / σ²


def test_weights_may_change_before_the_backward_pass() -> None:
    posterior = chained("kron", "keep", 2)
    wanted = gradient_of(posterior.penalty(), posterior.model)
    value = posterior.penalty()
    moved(posterior.model, 3)
    close(gradient_of(value, posterior.model), wanted, 1e-14)


def test_frozen_parameters_get_no_gradient() -> None:
    posterior = chained("kron", "keep", 2)
    wanted = gradient_of(posterior.penalty(), posterior.model)
    first, *others = posterior.model.parameters()
    first.requires_grad_(False)
    posterior.penalty().backward()
    assert first.grad is None
    close(torch.cat([p.grad.reshape(-1) for p in others if p.grad is not None]), wanted[first.numel() :])


@pytest.mark.parametrize(("terms", "held"), [("keep", 5), ("sum", 1), ("project", 1), ("project_kl", 1)])
def test_two_products_for_each_layer_and_term(terms: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient together; nothing is decomposed; collapsed terms cost what one term costs."""
    posterior = chained("kron", terms, 5)

    def refused(*_: Any) -> None:
        raise AssertionError("the penalty needs no decomposition")

    for module in (linalg, curvature, kronecker, kronecker_factors, kept_terms):
        monkeypatch.setattr(module, "eigh", refused)
    monkeypatch.setattr(kronecker_factors, "cholesky", refused)
    with Products() as counted:
        posterior.penalty().backward()
    layers = [(4, 4), (3, 5)]  # outputs and inputs with the constant
    wanted = [shape for o, i in layers for shape in ((o, o, i), (o, i, i))]
    assert sorted(counted.shapes) == sorted(held * wanted)


def test_in_single_precision_the_gradient_has_the_type_of_the_weights() -> None:
    model = network().float()
    posterior = lk.LaplacePosterior(model, "categorical", dtype=torch.float64).fit((normal(N, 3).float(), labels(3, N)))
    moved(model, 1)
    value = posterior.penalty()
    value.backward()
    assert value.dtype == torch.float64
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
