"""The evidence as an objective of Optuna."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk

optuna = pytest.importorskip("optuna")


def data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 40)[:, None]
    return x, x + 0.1 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))


def line(trial: Any) -> nn.Module:
    """A line, or a network that is broken."""
    model = nn.Linear(1, 1, bias=trial.suggest_categorical("bias", [True, False]))
    with torch.no_grad():
        model.weight.fill_(float("nan") if trial.number == 3 else 1.0)
        if model.bias is not None:
            model.bias.fill_(0.5)  # of no use
    return model


def test_trials_have_the_evidence_of_their_networks() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options: dict[str, Any] = {"structure": "full", "dtype": torch.float64}
    objective = lk.bridges.optuna.evidence_objective(line, data(), "gaussian", **options)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=8)
    assert [trial.state.name for trial in study.trials].count("PRUNED") == 1 and study.trials[3].state.name == "PRUNED"
    assert study.best_params == {"bias": False}
    best = study.best_trial
    posterior = lk.LaplacePosterior(line(optuna.trial.FixedTrial(best.params)), "gaussian", **options).fit(data())
    posterior.tune(objective="evidence")
    assert best.value == pytest.approx(float(posterior.log_evidence()))
    assert best.user_attrs["prior_precision"] == pytest.approx(posterior.prior_precision)
    assert best.user_attrs["noise"] == pytest.approx(float(posterior.likelihood.noise_scale))
    assert best.user_attrs["fit"] == pytest.approx(float(posterior.evidence().fit))
    untuned = lk.bridges.optuna.evidence_objective(
        line, data(), lk.likelihoods.Gaussian(0.1), tune=False, prior_precision=3.0, **options
    )
    fixed = optuna.trial.FixedTrial({"bias": True})
    wanted = lk.LaplacePosterior(line(fixed), lk.likelihoods.Gaussian(0.1), prior_precision=3.0, **options).fit(data())
    assert untuned(fixed) == pytest.approx(float(wanted.log_evidence()))


def test_mistakes_are_not_pruned() -> None:
    objective = lk.bridges.optuna.evidence_objective(line, data(), "gaussian", structure="krn")
    with pytest.raises(lk.errors.UnknownName):
        objective(optuna.trial.FixedTrial({"bias": True}))
