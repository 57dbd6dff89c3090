"""CG variants, structural damping, and whole Hessian-free steps against dense float64 references (methods 7)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.engine import Accumulator
from laplace_kf.errors import IncompatiblePair, UnknownName
from laplace_kf.optim.cg import Progress, Run, conjugate_gradients
from laplace_kf.optim.exact_curvature import DISTANCES, ExactCurvature
from laplace_kf.optim.objective import Batch, Objective
from laplace_kf.optim.recipes import backtracked, falling_back, last, smallest, worse_than_before
from laplace_kf.optim.stepsize import line_search
from laplace_kf.tape import Tracer
from tests import oracles
from tests.cases import rng
from tests.optim import reference as ref

NEVER = Progress(0.0)


def system(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    d = len(values)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, torch.randn(d, generator=rng).double()


def krylov_minimum(a: Tensor, b: Tensor, x0: Tensor, p: Tensor, steps: int) -> Tensor:
    """Minimiser of q over ``x0 + span{M r, (M A) M r, ...}`` with ``M = P⁻¹``, by dense least squares."""
    m = torch.linalg.inv(p)
    vectors = [m @ (b - a @ x0)]
    for _ in range(steps - 1):
        vectors.append(m @ a @ vectors[-1])
    basis, _ = torch.linalg.qr(torch.stack([v / v.norm() for v in vectors], 1))
    return x0 + basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ (b - a @ x0))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_is_optimal_over_its_krylov_space(preconditioned: bool, start: bool) -> None:
    a, b = system([1.0, 2, 4, 7, 9, 20])
    p = torch.diag(a.diagonal()) if preconditioned else torch.eye(6, dtype=torch.float64)
    x0 = torch.ones(6, dtype=torch.float64) if start else torch.zeros(6, dtype=torch.float64)
    for steps in range(1, 6):
        run = conjugate_gradients(
            lambda v: a @ v,
            b,
            start=x0 if start else None,
            precondition=(lambda r: torch.linalg.solve(p, r)) if preconditioned else None,
            limit=steps,
            progress=NEVER,
        )
        expected = krylov_minimum(a, b, x0, p, steps)
        torch.testing.assert_close(run.x, expected, rtol=1e-8, atol=1e-10)
        q = 0.5 * expected @ a @ expected - b @ expected
        assert run.values[-1] == pytest.approx(float(q), rel=1e-9)
        assert run.kept[-1][0] == steps and torch.equal(run.kept[-1][1], run.x)


def test_cg_takes_as_many_steps_as_there_are_eigenvalues() -> None:
    a, b = system([2.0, 2, 2, 5, 5, 5])
    run = conjugate_gradients(lambda v: a @ v, b, limit=2, progress=NEVER)
    torch.testing.assert_close(run.x, torch.linalg.solve(a, b))
    once = conjugate_gradients(lambda v: a @ v, b, precondition=lambda r: torch.linalg.solve(a, r), limit=1)
    torch.testing.assert_close(once.x, torch.linalg.solve(a, b))


def test_cg_stops_by_progress_at_zero_residual_and_at_negative_curvature() -> None:
    a, b = system([float(k) for k in range(1, 41)])
    run = conjugate_gradients(lambda v: a @ v, b, progress=Progress(1e-2, 3))
    j = len(run.values) - 1
    window = [(run.values[i] - run.values[i - 3]) / run.values[i] for i in range(4, j + 1)]
    assert run.reason == "progress" and window[-1] < 1e-2 and all(s >= 1e-2 for s in window[:-1])
    assert not Progress(1e-2, 3).stops([5.0, 4.0, 3.9, 3.9, 3.9, 3.9])  # above M(0): a warm start, never stop
    assert conjugate_gradients(lambda v: a @ v, torch.zeros(40).double()).reason == "solved"
    indefinite = torch.diag(torch.tensor([1.0, -1.0]).double())
    assert conjugate_gradients(lambda v: indefinite @ v, torch.ones(2).double()).reason == "negative curvature"


@pytest.mark.parametrize("radius", [0.1, 0.5, 100.0])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_steihaug_stays_inside_and_beats_the_cauchy_point(radius: float, preconditioned: bool) -> None:
    a, b = system([1.0, 3, 4, 7, 9])
    p = torch.diag(a.diagonal()) if preconditioned else torch.eye(5, dtype=torch.float64)
    run = conjugate_gradients(
        lambda v: a @ v, b, radius=radius, progress=NEVER,
        precondition=lambda r: torch.linalg.solve(p, r), metric=lambda v: p @ v,
    )  # fmt: skip
    size = float((run.x @ p @ run.x).sqrt())
    newton = torch.linalg.solve(a, b)
    if float((newton @ p @ newton).sqrt()) < radius:
        torch.testing.assert_close(run.x, newton)
    else:
        assert size == pytest.approx(radius, rel=1e-9) and run.reason == "boundary"
    # exact solution of min q s.t. ‖x‖_P ≤ r by bisection on the multiplier: at least half of its decrease
    low, high = 0.0, 1e6
    for _ in range(200):
        mid = (low + high) / 2
        x = torch.linalg.solve(a + mid * p, b)
        low, high = (mid, high) if float((x @ p @ x).sqrt()) > radius else (low, mid)
    best = float(0.5 * x @ a @ x - b @ x)
    assert run.values[-1] <= 0.5 * best
    with pytest.raises(ValueError, match="zero start"):
        conjugate_gradients(lambda v: a @ v, b, radius=1.0, start=b)


def test_steihaug_follows_negative_curvature_to_the_boundary() -> None:
    a = torch.diag(torch.tensor([1.0, -1.0]).double())
    run = conjugate_gradients(lambda v: a @ v, torch.tensor([1.0, 1.0]).double(), radius=2.0)
    assert run.reason == "boundary" and float(run.x.norm()) == pytest.approx(2.0)


def test_choosing_an_iterate() -> None:
    points = [(k, torch.tensor([float(k)])) for k in (1, 2, 3, 5, 7)]
    run = Run(points[-1][1], [0.0], points)
    scores = {1.0: 9.0, 2.0: 1.0, 3.0: 4.0, 5.0: 3.0, 7.0: 6.0}

    def value(x: Tensor) -> float:
        return scores[float(x)]

    assert float(backtracked(run, value)) == 5.0  # the walk stops at 3, which is worse, and never sees 2
    assert float(smallest(run, value)) == 2.0
    assert float(last(run, value)) == 7.0
    scores[7.0] = float("nan")
    assert float(backtracked(run, value)) == 5.0
    assert falling_back([1.0, 2.0, 1.7]) and not falling_back([1.0, 2.0, 1.9]) and not falling_back([-1.0, -2.0])
    assert worse_than_before([1.0, 1.1, 1.1, 0.9]) and not worse_than_before([1.0, 1.1, 1.2, 1.3])


def test_line_search() -> None:
    """On E(α) = α² − α the condition with c holds for α ≤ 1 − c."""
    alpha, value = line_search(lambda a: a * a - a, 0.0, -1.0, sufficient=0.5, shrink=0.8)
    assert alpha == pytest.approx(0.8**4) and value == pytest.approx(alpha**2 - alpha)
    assert line_search(lambda a: float("nan"), 3.0, -1.0) == (0.0, 3.0)


class Recurrent(nn.Module):
    def __init__(self, cell: bool = False, logistic: bool = False) -> None:
        super().__init__()
        self.cell, self.logistic = cell, logistic
        self.squash = nn.Sigmoid() if logistic else nn.Identity()
        self.rnn = nn.RNNCell(2, 3) if cell else nn.RNN(2, 3, batch_first=True)
        self.out = nn.Linear(3, 2)
        self.double()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for p in self.parameters():
                nn.init.normal_(p, std=0.6)

    def hidden(self, x: Tensor) -> Tensor:
        if not self.cell:
            return self.squash(self.rnn(x)[0])
        h, states = None, []
        for t in range(x.shape[1]):
            h = self.squash(self.rnn(x[:, t], h))
            states.append(h)
        return torch.stack(states, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x)[:, -1])


def jacobian_of(f: Any, model: nn.Module) -> Tensor:
    """Rows: flattened outputs of ``f()``, columns: parameters."""
    out = f().reshape(-1)
    rows = []
    for value in out:
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, model.parameters(), strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("distance", ["squared", "cross_entropy"])
def test_structural_damping_products(distance: str, cell: bool, forward_mode: bool) -> None:
    """``(G + μ D) v`` with ``D = E[J_cᵀ H_d J_c]`` from dense Jacobians."""
    model, mu = Recurrent(cell, distance == "cross_entropy"), 0.3
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    dense = oracles.dense_ggn(model, x, y, oracles.categorical_nll)
    for i in range(4):
        jac = jacobian_of(lambda i=i: model.hidden(x[i : i + 1]), model)
        c = model.hidden(x[i : i + 1]).detach().reshape(-1)
        metric = torch.ones_like(c) if distance == "squared" else 1 / (c * (1 - c)).clamp_min(1e-4)
        dense = dense + mu / 4 * jac.T @ torch.diag(metric) @ jac
    objective = Objective(model, lk.likelihoods.Categorical(), None)
    objective._forward_mode = forward_mode
    objective.hidden = [model.squash if model.logistic else model.rnn]
    batch = Batch((x, y), 4, objective.random_state())
    weights = dict(model.named_parameters())
    matrix = ExactCurvature(objective, [batch], weights, mu, DISTANCES[distance])
    v = torch.randn(len(dense), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts, start = {}, 0
    for name, p in weights.items():
        parts[name] = v[start : start + p.numel()].view(p.shape)
        start += p.numel()
    found = torch.cat([part.reshape(-1) for part in matrix.product(parts)])
    torch.testing.assert_close(found, dense @ v, rtol=1e-9, atol=1e-11)
    assert objective._forward_mode is forward_mode


def hidden_curvature(model: Recurrent, x: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """Jacobian of all activities ``(N·T·H, P)`` and the diagonal of ``H_d``, dense."""
    jac = torch.cat([jacobian_of(lambda i=i: model.hidden(x[i : i + 1]), model) for i in range(len(x))])
    c = model.hidden(x).detach().reshape(-1)
    return jac, torch.ones_like(c) if distance == "squared" else 1 / (c * (1 - c)).clamp_min(1e-4)


def signs_of(seed: int, shape: tuple[int, ...], samples: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([2.0 * torch.randint(2, shape, generator=rng).double() - 1 for _ in range(samples)]).flatten(1)


@pytest.mark.parametrize("distance", ["squared", "cross_entropy"])
def test_diagonal_of_the_structural_damping(distance: str) -> None:
    """The formula for given signs, and its mean against ``diag(J_cᵀ H_d J_c)``."""
    model, mu = Recurrent(logistic=distance == "cross_entropy"), 0.3
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jac, metric = hidden_curvature(model, x, distance)
    objective = Objective(model, lk.likelihoods.Categorical(), None)
    objective.hidden = [model.squash if model.logistic else model.rnn]
    batch = Batch((x, torch.tensor([0, 1, 1, 0])), 4, objective.random_state())
    matrix = ExactCurvature(objective, [batch], dict(model.named_parameters()), mu, DISTANCES[distance])

    def found(samples: int) -> Tensor:
        parts = matrix.hidden_diagonal(torch.Generator().manual_seed(1), samples)
        return torch.cat([part.reshape(-1) for part in parts.values()])

    def formula(samples: int) -> Tensor:
        return mu / 4 * ((metric.sqrt() * signs_of(1, (4, 5, 3), samples)) @ jac).square().mean(0)

    torch.testing.assert_close(found(6), formula(6), rtol=1e-10, atol=1e-14)
    dense = mu / 4 * (jac.square() * metric[:, None]).sum(0)
    assert float((formula(2000) - dense).norm() / dense.norm()) < 0.05
    assert float(found(1)[-8:].abs().max()) == 0  # the output layer moves no activity


def test_diagonal_preconditioner_is_of_the_damped_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """``P = (diag(F) + μ diag(D) + λ + η)^¾`` with structural damping (methods 7.6)."""
    from laplace_kf.optim import newton_cg

    solvers: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Run:
        solvers.append(kwargs["precondition"])
        return conjugate_gradients(*args, **kwargs)

    monkeypatch.setattr(newton_cg, "conjugate_gradients", spy)
    model, mu, l2, tau = Recurrent(), 0.3, 1e-2, 0.4
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    jac, metric = hidden_curvature(model, x, "squared")
    fisher = oracles.empirical_fisher(model, x, y, oracles.categorical_nll).diagonal()
    hidden = mu / 4 * ((metric.sqrt() * signs_of(7, (4, 5, 3), 16)) @ jac).square().mean(0)
    opt = lk.optim.hessian_free(
        model, "categorical", structural_damping=mu, preconditioner="diagonal", l2=l2, tau=tau,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    opt.step(x, y)
    r = torch.randn(len(fisher), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(solvers[0](r), r / (fisher + hidden + tau + l2) ** 0.75, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preconditioner", ["none", "diagonal", "kronecker"])
def test_converged_steps_are_damped_newton_steps(preconditioner: str) -> None:
    """CG run to the end: δ = −(G + (λ + η) I)⁻¹∇E, line search, and λ by the undamped model."""
    nll = oracles.categorical_nll
    model, l2, tau = ref.net([3, 3, 3]), 1e-2, 0.4
    rng = torch.Generator().manual_seed(0)
    opt = lk.optim.hessian_free(
        model, "categorical", l2=l2, tau=tau, preconditioner=preconditioner, generator=rng,
        recipe=lk.optim.Recipe(limit=40, decay=0.9, choose=last), termination=NEVER,
    )  # fmt: skip
    for seed in range(4):
        x, y = ref.batch(12, 3, 3, seed)
        theta = oracles.flat_parameters(model)
        g = ref.gradient(model, x, y, nll) + l2 * theta
        exact = oracles.dense_ggn(model, x, y, nll) + l2 * torch.eye(len(theta)).double()
        delta = -torch.linalg.solve(exact + tau * torch.eye(len(theta)).double(), g)

        def energy(flat: Tensor, x: Tensor = x, y: Tensor = y) -> float:
            return ref.mean_nll(ref.put(model, flat), x, y, nll) + l2 / 2 * float(flat @ flat)

        start, change = energy(theta), float(g @ delta + 0.5 * delta @ exact @ delta)
        rho = (energy(theta + delta) - start) / change
        alpha = 1.0
        while energy(theta + alpha * delta) > start + 1e-2 * alpha * float(g @ delta):
            alpha *= 0.8
        tau = tau * 2 / 3 if rho > 0.75 else tau * 3 / 2 if rho < 0.25 else tau
        assert float(opt.step(x, y)) == pytest.approx(start, rel=1e-10)
        torch.testing.assert_close(oracles.flat_parameters(model), theta + alpha * delta, rtol=1e-6, atol=1e-8)
        assert opt.diagnostics["rho"] == pytest.approx(rho, rel=1e-5)
        assert opt.diagnostics["tau"] == pytest.approx(tau, rel=1e-12)
        assert opt.diagnostics["alpha"] == pytest.approx(alpha)


def likelihood_fisher(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Diagonal of the mean of squared scores of given labels."""
    scores = [ref.gradient(model, x[i : i + 1], labels[i : i + 1], oracles.categorical_nll) for i in range(len(x))]
    return torch.stack(scores).square().mean(0)


