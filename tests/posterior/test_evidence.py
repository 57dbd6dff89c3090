"""The evidence in its terms: closed forms, derivatives, and its maximum."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.operators import KroneckerBlock, quadrature
from laplace_kf.operators.quadrature import nodes_of_products
from tests import oracles
from tests.cases import rng

STRUCTURES = [("kron", "exact"), ("kron", "factored"), ("kron", "balanced"), ("diag", "exact"), ("full", "exact")]
over_structures = pytest.mark.parametrize(("structure", "damping"), STRUCTURES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def network(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for k, (one, two) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(one, two).double(), nn.Tanh()]
        with torch.no_grad():
            layers[-2].weight.copy_(0.5 * normal(two, one, seed=50 + k))
            layers[-2].bias.copy_(0.5 * normal(two, seed=60 + k))
    return nn.Sequential(*layers[:-1])


def fitted(structure: str = "kron", damping: str = "exact", likelihood: Any = None, **options: Any) -> Any:
    likelihood = lk.likelihoods.Gaussian(scale=0.8) if likelihood is None else likelihood
    x, y = normal(7, 3), normal(7, 2, seed=1)
    posterior = lk.LaplacePosterior(network(3, 4, 2), likelihood, structure=structure, damping=damping, **options)
    return posterior.fit((x, y))


def quiet(posterior: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior.tune(*args, **options)


# ------------------------------------------------------------------------------------------------ sums over spectra


@pytest.mark.parametrize("c", [1e-9, 1e-3, 1.0, 1e5, 1e12])
def test_nodes_stand_for_the_whole_spectrum(c: float) -> None:
    """Spectra over 30 decades with zeros, two groups: sums over nodes equal sums over all products."""
    a = 10 ** (15 * torch.rand(2, 90, generator=rng(0), dtype=torch.float64) - 12)
    g = 10 ** (15 * torch.rand(2, 70, generator=rng(1), dtype=torch.float64) - 12)
    a[0, :9] = 0
    products = a[:, :, None] * g[:, None, :]
    nodes, weights = nodes_of_products(a, g)
    assert len(nodes) < products.numel() / 10
    exact = (c * products).log1p().sum()
    assert float((weights * (c * nodes).log1p()).sum()) == pytest.approx(float(exact), rel=1e-12)
    exact = (c * products / (1 + c * products)).sum()
    assert float((weights * c * nodes / (1 + c * nodes)).sum()) == pytest.approx(float(exact), rel=1e-11)
    long = products.reshape(1, -1)
    nodes, weights = nodes_of_products(long)
    assert float((weights * (c * nodes).log1p()).sum()) == pytest.approx(float((c * long).log1p().sum()), rel=1e-12)


def test_nodes_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 10 ** (15 * torch.rand(2, 9000, generator=rng(2), dtype=torch.float64) - 12)
    values[0, :9] = 0
    nodes, weights = nodes_of_products(values)
    monkeypatch.setattr(quadrature, "CHUNK", 1000)
    again, added = nodes_of_products(values)
    assert torch.equal(again, nodes) and torch.allclose(added, weights, rtol=1e-12, atol=1e-9)


def test_nodes_of_nothing_but_zeros() -> None:
    for size in (3, 100):
        nodes, weights = nodes_of_products(torch.zeros(1, size), torch.zeros(1, size))
        assert float((weights * nodes.log1p()).sum()) == 0.0


# ------------------------------------------------------------------------------------------------ values


@over_structures
def test_terms_of_the_evidence(structure: str, damping: str) -> None:
    posterior = fitted(structure, damping, prior_precision=1.7)
    posterior.n_data = 11.0
    found = posterior.evidence()
    theta = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
    x, y = normal(7, 3), normal(7, 2, seed=1)
    log_lik = torch.distributions.Normal(posterior.model(x), 0.8).log_prob(y).sum().detach()
    precision = posterior.precision.dense()
    assert float(found.fit) == pytest.approx(float(log_lik) * 11 / 7, rel=1e-10)
    ratio = torch.logdet(precision) - len(theta) * math.log(1.7)
    assert float(found.log_det_ratio) == pytest.approx(float(ratio), rel=1e-9)
    assert float(found.scatter) == pytest.approx(1.7 * float(theta @ theta), rel=1e-10)
    assert float(found.total) == pytest.approx(float(posterior.log_evidence()), rel=1e-12)
    assert all(term.ndim == 0 for term in (found.fit, found.log_det_ratio, found.scatter, found.total))
    assert "log_det_ratio" in str(found)
    other = posterior.evidence(3.0, 0.2)
    posterior.n_data, posterior.prior_precision = 3.0, 0.2
    assert float(other.total) == pytest.approx(float(posterior.log_evidence()), rel=1e-12)


def test_evidence_of_linear_regression_is_the_marginal_density() -> None:
    x, y = normal(9, 2), normal(9, seed=1)
    exact = oracles.linear_regression(torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1), y, 0.6, 1.4)
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(exact.mean[None, :2])
        model.bias.copy_(exact.mean[2:])
    posterior = lk.LaplacePosterior(model, lk.likelihoods.Gaussian(scale=0.6), "full", prior_precision=1.4)
    assert float(posterior.fit((x, y[:, None])).evidence().total) == pytest.approx(exact.log_evidence, rel=1e-10)


@over_structures
def test_a_prior_for_every_parameter(structure: str, damping: str) -> None:
    """Weight and bias of a layer apart, for structures that can: equal to the dense determinant."""
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    values = {name: 0.3 * 2.0**k for k, name in enumerate(names)}
    posterior = fitted(structure, damping)
    if damping != "exact":
        posterior.prior_precision = values
        with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
            posterior.evidence()
        return
    posterior.prior_precision = values
    prior = torch.cat(
        [torch.full((posterior.mean[name].numel(),), values[name], dtype=torch.float64) for name in names]
    )
    theta = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
    x, y = normal(7, 3), normal(7, 2, seed=1)
    log_lik = float(torch.distributions.Normal(posterior.model(x), 0.8).log_prob(y).sum().detach())
    wanted = oracles.log_evidence(posterior.precision.dense(), prior, theta, log_lik)
    assert float(posterior.log_evidence()) == pytest.approx(wanted, rel=1e-9)


def test_large_blocks_use_nodes_and_agree() -> None:
    """A block with more eigenvalues than are summed directly."""
    x, y = normal(40, 90), normal(40, 70, seed=1)
    model = network(90, 70)
    posterior = lk.LaplacePosterior(model, "gaussian", prior_precision=0.6).fit((x, y))
    (_, matrix) = posterior.curvature.entries[0]
    assert isinstance(matrix, KroneckerBlock)
    assert len(matrix.nodes()[0]) < matrix.size
    wanted = (40 * matrix.spectrum() / 0.6).log1p().sum()
    assert float(posterior.evidence().log_det_ratio) == pytest.approx(float(wanted), rel=1e-11)


def test_no_decomposition_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a value is a sum: neither an eigenbasis nor a grid of the block's size is made again."""
    posterior = fitted()
    posterior.log_evidence()
    for name in ("eigh", "cholesky_ex", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: pytest.fail("decomposed again"))
    monkeypatch.setattr(KroneckerBlock, "spectrum", lambda self: pytest.fail("made the grid again"))
    for value in (0.1, 1.0, 10.0):
        posterior.prior_precision = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(posterior.log_evidence(), posterior.prior_precision)


