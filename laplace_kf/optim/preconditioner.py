"""Preconditioners of conjugate gradients: a structured estimate of the curvature, damped and inverted (methods 7.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from laplace_kf.curvature import make_pair
from laplace_kf.estimators import Estimator
from laplace_kf.operators import DAMPINGS, Matrix
from laplace_kf.optim.inverse import INVERSES, damped_power
from laplace_kf.registry import Registry
from laplace_kf.structures import Structure
from laplace_kf.structures.base import Statistics

__all__ = ["PRECONDITIONERS", "Preconditioner"]


@dataclass(frozen=True)
class Preconditioner:
    """``P = (C̃ + (λ + η) I)^power`` with a structured estimate ``C̃`` of the curvature (methods 7.6).

    Attributes:
        structure: of the engine.
        estimator: of the engine.
        damping: how ``λ + η`` enters a block.
        power: ξ.
        inverse: how blocks are put together.
        options: of structure and estimator.
    """

    structure: str
    estimator: str
    damping: str = "exact"
    power: float = 1.0
    inverse: str = "block_diagonal"
    options: Mapping[str, Any] = field(default_factory=dict)

    def pair(self) -> tuple[Structure, Estimator]:
        """The structure that is kept and the estimator.

        Raises:
            IncompatiblePair: for an inverse that does not go with the damping.
        """
        inner, estimator = make_pair(self.structure, self.estimator, dict(self.options))
        INVERSES[self.inverse].check(DAMPINGS[self.damping])
        return INVERSES[self.inverse].structure(inner.narrowed()), estimator

    def build(self, statistics: Statistics, k: float) -> Matrix:
        """The preconditioner as a Matrix of size ``P``, from mean curvature and the damping ``k``."""
        matrix = INVERSES[self.inverse].build(statistics, k, DAMPINGS[self.damping], self.power != 1.0)
        return damped_power(matrix, self.power)


PRECONDITIONERS: Registry[Preconditioner | None] = Registry("preconditioner")
PRECONDITIONERS.register("none")(None)
PRECONDITIONERS.register("diagonal")(Preconditioner("diag", "empirical", power=0.75))
PRECONDITIONERS.register("kronecker")(Preconditioner("kron", "sampled", "balanced"))
