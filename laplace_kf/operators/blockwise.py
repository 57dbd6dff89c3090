"""A block-diagonal matrix over whole parameters, in flat order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.operators.base import Isotropic, Matrix, fresh_generator, standard_normal
from laplace_kf.operators.curvature import CurvatureBlock
from laplace_kf.operators.spectral import Spectral
from laplace_kf.tape.blocks import Block, FlatLayout, merged

__all__ = ["Blockwise"]


class Blockwise(Matrix):
    """One matrix per block (canonical order) read as one matrix on flat vectors.

    Args:
        layout: the flat order; every parameter belongs to exactly one block.
        entries: blocks with their matrices.
    """

    def __init__(self, layout: FlatLayout, entries: Sequence[tuple[Block, Matrix]]) -> None:
        self.layout = layout
        self.entries = tuple(entries)
        self.label = ", ".join(block.name for block, _ in self.entries)

    @property
    def size(self) -> int:
        return self.layout.size

    def _each(self, v: Tensor, operation: Callable[[Matrix, Tensor], Tensor]) -> Tensor:
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        parts = self.layout.split(columns.T)
        found = []
        for block, matrix in self.entries:
            packed = block.pack(parts).reshape(columns.shape[1], -1)
            result = operation(matrix, packed.T.to(matrix.device)).T.to(v.device)
            found.append(block.unpack(result.reshape(-1, *block.shape)))
        return self.layout.join(merged(found)).T.reshape(v.shape)

    def matvec(self, v: Tensor) -> Tensor:
        return self._each(v, lambda matrix, part: matrix.matvec(part))

    def solve(self, v: Tensor) -> Tensor:
        return self._each(v, lambda matrix, part: matrix.solve(part))

    def logdet(self) -> Tensor:
        return _added([matrix.logdet() for _, matrix in self.entries])

    def energy(self, v: Tensor) -> Tensor:
        """``vᵀ Λ v`` for one vector ``(P,)``, 0-dim."""
        parts = self.layout.split(self._checked(v)[None])
        terms = []
        for block, matrix in self.entries:
            part = block.pack(parts).reshape(-1).to(matrix.device)
            terms.append(matrix.energy(part) if isinstance(matrix, Spectral) else part @ matrix.matvec(part))
        return _added(terms)

    def diag(self) -> Tensor:
        found = [block.unpack(matrix.diag().reshape(1, *block.shape)) for block, matrix in self.entries]
        return self._joined(merged(found)).reshape(-1)

    def _joined(self, parts: dict[str, Tensor]) -> Tensor:
        device = parts[self.layout.names[0]].device
        return self.layout.join({name: part.to(device) for name, part in parts.items()})

    def dense(self) -> Tensor:
        parts = [(self.layout.positions(block), matrix.dense()) for block, matrix in self.entries]
        out = parts[0][1].new_zeros(self.size, self.size)
        for positions, part in parts:
            index = positions.to(out.device)
            out[index[:, None], index[None, :]] = part.to(out.device)
        return out

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self._joined(self.draw(n, generator))

    def draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``n`` draws from ``N(0, Λ⁻¹)`` as parameter-shaped tensors ``(n, *shape)`` by name.

        Entries that are constants (:attr:`FlatLayout.held`) do not move; they are independent of all others.
        """
        generator = generator if generator is not None else fresh_generator()
        return self.layout.hold(
            merged(block.unpack(matrix.sample(n, generator).reshape(n, *block.shape)) for block, matrix in self.entries)
        )

    def draws(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """One draw for every seed, as parameter-shaped tensors ``(K, *shape)`` by name.

        A draw is that of :meth:`draw` with a generator of its seed (up to rounding), whatever others are made with it.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parts = []
        for block, matrix in self.entries:
            like = matrix.diag()
            here = like.new_empty(0, device="cpu")  # numbers of a seed are the same on every device; they move together
            noise = torch.cat([standard_normal((1, matrix.noise_size), here, one) for one in generators])
            parts.append(block.unpack(matrix.colour(noise.to(like.device)).reshape(-1, *block.shape)))
        return self.layout.hold(merged(parts))

    def scaled(self, factor: float | Tensor) -> Blockwise:
        return Blockwise(self.layout, [(block, matrix.scaled(factor)) for block, matrix in self.entries])

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic):
            return self._zip([Isotropic(matrix.size, other.value) for _, matrix in self.entries])
        if isinstance(other, Blockwise) and self.layout == other.layout:
            mine, theirs = [b for b, _ in self.entries], {b.name: (b, m) for b, m in other.entries}
            if all(theirs.get(block.name, (None,))[0] == block for block in mine) and len(mine) == len(theirs):
                return self._zip([theirs[block.name][1] for block in mine])
        return super().plus(other)

    def _zip(self, others: Sequence[Matrix]) -> Blockwise:
        pairs = zip(self.entries, others, strict=True)
        return Blockwise(self.layout, [(block, matrix.plus(more)) for (block, matrix), more in pairs])

    def precision(
        self, n: float | Tensor, prior: Tensor | dict[str, Tensor], damping: str, many: bool = False
    ) -> Blockwise:
        """``n · C̄ + prior`` block by block.

        Args:
            n: data count ``N``.
            prior: λ as a 0-dim tensor, or one 0-dim tensor for every parameter name.
            damping: how Kronecker blocks are damped.
            many: whether there will be many of them, in bases that they share.
        """
        if many:
            return self._shifted(prior, lambda matrix, own: matrix.one_of_many(n, own, damping))
        return self._shifted(prior, lambda matrix, own: matrix.precision(n, own, damping))

    def products(self, n: float | Tensor, prior: Tensor | dict[str, Tensor], damping: str) -> Blockwise:
        """The matrix of :meth:`precision`, in the form that is cheapest to multiply ``(P,)`` with: undecomposed."""
        return self._shifted(prior, lambda matrix, own: matrix.products(n, own, damping))

    def _shifted(
        self, prior: Tensor | dict[str, Tensor], make: Callable[[CurvatureBlock, Tensor], Matrix]
    ) -> Blockwise:
        entries: list[tuple[Block, Matrix]] = []
        for block, matrix in self.entries:
            if not isinstance(matrix, CurvatureBlock):
                raise ShapeMismatch(
                    f"block {block.name!r} is a {type(matrix).__name__}, not a curvature block; only those can be "
                    "taken apart"
                )
            entries.append((block, make(matrix, prior_of(block, prior).to(matrix.device))))
        return Blockwise(self.layout, entries)


def _added(terms: Sequence[Tensor]) -> Tensor:
    """0-dim terms added up on the device of the first."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def prior_of(block: Block, prior: Tensor | dict[str, Tensor]) -> Tensor:
    """A block's prior: 0-dim if all its parameters share one value, else one value an entry, ``(R, O, I)``."""
    if isinstance(prior, Tensor):
        return prior
    values = [prior[name] for name in block.parameters]
    if all(value is values[0] or _same_number(value, values[0]) for value in values):
        return values[0]
    spread = {
        name: value.reshape((1,) * (len(shape) + 1)).expand(1, *shape)
        for name, value, shape in zip(block.parameters, values, block.shapes, strict=True)
    }
    return block.pack(spread)[0]


def _same_number(one: Tensor, other: Tensor) -> bool:
    """Whether two 0-dim tensors can stand for each other: two variables of a derivative cannot."""
    return not (one.requires_grad or other.requires_grad) and bool(one == other)
