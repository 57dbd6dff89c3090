"""The surrogate beside a Gaussian process with the kernel of dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NotFitted, ShapeMismatch

pytest.importorskip("botorch")

from botorch.acquisition import qKnowledgeGradient, qLogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.optim import optimize_acqf

from laplace_kf.bridges.botorch import LaplaceModel

SCALE = 0.3


def network(outputs: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def fitted(outputs: int = 1, structure: str = "full") -> lk.LaplacePosterior:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(12, 2, generator=rng, dtype=torch.float64)
    y = torch.sin(3 * x.sum(1, keepdim=True)).expand(-1, outputs).contiguous()
    return lk.LaplacePosterior(
        network(outputs), lk.likelihoods.Gaussian(SCALE), structure=structure, prior_precision=0.7
    ).fit((x, y))


def dense(posterior: lk.LaplacePosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(N, m)`` and the joint covariance ``(N·m, N·m)``, from dense Jacobians."""
    model = posterior.model
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(weights)
    j = torch.cat([rows[name].flatten(2) for name in weights], -1).flatten(0, 1)
    return model(x).detach(), j @ torch.linalg.inv(posterior.precision.dense()) @ j.T


def points(*shape: int) -> Tensor:
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("shape", [(4,), (3, 1), (2, 3, 2)], ids=str)
def test_joint_distributions_are_those_of_dense_jacobians(structure: str, outputs: int, shape: tuple[int, ...]) -> None:
    posterior = fitted(outputs, structure)
    x = points(*shape)
    found = LaplaceModel(posterior).posterior(x)
    assert found.mean.shape == (*shape, outputs)
    q = shape[-1]
    means, covariances = zip(*(dense(posterior, part) for part in x.reshape(-1, q, 2)), strict=True)
    torch.testing.assert_close(found.mean.reshape(-1, q, outputs), torch.stack(means))
    covariance = found.distribution.covariance_matrix.reshape(-1, q * outputs, q * outputs)
    torch.testing.assert_close(covariance, torch.stack(covariances))
    noisy = LaplaceModel(posterior).posterior(x, observation_noise=True)
    torch.testing.assert_close(noisy.variance, found.variance + SCALE**2)


def test_large_batches_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x = fitted(2), points(5, 2)
    whole = LaplaceModel(posterior).posterior(x).distribution.covariance_matrix
    monkeypatch.setattr("laplace_kf.bridges.botorch.JOINT", 8)  # two groups at once
    torch.testing.assert_close(LaplaceModel(posterior).posterior(x).distribution.covariance_matrix, whole)


def test_outputs_are_chosen_and_transformed() -> None:
    posterior, x = fitted(3), points(4)
    mean, covariance = dense(posterior, x)
    some = LaplaceModel(posterior).posterior(x, output_indices=[2, 0])
    torch.testing.assert_close(some.mean, mean[:, [2, 0]])
    torch.testing.assert_close(some.variance, covariance.diagonal().reshape(4, 3)[:, [2, 0]])
    weights = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    moved = LaplaceModel(posterior).posterior(x, posterior_transform=ScalarizedPosteriorTransform(weights))
    torch.testing.assert_close(moved.mean.squeeze(-1), mean @ weights)


