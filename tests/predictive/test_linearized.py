"""The linearised network against ``J Λ⁻¹ Jᵀ`` with a dense Jacobian and a dense precision, float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.operators import Basis, Blockwise, LowRank, Matrix, Ridge, Spectral
from laplace_kf.predictive import Linearization, covariance_shares, linearized, quadratic
from laplace_kf.predictive.precision_family import PrecisionFamily
from laplace_kf.tape import Block
from tests.cases import BY_NAME, CASES, Case, Problem, build, labels, mlp, normal, rng, tagged, truth
from tests.checks import Largest, close
from tests.fits import fitted_once

KINDS = [("full", "exact"), ("diag", "exact"), ("ekfac", "exact")]
MORE_KINDS = [
    ("kron", "factored"),
    ("kron", "balanced"),
    ("lowrank", "exact"),
    ("layer", "exact"),
    ("isotropic", "exact"),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def fitted(case: Case, structure: str, damping: str = "exact", **options: Any) -> tuple[Problem, Any]:
    return fitted_once(case, structure, split=False, damping=damping, **{"prior_precision": 0.7, **options})


def dense_covariance(case: Case, posterior: Any, structure: str, damping: str) -> Tensor:
    """The whole ``(N·C', N·C')`` from dense parts; Λ is the oracle's wherever the contract fixes it."""
    problem = case.make()
    prior = torch.full((problem.size,), 0.7, dtype=torch.float64)
    if structure in ("full", "diag") or (structure == "kron" and problem.kron == "blocks"):
        precision = truth(case).precision(structure, problem.n, prior, damping)
    else:
        precision = posterior.precision.dense()
    jacobian = truth(case).jacobian.flatten(0, 1)
    return jacobian @ torch.linalg.solve(precision, jacobian.T)


