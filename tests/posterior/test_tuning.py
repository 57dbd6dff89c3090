"""The default search, the comparison with MAP, the noise scale and the objectives of ``tune``."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor

import laplace_kf as lk
from laplace_kf.posterior.candidates import Contest
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.objectives import OBJECTIVES, OODContrast, WithinTolerance, missing_entropy
from laplace_kf.posterior.search import Plane, Search, champion, coarse_to_fine, widest
from laplace_kf.posterior.validation import MAP, Point, Score, Validation
from tests.cases import rng


def quiet(posterior: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior.tune(*args, **options)


def trained(sizes: Sequence[int], x: Tensor, y: Tensor, loss: Any, steps: int = 300) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for one, two in itertools.pairwise(sizes):
            layers += [nn.Linear(one, two), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    model.zero_grad()
    return model


Made = Callable[..., tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]


def once(make: Made) -> Made:
    """Trained once for all tests, each of which gets a network of its own; the data are only read."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def made(*args: Any) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        model, train, val = kept(*args)
        return copy.deepcopy(model), train, val

    return made


@once
def classification(noise: float = 0.8) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An over-confident classifier, its training data, and validation data."""
    x = torch.randn(240, 2, generator=rng(1))
    y = (x[:, 0] + noise * torch.randn(240, generator=rng(2)) > 0).long()
    model = trained((2, 8, 2), x[:40], y[:40], nn.functional.cross_entropy)
    return model, (x[:40], y[:40]), (x[40:], y[40:])


@once
def regression(scale: float = 0.3) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x = 2 * torch.randn(160, 1, generator=rng(3))
    y = torch.sin(2 * x) + scale * torch.randn(160, 1, generator=rng(4))
    model = trained((1, 12, 1), x[:40], y[:40], lambda z, t: (z - t).square().mean())
    return model, (x[:40], y[:40]), (x[40:], y[40:])


# ------------------------------------------------------------------------------------------------ the search itself


PLANE = Plane(10 ** torch.linspace(-6, 2, 50, dtype=torch.float64), torch.ones(50, dtype=torch.float64))


def surface(x0: float, y0: float, asked: list[Point], edge: float = 0.02) -> Any:
    """A smooth bowl around the coordinates (x0, y0) whose value tends to MAP's for small sizes."""

    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        found = {}
        for point in points:
            asked.append(point)
            if point == MAP:
                found[point] = Score(0.5)
                continue
            n, p = point
            x = math.log10(p / n / PLANE.largest)
            y = math.log10(PLANE.effective(p / n) / (2 * n))
            depth = 0.3 * math.exp(-((y - y0) ** 2) / 2 - edge * (x - x0) ** 2)
            found[point] = Score(0.5 - depth + 0.1 * max(0.0, y - y0) ** 2)
        return found

    return measure


def test_coordinates_of_a_plane() -> None:
    """x and y say what they should: ratio over the largest eigenvalue, half the trace of C̄ Λ⁻¹."""
    n, p = PLANE.point(-2.0, -1.0)
    assert p / n == pytest.approx(1e-2 * 1e2)
    assert 0.5 * float((PLANE.values / (n * PLANE.values + p)).sum()) == pytest.approx(0.1)


@pytest.mark.parametrize("x0", [-6.3, -4.6, -2.2, 0.4])
@pytest.mark.parametrize("y0", [-4.2, -2.6, -0.7])
def test_the_search_finds_the_bottom_of_a_bowl(x0: float, y0: float) -> None:
    asked: list[Point] = []
    search = Search(surface(x0, y0, asked), "bowl")
    best, at_edge = coarse_to_fine(search, PLANE)
    assert not at_edge
    assert search.value(best) < 0.2 + 0.02
    assert search.value(best) == min(search.value(point) for point in asked)
    assert len(asked) == len(set(asked)) <= 55


def test_the_search_reports_its_limits() -> None:
    _, at_edge = coarse_to_fine(Search(surface(-40.0, -1.0, [], edge=1e-3), "slope"), PLANE)
    assert at_edge


def test_the_search_survives_points_that_are_not_finite() -> None:
    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        inner = surface(-2.0, -2.0, [])(points, progress)
        return {p: score if p == MAP or p[0] > 50 else Score(math.inf) for p, score in inner.items()}

    search = Search(measure, "holes")
    best, _ = coarse_to_fine(search, PLANE)
    assert math.isfinite(search.value(best)) and best[0] > 50


def test_the_champion_beats_the_others_beyond_the_noise() -> None:
    """A gain that a few examples make, a smaller one that all share, and one that beats that one beyond the noise."""
    base = torch.zeros(100)
    few, every, more = base.clone(), base - 0.1 + 0.01 * torch.randn(100, generator=rng(0)), base - 0.1
    few[:2] = -10.0
    more[:50] -= 0.1
    known = {MAP: base, (1.0, 1.0): few, (2.0, 1.0): every}

    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        return {p: Score(float(known[p].mean()), known[p]) for p in points}

    search = Search(measure, "x")
    search.look(list(known))
    assert search.best() == (1.0, 1.0)
    assert (
        search.champion(0.0, 0.0) == (1.0, 1.0)
        and search.champion(1.0, 1.0) == (2.0, 1.0)
        and search.champion(500.0, 0.0) == MAP
    )
    known[3.0, 1.0] = more
    search.look([(3.0, 1.0)])
    assert search.champion(1.0, 1.0) == (3.0, 1.0)
    search.scores[3.0, 1.0] = Score(math.inf, None)
    assert search.champion(1.0, 1.0) == (2.0, 1.0)


# ------------------------------------------------------------------------------------------------ on models


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("make", [classification, regression])
def test_default_search(make: Any, structure: str) -> None:
    """Set to the best row; not worse than MAP on the validation data; better on an over-confident classifier."""
    model, train, val = make()
    posterior = lk.LaplacePosterior(model, "categorical" if make is classification else "gaussian", structure)
    result = quiet(posterior.fit(train), val, generator=rng(0))
    assert result.best in result.table
    assert float(posterior.n_data) == result.best["n_data"]
    assert float(posterior.prior_precision) == result.best["prior_precision"]
    assert {"n_data", "prior_precision", "objective"} <= set(result.best)
    assert 10 < len(result.table) <= 150 and result.cost <= 10
    limit = 1e-4 * (1 + abs(result.map_objective))
    assert result.best["objective"] <= result.map_objective + limit
    assert result.gain == pytest.approx(result.map_objective - result.best["objective"])
    if not result.map_wins:
        assert result.gain > 0 < result.gain_error
    if make is classification:
        assert not result.map_wins
        drawn = -posterior.predict(val[0], samples=400, generator=rng(5)).log_prob(val[1]).mean()
        assert float(drawn) < result.map_objective - 0.01
    assert "MAP" in str(result) and result.objective in repr(result)


