"""Dense matrices, forms, ranks, bounds, recursions and errors of expectations, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import LaplaceKFError, ShapeMismatch, UnsupportedLayer
from tests import oracles
from tests.checks import close

diagnostics = lk.diagnostics
N = 7


def net(act: type[nn.Module] = nn.Tanh, outs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 4), act(), nn.Linear(4, 3), act(), nn.Linear(3, outs)).double()


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=generator)


NLL = oracles.categorical_nll


def ggn_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return oracles.dense_ggn(model, x, y, NLL)


class TestMatrices:
    def test_jacobian_is_that_of_single_passes(self):
        model, (x, _) = net(), rows()
        found = diagnostics.jacobian(model, x)
        close(found, oracles.jacobian(model, x, N))

    def test_jacobian_of_a_convolution_and_of_the_last_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
        x = torch.randn(3, 1, 3, 3, dtype=torch.float64)
        whole = oracles.jacobian(model, x, 3)
        close(diagnostics.jacobian(model, x), whole)
        close(diagnostics.jacobian(model, x, "last_layer"), whole[..., -18:])

    def test_hessian_is_that_of_single_passes(self):
        model, (x, y) = net(), rows()
        close(diagnostics.hessian(model, "categorical", (x, y)), oracles.dense_hessian(model, x, y, NLL))
        last = diagnostics.hessian(model, "categorical", (x, y), "last_layer")
        close(last, oracles.dense_hessian(model, x, y, NLL)[-12:, -12:])

    @pytest.mark.parametrize("product", ["ggn_vector_product", "hessian_vector_product"])
    def test_products_take_several_vectors_and_the_last_layer(self, product: str):
        model, (x, y) = net(), rows()
        dense = ggn_of(model, x, y) if product.startswith("ggn") else oracles.dense_hessian(model, x, y, NLL)
        v = torch.randn(len(dense), 3, dtype=torch.float64)
        call = getattr(lk.curvature, product)
        loader = [(x[:4], y[:4]), (x[4:], y[4:])]
        close(call(model, "categorical", loader, v), dense @ v)
        close(call(model, "categorical", loader, v[:, 0]), dense @ v[:, 0])
        close(call(model, "categorical", loader, v[-12:], parameters="last_layer"), dense[-12:, -12:] @ v[-12:])
        with pytest.raises(ShapeMismatch, match=r"\(39,\)|one entry"):
            call(model, "categorical", loader, v[1:])
        assert model.training

    def test_quadratic_form(self):
        model, (x, y) = net(), rows()
        dense = ggn_of(model, x, y)
        u, v = torch.randn(2, len(dense), dtype=torch.float64)
        loader = [(x[:4], y[:4]), (x[4:], y[4:])]
        close(diagnostics.quadratic_form(model, "categorical", loader, u, v), u @ dense @ v)
        close(diagnostics.quadratic_form(model, "categorical", loader, u), u @ dense @ u)

    def test_quadratic_form_makes_no_backward_pass(self, monkeypatch: pytest.MonkeyPatch):
        model, (x, y) = net(), rows()
        u = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a backward pass"))
        monkeypatch.setattr(lk.passes, "require_same_loss", lambda *args: None)
        assert diagnostics.quadratic_form(model, "categorical", (x, y), u) > 0


class TestBounds:
    def test_ranks(self):
        model, (x, y) = net(), rows()
        found = diagnostics.ranks(model, "categorical", (x, y), samples=2)
        assert found.measured == int(torch.linalg.matrix_rank(ggn_of(model, x, y), hermitian=True))
        # softmax: C - 1 an example
        assert (found.bound, found.outputs, found.sampled, found.parameters) == (2 * N, 3 * N, 2 * N, 39)
        assert found.measured <= found.bound

    def test_rank_is_bounded_by_the_parameters_and_by_the_data(self):
        model = nn.Linear(2, 1).double()
        x = torch.randn(9, 2, dtype=torch.float64)
        found = diagnostics.ranks(model, "gaussian", [(x[:5], x[:5, :1]), (x[5:], x[5:, :1])])
        assert (found.measured, found.bound) == (3, 3)
        twice = torch.cat([x[:1], x[:1]])
        assert diagnostics.ranks(model, "gaussian", (twice, twice[:, :1])).measured == 1

    def test_reduction_bound_is_the_sum_over_examples(self):
        model, (x, y) = net(), rows()
        total = 0.0
        for n in range(N):
            z = model(x[n : n + 1]).detach()
            g = torch.softmax(z, 1)[0]
            matrix = torch.diag(g) - torch.outer(g, g)
            g = g - nn.functional.one_hot(y[n], 3)
            total += float(g @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ g) / (2 * N)
        assert float(diagnostics.reduction_bound(model, "categorical", (x, y))) == pytest.approx(total, rel=1e-9)

    def test_no_step_promises_more_and_a_wide_network_gets_all_of_it(self):
        model, (x, y) = net(), rows()
        gradient = torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
            ]
        )
        ggn = ggn_of(model, x, y)
        promised = 0.5 * float(gradient @ torch.linalg.pinv(ggn, hermitian=True, rtol=1e-12) @ gradient)
        bound = float(diagnostics.reduction_bound(model, "categorical", (x, y)))
        assert promised == pytest.approx(bound, rel=1e-6)  # 39 parameters fit 14 directions
        few = nn.Linear(2, 3).double()
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(nn.functional.cross_entropy(few(x), y), list(few.parameters()))]
        )
        promised = 0.5 * float(gradient @ torch.linalg.pinv(ggn_of(few, x, y), hermitian=True, rtol=1e-12) @ gradient)
        assert promised < 0.9 * float(diagnostics.reduction_bound(few, "categorical", (x, y)))


class TestBlocks:
    def pre_activations(self, model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Hessians in every linear layer's output, by plain autograd."""
        found = {}
        for k in (0, 2, 4):
            h = model[: k + 1](x).detach()
            for n in range(len(x)):

                def loss(r: Tensor, rest: nn.Sequential = model[k + 1 :], target: Tensor = y[n : n + 1]) -> Tensor:
                    return NLL(rest(r[None]), target)

                found.setdefault(str(k), []).append(torch.autograd.functional.hessian(loss, h[n]))
        return {name: torch.stack(parts) for name, parts in found.items()}

    @pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.SiLU, nn.Softplus])
    def test_recursion_is_autograd_case_by_case(self, act: type[nn.Module]):
        model, (x, y) = net(act), rows()
        found = diagnostics.blocks(model, "categorical", (x, y))
        for name, expected in self.pre_activations(model, x, y).items():
            close(found[name].hessian, expected, 1e-9)

    @pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
    def test_gauss_newton_blocks_traces_and_smallest(self, act: type[nn.Module]):
        model, (x, y) = net(act), rows()
        found = diagnostics.blocks(model, "categorical", (x, y))
        dense, hessian, start = ggn_of(model, x, y), oracles.dense_hessian(model, x, y, NLL), 0
        a = x
        for k in (0, 2, 4):
            layer = model[k]
            o, i = layer.weight.shape
            ones = torch.cat([a, torch.ones(N, 1, dtype=torch.float64)], 1)
            mean = torch.einsum("ni,nop->niop", ones[:, -1:], found[str(k)].ggn).mean(0)[0]
            places = slice(start + o * i, start + o * i + o)  # the bias block is the mean of the pre-activations'
            close(mean, dense[places, places])
            size = o * (i + 1)
            part = hessian[start : start + size, start : start + size]
            assert found[str(k)].trace == pytest.approx(float(part.trace()), rel=1e-9)
            assert found[str(k)]["smallest"] == pytest.approx(float(torch.linalg.eigvalsh(found[str(k)].hessian).min()))
            start += size
            a = model[: k + 2](x).detach() if k < 4 else a

    @pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
    def test_hessian_is_gauss_newton_and_first_order_part(self, act: type[nn.Module]):
        model, (x, y) = net(act), rows()
        found = diagnostics.blocks(model, "categorical", (x, y))
        close(found.first_order + ggn_of(model, x, y), oracles.dense_hessian(model, x, y, NLL), 1e-9)

    def test_cross_part_is_all_that_is_left_beside_the_pre_activations(self):
        # ReLU: what the two decompositions leave is the same, and zero inside a layer
        model, (x, y) = net(nn.ReLU), rows()
        found = diagnostics.blocks(model, "categorical", (x, y))
        close(found.cross, found.first_order, 1e-9)
        assert found.piecewise_linear
        assert found.no_maxima
        assert all(found[k].psd and found[k].trace >= 0 for k in "024")
        # tanh: Hessian = (inputs and pre-activation Hessians) + cross (Lemma 3.15)
        model = net(nn.Tanh)
        found = diagnostics.blocks(model, "categorical", (x, y))
        assert not found.piecewise_linear
        expected = oracles.dense_hessian(model, x, y, NLL) - self.inputs_and_pre_activations(model, x, y)
        close(found.cross, expected, 1e-9)
        assert not found.cross[:12, :12].any()
        assert found.cross[:12, 12:].any()

    def inputs_and_pre_activations(self, model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        """Mean of ``(ã ãᵀ) * ∂²L/∂h̃²``: second derivatives in shifts of the pre-activations, inputs held."""
        total = None
        for n in range(N):
            a1 = x[n]
            h1 = model[0](a1)
            a2 = model[1](h1)
            h2 = model[2](a2)
            a3 = model[3](h2)

            def loss(s: Tensor, at: Tensor = x[n], target: Tensor = y[n : n + 1]) -> Tensor:
                h = model[0](at) + s[:4]
                h = model[2](model[1](h)) + s[4:7]
                h = model[4](model[3](h)) + s[7:]
                return NLL(h[None], target)

            second = torch.autograd.functional.hessian(loss, torch.zeros(10, dtype=torch.float64))
            jac = []  # of the shifts by the weights
            for inputs, rows_, count in ((a1, slice(0, 4), 4), (a2, slice(4, 7), 3), (a3, slice(7, 10), 3)):
                weight = torch.zeros(10, count, len(inputs), dtype=torch.float64)
                bias = torch.zeros(10, count, dtype=torch.float64)
                for o in range(count):
                    weight[rows_.start + o, o] = inputs.detach()
                    bias[rows_.start + o, o] = 1
                jac += [weight.reshape(10, -1), bias]
            j = torch.cat(jac, 1)
            part = j.T @ second @ j
            total = part if total is None else total + part
        return total / N

    def test_other_networks_are_refused_by_name(self):
        model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(2, 2)).double()
        x = torch.randn(3, 1, 2, dtype=torch.float64)
        with pytest.raises(UnsupportedLayer, match="chain"):
            diagnostics.blocks(model, "gaussian", (x, torch.zeros(3, 2, dtype=torch.float64)))


