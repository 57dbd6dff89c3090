"""Names that other libraries have for arguments: refused with the line that says the same here, wherever given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, UnknownName, UnknownOption
from laplace_kf.keywords import explained
from tests.checks import of_every

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


@pytest.fixture(scope="module")
def posterior() -> lk.LaplacePosterior:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return lk.LaplacePosterior(model, "categorical").fit([(X, Y)])


Call = Callable[[lk.LaplacePosterior], Any]
NEW = {
    "hessian_structure": ("kron", 'structure="kron"'),
    "subset_of_weights": ("last_layer", "parameters="),
    "prior_prec": (2.0, "posterior.prior_precision = 2.0"),
    "sigma_noise": (0.3, "lk.likelihoods.Gaussian(scale=0.3)"),
    "temperature": (2.0, "posterior.n_data = posterior.n_data / 2.0"),
    "backend": (int, "estimator="),
    "n_samples": (7, 'posterior.predict(x, method="mc", samples=7)'),
    "pred_type": ("glm", 'posterior.predict(x, method="linearized")'),
    "link_approx": ("bridge", 'posterior.predict(x, method="linearized", link="bridge")'),
    "curvature_ema": (0.9, "lk.optim.kfac(model, likelihood, ema=0.9)"),
    "stat_decay": (0.9, "lk.optim.kfac(model, likelihood, ema=0.9)"),
    "update_freq": (10, "lk.optim.kfac(model, likelihood, refresh=10)"),
    "weight_decay": (0.1, "posterior.prior_precision = n_data * 0.1"),
}
PLACES: dict[str, Call] = {
    "a posterior": lambda p: lambda **given: lk.LaplacePosterior(p.model, "categorical", **given),
    "fit": lambda p: lambda **given: p.fit([(X, Y)], **given),
    "predict": lambda p: lambda **given: p.predict(X, **given),
    "predict_interval": lambda p: lambda **given: p.predict_interval(X, **given),
    "tune": lambda p: lambda **given: p.tune([(X, Y)], **given),
    "update": lambda p: lambda **given: p.update([(X, Y)], **given),
    "a mixture": lambda p: lambda **given: lk.Mixture([p], **given),
    "a mixture's predict": lambda p: lambda **given: lk.Mixture([p]).predict(X, **given),
    "kfac": lambda p: lambda **given: lk.optim.kfac(p.model, "categorical", **given),
    "ekfac": lambda p: lambda **given: lk.optim.ekfac(p.model, "categorical", **given),
    "diagonal": lambda p: lambda **given: lk.optim.diagonal(p.model, "categorical", **given),
    "Hessian-free": lambda p: lambda **given: lk.optim.HessianFree(p.model, "categorical", **given),
    "a learner": lambda p: lambda **given: lk.continual.OnlineLaplace(p.model, "categorical", **given),
    "intelligence": lambda p: lambda **given: lk.continual.SynapticIntelligence(p.model, "categorical", **given),
    "a curvature": lambda p: lambda **given: lk.curvature.estimate(p.model, "categorical", [(X, Y)], **given),
    "MC dropout": lambda p: lambda **given: lk.predictive.mc_dropout(p.model, "categorical", **given),
}


@pytest.mark.parametrize("place", PLACES)
def test_names_of_neighbours_are_refused_by_what_they_are_called_here(
    place: str, posterior: lk.LaplacePosterior
) -> None:
    of_every(lambda name: is_refused(place, name, posterior), NEW)


def is_refused(place: str, name: str, posterior: lk.LaplacePosterior) -> None:
    value, line = NEW[name]
    before = {n: p.clone() for n, p in posterior.model.named_parameters()}, posterior.n_data, posterior.method
    with pytest.raises(UnknownOption, match=f"option '{name}' ") as refused:
        PLACES[place](posterior)(**{name: value})
    said = str(refused.value).rpartition("Use ")[2]
    if name == "weight_decay" and said == f"l2={value}.":
        return  # of an optimiser, by which the line is longer
    argument = line.partition("(")[2] or line  # "name=value" where the call has that argument
    assert said and (line in said or said.rstrip(".") in argument or said.split("=")[0] in argument), said
    assert (posterior.n_data, posterior.method) == before[1:]
    assert all(torch.equal(p, before[0][n]) for n, p in posterior.model.named_parameters())


EXACT: dict[str, tuple[Call, str]] = {
    "glm": (lambda p: p.predict(X, pred_type="glm"), 'Use method="linearized".'),
    "nn": (lambda p: p.predict(X, pred_type="nn"), 'Use method="mc".'),
    "draws": (lambda p: p.predict(X, n_samples=9), "Use samples=9."),
    "refresh": (lambda p: lk.optim.HessianFree(p.model, "categorical", TInv=3), "Use refresh=3."),
    "l2": (lambda p: lk.likelihoods.Gaussian(sigma_noise=0.3), "Use scale=0.3."),
    "classes": (lambda p: lk.likelihoods.Categorical(weight=torch.ones(3)), "Use class_weights=..."),
    "reduction": (lambda p: lk.likelihoods.FromLoss(lambda z, y: z, reduction="sum"), "Use no reduction"),
    "learner": (
        lambda p: lk.continual.EWC(p.model, "categorical", ewc_lambda=3.0),
        "EWC(model, likelihood, multiplier=3.0)",
    ),
    "validation": (lambda p: p.tune(val_loader=[(X, Y)]), "Use posterior.tune(val)"),
    "a typing error": (lambda p: p.predict(X, sample=3), "Did you mean samples=?"),
    "anything": (lambda p: p.predict(X, colour=3), "arguments: x, method, samples, space"),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_line_to_use_is_the_whole_of_it(name: str, posterior: lk.LaplacePosterior) -> None:
    call, said = EXACT[name]
    with pytest.raises(UnknownOption) as refused:
        call(posterior)
    assert said in str(refused.value)
    assert isinstance(refused.value, TypeError)  # as Python's own


def test_what_other_libraries_give_numbers_for(posterior: lk.LaplacePosterior) -> None:
    with pytest.raises(UnknownName, match=r"prior_precision=0\.03 for a posterior, zeta=0\.03 for an optimiser"):
        lk.optim.kfac(posterior.model, "categorical", damping=0.03)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r"prior_precision=0\.03 for a posterior"):
        lk.LaplacePosterior(posterior.model, "categorical", damping=0.03)  # type: ignore[arg-type]
    with pytest.raises(IncompatiblePair, match="momentum must be True or False"):
        lk.optim.kfac(posterior.model, "categorical", momentum=0.9)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r'posterior\.tune\(objective="evidence"\)'):
        posterior.tune([(X, Y)], method="marglik")


def test_signatures_stay_what_they_were() -> None:
    def call(x: int, *, y: int = 2) -> int:
        """What it does."""
        return x + y

    wrapped = explained(call)
    assert inspect.signature(wrapped) == inspect.signature(call) and wrapped.__doc__ == call.__doc__
    assert wrapped(1, y=3) == 4
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        wrapped()  # type: ignore[call-arg]