def test_map_objective_is_that_of_the_weights() -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    exact = float(nn.functional.cross_entropy(model(val[0]), val[1]))
    for options in ({}, {"n_data": [40.0], "prior_precision": [1.0, 10.0]}):
        result = quiet(posterior, val, generator=rng(0), **options)
        assert result.map_objective == pytest.approx(exact, rel=1e-5)


def test_map_wins_where_nothing_helps() -> None:
    """An under-confident linear classifier: any spread makes it worse. So the posterior becomes MAP in effect and says
    so. With independent draws some would happen to be better weights."""
    x = torch.randn(150, 3, generator=rng(0))
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        model.bias.zero_()
    y = (x[:, 0] < 0).long()
    for seed in range(3):
        posterior = lk.LaplacePosterior(model, "categorical").fit((x[:50], y[:50]))
        with pytest.warns(UserWarning, match="MAP"):
            result = posterior.tune((x[50:], y[50:]), generator=rng(seed))
        assert result.map_wins and not result.at_edge and "MAP" in str(result)
        assert math.isfinite(posterior.n_data) and math.isfinite(float(posterior.prior_precision))
        nll = -posterior.predict(x[50:], method="mc", samples=50, generator=rng(1)).log_prob(y[50:]).mean()
        assert float(nll) == pytest.approx(result.map_objective, abs=5e-3)
        assert result.best["objective"] <= result.map_objective + 1e-4 * (1 + result.map_objective)


def test_the_default_search_is_reproducible_and_private() -> None:
    model, train, val = classification()
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    first = quiet(posterior, val, generator=rng(4))
    second = quiet(posterior, val, generator=rng(4))
    assert first.table == second.table and first.best == second.best
    assert quiet(posterior, val, generator=rng(5)).table != first.table
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_points_of_one_ratio_share_draws() -> None:
    """Common random numbers: a point scores the same whatever else is measured with it."""
    from laplace_kf.posterior.validation import Validation

    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    points = [(40.0, 4.0), (400.0, 40.0), (40.0, 40.0), MAP]
    together = Validation(posterior._fitted("a test"), val, OBJECTIVES["nll"], 7, rng(0)).scorer("mc")(points)
    for point in points:
        alone = Validation(posterior._fitted("a test"), val, OBJECTIVES["nll"], 7, rng(0)).scorer("mc")([point])
        assert alone[point].value == pytest.approx(together[point].value, rel=1e-5)


def test_draws_come_in_pairs() -> None:
    """Six draws are three of the posterior's, each with both signs; the score is that of a hundred, by jackknife."""
    from laplace_kf.posterior.validation import Validation

    model, train, (x, y) = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    validation = Validation(posterior._fitted("a test"), (x, y), OBJECTIVES["nll"], 6, rng(0), pairs=True)
    found = validation.scorer("mc")([(400.0, 40.0)])[400.0, 40.0].value
    pairs = []
    for seed in validation.seeds[::2]:
        noise = posterior.precision_at(400.0, 40.0).draw(1, torch.Generator().manual_seed(seed))
        total = torch.zeros(len(x), 2)
        for sign in (-1, 1):
            weights = {name: value + sign * noise[name][0] for name, value in posterior.mean.items()}
            total += torch.func.functional_call(model, weights, (x,)).softmax(-1).detach() / 2
        pairs.append(total[range(len(x)), y])
    everything = -torch.stack(pairs).mean(0).log()
    without = torch.stack([-(sum(pairs) - pair).div(2).log() for pair in pairs])
    bias = 2 * (without.mean(0) - everything)
    assert found == pytest.approx(float((everything - 0.94 * bias.clamp_max(0.5)).mean()), rel=1e-5)


def test_a_failed_default_search_changes_nothing() -> None:
    model, train, (x, y) = regression()
    likelihood = lk.likelihoods.Gaussian()
    posterior = lk.LaplacePosterior(model, likelihood, prior_precision=2.0).fit(train)

    def broken() -> Iterator[Any]:
        yield x[:4], y[:4]
        raise RuntimeError("disk")

    def refuses(prediction: Any, targets: Any) -> float:
        raise RuntimeError("no score")

    for data, options in ((broken(), {}), ([], {}), ((x, y), {"objective": refuses})):
        with pytest.raises((RuntimeError, lk.errors.LaplaceKFError)):
            posterior.tune(data, **options)
        assert posterior.n_data == 40 and posterior.prior_precision == 2.0 and posterior.likelihood is likelihood
    with pytest.raises(lk.errors.NonFinite, match="finite"):
        posterior.tune((x, y), objective=lambda prediction, targets: math.nan)
    assert posterior.n_data == 40 and posterior.likelihood is likelihood


def test_max_examples_stops_the_loader_early() -> None:
    model, train, (x, y) = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    served: list[int] = []

    def loader() -> Iterator[Any]:
        for k in range(10):
            served.append(k)
            yield x[20 * k : 20 * k + 20], y[20 * k : 20 * k + 20]

    result = quiet(posterior, loader(), generator=rng(0), max_examples=50, n_data=[40.0], prior_precision=[1.0])
    assert served == [0, 1, 2]
    exact = float(nn.functional.cross_entropy(model(x[:60]), y[:60]))
    assert result.map_objective == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------------------------------------ candidates, budget


def by_method(result: Any) -> dict[str, dict[str, Any]]:
    return {each["method"]: each for each in result.candidates}


def test_every_candidate_has_the_objective_of_its_own_prediction(tmp_path: Any) -> None:
    """MAP, temperature, probit, linearised and Monte Carlo as ``predict`` gives them at the settings in the row."""
    model, train, (x, y) = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    assert posterior.method == "probit" and posterior.temperature is None
    with pytest.raises(lk.errors.NotFitted, match="tune"):
        posterior.predict(x, method="temperature")
    result = quiet(posterior, (x, y), samples=200, generator=rng(0), budget=None)
    found = by_method(result)
    assert list(found) == ["map", "temperature", "probit", "linearized", "mc"]
    logits = model(x).detach()
    scaled = min(float(nn.functional.cross_entropy(logits / t, y)) for t in torch.logspace(-1, 1.2, 2000))
    assert found["temperature"]["objective"] == pytest.approx(scaled, abs=1e-5)
    assert found["map"]["gain"] == 0.0 and result.map_objective == pytest.approx(found["map"]["objective"])
    assert result.method == posterior.method == max(found, key=lambda m: found[m]["gain"])
    assert posterior.temperature == found["temperature"]["temperature"]
    assert result.gain == pytest.approx(found[result.method]["gain"])
    for method, row in found.items():
        assert row["gain"] == pytest.approx(result.map_objective - row["objective"]) and row["gain_error"] is not None
        if "n_data" in row:
            posterior.n_data, posterior.prior_precision = row["n_data"], row["prior_precision"]
        exact = -posterior.predict(x, method=method, samples=4000, generator=rng(3)).log_prob(y).mean()
        assert row["objective"] == pytest.approx(float(exact), abs=1e-4 if method in ("map", "probit") else 0.03)
        assert method in str(result)
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert (loaded.method, loaded.temperature) == (posterior.method, posterior.temperature)
    posterior.method = "auto"
    assert posterior.method == "probit"
    with pytest.raises(lk.errors.UnknownName, match="probit"):
        posterior.method = "bootstrap"