# ------------------------------------------------------------------------------------------------ derivatives


@over_structures
def test_gradcheck(structure: str, damping: str) -> None:
    """λ, one λ a layer, and the noise scale; first and second derivatives."""

    def shared(lam: Tensor, scale: Tensor) -> Tensor:
        posterior.prior_precision = lam
        posterior.likelihood = lk.likelihoods.Gaussian(scale=scale)
        return posterior.log_evidence()

    def by_layer(one: Tensor, two: Tensor) -> Tensor:
        posterior.prior_precision = {"0.*": one, "*": two}
        return posterior.log_evidence()

    posterior = fitted(structure, damping)
    lam, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.7))
    assert torch.autograd.gradcheck(shared, (lam, scale))
    assert torch.autograd.gradgradcheck(shared, (lam, scale))
    posterior = fitted(structure, damping)
    assert torch.autograd.gradcheck(by_layer, (lam, scale)) or structure == "full"


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_gradcheck_of_weight_and_bias_apart(structure: str) -> None:
    """Two variables stay two even where their values are equal."""

    def value(weight: Tensor, bias: Tensor) -> Tensor:
        posterior.prior_precision = {"*.weight": weight, "*.bias": bias}
        return posterior.log_evidence()

    posterior = fitted(structure)
    for one, two in ((1.3, 0.4), (0.9, 0.9)):
        given = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (one, two)]
        assert torch.autograd.gradcheck(value, given)