@pytest.mark.parametrize("reduction", ["undamped", "damped"])
@pytest.mark.parametrize(
    "penalty", ["identity", "diagonal", "scale_sensitive", "sampled_diagonal", "preconditioner", "curvature"]
)
def test_damping_matrices_and_the_ratio(penalty: str, reduction: str) -> None:
    """``−(G + η I + λ D)⁻¹ ∇E`` and ρ with and without λ D, dense, on a curvature batch of its own."""
    nll, tau, l2 = oracles.categorical_nll, 0.4, 1e-2
    model = ref.net([3, 3, 3])
    x, y = ref.batch(12, 3, 3, 0)
    x2, y2 = ref.batch(9, 3, 3, 1)
    theta = oracles.flat_parameters(model)
    eye = torch.eye(len(theta)).double()
    exact = oracles.dense_ggn(model, x2, y2, nll)
    undamped = exact + l2 * eye
    settings: dict[str, Any] = {"scale_sensitive": True} if penalty == "scale_sensitive" else {"penalty": penalty}
    d = {"identity": eye, "curvature": undamped}.get(penalty)
    if penalty in ("diagonal", "scale_sensitive"):
        d = torch.diag(exact.diagonal())
    elif penalty == "sampled_diagonal":
        rules = lk.curvature.make_estimator("sampled"), lk.curvature.make_structure("diag")
        drawn = Accumulator(Tracer(model, None), lk.likelihoods.get_likelihood("categorical"), *rules, rng(3))
        drawn.add((x2, y2), 0)  # draws of a step come from the stream, those of a fit belong to its examples
        d = torch.diag(drawn.freeze().mean().diag())
        often = (x2.repeat(50, 1), y2.repeat(50))  # as many draws as 4000 of each
        far = lk.curvature.estimate(model, "categorical", often, "diag", "sampled", samples=80, generator=rng(3))
        assert float((far.mean().diag() - exact.diagonal()).norm() / exact.diagonal().norm()) < 0.05
    elif penalty == "preconditioner":
        settings["preconditioner"] = "kronecker"
        settings["estimator"] = "exact"
        d = oracles.assemble(ref.kflr(nll)(model, x2, y2), len(theta), lambda b: torch.kron(b.G, b.A))
    assert d is not None
    if "estimator" in settings:
        del settings["estimator"]
        settings["preconditioner"] = lk.optim.Preconditioner("kron", "exact", "balanced")
    g = ref.gradient(model, x, y, nll) + l2 * theta
    damped = undamped + tau * d
    delta = -torch.linalg.solve(damped, g)
    opt = lk.optim.hessian_free(
        model, "categorical", tau=tau, l2=l2, reduction=reduction, generator=rng(3),
        recipe=lk.optim.Recipe(limit=40, choose=last), termination=NEVER, **settings,
    )  # fmt: skip
    opt.step(x, y, curvature=(x2, y2))
    found = (oracles.flat_parameters(model) - theta) / opt.diagnostics["alpha"]
    torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-6)

    def energy(flat: Tensor) -> float:
        return ref.mean_nll(ref.put(model, flat), x, y, nll) + l2 / 2 * float(flat @ flat)

    model_matrix = damped if reduction == "damped" else undamped
    change = float(g @ delta + 0.5 * delta @ model_matrix @ delta)
    rho = (energy(theta + delta) - energy(theta)) / change
    assert opt.diagnostics["rho"] == pytest.approx(rho, rel=1e-3)


