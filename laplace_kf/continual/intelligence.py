"""Synaptic Intelligence: how much every weight contributed to the loss, gathered along the way (methods 11.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.continual.base import Learner, Loader
from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior.prior import PriorPrecision, positive
from laplace_kf.registry import Registry
from laplace_kf.structures import STRUCTURES, Structure

__all__ = ["CENTRES", "SynapticIntelligence"]

Weights = dict[str, Tensor]
Anchors = list[tuple[Weights, Weights]]  # importance and centre by parameter name
CENTRES: Registry[Callable[[Anchors, Weights, Weights], Anchors]] = Registry("choice of penalty centres")


@CENTRES.register("each")
def _each(anchors: Anchors, importance: Weights, centre: Weights) -> Anchors:
    """Every task keeps its own centre."""
    return [*anchors, (importance, centre)]


@CENTRES.register("last")
def _last(anchors: Anchors, importance: Weights, centre: Weights) -> Anchors:
    """One centre, the latest, for the sum of all importances (the original method)."""
    total = {n: torch.stack([value, *(omega[n] for omega, _ in anchors)]).sum(0) for n, value in importance.items()}
    return [(total, centre)]


class SynapticIntelligence(Learner):
    """``½ Σ_i (θ − μ_i)ᵀ Ω_i (θ − μ_i)`` with ``Ω_t = c · max(0, ω_t) / (d_t² + ε)`` by weight (methods 11.4).

    ``ω_t = −Σ_k ∇L_k · Δθ_k`` over optimiser steps, with the gradient of the task's loss alone: what :meth:`penalty`
    adds to the gradients is found by itself and taken off. ``d_t`` is the way from the start to the end of the task.
    ``Ω`` is on the scale of the loss ``L`` that was trained; where ``penalty() / N_task`` is added to a mean loss, a
    ``c`` meant for ``mean loss + penalty`` becomes ``c · N_task``.

    Args:
        model, likelihood, parameters: as of :class:`Learner`; the likelihood is not used.
        structure: only ``"diag"``: the method is diagonal.
        multiplier: c, unless ``c`` is given.
        prior_precision: λ of a prior around 0 in the first task, folded into its penalty as for the other methods;
            none by default.
        c: strength of the penalty.
        epsilon: ε > 0.
        centres: ``"each"`` (a centre for every task) or ``"last"`` (one centre, as in the original method).

    Raises:
        IncompatiblePair: for another structure.
        UnknownName: for other ``centres``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        structure: str | Structure = "diag",
        multiplier: float = 1.0,
        prior_precision: PriorPrecision = 0.0,
        parameters: str | Sequence[str] = "all",
        *,
        c: float | None = None,
        epsilon: float = 1e-3,
        centres: str = "each",
        **options: Any,
    ) -> None:
        super().__init__(model, likelihood, structure, multiplier, prior_precision, parameters, **options)
        chosen = structure if isinstance(structure, Structure) else STRUCTURES[structure]()
        if not isinstance(chosen, STRUCTURES["diag"]):
            raise IncompatiblePair(f"Synaptic Intelligence is diagonal, structure={chosen.name!r} has no effect on it")
        self.c = positive("c", c if c is not None else multiplier)
        self.epsilon = positive("epsilon", epsilon)
        self._rule = CENTRES[centres]
        self.centres = centres
        self.anchors: Anchors = []
        self._prior_centre: Weights | None = None
        self._begin()

    def _begin(self) -> None:
        """The start of a task."""
        self._start = {name: weight.detach().clone() for name, weight in self._weights().items()}
        self._before = dict(self._start)
        self._path = {name: torch.zeros_like(weight) for name, weight in self._start.items()}
        self._from_penalty: Weights = {}
        self._of_loss: Weights = {}  # where the gradients were preconditioned since

    def _penalty(self) -> Tensor:
        weights = self._observed()
        total = self._pull(self._prior_centre, weights)
        for omega, centre in self.anchors:
            terms = [(omega[n] * (weight - centre[n]).square()).sum() / 2 for n, weight in weights.items()]
            total = total + torch.stack(terms).sum()
        return total

    @torch.no_grad()
    def _precondition(self, rate: float) -> None:
        for name, weight in self._weights().items():
            if weight.grad is not None:
                self._of_loss[name] = weight.grad - self._from_penalty.get(name, 0.0)
                stiffness = [omega[name] for omega, _ in self.anchors]
                if stiffness:
                    weight.grad /= 1 + rate * torch.stack(stiffness).sum(0)

    def _observed(self) -> Weights:
        """The weights behind a view each, whose gradient is the penalty's alone, with whatever factor it came."""
        found = {}
        for name, weight in self._weights().items():
            view = weight.view_as(weight)
            if view.requires_grad:
                view.register_hook(lambda gradient, name=name: self._note(name, gradient))
            found[name] = view
        return found

    def _note(self, name: str, gradient: Tensor) -> None:
        held = self._from_penalty.get(name)
        self._from_penalty[name] = gradient.detach() if held is None else held + gradient.detach()

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes in one optimiser step.

        Raises:
            IncompatiblePair: if no weight has a gradient (they were zeroed before).
        """
        weights = self._weights()
        if all(weight.grad is None for weight in weights.values()):
            raise IncompatiblePair(
                "after_step() found no gradients: call it right after optimizer.step(), before zero_grad()"
            )
        for name, weight in weights.items():
            if weight.grad is not None:
                gradient = self._of_loss.get(name, weight.grad - self._from_penalty.get(name, 0.0))
                self._path[name] -= gradient * (weight - self._before[name])
            self._before[name] = weight.detach().clone()
        self._from_penalty, self._of_loss = {}, {}

    @torch.no_grad()
    def _after_task(self, loader: Loader, forward: Forward | None, generator: torch.Generator | None) -> None:
        now = {name: weight.detach().clone() for name, weight in self._weights().items()}
        importance = {
            name: self.c * (self._path[name] / ((weight - self._start[name]).square() + self.epsilon)).clamp_min(0)
            for name, weight in now.items()
        }
        self.anchors = self._rule(self.anchors, importance, now)
        self._prior_centre = self.anchors[0][1]
        self._begin()

    def _state(self) -> dict[str, Any]:
        return {
            "anchors": [[_copied(omega), _copied(centre)] for omega, centre in self.anchors],
            "start": _copied(self._start),
            "before": _copied(self._before),
            "path": _copied(self._path),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.anchors = [(_copied(omega), _copied(centre)) for omega, centre in state["anchors"]]
        self._prior_centre = self.anchors[0][1] if self.anchors else None
        self._start, self._before, self._path = (_copied(state[key]) for key in ("start", "before", "path"))
        self._from_penalty = {}


def _copied(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.clone() for name, weight in weights.items()}