def diagonal_blocks(joint: Tensor, n: int) -> Tensor:
    """``(N, C', C')`` of ``(N·C', N·C')``."""
    parts = joint.reshape(n, joint.shape[0] // n, n, -1)
    return torch.stack([parts[i, :, i] for i in range(n)])


def check(posterior: Any, problem: Problem, joint: Tensor, outputs: Tensor) -> None:
    blocks = diagonal_blocks(joint, problem.n)
    close(posterior.functional_covariance(problem.x), blocks)
    close(posterior.functional_covariance(problem.x, joint=True), joint)
    variance = posterior.functional_covariance(problem.x, diagonal_only=True)
    assert variance.shape == outputs.shape
    close(variance.flatten(1), blocks.diagonal(dim1=1, dim2=2))


def check_covariance(case: Case, structure: str, damping: str) -> None:
    """Blocks, variances and the joint covariance."""
    problem, posterior = fitted(case, structure, damping)
    try:
        posterior.precision  # noqa: B018
    except lk.errors.IncompatiblePair:  # a damping that such blocks do not have
        with pytest.raises(lk.errors.IncompatiblePair):
            posterior.functional_covariance(problem.x)
        return
    check(posterior, problem, dense_covariance(case, posterior, structure, damping), truth(case).outputs)


@over_cases
def test_covariance(case: Case) -> None:
    """Every kind of layer."""
    check_covariance(case, "kron", "exact")


@pytest.mark.meets(case=CASES, kind=KINDS)
def test_covariance_of_other_structures(case: Case, kind: tuple[str, str]) -> None:
    """Every structure on every kind of layer, too, is among the contracts of the registered rules."""
    check_covariance(case, *kind)


@pytest.mark.meets(case=tagged("core"), kind=MORE_KINDS)
def test_covariance_of_more_kinds(case: Case, kind: tuple[str, str]) -> None:
    check_covariance(case, *kind)


@pytest.mark.share(3)
@over_cases
def test_both_ways_over_positions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model only chooses: the way that ``test_covariance`` does not go gives the same covariance."""
    chosen = quadratic.PositionForm.by_positions
    monkeypatch.setattr(quadratic.PositionForm, "by_positions", lambda self, width: not chosen(self, width))
    problem, posterior = fitted(case, "kron")
    check(posterior, problem, dense_covariance(case, posterior, "kron", "exact"), truth(case).outputs)


@pytest.fixture
def _tiny_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that every loop over examples, columns, outputs and rows takes single steps."""
    monkeypatch.setattr(linearized, "SMALL", 2)
    monkeypatch.setattr(linearized, "COLUMN_BYTES", 1)
    monkeypatch.setattr(covariance_shares, "ROW_NUMBERS", 1)
    monkeypatch.setattr(quadratic, "WORKING", 1)


@pytest.mark.share(3)
@pytest.mark.usefixtures("_tiny_runs")
@pytest.mark.parametrize(
    ("case", "structure"), [*((case, "kron") for case in CASES), *((case, "full") for case in tagged("core"))], ids=str
)
def test_runs_of_one(case: Case, structure: str) -> None:
    """Work cut into the smallest pieces gives the same covariance."""
    problem, posterior = fitted(case, structure)
    check(posterior, problem, dense_covariance(case, posterior, structure, "exact"), truth(case).outputs)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding-bag", "layernorm", "sequence", "attention"])
def test_several_precisions_at_once(name: str, keep: bool) -> None:
    """All (N, λ) of a grid together, one by one, and again later from what was kept."""
    case = BY_NAME.get(name) or next(c for c in CASES if name.split("-")[0] in c.name)
    problem, posterior = fitted(case, "kron")
    network = Linearization(problem.model, None, posterior.mean, problem.x, keep=keep)
    grid = [(n, p) for n in (1.0, 50.0, 1e3) for p in (1e-2, 1.0, 1e3)]
    precisions = [posterior.precision_at(n, p) for n, p in grid]
    together = network.covariances(precisions)
    jacobian = truth(case).jacobian
    for k, precision in enumerate(precisions):
        dense = jacobian @ torch.linalg.solve(precision.dense(), jacobian.transpose(1, 2))
        close(together[k], dense)
        close(network.covariance(precision), dense)
        close(network.variance(precision).flatten(1), dense.diagonal(dim1=1, dim2=2))
    mixed = [precisions[0], fitted(case, "diag")[1].precision, fitted(case, "full")[1].precision]
    close(network.covariances(mixed)[1], diagonal_blocks(dense_covariance(case, None, "diag", "exact"), problem.n))
    close(network.covariances(mixed)[2], diagonal_blocks(dense_covariance(case, None, "full", "exact"), problem.n))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_the_table_of_ratios(dtype: torch.dtype, tolerance: float) -> None:
    """``Σ ã²/(s t + λ)`` by interpolation, for spectra with zeros and over 20 orders of magnitude: relative error."""
    generator = rng(0)
    t = torch.cat([torch.zeros(5), 10 ** (torch.rand(1195, generator=generator) * 12 - 10)]).double()
    s = torch.cat([torch.zeros(3), 10 ** (torch.rand(397, generator=generator) * 14 - 12)]).double()
    squares = torch.randn(7, 1, 1200, generator=generator, dtype=torch.float64).square().to(dtype)
    basis = Basis.identity()
    points = [(n, p) for n in (1.0, 1e3, 1e6) for p in (1e-4, 1.0, 1e4)]
    ridges = [Ridge(n * s[None].to(dtype), t[None].to(dtype), torch.tensor(p, dtype=dtype)) for n, p in points]
    shared = [Ridge(r.outputs, ridges[0].inputs, r.shift) for r in ridges]
    family = PrecisionFamily([Spectral(basis, basis, ridge, "b") for ridge in shared])
    assert family._table is not None
    found = family.weights(squares).double()
    for k, ridge in enumerate(shared):
        grid = ridge.outputs.double()[0, :, None] * ridge.inputs.double()[0] + ridge.shift.double()
        expected = squares[:, 0].double() @ (1 / grid).T
        assert float((found[:, k] / expected - 1).abs().max()) <= tolerance


def test_the_table_is_used_and_agrees() -> None:
    """A layer wide enough for the table: the same covariances as one by one."""
    model = build(lambda: mlp(300, 200, 3)).float()
    x = normal(12, 300).float()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, labels(3, 12)))
    precisions = [posterior.precision_at(n, p) for n in (10.0, 1e3, 1e5) for p in (0.1, 1.0, 10.0)]
    assert PrecisionFamily([p.entries[0][1] for p in precisions])._table is not None
    network = Linearization(model, None, posterior.mean, x)
    together = network.covariances(precisions)
    for k, precision in enumerate(precisions):
        close(together[k], network.covariance(precision), 1e-5)