def test_exponent_and_kappa_of_the_preconditioner(monkeypatch: pytest.MonkeyPatch) -> None:
    """``P = (diag F + λ mean(D) + η + κ mean F)^ξ`` (methods 7.6)."""
    from laplace_kf.optim import newton_cg

    solvers: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Run:
        solvers.append(kwargs["precondition"])
        return conjugate_gradients(*args, **kwargs)

    monkeypatch.setattr(newton_cg, "conjugate_gradients", spy)
    x, y = ref.batch(12, 3, 3, 0)
    nll, l2, tau = oracles.categorical_nll, 1e-2, 0.4
    for settings, kappa, xi, sensitive in (
        ({}, 0.0, 0.75, False),
        ({"kappa": 0.3, "exponent": 0.5}, 0.3, 0.5, False),
        ({"penalty": "diagonal"}, 0.01, 0.75, True),
        ({"penalty": "diagonal", "kappa": 0.0, "exponent": 1.0}, 0.0, 1.0, True),
    ):
        model = ref.net([3, 3, 3])
        f = oracles.empirical_fisher(model, x, y, nll).diagonal()
        own = float(oracles.dense_ggn(model, x, y, nll).diagonal().mean()) if sensitive else 1.0
        lk.optim.hessian_free(model, "categorical", tau=tau, l2=l2, **settings).step(x, y)
        r = torch.randn(len(f), generator=rng(2), dtype=torch.float64)
        expected = r / (f + tau * own + l2 + kappa * f.mean()) ** xi
        torch.testing.assert_close(solvers[-1](r), expected, rtol=1e-9, atol=1e-12)


