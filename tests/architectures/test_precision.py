"""Floating types, autocast, compiled and wrapped models: the same posterior as the plain float64 model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import models
from tests.cases import build, labels, mlp, normal, rng
from tests.checks import of_every

STRUCTURES = ["diag", "kron", "full"]
over_structures = pytest.mark.parametrize("structure", STRUCTURES)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


def sequence_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4)
    )


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(3, 6, 4), lambda: normal(12, 3), lambda: labels(4, 12)),
    "sequence": (sequence_net, lambda: labels(7, 8, 3, seed=3), lambda: labels(4, 8, 3)),
    "conv": (conv_net, lambda: normal(8, 2, 4, 4), lambda: labels(4, 8)),
}


def problem(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, the float64 model with exactly its weights, inputs in its type, targets."""
    make, inputs, targets = PROBLEMS[name]
    model, exact, x = build(make).to(dtype), build(make), inputs()
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    return model, exact, x.to(dtype) if x.is_floating_point() else x, targets()


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.pairs(dtype=TOLERANCE, name=PROBLEMS, structure=STRUCTURES)
def test_end_to_end(dtype: torch.dtype, name: str, structure: str, tmp_path: Path) -> None:
    model, exact, x, y = problem(name, dtype)
    posterior = lk.LaplacePosterior(model, "categorical", structure, prior_precision=30.0).fit([(x, y)])
    truth = lk.LaplacePosterior(exact, "categorical", structure, prior_precision=30.0).fit([(wide(x), y)])
    limit = TOLERANCE[dtype]
    for part in (part for parts in posterior._state.statistics.sums.values() for part in parts):  # type: ignore[union-attr]
        assert part.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert error(posterior.curvature.dense(), truth.curvature.dense()) < limit
    assert abs(float(posterior.log_evidence() - truth.log_evidence())) < limit * abs(float(truth.log_evidence()))
    assert {value.dtype for value in posterior.mean.values()} == {dtype}
    draws = posterior.sample(3, generator=rng(0))
    assert {value.dtype for value in draws.values()} == {dtype}
    spread = posterior.precision.diag().double(), truth.precision.diag().double()
    assert error(*spread) < limit
    mapped = posterior.predict(x, method="map").probs
    assert error(mapped, truth.predict(wide(x), method="map").probs) < 3 * limit
    prediction = posterior.predict(x, method="mc", samples=60, generator=rng(0))
    wanted = truth.predict(wide(x), method="mc", samples=60, generator=rng(0))
    assert error(prediction.probs, wanted.probs) < 0.1
    assert torch.isfinite(prediction.log_prob(y)).all()
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    loaded = lk.LaplacePosterior.load(path, model)
    assert error(loaded.precision.dense(), posterior.precision.dense()) == 0
    assert {value.dtype for value in loaded.mean.values()} == {dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = posterior.tune(
            [(x, y)], n_data=[8.0], prior_precision=[0.5, 2.0], method="mc", samples=20, generator=rng(0)
        ).best
    assert torch.isfinite(torch.tensor(best["objective"]))


@over_structures
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_half_precision_gradients_are_squared_in_float32(structure: str, scale: float) -> None:
    """Squares of float16 numbers leave its range below 1e-4 and above 256."""
    model = nn.Linear(2, 2).half()
    x = (scale * normal(6, 2)).half()
    rule = lk.likelihoods.Gaussian(scale=0.9)
    found = lk.curvature.estimate(model, rule, [(x, torch.zeros(6, 2).half())], structure, "projection", samples=4)
    exact = lk.curvature.estimate(model.double(), rule, [(x.double(), torch.zeros(6, 2).double())], structure)
    traces = float(found.mean().diag().sum()), float(exact.mean().diag().sum())
    assert abs(traces[0] / traces[1] - 1) < 0.01


@over_structures
def test_models_of_several_types(structure: str) -> None:
    """A bfloat16 body under a float32 head: draws and means come back in each parameter's own type."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 6).bfloat16(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x.bfloat16())).float())

    torch.manual_seed(0)
    model, x, y = Mixed(), normal(8, 3).float(), labels(4, 8)
    posterior = lk.LaplacePosterior(model, "categorical", structure).fit([(x, y)])
    wanted = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: value.dtype for name, value in posterior.mean.items()} == wanted
    assert {name: value.dtype for name, value in posterior.sample(2).items()} == wanted
    assert torch.isfinite(posterior.predict(x, method="mc", samples=3).probs).all()
    assert torch.isfinite(posterior.penalty()) and torch.isfinite(posterior.log_evidence())


# ------------------------------------------------------------------------------------------------ autocast


@over_structures
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("used_before", [False, True])
def test_autocast_fits_and_predicts(name: str, structure: str, used_before: bool) -> None:
    make, inputs, targets = PROBLEMS[name]
    model, x, y = build(make).float(), inputs(), targets()
    x = x.float() if x.is_floating_point() else x
    plain = lk.LaplacePosterior(model, "categorical", structure, prior_precision=30.0).fit([(x, y)])
    posterior = lk.LaplacePosterior(model, "categorical", structure, prior_precision=30.0)
    seen: list[torch.dtype] = []
    hook = model[-1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        if used_before:
            with torch.no_grad():
                model(x)  # leaves weights without a graph in autocast's cache
        posterior.fit([(x, y)])
        assert torch.is_autocast_enabled("cpu")
        prediction = posterior.predict(x, method="mc", samples=60, generator=rng(0))
    hook.remove()
    assert set(seen) == {torch.bfloat16}, "the model did not run under the caller's autocast"
    dense = posterior.curvature.dense()
    assert dense.dtype == torch.float32
    assert error(dense, plain.curvature.dense()) < 0.03
    assert error(prediction.probs, plain.predict(x, method="mc", samples=60, generator=rng(0)).probs) < 0.1


def test_sums_are_not_rounded_under_autocast() -> None:
    """The input factor is made of float32 inputs: autocast is off for the package's own products."""
    model, x, y = nn.Linear(3, 4), normal(64, 3).float(), labels(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        stats = lk.curvature.estimate(model, "categorical", [(x, y)], "kron")
    inputs = torch.cat([x, torch.ones(64, 1)], 1).double()
    (factor, _, _) = next(iter(stats.sums.values()))
    assert error(factor[0], inputs.T @ inputs) < 1e-6


# ------------------------------------------------------------------------------------------------ compiled, wrapped


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_part(model: Any) -> nn.Module:
    model.body = torch.compile(model.body, backend="eager")
    return model  # type: ignore[no-any-return]


def used_compiled_part(model: Any) -> nn.Module:
    compiled_part(model)(normal(8, 3))
    return model  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled_whole,
    "compiled in place": compiled_in_place,
    "compiled part": compiled_part,
    "compiled part, used": used_compiled_part,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: compiled_whole(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@over_structures
def test_wrapped_models(structure: str, wrapper: str) -> None:
    x, y = normal(8, 3), labels(4, 8)
    plain = lk.LaplacePosterior(build(Parts), "categorical", structure).fit([(x, y)])
    model = WRAPPERS[wrapper](build(Parts))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    posterior = lk.LaplacePosterior(model, "categorical", structure).fit([(x, y)])
    assert error(posterior.precision.dense(), plain.precision.dense()) < 1e-12
    assert [models.plain_name(name) for name in posterior.mean] == list(plain.mean)
    for method in ("map", "mc"):
        mine = posterior.predict(x, method=method, samples=3, generator=rng(0)).probs
        assert error(mine, plain.predict(x, method=method, samples=3, generator=rng(0)).probs) < 1e-12
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert error(model(x), plain.model(x)) < 1e-12


@pytest.mark.parametrize("wrapper", ["compiled", "compiled part", "parallel"])
def test_name_patterns_with_and_without_prefixes(wrapper: str) -> None:
    x, y = normal(8, 3), labels(4, 8)
    model = WRAPPERS[wrapper](build(Parts))
    inside = [name for name, _ in model.named_parameters() if "body" in name]
    for pattern in (inside[0].rpartition(".")[0] + ".*", "body.0.*"):
        posterior = lk.LaplacePosterior(model, "categorical", parameters=[pattern], prior_precision={pattern: 2.0}).fit(
            [(x, y)]
        )
        assert [models.plain_name(name) for name in posterior.mean] == ["body.0.weight", "body.0.bias"]
    assert lk.curvature.estimate(model, "categorical", [(x, y)], parameters=["body.0.*"]).mean().size == 20


def test_compiled_functions_inside_the_model() -> None:
    scale = torch.compile(lambda x, w: torch.nn.functional.linear(x, w), backend="eager")

    class Inside(nn.Module):
        def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.weight, self.function = nn.Parameter(torch.zeros(4, 3)), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x, self.weight)

    x, y = normal(8, 3), labels(4, 8)
    found = lk.curvature.estimate(build(lambda: Inside(scale)), "categorical", [(x, y)]).mean().dense()
    plain = build(lambda: Inside(torch.nn.functional.linear))
    assert error(found, lk.curvature.estimate(plain, "categorical", [(x, y)]).mean().dense()) < 1e-12


def test_products_take_wrapped_models() -> None:
    x, y = normal(8, 3), labels(4, 8)
    model = build(Parts)
    v = normal(sum(p.numel() for p in model.parameters()))
    wanted = lk.curvature.ggn_vector_product(model, "categorical", [(x, y)], v)
    assert error(lk.curvature.ggn_vector_product(compiled_whole(model), "categorical", [(x, y)], v), wanted) < 1e-12


# ------------------------------------------------------------------------------------------------ several devices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@over_structures
def test_models_spread_over_devices(structure: str) -> None:
    """A body on the CPU and a head on the GPU: inputs go to the first, targets to the outputs, sums to their layers."""

    class Spread(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).to(self.head.weight.device))

    x, y = normal(8, 3), labels(4, 8)
    plain = lk.LaplacePosterior(build(Parts), "categorical", structure).fit([(x, y)])
    model: Any = build(Spread)
    model.head.cuda()
    posterior = lk.LaplacePosterior(model, "categorical", structure).fit([(x, y)])
    matrix, wanted = posterior.precision, plain.precision
    v = normal(wanted.size)
    assert error(matrix.dense().cpu(), wanted.dense()) < 1e-10
    assert error(matrix.solve(v).cpu(), wanted.solve(v)) < 1e-10
    assert abs(float(posterior.log_evidence() - plain.log_evidence())) < 1e-8
    assert float(posterior.penalty()) == 0.0
    assert {name: value.device for name, value in posterior.mean.items()} == {
        name: value.device for name, value in model.named_parameters()
    }
    mapped = posterior.predict(x, method="map").probs
    assert error(mapped.cpu(), plain.predict(x, method="map").probs) < 1e-10
    assert torch.isfinite(posterior.predict(x, method="mc", samples=3).log_prob(y.cuda())).all()


# ------------------------------------------------------------------------------------------------ parametrisations


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def symmetric() -> nn.Module:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).T

    layer = nn.Linear(3, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3))


