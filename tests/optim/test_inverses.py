"""Block-tridiagonal inverse, factors between layers, low-rank gradients, output curvature: dense float64 references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.curvature import make_structure
from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators import DAMPINGS, KroneckerProduct
from laplace_kf.optim.inverse import INVERSES, damped_power
from laplace_kf.optim.links import Linked
from tests import oracles
from tests.cases import BERNOULLI, CATEGORICAL, GAUSSIAN, HETEROSCEDASTIC, POISSON, mixture
from tests.optim import reference as ref


def cross_factors(
    model: nn.Sequential, x: Tensor, y: Tensor, nll: Any
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """``A_ij = E[â âᵀ]`` and ``G_ij = E[J_iᵀ H J_j]`` for all pairs of layers, one example at a time."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    size, n = len(layers), len(y)
    a_sum: list[list[Any]] = [[0.0] * size for _ in range(size)]
    g_sum: list[list[Any]] = [[0.0] * size for _ in range(size)]
    for i in range(n):
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        v = x[i : i + 1]
        for layer in model:
            if isinstance(layer, nn.Linear):
                values.append(torch.cat([v[0].detach(), torch.ones(1, dtype=v.dtype)]))
            v = layer(v)
            if isinstance(layer, nn.Linear):
                outputs.append(v)
        h = oracles.output_hessian(nll)(v.detach(), y[i : i + 1])
        jac = [torch.stack([torch.autograd.grad(v[0, c], o, retain_graph=True)[0][0] for c in range(v.shape[1])])
               for o in outputs]  # fmt: skip
        for p in range(size):
            for q in range(size):
                a_sum[p][q] = a_sum[p][q] + torch.outer(values[p], values[q]) / n
                g_sum[p][q] = g_sum[p][q] + jac[p].T @ h @ jac[q] / n
    return a_sum, g_sum


def dense_tridiagonal(a: list[list[Tensor]], g: list[list[Tensor]], k: float) -> tuple[Tensor, Tensor, list[int]]:
    """Methods 5.5 with dense matrices: the inverse, ``F̃`` with damped diagonal factors, and the block edges."""
    size = len(a)
    a, g = [list(row) for row in a], [list(row) for row in g]
    for i in range(size):
        d_in, d_out = len(a[i][i]), len(g[i][i])
        omega = math.sqrt((float(a[i][i].trace()) / d_in) / (float(g[i][i].trace()) / d_out))
        a[i][i] = a[i][i] + omega * math.sqrt(k) * torch.eye(d_in, dtype=torch.float64)
        g[i][i] = g[i][i] + math.sqrt(k) / omega * torch.eye(d_out, dtype=torch.float64)
    f = [[torch.kron(g[i][j], a[i][j]) for j in range(size)] for i in range(size)]
    edges = [0]
    for i in range(size):
        edges.append(edges[-1] + len(f[i][i]))
    xi = torch.eye(edges[-1], dtype=torch.float64)
    conditional = torch.zeros(edges[-1], edges[-1], dtype=torch.float64)
    for i in range(size):
        here = slice(edges[i], edges[i + 1])
        block = f[i][i]
        if i + 1 < size:
            psi = f[i][i + 1] @ torch.linalg.inv(f[i + 1][i + 1])
            xi[here, edges[i + 1] : edges[i + 2]] = -psi
            block = block - psi @ f[i + 1][i + 1] @ psi.T
        conditional[here, here] = torch.linalg.inv(block)
    full = torch.cat([torch.cat(row, 1) for row in f])
    return xi.T @ conditional @ xi, full, edges


