"""Leverage: how far an input of a layer lies from the inputs that the layer was trained on.

For a layer with a Kronecker pair it is ``aᵀ (A + δ I)⁻¹ a`` with the input a (with its constant 1) and the layer's own
input factor A (methods 4.1): the statistical leverage of linear regression on the layer's inputs. It takes one forward
pass; no output is looked at. ``δ`` is a thousandth of A's mean eigenvalue: it only keeps directions that the data never
showed finite, and does not depend on N or λ, because a damping as large as that of the posterior's factors hides
exactly those directions. Where a structure has no input factor (diagonal, dense, low rank, eigenvalue-corrected), it is
what the posterior itself says of that input: N times the summed variances of the layer's outputs,
``N Σ_o Var(w_oᵀ a)``. Positions (pixels, steps, nodes) are summed over, as A sums over them; an example's score is the
sum of logarithms over layers.

The leverage grows with the square of the input, so it does not see a stranger that excites a layer weakly. The leverage
of its direction, ``aᵀ (A + δ I)⁻¹ a / aᵀ a``, does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite, map_examples, to_device
from laplace_kf.errors import IncompatiblePair, UnknownName, UnsupportedLayer
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise, KroneckerBlock, Matrix, Spectral
from laplace_kf.predictive.calls import require_movable
from laplace_kf.predictive.linearized import Stand
from laplace_kf.replica import current, standing
from laplace_kf.tape import (
    Block,
    EntryLayout,
    LookupSignals,
    MatrixSignals,
    Observation,
    OuterSignals,
    TiedSignals,
    Tracer,
)

__all__ = ["Leverage"]

Form = Callable[["OuterSignals | LookupSignals"], Tensor]
RIDGE = 1e-3  # damping of an input factor, in units of its mean eigenvalue
LARGEST = 6000  # parameters of a layer whose dense covariance is made


@dataclass(frozen=True)
class Layers:
    """Leverages of one batch.

    Attributes:
        values: leverage ``(N,)`` by layer, in the order in which the layers first ran.
        lengths: squared length of the layer's input ``(N,)``, over its positions, likewise.
        outputs: the network's outputs ``(N, ...)`` at the posterior mean.
        last: name of the layer that ran last.
    """

    values: dict[str, Tensor]
    lengths: dict[str, Tensor]
    outputs: Tensor
    last: str

    def directions(self) -> dict[str, Tensor]:
        """Leverages of the inputs' directions ``(N,)`` by layer."""
        tiny = torch.finfo(self.outputs.dtype).tiny
        return {name: value / self.lengths[name].clamp_min(tiny) for name, value in self.values.items()}


