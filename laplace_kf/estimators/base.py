"""An estimator: which columns are sent back through the network, so that ``Σ_v r rᵀ`` is (in expectation) ``H_L``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_kf.columns import Sink
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.notebooks import as_call
from laplace_kf.registry import Registry
from laplace_kf.tape import Observation

__all__ = ["ESTIMATORS", "ColumnEstimator", "Estimator", "Sink"]


class Estimator(ABC):
    """How the output curvature is turned into signals.

    Attributes:
        name: registered name.
        is_ggn: whether its expectation is the Gauss-Newton matrix (or Fisher); the empirical Fisher is neither.
        draws: whether it uses random numbers.
        averages: whether it takes means inside a minibatch, so that the result depends on how the data are cut.
        by_example: whether its random numbers may be those of the examples (:class:`~laplace_kf.draws.ExampleDraws`); a
            fit then gives it these. Others get a generator that depends on the examples of the minibatch.
    """

    name: ClassVar[str]
    is_ggn: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    by_example: ClassVar[bool] = False

    @classmethod
    def examples(cls) -> tuple[Estimator, ...]:
        """Objects to try the estimator on (the contract tests do)."""
        return (cls(),)

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values that can be saved."""
        return {}

    def __repr__(self) -> str:
        return as_call(self, self.options())

    @abstractmethod
    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: Any) -> None:
        """Adds one minibatch's curvature, summed over its examples, to the sink."""


ESTIMATORS: Registry[type[Estimator]] = Registry("estimator")


class ColumnEstimator(Estimator):
    """An estimator that is a list of columns with the shape of the outputs."""

    @abstractmethod
    def columns(
        self, observation: Observation, likelihood: Likelihood, generator: Any, at_once: int
    ) -> Iterator[Tensor]:
        """Columns ``(v, N, ...)`` in chunks of at most ``at_once``."""

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: Any) -> None:
        for chunk in self.columns(observation, likelihood, generator, sink.columns_at_once(observation)):
            sink.add_columns(observation.signals(chunk))


def widened(outputs: Tensor) -> Tensor:
    """Outputs off the graph, in float32 at least: output curvature is computed in this type."""
    outputs = outputs.detach()
    return outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
