"""``J Λ⁻¹ Jᵀ`` of one block from its signals, without the block's Jacobian (performance technique 5).

Inputs and columns are rotated into the precision's bases once: ``ã = B_A⁻¹[a; 1]``, ``g̃ = B_G⁻¹ g``. What is left
depends on (N, λ) through the grid ``S`` alone, so one rotated block serves every precision that shares the bases.
``n`` counts the examples here, ``V`` the columns (network outputs), which come in ``G`` groups of ``W``: covariances
are wanted inside a group only. ``Q = R·O`` counts the outputs of all groups of a weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor

from laplace_kf.operators import Basis, Spectral
from laplace_kf.predictive.precision_family import PrecisionFamily
from laplace_kf.tape import GradientSignals, LookupSignals, OuterSignals, Signals

__all__ = [
    "Form",
    "GradientForm",
    "LookupForm",
    "PositionForm",
    "SingleForm",
    "rotated",
    "rotated_inputs",
    "rotated_rows",
]

WORKING = 2**22  # numbers in the largest temporary (16 MiB in float32: it stays near the caches)
TABLE_FROM = 3  # number of precisions from which products of columns are tabulated


class Form(ABC):
    """The rotated signals of one block; ``n`` examples, ``V`` columns."""

    @abstractmethod
    def blocks(self, family: PrecisionFamily, width: int) -> Tensor:
        """Covariances inside groups of ``W = width`` columns for ``K`` precisions: ``(K, G, n, W, W)``."""

    @abstractmethod
    def joint(self, matrix: Spectral) -> Tensor:
        """The covariance of all examples and columns, ``(n·V, n·V)``, the columns of an example together."""


class SingleForm(Form):
    """A weight used once per example: ``V_ck = Σ_o g̃_co w_o g̃_ko`` with ``w_o = Σ_i ã_i² / S_oi``.

    Args:
        a: rotated inputs ``(n, R, I)``; ``None`` for a vector block, whose input is the constant 1.
        g: rotated columns ``(V, n, R, O)``, or ``(V, 1, R, O)`` if they are the same for every example.
        count: ``n``.
    """

    def __init__(self, a: Tensor | None, g: Tensor, count: int) -> None:
        self.a, self.count = a, count
        self.g = g.flatten(2)  # (V, n or 1, Q)

    def _weights(self, family: PrecisionFamily) -> Tensor:
        """``(n, K, Q)``."""
        if self.a is not None:
            return family.weights(self.a.square())
        flat = torch.stack([family.inverse(k).reshape(-1) for k in range(len(family))])
        return flat.expand(self.count, -1, -1)

    def blocks(self, family: PrecisionFamily, width: int) -> Tensor:
        weights = self._weights(family)
        precisions, groups = len(family), self.g.shape[0] // width
        if self.g.shape[1] == 1:  # the same columns for every example: their products are one small matrix
            table = _pair_products(self.g[:, 0].unflatten(0, (groups, width)))  # (G, pairs, Q)
            found = torch.matmul(weights, table.flatten(0, 1).T).unflatten(2, table.shape[:2])  # (n, K, G, pairs)
            return _from_pairs(found.permute(1, 2, 0, 3), width)
        if width == 1 and 2 * self.g.numel() <= WORKING:  # variances, in one run
            found = torch.matmul(self.g.square().transpose(0, 1), weights.transpose(1, 2))  # (n, G, K)
            return found.permute(2, 1, 0)[..., None, None]
        out = weights.new_empty(precisions, groups, self.count, width, width)
        tabulate = width == 1 or precisions >= TABLE_FROM
        each = groups * (width * (width + 1) // 2 if tabulate else 2 * width)
        # runs of examples whose columns stay in the cache while all precisions pass over them
        for part in _runs(self.count, 4 * self.g.shape[2] * each):
            columns = self.g[:, part].unflatten(0, (groups, width)).permute(0, 2, 1, 3)  # (G, m, W, Q)
            some = weights[part]
            if tabulate:
                found = torch.matmul(_pair_products(columns), some.transpose(1, 2))  # (G, m, pairs, K)
                out[:, :, part] = _from_pairs(found.permute(3, 0, 1, 2), width)
            else:
                for k in range(precisions):
                    out[k][:, part] = torch.matmul(columns * some[:, k, None, :], columns.transpose(-1, -2))
        return out

    def joint(self, matrix: Spectral) -> Tensor:
        columns, n = self.g.shape[0], self.count
        groups, outs, _ = matrix.shape
        if self.a is None:
            rows = self.g.transpose(0, 1).flatten(0, 1)  # (n·V, Q)
            return (rows / matrix.grid.reshape(-1)) @ rows.T
        total = self.g.new_zeros(n, n, columns, columns)  # (n', n, V, V)
        g = self.g.expand(-1, n, -1).reshape(columns, n, groups, outs)
        inverse = matrix.grid.reciprocal()
        for r in range(groups):
            a = self.a[:, r]
            for part in _runs(outs, n * max(n * columns, a.shape[1])):
                kernel = (inverse[r, part][:, None, :] * a) @ a.T  # (o, n, n')
                some = g[:, :, r, part]
                # (n', n·V, o) @ (n', o, V)
                left = kernel.permute(2, 1, 0)[:, :, None, :] * some.transpose(0, 1)
                found = torch.matmul(left.flatten(1, 2), some.permute(1, 2, 0))
                total = total + found.unflatten(1, (n, columns))
        return total.permute(1, 2, 0, 3).reshape(n * columns, n * columns)


class PositionForm(Form):
    """A weight used at ``T`` positions of an example, whose gradients add up: by the cheaper of two ways.

    Products for one example, ``G`` groups of ``W`` columns:

    * *positions*: ``K_ott' = Σ_i ã_ti ã_t'i / S_oi``, then ``g̃ᵀ K g̃``: ``T²/2 · Q·I + G·Q·(W·T² + W²·T)``; none of
      it but the last sum knows the columns;
    * *gradients*: ``Σ_t g̃ ã`` for every column (rotated already), then their weighted Gram matrix:
      ``G·W·T·Q·I + G·W²·Q·I``.

    Args:
        a: rotated inputs ``(n, T, R, I)``.
        g: rotated columns ``(V, n, T, R, O)``.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g

    def by_positions(self, width: int) -> bool:
        """Whether the way over positions takes fewer products."""
        columns, _, positions, _, _ = self.g.shape
        size = self.a.shape[-1]
        pairs = positions**2 / 2 * size + columns * (positions**2 + width * positions)
        return pairs < columns * (positions + width) * size

    def blocks(self, family: PrecisionFamily, width: int) -> Tensor:
        return self._over_positions(family, width) if self.by_positions(width) else self._over_gradients(family, width)

    def _over_positions(self, family: PrecisionFamily, width: int) -> Tensor:
        columns, n, positions, groups, outs = self.g.shape
        first, second, whole = _pairs(positions, self.a.device)
        split = (columns // width, width)
        found = []
        for part in _runs(n, max(len(first) * groups * self.a.shape[-1], groups * positions * (positions + columns))):
            a, g = self.a[part], self.g[:, part]
            products = (a[:, first] * a[:, second]).permute(2, 0, 1, 3)  # (R, m, pairs, I)
            m = a.shape[0]
            sums = [self.g.new_zeros(m, *split, width) for _ in range(len(family))]
            for some in _runs(outs, m * groups * (positions**2 + 2 * columns * positions)):
                seeds = g[..., some].permute(1, 3, 4, 0, 2).flatten(1, 2)  # (m, q, V, T)
                right = seeds.unflatten(2, split).permute(0, 2, 3, 1, 4).flatten(3)  # (m, G, W, q·T)
                for k in range(len(family)):
                    kernel = torch.matmul(
                        products, family.inverse(k)[:, None, some].transpose(-1, -2)
                    )  # (R, m, pairs, o)
                    kernel = kernel.permute(1, 0, 3, 2).flatten(1, 2)[..., whole]  # (m, q, T, T)
                    left = torch.matmul(seeds, kernel).unflatten(2, split).permute(0, 2, 3, 1, 4).flatten(3)
                    sums[k] = sums[k] + torch.matmul(left, right.transpose(-1, -2))
            found.append(torch.stack(sums).transpose(1, 2))  # (K, G, m, W, W)
        return torch.cat(found, 2)

    def _gradients(self, part: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rotated gradients ``(m, V, R, o, I)`` of a run of examples, by runs of outputs."""
        a, g = self.a[part].permute(0, 2, 1, 3), self.g[:, part]  # (m, R, T, I)
        columns, m, _, groups, outs = g.shape
        for some in _runs(outs, m * columns * groups * a.shape[-1]):
            seeds = g[..., some].permute(1, 3, 0, 4, 2).flatten(2, 3)  # (m, R, V·o, T)
            yield some, torch.matmul(seeds, a).unflatten(2, (columns, -1)).transpose(1, 2)

    def _over_gradients(self, family: PrecisionFamily, width: int) -> Tensor:
        columns, n, _, groups, _ = self.g.shape
        found = []
        for part in _runs(n, columns * groups * self.a.shape[-1] * min(64, self.g.shape[-1])):
            m = len(range(n)[part])
            sums = [self.g.new_zeros(m, columns // width, width, width) for _ in range(len(family))]
            for some, gradients in self._gradients(part):
                for k in range(len(family)):
                    rows = (
                        (gradients * family.inverse(k)[:, some].sqrt()).flatten(2).unflatten(1, (-1, width))
                    )  # (m, G, W, entries)
                    sums[k] = sums[k] + torch.matmul(rows, rows.transpose(-1, -2))
            found.append(torch.stack(sums).transpose(1, 2))
        return torch.cat(found, 2)

    def joint(self, matrix: Spectral) -> Tensor:
        columns, n = self.g.shape[:2]
        root = matrix.grid.rsqrt()
        total = self.g.new_zeros(n * columns, n * columns)
        for some, gradients in self._gradients(slice(0, n)):
            rows = (gradients * root[:, some]).flatten(2).flatten(0, 1)
            total = total + rows @ rows.T
        return total


class LookupForm(Form):
    """An embedding whose input basis is the identity: an example's gradient has the rows of its tokens only.

    Args:
        summed: rotated columns added up over equal tokens of one example, ``(V, J, O)``.
        example: the example of each of the ``J`` rows.
        token: its token.
        count: ``n``.
    """

    def __init__(self, summed: Tensor, example: Tensor, token: Tensor, count: int) -> None:
        self.summed, self.example, self.token, self.count = summed, example, token, count

    def blocks(self, family: PrecisionFamily, width: int) -> Tensor:
        groups = self.summed.shape[0] // width
        columns = self.summed.unflatten(0, (groups, width)).transpose(1, 2)  # (G, J, W, O)
        found = []
        for matrix in family.matrices:
            root = matrix.grid[0][:, self.token].T.rsqrt()  # (J, O)
            total = root.new_zeros(groups, self.count, width, width)
            for part in _runs(len(self.token), groups * width * (width + columns.shape[-1])):
                rows = columns[:, part] * root[part][:, None, :]
                total = total.index_add(1, self.example[part], torch.matmul(rows, rows.transpose(-1, -2)))
            found.append(total)
        return torch.stack(found)

    def joint(self, matrix: Spectral) -> Tensor:
        columns, outs = self.summed.shape[0], self.summed.shape[2]
        used, place = torch.unique(self.token, return_inverse=True)
        root = matrix.grid[0][:, used].rsqrt()  # (O, U)
        total = self.summed.new_zeros(self.count * columns, self.count * columns)
        for part in _runs(outs, self.count * columns * max(1, len(used))):
            some = self.summed[..., part]
            rows = some.new_zeros(self.count, len(used), columns, some.shape[-1])
            rows[self.example, place] = some.transpose(0, 1)
            scaled = rows.permute(0, 2, 3, 1) * root[part]  # (n, V, o, U)
            scaled = scaled.flatten(2).flatten(0, 1)
            total = total + scaled @ scaled.T
        return total


class GradientForm(Form):
    """Any other signals, through per-example gradients that are made anew, a run of examples at a time.

    Args:
        signals: of one block.
        inputs: input basis.
        outputs: output basis.
        dtype: type of the results.
    """

    def __init__(self, signals: Signals, inputs: Basis, outputs: Basis, dtype: torch.dtype) -> None:
        self.signals, self.inputs, self.outputs, self.dtype = signals, inputs, outputs, dtype

    def _rows(self, part: slice) -> SingleForm:
        rows = self.signals.gradients(part, self.dtype)
        shape = self.signals.block.shape
        return rotated_rows(rows.reshape(-1, math.prod(shape)), shape, self.inputs, self.outputs, rows.shape[1])

    def blocks(self, family: PrecisionFamily, width: int) -> Tensor:
        columns, count = self.signals.count
        runs = _runs(count, columns * self.signals.block.size)
        return torch.cat([self._rows(part).blocks(family, width) for part in runs], 2)

    def joint(self, matrix: Spectral) -> Tensor:
        return self._rows(slice(0, self.signals.count[1])).joint(matrix)


# ---------------------------------------------------------------------------------------------- signals in a basis


@singledispatch
def rotated(signals: Signals, inputs: Basis, outputs: Basis, like: Tensor) -> Form:
    """The signals in a precision's bases.

    Args:
        signals: of one block; a kind without a rule of its own goes through its per-example gradients.
        inputs: input basis.
        outputs: output basis.
        like: a tensor in the precision's type, of any shape.
    """
    return GradientForm(signals, inputs, outputs, like.dtype)


def rotated_rows(rows: Tensor, shape: tuple[int, int, int], inputs: Basis, outputs: Basis, count: int) -> SingleForm:
    """Per-example gradients ``(V·n, P_b)`` of a block of canonical ``shape (R, O, I)`` in a precision's bases."""
    turned = _apply(outputs.dual, rows.reshape(-1, *shape).transpose(-1, -2).transpose(-2, -3))  # (V·n, I, R, O)
    turned = _apply(inputs.dual, turned.permute(0, 3, 2, 1))  # (V·n, O, R, I)
    return SingleForm(None, turned.transpose(1, 2).reshape(-1, count, rows.shape[1], 1), count)


def rotated_inputs(signals: OuterSignals, inputs: Basis, like: Tensor) -> Tensor:
    """Inputs ``(N, T, R, I)`` with their constant in the input basis, in the type of ``like`` (of any shape)."""
    a = signals.a.to(like.dtype)
    return _affine(inputs.dual, a) if signals.has_constant else _apply(inputs.dual, a)


@rotated.register
def _(signals: OuterSignals, inputs: Basis, outputs: Basis, like: Tensor) -> Form:
    assert signals.example is None and not signals.rotated
    a, g, count = rotated_inputs(signals, inputs, like), signals.g, signals.count[1]
    if a.shape[1] > 1:
        return PositionForm(a, _apply(outputs.dual, g.to(like.dtype)))
    if count > 1 and torch.equal(g[:, 0], g[:, -1]) and torch.equal(g, g[:, :1].expand_as(g)):
        g = g[:, :1]  # a linear output layer: nothing of it has to be done for every example
    return SingleForm(a[:, 0], _apply(outputs.dual, g[:, :, 0].to(like.dtype)), count)


@rotated.register
def _(signals: LookupSignals, inputs: Basis, outputs: Basis, like: Tensor) -> Form:
    turned = LookupSignals(signals.block, signals.tokens, _apply(outputs.dual, signals.g.to(like.dtype)))
    if inputs.dual is None:
        return LookupForm(*turned._per_token(), signals.count[1])
    found = inputs.dual[:, signals.tokens.clamp_min(0)].permute(1, 2, 0, 3)  # rows of the basis: (n, T, R, I)
    return PositionForm(torch.where(signals.tokens[:, :, None, None] >= 0, found, 0.0), turned.g)


@rotated.register
def _(signals: GradientSignals, inputs: Basis, outputs: Basis, like: Tensor) -> Form:
    g = signals.values.to(like.dtype)[:, :, None]  # (V, n, 1, P_b)
    return SingleForm(None, _apply(outputs.dual, g), signals.count[1])


def _apply(dual: Tensor | None, rows: Tensor) -> Tensor:
    """Rows ``(..., R, d)`` times ``dual (R, d, d)``."""
    if dual is None:
        return rows
    if dual.shape[0] == 1:
        # flat, because matmul copies the basis once a row for batches that are not contiguous
        return (rows.flatten(0, -2) @ dual[0]).reshape(rows.shape)
    flat = rows.flatten(0, -3).transpose(0, 1)
    return torch.matmul(flat, dual).transpose(0, 1).reshape(rows.shape)


def _affine(dual: Tensor | None, a: Tensor) -> Tensor:
    """As :func:`_apply` for rows ``[a; 1]``, without making them where there is a basis."""
    if dual is None:
        return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
    width = a.shape[-1]
    if dual.shape[0] == 1:
        return torch.addmm(dual[0, width], a.flatten(0, -2), dual[0, :width]).reshape(*a.shape[:-1], -1)
    flat = a.flatten(0, -3).transpose(0, 1)
    out = torch.baddbmm(dual[:, width:], flat, dual[:, :width])
    return out.transpose(0, 1).reshape(*a.shape[:-1], -1)


# -------------------------------------------------------------------------------------------------------- helpers


def _runs(count: int, each: int) -> Iterator[slice]:
    """Runs of ``count`` things of ``each`` numbers, within the working memory."""
    step = max(1, WORKING // max(1, each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _pairs(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices ``c ≤ k``, each ``(pairs,)``, and where ``(c, k)`` stands among them, ``(W, W)``."""
    first, second = torch.triu_indices(width, width, device=device)
    whole = torch.zeros(width, width, dtype=torch.long, device=device)
    whole[first, second] = whole[second, first] = torch.arange(len(first), device=device)
    return first, second, whole


def _pair_products(columns: Tensor) -> Tensor:
    """``(..., W, Q)`` to ``(..., pairs, Q)``, products of two columns ``c ≤ k``."""
    width = columns.shape[-2]
    if width == 1:
        return columns.square()
    out = columns.new_empty(*columns.shape[:-2], width * (width + 1) // 2, columns.shape[-1])
    start = 0
    for c in range(width):
        torch.mul(columns[..., c:, :], columns[..., c : c + 1, :], out=out[..., start : start + width - c, :])
        start += width - c
    return out


def _from_pairs(found: Tensor, width: int) -> Tensor:
    """``(..., pairs)`` to symmetric ``(..., W, W)``."""
    if width == 1:
        return found[..., None]
    return found[..., _pairs(width, found.device)[2]]
