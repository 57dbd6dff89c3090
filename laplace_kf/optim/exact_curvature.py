"""Products with the exact Gauss-Newton matrix for many vectors at one point, structural damping included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_kf.errors import IncompatiblePair
from laplace_kf.optim.objective import Batch, Objective
from laplace_kf.outputs.layout import masked
from laplace_kf.registry import Registry
from laplace_kf.tape.reach import reached

__all__ = ["DISTANCES", "ExactCurvature"]

Distance = Callable[[Tensor], Tensor]
DISTANCES: Registry[Distance] = Registry("distance of hidden activities")


@DISTANCES.register("squared")
def _squared(activity: Tensor) -> Tensor:
    """``½ ‖c − c_k‖²``: unit curvature in every activity."""
    return torch.ones_like(activity)


@DISTANCES.register("cross_entropy")
def _cross_entropy(activity: Tensor) -> Tensor:
    """Cross-entropy of logistic units: ``diag(a(1−a))`` in the pre-activations, so ``1/(a(1−a))`` in ``a`` itself.

    Raises:
        IncompatiblePair: for activities outside [0, 1].
    """
    if not bool(((activity >= 0) & (activity <= 1)).all()):
        raise IncompatiblePair(
            'distance="cross_entropy" is of logistic units, whose activities are in [0, 1]; the hidden activities go '
            f'from {float(activity.min()):.3g} to {float(activity.max()):.3g}. Use distance="squared"'
        )
    return 1 / (activity * (1 - activity)).clamp_min(1e-4)


class ExactCurvature:
    """``v ↦ (G + μ D) v`` on minibatches, with one graph for all vectors (methods 2.7, 7.7).

    ``D = E[J_cᵀ H_d J_c]`` is the Gauss-Newton matrix of the distance between the hidden activities ``c`` and what
    they are now; it adds nothing to the gradient. Activities from which no counted output can be reached (at padded
    positions) are not among them.

    Args:
        objective: runs the model; its ``hidden`` modules give ``c``.
        batches: minibatches that the mean is taken over.
        weights: parameters ``θ`` by name, in flat order, part of the model.
        structural: μ.
        distance: ``c -> diag H_d``, of the shape of ``c``.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        weights: Mapping[str, Tensor],
        structural: float = 0.0,
        distance: Distance = _squared,
    ) -> None:
        self.objective, self.batches, self.weights = objective, batches, weights
        self.structural = structural
        self._graphs: list[tuple[list[Tensor], Any, list[Tensor]]] = []
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                values, targets = objective.with_hidden(batch)
                counted = objective.likelihood.counted(values[0].detach(), targets)
                kept = _reaching(values, counted, objective.listened)
                metrics = [
                    masked(structural * distance(value.detach()), keep)
                    for value, keep in zip(values[1:], kept, strict=True)
                ]
                self._graphs.append((values, targets, metrics))

    def product(self, direction: Mapping[str, Tensor]) -> list[Tensor]:
        """The product with parameter-shaped tensors by name; parameter-shaped, in the order of ``weights``."""
        leaves = list(self.weights.values())
        total = [torch.zeros_like(leaf) for leaf in leaves]
        directions = {name: part[None] for name, part in direction.items()}
        for batch, (values, targets, metrics) in zip(self.batches, self._graphs, strict=True):
            if metrics:
                _, _, (tangents,) = self.objective.push_all(batch, directions)
            else:
                tangents = list(self.objective.push(batch, directions)[2])
            outputs = values[0].detach()
            curved = self.objective.likelihood.curvature_product(outputs, tangents[0][None], targets)[0]
            back = [curved.to(outputs.dtype), *(m * t for m, t in zip(metrics, tangents[1:], strict=True))]
            roots = [(v, b) for v, b in zip(values, back, strict=True) if v.requires_grad]
            grads = torch.autograd.grad(
                [v for v, _ in roots], leaves, [b for _, b in roots], retain_graph=True, allow_unused=True
            )
            for out, grad in zip(total, grads, strict=True):
                if grad is not None:
                    out += grad
        count = sum(batch.count for batch in self.batches)
        return [part / count for part in total]

    def hidden_diagonal(self, generator: torch.Generator, samples: int = 16) -> dict[str, Tensor]:
        """``μ diag(D)`` by name, parameter-shaped: unbiased, from ``samples`` backward passes (methods 4.7, 7.6).

        With independent random signs ``s`` on all activities ``E[(J_cᵀ H_d^½ s)²] = diag(J_cᵀ H_d J_c)``, summed over
        examples, too: signs of different examples do not correlate.

        Args:
            generator: draws the signs.
            samples: how many; the relative error of an entry is about ``√(2 / samples)``.
        """
        leaves = list(self.weights.values())
        total = {name: torch.zeros_like(leaf) for name, leaf in self.weights.items()}
        for values, _, metrics in self._graphs:
            roots = [(v, m.sqrt()) for v, m in zip(values[1:], metrics, strict=True) if v.requires_grad]
            for _ in range(samples if roots else 0):
                back = [root * _signs(root, generator) for _, root in roots]
                grads = torch.autograd.grad([v for v, _ in roots], leaves, back, retain_graph=True, allow_unused=True)
                for out, grad in zip(total.values(), grads, strict=True):
                    if grad is not None:
                        out += grad.square()
        count = samples * sum(batch.count for batch in self.batches)
        return {name: part / count for name, part in total.items()}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with equal chances, as ``like``; 0 where that is 0."""
    kept = like != 0  # the others need none, and must not shift these
    drawn = torch.randint(2, (int(kept.sum()),), generator=generator, device=generator.device)
    out = torch.zeros_like(like)
    out[kept] = 2 * drawn.to(like) - 1
    return out


def _reaching(values: Sequence[Tensor], counted: Tensor | None, modules: Sequence[nn.Module]) -> list[Tensor | None]:
    """Which hidden activities ``values[1:]`` (any shapes) reach a counted one of the outputs ``values[0]``.

    ``None`` for all of them, as always where no target is ignored. A recurrent module (one of ``modules``, which gave
    the activities) hands its steps on inside: a step is reached where a later one is.
    """
    outputs, *hidden = values
    found: list[Tensor | None] = [None] * len(hidden)
    places = [k for k, value in enumerate(hidden) if value.requires_grad]
    if counted is None or not places or not outputs.requires_grad:
        return found
    grads = reached(outputs, [get_gradient_edge(hidden[k]) for k in places], counted)
    for k, grad in zip(places, grads, strict=True):
        kept = torch.zeros_like(hidden[k], dtype=torch.bool) if grad is None else grad != 0
        module = modules[k]
        if isinstance(module, nn.RNNBase) and kept.dim() == 3:
            time = 1 if module.batch_first else 0
            later = kept.flip(time).cummax(time).values.flip(time).any(-1, keepdim=True)
            kept = (kept.any((time, 2), keepdim=True) if module.bidirectional else later).expand(kept.shape)
        found[k] = kept
    return found
