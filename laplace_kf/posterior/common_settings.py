"""Settings that all components of a mixture have in common: asked once, set for all of them or for none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior.calibration import Calibration
from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision, plain
from laplace_kf.predictive import PREDICTION_METHODS
from laplace_kf.registry import AUTO

__all__ = ["CommonSettings"]


class CommonSettings:
    """What a mixture says of its components together; setting one of them drops the mixture's calibration."""

    posteriors: tuple[LaplacePosterior, ...]
    _shares: list[float]
    _calibration: Calibration | None

    @property
    def weights(self) -> Tensor:
        """Weights of the components ``(M,)`` in float64, adding up to 1."""
        return torch.tensor(self._shares, dtype=torch.float64)

    @property
    def likelihood(self) -> Likelihood:
        """That of the first component; noise scales may differ between components."""
        return self.posteriors[0].likelihood

    @property
    def method(self) -> str:
        """What ``"auto"`` stands for in :meth:`predict`, set for all components; ``"auto"`` where they differ."""
        found = {member.method for member in self.posteriors}
        return found.pop() if len(found) == 1 else AUTO

    @method.setter
    def method(self, value: str) -> None:
        if value != AUTO:
            _ = PREDICTION_METHODS[value]
        for member in self.posteriors:
            member.method = value
        self._calibration = None

    @property
    def temperature(self) -> float | None:
        """As of a posterior, the same for all components; ``None`` where it is not chosen or differs."""
        found = {member.temperature for member in self.posteriors}
        return found.pop() if len(found) == 1 else None

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        for member in self.posteriors:
            member.temperature = value
        self._calibration = None

    @property
    def n_data(self) -> float:
        """N of all components; settable.

        Raises:
            IncompatiblePair: where they have several.
        """
        return float(self._common("n_data", [member.n_data for member in self.posteriors]))

    @n_data.setter
    def n_data(self, value: float) -> None:
        for member in self.posteriors:
            member.n_data = value
        self._calibration = None

    @property
    def prior_precision(self) -> PriorPrecision:
        """λ of all components; settable.

        Raises:
            IncompatiblePair: where they have several.
        """
        found: PriorPrecision = self._common("prior_precision", [plain(m.prior_precision) for m in self.posteriors])
        return found

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        before = [member.prior_precision for member in self.posteriors]
        try:
            for member in self.posteriors:
                member.prior_precision = value
        except Exception:
            for member, old in zip(self.posteriors, before, strict=True):
                member.prior_precision = old
            raise
        self._calibration = None

    @staticmethod
    def _common(name: str, values: Sequence[Any]) -> Any:
        if any(value != values[0] for value in values):
            raise IncompatiblePair(
                f"the components have several values of {name}: {', '.join(map(str, values))}; ask "
                f"mixture.posteriors[k].{name}, or set mixture.{name} = ... for all"
            )
        return values[0]
