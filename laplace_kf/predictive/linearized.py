"""The network linearised at the posterior mean: outputs ``N(f(x), J Λ⁻¹ Jᵀ)`` without ever forming ``J``.

One forward pass on the tape, identity seeds at the outputs, and every block's covariance from its inputs and columns
(:mod:`laplace_kf.predictive.quadratic`). Work goes by runs of examples and of outputs, so that no tensor of examples ×
outputs × parameters exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, as_tensor, map_examples, model_outputs, run, tensors_of, to_device
from laplace_kf.engine import preserved
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch
from laplace_kf.likelihoods import to_positions
from laplace_kf.linalg import cholesky
from laplace_kf.operators import Basis, Blockwise, Isotropic, Matrix, Spectral
from laplace_kf.predictive.quadratic import Form, rotated, rotated_rows
from laplace_kf.predictive.ratios import Family
from laplace_kf.tape import Block, GradientSignals, LookupSignals, Observation, OuterSignals, Signals, Tracer

__all__ = ["Linearization"]

SMALL = 16  # examples up to which the whole minibatch is one run
EXAMPLES = 256  # examples of one run: enough rows for the matrix products, few enough for the caches
COLUMN_BYTES = 128 * 2**20  # back-propagated columns of one run
ROW_NUMBERS = 2**23  # per-example gradients, in numbers, where a precision leaves no other way
RESULT_BYTES = 4 * 2**30  # a larger covariance is refused


@runtime_checkable
class LowRank(Protocol):
    """A matrix ``U diag(values) Uᵀ + diag(prior)`` over a block, in the block's order.

    Attributes:
        vectors: ``U (P, k)``.
        values: ``(k,)``, not negative.
        prior: 0-dim or ``(P,)``, positive.
    """

    vectors: Tensor
    values: Tensor
    prior: Tensor


class _Stand:
    """A ``forward=`` that puts weights into the model for the call, unless somebody has put others there already."""

    def __init__(self, model: nn.Module, forward: Forward | None, weights: Mapping[str, Tensor]) -> None:
        self.own = dict(model.named_parameters())
        self.forward, self.weights = forward, weights

    def __call__(self, model: nn.Module, inputs: Any) -> tuple[Tensor, None]:
        now = dict(model.named_parameters())
        replaced = {f"model.{name}": value for name, value in self.weights.items() if now[name] is self.own[name]}
        return torch.func.functional_call(_Caller(model, self.forward), replaced, (inputs,)), None


class _Caller(nn.Module):
    """Makes ``forward(model, inputs)`` callable through ``functional_call`` (which wants a module)."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Tensor:
        if self._forward is not None:
            return as_tensor(self._forward(self.model, inputs)[0])
        return model_outputs(self.model, inputs)


@dataclass(frozen=True)
class _Wanted:
    """Which outputs' covariances: ``order (C',)`` of the flattened outputs, in groups of ``width``."""

    order: Tensor
    width: int


class _Piece:
    """Signals of a run of examples and a run of columns, and their forms by basis."""

    def __init__(
        self, examples: slice, columns: slice, signals: dict[str, Signals], tracer: Tracer, outputs: Tensor
    ) -> None:
        self.examples, self.columns, self.signals, self.tracer = examples, columns, signals, tracer
        self.outputs = outputs
        self.count = examples.stop - examples.start
        self.width = columns.stop - columns.start
        self._forms: dict[tuple[Any, ...], tuple[Basis, Basis, Form]] = {}

    def form(self, name: str, matrix: Spectral) -> Form:
        """The block's signals in the matrix's bases, made once."""
        key = (name, id(matrix.inputs.dual), id(matrix.outputs.dual), matrix.like.dtype)
        if key not in self._forms:
            with torch.no_grad():
                form = rotated(self.signals[name], matrix.inputs, matrix.outputs, self.count, matrix.like)
            self._forms[key] = (matrix.inputs, matrix.outputs, form)  # keeps what the ids stand for alive
        return self._forms[key][2]

    def own(self, block: Block) -> bool:
        """Whether the block is one of the signals' (and not made of parts of several)."""
        return self.tracer.blocks.get(block.name) == block

    def rows(self, block: Block, part: slice) -> Tensor:
        """Per-example gradients ``(V·m, P_b)`` of a run of the examples, in the block's order."""
        found: dict[str, Tensor] = {}
        for name, signal in self.signals.items():
            mine = self.tracer.blocks[name]
            if set(mine.parameters) & set(block.parameters):
                rows = _examples(signal, part, self.count).jacobian()
                found.update(mine.unpack(rows.reshape(-1, *mine.shape)))
        count = self.width * len(range(self.count)[part])
        for name, shape in zip(block.parameters, block.shapes, strict=True):
            if name not in found:
                found[name] = self.outputs.new_zeros(count, *shape)
        return block.pack(found).reshape(count, -1)