def test_auto_is_what_was_chosen() -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    x = val[0]
    for method in ("probit", "map", "linearized", "mc"):
        posterior.method = method
        one = posterior.predict(x, generator=rng(0)).probs
        torch.testing.assert_close(one, posterior.predict(x, method=method, generator=rng(0)).probs)
    drawn = posterior.predict(x, method="mc", space="weights", generator=rng(0)).probs
    posterior.method = "map"
    torch.testing.assert_close(posterior.predict(x, space="weights", generator=rng(0)).probs, drawn)
    through = posterior.predict(x, method="linearized", link="probit").probs
    torch.testing.assert_close(posterior.predict(x, link="probit").probs, through)
    posterior.temperature = 2.0
    torch.testing.assert_close(posterior.predict(x, method="temperature").probs, (model(x) / 2).softmax(-1).detach())
    other = lk.LaplacePosterior(nn.Linear(2, 1), "gaussian").fit((x, x[:, :1]))
    assert other.method == "linearized"
    with pytest.raises(lk.errors.IncompatiblePair, match="logits"):
        other.predict(x, method="temperature")
    assert list(by_method(quiet(other, (x, x[:, :1]), generator=rng(0)))) == ["map", "linearized", "mc"]


SEEN: list[int] = []  # not an attribute of the network: those are put back after every call


class Counted(nn.Module):
    """A network that counts the examples that pass through it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(60, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body[0].weight
        draws = get_unwrapped(weight).shape[0] if is_batchedtensor(weight) else 1  # that are run together
        SEEN.append(len(x) * draws)
        return self.body(x)


@pytest.mark.parametrize("method", ["auto", "mc", "probit"])
def test_the_budget_is_kept(method: str) -> None:
    """Counted by the network itself: forward passes alone stay within what the budget allows, and so does the cost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Counted()
    x = torch.randn(1500, 60, generator=rng(0))
    y = (x[:, :4] + 2 * torch.randn(1500, 4, generator=rng(1))).argmax(1)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x[:500], y[:500]))
    costs = []
    for budget in (10.0, 20.0):
        SEEN.clear()
        result = quiet(posterior, (x, y), method=method, budget=budget, generator=rng(0))
        costs.append(result.cost)
        assert result.cost <= 1.5 * budget
        assert 1500 <= sum(SEEN) <= 3 * 1500 * 1.5 * budget
        chosen = by_method(result)[result.method if method == "auto" else method]
        assert "left_out" not in chosen
    assert costs[0] <= costs[1]


def ruined(scale: float, dtype: torch.dtype, count: int = 60) -> tuple[nn.Module, Any]:
    """A network whose weights have run away, and data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model, (torch.randn(count, 4, generator=rng(0)).to(dtype), torch.randint(0, 3, (count,), generator=rng(1)))


def test_runaway_weights_leave_map_and_the_temperature() -> None:
    """No posterior of float32 is finite around such logits; the trained weights and a temperature are."""
    model, data = ruined(1e15, torch.float32)
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision=2.0).fit(data)
    for method in ("linearized", "probit"):
        with pytest.raises(lk.errors.NonFinite, match=r"at any of the .* temperature"):
            posterior.tune(data, method=method)
    assert (posterior.n_data, posterior.prior_precision, posterior.method) == (60, 2.0, "probit")
    with pytest.warns(UserWarning, match=r"probit, linearized.*not finite.*predictions are by method="):
        result = posterior.tune(data, generator=rng(0))
    assert result.method in ("temperature", "mc")
    assert bool(posterior.predict(data[0], generator=rng(0)).log_prob(data[1]).isfinite().all())
    assert all("not finite" in each["left_out"] for each in result.candidates[2:4])


LARGE = [("categorical", 60), ("bernoulli", 60), pytest.param("categorical", 3000, marks=pytest.mark.nightly)]


@pytest.mark.parametrize(("make", "count"), LARGE)
def test_objectives_keep_their_digits_beside_a_huge_one_of_map(make: str, count: int) -> None:
    """A candidate of about one nat where MAP has 1e29: its objective is its own, and no log-probability is positive."""
    model, (x, y) = ruined(1e15, torch.float64, count)
    y = y if make == "categorical" else nn.functional.one_hot(y, 3).double()
    posterior = lk.LaplacePosterior(model, make, structure="diag").fit((x, y))
    result = quiet(posterior, (x, y), generator=rng(0))
    assert result.map_objective is not None and result.map_objective > 1e20
    for each in result.candidates[2:]:
        assert 0.5 < each["objective"] < 4 or "left_out" in each
    assert all(row["objective"] > 0.5 for row in result.table)
    for method in ("map", "temperature", "probit", "linearized", "mc"):
        found = posterior.predict(x, method=method, generator=rng(0))
        assert bool((found.log_prob(y) <= 0).all()) and bool(found.probs.isfinite().all())
        if make == "categorical":
            assert float((found.probs.sum(-1) - 1).abs().max()) < 1e-12


def test_few_examples_and_a_large_network_leave_room_for_posteriors() -> None:
    """The eigenbases alone would take more than ten epochs of 60 rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(700, 100), nn.Tanh(), nn.Linear(100, 4))
    x, y = torch.randn(60, 700, generator=rng(0)), torch.randint(0, 4, (60,), generator=rng(1))
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    result = quiet(posterior, (x, y), generator=rng(0))
    assert not any("left_out" in each for each in result.candidates)
    assert result.cost <= 15.0
    assert "left_out" in by_method(quiet(posterior, (x, y), budget=2.0, generator=rng(0)))["mc"]