def test_tensor_priors_by_name_can_be_saved(tmp_path: Any) -> None:
    posterior = fitted()
    posterior.prior_precision = {"0.*": torch.tensor(2.0, requires_grad=True), "*": 3.0}
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", posterior.model)
    assert loaded.prior_precision == {"0.*": 2.0, "*": 3.0}
    assert "2.*" in repr(loaded.summary()) or loaded.summary()


# ------------------------------------------------------------------------------------------------ its maximum


@over_structures
def test_tuning_by_evidence_finds_the_maximum(structure: str, damping: str) -> None:
    """Every step goes up, the end is stationary, and a fine grid has nothing better."""
    posterior = fitted(structure, damping)
    result = quiet(posterior, objective="evidence")
    objectives = [row["objective"] for row in result.table]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(objectives))
    assert result.best is result.table[-1] and len(objectives) > 1
    lam = float(posterior.prior_precision)
    assert lam == result.best["prior_precision"] and posterior.n_data == 7
    best = float(posterior.log_evidence())
    assert best == pytest.approx(-result.best["objective"], rel=1e-12)
    for factor in (0.01, 0.5, 0.99, 1.01, 2.0, 100.0):
        assert float(posterior.evidence(7.0, lam * factor).total) < best
    if damping == "exact":  # MacKay: λ is the effective number of parameters over ‖θ‖²
        theta = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
        dense = posterior.precision.dense()
        effective = len(theta) - lam * float(torch.linalg.inv(dense).trace())
        assert lam == pytest.approx(effective / float(theta @ theta), rel=1e-5)


@pytest.mark.parametrize(("structure", "blocks"), [("kron", 2), ("diag", 2)])
def test_one_lambda_for_each_block(structure: str, blocks: int) -> None:
    posterior = fitted(structure)
    quiet(posterior, objective="evidence")
    shared = float(posterior.log_evidence())
    result = quiet(posterior, objective="evidence", per_block=True)
    objectives = [row["objective"] for row in result.table]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(objectives))
    prior = posterior.prior_precision
    assert set(prior) == set(posterior.mean) and len(set(prior.values())) >= blocks
    best = float(posterior.log_evidence())
    assert best == pytest.approx(-result.best["objective"], rel=1e-12) and best > shared
    for layer in ("0", "2"):
        for factor in (0.8, 1.25):
            moved = {name: value * factor if name.startswith(layer) else value for name, value in prior.items()}
            assert float(posterior.evidence(prior_precision=moved).total) < best
    assert posterior.predict(normal(2, 3), method="mc", samples=2, generator=rng(0)).mean.shape == (2, 2)


def test_noise_and_prior_by_evidence() -> None:
    """Linear regression: the maximum of the exact marginal density over both, found on a grid around it."""
    likelihood = lk.likelihoods.Gaussian(scale=1.0)
    posterior = fitted("full", likelihood=likelihood)
    result = quiet(posterior, objective="evidence")
    sigma, lam, best = result.best["noise"], result.best["prior_precision"], -result.best["objective"]
    assert posterior.likelihood.scale == sigma and likelihood.scale == 1.0
    assert float(posterior.log_evidence()) == pytest.approx(best, rel=1e-10)
    for a in (0.97, 1.0, 1.03):
        for b in (0.97, 1.0, 1.03):
            posterior.likelihood = lk.likelihoods.Gaussian(scale=sigma * a)
            assert float(posterior.evidence(prior_precision=lam * b).total) <= best + 1e-9
    fixed = fitted("full", likelihood=lk.likelihoods.Gaussian(scale=1.0))
    assert "noise" not in quiet(fixed, objective="evidence", noise=False).best
    assert fixed.likelihood.scale == 1.0