# ------------------------------------------------------------------------------------------------ other precisions


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("name", ["layernorm", "small-cnn", "frozen-weight-and-bias", "prelu"])
def test_unequal_priors(name: str, structure: str) -> None:
    """A prior by parameter: dense blocks without a shared basis, and sums of two Kronecker products."""
    case = BY_NAME.get(name) or BY_NAME["conv2d"]
    prior = {"*bias*": 3.0, "*": 0.4}
    problem, posterior = fitted(case, structure, prior_precision=prior)
    jacobian = truth(case).jacobian.flatten(0, 1)
    joint = jacobian @ torch.linalg.solve(posterior.precision.dense(), jacobian.T)
    check(posterior, problem, joint, truth(case).outputs)


def whole(posterior: Any, matrix: Matrix) -> Blockwise:
    layout = posterior.precision.layout
    block = Block("all", layout.names, layout.shapes, (1, layout.size, 1), None, False)
    return Blockwise(layout, [(block, matrix)])


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("case", "equal"), [*((case, False) for case in CASES), *((case, True) for case in tagged("core"))], ids=str
)
def test_low_rank_plus_diagonal(case: Case, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Woodbury between the columns; no per-example gradient is formed where the block has inputs and columns.

    A weight that is also used as its transpose has no such form and goes through per-example gradients.
    """
    problem, posterior = fitted(case, "diag")
    vectors = torch.linalg.qr(normal(problem.size, min(4, problem.size), seed=5)).Q
    values = torch.tensor([30.0, 4.0, 0.2, 0.0], dtype=torch.float64)[: vectors.shape[1]]
    prior = torch.tensor(0.8, dtype=torch.float64) if equal else normal(problem.size, seed=6).square() + 0.3
    precision = whole(posterior, LowRank(vectors, values, prior))
    jacobian = truth(case).jacobian.flatten(0, 1)
    joint = jacobian @ torch.linalg.solve(precision.dense(), jacobian.T)
    network = Linearization(problem.model, None, posterior.mean, problem.x)
    close(network.covariance(precision, joint=True), joint)
    if any(block.turned is not None for block, _ in posterior.precision.entries):
        close(network.covariance(precision), diagonal_blocks(joint, problem.n))
        return
    monkeypatch.setattr(lk.tape.OuterSignals, "jacobian", lambda self: pytest.fail("a Jacobian was formed"))
    monkeypatch.setattr("laplace_kf.tape.signals.FILLED", math.inf)  # for small ones, too
    monkeypatch.setattr(lk.tape.LookupSignals, "jacobian", lambda self: pytest.fail("a Jacobian was formed"))
    close(network.covariance(precision), diagonal_blocks(joint, problem.n))


class Plain(Matrix):
    """A matrix with nothing but its dense form."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    def dense(self) -> Tensor:
        return self.matrix

    def scaled(self, factor: float | Tensor) -> Matrix:
        return Plain(self.matrix * factor)


@pytest.mark.parametrize("name", ["layernorm", "attention", "conv2d"])
def test_any_matrix(name: str) -> None:
    """A matrix that only knows its dense form, over all parameters and for each block."""
    case = BY_NAME.get(name) or next(c for c in CASES if name in c.name)
    problem, posterior = fitted(case, "kron")
    root = normal(problem.size, problem.size, seed=8)
    matrix = root @ root.T + torch.eye(problem.size, dtype=torch.float64)
    jacobian = truth(case).jacobian
    network = Linearization(problem.model, None, posterior.mean, problem.x)
    by_block = Blockwise(posterior.precision.layout, [(b, Plain(m.dense())) for b, m in posterior.precision.entries])
    for precision in (whole(posterior, Plain(matrix)), by_block):
        dense = jacobian @ torch.linalg.inv(precision.dense()) @ jacobian.transpose(1, 2)
        close(network.covariance(precision), dense)


# ------------------------------------------------------------------------------------------------ where and when


@pytest.mark.parametrize("name", ["layernorm", "gru", "attention", "conv2d", "tuple-inputs", "dict-batch", "own-scale"])
@pytest.mark.parametrize("structure", ["kron", "full"])
def test_at_the_mean_and_not_at_the_models_weights(name: str, structure: str) -> None:
    """A model that was trained on after the fit: outputs and Jacobian are those of the posterior's mean."""
    case = BY_NAME.get(name) or next(c for c in CASES if name in c.name)
    problem, posterior = fitted(case, structure)
    expected = posterior.functional_covariance(problem.x)
    outputs = Linearization(problem.model, None, posterior.mean, problem.x).outputs
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng(3), dtype=parameter.dtype))
    moved = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    problem.model.requires_grad_(False)
    close(posterior.functional_covariance(problem.x), expected)
    close(Linearization(problem.model, None, posterior.mean, problem.x).outputs, outputs)
    for name, parameter in problem.model.named_parameters():
        assert torch.equal(parameter, moved[name]) and not parameter.requires_grad and parameter.grad is None