@pytest.mark.parametrize("make", [weight_norm, spectral_norm, symmetric])
@over_structures
def test_parametrised_weights(structure: str, make: Callable[[], nn.Module]) -> None:
    """The parameters behind the weight get their exact diagonal (or their part of the full matrix)."""
    model, x, y = build(make), normal(6, 3), labels(3, 6)
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    rows = []
    for n in range(6):
        z = model(x[n : n + 1])[0]
        grads = [torch.autograd.grad(z[c], list(model.parameters()), retain_graph=True) for c in range(3)]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in grad]) for grad in grads])
        p = torch.softmax(z.detach(), 0)
        rows.append(jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian)
    exact = torch.stack(rows).mean(0)
    model.train()
    posterior = lk.LaplacePosterior(model, "categorical", structure).fit([(x, y)])
    found = posterior.curvature.dense()
    if structure == "full":
        assert error(found, exact) < 1e-10
    behind = torch.cat([torch.full((k,), "original" in name) for name, k in zip(names, sizes, strict=True)])
    assert error(found.diagonal()[behind], exact.diagonal()[behind]) < 1e-10
    assert torch.isfinite(posterior.predict(x, method="mc", samples=3).probs).all()


class Cast(nn.Module):
    """Outputs of another floating type than the weights, as of logits that are made float."""

    def __init__(self, weights: torch.dtype, outputs: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), outputs
        self.to(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).to(self.kind)


