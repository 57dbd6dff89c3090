"""Output factors that are low rank plus diagonal: the fit from sums, and every operation against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, NotPositiveDefinite
from laplace_kf.likelihoods import get_likelihood
from laplace_kf.operators import (
    DAMPINGS,
    Isotropic,
    KroneckerBlock,
    Matrix,
    Poles,
    WideBlock,
    WideFactor,
    WideSpectral,
    directions,
    sketch_width,
    wide_factor,
)
from laplace_kf.outputs.wide_spread import WideSpread

WIDTH = 60


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax_factor(seed: int, width: int = WIDTH) -> Tensor:
    """``E[diag(p) − p pᵀ]``: what stands beside its diagonal is negative, and it is singular."""
    logits = torch.randn(200, 3, generator=rng(seed), dtype=torch.float64) @ torch.randn(
        3, width, generator=rng(seed + 1), dtype=torch.float64
    )
    p = torch.softmax(logits, 1)
    return torch.diag(p.mean(0)) - p.T @ p / len(p)


def common_factor(seed: int, rank: int = 3, width: int = WIDTH) -> Tensor:
    """Low rank plus diagonal."""
    root = torch.randn(width, rank, generator=rng(seed), dtype=torch.float64)
    return root @ root.T + torch.diag(1 + 5 * torch.rand(width, generator=rng(seed + 1), dtype=torch.float64))


def fitted(matrix: Tensor, rank: int) -> WideFactor:
    sketch = matrix @ directions(matrix, len(matrix), sketch_width(rank))
    return wide_factor(matrix.diagonal()[None], sketch[None], rank)


def relative(matrix: Tensor, near: Tensor) -> float:
    return float((matrix - near).norm() / matrix.norm())


@pytest.mark.parametrize("make", [softmax_factor, common_factor])
def test_low_rank_factors_are_found(make: object) -> None:
    matrix = make(0)  # type: ignore[operator]
    alone = relative(matrix, torch.diag(matrix.diagonal()))
    factor = fitted(matrix, 8)
    near = factor.dense()[0]
    assert relative(matrix, near) < alone / 5
    torch.testing.assert_close(near.diagonal(), matrix.diagonal())  # exact, whatever the low rank is
    torch.testing.assert_close(factor.diagonal()[0], matrix.diagonal())
    assert float(torch.linalg.eigvalsh(near)[0]) > -1e-12
    assert factor.largest() >= float(torch.linalg.eigvalsh(near)[-1])
    # what it says of its errors is near them: eight directions
    assert 0.5 * relative(matrix, near) < factor.error < 2 * relative(matrix, near)
    assert 0.5 * alone < factor.of_diagonal < 2 * alone


def test_the_low_rank_stands_for_what_is_beside_the_diagonal_and_so_has_both_signs() -> None:
    """The leading eigenvectors of the factor itself are worse than its diagonal alone."""
    matrix = softmax_factor(3)
    values, vectors = torch.linalg.eigh(matrix)
    low = (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].T
    naive = low - torch.diag(low.diagonal()) + torch.diag(matrix.diagonal())
    factor = fitted(matrix, 8)
    assert relative(matrix, factor.dense()[0]) < relative(matrix, naive) / 2
    assert bool((factor.values < 0).any())


def test_the_sums_are_additive() -> None:
    """Two halves of the data, added up, are the factor of all."""
    one, two = softmax_factor(5), common_factor(6)
    omega = directions(one, WIDTH, sketch_width(4))
    whole = wide_factor((one + two).diagonal()[None], ((one + two) @ omega)[None], 4)
    added = wide_factor((one.diagonal() + two.diagonal())[None], (one @ omega + two @ omega)[None], 4)
    torch.testing.assert_close(added.dense(), whole.dense())


def test_directions_do_not_change() -> None:
    """Saved sums belong to them."""
    found = directions(torch.zeros(1), 5, 3)
    expected = [[-1, 1, 1], [1, -1, -1], [1, 1, 1], [1, -1, -1], [1, 1, -1]]
    assert found.tolist() == expected


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
def test_any_sketch_gives_a_positive_semidefinite_factor_with_its_diagonal(rank: int) -> None:
    """Also one that belongs to no matrix: sums in half precision, or with noise."""
    d = torch.rand(WIDTH, generator=rng(8), dtype=torch.float64).pow(4)
    d[:3] = 0
    sketch = torch.randn(1, WIDTH, sketch_width(rank), generator=rng(9), dtype=torch.float64) * d.sqrt()[:, None]
    factor = wide_factor(d[None], sketch, rank)
    torch.testing.assert_close(factor.diagonal()[0], d)
    assert float(torch.linalg.eigvalsh(factor.dense()[0])[0]) > -1e-12
    assert bool((factor.remainder >= 0).all())


def test_a_diagonal_factor_keeps_its_diagonal() -> None:
    matrix = torch.diag(torch.rand(WIDTH, generator=rng(10), dtype=torch.float64))
    factor = fitted(matrix, 4)
    assert factor.rank == 0 and factor.error == 0.0
    torch.testing.assert_close(factor.dense()[0], matrix)
    nothing = fitted(torch.zeros_like(matrix), 4)
    assert nothing.rank == 0 and nothing.error == 0.0 and not bool(nothing.dense().any())


def test_noise_is_not_taken_for_a_low_rank() -> None:
    """No better along the held-out directions than the diagonal: rank 0."""
    noise = torch.randn(400, 400, generator=rng(11), dtype=torch.float64) / 400
    matrix = torch.eye(400, dtype=torch.float64) + (noise + noise.T) / 2
    factor = fitted(matrix, 2)
    assert factor.error <= factor.of_diagonal
    assert relative(matrix, factor.dense()[0]) < 1.1 * relative(matrix, torch.diag(matrix.diagonal()))


# ------------------------------------------------------------------------------------------------------- operations


def block(groups: int = 2, one_hot: bool = False, scale: float = 0.7) -> WideBlock:
    """Both signs, a zero in the remainder, an input direction without curvature."""
    outs, ins = 5, 4
    factors = [common_factor(20 + r, 2, outs) * (1 - 0.9 * r) for r in range(groups - 1)]
    factors.append(softmax_factor(23, outs))
    sketches = torch.stack([f @ directions(f, outs, sketch_width(2)) for f in factors])
    factor = wide_factor(torch.stack([f.diagonal() for f in factors]), sketches, 2)
    root = torch.randn(groups, ins, ins - 1, generator=rng(24), dtype=torch.float64)
    inputs = root @ root.mT
    return WideBlock(inputs.diagonal(dim1=-2, dim2=-1).clone() if one_hot else inputs, factor, "head", scale)


def agrees(matrix: Matrix) -> None:
    """Every operation against the dense matrix."""
    dense = matrix.dense()
    inverse = torch.linalg.inv(dense)
    v = torch.randn(matrix.size, 3, generator=rng(30), dtype=torch.float64)
    close = {"rtol": 1e-8, "atol": 1e-9 * float(inverse.abs().max())}
    torch.testing.assert_close(matrix.matvec(v), dense @ v)
    torch.testing.assert_close(matrix.matvec(v[:, 0]), dense @ v[:, 0])
    torch.testing.assert_close(matrix.diag(), dense.diagonal())
    torch.testing.assert_close(matrix.solve(v), inverse @ v, **close)
    torch.testing.assert_close(matrix.solve(v[:, 0]), inverse @ v[:, 0], **close)
    torch.testing.assert_close(matrix.quadratic(v), v.T @ inverse @ v, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(matrix.logdet(), torch.linalg.slogdet(dense)[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix.scaled(2.5).dense(), 2.5 * dense)
    coloured = matrix.colour(torch.eye(matrix.noise_size, dtype=torch.float64))  # rows R with Rᵀ R = Λ⁻¹
    torch.testing.assert_close(coloured.T @ coloured, inverse, **close)
    assert isinstance(matrix, WideSpectral)
    torch.testing.assert_close(matrix.variances(), inverse.diagonal(), **close)
    draws = matrix.sample(4, rng(31))
    torch.testing.assert_close(draws, matrix.colour(torch.randn(4, matrix.size, generator=rng(31), dtype=draws.dtype)))


@pytest.mark.parametrize("damping", ["exact", "factored", "balanced"])
@pytest.mark.parametrize("one_hot", [False, True], ids=["dense inputs", "one-hot"])
def test_precisions_agree_with_the_dense_matrix(damping: str, one_hot: bool) -> None:
    wide, prior = block(one_hot=one_hot), torch.tensor(0.3, dtype=torch.float64)
    assert any(bool((low < 0).any()) for low in wide.outputs.values) and bool((wide.outputs.values > 0).any())
    matrix = wide.precision(7.0, prior, damping)
    # the same factors as dense ones, damped by the code for those
    dense = KroneckerBlock(wide.inputs, wide.outputs.dense(), "head", wide.scale)
    torch.testing.assert_close(matrix.dense(), dense.precision(7.0, prior, damping).dense())
    agrees(matrix)
    if damping == "exact":
        agrees(matrix.plus(Isotropic(matrix.size, torch.tensor(0.2, dtype=torch.float64))))
    torch.testing.assert_close(wide.products(7.0, prior, damping).dense(), matrix.dense())


def test_the_block_agrees_with_the_dense_matrix() -> None:
    wide = block()
    dense = wide.dense()
    v = torch.randn(wide.size, 2, generator=rng(32), dtype=torch.float64)
    torch.testing.assert_close(wide.matvec(v), dense @ v)
    torch.testing.assert_close(wide.matvec(v[:, 0]), dense @ v[:, 0])
    torch.testing.assert_close(wide.diag(), dense.diagonal())
    torch.testing.assert_close(wide.scaled(3.0).dense(), 3 * dense)
    torch.testing.assert_close(wide.narrowed().diag(), dense.diagonal())
    assert sorted(wide.spectrum().flatten().tolist()) == pytest.approx(torch.linalg.eigvalsh(dense).tolist(), abs=1e-8)
    both = wide.absorbed(wide.scaled(2.0))  # type: ignore[arg-type]
    assert both is not None
    torch.testing.assert_close(both.dense(), 3 * dense)
    assert wide.absorbed(block()) is None
    with pytest.raises(NotPositiveDefinite):  # the inputs have a direction without curvature
        wide.solve(v)


def test_a_prior_of_its_own_for_the_bias() -> None:
    wide = block()
    prior = torch.tensor([0.3, 0.3, 0.3, 2.0], dtype=torch.float64).expand(wide.shape)
    matrix = wide.precision(7.0, prior, "exact")
    torch.testing.assert_close(matrix.dense(), 7 * wide.dense() + torch.diag(prior.reshape(-1)))
    agrees(matrix)
    with pytest.raises(IncompatiblePair, match="one prior precision"):
        wide.precision(7.0, prior, "balanced")
    uneven = torch.rand(wide.shape, generator=rng(33), dtype=torch.float64) + 0.1
    for one in (wide, KroneckerBlock(wide.inputs, wide.outputs.dense(), "head", wide.scale)):
        summed = one.precision(7.0, uneven, "exact")  # one for every weight: through the dense matrix
        torch.testing.assert_close(summed.dense(), 7 * wide.dense() + torch.diag(uneven.reshape(-1)))


@pytest.mark.parametrize("damping", [name for name in DAMPINGS if not DAMPINGS[name].of_diagonals])
def test_dampings_that_need_the_whole_factor_are_refused(damping: str) -> None:
    with pytest.raises(IncompatiblePair, match="wide_rank=0"):
        block().precision(7.0, torch.tensor(0.3, dtype=torch.float64), damping)


@pytest.mark.parametrize("damping", ["exact", "balanced"])
def test_evidence_and_its_gradient(damping: str) -> None:
    wide, n = block(), 7.0
    dense = KroneckerBlock(wide.inputs, wide.outputs.dense(), "head", wide.scale)
    found = []
    for one in (wide, dense):
        prior = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        factor = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        ratio = one.log_det_ratio(n, factor, prior, damping)
        found.append(torch.stack([ratio, *torch.autograd.grad(ratio, (factor, prior))]))
    torch.testing.assert_close(*found)
    prior = torch.tensor(0.3, dtype=torch.float64)
    assert wide.effective(n, prior) == pytest.approx(dense.effective(n, prior))


def test_many_outputs_in_runs_and_in_single_precision() -> None:
    """More outputs than fit into one run of the inner products."""
    outs, ins = 3000, 40
    vectors = torch.linalg.qr(torch.randn(1, outs, 3, generator=rng(40), dtype=torch.float64))[0]
    remainder = torch.rand(1, outs, generator=rng(41), dtype=torch.float64) + 0.5
    factor = WideFactor(vectors, torch.tensor([[3.0, 0.5, -0.3]], dtype=torch.float64), remainder)
    scale, shift = torch.logspace(-3, 1, ins, dtype=torch.float64)[None], torch.full((1, ins), 0.2).double()
    wide = WideBlock(scale, factor, "head").precision(1.0, torch.tensor(0.2, dtype=torch.float64), "exact")
    assert isinstance(wide, WideSpectral)
    v = torch.randn(outs * ins, generator=rng(42), dtype=torch.float64)
    torch.testing.assert_close(wide.matvec(wide.solve(v)), v)
    small = WideFactor(vectors.float(), factor.values.float(), remainder.float())
    single = WideSpectral(wide.inputs, small, scale.float(), shift.float(), "head")
    torch.testing.assert_close(single.solve(v.float()), wide.solve(v).float(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- functions by poles


def head(dtype: torch.dtype, span: float, damping: str = "exact", outs: int = 50, ins: int = 30) -> WideSpectral:
    """A precision whose inputs have eigenvalues over many orders of magnitude."""
    matrix = 0.2 * softmax_factor(50, outs) + 1e-3 * common_factor(51, 2, outs)
    factor = fitted(matrix, 4)
    scale = torch.logspace(0, -span, ins, dtype=torch.float64)[None].to(dtype)
    cast = WideFactor(factor.vectors.to(dtype), factor.values.to(dtype), factor.remainder.to(dtype))
    found = WideBlock(scale, cast, "head").precision(1e5, torch.tensor(0.1, dtype=dtype), damping)
    assert isinstance(found, WideSpectral)
    return found


ACCURACY = {torch.float64: 1e-6, torch.float32: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("span", [0.5, 4.0, 12.0])
@pytest.mark.parametrize("damping", ["exact", "balanced"])
def test_covariances_by_poles(dtype: torch.dtype, span: float, damping: str) -> None:
    """``Σ_j a_j (c_j G + σ_j)⁻¹`` and a root of it, relative to the covariance itself in all directions."""
    matrix = head(dtype, span, damping)
    squares = torch.rand(4, matrix.shape[2], generator=rng(52), dtype=torch.float64).pow(6)
    squares[1] = 0
    squares[1, 0] = 1  # one input alone
    squares[2] = 0
    squares[2, 0] = squares[2, -1] = 1  # and two, as far from one another as there are
    poles = Poles.of(matrix)
    assert Poles.of(matrix) is poles
    weights, roots = (part[:, None] for part in poles.weights(squares.to(dtype)))
    spread = WideSpread(weights, roots, poles)
    g = matrix.factor.dense()[0].double()
    eye = torch.eye(len(g), dtype=torch.float64)
    scale, shift = matrix.scale[0].double(), matrix.shift[0].double()
    for k in range(4):
        wanted = sum(a * torch.linalg.inv(c * g + s * eye) for a, c, s in zip(squares[k], scale, shift, strict=True))
        lower = torch.linalg.inv(torch.linalg.cholesky(wanted))
        root = spread.part(slice(k, k + 1)).colour(torch.eye(len(g), dtype=dtype))[:, 0, 0].double()
        for found in (spread.dense()[k, 0].double(), root.T @ root):
            off = torch.linalg.eigvalsh(lower @ found @ lower.T) - 1
            assert float(off.abs().max()) < ACCURACY[dtype]
        torch.testing.assert_close(spread.variance()[k, 0].double(), wanted.diagonal(), rtol=ACCURACY[dtype], atol=0.0)


def test_an_input_of_zeros_has_no_variance() -> None:
    matrix = head(torch.float64, 4.0)
    weights, roots = Poles.of(matrix).weights(torch.zeros(1, matrix.shape[2], dtype=torch.float64))
    assert not bool(weights.any()) and not bool(roots.any())


def test_covariances_by_poles_are_differentiable() -> None:
    """In the squares of the inputs and in the prior."""
    matrix = head(torch.float64, 4.0)
    squares = torch.rand(1, matrix.shape[2], generator=rng(53), dtype=torch.float64).requires_grad_()
    shift = matrix.shift.clone().requires_grad_()
    moved = WideSpectral(matrix.inputs, matrix.factor, matrix.scale, shift, "head")
    poles = Poles.of(moved)
    weights, _ = poles.weights(squares)
    total = (weights @ poles.variances.T).sum()
    found = torch.autograd.grad(total, (squares, shift))
    inverse = torch.linalg.inv(
        matrix.scale[0, :, None, None] * matrix.factor.dense() + shift[0, :, None, None] * torch.eye(50).double()
    )
    wanted = torch.autograd.grad((squares[0, :, None] * inverse.diagonal(dim1=1, dim2=2)).sum(), (squares, shift))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_every_operation_of_a_spread_is_that_of_its_covariance() -> None:
    matrix = head(torch.float64, 4.0)
    poles = Poles.of(matrix)
    squares = torch.rand(6, matrix.shape[2], generator=rng(54), dtype=torch.float64)
    spread = WideSpread(*(part.unflatten(0, (2, 3)) for part in poles.weights(squares)), poles)
    dense = spread.covariance()
    torch.testing.assert_close(spread.variance(), dense.diagonal(dim1=-2, dim2=-1))
    v = torch.randn(50, generator=rng(55), dtype=torch.float64)
    torch.testing.assert_close(spread.product(v), dense @ v)
    root = spread.colour(torch.eye(spread.noise_size).double()).permute(1, 2, 3, 0)
    torch.testing.assert_close(root @ root.mT, dense, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(spread.scaled(2.5).covariance(), 2.5 * dense)
    torch.testing.assert_close(spread.part(slice(1, 2)).covariance(), dense[1:])
    again = spread.part(slice(0, 1)).joined([spread.part(slice(1, 2))])
    torch.testing.assert_close(again.covariance(), dense)
    assert spread.to(torch.zeros(1)).variance().dtype == torch.float32


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_summed_curvature_along_directions(name: str) -> None:
    likelihood = get_likelihood(name)
    z = torch.randn(6, 2, 7, generator=rng(56), dtype=torch.float64)
    omega = directions(z, 7, 3)
    found = likelihood.summed_curvature(z, None, omega)
    torch.testing.assert_close(found, likelihood.summed_curvature(z) @ omega)
