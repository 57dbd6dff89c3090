"""The bridge to Pyro: densities and draws against closed forms, and that nothing of the user's is touched."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value
from torch import nn

import laplace_kf as lk
from laplace_kf.bridges import pyro as bridge
from tests import oracles
from tests.cases import rng
from tests.fresh import said

NLL = {
    "categorical": oracles.categorical_nll,
    "bernoulli": oracles.bernoulli_nll,
    "gaussian": oracles.gaussian_nll(1.0),
    "poisson": oracles.poisson_nll,
}


def network(seed=0, outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, outputs)).double()


def problem(name, n=7):
    x = torch.randn(n, 2, generator=rng(), dtype=torch.float64)
    targets = {
        "categorical": torch.randint(3, (n,), generator=rng()),
        "bernoulli": torch.randint(2, (n, 3), generator=rng()).double(),
        "gaussian": torch.randn(n, 3, generator=rng(), dtype=torch.float64),
        "poisson": torch.randint(4, (n, 3), generator=rng()).double(),
    }
    return x, targets[name]


def draw(model, seed=1):
    generator = rng(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


def log_prior(values, precision):
    """``Σ log N(θ; 0, 1/λ)``, one entry at a time."""
    total = 0.0
    for name, value in values.items():
        lam = precision[name] if isinstance(precision, dict) else precision
        for entry in value.reshape(-1).tolist():
            total += 0.5 * math.log(lam / (2 * math.pi)) - 0.5 * lam * entry**2
    return total


def log_likelihood(model, values, x, y, nll):
    model = copy.deepcopy(model).eval()
    model.load_state_dict({**model.state_dict(), **values})
    return -sum(float(nll(model(x[i : i + 1]), y[i : i + 1])) for i in range(len(y)))


def traced(lifted, values, *arguments):
    trace = poutine.trace(poutine.condition(lifted, values)).get_trace(*arguments)
    return trace, float(trace.log_prob_sum())


@pytest.fixture(autouse=True)
def clean():
    """Pyro's global state is the same after every test as before, without any tidying by the bridge's users."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("name", NLL)
def test_log_joint_is_prior_plus_likelihood(name):
    model, (x, y) = network(), problem(name)
    values = draw(model)
    precision = {"0.weight": 0.5, "0.bias": 2.0, "3.weight": 2.0, "3.bias": 2.0}
    lifted = bridge.lift(model, name, {"0.weight": 0.5, "*": 2.0})
    expected = log_prior(values, precision) + log_likelihood(model, values, x, y, NLL[name])
    trace, total = traced(lifted, values, x, y)
    assert total == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert float(lifted.log_joint(values, x, y)) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert [n for n, site in trace.nodes.items() if site["type"] == "sample"] == [*precision, "obs"]


def test_unselected_parameters_are_fixed():
    model, (x, y) = network(), problem("categorical")
    values = {n: v for n, v in draw(model).items() if n.startswith("3.")}
    rest = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("0.")}
    for parameters in (["3.*"], "last_layer"):
        lifted = bridge.lift(model, "categorical", 0.7, parameters)
        expected = log_prior(values, 0.7) + log_likelihood(model, {**rest, **values}, x, y, NLL["categorical"])
        trace, total = traced(lifted, values, x, y)
        assert total == pytest.approx(expected, abs=1e-10)
        assert {n for n, site in trace.nodes.items() if site["type"] == "sample"} == {"3.weight", "3.bias", "obs"}


