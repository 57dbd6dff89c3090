"""Kronecker algebra as properties: every fast path of a Matrix equals the dense one, for any shape and scale."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laplace_kf import linalg
from laplace_kf.errors import NonFinite, NotPositiveDefinite, ShapeMismatch
from laplace_kf.linalg import cholesky, eigh
from laplace_kf.operators import (
    DAMPINGS,
    DenseBlock,
    DiagonalBlock,
    Isotropic,
    KroneckerBlock,
    Matrix,
    Spectral,
    Sum,
    curvature,
)
from laplace_kf.operators.conjugate import conjugate_gradients
from laplace_kf.operators.eigenbasis import SpectralBlock
from laplace_kf.operators.kept_terms import KeptTerms
from laplace_kf.operators.lowrank import LowRankBlock
from laplace_kf.operators.nearest import factor_sum, nearest_in_divergence, nearest_product
from laplace_kf.operators.quadrature import DIRECT, nodes_of_products
from laplace_kf.operators.spectral import Ridge

DIMENSIONS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
SCALES = st.floats(1e-3, 1e3)


def psd(rng: torch.Generator, groups: int, size: int, rank: int) -> Tensor:
    root = torch.randn(groups, size, rank, generator=rng, dtype=torch.float64)
    return root @ root.transpose(-1, -2)


def kronecker(shape: tuple[int, int, int], seed: int, definite: bool, one_hot: bool = False) -> KroneckerBlock:
    rng = torch.Generator().manual_seed(seed)
    groups, out, inp = shape
    a = psd(rng, groups, inp, inp + 2 if definite else 1)
    a = a.diagonal(dim1=-2, dim2=-1).clone() if one_hot else a
    return KroneckerBlock(a, psd(rng, groups, out, out + 2 if definite else 1), "block", 0.7)


def agrees(matrix: Matrix, seed: int) -> None:
    """Every operation against the dense matrix."""
    dense = matrix.dense()
    rng = torch.Generator().manual_seed(seed)
    v = torch.randn(matrix.size, 3, generator=rng, dtype=torch.float64)
    scale = dense.abs().max()
    inverse = torch.linalg.inv(dense)
    condition = float(torch.linalg.cond(dense))
    near = {"rtol": 1e-8, "atol": 1e-13 * condition * float(inverse.abs().max()) + 1e-13}
    torch.testing.assert_close(matrix.matvec(v), dense @ v, rtol=1e-9, atol=1e-10 * float(scale))
    torch.testing.assert_close(matrix.matvec(v[:, 0]), dense @ v[:, 0], rtol=1e-9, atol=1e-10 * float(scale))
    torch.testing.assert_close(matrix.diag(), dense.diagonal(), rtol=1e-9, atol=1e-10 * float(scale))
    torch.testing.assert_close(matrix.solve(v), inverse @ v, **near)
    torch.testing.assert_close(matrix.quadratic(v), v.T @ inverse @ v, **near)
    torch.testing.assert_close(matrix.quadratic(v[:, 0]), v[:, 0] @ inverse @ v[:, 0], **near)
    torch.testing.assert_close(matrix.logdet(), torch.linalg.slogdet(dense)[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(matrix.scaled(2.5).dense(), 2.5 * dense, rtol=1e-9, atol=1e-10 * float(scale))
    if isinstance(matrix, Spectral):
        coloured = matrix.colour(torch.eye(matrix.size, dtype=torch.float64))  # rows R with Rᵀ R = Λ⁻¹
        torch.testing.assert_close(coloured.T @ coloured, inverse, **near)
        torch.testing.assert_close(
            matrix.energy(v[:, 0]), v[:, 0] @ dense @ v[:, 0], rtol=1e-8, atol=1e-10 * float(scale)
        )


@settings(max_examples=60, deadline=None)
@given(DIMENSIONS, st.integers(0, 10**6), SCALES, SCALES, st.sampled_from(sorted(DAMPINGS)), st.booleans())
def test_damped_kronecker(
    shape: tuple[int, int, int], seed: int, n: float, prior: float, damping: str, one_hot: bool
) -> None:
    block = kronecker(shape, seed, definite=False, one_hot=one_hot)
    precision = block.precision(n, torch.tensor(prior, dtype=torch.float64), damping)
    agrees(precision, seed)
    exact = n * block.dense() + prior * torch.eye(block.size, dtype=torch.float64)
    if damping == "exact":
        torch.testing.assert_close(precision.dense(), exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
    else:  # methods 9.2: the factored forms always lie above
        assert torch.linalg.eigvalsh(precision.dense() - exact).min() > -1e-9 * exact.abs().max()


@settings(max_examples=60, deadline=None)
@given(DIMENSIONS, st.integers(0, 10**6), st.booleans(), st.booleans())
def test_sum_of_two_kronecker_products(shape: tuple[int, int, int], seed: int, swap: bool, one_hot: bool) -> None:
    """Methods 5.4: exact solve and determinant if one of the two is definite."""
    first, second = kronecker(shape, seed, definite=False), kronecker(shape, seed + 1, definite=True, one_hot=one_hot)
    total = second.plus(first) if swap else first.plus(second)
    assert isinstance(total, Spectral)
    dense = first.dense() + second.dense()
    torch.testing.assert_close(total.dense(), dense, rtol=1e-7, atol=1e-8 * float(dense.abs().max()))
    torch.testing.assert_close(total.logdet(), torch.linalg.slogdet(dense)[1], rtol=1e-6, atol=1e-6)
    v = torch.randn(total.size, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(dense @ total.solve(v), v, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(DIMENSIONS, st.integers(0, 10**6), SCALES)
def test_prior_that_differs_between_weight_and_bias(shape: tuple[int, int, int], seed: int, ratio: float) -> None:
    block = kronecker(shape, seed, definite=True)
    prior = torch.ones(shape, dtype=torch.float64)
    prior[..., -1] = ratio
    precision = block.precision(3.0, prior, "exact")
    expected = 3.0 * block.dense() + torch.diag(prior.reshape(-1))
    torch.testing.assert_close(precision.dense(), expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(precision.logdet(), torch.linalg.slogdet(expected)[1], rtol=1e-8, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6), SCALES)
def test_diagonal_dense_isotropic(size: int, seed: int, prior: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    lam = torch.tensor(prior, dtype=torch.float64)
    dense = DenseBlock(psd(rng, 1, size, max(1, size - 1))[0], "block")
    diagonal = DiagonalBlock(torch.rand(1, size, 1, generator=rng, dtype=torch.float64), "block")
    isotropic = Isotropic(size, lam)
    eye = torch.eye(size, dtype=torch.float64)
    for matrix in (dense, diagonal):
        agrees(matrix.plus(isotropic), seed)
        agrees(isotropic.plus(matrix), seed)
        torch.testing.assert_close(matrix.plus(isotropic).dense(), matrix.dense() + prior * eye)
    agrees(isotropic, seed)
    agrees(isotropic.plus(isotropic), seed)
    both = dense.plus(diagonal).plus(isotropic)
    torch.testing.assert_close(both.dense(), dense.dense() + diagonal.dense() + prior * eye)
    lazy = Sum((dense, diagonal)).plus(isotropic)
    torch.testing.assert_close(lazy.dense(), both.dense())
    agrees(lazy, seed)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("damping", sorted(DAMPINGS))
def test_ratio_of_determinants_is_that_of_the_precision(damping: str, one_hot: bool) -> None:
    block = kronecker((2, 3, 4), 1, definite=False, one_hot=one_hot)
    for prior in (torch.tensor(0.3), 0.3 + torch.arange(4.0).expand(2, 3, 4), 0.3 + torch.arange(24.0).view(2, 3, 4)):
        prior = prior.double()
        if damping != "exact" and prior.dim():
            continue  # one number only
        wide = prior.expand(block.shape)
        expected = torch.linalg.slogdet(block.scaled(1.5).precision(5.0, prior, damping).dense())[1] - wide.log().sum()
        torch.testing.assert_close(block.log_det_ratio(5.0, 1.5, prior, damping), expected, rtol=1e-9, atol=1e-9)


def test_effective_number_of_parameters_is_the_trace() -> None:
    lam = torch.tensor(0.4, dtype=torch.float64)
    for block in (kronecker((2, 3, 4), 1, definite=False), DenseBlock(kronecker((1, 3, 4), 2, False).dense(), "block")):
        curvature = 3.0 * block.dense()
        total = curvature + 0.4 * torch.eye(block.size, dtype=torch.float64)
        assert block.effective(3.0, lam) == pytest.approx(float(torch.trace(curvature @ torch.linalg.inv(total))))


def test_a_chain_of_terms_shows_the_spectra_of_the_newest() -> None:
    terms = [kronecker((1, 3, 4), seed, definite=True) for seed in range(3)]
    for found, expected in zip(KeptTerms(terms, "block").leading(), terms[-1].leading(), strict=True):
        assert torch.equal(found, expected)


def test_nodes_stand_for_the_products_of_all_entries() -> None:
    """Where there are too many products to be written out, with the smooth functions they are used for."""
    rng = torch.Generator().manual_seed(0)
    outputs, inputs = ((4 * torch.randn(2, d, generator=rng, dtype=torch.float64)).exp() for d in (60, 90))
    inputs[1, 7] = 0.0  # left out, as both functions vanish there
    assert outputs.numel() * inputs.shape[1] > DIRECT
    both = (outputs[:, :, None] * inputs[:, None, :]).flatten()
    for factors, values in (((outputs, inputs), both), ((both.view(1, -1),), both)):
        nodes, weights = nodes_of_products(*factors)
        assert len(nodes) < len(values) / 10
        for c in (1e-3, 1.0, 1e4):
            for f in (lambda s, c=c: (c * s).log1p(), lambda s, c=c: c * s / (1 + c * s)):
                torch.testing.assert_close((weights * f(nodes)).sum(), f(values).sum(), rtol=1e-11, atol=0.0)


def test_the_smallest_entry_of_a_grid_that_is_not_written_out() -> None:
    rng = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.rand(2, d, generator=rng) + 0.1 for d in (3, 4))
    for shift in (None, torch.tensor(0.7)):
        ridge = Ridge(outputs, inputs, shift)
        torch.testing.assert_close(ridge.smallest(), ridge.grid().flatten(1).amin(1))
    outputs[1, 2] = torch.inf
    assert Ridge(outputs, inputs).smallest().isfinite().tolist() == [True, False]


@pytest.mark.parametrize("one_hot", [False, True])
def test_one_product_is_its_own_nearest_product(one_hot: bool) -> None:
    """With a factor that is singular, too: every way of finding one product finds this one."""
    for definite in (True, False):
        block = kronecker((2, 3, 4), 5, definite=definite, one_hot=one_hot)
        if one_hot and not definite:
            block.inputs[:, 2] = 0.0  # a category that never came
        dense = block.dense()
        for nearest in (nearest_product, nearest_in_divergence, factor_sum):
            found = nearest([block])
            assert found.inputs.shape == block.inputs.shape
            torch.testing.assert_close(found.dense(), dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max()))


def test_a_sum_is_kept_in_the_bases_of_its_marginals() -> None:
    """Each factor counts as much as the other side of its term has trace; the trace of the sum stays."""
    terms = [kronecker((2, 3, 4), 1, definite=True), kronecker((2, 3, 4), 2, definite=True)]
    terms = [KroneckerBlock(b.inputs, b.outputs * scale, "block") for b, scale in zip(terms, (1.0, 30.0), strict=True)]
    found = SpectralBlock.of_sum([(b.outputs, b.inputs) for b in terms], "block")
    for basis, ours, others in ((found.inputs, "inputs", "outputs"), (found.outputs, "outputs", "inputs")):
        traces = [getattr(b, others).diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for b in terms]
        marginal = sum(getattr(b, ours) * trace for b, trace in zip(terms, traces, strict=True))
        assert basis.matrix is not None
        inside = basis.matrix.mT @ marginal @ basis.matrix
        diagonal = torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
        torch.testing.assert_close(inside, diagonal, rtol=0, atol=1e-9 * float(diagonal.abs().max()))
    torch.testing.assert_close(found.grid.sum(), sum(b.dense().trace() for b in terms))


@pytest.mark.parametrize("remainder", [torch.tensor(0.2), torch.arange(6.0) / 10], ids=["number", "diagonal"])
def test_low_rank_precision_with_a_prior_for_every_weight(remainder: Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(6, 2, generator=rng, dtype=torch.float64))[0]
    block = LowRankBlock(vectors, torch.tensor([3.0, 1.0]).double(), remainder.double(), "block")
    prior = 0.5 + torch.arange(6.0).double().reshape(1, 6, 1)
    precision = block.precision(4.0, prior, "exact")
    expected = 4 * block.dense() + torch.diag(prior.reshape(-1))
    torch.testing.assert_close(precision.dense(), expected)
    agrees(precision, 0)


def test_conjugate_gradients_say_how_far_they_came() -> None:
    rng = torch.Generator().manual_seed(0)
    matrix = psd(rng, 1, 30, 30)[0] + 0.01 * torch.eye(30, dtype=torch.float64)
    right = torch.randn(30, 2, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1e3], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="stopped after 3 steps") as caught:
        found = conjugate_gradients(
            lambda v: matrix @ v, lambda v: v, right, lambda r, _: r.norm(dim=0) < 0, "block", 3
        )
    left = ((right - matrix @ found).norm(dim=0) / right.norm(dim=0)).max()
    assert f"relative residual of {float(left):.2g}." in str(caught[0].message)


def test_decompositions_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block = kronecker((1, 4, 5), 0, definite=True)
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m.shape) or original(m))
    for n in (1.0, 10.0, 100.0):
        block.scaled(2.0).precision(n, torch.tensor(0.1, dtype=torch.float64), "exact").logdet()
    assert calls == [(1, 5, 5), (1, 4, 4)]


@pytest.fixture
def large_from_three(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Dense blocks of more than two parameters count as large; the names of the decompositions that are made."""
    made: list[str] = []

    def noted(name: str) -> None:
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m: made.append(name) or original(m))

    monkeypatch.setattr(curvature, "LARGE", 2)
    for name in ("eigh", "eigvalsh", "cholesky_ex"):
        noted(name)
    return made


