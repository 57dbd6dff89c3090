"""Constants and guards of methods 4.2, 5.2, 5.4, 6.2 by what they do: each of these fails if one of them changes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.curvature import make_structure
from laplace_kf.operators import DAMPINGS, BlockTridiagonal, CrossFactors, Isotropic, KroneckerBlock, KroneckerProduct
from laplace_kf.operators.kronecker import balance
from laplace_kf.optim.inverse import INVERSES
from laplace_kf.optim.objective import Batch
from laplace_kf.optim.stepsize import optimal_coefficients
from tests import oracles
from tests.cases import rng
from tests.optim import reference as ref


def counted(opt: Any, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Examples behind the factors and behind the exact products of one step."""
    products: list[int] = []
    real = opt.objective.products

    def spy(batches: Sequence[Batch], directions: Any) -> Tensor:
        products.append(sum(batch.count for batch in batches))
        return real(batches, directions)

    opt.objective.products = spy
    opt.step(x, y)
    assert len(set(products)) == 1
    return int(opt.statistics.count), products[0]


@pytest.mark.parametrize("make", [lk.optim.kfac, lk.optim.ekfac])
def test_an_eighth_and_a_quarter_of_the_minibatch(make: Any) -> None:
    """τ₁ = 1/8 for the factors, τ₂ = 1/4 for the products (methods 6.2), 128 at the least."""
    for n, expected in ((4096, (512, 1024)), (600, (128, 150)), (50, (50, 50))):
        opt = make(ref.net([3, 4, 3]), "categorical", generator=rng())
        assert counted(opt, *ref.batch(n, 3, 3)) == expected


def test_kfac_inverts_every_twenty_steps() -> None:
    """T₃ = 20, at the first three steps, and for all three candidates at T₂ = 20 (methods 6.2)."""
    opt, made = lk.optim.kfac(ref.net([3, 4, 3]), "categorical", generator=rng()), []
    real = opt.running._build

    def spy(statistics: Any, zeta: float) -> Any:
        made.append(opt.steps)
        return real(statistics, zeta)

    opt.running._build = spy
    for seed in range(41):
        opt.step(*ref.batch(8, 3, 3, seed))
    assert made == [1, 2, 3, 20, 20, 20, 40, 40, 40]


@pytest.mark.nightly
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_projections_are_unbiased(noise: str) -> None:
    """E[v vᵀ] = I (methods 4.2): any other scale of the noise is seen."""
    model, (x, y) = ref.net([3, 4, 3]), ref.batch(6, 3, 3)
    found = lk.curvature.estimate(
        model, "categorical", (x, y), "diag", "projection", noise=noise, samples=4000, generator=rng()
    )
    exact = oracles.dense_ggn(model, x, y, oracles.categorical_nll).diagonal()
    diagonal = found.mean().diag()
    assert float((diagonal - exact).norm() / exact.norm()) < 0.05


def test_balance_is_clamped_and_one_for_dead_factors() -> None:
    """ω in [10⁻⁶, 10⁶] (methods 5.2)."""
    eye = torch.eye(3).double()[None]
    for a, g, omega in (
        (4.0, 1.0, 2.0), (1.0, 1e-18, 1e6), (1e-18, 1.0, 1e-6), (1e-11, 1.0, math.sqrt(1e-11)), (0.0, 1.0, 1.0),
        (1.0, 0.0, 1.0),
    ):  # fmt: skip
        assert float(balance(KroneckerBlock(a * eye, g * eye, "x"))) == pytest.approx(omega, rel=1e-12)


def test_layers_that_predict_each_other_perfectly_are_still_solved() -> None:
    """``1 − s_G s_Aᵀ = 0`` is clipped (methods 5.4): the inverse is finite and positive, not refused."""
    model = ref.net([3, 3, 3])
    rule = INVERSES["block_tridiagonal"]
    structure = rule.structure(make_structure("kron"))
    stats = lk.curvature.estimate(model, "categorical", ref.batch(30, 3, 3), structure)
    matrix = rule.build(stats, 0.1, DAMPINGS["balanced"])
    assert isinstance(matrix, BlockTridiagonal)
    (one, first), (two, second) = matrix.entries
    assert isinstance(first, KroneckerProduct) and isinstance(second, KroneckerProduct)

    def perfect(here: Tensor, there: Tensor) -> Tensor:  # L Lᵀ' with here = L Lᵀ, there = L' L'ᵀ
        return torch.linalg.cholesky(here[0]) @ torch.linalg.cholesky(there[0]).T

    link = CrossFactors(
        one.name, two.name, perfect(first.inputs, second.inputs), perfect(first.outputs, second.outputs)
    )
    linked = BlockTridiagonal(matrix.layout, matrix.entries, [link])
    v = torch.randn(linked.size, 5, generator=rng(), dtype=torch.float64)
    solved = linked.solve(v)
    assert bool(torch.isfinite(solved).all()) and bool(((v * solved).sum(0) > 0).all())


