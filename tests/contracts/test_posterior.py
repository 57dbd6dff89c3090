"""``lk.LaplacePosterior`` against the dense references, from the precision to files and errors."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import laplace_kf as lk
from tests import oracles
from tests.cases import (
    BY_NAME,
    CATEGORICAL,
    Case,
    Problem,
    binary,
    build,
    gaussian,
    labels,
    mlp,
    normal,
    rng,
    tagged,
    truth,
)
from tests.checks import close
from tests.fits import fitted_once

DENSE = 1e-8  # through an inverse or a determinant

STRUCTURES = [
    ("full", "exact"),
    ("diag", "exact"),
    ("kron", "exact"),
    ("kron", "factored"),
    ("kron", "balanced"),
    ("ekfac", "exact"),
    ("layer", "exact"),
    ("lowrank", "exact"),
]
KINDS = [pytest.param(s, d, id=s if s != "kron" else f"kron-{d}") for s, d in STRUCTURES]
over_kinds = pytest.mark.parametrize(("structure", "damping"), KINDS)
# of what takes the precision that `test_precision` has looked at
few_of_each = pytest.mark.meets(case=tagged("core"), kind=STRUCTURES)
over_core = pytest.mark.parametrize("case", tagged("core"), ids=lambda case: case.name)


def fitted(problem: Problem, data: Any = None, **options: Any) -> Any:
    """A fitted posterior."""
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood.build(lk), **options)
    returned = posterior.fit(problem.uneven() if data is None else data)
    assert returned is posterior
    return posterior


def constant(problem: Problem, value: float) -> Tensor:
    return torch.full((problem.size,), value, dtype=torch.float64)


def flatten(draws: dict[str, Tensor], lead: int = 0) -> Tensor:
    """A parameter dict as flat vectors (*lead, P)."""
    return torch.cat([v.reshape(*v.shape[:lead], -1) for v in draws.values()], lead)


def unflatten(model: nn.Module, names: list[str], flat: Tensor) -> dict[str, Tensor]:
    """Flat vectors (S, P) as a dict of (S, *shape)."""
    index = oracles.flat_index(model, names)
    return {name: flat[:, where] for name, where in index.items()}


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.share(2)
@over_kinds
@over_core
def test_precision(case: Case, structure: str, damping: str) -> None:
    problem, t = case.make(), truth(case)
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=1.7)
    close(posterior.precision.dense(), t.precision(structure, problem.n, constant(problem, 1.7), damping))
    assert float(posterior.n_data) == problem.n


@few_of_each
def test_setting_hyperparameters_needs_no_refit(case: Case, kind: tuple[str, str]) -> None:
    structure, damping = kind
    t = truth(case)
    problem, posterior = fitted_once(case, structure, split=True, damping=damping)
    for n, lam in ((37.5, 0.3), (0.5, 40.0), (1e4, 1e-2)):
        posterior.n_data = n
        posterior.prior_precision = lam
        close(posterior.precision.dense(), t.precision(structure, n, constant(problem, lam), damping))
        assert float(posterior.n_data) == n
        assert float(posterior.prior_precision) == lam


def check_matrix(matrix: Any, dense: Tensor) -> None:
    """Every method of a Matrix against the dense one."""
    size = dense.shape[0]
    v, many = normal(size, seed=31), normal(size, 3, seed=32)
    inverse = torch.linalg.inv(dense)
    close(matrix.dense(), dense)
    close(matrix.diag(), dense.diagonal())
    close(matrix.matvec(v), dense @ v)
    close(matrix.matvec(many), dense @ many)
    close(matrix.solve(v), inverse @ v, DENSE)
    close(matrix.solve(many), inverse @ many, DENSE)
    assert matrix.logdet().ndim == 0
    close(matrix.logdet(), torch.logdet(dense), DENSE)
    close(matrix.quadratic(many), many.T @ inverse @ many, DENSE)
    close(matrix.quadratic(v[:, None]), (v @ inverse @ v).view(1, 1), DENSE)
    draws = matrix.sample(4, generator=rng(1))
    assert draws.shape == (4, size) and draws.dtype == dense.dtype
    assert torch.equal(draws, matrix.sample(4, generator=rng(1)))
    assert not torch.equal(draws, matrix.sample(4, generator=rng(2)))


@pytest.mark.share(2)
@over_kinds
@over_core
def test_matrix_methods(case: Case, structure: str, damping: str) -> None:
    t = truth(case)
    problem, posterior = fitted_once(case, structure, split=True, damping=damping, prior_precision=0.9)
    posterior.n_data = 12.0
    check_matrix(posterior.precision, t.precision(structure, 12.0, constant(problem, 0.9), damping))


@pytest.mark.parametrize(
    "structure",
    ["ekfac", "lowrank", "auto"],
)
@over_core
def test_other_structures_are_consistent(case: Case, structure: str) -> None:
    """Whatever they approximate: a symmetric positive definite precision whose methods agree with its dense form."""
    problem = case.make()
    posterior = fitted(problem, structure=structure, prior_precision=0.9)
    dense = posterior.precision.dense()
    assert dense.shape == (problem.size, problem.size)
    close(dense, dense.T)
    assert float(torch.linalg.eigvalsh(dense).min()) >= 0.9 * (1 - 1e-8)
    check_matrix(posterior.precision, dense)
    posterior.n_data, posterior.prior_precision = 2.0 * problem.n, 1.8
    close(posterior.precision.dense(), 2.0 * dense, 1e-9)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_precision_of_curvature_statistics(structure: str) -> None:
    """``C̄`` itself has the same interface."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    matrix = lk.curvature.estimate(problem.model, "categorical", [problem.batch()], structure=structure).mean()
    v = normal(problem.size, 2, seed=33)
    close(matrix.matvec(v), truth(case).structured(structure) @ v)


# ------------------------------------------------------------------------------------------------ priors per parameter


