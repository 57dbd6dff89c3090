"""What cannot be handled is refused with a typed error that names the module and a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import models
from tests.cases import build, labels, mlp, normal

X, Y = normal(6, 3).float(), labels(4, 6)


class Body(nn.Module):
    """A linear layer, another module in between, and a head."""

    def __init__(self, middle: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(3, 5), middle, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x)))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Body(nn.Tanh()), X)


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Body(nn.LazyLinear(5))


class Phase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.turn).real


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's class of this name, which needs a process group to be made."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class DTensor(nn.Parameter):
    """Stands for torch's sharded tensor, which needs a process group to be made."""


def sharded() -> nn.Module:
    model = Body(nn.Tanh())
    model.first.weight = DTensor(torch.ones(5, 3))
    return model


def eight_bits() -> nn.Module:
    model = Body(nn.Tanh())
    model.first.weight = nn.Parameter(torch.ones(5, 3).to(torch.float8_e4m3fn))
    return model


def quantised() -> nn.Module:
    return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4))


def whole_numbers() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    return model.requires_grad_(False)


# model, what the message must say: the module, and the way out
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted part": (lambda: Body(scripted()), r"module 'middle'.*scripted.*plain Python module.*freeze"),
    "scripted whole": (lambda: scripted(), r"the model.*scripted.*plain Python module"),
    "traced": (traced, r"the model.*traced.*plain Python module"),
    "lazy": (lazy, r"'middle.weight'.*module 'middle'.*lazy.*one batch through the model"),
    "meta": (lambda: Body(nn.Linear(5, 5, device="meta")), r"module 'middle'.*meta device.*load the weights"),
    "complex": (lambda: Body(Phase()), r"'middle.turn'.*complex.*two real parameters"),
    "sharded wrapper": (lambda: Body(FullyShardedDataParallel(nn.Tanh())), r"'middle'.*full state_dict"),
    "sharded tensor": (sharded, r"module 'first'.*sharded.*full state_dict"),
    "eight bits": (eight_bits, r"'first.weight'.*float8.*model.to\(torch.bfloat16\)"),
    "quantised": (quantised, r"module '0' is quantised.*float model"),
    "whole numbers": (whole_numbers, r"module '0' is quantised.*float model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, message = MODELS[name]
    model = make()
    for use in (
        lambda: lk.LaplacePosterior(model, "categorical"),
        lambda: lk.curvature.estimate(model, "categorical", [(X, Y)]),
        lambda: lk.curvature.ggn_vector_product(model, "categorical", [(X, Y)], X),
    ):
        with pytest.raises(lk.errors.UnsupportedLayer, match=message):
            use()


def test_frozen_parts_of_those_kinds_are_no_obstacle() -> None:
    torch.manual_seed(0)
    for middle in (scripted(), Phase()):
        model = Body(middle)
        for parameter in middle.parameters():
            parameter.requires_grad_(False)
        posterior = lk.LaplacePosterior(model, "categorical", "full").fit([(X, Y)])
        assert torch.isfinite(posterior.predict(X, method="mc", samples=2).probs).all()
        assert set(posterior.mean) == {"first.weight", "first.bias", "head.weight", "head.bias"}


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        lk.LaplacePosterior(lambda x: x, "categorical")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ uses


class BatchMean(nn.Module):
    """The output of an example depends on the others, and its weight has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.scale


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Explodes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


USES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "batch statistics": (
        lambda: Body(BatchMean()), {}, lk.errors.UnsupportedLayer, r"other examples.*running statistics",
    ),
    "never used": (lambda: Body(Unused()), {}, lk.errors.UnsupportedLayer, r"middle.spare.*[Ff]reeze.*parameters="),
    "no output axis": (
        lambda: nn.Sequential(nn.Linear(3, 4), Scalar()), {}, lk.errors.ShapeMismatch, r"\(6,\).*Keep the output axis",
    ),
    "infinite outputs": (
        lambda: nn.Sequential(nn.Linear(3, 4), Explodes()), {}, lk.errors.NonFinite, r"batch 0.*outputs.*weights",
    ),
    "recursion off a chain": (
        lambda: Body(nn.LayerNorm(5)), {"estimator": "recursive"}, lk.errors.UnsupportedLayer,
        r"'middle'.*estimator=\"exact\"",
    ),
    "recursion through a function": (
        lambda: Body(nn.Softmax(-1)), {"estimator": "recursive"}, lk.errors.UnsupportedLayer,
        r"function 'softmax' \(after 'first\.weight'\) on shape \(6, 5\)",
    ),
    "recursion without factors": (
        lambda: Body(nn.Tanh()), {"estimator": "recursive", "structure": "diag"}, lk.errors.IncompatiblePair,
        r"'recursive'.*structure=\"kron\"",
    ),
    "frozen": (
        lambda: Body(nn.Tanh()).requires_grad_(False), {}, lk.errors.UnsupportedLayer, r"Body.*requires_grad",
    ),
    "pattern of frozen ones": (
        lambda: Body(nn.Linear(5, 5).requires_grad_(False)), {"parameters": ["middle.*"]},
        lk.errors.UnsupportedLayer, r"middle.bias.*requires_grad",
    ),
    "unknown pattern": (
        lambda: Body(nn.Tanh()), {"parameters": ["haed.*"]}, lk.errors.UnknownName, r"haed.*head",
    ),
    "too large": (
        lambda: nn.Sequential(nn.Linear(3, 600_000), nn.Linear(600_000, 4)), {"structure": "full"},
        lk.errors.IncompatiblePair, r"full.*GiB.*(kron|diag)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    make, options, kind, message = USES[name]
    torch.manual_seed(0)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(kind, match=message) as caught:
        lk.curvature.estimate(model, "categorical", [(X, Y)], **options)
    assert isinstance(caught.value, lk.errors.LaplaceKFError)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_plain_names() -> None:
    assert models.plain_name("_orig_mod.body._orig_mod.0.weight") == "body.0.weight"
    assert models.plain_name("module.body.0.weight") == "body.0.weight"
    assert models.plain_name("body.module.weight") == "body.module.weight"


def test_wrappers_are_taken_off() -> None:
    model = build(lambda: mlp(3, 4, 4))
    assert models.usable(model) is model
    assert models.usable(nn.DataParallel(model)) is model
    assert models.usable(torch.compile(nn.DataParallel(model), backend="eager")) is model  # type: ignore[arg-type]
