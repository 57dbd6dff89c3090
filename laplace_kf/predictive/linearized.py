"""The network linearised at the posterior mean: outputs ``N(f(x), J Λ⁻¹ Jᵀ)`` without ever forming ``J``.

One forward pass on the tape, identity seeds at the outputs, and every block's covariance from its inputs and columns
(:mod:`laplace_kf.predictive.quadratic`). Work goes by runs of examples and of outputs, so that no tensor of examples ×
outputs × parameters exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, called, map_examples, run, tensors_of, to_device
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.forecast import Forecast
from laplace_kf.likelihoods import Likelihood, to_positions
from laplace_kf.models import evaluating, parameters_of, preserved
from laplace_kf.operators import Blockwise, Spectral
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.outputs.derivatives import require_twice
from laplace_kf.outputs.layout import from_positions
from laplace_kf.outputs.spread import Spread
from laplace_kf.predictive.covariance_shares import Piece, joint_of, like_of, shares_of
from laplace_kf.predictive.heads import MANY, head_spreads, linear_head
from laplace_kf.predictive.suffix import Suffix, cut
from laplace_kf.substitution import substituted
from laplace_kf.tape import Observation, Tracer

__all__ = ["Linearization", "Stand"]

SMALL = 16  # examples up to which the whole minibatch is one run
FEW = 2**12  # numbers of more examples up to which the first pass is on the tape all the same
EXAMPLES = 256  # examples of one run: enough rows for the matrix products, few enough for the caches
COLUMN_BYTES = 128 * 2**20  # back-propagated columns of one run
RESULT_BYTES = 4 * 2**30  # a larger covariance is refused


class Stand:
    """A ``forward=`` that puts weights into the model for the call, unless somebody has put others there already.

    Args:
        model: the module.
        forward: the user's, or ``None``.
        weights: by parameter name, each of its parameter's shape.
    """

    def __init__(self, model: nn.Module, forward: Forward | None, weights: Mapping[str, Tensor]) -> None:
        self.own = dict(model.named_parameters())
        self.forward, self.weights = forward, weights

    @property
    def plain(self) -> bool:
        """Whether all it does is to run the model on its inputs with the weights in it."""
        return self.forward is None

    def __call__(self, model: nn.Module, inputs: Any) -> tuple[Tensor, None]:
        now = dict(model.named_parameters())
        replaced = {name: value for name, value in self.weights.items() if now[name] is self.own[name]}

        def call() -> Tensor:
            return called(model, inputs, self.forward)

        return substituted(model, replaced, call), None


@dataclass(frozen=True)
class _Wanted:
    """Which outputs' covariances: ``order (C',)`` of the flattened outputs, in groups of ``width``."""

    order: Tensor
    width: int


class Linearization:
    """The network around the posterior mean at some inputs.

    Args:
        model: the module; never changed.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        mean: posterior mean by parameter name, each of its parameter's shape; the model's own values may differ.
        x: inputs as the model takes them, ``N`` examples.
        keep: keep the signals and their rotated forms, so that further precisions cost a fraction of the first. For
            10 outputs of 784-1024-1024-10 that is 0.2 MB an input.
        announce: warn where variances are going to take long (:mod:`laplace_kf.forecast`).

    Attributes:
        outputs: outputs at the mean, ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.

    Raises:
        ShapeMismatch: if the model's parameters do not have the mean's names and shapes, or ``x`` does not fit it.
        NonFinite: if the outputs are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        mean: Mapping[str, Tensor],
        x: Any,
        *,
        keep: bool = True,
        announce: bool = False,
    ) -> None:
        parameters_of(model, list(mean), [tuple(value.shape) for value in mean.values()], "the posterior")
        x = to_device(x, next(iter(mean.values())).device)
        model, forward, self.x = cut(model, forward, mean, x)
        if isinstance(model, Suffix) and not model.divisible:  # some ways need single examples
            model, forward, self.x = model.origin
        self.model, self.keep, self.announce = model, keep, announce
        inputs = (t for t in tensors_of(self.x) if t.requires_grad)
        self.differentiable = torch.is_grad_enabled() and any(True for _ in inputs)
        self.head = linear_head(model, mean, self.x)
        self._first: Observation | None = None
        # nothing writes into the weights of a linear map
        own = {
            name: value.detach() if self.head is not None else value.detach().clone() for name, value in mean.items()
        }
        self._leaves = {name: value.requires_grad_() for name, value in own.items()}
        self.forward = Stand(model, forward, self._leaves)
        self.tracer = Tracer(model, self.forward, weights=self._leaves)
        if self.head is not None:
            self.outputs = self.head.outputs
        else:
            with self._standing(model):
                self.outputs = self._first_outputs()
        if self.outputs.dim() < 2:
            raise ShapeMismatch(
                f"the model's outputs must be (N, C), (N, T, C) or (N, C, H, W), got {tuple(self.outputs.shape)}; one "
                "example is a batch of one, x[None]"
            )
        if not torch.isfinite(self.outputs).all():
            raise NonFinite("the outputs at the posterior mean have NaN or infinite entries; check inputs and weights")
        self._pieces: dict[bytes, list[Piece]] = {}

    def _standing(self, model: nn.Module) -> AbstractContextManager[None]:
        """In eval mode, and left as it was afterwards."""
        return evaluating(model) if self.forward.plain else preserved(model)

    def _first_outputs(self) -> Tensor:
        """Outputs at the mean; where the inputs are few enough to be one run, of the pass on the tape."""
        tensors = [t for t in tensors_of(self.x) if t.dim()]
        few = max((t.shape[0] for t in tensors), default=FEW) <= SMALL or sum(t.numel() for t in tensors) <= FEW
        if few and not self.differentiable:
            try:
                self._first = self.tracer.observe(self.x)
                return self._first.outputs.detach()
            except (LaplaceKFError, RuntimeError, ValueError, TypeError, IndexError):  # whoever asks for it is told
                self.tracer = Tracer(self.model, self.forward, weights=self._leaves)
        with torch.set_grad_enabled(self.differentiable):
            return self._run(self.x)

    def _whole(self) -> Observation:
        """The pass over all inputs on the tape."""
        found, self._first = self._first, None  # its graph takes memory: for whoever asks first
        return self.tracer.observe(self.x) if found is None else found

    def _run(self, x: Any) -> Tensor:
        return run(self.model, x, self.forward)[0]

    # -- what is asked for -------------------------------------------------------------------------------------------

    @property
    def _flat(self) -> int:
        """``C'``, all outputs of an example."""
        return math.prod(self.outputs.shape[1:])

    def covariance(self, precision: Blockwise, joint: bool = False) -> Tensor:
        """``J Λ⁻¹ Jᵀ`` over all ``C'`` outputs of an example (``T·C`` for sequences, in the outputs' own order).

        Args:
            precision: Λ over the mean's parameters.
            joint: the covariance of different inputs too.

        Returns:
            ``(N, C', C')``, or ``(N·C', N·C')``.

        Raises:
            IncompatiblePair: if the result would be larger than 4 GiB; says what to ask for instead.
            NotPositiveDefinite: if the precision is singular.
        """
        if joint:
            return self._joint(precision)
        return self.covariances([precision])[0]

    def covariances(self, precisions: Sequence[Blockwise]) -> Tensor:
        """:meth:`covariance` for ``K`` precisions at once, ``(K, N, C', C')``; much cheaper than one by one."""
        spreads = self.spreads(precisions) if self._flat == self.outputs.shape[1] else None
        if spreads is not None:
            return torch.stack([spread.covariance()[:, 0] for spread in spreads])
        order = torch.arange(self._flat)
        return self._grouped(precisions, _Wanted(order, self._flat))[:, 0]

    def variances(self, precisions: Sequence[Blockwise]) -> Tensor:
        """Variances of all outputs for ``K`` precisions, ``(K, *outputs.shape)``."""
        spreads = self.spreads(precisions)
        if spreads is not None:
            return torch.stack([from_positions(spread.variance(), self.outputs.shape) for spread in spreads])
        found = self._grouped(precisions, _Wanted(torch.arange(self._flat), 1))[..., 0, 0]  # (K, C', N)
        return found.transpose(1, 2).reshape(len(precisions), *self.outputs.shape)

    def variance(self, precision: Blockwise) -> Tensor:
        """Variances of all outputs in the layout of :attr:`outputs`, such as ``(N, C)``."""
        return self.variances([precision])[0]

    def position_covariances(
        self, precisions: Sequence[Blockwise], to_positions: Callable[[Tensor], Tensor] = to_positions
    ) -> Tensor:
        """Covariances of the outputs of one position (sequence step, pixel), ``(K, N, T, C, C)``.

        Args:
            precisions: K of them.
            to_positions: the likelihood's reading of outputs as ``(N, T, C)``.
        """
        index = torch.arange(self._flat).reshape(1, *self.outputs.shape[1:])
        index = to_positions(index)[0]  # (T, C)
        return self._grouped(precisions, _Wanted(index.reshape(-1), index.shape[1])).transpose(1, 2)

    def spreads(
        self, precisions: Sequence[Blockwise], to_positions: Callable[[Tensor], Tensor] = to_positions
    ) -> Sequence[Spread] | None:
        """Covariances of the outputs of a position by what they are made of, one for each of ``K`` precisions.

        Args:
            precisions: K of them.
            to_positions: the likelihood's reading of outputs as ``(N, T, C)``.

        Returns:
            ``None`` for few outputs (unless it costs nothing), where the inputs' gradients are wanted, and where there
            is no such form.
        """
        if self.differentiable or not self.outputs.numel():
            return None
        few = to_positions(torch.empty(self.outputs.shape, device="meta")).shape[-1] < MANY
        if few and (self.head is None or len(precisions) > 1):
            return None
        self._check_positive(precisions)
        if self.head is not None:
            return self.head.spreads(precisions, to_positions)
        with self._standing(self.model), torch.no_grad():
            return head_spreads(self._whole(), precisions, to_positions)

    def moments(
        self, precisions: Sequence[Blockwise], likelihood: Likelihood, *, marginal: bool
    ) -> tuple[Tensor, list[Tensor | Spread]]:
        """What a likelihood's link needs of the outputs for each of ``K`` precisions.

        Args:
            precisions: K of them.
            likelihood: its reading of outputs as ``(N, T, C)``.
            marginal: whether the variances suffice.

        Returns:
            Variances ``(K, *outputs.shape)``; and unless these suffice, covariances of the outputs of a position
            ``(N, T, C, C)``, of many outputs what they are made of.
        """
        many: list[Tensor | Spread] = []
        spreads = self.spreads(precisions, likelihood.to_positions)
        if spreads is not None:
            variances = [spread.variance() for spread in spreads]
            if not marginal:
                many = [spread if spread.shape[-1] >= MANY else spread.covariance() for spread in spreads]
        elif marginal:
            return self.variances(precisions), many
        else:
            dense = self.position_covariances(precisions, likelihood.to_positions)  # (K, N, T, C, C)
            many, variances = list(dense), list(dense.diagonal(dim1=-2, dim2=-1))
        return torch.stack([likelihood.from_positions(each, self.outputs) for each in variances]), many

    # -- how it is found ---------------------------------------------------------------------------------------------

    def _grouped(self, precisions: Sequence[Blockwise], wanted: _Wanted) -> Tensor:
        """``(K, G, N, W, W)``."""
        count, width = self.outputs.shape[0], wanted.width
        like = like_of(precisions[0])
        shape = (len(precisions), len(wanted.order) // width, count, width, width)
        self._check_size(shape, like)
        self._check_positive(precisions)
        if self.differentiable:
            rows = self._jacobian(precisions[0])[:, wanted.order.to(like.device)].unflatten(1, (-1, width))
            return torch.stack([self._between(rows, precision) for precision in precisions]).transpose(1, 2)
        out = torch.zeros(shape, dtype=like.dtype, device=like.device)
        shares = shares_of(precisions)

        def consume(piece: Piece) -> None:
            groups = slice(piece.columns.start // width, piece.columns.stop // width)
            for share in shares:
                found = share.covariance(piece, width)
                if found is not None:
                    out[share.members, groups, piece.examples] += found

        if count:
            self._each(wanted, consume)
        return out

    def _joint(self, precision: Blockwise) -> Tensor:
        size = self.outputs.numel()
        like = like_of(precision)
        self._check_size((size, size), like)
        self._check_positive([precision])
        if not size:
            return torch.zeros(0, 0, dtype=like.dtype, device=like.device)
        if self.differentiable:
            return self._between(self._jacobian(precision).flatten(0, 1)[None, None], precision)[0, 0]
        with self._standing(self.model), torch.no_grad():
            observation = self._whole()
            piece = self._piece(observation, slice(0, observation.count), torch.arange(self._flat))
        return joint_of(piece, precision)

    def _jacobian(self, precision: Blockwise) -> Tensor:
        """``J (N, C', P)`` with a graph to the inputs, one backward pass a row."""
        like, flat = like_of(precision), self.outputs.flatten(1)
        require_twice([self.outputs], list(self._leaves.values()))
        rows = []
        for output in flat.reshape(-1):
            found = torch.autograd.grad(output, list(self._leaves.values()), create_graph=True, allow_unused=True)
            parts = {
                name: (torch.zeros_like(leaf) if part is None else part).to(like.dtype)[None]
                for (name, leaf), part in zip(self._leaves.items(), found, strict=True)
            }
            rows.append(precision.layout.join(parts)[0])
        return torch.stack(rows).reshape(*flat.shape, -1)

    @staticmethod
    def _between(rows: Tensor, precision: Blockwise) -> Tensor:
        """``rows Λ⁻¹ rowsᵀ`` of ``(N, G, W, P)``, as ``(N, G, W, W)``."""
        solved = precision.solve(rows.flatten(0, 2).T).T.reshape(rows.shape)
        return torch.matmul(rows, solved.transpose(-1, -2))

    def _check_size(self, shape: Sequence[int], like: Tensor) -> None:
        needed = torch.Size(shape).numel() * like.element_size()
        if needed > RESULT_BYTES:
            raise IncompatiblePair(
                f"the covariance of outputs {tuple(self.outputs.shape)} needs {needed / 2**30:.1f} GiB; ask for the "
                'variances alone (functional_covariance(x, diagonal_only=True), predict(x, method="probit")), or for '
                "fewer inputs at a time"
            )

    @staticmethod
    def _check_positive(precisions: Sequence[Blockwise]) -> None:
        for precision in precisions:
            for _, matrix in precision.entries:
                if isinstance(matrix, Spectral):
                    matrix.require_positive()

    def _each(self, wanted: _Wanted, consume: Callable[[Piece], None]) -> None:
        """Hands out pieces that together cover all examples and columns; a kept one is made once."""
        key = wanted.order.numpy().tobytes()
        kept = self._pieces.get(key)
        if kept is not None and all((p.columns.stop - p.columns.start) % wanted.width == 0 for p in kept):
            for piece in kept:
                consume(piece)
            return
        made: list[Piece] = []
        forecast = Forecast(self.outputs.shape[0], len(wanted.order)) if self.announce else None
        differentiable = torch.is_grad_enabled()

        def hand_out(piece: Piece) -> None:
            if self.keep:
                made.append(piece)
            with torch.set_grad_enabled(differentiable):
                consume(piece)
            if forecast is not None:
                rows, columns = piece.examples, piece.columns
                forecast.done((rows.stop - rows.start) * (columns.stop - columns.start))

        with self._standing(self.model), torch.no_grad():
            self._walk(wanted, hand_out)
        if self.keep:
            self._pieces[key] = made

    def _walk(self, wanted: _Wanted, hand_out: Callable[[Piece], None]) -> None:
        count = self.outputs.shape[0]
        sliceable = count > max(2, SMALL) and any(t.dim() and t.shape[0] == count for t in tensors_of(self.x))
        examples, columns = count, len(wanted.order)
        if sliceable and self._first is not None:
            examples, columns = _run_sizes(max(1, self._first.column_bytes() // count), wanted, count)
        elif sliceable:
            probe = self._observe(slice(0, 2))
            if probe is not None:
                examples, columns = _run_sizes(max(1, probe.column_bytes() // 2), wanted, count)
        for start in range(0, count, examples):
            part = slice(start, min(start + examples, count))
            observation = self._observe(part)
            if observation is None:  # only the whole minibatch gives these outputs
                if start:
                    raise ShapeMismatch(
                        "the model's outputs for some of the examples alone differ from those for all of them, so "
                        "per-example covariances are not defined; use running statistics, or fewer inputs at a time"
                    )
                self._split(self._whole(), slice(0, count), wanted, None, hand_out)
                return
            self._split(observation, part, wanted, columns if sliceable else None, hand_out)

    def _split(
        self,
        observation: Observation,
        part: slice,
        wanted: _Wanted,
        columns: int | None,
        hand_out: Callable[[Piece], None],
    ) -> None:
        """All columns of one forward pass, by runs."""
        if columns is None:
            each = observation.column_bytes() * wanted.width
            columns = max(1, COLUMN_BYTES // max(1, each)) * wanted.width
        for start in range(0, len(wanted.order), columns):
            stop = min(start + columns, len(wanted.order))
            piece = self._piece(observation, part, wanted.order[start:stop])
            piece.columns = slice(start, stop)
            hand_out(piece)

    def _observe(self, part: slice) -> Observation | None:
        """A run of the examples on the tape; ``None`` if its outputs are not those of the whole."""
        count = self.outputs.shape[0]
        whole = part.start == 0 and part.stop == count
        if whole and self._first is not None:
            return self._whole()
        try:
            observation = self._whole() if whole else self.tracer.observe(self._some(part))
        except (RuntimeError, ValueError, IndexError, UnsupportedLayer):  # it cannot be cut (a mask as long as it)
            if whole:
                raise
            return None
        return observation if same_outputs(observation.outputs.detach(), self.outputs[part]) else None

    def _some(self, part: slice) -> Any:
        return map_examples(self.x, self.outputs.shape[0], lambda t: t[part])

    def _piece(self, observation: Observation, examples: slice, order: Tensor) -> Piece:
        """The signals of some columns of the identity over an example's flattened outputs."""
        rest = observation.outputs.shape[1:]
        seeds = torch.zeros(len(order), self._flat, dtype=observation.outputs.dtype, device=observation.outputs.device)
        seeds[torch.arange(len(order)), order] = 1
        columns = seeds.reshape(len(order), 1, *rest).expand(-1, observation.count, *rest)
        return Piece(examples, slice(0, len(order)), observation.signals(columns), self.tracer.blocks, self.outputs)


def _run_sizes(each: int, wanted: _Wanted, count: int) -> tuple[int, int]:
    """Examples and columns of one run, for ``each`` bytes per column and example."""
    total = len(wanted.order)
    examples = COLUMN_BYTES // max(1, each * total)
    if examples >= min(count, 16):  # all columns at once: every example's inputs are rotated once
        return min(count, EXAMPLES, examples), total
    examples = max(1, min(count, 16, COLUMN_BYTES // max(1, each * wanted.width)))
    columns = max(1, COLUMN_BYTES // max(1, each * wanted.width * examples)) * wanted.width
    return examples, min(total, columns)
