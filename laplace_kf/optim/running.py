"""Running curvature: factors of the minibatches of a step, their average over steps, and the inverse made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from laplace_kf.engine import Accumulator
from laplace_kf.operators import Matrix
from laplace_kf.optim.running_statistics import averaged, dumped, loaded
from laplace_kf.structures.base import Statistics, Structure
from laplace_kf.tape import Observation

__all__ = ["WARM_UP", "Running"]

WARM_UP = 3  # first steps that always get fresh inverses (methods 6.2)


class Running:
    """Factors averaged over steps, with the inverse that was made of them last.

    Structures that see the data twice (EKFAC) keep their bases between refreshes; what they gather along the bases is
    up to date at every step (George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", EKFAC-ra).

    Args:
        accumulator: makes an empty accumulator of a structure.
        structure: of the factors.
        ema: limit of the average (:func:`laplace_kf.optim.running_statistics.averaged`).
        refresh: steps between fresh inverses, or fresh bases.
        build: ``(statistics, ζ) -> damped matrix``.

    Attributes:
        statistics: the average, ``None`` before the first step.
    """

    def __init__(
        self,
        accumulator: Callable[[Structure], Accumulator],
        structure: Structure,
        ema: float,
        refresh: int,
        build: Callable[[Statistics, float], Matrix],
    ) -> None:
        self._new, self.structure, self.ema, self.refresh, self._build = accumulator, structure, ema, refresh, build
        self.statistics: Statistics | None = None
        self._seen = 0  # steps whose factors are in the average
        self._made_of: tuple[Statistics, float] | None = None  # what the kept matrix was made of
        self._matrix: Matrix | None = None
        self.forget()

    # -- factors -----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drops the minibatches taken in since the last update."""
        self._accumulator: Accumulator | None = None
        self._parts: list[Any] = []

    def take(self, part: Any, step: int) -> None:
        """Takes in a minibatch, or an :class:`Observation` of one."""
        if self._accumulator is None:
            self._accumulator = self._new(self.structure)
        self._parts.append(part)
        _taken(self._accumulator, part, step)

    def update(self, step: int) -> None:
        """The average with what was taken in, once; nothing where nothing was."""
        if self._accumulator is None:
            return
        new, kept = self._accumulator.freeze(), None
        self._accumulator = None
        if self.statistics is not None and self.ema:
            if self.due(step):
                self.statistics = self.statistics.structure.turned(self.statistics)
            kept = self.statistics.structure.again(new)
        following = kept if kept is not None else new.structure.refined(new)
        while following is not None:
            accumulator = self._new(following)
            with torch.enable_grad():
                for part in self._parts:
                    _taken(accumulator, part, step)
            new = accumulator.freeze()
            following = new.structure.refined(new)
        self._seen += 1
        self.statistics = averaged(self.statistics, new, self._seen, self.ema)

    def require_whole(self) -> None:
        """Refuses to hand out an average of which other processes have parts (:class:`SharedRunning`)."""

    def fold(self) -> None:
        """Adds up what processes have, where there are several."""

    # -- inverse -----------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether step number ``step`` (1, 2, ...) gets a fresh inverse, or fresh bases."""
        return step <= WARM_UP or step % self.refresh == 0

    def wants_fresh(self, step: int) -> bool:
        """Whether a matrix should be made at this step; one in kept bases costs nothing to make."""
        return self.due(step) or bool(self.latest.structure.fixed)

    @property
    def latest(self) -> Statistics:
        """The average, which must be there."""
        assert self.statistics is not None
        return self.statistics

    def fresh(self, zeta: float) -> Matrix:
        """A matrix from the average."""
        return self._build(self.latest, zeta)

    def keep(self, matrix: Matrix, zeta: float) -> None:
        """Remembers a fresh matrix until the next one."""
        self._matrix, self._made_of = matrix, (self.latest, zeta)

    def kept(self, zeta: float) -> Matrix:
        """The matrix of the last refresh; made anew from what it was made of after loading a state."""
        if self._made_of is None:
            self._made_of = (self.latest, zeta)
        if self._matrix is None:
            self._matrix = self._build(*self._made_of)
        return self._matrix

    def drop(self, zeta: float) -> None:
        """The next matrix is made from the average of now, with another damping."""
        self._matrix, self._made_of = None, (self.latest, zeta)

    # -- state -------------------------------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """Plain values and tensors."""
        made_of = self._made_of
        shared = made_of is not None and made_of[0] is self.statistics
        return {
            "factors": dumped(self.statistics),
            "factors_seen": self._seen,
            "inverted": None if made_of is None or shared else dumped(made_of[0]),
            "inverted_zeta": None if made_of is None else made_of[1],
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`export`."""
        self._seen, self._matrix = state["factors_seen"], None
        self.statistics = loaded(state["factors"], self.structure, device)
        older = loaded(state["inverted"], self.structure, device) or self.statistics
        self._made_of = None if older is None or state["inverted_zeta"] is None else (older, state["inverted_zeta"])


def _taken(accumulator: Accumulator, part: Any, step: int) -> None:
    if isinstance(part, Observation):
        accumulator.take(part, step)
    else:
        accumulator.add(part, step)