@pytest.mark.parametrize("prior", [torch.tensor(0.3), torch.arange(1.0, 6.0)], ids=["number", "diagonal"])
def test_one_precision_of_a_large_dense_block_needs_no_eigenbasis(large_from_three: list[str], prior: Tensor) -> None:
    prior = prior.double().reshape(() if prior.dim() == 0 else (1, 5, 1)).requires_grad_()
    matrix = psd(torch.Generator().manual_seed(0), 1, 5, 4)[0]
    block = DenseBlock(matrix, "block")
    precision = block.precision(3.0, prior.detach(), "exact")
    assert large_from_three == ["cholesky_ex"]
    wanted = 3 * matrix + torch.diag(prior.detach().reshape(-1).expand(5))
    torch.testing.assert_close(precision.dense(), wanted)
    agrees(precision, 0)
    found = torch.autograd.grad(block.precision(3.0, prior, "exact").logdet(), prior)[0]
    inverse = torch.linalg.inv(wanted).diagonal()
    torch.testing.assert_close(found.reshape(-1), inverse.sum().reshape(-1) if prior.dim() == 0 else inverse)


def test_a_large_dense_block_without_a_prior_is_not_helped_by_a_jitter(large_from_three: list[str]) -> None:
    """What is singular stays so, and what rounding makes less than the prior goes through the eigenbasis."""
    matrix = psd(torch.Generator().manual_seed(0), 1, 5, 2)[0]
    block = DenseBlock(matrix, "block")
    precision = block.precision(2.0, torch.tensor(0.0, dtype=torch.float64), "exact")
    torch.testing.assert_close(precision.dense(), 2 * matrix)
    with pytest.raises(NotPositiveDefinite, match=r"block.*prior_precision"):
        precision.sample(1)
    little = torch.tensor(1e-9)
    for seed in range(20):  # with a pivot of round-off, variances would be far above 1 / λ
        some = DenseBlock(psd(torch.Generator().manual_seed(seed), 1, 5, 2)[0].float(), "block")
        solved = some.precision(1.0, little, "exact").solve(torch.eye(5))
        assert float(solved.diagonal().max()) < 2e9
    assert "eigh" in large_from_three


