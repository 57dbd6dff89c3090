"""Inputs that a model cannot take, at every entry point: a typed refusal that names what was given and the way out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.predictive import mc_dropout

Y = torch.arange(8) % 3


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).eval()


def table() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3))


GOOD: dict[Callable[[], nn.Module], Tensor] = {
    dense: torch.ones(8, 4),
    convolution: torch.ones(8, 2, 4, 4),
    table: torch.ones(8, 2, dtype=torch.long),
}
CASES = {
    "float64": (dense, torch.ones(8, 4).double(), "x.to(torch.float32)"),
    "uint8": (dense, torch.ones(8, 4).byte(), "x.to(torch.float32)"),
    "int64": (dense, torch.ones(8, 4).long(), "x.to(torch.float32)"),
    "bool": (dense, torch.ones(8, 4).bool(), "x.to(torch.float32)"),
    "half": (dense, torch.ones(8, 4).half(), "x.to(torch.float32)"),
    "images of float64": (convolution, torch.ones(8, 2, 4, 4).double(), "x.to(torch.float32)"),
    "images of uint8": (convolution, torch.ones(8, 2, 4, 4).byte(), "x.to(torch.float32)"),
    "another number of features": (dense, torch.ones(8, 6), "(8, 6)"),
    "another number of channels": (convolution, torch.ones(8, 1, 4, 4), "(8, 1, 4, 4)"),
    "images of another size": (convolution, torch.ones(8, 2, 5, 5), "(8, 2, 5, 5)"),
    "images without channels": (convolution, torch.ones(8, 4), "(8, 4)"),
    "another number of tokens": (table, torch.ones(8, 3, dtype=torch.long), "(8, 3)"),
    "tokens out of range": (table, torch.full((8, 2), 6), "(8, 2)"),
    "tokens as numbers": (table, torch.ones(8, 2), "x.long()"),
}
ENTRIES: dict[str, Callable[[nn.Module, lk.LaplacePosterior, Tensor], object]] = {
    "fit": lambda m, p, x: lk.LaplacePosterior(m, "categorical").fit(x, Y),
    "fit, inputs=": lambda m, p, x: lk.LaplacePosterior(
        m, "categorical", inputs=lambda b: b[0], targets=lambda b: b[1]
    ).fit([(x, Y)]),
    "fit, forward=": lambda m, p, x: lk.LaplacePosterior(
        m, "categorical", forward=lambda model, b: (model(b[0]), b[1])
    ).fit([(x, Y)]),
    "tune": lambda m, p, x: p.tune((x, Y)),
    "update": lambda m, p, x: p.update((x, Y)),
    "curvature": lambda m, p, x: lk.curvature.estimate(m, "categorical", (x, Y)),
    "functional_covariance": lambda m, p, x: p.functional_covariance(x),
    **{
        f"predict, {method}": lambda m, p, x, method=method: p.predict(x, method=method, samples=3)  # type: ignore[misc]
        for method in ("mc", "linearized", "probit", "map")
    },
    "predictor": lambda m, p, x: p.predictor(3)(x),
    "kfac": lambda m, p, x: lk.optim.kfac(m, "categorical").step(x, Y),
    "hessian_free": lambda m, p, x: lk.optim.hessian_free(m, "categorical").step(x, Y),
}

EVERYWHERE = ("float64", "images of uint8", "another number of features", "tokens out of range")
OTHER: dict[str, Callable[[nn.Module, lk.LaplacePosterior, Tensor], object]] = {
    **{
        name: lambda m, p, x, name=name: getattr(lk.optim, name)(m, "categorical").step(x, Y)  # type: ignore[misc]
        for name in ("ekfac", "kflr", "kfra", "diagonal", "natural_gradient")
    },
    **{
        kind.__name__: lambda m, p, x, kind=kind: kind(m, "categorical").after_task([(x, Y)])  # type: ignore[misc]
        for kind in (lk.continual.EWC, lk.continual.OnlineLaplace, lk.continual.NonOnlineLaplace)
    },
    "accuracy": lambda m, p, x: lk.continual.accuracy(m, [(x, Y)]),
    "mc_dropout": lambda m, p, x: mc_dropout(nn.Sequential(m, nn.Dropout(0.1)), "categorical", 2)(x),
    "predict_interval": lambda m, p, x: p.predict_interval(x),
    "ood_score": lambda m, p, x: p.ood_score(x, kind="entropy"),
    "calibrate": lambda m, p, x: p.calibrate([(x, Y)]),
    "refit": lambda m, p, x: p.refit([(x, Y)]),
    "evidence_training": lambda m, p, x: lk.evidence_training(m, "categorical", [(x, Y)], epochs=1),
    "self_influence": lambda m, p, x: lk.attribution.self_influence(p, [(x, Y)]),
    "jacobian": lambda m, p, x: lk.diagnostics.jacobian(m, x),
    "Mixture": lambda m, p, x: lk.Mixture([p, p]).predict(x),
}


@pytest.fixture(scope="module")
def fitted() -> dict[Callable[[], nn.Module], tuple[nn.Module, lk.LaplacePosterior]]:
    models = {make: make() for make in GOOD}
    return {make: (m, lk.LaplacePosterior(m, "categorical").fit(GOOD[make], Y)) for make, m in models.items()}


@pytest.mark.parametrize(
    ("case", "entry"),
    [
        *((case, entry) for case in CASES for entry in ENTRIES),
        *((case, entry) for case in EVERYWHERE for entry in OTHER),
    ],
)
def test_is_refused_with_what_was_given(
    case: str, entry: str, fitted: dict[Callable[[], nn.Module], tuple[nn.Module, lk.LaplacePosterior]]
) -> None:
    make, x, words = CASES[case]
    model, posterior = fitted[make]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = posterior.n_data, posterior.prior_precision, posterior.method
    with pytest.raises(lk.errors.ShapeMismatch) as refused:
        {**ENTRIES, **OTHER}[entry](model, posterior, x)
    assert words in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert settings == (posterior.n_data, posterior.prior_precision, posterior.method)


def test_a_tensor_on_another_device_is_named() -> None:
    class Adrift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.layer(x)
            return z + torch.ones(3, device="meta")

    with pytest.raises(lk.errors.ShapeMismatch, match=r'model.to\("cpu"\)'):
        lk.LaplacePosterior(Adrift(), "categorical").fit(torch.ones(8, 4), Y)


NO_TENSORS = {
    "text": ("hello", "given a str"),
    "texts": (np.array(["a"] * 8), "given a ndarray"),
    "nothing": (None, "given a NoneType"),
    "a set": ({1, 2}, "given a set"),
    "one number": (torch.tensor(1.0), "shape ()"),
    "numbers on meta": (torch.ones(8, 4, device="meta"), "meta"),
    "nested": (torch.nested.nested_tensor([torch.ones(4)] * 8), "to_padded_tensor"),
}


@pytest.mark.parametrize("entry", ["fit, inputs=", "predict, mc", "predict, map", "kfac", "EWC"])
@pytest.mark.parametrize("case", NO_TENSORS)
def test_what_is_no_tensor_is_named(
    case: str, entry: str, fitted: dict[Callable[[], nn.Module], tuple[nn.Module, lk.LaplacePosterior]]
) -> None:
    x, words = NO_TENSORS[case]
    with pytest.raises(lk.errors.LaplaceKFError) as refused:
        {**ENTRIES, **OTHER}[entry](*fitted[dense], x)  # type: ignore[arg-type]
    assert words in str(refused.value) or (case, entry) == ("nothing", "kfac")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("before", [True, False])
def test_nested_tensors_inside_are_named(layout: torch.layout, before: bool) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if before else self.layer(x)
            ragged = torch.nested.as_nested_tensor([*x[:, :2], x[0]], layout=layout)
            padded = torch.nested.to_padded_tensor(self.layer(ragged) if before else ragged, 0.0)
            z: Tensor = self.out(padded.sum(1)[: len(x)])
            return z

    model, x = Ragged(), torch.ones(8, 3, 4)
    if layout is torch.jagged and not before:  # no parameter meets it
        lk.LaplacePosterior(model, "categorical").fit(x, Y)
        return
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"a nested tensor.*pad instead"):
        lk.LaplacePosterior(model, "categorical").fit(x, Y)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_sparse_inputs_are_taken_as_dense_ones(structure: str, layout: torch.layout) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(8, 4) * (torch.rand(8, 4) < 0.4), dense()
    sparse = x.to_sparse(layout=layout)
    wanted = lk.LaplacePosterior(model, "categorical", structure).fit(x, Y)
    for found in (
        lk.LaplacePosterior(model, "categorical", structure).fit(sparse, Y),
        lk.LaplacePosterior(model, "categorical", structure).fit([(sparse, Y)]),
    ):
        torch.testing.assert_close(found.precision.dense(), wanted.precision.dense())
        torch.testing.assert_close(found.predict(sparse, samples=3).probs, found.predict(x, samples=3).probs)


def test_targets_on_meta_are_refused() -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match="meta"):
        lk.LaplacePosterior(dense(), "categorical").fit(torch.ones(8, 4), Y.to("meta"))


def test_errors_of_the_model_itself_are_its_own() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="out of coffee"):
        lk.LaplacePosterior(Broken(4, 3), "categorical").fit(torch.ones(8, 4), Y)


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        ("categorical", Y + 1),
        ("categorical", Y.double()),
        ("categorical", torch.full((8, 3), 0.9)),
        ("bernoulli", torch.full((8, 3), 2)),
        ("poisson", torch.full((8, 3), -1)),
    ],
)
def test_targets_that_cannot_be_are_refused(likelihood: str, targets: Tensor) -> None:
    with pytest.raises(lk.errors.InvalidTarget):
        lk.LaplacePosterior(dense(), likelihood).fit(torch.ones(8, 4), targets)
