"""Losses that are not defined at the outputs, and arguments that cannot be: refused by the package's own errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import InvalidArgument, InvalidType, LaplaceKFError, NonFinite, ShapeMismatch

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_loss_that_is_nan_is_refused_although_its_curvature_is_finite(structure: str) -> None:
    likelihood = lk.likelihoods.FromLoss(lambda z, y: z.log().sum(1) - y.sum(1))
    posterior = lk.LaplacePosterior(network(), likelihood, structure=structure)
    with pytest.raises(NonFinite, match="of a minibatch is NaN under FromLoss"):
        posterior.fit([(X, Y)])
    with pytest.raises(LaplaceKFError, match="fit"):
        posterior.predict(X)


def test_a_step_on_a_loss_that_is_nan_changes_nothing() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lk.optim.kflr(model, lk.likelihoods.FromLoss(lambda z, y: z.log().sum(1) - y.sum(1)))
    with pytest.raises(LaplaceKFError):
        optimizer.step((X, Y))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


CALLS: dict[str, Callable[[], Any]] = {
    "class weights": lambda: lk.likelihoods.Categorical(class_weights=torch.zeros(3)),
    "noise": lambda: lk.likelihoods.Gaussian(scale=-1.0),
    "prior": lambda: lk.LaplacePosterior(network(), "gaussian", prior_precision=-1.0),
    "passes": lambda: lk.LaplacePosterior(network(), "gaussian").fit([(X, Y)], passes=0),
    "samples": lambda: lk.LaplacePosterior(network(), "gaussian", estimator="sampled", samples=0),
    "subnetwork": lambda: lk.Subnetwork(0),
    "mixture": lambda: lk.Mixture([]),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_cannot_be_are_refused_by_an_error_of_the_package(name: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        CALLS[name]()
    assert isinstance(refused.value, (LaplaceKFError, ValueError))


def test_what_is_no_module_is_refused_by_an_error_of_the_package() -> None:
    with pytest.raises(InvalidType, match="must be a torch"):
        lk.LaplacePosterior([network()], "gaussian")  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match="component 0"):
        lk.Mixture([network()])  # type: ignore[list-item]


def test_the_fisher_of_an_exponential_family_whose_divergence_torch_differentiates() -> None:
    """Wishart with df ν, scale diag(e^{2z}): −log p = ν Σ z_i + ½ Σ X_ii e^{−2z_i} + c, so that its Fisher is 2ν I."""
    nu = 5.0

    def wishart(z: Tensor) -> torch.distributions.Wishart:
        return torch.distributions.Wishart(torch.full(z.shape[:-1], nu, dtype=z.dtype), scale_tril=z.exp().diag_embed())

    model = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64).expand(6, 2, 2) + 0.1
    found = lk.curvature.estimate(model, lk.likelihoods.FromDistribution(wishart), [(x, y)], "full").mean().dense()
    jacobian = torch.cat([torch.kron(torch.eye(2, dtype=torch.float64), x[:, None]),
                          torch.eye(2, dtype=torch.float64).expand(6, 2, 2)], 2)  # fmt: skip
    torch.testing.assert_close(found, 2 * nu * torch.einsum("ncp,ncq->pq", jacobian, jacobian) / 6)


class Masked(nn.Module):
    """Logits (N, 4), the third class of which is shut out."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(3, 4), value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).masked_fill(torch.tensor([False, False, True, False]), self.value)


def test_classes_masked_with_minus_infinity_name_the_way_out_which_works() -> None:
    y = torch.tensor([0, 1, 3, 0, 1, 3])
    with pytest.raises(NonFinite, match=r"logits\.masked_fill\(mask, -1e4\)"):
        lk.LaplacePosterior(Masked(float("-inf")), "categorical").fit((X, y))
    with pytest.raises(NonFinite, match=r"weights$"):
        lk.LaplacePosterior(Masked(math.nan), "categorical").fit((X, y))
    posterior = lk.LaplacePosterior(Masked(-1e4), "categorical", structure="full").fit((X, y))
    for method in ("linearized", "probit", "mc", "map"):
        found = posterior.predict(X, method=method, samples=4)
        assert found.probs is not None and float(found.probs[:, 2].max()) == 0.0
        assert bool(torch.isfinite(found.entropy).all())
    assert bool(torch.isfinite(posterior.log_evidence()))


SQUASHED: dict[str, tuple[str, nn.Module, str, Any]] = {
    "softmax": ("categorical", nn.Softmax(-1), "log", torch.arange(6) % 2),
    "sigmoid": ("bernoulli", nn.Sigmoid(), "logit", (Y > 0.5).float()),
    "softplus": ("poisson", nn.Softplus(), "log", torch.ones(6, 2)),
}


