"""Signals: what one minibatch says about one block, and the few reductions that every structure is built from.

For a matrix block the signals are inputs ``a (N, T, R, I)`` and back-propagated columns ``g (V, N, T, R, O)``: the
gradient of column ``v`` of example ``n`` is ``Σ_t g ⊗ [a; 1]``. Positions, and several calls of one weight, lie
along ``T``, so that per-example gradients are added before they are squared. The constant 1 of a bias is never
materialised.

Accumulators are float tensors in canonical ``(R, O, I)`` layout. Symmetric ones are filled on and below the
diagonal only (:func:`add_gram`); :func:`symmetrised` completes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.tape.blocks import Block

__all__ = [
    "GradientSignals",
    "LookupSignals",
    "MatrixSignals",
    "OuterSignals",
    "Signals",
    "TiedSignals",
    "add_gram",
    "symmetrised",
]

LEAF = 128  # columns per strip of a half Gram; smaller strips save more products but feed the BLAS less well
WORKING_BYTES = 64 * 2**20  # size of the largest temporary a reduction may build


def add_gram(total: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    """Adds ``alpha · rowsᵀ rows`` to the lower triangle of ``total`` in place, by strips of columns.

    Args:
        total: ``(d, d)``; entries above the diagonal are left undefined.
        rows: ``(K, d)``, cast to the type of ``total``.
    """
    rows = rows.to(total)  # also from another device
    width = rows.shape[1]
    if width <= LEAF:
        total.addmm_(rows.T, rows, alpha=alpha)
        return
    for start in range(0, width, LEAF):
        stop = min(start + LEAF, width)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=alpha)


def _add_columns(total: Tensor, rows: Tensor, alpha: float) -> None:
    """Adds ``alpha · rowsᵀ rows`` to the lower triangle ``(d, d)``, or its diagonal to ``(d,)``."""
    if total.dim() == 1:
        total += alpha * rows.to(total).square().sum(0)
    else:
        add_gram(total, rows, alpha)


def symmetrised(total: Tensor) -> Tensor:
    """Completes matrices ``(..., d, d)`` filled on and below the diagonal, in place, and returns them."""
    width = total.shape[-1]
    for start in range(0, width, LEAF):
        stop = min(start + LEAF, width)
        total[..., :start, start:stop] = total[..., start:stop, :start].transpose(-1, -2)
        corner = total[..., start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).transpose(-1, -2))
    return total


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
            total += gradients.square().sum((0, 1)).reshape(total.shape)

    @abstractmethod
    def total(self) -> Tensor:
        """The gradients added up over columns and examples, ``(R, O, I)``."""

    @abstractmethod
    def jacobian(self) -> Tensor:
        """Per-example gradients of every column in canonical order, ``(V·N, P_b)``."""

    def add_outer(self, total: Tensor) -> None:
        """Adds ``Σ_vn j jᵀ`` to the lower triangle of ``total (P_b, P_b)``, ``j`` in canonical order."""
        add_gram(total, self.jacobian())


@dataclass
class OuterSignals(Signals):
    """Signals of a matrix block with dense inputs.

    Attributes:
        block: the block they belong to.
        a: inputs ``(N, T, R, I)`` without the constant 1; ``I`` may be 0 for a bias on its own.
        g: columns ``(V, N, T, R, O)``, or ``(1, M, T, R, O)`` for gathered rows.
        example: for gathered rows, the example ``(M,)`` each one belongs to; otherwise ``None``.
    """

    block: Block
    a: Tensor
    g: Tensor
    example: Tensor | None = None

    def _inputs(self) -> Tensor:
        return self.a if self.example is None else self.a.index_select(0, self.example)

    def reduced(self) -> OuterSignals:
        """One position per example: the mean input and the summed column (weight sharing "reduce")."""
        if self.a.shape[1] == 1:
            return self
        return OuterSignals(self.block, self.a.mean(1, keepdim=True), self.g.sum(2, keepdim=True), self.example)

    def add_input_gram(self, total: Tensor) -> None:
        """Adds ``Σ_n Σ_t [a;1][a;1]ᵀ`` (methods 4.5: sum in A).

        Args:
            total: lower triangles ``(R, I, I)``, or ``(R, I)`` for the diagonal alone.
        """
        width = self.a.shape[-1]
        for r in range(total.shape[0]):
            rows = self.a[:, :, r].flatten(0, 1)
            if total.dim() == 2:
                total[r, :width] += rows.to(total).square().sum(0)
                if self.block.has_bias_column:
                    total[r, width] += rows.shape[0]
                continue
            add_gram(total[r, :width, :width], rows)
            if self.block.has_bias_column:
                total[r, width, :width] += rows.sum(0, dtype=total.dtype).to(total.device)
                total[r, width, width] += rows.shape[0]

    def add_column_gram(self, total: Tensor) -> None:
        """Adds ``Σ_vn mean_t g gᵀ`` (methods 4.5: mean in G).

        Args:
            total: lower triangles ``(R, O, O)``, or ``(R, O)`` for the diagonal alone.
        """
        positions = max(1, self.g.shape[2])  # a call may have met no row at all
        for r in range(total.shape[0]):
            _add_columns(total[r], self.g[:, :, :, r].reshape(-1, self.g.shape[-1]), 1.0 / positions)

    def add_squares(self, total: Tensor) -> None:
        width = self.a.shape[-1]
        if self.a.shape[1] == 1:  # (g⊗a)² = g²⊗a²: sum the squares over the columns first, then one product
            squares = self.g[:, :, 0].square().sum(0, dtype=total.dtype)  # (N, R, O)
            a = self._inputs()[:, 0].to(total.dtype)
            if total.shape[0] == 1:
                total[0, :, :width].addmm_(squares[:, 0].T, a[:, 0].square())
            else:
                total[:, :, :width] += torch.einsum("nro,nri->roi", squares, a.square())
            if self.block.has_bias_column:
                total[:, :, width] += squares.sum(0)
            return
        super().add_squares(total)

    @property
    def count(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        a = self.a[part] if self.example is None else self.a[self.example[part]]
        return self._gradients(a.to(dtype), self.g[:, part].to(dtype))

    def _gradients(self, a: Tensor, g: Tensor) -> Tensor:
        # (V, n, R, O, T) @ (n, R, T, I)
        out = torch.matmul(g.permute(0, 1, 3, 4, 2), a.permute(0, 2, 1, 3))
        if self.block.has_bias_column:
            out = torch.cat([out, g.sum(2)[..., None]], -1)
        return out

    def total(self) -> Tensor:
        a = self._inputs().flatten(0, 1)  # (N·T, R, I)
        g = self.g.sum(0).flatten(0, 1)
        out = torch.einsum("mro,mri->roi", g, a)
        return torch.cat([out, g.sum(0)[..., None]], -1) if self.block.has_bias_column else out

    def jacobian(self) -> Tensor:
        gradients = self._gradients(self._inputs(), self.g)
        return gradients.reshape(-1, self.block.size)

    def add_outer(self, total: Tensor) -> None:
        """As the base class, through ``Σ_n (Σ_v g gᵀ) ⊗ a aᵀ`` where every weight is used once per example.

        That needs ``O²/2`` input Grams instead of one Gram of ``V·N`` rows of length ``O·I``: ``V`` times fewer
        products (last layer of a classifier: methods 9.2, "full").
        """
        single = self.a.shape[1] == 1 and self.block.shape[0] == 1
        if not single or self.g.shape[0] == 1 or self.block.shape[1] * 4 > self.g.shape[0] * self.block.shape[2]:
            super().add_outer(total)
            return
        a, g = self._inputs()[:, 0, 0].to(total.dtype), self.g[:, :, 0, 0].to(total.dtype)
        if self.block.has_bias_column:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], 1)
        outputs, width = self.block.shape[1], a.shape[1]
        weights = torch.einsum("vno,vnp->opn", g, g)
        for o in range(outputs):
            for p in range(o + 1):
                part = total[o * width : (o + 1) * width, p * width : (p + 1) * width]
                part.addmm_(a.T, a * weights[o, p][:, None])


@dataclass
class LookupSignals(Signals):
    """Signals of an embedding: inputs are tokens ``(N, T)`` (−1: none), columns ``g (V, N, T, 1, O)``."""

    block: Block
    tokens: Tensor
    g: Tensor
    example: Tensor | None = None

    def add_input_gram(self, total: Tensor) -> None:
        """Adds how often each token occurs to ``total (1, I)``, the diagonal of the one-hot input factor."""
        tokens = self.tokens[self.tokens >= 0].to(total.device)
        total[0].index_add_(0, tokens, torch.ones_like(tokens, dtype=total.dtype))

    def add_column_gram(self, total: Tensor) -> None:
        """Adds ``Σ_vn mean_t g gᵀ`` to the lower triangle of ``total (1, O, O)``, or to the diagonal ``(1, O)``."""
        _add_columns(total[0], self.g.reshape(-1, self.g.shape[-1]), 1.0 / max(1, self.g.shape[2]))

    def _tokens(self) -> Tensor:
        return self.tokens if self.example is None else self.tokens[self.example]

    def _per_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients summed over equal tokens of one example: (columns (V, K, O), example (K,), token (K,))."""
        tokens = self._tokens()
        vocabulary = self.block.shape[2]
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        keep = tokens >= 0
        keys, inverse = torch.unique((rows * vocabulary + tokens)[keep], return_inverse=True)
        columns = self.g[:, :, :, 0][:, keep]  # (V, kept positions, O)
        summed = columns.new_zeros(columns.shape[0], keys.shape[0], columns.shape[2])
        summed.index_add_(1, inverse, columns)
        return summed, keys // vocabulary, keys % vocabulary

    def add_squares(self, total: Tensor) -> None:
        summed, _, token = self._per_token()
        squares = summed.square().sum(0, dtype=total.dtype)  # (K, O)
        total[0].index_add_(1, token, squares.T)

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
        total += self.values.to(total.dtype).square().sum((0, 1)).reshape(total.shape)

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


@dataclass
class TiedSignals(Signals):
    """Signals of a weight that is used as itself and as its transpose (a tied embedding and output matrix).

    Attributes:
        straight: signals of the uses as ``W``, in canonical order.
        turned: signals of the uses as ``Wᵀ``, whose own canonical order is ``(1, I, O)``.
    """

    block: Block
    straight: OuterSignals
    turned: OuterSignals | LookupSignals

    @property
    def count(self) -> tuple[int, int]:
        return self.straight.count

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        return self.straight.gradients(part, dtype) + self.turned.gradients(part, dtype).transpose(-1, -2)

    def jacobian(self) -> Tensor:
        return self.gradients(slice(None), self.straight.g.dtype).reshape(-1, self.block.size)

    def total(self) -> Tensor:
        return self.straight.total() + self.turned.total().transpose(-1, -2)


MatrixSignals = OuterSignals | LookupSignals | TiedSignals