@over_kinds
def test_prior_precision_by_layer(structure: str, damping: str) -> None:
    case = BY_NAME["deep-tanh-mlp-gaussian"]
    problem, t = case.make(), truth(case)
    values = {"0.*": 0.5, "2.*": 3.0, "4.*": 20.0}
    prior = constant(problem, 0.0)
    for name, index in oracles.flat_index(problem.model).items():
        prior[index] = values[f"{name[0]}.*"]
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=values)
    dense = t.precision(structure, problem.n, prior, damping)
    close(posterior.precision.dense(), dense)
    evidence = oracles.log_evidence(dense, prior, t.theta, t.log_likelihood)
    assert float(posterior.log_evidence()) == pytest.approx(evidence, rel=1e-9)
    posterior.prior_precision = 2.0
    close(posterior.precision.dense(), t.precision(structure, problem.n, constant(problem, 2.0), damping))
    posterior.prior_precision = values
    close(posterior.precision.dense(), dense)
    check_matrix(posterior.precision, dense)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_prior_precision_by_parameter(structure: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem, t = case.make(), truth(case)
    values = {"*.weight": 0.5, "*.bias": 7.0}
    prior = constant(problem, 0.0)
    for name, index in oracles.flat_index(problem.model).items():
        prior[index] = values["*." + name.split(".")[1]]
    posterior = fitted(problem, structure=structure, prior_precision=values)
    check_matrix(posterior.precision, t.precision(structure, problem.n, prior))


# ------------------------------------------------------------------------------------------------ samples


def covariance_z(draws: Tensor, covariance: Tensor) -> float:
    """Largest standardised deviation of first and second moments of draws (n, P) from N(0, covariance)."""
    n = draws.shape[0]
    variances = covariance.diagonal()
    mean_z = draws.mean(0) / (variances / n).sqrt()
    spread = ((variances[:, None] * variances[None, :] + covariance**2) / n).sqrt()
    second_z = (draws.T @ draws / n - covariance) / spread
    return max(float(mean_z.abs().max()), float(second_z.abs().max()))


@over_kinds
@pytest.mark.parametrize("name", ["no-bias-mlp", "conv2d-groups", "layernorm"])
def test_sample_covariance(name: str, structure: str, damping: str) -> None:
    case = BY_NAME[name]
    problem, t = case.make(), truth(case)
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=0.8)
    posterior.n_data = 30.0
    covariance = torch.linalg.inv(t.precision(structure, 30.0, constant(problem, 0.8), damping))
    assert covariance_z(posterior.precision.sample(20_000, generator=rng(7)), covariance) < 5.5
    draws = flatten(posterior.sample(20_000, generator=rng(8)), 1) - t.theta
    assert covariance_z(draws, covariance) < 5.5


@few_of_each
def test_sample_shapes(case: Case, kind: tuple[str, str]) -> None:
    structure, damping = kind
    problem, posterior = fitted_once(case, structure, split=True, damping=damping)
    before = torch.get_rng_state()
    for n in (1, 5):
        draws = posterior.sample(n, generator=rng(n))
        assert list(draws) == problem.names
        for name, value in draws.items():
            parameter = problem.model.get_parameter(name)
            assert value.shape == (n, *parameter.shape) and value.dtype == parameter.dtype
            assert not value.requires_grad
        again = posterior.sample(n, generator=rng(n))
        assert all(torch.equal(draws[name], again[name]) for name in draws)
    one, two = posterior.sample(2), posterior.sample(2)
    assert not torch.equal(flatten(one), flatten(two))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(posterior.mean) == problem.names
    for name, value in posterior.mean.items():
        assert torch.equal(value, problem.model.get_parameter(name).detach())
    single = {name: value[0] for name, value in draws.items()}
    x = oracles.take(problem.x, slice(0, 2))
    args, kwargs = ((), x) if isinstance(x, dict) else ((x if isinstance(x, tuple) else (x,)), {})
    with torch.no_grad():
        z = functional_call(problem.model, single, args, kwargs)
    assert torch.isfinite(z).all()


def test_mean_does_not_follow_the_model() -> None:
    """The posterior keeps its own copy of the weights it was fitted at."""
    problem = BY_NAME["tanh-mlp-categorical"].make()
    posterior = fitted(problem)
    before = {name: value.clone() for name, value in posterior.mean.items()}
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(posterior.mean[name], value) for name, value in before.items())


# ------------------------------------------------------------------------------------------------ evidence, penalty


@few_of_each
def test_log_evidence(case: Case, kind: tuple[str, str]) -> None:
    structure, damping = kind
    t = truth(case)
    problem, posterior = fitted_once(case, structure, split=True, damping=damping, prior_precision=1.7)
    prior = constant(problem, 1.7)
    precision = t.precision(structure, problem.n, prior, damping)
    value = posterior.log_evidence()
    assert value.ndim == 0
    assert float(value) == pytest.approx(oracles.log_evidence(precision, prior, t.theta, t.log_likelihood), rel=1e-9)


@over_kinds
@pytest.mark.parametrize("name", ["deep-tanh-mlp-gaussian", "layernorm", "conv2d-groups"])
def test_log_evidence_is_differentiable_in_the_prior(name: str, structure: str, damping: str) -> None:
    case = BY_NAME[name]
    problem, t = case.make(), truth(case)
    posterior = fitted(problem, structure=structure, damping=damping)
    lam = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    posterior.prior_precision = lam
    value = posterior.log_evidence()
    (gradient,) = torch.autograd.grad(value, lam)

    def reference(at: float) -> float:
        prior = constant(problem, at)
        precision = t.precision(structure, problem.n, prior, damping)
        return oracles.log_evidence(precision, prior, t.theta, t.log_likelihood)

    assert value.item() == pytest.approx(reference(1.3), rel=1e-9)
    numeric = (reference(1.3 + 1e-4) - reference(1.3 - 1e-4)) / 2e-4
    assert float(gradient) == pytest.approx(numeric, rel=1e-5)


@over_kinds
def test_log_evidence_is_differentiable_in_the_noise_scale(structure: str, damping: str) -> None:
    problem = BY_NAME["deep-tanh-mlp-gaussian"].make()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    posterior = lk.LaplacePosterior(
        problem.model, lk.likelihoods.Gaussian(scale=scale), structure=structure, damping=damping, prior_precision=1.3
    ).fit(problem.uneven())
    (gradient,) = torch.autograd.grad(posterior.log_evidence(), scale)

    def reference(at: float) -> float:
        t = truth(Case("", lambda: Problem(problem.model, problem.x, problem.y, gaussian(at))))
        prior = constant(problem, 1.3)
        precision = t.precision(structure, problem.n, prior, damping)
        return oracles.log_evidence(precision, prior, t.theta, t.log_likelihood)

    assert posterior.log_evidence().item() == pytest.approx(reference(0.7), rel=1e-9)
    assert float(gradient) == pytest.approx((reference(0.7001) - reference(0.6999)) / 2e-4, rel=1e-5)


