"""What users give that is nearly right: arrays that hide something, numbers in wrappings, one argument too many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import laplace_kf as lk
from tests.cases import labels, normal, rng
from tests.checks import close


def make(out: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out)).double()


X, Y = normal(12, 4), labels(3, 12)


def test_masked_arrays_are_no_numbers() -> None:
    """numpy drops the mask on the way to a tensor, and what lies under it would be taken for data."""
    x = np.ma.masked_array(X.numpy(), mask=X.numpy() > 1.0)
    posterior = lk.LaplacePosterior(make(), "categorical").fit(X, Y)
    for call in (
        lambda: lk.LaplacePosterior(make(), "categorical").fit(x, Y.numpy()),
        lambda: posterior.predict(x),
        lambda: posterior.tune((x, Y)),
        lambda: posterior.functional_covariance(x),
    ):
        with pytest.raises(lk.errors.InvalidArgument, match=r"masked entries.*array.filled\(float\('nan'\)\)"):
            call()
    whole = np.ma.masked_array(X.numpy(), mask=np.zeros((12, 4), bool))
    close(posterior.predict(whole).probs, posterior.predict(X).probs)
    targets = np.ma.masked_array(normal(12, 1).numpy(), mask=np.arange(12)[:, None] < 2)
    found = lk.LaplacePosterior(make(1), "gaussian").fit(X.numpy(), targets.filled(np.nan))
    assert found.n_data == 10


@pytest.mark.parametrize("y", [np.array(["a", "b", "c"] * 4), Y.numpy().astype(object), Y.numpy().astype("M8[s]")])
def test_arrays_of_other_things_are_named(y: np.ndarray) -> None:
    for given in ((X.numpy(), y), ((X.numpy(), y), None)):
        with pytest.raises(lk.errors.InvalidType, match=r"targets are an array of .*return_inverse"):
            lk.LaplacePosterior(make(), "categorical").fit(*given)
    with pytest.raises(lk.errors.InvalidType, match="inputs are an array of object"):
        lk.LaplacePosterior(make(), "categorical").fit(X.numpy().astype(object), Y)


@pytest.mark.parametrize("scale", [np.array([0.5, 2.0]), [0.5, 2], (0.5, 2.0), np.array([0.5, 2.0], np.float32)])
def test_scales_in_any_wrapping(scale: object) -> None:
    right = lk.likelihoods.Gaussian(scale=torch.tensor([0.5, 2.0], dtype=torch.float64))
    y = normal(12, 2)
    found = lk.likelihoods.Gaussian(scale=scale)  # type: ignore[arg-type]
    close(found.log_prob(y, y), right.log_prob(y, y))


@pytest.mark.parametrize("scale", [np.float32(0.5), np.array(0.5), np.float64(0.5), 0.5])
def test_scales_that_are_one_number(scale: object) -> None:
    assert lk.likelihoods.Gaussian(scale=scale).scale == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make_it", "kind"),
    [
        (lambda: lk.likelihoods.Gaussian(scale="wide"), lk.errors.InvalidType),
        (lambda: lk.likelihoods.Gaussian(scale=None), lk.errors.InvalidType),
        (lambda: lk.likelihoods.Gaussian(scale=["a"]), lk.errors.InvalidType),
        (lambda: lk.likelihoods.Gaussian(scale=np.array([0.5, -1])), lk.errors.InvalidArgument),
        (lambda: lk.likelihoods.Categorical(label_smoothing=2.0), lk.errors.InvalidArgument),
        (lambda: lk.likelihoods.Categorical(label_smoothing="much"), lk.errors.InvalidType),
        (lambda: lk.LaplacePosterior(make(), "categorical", parameters=[]), lk.errors.InvalidArgument),
    ],
)
def test_settings_that_cannot_be(make_it: object, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        make_it()  # type: ignore[operator]


def test_inputs_and_targets_one_by_one() -> None:
    posterior = lk.LaplacePosterior(make(), "categorical").fit(X, Y)
    right = lk.LaplacePosterior(make(), "categorical").fit((X, Y)).refit((X[:6], Y[:6]))
    close(posterior.refit(X[:6], Y[:6]).precision.dense(), right.precision.dense())
    for call in (
        lambda: posterior.calibrate(X, Y),
        lambda: posterior.tune(X, Y),
        lambda: posterior.update(X, Y),
    ):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"\(\(x, y\)\)"):
            call()
    close(posterior.predict(X, generator=rng(0)).probs, right.predict(X, generator=rng(0)).probs)


def test_single_examples_are_told_of_loaders() -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match=r"DataLoader\(dataset, batch_size=64\)"):
        lk.LaplacePosterior(make(), "categorical").fit(list(zip(X, Y, strict=True)))


def test_a_network_that_torch_cannot_differentiate_is_named() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.last(h.add_(torch.sin(h)))

    for structure in ("kron", "diag"):
        with pytest.raises(lk.errors.UnsupportedLayer, match=r"inplace operation.*h = h \+ f\(h\)"):
            lk.LaplacePosterior(Overwrites().double(), "categorical", structure).fit(X, Y)


def test_densities_without_moments_are_mixed_and_joined() -> None:
    """A Cauchy prediction has neither mean nor variance; its density is all there is."""
    likelihood = lk.likelihoods.FromDistribution(lambda f: torch.distributions.Cauchy(f, 1.0))
    x, y = normal(5, 4), normal(5, 1)
    members = [lk.LaplacePosterior(make(1), likelihood, prior_precision=p).fit((x, y)) for p in (1.0, 4.0)]
    found = lk.Mixture(members).predict(x, method="mc", samples=7, generator=rng(0))
    close(lk.Mixture(members).predict(x, method="map").log_prob(y), members[0].predict(x, method="map").log_prob(y))
    assert found.log_prob(y).shape == (5,) and bool(found.log_prob(y).isfinite().all())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 2)
    whole = members[0].predict(x, method="map").log_prob(y)
    close(members[0].predict(loader, method="map").log_prob(y), whole)


def test_weights_that_went_away_after_the_fit_are_named() -> None:
    posterior = lk.LaplacePosterior(make(), "categorical").fit(X, Y)
    posterior.model.to("meta")
    for call in (lambda: posterior.predict(X), lambda: posterior.functional_covariance(X), lambda: posterior.mean):
        with pytest.raises(lk.errors.UnsupportedLayer, match=r"'0.weight'.*meta device"):
            call()


def test_a_model_that_cannot_be_copied_is_named() -> None:
    posterior = lk.LaplacePosterior(make(), "categorical", parameters=["2.*"]).fit(X, Y)
    prune.l1_unstructured(posterior.model[0], "weight", 0.5)  # type: ignore[index]
    posterior.predict(X)
    posterior.model(X)
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"cannot be copied.*prune.remove"):
        lk.pruning.prune(posterior, sparsity=0.5)