class Linearization:
    """The network around the posterior mean at some inputs.

    Args:
        model: the module; never changed.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        mean: posterior mean by parameter name, each of its parameter's shape; the model's own values may differ.
        x: inputs as the model takes them, ``N`` examples.
        keep: keep the signals and their rotated forms, so that further precisions cost a fraction of the first. For
            10 outputs of 784-1024-1024-10 that is 0.2 MB an input.

    Attributes:
        outputs: outputs at the mean, ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.

    Raises:
        ShapeMismatch: if the model's parameters do not have the mean's names and shapes, or ``x`` does not fit it.
        NonFinite: if the outputs are not finite.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any, *, keep: bool = True
    ) -> None:
        self.model, self.keep = model, keep
        named = dict(model.named_parameters())
        for name, value in mean.items():
            found = tuple(named[name].shape) if name in named else None
            if found != tuple(value.shape):
                raise ShapeMismatch(
                    f"the posterior has parameter {name!r} of shape {tuple(value.shape)}, the model has {found}"
                )
        self.x = to_device(x, next(iter(mean.values())).device)
        with preserved(model):
            leaves = {name: value.detach().clone().requires_grad_() for name, value in mean.items()}
            self.forward = _Stand(model, forward, leaves)
            self.tracer = Tracer(model, self.forward, weights=leaves)
            with torch.no_grad():
                self.outputs = self._run(self.x)
        if self.outputs.dim() < 2:
            raise ShapeMismatch(
                f"the model's outputs must be (N, C), (N, T, C) or (N, C, H, W), got {tuple(self.outputs.shape)}"
            )
        if not torch.isfinite(self.outputs).all():
            raise NonFinite("the outputs at the posterior mean have NaN or infinite entries; check inputs and weights")
        self._pieces: dict[bytes, list[_Piece]] = {}

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
        order = torch.arange(self._flat)
        return self._grouped(precisions, _Wanted(order, self._flat))[:, 0]

    def variances(self, precisions: Sequence[Blockwise]) -> Tensor:
        """Variances of all outputs for ``K`` precisions, ``(K, *outputs.shape)``."""
        found = self._grouped(precisions, _Wanted(torch.arange(self._flat), 1))[..., 0, 0]  # (K, C', N)
        return found.transpose(1, 2).reshape(len(precisions), *self.outputs.shape)

    def variance(self, precision: Blockwise) -> Tensor:
        """Variances of all outputs in the layout of :attr:`outputs`, such as ``(N, C)``."""
        return self.variances([precision])[0]

    def position_covariances(self, precisions: Sequence[Blockwise]) -> Tensor:
        """Covariances of the outputs of one position (sequence step, pixel), ``(K, N, T, C, C)``."""
        index = torch.arange(self._flat).reshape(1, *self.outputs.shape[1:])
        index = to_positions(index)[0]  # (T, C)
        return self._grouped(precisions, _Wanted(index.reshape(-1), index.shape[1])).transpose(1, 2)

    # -- how it is found ---------------------------------------------------------------------------------------------

    def _grouped(self, precisions: Sequence[Blockwise], wanted: _Wanted) -> Tensor:
        """``(K, G, N, W, W)``."""
        count, width = self.outputs.shape[0], wanted.width
        like = _like(precisions[0])
        shape = (len(precisions), len(wanted.order) // width, count, width, width)
        self._check_size(shape, like)
        self._check_positive(precisions)
        out = torch.zeros(shape, dtype=like.dtype, device=like.device)
        shares = _shares(precisions)

        def consume(piece: _Piece) -> None:
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
        like = _like(precision)
        self._check_size((size, size), like)
        self._check_positive([precision])
        if not size:
            return torch.zeros(0, 0, dtype=like.dtype, device=like.device)
        with preserved(self.model), torch.no_grad():
            observation = self.tracer.observe(self.x)
            piece = self._piece(observation, slice(0, observation.count), torch.arange(self._flat))
        return _joint(piece, precision)

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

    def _each(self, wanted: _Wanted, consume: Callable[[_Piece], None]) -> None:
        """Hands out pieces that together cover all examples and columns; a kept one is made once."""
        key = wanted.order.numpy().tobytes()
        kept = self._pieces.get(key)
        if kept is not None and all((p.columns.stop - p.columns.start) % wanted.width == 0 for p in kept):
            for piece in kept:
                consume(piece)
            return
        made: list[_Piece] = []
        differentiable = torch.is_grad_enabled()

        def hand_out(piece: _Piece) -> None:
            if self.keep:
                made.append(piece)
            with torch.set_grad_enabled(differentiable):
                consume(piece)

        with preserved(self.model), torch.no_grad():
            self._walk(wanted, hand_out)
        if self.keep:
            self._pieces[key] = made

    def _walk(self, wanted: _Wanted, hand_out: Callable[[_Piece], None]) -> None:
        count = self.outputs.shape[0]
        sliceable = count > max(2, SMALL) and any(t.dim() and t.shape[0] == count for t in tensors_of(self.x))
        examples, columns = count, len(wanted.order)
        if sliceable:
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
                self._split(self.tracer.observe(self.x), slice(0, count), wanted, None, hand_out)
                return
            self._split(observation, part, wanted, columns if sliceable else None, hand_out)

    def _split(
        self,
        observation: Observation,
        part: slice,
        wanted: _Wanted,
        columns: int | None,
        hand_out: Callable[[_Piece], None],
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
        x = self.x if whole else map_examples(self.x, count, lambda t: t[part])
        observation = self.tracer.observe(x)
        found, expected = observation.outputs.detach(), self.outputs[part]
        if found.shape != expected.shape:
            return None
        gap = (found - expected).abs().max()
        return observation if bool(gap <= 10 * torch.finfo(found.dtype).eps ** 0.5 * expected.abs().max()) else None

    def _piece(self, observation: Observation, examples: slice, order: Tensor) -> _Piece:
        """The signals of some columns of the identity over an example's flattened outputs."""
        rest = observation.outputs.shape[1:]
        seeds = torch.zeros(len(order), self._flat, dtype=observation.outputs.dtype, device=observation.outputs.device)
        seeds[torch.arange(len(order)), order] = 1
        columns = seeds.reshape(len(order), 1, *rest).expand(-1, observation.count, *rest)
        return _Piece(examples, slice(0, len(order)), observation.signals(columns), self.tracer, self.outputs)