class Leverage:
    """Leverages of the layers of one posterior.

    The first call finds out how the network uses its layers; from then on a batch costs one forward pass (and one
    backward pass where layers act at several positions, to see which of them count).

    Args:
        model: the module; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        mean: posterior mean by parameter name, each of its parameter's shape.
        curvature: mean curvature ``C̄``.
        n_data: N.
        prior: λ, 0-dim, or by parameter name.
        damping: of Kronecker blocks, where no input factor is on its own (chained posteriors).
        sharing: what the structure makes of the positions of an example before it takes their factor.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        mean: Mapping[str, Tensor],
        curvature: Blockwise,
        n_data: float,
        prior: Tensor | Mapping[str, Tensor],
        damping: str = "exact",
        sharing: Callable[[OuterSignals], OuterSignals] | None = None,
    ) -> None:
        if isinstance(curvature.layout, EntryLayout):
            raise IncompatiblePair(
                "a posterior over single weights has no leverages of layers; take another kind of score "
                '("entropy", "mutual_information", "variance", "max_prob")'
            )
        model, forward = standing(model, forward)
        self.model, self.curvature, self.n_data, self.prior, self.damping = model, curvature, n_data, prior, damping
        self.sharing = sharing
        self.device = next(iter(mean.values())).device
        leaves = {name: value.detach().clone().requires_grad_() for name, value in mean.items()}
        self._require_movable = lambda x: require_movable(model, forward, mean, x)
        self._new_tracer = lambda: Tracer(model, Stand(model, forward, leaves), weights=leaves)
        self._tracer: Tracer | None = None
        self._blocks: Mapping[str, Block] = {}
        self._forms: dict[str, Form] = {}
        self._precision: Blockwise | None = None
        self._covariance: Tensor | None = None
        self._lock = threading.Lock()  # the tracer learns from call to call

    def __call__(self, x: Any, layers: str | Sequence[str] = "last") -> Tensor:
        """Sum of the logarithms of the layers' leverages, ``(N,)``; arguments and errors as :meth:`by_layer`."""
        return total(self.by_layer(x, layers).values)

    def by_layer(self, x: Any, layers: str | Sequence[str] = "last") -> Layers:
        """Leverages by layer, and the network's outputs.

        Args:
            x: inputs as the model takes them, N examples.
            layers: ``"last"`` for the one that runs last, ``"all"``, or patterns (``fnmatch``) over the names of layers
                and parameters.

        Raises:
            UnknownName: for another word, or patterns that match no layer; lists the layers.
            IncompatiblePair: if the posterior covers no layer with inputs, or a dense covariance would be too large.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        check_finite(x, 0, "the input")
        with self._lock, current(self.model), preserved(self.model):
            x = to_device(x, self.device)
            self._require_movable(x)
            observation = self._observed(x)
            with torch.no_grad():
                signals = observation.input_signals()
            order = [block.name for call in observation.calls for block in observation.blocks_of(call)]
            usable = {name: signals[name] for name in dict.fromkeys(order) if _has_inputs(signals.get(name))}
            if not usable:
                raise IncompatiblePair("the posterior covers no layer with inputs of its own, so there is no leverage")
            last = next(name for name in reversed(order) if name in usable)
            chosen = _chosen(layers, last, {name: self._blocks[name] for name in usable})
            with torch.no_grad():
                shared = {name: self._shared(_plain(usable[name])) for name in chosen}
                found = {name: self._form(name)(signal) for name, signal in shared.items()}
                lengths = {name: _length(signal, found[name]) for name, signal in shared.items()}
        return Layers(found, lengths, observation.outputs.detach(), last)

    def _observed(self, x: Any) -> Observation:
        """What the layers did; a batch that shows more of how they are used than the first one did starts anew."""
        known, tracer = self._tracer is not None, self._tracer or self._new_tracer()
        try:
            found = tracer.observe(x)
        except UnsupportedLayer:
            if not known:
                raise
            self._tracer = None  # it knew too little, of a single example say
            tracer, self._forms = self._new_tracer(), {}
            found = tracer.observe(x)
        if self._tracer is None and len(found.outputs) == 1:  # one example cannot tell its axis from one of length 1
            with suppress(Exception):  # a model may take one example at a time (texts, no token for padding)
                pair = self._new_tracer()
                if len(pair.observe(map_examples(x, 1, lambda t: torch.cat([t, t]))).outputs) == 2:
                    tracer, found = pair, pair.observe(x)
        self._tracer, self._blocks = tracer, tracer.blocks
        return found

    def _shared(self, signal: OuterSignals | LookupSignals) -> OuterSignals | LookupSignals:
        return signal if self.sharing is None or isinstance(signal, LookupSignals) else self.sharing(signal)

    def _form(self, name: str) -> Form:
        if name not in self._forms:
            block = self._blocks[name]
            fitted = {known.name: matrix for known, matrix in self.curvature.entries}.get(name)
            if isinstance(fitted, KroneckerBlock) and fitted.inputs.shape[1] == block.shape[2]:
                self._forms[name] = _of_factor(fitted.inputs)
            else:
                self._forms[name] = self._of_posterior(block)
        return self._forms[name]

    def _of_posterior(self, block: Block) -> Form:
        if self._precision is None:
            prior = dict(self.prior) if isinstance(self.prior, Mapping) else self.prior
            self._precision = self.curvature.precision(self.n_data, prior, self.damping)
        own = {known.name: matrix for known, matrix in self._precision.entries}.get(block.name)
        if isinstance(own, Spectral) and own.shape == block.shape:
            return _quadratic(*_spectral_root(own), self.n_data)
        return _dense(self._block_covariance(block, own), self.n_data)

    def _block_covariance(self, block: Block, own: Matrix | None) -> Tensor:
        """``Σ_o Cov(w_o)``, ``(R, I, I)``, from a dense covariance."""
        precision = self._precision
        assert precision is not None
        groups, out, width = block.shape
        if block.size > LARGEST:
            raise IncompatiblePair(
                f"the leverage of layer {block.name!r} ({block.size} parameters) by this structure needs its dense "
                f'covariance (at most {LARGEST}); use structure="kron", or another kind of score'
            )
        if own is not None:
            covariance = torch.linalg.inv(own.dense())
        else:
            places = precision.layout.positions(block).to(precision.entries[0][1].diag().device)
            identity = torch.zeros(precision.size, block.size, device=places.device, dtype=_dtype(precision))
            identity[places, torch.arange(block.size, device=places.device)] = 1
            covariance = precision.solve(identity)[places]
        blocks = covariance.reshape(groups, out, width, groups, out, width)
        return torch.stack([sum(blocks[r, o, :, r, o] for o in range(out)) for r in range(groups)])


def total(leverages: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of the logarithms of leverages ``(N,)``."""
    parts = [value.clamp_min(torch.finfo(value.dtype).tiny).log() for value in leverages.values()]
    return torch.stack(parts).sum(0)


def _dtype(precision: Blockwise) -> torch.dtype:
    return precision.entries[0][1].diag().dtype