class TestExpectation:
    def test_relative_error_and_entries(self):
        model, (x, y) = net(), rows()
        found = diagnostics.kronecker_error(model, "categorical", (x, y))
        dense = ggn_of(model, x, y)
        kron = lk.curvature.estimate(model, "categorical", (x, y)).mean().dense()
        start = 0
        for name, size in (("0", 12), ("2", 15), ("4", 12)):
            exact, factors = (m[start : start + size, start : start + size] for m in (dense, kron))
            assert found[name].relative == pytest.approx(float((exact - factors).norm() / exact.norm()), rel=1e-8)
            assert found[name].error == pytest.approx(float((exact - factors).abs().sum()), rel=1e-8)
            assert found[name].error <= found[name].bound
            start += size
        summary = found.summary
        assert summary.error == pytest.approx(sum(found[k].error for k in "024"))
        assert summary.worst == max("024", key=lambda k: found[k].relative)
        assert summary.error < summary.total_error <= summary.total_bound

    def test_cumulants_are_those_of_an_enumeration(self):
        """One entry at a time, from joint draws of (a, g) enumerated over examples and root columns."""
        torch.manual_seed(1)
        model = nn.Linear(2, 2).double()
        x = torch.randn(4, 2, dtype=torch.float64)
        y = torch.tensor([0, 1, 0, 1])
        a = torch.cat([x, torch.ones(4, 1, dtype=torch.float64)], 1)
        p = torch.softmax(model(x).detach(), 1)
        outer = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p])
        bound = error = 0.0
        for i in range(3):
            for j in range(3):
                for o in range(2):
                    for q in range(2):
                        gg = outer[:, o, q]
                        ai, aj = a[:, i], a[:, j]
                        ci, cj = ai - ai.mean(), aj - aj.mean()
                        fourth = (ci * cj * gg).mean() - (ci * cj).mean() * gg.mean()
                        third_i, third_j = (ci * gg).mean(), (cj * gg).mean()
                        bound += float(fourth.abs() + (ai.mean() * third_j).abs() + (aj.mean() * third_i).abs())
                        exact = (ai * aj * gg).mean() - (ai * aj).mean() * gg.mean()
                        assert float(exact) == pytest.approx(float(fourth + ai.mean() * third_j + aj.mean() * third_i))
                        error += float(exact.abs())
        found = diagnostics.kronecker_error(model, "categorical", [(x[:1], y[:1]), (x[1:], y[1:])])
        entry = next(value for name, value in found.items() if name != "summary")
        assert entry.error == pytest.approx(error)
        assert entry.bound == pytest.approx(bound)
        assert found["summary"]["total_bound"] == pytest.approx(bound)

    def test_shared_positions_have_no_cumulant_bound(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)).double()
        x = torch.randn(5, 1, 3, dtype=torch.float64)
        found = diagnostics.kronecker_error(model, "gaussian", (x, torch.zeros(5, 2, dtype=torch.float64)))
        assert math.isnan(found["0"].bound)
        assert found["0"].relative > 0
        assert found["3"].relative == pytest.approx(0, abs=1e-12)  # the same output curvature for all examples
        assert math.isnan(found.summary.total_error)


