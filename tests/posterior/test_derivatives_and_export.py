"""Derivatives beside dense Jacobians of them; exported graphs beside the posterior, also without the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NotFitted, ShapeMismatch, UnsupportedLayer
from laplace_kf.posterior import exporting


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def points(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fitted(structure: str = "kron", **settings: object) -> lk.LaplacePosterior:
    x = points(20)
    return lk.LaplacePosterior(network(), "gaussian", structure=structure, **settings).fit((x, x[:, :2].sin()))


def rows_of(posterior: lk.LaplacePosterior, value: object) -> tuple[Tensor, Tensor]:
    """Values (flat) and their derivatives to the covered weights ``(K, P)``, by torch.func."""
    weights = posterior.mean
    found = value(weights)  # type: ignore[operator]
    rows = torch.func.jacrev(lambda w: value(w).flatten())(weights)  # type: ignore[operator]
    return found, torch.cat([rows[name].flatten(1) for name in weights], 1)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "lowrank"])
def test_gradients_to_the_inputs(structure: str) -> None:
    posterior, x = fitted(structure), points(4)

    def value(weights: dict[str, Tensor]) -> Tensor:
        def single(one: Tensor) -> Tensor:
            return torch.func.functional_call(posterior.model, weights, (one[None],))[0]

        return torch.func.vmap(torch.func.jacrev(single))(x)

    mean, rows = rows_of(posterior, value)
    covariance = rows @ torch.linalg.inv(posterior.precision.dense()) @ rows.T
    found = posterior.derivatives(x, joint=True)
    assert found.mean.shape == found.epistemic_variance.shape == (4, 2, 3)
    torch.testing.assert_close(found.mean, mean.detach())
    torch.testing.assert_close(found.epistemic_variance.flatten(), covariance.diagonal())
    torch.testing.assert_close(found.covariance, covariance)
    assert posterior.derivatives(x).covariance is None


def test_sums_over_parts_and_residuals() -> None:
    posterior, x = fitted(parameters=["2.*"]), points(5)

    def energy(f: object, z: Tensor) -> Tensor:
        return f(z)[:, 0].sum()[None]  # type: ignore[operator]

    j = posterior.functional_covariance(x, joint=True).reshape(5, 2, 5, 2)[:, 0, :, 0]
    found = posterior.derivatives(x, energy)
    torch.testing.assert_close(found.epistemic_variance, j.sum()[None])
    torch.testing.assert_close(found.mean, posterior.model(x)[:, 0].sum()[None].detach())

    def residual(f: object, z: Tensor) -> Tensor:
        u = f(z)[:, 0]  # type: ignore[operator]
        first = torch.autograd.grad(u.sum(), z, create_graph=True)[0][:, 0]
        second = torch.autograd.grad(first.sum(), z, create_graph=True)[0][:, 0]
        return second + 2 * u

    def value(weights: dict[str, Tensor]) -> Tensor:
        def single(one: Tensor) -> Tensor:
            whole = {**dict(posterior.model.named_parameters()), **weights}
            return torch.func.functional_call(posterior.model, whole, (one[None],))[0, 0]

        second = torch.func.vmap(torch.func.hessian(single))(x)[:, 0, 0]
        return second + 2 * torch.func.vmap(single)(x)

    mean, rows = rows_of(posterior, value)
    found = posterior.derivatives(x, residual, joint=True)
    torch.testing.assert_close(found.mean, mean.detach())
    torch.testing.assert_close(found.covariance, rows @ torch.linalg.inv(posterior.precision.dense()) @ rows.T)


def test_values_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x = fitted(), points(3)
    whole = posterior.derivatives(x, joint=True)
    monkeypatch.setattr("laplace_kf.posterior.derivatives.ROWS", 80)
    parts = posterior.derivatives(x, joint=True)
    torch.testing.assert_close(parts.epistemic_variance, whole.epistemic_variance)
    torch.testing.assert_close(parts.covariance, whole.covariance)


def test_refused_derivatives() -> None:
    x = points(3)
    with pytest.raises(NotFitted):
        lk.LaplacePosterior(network(), "gaussian").derivatives(x)
    posterior = fitted()
    with pytest.raises(ShapeMismatch, match="floating type"):
        posterior.derivatives((x, x))
    with pytest.raises(UnsupportedLayer, match="create_graph=True"):
        posterior.derivatives(x, lambda f, z: f(z).detach())
    with pytest.raises(ShapeMismatch, match="tuple"):
        posterior.derivatives(x, lambda f, z: (f(z),))
    grads = [p.grad for p in posterior.model.parameters()]
    posterior.derivatives(x)
    assert grads == [None] * 4 and all(p.grad is None for p in posterior.model.parameters())


@pytest.mark.parametrize("structure", ["kron", "lowrank", "full"])
def test_the_exported_module_gives_mean_and_variance(structure: str) -> None:
    posterior = fitted(structure)
    module = posterior.export(points(2))
    assert isinstance(module, nn.Module) and type(module).__module__.startswith("torch.")
    for count in (1, 7):  # another number of examples
        x = points(count)
        mean, variance = module(x)
        torch.testing.assert_close(mean, posterior.model(x).detach())
        torch.testing.assert_close(variance, posterior.functional_covariance(x, diagonal_only=True))
    with torch.no_grad():  # it holds the weights of then
        posterior.model[0].weight.mul_(2)
    assert not torch.allclose(module(points(7))[0], posterior.model(points(7)))


def test_a_server_needs_nothing_of_the_package(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ).double()
        x = torch.randn(6, 1, 6, 6, dtype=torch.float64)
    posterior = lk.LaplacePosterior(model.eval(), "categorical", parameters="last_layer").fit((x, torch.arange(6) % 3))
    program = torch.export.export(
        posterior.export(x), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    torch.export.save(program, tmp_path / "served.pt2")
    torch.save(x[:4], tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "m = torch.export.load('served.pt2').module()\n"
        "torch.save(m(torch.load('x.pt')), 'out.pt')\n"
        "assert not any(name.startswith('laplace_kf') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=240)
    mean, variance = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(mean, model(x[:4]).detach())
    torch.testing.assert_close(variance, posterior.functional_covariance(x[:4], diagonal_only=True))


class Looks(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if float(x.sum()) > 0 else out + 1


def test_refused_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    x = points(4)
    with pytest.raises(NotFitted):
        lk.LaplacePosterior(network(), "gaussian").export(x)
    looking = lk.LaplacePosterior(Looks().double(), "gaussian").fit((x, x[:, :2]))
    with pytest.raises(UnsupportedLayer, match="Looks cannot be traced"):
        looking.export(x)
    chained = fitted().update((x, x[:, :2]))
    _, variance = chained.export(x, dynamic=False)(x)
    torch.testing.assert_close(variance, chained.functional_covariance(x, diagonal_only=True))
    monkeypatch.setattr(exporting, "LARGEST", 4)
    with pytest.raises(IncompatiblePair, match="closed form"):
        chained.export(x)
    with pytest.raises(ShapeMismatch, match="example inputs"):
        fitted().export({"x": x})
