"""What a step is made of: the minibatches taken in since the last one, and the update that is proposed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_kf.lookups import padding_rows
from laplace_kf.models import preserved
from laplace_kf.optim.objective import Batch, Objective
from laplace_kf.optim.peers import Alone
from laplace_kf.tape import Observation, Tracer

__all__ = ["PendingStep", "Proposal", "agreed", "gradient_of"]


@dataclass(frozen=True)
class Proposal:
    """An update that has not been made yet.

    Attributes:
        delta: ``(P,)``, learning rates included.
        change: ``M(δ) − M(0)`` of the model that the ratio ρ compares with; negative.
        alpha: coefficient of the new direction.
        mu: coefficient of the previous update.
        check: minibatches on which the loss at the new weights is looked at first.
        rho: the ratio ρ, if the proposal measured it itself.
        after: mean ``−log p`` of all minibatches at the new weights, if the proposal measured it itself.
    """

    delta: Tensor
    change: float
    alpha: float
    mu: float
    check: Sequence[Batch]
    rho: float | None = None
    after: float | None = None


class PendingStep:
    """The minibatches since the last step: their passes, their gradients in ``.grad``, their mean loss.

    Args:
        objective: runs the model.
        tracer: runs it on the tape.
        named: parameters ``(*shape)`` by name.
        names: those that are optimised.
        l2: coefficient η.

    Attributes:
        batches: the minibatches.
        count: number of examples.
    """

    def __init__(
        self, objective: Objective, tracer: Tracer, named: Mapping[str, Tensor], names: Sequence[str], l2: float
    ) -> None:
        self.objective, self.tracer, self.named, self.names, self.l2 = objective, tracer, named, names, l2
        self._padding = padding_rows(objective.model)
        self._mode_matters: bool | None = None  # whether training mode changes the outputs; measured once
        self.clear()

    def clear(self) -> None:
        """Forgets the minibatches."""
        self.batches: list[Batch] = []
        self._loss = 0.0  # sum of −log p
        self.count = 0  # examples of all processes

    @property
    def loss(self) -> float:
        """Mean of ``−log p``, without the L2 term."""
        return self._loss / self.count

    def outputs(self, data: Any, step: int, wants_tape: bool) -> tuple[Tensor, Any, Observation | None]:
        """Outputs ``(N, ...)`` and targets of the pass that gives the gradient; on the tape where it can be shared.

        It can if the model is the same function in training mode (no dropout, no batch statistics).
        """
        model = self.objective.model
        training = any(module.training for module in model.modules())
        shared = wants_tape and not torch.is_autocast_enabled(self.tracer.device.type)
        plain = training and self._mode_matters is not False
        if plain or not shared:
            outputs, targets = self.objective.runner(data)
            if not (shared and training and self._mode_matters is None):
                return outputs, targets, None
        with preserved(model):
            observation = self.tracer.observe(data, step)
        if plain:
            self._mode_matters = not torch.allclose(observation.outputs, outputs, rtol=1e-5, atol=1e-7)
            if self._mode_matters:
                return outputs, targets, None
        return observation.outputs, observation.targets, observation

    @torch.no_grad()
    def add(self, batch: Batch, grads: Sequence[Tensor | None], loss: float, count: int) -> None:
        """Takes in a minibatch.

        Args:
            batch: of this process.
            grads: gradients of the loss by parameter, each of its shape.
            loss: mean ``−log p``.
            count: number of examples that it is the mean of, in all processes.
        """
        before = self.count
        self.batches.append(batch)
        self._loss += loss * count
        self.count += count
        share = count / self.count
        for name, grad in zip(self.names, grads, strict=True):
            parameter = self.named[name]
            value = parameter.detach()
            own = self.l2 * value if grad is None else torch.add(grad.to_dense(), value, alpha=self.l2)
            if before and parameter.grad is not None:
                own = (1 - share) * parameter.grad + share * own
            parameter.grad = self._free(name, own, grad).to(parameter.dtype)

    def _free(self, name: str, own: Tensor, grad: Tensor | None) -> Tensor:
        """The gradient ``own`` without what weight decay says of the rows that are constants (``grad``: the loss's)."""
        if not self.l2:
            return own
        width = own[0].numel() if own.dim() else 1
        rows = {start // width for n, start, _ in self.tracer.layout.held if n == name}
        rows |= {self._padding[name]} if name in self._padding else set()
        for row in rows:
            if grad is None or not bool(grad.to_dense()[row].any()):
                own[row] = 0
        return own

    @torch.no_grad()
    def regularised(self, like: Tensor) -> Tensor:
        """The mean loss with its L2 term, 0-dim, in the type and on the device of ``like``."""
        loss = torch.tensor(self.loss, dtype=like.dtype, device=like.device)
        for name in self.names if self.l2 else ():
            loss = loss + self.l2 / 2 * torch.linalg.vector_norm(self.named[name]).to(loss).square()
        return loss


def agreed(
    peers: Alone, proposal: Proposal, tau: float | None, zeta: float | None
) -> tuple[Proposal, tuple[float | None, float | None]]:
    """The first process's proposal of an update ``(P,)`` and its dampings, so that rounding cannot part them."""
    if peers.ranks is None:
        return proposal, (tau, zeta)
    delta = peers.handed({"delta": proposal.delta})["delta"]
    change, alpha, mu, tau, zeta = peers.first((proposal.change, proposal.alpha, proposal.mu, tau, zeta))
    return replace(proposal, delta=delta, change=change, alpha=alpha, mu=mu), (tau, zeta)


def gradient_of(parameter: Tensor) -> Tensor:
    """``.grad`` of a parameter, of its shape; zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
