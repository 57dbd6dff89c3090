"""Draws of weights, one set for a whole batch of inputs (methods 9.4, 10.1).

A fully connected block's draw is ``W = W* + D_G (S^{-1/2} ∘ E) D_Aᵀ`` with the dual bases ``D`` of
:class:`laplace_kf.operators.Spectral`. It is kept in its eigenbasis, ``X = S^{-1/2} ∘ E``, and the product with inputs
``[a; 1]`` is taken in the cheaper order: ``D_G (X (D_Aᵀ [a; 1]))`` for few rows, in which case ``W`` is never made, and
``W`` first for many. Over many rows the mean joins in the eigenbasis (``X + B_Gᵀ W* B_A``), which saves its product.
Every other block is drawn as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair
from laplace_kf.layers.base import BoundCall, LayerRule
from laplace_kf.layers.linear import LINEAR
from laplace_kf.linalg import require_positive
from laplace_kf.models import autocasting
from laplace_kf.operators import Blockwise, Matrix, Spectral
from laplace_kf.predictive.activations import augmented, examples, factorises, is_linear
from laplace_kf.predictive.calls import Uses, outputs_at, over_draws
from laplace_kf.predictive.draws import Draws
from laplace_kf.predictive.suffix import Site, cut
from laplace_kf.tape import Block
from laplace_kf.tape.blocks import merged

__all__ = ["WeightDraws", "at_once", "chain_is_cheaper"]

MEMORY_BYTES = 128 * 2**20  # noise and activations of the draws that are made at once
# Draws times inputs that are run together through layers whose weights differ from draw to draw: a batched convolution
# is faster than one after the other for few images, slower for many (measured on LeNet, one core).
TOGETHER = 256
KEEP_BYTES = 2**30  # draws that may be kept from one batch to the next


def chain_is_cheaper(rows: int, matrix: Spectral, shared: int = 1) -> bool:
    """Whether ``rows`` inputs go through the factors of a draw with fewer products than the draw's own weight takes.

    Args:
        rows: number of inputs M.
        matrix: the precision of one fully connected block ``(1, O, I)``.
        shared: how many draws share the rotation of the inputs.
    """
    _, out, inp = matrix.grid.shape
    right = inp * inp if matrix.inputs.dual is not None else 0
    left = out * out if matrix.outputs.dual is not None else 0
    form = out * inp * ((inp if right else 0) + (out if left else 0))
    return rows * (right / shared + left) < form


def at_once(blocks: Sequence[Block], samples: int, inputs: int, itemsize: int) -> int:
    """How many of S draws are run together.

    Args:
        blocks: of all parameters that are drawn.
        samples: S.
        inputs: number of inputs N.
        itemsize: bytes of a number.
    """
    widths = sum(sum(block.shape[1:]) for block in blocks if is_linear(block))
    numbers = sum(block.size for block in blocks) + inputs * widths
    size = min(samples, MEMORY_BYTES // max(1, 2 * numbers * itemsize))
    if any(block.factorises and block.view is not None and not is_linear(block) for block in blocks):
        size = min(size, TOGETHER // max(1, inputs))
    return max(1, size)


@dataclass
class _Factored:
    """A fully connected block whose draws stay in their eigenbasis.

    Attributes:
        block: the block.
        matrix: its precision.
        deviations: ``S^{-1/2}`` as ``(O, I)``.
        mean: ``W*`` in the eigenbasis, ``(O, I)``, if it is folded into the draws.
    """

    block: Block
    matrix: Spectral
    deviations: Tensor
    mean: Tensor | None

    def draws(self, noise: Tensor) -> Tensor:
        """``X`` of K draws, ``(K, O, I)``, from standard normal ``(K, P_b)``."""
        x = noise.reshape(-1, *self.deviations.shape) * self.deviations
        return x if self.mean is None else x + self.mean

    def weight(self, x: Tensor) -> dict[str, Tensor]:
        """``D_G X D_Aᵀ`` for ``X (O, I)``, in the shapes of the parameters."""
        return {name: value[0] for name, value in self.block.unpack(self.matrix.rotate_back(x[None, None])).items()}

    def through(self, x: Tensor, a: Tensor) -> Tensor:
        """``D_G X D_Aᵀ [a; 1]`` for inputs ``a (M, I)``, as ``(M, O)``, without making the weight."""
        bias = self.block.has_bias_column
        if self.matrix.inputs.dual is None:
            inner = augmented(a.to(x), x.T, bias)
        else:
            inner = torch.matmul(augmented(a.to(x), self.matrix.inputs.dual[0], bias), x.T)
        return inner if self.matrix.outputs.dual is None else torch.matmul(inner, self.matrix.outputs.dual[0].T)


class WeightDraws:
    """S draws of a posterior's weights, and the outputs at them.

    Args:
        model: the module.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        mean: mean weights by parameter name, each of its parameter's shape.
        precision: precision of the flat weights ``(P,)``.
        draws: noise of S draws.
        rows: about how many inputs N each draw will see: over many, the mean is folded into the draws.
        keep: make the weights themselves and keep them from one batch to the next, if they fit into ``KEEP_BYTES``;
            otherwise draws are made anew from their seeds for every batch, with the same values.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        mean: Mapping[str, Tensor],
        precision: Blockwise,
        draws: Draws,
        rows: float,
        keep: bool = False,
    ) -> None:
        self.model, self.forward, self.mean, self.draws, self.entries = model, forward, mean, draws, precision.entries
        self.layout = precision.layout
        self.like = _like(self.entries[0][1])
        self.bytes_of_one = precision.size * self.like.element_size()
        self.keep = keep and draws.samples * self.bytes_of_one <= KEEP_BYTES
        self.kept: list[dict[str, Tensor]] = []
        self.factored: dict[str, _Factored] = {}
        as_weights = self.keep or autocasting()  # kept draws are worth making; autocast acts on products with weights
        for block, matrix in self.entries:
            if as_weights or not isinstance(matrix, Spectral) or not (_plain(block) and factorises(block, matrix)):
                continue
            require_positive(matrix.grid, block.name)
            folded = None
            if rows * draws.samples > sum(block.shape[1:]):
                packed = block.pack({name: mean[name][None] for name in block.parameters})
                folded = matrix.rotate(packed.to(matrix.grid))[0, 0]
            self.factored[block.name] = _Factored(block, matrix, matrix.grid[0].rsqrt(), folded)

    def make(self, indices: Sequence[int], factored: Mapping[str, _Factored] | None = None) -> dict[str, Tensor]:
        """Draws with a leading axis of K: ``(K, O, I)`` by block where they stay factored, else by parameter name."""
        factored = self.factored if factored is None else factored
        shapes = [(1, matrix.noise_size) for _, matrix in self.entries]
        drawn = [self.draws.normal(index, shapes, self.like) for index in indices]
        made: dict[str, Tensor] = {}
        formed: list[dict[str, Tensor]] = []
        for number, (block, matrix) in enumerate(self.entries):
            parts = [one[number] for one in drawn]
            noise = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(matrix.device)
            if block.name in factored:
                made[_key(block)] = factored[block.name].draws(noise)
            else:
                formed.append(block.unpack(matrix.colour(noise).reshape(-1, *block.shape)))
        moved = self.layout.hold(merged(formed))
        made.update({name: self.mean[name] + value.to(self.mean[name]) for name, value in moved.items()})
        return made

    def outputs(self, inputs: Any, model: nn.Module | None = None, forward: Forward | None = None) -> Tensor:
        """Outputs ``(S, N, ...)`` of one batch of inputs.

        Args:
            inputs: what the model takes.
            model, forward: run these instead, a double of the model (:mod:`laplace_kf.replica`).
        """
        plain = (self.model, self.forward) if model is None else (model, forward)
        site = cut(*plain, self.mean, inputs)
        factored = self.factored  # several threads may draw from this object
        try:
            return self._outputs(site, factored)
        except IncompatiblePair:  # a weight is used by something else than a linear layer: draw it as it is
            if not factored:
                raise
            found = self._outputs(site, {})
            self.factored = {}
            return found

    def _outputs(self, site: Site, factored: Mapping[str, _Factored]) -> Tensor:
        samples, count = self.draws.samples, examples(site[2])
        size = at_once([block for block, _ in self.entries], samples, count, self.like.itemsize)
        parts = []
        for made in self._chunks(size, factored):
            held = next(iter(made.values())).shape[0]
            for start in range(0, held, size):
                some = {name: value[start : start + size] for name, value in made.items()}
                parts.append(over_draws(site[0], partial(self._run, site, factored, min(size, held - start)), some))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _chunks(self, size: int, factored: Mapping[str, _Factored]) -> Iterator[dict[str, Tensor]]:
        """All draws, at most ``size`` at once, unless they are kept."""
        if self.kept:
            yield from self.kept
            return
        if self.keep:
            size = max(1, MEMORY_BYTES // (3 * self.bytes_of_one))
        made = []
        for start in range(0, self.draws.samples, size):
            chunk = self.make(range(start, min(start + size, self.draws.samples)), factored)
            if self.keep:
                made.append(chunk)
            yield chunk
        self.kept = made

    def _run(self, site: Site, factored: Mapping[str, _Factored], shared: int, drawn: Mapping[str, Tensor]) -> Tensor:
        """Outputs ``(N, ...)`` at one draw; ``shared`` draws are run together."""
        formed = {name: value for name, value in drawn.items() if name in self.mean}
        owner = {name: found for found in factored.values() for name in found.block.parameters}
        weights: dict[str, dict[str, Tensor]] = {}
        met: set[str] = set()

        def handle(rule: LayerRule, bound: BoundCall, names: Mapping[str, str], call: Callable[[], Tensor]) -> Tensor:
            found = owner[next(iter(names.values()))]
            block, a, x = found.block, bound["input"], drawn[_key(found.block)]
            if set(names.values()) != set(block.parameters) or rule is not LINEAR:
                raise IncompatiblePair(f"block {block.name!r} is used in another way than when it was fitted")
            rows = a.numel() // max(1, a.shape[-1])
            first = not met and not formed  # then the inputs are the same for all draws
            met.add(block.name)
            if block.name not in weights and chain_is_cheaper(rows, found.matrix, shared if first else 1):
                output = found.through(x, a.reshape(-1, a.shape[-1])).to(a)  # (rows, O); an expert may have no rows
                output = output.reshape(*a.shape[:-1], output.shape[-1])
                if found.mean is None:
                    return call() + output
                return output if bound["bias"] is None or "bias" in names else output + bound["bias"]
            if block.name not in weights:
                made = found.weight(x)
                if found.mean is None:
                    made = {name: self.mean[name] + value.to(self.mean[name]) for name, value in made.items()}
                weights[block.name] = {name: value.to(self.mean[name]) for name, value in made.items()}
            values = weights[block.name]
            return F.linear(a, values[names["weight"]], values[names["bias"]] if "bias" in names else bound["bias"])

        tracked = {id(self.mean[name]): name for name in owner}
        with Uses(tracked, handle):
            return outputs_at(site[0], site[1], {**self.mean, **formed}, site[2])


def _plain(block: Block) -> bool:
    """Whether a block is the weight ``(O, I)`` of ``F.linear``."""
    return is_linear(block) and block.view is not None and block.view.split == block.view.shape


def _like(matrix: Matrix) -> Tensor:
    return matrix.grid if isinstance(matrix, Spectral) else matrix.diag()


def _key(block: Block) -> str:
    """A key that no parameter name can have."""
    return f"factored {block.name}"
