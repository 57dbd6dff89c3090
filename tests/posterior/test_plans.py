"""What a plan says beside what happens: counts exactly, memory closely, seconds by a clock that the test drives."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import engine, rates
from laplace_kf.forecast import Progress, duration, size
from laplace_kf.peaks import Peak
from laplace_kf.posterior import planning
from laplace_kf.rates import decomposition_seconds


def data(n: int = 24, classes: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % classes


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes))


class Ticking:
    """A clock that says how often the model ran: one second for every forward pass of some examples."""

    def __init__(self, model: nn.Module) -> None:
        self.now = 0.0
        model.register_forward_pre_hook(lambda *_: setattr(self, "now", self.now + 1.0))

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No searches for memory, and no calibration: they are tested alone."""
    monkeypatch.setattr(planning, "MOST", 3)
    monkeypatch.setattr(lk.LaplacePosterior, "tune", lambda *a, **k: None)
    monkeypatch.setattr(rates, "_coefficients", lambda *a: (0.0, 1e-6))


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "ekfac", "lowrank"])
def test_seconds_of_a_fit_are_those_of_a_minibatch_for_each(structure: str, quick: None) -> None:
    model, (x, y) = network(), data()
    clock = Ticking(model)
    posterior = lk.LaplacePosterior(model, "categorical", structure)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)]
    plan = posterior.plan(batches, clock=clock)
    start = clock.now
    posterior.fit(batches)
    assert plan.fit.seconds == pytest.approx(clock.now - start, abs=1)
    assert (plan.examples, plan.minibatches) == (24, 6)


def test_a_plan_changes_nothing(quick: None) -> None:
    model, (x, y) = network(), data()
    model.train()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(7)
    )
    posterior = lk.LaplacePosterior(model, "categorical", estimator="sampled")

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), loader.generator.get_state().tolist(), random.getstate(),
            np.random.get_state()[1].tolist(), {k: v.tolist() for k, v in model.state_dict().items()}, model.training,
            posterior._state, posterior.structure.name, posterior.estimator.name,
        ]  # fmt: skip

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = posterior.plan(loader)
    assert state() == before and plan.minibatches == 3
    fitted = posterior.fit(loader)
    kept = fitted._state
    fitted.plan(loader)
    assert fitted._state is kept


def test_of_very_many_columns_the_first_are_sent_back(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MEMORY_BYTES", 1)
    monkeypatch.setattr(planning, "PATIENCE", 3.0)
    model, (x, y) = network(40), data(24, 40)
    posterior = lk.LaplacePosterior(model, "categorical")
    clock, done = Ticking(model), []
    real = engine.Accumulator.add_columns

    def counted(self: Any, signals: Any) -> None:
        clock.now += 1.0
        done.append(1)
        real(self, signals)

    monkeypatch.setattr(engine.Accumulator, "add_columns", counted)
    plan = posterior.plan([(x, y)] * 5, clock=clock)
    assert plan.columns == 39 and len(done) < 3 * 39
    start = clock.now
    done.clear()
    posterior.fit([(x, y)] * 5)
    assert len(done) >= 5 * 39
    assert plan.fit.seconds == pytest.approx(clock.now - start, rel=0.1)


def test_decompositions_are_not_made(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), data()
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: pytest.fail("a decomposition"))
    plan = lk.plan(model, "categorical", (x, y), method="mc", samples=3)
    sides = [5, 6, 7, 3]
    assert plan.decompositions.seconds == pytest.approx(1e-6 * sum(side**3 for side in sides))
    assert plan.decompositions.bytes >= 4 * sum(side**2 for side in sides)


def test_traffic_of_several_processes(quick: None) -> None:
    model, (x, y) = network(), data()
    alone, four = (lk.plan(model, "categorical", (x, y), processes=n, bandwidth=1e3) for n in (1, 4))
    sums = 4 * (5 * 5 + 6 * 6 + 7 * 7 + 3 * 3 + 2)
    assert alone.fit.traffic == 0
    assert four.fit.traffic == pytest.approx(2 * 3 / 4 * sums)
    assert four.decompositions.traffic == pytest.approx(3 / 4 * 4 * (5 * 5 + 6 * 6 + 7 * 7 + 3 * 3))


def test_memory_is_that_of_the_tensors(quick: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))
    x, y = data()
    plan = lk.plan(model, "categorical", [(x, y)] * 4, estimator="sampled")
    sums = 4 * (3 * 300**2 + 301**2)
    assert sums < plan.fit.bytes < 3 * sums
    assert plan.predict.bytes > plan.fit.bytes - sums + 2 * sums - 4 * 301**2


def test_memory_is_the_peak_of_a_fit_of_one_minibatch(quick: None) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))

    x, y = data()
    posterior = lk.LaplacePosterior(made(), "categorical")
    with Peak() as peak:
        posterior.fit([(x, y)])
    assert lk.plan(made(), "categorical", [(x, y)] * 4).fit.bytes == pytest.approx(peak.most, rel=0.02)


