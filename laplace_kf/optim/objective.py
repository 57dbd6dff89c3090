"""The regularised training objective of one model, and exact Gauss-Newton products with it.

``E(θ) = mean(−log p) + η/2 ‖θ‖²`` over the parameters that are optimised. All passes of one step see the same
function: the model stands in the mode the user left it in, a replayed pass uses the random numbers of the first one
(dropout masks) and writes to no buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_kf.batches import Forward, map_examples, run, to_device
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.linalg import all_finite
from laplace_kf.optim.peers import Alone
from laplace_kf.outputs.derivatives import one_jacobian, pushed_twice
from laplace_kf.sequences import read
from laplace_kf.substitution import substituted
from laplace_kf.tape import Observation
from laplace_kf.tape.chain import Chain

__all__ = ["Batch", "Objective", "counting"]


@dataclass(frozen=True)
class Batch:
    """One minibatch of a step.

    Attributes:
        data: what the user gave, on the model's device, tensors ``(N, ...)``.
        count: number of examples that count: those with a target that is not ignored.
        random: state of the random generators (by device) before its first pass.
        seen: its pass on the tape, if the model's own was one.
        losses: ``−log p (N,)`` of the gradient's pass, where there was one.
        counted: which of the examples count, ``(N,)``; ``None`` for all.
    """

    data: Any
    count: int
    random: Mapping[str, Tensor]
    seen: Observation | None = None
    losses: Tensor | None = None
    counted: Tensor | None = None

    def part(self, fraction: float, least: int, generator: torch.Generator) -> Batch:
        """A random part of the examples, ``least`` of them at the least (methods 4.4)."""
        return self.split(fraction, least, generator)[0]

    def split(self, fraction: float, least: int, generator: torch.Generator) -> tuple[Batch, Batch | None]:
        """As :meth:`part`, with the rest (``None`` if the part is all)."""
        size = min(self.count, max(least, round(fraction * self.count)))
        if size == self.count:
            return self, None
        order = torch.randperm(self.count, generator=generator, device=generator.device)
        if self.counted is not None:
            order = self.counted.nonzero()[:, 0].to(order.device)[order]
        return self._take(order[:size]), self._take(order[size:])

    def _take(self, chosen: Tensor) -> Batch:
        losses = None if self.losses is None else self.losses[chosen.to(self.losses.device)]
        if self.seen is not None and self.seen.chain is not None:
            seen = self.seen.part(chosen.to(self.seen.outputs.device))
            return Batch(seen.batch, len(chosen), self.random, seen, losses)
        rows = self.count if self.counted is None else len(self.counted)
        data = map_examples(self.data, rows, lambda t: t[chosen.to(t.device)])
        return Batch(data, len(chosen), self.random, None, losses)


def counting(batch: Batch, likelihood: Likelihood, outputs: Tensor, targets: Any) -> Batch:
    """The batch with the number of its examples that count, found from its pass.

    Args:
        batch: minibatch.
        likelihood: knows which targets are ignored.
        outputs, targets: of the pass, ``(N, ...)``.

    Raises:
        ShapeMismatch: if not one of them counts.
    """
    kept = likelihood.counted(outputs.detach(), targets)
    examples = None if kept is None else kept.flatten(1).any(1)
    if examples is None or bool(examples.all()):
        return replace(batch, count=int(outputs.shape[0]))
    if not bool(examples.any()):
        raise ShapeMismatch("all targets of the minibatch are ignored, so it has no loss; leave it out")
    return replace(batch, count=int(examples.sum()), counted=examples)


class Objective:
    """``E(θ)`` of one model: its loss, its outputs, and products ``Vᵀ G V``, all of the same function.

    Args:
        model: the module that is trained.
        likelihood: output density.
        forward: ``(model, batch) -> (outputs, targets)`` or ``None``.
        peers: other processes, whose minibatches count as well.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, forward: Forward | None, peers: Alone | None = None
    ) -> None:
        peers = Alone() if peers is None else peers
        self.likelihood = likelihood
        self.runner = partial(run, model, forward=forward)
        self.model = model
        self.hidden: list[nn.Module] = []  # modules whose outputs structural damping looks at
        self.listened: list[nn.Module] = []  # the one behind every activity of the last pass
        self.peers = peers  # whose minibatches all means are taken over
        # None: to be checked; there is nothing that could hide a derivative in a list of torch's own modules
        self._forward_mode: bool | None = True if forward is None and read(model) is not None else None

    def random_state(self) -> dict[str, Tensor]:
        """States of the global generators that a pass may draw from, by device name (opaque, of any shape)."""
        devices = {p.device for p in self.model.parameters() if p.device.type != "cpu"}
        states = {str(device): getattr(torch, device.type).get_rng_state(device) for device in devices}
        return {"cpu": torch.get_rng_state(), **states}

    @contextmanager
    def _replayed(self, random: Mapping[str, Tensor]) -> Iterator[None]:
        now = self.random_state()
        self._set_random(random)
        try:
            yield
        finally:
            self._set_random(now)

    @staticmethod
    def _set_random(states: Mapping[str, Tensor]) -> None:
        for name, state in states.items():
            device = torch.device(name)
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                getattr(torch, device.type).set_rng_state(state, device)

    def outputs(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        """Outputs ``(N, ...)`` and targets of a replayed pass with some parameters replaced, by name."""
        replaced = {name: buffer.clone() for name, buffer in self.model.named_buffers()} | dict(weights or {})
        with self._replayed(batch.random):
            outputs, targets = substituted(self.model, replaced, lambda: self.runner(batch.data))
        return outputs, to_device(targets, outputs.device)

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], weights: Mapping[str, Tensor]) -> float:
        """Mean of ``−log p`` over the batches at other weights (by name, parameter-shaped); no L2 term.

        Not finite outputs give NaN, they raise nothing.
        """
        total, count = 0.0, 0
        for batch in batches:
            outputs, targets = self.outputs(batch, weights)
            if not all_finite(outputs):
                total = float("nan")
                break
            total -= float(self.likelihood.log_prob(outputs, targets).sum(dtype=torch.float64))
            count += batch.count
        total, number = self.peers.total(total, count)
        return total / number if number else total

    def products(self, batches: Sequence[Batch], directions: Mapping[str, Tensor]) -> Tensor:
        """``uᵀ G v`` for all pairs of ``K`` directions, by one Jacobian product each (methods 2.7; Martens 2016, B.3).

        Args:
            batches: minibatches that the mean is taken over.
            directions: ``(K, *shape)`` by parameter name.

        Returns:
            ``(K, K)`` float64.
        """
        total: Tensor | float = 0.0
        for batch in batches:
            outputs, targets, pushed = self.push(batch, directions)
            curved = self.likelihood.curvature_product(outputs, pushed, targets)
            rows = pushed.flatten(1).to(curved.dtype)
            total = total + (rows @ curved.flatten(1).T).double()
        assert isinstance(total, Tensor)
        (number,) = self.peers.total(sum(batch.count for batch in batches))
        products = self.peers.summed(total) / number
        return (products + products.T) / 2

    def push(self, batch: Batch, directions: Mapping[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        """Outputs ``(N, ...)``, targets, and ``J u`` for directions ``(K, *shape)`` by name, ``(K, N, ...)``."""
        if batch.seen is not None and batch.seen.chain is not None:
            return self._push_along(batch.seen, batch.seen.chain, directions)
        (outputs, *_), targets, pushed = self.push_all(batch, directions)
        return outputs, targets, torch.stack([tangents[0] for tangents in pushed])

    @torch.no_grad()
    def _push_along(
        self, seen: Observation, chain: Chain, directions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any, Tensor]:
        """With the activations that the gradient's pass left on the tape."""
        outputs = seen.outputs.detach()
        pushed = chain.push({name: part.to(outputs.dtype) for name, part in directions.items()})
        return (
            outputs,
            seen.targets,
            outputs.new_zeros(_count(directions), *outputs.shape) if pushed is None else pushed,
        )

    def push_all(self, batch: Batch, directions: Mapping[str, Tensor]) -> tuple[list[Tensor], Any, list[list[Tensor]]]:
        """As :meth:`push` for the outputs and the hidden activities (any shapes), one list of products a direction.

        Forward-mode differentiation; where an operation has no rule for it, or where it is that of another function
        (:func:`laplace_kf.outputs.derivatives.one_jacobian`), two backward passes instead.
        """
        if self._forward_mode is not False:
            try:
                found = self._push_forward(batch, directions)
            except (NotImplementedError, RuntimeError) as error:
                if "orward" not in str(error) and "jvp" not in str(error):
                    raise
                self._forward_mode = False
            else:
                if self._forward_mode is None:
                    self._forward_mode = self._agrees(batch, directions, found[2][0])
                if self._forward_mode is not False:
                    return found
        return self._push_twice(batch, directions)

    def _agrees(self, batch: Batch, directions: Mapping[str, Tensor], pushed: Sequence[Tensor]) -> bool | None:
        """Whether products by forward mode with the first direction, one a value, are those of a backward pass."""
        named = dict(self.model.named_parameters())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaves = {name: named[name].detach().requires_grad_() for name in directions}
            values, _ = self.with_hidden(batch, leaves)
        return one_jacobian(values, list(leaves.values()), pushed, [part[0] for part in directions.values()])

    def with_hidden(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> tuple[list[Tensor], Any]:
        """Outputs followed by what the hidden modules gave, call by call (any shapes), and targets."""
        found: list[Tensor] = []
        self.listened = []

        def listen(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                found.append(first)
                self.listened.append(module)

        handles = [module.register_forward_hook(listen) for module in self.hidden]
        try:
            outputs, targets = self.outputs(batch, weights)
        finally:
            for handle in handles:
                handle.remove()
        return [outputs, *found], targets

    @torch.no_grad()
    def _push_forward(
        self, batch: Batch, directions: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Any, list[list[Tensor]]]:
        named = dict(self.model.named_parameters())
        pushed: list[list[Tensor]] = []
        for k in range(_count(directions)):
            # fused attention kernels have no rule
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                dual = {n: forward_ad.make_dual(named[n].detach(), t[k].to(named[n])) for n, t in directions.items()}
                values, targets = self.with_hidden(batch, dual)
                pairs = [forward_ad.unpack_dual(value) for value in values]
                pushed.append([torch.zeros_like(p) if t is None else t.clone() for p, t in pairs])
                primals = [p.clone() for p, _ in pairs]
        return primals, targets, pushed

    def _push_twice(
        self, batch: Batch, directions: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Any, list[list[Tensor]]]:
        named = dict(self.model.named_parameters())
        names = list(directions)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaves = {name: named[name].detach().requires_grad_() for name in names}
            values, targets = self.with_hidden(batch, leaves)
            along = [[directions[n][k] for n in names] for k in range(_count(directions))]
            pushed = pushed_twice(values, list(leaves.values()), along)
        return [value.detach() for value in values], targets, pushed


def _count(directions: Mapping[str, Tensor]) -> int:
    """The ``K`` of directions ``(K, *shape)``."""
    return next(iter(directions.values())).shape[0]