def test_less_noise_needs_more_of_a_gain() -> None:
    """Beyond one standard error at MAP's noise scale, beyond three at half of it; among others by half of one."""
    parts = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)  # its mean has the standard error 0.1005

    def score(gain: float, noise: float | None) -> Score:
        return Score(-gain, parts - gain, noise)

    first = Score(0.0, torch.zeros(100, dtype=torch.float64), 0.4)
    for gain, noise, wins in (
        (0.12, 0.4, True), (0.12, 0.5, True), (0.12, 0.2, False), (0.29, 0.2, False), (0.31, 0.2, True),
        (0.19, 0.283, False), (0.21, 0.283, True), (0.09, 0.4, False), (0.12, None, True),
    ):  # fmt: skip
        found = champion({"map": first, "other": score(gain, noise)}, "map", 1.0, 0.5)
        assert found == ("other" if wins else "map"), (gain, noise)
    both = {"map": first, "some": score(0.35, 0.4), "less": Score(-0.45, parts - 0.45, 0.2)}
    assert champion(both, "map", 1.0, 0.5) == "less"  # it beats MAP itself, and the other one too
    chain = {"map": first, "some": score(0.12, 0.4), "less": Score(-0.2, parts - 0.2, 0.2)}
    assert champion(chain, "map", 1.0, 0.5) == "some"  # the other one is better, but not that much better than MAP


def test_what_was_named_beforehand_needs_no_more_than_a_gain() -> None:
    """It takes MAP's place if it is better at all; the best of a search has to beat MAP and it beyond the noise."""
    parts = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)  # its mean has the standard error 0.1005
    other_parts = torch.tensor([1.0, 1.0, -1.0, -1.0] * 25, dtype=torch.float64)

    def score(gain: float, parts: torch.Tensor = parts, noise: float | None = None) -> Score:
        return Score(-gain, parts - gain, noise)

    still = torch.zeros(100, dtype=torch.float64)
    for beforehand, searched, wins in (
        (0.01, 0.05, "modest"),  # a winner on the examples at hand only
        (-0.01, 0.05, "map"),
        (-0.01, 0.12, "searched"),
        (0.01, 0.15, "searched"),  # above MAP by 1.5, above the modest one by 1.4 standard errors
        (0.06, 0.15, "modest"),  # by 0.9
        (math.nan, 0.05, "map"),
    ):
        known = {"map": score(0.0, still), "modest": score(beforehand, still), "searched": score(searched)}
        assert champion(known, "map", 1.0, 0.5, ["modest"]) == wins, (beforehand, searched)
        assert champion(known, "map", 1.0, 0.5, ["modest", "elsewhere"]) == wins
    known = {"map": score(0.0, still), "modest": score(0.5), "searched": score(0.65, parts + 0.9 * other_parts)}
    assert champion(known, "map", 1.0, 0.5, ["modest"]) == "searched"
    known["searched"] = score(0.65, parts + 6.0 * other_parts)  # not above the modest one beyond the noise
    assert champion(known, "map", 1.0, 0.5, ["modest"]) == "modest"
    known = {"map": score(0.0, still), "one": score(0.01), "two": score(0.02)}
    assert champion(known, "map", 1.0, 0.5, ["one", "two"]) == "two"
    assert champion(known, "map", 1.0, 0.5, ["two", "one"]) == "two"
    halved = {"map": score(0.0, still, 0.4), "modest": score(0.01, still, 0.4), "less": score(0.2, parts, 0.2)}
    assert champion(halved, "map", 1.0, 0.5, ["modest"]) == "modest"  # half the noise needs three standard errors


@pytest.mark.parametrize("make", [classification, regression])
def test_the_modest_spread_is_at_the_default_ratio_and_of_its_nats(make: Any) -> None:
    """``γ(λ/N) / (2 N)`` nats at the noise of MAP, by the eigenvalues of a dense curvature in float64."""
    model, (x, y), val = make()
    gaussian = make is regression
    posterior = lk.LaplacePosterior(model, "gaussian" if gaussian else "categorical", structure="full").fit(x, y)
    before = posterior.likelihood.scale if gaussian else 1.0
    result = quiet(posterior, val, method="linearized", generator=rng(0))
    # rows count N at their own noise scale
    points = [(row["n_data"] * (before / row.get("noise", 1.0)) ** 2, row["prior_precision"]) for row in result.table]
    at_default = [n for n, prior in points if abs(40 * prior / n - 1) < 1e-6]
    exact = {name: p.detach().double() for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (rows.double(),))
        return found

    pieces = torch.func.jacrev(outputs)(exact, x).values()
    jacobian = torch.cat([piece.flatten(2) for piece in pieces], 2)
    probs = torch.softmax(outputs(exact, x), -1)
    hessian = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    if gaussian:
        hessian = torch.full((40, 1, 1), before**-2, dtype=torch.float64)
    mean = torch.einsum("nop,noq,nqr->pr", jacobian, hessian, jacobian) / 40
    values = torch.linalg.eigvalsh(mean).clamp_min(0)
    noise = float((outputs(exact, val[0]) - val[1]).square().mean().sqrt()) if gaussian else 1.0
    effective = float((values / (values + 1 / 40)).sum()) * (before / noise) ** 2
    assert len(at_default) >= 2
    wanted = effective / (2 * (0.1 if gaussian else 10**-2.5))
    assert any(n == pytest.approx(wanted, rel=1e-3) for n in at_default), (at_default, wanted)


def test_where_map_wins_the_noise_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, val = regression()
    posterior = lk.LaplacePosterior(model, "gaussian").fit(train)
    monkeypatch.setattr(Contest, "winner", lambda self: self.found["map"])
    result = quiet(posterior, val, generator=rng(0))
    assert any(each["gain"] > 0.005 for each in result.candidates)  # a posterior with less noise is there to be taken
    own = float((model(val[0]).detach() - val[1]).square().mean().sqrt())
    assert posterior.method == "map"
    assert posterior.likelihood.noise_scale == pytest.approx(own, rel=0.02)
    assert -float(posterior.predict(val[0]).log_prob(val[1]).mean()) == pytest.approx(result.map_objective, abs=1e-3)


def test_monte_carlo_is_judged_by_draws_that_it_was_not_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    made: list[Validation] = []
    original = Validation.redrawn
    monkeypatch.setattr(Validation, "redrawn", lambda self, samples: made.append(original(self, samples)) or made[-1])
    result = quiet(posterior, val, method="mc", generator=rng(0))
    assert {len(each.seeds) for each in made} == {100}  # as many as predict uses: the budget of small data allows it
    chosen = by_method(result)["mc"]
    point = chosen["n_data"], chosen["prior_precision"]
    first = Validation(posterior._fitted("test"), val, OBJECTIVES["nll"], 20, rng(0), pairs=True, mixed=True)
    search = first.redrawn(100)
    other = search.redrawn(100)
    assert not set(search.seeds) & set(other.seeds)
    assert [each.seeds for each in made[:2]] == [search.seeds, other.seeds]
    again, before = (each.scorer("mc")([point])[point].value for each in (other, search))
    assert chosen["objective"] == pytest.approx(again, rel=1e-6)
    assert abs(before - again) > 1e-5


