"""Optuna: the evidence as an objective, for settings that no gradient reaches, such as widths and weight decays::

    objective = lk.bridges.optuna.evidence_objective(build, train_loader, "categorical")
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=30)

``build(trial)`` returns a trained network. No validation data are used: all data may be trained on. Needs Optuna:
``pip install optuna``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from laplace_kf.errors import NonFinite
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior import LaplacePosterior

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "The bridge to Optuna needs the package 'optuna', which is not installed: pip install optuna", name=error.name
    ) from error

__all__ = ["evidence_objective"]


def evidence_objective(
    build: Callable[[Any], nn.Module],
    train: Any,
    likelihood: str | Likelihood,
    *,
    tune: bool = True,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[[Any], float]:
    """The log evidence of a trial's network, to be maximised.

    Evidences can be compared between networks that were trained on the same data with the same likelihood, and between
    posteriors of one structure and one estimator. What was chosen is kept with the trial, as its user attributes
    ``prior_precision``, ``noise`` (of a Gaussian likelihood) and ``fit``, the log likelihood of the data.

    Args:
        build: ``trial -> trained network``; it asks the trial for its settings.
        train: the data that the networks are trained on, as ``fit`` takes them.
        likelihood: registered name or likelihood object.
        tune: maximise the evidence over λ (and the noise scale) first, so that networks are compared at their best.
        generator: random numbers of the fits; fresh ones by default.
        **options: arguments of :class:`~laplace_kf.LaplacePosterior` after the likelihood.

    Returns:
        ``trial -> log evidence`` in nats. A trial whose network has outputs, curvature or an evidence that are not
        finite is pruned.

    Raises:
        LaplaceKFError: in the trial, as :class:`~laplace_kf.LaplacePosterior` and its ``fit``.
    """

    def objective(trial: Any) -> float:
        model = build(trial)
        try:
            posterior = LaplacePosterior(model, likelihood, **options).fit(train, generator=generator)
            if tune:
                posterior.tune(objective="evidence")
            found = posterior.evidence()
        except NonFinite as error:
            raise optuna.TrialPruned(str(error)) from error
        value = float(found.total)
        if value != value or abs(value) == float("inf"):
            raise optuna.TrialPruned(f"the log evidence is {value}")
        prior = posterior.prior_precision
        trial.set_user_attr("prior_precision", float(prior) if isinstance(prior, (int, float)) else str(prior))
        trial.set_user_attr("fit", float(found.fit))
        scale = posterior.likelihood.noise_scale
        if scale is not None:
            trial.set_user_attr("noise", float(torch.as_tensor(scale).mean()))
        return value

    return objective