@pytest.mark.parametrize("momentum", [False, True])
def test_directions_that_ascend_become_the_gradients(momentum: bool) -> None:
    """An inverse that turns the gradient round: the step is −α∇E with the exact α."""
    nll, tau = oracles.categorical_nll, 0.5
    model, (x, y) = ref.net([3, 4, 3]), ref.batch(12, 3, 3)
    opt = lk.optim.kflr(model, "categorical", tau=tau, zeta=0.1, l2=0.0, momentum=momentum, adapt_zeta=False)
    theta, g = oracles.flat_parameters(model), ref.gradient(model, x, y, nll)
    curved = oracles.dense_ggn(model, x, y, nll) + tau * torch.eye(len(theta)).double()
    size = len(theta)

    class Backwards(Isotropic):
        def solve(self, v: Tensor) -> Tensor:
            return -v

    opt.running._build = lambda statistics, zeta: Backwards(size, torch.ones(()).double())
    opt.step(x, y)
    alpha = float(g @ g / (g @ curved @ g))
    torch.testing.assert_close(oracles.flat_parameters(model), theta - alpha * g, rtol=1e-8, atol=1e-10)
    assert opt.diagnostics["alpha"] == pytest.approx(alpha)


NEIGHBOURS: dict[str, tuple[Any, dict[str, str]]] = {
    "hessian_free": (
        lk.optim.hessian_free,
        {
            "levenberg": "tau=", "cg_tol": "termination=lk.optim.cg.Progress(tolerance=...)", "lambda_": "tau=",
            "max_cg_iters": "recipe=lk.optim.Recipe(limit=...)", "delta_decay": "momentum=", "radius": "trust_radius=",
            "use_adaptive_damping": "adapt_tau=", "weight_decay": "l2=", "norm_constraint": "trust_radius=",
            "min_damping": "tau_rule=lk.optim.LevenbergMarquardt(...)", "line_search": "recipe=",
            "curvature_ema": "ema=",
        },
    ),
    "natural_gradient": (lk.optim.natural_gradient, {"cg_tol": "termination=lk.optim.cg.Progress(tolerance=...)"}),
    "kfac": (
        lk.optim.kfac,
        {
            "initial_damping": "zeta=", "inverse_update_period": "refresh=", "stat_decay": "ema=", "lr_": "lr=",
            "norm_constraint": "rescale=True", "kfac_approx": "sharing=", "estimation_mode": "estimator=",
            "learning_rate": "lr=", "nesterov": "momentum=", "eps": "zeta=", "mc_samples": "samples=",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_options_of_neighbours_are_named(name: str) -> None:
    make, words = NEIGHBOURS[name]
    for word, meant in words.items():
        with pytest.raises(lk.errors.UnknownOption, match=f"option {word!r}") as caught:
            make(nn.Linear(2, 2), "categorical", **{word: 1.0})
        assert re.search(rf"(Use|Did you mean) {re.escape(meant)}", str(caught.value))


def test_values_of_neighbours_are_named() -> None:
    for name, given, meant in [
        ("preconditioner", "kfac", "kronecker"), ("preconditioner", "jacobi", "diagonal"),
        ("distance", "mse", "squared"),
        ("distance", "kl", "cross_entropy"), ("penalty", "levenberg", "identity"), ("penalty", "ggn", "curvature"),
        ("penalty", "marquardt", "diagonal"), ("recipe", "martens", "original"), ("damping", "pi", "balanced"),
    ]:  # fmt: skip
        with pytest.raises(lk.errors.UnknownName, match=f"Did you mean {meant!r}"):
            lk.optim.hessian_free(
                nn.Linear(2, 2),
                "categorical",
                **{"preconditioner": "kronecker", name: given},  # type: ignore[arg-type]
            )


def test_kinds_of_values_are_refused_with_the_argument_that_is_meant() -> None:
    for make in (lk.optim.kfac, lk.optim.hessian_free):
        with pytest.raises(lk.errors.UnknownName, match=r"zeta=0\.1 for an optimiser"):
            make(nn.Linear(2, 2), "categorical", damping=0.1)
        with pytest.raises(lk.errors.IncompatiblePair, match=r"momentum must be True or False.*got 0\.9"):
            make(nn.Linear(2, 2), "categorical", momentum=0.9)
    for wrong in (True, False, 3):
        with pytest.raises(lk.errors.IncompatiblePair, match='none is preconditioner="none"'):
            lk.optim.hessian_free(nn.Linear(2, 2), "categorical", preconditioner=wrong)


def test_kfac_leaves_tau_between_a_quarter_and_three_quarters() -> None:
    """Methods 6.2: τ is raised below ρ = ¼, lowered above ¾, and left alone between them."""
    rule = lk.optim.kfac(ref.net([2, 2]), "categorical").tau_rule
    assert [rule.adapted(1.0, rho) for rho in (0.26, 0.5, 0.74)] == [1.0, 1.0, 1.0]
    assert rule.adapted(1.0, 0.24) > 1.0 > rule.adapted(1.0, 0.76)


def test_two_directions_that_are_nearly_one_count_as_one() -> None:
    """Methods 6.2: beyond rounding there is no second coefficient to be had, only large numbers that cancel."""
    products = torch.tensor([[1.0, 1.0 - 1e-14], [1.0 - 1e-14, 1.0]], dtype=torch.float64)
    coefficients = optimal_coefficients(products, torch.tensor([-1.0, -1.0 - 1e-6], dtype=torch.float64))
    assert coefficients.tolist() == [1.0, 0.0]
