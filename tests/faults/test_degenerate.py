"""Data and settings at the edge of what can be: nothing is raised, and the numbers are those that a Gaussian can have.

Where float64 itself cannot say what is right (scales of 1e±12 square to 1e±24) this is still asked: everything is
finite, no variance is negative or above that of the prior (data only take away), probabilities add up to 1, a draw can
be made, a file says the same, and the model is what it was, bit for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import CATEGORICAL, rng

N, WIDTH, CLASSES = 12, 4, 3


def network(dead: int = 0, loud: float = 1.0) -> nn.Module:
    """ReLU units, some of which are never on; ``loud`` scales the last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    with torch.no_grad():
        model[0].bias[:dead] = -1e30
        model[2].weight.mul_(loud)
    return model


def some(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return change(torch.randn(N, WIDTH, generator=rng(1), dtype=torch.float64), torch.arange(N) % CLASSES)


KEPT: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y)  # noqa: E731
SPREAD = torch.tensor([1e-12, 1e-3, 1.0, 1e12], dtype=torch.float64)
CASES: dict[str, tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Any]]] = {
    "dead units": (network(dead=2), some(KEPT), {}),
    "no unit alive": (network(dead=5), some(KEPT), {}),
    "constant feature": (network(), some(lambda x, y: (torch.cat([x[:, :3], torch.full((N, 1), 3.0)], 1), y)), {}),
    "features of zero": (network(), some(lambda x, y: (0 * x, y)), {}),
    "one example": (network(), some(lambda x, y: (x[:1], y[:1])), {}),
    "one class": (network(), some(lambda x, y: (x, 0 * y)), {}),
    "one example many times": (network(), some(lambda x, y: (x[:1].repeat(N, 1), y[:1].repeat(N))), {}),
    "features alike": (network(), some(lambda x, y: (x[:, :1].repeat(1, WIDTH), y)), {}),
    "scale 1e12": (network(), some(lambda x, y: (1e12 * x, y)), {}),
    "scale 1e-12": (network(), some(lambda x, y: (1e-12 * x, y)), {}),
    "scales of all kinds": (network(), some(lambda x, y: (x * SPREAD, y)), {}),
    "certain of everything": (network(loud=1e6), some(KEPT), {}),
    "prior 1e12": (network(), some(KEPT), {"prior_precision": 1e12}),
    "prior 1e-12": (network(), some(KEPT), {"prior_precision": 1e-12}),
    "1e12 examples": (network(), some(KEPT), {"n_data": 1e12}),
}
EXACT = {"scale 1e12", "scales of all kinds", "prior 1e-12", "1e12 examples"}
"""Where float64 itself cannot say what is right."""
STRUCTURES: dict[str, dict[str, Any]] = {
    "kron": {}, "ekfac": {}, "diag": {}, "full": {}, "layer": {}, "isotropic": {}, "lowrank": {"rank": 3},
}  # fmt: skip


def state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers(), torch.get_rng_state()]]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edges of grids, jitter
        yield
    assert all(torch.equal(one, two) for one, two in zip(before, state(model), strict=True))


def fitted(model: nn.Module, name: str, structure: str, dtype: torch.dtype = torch.float64) -> lk.LaplacePosterior:
    _, (x, y), settings = CASES[name]
    posterior = lk.LaplacePosterior(model, "categorical", structure, **STRUCTURES[structure])
    posterior.fit((x.to(dtype), y), generator=rng(0))
    for setting, value in settings.items():
        setattr(posterior, setting, value)
    return posterior


@pytest.mark.meets(name=list(CASES), structure=list(STRUCTURES))
def test_edges_of_data_in_float64(name: str, structure: str) -> None:
    model, (x, y), settings = CASES[name]
    with unchanged(model):
        posterior = fitted(model, name, structure)
        dense_before = posterior.precision.dense()
        check(posterior, x, y, tuned=structure == "kron")
    if structure == "full" and name not in EXACT:
        curvature = len(x) * oracles.dense_ggn(model, x, y, CATEGORICAL.nll, curvature=CATEGORICAL.curvature)
        dense = curvature + settings.get("prior_precision", 1.0) * torch.eye(len(curvature), dtype=torch.float64)
        torch.testing.assert_close(dense_before, dense, rtol=1e-8, atol=1e-10 * float(dense.max()))