def test_a_budget_that_is_too_small_leaves_candidates_out() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Counted()
    x, y = torch.randn(2000, 60, generator=rng(0)), torch.randint(0, 4, (2000,), generator=rng(1))
    posterior = lk.LaplacePosterior(model, "categorical").fit((x[:200], y[:200]))
    before = posterior.n_data, posterior.prior_precision
    result = quiet(posterior, (x, y), budget=0.4, generator=rng(0))
    found = by_method(result)
    assert "budget" in found["mc"]["left_out"] and math.isinf(found["mc"]["objective"])
    assert result.method in ("map", "temperature") and "left out" in str(result)
    assert (posterior.n_data, posterior.prior_precision) == before
    with pytest.raises(lk.errors.IncompatiblePair, match="budget"):
        posterior.tune((x, y), method="mc", budget=0.4)
    with pytest.raises(ValueError, match="budget"):
        posterior.tune((x, y), budget=-1.0)


def test_the_bar_counts_training_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    result = quiet(posterior, val, generator=rng(0), budget=7.0, progress=True)
    shown = capsys.readouterr().err
    assert "/7 epochs" in shown and f"{result.cost:.1f}/7" in shown


def test_map_alone_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no posterior is looked at, none is made."""
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    monkeypatch.setattr(Fitted, "precision", lambda *args: pytest.fail("a precision was made"))
    for method in ("map", "temperature"):
        assert quiet(posterior, val, method=method, generator=rng(0)).method == method


def test_linearized_candidates_pass_over_the_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many settings are looked at, every minibatch is linearised once."""
    from laplace_kf.posterior import predictors

    made: list[int] = []
    original = predictors.Linearization

    def counting(*args: Any, **options: Any) -> Any:
        made.append(1)
        return original(*args, **options)

    monkeypatch.setattr(predictors, "Linearization", counting)
    model, train, (x, y) = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    loader = [(x[k : k + 50], y[k : k + 50]) for k in range(0, 200, 50)]
    result = quiet(posterior, loader, generator=rng(0))
    assert len(made) == 4
    assert len(result.table) > 20


def test_the_first_examples_stand_for_all() -> None:
    """Data sorted by class: a part of them is no single class; large minibatches are cut where they can be."""
    from laplace_kf.posterior.validation import Validation

    model, train, (x, y) = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    order = y.argsort()
    big = (x[order].repeat(8, 1), y[order].repeat(8).sort().values)
    validation = Validation(posterior._fitted("a test"), [big], OBJECTIVES["nll"], 4, rng(0), mixed=True)
    assert len(validation.batches) == 7 and validation.count == 1600
    part = validation.part(300)
    assert part.count == 300
    whole, some = validation.scorer("map")([MAP])[MAP], validation.scorer("map", 300)([MAP])[MAP]
    torch.testing.assert_close(whole.parts[:300], some.parts)
    plain = Validation(posterior._fitted("a test"), [big], OBJECTIVES["nll"], 4, rng(0))
    assert len(plain.batches) == 1 and plain.part(300).count == 300


# ------------------------------------------------------------------------------------------------ noise


def test_noise_is_tuned_with_the_rest() -> None:
    """σ left at its default: MAP gets its own best σ, the posterior N at its σ; no refit; the user's object stays."""
    model, train, val = regression()
    likelihood = lk.likelihoods.Gaussian()
    posterior = lk.LaplacePosterior(model, likelihood).fit(train)
    result = quiet(posterior, val, generator=rng(0))
    rms = float((model(val[0]) - val[1]).square().mean().sqrt())
    exact = float(-torch.distributions.Normal(model(val[0]), rms).log_prob(val[1]).mean())
    assert result.map_objective == pytest.approx(exact, abs=1e-4)
    sigma = result.best["noise"]
    assert likelihood.scale == 1.0 and posterior.likelihood.scale == sigma
    assert 0.5 * rms < sigma < 1.01 * rms
    again = -posterior.predict(val[0], samples=2000, generator=rng(0)).log_prob(val[1]).mean()
    assert float(again) == pytest.approx(result.best["objective"], abs=0.05)
    for factor in (0.7, 1.4):  # the best noise at this spread
        other = lk.likelihoods.Gaussian(scale=sigma * factor)
        drawn = posterior.predict(val[0], method="mc", samples=2000, generator=rng(0), keep_samples=True).samples
        assert float(-other.predict(drawn).log_prob(val[1]).mean()) > float(again) - 0.005
    refit = lk.LaplacePosterior(model, lk.likelihoods.Gaussian(scale=sigma)).fit(train)
    refit.n_data, refit.prior_precision = posterior.n_data, posterior.prior_precision
    one, two = refit.precision.dense(), posterior.precision.dense()
    assert float((one - two).abs().max() / one.abs().max()) < 1e-4
    again = quiet(posterior, val, generator=rng(0))  # a second search tunes it again, from where it is
    assert again.best["noise"] == pytest.approx(sigma, rel=0.01)
    assert again.map_objective == pytest.approx(result.map_objective, abs=1e-4)


def test_a_noise_scale_that_was_chosen_is_kept() -> None:
    model, train, val = regression()
    chosen = lk.LaplacePosterior(model, lk.likelihoods.Gaussian(scale=0.35)).fit(train)
    assert "noise" not in quiet(chosen, val, generator=rng(0)).best and chosen.likelihood.scale == 0.35
    default = lk.LaplacePosterior(model, "gaussian").fit(train)
    assert "noise" not in quiet(default, val, generator=rng(0), noise=False).best
    assert default.likelihood.scale == 1.0
    grids = {"n_data": [40.0, 400.0], "prior_precision": [1.0, 10.0]}
    assert "noise" not in quiet(default, val, generator=rng(0), **grids).best
    found = quiet(default, val, generator=rng(0), noise=True, **grids)
    rms = float((model(val[0]) - val[1]).square().mean().sqrt())
    assert found.best["noise"] == pytest.approx(rms, rel=2e-3)
    assert found.best["n_data"] in grids["n_data"] and default.likelihood.scale == found.best["noise"]
    again = -default.predict(val[0], samples=2000, generator=rng(0)).log_prob(val[1]).mean()
    assert float(again) == pytest.approx(found.best["objective"], abs=0.05)