def _has_inputs(signal: MatrixSignals | None) -> bool:
    """Whether a block reads inputs (a bias on its own reads none)."""
    if signal is None:
        return False
    plain = _plain(signal)
    return isinstance(plain, LookupSignals) or plain.a.shape[-1] > 0


def _plain(signal: MatrixSignals) -> OuterSignals | LookupSignals:
    """Of a weight that is used as itself and as its transpose, the first."""
    return signal.straight if isinstance(signal, TiedSignals) else signal


def _chosen(layers: str | Sequence[str], last: str, blocks: Mapping[str, Block]) -> list[str]:
    if layers == "last":
        return [last]
    if layers == "all":
        return list(blocks)
    if isinstance(layers, str):
        raise UnknownName("choice of layers", layers, ["last", "all", *blocks])
    found = [
        name
        for name, block in blocks.items()
        if any(fnmatch(known, pattern) for pattern in layers for known in (name, *block.parameters))
    ]
    if not found:
        raise UnknownName("layer", ", ".join(layers), blocks)
    return found


def _of_factor(factor: Tensor) -> Form:
    """``Σ_t aᵀ (A + δ I)⁻¹ a`` for an input factor ``(R, I, I)``, or its diagonal ``(R, I)``."""
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)
    damping = (RIDGE * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(factor.dtype).tiny ** 0.5)  # (R, 1)
    if factor.dim() == 2:
        return _weighted(1.0 / (factor + damping))
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    lower = torch.linalg.cholesky(factor + damping[..., None] * eye)
    root = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).transpose(-1, -2)  # (R, I, I)
    return _quadratic(root, torch.ones_like(factor[:, 0]), 1.0)


def _weighted(weights: Tensor) -> Form:
    """``Σ_t Σ_i w_i a_i²`` for weights ``(R, I)``."""

    def form(signal: OuterSignals | LookupSignals) -> Tensor:
        if isinstance(signal, LookupSignals):
            tokens = signal.tokens.to(weights.device)
            each = weights[0][tokens.clamp_min(0)]
            return torch.where(tokens >= 0, each, torch.zeros_like(each)).sum(1)
        return (_inputs(signal, weights).square() * weights).sum((1, 2, 3))

    return form


def _quadratic(root: Tensor | None, weights: Tensor, factor: float) -> Form:
    """``factor · Σ_t Σ_k w_k (rootᵀ a)_k²`` for a root ``(R, I, K)`` (``None``: the identity), weights ``(R, K)``."""
    if root is None:
        return _weighted(factor * weights)

    def form(signal: OuterSignals | LookupSignals) -> Tensor:
        if isinstance(signal, LookupSignals):
            each = factor * (root[0].square() * weights[0]).sum(1)  # of every token
            return _weighted(each[None])(signal)
        turned = torch.einsum("ntri,rik->ntrk", _inputs(signal, root), root)
        return factor * _counted(turned.square() * weights, signal).sum((1, 2, 3))

    return form


def _dense(matrix: Tensor, factor: float) -> Form:
    """``factor · Σ_t aᵀ M a`` for ``M (R, I, I)``."""

    def form(signal: OuterSignals | LookupSignals) -> Tensor:
        if isinstance(signal, LookupSignals):
            return _weighted(factor * matrix.diagonal(dim1=-2, dim2=-1))(signal)
        a = _inputs(signal, matrix)
        return factor * _counted(torch.einsum("ntri,rij->ntrj", a, matrix) * a, signal).sum((1, 2, 3))

    return form


def _length(signal: OuterSignals | LookupSignals, like: Tensor) -> Tensor:
    """``Σ_t aᵀ a``, ``(N,)``; of a lookup, the number of its tokens."""
    if isinstance(signal, LookupSignals):
        return (signal.tokens >= 0).sum(1).to(like)
    return _inputs(signal, like).square().sum((1, 2, 3))


def _inputs(signal: OuterSignals, like: Tensor) -> Tensor:
    """Inputs ``(N, T, R, I)`` with the constant 1; positions that do not count are zero."""
    a = signal.a.to(like)
    if signal.has_constant:
        a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], -1)
    return _counted(a, signal)


def _counted(values: Tensor, signal: OuterSignals) -> Tensor:
    """Values ``(N, T, R, ...)`` with 0 at positions that do not count."""
    if signal.counted is None:
        return values
    return torch.where(signal.counted.to(values.device)[:, :, None, None], values, torch.zeros_like(values[:1, :1]))


def _spectral_root(matrix: Spectral) -> tuple[Tensor | None, Tensor]:
    """Basis ``(R, I, I)`` and weights ``(R, I)`` with ``Σ_o Cov(w_o) = B diag(w) Bᵀ`` of a precision."""
    dual = matrix.outputs.dual
    lengths = torch.ones_like(matrix.grid[..., 0]) if dual is None else dual.square().sum(-2)  # (R, K)
    return matrix.inputs.dual, (lengths[..., None] / matrix.grid).sum(1)