class TestDirections:
    @pytest.mark.parametrize("limit", [1500, 0], ids=["dense", "conjugate gradients"])
    @pytest.mark.parametrize("damping", [0.1, 0.0])
    def test_alignment(self, limit: int, damping: float, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(diagnostics.direction, "DENSE", limit)
        model, (x, y) = net(), rows()
        loss = nn.functional.cross_entropy(model(x), y)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        dense = ggn_of(model, x, y)

        def step(places: slice) -> Tensor:
            part = dense[places, places]
            part = part + damping * torch.eye(len(part), dtype=torch.float64)
            return -torch.linalg.pinv(part, hermitian=True, rtol=1e-13) @ gradient[places]

        update = -gradient
        layers = {"0": slice(0, 12), "2": slice(12, 27), "4": slice(27, 39)}

        def cos(u: Tensor, v: Tensor) -> float:
            return float(u @ v / u.norm() / v.norm())

        tolerance = 1e-6 if damping else 1e-3
        found = diagnostics.alignment(model, "categorical", (x, y), update, damping)
        assert found["full"] == pytest.approx(cos(update, step(slice(0, 39))), abs=tolerance)
        for name, places in layers.items():
            assert found[name] == pytest.approx(cos(update[places], step(places)), abs=tolerance)
        together = torch.cat([step(places) for places in layers.values()])
        assert diagnostics.alignment(model, "categorical", (x, y), together, damping)["block_diagonal"] == (
            pytest.approx(1, abs=tolerance)
        )

    def test_alignment_takes_updates_by_name_and_refuses_others(self):
        model, (x, y) = net(), rows()
        named = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        flat = torch.cat([part.reshape(-1) for part in named.values()])
        assert diagnostics.alignment(model, "categorical", (x, y), named) == diagnostics.alignment(
            model, "categorical", (x, y), flat
        )
        with pytest.raises(ShapeMismatch, match=r"'0\.bias'"):
            diagnostics.alignment(model, "categorical", (x, y), {k: v for k, v in named.items() if k != "0.bias"})
        with pytest.raises(LaplaceKFError, match="damping"):
            diagnostics.alignment(model, "categorical", (x, y), flat, -1.0)

    def test_block_diagonal_is_enough_for_square_linear_networks_only(self):
        torch.manual_seed(0)
        linear = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(3)]).double()
        x, y = torch.randn(2, 9, 3, dtype=torch.float64)
        assert diagnostics.block_diagonal_residual(linear, "gaussian", (x, y)) < 1e-9
        bent = nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])
        assert diagnostics.block_diagonal_residual(bent, "gaussian", (x, y)) > 0.01


