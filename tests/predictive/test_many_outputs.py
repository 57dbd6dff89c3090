"""Linearised last layers of many outputs: exact, and without ``C × C`` numbers for an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import laplace_kf as lk
from laplace_kf.likelihoods import predicting
from laplace_kf.outputs.spread import SharedBasis, Spread
from laplace_kf.outputs.wide_spread import WideSpread
from laplace_kf.predictive import Linearization
from laplace_kf.predictive.heads import MANY
from laplace_kf.structures.kron import Kronecker

CLASSES, WIDTH = MANY + 6, 3


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return found


def fitted(likelihood: Any, classes: int = CLASSES, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes)).to(dtype)
    x = torch.randn(9, 4, dtype=dtype)
    y = torch.randint(0, classes, (9,)) if likelihood == "categorical" else torch.randn(9, classes, dtype=dtype)
    return lk.LaplacePosterior(model, likelihood, parameters="last_layer", **options).fit((x, y)), x


def oracle(posterior: Any, x: Tensor) -> Tensor:
    """``J Λ⁻¹ Jᵀ`` from the dense precision, ``(N, C, C)``."""
    with torch.no_grad():
        a = posterior.model[1](posterior.model[0](x))
    inverse = torch.linalg.inv(posterior.precision.dense())
    eye = torch.eye(CLASSES, dtype=x.dtype)
    rows = [torch.cat([torch.kron(eye, row[None]), eye], 1) for row in a]
    return torch.stack([row @ inverse @ row.T for row in rows])


CASES = [
    {"structure": "kron"}, {"structure": "kron", "damping": "factored"}, {"structure": "kron", "damping": "balanced"},
    {"structure": "diag"}, {"structure": "ekfac"}, {"structure": Kronecker(max_side=8, wide_rank=0)},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:structure")
@pytest.mark.parametrize("options", CASES, ids=["kron", "factored", "balanced", "diag", "ekfac", "sides"])
def test_last_layers_have_the_dense_covariance(options: dict[str, Any]) -> None:
    posterior, x = fitted("categorical", **options)
    network = Linearization(posterior.model, None, posterior.mean, x, keep=False)
    found = network.spreads([posterior.precision])
    assert found is not None, "the fast path did not run"
    wanted = oracle(posterior, x)
    torch.testing.assert_close(found[0].covariance()[:, 0], wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[0].variance()[:, 0], wanted.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-10)
    assert network.spreads([posterior.precision_at(3.0, 2.0)]) is not None


@pytest.mark.filterwarnings("ignore:structure")
@pytest.mark.parametrize("damping", ["exact", "balanced"])
def test_last_layers_with_a_low_rank_have_the_dense_covariance(damping: str) -> None:
    posterior, x = fitted("categorical", structure=Kronecker(max_side=8, wide_rank=2), damping=damping)
    network = Linearization(posterior.model, None, posterior.mean, x, keep=False)
    found = network.spreads([posterior.precision])
    assert found is not None and isinstance(found[0], WideSpread), "the fast path did not run"
    wanted = oracle(posterior, x)
    assert posterior.curvature.entries[0][1].outputs.rank == 2, "there is no low rank to be seen"
    lower = torch.linalg.inv(torch.linalg.cholesky(wanted))
    off = lower @ found[0].covariance()[:, 0] @ lower.mT - torch.eye(CLASSES).double()
    assert float(off.abs().max()) < 1e-5
    one = torch.ones((), dtype=torch.float64)
    alone = posterior.curvature.entries[0][1].narrowed().precision(posterior.n_data, one, damping)
    torch.testing.assert_close(posterior.precision.entries[0][1].diag(), alone.diag())
    probs = posterior.predict(x, method="linearized", samples=4, generator=torch.Generator().manual_seed(0)).probs
    torch.testing.assert_close(probs.sum(1), torch.ones(len(x)).double())


def test_few_outputs_and_whole_networks_go_the_other_way() -> None:
    torch.manual_seed(0)
    few, x = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5)).double(), torch.randn(9, 4).double()
    posterior = lk.LaplacePosterior(few, "categorical").fit((x, torch.randint(0, 5, (9,))))
    assert Linearization(few, None, posterior.mean, x).spreads([posterior.precision]) is None
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    whole = lk.LaplacePosterior(model, "categorical").fit((x, torch.randint(0, CLASSES, (9,))))
    assert Linearization(model, None, whole.mean, x).spreads([whole.precision]) is None
    assert whole.predict(x, method="linearized", samples=3).probs.shape == (9, CLASSES)


def spreads() -> list[Spread]:
    torch.manual_seed(1)
    weights, basis = torch.rand(2, 3, 5).double(), torch.randn(5, 5).double()
    return [SharedBasis(weights, None), SharedBasis(weights, basis)]


@pytest.mark.parametrize("spread", spreads(), ids=["diagonal", "basis"])
def test_every_operation_is_that_of_the_covariance(spread: Spread) -> None:
    dense = spread.covariance()
    torch.testing.assert_close(spread.variance(), dense.diagonal(dim1=-2, dim2=-1))
    v = torch.arange(5.0).double()
    torch.testing.assert_close(spread.product(v), dense @ v)
    # the draws of unit vectors are the columns of a root
    root = spread.colour(torch.eye(spread.noise_size).double()).permute(1, 2, 3, 0)
    torch.testing.assert_close(root @ root.mT, dense)
    torch.testing.assert_close(spread.scaled(2.5).covariance(), 2.5 * dense)
    torch.testing.assert_close(spread.part(slice(1, 2)).covariance(), dense[1:])
    again = spread.part(slice(0, 1)).joined([spread.part(slice(1, 2))])
    torch.testing.assert_close(again.covariance(), dense)


def test_predictions_follow_the_dense_covariance() -> None:
    posterior, x = fitted("categorical")
    wanted = oracle(posterior, x)
    outputs = posterior.model(x).detach()
    likelihood = posterior.likelihood
    options = {"samples": 8_000, "generator": torch.Generator().manual_seed(0)}
    found = posterior.predict(x, method="linearized", **options)
    variance = wanted.diagonal(dim1=1, dim2=2)
    other = likelihood.predict_gaussian(outputs, variance, wanted[:, None], "mc", **options)
    torch.testing.assert_close(found.probs, other.probs, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(found.entropy, other.entropy, rtol=1e-2, atol=1e-2)
    for link in ("probit", "bridge"):
        exact = likelihood.predict_gaussian(outputs, variance, wanted[:, None], link)
        torch.testing.assert_close(posterior.predict(x, method="linearized", link=link).probs, exact.probs)


def test_regression_has_the_joint_density_of_the_dense_covariance() -> None:
    posterior, x = fitted("gaussian")
    wanted, mean = oracle(posterior, x), posterior.model(x).detach()
    y = mean + 0.3
    found = posterior.predict(x, method="linearized")
    full = torch.distributions.MultivariateNormal(mean, wanted + torch.eye(CLASSES).double())
    torch.testing.assert_close(found.log_prob(y), full.log_prob(y))
    torch.testing.assert_close(found.entropy, full.entropy())
    torch.testing.assert_close(found.distribution.log_prob(y), full.log_prob(y))
    torch.testing.assert_close(found.epistemic_variance, wanted.diagonal(dim1=1, dim2=2))


@pytest.mark.filterwarnings("ignore:structure")
@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("method", ["linearized", "probit"])
def test_no_input_makes_a_matrix_over_pairs_of_outputs(structure: str, method: str) -> None:
    classes, samples, rows = 400, 10, 5
    posterior, x = fitted("categorical", classes, torch.float32, structure=structure)
    posterior.precision.logdet()
    with Largest() as largest:
        posterior.predict(x[:rows], method=method, samples=samples)
    # once a basis of the posterior, squared; for one input there is nothing of that size
    assert largest.numbers <= classes**2 < rows * classes**2
    if structure == "diag":
        assert largest.numbers <= 2 * max(samples * rows, WIDTH + 1) * classes


def test_functional_covariance_goes_the_same_way() -> None:
    posterior, x = fitted("categorical")
    wanted = oracle(posterior, x)
    torch.testing.assert_close(posterior.functional_covariance(x), wanted, rtol=1e-8, atol=1e-10)
    variances = posterior.functional_covariance(x, diagonal_only=True)
    torch.testing.assert_close(variances, wanted.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("classes", [5, CLASSES])
def test_runs_of_inputs_are_one_prediction(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x = fitted("categorical", classes)

    def predicted() -> Any:
        generator = torch.Generator().manual_seed(0)
        return posterior.predict(x, method="linearized", samples=6, generator=generator)

    whole = predicted()
    monkeypatch.setattr(predicting, "DRAWN", 6 * classes * 2)
    with Largest() as largest:
        parts = predicted()
    y = torch.arange(9) % classes
    torch.testing.assert_close(parts.probs, whole.probs)
    torch.testing.assert_close(parts.log_prob(y), whole.log_prob(y))
    torch.testing.assert_close(parts.mutual_information, whole.mutual_information)
    torch.testing.assert_close(parts.distribution.probs, whole.distribution.probs)
    assert largest.numbers <= max(6 * classes * 2, classes**2 * 9)


@pytest.mark.parametrize("method", ["probit", "linearized"])
def test_batches_keep_their_mutual_information(method: str) -> None:
    posterior, x = fitted("categorical", 5)
    batches = [(part, None) for part in x.split(4)]
    found = posterior.predict(iter(batches), method=method, generator=torch.Generator().manual_seed(0))
    assert found.mutual_information.shape == (9,)
    parts = [posterior.predict(b, method=method, generator=torch.Generator().manual_seed(0)) for b, _ in batches]
    torch.testing.assert_close(found.mutual_information, torch.cat([p.mutual_information for p in parts]))


@pytest.mark.filterwarnings("ignore:the best nll")
@pytest.mark.parametrize(("method", "close"), [("probit", 1e-6), ("linearized", 0.05)])
def test_tuning_keeps_what_the_covariances_are_made_of(method: str, close: float) -> None:
    posterior, x = fitted("categorical")
    y, grid = torch.arange(9) % CLASSES, {"n_data": [9.0], "prior_precision": [1.0, 5.0]}
    network = Linearization(posterior.model, None, posterior.mean, x, keep=False)
    precisions = [posterior.precision_at(9.0, prior) for prior in (1.0, 5.0)]
    variances, made = network.moments(precisions, posterior.likelihood, marginal=False)
    assert all(isinstance(each, SharedBasis) for each in made), "the fast path did not run"
    assert variances.shape == (2, 9, CLASSES)
    result = posterior.tune([(x[:5], y[:5]), (x[5:], y[5:])], method=method, samples=4_000, **grid)
    for row in result.table:
        posterior.n_data, posterior.prior_precision = row["n_data"], row["prior_precision"]
        loss = -posterior.predict(x, method=method, samples=4_000).log_prob(y).mean()
        assert float(loss) == pytest.approx(row["objective"], abs=close)


def directional(of: Any, x: Tensor) -> None:
    """The gradient of a function of one input ``(1, I)`` is that of finite differences, also the second one."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(x), x, create_graph=True)
    step, direction = 1e-5, torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    ahead, behind = (x.detach() + sign * step * direction for sign in (1, -1))
    difference = (of(ahead) - of(behind)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)
    (second,) = torch.autograd.grad((gradient * direction).sum(), x)
    ends = []
    for end in (ahead, behind):
        end = end.clone().requires_grad_()
        ends.append((torch.autograd.grad(of(end), end)[0] * direction).sum())
    torch.testing.assert_close((second * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parameters", ["last_layer", "all"])
@pytest.mark.parametrize("what", ["probit", "linearized", "variance", "covariance", "joint"])
def test_gradients_to_the_input_with_many_outputs(parameters: str, what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, MANY)).double()
    x = torch.randn(9, 4).double()
    posterior = lk.LaplacePosterior(model, "categorical", "diag", parameters=parameters)
    posterior.fit((x, torch.randint(0, MANY, (9,))))
    weight = torch.randn(MANY, generator=torch.Generator().manual_seed(5)).double()

    def of(x: Tensor) -> Tensor:
        if what in ("probit", "linearized"):
            generator = torch.Generator().manual_seed(0)
            return posterior.predict(x, method=what, samples=4, generator=generator).probs[0] @ weight
        if what == "variance":
            return posterior.functional_covariance(x, diagonal_only=True)[0] @ weight
        full = posterior.functional_covariance(torch.cat([x, 2 * x]) if what == "joint" else x, joint=what == "joint")
        return weight @ full.reshape(-1, full.shape[-1])[:MANY, -MANY:] @ weight

    directional(of, x[:1])
