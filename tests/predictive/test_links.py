"""From normal outputs to predictions: closed forms against quadrature by many independent draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import BY_NAME, CASES, build, labels, mlp, normal, rng
from tests.fits import fitted_once

DRAWS = 400_000


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert float((actual - expected).abs().max()) <= tolerance


def normal_outputs(n: int, c: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Means ``(N, C)`` and covariances ``(N, C, C)``."""
    root = normal(n, c, c, seed=2) * spread
    return 1.5 * normal(n, c, seed=1), root @ root.transpose(1, 2) / c


def predict(likelihood: Any, mean: Tensor, covariance: Tensor, link: str | None = None, **options: Any) -> Any:
    variance = covariance.diagonal(dim1=1, dim2=2)
    options.setdefault("generator", rng(0))
    return likelihood.predict_gaussian(mean, variance, covariance[:, None], link, **options)


def reference(mean: Tensor, covariance: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``E[function(f)]`` over independent draws of the outputs."""
    noise = torch.randn(DRAWS, mean.shape[1], generator=rng(7), dtype=torch.float64)
    return torch.stack(
        [function(m + noise @ torch.linalg.cholesky(v).T).mean(0) for m, v in zip(mean, covariance, strict=True)]
    )


def test_categorical_draws() -> None:
    mean, covariance = normal_outputs(4, 3)
    expected = reference(mean, covariance, lambda f: f.softmax(-1))
    found = predict(lk.likelihoods.Categorical(), mean, covariance, samples=200_000)
    close(found.probs, expected, 5e-3)
    assert (found.mutual_information > 0).all()
    few = predict(lk.likelihoods.Categorical(), mean, covariance, samples=100, keep_samples=True)
    assert few.samples.shape == (100, 4, 3)
    close(few.samples.mean(0), mean, 1e-12)  # antithetic
    close(few.samples.softmax(-1).mean(0), few.probs, 1e-12)
    again = predict(lk.likelihoods.Categorical(), mean[1:2], covariance[1:2], samples=100)
    close(again.probs, few.probs[1:2], 1e-12)  # not a matter of the examples around it


def test_categorical_probit_is_its_formula() -> None:
    mean, covariance = normal_outputs(4, 3)
    found = predict(lk.likelihoods.Categorical(), mean, covariance, "probit")
    variance = torch.stack([v.diagonal() for v in covariance])
    close(found.probs, (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1), 1e-14)
    assert (found.mutual_information > 0).all()  # from draws, see test_functions
    y = torch.tensor([0, 1, 2, -100])
    close(found.log_prob(y)[:3], found.probs[:3].gather(1, y[:3, None]).log()[:, 0], 1e-12)


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Dirichlet concentrations of one example by the formulas of the paper, with plain conditional normals."""
    k = len(mean)
    one = torch.ones(k, dtype=torch.float64)
    gain = covariance @ one / (one @ covariance @ one)
    mu = mean - gain * (one @ mean)
    sigma = covariance - torch.outer(gain, one @ covariance)
    c = sigma.trace() / k / math.sqrt(k / 2)
    mu, sigma = mu / math.sqrt(c), sigma / c
    return torch.stack(
        [(1 - 2 / k + mu[i].exp() / k**2 * sum((-mu[j]).exp() for j in range(k))) / sigma[i, i] for i in range(k)]
    )


def test_categorical_bridge_is_its_formula() -> None:
    mean, covariance = normal_outputs(5, 4)
    found = predict(lk.likelihoods.Categorical(), mean, covariance, "bridge")
    alpha = torch.stack([bridge(m, v) for m, v in zip(mean, covariance, strict=True)])
    close(found.probs, alpha / alpha.sum(-1, keepdim=True), 1e-12)
    members = torch.distributions.Dirichlet(alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = members.sample((100_000,))
    inner = -(p * p.clamp_min(1e-300).log()).sum(-1).mean(0)
    total = -(found.probs * found.probs.log()).sum(-1)
    close(found.mutual_information, total - inner, 5e-3)
    extreme = predict(
        lk.likelihoods.Categorical(), 1e4 * mean, torch.eye(4, dtype=torch.float64).expand(5, 4, 4), "bridge"
    )
    assert torch.isfinite(extreme.probs).all()
    assert (extreme.probs.gather(1, mean.argmax(1, keepdim=True)) > 0.9).all()
    assert torch.isfinite(extreme.mutual_information).all()


def test_bernoulli() -> None:
    mean, covariance = normal_outputs(4, 3)
    expected = reference(mean, covariance, torch.sigmoid)
    likelihood = lk.likelihoods.Bernoulli()
    close(predict(likelihood, mean, covariance, samples=200_000).probs, expected, 5e-3)
    probit = predict(likelihood, mean, covariance, "probit").probs
    variance = torch.stack([v.diagonal() for v in covariance])
    close(probit, torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt()), 1e-14)
    close(probit, expected, 0.02)  # the approximation itself is good
    assert all(link.marginal for link in likelihood.links().values())


def test_gaussian_is_exact_and_joint() -> None:
    mean, covariance = normal_outputs(4, 3)
    found = predict(lk.likelihoods.Gaussian(scale=0.5), mean, covariance)
    whole = covariance + 0.25 * torch.eye(3, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(mean, whole)
    y = normal(4, 3, seed=9)
    close(found.log_prob(y), exact.log_prob(y), 1e-10)
    close(found.mean, mean, 0)
    variance = torch.stack([v.diagonal() for v in covariance])
    close(found.epistemic_variance, variance, 1e-14)
    close(found.variance, variance + 0.25, 1e-14)
    close(found.entropy, exact.entropy(), 1e-10)
    noise = torch.distributions.Normal(torch.zeros(3).double(), 0.5).entropy().sum()
    close(found.mutual_information, exact.entropy() - noise, 1e-10)
    close(found.distribution.log_prob(y), exact.log_prob(y), 1e-10)
    marginal = predict(lk.likelihoods.Gaussian(scale=0.5), mean, covariance, "probit")
    independent = torch.distributions.Normal(mean, (variance + 0.25).sqrt())
    close(marginal.log_prob(y), independent.log_prob(y).sum(1), 1e-10)
    close(marginal.entropy, independent.entropy().sum(1), 1e-10)
    close(marginal.distribution.log_prob(y), independent.log_prob(y).sum(1), 1e-10)


def test_gaussian_leaves_out_ignored_outputs() -> None:
    mean, covariance = normal_outputs(2, 3)
    found = predict(lk.likelihoods.Gaussian(scale=0.5, ignore_index=-100), mean, covariance)
    y = normal(2, 3, seed=9)
    y[0, 1] = -100
    keep = torch.tensor([0, 2])
    whole = covariance + 0.25 * torch.eye(3, dtype=torch.float64)
    part = torch.distributions.MultivariateNormal(mean[0, keep], whole[0][keep][:, keep])
    full = torch.distributions.MultivariateNormal(mean[1], whole[1])
    close(found.log_prob(y), torch.stack([part.log_prob(y[0, keep]), full.log_prob(y[1])]), 1e-10)


def test_heteroscedastic_moments() -> None:
    mean, covariance = normal_outputs(3, 2, 0.5)
    likelihood = lk.likelihoods.HeteroscedasticGaussian()
    found = predict(likelihood, mean, covariance)
    noise = reference(mean, covariance, lambda f: f[:, 1:].exp())
    close(found.mean, mean[:, :1], 0)
    close(found.epistemic_variance, covariance[:, :1, 0], 1e-14)
    assert float((found.variance / (covariance[:, :1, 0] + noise) - 1).abs().max()) < 0.02
    y = normal(3, 1, seed=4)
    exact = torch.distributions.Normal(found.mean, found.variance.sqrt())
    close(found.log_prob(y), exact.log_prob(y)[:, 0], 1e-10)
    drawn = predict(likelihood, mean, covariance, "mc", samples=100_000)
    assert float((drawn.variance / found.variance - 1).abs().max()) < 0.02


def test_poisson_moments() -> None:
    mean, covariance = normal_outputs(3, 2, 0.4)
    found = predict(lk.likelihoods.Poisson(), mean, covariance, samples=50_000)
    rate = reference(mean, covariance, torch.exp)
    square = reference(mean, covariance, lambda f: (2 * f).exp())
    assert float((found.mean / rate - 1).abs().max()) < 0.02
    assert float((found.epistemic_variance / (square - rate**2) - 1).abs().max()) < 0.05
    close(found.variance, found.mean + found.epistemic_variance, 1e-12)
    y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    exact = reference(
        mean,
        covariance,
        lambda f: torch.stack([(row * f - f.exp() - torch.lgamma(row + 1)).sum(1).exp() for row in y], 1),
    )
    close(found.log_prob(y), exact.diagonal().log(), 0.02)


def test_other_likelihoods_draw() -> None:
    mean, covariance = normal_outputs(3, 3)
    mixture = lk.likelihoods.BernoulliMixture()
    gate = reference(
        mean,
        covariance,
        lambda f: f[:, :1].sigmoid() * f[:, 1:2].sigmoid() + (-f[:, :1]).sigmoid() * f[:, 2:].sigmoid(),
    )
    close(predict(mixture, mean, covariance, samples=100_000).probs, gate, 5e-3)
    own = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Categorical(logits=z))
    expected = reference(mean, covariance, lambda f: f.softmax(-1))
    close(predict(own, mean, covariance, samples=100_000).probs, expected, 5e-3)


def test_singular_covariances() -> None:
    """Rank one, and none at all: the draws still have the covariance."""
    mean = normal(2, 3, seed=1)
    direction = normal(3, seed=2)
    covariance = torch.stack([torch.outer(direction, direction), torch.zeros(3, 3, dtype=torch.float64)])
    found = predict(lk.likelihoods.Categorical(), mean, covariance, samples=20_000, keep_samples=True)
    spread = found.samples - mean
    close(torch.einsum("snc,snk->nck", spread, spread) / 20_000, covariance, 0.1)
    close(found.probs[1], mean[1].softmax(-1), 1e-12)


def test_names() -> None:
    mean, covariance = normal_outputs(2, 3)
    with pytest.raises(lk.errors.UnknownName, match="probit"):
        predict(lk.likelihoods.Categorical(), mean, covariance, "probt")
    with pytest.raises(ValueError, match="samples"):
        predict(lk.likelihoods.Categorical(), mean, covariance, samples=0)


# ------------------------------------------------------------------------------------------------ through a posterior


def test_predict_through_the_posterior() -> None:
    """Every method is the likelihood's link applied to the functional covariance."""
    model = build(lambda: mlp(3, 5, 4))
    x = normal(7, 3)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, labels(4, 7)))
    covariance = posterior.functional_covariance(x)
    with torch.no_grad():
        mean = model(x)
    for link in (None, "mc", "bridge", "probit"):
        found = posterior.predict(x, method="linearized", link=link, samples=50, generator=rng(3))
        seed = int(torch.randint(2**62, (1,), generator=rng(3)))
        expected = predict(lk.likelihoods.Categorical(), mean, covariance, link, samples=50, generator=rng(seed))
        close(found.probs, expected.probs, 1e-10)
    close(posterior.predict(x, method="probit").probs, found.probs, 1e-12)
    draws = posterior.predict(x, method="linearized", samples=6, keep_samples=True).samples
    assert draws.shape == (6, 7, 4)
    with pytest.raises(lk.errors.IncompatiblePair, match="link"):
        posterior.predict(x, method="mc", link="probit")
    with pytest.raises(lk.errors.IncompatiblePair, match="link"):
        posterior.predict(x, method="probit", link="bridge")
    with pytest.raises(lk.errors.UnknownName, match="linearized"):
        posterior.predict(x, method="linearised")