@pytest.mark.parametrize("outputs", [1, 2])
def test_observations_condition_exactly(outputs: int) -> None:
    posterior, x, seen = fitted(outputs), points(3), points(5) + 0.5
    y = torch.randn(5, outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, covariance = dense(posterior, torch.cat([seen, x]))
    n = 5 * outputs
    gain = covariance[n:, :n] @ torch.linalg.inv(covariance[:n, :n] + SCALE**2 * torch.eye(n, dtype=torch.float64))
    wanted = mean[5:].flatten() + gain @ (y - mean[:5]).flatten()
    left = covariance[n:, n:] - gain @ covariance[:n, n:]
    surrogate = LaplaceModel(posterior)
    at_once = surrogate.condition_on_observations(seen, y)
    in_turn = surrogate.condition_on_observations(seen[:2], y[:2]).condition_on_observations(seen[2:], y[2:])
    for conditioned in (at_once, in_turn):
        found = conditioned.posterior(x)
        torch.testing.assert_close(found.mean.flatten(), wanted)
        torch.testing.assert_close(found.distribution.covariance_matrix, left)
    torch.testing.assert_close(surrogate.posterior(x).mean, mean[5:])  # it stays
    if outputs == 1:  # what a fit with the same points as further data has as its precision
        again = posterior.update((seen, y))
        torch.testing.assert_close(again.functional_covariance(x, joint=True), left)


def test_gradients_are_finite_differences() -> None:
    surrogate = LaplaceModel(fitted(2)).condition_on_observations(points(2), torch.ones(2, 2, dtype=torch.float64))

    def value(x: Tensor) -> Tensor:
        found = surrogate.posterior(x)
        return torch.cat([found.mean.flatten(), found.distribution.covariance_matrix.flatten()])

    assert torch.autograd.gradcheck(value, points(2, 2).requires_grad_(), atol=1e-6)


def test_acquisition_functions_are_optimised() -> None:
    posterior = fitted()
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    settings = {"bounds": bounds, "num_restarts": 2, "raw_samples": 8, "options": {"maxiter": 5}}
    surrogate = LaplaceModel(posterior)
    improvement = qLogExpectedImprovement(surrogate, best_f=0.5)
    candidates, value = optimize_acqf(improvement, q=2, **settings)
    assert candidates.shape == (2, 2) and candidates.ge(0).all() and candidates.le(1).all()
    tried = improvement(points(64, 2))
    assert value >= tried.median()
    knowledge = qKnowledgeGradient(surrogate, num_fantasies=2)
    found, _ = optimize_acqf(knowledge, q=1, **settings)
    assert found.shape == (1, 2)


@pytest.mark.parametrize("outputs", [1, 2])
def test_points_that_coincide_have_draws(outputs: int) -> None:
    """An optimiser of two points moves them onto each other: their joint covariance is singular, and no failure."""
    posterior, x = fitted(outputs), points(1).expand(3, 2).clone().requires_grad_()
    found = LaplaceModel(posterior).posterior(x)
    drawn = found.rsample(torch.Size([2000]))
    drawn.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    torch.testing.assert_close(drawn[:, 0], drawn[:, 2], atol=1e-3, rtol=0)
    variance = drawn.detach()[:, 0].var(0)
    torch.testing.assert_close(variance, found.variance[0].detach(), rtol=0.2, atol=0)


def test_paths_are_functions() -> None:
    posterior, x = fitted(2), points(3, 2)
    path = LaplaceModel(posterior).paths(2000, torch.Generator().manual_seed(0))
    drawn = path(x)
    assert drawn.shape == (2000, 3, 2, 2)
    torch.testing.assert_close(drawn[:, 1:2], path(x[1:2]))  # the same functions at other points
    mean, covariance = dense(posterior, x.reshape(-1, 2))
    empirical = drawn.flatten(1).T.cov()
    error = (empirical - covariance).abs() / covariance.diagonal().outer(covariance.diagonal()).sqrt()
    assert error.max() < 5 * (2 / 2000) ** 0.5
    torch.testing.assert_close(drawn.mean(0).flatten(), mean.flatten(), atol=0.1, rtol=0)


def test_refusals_name_the_way_out() -> None:
    model = network(2)
    labels = torch.zeros(6, dtype=torch.long)
    with pytest.raises(NotFitted):
        LaplaceModel(lk.LaplacePosterior(model, "gaussian"))
    classifier = lk.LaplacePosterior(model, "categorical").fit((points(6), labels))
    with pytest.raises(IncompatiblePair, match=r"LaplaceModel\(posterior, num_outputs=1\)"):
        LaplaceModel(classifier)
    logits = LaplaceModel(classifier, num_outputs=2)
    assert logits.posterior(points(3)).mean.shape == (3, 2)
    with pytest.raises(IncompatiblePair, match="tensor of variances"):
        logits.posterior(points(3), observation_noise=True)
    with pytest.raises(ShapeMismatch, match="num_outputs"):
        LaplaceModel(classifier, num_outputs=1).posterior(points(3))
    surrogate = LaplaceModel(fitted(2))
    with pytest.raises(ShapeMismatch, match="observations are"):
        surrogate.condition_on_observations(points(3), torch.zeros(3, 1, dtype=torch.float64))
    conditioned = surrogate.condition_on_observations(points(3), torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(IncompatiblePair, match="rsample"):
        conditioned.paths(3)
