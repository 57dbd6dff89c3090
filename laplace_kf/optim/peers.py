"""Training with several processes: each takes in minibatches of its own, and all make the same step.

Gradients, losses and products with the exact curvature are means over the minibatches of all processes, weighted by
their examples, so that shares may be uneven. The optimiser adds them up itself: torch's ``DistributedDataParallel``
plays no part, and a model that is wrapped in it is taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from laplace_kf.distributed import Ranks, require_one_network
from laplace_kf.draws import mixed
from laplace_kf.errors import IncompatiblePair

__all__ = ["Alone", "Peers", "peers_of"]

T = TypeVar("T")


class Alone:
    """One process."""

    ranks: Ranks | None = None

    def doing(self, what: str) -> AbstractContextManager[None]:
        """What runs inside fails everywhere if it fails here."""
        return nullcontext()

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        return list(values)

    def summed(self, value: Tensor) -> Tensor:
        """A tensor of any shape, added up over all processes."""
        return value

    def mean(
        self, grads: Sequence[Tensor | None], like: Sequence[Tensor], loss: float, count: int
    ) -> tuple[Sequence[Tensor | None], float, int]:
        """Gradients ``(*shape)`` and loss, means over ``count`` examples, as means over those of all processes."""
        return grads, loss, count

    def first(self, value: T) -> T:
        """The first process's value."""
        return value

    def handed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors of any shapes, by name."""
        return dict(tensors)

    def settle_buffers(self, model: nn.Module) -> None:
        """Gives the model the first process's buffers, which its passes in training mode have moved."""

    def own(self, generator: torch.Generator) -> torch.Generator:
        """A generator whose numbers are not those of another process."""
        return generator


class Peers(Alone):
    """This process among others.

    Args:
        ranks: all of them.
    """

    ranks: Ranks

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def doing(self, what: str) -> AbstractContextManager[None]:
        return self.ranks.together(what)

    def total(self, *values: float) -> list[float]:
        found: list[float] = self.summed(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def summed(self, value: Tensor) -> Tensor:
        return self.ranks.add_up([value], "a sum of the step")[0]

    def mean(
        self, grads: Sequence[Tensor | None], like: Sequence[Tensor], loss: float, count: int
    ) -> tuple[Sequence[Tensor | None], float, int]:
        total, number = self.total(loss * count, float(count))
        parts = [
            torch.zeros_like(w) if g is None else g.to_dense() * (count / number)
            for g, w in zip(grads, like, strict=True)
        ]
        return self.ranks.add_up(parts, "the gradient"), total / number, round(number)

    def first(self, value: T) -> T:
        found: T = self.ranks.exchange("a number of the step", value)[0]
        return found

    def handed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = list(tensors)
        found = self.ranks.hand_round([tensors[n] for n in names], [0] * len(names), "the new weights")
        return dict(zip(names, found, strict=True))

    def settle_buffers(self, model: nn.Module) -> None:
        buffers = dict(model.named_buffers())
        for name, value in self.handed(buffers).items():
            buffers[name].copy_(value)

    def own(self, generator: torch.Generator) -> torch.Generator:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        seed = self.first(seed)
        return torch.Generator(generator.device).manual_seed(int(mixed(torch.tensor(seed), self.ranks.rank)))


def peers_of(group: Any, given: nn.Module, model: nn.Module) -> Alone:
    """The processes of a group, or this one alone.

    Args:
        group: a process group, or ``None``.
        given: the model as it was handed over, perhaps wrapped.
        model: the model itself.

    Raises:
        IncompatiblePair: for a model wrapped in DistributedDataParallel without a group, whose processes would drift
            apart; for networks that are not the same in all processes.
    """
    ranks = Ranks.of(group)
    if ranks is None:
        wrapped = given if isinstance(given, DistributedDataParallel) else None
        if group is None and wrapped is not None and torch.distributed.get_world_size(wrapped.process_group) > 1:
            raise IncompatiblePair(
                "the model is wrapped in DistributedDataParallel, whose averages of gradients these optimisers do not "
                "use: they make gradients and curvature themselves, and the processes' weights would drift apart. Pass "
                "process_group=model.process_group (and the minibatch to step(x, y), not loss.backward())"
            )
        return Alone()
    peers = Peers(ranks)
    with peers.doing("the making of the optimiser"):
        require_one_network(ranks, model)
    return peers
