"""Missing targets, a noise scale for every output, and known noise for every example."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch
from laplace_kf.likelihoods import Gaussian, HeteroscedasticGaussian, Likelihood, to_positions
from tests.checks import close
from tests.likelihoods.test_targets import dense_ggn, network, randn, rng

F64 = torch.float64


# ----------------------------------------------------------------------------------------------------- missing values


@pytest.mark.parametrize("shape", [(5, 2), (3, 4, 2), (2, 2, 2, 3)])
@pytest.mark.parametrize("likelihood", [Gaussian(0.7), Gaussian([0.5, 1.5]), HeteroscedasticGaussian()], ids=repr)
def test_missing_targets_contribute_nothing(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    outputs = randn(*shape)
    y = likelihood.sample(outputs, rng())
    hole = torch.rand(y.shape, generator=rng(1)) < 0.4
    hole.view(-1)[0], hole.view(-1)[-1] = True, False
    missing = y.masked_fill(hole, math.nan)
    other = type(likelihood)(ignore_index=-100) if isinstance(likelihood, HeteroscedasticGaussian) else None
    other = Gaussian(likelihood.scale, ignore_index=-100) if isinstance(likelihood, Gaussian) else other
    assert other is not None
    marked = y.masked_fill(hole, -100.0)
    for method in (
        "log_prob",
        "score",
        "hessian",
        "curvature",
        "hessian_root",
        "summed_curvature",
        "counted_positions",
    ):
        found, wanted = getattr(likelihood, method)(outputs, missing), getattr(other, method)(outputs, marked)
        close(found.double(), wanted.double())
        assert bool(torch.isfinite(found).all())
    assert likelihood.terms(missing) == float((~hole).sum())
    sampled = torch.stack([outputs, outputs + 0.3])
    close(likelihood.predict(sampled).log_prob(missing), other.predict(sampled).log_prob(marked))
    variance = torch.full_like(outputs, 0.2)
    covariance = torch.diag_embed(to_positions(variance)) + 0.05
    for link in likelihood.links():
        pair = [
            rule.predict_gaussian(outputs, variance, covariance, link, 6, rng()).log_prob(t)
            for rule, t in ((likelihood, missing), (other, marked))
        ]
        close(*pair)
    assert torch.equal(likelihood.predict(sampled).kept(missing), ~hole)


def regression(n: int = 8) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model with two outputs, data, and the same with some targets missing, one example's both."""
    model, x = network(2), randn(n, 2)
    y = randn(n, 2, seed=1)
    missing = y.clone()
    missing[0], missing[2, 1], missing[5, 0] = math.nan, math.nan, math.nan
    return model, x, y, missing