@few_of_each
def test_penalty(case: Case, kind: tuple[str, str]) -> None:
    structure, damping = kind
    t = truth(case)
    problem, posterior = fitted_once(case, structure, split=True, damping=damping, prior_precision=1.7)
    dense = t.precision(structure, problem.n, constant(problem, 1.7), damping)
    assert posterior.penalty().item() == 0.0
    shift = 0.3 * normal(problem.size, seed=40)
    with torch.no_grad():
        for name, index in oracles.flat_index(problem.model, problem.names).items():
            problem.model.get_parameter(name).add_(shift[index])
    value = posterior.penalty()
    assert value.ndim == 0
    close(value.detach(), oracles.penalty(dense, t.theta + shift, t.theta))
    wrt = [problem.model.get_parameter(name) for name in problem.names]
    grads = torch.autograd.grad(value, wrt)
    close(torch.cat([g.reshape(-1) for g in grads]), dense @ shift, 1e-9)
    value = posterior.penalty()
    value.backward()
    for name, parameter in problem.model.named_parameters():
        assert (parameter.grad is not None) == (name in problem.names)


# ------------------------------------------------------------------------------------------------ linear regression


def _regression(prior: float, scale: float) -> tuple[nn.Module, Tensor, Tensor, oracles.LinearRegression]:
    x, y = normal(9, 2), normal(9, seed=1)
    design = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    exact = oracles.linear_regression(design, y, scale, prior)
    model = build(lambda: nn.Linear(2, 1))
    with torch.no_grad():
        model.weight.copy_(exact.mean[None, :2])
        model.bias.copy_(exact.mean[2:])
    return model, x, y[:, None], exact


EXACT_FOR_LINEAR = ["full", "kron", "ekfac"]


@pytest.mark.parametrize("structure", EXACT_FOR_LINEAR)
def test_bayesian_linear_regression_is_exact(structure: str) -> None:
    """T25: posterior and evidence equal the closed form, the Monte Carlo predictive up to its error."""
    model, x, y, exact = _regression(1.4, 0.6)
    posterior = lk.LaplacePosterior(
        model, lk.likelihoods.Gaussian(scale=0.6), structure=structure, prior_precision=1.4
    ).fit((x, y))
    close(posterior.precision.dense(), exact.precision, 1e-9)
    assert float(posterior.log_evidence()) == pytest.approx(exact.log_evidence, rel=1e-9)
    new = normal(5, 2, seed=3)
    mean, variance = exact.predict(torch.cat([new, torch.ones(5, 1, dtype=torch.float64)], 1))
    sampled = posterior.predict(new, method="mc", samples=4000, generator=rng(5))
    error = (variance / 4000).sqrt()
    assert float(((sampled.mean[:, 0] - mean) / error).abs().max()) < 5
    assert float((sampled.epistemic_variance[:, 0] / variance - 1).abs().max()) < 5 * (2 / 4000) ** 0.5
    close(sampled.variance, sampled.epistemic_variance + 0.36)


@pytest.mark.parametrize("structure", EXACT_FOR_LINEAR)
def test_bayesian_linear_regression_predictive_is_exact(structure: str) -> None:
    """T25: functional covariance and linearised predictive equal the closed form."""
    model, x, y, exact = _regression(1.4, 0.6)
    posterior = lk.LaplacePosterior(
        model, lk.likelihoods.Gaussian(scale=0.6), structure=structure, prior_precision=1.4
    ).fit((x, y))
    new = normal(5, 2, seed=3)
    mean, variance = exact.predict(torch.cat([new, torch.ones(5, 1, dtype=torch.float64)], 1))
    close(posterior.functional_covariance(new), variance.view(5, 1, 1), DENSE)
    prediction = posterior.predict(new, method="linearized")
    close(prediction.mean, mean[:, None], DENSE)
    close(prediction.epistemic_variance, variance[:, None], DENSE)
    close(prediction.variance, variance[:, None] + 0.36, DENSE)
    targets = normal(5, 1, seed=4)
    wanted = torch.distributions.Normal(mean, (variance + 0.36).sqrt()).log_prob(targets[:, 0])
    close(prediction.log_prob(targets), wanted, DENSE)


# ------------------------------------------------------------------------------------------------ predictions


DRAWS = 1500


def draw(case: Case, structure: str, damping: str, n: float, lam: float, samples: int, seed: int) -> dict[str, Tensor]:
    """Weight draws of the reference posterior."""
    t, problem = truth(case), case.make()
    covariance = torch.linalg.inv(t.precision(structure, n, constant(problem, lam), damping))
    factor = torch.linalg.cholesky((covariance + covariance.T) / 2)
    noise = torch.randn(samples, problem.size, generator=rng(seed), dtype=torch.float64)
    return unflatten(problem.model, problem.names, t.theta + noise @ factor.T)


