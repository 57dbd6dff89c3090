"""Draws of pre-activations, one for every example: no weight is ever drawn (local reparameterisation).

If a weight ``W (O, I)`` acts once per example, on ``[a; 1]``, then its pre-activation under ``N(W*, Λ⁻¹)`` is Gaussian
with mean ``W* [a; 1]``. For ``Λ⁻¹ = (D_G ⊗ D_A) diag(1/S) (D_G ⊗ D_A)ᵀ`` with the dual bases ``D`` of
:class:`laplace_kf.operators.Spectral`, its covariance is ``D_G diag(w) D_Gᵀ``, ``w_o = Σ_i ã_i² / S_oi`` and
``ã = D_Aᵀ [a; 1]``: a draw is ``D_G (√w ∘ ε)``, exactly, for every Kronecker damping, the eigenvalue-corrected form and
the diagonal (where ``D`` is the identity). Blocks are independent under the posterior, so drawing layer after layer
gives every example's outputs their exact joint distribution. Different examples get independent draws; draws of
*one function* over several inputs need weights.

Where a weight acts at several positions of an example, their pre-activations are correlated, and this is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, graphs_of, tensors_of
from laplace_kf.errors import IncompatiblePair
from laplace_kf.graphs import count
from laplace_kf.layers.base import AffineRule, BoundCall, LayerRule, flatten_rows
from laplace_kf.layers.linear import LinearRule
from laplace_kf.linalg import require_positive
from laplace_kf.operators import Blockwise, Matrix, Spectral
from laplace_kf.predictive.calls import Uses, outputs_at, over_draws
from laplace_kf.predictive.draws import Draws
from laplace_kf.tape import Block

__all__ = ["activation_outputs", "augmented", "examples", "factorises", "is_linear", "refusal"]

MEMORY_BYTES = 128 * 2**20  # noise and activations of the draws that are made at once
ADVICE = 'use space="weights" (or "auto")'


def is_linear(block: Block) -> bool:
    """Whether a block is one whole matrix that multiplies vectors, with or without its bias."""
    whole = not block.pieces and block.turned is None and not block.one_hot
    return block.factorises and whole and block.view is not None and len(block.shapes[0]) == 2


def factorises(block: Block, matrix: Matrix) -> bool:
    """Whether a matrix has a basis over the inputs and one over the outputs of its block."""
    return isinstance(matrix, Spectral) and tuple(matrix.grid.shape) == block.shape


def refusal(block: Block, matrix: Matrix) -> str | None:
    """Why a block's pre-activations cannot be drawn whatever the input is; ``None`` if they may be."""
    if not isinstance(matrix, Spectral) or not factorises(block, matrix):
        return f"the precision of block {block.name!r} has no basis that factorises over inputs and outputs"
    if is_linear(block):
        return None
    if block.factorises:
        if block.view is None and block.shape[0] == 1 and not block.pieces:
            return None  # a bias on its own
        if block.turned is not None:
            return f"block {block.name!r} is used twice per example, as itself and as its transpose"
        if block.pieces:
            return f"block {block.name!r} is a part of a packed parameter"
        kind = "an embedding" if block.one_hot else "a convolution"
        return (
            f"block {block.name!r} is {kind}, which acts at several positions per example; its outputs are correlated"
        )
    if matrix.inputs.dual is None and matrix.outputs.dual is None:
        return None
    return f"block {block.name!r} couples parameters of several uses; its outputs are correlated in no simple way"


def examples(inputs: Any) -> int:
    """Number of examples N of an input structure: the length of its first tensor (1 if it has none), or of graphs."""
    graph = next(graphs_of(inputs), None)
    if graph is not None:
        return count(graph)
    return next((t.shape[0] for t in tensors_of(inputs) if t.dim()), 1)


def augmented(a: Tensor, matrix: Tensor, bias: bool) -> Tensor:
    """``[a; 1] M`` for ``a (N, I)`` and a matrix ``(I, K)``, or ``(I+1, K)`` with ``bias``, without making ``[a; 1]``.

    A matrix of one row with ``bias`` is a bias on its own: no input counts.
    """
    if not bias:
        return torch.matmul(a, matrix)
    return torch.matmul(a[:, : matrix.shape[0] - 1], matrix[:-1]) + matrix[-1]


