"""A posterior whose network is set in another way now: lost parameters are refused, other outputs are warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(9) % 3


class Switched(nn.Module):
    """A frozen body, a side branch that can be switched off, and what a forward pass notes of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
        self.body.requires_grad_(False)
        self.on: Any = True
        self.scales, self.calls = {"branch": 1.0}, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = self.body(x)
        with torch.set_grad_enabled(self.on != "watched" and torch.is_grad_enabled()):
            side = self.scales["branch"] * self.branch(x)
        return self.head(torch.tanh(z + side if self.on else z))


CALLS: dict[str, Callable[[lk.LaplacePosterior], Any]] = {
    "map": lambda p: p.predict(X, method="map"),
    "mc": lambda p: p.predict(X, method="mc", samples=2),
    "probit": lambda p: p.predict(X, method="probit"),
    "loader": lambda p: p.predict(DataLoader(TensorDataset(X, Y), 4), method="map"),
    "predictor": lambda p: p.predictor(samples=2)(X),
    "covariance": lambda p: p.functional_covariance(X),
    "score": lambda p: p.ood_score(X, "variance"),
    "derivatives": lambda p: p.derivatives(X),
    "export": lambda p: p.export(X),
    "acquisition": lambda p: lk.acquisition.bald(p, X),
    "influence": lambda p: lk.attribution.influence(p, (X, Y), (X, Y)),
    "calibrate": lambda p: p.calibrate((X, Y)),
    "tune": lambda p: p.tune((X, Y), n_data=[9.0, 10.0], prior_precision=[1.0], method="probit"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_parameters_that_are_switched_off_are_refused(call: Callable[[lk.LaplacePosterior], Any]) -> None:
    model = Switched()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag").fit((X, Y))
    model.on = False
    before = posterior.method, posterior.n_data, dict(model.__dict__)
    with pytest.raises(lk.errors.UnsupportedLayer) as caught:
        call(posterior)
    said = str(caught.value)
    assert "2 of the 4 parameters" in said and "'branch.weight', 'branch.bias'" in said
    assert "since attribute 'on' of the model is False, and was True when the posterior was fitted" in said
    assert (posterior.method, posterior.n_data, dict(model.__dict__)) == before
    model.on = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if call not in (CALLS["tune"], CALLS["export"]):  # where MAP wins, that is a warning; the other is slow
            call(posterior)


def test_other_outputs_are_warned_of_once_and_not_when_they_are_back() -> None:
    model = Switched()
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    wanted = posterior.predict(X).probs
    model.scales["branch"] = 2.0
    with pytest.warns(UserWarning, match=r"attribute 'scales' of the model is \{'branch': 2.0\}, and was") as caught:
        posterior.predict(X)
    assert any(each.filename == __file__ for each in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        posterior.predict(X)
        model.scales["branch"] = 1.0
        assert torch.equal(posterior.predict(X).probs, wanted)


def test_parameters_without_a_gradient_are_warned_of() -> None:
    """Draws of them move the outputs all the same."""
    model = Switched()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag").fit((X, Y))
    wanted = posterior.predict(X, method="mc", samples=2, generator=torch.Generator().manual_seed(0)).probs
    model.on = "watched"
    with pytest.warns(UserWarning, match="'branch.bias' have an influence on the outputs, and no gradient"):
        found = posterior.predict(X, method="mc", samples=2, generator=torch.Generator().manual_seed(0)).probs
    assert torch.equal(found, wanted)


def test_a_counter_costs_a_few_passes_and_no_more() -> None:
    model = Switched()
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    costs = []
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for _ in range(5):
        model(X)
        passes.clear()
        posterior.predict(X, method="map")
        costs.append(list(passes))
    handle.remove()
    assert costs == [[2, 2, 9]] * 3 + [[9]] * 2  # two examples, as it was and as it is
    model.on = False  # is still noticed
    with pytest.raises(lk.errors.UnsupportedLayer, match="attribute 'on'"):
        posterior.predict(X)


def test_a_posterior_from_a_file_asks_whether_its_parameters_reach_anything(tmp_path: Path) -> None:
    model = Switched()
    lk.LaplacePosterior(model, "categorical", structure="diag", parameters=["branch.*"]).fit((X, Y)).save(
        tmp_path / "p"
    )
    model.on = False
    posterior = lk.LaplacePosterior.load(tmp_path / "p", model)
    with pytest.raises(lk.errors.UnsupportedLayer, match="2 of the 2 parameters"):
        posterior.predict(X)
    model = Switched()
    posterior = lk.LaplacePosterior.load(tmp_path / "p", model)
    posterior.predict(X)
    model.on = False
    with pytest.raises(lk.errors.UnsupportedLayer, match="attribute 'on'"):
        posterior.predict(X)


@pytest.mark.parametrize("parameters", ["all", "last_layer", ["head.*", "branch.*"]])
def test_files_are_loaded_into_frozen_models(parameters: Any, tmp_path: Path) -> None:
    """A fit needs gradients; a prediction does not, and models are frozen where they are used."""
    posterior = lk.LaplacePosterior(Switched(), "categorical", parameters=parameters).fit((X, Y))
    posterior.save(tmp_path / "p")
    frozen = Switched().requires_grad_(False)
    loaded = lk.LaplacePosterior.load(tmp_path / "p", frozen)
    assert loaded.parameters == posterior.parameters
    for method in ("probit", "mc"):
        mine, theirs = (
            p.predict(X, method=method, samples=2, generator=torch.Generator().manual_seed(0)).probs
            for p in (loaded, posterior)
        )
        assert torch.equal(mine, theirs)
    with pytest.raises(lk.errors.UnsupportedLayer, match="requires a gradient"):
        loaded.refit((X, Y))
    assert not any(p.requires_grad for p in frozen.parameters())