@pytest.mark.parametrize("estimator", ["exact", "projection", "importance", "sampled", "empirical"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac"])
def test_missing_targets_in_fit(structure: str, estimator: str) -> None:
    model, x, _, missing = regression()
    marked = torch.nan_to_num(missing, nan=-100.0)

    def fitted(y: Tensor, likelihood: Likelihood) -> Any:
        return lk.LaplacePosterior(model, likelihood, structure, estimator).fit([(x, y)], generator=rng())

    one, other = fitted(missing, Gaussian(0.7)), fitted(marked, Gaussian(0.7, ignore_index=-100))
    close(one.precision.dense(), other.precision.dense())
    assert one.n_data == other.n_data == 7
    close(one.log_evidence(), other.log_evidence())
    if structure == "full" and estimator == "exact":
        blocks = torch.diag_embed((~missing.isnan()).to(F64)) / 0.49
        close(one.curvature.dense(), dense_ggn(model, x, blocks) * 8 / 7)
        with torch.no_grad():
            elements = td.Normal(model(x), 0.7).log_prob(torch.nan_to_num(missing))
        wanted = elements.where(~missing.isnan(), 0.0).sum()
        close(one.evidence().fit.detach().double(), wanted)
        one.likelihood = Gaussian(0.9)  # the evidence follows the noise with the counts of what is there
        with torch.no_grad():
            elements = td.Normal(model(x), 0.9).log_prob(torch.nan_to_num(missing))
        close(one.evidence().fit.detach().double(), elements.where(~missing.isnan(), 0.0).sum())


def test_missing_targets_in_tune_and_optimisers() -> None:
    model, x, _, missing = regression()
    posterior = lk.LaplacePosterior(model, "gaussian", "kron").fit((x, missing))
    result = posterior.tune((x, missing), samples=4, generator=rng())
    assert math.isfinite(result.best["objective"])
    for optimiser in (lk.optim.GaussNewton, lk.optim.HessianFree):
        made = optimiser(network(2), "gaussian")
        kept = ~missing.isnan()
        with torch.no_grad():
            elements = -td.Normal(network(2)(x), 1.0).log_prob(torch.nan_to_num(missing))
        close(made.step(x, missing), elements.where(kept, 0.0).sum() / 7)
        assert math.isfinite(float(made.step(x, missing)))


def test_what_nan_does_not_mean() -> None:
    model, x, y, missing = regression()
    with pytest.raises(NonFinite, match="batch 0"):
        lk.LaplacePosterior(model, "gaussian").fit([(x.masked_fill(x > 0, math.nan), missing)])
    with pytest.raises(NonFinite, match="inf"):
        lk.LaplacePosterior(model, "gaussian").fit([(x, y.masked_fill(y > 0, math.inf))])
    with pytest.raises(NonFinite):
        lk.LaplacePosterior(model, "bernoulli").fit([(x, torch.full((8, 2), math.nan, dtype=F64))])
    with pytest.raises(ShapeMismatch, match="ignored"):
        lk.LaplacePosterior(model, "gaussian").fit([(x, torch.full((8, 2), math.nan, dtype=F64))])
    forward = lambda m, batch: (m(batch["x"]), batch["y"])  # noqa: E731
    one = lk.LaplacePosterior(model, "gaussian", forward=forward).fit([{"x": x, "y": missing}])
    close(one.precision.dense(), lk.LaplacePosterior(model, "gaussian").fit([(x, missing)]).precision.dense())
    with pytest.raises(NonFinite):
        lk.LaplacePosterior(model, "gaussian", forward=forward).fit([{"x": x.masked_fill(x > 0, math.nan), "y": y}])


# ------------------------------------------------------------------------------------------------------- noise scales


def test_one_noise_scale_per_output() -> None:
    model, x, y, _ = regression()
    scale = torch.tensor([0.5, 1.5], dtype=F64)
    likelihood = Gaussian(scale)
    with torch.no_grad():
        outputs = model(x)
    close(likelihood.log_prob(outputs, y), td.Normal(outputs, scale).log_prob(y).sum(1))
    expected = dense_ggn(model, x, torch.diag(scale**-2).expand(8, 2, 2))
    posterior = lk.LaplacePosterior(model, likelihood, "full").fit((x, y))
    close(posterior.curvature.dense(), expected)
    prediction = posterior.predict(x, method="linearized")
    covariance = posterior.functional_covariance(x) + torch.diag(scale**2)
    close(prediction.variance, covariance.diagonal(dim1=1, dim2=2))
    close(prediction.log_prob(y), td.MultivariateNormal(outputs, covariance).log_prob(y))
    close(posterior.predict(x, method="map").variance, (scale**2).expand(8, 2))
    draws = likelihood.sample(torch.zeros(20_000, 2, dtype=F64), rng())
    torch.testing.assert_close(draws.std(0), scale, rtol=0.03, atol=0)


def test_scales_per_output_are_saved_and_moved_by_one_factor(tmp_path: Any) -> None:
    model, x, y, missing = regression()
    scale = torch.tensor([0.5, 1.5], dtype=F64)
    posterior = lk.LaplacePosterior(model, Gaussian(scale), "full").fit((x, missing))
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    close(torch.as_tensor(again.likelihood.scale), scale)  # type: ignore[attr-defined]
    for one in (posterior, again):
        one.likelihood = Gaussian(1.7 * scale)
        fresh = lk.LaplacePosterior(model, Gaussian(1.7 * scale), "full").fit((x, missing))
        close(one.precision.dense(), fresh.precision.dense())
        close(one.log_evidence().detach(), fresh.log_evidence().detach())
        one.likelihood = Gaussian([0.5, 1.0])
        with pytest.raises(IncompatiblePair, match="call fit again"):
            _ = one.precision
        one.likelihood = Gaussian(0.5)
        with pytest.raises(IncompatiblePair, match="call fit again"):
            _ = one.precision
    posterior = lk.LaplacePosterior(model, Gaussian(scale), "full").fit((x, y))
    found = posterior.tune((x, y), noise=True, samples=4, generator=rng()).best["noise"]
    moved = torch.as_tensor(posterior.likelihood.scale)  # type: ignore[attr-defined]
    close(moved / moved[0], scale / scale[0])
    close(moved.log().mean().exp(), torch.tensor(found, dtype=F64), 1e-9)
    best = lk.LaplacePosterior(model, Gaussian(scale), "full").fit((x, y))
    best.tune(objective="evidence", noise=True)
    value = float(best.log_evidence().detach())
    for step in (0.97, 1.03):
        best.likelihood = Gaussian(torch.as_tensor(best.likelihood.scale) * step)  # type: ignore[attr-defined]
        assert float(best.log_evidence().detach()) < value
        best.likelihood = Gaussian(torch.as_tensor(best.likelihood.scale) / step)  # type: ignore[attr-defined]
    with pytest.raises(ShapeMismatch, match="it has 2, got outputs"):
        Gaussian(scale).check(randn(3, 3), randn(3, 3))


def known(n: int, form: str) -> Tensor:
    shape = {"example": (n,), "column": (n, 1), "output": (n, 2)}[form]
    return 0.3 + torch.rand(shape, dtype=F64, generator=rng(6))


@pytest.mark.parametrize("form", ["example", "column", "output"])
def test_known_noise_of_every_example(form: str) -> None:
    model, x, y, _ = regression()
    noise = known(8, form)
    full = noise.reshape(8, -1).expand(8, 2)
    likelihood = Gaussian(0.8)  # of new observations
    with torch.no_grad():
        outputs = model(x)
    close(likelihood.log_prob(outputs, (y, noise)), td.Normal(outputs, full).log_prob(y).sum(1))
    close(likelihood.score(outputs, (y, noise)), (y - outputs) / full**2)
    expected = dense_ggn(model, x, torch.diag_embed(full**-2))
    data = [(x, (y, noise))]
    close(lk.curvature.estimate(model, likelihood, data, "full").mean().dense(), expected)
    whole = lk.curvature.estimate(model, likelihood, (x, (y, noise)), "full")
    assert whole.n_data == 8
    close(whole.mean().dense(), expected)
    many = [(torch.cat([x] * 400), (torch.cat([y] * 400), torch.cat([noise] * 400)))]
    for name in ("sampled", "projection", "importance"):
        mean = lk.curvature.estimate(model, likelihood, many, "full", name, generator=rng()).mean().dense()
        assert float((mean - expected).norm() / expected.norm()) < 0.15, name
    posterior = lk.LaplacePosterior(model, likelihood, "full").fit(data)
    prediction = posterior.predict(x, method="linearized")
    spread = posterior.functional_covariance(x)
    close(prediction.variance, spread.diagonal(dim1=1, dim2=2) + 0.64)
    total = spread + torch.diag_embed(full**2)
    close(prediction.log_prob((y, noise)), td.MultivariateNormal(outputs, total).log_prob(y))
    close(posterior.predict(x, method="map").log_prob((y, noise)), likelihood.log_prob(outputs, (y, noise)))
    before = posterior.precision.dense()
    posterior.likelihood = Gaussian(0.3)  # of new observations only: the data keep their own
    close(posterior.precision.dense(), before)
    result = posterior.tune(data, samples=3, generator=rng())
    assert math.isfinite(result.best["objective"])
    optimiser = lk.optim.GaussNewton(network(2), likelihood)
    close(optimiser.step(x, (y, noise)), -likelihood.log_prob(outputs, (y, noise)).mean())


def test_known_noise_with_missing_targets_and_positions() -> None:
    _, _, _, missing = regression()
    noise = known(8, "output").masked_fill(missing.isnan(), math.nan)
    found = Gaussian().log_prob(torch.zeros(8, 2, dtype=F64), (missing, noise))
    elements = td.Normal(0.0, torch.nan_to_num(noise, nan=1.0)).log_prob(torch.nan_to_num(missing))
    close(found, elements.where(~missing.isnan(), 0.0).sum(1))
    for shape in ((3, 4, 2), (3, 2, 2, 2)):
        z, y = randn(*shape), randn(*shape, seed=1)
        scales = 0.5 + torch.rand(shape, dtype=F64, generator=rng(2))
        close(Gaussian().log_prob(z, (y, scales)), td.Normal(z, scales).log_prob(y).flatten(1).sum(1))
        one = scales[:, 0, 0] if len(shape) == 3 else scales[:, 0, 0, 0]
        spread = one.reshape(-1, *[1] * (len(shape) - 1))
        close(Gaussian().log_prob(z, (y, one)), td.Normal(z, spread).log_prob(y).flatten(1).sum(1))


def test_bad_noise_is_refused() -> None:
    z, y = torch.zeros(4, 2), torch.zeros(4, 2)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="known noise"):
            Gaussian().check(z, (y, torch.full((4,), bad)))
    for shape in ((3,), (4, 3), (2, 4)):
        with pytest.raises(ShapeMismatch, match="known noise"):
            Gaussian().check(z, (y, torch.ones(shape)))
    with pytest.raises(ShapeMismatch, match="pair"):
        Gaussian().check(z, (y, y, y))
    with pytest.raises(ValueError, match="tensor"):
        HeteroscedasticGaussian().check(z, (y, y))
