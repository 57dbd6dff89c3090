"""A posterior whose model is another one now: its own weights are those of the fit; the rest is warned of, once."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(9) % 3


def net(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)).double()
    model.train()
    model(X + seed)  # running statistics of its own
    return model.eval()


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


def test_another_state_leaves_the_posteriors_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    before = posterior.predict(X).probs
    torch.manual_seed(1)
    model.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().state_dict())
    assert torch.equal(quietly(lambda: posterior.predict(X).probs), before)


CALLS: dict[str, Callable[[lk.LaplacePosterior], Any]] = {
    "predict": lambda p: p.predict(X),
    "covariance": lambda p: p.functional_covariance(X),
    "score": lambda p: p.ood_score(X, "variance"),
    "predictor": lambda p: p.predictor(samples=2),
    "calibrate": lambda p: p.calibrate((X, Y)),
    "tune": lambda p: p.tune((X, Y), n_data=[9.0, 10.0], prior_precision=[1.0], method="probit"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_running_statistics_of_another_state_are_warned_of(call: Callable[[lk.LaplacePosterior], Any]) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    model.load_state_dict(net(1).state_dict())
    line = r"buffer '1\.running_mean' of module '1' \(and 1 more\) has other numbers.*model\.load_state_dict\(state\)"
    with pytest.warns(UserWarning, match=line) as caught:
        call(posterior)
    assert any(each.filename == __file__ for each in caught)
    posterior._around.told = False
    model.load_state_dict(state)  # the line of the message
    posterior.predict(X)
    assert not posterior._around.told


def test_training_on_is_warned_of_once() -> None:
    model = net()
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    quietly(lambda: posterior.predict(X))
    model.train()
    model(X * 3)  # writes the running statistics without a new version
    model.eval()
    with pytest.warns(UserWarning, match="running_mean"):
        posterior.predict(X)
    quietly(lambda: posterior.predict(X))
    quietly(lambda: posterior.fit((X, Y)).predict(X))


@pytest.mark.parametrize("width", [4, 30000])  # compared by a copy, and by sums
def test_another_backbone_is_warned_of(width: int) -> None:
    model = net(width=width)
    posterior = lk.LaplacePosterior(model, "categorical", "diag", parameters="last_layer").fit((X, Y))
    with torch.no_grad():
        model[0].weight.add_(0.0)  # a new version of the same numbers
    quietly(lambda: posterior.predict(X[:2], "map"))
    with torch.no_grad():
        model[0].weight[0, 0] += 0.1
    with pytest.warns(UserWarning, match=r"parameter '0\.weight' of module '0' has other numbers"):
        posterior.predict(X[:2], "map")


def test_weights_that_are_written_without_a_new_version_are_warned_of() -> None:
    """As averages of weights are swapped in, by ``.data``; of a large tensor some entries are looked at."""
    model = net(width=30000)
    posterior = lk.LaplacePosterior(model, "categorical", "diag", parameters="last_layer").fit((X, Y))
    version = model[0].weight._version
    model[0].weight.data.mul_(0.999)
    assert model[0].weight._version == version
    with pytest.warns(UserWarning, match=r"parameter '0\.weight' of module '0' has other numbers"):
        posterior.predict(X[:2], "map")


def test_a_file_knows_its_backbone(tmp_path: Path) -> None:
    posterior = lk.LaplacePosterior(net(), "categorical", parameters="last_layer").fit((X, Y))
    posterior.save(tmp_path / "posterior.st")
    same = lk.LaplacePosterior.load(tmp_path / "posterior.st", net())
    assert torch.equal(quietly(lambda: same.predict(X).probs), posterior.predict(X).probs)
    other = lk.LaplacePosterior.load(tmp_path / "posterior.st", net(1))
    with pytest.warns(UserWarning, match=r"parameter '0\.weight'.*\(and 3 more\)"):
        other.predict(X)
    other.save(tmp_path / "again.st")  # still of the backbone of the fit
    again = lk.LaplacePosterior.load(tmp_path / "again.st", net())
    quietly(lambda: again.predict(X))
    assert quietly(lambda: pickle.loads(pickle.dumps(posterior)).predict(X).probs).shape == (9, 3)


def test_masks_of_infinities_and_other_types_are_no_change(tmp_path: Path) -> None:
    model = net()
    model.register_buffer("mask", torch.full((300, 300), -torch.inf, dtype=torch.float64))
    posterior = lk.LaplacePosterior(model, "categorical").fit((X, Y))
    quietly(lambda: posterior.predict(X))
    posterior.save(tmp_path / "posterior.st")
    loaded = lk.LaplacePosterior.load(tmp_path / "posterior.st", copy.deepcopy(model))
    quietly(lambda: loaded.predict(X))
    model.float()
    quietly(lambda: posterior.predict(X.float()))


def test_tables_that_renormalise_themselves_are_no_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 3)).double()
    tokens = torch.randint(0, 5, (9, 2))
    posterior = lk.LaplacePosterior(model, "categorical", parameters="last_layer").fit((tokens, Y))
    model(tokens)  # writes into the table
    quietly(lambda: posterior.predict(tokens))


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("chosen", ["all", ["0.*", "2.bias"]])
def test_weights_that_are_no_longer_tied_are_refused(chosen: Any, tmp_path: Path) -> None:
    model = tied()
    posterior = lk.LaplacePosterior(model, "categorical", parameters=chosen).fit((X, Y))
    posterior.save(tmp_path / "posterior.st")
    wanted = posterior.functional_covariance(X)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert model[2].weight is not model[0].weight
    match = r"'0\.weight' and '2\.weight' were one tensor.*get_submodule\('2'\)\.weight = model\.get_submodule\('0'\)"
    for call in (*CALLS.values(), lambda p: p.penalty(), lambda p: p.update((X, Y)), lambda p: p.condition(0.0)):
        with pytest.raises(lk.errors.ShapeMismatch, match=match):
            call(posterior)
    model.get_submodule("2").weight = model.get_submodule("0").weight  # the line of the message
    torch.testing.assert_close(posterior.functional_covariance(X), wanted)
    apart = tied()
    apart[2].weight = nn.Parameter(apart[0].weight.detach().clone())
    with pytest.raises(lk.errors.ShapeMismatch):
        lk.LaplacePosterior.load(tmp_path / "posterior.st", apart)
    loaded = lk.LaplacePosterior.load(tmp_path / "posterior.st", tied())
    torch.testing.assert_close(loaded.functional_covariance(X), wanted)


def test_weights_that_were_tied_after_the_fit_are_refused() -> None:
    model = tied()
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    posterior = lk.LaplacePosterior(model, "categorical", parameters=["0.*"]).fit((X, Y))
    posterior.predict(X)
    model[2].weight = model[0].weight
    with pytest.raises(lk.errors.ShapeMismatch, match=r"'0\.weight' and '2\.weight' are one tensor, and were two"):
        posterior.predict(X)
