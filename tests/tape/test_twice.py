"""Networks of which there are first derivatives, but no second ones: right where those are enough, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests.classifiers import DOUBLE, agrees, data, seeded


class Shares(torch.autograd.Function):
    """A softmax whose backward pass autograd does not see through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        shares = x.softmax(1)
        ctx.save_for_backward(shares)
        return shares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (shares,) = ctx.saved_tensors
        result: Tensor = shares * (g - (shares * g).sum(1, keepdim=True))
        return result


class Cut(Shares):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = Shares.backward(ctx, g)
            return result


class Through(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.out, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.function(self.layer(x)))
        return result


@pytest.mark.parametrize("function", [Shares, Cut])
def test_a_function_whose_backward_pass_has_no_derivative(function: Any) -> None:
    """Factors and covariances need none; products would leave out what lies before it."""
    model, (x, y), v = seeded(Through, function.apply), data(), torch.linspace(-1, 1, 31, **DOUBLE)
    agrees(model, x, y)
    products = {
        "G v": lambda: lk.curvature.ggn_vector_product(model, "categorical", (x, y), v),
        "H v": lambda: lk.curvature.hessian_vector_product(model, "categorical", (x, y), v),
        "H": lambda: lk.diagnostics.hessian(model, "categorical", (x, y)),
        "functions": lambda: posterior.predict(x, method="linearized", keep_samples=True, samples=2),
        "by inputs": lambda: posterior.functional_covariance(x.clone().requires_grad_()),
        "step": lambda: lk.optim.kfac(model, "categorical").step(x, y),
    }
    posterior = lk.LaplacePosterior(model, "categorical").fit(x, y)
    before = model.layer.weight.clone()
    for call in products.values():
        with pytest.raises(lk.errors.UnsupportedLayer, match=rf"{function.__name__} cannot be.*adapt_tau=False"):
            call()
    assert torch.equal(model.layer.weight, before)
    plain = seeded(Through, lambda z: z.softmax(1))
    for net in (model, plain):  # the line of the message
        optimiser = lk.optim.kflr(net, "categorical", momentum=False, rescale=False, adapt_tau=False)
        optimiser.step(x, y)
    torch.testing.assert_close(model.layer.weight, plain.layer.weight)


def test_a_function_of_torch_without_a_second_derivative() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.centres = nn.Linear(3, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return -torch.cdist(self.layer(x), self.centres)

    model, (x, y) = seeded(Prototypes), data()
    agrees(model, x, y)
    for call in (
        lambda: lk.curvature.ggn_vector_product(model, "categorical", (x, y), torch.ones(28, **DOUBLE)),
        lambda: lk.diagnostics.hessian(model, "categorical", (x, y)),
        lambda: lk.optim.hessian_free(model, "categorical").step(x, y),
    ):
        with pytest.raises(lk.errors.UnsupportedLayer, match=r"cdist_backward.*write it by others"):
            call()