class TestSurfaces:
    def test_loss_surface(self):
        model, (x, y) = net(), rows()
        before = [p.detach().clone() for p in model.parameters()]
        u, v = torch.randn(2, 39, dtype=torch.float64)
        found = diagnostics.loss_surface(model, "categorical", (x, y), u, v, [-1.0, 0.0, 0.5], [0.0, 2.0])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        theta = torch.cat([p.reshape(-1) for p in before])
        for i, s in enumerate([-1.0, 0.0, 0.5]):
            for j, t in enumerate([0.0, 2.0]):
                nn.utils.vector_to_parameters(theta + s * u + t * v, model.parameters())
                assert float(found[i, j]) == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-12)
        with pytest.raises(ShapeMismatch):
            diagnostics.loss_surface(model, "categorical", (x, y), u[1:], v[1:], [0.0], [0.0])

    def test_damping_study(self):
        model, (x, y) = net(), rows()
        found = diagnostics.damping_study(model, "categorical", (x, y), [0.3, 10.0], tau=0.2, l2=0.1)
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

        def objective(at: Tensor) -> float:
            nn.utils.vector_to_parameters(at, model.parameters())
            return float(nn.functional.cross_entropy(model(x), y)) + 0.05 * float(at @ at)

        loss = nn.functional.cross_entropy(model(x), y)
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]) + 0.1 * theta
        factors = lk.curvature.estimate(model, "categorical", (x, y)).mean()
        exact = ggn_of(model, x, y) + 0.3 * torch.eye(39, dtype=torch.float64)
        for k, gamma in enumerate([0.3, 10.0]):
            parts = []
            for block, matrix in factors.entries:
                a, g = matrix.inputs[0], matrix.scale * matrix.outputs[0]
                omega = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
                damped = torch.kron(
                    g + gamma / omega * torch.eye(len(g), dtype=torch.float64),
                    a + gamma * omega * torch.eye(len(a), dtype=torch.float64),
                )
                places = factors.layout.positions(block)
                parts.append((places, -torch.linalg.solve(damped, gradient[places])))
            step = torch.zeros_like(theta)
            for places, part in parts:
                step[places] = part
            alpha = float(-(gradient @ step) / (step @ exact @ step))
            assert float(found.alpha[k]) == pytest.approx(alpha, rel=1e-8)
            here = objective(theta)
            assert float(found.improvement[k]) == pytest.approx(here - objective(theta + step), rel=1e-7)
            assert float(found.rescaled[k]) == pytest.approx(here - objective(theta + alpha * step), rel=1e-7)
            nn.utils.vector_to_parameters(theta, model.parameters())
