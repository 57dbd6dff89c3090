"""Signals: what one minibatch says about one block, and the few reductions that every structure is built from.

For a matrix block the signals are inputs ``a (N, T, R, I)`` and back-propagated columns ``g (V, N, T, R, O)``: the
gradient of column ``v`` of example ``n`` is ``Σ_t g ⊗ [a; 1]``. Positions, and several calls of one weight, lie
along ``T``, so that per-example gradients are added before they are squared. The constant 1 of a bias is never
materialised.

Accumulators are float tensors in canonical ``(R, O, I)`` layout; of symmetric ones the lower triangle is filled
(:mod:`laplace_kf.tape.grams`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.tape.blocks import Block
from laplace_kf.tape.grams import add_columns, add_gram, add_sketch, widened

__all__ = [
    "GradientSignals",
    "LookupSignals",
    "OuterSignals",
    "Signals",
]

FEW = 2**14  # numbers that are copied faster than a few more functions are called
FILLED, GATHERED = 100, 150  # products that take as long as a number of a dense gradient, or of a token's direction
CACHED = 2**19  # numbers that a processor's cache holds between two passes over them
WORKING_BYTES = 64 * 2**20  # size of the largest temporary a reduction may build


class Signals(ABC):
    """The reductions over one block's signals; ``V`` columns of ``N`` examples."""

    block: Block

    @property
    @abstractmethod
    def count(self) -> tuple[int, int]:
        """Columns ``V`` and examples (or gathered rows) ``N``."""

    @abstractmethod
    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Per-example gradients ``(V, n, R, O, I)`` of a run of examples."""

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Runs of examples with their gradients ``(V, n, R, O, I)``, lazily, within the working memory."""
        columns, examples = self.count
        per_example = columns * self.block.size * torch.finfo(dtype).bits // 8
        step = max(1, WORKING_BYTES // max(1, per_example))
        for start in range(0, examples, step):
            part = slice(start, min(start + step, examples))
            yield part, self.gradients(part, dtype)

    def add_squares(self, total: Tensor) -> None:
        """Adds ``Σ_vn (per-example gradient)²`` to ``total (R, O, I)``."""
        for _, gradients in self.chunks(total.dtype):
            total += gradients.square().sum((0, 1)).reshape(total.shape).to(total.device)

    @abstractmethod
    def total(self) -> Tensor:
        """The gradients added up over columns and examples, ``(R, O, I)``."""

    @abstractmethod
    def jacobian(self) -> Tensor:
        """Per-example gradients of every column in canonical order, ``(V·N, P_b)``."""

    def add_outer(self, total: Tensor) -> None:
        """Adds ``Σ_vn j jᵀ`` to the lower triangle of ``total (P_b, P_b)``, ``j`` in canonical order."""
        add_gram(total, self.jacobian())

    def add_rotated_squares(self, total: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """Adds ``Σ_vn (B_Gᵀ (per-example gradient) B_A)²`` to ``total (R, O, I)``.

        Args:
            total: the sums.
            inputs: ``B_A (R, I, I)``, or ``None`` for the identity.
            outputs: ``B_G (R, O, O)``, or ``None`` for the identity.
        """
        for _, gradients in self.chunks(total.dtype):
            turned = gradients if inputs is None else torch.matmul(gradients, inputs.to(gradients.device))
            turned = turned if outputs is None else torch.matmul(outputs.to(turned.device).transpose(-1, -2), turned)
            total += turned.square().sum((0, 1)).to(total.device)

    def entries(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The entries at canonical positions ``index (k,)`` of the per-example gradients, ``(V·N, k)``."""
        parts = [gradients.flatten(2)[..., index.to(gradients.device)] for _, gradients in self.chunks(dtype)]
        return torch.cat(parts, 1).flatten(0, 1)

    def project(self, directions: Tensor) -> Tensor:
        """Products of the per-example gradients with ``directions (K, R, O, I)``: ``(V·N, K)``."""
        flat = directions.flatten(1).T
        parts = [gradients.flatten(2).to(flat.device) @ flat for _, gradients in self.chunks(directions.dtype)]
        return torch.cat(parts, 1).flatten(0, 1)

    def add_combined(self, total: Tensor, weights: Tensor) -> None:
        """Adds the per-example gradients times ``weights (V·N, K)`` to ``total (K, R, O, I)``."""
        each = weights.reshape(*self.count, -1)
        for part, gradients in self.chunks(total.dtype):
            mine = each[:, part].flatten(0, 1).T
            total += (mine @ gradients.flatten(2).flatten(0, 1).to(total.device)).reshape(total.shape)


@dataclass
class OuterSignals(Signals):
    """Signals of a matrix block with dense inputs.

    Attributes:
        block: the block they belong to.
        a: inputs ``(N, T, R, I)`` without the constant 1; ``I`` may be 0 for a bias on its own.
        g: columns ``(V, N, T, R, O)``, or ``(1, M, T, R, O)`` for gathered rows.
        example: for gathered rows, the example ``(M,)`` each one belongs to; otherwise ``None``.
        rotated: the inputs are complete as they are, in another basis; no constant 1 belongs to them.
        counted: which positions count, bool ``(N, T)`` (:mod:`laplace_kf.tape.reach`); ``None`` for all. The columns
            of the others are zero.
    """

    block: Block
    a: Tensor
    g: Tensor
    example: Tensor | None = None
    rotated: bool = False
    counted: Tensor | None = None

    @property
    def has_constant(self) -> bool:
        """Whether the constant 1 of a bias is to be appended to the inputs."""
        return self.block.has_bias_column and not self.rotated

    def _inputs(self) -> Tensor:
        return self.a if self.example is None else self.a.index_select(0, self.example)

    def reduced(self) -> OuterSignals:
        """One position per example: the mean input and the summed column (weight sharing "reduce")."""
        if self.a.shape[1] == 1:
            return self
        g = self.g.sum(2, keepdim=True)
        if self.counted is None:
            return OuterSignals(self.block, self.a.mean(1, keepdim=True), g, self.example)
        shares = self.counted.to(self.a.dtype)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        mean = torch.where(self.counted[..., None, None], self.a * shares[..., None, None], 0).sum(1, keepdim=True)
        return OuterSignals(self.block, mean, g, self.example, counted=self.counted.any(1, keepdim=True))

    @property
    def positions(self) -> int:
        """How many positions of all examples count."""
        return int(self.counted.sum()) if self.counted is not None else self.a.shape[0] * self.a.shape[1]

    def input_rows(self, group: int) -> Tensor:
        """Inputs ``(M, I)`` of the positions that count, without the constant 1."""
        rows = self.a[:, :, group]
        return rows.flatten(0, 1) if self.counted is None else rows[self.counted]

    def add_input_gram(self, total: Tensor) -> None:
        """Adds ``Σ_n Σ_t [a;1][a;1]ᵀ`` over the positions that count (methods 4.5: sum in A).

        Args:
            total: lower triangles ``(R, I, I)``, or ``(R, I)`` for the diagonal alone.
        """
        width = self.a.shape[-1]
        for r in range(total.shape[0]):
            rows = self.input_rows(r)
            if total.dim() == 2:
                total[r, :width] += rows.to(total).square().sum(0)
                if self.has_constant:
                    total[r, width] += rows.shape[0]
                continue
            if self.has_constant and rows.numel() <= FEW:  # fewer calls, which is what counts then
                rows = rows.to(total)
                add_gram(total[r], torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1))
                continue
            add_gram(total[r, :width, :width], rows)
            if self.has_constant:
                total[r, width, :width] += rows.sum(0, dtype=total.dtype).to(total.device)
                total[r, width, width] += rows.shape[0]

    def add_column_gram(self, total: Tensor) -> None:
        """Adds ``Σ_vn Σ_t g gᵀ``; divided by the number of positions it is the mean (methods 4.5: mean in G).

        Args:
            total: lower triangles ``(R, O, O)``, or ``(R, O)`` for the diagonal alone.
        """
        for r in range(total.shape[0]):
            add_columns(total[r], self.g[:, :, :, r].reshape(-1, self.g.shape[-1]))

    def add_column_sketch(self, total: Tensor, directions: Tensor) -> None:
        """Adds ``Σ_vn Σ_t g (gᵀ Ω)`` to ``total (R, O, k)`` for ``directions`` ``Ω (O, k)``."""
        for r in range(total.shape[0]):
            add_sketch(total[r], self.g[:, :, :, r].reshape(-1, self.g.shape[-1]), directions)

    def add_squares(self, total: Tensor) -> None:
        width = self.a.shape[-1]
        if self.a.shape[1] == 1:  # (g⊗a)² = g²⊗a²: sum the squares over the columns first, then one product
            squares = self.g[:, :, 0].to(total).square().sum(0)  # (N, R, O)
            a = self._inputs()[:, 0].to(total)
            if total.shape[0] == 1:
                total[0, :, :width].addmm_(squares[:, 0].T, a[:, 0].square())
            else:
                total[:, :, :width] += torch.einsum("nro,nri->roi", squares, a.square())
            if self.has_constant:
                total[:, :, width] += squares.sum(0)
            return
        self._add_squares_over_positions(total)

    def _add_squares_over_positions(self, total: Tensor) -> None:
        """:meth:`add_squares` where gradients have to be added over positions before they are squared.

        All columns of an example share one product with its inputs, which are never repeated for them; a few examples
        at a time, so that what is squared is still in the cache.
        """
        (columns, examples), (groups, outputs, _), width = self.count, self.block.shape, self.a.shape[-1]
        step = max(1, CACHED // max(1, columns * groups * outputs * width))
        for start in range(0, examples, step):
            part = slice(start, start + step)
            a = self.a[part] if self.example is None else self.a[self.example[part]]
            g = self.g[:, part].to(total).permute(1, 3, 0, 4, 2).flatten(2, 3)  # (n, R, V·O, T)
            if width:
                squares = torch.matmul(g, a.to(total).transpose(1, 2)).square_()
                total[:, :, :width] += squares.unflatten(2, (columns, outputs)).sum((0, 2))
            if self.has_constant:
                total[:, :, width] += g.sum(-1).square_().unflatten(2, (columns, outputs)).sum((0, 2))

    @property
    def count(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        a = self.a[part] if self.example is None else self.a[self.example[part]]
        return self._gradients(a.to(dtype), self.g[:, part].to(dtype))

    def _gradients(self, a: Tensor, g: Tensor) -> Tensor:
        # (V, n, R, O, T) @ (n, R, T, I)
        out = torch.matmul(g.permute(0, 1, 3, 4, 2), a.permute(0, 2, 1, 3))
        if self.has_constant:
            out = torch.cat([out, g.sum(2)[..., None]], -1)
        return out

    def total(self) -> Tensor:
        a = widened(self._inputs().flatten(0, 1))  # (N·T, R, I)
        g = widened(self.g.sum(0).flatten(0, 1))
        out = torch.einsum("mro,mri->roi", g, a)
        return torch.cat([out, g.sum(0)[..., None]], -1) if self.has_constant else out

    def jacobian(self) -> Tensor:
        gradients = self._gradients(widened(self._inputs()), widened(self.g))
        return gradients.reshape(-1, self.block.size)

    def add_rotated_squares(self, total: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> None:
        """As the base class, with inputs and columns rotated before they are multiplied."""
        a, g = self.a.to(total), self.g.to(total)
        if inputs is not None:
            a = torch.einsum("ntri,rij->ntrj", a, inputs[:, : a.shape[-1]])
            a = a + inputs[:, -1] if self.has_constant else a
        if outputs is not None:
            g = torch.einsum("vntro,rop->vntrp", g, outputs)
        example = None if self.example is None else self.example.to(total.device)
        OuterSignals(self.block, a, g, example, self.rotated or inputs is not None).add_squares(total)

    def entries(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        _, outs, width = self.block.shape
        index = index.to(self.g.device)
        r, o, i = index // (outs * width), index // width % outs, index % width
        inputs, g = self._inputs().to(dtype), self.g.to(dtype)
        out = g.new_zeros(*self.count, len(index))
        for t in range(g.shape[2]):  # a position at a time: V·N·T·k products would not fit
            a = inputs[:, t]
            if self.has_constant:
                a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
            out += g[:, :, t][..., r, o] * a[:, r, i]
        return out.flatten(0, 1)

    def _runs(self, count: int) -> Iterator[slice]:
        """Runs of ``count`` directions whose images of all rows fit into the working memory."""
        each = 8 * self.count[1] * self.g[0, 0].numel()
        step = max(1, WORKING_BYTES // max(1, each))
        return (slice(start, start + step) for start in range(0, count, step))

    def _gradients_first(self, count: int) -> bool:
        """Whether ``count`` directions take fewer products by per-example gradients than position by position.

        An example's gradients take ``V·T·O·I`` products and then ``V·count·O·I``; its positions take
        ``count·T·O·I``, in which the columns share, and then ``V·count·T·O``.
        """
        columns, positions, width = self.g.shape[0], self.g.shape[2], self.block.shape[2]
        return positions > 1 and columns * (positions + count) * width < count * positions * (width + columns)

    def project(self, directions: Tensor) -> Tensor:
        """As the base class, or, for many columns and few directions, without gradients: position by position."""
        if self._gradients_first(len(directions)):
            return super().project(directions)
        columns, rows = self.count
        a, width = self.a.to(directions), self.a.shape[-1]
        g = self.g.to(directions).transpose(0, 1).flatten(2)  # (N, V, T·R·O)
        parts = []
        for part in self._runs(len(directions)):
            some = directions[part]
            # W a first and then gᵀ(W a): the columns share the expensive product
            moved = torch.einsum("ntri,kroi->nktro", a, some[..., :width])
            if self.has_constant:
                moved = moved + some[:, None, :, :, -1]
            moved = moved if self.example is None else moved.index_select(0, self.example.to(moved.device))
            parts.append(torch.matmul(g, moved.flatten(2).transpose(1, 2)))  # (N, V, k)
        return torch.cat(parts, 2).transpose(0, 1).reshape(columns * rows, -1)

    def add_combined(self, total: Tensor, weights: Tensor) -> None:
        """As the base class; the way is chosen as in :meth:`project`."""
        if self._gradients_first(len(total)):
            super().add_combined(total, weights)
            return
        a, width = self._inputs().to(total), self.a.shape[-1]
        g = self.g.to(total).transpose(0, 1).flatten(2)
        each = weights.reshape(*self.count, -1).permute(1, 2, 0)  # (N, K, V)
        for part in self._runs(len(total)):
            mixed = torch.matmul(each[:, part], g).reshape(g.shape[0], -1, *self.g.shape[2:])
            total[part, ..., :width] += torch.einsum("nktro,ntri->kroi", mixed, a)
            if self.has_constant:
                total[part, ..., -1] += mixed.sum((0, 2))

    def add_outer(self, total: Tensor) -> None:
        """As the base class, through ``Σ_n (Σ_v g gᵀ) ⊗ a aᵀ`` where every weight is used once per example.

        That needs ``O²/2`` input Grams instead of one Gram of ``V·N`` rows of length ``O·I``: ``V`` times fewer
        products (last layer of a classifier: methods 9.2, "full").
        """
        single = self.a.shape[1] == 1 and self.block.shape[0] == 1
        if not single or self.g.shape[0] == 1 or self.block.shape[1] * 4 > self.g.shape[0] * self.block.shape[2]:
            super().add_outer(total)
            return
        a, g = self._inputs()[:, 0, 0].to(total), self.g[:, :, 0, 0].to(total)
        if self.has_constant:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], 1)
        outputs, width = self.block.shape[1], a.shape[1]
        weights = torch.einsum("vno,vnp->opn", g, g)
        for o in range(outputs):
            for p in range(o + 1):
                part = total[o * width : (o + 1) * width, p * width : (p + 1) * width]
                part.addmm_(a.T, a * weights[o, p][:, None])


@dataclass
class LookupSignals(Signals):
    """Signals of an embedding: inputs are tokens ``(N, T)`` (−1: does not count), columns ``g (V, N, T, 1, O)``."""

    block: Block
    tokens: Tensor
    g: Tensor
    example: Tensor | None = None

    @property
    def positions(self) -> int:
        """How many positions of all examples count."""
        return int((self.tokens >= 0).sum())

    def add_input_gram(self, total: Tensor) -> None:
        """Adds how often each token occurs to ``total (1, I)``, the diagonal of the one-hot input factor."""
        tokens = self.tokens[self.tokens >= 0].to(total.device)
        total[0].index_add_(0, tokens, torch.ones_like(tokens, dtype=total.dtype))

    def add_column_gram(self, total: Tensor) -> None:
        """Adds ``Σ_vn Σ_t g gᵀ`` to the lower triangle of ``total (1, O, O)``, or to the diagonal ``(1, O)``."""
        add_columns(total[0], self.g[:, self._tokens() >= 0].reshape(-1, self.g.shape[-1]))

    def add_column_sketch(self, total: Tensor, directions: Tensor) -> None:
        """Adds ``Σ_vn Σ_t g (gᵀ Ω)`` to ``total (1, O, k)`` for ``directions`` ``Ω (O, k)``."""
        add_sketch(total[0], self.g[:, self._tokens() >= 0].reshape(-1, self.g.shape[-1]), directions)

    def add_rotated_squares(self, total: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> None:
        if inputs is not None:
            super().add_rotated_squares(total, inputs, outputs)
            return
        g = self.g if outputs is None else torch.matmul(self.g.to(outputs), outputs)
        LookupSignals(self.block, self.tokens.to(g.device), g, self.example).add_squares(total)

    def entries(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        tokens, g, index = self._tokens(), self.g.to(dtype), index.to(self.g.device)
        o, i = index // self.block.shape[2], index % self.block.shape[2]
        out = g.new_zeros(*self.count, len(index))
        for t in range(tokens.shape[1]):
            out += g[:, :, t, 0][..., o] * (tokens[:, t, None] == i)
        return out.flatten(0, 1)

    def project(self, directions: Tensor) -> Tensor:
        """As the base class for a small vocabulary; otherwise from the rows of the tokens that occur."""
        (columns, _), count, (_, _, vocabulary) = self.count, len(directions), self.block.shape
        if columns * vocabulary * (FILLED + count) < count * self.tokens.shape[1] * (GATHERED + 10 * columns):
            return super().project(directions)
        summed, example, token = self._per_token()
        products = torch.einsum("vjo,koj->vjk", summed.to(directions), directions[:, 0][..., token])
        out = products.new_zeros(*self.count, len(directions))
        return out.index_add_(1, example.to(out.device), products).flatten(0, 1)

    def add_combined(self, total: Tensor, weights: Tensor) -> None:
        summed, example, token = self._per_token()
        each = weights.reshape(*self.count, -1)[:, example]  # (V, J, K)
        total[:, 0].index_add_(2, token.to(total.device), torch.einsum("vjk,vjo->koj", each, summed.to(total)))

    def _tokens(self) -> Tensor:
        return self.tokens if self.example is None else self.tokens[self.example]

    def _per_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients summed over equal tokens of one example: (columns (V, K, O), example (K,), token (K,))."""
        tokens = self._tokens()
        vocabulary = self.block.shape[2]
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        keep = tokens >= 0
        keys, inverse = torch.unique((rows * vocabulary + tokens)[keep], return_inverse=True)
        columns = widened(self.g[:, :, :, 0][:, keep])  # (V, kept positions, O)
        summed = columns.new_zeros(columns.shape[0], keys.shape[0], columns.shape[2])
        summed.index_add_(1, inverse, columns)
        return summed, keys // vocabulary, keys % vocabulary

    def add_squares(self, total: Tensor) -> None:
        summed, _, token = self._per_token()
        squares = summed.to(total).square().sum(0)  # (K, O)
        total[0].index_add_(1, token.to(total.device), squares.T)

    def total(self) -> Tensor:
        summed, _, token = self._per_token()
        out = summed.new_zeros(self.block.shape)
        out[0].index_add_(1, token, summed.sum(0).T)
        return out

    def jacobian(self) -> Tensor:
        summed, row, token = self._per_token()
        columns, _, outputs = summed.shape
        out = summed.new_zeros(columns, self.g.shape[1], outputs, self.block.shape[2])
        index = torch.arange(outputs, device=row.device)
        out[:, row[:, None], index[None, :], token[:, None]] = summed
        return out.reshape(-1, self.block.size)

    @property
    def count(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        example = None if self.example is None else self.example[part]
        tokens = self.tokens[part] if example is None else self.tokens
        own = LookupSignals(self.block, tokens, self.g[:, part].to(dtype), example)
        return own.jacobian().reshape(self.g.shape[0], -1, *self.block.shape)


@dataclass
class GradientSignals(Signals):
    """Signals of a vector block: per-example gradients ``(V, N, P_b)`` themselves."""

    block: Block
    values: Tensor

    def add_squares(self, total: Tensor) -> None:
        total += self.values.to(total).square().sum((0, 1)).reshape(total.shape)

    def total(self) -> Tensor:
        return self.values.sum((0, 1)).reshape(self.block.shape)

    def jacobian(self) -> Tensor:
        return self.values.reshape(-1, self.block.size)

    @property
    def count(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        values = self.values[:, part].to(dtype)
        return values.reshape(*values.shape[:2], *self.block.shape)
