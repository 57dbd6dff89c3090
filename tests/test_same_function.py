"""Whether a network is a function in eval mode: one that draws, or keeps something from pass to pass, is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.checks import of_every

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 3


class Noisy(nn.Module):
    """Draws in eval mode, or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3, dtype=torch.float64), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dropout":
            x = nn.functional.dropout(x, 0.5)
        elif self.how == "told":
            x = nn.functional.dropout(x, 0.5, training=self.training)
        elif self.how == "noise":
            x = x + torch.randn_like(x)
        return self.layer(x)


@pytest.mark.parametrize(("how", "by"), [("dropout", "dropout"), ("noise", "randn_like")])
def test_random_numbers_in_eval_mode_are_warned_of(how: str, by: str) -> None:
    with pytest.warns(UserWarning, match=rf"in eval mode \(by {by}\).*F\.dropout\(x, p, training=self\.training\)"):
        lk.LaplacePosterior(Noisy(how), "categorical").fit([(X[:4], Y[:4]), (X[4:], Y[4:])])
    with pytest.warns(UserWarning, match="in eval mode"):
        lk.optim.kfac(Noisy(how), "categorical").step(X, Y)


FORWARDS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "fit": lambda m, forward: lk.LaplacePosterior(m, "categorical", forward=forward).fit((X, Y)),
    "step": lambda m, forward: lk.optim.kfac(m, "categorical", forward=forward).step((X, Y)),
    "Gauss-Newton product": lambda m, forward: lk.curvature.ggn_vector_product(
        m, "categorical", (X, Y), torch.ones(12).double(), forward=forward
    ),
    "Hessian product": lambda m, forward: lk.curvature.hessian_vector_product(
        m, "categorical", (X, Y), torch.ones(12).double(), forward=forward
    ),
}


def test_draws_of_the_model_are_told_from_those_of_a_forward() -> None:
    def case(name: str) -> None:
        call = FORWARDS[name]
        for forward in (None, lambda m, b: (m(b[0] + 0.1 * torch.randn_like(b[0])), b[1])):
            with pytest.warns(UserWarning, match=r"in eval mode \(by dropout in module 'inner'\)"):
                call(Wrapped(Noisy("dropout")), forward)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                warnings.filterwarnings("ignore", message=".*script.*")  # torch's, of itself
                call(Wrapped(Noisy("told")).eval(), forward)

    of_every(case, FORWARDS)