# ------------------------------------------------------------------------------------------------ objectives


def _prediction(probs: Tensor) -> Any:
    return lk.likelihoods.Categorical().predict(probs.log()[None])


def test_scores_of_classes() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.6, 0.0001], [0.3, 0.3, 0.4]]).double()
    probs = probs / probs.sum(-1, keepdim=True)
    y = torch.tensor([0, 0, 2])
    found = OBJECTIVES["brier"](_prediction(probs), y)
    one_hot = torch.eye(3).double()[y]
    assert torch.allclose(found, (probs - one_hot).square().sum(1), atol=1e-12)
    assert torch.allclose(OBJECTIVES["nll"](_prediction(probs), y), -probs[range(3), y].log(), atol=1e-12)
    confidence, hits = probs.amax(1), torch.tensor([1.0, 0.0, 1.0]).double()  # three different bins
    assert float(OBJECTIVES["ece"](_prediction(probs), y)) == pytest.approx(float((confidence - hits).abs().mean()))
    uniform = torch.full((4, 3), 1 / 3).double()
    assert torch.allclose(missing_entropy(_prediction(uniform)), torch.zeros(4).double(), atol=1e-9)
    expected = math.log(3) + (probs * probs.log()).sum(1)
    assert torch.allclose(missing_entropy(_prediction(probs)), expected, atol=1e-9)


def test_ece_of_many_bins() -> None:
    """Against a loop over the bins."""
    probs = torch.rand(200, 4, generator=rng(0)).double().softmax(-1).pow(3)
    probs = probs / probs.sum(-1, keepdim=True)
    y = torch.randint(4, (200,), generator=rng(1))
    y[:10] = -100
    confidence, label = probs[10:].max(-1)
    total = 0.0
    for k in range(15):
        inside = (confidence >= k / 15) & (confidence < (k + 1) / 15)
        if inside.any():
            hits = (label[inside] == y[10:][inside]).double().mean()
            total += float(inside.double().mean() * (confidence[inside].mean() - hits).abs())
    assert float(OBJECTIVES["ece"](_prediction(probs), y)) == pytest.approx(total, rel=1e-9)


def test_scores_of_images_and_sequences() -> None:
    """Positions that are ignored do not count, whatever the layout."""
    z = torch.randn(1, 3, 4, 2, 2, generator=rng(0)).double()
    y = torch.randint(4, (3, 2, 2), generator=rng(1))
    y[0, 0, 0] = -100
    image = lk.likelihoods.Categorical().predict(z)
    rows = lk.likelihoods.Categorical().predict(z.flatten(3).transpose(2, 3))
    for name in ("brier", "ece"):
        one, two = OBJECTIVES[name](image, y), OBJECTIVES[name](rows, y.flatten(1))
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(two), atol=1e-12)
    assert torch.allclose(missing_entropy(image), missing_entropy(rows), atol=1e-12)
    probs = z[0].softmax(1).movedim(1, -1)
    squares = (probs - torch.eye(4).double()[y.clamp_min(0)]).square().sum(-1)
    assert float(OBJECTIVES["brier"](image, y)[0]) == pytest.approx(float(squares[0].flatten()[1:].mean()))


def test_objectives_need_probabilities() -> None:
    model, train, val = regression()
    posterior = lk.LaplacePosterior(model, "gaussian").fit(train)
    for options in ({"objective": "brier"}, {"objective": "ece"}, {"objective": "ood", "ood": val[0]}):
        with pytest.raises(lk.errors.IncompatiblePair, match="probabilities"):
            posterior.tune(val, noise=False, **options)
    with pytest.raises(lk.errors.IncompatiblePair, match="ood"):
        posterior.tune(val, objective="ood")
    with pytest.raises(lk.errors.IncompatiblePair, match="ood"):
        posterior.tune(val, ood=val[0])
    with pytest.raises(lk.errors.UnknownName, match="evidence"):
        posterior.tune(val, objective="loss")


@pytest.mark.parametrize("objective", ["brier", "ece"])
def test_other_objectives_are_searched(objective: str) -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    result = quiet(posterior, val, objective=objective, generator=rng(0))
    assert result.objective == objective and not result.map_wins
    assert result.best["objective"] < result.map_objective
    assert (result.gain_error is None) == (objective == "ece")


def test_callables_of_both_kinds() -> None:
    """A mean score, or scores by example, which alone tell the noise of the validation set."""
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    grids = {"n_data": [40.0], "prior_precision": [1.0, 10.0, 100.0]}
    named = quiet(posterior, val, generator=rng(0), **grids)
    mean = quiet(posterior, val, lambda p, y: float(-p.log_prob(y).mean()), generator=rng(0), **grids)
    parts = quiet(posterior, val, lambda p, y: -p.log_prob(y), generator=rng(0), **grids)
    for other in (mean, parts):
        for one, two in zip(named.table, other.table, strict=True):
            assert one["objective"] == pytest.approx(two["objective"], rel=1e-6)
    assert mean.gain_error is None and parts.gain_error == pytest.approx(named.gain_error)


def test_out_of_distribution_contrast() -> None:
    """The table is validation NLL plus the weighted mean of the missing entropy far away; it asks for more spread."""
    model, train, val = classification()
    far = 8 * torch.randn(60, 2, generator=rng(9))
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    result = quiet(posterior, val, objective="ood", ood=[far[:20], (far[20:], None)], generator=rng(0))
    probs = model(far).softmax(-1).detach()
    missing = math.log(2) + (probs * probs.log()).nansum(1).mean()
    nll = nn.functional.cross_entropy(model(val[0]), val[1])
    assert result.map_objective == pytest.approx(float(nll + 0.5 * missing), rel=1e-4)
    entropy = float(posterior.predict(far, method="mc", samples=100, generator=rng(1)).entropy.mean())
    quiet(posterior, val, generator=rng(0))
    assert entropy > float(posterior.predict(far, method="mc", samples=100, generator=rng(1)).entropy.mean())
    strong = quiet(posterior, val, objective=OODContrast(far, weight=5.0), generator=rng(0))
    assert strong.objective == "OODContrast"
    assert float(posterior.predict(far, method="mc", samples=100, generator=rng(1)).entropy.mean()) > entropy - 0.02