@pytest.mark.meets(name=list(CASES), structure=list(STRUCTURES))
def test_edges_of_data_in_float32(name: str, structure: str) -> None:
    """Sums of outer products lose half of the digits, so that factors of a low rank may come out indefinite."""
    model, (x, y), _ = CASES[name]
    single = copied(model).float()
    with unchanged(single):
        check(fitted(single, name, structure, torch.float32), x.float(), y, rtol=1e-3)


def copied(model: nn.Module) -> nn.Module:
    found = network()
    found.load_state_dict(model.state_dict())
    return found.double()


def check(posterior: lk.LaplacePosterior, x: Tensor, y: Tensor, rtol: float = 1e-6, tuned: bool = False) -> None:
    """Numbers that can be, at the data and far from them."""
    far = x.flip(0) * 3 + 1
    prior = prior_variances(posterior.model, far, posterior.prior_precision)
    for inputs, most in ((x, prior_variances(posterior.model, x, posterior.prior_precision)), (far, prior)):
        found = posterior.functional_covariance(inputs).diagonal(dim1=-2, dim2=-1).double()
        assert bool(found.isfinite().all()) and float(found.min()) >= 0
        assert bool((found <= most * (1 + rtol)).all())
        for method in ("probit", "linearized", "mc"):
            probs = posterior.predict(inputs, method, samples=5, generator=rng(2)).probs
            assert bool(((probs >= 0) & (probs <= 1)).all())
            torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert math.isfinite(float(posterior.log_evidence()))
    assert all(bool(draw.isfinite().all()) for draw in posterior.sample(3, generator=rng(3)).values())
    if tuned:
        posterior.tune((x, y), samples=3, generator=rng(4))
        assert float(posterior.prior_precision) > 0
        assert bool(posterior.predict(x, "probit").probs.isfinite().all())


def prior_variances(model: nn.Module, x: Tensor, precision: Any) -> Tensor:
    """``diag(J Jᵀ) / λ``, ``(N, C)`` in float64."""
    jacobian = oracles.jacobian(copied(model), x.double(), len(x))
    return jacobian.square().sum(-1).reshape(len(x), CLASSES) / float(precision)


@pytest.mark.meets(
    name=["dead units", "one example", "scale 1e12", "scale 1e-12", "1e12 examples"], structure=list(STRUCTURES)
)
def test_files_keep_the_edges(name: str, structure: str, tmp_path: Path) -> None:
    model, (x, _), _ = CASES[name]
    with unchanged(model):
        posterior = fitted(model, name, structure)
        posterior.save(tmp_path / "p")
        again = lk.LaplacePosterior.load(tmp_path / "p", model)
        assert torch.equal(again.precision.diag(), posterior.precision.diag())
        assert torch.equal(again.predict(x, "probit").probs, posterior.predict(x, "probit").probs)


OPTIMISERS: dict[str, Callable[[nn.Module], Any]] = {
    name: lambda model, name=name: getattr(lk.optim, name)(model, "categorical", generator=rng(5))
    for name in ("kflr", "kfac", "kfra", "ekfac", "hessian_free", "natural_gradient")
}


@pytest.mark.meets(name=[name for name in CASES if not CASES[name][2]], optimiser=list(OPTIMISERS))
def test_steps_at_the_edges(name: str, optimiser: str) -> None:
    """Losses and weights stay finite."""
    source, (x, y), _ = CASES[name]
    model = copied(source)
    opt = OPTIMISERS[optimiser](model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            loss = float(opt.step(x, y))
            assert math.isfinite(loss)
            assert all(bool(p.isfinite().all()) for p in model.parameters())
            assert math.isfinite(float(nn.functional.cross_entropy(model(x), y)))