def test_probit_of_a_likelihood_without_one() -> None:
    model = build(lambda: mlp(2, 3, 3))
    posterior = lk.LaplacePosterior(model, lk.likelihoods.BernoulliMixture()).fit((normal(5, 2), labels(2, 5)))
    with pytest.raises(lk.errors.IncompatiblePair, match="'mc'"):
        posterior.predict(normal(5, 2), method="probit")
    assert posterior.predict(normal(5, 2), method="linearized", samples=4).probs.shape == (5, 1)


@pytest.mark.share(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_predicts(case: Any) -> None:
    """Outputs ``(N, C)``, sequences and images, every likelihood: shapes as of Monte Carlo, log densities finite."""
    problem, posterior = fitted_once(case, "kron", split=False)
    sampled = posterior.predict(problem.x, method="mc", samples=3)
    shapes = {name: value.shape for name, value in sampled.values.items()}
    for link in (None, "mc", "probit"):
        if link is not None and link not in posterior.likelihood.links():
            with pytest.raises(lk.errors.UnknownName):
                posterior.predict(problem.x, method="linearized", link=link)
            continue
        found = posterior.predict(problem.x, method="linearized", link=link, samples=3)
        assert {name: value.shape for name, value in found.values.items()} == shapes, link
        assert torch.isfinite(found.log_prob(problem.y)).all(), link
        assert found.entropy.shape == sampled.entropy.shape, link


def _classifies_positions(case: Any) -> bool:
    problem = case.make()
    outputs = oracles.outputs(problem.model, problem.x, 1)[0]
    return outputs.dim() > 2 and problem.likelihood.name in ("categorical", "bernoulli")


@pytest.mark.parametrize("name", [case.name for case in CASES if _classifies_positions(case)])
def test_positions_have_their_own_covariance(name: str) -> None:
    """Sequences and images: probit with the variances of each position."""
    problem = BY_NAME[name].make()
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood.build(lk)).fit([problem.batch()])
    jacobian = oracles.jacobian(problem.model, problem.x, problem.n, problem.names)
    variance = torch.einsum("ncp,ncp->nc", jacobian @ torch.linalg.inv(posterior.precision.dense()), jacobian)
    outputs = torch.cat(oracles.outputs(problem.model, problem.x, problem.n))
    scaled = outputs / (1 + math.pi / 8 * variance.reshape(outputs.shape)).sqrt()
    probs = posterior.predict(problem.x, method="probit").probs
    if isinstance(posterior.likelihood, lk.likelihoods.Categorical):
        expected = scaled.softmax(1 if outputs.dim() == 4 else -1)
    else:
        expected = scaled.sigmoid()
    close(probs, expected, 1e-9)
    blocks = posterior.predict(problem.x, method="linearized", samples=4000, keep_samples=True, generator=rng(1))
    spread = blocks.samples.var(0, correction=0)
    assert float((spread / variance.reshape(outputs.shape) - 1).abs().max()) < 0.1


