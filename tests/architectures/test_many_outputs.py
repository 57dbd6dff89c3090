"""Many outputs: lazy root columns, closed forms of the layer at the output, and refusals with numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import engine, models
from laplace_kf.operators import sketch_width
from laplace_kf.structures.kron import WIDE_RANK
from laplace_kf.tape import Observation
from tests.cases import binary, build, counts, labels, mlp, normal, rng
from tests.checks import Largest, close

STRUCTURES = ["diag", "kron", "full", "isotropic", "ekfac", "layer", "lowrank"]


# ------------------------------------------------------------------------------------------------ lazy roots


def softmax_matrix(z: Tensor) -> Tensor:
    p = torch.softmax(z, -1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


RULES: dict[str, tuple[lk.likelihoods.Likelihood, Callable[[], Tensor]]] = {
    "categorical": (lk.likelihoods.Categorical(), lambda: labels(4, 3, 2)),
    "bernoulli": (lk.likelihoods.Bernoulli(), lambda: binary(3, 2, 4)),
    "poisson": (lk.likelihoods.Poisson(), lambda: counts(3, 2, 4)),
    "gaussian": (lk.likelihoods.Gaussian(0.7, ignore_index=-100), lambda: normal(3, 2, 4)),
    "distribution": (
        lk.likelihoods.FromDistribution(lambda z: torch.distributions.Categorical(logits=z), ignore_index=-100),
        lambda: labels(4, 3, 2),
    ),
}


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_lazy_forms_equal_the_written_root(name: str, ignored: bool) -> None:
    rule, make = RULES[name]
    z, y = 3 * normal(3, 2, 4), make()
    if ignored:
        y[0, 1] = -100
        if y.ndim == 3 and name != "distribution":
            y[1, 0, 2] = -100
    root = rule.position_root(z, y)  # (K, N, T, C)
    kinds, count, positions, width = root.shape
    curvature = torch.einsum("kntc,kntd->ntcd", root, root)
    if name == "categorical" and not ignored:
        close(curvature, softmax_matrix(z))
    lazy = rule.root(z, y)
    assert (lazy.count, lazy.shape) == (kinds, (count, positions, width))
    close(lazy.norms(), root.square().sum(-1).permute(1, 2, 0))
    whole = torch.cat([lazy.columns(start, start + 3) for start in range(0, kinds * positions, 3)])
    assert whole.shape == (kinds * positions, count, positions, width)
    for index, column in enumerate(whole):
        wanted = torch.zeros_like(column)
        wanted[:, index % positions] = root[index // positions, :, index % positions]
        assert torch.equal(column, wanted)
    close(rule.summed_curvature(z, y), curvature.sum((0, 1)))
    close(rule.curvature_diagonal(z, y), curvature.diagonal(dim1=-2, dim2=-1))
    for c in range(width):
        close(rule.curvature_rows(c, z, y), curvature[:, :, c])
    v = normal(2, 3, 2, 4, seed=5)
    close(rule.curvature_product(z, v, y), torch.einsum("ntcd,sntd->sntc", curvature, v))


def test_closed_forms_keep_their_accuracy_for_confident_outputs() -> None:
    z = torch.tensor([[40.0, 0.0, -5.0]])
    wide = softmax_matrix(z.double() * torch.ones(1, 1, dtype=torch.float64))[0]
    p = torch.softmax(z.double(), -1)[0]
    exact = torch.stack([p[i] * (p.sum() - p[i]) if i else p[0] * (p[1] + p[2]) for i in range(3)])
    rule = lk.likelihoods.Categorical()
    close(rule.curvature_diagonal(z)[0, 0].double(), exact, 1e-6)
    found = rule.summed_curvature(z).double()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(found[i, j] / wide[i, j]) - 1) < 1e-5
    assert float((found.diagonal() / exact - 1).abs().max()) < 1e-5


# ---------------------------------------------------------------------------------------- the layer at the output


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1))


class Cast(nn.Module):
    """Outputs that are cast and copied after the last layer, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).float().clone()