@pytest.mark.parametrize(
    ("scores", "taken", "at_edge"),
    [
        ([9.0, 2.0, 1.05, 1.0, 0.9], 2, False),  # the smallest that is near MAP
        ([1.0, 2.0, 1.05, 1.0, 0.9], 2, False),  # what comes below one that is not near is not taken
        ([1.0, 1.0, 1.05, 1.0, 0.9], 0, True),
        ([9.0, 9.0, 9.0, 9.0, math.nan], 4, True),
    ],
)
def test_the_widest_point_near_map(scores: list[float], taken: int, at_edge: bool) -> None:
    priors = [0.01, 0.1, 1.0, 10.0, 100.0]
    known = dict(zip(priors, scores, strict=True))

    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        return {point: Score(1.0 if point == MAP else known.get(point[1], 9.0)) for point in points}

    assert widest(Search(measure, "score"), 5.0, list(priors), 0.1, 0) == ((5.0, priors[taken]), at_edge)
    found, edge = widest(Search(measure, "score"), 5.0, longer := list(priors), 0.1, 1)
    if at_edge and taken == 0:  # one further value, which is not near
        assert longer[0] == pytest.approx(0.001) and found == (5.0, 0.01) and not edge
    elif at_edge:
        assert longer[-1] == pytest.approx(1000.0) and edge
    else:
        assert longer == priors


def test_the_largest_variance_within_a_tolerance() -> None:
    """The smallest λ whose table entry is within the tolerance of MAP; the best score has another one."""
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    priors = [10 ** (k / 2) for k in range(-6, 7)]
    settings = {"prior_precision": priors, "method": "probit"}
    best = quiet(posterior, val, n_data=[40.0], generator=rng(0), **settings)
    found = {}
    for tolerance in (0.0, 0.05):
        result = quiet(posterior, val, objective=WithinTolerance(tolerance), generator=rng(0), **settings)
        near = [r["prior_precision"] for r in best.table if r["objective"] <= best.map_objective + tolerance]
        assert result.best["prior_precision"] == posterior.prior_precision == min(near)
        assert result.best["n_data"] == posterior.n_data == 40.0 and posterior.method == "probit"
        assert [row["objective"] for row in result.table] == pytest.approx([row["objective"] for row in best.table])
        found[tolerance] = result.best["prior_precision"]
    assert found[0.05] <= found[0.0] < best.best["prior_precision"]
    alone = quiet(posterior, val, objective=WithinTolerance(0.05), method="probit", generator=rng(0))
    assert len(alone.table) == 17 and alone.objective == "WithinTolerance"
    other = quiet(posterior, val, objective=WithinTolerance(0.05, of="brier"), generator=rng(0), **settings)
    brier = quiet(posterior, val, objective="brier", n_data=[40.0], generator=rng(0), **settings)
    assert other.map_objective == pytest.approx(brier.map_objective)
    with pytest.raises(lk.errors.IncompatiblePair, match="leave n_data out"):
        posterior.tune(val, WithinTolerance(), n_data=[1.0, 2.0])
    with pytest.raises(ValueError, match="≥ 0"):
        WithinTolerance(-1.0)
    with pytest.raises(lk.errors.UnknownName):
        WithinTolerance(of="accuracyy")


def test_map_method_has_nothing_to_tune() -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    result = quiet(posterior, val, method="map", generator=rng(0))
    assert result.map_wins and result.best["objective"] == pytest.approx(result.map_objective)
    with pytest.raises(lk.errors.UnknownName, match="mc"):
        posterior.tune(val, method="bootstrap")


# ------------------------------------------------------------------------------------------------ ways to predict


@pytest.mark.parametrize("method", ["linearized", "probit"])
@pytest.mark.parametrize("make", [classification, regression])
def test_linearized_scores_are_those_of_predict(make: Any, method: str) -> None:
    """Every row of the table equals the prediction at its setting; loaders and pairs give the same."""
    model, train, (x, y) = make()
    posterior = lk.LaplacePosterior(model, "categorical" if make is classification else "gaussian").fit(train)
    grids = {"n_data": [40.0, 4000.0], "prior_precision": [1.0, 30.0]}
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    result = quiet(posterior, batches, method=method, samples=4000, generator=rng(0), **grids)
    link = posterior.likelihood.link("probit" if method == "probit" else None)
    tolerance = 1e-4 if link.marginal or make is regression else 0.1
    for row in result.table:
        posterior.n_data, posterior.prior_precision = row["n_data"], row["prior_precision"]
        exact = -posterior.predict(x, method=method, samples=4000, generator=rng(1)).log_prob(y).mean()
        assert row["objective"] == pytest.approx(float(exact), abs=tolerance)


@pytest.mark.parametrize("method", ["linearized", "probit"])
def test_default_search_over_the_linearized_network(method: str) -> None:
    """Regression with its noise: better than MAP's own best noise on the validation data, and set to that."""
    model, train, val = regression()
    posterior = lk.LaplacePosterior(model, "gaussian").fit(train)
    result = quiet(posterior, val, method=method, generator=rng(0))
    exact = -posterior.predict(val[0], method=method).log_prob(val[1]).mean()
    assert float(exact) == pytest.approx(result.best["objective"], abs=1e-3)
    assert result.best["objective"] <= result.map_objective
    assert posterior.likelihood.scale == result.best["noise"]


def test_probit_needs_a_likelihood_with_it() -> None:
    x, y = torch.randn(20, 2, generator=rng(0)), torch.ones(20, 2)
    posterior = lk.LaplacePosterior(nn.Linear(2, 2), "poisson").fit((x, y))
    if "probit" not in posterior.likelihood.links():
        with pytest.raises(lk.errors.IncompatiblePair, match="probit"):
            posterior.tune((x, y), method="probit")
    assert quiet(posterior, (x, y), method="linearized", generator=rng(0)).table


# ------------------------------------------------------------------------------------------------ what a call leaves


@pytest.mark.parametrize("method", ["mc", "linearized"])
def test_map_in_effect_is_neither_worse_nor_better_than_map(method: str) -> None:
    """Labels as the network has them, less surely than it could: every spread of the weights makes it worse."""
    for seed in range(2):
        x = torch.randn(16, 3, generator=rng(seed))
        model = trained((3, 4, 2), x, torch.zeros(16, 2), nn.functional.binary_cross_entropy_with_logits, steps=0)
        y = (model(x).detach() > 0).float()
        posterior = lk.LaplacePosterior(model, "bernoulli").fit((x, y))
        result = quiet(posterior, (x, y), method=method, generator=rng(seed))
        assert result.map_wins
        tolerance = 1.01e-4 * (1 + abs(result.map_objective))
        assert result.best["objective"] == pytest.approx(result.map_objective, abs=tolerance)