def test_what_damping_matrices_refuse() -> None:
    model = ref.net([3, 3])
    for settings, message in (
        ({"penalty": "preconditioner", "preconditioner": "none"}, "preconditioner"),
        ({"kappa": 0.1, "preconditioner": "none"}, "kappa"),
        ({"penalty": "curvature", "scale_sensitive": True}, "scale_sensitive"),
        ({"penalty": "diagonal", "trust_radius": 1.0}, "trust"),
        ({"preconditioner": "kronecker", "exponent": 0.5}, "exact"),
        ({"kappa": -1.0}, "kappa"),
    ):
        with pytest.raises(IncompatiblePair, match=message):
            lk.optim.hessian_free(model, "categorical", **settings)
    with pytest.raises(UnknownName, match="sampled_diagonal"):
        lk.optim.hessian_free(model, "categorical", penalty="diag")
    with pytest.raises(UnknownName, match="damped"):
        lk.optim.hessian_free(model, "categorical", reduction="both")


def test_cross_entropy_of_units_that_are_not_logistic_is_refused() -> None:
    settings: dict[str, Any] = {"structural_damping": 0.1, "distance": "cross_entropy"}
    for cell in (False, True):
        with pytest.raises(IncompatiblePair, match=r"logistic.*squared"):
            lk.optim.hessian_free(Recurrent(cell), "categorical", **settings)
    with pytest.raises(IncompatiblePair, match="Tanh"):
        lk.optim.hessian_free(ref.net([3, 3, 3]), "categorical", hidden=["1"], **settings)
    x, y = torch.randn(6, 5, 2, generator=rng(), dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    model = Recurrent(logistic=True)
    opt = lk.optim.hessian_free(model, "categorical", hidden=["squash"], tau=0.1, **settings)
    assert float(opt.step(x, y)) > float(opt.step(x, y))
    linear = ref.net([3, 3, 3])
    opt = lk.optim.hessian_free(linear, "categorical", hidden=["0"], **settings)
    before = oracles.flat_parameters(linear)
    with pytest.raises(IncompatiblePair, match=r"\[0, 1\]"):
        opt.step(*ref.batch(6, 3, 3))
    assert torch.equal(oracles.flat_parameters(linear), before)


def test_warm_start_is_the_decayed_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    from laplace_kf.optim import newton_cg

    starts: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Run:
        starts.append((kwargs["start"], conjugate_gradients(*args, **kwargs)))
        return starts[-1][1]

    monkeypatch.setattr(newton_cg, "conjugate_gradients", spy)
    opt = lk.optim.hessian_free(ref.net([3, 3, 3]), "categorical", tau=1.0)
    for seed in range(2):
        opt.step(*ref.batch(12, 3, 3, seed))
    assert starts[0][0] is None
    torch.testing.assert_close(starts[1][0], 0.95 * starts[0][1].x)


@pytest.mark.parametrize("settings", [{"trust_radius": 0.5}, {"recipe": "short"}, {"recipe": "held_out"}, {}])
def test_every_recipe_reduces_the_loss(settings: dict[str, Any]) -> None:
    if settings.get("recipe") == "held_out":
        settings = {**settings, "curvature_fraction": 0.5}
    model = ref.net([3, 5, 3])
    x, y = ref.batch(40, 3, 3)
    opt = lk.optim.hessian_free(model, "categorical", l2=1e-3, generator=torch.Generator().manual_seed(0), **settings)
    losses = [float(opt.step(x, y)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))  # the line search guards the batch


def test_recurrent_preset_and_refusals() -> None:
    model = Recurrent()
    x = torch.randn(20, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0, 0] > 0).long()
    opt = lk.optim.hessian_free(model, "categorical", structural_damping=1 / 30, tau=0.1)
    assert opt.objective.hidden == [model.rnn]
    losses = [float(opt.step(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    with pytest.raises(UnknownName):
        lk.optim.hessian_free(ref.net([2, 2]), "categorical", structural_damping=0.1)
    with pytest.raises(IncompatiblePair, match="outside"):
        lk.optim.hessian_free(ref.net([2, 2]), "categorical", recipe="held_out")


def test_preconditioner_settings() -> None:
    """The settings that all presets share: a preconditioner's own damping, average, refresh and inverse."""
    x, y = ref.batch(40, 3, 3)
    losses = {}
    for name, settings in {
        "linked": {"inverse": "block_tridiagonal", "samples": 2},
        "stale": {"refresh": 3, "ema": 0.9},
        "own": {"zeta": 0.5, "adapt_zeta": False},
        "moving": {"zeta": 0.5},
        "cold": {"momentum": False},
    }.items():
        opt = lk.optim.hessian_free(
            ref.net([3, 5, 3]), "categorical", preconditioner="kronecker", tau=1.0,
            generator=torch.Generator().manual_seed(0), recipe="short", **settings,
        )  # fmt: skip
        losses[name] = [float(opt.step(x, y)) for _ in range(6)]
        assert losses[name][-1] < losses[name][0]
        if name == "own":
            assert opt.diagnostics["zeta"] == 0.5
        if name == "moving":
            assert opt.diagnostics["zeta"] == pytest.approx(0.5 * opt.diagnostics["tau"])
    with pytest.raises(IncompatiblePair, match="preconditioner"):
        lk.optim.hessian_free(ref.net([3, 3]), "categorical", preconditioner="none", zeta=0.1)
    with pytest.raises(IncompatiblePair, match="one by one"):
        lk.optim.hessian_free(
            ref.net([3, 3]), "categorical", preconditioner="kronecker", inverse="block_tridiagonal", damping="exact"
        )


def test_products_along_the_chain_are_the_products_of_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [ref.batch(8, 3, 3, seed) for seed in range(4)]
    models = [ref.net([3, 4, 3]) for _ in range(2)]
    ours, other = (lk.optim.hessian_free(m, "categorical", curvature_fraction=0.5, generator=rng()) for m in models)
    monkeypatch.setattr(other, "_chained", lambda data: False)
    monkeypatch.setattr(ours.objective, "push_all", None)  # along the chain nothing runs the model for a product
    for x, y in batches:
        assert float(ours.step(x, y)) == pytest.approx(float(other.step(x, y)), rel=1e-9)
    torch.testing.assert_close(*(oracles.flat_parameters(m) for m in models), rtol=1e-7, atol=1e-9)


def test_networks_that_are_no_chain_need_no_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recurrent()
    opt = lk.optim.hessian_free(model, "categorical", preconditioner="none")
    monkeypatch.setattr(opt.tracer, "observe", None)
    x, y = torch.randn(6, 5, 2, generator=rng(), dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    losses = [float(opt.step(x, y)) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("first", "second", "refused"), [(math.inf, 1e9, True), (1e9, math.inf, False)])
def test_a_whole_step_that_is_no_number_asks_for_more_damping(first: float, second: float, refused: bool) -> None:
    """Where no length will do: with a whole step that has a loss, the answer is a step of length 0."""
    model = nn.Linear(3, 2).double()
    opt = lk.optim.hessian_free(model, "categorical", generator=rng(0))
    losses = iter([first, second, *[1e9] * 100])
    opt.objective.loss = lambda batches, weights: next(losses)  # type: ignore[method-assign]
    theta = opt.flat(opt.named)
    down = -torch.ones_like(theta)
    found = opt._searched([], 1.0, torch.ones_like(theta), theta, down, torch.ones_like(theta))
    assert found.alpha == 0.0
    assert bool(found.delta.isnan().all()) is refused and bool((found.delta == 0).all()) is not refused