def _run_sizes(each: int, wanted: _Wanted, count: int) -> tuple[int, int]:
    """Examples and columns of one run, for ``each`` bytes per column and example."""
    total = len(wanted.order)
    examples = COLUMN_BYTES // max(1, each * total)
    if examples >= min(count, 16):  # all columns at once: every example's inputs are rotated once
        return min(count, EXAMPLES, examples), total
    examples = max(1, min(count, 16, COLUMN_BYTES // max(1, each * wanted.width)))
    columns = max(1, COLUMN_BYTES // max(1, each * wanted.width * examples)) * wanted.width
    return examples, min(total, columns)


def _like(precision: Blockwise) -> Tensor:
    """A tensor in the type and on the device of a precision."""
    return _like_matrix(precision.entries[0][1])


def _like_matrix(matrix: Matrix) -> Tensor:
    return matrix.like if isinstance(matrix, Spectral) else matrix.diag()[:0]


# ------------------------------------------------------------------------------------------- from pieces to numbers


@dataclass
class _Share:
    """What one block adds to the covariances of some of the precisions, all of whose matrices go together.

    Attributes:
        block: the block.
        members: which precisions, a slice where all of them.
        matrices: theirs.
        family: the matrices, if they are spectral and share a basis.
    """

    block: Block
    members: list[int] | slice
    matrices: list[Matrix]
    family: Family | None

    def covariance(self, piece: _Piece, width: int) -> Tensor | None:
        """``(K, G, m, W, W)``; ``None`` if these outputs do not depend on the block."""
        if self.family is not None:
            if piece.own(self.block):
                if self.block.name not in piece.signals:
                    return None
                return piece.form(self.block.name, self.family.matrices[0]).blocks(self.family, width)
            first = self.family.matrices[0]
            if first.inputs.dual is None and first.outputs.dual is None:
                parts = [_diagonal(piece, self.block, matrix.diag(), width) for matrix in self.family.matrices]
                found = [part for part in parts if part is not None]
                return torch.cat(found) if found else None
            return _by_rows(piece, self.block, self.family, width)
        (matrix,) = self.matrices
        if isinstance(matrix, LowRank):
            return _low_rank(piece, self.block, matrix, width)
        return _by_rows(piece, self.block, _solver(matrix), width)


def _shares(precisions: Sequence[Blockwise]) -> list[_Share]:
    """The blocks of the precisions, those together that share a basis."""
    found: list[_Share] = []
    grouped: dict[tuple[Any, ...], tuple[Block, list[int], list[Matrix]]] = {}
    for k, precision in enumerate(precisions):
        for block, given in precision.entries:
            matrix = _simplest(given, block)
            spectral = isinstance(matrix, Spectral)
            basis = (id(matrix.inputs.dual), id(matrix.outputs.dual)) if isinstance(matrix, Spectral) else (k,)
            _, members, matrices = grouped.setdefault((block, spectral, basis), (block, [], []))
            members.append(k)
            matrices.append(matrix)
    for block, members, matrices in grouped.values():
        spectral_ones = [matrix for matrix in matrices if isinstance(matrix, Spectral)]
        family = Family(spectral_ones) if spectral_ones else None
        all_of_them = len(members) == len(precisions)
        found.append(_Share(block, slice(None) if all_of_them else members, matrices, family))
    return found


def _simplest(matrix: Matrix, block: Block) -> Matrix:
    """A multiple of the identity as a diagonal."""
    if isinstance(matrix, Isotropic):
        return Spectral(Basis.identity(), Basis.identity(), matrix.value.expand(block.shape), matrix.label)
    return matrix


def _diagonal(piece: _Piece, block: Block, values: Tensor, width: int) -> Tensor | None:
    """``J diag(values)⁻¹ Jᵀ`` for a diagonal over several blocks, ``(1, G, m, W, W)``."""
    parts = block.unpack(values.reshape(1, *block.shape))
    found: list[Tensor] = []
    for name in piece.signals:
        mine = piece.tracer.blocks[name]
        if all(p in parts for p in mine.parameters):
            grid = mine.pack(parts)[0]
            matrix = Spectral(Basis.identity(), Basis.identity(), grid, block.name)
            found.append(piece.form(name, matrix).blocks(Family([matrix]), width))
    return torch.stack(found).sum(0) if found else None


def _low_rank(piece: _Piece, block: Block, matrix: LowRank, width: int) -> Tensor | None:
    """``D⁻¹ − D⁻¹ B (I + Bᵀ D⁻¹ B)⁻¹ Bᵀ D⁻¹`` between the columns, ``B = vectors √values``: no Jacobian either.

    Returns:
        ``(1, G, m, W, W)``.
    """
    total = _diagonal(piece, block, matrix.prior.expand(len(matrix.vectors)), width)
    if total is None:
        return None
    rows = _inner(piece, block, matrix).unflatten(0, (-1, width)).transpose(1, 2)  # (G, m, W, k)
    return total - torch.matmul(rows, rows.transpose(-1, -2))[None]


def _inner(piece: _Piece, block: Block, matrix: LowRank) -> Tensor:
    """``J D⁻¹ B L⁻ᵀ`` with ``L Lᵀ = I + Bᵀ D⁻¹ B``, ``(V, m, k)``."""
    scaled = matrix.vectors * matrix.values.sqrt()
    solved = scaled / matrix.prior.expand(len(scaled))[:, None]
    inner = torch.eye(scaled.shape[1], dtype=scaled.dtype, device=scaled.device) + scaled.T @ solved
    parts = block.unpack(solved.T.reshape(-1, *block.shape))
    products = solved.new_zeros(piece.width * piece.count, scaled.shape[1])
    for name, signal in piece.signals.items():
        mine = piece.tracer.blocks[name]
        if all(p in parts for p in mine.parameters):
            products = products + signal.project(mine.pack(parts))
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), products.T, upper=False).T
    return rows.reshape(piece.width, piece.count, -1)


Solver = Callable[[Tensor], Tensor]


def _by_rows(piece: _Piece, block: Block, rule: Family | Solver, width: int) -> Tensor | None:
    """Through per-example gradients, a run of examples at a time, ``(K, G, m, W, W)``."""
    step = max(1, ROW_NUMBERS // max(1, piece.width * block.size))
    found = []
    for start in range(0, piece.count, step):
        part = slice(start, min(start + step, piece.count))
        rows, count = piece.rows(block, part), part.stop - start
        if isinstance(rule, Family):
            first = rule.matrices[0]
            form = rotated_rows(rows.to(first.like.dtype), block.shape, first.inputs, first.outputs, count)
            found.append(form.blocks(rule, width))
            continue
        shape = (piece.width // width, width, count, -1)
        solved = rule(rows)
        right = solved.reshape(shape).permute(0, 2, 3, 1)
        found.append(torch.matmul(rows.to(solved.dtype).reshape(shape).transpose(1, 2), right)[None])
    return torch.cat(found, 2)


def _solver(matrix: Matrix) -> Solver:
    """``rows (K, P_b)`` to ``rows matrix⁻¹``; a matrix without a solve of its own is factorised once."""
    if type(matrix).solve is not Matrix.solve:
        like = _like_matrix(matrix)
        return lambda rows: matrix.solve(rows.to(like.dtype).T).T
    factor = cholesky(matrix.dense(), matrix.label)
    return lambda rows: torch.cholesky_solve(rows.to(factor.dtype).T, factor).T


def _joint(piece: _Piece, precision: Blockwise) -> Tensor:
    """``(N·C', N·C')`` over all blocks."""
    like = _like(precision)
    size = piece.width * piece.count
    total = like.new_zeros(size, size)
    for block, given in precision.entries:
        matrix = _simplest(given, block)
        if isinstance(matrix, Spectral) and piece.own(block):
            if block.name in piece.signals:
                total = total + piece.form(block.name, matrix).joint(matrix)
            continue
        rows = piece.rows(block, slice(0, piece.count)).to(like.dtype)
        total = total + _by_example(rows, piece) @ _by_example(_solver(matrix)(rows), piece).T
    return total


def _by_example(rows: Tensor, piece: _Piece) -> Tensor:
    """Rows ``(V·n, P_b)`` with the columns of an example together."""
    return rows.reshape(piece.width, piece.count, -1).transpose(0, 1).flatten(0, 1)


def _examples(signal: Signals, part: slice, count: int) -> Signals:
    """The signals of a run of examples."""
    if part.start == 0 and part.stop == count:
        return signal
    if isinstance(signal, OuterSignals):
        return replace(signal, a=signal.a[part], g=signal.g[:, part])
    if isinstance(signal, LookupSignals):
        return replace(signal, tokens=signal.tokens[part], g=signal.g[:, part])
    if isinstance(signal, GradientSignals):
        return replace(signal, gradients=signal.gradients[:, part])
    whole = signal.jacobian().unflatten(0, (-1, count))[:, part]
    return GradientSignals(signal.block, whole)
