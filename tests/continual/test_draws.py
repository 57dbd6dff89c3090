"""Draws from a sum of kept terms: how exact they are, and what they cost."""

from __future__ import annotations

import pytest
import torch

from laplace_kf.operators import KroneckerBlock, TermSum
from laplace_kf.operators.kept_terms import DRAW_TOLERANCE
from tests.cases import normal
from tests.continual.problems import Products

LAM = 1e-3


@pytest.mark.parametrize(("out", "inp"), [(6, 40), (5, 30)])
def test_a_draw_stops_where_nothing_is_left_of_its_variance(out: int, inp: int) -> None:
    """Fewer products than a solve to working precision, and within the stated error in the norm of Λ."""
    roots = [(normal(1, out, out, seed=k), normal(1, inp, inp, seed=k + 5)) for k in range(3)]
    terms = [KroneckerBlock(a @ a.mT, g @ g.mT, "b") for g, a in roots]
    matrix = TermSum(terms, torch.tensor(LAM, dtype=torch.float64), "b")
    noise = normal(3, matrix.noise_size)
    with Products() as few:
        draws = matrix.colour(noise)
    dense = matrix.dense()
    first, *others = noise.split(matrix.size, 1)
    right = LAM**0.5 * first
    for term, part in zip(terms, others, strict=True):
        (values_g, g), (values_a, a) = torch.linalg.eigh(term.outputs[0]), torch.linalg.eigh(term.inputs[0])
        right = right + part * torch.kron(values_g, values_a).clamp_min(0).sqrt() @ torch.kron(g, a).T
    exact = torch.linalg.solve(dense, right.T).T
    error, size = draws - exact, (exact @ dense * exact).sum(1)
    # the criterion measures the error through the preconditioner, hence the factor
    assert bool(((error @ dense * error).sum(1) <= (3 * DRAW_TOLERANCE) ** 2 * size).all())
    assert float(error.abs().max()) > 0
    with Products() as many:
        matrix.solve(right.T)
    assert len(few.shapes) < 0.7 * len(many.shapes)