CASTS = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("weights", "outputs"), CASTS)
def test_outputs_of_another_type_than_the_weights(weights: torch.dtype, outputs: torch.dtype) -> None:
    """Steps, and predictions of a chain of kept terms, are those of the network whose outputs are not cast."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64).to(weights)
    y = torch.arange(6) % 3

    def step(make: Callable[..., Any], kind: torch.dtype, **settings: Any) -> Tensor:
        net = Cast(weights, kind)
        make(net, "categorical", generator=torch.Generator().manual_seed(1), **settings).step(x, y)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def case(name: str) -> None:
        settings = {"inverse": "block_tridiagonal"} if name == "linked" else {}
        make = lk.optim.kflr if name == "linked" else getattr(lk.optim, name)
        mine, theirs = step(make, outputs, **settings), step(make, weights, **settings)
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 if outputs == torch.bfloat16 else 1e-4)

    of_every(case, ["kflr", "linked", "ekfac", "diagonal", "hessian_free"])
    spreads = []
    for kind in (outputs, weights):
        chained = lk.LaplacePosterior(Cast(weights, kind), "categorical").fit([(x, y)]).update([(x[:4], y[:4])])
        spreads.append(chained.functional_covariance(x).double())
    torch.testing.assert_close(spreads[0], spreads[1], rtol=0.03, atol=0.03 * float(spreads[1].max()))