class Wrapped(nn.Module):
    """A module inside a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


class Stateful(nn.Module):
    """Keeps something from pass to pass in eval mode, which may or may not change its outputs."""

    elsewhere = 0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3, dtype=torch.float64), how
        self.register_buffer("count", torch.zeros(()).double())
        self.calls, self.cache, self.seen = 0, None, []
        self.start = nn.Parameter(torch.zeros(3).double())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer in place":
            self.count += 1
        elif self.how == "new buffer":
            self.count = self.count + 1
        elif self.how == "attribute":
            self.calls += 1
        elif self.how == "mean of the first batch":
            self.cache = x.mean(0) if self.cache is None else self.cache
            x = x - self.cache
        elif self.how == "outputs of the first batch":
            self.cache = x * 2 if self.cache is None else self.cache
            x = self.cache if len(x) == len(self.cache) else x * 2
        elif self.how == "list":
            self.seen.append(x)
            x = x + torch.cat(self.seen).mean(0)
        elif self.how == "global":
            Stateful.elsewhere += 1
            x = x * Stateful.elsewhere
        elif self.how == "parameter":
            self.start.data.copy_(x.mean(0))
        elif self.how == "harmless":  # what interpretability tools do, and what depends on the width only
            self.calls, self.last = self.calls + 1, x
            self.seen.append(x)
            self.count += 1
            self.cache = torch.linspace(0, 1, 3).double() if self.cache is None else self.cache
            return self.layer(x + self.cache) + self.start
        return self.layer(x) * (1 + self.count) * (1 + 0.1 * self.calls) + self.start


STATES = {
    "buffer in place": r"module 'inner' changes its buffer 'count'.*if self\.training: self\.count",
    "new buffer": r"module 'inner' changes its buffer 'count'",
    "attribute": r"module 'inner' changes its attribute 'calls'",
    "mean of the first batch": r"module 'inner' changes its attribute 'cache'.*initialised by the first batch",
    "outputs of the first batch": r"module 'inner' changes its attribute 'cache'",
    "list": r"module 'inner' changes its attribute 'seen'",
    "global": "other outputs for the same inputs when it runs again",
    "parameter": r"module 'inner' writes into its parameter 'start'.*model\.eval\(\)\(x\)",
}


@pytest.mark.parametrize("product", ["ggn_vector_product", "hessian_vector_product"])
def test_products_ask_once_whether_two_passes_agree(product: str) -> None:
    """A pass more for each product of conjugate gradients would be a fifth of it; another layer is asked again."""
    model = Wrapped(Stateful("none"))
    calls = []
    model.inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    x, y, vector = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0]), torch.ones(15).double()

    def passes() -> int:
        calls.clear()
        getattr(lk.curvature, product)(model, "categorical", (x, y), vector)
        return len(calls)

    first = passes()
    assert passes() == first - 1 == passes()
    model.inner.layer = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))
    assert passes() == first
    model.inner.how = "attribute"  # what a module holds is looked at each time
    with pytest.raises(lk.errors.UnsupportedLayer, match="attribute 'calls'"):
        passes()


def test_what_a_network_keeps_from_pass_to_pass_in_eval_mode() -> None:
    """Refused by the module's path if outputs hang on it, with everything as it was; else nothing is said."""

    def case(state: str, structure: str) -> None:
        model = Wrapped(Stateful(state))
        before = copy.deepcopy(model.state_dict())
        vector = torch.ones(15).double()
        for call in (
            lambda: lk.LaplacePosterior(model, "categorical", structure=structure).fit([(X[:5], Y[:5]), (X, Y)]),
            lambda: lk.curvature.ggn_vector_product(model, "categorical", (X, Y), vector),
            lambda: lk.curvature.hessian_vector_product(model, "categorical", (X, Y), vector),
        ):
            with pytest.raises(lk.errors.UnsupportedLayer, match=STATES[state]):
                call()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.inner.calls == 0 and model.inner.cache is None and not model.inner.seen

    of_every(case, [(state, structure) for state in STATES for structure in ("diag", "kron", "full")])


def test_harmless_notes_of_a_network_are_nobodys_business() -> None:
    model = Wrapped(Stateful("harmless"))
    found = lk.LaplacePosterior(model, "categorical", structure="full").fit([(X[:5], Y[:5]), (X[5:], Y[5:])])
    twin = nn.Linear(3, 3).double()
    twin.load_state_dict(model.inner.layer.state_dict())
    moved = X + torch.linspace(0, 1, 3).double()
    expected = oracles.dense_ggn(twin, moved, Y, oracles.categorical_nll)
    torch.testing.assert_close(found.curvature.dense()[3:, 3:], expected)
    assert model.inner.calls == 0 and float(model.inner.count) == 0


def test_networks_that_draw_nothing_and_forwards_that_do_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lk.LaplacePosterior(Noisy("told"), "categorical").fit((X, Y))
        lk.LaplacePosterior(
            Noisy("none"), "categorical", forward=lambda m, b: (m(b[0] + 0.1 * torch.randn_like(b[0])), b[1])
        ).fit((X, Y))


# each in place of a fit, which looks for itself; the first call of all that looks at a network it has not seen
LOADED: dict[str, Callable[[Any], Any]] = {
    "predict": lambda p: p.predict(X, method="map"),
    "draws": lambda p: p.predict(X, method="mc", samples=2),
    "covariance": lambda p: p.functional_covariance(X),
    "tune": lambda p: p.tune((X, Y), samples=2),
    "calibrate": lambda p: p.calibrate((X, Y)),
    "leverage": lambda p: p.ood_score(X, kind="leverage", layers="all"),
    "influence": lambda p: lk.attribution.influence(p, (X, Y), (X, Y)),
    "derivatives": lambda p: p.derivatives(X),
    "export": lambda p: p.export(X, dynamic=False),
}