def test_minibatches_count_as_the_whole_data_set():
    model, (x, y) = network(), problem("categorical")
    values = draw(model)
    lifted = bridge.lift(model, "categorical", 1.0, n_data=70.0)
    expected = log_prior(values, 1.0) + 10 * log_likelihood(model, values, x, y, NLL["categorical"])
    assert traced(lifted, values, x, y)[1] == pytest.approx(expected, rel=1e-10)
    assert float(lifted.log_joint(values, x, y)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("structure", ["kron", "full", "diag"])
def test_a_posterior_is_a_prior(structure):
    """Chained inference: the density is the posterior's Gaussian, off-diagonal terms included."""
    model, (x, y) = network(), problem("categorical")
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit((x, y))
    values = draw(model)
    flat = torch.cat([values[n].reshape(-1) for n in values])
    mean = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    gaussian = torch.distributions.MultivariateNormal(mean, precision_matrix=posterior.precision.dense())
    expected = float(gaussian.log_prob(flat)) + log_likelihood(model, values, x, y, NLL["categorical"])
    lifted = bridge.lift(model, "categorical", prior=posterior)
    assert traced(lifted, values, x, y)[1] == pytest.approx(expected, rel=1e-10)
    assert float(lifted.log_joint(values, x, y)) == pytest.approx(expected, rel=1e-10)
    prior_draws = Predictive(lifted, num_samples=3)(x)
    assert prior_draws["0.weight"].shape == (3, 4, 2) and prior_draws["obs"].shape == (3, 7)


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_guide_draws_have_the_posteriors_moments(structure):
    model, (x, y) = network(outputs=2), problem("categorical", 30)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=2.0).fit((x, y % 2))
    lifted, guide = bridge.lift(model, "categorical"), bridge.guide(posterior)
    count = 250
    pyro.set_rng_seed(0)
    names = [n for n, _ in model.named_parameters()]
    found = Predictive(lifted, guide=guide, num_samples=count, return_sites=[*names, "obs", "_RETURN"])(x)
    assert found["obs"].shape == (count, 30) and found["_RETURN"].shape == (count, 30, 2)
    flat = torch.cat([found[n].reshape(count, -1) for n in names], 1)
    covariance = torch.linalg.inv(posterior.precision.dense())
    mean = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    deviation = covariance.diagonal().sqrt()
    assert ((flat.mean(0) - mean).abs() < 5 * deviation / math.sqrt(count)).all()
    # the standard error of a covariance is at most √2 times the product of the deviations over √S
    error = (torch.cov(flat.T) - covariance).abs() / torch.outer(deviation, deviation)
    assert error.max() < 5 * math.sqrt(2 / count)
    weights = {n: found[n][17] for n in names}
    expected = torch.func.functional_call(copy.deepcopy(model).eval(), weights, (x,))
    torch.testing.assert_close(found["_RETURN"][17], expected)
    pyro.set_rng_seed(0)
    again = Predictive(lifted, guide=guide, num_samples=2, return_sites=names)(x)
    assert torch.equal(again["0.weight"], found["0.weight"][:2])


def test_guide_density_is_the_posteriors():
    model, (x, y) = network(), problem("categorical")
    posterior = lk.LaplacePosterior(model, "categorical", structure="kron").fit((x, y))
    trace = poutine.trace(bridge.guide(posterior)).get_trace(x, y)
    flat = torch.cat([trace.nodes[n]["value"].reshape(-1) for n, _ in model.named_parameters()])
    mean = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    truth = torch.distributions.MultivariateNormal(mean, precision_matrix=posterior.precision.dense()).log_prob(flat)
    assert float(trace.log_prob_sum()) == pytest.approx(float(truth), rel=1e-9)
    # and so an evidence lower bound can be taken of it
    lifted, guide = bridge.lift(model, "categorical"), bridge.guide(posterior)
    assert math.isfinite(Trace_ELBO(num_particles=2).loss(lifted, guide, x, y))


def linear_problem():
    x = torch.randn(25, 2, generator=rng(3), dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-0.5]], dtype=torch.float64) + 0.3
    y = y + 0.5 * torch.randn(25, 1, generator=rng(4), dtype=torch.float64)
    truth = oracles.linear_regression(torch.cat([x, torch.ones(25, 1).double()], 1), y[:, 0], 0.5, 2.0)
    return x, y, truth, nn.Linear(2, 1).double(), lk.likelihoods.Gaussian(scale=0.5)


NUTS_DRAWS = 150


@pytest.mark.nightly
@pytest.mark.slow
def test_nuts_on_a_linear_model_has_the_closed_form():
    x, y, truth, model, likelihood = linear_problem()
    lifted = bridge.lift(model, likelihood, 2.0)
    start = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    pyro.set_rng_seed(1)
    kernel = NUTS(lifted, init_strategy=init_to_value(values=start), max_tree_depth=3)
    chain = MCMC(kernel, num_samples=NUTS_DRAWS, warmup_steps=50, disable_progbar=True)
    chain.run(x, y)
    draws = chain.get_samples()
    flat = torch.cat([draws["weight"].reshape(NUTS_DRAWS, -1), draws["bias"]], 1)
    effective = torch.stack([pyro.ops.stats.effective_sample_size(flat[None, :, k], 0, 1) for k in range(3)])
    covariance = torch.linalg.inv(truth.precision)
    deviation = covariance.diagonal().sqrt()
    assert effective.min() > 50
    assert ((flat.mean(0) - truth.mean).abs() < 4.5 * deviation / effective.sqrt()).all()
    assert ((flat.std(0) / deviation - 1).abs() < 4.5 / (2 * effective).sqrt()).all()


