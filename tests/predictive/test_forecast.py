"""Exact variances that are going to take long are announced, with the line that does not."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf import forecast
from laplace_kf.predictive import linearized

X, Y = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(100).reshape(4, 5, 5) % 3


@pytest.fixture
def posterior(monkeypatch: pytest.MonkeyPatch) -> lk.LaplacePosterior:
    """For images of 75 outputs, on a machine on which the first variances have taken long."""
    monkeypatch.setattr(forecast, "SLOW", 0.0)
    monkeypatch.setattr(forecast, "SURE", 0.0)
    monkeypatch.setattr(linearized, "COLUMN_BYTES", 2**14)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return lk.LaplacePosterior(model, "categorical", structure="diag").fit([(X, Y)])


def test_slow_variances_are_announced_once_at_the_users_line(posterior: lk.LaplacePosterior) -> None:
    with pytest.warns(UserWarning, match="75 outputs of an example; those of these 4 examples will take about") as seen:
        slow = posterior.predict(X)
    assert len(seen) == 1 and seen[0].filename == __file__
    (line,) = re.findall(r"posterior\.predict\(x, [^)]*\)", str(seen[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = eval(line, {"posterior": posterior, "x": X})  # it can be pasted
    assert fast.probs.shape == slow.probs.shape


def test_variances_that_are_soon_made_are_not_announced(
    posterior: lk.LaplacePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "SLOW", 1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.predict(X)


def test_what_is_made_in_one_run_is_not_announced(
    posterior: lk.LaplacePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearized, "COLUMN_BYTES", 2**27)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.predict(X)


def test_tuning_keeps_to_its_budget_instead(posterior: lk.LaplacePosterior) -> None:
    """It knows before what a look costs, and leaves out what is too dear."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = posterior.tune([(X, Y)], budget=0.001, generator=torch.Generator().manual_seed(0))
    assert not [w for w in seen if "backward pass for each" in str(w.message)]
    assert "left_out" in next(c for c in result.candidates if c["method"] == "probit")