@dataclass(frozen=True)
class _Linear:
    """Noise of one fully connected block.

    Attributes:
        block: the block.
        matrix: its precision.
        variances: ``1 / S`` as ``(O, I)``.
    """

    block: Block
    matrix: Spectral
    variances: Tensor

    def noise(self, a: Tensor, eps: Tensor) -> Tensor:
        """``D_G (√w ∘ ε)`` for inputs ``a (M, I)`` and ``ε (M, O)``, as ``(M, O)``."""
        a, bias = a.to(self.variances), self.block.has_bias_column
        if self.matrix.inputs.dual is None:
            spread = augmented(a.square(), self.variances.T, bias)
        else:
            rotated = augmented(a, self.matrix.inputs.dual[0], bias)
            spread = torch.matmul(rotated.square(), self.variances.T)
        scaled = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt() * eps.to(spread)
        outputs = self.matrix.outputs.dual
        return scaled if outputs is None else torch.matmul(scaled, outputs[0].T)


class _Sampler:
    """One model with its posterior, ready to draw pre-activations."""

    def __init__(
        self, model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], precision: Blockwise
    ) -> None:
        reasons = [reason for reason in (refusal(b, m) for b, m in precision.entries) if reason is not None]
        if reasons:
            raise IncompatiblePair(f'space="activations" cannot be used here: {reasons[0]}; {ADVICE}')
        self.model, self.forward, self.mean = model, forward, mean
        self.tracked = {id(value): name for name, value in mean.items()}
        self.linear: dict[str, _Linear] = {}  # by name of every parameter of the block
        self.diagonal: dict[str, Tensor] = {}  # standard deviations of elementwise parameters
        self.widths: dict[str, int] = {}  # noise entries per example, by name of the parameter that they belong to
        for block, matrix in precision.entries:
            assert isinstance(matrix, Spectral)
            require_positive(matrix.grid, block.name)
            if block.factorises:
                found = _Linear(block, matrix, 1 / matrix.grid[0])
                self.linear.update(dict.fromkeys(block.parameters, found))
                self.widths[block.parameters[0]] = block.shape[1]
            else:
                for name, value in block.unpack(matrix.grid.rsqrt()[None]).items():
                    self.diagonal[name] = value[0]
                    self.widths[name] = value.numel()
        self.like = next(m.grid for _, m in precision.entries if isinstance(m, Spectral))

    def run(self, inputs: Any, count: int, noise: Mapping[str, Tensor]) -> Tensor:
        """Outputs ``(N, ...)`` of ``count`` examples for one draw's noise ``(N, width)`` by parameter name."""
        seen: set[str] = set()

        def handle(rule: LayerRule, bound: BoundCall, names: Mapping[str, str], call: Callable[[], Tensor]) -> Tensor:
            output = call()
            reason = rule.refuses(bound, output)
            if reason is not None:
                raise self._refused(names, f"is used by {reason}", "")
            if seen & set(names.values()):
                raise self._refused(names, "is used several times per example", "; its outputs are correlated")
            seen.update(names.values())
            leading = rule.leading(bound, output)
            if isinstance(rule, AffineRule):
                drawn = self._elementwise(rule, bound, names, output, leading, count, noise)
            else:
                drawn = self._product(rule, bound, names, output, leading, count, noise)
            return output + drawn.reshape(output.shape).to(output)

        with Uses(self.tracked, handle):
            outputs = outputs_at(self.model, self.forward, self.mean, inputs)
        missing = [name for name in self.mean if name not in seen]
        if missing:
            raise self._refused({"weight": missing[0]}, "is not seen in use in this forward pass", "")
        if outputs.shape[0] != count:
            raise IncompatiblePair(
                f'space="activations" takes the first axis of the first input ({count}) for the examples, but the '
                f"outputs have {outputs.shape[0]}; {ADVICE}"
            )
        return outputs

    def _product(
        self,
        rule: LayerRule,
        bound: BoundCall,
        names: Mapping[str, str],
        output: Tensor,
        leading: int,
        count: int,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """Noise ``(N, O)`` of a product with a weight, a bias, or both."""
        self._once(names, math.prod(output.shape[:leading]), count)
        total: Tensor | None = None
        for leader, role in {n: r for r, n in names.items() if n in self.widths}.items():
            found = self.linear.get(leader)
            if found is not None and isinstance(rule, LinearRule) and set(found.block.parameters) <= {*names.values()}:
                view = rule.view(bound["weight"], bound) if role == "weight" else None
                if view == found.block.view:
                    with torch.autocast(output.device.type, enabled=False):
                        drawn = found.noise(flatten_rows(bound["input"], leading), noise[leader])
                    total = drawn if total is None else total + drawn
                    continue
            raise self._refused(names, "is used in another way than when the posterior was fitted", "")
        covered = {
            n for leader in names.values() if leader in self.linear for n in self.linear[leader].block.parameters
        }
        if total is None or covered != set(names.values()):
            raise self._refused(names, "is used in another way than when the posterior was fitted", "")
        return total

    def _elementwise(
        self,
        rule: AffineRule,
        bound: BoundCall,
        names: Mapping[str, str],
        output: Tensor,
        leading: int,
        count: int,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """Noise ``(N, F)`` of an elementwise scale and shift with a diagonal posterior."""
        if not set(names.values()) <= self.diagonal.keys():
            raise self._refused(names, "is also used where no rule sees it", "")
        rows, _, positions = rule.outputs(flatten_rows(output, leading), bound).shape
        self._once(names, rows * positions, count)
        parts = []
        for role, name in names.items():
            drawn = noise[name].to(self.diagonal[name]) * self.diagonal[name].reshape(-1)
            if role == "weight":
                normal = rule.normalised(flatten_rows(bound["input"], leading), bound)  # (N, F, 1)
                drawn = drawn * normal[:, :, 0].to(drawn)
            parts.append(drawn)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _once(self, names: Mapping[str, str], rows: int, count: int) -> None:
        if rows != count:
            where = f"is used at {rows // count} positions per example" if rows % count == 0 else f"has {rows} rows"
            raise self._refused(names, where, "; its outputs are correlated")

    def _refused(self, names: Mapping[str, str], what: str, why: str) -> IncompatiblePair:
        name = next(iter(names.values()))
        return IncompatiblePair(f'space="activations" cannot be used here: parameter {name!r} {what}{why}; {ADVICE}')

    def bytes_per_draw(self, count: int) -> int:
        """Bytes that one draw of ``count`` examples takes while it is made."""
        widest = max((sum(e.block.shape[1:]) for e in self.linear.values()), default=0)
        return count * (sum(self.widths.values()) + 2 * widest) * self.like.element_size()


def activation_outputs(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    draws: Draws,
    inputs: Any,
) -> Tensor:
    """Outputs ``(S, N, ...)`` with pre-activations drawn for every example and draw.

    Raises:
        IncompatiblePair: if a block or its use does not allow it; names both the block and the reason.
    """
    if next(graphs_of(inputs), None) is not None:
        raise IncompatiblePair(
            'space="activations" cannot be used here: the nodes of a graph share the weights, so that their outputs '
            f"are correlated; {ADVICE}"
        )
    sampler = _Sampler(model, forward, mean, precision)
    number = examples(inputs)
    shapes = [(number, width) for width in sampler.widths.values()]
    size = max(1, min(draws.samples, MEMORY_BYTES // max(1, sampler.bytes_per_draw(number))))
    parts = []
    for start in range(0, draws.samples, size):
        indices = range(start, min(start + size, draws.samples))
        noise = _stacked([draws.normal(k, shapes, sampler.like) for k in indices], list(sampler.widths))
        parts.append(over_draws(model, lambda one: sampler.run(inputs, number, one), noise))
    return torch.cat(parts)


def _stacked(drawn: Sequence[Sequence[Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of every draw, in order, to ``(K, ...)`` by name."""
    return {name: torch.stack([one[k] for one in drawn]) for k, name in enumerate(names)}