@pytest.mark.parametrize("method", ["mc", "linearized"])
def test_chance_is_no_reason_for_a_spread(method: str) -> None:
    """Labels without any signal: some wide posterior gains a little by chance. Only the modest spread may be kept."""
    taken = 0
    for seed in range(4):
        x, y = torch.randn(16, 3, generator=rng(seed)), torch.randint(0, 2, (16, 2), generator=rng(9 + seed)).float()
        model = trained((3, 4, 2), x, y, nn.functional.binary_cross_entropy_with_logits, steps=0)
        posterior = lk.LaplacePosterior(model, "bernoulli").fit((x, y))
        result = quiet(posterior, (x, y), method=method, generator=rng(seed))
        modest = result.best["prior_precision"] / result.best["n_data"] == pytest.approx(1 / 16, rel=1e-6)
        taken += method == "linearized" and modest and not result.map_wins
        if not result.map_wins:
            assert result.gain is not None and result.gain_error is not None
            assert (modest and 0 < result.gain < 0.01) or result.gain > result.gain_error
    assert taken or method == "mc"


@pytest.mark.parametrize("objective", ["nll", "brier"])
def test_examples_without_a_target_change_no_score(objective: str) -> None:
    """Not even how many there are to take the mean over; neither with a loader whose last minibatch has no other."""
    model, train, (x, y) = classification()
    marked = torch.cat([y[:50], torch.full((150,), -100)])
    options = {"n_data": [40.0], "prior_precision": [1.0, 9.0], "method": "probit", "objective": objective}
    found = quiet(lk.LaplacePosterior(model, "categorical").fit(train), (x, marked), **options)
    batched = quiet(
        lk.LaplacePosterior(model, "categorical").fit(train), [(x[:60], marked[:60]), (x[60:], marked[60:])], **options
    )
    alone = quiet(lk.LaplacePosterior(model, "categorical").fit(train), (x[:50], y[:50]), **options)
    for one, two, wanted in zip(found.table, batched.table, alone.table, strict=True):
        assert set(one) == {"n_data", "prior_precision", "objective"}
        assert one["objective"] == pytest.approx(wanted["objective"], rel=1e-5)
        assert two["objective"] == pytest.approx(wanted["objective"], rel=1e-5)
    assert found.gain_error == pytest.approx(alone.gain_error, rel=1e-4)


def test_ignored_targets_do_not_count() -> None:
    """Whatever number marks them: no score but that of the targets that are left (all classes are real ones)."""
    x, y = torch.randn(6, 4, 3, generator=rng(0)), torch.randint(0, 3, (6, 4), generator=rng(1))
    for mark in (-100, 255, 0):
        likelihood = lk.likelihoods.Categorical(ignore_index=mark)
        found, keep = likelihood.predict(x[None]), torch.rand(6, 4, generator=rng(2)) > 0.4
        labels = y.where(y != mark, 1)
        marked, probs = labels.where(keep, mark), torch.softmax(x, -1)
        squares = (probs - nn.functional.one_hot(labels, 3)).square().sum(-1)
        expected = torch.stack([s[k].mean() for s, k in zip(squares, keep, strict=True) if k.any()])
        torch.testing.assert_close(OBJECTIVES["brier"](found, marked), expected)
        plain = lk.likelihoods.Categorical().predict(x[keep][None])
        torch.testing.assert_close(OBJECTIVES["ece"](found, marked), OBJECTIVES["ece"](plain, labels[keep]))
    likelihood = lk.likelihoods.Bernoulli()
    z = torch.tensor([[0.3, -1.0], [2.0, 0.5], [1.0, 1.0]])
    targets = torch.tensor([[1.0, -100.0], [0.0, 1.0], [-100.0, -100.0]])
    p = z.sigmoid()
    expected = torch.stack([(p[0, 0] - 1) ** 2, p[1, 0] ** 2 + (p[1, 1] - 1) ** 2])
    torch.testing.assert_close(OBJECTIVES["brier"](likelihood.predict(z[None]), targets), expected)


def test_a_warning_that_is_an_error_leaves_the_posterior_as_it_was() -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    before = posterior.n_data, posterior.prior_precision
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="edge"):
            posterior.tune(
                val, n_data=[40.0], prior_precision=[1e-6, 1e6, 1e7], method="mc", samples=3, generator=rng(0)
            )
    assert (posterior.n_data, posterior.prior_precision) == before


def test_out_of_distribution_pairs_and_wrong_limits() -> None:
    model, train, val = classification()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    options = {"n_data": [4.0, 40.0], "prior_precision": [1.0], "samples": 3}
    far = 5 * torch.randn(20, 2, generator=rng(3))
    plain = quiet(posterior, val, "ood", ood=far, generator=rng(0), **options)
    pair = quiet(posterior, val, "ood", ood=(far, torch.zeros(20)), generator=rng(0), **options)
    assert [row["objective"] for row in pair.table] == pytest.approx([row["objective"] for row in plain.table])
    with pytest.raises(ValueError, match="max_examples"):
        posterior.tune(val, max_examples=0)


@pytest.mark.parametrize("structure", ["kron", "full", "ekfac", "lowrank"])
def test_evidence_and_predictions_inside_inference_mode(structure: str) -> None:
    """Everything works there, gives the same, and leaves nothing behind that later has no gradient."""
    model, train, val = classification()
    model = model.double()
    train, val = (train[0].double(), train[1]), (val[0].double(), val[1])

    def everything(posterior: Any) -> list[Tensor]:
        found = [posterior.predict(val[0], m, generator=rng(0)).probs for m in ("mc", "linearized", "probit", "map")]
        found += [posterior.functional_covariance(val[0]), posterior.log_evidence()]
        quiet(posterior, objective="evidence")
        found += [posterior.log_evidence()]
        quiet(posterior, objective="evidence", per_block=True)
        found += [posterior.log_evidence()]
        quiet(posterior, val, method="linearized", n_data=[4.0, 40.0], prior_precision=[1.0])
        return [value.detach() for value in [*found, posterior.log_evidence()]]

    expected = everything(lk.LaplacePosterior(model, "categorical", structure).fit(train))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            posterior = lk.LaplacePosterior(model, "categorical", structure).fit(train)
            found = everything(posterior)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        posterior.prior_precision = prior = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (posterior.log_evidence() + posterior.functional_covariance(val[0]).sum()).backward()
        assert prior.grad is not None and bool(torch.isfinite(prior.grad))
        posterior.penalty().backward()
        model.zero_grad()


def test_load_keeps_a_mean_of_several_types(tmp_path: Any) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 4).bfloat16(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x.bfloat16())).float())

    _, train, _ = classification()
    model = Mixed()
    posterior = lk.LaplacePosterior(model, "categorical").fit(train)
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert all(torch.equal(loaded.mean[name], value) for name, value in posterior.mean.items())
