"""A ``tune`` that is stopped at any measurement goes on with the same numbers, bit for bit."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import laplace_kf as lk
from laplace_kf import files
from laplace_kf.posterior import kept_scores, predictors
from tests.cases import labels, normal, rng
from tests.resuming.test_fits import Killed, made

X, Y = normal(30, 3, seed=1), labels(3, 30, seed=2)
VAL, WANTED = normal(24, 3, seed=3), labels(3, 24, seed=4)
NUMBERS = normal(24, 2, seed=5)
GRID: dict[str, Any] = {"n_data": [10.0, 100.0], "prior_precision": [0.1, 1.0, 10.0], "samples": 3}


def network(outputs: int) -> torch.nn.Module:
    return made(
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)).double()
    )


def classifier() -> lk.LaplacePosterior:
    return lk.LaplacePosterior(network(3), "categorical").fit(X, Y)


def regression() -> lk.LaplacePosterior:
    return lk.LaplacePosterior(network(2), "gaussian", "diag").fit(X, normal(30, 2, seed=6))


CASES: dict[str, tuple[Callable[[], lk.LaplacePosterior], Tensor, dict[str, Any]]] = {
    "contest": (classifier, WANTED, {"samples": 2, "budget": 0.3}),
    "budget": (classifier, WANTED, {"samples": 2, "budget": 0.05}),
    "mc": (classifier, WANTED, {"samples": 3, "method": "mc"}),
    "grid": (classifier, WANTED, {**GRID, "method": "mc"}),
    "linearized-grid": (classifier, WANTED, {**GRID, "method": "linearized"}),
    "noise": (regression, NUMBERS, {"samples": 2, "budget": 0.3}),
}


@pytest.fixture(autouse=True)
def every_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third time something is written, however fast the machine, and need not reach the disk."""
    ticks = itertools.count()
    monkeypatch.setattr(kept_scores, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(kept_scores, "SECONDS", 3.0)
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


class Meter:
    """Counts runs of the network at other weights (many at once), and ends the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last, self.run = 0, -1, predictors.outputs_at
        self.moments = predictors.Linearization.moments
        monkeypatch.setattr(predictors, "outputs_at", lambda *args: self.use(self.run, *args))
        monkeypatch.setattr(predictors.Linearization, "moments", lambda *a, **k: self.use(self.moments, *a, **k))

    def use(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.count == self.last:
            raise Killed
        self.count += 1
        return function(*args, **kwargs)

    def again(self, last: int = -1) -> None:
        self.count, self.last = 0, last


def tuned(name: str, path: Path | None = None) -> Any:
    posterior, val, settings = CASES[name][0](), CASES[name][1], CASES[name][2]
    data = [(VAL[:10], val[:10]), (VAL[10:], val[10:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {} if path is None else {"checkpoint": path}
        found = posterior.tune(data, generator=rng(3), **settings, **more)
    state = posterior.packed()[1]
    return found, {key: state[key] for key in ("n_data", "prior_precision", "likelihood", "method", "temperature")}


@pytest.mark.parametrize("name", [*list(CASES)[:-1], pytest.param("noise", marks=pytest.mark.nightly)])
def test_stopped_at_many_measurements(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meter = tmp_path / "tune", Meter(monkeypatch)
    whole = tuned(name)
    total = meter.count
    if total < 50:  # what was measured last has to be there
        monkeypatch.setattr(kept_scores, "SECONDS", 0.0)
    meter.again()
    assert repr(tuned(name, path)) == repr(whole)  # every digit of every number
    assert meter.count == total and not path.exists()
    at = {"contest": total - 1, "mc": total // 3, "grid": total - 1}
    meter.again(at.get(name, total // 2))
    with pytest.raises(Killed):
        tuned(name, path)
    there = path.exists()
    meter.again()
    found = tuned(name, path)
    assert repr(found) == repr(whole) and found[0].table == whole[0].table
    saved = total - meter.count
    assert there or meter.count == total
    assert not list(tmp_path.iterdir())
    assert saved > 0 or total < 3  # variances are found in one pass


def test_stopped_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meter = tmp_path / "tune", Meter(monkeypatch)
    whole = tuned("mc")
    step, tries = meter.count // 4, 0
    while True:
        meter.again(step)
        tries += 1
        try:
            assert repr(tuned("mc", path)) == repr(whole)
            break
        except Killed:
            assert tries < 20
    assert tries > 2


def test_not_everything_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tune"
    kept = kept_scores.KeptScores(path, {})  # reads the clock, and so does every attempt: 3 seconds are 3 of them
    there = []
    for k in range(4):
        kept.keep_score([k], {"nll": 1.0}, None)
        kept.write()
        there.append(path.exists())
    assert there == [False, False, True, True]


def test_another_search_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meter = tmp_path / "tune", Meter(monkeypatch)
    monkeypatch.setattr(kept_scores, "SECONDS", 0.0)
    meter.again(7)
    with pytest.raises(Killed):
        tuned("grid", path)
    meter.again()
    kept, posterior = path.read_bytes(), classifier()

    def refused(match: str, posterior: lk.LaplacePosterior = posterior, val: Any = None, **changes: Any) -> None:
        settings = {**GRID, "method": "mc", "generator": rng(3), **changes}
        before = posterior.n_data, posterior.prior_precision, posterior.method
        data = val or [(VAL[:10], WANTED[:10]), (VAL[10:], WANTED[10:])]
        with pytest.raises(lk.errors.ShapeMismatch, match=match):
            posterior.tune(data, checkpoint=path, **settings)
        assert path.read_bytes() == kept
        assert (posterior.n_data, posterior.prior_precision, posterior.method) == before

    refused("its samples was 3, and is 4", samples=4)
    refused("its method was 'mc', and is 'linearized'", method="linearized")
    refused("its grids was", n_data=[10.0])
    refused("its objective was 'nll', and is 'brier'", objective="brier")
    refused("generator in another state", generator=rng(4))
    refused("outputs or targets differ", val=[(VAL[:10], WANTED[:10]), (VAL[10:], WANTED[10:].flip(0))])
    refused("its posterior was", lk.LaplacePosterior(network(3), "categorical").fit(X[:20], Y[:20]))
    other = classifier()
    other.prior_precision = 2.0
    refused("n_data and prior_precision", other)
    with pytest.raises(lk.errors.CorruptFile, match="checkpoint of tune"):
        posterior.fit(X, Y, checkpoint=path)
    posterior.save(path)
    with pytest.raises(lk.errors.CorruptFile, match="it holds a laplace_kf posterior"):
        posterior.tune((VAL, WANTED), checkpoint=path, **GRID)
    with pytest.raises(FileNotFoundError):
        posterior.tune((VAL, WANTED), checkpoint=tmp_path / "missing" / "tune", **GRID)


def test_a_failed_search_leaves_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, meter, generator, posterior = tmp_path / "tune", Meter(monkeypatch), rng(3), classifier()
    meter.again(4)
    with pytest.raises(Killed):
        posterior.tune((VAL, WANTED), generator=generator, checkpoint=path, method="mc", **GRID)
    assert torch.equal(generator.get_state(), rng(3).get_state())
    meter.again()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = posterior.tune((VAL, WANTED), generator=generator, checkpoint=path, method="mc", **GRID)
        wanted = classifier().tune((VAL, WANTED), generator=rng(3), method="mc", **GRID)
    assert found.table == wanted.table


def test_the_evidence_writes_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier().tune(objective="evidence", checkpoint=tmp_path / "tune")
    assert not list(tmp_path.iterdir())
