"""Posteriors of the cases whose data were run through the network once, for all tests that only ask them."""

from __future__ import annotations

import functools
from typing import Any

import laplace_kf as lk
from tests.cases import Case, Problem

__all__ = ["fitted_once"]


@functools.cache
def _statistics(case: Case, structure: str, split: bool) -> Any:
    problem = case.make()
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood.build(lk), structure=structure)
    return posterior.fit(problem.uneven() if split else [problem.batch()])._fitted("a test").statistics


def fitted_once(case: Case, structure: str, split: bool, **options: Any) -> tuple[Problem, Any]:
    """A problem and a posterior of its own, by ``adopt`` of statistics that tests share and leave alone.

    Tests of ``fit`` itself fit.
    """
    problem = case.make()
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood.build(lk), structure=structure, **options)
    return problem, posterior.adopt(_statistics(case, structure, split))