@pytest.mark.parametrize("route", ["chain", "autograd"])
@pytest.mark.parametrize("k", [0.3, 1e-3])
def test_block_tridiagonal_inverse(k: float, route: str) -> None:
    model = ref.net([3, 4, 2, 3])
    x, y = ref.batch(60, 3, 3)
    inverse, full, edges = dense_tridiagonal(*cross_factors(model, x, y, oracles.categorical_nll), k)
    size = edges[-1]
    again = torch.linalg.inv(inverse)
    for i in range(3):
        for j in range(3):
            rows, columns = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
            if abs(i - j) <= 1:  # agrees with F̃ on the three block diagonals
                torch.testing.assert_close(again[rows, columns], full[rows, columns], rtol=1e-6, atol=1e-8)
            else:
                assert float(inverse[rows, columns].abs().max()) < 1e-10
    index = torch.cat([b.index.reshape(-1) for b in sorted(ref.kflr(oracles.categorical_nll)(model, x, y), key=_first)])
    rule = INVERSES["block_tridiagonal"]
    structure = rule.structure(make_structure("kron"))
    stats = lk.curvature.estimate(model if route == "chain" else Wrapped(model), "categorical", (x, y), structure)
    matrix = rule.build(stats, k, DAMPINGS["balanced"])
    v = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros_like(v)
    expected[index] = inverse @ v[index]
    torch.testing.assert_close(matrix.solve(v), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(matrix.dense() @ matrix.solve(v), v, rtol=1e-6, atol=1e-7)
    assert isinstance(structure, Linked)
    assert structure.unlinked(stats).structure.name == "kron"


def _first(block: oracles.Block) -> int:
    return int(block.index.min())


class Wrapped(nn.Module):
    """The same network with a step that is no chain link."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x)]).sum(0)


def test_links_add_over_batches_and_leave_shared_positions_alone() -> None:
    model = ref.net([3, 4, 3])
    x, y = ref.batch(9, 3, 3)
    structure = Linked(make_structure("kron"))
    whole = lk.curvature.estimate(model, "categorical", (x, y), structure)
    parts = [lk.curvature.estimate(model, "categorical", [(x[p], y[p])], structure) for p in (slice(0, 4), slice(4, 9))]
    (one,), (two,) = structure.links(whole), structure.links(parts[0] + parts[1])
    torch.testing.assert_close(one.inputs, two.inputs)
    torch.testing.assert_close(one.outputs, two.outputs)
    conv = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    stats = lk.curvature.estimate(
        conv, "categorical", (torch.randn(5, 1, 4).double(), torch.zeros(5).long()), structure
    )
    assert [(link.first, link.second) for link in structure.links(stats)] == [("2", "4")]


def test_tridiagonal_refuses_what_it_cannot_do() -> None:
    model = ref.net([3, 4, 3])
    with pytest.raises(IncompatiblePair, match="columns"):
        lk.optim.kfra(model, "categorical", inverse="block_tridiagonal").step(*ref.batch(4, 3, 3))
    with pytest.raises(IncompatiblePair, match="one by one"):
        lk.optim.kflr(model, "categorical", inverse="block_tridiagonal", damping="exact")
    with pytest.raises(IncompatiblePair, match="Kronecker"):
        lk.optim.kflr(model, "categorical", structure="diag", inverse="block_tridiagonal")


@pytest.mark.parametrize("flat_outputs", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_low_rank_gradient(diagonal: bool, flat_outputs: bool) -> None:
    """Methods 5.6: inverses applied to the factors of the gradient, against the dense solve of their sum."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def definite(d: int) -> Tensor:
        root = normal(2, d, d)
        return root @ root.transpose(1, 2) + torch.eye(d, dtype=torch.float64)

    g, a = normal(3, 2, 5), normal(3, 2, 4)
    inputs = normal(2, 4).square() + 1 if diagonal else definite(4)
    outputs = normal(2, 5).square() + 1 if flat_outputs else definite(5)
    matrix = KroneckerProduct(inputs, outputs, "test")
    total = torch.einsum("nro,nri->roi", g, a)
    expected = torch.linalg.solve(matrix.dense(), total.reshape(-1))
    torch.testing.assert_close(matrix.solve_outer(g, a).reshape(-1), expected)
    torch.testing.assert_close(matrix.solve(total.reshape(-1)), expected)
    torch.testing.assert_close(matrix.matvec(expected), total.reshape(-1))


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("structure", ["diag", "kron", "full", "full, large"])
def test_powers_of_the_damped_curvature(structure: str, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """``(C̃ + k)^ξ`` (methods 8.2)."""
    if structure == "full, large":
        monkeypatch.setattr("laplace_kf.operators.curvature.LARGE", 2)
        structure = "full"
    model = ref.net([3, 2, 3])
    stats = lk.curvature.estimate(model, "categorical", ref.batch(30, 3, 3), structure)
    dense = stats.mean().dense()
    dense = dense + 0.2 * torch.eye(len(dense), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(dense)
    v = torch.randn(len(dense), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = damped_power(INVERSES["block_diagonal"].build(stats, 0.2, DAMPINGS["exact"], power != 1.0), power)
    torch.testing.assert_close(matrix.solve(v), vectors @ (values**-power * (vectors.T @ v)))


@pytest.mark.parametrize(
    "likelihood", [CATEGORICAL, BERNOULLI, GAUSSIAN, POISSON, HETEROSCEDASTIC, mixture("clip")], ids=lambda l: l.name
)
def test_products_with_the_output_curvature(likelihood: Any) -> None:
    rule = lk.likelihoods.get_likelihood(likelihood.build(lk))
    width = {"heteroscedastic": 2, "mixture(clip)": 3}.get(likelihood.name, 4)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5, width, generator=rng, dtype=torch.float64)
    y = rule.sample(z, rng)
    v = torch.randn(3, 5, width, generator=rng, dtype=torch.float64)
    h = torch.stack([likelihood.curvature(z[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(rule.curvature_product(z, v, y), torch.einsum("ncd,knd->knc", h, v))
    torch.testing.assert_close(rule.summed_curvature(z, y), h.sum(0))


def test_products_of_ignored_positions_are_zero() -> None:
    rule = lk.likelihoods.Categorical()
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([[0, -100, 2], [-100, 1, 1]])
    found = rule.curvature_product(z, torch.ones_like(z)[None] * torch.arange(4.0), y)[0]
    assert float(found[0, 1].abs().max()) == 0.0 and float(found[0, 0].abs().max()) > 0
    kept = torch.softmax(z[y >= 0], -1)
    torch.testing.assert_close(rule.summed_curvature(z, y), torch.diag(kept.sum(0)) - kept.T @ kept)


def test_options_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="inverse"):
        lk.optim.kfac(ref.net([3, 3]), "categorical", inverse="tridiagonal")
    with pytest.raises(ValueError, match="damping"):
        lk.optim.kfac(ref.net([3, 3]), "categorical", damping="none")
    with pytest.raises(TypeError, match="columns"):
        lk.optim.kfac(ref.net([3, 3]), "categorical", columns=3)
