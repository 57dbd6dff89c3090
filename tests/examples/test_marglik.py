"""The marginal-likelihood example: its gradients, and that evidence finds the noise."""

import json
import math

import pytest
import torch

import laplace_kf as lk
from examples import marglik


@pytest.fixture(scope="module")
def learned():
    return marglik.train(marglik.data(150, 0), epochs=1200, seed=0)


def test_gradients_are_those_of_the_log_evidence(learned):
    """Against central differences of ``log_evidence`` itself."""
    posterior = learned.posterior
    values = {name.removesuffix(".*"): value for name, value in posterior.prior_precision.items()}
    log_noise = torch.tensor(math.log(posterior.likelihood.scale), dtype=torch.float64)
    slopes, slope = marglik.evidence_gradient(posterior, log_noise)

    def evidence(logs, noise):
        posterior.prior_precision = {f"{name}.*": math.exp(value) for name, value in logs.items()}
        posterior.likelihood.scale = math.exp(noise)
        return float(posterior.log_evidence())

    logs, noise, step = {name: math.log(value) for name, value in values.items()}, float(log_noise), 1e-4
    for name in values:
        up, down = ({**logs, name: logs[name] + sign * step} for sign in (1, -1))
        assert slopes[name] == pytest.approx((evidence(up, noise) - evidence(down, noise)) / (2 * step), abs=1e-5)
    assert slope == pytest.approx((evidence(logs, noise + step) - evidence(logs, noise - step)) / (2 * step), abs=1e-4)
    evidence(logs, noise)


def test_evidence_rises_and_finds_the_noise(learned):
    """It ends where a step in any direction would no longer pay, above where it began."""
    slopes, slope = marglik.evidence_gradient(learned.posterior, torch.tensor(math.log(learned.noise[-1])).double())
    assert max(map(abs, [slope, *slopes.values()])) < 1.0
    assert learned.log_evidence[-1] > learned.log_evidence[0]
    assert learned.noise[-1] == pytest.approx(marglik.NOISE, rel=0.35)
    assert all(1e-3 < value < 1e2 for value in learned.prior_precision[-1].values())


def test_linearized_prediction_is_exact_for_a_linear_model():
    """``x (XᵀX/σ² + λ)⁻¹ xᵀ`` of Bayesian linear regression."""
    x, y = marglik.data(20, 3)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1)).double()
    likelihood = lk.likelihoods.Gaussian(scale=0.5)
    posterior = lk.LaplacePosterior(model, likelihood, structure="full", prior_precision=2.0).fit((x, y))
    mean, variance = marglik.linearized(posterior, x)
    design = torch.cat([x, torch.ones_like(x)], 1)
    precision = design.T @ design / 0.25 + 2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(variance, (design @ torch.linalg.inv(precision) * design).sum(1))
    torch.testing.assert_close(mean, model(x)[:, 0].detach())


def test_run_writes_its_numbers_and_picture(tmp_path):
    state = torch.get_rng_state()
    found = marglik.run(tmp_path, count=20, epochs=20, grid=(0.1, 1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marglik.json", "marglik.png"]
    assert json.loads((tmp_path / "marglik.json").read_text()) == found
    assert set(found["test_nll"]["fixed"]) == {"0.1", "1"}