@pytest.mark.parametrize("function", SQUASHED)
def test_outputs_that_are_probabilities_or_rates_already_are_warned_of(function: str) -> None:
    likelihood, last, undone, y = SQUASHED[function]
    model = nn.Sequential(network(), last, nn.Unflatten(1, (2, 1)), nn.Flatten())
    with pytest.warns(UserWarning, match=rf"went through {function}, but \w+.* takes log.*\.{undone}\(\)") as found:
        lk.LaplacePosterior(model, likelihood).fit(X, y)
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match=rf"went through {function} \(module '1'\)"):
        lk.curvature.estimate(model[:2], likelihood, (X, y), "diag")
    optimizer = lk.optim.kfac(model, likelihood)
    with pytest.warns(UserWarning, match=f"went through {function}"):
        optimizer.step(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way_out = lambda model, batch: (getattr(model(batch[0]), undone)(), batch[1])  # noqa: E731
        lk.LaplacePosterior(model, likelihood, structure="diag", forward=way_out).fit(X, y)
        lk.LaplacePosterior(model, "gaussian", structure="diag").fit(X, Y)


ALREADY: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "bounded softmax": ("categorical", "went through softmax", lambda z: z.softmax(1).clamp(1e-6, 1 - 1e-6)),
    "softmax and a little": ("categorical", "went through softmax", lambda z: z.softmax(1) + 1e-8),
    "ensemble": ("categorical", "softmax", lambda z: torch.stack([z.softmax(1), (2 * z).softmax(1)]).mean(0)),
    "normalised": ("categorical", "add up to 1", lambda z: z.exp() / z.exp().sum(1, keepdim=True)),
    "bounded sigmoid": ("bernoulli", "went through sigmoid", lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6)),
    "complement": ("bernoulli", "went through sigmoid", lambda z: 1 - z.sigmoid()),
    "one of two classes": ("bernoulli", "went through softmax", lambda z: z.softmax(1)[:, 1:]),
    "rate and a little": ("poisson", "went through exp", lambda z: z.exp() + 1e-6),
    "variance": ("heteroscedastic_gaussian", "softplus", lambda z: torch.cat([z[:, :1], F.softplus(z[:, 1:])], 1)),
    "variance of some size": (
        "heteroscedastic_gaussian",
        "exp",
        lambda z: torch.stack([z[:, 0], z[:, 1].exp() + 1e-6], 1),
    ),
}
OTHERWISE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "logarithms": ("categorical", lambda z: (z.softmax(1) + 1e-8).log()),
    "bounded logits": ("bernoulli", lambda z: 5 * z.sigmoid() - 2.5),
    "mixed logits": ("categorical", lambda z: (z.sigmoid() - 0.5) * 4),
    "positive mean": ("heteroscedastic_gaussian", lambda z: torch.cat([F.softplus(z[:, :1]), z[:, 1:]], 1)),
    "least variance": ("heteroscedastic_gaussian", lambda z: torch.cat([z[:, :1], F.softplus(z[:, 1:]) - 9], 1)),
}


class Ending(nn.Module):
    def __init__(self, ending: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.ending = network(), ending

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(self.body(x))


def targets_of(likelihood: str, outputs: Tensor) -> Tensor:
    if likelihood == "categorical":
        return torch.arange(6) % 2
    return torch.ones(6, 1) if likelihood == "heteroscedastic_gaussian" else torch.ones_like(outputs)


@pytest.mark.parametrize("case", ALREADY)
def test_probabilities_rates_and_variances_in_disguise_are_warned_of(case: str) -> None:
    likelihood, said, ending = ALREADY[case]
    model = Ending(ending)
    y = targets_of(likelihood, model(X))
    with pytest.warns(UserWarning, match=said) as found:
        lk.curvature.estimate(model, likelihood, (X, y), "diag")
    line = next(str(w.message) for w in found if said in str(w.message)).partition("forward=")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.curvature.estimate(model, likelihood, (X, y), "diag", forward=eval(line, {"torch": torch}))


@pytest.mark.parametrize("case", OTHERWISE)
def test_outputs_of_some_range_are_no_probabilities(case: str) -> None:
    likelihood, ending = OTHERWISE[case]
    model = Ending(ending)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.curvature.estimate(model, likelihood, (X, targets_of(likelihood, model(X))), "diag")


def test_labels_in_a_column_or_a_list_name_the_line_to_paste() -> None:
    labels, posterior = torch.arange(6) % 2, lk.LaplacePosterior(network(), "categorical")
    with pytest.raises(ShapeMismatch, match=r"targets\.squeeze\(-1\)"):
        posterior.fit(X, labels[:, None])
    with pytest.raises(ShapeMismatch, match=r"list of 6 numbers.*torch\.tensor\(y\)"):
        posterior.fit((X, labels.tolist()))
