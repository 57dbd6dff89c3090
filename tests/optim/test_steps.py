"""Whole optimisation runs against dense references: α*, (α, μ), τ, ζ and γ, EMA, refresh (methods 6.1, 6.2, 14)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair
from laplace_kf.optim.damping import StartSearch, ratio
from laplace_kf.optim.objective import Objective
from laplace_kf.optim.running import Running
from tests import oracles
from tests.optim import reference as ref

STEPS = 22  # past the first search for ζ (20) and several adaptations of τ (5)


def run(opt: Any, dense: ref.Reference, batches: list[tuple[Tensor, Tensor]]) -> None:
    for number, (x, y) in enumerate(batches):
        expected = dense.step(x, y)
        found = float(opt.step(x, y))
        assert found == pytest.approx(expected, rel=1e-8), number
        for key, value in dense.log[-1].items():
            assert opt.diagnostics[key] == pytest.approx(value, rel=1e-5, abs=1e-11, nan_ok=True), (number, key)
        assert opt.diagnostics["rejected"] == 0
        torch.testing.assert_close(
            oracles.flat_parameters(opt.model), oracles.flat_parameters(dense.model), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("damping", ["exact", "factored", "balanced"])
@pytest.mark.parametrize("estimator", ["exact", "recursive"])
def test_botev_steps(estimator: str, damping: str) -> None:
    nll = oracles.categorical_nll
    factors = {"exact": ref.kflr, "recursive": ref.kfra}[estimator](nll)
    batches = [ref.batch(4, 3, 3, seed) for seed in range(9)]
    model = ref.net([3, 3, 3])
    dense = ref.Reference(
        ref.net([3, 3, 3]), nll, factors, 0.7, 9.0, l2=1e-2, damping=damping, ema=0.9, tau_every=2, zeta_every=3
    )
    opt = lk.optim.GaussNewton(
        model, "categorical", estimator, tau=0.7, zeta=9.0, l2=1e-2, damping=damping, ema=0.9,
        tau_rule=lk.optim.LevenbergMarquardt(every=2), zeta_rule=lk.optim.GreedySearch(every=3),
    )  # fmt: skip
    run(opt, dense, batches)
    assert dense.zeta != 9.0 and dense.tau != 0.7  # both rules acted


@pytest.mark.parametrize("every", [1, 2, 4])
def test_martens_steps(every: int) -> None:
    """Momentum, dead zone for τ, γ in place of ζ, stale inverses and factors; the first has no previous update."""
    nll = oracles.bernoulli_nll
    rng = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(4, 2, generator=rng, dtype=torch.float64), torch.rand(4, 2, generator=rng, dtype=torch.float64))
        for _ in range(STEPS)
    ]
    dense = ref.Reference(
        ref.net([2, 3, 2]), nll, ref.kflr(nll), 0.5, 0.5, l2=1e-2, momentum=True, ema=0.95, refresh=4, low=0.25,
        gamma=True, factors_every=every,
    )  # fmt: skip
    opt = lk.optim.kfac(
        ref.net([2, 3, 2]), "bernoulli", estimator="exact", tau=0.5, zeta=0.5, l2=1e-2, refresh=4, factors_every=every
    )
    run(opt, dense, batches)
    assert dense.log[0]["mu"] == 0.0 and dense.log[1]["mu"] != 0.0
    assert dense.zeta != 0.5 and dense.tau != 0.5


@pytest.mark.parametrize("given", [{}, {"tau": 0.3}, {"zeta": 0.3}])
def test_start_of_the_damping_is_the_best_of_a_ladder(given: dict[str, float]) -> None:
    """Against one dense step for every pair: the smallest ζ that does as well, the largest τ that is harmless."""
    nll, (x, y), l2 = oracles.categorical_nll, ref.batch(7, 3, 3, 0), 1e-2
    ladder = [30.0**-k for k in range(6)]
    pairs = [(given.get("tau", t), given.get("zeta", z)) for t in ladder for z in ladder]
    decrease: dict[tuple[float, float], float] = {}
    start = ref.net([3, 3, 3])  # all pairs start here: its curvature is computed once
    blocks, exact = ref.kflr(nll)(start, x, y), oracles.dense_ggn(start, x, y, nll)
    for tau, zeta in pairs:
        dense = ref.Reference(ref.net([3, 3, 3]), nll, lambda *_: blocks, tau, zeta, l2=l2, exact=lambda *_: exact)
        before = dense.step(x, y)
        weights = oracles.flat_parameters(dense.model)
        decrease[tau, zeta] = before - ref.mean_nll(dense.model, x, y, nll) - l2 / 2 * float(weights @ weights)
    zeta = min(pair[1] for pair in pairs if decrease[pair] >= 0.9 * max(decrease.values()))
    best = max(decrease[pair] for pair in pairs if pair[1] == zeta)
    expected = max(pair[0] for pair in pairs if pair[1] == zeta and decrease[pair] >= 0.99 * best), zeta
    model = ref.net([3, 3, 3])
    opt = lk.optim.GaussNewton(model, "categorical", "exact", l2=l2, search_start=True, **given)
    before = float(opt.step(x, y))
    assert (opt.diagnostics["tau"], opt.diagnostics["zeta"]) == pytest.approx(expected, rel=1e-12)
    weights = oracles.flat_parameters(model)
    after = ref.mean_nll(model, x, y, nll) + l2 / 2 * float(weights @ weights)
    assert before - after == pytest.approx(decrease[expected], rel=1e-6)
    opt.step(x, y)
    assert opt.diagnostics["zeta"] == pytest.approx(expected[1])  # only the first step searches


def test_start_values_without_a_decrease_stay() -> None:
    search = StartSearch()
    assert search.chosen({(1.0, 1.0): -1.0, (0.1, 0.1): math.nan}) is None
    assert search.chosen({}) is None
    nearly = {
        (9.0, 0.1): 0.85,
        (0.5, 0.1): 0.945,
        (0.2, 0.1): 0.95,
        (9.0, 0.01): 0.8,
        (1.0, 0.5): 1.0,
        (2.0, 0.5): math.inf,
    }
    assert search.chosen(nearly) == (0.5, 0.1)


def test_fixed_damping_stays() -> None:
    opt = lk.optim.GaussNewton(ref.net([3, 4, 3]), "categorical", tau=0.7, zeta=0.3, adapt_tau=False, adapt_zeta=False)
    for seed in range(STEPS):
        opt.step(*ref.batch(6, 3, 3, seed))
    assert (opt.diagnostics["tau"], opt.diagnostics["zeta"]) == (0.7, 0.3)
    assert math.isnan(opt.diagnostics["rho"])


def test_kfac_with_momentum_is_preconditioned_cg_on_a_quadratic() -> None:
    """Methods 6.2, 14 T16: same iterates as PCG with the damped Kronecker matrix as preconditioner."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=rng, dtype=torch.float64) @ torch.diag(
        torch.tensor([3.0, 1, 1, 0.3, 0.1]).double()
    )
    y = torch.randn(30, 2, generator=rng, dtype=torch.float64)
    model, l2, zeta = ref.net([5, 2]), 1e-2, 0.3
    nll = oracles.gaussian_nll(1.0)
    hessian = oracles.dense_ggn(model, x, y, nll)
    hessian = hessian + l2 * torch.eye(len(hessian), dtype=torch.float64)
    theta = oracles.flat_parameters(model)
    b = -(ref.gradient(model, x, y, nll) + l2 * theta)
    blocks = ref.kflr(nll)(model, x, y)
    metric = oracles.assemble(blocks, len(theta), lambda block: ref.damped_block(block, zeta + l2, "balanced"))
    opt = lk.optim.kfac(
        model, "gaussian", estimator="exact", tau=0.0, zeta=zeta, l2=l2, adapt_tau=False, adapt_zeta=False
    )
    iterate, residual = torch.zeros_like(b), b.clone()
    z = torch.linalg.solve(metric, residual)
    p = z.clone()
    for _ in range(8):
        opt.step(x, y)
        curved = hessian @ p
        length = (residual @ z) / (p @ curved)
        iterate, fresh = iterate + length * p, residual - length * curved
        z_new = torch.linalg.solve(metric, fresh)
        p = z_new + (fresh @ z_new) / (residual @ z) * p
        residual, z = fresh, z_new
        torch.testing.assert_close(oracles.flat_parameters(model), theta + iterate, rtol=1e-8, atol=1e-10)
    assert opt.diagnostics["mu"] != 0


