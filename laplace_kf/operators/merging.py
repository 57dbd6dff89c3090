"""A bounded number of kept terms: where there are too many, the two that lose least by it become one (methods 11.2).

Two Kronecker products become the nearest single one in Frobenius norm; two terms of which one or both are known in
eigenbases the diagonal in the eigenbases of both together. What is lost by a pair is the Frobenius norm of the
difference, so that the pair is chosen for the sum of all terms, not for itself: small terms go first, and like ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators.curvature import CurvatureBlock, DiagonalBlock
from laplace_kf.operators.eigenbasis import SpectralBlock
from laplace_kf.operators.kept_terms import diagonalised, in_common_bases
from laplace_kf.operators.kronecker import KroneckerBlock
from laplace_kf.operators.nearest import nearest_product, pair_errors, relative_error
from laplace_kf.operators.spectral import Basis, Spectral

__all__ = ["merged_to", "overlap"]

MERGED = (KroneckerBlock, SpectralBlock, DiagonalBlock)


def merged_to(terms: Sequence[CurvatureBlock], most: int, label: str) -> tuple[list[CurvatureBlock], float]:
    """The terms as at most ``most``, in their order, and the Frobenius norm of the difference over that of their sum.

    As long as there are more, the pair that loses least becomes one term in the place of its elder; the error is that
    of all such steps together.

    Args:
        terms: of one shape; Kronecker, diagonal or known in eigenbases.
        most: 1 or more.
        label: name of the block, for messages.

    Raises:
        IncompatiblePair: for terms of another kind, if there are too many.
    """
    held = list(terms)
    if len(held) <= most:
        return held, 0.0
    other = [term for term in held if not isinstance(term, MERGED)]
    if other:
        raise IncompatiblePair(
            f"block {label!r} has {len(held)} terms, of which {len(other)} ({other[0].kind}) cannot become one with "
            f"another kind, and max_terms={most}; leave max_terms out"
        )
    while len(held) > most:
        first, second, both = _nearest(held, label)
        held[first] = both
        del held[second]
    return held, _relative_error(terms, held)


def overlap(one: SpectralBlock | Spectral, other: SpectralBlock | Spectral) -> float:
    """``tr(one · other)`` of two blocks in their own eigenbases."""

    def rotation(mine: Basis, theirs: Basis) -> Tensor | None:
        if mine.matrix is None:
            return theirs.matrix
        return mine.matrix.mT if theirs.matrix is None else torch.matmul(mine.matrix.mT, theirs.matrix)

    grid = other.grid.double()
    out, inp = rotation(one.outputs, other.outputs), rotation(one.inputs, other.inputs)
    if out is not None:
        grid = torch.matmul(out.double().square(), grid)
    if inp is not None:
        grid = torch.matmul(grid, inp.double().square().mT)
    return float((one.grid.double() * grid).sum())


def _nearest(terms: Sequence[CurvatureBlock], label: str) -> tuple[int, int, CurvatureBlock]:
    """The places of the two that lose least, and what they become."""
    pairs = list(combinations(range(len(terms)), 2))
    products = [term for term in terms if isinstance(term, KroneckerBlock)]
    if len(products) == len(terms):
        lost = pair_errors(products)
        first, second = min(pairs, key=lambda pair: float(lost[pair]))
        return first, second, nearest_product([products[first], products[second]])
    found = {pair: _both([terms[k] for k in pair], label) for pair in pairs}
    first, second = min(pairs, key=lambda pair: _norm([terms[k] for k in pair], [found[pair]]))
    return first, second, found[first, second]


def _both(pair: Sequence[CurvatureBlock], label: str) -> CurvatureBlock:
    products = [term for term in pair if isinstance(term, KroneckerBlock)]
    return nearest_product(products) if len(products) == len(pair) else in_common_bases(pair, label)


def _relative_error(terms: Sequence[CurvatureBlock], held: Sequence[CurvatureBlock]) -> float:
    exact, kept = ([t for t in some if isinstance(t, KroneckerBlock)] for some in (terms, held))
    if len(exact) == len(terms):
        return relative_error(exact, kept)
    whole = _norm(terms, [])
    changed = [t for t in terms if all(t is not k for k in held)], [k for k in held if all(k is not t for t in terms)]
    return _norm(*changed) / whole if whole > 0 else 0.0


def _norm(plus: Sequence[CurvatureBlock], minus: Sequence[CurvatureBlock]) -> float:
    """``‖Σ plus − Σ minus‖`` in Frobenius norm, from the overlaps."""
    signed = [(1.0, diagonalised(term)) for term in plus] + [(-1.0, diagonalised(term)) for term in minus]
    return max(sum(s * t * overlap(one, other) for s, one in signed for t, other in signed), 0.0) ** 0.5
