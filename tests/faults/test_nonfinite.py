"""NaN and infinity at every place that a number comes in: refused by name, and nothing is changed.

What is kept of the posterior, the model, the random numbers and a file that is there are the same afterwards, bit for
bit, and the same call without the NaN gives what it always gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from tests.cases import rng
from tests.faults.test_injected import same
from tests.optim.test_refused_steps import equal, everything

N = 12
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def data(place: str = "", value: float = 0.0) -> list[Any]:
    """Three minibatches with weights of examples; the last one may have one entry that is no number."""
    x, y = (torch.randn(N, width, generator=rng(width), dtype=torch.float64) for width in (3, 2))
    w = torch.ones(N, dtype=torch.float64)
    if place:
        {"inputs": x, "targets": y, "weights": w}[place].view(-1)[-1] = value
    return [(x[k : k + 4], y[k : k + 4], w[k : k + 4]) for k in range(0, N, 4)]


Call = Callable[[lk.LaplacePosterior, list[Any]], Any]
CALLS: dict[str, Call] = {
    "fit": lambda p, batches: p.fit(batches, generator=rng(1)),
    "refit": lambda p, batches: p.refit(batches, generator=rng(1)),
    "update": lambda p, batches: p.update(batches, generator=rng(1)),
    "update-projected": lambda p, batches: p.update(batches, terms="project", generator=rng(1)),
    "tune": lambda p, batches: p.tune(batches, samples=3, generator=rng(1)),
    "calibrate": lambda p, batches: p.calibrate(batches, method="probit"),
    "influence": lambda p, batches: lk.attribution.influence(p, batches, batches[:1]),
    "estimate": lambda p, batches: lk.curvature.estimate(p.model, "gaussian", batches, "kron", weights=True),
}
READS: dict[str, Call] = {
    "predict-mc": lambda p, batches: p.predict(batches[-1][0], "mc", samples=3, generator=rng(1)),
    "predict-linearized": lambda p, batches: p.predict(batches[-1][0], "linearized", samples=3, generator=rng(1)),
    "functional-covariance": lambda p, batches: p.functional_covariance(batches[-1][0]),
    "ood-score": lambda p, batches: p.ood_score(batches[-1][0], kind="leverage"),
    "derivatives": lambda p, batches: p.derivatives(batches[-1][0]),
}


def fitted(structure: str = "kron") -> lk.LaplacePosterior:
    return lk.LaplacePosterior(network(), "gaussian", structure, weights=True).fit(data(), generator=rng(0))


def refused(call: Callable[[], Any], posterior: lk.LaplacePosterior, folder: Path) -> None:
    posterior.save(folder / "there")
    kept, packed = (folder / "there").read_bytes(), posterior.packed()
    weights = [tensor.clone() for tensor in posterior.model.state_dict().values()]
    numbers = torch.get_rng_state()
    with pytest.raises(lk.errors.LaplaceKFError, match=r"(?i)nan|infinit|finite|inf\b") as caught:
        call()
    assert isinstance(caught.value, (lk.errors.NonFinite, lk.errors.InvalidArgument, lk.errors.InvalidTarget))
    assert same(packed, posterior.packed())
    for one, two in zip(weights, posterior.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert (folder / "there").read_bytes() == kept and [path.name for path in folder.iterdir()] == ["there"]


@pytest.mark.share(3)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["inputs", "weights"])
@pytest.mark.parametrize("name", CALLS)
def test_data_that_are_no_numbers(name: str, place: str, value: str, tmp_path: Path) -> None:
    posterior = fitted()
    refused(lambda: CALLS[name](posterior, data(place, VALUES[value])), posterior, tmp_path)


@pytest.mark.parametrize("value", ["inf", "-inf"])
@pytest.mark.parametrize("name", CALLS)
def test_targets_that_are_no_numbers(name: str, value: str, tmp_path: Path) -> None:
    """A target that is NaN is one that is missing."""
    posterior = fitted()
    refused(lambda: CALLS[name](posterior, data("targets", VALUES[value])), posterior, tmp_path)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", READS)
def test_inputs_to_predict_on(name: str, value: str, tmp_path: Path) -> None:
    posterior = fitted()
    refused(lambda: READS[name](posterior, data("inputs", VALUES[value])), posterior, tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "3.weight", "1.running_var", "1.running_mean"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_models_that_hold_what_is_no_number(structure: str, where: str, value: str) -> None:
    model = network()
    with torch.no_grad():
        model.state_dict()[where].view(-1)[0] = VALUES[value]
    before = [tensor.clone() for tensor in model.state_dict().values()]
    posterior = lk.LaplacePosterior(model, "gaussian", structure, weights=True)
    if (where, value) == ("1.running_var", "inf"):  # divides by it: a unit that is switched off
        posterior.fit(data(), generator=rng(0))
        assert bool(posterior.precision.diag().isfinite().all())
        return
    with pytest.raises(lk.errors.NonFinite):
        posterior.fit(data(), generator=rng(0))
    for one, two in zip(before, model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(lk.errors.NotFitted):
        posterior.sample(1)


SETTINGS = ("prior_precision", "n_data", "temperature")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_no_numbers(name: str, value: str, tmp_path: Path) -> None:
    posterior = fitted()
    refused(lambda: setattr(posterior, name, VALUES[value]), posterior, tmp_path)
    if name != "n_data":
        model = network()
        with pytest.raises(lk.errors.LaplaceKFError):
            lk.LaplacePosterior(model, "gaussian", **{name: VALUES[value]})


@pytest.mark.share(3)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["inputs", "weights"])
@pytest.mark.parametrize("optimiser", ["kflr", "kfac", "ekfac", "hessian_free"])
def test_steps_on_data_that_are_no_numbers(optimiser: str, place: str, value: str) -> None:
    model = network()
    opt = getattr(lk.optim, optimiser)(model, "gaussian", weights=True, generator=rng(2))
    opt.step(data()[0])
    before = everything(model, opt)
    with pytest.raises(lk.errors.LaplaceKFError):
        opt.step(data(place, VALUES[value])[-1])
    assert equal(before, everything(model, opt))
    assert math.isfinite(float(opt.step(data()[1])))
