"""Synaptic Intelligence: how much every weight contributed to the loss, gathered along the way (methods 11.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.continual.base import Learner, Loader
from laplace_kf.continual.gradients import TaskGradients
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import parameters_of
from laplace_kf.posterior.prior import PriorPrecision, positive
from laplace_kf.posterior.surroundings import Ties
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
    every = [*(omega for omega, _ in anchors), importance]
    names = dict.fromkeys(name for omega in every for name in omega)  # some may have been frozen at times
    total = {n: torch.stack([omega[n] for omega in every if n in omega]).sum(0) for n in names}
    return [(total, {**(anchors[0][1] if anchors else {}), **centre})]


class SynapticIntelligence(Learner):
    """``½ Σ_i (θ − μ_i)ᵀ Ω_i (θ − μ_i)`` with ``Ω_t = c · max(0, ω_t) / (d_t² + ε)`` by weight (methods 11.4).

    ``ω_t = −Σ_k ∇L_k · Δθ_k`` over optimiser steps, with the gradient of the task's loss alone: what :meth:`penalty`
    adds to the gradients is found by itself and taken off. ``d_t`` is the way from the start to the end of the task.
    Loops that clip gradients, scale the loss or divide gradients mark the task's loss by :meth:`record`. The parameters
    carry hooks for as long as the learner lives.
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
            raise IncompatiblePair(
                f"Synaptic Intelligence is diagonal, structure={chosen.name!r} has no effect on it: leave structure= "
                "out"
            )
        self.c = positive("c", c if c is not None else multiplier)
        self.epsilon = positive("epsilon", epsilon)
        self._rule = CENTRES[centres]
        self.centres = centres
        self.anchors: Anchors = []
        self._prior_centre: Weights | None = None
        self._start: Weights = {}
        self._ties = Ties({})
        self._gradients = TaskGradients(self._weights())
        self._begin()

    def _weights(self) -> dict[str, Tensor]:
        """The selected parameters by name.

        Raises:
            ShapeMismatch: if a layer was replaced by one of another size, or weights are no longer tied.
        """
        weights = super()._weights()
        known = [name for name in weights if name in self._start]
        parameters_of(self.model, known, [tuple(self._start[name].shape) for name in known], "the learner")
        self._ties.require(self.model)
        return weights

    def _begin(self) -> None:
        """The start of a task."""
        self._ties = Ties.of(self.model, self._names(), "the task began")
        self._gradients.begin(self._weights())
        self._start = dict(self._gradients.before)
        self._path = {name: torch.zeros_like(weight) for name, weight in self._start.items()}

    def _penalty(self) -> Tensor:
        self._gradients.follow(self._weights())
        weights = self._gradients.views()
        total = self._pull(self._prior_centre, weights)
        for omega, centre in self.anchors:
            known = [name for name in weights if name in omega]  # others were frozen then, or not there
            terms = [(omega[n] * (weights[n] - centre[n]).square()).sum() / 2 for n in known]
            total = total + sum(terms[1:], terms[0]) if terms else total
        return total

    @torch.no_grad()
    def _precondition(self, rate: float) -> None:
        self._gradients.check()
        for name, weight in self._weights().items():
            stiffness = [omega[name] for omega, _ in self.anchors if name in omega]
            if weight.grad is not None and stiffness:
                weight.grad /= 1 + rate * torch.stack(stiffness).sum(0)

    def record(self, loss: Tensor) -> Tensor:
        """Marks the loss of the task, without the penalty, and returns it unchanged.

        With it the gradients of the path are exact under clipping, a ``GradScaler`` and divisions: they are seen where
        they are made, and measured in units of the gradient that arrives at this loss. With several minibatches a step
        the gradient is that of the mean of their losses, weighted as they are in what is differentiated::

            loss = learner.record(cross_entropy(model(x), y)) + learner.penalty() / N_task

        So with k minibatches a step it is ``record(loss) / k``; losses that were divided by k before they were recorded
        are refused by :meth:`after_step`.

        Args:
            loss: 0-dim, once a backward pass.

        Raises:
            IncompatiblePair: for something else than a 0-dim tensor with a gradient.
        """
        self._gradients.follow(self._weights())
        return self._gradients.record(loss)

    @torch.no_grad()
    def after_step(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Takes in one optimiser step.

        Without :meth:`record` the gradients must be what ``backward()`` left (or its mean over several passes); what
        cannot be told apart from the loss's own gradient is refused.

        Args:
            gradients: of the task's loss alone, ``(*shape)`` by parameter name, where the loop has them; what was seen
                of backward passes is then not used.

        Raises:
            IncompatiblePair: if there was no gradient, if it was changed before the step without :meth:`record`, if the
                weights moved between two gradients of the step, or if each of its k losses was divided by k before it
                was recorded. Nothing is taken in then.
            NonFinite: for a gradient that is not finite of a weight that moved.
        """
        weights = self._weights()
        self._gradients.follow(weights)
        if gradients is None and not self._gradients.seen and all(w.grad is None for w in weights.values()):
            raise IncompatiblePair(
                "after_step() found no gradients: call it right after optimizer.step(), before zero_grad()"
            )
        if gradients is not None:
            self._checked(gradients, weights)
        if not self._gradients.still():
            found = self._gradients.along(self._gradients.task() if gradients is None else gradients)
            for name, value in found.items():
                self._start.setdefault(name, self._gradients.before[name])
                self._path[name] = self._path.get(name, 0) + value
        self._gradients.begin(weights)

    @staticmethod
    def _checked(gradients: Mapping[str, Tensor], weights: Weights) -> None:
        for name, gradient in gradients.items():
            if name not in weights:
                raise UnknownName("parameter that this learner follows", name, weights)
            if gradient.shape != weights[name].shape:
                raise ShapeMismatch(
                    f"the gradient of {name!r} must be {tuple(weights[name].shape)}, got {tuple(gradient.shape)}"
                )

    @torch.no_grad()
    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        now = {name: weight.detach().clone() for name, weight in self._weights().items()}
        way = {name: weight - self._start.get(name, weight) for name, weight in now.items()}
        importance = {
            name: self.c * (self._path.get(name, torch.zeros_like(d)) / (d.square() + self.epsilon)).clamp_min(0)
            for name, d in way.items()
        }
        self.anchors = self._rule(self.anchors, importance, now)
        self._prior_centre = self.anchors[0][1]
        self._begin()

    def _state(self) -> dict[str, Any]:
        return {
            "anchors": [[_copied(omega), _copied(centre)] for omega, centre in self.anchors],
            "start": _copied(self._start),
            "before": _copied(self._gradients.before),
            "path": _copied(self._path),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.anchors = [(_copied(omega), _copied(centre)) for omega, centre in state["anchors"]]
        self._prior_centre = self.anchors[0][1] if self.anchors else None
        self._start, self._path = _copied(state["start"]), _copied(state["path"])
        self._gradients.begin(self._weights())
        self._gradients.before = _copied(state["before"])


def _copied(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.clone() for name, weight in weights.items()}
