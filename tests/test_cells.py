"""The hand-written code that fits are compared with computes the same, and its page says who is behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from benchmarks import by_hand, cells
from benchmarks.networks import NETWORKS, Problem
from experiments import site_tables


def small_convolutions() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return Problem(model, [(torch.randn(5, 2, 6, 6), torch.arange(5) % 3) for _ in range(2)], "categorical")


def dense(likelihood: str) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3))
    y = torch.arange(5) % 3 if likelihood == "categorical" else torch.rand(5, 3).round()
    return Problem(model, [(torch.randn(5, 4), y)], likelihood)


@pytest.mark.parametrize("make", [small_convolutions, lambda: dense("categorical"), lambda: dense("bernoulli")])
def test_the_hand_written_fits_are_those_of_the_package(make: Any) -> None:
    problem = make()
    for structure in ("kron", "diag"):
        posterior = lk.LaplacePosterior(problem.model, problem.likelihood, structure).fit(problem.batches)
        sums = posterior.statistics.sums
        for name, module in problem.model.named_children():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            first, second = by_hand.fit(problem, structure, False)[module]
            if structure == "diag":
                torch.testing.assert_close(sums[name][0][0, :, :-1], first, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(sums[name][0][0, :, -1], second, rtol=1e-4, atol=1e-6)
                continue
            a, g = sums[name][0][0], sums[name][1][0]
            torch.testing.assert_close(a[:-1, :-1].tril(), first.tril(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(g.tril(), second.tril(), rtol=1e-4, atol=1e-5)


def test_hand_written_ekfac_last_layer_and_kfra() -> None:
    problem = dense("categorical")
    posterior = lk.LaplacePosterior(problem.model, "categorical", "ekfac").fit(problem.batches)
    found = by_hand.ekfac(problem)
    for name, module in problem.model.named_children():
        if isinstance(module, nn.Linear):
            (matrix,) = (m for block, m in posterior.curvature.entries if block.name == name)
            mine, theirs = (v.flatten().sort()[0] for v in (found[module], 5 * matrix.spectrum()))
            torch.testing.assert_close(mine, theirs.to(mine), rtol=1e-3, atol=1e-4)  # the order of equal ones is free
    full = lk.LaplacePosterior(problem.model, "categorical", "full", parameters="last_layer").fit(problem.batches)
    lower = by_hand.last_layer(problem)
    weight, bias = torch.arange(903).reshape(3, 301)[:, :300].flatten(), torch.arange(903).reshape(3, 301)[:, 300]
    order = torch.cat([weight, bias])
    whole = torch.tril(lower) + torch.tril(lower, -1).T
    torch.testing.assert_close(whole[order][:, order], 5 * full.curvature.dense(), rtol=1e-4, atol=1e-5)
    problem = dense("bernoulli")
    sums = lk.LaplacePosterior(problem.model, "bernoulli", "kron", "recursive").fit(problem.batches).statistics.sums
    for module, (first, second) in by_hand.kfra(problem).items():
        name = next(n for n, m in problem.model.named_children() if m is module)
        torch.testing.assert_close(sums[name][0][0][:-1, :-1].tril(), first.tril(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums[name][1][0], second, rtol=1e-4, atol=1e-5)


def test_a_cell_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cells.NETWORKS, "lenet", small_convolutions)
    monkeypatch.setattr(cells, "FITS", {"another": _missing, "none": lambda *given: None})
    found = cells.measure("lenet, kron sampled", 1)
    assert found["bytes"].keys() == found["costs"].keys()
    assert found["costs"].keys() == {"by hand", "laplace_kf"} and "ImportError" in found["missing"]["another"]
    assert "not measured: another" in cells.text({"workload": "w", "cells": {"lenet, kron sampled": found}})


def _missing(*given: Any) -> Any:
    raise ImportError("no such library")


def test_what_is_behind_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"laplace_kf": 2.0, "by hand": 1.5, "curvlinops": 1.9, "BackPACK": 2.1}
    held = {"laplace_kf": 200e6, "by hand": 100e6}
    result = {
        "workload": "w", "unit": "u", "machine": {"cpu": "c", "cores": 2}, "versions": {"torch": "t"},
        "reasons": {"x": "why", "tiny, small jobs": "small"},
        "cells": {"x": {"costs": costs, "missing": {"asdl": "gone"}}, "y": {"costs": {**costs, "laplace_kf": 1.6}},
                  "z": {"costs": {**costs, "laplace_kf": 1.6}, "bytes": held}},
    }  # fmt: skip
    monkeypatch.setattr(site_tables, "_benchmark", lambda name: result)
    lines = site_tables.cells().splitlines()
    (one,) = (line for line in lines if line.startswith("| x "))
    (other,) = (line for line in lines if line.startswith("| y "))
    assert "**behind curvlinops**" in one and "**beyond the bound**" in one and "BackPACK" not in one
    assert "**" not in other
    (larger,) = (line for line in lines if line.startswith("| z "))
    assert "| 200 | 100 | **more memory** |" in larger
    assert "* *x*: why." in lines and any("asdl is not measured: gone" in line for line in lines)


def test_every_cell_has_its_network() -> None:
    assert {network for network, _, _ in cells.CELLS.values()} <= NETWORKS.keys()
    assert cells.REASONS.keys() <= cells.CELLS.keys()