def test_a_loaded_posterior_looks_at_the_network_it_was_given(tmp_path: Path) -> None:
    plain = Wrapped(Stateful("none"))
    lk.LaplacePosterior(plain, "categorical", structure="kron").fit([(X, Y)]).save(tmp_path / "kept.st")

    def case(name: str) -> None:
        # every call meets two of the states, every state some call
        first = list(LOADED).index(name)
        for state in [list(STATES)[(first + k) % len(STATES)] for k in (0, 3)]:
            model = Wrapped(Stateful(state)).eval()
            posterior = lk.LaplacePosterior.load(tmp_path / "kept.st", model)
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(lk.errors.UnsupportedLayer, match=STATES[state]):
                LOADED[name](posterior)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert model.inner.calls == 0 and model.inner.cache is None and not model.inner.seen
            assert torch.isfinite(LOADED["predict"](lk.LaplacePosterior.load(tmp_path / "kept.st", plain)).probs).all()

    of_every(case, LOADED)


class Keeps(nn.Module):
    """Makes something of a weight in its first pass, and keeps it."""

    def __init__(self, graph: bool) -> None:
        super().__init__()
        self.layer, self.graph, self.kept = nn.Linear(3, 3, dtype=torch.float64), graph, None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = 2 * (self.layer.weight if self.graph else self.layer.weight.detach())
        return nn.functional.linear(x, self.kept, self.layer.bias)


@pytest.mark.parametrize("graph", [False, True])
def test_what_was_made_of_weights_is_not_kept_from_pass_to_pass(graph: bool, tmp_path: Path) -> None:
    """Draws and steps would go on with the old one; products differentiate it as it is."""
    fitted = lk.LaplacePosterior(Wrapped(Keeps(True)), "categorical", parameters=["*.bias"]).fit([(X, Y)])
    assert len(fitted.mean) == 1  # the weight stays what it is
    kept = r"another way than|keeps its attribute 'kept', which it made of its weights|never took part"
    calls: dict[str, Callable[[nn.Module], Any]] = {
        "fit": lambda m: lk.LaplacePosterior(m, "categorical").fit([(X, Y)]),
        "kfac": lambda m: lk.optim.kfac(m, "categorical").step(X, Y),
        "natural_gradient": lambda m: lk.optim.natural_gradient(m, "categorical").step(X, Y),
    }

    def case(name: str, training: bool) -> None:
        model = Wrapped(Keeps(graph)).train(training)
        with pytest.raises(lk.errors.UnsupportedLayer, match=kept):
            calls[name](model)
        assert training or model.inner.kept is None

    of_every(case, [(name, training) for name in calls for training in (False, True)])
    lk.LaplacePosterior(Wrapped(Stateful("none")), "categorical", parameters=["*.layer.*"], structure="kron").fit(
        [(X, Y)]
    ).save(tmp_path / "kept.st")
    for name in ("predict", "draws", "tune", "influence"):
        posterior = lk.LaplacePosterior.load(tmp_path / "kept.st", Wrapped(Keeps(graph)))
        with pytest.raises(lk.errors.UnsupportedLayer, match=kept):
            LOADED[name](posterior)


def test_products_of_later_minibatches_see_what_the_first_one_kept() -> None:
    found = []
    for data in ([(X, Y)], [(X[:3], Y[:3]), (X[3:], Y[3:])]):
        model = Wrapped(Keeps(True))
        torch.nn.init.ones_(model.inner.layer.weight)
        torch.nn.init.zeros_(model.inner.layer.bias)
        found.append(lk.curvature.ggn_vector_product(model, "categorical", data, torch.arange(12).double()))
    torch.testing.assert_close(found[0], found[1])