def test_forward_function_and_loaded_posterior(tmp_path: Any) -> None:
    """``forward=`` gets ``x`` itself; a posterior read from a file predicts at the file's mean."""
    model = build(lambda: mlp(3, 4, 2))
    x, y = normal(6, 3), labels(2, 6)
    plain = lk.LaplacePosterior(model, "categorical").fit((x, y))
    given = lk.LaplacePosterior(model, "categorical", forward=lambda m, b: (m(b["x"]), b.get("y")))
    given.fit([{"x": x, "y": y}])
    close(given.functional_covariance({"x": x}), plain.functional_covariance(x))
    plain.save(tmp_path / "p")
    other = build(lambda: mlp(3, 4, 2), seed=9)
    close(lk.LaplacePosterior.load(tmp_path / "p", other).functional_covariance(x), plain.functional_covariance(x))


def test_examples_that_cannot_be_cut_out() -> None:
    """A table that is as long as there are examples, shared by all: the minibatch is taken as a whole."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(3, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.weight(torch.tanh(x + table.mean(0)))

    model = build(Table)
    x, table = normal(40, 3), normal(40, 3, seed=4)
    posterior = lk.LaplacePosterior(model, "categorical").fit([((x, table), labels(2, 40))])
    inputs = torch.tanh(x + table.mean(0))
    rows = torch.cat([inputs, torch.ones(40, 1, dtype=torch.float64)], 1)
    jacobian = torch.einsum("ck,ni->ncki", torch.eye(2, dtype=torch.float64), rows)
    flat = torch.cat([jacobian[..., :3].flatten(2), jacobian[..., 3]], 2)
    dense = flat @ torch.linalg.inv(posterior.precision.dense()) @ flat.transpose(1, 2)
    close(posterior.functional_covariance((x, table)), dense)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(60, 120), nn.Tanh(), nn.Linear(120, 100), nn.Tanh(), nn.Linear(100, 10)),
        (60,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 24, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10)
        ),
        (3, 9, 9),
    ),
}


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("name", MODELS)
def test_no_jacobian_is_ever_formed(name: str, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor stays far below examples × outputs × parameters, and below the working memory."""
    make, shape = MODELS[name]
    model = build(make)
    x = normal(300, *shape)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit((x[:50], labels(10, 50)))
    precision = posterior.precision
    precision.logdet()
    monkeypatch.setattr(quadratic, "WORKING", 2**16)
    monkeypatch.setattr(linearized, "COLUMN_BYTES", 2**20)
    with Largest() as largest:
        found = posterior.functional_covariance(x)
    size = sum(p.numel() for p in model.parameters())
    jacobian = 300 * 10 * size
    assert largest.numel < jacobian / 50, f"{largest.numel} of {jacobian}"
    assert found.shape == (300, 10, 10)


