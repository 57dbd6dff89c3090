"""Laplace approximations over tasks: online, non-online (an oracle), and one penalty per task (methods 11.3).

For two tasks the three coincide, because the prior is folded into the first penalty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.continual.base import AGAIN, GIVEN, Learner, Loader, require_again, require_data
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.implicit import ImplicitPenalty
from laplace_kf.posterior.prior import PriorPrecision
from laplace_kf.posterior.task_chain import require_terms
from laplace_kf.reading import Part
from laplace_kf.structures import Structure

__all__ = ["EWC", "NonOnlineLaplace", "OnlineLaplace"]


class _Chained(Learner):
    """One posterior over all tasks; its penalty has the latest mean as its centre.

    Attributes:
        posterior: after at least one task; ``None`` before.
    """

    posterior: LaplacePosterior | None = None

    def _penalty(self) -> Tensor:
        return self._pull() if self.posterior is None else self.posterior.penalty()

    def _precondition(self, rate: float) -> None:
        if self.posterior is not None:
            self.posterior.precondition_gradients(rate)

    def _state(self) -> dict[str, Any]:
        return {"posterior": None if self.posterior is None else self._packed(self.posterior)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.posterior = None if state["posterior"] is None else self._unpacked(state["posterior"])


class OnlineLaplace(_Chained):
    """``Λ_{t+1} = Λ_t + λ_c N C̄_{t+1}(μ_{t+1})``, needs the current task's data only (methods 11.1, 11.2).

    Args:
        terms: ``"keep"``, ``"sum"``, ``"project"`` or ``"project_kl"``, and
        forgetting, max_terms: as of :meth:`laplace_kf.LaplacePosterior.update`.
        *args: as of :class:`Learner`.
        **kwargs: as of :class:`Learner`.
    """

    def __init__(
        self,
        *args: Any,
        terms: str = "keep",
        forgetting: float = 1.0,
        max_terms: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_terms(terms, max_terms)
        self.terms, self.forgetting, self.max_terms = terms, forgetting, max_terms

    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        if self.posterior is None:
            self.posterior = self._posterior(loader, self.prior_precision, forward, fitting)
        else:
            self.posterior = self.posterior.update(
                loader,
                self.multiplier,
                self.terms,
                forgetting=self.forgetting,
                max_terms=self.max_terms,
                forward=forward,
                **fitting,
            )


class NonOnlineLaplace(_Chained):
    """The curvature of all tasks at the latest mean (methods 11.3): revisits all data, so a reference, not a method.

    It keeps the loaders of all tasks; arguments as of :class:`Learner`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[Loader, Forward | None]] = []

    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        require_again(loader)
        seen = [*self.seen, (loader, forward)]
        generator, path = fitting["generator"], fitting["checkpoint"]
        before = None if generator is None or path is None else generator.get_state()
        # the data of every task have a file of their own; fits that were complete are made again
        each = [{**fitting, "checkpoint": None if path is None else f"{os.fspath(path)}.{k}"} for k in range(len(seen))]
        try:
            posterior = self._posterior(seen[0][0], self.prior_precision, seen[0][1], each[0])
            for (other, own), how in zip(seen[1:], each[1:], strict=True):
                posterior = posterior.update(other, self.multiplier, forward=own, **how)
        except BaseException:
            if before is not None:
                generator.set_state(before)
            raise
        self.seen, self.posterior = seen, posterior

    def revisit(self, loaders: Sequence[Loader], forwards: Sequence[Forward | None] | None = None) -> None:
        """Brings back the data of the finished tasks after :meth:`load_state_dict`, which a state does not hold.

        Raises:
            IncompatiblePair: if their number is not that of the finished tasks.
        """
        require_data(len(loaders), self.tasks, GIVEN)
        require_again(*loaders)
        own = list(forwards) if forwards is not None else [self.forward] * len(loaders)
        self.seen = list(zip(loaders, own, strict=True))

    def after_task(
        self,
        loader: Loader,
        *,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        **fitting: Any,
    ) -> None:
        """As of :class:`Learner`; goes over the data of all tasks.

        Raises:
            IncompatiblePair: after :meth:`load_state_dict` without :meth:`revisit`.
        """
        require_data(len(self.seen), self.tasks, AGAIN)
        super().after_task(loader, forward=forward, inputs=inputs, targets=targets, **fitting)


class EWC(Learner):
    """One penalty per task around its own mean: ``Σ_i ½ (θ − μ_i)ᵀ λ_c N_i C̄_i(μ_i) (θ − μ_i)`` (methods 11.3).

    Elastic weight consolidation is ``structure="diag"``, the default; the curvature is the exact one of single
    examples. The prior stands in the first penalty. From the third task on, early data count several times: every
    ``μ_i`` was found under the penalties before it.

    Args: as of :class:`Learner`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        structure: str | Structure = "diag",
        multiplier: float = 1.0,
        prior_precision: PriorPrecision = 1.0,
        parameters: str | Sequence[str] = "all",
        **options: Any,
    ) -> None:
        super().__init__(model, likelihood, structure, multiplier, prior_precision, parameters, **options)
        self.posteriors: list[LaplacePosterior] = []
        self._implicit: ImplicitPenalty | None = None

    def _penalty(self) -> Tensor:
        if not self.posteriors:
            return self._pull()
        return torch.stack([posterior.penalty() for posterior in self.posteriors]).sum()

    def _precondition(self, rate: float) -> None:
        if self.posteriors and self._implicit is None:
            self._implicit = ImplicitPenalty([posterior.summed_curvature() for posterior in self.posteriors])
        if self._implicit is not None:
            self._implicit.apply(self.model, rate)

    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        prior: PriorPrecision = 0.0 if self.posteriors else self.prior_precision
        self.posteriors.append(self._posterior(loader, prior, forward, fitting))
        self._implicit = None

    def _state(self) -> dict[str, Any]:
        return {"posteriors": [self._packed(posterior) for posterior in self.posteriors]}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.posteriors = [self._unpacked(one) for one in state["posteriors"]]
        self._implicit = None