def test_regression_with_several_outputs_is_exact() -> None:
    """A linear model: the linearised predictive is Bayesian regression, joint over two outputs."""
    x = normal(9, 2)
    y = normal(9, 2, seed=1)
    design = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    exact = [oracles.linear_regression(design, y[:, c], 0.6, 1.4) for c in range(2)]
    model = build(lambda: nn.Linear(2, 2))
    with torch.no_grad():
        model.weight.copy_(torch.stack([e.mean[:2] for e in exact]))
        model.bias.copy_(torch.stack([e.mean[2] for e in exact]))
    posterior = lk.LaplacePosterior(model, lk.likelihoods.Gaussian(scale=0.6), structure="full", prior_precision=1.4)
    posterior.fit((x, y))
    new, targets = normal(5, 2, seed=3), normal(5, 2, seed=4)
    rows = torch.cat([new, torch.ones(5, 1, dtype=torch.float64)], 1)
    found = posterior.predict(new, method="linearized")
    expected = torch.zeros(5, dtype=torch.float64)
    for c, single in enumerate(exact):
        mean, variance = single.predict(rows)
        expected += torch.distributions.Normal(mean, (variance + 0.36).sqrt()).log_prob(targets[:, c])
    close(found.log_prob(targets), expected, 1e-9)