CLOSED: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Tensor], Callable[[], Tensor]]] = {
    "mlp-categorical": (lambda: mlp(3, 5, 4), "categorical", lambda: normal(6, 3), lambda: labels(4, 6)),
    "mlp-bernoulli": (lambda: mlp(3, 5, 4), "bernoulli", lambda: normal(6, 3), lambda: binary(6, 4)),
    "mlp-gaussian": (lambda: mlp(3, 5, 2), lk.likelihoods.Gaussian(0.5), lambda: normal(6, 3), lambda: normal(6, 2)),
    "no-bias": (lambda: mlp(3, 5, 4, bias=False), "categorical", lambda: normal(6, 3), lambda: labels(4, 6)),
    "sequence": (lambda: mlp(3, 5, 4), "categorical", lambda: normal(6, 2, 3), lambda: labels(4, 6, 2)),
    "pixels": (convolutional, "categorical", lambda: normal(6, 2, 3, 2), lambda: labels(4, 6, 3, 2)),
    "mixture": (lambda: mlp(3, 5, 3), lk.likelihoods.BernoulliMixture(), lambda: normal(6, 3), lambda: binary(6, 1)),
    "cast": (Cast, "categorical", lambda: normal(6, 3), lambda: labels(4, 6)),
}


@pytest.mark.pairs(name=CLOSED, structure=STRUCTURES, parameters=["all", "last_layer"])
def test_closed_forms_equal_the_columns(
    structure: str, name: str, parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, rule, inputs, targets = CLOSED[name]
    model, x, y = build(make), inputs(), targets()
    if name == "cast":
        model, x = model.float(), x.float()
    if name in ("sequence", "pixels"):
        y.flatten()[[0, 3, 4]] = -100

    def fitted() -> Tensor:
        return lk.curvature.estimate(model, rule, [(x, y)], structure, parameters=parameters).mean().dense().double()

    used: list[int] = []
    original = Observation.output_signals

    def recorded(self: Observation, *args: Any) -> Any:
        found = original(self, *args)
        used.append(len(found))
        return found

    monkeypatch.setattr(Observation, "output_signals", recorded)
    closed = fitted()
    together = structure == "lowrank" or (structure == "full" and parameters == "all")  # needs the columns themselves
    assert used == ([] if together else [1])
    monkeypatch.setattr(Observation, "output_signals", lambda self, *args: {})
    close(closed, fitted(), 1e-5 if name == "cast" else 1e-11)


@pytest.mark.parametrize("options", [{"sharing": "reduce"}, {"max_side": 3}, {"sharing": "reduce", "max_side": 3}])
def test_closed_forms_of_other_kronecker_factors(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build(lambda: mlp(3, 5, 4)), normal(6, 2, 3), labels(4, 6, 2)
    y[0, 1] = -100
    closed = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", **options).mean().dense()
    monkeypatch.setattr(Observation, "output_signals", lambda self, *args: {})
    close(closed, lk.curvature.estimate(model, "categorical", [(x, y)], "kron", **options).mean().dense())


def test_an_output_in_another_order_takes_the_columns() -> None:
    """A layer at the output whose features are not the likelihood's classes: here they are the positions."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # (N, 4, 4), read as 4 positions with 4 classes

    model, x, y = build(Turned), normal(3, 2, 4), labels(4, 3, 4)
    found = lk.curvature.estimate(model, "categorical", [(x, y)], "full", layout="channels_last").mean().dense()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        return F.conv1d(x, flat[:8].reshape(4, 2, 1), flat[8:])

    jacobian = torch.autograd.functional.jacobian(outputs, weights).reshape(12, 4, -1)
    h = softmax_matrix(outputs(weights)).reshape(12, 4, 4)
    close(found, torch.einsum("mcp,mcd,mdq->pq", jacobian, h, jacobian) / 3)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("parameters", ["all", "last_layer"])
@pytest.mark.parametrize("estimator", ["sampled", "projection", "importance"])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_few_columns_need_nothing_of_classes_squared_per_example(
    structure: str, estimator: str, parameters: str
) -> None:
    n, classes = 48, 300
    model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)))
    with Largest() as largest:
        lk.curvature.estimate(
            model, "categorical", [(normal(n, 6), labels(classes, n))], structure, estimator, parameters
        )
    # the output factor itself, or a few times the outputs
    assert largest.numel <= max(classes * (classes + 16), 4 * n * classes)  # a factor's rows are whole cache lines


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_exact_last_layer_needs_nothing_of_classes_squared_per_example(structure: str) -> None:
    n, classes = 48, 300
    model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)))
    with Largest() as largest:
        lk.curvature.estimate(
            model, "categorical", [(normal(n, 6), labels(classes, n))], structure, parameters="last_layer"
        )
    assert largest.numel <= max(classes * (classes + 16), 4 * n * classes)  # a factor's rows are whole cache lines


def test_exact_columns_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    n, classes = 16, 120
    model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)))
    monkeypatch.setattr(engine, "MEMORY_BYTES", 8 * 4 * n * classes)
    with Largest() as largest:
        lk.curvature.estimate(model, "categorical", [(normal(n, 6), labels(classes, n))], "kron")
    assert largest.numel <= max(classes**2, 8 * n * classes)


@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "projection"])
def test_a_vocabulary_of_fifty_thousand(estimator: str, structure: str) -> None:
    """A head with 50,000 outputs, fitted, scored and sampled; nothing larger than its weights, or than the sketch."""
    n, classes, width = 8, 50_000, 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, classes))
    x, y = normal(n, 3).float(), labels(classes, n)
    with Largest() as largest:
        posterior = lk.LaplacePosterior(model, "categorical", structure, estimator, "last_layer")
        posterior.fit([(x, y)], generator=rng(0))
        posterior.predict(x, method="mc", samples=2, generator=rng(0))
    sketch = sketch_width(WIDE_RANK) if structure == "kron" else 0
    assert largest.numel <= max(4 * max(n, width + 1), sketch) * classes
    if estimator == "exact":
        p = torch.softmax(model(x).detach().double(), -1)
        h = torch.relu(model[0](x)).detach().double()
        weights, squares = p * (1 - p), h.square()
        wanted = weights.T @ squares / n if structure == "diag" else weights.mean(0)[:, None] * squares.mean(0)
        found = posterior.curvature.diag()[: classes * width].reshape(classes, width)
        close(found.double(), wanted, 1e-4)


# ------------------------------------------------------------------------------------------------ refusals


def test_very_many_columns_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MANY_COLUMNS", 5)
    model, x, y = build(lambda: mlp(3, 4, 4)), normal(4, 2, 3), labels(4, 4, 2)
    with pytest.warns(UserWarning, match=r"6 columns.*\(4, 2, 4\).*sampled.*last_layer") as caught:
        lk.curvature.estimate(model, "categorical", [(x, y)] * 3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.curvature.estimate(model, "categorical", [(x, y)], parameters="last_layer")
        lk.curvature.estimate(model, "categorical", [(x, y)], estimator="sampled")


def test_columns_that_cannot_fit_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LITTLE", 0)
    monkeypatch.setattr(models, "memory_bytes", lambda device: 100)
    model, x, y = build(lambda: mlp(3, 4, 4)), normal(4, 3), labels(4, 4)
    with pytest.raises(lk.errors.IncompatiblePair, match=r"one column.*\(4, 4\) needs .*MiB.*last_layer.*sampled"):
        lk.curvature.estimate(model, "categorical", [(x, y)])


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < models.memory_bytes(torch.device("cpu")) < 2**50


def test_the_memory_of_this_machine_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every minibatch asks; a limit that changes is seen soon."""
    cpu, reads, now = torch.device("cpu"), [], [5.0]
    monkeypatch.setattr(models.Path, "read_text", lambda path: (reads.append(path), str(2**20 * len(reads)))[1])
    monkeypatch.setattr(models.time, "monotonic", lambda: now[0])
    models._machine_bytes.cache_clear()
    assert [models.memory_bytes(cpu) for _ in range(3)] == [2**20] * 3 and len(reads) == 1
    now[0] = 6.1
    assert models.memory_bytes(cpu) == 2**21 and len(reads) == 2
    models._machine_bytes.cache_clear()
