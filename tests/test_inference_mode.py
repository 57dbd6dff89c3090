"""Whatever takes derivatives gives the same numbers inside ``torch.inference_mode()`` as outside of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles

Data = tuple[Tensor, Tensor]


def problem() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, (torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3)


def ones(model: nn.Module) -> Tensor:
    return torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)


def stepped(make: Callable[..., Any]) -> Callable[[nn.Module, Data], Any]:
    def call(model: nn.Module, data: Data) -> Any:
        optimizer = make(model)
        return [optimizer.step(*data), optimizer.step(*data), *model.parameters()]

    return call


def accumulated(model: nn.Module, data: Data) -> Any:
    optimizer = lk.optim.hessian_free(model, "categorical")
    loss = optimizer.backward(*data)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return [loss, *gradients, *model.parameters()]


def by_closure(model: nn.Module, data: Data) -> Any:
    optimizer = lk.optim.SGDQN(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    return [optimizer.step(closure), optimizer.step(closure), *model.parameters()]


def trained(model: nn.Module, data: Data) -> Any:
    lk.evidence_training(
        model, "categorical", [data], epochs=2, burn_in=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    return list(model.parameters())


def checked(model: nn.Module, data: Data) -> Any:
    report = lk.diagnostics.check(model, "categorical", data)
    assert report.ok
    return list(report.errors.values())


def surface(model: nn.Module, data: Data) -> Any:
    along = ones(model)
    return [lk.diagnostics.loss_surface(model, "categorical", data, along, -along, [0.0, 0.1], [0.2])]


CALLS: dict[str, Callable[[nn.Module, Data], Any]] = {
    "ggn_vector_product": lambda m, d: [lk.curvature.ggn_vector_product(m, "categorical", d, ones(m))],
    "hessian_vector_product": lambda m, d: [lk.curvature.hessian_vector_product(m, "categorical", d, ones(m))],
    "kfac": stepped(lambda m: lk.optim.kfac(m, "categorical", generator=torch.Generator().manual_seed(1))),
    "hessian_free": stepped(lambda m: lk.optim.hessian_free(m, "categorical")),
    "backward": accumulated,
    "closure": by_closure,
    "evidence_training": trained,
    "check": checked,
    "loss_surface": surface,
    "reduction_bound": lambda m, d: [lk.diagnostics.reduction_bound(m, "categorical", d)],
    "kronecker_error": lambda m, d: [lk.diagnostics.kronecker_error(m, "categorical", d).summary.total_error],
    "alignment": lambda m, d: list(lk.diagnostics.alignment(m, "categorical", d, ones(m), 0.1).values()),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_numbers_inside(name: str) -> None:
    model, data = problem()
    expected = CALLS[name](model, data)
    model, data = problem()
    with torch.inference_mode():
        found = CALLS[name](model, (data[0] + 0, data[1]) if name != "closure" else data)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-12, atol=1e-14)
    assert not any(isinstance(one, Tensor) and one.is_inference() for one in found)
    assert not any(p.is_inference() for p in model.parameters())


def test_a_hessian_product_of_a_vector_made_inside() -> None:
    model, (x, y) = problem()
    with torch.inference_mode():
        v = ones(model)
    found = lk.curvature.hessian_vector_product(model, "categorical", (x, y), v)
    torch.testing.assert_close(found, oracles.dense_hessian(model, x, y, oracles.categorical_nll) @ v)


def made_inside() -> Iterator[tuple[nn.Module, str]]:
    with torch.inference_mode():
        yield nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double(), "parameter '0.weight'"
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with torch.inference_mode():
        model[1].running_mean = torch.zeros(4, dtype=torch.float64)
    yield model, "buffer '1.running_mean' \\(module '1'\\)"


REFUSING: dict[str, Callable[[nn.Module, Data], Any]] = {
    "fit": lambda m, d: lk.LaplacePosterior(m, "categorical").fit(d),
    "kfac": lambda m, d: lk.optim.kfac(m, "categorical"),
    "product": CALLS["ggn_vector_product"],
    "estimate": lambda m, d: lk.curvature.estimate(m, "categorical", d),
    "learner": lambda m, d: lk.continual.EWC(m, "categorical"),
}


@pytest.mark.parametrize("call", REFUSING.values(), ids=REFUSING)
def test_models_made_inside_are_refused_by_name(call: Callable[[nn.Module, Data], Any]) -> None:
    data = problem()[1]
    for model, what in made_inside():
        with pytest.raises(lk.errors.UnsupportedLayer, match=f"{what}.*inference_mode.*copy.deepcopy\\(model\\)"):
            call(model, data)
        with torch.inference_mode(False):  # the line of the message
            plain = copy.deepcopy(model)
            call(plain, data)


def test_a_model_converted_inside_after_the_fit_is_refused() -> None:
    model, data = problem()
    posterior = lk.LaplacePosterior(model, "categorical").fit(data)
    with torch.inference_mode():
        model.double().float().double()
        assert next(model.parameters()).is_inference()
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"parameter '0\.weight'.*copy\.deepcopy\(model\)"):
        posterior.predict(data[0])
