"""Fisher structure, costs, Kronecker algebra, start weights and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import operators
from laplace_kf.errors import LaplaceKFError, ShapeMismatch, UnsupportedLayer
from laplace_kf.optim.inverse import damped_block
from tests import oracles
from tests.checks import close


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])


class TestFisherStructure:
    def test_exact_kronecker_and_inverses(self):
        model, x, y = problem()
        found = lk.diagnostics.fisher_structure(model, "categorical", [(x[:2], y[:2]), (x[2:], y[2:])], 0.1)
        dense = oracles.dense_ggn(model, x, y, oracles.categorical_nll)
        places = torch.cat([torch.tensor([0, 1, 6, 2, 3, 7, 4, 5, 8]), torch.tensor([9, 10, 11, 15, 12, 13, 14, 16])])
        close(found.exact, dense[places][:, places])
        # by examples: inputs with the 1, and Jacobians of the outputs in the pre-activations
        ones = torch.ones(6, 1, dtype=torch.float64)
        hidden = torch.tanh(model[0](x)).detach()
        inputs = [torch.cat([x, ones], 1), torch.cat([hidden, ones], 1)]
        p = torch.softmax(model(x), 1).detach()
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        jac = [
            model[2].weight.detach() * (1 - hidden**2)[:, None, :],
            torch.eye(2, dtype=torch.float64).expand(6, 2, 2),
        ]
        rows = []
        for i in range(2):
            row = []
            for j in range(2):
                a = torch.einsum("ni,nj->ij", inputs[i], inputs[j]) / 6
                g = (jac[i].transpose(1, 2) @ h @ jac[j]).mean(0)
                row.append(torch.kron(g, a))
            rows.append(torch.cat(row, 1))
        close(found.kronecker, torch.cat(rows))
        eye = 0.1 * torch.eye(17, dtype=torch.float64)
        close(found.exact_inverse @ (found.exact + eye), 10 * eye, 1e-9)
        close(found.kronecker_inverse @ (found.kronecker + eye), 10 * eye, 1e-9)
        means = found.block_means(found.exact)
        assert float(means[0, 1]) == pytest.approx(float(found.exact[:9, 9:].abs().mean()))
        assert list(found.sizes.values()) == [9, 8]

    def test_some_layers(self):
        model, x, y = problem()
        whole = lk.diagnostics.fisher_structure(model, "categorical", (x, y), 0.1)
        part = lk.diagnostics.fisher_structure(model, "categorical", (x, y), 0.1, ["2.weight", "2.bias"])
        assert list(part.sizes.values()) == [8]
        close(part.exact, whole.exact[9:, 9:])
        close(part.kronecker, whole.kronecker[9:, 9:])

    def test_refusals(self):
        model, x, y = problem()
        with pytest.raises(LaplaceKFError, match="damping"):
            lk.diagnostics.fisher_structure(model, "categorical", (x, y), 0.0)
        shared = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(2, 2)).double()
        with pytest.raises(UnsupportedLayer, match="'0'"):
            lk.diagnostics.fisher_structure(shared, "categorical", (x[:, None], y), 0.1)


class TestCosts:
    def test_formulas(self):
        model, x, y = problem()
        found = lk.diagnostics.costs(model, "categorical", (x, y), samples=2)
        n = 6
        columns = lambda v: 2 * n * v * (3 * 3 + 2 * 2) + 2 * n * v * 2 * 3  # noqa: E731
        assert found.formula == {
            "recursive": 2 * (2 * 2 * 3 + 2 * 3 * 3) + 2 * n * 3 * 3,
            "sampled": columns(2),
            "exact": columns(1),  # softmax: C - 1 columns
        }
        assert all(found.measured[name] > 0 for name in found.formula)

    def test_columns_cost_what_the_formula_says_they_add(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 5)).double()
        batch = (torch.randn(32, 40, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64))
        few, many = (lk.diagnostics.costs(model, "gaussian", batch, samples=s) for s in (1, 5))
        added = many.measured["sampled"] - few.measured["sampled"]
        assert added == pytest.approx(many.formula["sampled"] - few.formula["sampled"], rel=0.1)


class TestKroneckerAlgebra:
    def matrices(self) -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.randn(4, 3, 3, dtype=torch.float64))

    def test_vec_stacks_columns(self):
        a, b, c, _ = self.matrices()
        assert torch.equal(operators.vec(a)[:3], a[:, 0])
        assert torch.equal(operators.unvec(operators.vec(a), 3), a)
        close(operators.kron_matvec(a, b, operators.vec(c)), torch.kron(a, b) @ operators.vec(c))
        close(operators.kron_matvec(a, b, operators.vec(c)), operators.vec(b @ c @ a.T))

    def test_mixed_product_rank_and_determinant(self):
        a, b, c, d = self.matrices()
        close(torch.kron(*operators.mixed_product((a, b), (c, d))), torch.kron(a, b) @ torch.kron(c, d))
        thin = a.clone()
        thin[2] = thin[0]
        assert operators.kron_rank(thin, b) == 6 == int(torch.linalg.matrix_rank(torch.kron(thin, b)))
        wide = torch.kron(a, torch.randn(2, 2, dtype=torch.float64).T @ torch.eye(2).double())
        assert wide.shape == (6, 6)
        small = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        close(operators.kron_logdet(a, small), torch.linalg.slogdet(torch.kron(a, small)).logabsdet)

    def test_khatri_rao(self):
        a, b, *_ = self.matrices()
        found = operators.khatri_rao(a, b, [1, 2], [2, 1])
        assert found.shape == (4, 4)
        close(found[:2, 2:], torch.kron(a[:1, 1:], b[:2, 2:]))
        close(found[2:, :2], torch.kron(a[1:, :1], b[2:, :2]))
        with pytest.raises(ShapeMismatch):
            operators.khatri_rao(a, b, [1, 1], [2, 1])
        with pytest.raises(ShapeMismatch):
            operators.unvec(operators.vec(a), 2)
        with pytest.raises(ShapeMismatch):
            operators.mixed_product((a, b), (a[:2], b))


class TestBalance:
    @pytest.mark.parametrize(
        ("name", "norm"),
        [
            ("balanced", lambda m: float(m.trace())),
            ("balanced_frobenius", lambda m: float(m.norm())),
            ("balanced_spectral", lambda m: float(torch.linalg.matrix_norm(m, 2))),
        ],
    )
    def test_each_norm_splits_the_damping_by_its_own_omega(self, name: str, norm: Callable[[Tensor], float]):
        torch.manual_seed(0)
        a, g = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
        a, g = a @ a.T, 7 * g @ g.T
        eye_a, eye_g = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        omega = math.sqrt(norm(torch.kron(a, eye_g)) / norm(torch.kron(eye_a, g)))
        block = operators.KroneckerBlock(a[None], g[None], "block")
        n, prior = 4.0, torch.tensor(0.3, dtype=torch.float64)
        root = math.sqrt(0.3)
        expected = torch.kron(2 * g + root / omega * eye_g, 2 * a + omega * root * eye_a)
        close(block.precision(n, prior, name).dense(), expected)
        expected = torch.kron(g + root / omega * eye_g, a + omega * root * eye_a)
        close(damped_block(block, prior, operators.DAMPINGS[name]).dense(), expected)
        # the Frobenius residual bound is least at its own ω
        bound = lambda w: w * norm(torch.kron(eye_a, g)) + norm(torch.kron(a, eye_g)) / w  # noqa: E731
        assert all(bound(omega) <= bound(omega * s) for s in (0.5, 0.9, 1.1, 2.0))


class TestStartsAndSchedules:
    @pytest.mark.parametrize(
        ("layer", "fans"),
        [(nn.Linear(40, 60), 100), (nn.Conv2d(6, 8, 3, groups=2), (3 + 4) * 9), (nn.GRU(30, 20), 50)],
        ids=lambda value: type(value).__name__,
    )
    def test_glorot(self, layer: nn.Module, fans: int):
        lk.optim.glorot_init_(layer, generator=torch.Generator().manual_seed(0))
        weight = next(p for p in layer.parameters() if p.dim() > 1)
        bound = math.sqrt(6 / fans)
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
        assert float(weight.detach().var()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert not any(p.any() for name, p in layer.named_parameters() if "bias" in name)
        first = weight.detach().clone()
        lk.optim.glorot_init_(layer, generator=torch.Generator().manual_seed(0))
        assert torch.equal(first, weight)

    def test_halving_and_the_published_grid(self):
        factors = [lk.optim.halving(k, 100, 0.25) for k in range(100)]
        assert [factors[k] for k in (0, 24, 25, 49, 50, 99)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
        assert {lk.optim.halving(k, 100, 1.0) for k in range(100)} == {1.0}
        assert (lk.optim.PUBLISHED_RATES[0], lk.optim.PUBLISHED_RATES[-1], len(lk.optim.PUBLISHED_RATES)) == (
            2**-6,
            2**-13,
            8,
        )
        assert len(lk.optim.PUBLISHED_SHARES) == 5
        with pytest.raises(ValueError, match="share"):
            lk.optim.halving(0, 10, 0.0)