def test_many_precisions_of_a_large_dense_block_share_one_eigenbasis(large_from_three: list[str]) -> None:
    block = DenseBlock(psd(torch.Generator().manual_seed(0), 1, 5, 4)[0], "block")
    lam, noise = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    before = block.precision(2.0, lam, "exact").colour(noise)
    assert list(block.undecomposed()) == ["full"] and not block.undecomposed(many=False)
    many = [block.one_of_many(n, lam, "exact") for n in (1.0, 2.0, 3.0)]
    assert large_from_three == ["cholesky_ex", "eigh"]
    assert many[0].outputs.dual is many[2].outputs.dual  # type: ignore[attr-defined]
    torch.testing.assert_close(many[1].dense(), block.precision(2.0, lam, "exact").dense())
    assert torch.equal(block.precision(2.0, lam, "exact").colour(noise), before)  # whatever was asked for in between


def test_the_spectrum_of_a_large_dense_block_needs_no_vectors(large_from_three: list[str]) -> None:
    matrix = psd(torch.Generator().manual_seed(0), 1, 5, 4)[0]
    block = DenseBlock(matrix, "block")
    assert torch.equal(block.spectrum(), block.spectrum())
    assert large_from_three == ["eigvalsh"]
    torch.testing.assert_close(block.spectrum().reshape(-1), eigh(matrix, "block")[0])
    with pytest.raises(NotPositiveDefinite, match="factor"):
        DenseBlock(torch.diag(torch.tensor([1.0, 0.2, -0.5])), "block (factor)").spectrum()


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 3, 40), (1, 40, 3), (2, 3, 4)])
def test_draws_of_any_shape_are_rotated_together(shape: tuple[int, int, int]) -> None:
    precision = kronecker(shape, 0, definite=True).precision(2.0, torch.tensor(0.1, dtype=torch.float64), "exact")
    assert isinstance(precision, Spectral)
    noise = torch.randn(5, precision.size, dtype=torch.float64)
    torch.testing.assert_close(precision.colour(noise), torch.cat([precision.colour(one[None]) for one in noise]))
    torch.testing.assert_close(precision.rotate(precision.rotate_back(noise.reshape(5, *shape))).flatten(1), noise)


