"""Scores averaged over several posteriors, kept in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from laplace_kf import files
from laplace_kf.attribution import scoring as single
from laplace_kf.attribution.values import Value
from laplace_kf.errors import NotFitted, ShapeMismatch
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision

__all__ = ["Attribution"]


class Attribution:
    """Influences averaged over the posteriors of an ensemble (other seeds, other subsets of the data).

    Args:
        posteriors: fitted, of any networks that take the same data; none for scores that are loaded.

    Attributes:
        results: scores of the last call of every kind: ``influence (Q, N)``, ``self_influence (N,)``,
            ``group_influence (Q, G)``.
    """

    def __init__(self, posteriors: Sequence[LaplacePosterior] | LaplacePosterior = ()) -> None:
        self.posteriors = (posteriors,) if isinstance(posteriors, LaplacePosterior) else tuple(posteriors)
        self.results: dict[str, Tensor] = {}
        self._newest = ""

    @property
    def scores(self) -> Tensor:
        """The newest scores: ``(Q, N)`` of :meth:`influence`.

        Raises:
            NotFitted: if nothing was computed or loaded yet.
        """
        if not self._newest:
            raise NotFitted("there are no scores yet: call influence(train, queries) first, or Attribution.load(path)")
        return self.results[self._newest]

    def influence(
        self,
        train: Any,
        queries: Any,
        of: str | Value = "loss",
        *,
        damping: PriorPrecision | None = None,
        tokens: str | None = None,
        accuracy: float | None = None,
    ) -> Tensor:
        """The mean of :func:`laplace_kf.attribution.influence` over the posteriors, ``(Q, N)``; arguments as there.

        Raises:
            ShapeMismatch: without posteriors, or if their scores have different shapes; otherwise as there.
        """
        return self._kept(
            "influence",
            lambda p: single.influence(p, train, queries, of, damping=damping, tokens=tokens, accuracy=accuracy),
        )

    def self_influence(self, train: Any, *, damping: PriorPrecision | None = None) -> Tensor:
        """The mean of :func:`laplace_kf.attribution.self_influence` over the posteriors, ``(N,)``; errors as there."""
        return self._kept("self_influence", lambda p: single.self_influence(p, train, damping=damping))

    def group_influence(
        self,
        train: Any,
        queries: Any,
        groups: Tensor | Sequence[int],
        of: str | Value = "loss",
        *,
        damping: PriorPrecision | None = None,
        accuracy: float | None = None,
    ) -> Tensor:
        """The mean of :func:`laplace_kf.attribution.group_influence`, ``(Q, G)``; arguments and errors as there."""
        return self._kept(
            "group_influence",
            lambda p: single.group_influence(p, train, queries, groups, of, damping=damping, accuracy=accuracy),
        )

    def _kept(self, kind: str, one: Callable[[LaplacePosterior], Tensor]) -> Tensor:
        if not self.posteriors:
            raise ShapeMismatch("there is no posterior to compute scores with: Attribution([posterior, ...])")
        total: Tensor | None = None
        for posterior in self.posteriors:
            found = one(posterior)
            if total is not None and total.shape != found.shape:
                raise ShapeMismatch(
                    f"the posteriors give scores of shapes {tuple(total.shape)} and {tuple(found.shape)}; all of them "
                    "have to see the same data in the same order"
                )
            total = found if total is None else total + found.to(total)
        assert total is not None
        self.results[kind], self._newest = total / len(self.posteriors), kind
        return self.results[kind]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all scores into one safetensors file with a checksum.

        Raises:
            NotFitted: if there are none.
        """
        _ = self.scores
        files.write(path, self.results, {"newest": self._newest, "posteriors": len(self.posteriors)}, files.ATTRIBUTION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Scores written by :meth:`save`, without the posteriors.

        Raises:
            MissingFile: if there is no such file.
            CorruptFile: if it is truncated, altered or not one of ours.
        """
        tensors, header = files.read(path, files.ATTRIBUTION)
        made = cls()
        made.results, made._newest = tensors, header["newest"]
        return made