def test_options_that_do_not_go_together() -> None:
    posterior = fitted()
    x, y = normal(4, 3), normal(4, 2)
    with pytest.raises(lk.errors.IncompatiblePair, match="per_block"):
        posterior.tune((x, y), per_block=True)
    with pytest.raises(lk.errors.IncompatiblePair, match="grids"):
        posterior.tune(objective="evidence", prior_precision=[1.0, 2.0], noise=True)
    classifier = lk.LaplacePosterior(network(3, 2), "categorical").fit((x, torch.tensor([0, 1, 0, 1])))
    with pytest.raises(lk.errors.IncompatiblePair, match="noise"):
        classifier.tune(objective="evidence", noise=True)


def test_one_lambda_takes_one_sum_over_the_nodes_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("kron")
    apart = posterior.evidence(prior_precision={"*": 0.7}).total  # block by block
    monkeypatch.setattr(KroneckerBlock, "log_det_ratio", lambda *args: pytest.fail("a block on its own"))
    torch.testing.assert_close(posterior.evidence(prior_precision=0.7).total, apart, rtol=1e-12, atol=1e-12)
    posterior.likelihood = lk.likelihoods.Gaussian(scale=0.4)
    again = posterior.evidence(prior_precision=0.7).total
    assert not torch.allclose(again, apart), "the noise of now"
    monkeypatch.undo()
    torch.testing.assert_close(posterior.evidence(prior_precision={"*": 0.7}).total, again, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(fitted("kron", "factored").evidence(prior_precision=0.7).total), (
        "no such sum for this damping"
    )


def chained() -> Any:
    first = fitted("kron", prior_precision=0.9)
    return first.update((normal(5, 3, seed=4), normal(5, 2, seed=5)))


@pytest.mark.parametrize("make", [*(lambda s=s, d=d: fitted(s, d) for s, d in STRUCTURES), chained])
def test_slope_without_a_graph_is_the_derivative(make: Any) -> None:
    """One λ and λ by patterns; N and the noise of now, those at the time of the call."""
    posterior = make()
    for step in range(2):
        prior = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(posterior.evidence(9.0, prior).total, prior)
        assert abs(float(wanted)) > 1e-3
        for given in (1.3, prior):
            with torch.inference_mode():
                evidence = posterior.evidence(9.0, given)
                found = evidence.slope
            assert found.shape == () and not found.requires_grad and found.dtype == torch.float64
            assert float(found) == pytest.approx(float(wanted), rel=1e-10)
            assert float(found) == pytest.approx(float(wanted), rel=1e-10)
        late = posterior.evidence(9.0, prior)
        with torch.no_grad():
            prior.mul_(5)
        if step == 0:
            posterior.likelihood = lk.likelihoods.Gaussian(scale=torch.tensor(0.5, dtype=torch.float64))
        assert float(late.slope) == pytest.approx(float(wanted), rel=1e-10), "at the λ and noise it was asked at"


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_slope_by_patterns(structure: str) -> None:
    posterior = fitted(structure)
    leaves = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in (("0.*", 1.3), ("*", 0.2))}
    wanted = torch.autograd.grad(posterior.evidence(prior_precision=leaves).total, list(leaves.values()))
    found = posterior.evidence(prior_precision={"0.*": 1.3, "*": 0.2}).slope
    assert list(found) == list(leaves)
    torch.testing.assert_close(list(found.values()), list(wanted), rtol=1e-10, atol=1e-12)


def test_slope_of_one_prior_is_a_sum_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("kron")
    posterior.likelihood = lk.likelihoods.Gaussian(scale=0.4)
    slow = sum(posterior.evidence(prior_precision={"0.*": 0.7, "*": 0.7}).slope.values())
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a backward pass"))
    torch.testing.assert_close(posterior.evidence(prior_precision=0.7).slope, slow, rtol=1e-11, atol=1e-12)