def test_too_large_a_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linearized.RESULT_BYTES == 4 * 2**30
    monkeypatch.setattr(linearized, "RESULT_BYTES", 4 * 50 * 30 * 30)
    model = nn.Linear(1, 30)
    posterior = lk.LaplacePosterior(model, "gaussian", structure="diag").fit((torch.ones(2, 1), torch.ones(2, 30)))
    assert posterior.functional_covariance(torch.ones(50, 1)).shape == (50, 30, 30)
    with pytest.raises(lk.errors.IncompatiblePair, match="diagonal_only"):
        posterior.functional_covariance(torch.ones(51, 1))
    assert posterior.functional_covariance(torch.ones(51, 1), diagonal_only=True).shape == (51, 30)


def test_arguments() -> None:
    problem, posterior = fitted(BY_NAME["layernorm"], "kron")
    with pytest.raises(ValueError, match="exclude"):
        posterior.functional_covariance(problem.x, diagonal_only=True, joint=True)
    with pytest.raises(lk.errors.NonFinite):
        posterior.functional_covariance(problem.x * float("nan"))
    posterior.prior_precision = 0.0
    with pytest.raises(lk.errors.NotPositiveDefinite):
        posterior.functional_covariance(problem.x)
    assert posterior.mean.keys() == set(problem.names)
    with pytest.raises(lk.errors.ShapeMismatch):
        Linearization(nn.Linear(2, 2), None, posterior.mean, problem.x)


def test_float32_and_half_precision() -> None:
    """The covariance is in the curvature's type, close to the float64 one."""
    model = build(lambda: mlp(3, 4, 2))
    x, y = normal(6, 3), labels(2, 6)
    exact = lk.LaplacePosterior(model, "categorical").fit((x, y)).functional_covariance(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        small = copy.deepcopy(model).to(dtype)
        found = lk.LaplacePosterior(small, "categorical").fit((x.to(dtype), y)).functional_covariance(x.to(dtype))
        assert found.dtype == torch.float32
        close(found.double(), exact, tolerance)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_differentiable_in_the_prior(structure: str) -> None:
    """As the evidence is: a tensor λ that requires a gradient gets one."""
    problem, posterior = fitted(BY_NAME["layernorm"], structure)
    lam = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    posterior.prior_precision = lam
    (slope,) = torch.autograd.grad(posterior.functional_covariance(problem.x).sum(), lam)
    values = []
    for value in (0.7 - 1e-6, 0.7 + 1e-6):
        posterior.prior_precision = value
        values.append(float(posterior.functional_covariance(problem.x).sum()))
    assert float(slope) == pytest.approx((values[1] - values[0]) / 2e-6, rel=1e-5)


def test_subnetwork_of_single_weights() -> None:
    """A posterior over chosen entries: the others are known, and add nothing."""
    problem = BY_NAME["layernorm"].make()
    size = problem.size // 3
    chosen = truth(BY_NAME["layernorm"]).theta.abs().argsort(descending=True)[:size].sort().values
    subnetwork = lk.Subnetwork(size, by="magnitude")
    posterior = lk.LaplacePosterior(problem.model, "categorical", structure="full", parameters=subnetwork)
    posterior.fit([problem.batch()])
    jacobian = truth(BY_NAME["layernorm"]).jacobian[..., chosen]
    dense = jacobian @ torch.linalg.inv(posterior.precision.dense()) @ jacobian.transpose(1, 2)
    close(posterior.functional_covariance(problem.x), dense)