@pytest.mark.nightly
def test_mean_field_fit_of_a_linear_model():
    """The best factorised Gaussian has the posterior's mean, and the diagonal of its precision."""
    x, y, truth, model, likelihood = linear_problem()
    lifted = bridge.lift(model, likelihood, 2.0)
    pyro.set_rng_seed(0)
    guide = AutoDiagonalNormal(lifted, init_scale=0.1)
    inference = SVI(lifted, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), Trace_ELBO(num_particles=2))
    for _ in range(200):
        inference.step(x, y)
    torch.testing.assert_close(guide.loc.detach(), truth.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(guide.scale.detach(), truth.precision.diagonal().rsqrt(), atol=0, rtol=0.2)
    assert Predictive(lifted, guide=guide, num_samples=5)(x)["obs"].shape == (5, 25, 1)


def test_nothing_is_touched():
    model, (x, y) = network().train(), problem("categorical")
    model.register_buffer("calls", torch.zeros(1))
    before = copy.deepcopy(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    precision = posterior.precision.dense()
    pyro.param("mine", torch.ones(1))
    state = torch.get_rng_state()
    lifted, guide = bridge.lift(model, "categorical", parameters="last_layer"), bridge.guide(posterior)
    values = {n: v for n, v in draw(model).items() if n.startswith("3.")}
    lifted.log_joint(values, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    Predictive(bridge.lift(model, "categorical"), guide=guide, num_samples=2)(x)
    assert list(pyro.get_param_store()) == ["mine"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(posterior.precision.dense(), precision)


def test_later_training_does_not_reach_the_lifted_model():
    model, (x, y) = network(), problem("categorical")
    lifted = bridge.lift(model, "categorical", parameters=["3.*"])
    values = {n: v for n, v in draw(model).items() if n.startswith("3.")}
    before = float(lifted.log_joint(values, x, y))
    with torch.no_grad():
        model[0].weight.mul_(3)
    assert float(lifted.log_joint(values, x, y)) == before


def test_mapping_batches_and_forward():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return {"logits": self.inner(x)}

    model, (x, y) = Named(), problem("categorical")
    values = draw(model)
    expected = bridge.lift(model.inner, "categorical").log_joint({n[6:]: v for n, v in values.items()}, x, y)
    batch = {"x": x, "labels": y}
    assert torch.equal(bridge.lift(model, "categorical").log_joint(values, batch), expected)
    lifted = bridge.lift(model, "categorical", forward=lambda m, b: (m(b["x"])["logits"], b["labels"]))
    assert torch.equal(lifted.log_joint(values, batch), expected)


def test_refusals():
    model, (x, y) = network(), problem("categorical")
    posterior = lk.LaplacePosterior(model, "categorical", parameters=["3.*"])
    with pytest.raises(lk.errors.NotFitted):
        bridge.guide(posterior)
    with pytest.raises(lk.errors.NotFitted):
        bridge.lift(model, "categorical", prior=posterior)
    posterior.fit((x, y))
    with pytest.raises(lk.errors.ShapeMismatch, match="same ones"):
        bridge.lift(model, "categorical", parameters="all", prior=posterior)
    with pytest.raises(lk.errors.UnknownName):
        bridge.lift(model, "categorical", parameters=["4.*"])
    with pytest.raises(ValueError, match="improper"):
        bridge.lift(model, "categorical", 0.0)
    with pytest.raises(ValueError, match="n_data"):
        bridge.lift(model, "categorical", n_data=-1.0)
    with pytest.raises(TypeError, match="Module"):
        bridge.lift(lambda v: v, "categorical")
    lifted = bridge.lift(model, "categorical")
    with pytest.raises(lk.errors.IncompatiblePair, match="targets"):
        lifted.log_joint(draw(model), x)
    with pytest.raises(lk.errors.ShapeMismatch, match="parallel=False"):
        lifted.log_joint({n: v[None] for n, v in draw(model).items()}, x, y)


def test_pyro_is_imported_only_when_asked_for_and_a_missing_one_is_named():
    assert said("pyro") == ["False"]
    assert "laplace_kf[pyro]" in said("without pyro")[0]
    assert said("pyro when asked for") == ["True"]
    with pytest.raises(AttributeError, match="numpyro"):
        lk.bridges.numpyro  # noqa: B018