def test_ekfac_direction() -> None:
    """The gradient through exact second moments in the Kronecker eigenbases, plus ζ."""
    model = ref.net([3, 3])
    x, y = ref.batch(9, 3, 3)
    theta = oracles.flat_parameters(model)
    (block,) = ref.kflr(oracles.categorical_nll)(model, x, y)
    bases = torch.kron(torch.linalg.eigh(block.G)[1], torch.linalg.eigh(block.A)[1])
    index = block.index.reshape(-1)
    exact = oracles.dense_ggn(model, x, y, oracles.categorical_nll)[index[:, None], index[None, :]]
    grid = (bases.T @ exact @ bases).diagonal()
    g = ref.gradient(model, x, y, oracles.categorical_nll)[index]
    expected = -bases @ ((bases.T @ g) / (grid + 0.3))
    opt = lk.optim.ekfac(model, "categorical", estimator="exact", zeta=0.3, tau=0.1, l2=0.0)
    opt.step(x, y)
    found = (oracles.flat_parameters(model) - theta)[index] / opt.diagnostics["alpha"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_lm_ratio_is_one_on_a_quadratic() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    opt = lk.optim.kflr(ref.net([3, 2]), "gaussian", tau=0.0, zeta=0.1, l2=0.1, adapt_zeta=False)
    for _ in range(5):
        opt.step(x, y)
    assert opt.diagnostics["rho"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("rho", "low", "expected"),
    [(0.8, 0.75, 0.5), (0.5, 0.75, 2.0), (0.5, 0.25, 1.0), (0.1, 0.25, 2.0), (-math.inf, 0.25, 2.0), (None, 0.25, 1.0)],
)
def test_levenberg_marquardt_thresholds(rho: float | None, low: float, expected: float) -> None:
    rule = lk.optim.LevenbergMarquardt(factor=0.5, low=low, high=0.75)
    assert rule.adapted(1.0, rho) == expected


def test_ratio_is_left_out_below_the_rounding_of_the_objective() -> None:
    assert ratio(100.0, 99.999_999, -2e-6, torch.float64) == pytest.approx(0.5, rel=1e-6)
    assert ratio(100.0, 99.999_999, -2e-6, torch.float32) is None
    assert ratio(100.0, 100.0, 0.0, torch.float64) is None
    assert ratio(100.0, math.nan, -1.0, torch.float64) == -math.inf


def test_plain_factored_tikhonov_updates() -> None:
    """Methods 6.4: γ I on both factors, no rescaling, no adaptation."""
    nll, gamma = oracles.categorical_nll, 0.6
    model = ref.net([3, 4, 3])
    opt = lk.optim.GaussNewton(
        model, "categorical", "exact", damping="factored", zeta=gamma**2, rescale=False, adapt_tau=False,
        adapt_zeta=False, ema=0.0, lr=0.1,
    )  # fmt: skip
    for seed in range(3):
        x, y = ref.batch(20, 3, 3, seed)
        theta, g = oracles.flat_parameters(model), ref.gradient(model, x, y, nll)
        expected = torch.zeros_like(theta)
        for block in ref.kflr(nll)(model, x, y):
            index = block.index.reshape(-1)
            damped = ref.damped_block(block, gamma**2, "factored")
            expected[index] = -0.1 * torch.linalg.solve(damped, g[index])
        opt.step(x, y)
        torch.testing.assert_close(oracles.flat_parameters(model) - theta, expected)
        assert opt.diagnostics["alpha"] == 1.0
    with pytest.raises(IncompatiblePair, match="rescale"):
        lk.optim.kfac(model, "categorical", rescale=False)


def test_no_curvature_along_the_direction_makes_no_step_and_raises_tau() -> None:
    """Methods 6.1: a softmax that is 0 and 1 to the last bit has a gradient and no curvature."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2000.0], [-2000.0]]))
    opt = lk.optim.kflr(model, "categorical", tau=0.0, zeta=1.0, l2=0.0)
    opt.step(torch.ones(4, 1).double(), torch.ones(4).long())
    assert opt.diagnostics["alpha"] == 0.0 and opt.diagnostics["tau"] > 0
    assert float(model.weight[0]) == 2000.0
    opt.step(torch.ones(4, 1).double(), torch.ones(4).long())
    assert float(model.weight[0].detach()) < 2000.0


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
@pytest.mark.parametrize("seed", [0, 1])
def test_undamped_updates_are_invariant(inverse: str, seed: int) -> None:
    """Methods 5.8: tanh units against units seen through affine maps Ω, Φ move in the same way."""
    rng = torch.Generator().manual_seed(seed)

    def near_identity(d: int) -> Tensor:
        return torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=rng, dtype=torch.float64) / d

    x = torch.randn(60, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(60, 3, generator=rng, dtype=torch.float64)
    plain = Affine([torch.eye(4).double()] * 3, [torch.eye(3).double()] * 3)
    omegas = [_affine(near_identity(3), torch.randn(3, generator=rng, dtype=torch.float64)) for _ in range(3)]
    phis = [near_identity(3) for _ in range(3)]
    other = Affine(omegas, phis)
    with torch.no_grad():  # W = Φ W† Ω
        for w, w_other, phi, omega in zip(plain.weights(), other.weights(), phis, omegas, strict=True):
            w.copy_(0.7 * torch.randn(w.shape, generator=rng, dtype=torch.float64))
            w_other.copy_(torch.linalg.inv(phi) @ w @ torch.linalg.inv(omega))
    torch.testing.assert_close(plain(x), other(x))
    changes = []
    for model in (plain, other):
        before = [w.clone() for w in model.weights()]
        opt = lk.optim.GaussNewton(
            model,
            "gaussian",
            "exact",
            tau=0.0,
            zeta=0.0,
            inverse=inverse,
            damping="factored",
            ema=0.0,
            max_rise=math.inf,  # undamped steps may be long ones
        )
        opt.step(x, y)
        assert opt.diagnostics["alpha"] > 0
        changes.append([w.detach() - b for w, b in zip(model.weights(), before, strict=True)])
    for change, change_other, phi, omega in zip(*changes, phis, omegas, strict=True):
        expected = phi @ change_other @ omega
        assert float((change - expected).norm() / change.norm()) < 1e-8


def _affine(matrix: Tensor, shift: Tensor) -> Tensor:
    """``â ↦ Ω â`` on homogeneous inputs ``(4, 4)``; the constant 1 stays 1."""
    out = torch.zeros(4, 4, dtype=torch.float64)
    out[:3, :3], out[:3, 3], out[3, 3] = matrix, shift, 1.0
    return out


class Affine(nn.Module):
    """``s = W† Ω [φ(Φ s_prev); 1]`` with three layers of three units; weights are ``[W|b]`` as ``nn.Linear``."""

    def __init__(self, omegas: list[Tensor], phis: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in range(3))
        self.omegas, self.phis = omegas, phis

    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        a = x
        for k, layer in enumerate(self.layers):
            ones = a.new_ones(a.shape[0], 1)
            s = layer(torch.cat([a, ones], 1) @ self.omegas[k].T) @ self.phis[k].T
            a = torch.tanh(s)
        return s


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_factors_of_some_steps_only(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minibatches in between are not measured; a state that is loaded goes on in the same rhythm."""
    settings: dict[str, Any] = {"structure": structure, "refresh": 4, "factors_every": 4, "ema": 0.9, "zeta": 0.3}
    if structure != "kron":
        settings["damping"] = "exact"
    taken: list[int] = []
    take = Running.take
    monkeypatch.setattr(Running, "take", lambda self, part, step: (taken.append(step + 1), take(self, part, step))[1])
    opt = lk.optim.GaussNewton(ref.net([3, 4, 3]), "categorical", "exact", **settings)
    other = lk.optim.GaussNewton(ref.net([3, 4, 3]), "categorical", "exact", **settings)
    for number in range(13):
        opt.step(*ref.batch(6, 3, 3, number))
        if number == 5:
            other.load_state_dict(opt.state_dict())
            other.model.load_state_dict(opt.model.state_dict())
    assert taken == [1, 2, 3, 4, 8, 12]
    for number in range(6, 13):
        other.step(*ref.batch(6, 3, 3, number))
    torch.testing.assert_close(oracles.flat_parameters(other.model), oracles.flat_parameters(opt.model), rtol=0, atol=0)
    with pytest.raises(IncompatiblePair, match="does not divide refresh=4"):
        lk.optim.GaussNewton(ref.net([3, 4, 3]), "categorical", "exact", **{**settings, "factors_every": 3})


def test_no_products_where_nothing_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step length and without a ratio to measure, the exact curvature is not multiplied with anything."""
    nll, (x, y) = oracles.categorical_nll, ref.batch(6, 3, 3, 0)
    plain: dict[str, Any] = {"rescale": False, "adapt_tau": False, "adapt_zeta": False, "zeta": 0.3, "tau": 0.3}
    opt = lk.optim.GaussNewton(ref.net([3, 4, 3]), "categorical", "exact", lr=0.1, **plain)
    monkeypatch.setattr(Objective, "products", lambda *given: pytest.fail("a product"))
    model = ref.net([3, 4, 3])
    theta = oracles.flat_parameters(model)
    blocks = ref.kflr(nll)(model, x, y)
    metric = oracles.assemble(blocks, len(theta), lambda block: ref.damped_block(block, 0.3, "balanced"))
    opt.step(x, y)
    wanted = theta - 0.1 * torch.linalg.solve(metric, ref.gradient(model, x, y, nll))
    torch.testing.assert_close(oracles.flat_parameters(opt.model), wanted, rtol=1e-8, atol=1e-10)
    assert math.isnan(opt.diagnostics["model_decrease"]) and "model_decrease" not in opt.progress()
