"""Running curvature: averages, parts of a pass, EKFAC in kept bases, natural gradient; dense float64 references."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.distributed import Ranks
from laplace_kf.errors import IncompatiblePair
from laplace_kf.optim.objective import Batch
from laplace_kf.optim.running_statistics import averaged
from tests import oracles
from tests.cases import CASES, rng
from tests.optim import reference as ref
from tests.optim.test_inverses import Wrapped


def test_ekfac_keeps_its_bases_between_refreshes() -> None:
    """George et al. 2018, EKFAC-ra: second moments at every step, bases of the running factors at steps 2, 3, 6, 9."""
    nll, ema, refresh, zeta, tau = oracles.categorical_nll, 0.8, 3, 0.3, 0.2
    model = ref.net([3, 4, 3])
    opt = lk.optim.ekfac(
        model, "categorical", estimator="exact", zeta=zeta, tau=tau, l2=0.0, ema=ema, refresh=refresh, momentum=False,
        adapt_tau=False, adapt_zeta=False, curvature_fraction=1.0,
    )  # fmt: skip
    factors: list[tuple[Tensor, Tensor]] = []
    bases: list[tuple[Tensor, Tensor]] = []
    grids: list[Tensor] = []
    for step in range(1, 11):
        x, y = ref.batch(12, 3, 3, step)
        theta, g = oracles.flat_parameters(model), ref.gradient(model, x, y, nll)
        exact = oracles.dense_ggn(model, x, y, nll)
        blocks = ref.kflr(nll)(model, x, y)
        weight = min(1 - 1 / step, ema)
        due = step <= 3 or step % refresh == 0
        direction = torch.zeros_like(theta)
        for k, block in enumerate(blocks):
            if step == 1:
                factors.append((block.A, block.G))
                bases.append((torch.linalg.eigh(block.A)[1], torch.linalg.eigh(block.G)[1]))
                grids.append(torch.zeros(len(block.G), len(block.A)).double())
            elif due:
                old, bases[k] = bases[k], tuple(torch.linalg.eigh(f)[1] for f in factors[k])  # type: ignore[call-overload]
                turn_a, turn_g = ((new.T @ before).square() for new, before in zip(bases[k], old, strict=True))
                grids[k] = turn_g @ grids[k] @ turn_a.T
            index = block.index.reshape(-1)
            both = torch.kron(bases[k][1], bases[k][0])
            fresh = (both.T @ exact[index[:, None], index[None, :]] @ both).diagonal().reshape(grids[k].shape)
            grids[k] = weight * grids[k] + (1 - weight) * fresh
            factors[k] = tuple(  # type: ignore[call-overload]
                weight * f + (1 - weight) * new for f, new in zip(factors[k], (block.A, block.G), strict=True)
            )
            direction[index] = -both @ ((both.T @ g[index]) / (grids[k].reshape(-1) + zeta))
        alpha = -(g @ direction) / (direction @ exact @ direction + tau * direction @ direction)
        opt.step(x, y)
        torch.testing.assert_close(
            oracles.flat_parameters(model), theta + alpha * direction, rtol=1e-7, atol=1e-9, msg=f"step {step}"
        )


def test_factors_of_a_part_come_from_the_gradients_own_pass() -> None:
    """Along a chain rows are taken from the tape, elsewhere another pass is made: the same factors, of those rows."""
    x = torch.randn(300, 3, generator=rng(4), dtype=torch.float64)
    y = torch.randint(0, 3, (300,), generator=rng(5))
    rows = torch.randperm(300, generator=rng(6))[:150]
    expected = ref.kflr(oracles.categorical_nll)(ref.net([3, 4, 3]), x[rows], y[rows])
    for model in (ref.net([3, 4, 3]), Wrapped(ref.net([3, 4, 3]))):
        opt = lk.optim.kflr(model, "categorical", curvature_fraction=(0.5, 1.0), generator=rng(6))
        opt.step(x, y)
        for (_, matrix), block in zip(opt.statistics.mean().entries, expected, strict=True):
            torch.testing.assert_close(matrix.inputs[0], block.A)
            torch.testing.assert_close(matrix.outputs[0], block.G)


def test_averages_weigh_by_the_step_not_by_examples() -> None:
    model = ref.net([3, 4, 3])
    one, two, three = (
        lk.curvature.estimate(model, "categorical", ref.batch(count, 3, 3, count), "kron") for count in (5, 40, 11)
    )
    means = [[m.clone() for parts in s.sums.values() for m in (p / s.count for p in parts)] for s in (one, two, three)]
    running = averaged(averaged(averaged(None, one, 1, 0.4), two, 2, 0.4), three, 3, 0.4)
    expected = [0.6 * c + 0.4 * (0.6 * b + 0.4 * a) for a, b, c in zip(*means, strict=True)]
    found = [part / running.count for parts in running.sums.values() for part in parts]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("names", [["0.bias", "2.weight"], ["0.bias", "2.bias"], ["2.bias"], ["0.weight", "2.bias"]])
def test_products_along_a_chain_with_some_of_the_parameters(names: list[str]) -> None:
    model = ref.net([3, 4, 3])
    x, y = ref.batch(7, 3, 3)
    opt = lk.optim.kflr(model, "categorical", parameters=names)
    rows = torch.tensor([5, 0, 2])
    seen = opt.tracer.observe((x, y)).part(rows)
    directions = torch.randn(2, opt.layout.size, generator=rng(), dtype=torch.float64)
    kept = directions.clone()
    batch = Batch(seen.batch, 3, opt.objective.random_state(), seen)
    found = opt.objective.products([batch], opt.layout.split(directions))
    exact = oracles.dense_ggn(model, x[rows], y[rows], oracles.categorical_nll, names)
    torch.testing.assert_close(found, directions @ exact @ directions.T)
    assert torch.equal(directions, kept)


@pytest.mark.parametrize("preconditioner", ["none", "kronecker"])
def test_natural_gradient(preconditioner: str) -> None:
    """``(F + (λ + η) I)⁻¹ ∇`` with the Fisher summed over the classes (methods 2.6, 8.3), whatever came before."""
    model, l2, tau = ref.net([3, 3, 3]), 1e-2, 0.4
    opt = lk.optim.natural_gradient(
        model, "categorical", steps=300, tolerance=0.0, l2=l2, tau=tau, adapt_tau=False,
        preconditioner=preconditioner, generator=rng(),
    )  # fmt: skip
    for seed in range(3):
        x, y = ref.batch(12, 3, 3, seed)
        theta = oracles.flat_parameters(model)
        g = ref.gradient(model, x, y, oracles.categorical_nll) + l2 * theta
        fisher = torch.zeros(len(theta), len(theta)).double()
        for i in range(12):
            probs = torch.softmax(model(x[i : i + 1])[0], 0).detach()
            for label in range(3):
                score = ref.gradient(model, x[i : i + 1], torch.tensor([label]), oracles.categorical_nll)
                fisher += probs[label] * torch.outer(score, score) / 12
        natural = torch.linalg.solve(fisher + (tau + l2) * torch.eye(len(theta)).double(), g)
        opt.step(x, y)
        moved = oracles.flat_parameters(model) - theta
        torch.testing.assert_close(moved, -opt.diagnostics["alpha"] * natural, rtol=1e-6, atol=1e-8)
        assert opt.diagnostics["tau"] == tau


LAYERS = [
    "small-cnn", "conv2d-groups", "conv2d-depthwise", "conv-transpose1d", "batchnorm2d", "layernorm-sequence",
    "embedding", "tied-embedding-decoder", "attention", "gru", "reused-module", "own-scale", "bilinear",
]  # fmt: skip
ROWS: dict[str, Any] = {
    "ekfac": lambda *given, **more: lk.optim.ekfac(*given, estimator="exact", **more),
    "block-tridiagonal": lambda *given, **more: lk.optim.kfac(
        *given, estimator="exact", inverse="block_tridiagonal", **more
    ),
    "diagonal": lambda *given, **more: lk.optim.diagonal(*given, estimator="exact", **more),
    "hessian-free": lambda *given, **more: lk.optim.hessian_free(*given, preconditioner="kronecker", **more),
    "natural-gradient": lk.optim.natural_gradient,
}


@pytest.mark.meets(name=LAYERS, row=ROWS)
def test_every_row_of_settings_trains_every_kind_of_layer(row: str, name: str) -> None:
    problem = next(case for case in CASES if str(case) == name).make()
    model: nn.Module = problem.model
    named, gradients = dict(model.named_parameters()), _gradients(problem)
    moving = sorted(gradients)
    opt = ROWS[row](model, problem.likelihood.build(lk), tau=1.0, generator=rng(), parameters=moving)
    before = {n: named[n].detach().clone() for n in moving}
    losses = [float(opt.step(problem.batch())) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(named[n].detach(), value) for n, value in before.items())


def _gradients(problem: Any) -> dict[str, Tensor]:
    """Gradients of the trainable parameters that are not zero."""
    model, named = oracles.private(problem.model, None)
    z = oracles.call(model, problem.x)
    total = sum(problem.likelihood.nll(z[i : i + 1], problem.y[i : i + 1]) for i in range(problem.n))
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    pairs = ((n, g.to_dense()) for n, g in zip(named, grads, strict=True) if g is not None)
    return {n: g for n, g in pairs if float(g.abs().max()) > 1e-12}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A group of this process alone, taken for one of several; those of several stand in tests/distributed."""
    monkeypatch.setattr(Ranks, "of", classmethod(lambda cls, group: None if group is None else cls(group)))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("refresh", [1, 3])
def test_factors_that_are_added_up_at_a_refresh_are_the_averages_of_every_step(refresh: int, alone: Any) -> None:
    found = []
    for group in (None, alone):
        model = ref.net([4, 6, 3])
        more = {} if group is None else {"process_group": group}
        opt = lk.optim.kfac(model, "categorical", estimator="exact", refresh=refresh, ema=0.9, low_rank=False, **more)
        for k in range(8):
            opt.step(*_minibatch(k))
        if group is not None and refresh > 1:
            with pytest.raises(IncompatiblePair, match=r"optimizer\.synchronize\(\)"):
                opt.state_dict()
        opt.synchronize()
        opt.load_state_dict(opt.state_dict())
        for k in range(8, 12):
            opt.step(*_minibatch(k))
        opt.synchronize()
        found.append((oracles.flat_parameters(model), opt.posterior(n_data=100).precision.dense()))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def _minibatch(k: int) -> tuple[Tensor, Tensor]:
    count = 20 + 3 * (k % 4)
    return torch.randn(count, 4, generator=rng(k)).double(), torch.randint(0, 3, (count,), generator=rng(k))
