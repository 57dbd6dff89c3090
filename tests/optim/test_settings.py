"""The arguments of optimisers and presets: shown, documented, checked, and the same for editors as at run time."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.errors import LaplaceKFError
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.optim import gauss_newton, newton_cg, settings

PRESETS = ["kfac", "kflr", "kfra", "ekfac", "diagonal", "hessian_free", "natural_gradient"]
ALL = [*PRESETS, "GaussNewton", "HessianFree"]
# what every preset takes (and those of Gauss-Newton: more)
SHARED = {"l2", "lr", "tau", "zeta", "adapt_tau", "adapt_zeta", "inverse", "damping", "momentum", "ema", "refresh",
          "curvature_fraction", "generator"}  # fmt: skip
POSITIONAL = {"self", "model", "likelihood"}


def optimiser(name: str) -> Callable[..., Any]:
    return getattr(lk.optim, name)


def documentation(name: str) -> str:
    found = optimiser(name)
    return (found.__init__ if isinstance(found, type) else found).__doc__ or ""


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_shown_and_documented(name: str) -> None:
    shown = inspect.signature(optimiser(name)).parameters
    assert set(shown) >= SHARED
    told = documentation(name)
    for argument in shown:
        assert f"    {argument}: " in told or f"**{argument}: " in told, argument
    assert "See the module's text" not in told + (optimiser(name).__doc__ or "")


@pytest.mark.parametrize(
    ("name", "draws"), [("kfac", True), ("ekfac", True), ("diagonal", True), ("kflr", False), ("kfra", False)]
)
def test_samples_belong_to_presets_that_draw(name: str, draws: bool) -> None:
    shown = inspect.signature(optimiser(name)).parameters
    assert ("samples" in shown) == draws == ESTIMATORS[shown["estimator"].default].draws
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    if draws:
        assert optimiser(name)(model, "categorical", samples=3).estimator.samples == 3
    else:
        with pytest.raises(TypeError, match="samples"):
            optimiser(name)(model, "categorical", samples=3)


@pytest.mark.parametrize("name", PRESETS)
def test_the_defaults_shown_are_those_that_hold(name: str) -> None:
    """Giving all of them changes nothing."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    shown = inspect.signature(optimiser(name)).parameters
    given = {
        p.name: p.default
        for p in shown.values()
        if p.default is not inspect.Parameter.empty and p.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert name != "natural_gradient" or not {"recipe", "termination"} & set(given)  # made of steps and tolerance
    plain, full = optimiser(name)(model, "categorical"), optimiser(name)(model, "categorical", **given)
    skipped = {"generator", "model", "objective", "tracer", "pending", "running", "named", "param_groups", "pair"}

    def state(made: Any) -> dict[str, Any]:
        simple = (int, float, str, bool, tuple, type(None))
        return {
            key: value if isinstance(value, simple) or dataclasses.is_dataclass(value) else type(value)
            for key, value in vars(made).items()
            if key not in skipped
        }

    assert state(plain) == state(full)
    assert plain.defaults == full.defaults


@pytest.mark.parametrize(
    ("keywords", "groups"),
    [
        (settings.GaussNewtonSettings, gauss_newton.CONCERNS),
        (settings.GaussNewtonPreset, (settings.Curvature, *gauss_newton.CONCERNS)),
        (settings.HessianFreeSettings, newton_cg.CONCERNS),
    ],
    ids=["GaussNewton", "presets", "HessianFree"],
)
def test_editors_are_told_the_same(keywords: Any, groups: tuple[type, ...]) -> None:
    told = get_type_hints(keywords)
    fields = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    assert {name: told.get(name) for name in fields} == fields
    options = {"samples", "columns", "noise", "vector_blocks", "sharing", "max_side", "rank"}
    assert set(told) - set(fields) <= options


@pytest.mark.parametrize("groups", [gauss_newton.CONCERNS, newton_cg.CONCERNS], ids=["GaussNewton", "HessianFree"])
def test_an_argument_belongs_to_one_concern(groups: tuple[type, ...]) -> None:
    names = [entry.name for group in groups for entry in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert all(entry.metadata["text"] for group in groups for entry in dataclasses.fields(group))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"momentumm": True}, TypeError),
        ({"l2": -1.0}, LaplaceKFError),
        ({"refresh": 0}, LaplaceKFError),
        ({"curvature_fraction": 2.0}, LaplaceKFError),
        ({"curvature_fraction": (0.5,)}, LaplaceKFError),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(name: str, given: dict[str, Any], error: type[Exception]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    before = torch.get_rng_state()
    with pytest.raises((error, TypeError, LaplaceKFError)) as caught:
        optimiser(name)(model, "categorical", **given)
    assert next(iter(given)) in str(caught.value) or "options" in str(caught.value)
    assert torch.equal(before, torch.get_rng_state())