def test_singular_precision_names_block_and_knob() -> None:
    block = kronecker((1, 3, 3), 0, definite=False)
    precision = block.precision(1.0, torch.tensor(0.0, dtype=torch.float64), "exact")
    for use in (precision.logdet, lambda: precision.solve(torch.ones(9).double()), lambda: precision.sample(1)):
        with pytest.raises(NotPositiveDefinite, match=r"block.*prior_precision"):
            use()
    with pytest.raises(NotPositiveDefinite):
        Isotropic(3, torch.tensor(0.0)).logdet()


def test_indefinite_factor_is_refused_not_clamped() -> None:
    with pytest.raises(NotPositiveDefinite, match="factor"):
        eigh(torch.diag(torch.tensor([1.0, -0.5])), "block (input factor A)")
    with pytest.raises(NonFinite, match="block"):
        eigh(torch.tensor([[float("nan")]]), "block")


def test_cholesky_retries_then_jitters_then_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    nearly = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]])  # singular in float32, and in float64 after the cast
    with pytest.warns(RuntimeWarning, match="jitter"):
        factor = cholesky(nearly, "block")
    torch.testing.assert_close(factor @ factor.T, nearly)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        torch.testing.assert_close(cholesky(good, "block"), torch.linalg.cholesky(good))
    with pytest.raises(NotPositiveDefinite, match="-1"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0])), "block")