def run_draws(model: nn.Module, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs (S, N, C) at weight draws."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.vmap(lambda weights: functional_call(model, weights, (x,)))(draws)


@over_kinds
def test_predict_categorical(structure: str, damping: str) -> None:
    """Probabilities, not outputs, are averaged over weight samples."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=0.5)
    x, y = normal(6, 3, seed=50), labels(3, 6, seed=51)
    probs = torch.softmax(run_draws(problem.model, draw(case, structure, damping, 5, 0.5, DRAWS, 1), x), -1)
    prediction = posterior.predict(x, method="mc", samples=DRAWS, space="weights", generator=rng(2))
    assert prediction.probs.shape == (6, 3) and prediction.probs.dtype == torch.float64
    error = (2 * probs.var(0) / DRAWS).sqrt()
    assert float(((prediction.probs - probs.mean(0)) / error).abs().max()) < 5
    close(prediction.probs.sum(1), torch.ones(6, dtype=torch.float64))
    close(prediction.entropy, -(prediction.probs * prediction.probs.log()).sum(1))
    close(prediction.log_prob(y), prediction.probs.log()[torch.arange(6), y])
    information = prediction.entropy + (probs * probs.log()).sum(-1).mean(0)
    assert prediction.mutual_information.shape == (6,)
    assert float((prediction.mutual_information - information).abs().max()) < 0.05
    assert bool((prediction.mutual_information >= -1e-12).all())
    assert bool((prediction.entropy <= math.log(3) + 1e-12).all())
    few = [posterior.predict(x, method="mc", samples=7, space="weights", generator=rng(seed)) for seed in (2, 2, 3)]
    assert torch.equal(few[0].probs, few[1].probs)
    assert not torch.equal(few[0].probs, few[2].probs)


@over_kinds
def test_predict_categorical_in_the_default_space(structure: str, damping: str) -> None:
    """``space="auto"`` may sample pre-activations of a Kronecker posterior: the predictive keeps its meaning."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=2.0)
    x = normal(6, 3, seed=50)
    prediction = posterior.predict(x, method="mc", samples=DRAWS, generator=rng(2))
    probs = torch.softmax(run_draws(problem.model, draw(case, structure, damping, 5, 2.0, DRAWS, 1), x), -1)
    error = (2 * probs.var(0) / DRAWS).sqrt()
    assert float(((prediction.probs - probs.mean(0)) / error).abs().max()) < 5


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_predict_map(structure: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, structure=structure)
    x = normal(6, 3, seed=50)
    with torch.no_grad():
        z = problem.model(x)
    close(posterior.predict(x, method="map").probs, torch.softmax(z, -1))
    one = posterior.predict(x[:1], method="map")
    assert one.probs.shape == (1, 3) and one.entropy.shape == (1,)

    regression = BY_NAME["deep-tanh-mlp-gaussian"].make()
    posterior = fitted(regression, structure=structure)
    prediction = posterior.predict(regression.x, method="map")
    close(prediction.mean, torch.cat(oracles.outputs(regression.model, regression.x, regression.n)))
    close(prediction.variance, torch.full_like(prediction.mean, 0.49))
    assert float(prediction.epistemic_variance.abs().max()) == 0.0
    wanted = torch.stack(
        [-oracles.gaussian_nll(0.7)(m[None], t[None]) for m, t in zip(prediction.mean, regression.y, strict=True)]
    )
    close(prediction.log_prob(regression.y), wanted)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_predict_uses_the_mean_not_the_current_weights(structure: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, structure=structure)
    x = normal(4, 3, seed=50)
    before = posterior.predict(x, method="map").probs
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.add_(0.5)
    close(posterior.predict(x, method="map").probs, before)


@over_kinds
def test_predict_gaussian(structure: str, damping: str) -> None:
    """Mean, both variances, and a log density that is the log of the mixture, not of a moment-matched Gaussian."""
    case = BY_NAME["deep-tanh-mlp-gaussian"]
    problem = case.make()
    posterior = fitted(problem, structure=structure, damping=damping, prior_precision=0.2)
    x, y = normal(6, 2, seed=50), 2 * normal(6, 2, seed=51)
    z = run_draws(problem.model, draw(case, structure, damping, 5, 0.2, DRAWS, 1), x)
    prediction = posterior.predict(x, method="mc", samples=DRAWS, space="weights", generator=rng(2))
    error = (2 * z.var(0) / DRAWS).sqrt()
    assert float(((prediction.mean - z.mean(0)) / error).abs().max()) < 5
    assert float((prediction.epistemic_variance / z.var(0) - 1).abs().max()) < 0.25
    close(prediction.variance, prediction.epistemic_variance + 0.49)
    assert prediction.entropy.shape == (6,)
    density = torch.distributions.Normal(z, 0.7).log_prob(y).sum(-1).exp()
    error = (2 * density.var(0) / DRAWS).sqrt()
    value = prediction.log_prob(y)
    assert value.shape == (6,)
    assert float(((value.exp() - density.mean(0)) / error).abs().max()) < 5
    assert isinstance(prediction.distribution, torch.distributions.Distribution)


def test_predict_bernoulli_and_poisson() -> None:
    case = BY_NAME["relu-mlp-bernoulli"]
    problem = case.make()
    posterior = fitted(problem, structure="full", prior_precision=0.5)
    x, y = normal(6, 3, seed=50), binary(6, 2, seed=51)
    probs = torch.sigmoid(run_draws(problem.model, draw(case, "full", "exact", 5, 0.5, DRAWS, 1), x))
    prediction = posterior.predict(x, method="mc", samples=DRAWS, space="weights", generator=rng(2))
    assert prediction.probs.shape == (6, 2)
    error = (2 * probs.var(0) / DRAWS).sqrt()
    assert float(((prediction.probs - probs.mean(0)) / error).abs().max()) < 5
    p = prediction.probs
    close(prediction.entropy, -(p * p.log() + (1 - p) * (1 - p).log()).sum(1))
    assert prediction.log_prob(y).shape == (6,)
    assert isinstance(prediction.distribution, torch.distributions.Distribution)

    problem = BY_NAME["tanh-mlp-poisson"].make()
    posterior = fitted(problem, structure="kron", prior_precision=5.0)
    assert posterior.predict(problem.x, method="mc", samples=50, generator=rng(0)).log_prob(problem.y).shape == (
        problem.n,
    )


def test_mixture_of_both_outputs_is_joint() -> None:
    """Two Gaussian outputs share the weight sample: the log density is not the sum of marginal mixtures."""
    case = BY_NAME["linear-gaussian"]
    problem = case.make()
    posterior = fitted(problem, structure="full", prior_precision=0.05)
    x, y = 3 * normal(4, 3, seed=60), normal(4, 2, seed=61)
    z = run_draws(problem.model, draw(case, "full", "exact", 5, 0.05, DRAWS, 1), x)
    parts = torch.distributions.Normal(z, 0.7).log_prob(y)
    joint = parts.sum(-1).exp()
    value = posterior.predict(x, method="mc", samples=DRAWS, space="weights", generator=rng(2)).log_prob(y)
    error = (2 * joint.var(0) / DRAWS).sqrt()
    assert float(((value.exp() - joint.mean(0)) / error).abs().max()) < 5


@over_core
def test_predict_runs_on_every_input_form(case: Case) -> None:
    problem = case.make()
    posterior = fitted(problem, structure="kron")
    prediction = posterior.predict(problem.x, method="mc", samples=3, generator=rng(0))
    assert prediction.log_prob(problem.y).shape == (problem.n,)


# ------------------------------------------------------------------------------------------------ files, summary


@few_of_each
def test_save_and_load(case: Case, kind: tuple[str, str], tmp_path: Path) -> None:
    structure, damping = kind
    problem, posterior = fitted_once(case, structure, split=True, damping=damping, prior_precision=1.7)
    posterior.n_data = 12.5
    posterior.prior_precision = 0.6
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    fresh = case.make()
    with torch.no_grad():
        for parameter in (p for p in fresh.model.parameters() if p.requires_grad):
            parameter.add_(0.1)  # the file, not the model, knows the mean
    loaded = lk.LaplacePosterior.load(path, fresh.model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())
    assert list(loaded.mean) == list(posterior.mean)
    assert all(torch.equal(loaded.mean[name], value) for name, value in posterior.mean.items())
    assert float(loaded.n_data) == 12.5 and float(loaded.prior_precision) == 0.6
    one, two = posterior.sample(3, generator=rng(1)), loaded.sample(3, generator=rng(1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert float(loaded.log_evidence()) == pytest.approx(float(posterior.log_evidence()), rel=1e-12)
    if problem.y.ndim == 1:
        x = problem.x
        a, b = (p.predict(x, method="mc", samples=4, generator=rng(3)).log_prob(problem.y) for p in (posterior, loaded))
        close(b, a)
    loaded.n_data, loaded.prior_precision = problem.n, 1.7
    dense = truth(case).precision(structure, problem.n, constant(problem, 1.7), damping)
    close(loaded.precision.dense(), dense)


def test_save_accepts_strings_and_replaces_files(tmp_path: Path) -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    posterior = fitted(problem)
    path = str(tmp_path / "p.safetensors")
    posterior.save(path)
    posterior.n_data = 99.0
    posterior.save(path)
    assert float(lk.LaplacePosterior.load(path, problem.model).n_data) == 99.0
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    path = tmp_path / "p.safetensors"
    fitted(problem).save(path)
    return path, problem.model


def test_truncated_files_are_corrupt(saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(lk.errors.CorruptFile):
            lk.LaplacePosterior.load(path, model)


def test_flipped_bits_are_corrupt(saved: tuple[Path, nn.Module]) -> None:
    """Header, metadata and data: no single bit goes unnoticed."""
    path, model = saved
    content = path.read_bytes()
    release = content.index(b'"package"')  # who wrote the file is a part of it, too
    places = {0, 3, 8, 9, len(content) - 1, *range(11, len(content), max(1, len(content) // 40))}
    places |= {*range(release, release + 17)}
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 7)
        path.write_bytes(bytes(damaged))
        with pytest.raises(lk.errors.CorruptFile):
            lk.LaplacePosterior.load(path, model)
    path.write_bytes(content)
    lk.LaplacePosterior.load(path, model)


def test_foreign_files_are_corrupt(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    problem = BY_NAME["tanh-mlp-categorical"].make()
    foreign = tmp_path / "foreign.safetensors"
    save_file({name: p.detach() for name, p in problem.model.named_parameters()}, foreign)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    for path in (foreign, text):
        with pytest.raises(lk.errors.CorruptFile):
            lk.LaplacePosterior.load(path, problem.model)


def test_missing_files_and_other_models(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = saved
    with pytest.raises(FileNotFoundError):
        lk.LaplacePosterior.load(tmp_path / "nothing.safetensors", model)
    with pytest.raises((lk.errors.LaplaceKFError, ValueError)):
        lk.LaplacePosterior.load(path, build(lambda: mlp(3, 5, 3)))


def test_summary_names_every_block() -> None:
    for structure in ("full", "diag", "kron"):
        problem = BY_NAME["batchnorm1d"].make()
        text = str(fitted(problem, structure=structure).summary())
        assert text.strip()
        if structure != "full":
            for module in ("0", "1", "3"):
                assert module in text
    problem = BY_NAME["tuple-inputs"].make()
    text = str(fitted(problem, structure="kron").summary())
    assert all(name in text for name in ("left", "right", "head"))


# ------------------------------------------------------------------------------------------------ counting data


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x, self.y, strict=True))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_n_counts_what_was_seen(structure: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem, t = case.make(), truth(case)
    loader = torch.utils.data.DataLoader
    dropped = loader(torch.utils.data.TensorDataset(problem.x, problem.y), batch_size=2, drop_last=True)
    posterior = fitted(problem, dropped, structure=structure)
    assert float(posterior.n_data) == 4
    four = truth(Case("", lambda: problem.at(slice(0, 4))))
    close(posterior.precision.dense(), four.precision(structure, 4, constant(problem, 1.0)))
    posterior = fitted(problem, loader(Stream(problem.x, problem.y), batch_size=2), structure=structure)
    assert float(posterior.n_data) == 5
    close(posterior.precision.dense(), t.precision(structure, 5, constant(problem, 1.0)))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_passes_and_n_data(structure: str) -> None:
    """Several passes refine the mean; N stays that of one pass unless it is given."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem, t = case.make(), truth(case)
    posterior = lk.LaplacePosterior(problem.model, "categorical", structure=structure)
    posterior.fit(problem.uneven(), passes=3)
    assert float(posterior.n_data) == problem.n
    close(posterior.precision.dense(), t.precision(structure, problem.n, constant(problem, 1.0)))
    posterior.fit(problem.uneven(), n_data=1234.5)
    assert float(posterior.n_data) == 1234.5
    close(posterior.precision.dense(), t.precision(structure, 1234.5, constant(problem, 1.0)))

    class Augmented:
        """Another view of the data at every pass."""

        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            yield (problem.x * self.passes, problem.y)

    posterior.fit(Augmented(), passes=2)
    both = Problem(problem.model, torch.cat([problem.x, 2 * problem.x]), torch.cat([problem.y] * 2), CATEGORICAL)
    wanted = truth(Case("", lambda: both)).precision(structure, problem.n, constant(problem, 1.0))
    close(posterior.precision.dense(), wanted)


def test_sequences_count_as_one_example() -> None:
    problem = BY_NAME["sequence-outputs-ignored"].make()
    assert float(fitted(problem).n_data) == problem.n


def test_refit_replaces() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, [problem.batch(slice(0, 2))], structure="full")
    posterior.fit(problem.uneven())
    close(posterior.precision.dense(), truth(case).precision("full", problem.n, constant(problem, 1.0)))


def test_forward_argument() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["features"]), batch["answer"]

    data = [{"features": problem.x[:3], "answer": problem.y[:3]}, {"features": problem.x[3:], "answer": problem.y[3:]}]
    posterior = lk.LaplacePosterior(problem.model, "categorical", structure="full", forward=forward).fit(data)
    close(posterior.precision.dense(), truth(case).precision("full", problem.n, constant(problem, 1.0)))


# ------------------------------------------------------------------------------------------------ tuning


def _train(model: nn.Module, x: Tensor, y: Tensor, nll: Callable[[Tensor, Tensor], Tensor], decay: float) -> nn.Module:
    """Full-batch training, good enough for a mode."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        norm = sum((p**2).sum() for p in model.parameters())
        (nll(model(x), y) + 0.5 * decay * norm).backward()
        optimiser.step()
    for p in model.parameters():
        p.grad = None
    return model.eval()


@functools.cache
def _classification() -> tuple[Case, tuple[Tensor, Tensor]]:
    x = normal(60, 2, seed=70)
    noise = normal(60, 3, seed=71)
    y = (torch.stack([x[:, 0], x[:, 1], -x.sum(1)], 1) + 0.8 * noise).argmax(1)
    with torch.random.fork_rng(devices=[]):
        model = _train(build(lambda: mlp(2, 5, 3)), x[:30], y[:30], nn.functional.cross_entropy, 1e-3)
    problem = Problem(model, x[:30], y[:30], CATEGORICAL)
    return Case("tune-classification", lambda: problem), (x[30:], y[30:])


@functools.cache
def _regression_data() -> tuple[Case, tuple[Tensor, Tensor]]:
    x = 2 * normal(40, 1, seed=80)
    y = torch.sin(2 * x) + 0.3 * normal(40, 1, seed=81)
    likelihood = gaussian(0.3)
    with torch.random.fork_rng(devices=[]):
        model = _train(build(lambda: mlp(1, 6, 1)), x[:20], y[:20], lambda z, t: 5 * ((z - t) ** 2).mean(), 1e-3)
    problem = Problem(model, x[:20], y[:20], likelihood)
    return Case("tune-regression", lambda: problem), (x[20:], y[20:])


N_GRID = [6.0, 30.0, 300.0]
PRIOR_GRID = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e4]


def _mc_table(case: Case, structure: str, val: tuple[Tensor, Tensor], samples: int) -> dict[tuple[float, float], Any]:
    """(n, λ) -> (mean nll, standard error of the mean over validation points) with draws of the reference posterior."""
    problem, table = case.make(), {}
    for n in N_GRID:
        for lam in PRIOR_GRID:
            z = run_draws(problem.model, draw(case, structure, "exact", n, lam, samples, 5), val[0])
            if problem.likelihood is CATEGORICAL:
                densities = torch.softmax(z, -1)[:, torch.arange(len(val[1])), val[1]]
            else:
                densities = torch.distributions.Normal(z, 0.3).log_prob(val[1]).sum(-1).exp()
            mean = densities.mean(0)
            relative = densities.std(0) / mean  # per draw, of each validation point
            table[n, lam] = (float(-mean.log().mean()), float(relative.square().mean().sqrt()))
    return table


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("make", [_classification, _regression_data], ids=["classification", "regression"])
def test_tune_finds_the_grid_optimum(make: Callable[[], Any], structure: str) -> None:
    """Every candidate scored by itself: the table equals an independent recomputation and the best is its minimum."""
    case, val = make()
    problem = case.make()
    posterior = fitted(problem, structure=structure)
    samples = 150
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = posterior.tune(
            val, objective="nll", method="mc", n_data=N_GRID, prior_precision=PRIOR_GRID, samples=samples,
            generator=rng(9),
        )  # fmt: skip
    reference = _mc_table(case, structure, val, 800)  # five times as many draws: most of the error is that of the table
    rows = {(float(row["n_data"]), float(row["prior_precision"])): float(row["objective"]) for row in result.table}
    assert len(result.table) == len(rows) == len(N_GRID) * len(PRIOR_GRID)
    assert set(rows) == set(reference)
    for where, (value, spread) in reference.items():
        assert abs(rows[where] - value) < 0.01 + 4 * spread / samples**0.5, where
    lowest = min(result.table, key=lambda row: row["objective"])
    assert result.best == lowest
    chosen = float(result.best["n_data"]), float(result.best["prior_precision"])
    assert float(posterior.n_data) == chosen[0] and float(posterior.prior_precision) == chosen[1]
    best = min(value for value, _ in reference.values())
    assert reference[chosen][0] < best + 0.01 + 4 * reference[chosen][1] / samples**0.5
    values = [value for value, _ in reference.values()]
    assert max(values) - min(values) > 0.05  # the problem does distinguish the candidates
    close(
        posterior.precision.dense(),
        truth(case).precision(structure, chosen[0], constant(problem, chosen[1])),
    )


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_tune_with_the_linearized_predictive_is_exact(structure: str) -> None:
    """No Monte Carlo: N(f, J Λ⁻¹ Jᵀ + σ²) at every candidate."""
    case, val = _regression_data()
    problem, t = case.make(), truth(case)
    posterior = fitted(problem, structure=structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = posterior.tune(val, method="linearized", n_data=N_GRID, prior_precision=PRIOR_GRID)
    jac = oracles.jacobian(problem.model, val[0], len(val[0]))[:, 0]
    mean = torch.cat(oracles.outputs(problem.model, val[0], len(val[0])))[:, 0]
    scores = {}
    for row in result.table:
        n, lam = float(row["n_data"]), float(row["prior_precision"])
        inverse = torch.linalg.inv(t.precision(structure, n, constant(problem, lam)))
        variance = (jac @ inverse * jac).sum(1) + 0.09
        value = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(val[1][:, 0]).mean()
        assert float(row["objective"]) == pytest.approx(float(value), rel=1e-6)
        scores[n, lam] = float(value)
    assert (float(result.best["n_data"]), float(result.best["prior_precision"])) == min(scores, key=scores.__getitem__)


def test_tune_does_not_depend_on_the_order_of_the_grid() -> None:
    case, val = _classification()
    posterior = fitted(case.make())
    best = []
    for grid in (PRIOR_GRID, PRIOR_GRID[::-1], PRIOR_GRID[3:] + PRIOR_GRID[:3]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = posterior.tune(val, n_data=[30.0], prior_precision=grid, method="mc", samples=60, generator=rng(1))
        best.append(float(result.best["prior_precision"]))
    assert len(set(best)) == 1


def test_tune_reports_the_edge() -> None:
    """A grid with one value has no edge: that hyper-parameter was not searched."""
    case, val = _regression_data()
    posterior = fitted(case.make())
    grid = [1e-6, 1e-2, 1.0, 30.0, 1e3, 1e5, 1e9]
    options: dict[str, Any] = {"n_data": [20.0], "samples": 150}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = posterior.tune(val, prior_precision=grid, generator=rng(3), **options)
    assert not result.at_edge
    inner = grid.index(float(result.best["prior_precision"]))
    with pytest.warns(UserWarning, match="edge"):
        result = posterior.tune(val, prior_precision=grid[inner + 1 :], generator=rng(3), **options)
    assert result.at_edge
    assert float(result.best["prior_precision"]) == grid[inner + 1]


def _quiet(posterior: Any, *val: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior.tune(*val, **options)


def test_tune_by_evidence() -> None:
    """No validation data; the best candidate has the highest log evidence."""
    case, _ = _regression_data()
    problem, t = case.make(), truth(case)
    for structure, damping in STRUCTURES:
        posterior = fitted(problem, structure=structure, damping=damping)
        result = _quiet(posterior, objective="evidence", n_data=[20.0], prior_precision=PRIOR_GRID)
        values = {}
        for lam in PRIOR_GRID:
            prior = constant(problem, lam)
            precision = t.precision(structure, 20.0, prior, damping)
            values[lam] = oracles.log_evidence(precision, prior, t.theta, t.log_likelihood)
        assert float(result.best["prior_precision"]) == max(values, key=values.__getitem__)
        assert float(posterior.prior_precision) == max(values, key=values.__getitem__)


@pytest.mark.parametrize("make", [_classification, _regression_data], ids=["classification", "regression"])
def test_tune_without_grids_helps(make: Callable[[], Any]) -> None:
    case, val = make()
    posterior = fitted(case.make())

    def nll(**options: Any) -> float:
        return -float(posterior.predict(val[0], samples=400, generator=rng(2), **options).log_prob(val[1]).mean())

    before = [nll(), nll(method="mc"), nll(method="map")]
    result = _quiet(posterior, val, generator=rng(1))
    after = nll()  # by the method that was chosen, whichever it is
    assert after < before[2] + 1e-6
    assert after < min(before) + 0.05
    assert len(result.table) > 5


def test_tune_accepts_loaders() -> None:
    """The objective is a mean over examples, however they are batched."""
    case, val = _regression_data()
    posterior = fitted(case.make())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*val), batch_size=7)
    options: dict[str, Any] = {"n_data": [20.0], "prior_precision": [1.0, 30.0, 1e3, 1e9], "samples": 300}
    tables = [_quiet(posterior, data, generator=rng(2), **options).table for data in (val, loader, [val])]
    for table in tables[1:]:
        for one, two in zip(tables[0], table, strict=True):
            assert float(one["objective"]) == pytest.approx(float(two["objective"]), abs=0.1)
    exact = torch.cat(oracles.outputs(case.make().model, val[0], len(val[0])))
    nll = -torch.distributions.Normal(exact, 0.3).log_prob(val[1]).mean()
    for table in tables:  # λ = 1e9: no spread left, and no Monte Carlo error
        assert float(table[-1]["objective"]) == pytest.approx(float(nll), abs=1e-3)


def test_tune_is_reproducible_and_leaves_the_global_generator() -> None:
    case, val = _classification()
    posterior = fitted(case.make())
    before = torch.get_rng_state()
    options: dict[str, Any] = {"n_data": [30.0], "prior_precision": PRIOR_GRID, "method": "mc", "samples": 10}
    first = _quiet(posterior, val, generator=rng(4), **options).table
    second = _quiet(posterior, val, generator=rng(4), **options).table
    assert [row["objective"] for row in first] == [row["objective"] for row in second]
    other = _quiet(posterior, val, generator=rng(5), **options).table
    assert [row["objective"] for row in first] != [row["objective"] for row in other]
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ bad input

ANY = (lk.errors.LaplaceKFError, ValueError)


def _mlp_posterior(**options: Any) -> tuple[Any, Tensor, Tensor]:
    model = build(lambda: mlp(3, 4, 3))
    return lk.LaplacePosterior(model, "categorical", **options), normal(6, 3), labels(3, 6)


@pytest.mark.parametrize(
    "use",
    [
        lambda p, x, y: p.predict(x),
        lambda p, x, y: p.sample(2),
        lambda p, x, y: p.tune((x, y)),
        lambda p, x, y: p.penalty(),
        lambda p, x, y: p.log_evidence(),
        lambda p, x, y: p.precision,
        lambda p, x, y: p.mean,
        lambda p, x, y: p.functional_covariance(x),
        lambda p, x, y: p.summary(),
        lambda p, x, y: p.update([(x, y)]),
    ],
    ids=["predict", "sample", "tune", "penalty", "evidence", "precision", "mean", "covariance", "summary", "update"],
)
def test_before_fit(use: Callable[..., Any]) -> None:
    posterior, x, y = _mlp_posterior()
    with pytest.raises(lk.errors.NotFitted):
        use(posterior, x, y)


def test_saving_before_fit(tmp_path: Path) -> None:
    posterior, _, _ = _mlp_posterior()
    with pytest.raises(lk.errors.NotFitted):
        posterior.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_empty_loader() -> None:
    posterior, x, y = _mlp_posterior()
    for data in ([], iter([]), (x[:0], y[:0])):
        with pytest.raises(ANY):
            posterior.fit(data)
    with pytest.raises(lk.errors.NotFitted):
        posterior.predict(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_non_finite_data_name_the_batch(structure: str, bad: float) -> None:
    posterior, x, y = _mlp_posterior(structure=structure)
    x[5, 1] = bad
    with pytest.raises(lk.errors.NonFinite, match=r"\b2\b"):
        posterior.fit([(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])])
    with pytest.raises(lk.errors.NotFitted):
        posterior.predict(x)


def test_non_finite_targets_and_weights() -> None:
    model = build(lambda: mlp(3, 4, 2))
    posterior = lk.LaplacePosterior(model, "gaussian")
    y = normal(6, 2)
    y[3, 0] = float("inf")  # NaN is a missing target
    with pytest.raises(ANY):
        posterior.fit([(normal(6, 3), y)])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ANY):
        posterior.fit([(normal(6, 3), normal(6, 2))])


@pytest.mark.parametrize(
    ("likelihood", "outs", "targets", "shown"),
    [
        ("categorical", 3, torch.tensor([0, 1, 3, 2, 0, 1]), "3"),
        ("categorical", 3, torch.tensor([0, 1, -1, 2, 0, 1]), "-1"),
        ("bernoulli", 2, torch.full((6, 2), 1.5, dtype=torch.float64), "1.5"),
        ("bernoulli", 2, torch.full((6, 2), -0.5, dtype=torch.float64), "-0.5"),
        ("poisson", 2, torch.full((6, 2), -1.0, dtype=torch.float64), "-1"),
        ("gaussian", 2, normal(6), "6"),
        ("gaussian", 2, normal(6, 1), "1"),
        ("gaussian", 2, normal(5, 2), "5"),
        ("categorical", 3, labels(3, 6, 1), "6"),
        ("categorical", 3, labels(3, 5), "5"),
    ],
    ids=[
        "class-too-large",
        "negative-class",
        "probability-above-one",
        "negative-probability",
        "negative-count",
        "gaussian-targets-1d",
        "gaussian-targets-one-column",
        "gaussian-fewer-targets",
        "class-column",
        "fewer-labels",
    ],
)
def test_targets_that_do_not_fit(likelihood: str, outs: int, targets: Tensor, shown: str) -> None:
    model = build(lambda: mlp(3, 4, outs))
    for structure in ("kron", "full"):
        posterior = lk.LaplacePosterior(model, likelihood, structure=structure)
        with pytest.raises(ANY) as caught:
            posterior.fit([(normal(6, 3), targets)])
        assert shown in str(caught.value), str(caught.value)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
def test_one_output_never_broadcasts_against_flat_targets(likelihood: str) -> None:
    """Outputs (6, 1) with targets (6,): refused, or the same as targets (6, 1); never a (6, 6) table."""
    x, y = normal(6, 3), binary(6)
    results = []
    for targets in (y[:, None], y):
        posterior = lk.LaplacePosterior(build(lambda: mlp(3, 4, 1)), likelihood, structure="full")
        try:
            results.append(posterior.fit([(x, targets)]).log_evidence())
        except ANY:
            assert targets.ndim == 1
            return
    close(results[1], results[0])


def test_outputs_of_one_dimension() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, 0]

    for structure in ("kron", "diag", "full"):
        posterior = lk.LaplacePosterior(build(Flat), "gaussian", structure=structure)
        with pytest.raises(ANY, match=r"\(6,\)|1-D|one-dim"):
            posterior.fit([(normal(6, 3), normal(6))])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"structure": "krno"}, "kron"),
        ({"estimator": "exactt"}, "exact"),
        ({"damping": "factord"}, "factored"),
        ({"parameters": "last-layer"}, "last"),
        ({"parameters": ["nothing.*"]}, "nothing"),
        ({"prior_precision": {"nothing.*": 1.0}}, "nothing"),
    ],
    ids=lambda v: next(iter(v)) + "-" + str(next(iter(v.values()))) if isinstance(v, dict) else v,
)
def test_unknown_names(options: dict[str, Any], shown: str) -> None:
    def build_and_fit() -> None:
        posterior, x, y = _mlp_posterior(**options)
        posterior.fit([(x, y)])

    with pytest.raises(ANY) as caught:
        build_and_fit()
    assert shown in str(caught.value)
    if next(iter(options)) in {"structure", "estimator", "damping"}:
        assert isinstance(caught.value, lk.errors.UnknownName)


def test_unknown_likelihood_method_objective_and_space() -> None:
    with pytest.raises(lk.errors.UnknownName, match="categorical"):
        lk.LaplacePosterior(build(lambda: mlp(3, 4, 3)), "categorial")
    posterior, x, y = _mlp_posterior()
    posterior.fit([(x, y)])
    with pytest.raises(ANY, match="mc"):
        posterior.predict(x, method="monte carlo")
    with pytest.raises(ANY, match="weights"):
        posterior.predict(x, space="weight")
    with pytest.raises(ANY, match="nll"):
        posterior.tune((x, y), objective="loss")


def test_activation_space_of_a_structure_that_has_none() -> None:
    posterior, x, y = _mlp_posterior(structure="full")
    posterior.fit([(x, y)])
    with pytest.raises(lk.errors.IncompatiblePair):
        posterior.predict(x, space="activations")


def test_everything_frozen() -> None:
    model = build(lambda: mlp(3, 4, 3)).requires_grad_(False)
    with pytest.raises(ANY):
        lk.LaplacePosterior(model, "categorical").fit([(normal(6, 3), labels(3, 6))])


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_hyperparameters(value: float) -> None:
    def build_and_fit() -> None:
        posterior, x, y = _mlp_posterior(prior_precision=value)
        posterior.fit([(x, y)]).precision.logdet()

    with pytest.raises(ANY):
        build_and_fit()
    posterior, x, y = _mlp_posterior()
    posterior.fit([(x, y)])
    dense = posterior.precision.dense()
    for attribute in ("prior_precision", "n_data"):
        with pytest.raises(ANY):
            setattr(posterior, attribute, value)
        assert torch.equal(posterior.precision.dense(), dense)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_singular_without_a_prior(structure: str) -> None:
    """λ = 0 with a dead unit: a typed error that says what to do."""
    posterior, x, y = _mlp_posterior(structure=structure)
    posterior.fit([(x[:1] * 0, y[:1])])

    def solve() -> None:
        posterior.prior_precision = 0.0
        posterior.precision.solve(torch.ones(31, dtype=torch.float64))

    with pytest.raises((lk.errors.NotPositiveDefinite, ValueError)):
        solve()


def test_a_failing_fit_leaves_the_posterior() -> None:
    """A loader that raises half-way, NaN in the last batch, a bad target: the earlier fit stays."""
    posterior, x, y = _mlp_posterior(structure="full")
    posterior.fit([(x, y)])
    dense, mean = posterior.precision.dense(), {k: v.clone() for k, v in posterior.mean.items()}

    def halfway() -> Iterator[Any]:
        yield (x[:2], y[:2])
        raise RuntimeError("disk")

    broken = x.clone()
    broken[5] = float("nan")
    for data, error in (
        (halfway(), RuntimeError),
        ([(x[:3], y[:3]), (broken[3:], y[3:])], lk.errors.NonFinite),
        ([(x[:3], y[:3]), (x[3:], y[3:] + 7)], ValueError),
        ([(x[:3], y[:3]), (x[3:, :2], y[3:])], Exception),
        ([], ValueError),
    ):
        with pytest.raises(error):
            posterior.fit(data)
        assert torch.equal(posterior.precision.dense(), dense)
        assert float(posterior.n_data) == 6
        assert all(torch.equal(posterior.mean[k], v) for k, v in mean.items())


def test_a_failing_tune_leaves_the_hyperparameters() -> None:
    posterior, x, y = _mlp_posterior()
    posterior.fit([(x, y)])

    def halfway() -> Iterator[Any]:
        yield (x[:2], y[:2])
        raise RuntimeError("disk")

    for bad in (halfway(), [(x, y + 7)], []):
        with pytest.raises((RuntimeError, *ANY)):
            posterior.tune(bad, n_data=[6.0, 60.0], prior_precision=[0.1, 1.0], method="mc", samples=3)
        assert float(posterior.n_data) == 6 and float(posterior.prior_precision) == 1.0
    with pytest.raises(ANY):
        posterior.tune((x, y), n_data=[6.0], prior_precision=[1.0, -3.0], method="mc", samples=3)
    assert float(posterior.prior_precision) == 1.0


def test_a_failing_save_leaves_the_file(tmp_path: Path) -> None:
    posterior, x, y = _mlp_posterior()
    posterior.fit([(x, y)])
    with pytest.raises(OSError, match="no such folder"):
        posterior.save(tmp_path / "no such folder" / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrong_vector_lengths() -> None:
    posterior, x, y = _mlp_posterior()
    posterior.fit([(x, y)])
    wrong = torch.zeros(7, dtype=torch.float64)
    for method in ("matvec", "solve"):
        with pytest.raises(ANY):
            getattr(posterior.precision, method)(wrong)
    with pytest.raises(ANY):
        posterior.precision.quadratic(wrong[:, None])
    with pytest.raises(ANY):
        posterior.sample(-1)