def test_a_search_of_a_large_dense_posterior_pays_for_the_eigenbasis(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    asked: list[list[int]] = []
    monkeypatch.setattr(planning, "decomposition_seconds", lambda sides, *more: asked.append(list(sides)) or 0.0)
    lk.plan(model, "categorical", [data()] * 4, structure="full")
    monkeypatch.setattr("laplace_kf.operators.curvature.LARGE", 10)
    lk.plan(model, "categorical", [data()] * 4, structure="full")
    assert asked == [[67], [67], [], [67]]  # of predictions, and of a search


@pytest.mark.parametrize("kind", ["generator", "no length", "empty", "budget", "processes", "targets"])
def test_what_cannot_be_planned_is_refused(kind: str) -> None:
    x, y = data()
    posterior = lk.LaplacePosterior(network(), "categorical")

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(x, y)] * 3)

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    given: Any = {"generator": iter([(x, y)]), "no length": stream, "empty": [], "targets": (x, y + 5)}.get(
        kind, (x, y)
    )
    settings: dict[str, Any] = {"budget": {"budget": -1.0}, "processes": {"processes": 0}}.get(kind, {})
    said = {
        "generator": "gone for the fit", "no length": "minibatches=", "empty": "nothing to plan", "budget": "budget",
        "processes": "processes", "targets": "outside",
    }[kind]  # fmt: skip
    with pytest.raises((lk.errors.LaplaceKFError, ValueError), match=said):
        posterior.plan(given, **settings)
    assert posterior._state is None
    if kind == "no length":
        assert posterior.plan(stream, minibatches=3).minibatches == 3


def test_a_plan_prints_and_a_search_has_its_budget() -> None:
    model, (x, y) = network(), data()
    plan = lk.plan(model, "categorical", (x, y), budget=1e-3)
    free = lk.plan(model, "categorical", (x, y), budget=None)
    assert 0 < plan.tune.seconds <= free.tune.seconds < math.inf
    assert [line.split()[0] for line in str(plan).splitlines()[1:5]] == ["fit", "decompositions", "tune", "predict"]
    assert plan.tune.bytes >= plan.predict.bytes > 0


# ------------------------------------------------------------------------------------------------ the parts


def test_the_peak_counts_what_is_made_inside_and_nothing_else() -> None:
    x = torch.zeros(1000)
    peak = Peak()
    with peak:
        view = x[:10]
        first = x + 1
        second = first * 2
        assert (peak.live, peak.most) == (8000, 8000)
        del first
        assert peak.live == 4000
        view.add_(1)
        weight = torch.ones(1000, requires_grad=True)
        (weight.exp() * second).sum().backward()
    assert peak.most >= 4 * 4000 and weight.grad is not None
    peak.begin()
    assert peak.most == peak.live


def test_sides_are_those_of_the_matrices_that_are_decomposed() -> None:
    model, (x, y) = network(), data()
    for name in ("kron", "full", "layer", "diag", "isotropic"):
        stats = lk.curvature.estimate(model, "categorical", (x, y), name)
        found = [
            side.shape[-1]
            for _, matrix in stats.mean().entries
            for side in matrix.undecomposed().values()  # type: ignore[attr-defined]
            for _ in range(side.shape[:-2].numel())
        ]
        assert stats.structure.sides(stats.blocks, stats.layout) == found, name


def test_decompositions_take_longer_the_larger_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_timed", lambda side, *_: 2e-8 * side**2 + 3e-10 * side**3)
    rates._coefficients.cache_clear()
    cpu = torch.device("cpu")
    found = decomposition_seconds([100, 1000], cpu, torch.float32)
    rates._coefficients.cache_clear()
    assert found == pytest.approx(2e-8 * (100**2 + 1000**2) + 3e-10 * (100**3 + 1000**3))
    assert decomposition_seconds([], cpu, torch.float32) == 0


def test_the_bar_says_what_is_held_and_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    model, (x, y) = network(), data()
    lk.LaplacePosterior(model, "categorical").fit([(x, y)] * 3, progress=True)
    assert "held, then" in capsys.readouterr().err
    lk.LaplacePosterior(model, "categorical", "diag").fit([(x, y)] * 3, progress=True)
    said = capsys.readouterr().err
    assert "held" in said and "then" not in said


def test_a_dense_matrix_that_was_chosen_says_what_its_decomposition_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 3))
    posterior = lk.LaplacePosterior(model, "categorical", "auto").fit(data())
    assert posterior.structure.name == "full" and "to decompose" in posterior.structure.reason


def test_progress_extrapolates_and_words_are_short() -> None:
    now = [0.0]
    progress = Progress(10, lambda: now[0])
    assert progress.left == 0
    now[0] = 2.0
    progress.done(4)
    assert progress.left == pytest.approx(3.0)
    progress.done(100)
    assert progress.left == 0
    assert [duration(s) for s in (0.01, 3, 600, 1e5, math.inf)] == ["10 ms", "3 s", "10 min", "27.8 h", "no limit"]
    assert [size(b) for b in (10, 2e3, 3e6, 4e9, 5e12)] == ["10 bytes", "2 kB", "3 MB", "4 GB", "5 TB"]