def test_failing_eigensolver_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.eigh

    def fails_in_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    values, vectors = eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), "block")
    torch.testing.assert_close(values, torch.tensor([1.0, 3.0]))
    assert vectors.dtype == torch.float32

    def always_fails(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", always_fails)
    with pytest.raises(NotPositiveDefinite, match="converge"):
        eigh(torch.eye(2), "block")


def test_sizes_are_checked() -> None:
    block = kronecker((1, 2, 3), 0, definite=True)
    with pytest.raises(ShapeMismatch, match="6"):
        block.matvec(torch.ones(5, dtype=torch.float64))
    with pytest.raises(ShapeMismatch):
        block.plus(Isotropic(5, torch.tensor(1.0, dtype=torch.float64)))


def test_an_eigensolver_that_gives_nan_in_float32_is_asked_again_in_float64(monkeypatch):
    # seen at 785x785 with finite, well-conditioned input: LAPACK's divide and conquer in single precision
    right = torch.linalg.eigh
    asked = []

    def single_fails(matrix):
        asked.append(matrix.dtype)
        values, vectors = right(matrix)
        return (values, vectors) if matrix.dtype == torch.float64 else (values * torch.nan, vectors * torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", single_fails)
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    values, vectors = linalg.eigh(matrix, "fc")
    assert asked == [torch.float32, torch.float64]
    assert values.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
