"""``lk.curvature`` against the dense references: every case, structure and estimator."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import (
    BERNOULLI,
    BY_NAME,
    CASES,
    CATEGORICAL,
    Case,
    Problem,
    binary,
    build,
    gaussian,
    labels,
    mixture,
    mlp,
    normal,
    rng,
    tagged,
    truth,
)
from tests.checks import close


def by_id(case: Case) -> str:
    return case.name


def estimate(problem: Problem, data: Any = None, **options: Any) -> Any:
    """The public call, on the whole data as one batch unless ``data`` is given."""
    data = [problem.batch()] if data is None else data
    return lk.curvature.estimate(problem.model, problem.likelihood.build(lk), data, **options)


def expected(case: Case, structure: str) -> Tensor:
    return truth(case).structured(structure)


@pytest.fixture
def same_rng() -> Iterator[None]:
    """The caller's global generators do not advance."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert random.getstate() == before[2]


# of the low-rank structure on problems whose rank is at most its own: nothing is lost
MORE = ["ekfac", "layer", "lowrank"]
STRICT = [case for case in CASES if case.make().kron == "blocks"]

# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_exact_is_the_dense_ggn(case: Case, structure: str) -> None:
    problem = case.make()
    matrix = estimate(problem, structure=structure, estimator="exact").mean()
    close(matrix.dense(), expected(case, structure))
    close(matrix.diag(), expected(case, structure).diagonal())


@pytest.mark.parametrize("case", STRICT, ids=by_id)
def test_exact_kron_is_the_block_assembly(case: Case) -> None:
    problem = case.make()
    matrix = estimate(problem, structure="kron", estimator="exact").mean()
    close(matrix.dense(), truth(case).kron)
    close(matrix.diag(), truth(case).kron.diagonal())


@pytest.mark.parametrize("case", [c for c in CASES if c not in STRICT], ids=by_id)
def test_kron_where_the_contract_leaves_the_block_open(case: Case) -> None:
    """Factors or exact diagonal, but never a dropped parameter, and exact where both are."""
    problem = case.make()
    dense = estimate(problem, structure="kron").mean().dense()
    assert dense.shape == (problem.size, problem.size)
    close(dense, dense.T)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-10 * float(dense.abs().max())
    reached = truth(case).ggn.diagonal() > 1e-12
    assert bool((dense.diagonal()[reached] > 0).all()), "a parameter with curvature has none in the Kronecker matrix"
    if problem.kron == "single":
        for i in range(problem.n):
            one = problem.at(slice(i, i + 1))
            diagonal = oracles.dense_ggn(one.model, one.x, one.y, one.likelihood.nll).diagonal()
            close(estimate(one, structure="kron").mean().diag(), diagonal)


@pytest.mark.parametrize("case", tagged("reused"), ids=by_id)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_calls_are_added_before_squaring(case: Case, structure: str) -> None:
    """Example by example, so that no average can hide a factor."""
    problem = case.make()
    for i in range(problem.n):
        one = problem.at(slice(i, i + 1))
        ggn = oracles.dense_ggn(one.model, one.x, one.y, one.likelihood.nll)
        wanted = ggn if structure == "full" else torch.diag(ggn.diagonal())
        close(estimate(one, structure=structure).mean().dense(), wanted)


@pytest.mark.share(2)
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("case", STRICT, ids=by_id)
def test_empirical_fisher(case: Case, structure: str) -> None:
    problem, t = case.make(), truth(case)
    matrix = estimate(problem, structure=structure, estimator="empirical").mean()
    if structure == "full":
        close(matrix.dense(), t.empirical)
    elif structure == "diag":
        close(matrix.dense(), torch.diag(t.empirical.diagonal()))
    else:
        blocks = t.blocks(oracles.output_score(problem.likelihood.nll))
        close(matrix.dense(), oracles.assemble(blocks, problem.size))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_training_mode_is_ignored_and_kept(structure: str) -> None:
    """BatchNorm uses running statistics and dropout is off, whatever mode the model was handed over in."""
    for name in ("batchnorm1d", "batchnorm2d", "dropout-off"):
        case = BY_NAME[name]
        problem = case.make()
        problem.model.train()
        close(estimate(problem, structure=structure).mean().dense(), expected(case, structure))
        assert all(module.training for module in problem.model.modules())


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_the_model_of_a_caller_without_gradients(structure: str) -> None:
    """``no_grad`` around the call changes nothing."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    wanted = expected(case, structure)
    with torch.no_grad():
        close(estimate(problem, structure=structure).mean().dense(), wanted)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_positions_without_targets_contribute_nothing(structure: str) -> None:
    """An example without any target is in no sum and no count: the others' mean curvature is what it is without it."""
    case = BY_NAME["sequence-outputs-ignored"]
    problem = case.make()
    problem.y[1] = oracles.IGNORE
    rest = problem.at(torch.tensor([0, 2, 3]))
    t = truth(Case("", lambda: rest))
    found = estimate(problem, structure=structure)
    assert found.n_data == 3
    close(found.mean().dense(), t.structured(structure))
    empty = problem.at(slice(1, 2))
    both = estimate(problem, [rest.batch(), empty.batch()], structure=structure)
    close(both.mean().dense(), found.mean().dense())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_device_follows_the_model(structure: str) -> None:
    case = BY_NAME["conv2d-groups"]
    problem = case.make()
    problem.model.cuda()
    dense = estimate(problem, [tuple(t.cuda() for t in problem.batch())], structure=structure).mean().dense()
    assert dense.is_cuda
    close(dense.cpu(), expected(case, structure))


# ------------------------------------------------------------------------------------------------ selections


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("last_layer", ["2.weight", "2.bias"]),
        (["2.*"], ["2.weight", "2.bias"]),
        (["0.*"], ["0.weight", "0.bias"]),
        (["*.weight"], ["0.weight", "2.weight"]),
        (["2.bias", "2.weight", "0.weight"], ["0.weight", "2.weight", "2.bias"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_selected_parameters(structure: str, patterns: Any, names: list[str]) -> None:
    """Flat order is that of ``named_parameters`` whatever the order of the patterns."""
    problem = BY_NAME["tanh-mlp-categorical"].make()
    args = (problem.model, problem.x, problem.y)
    if structure == "kron":
        blocks = oracles.kron_blocks(*args, problem.likelihood.curvature, names)
        size = sum(problem.model.get_parameter(name).numel() for name in names)
        wanted = oracles.assemble(blocks, size)
    else:
        wanted = oracles.dense_ggn(*args, problem.likelihood.nll, names)
        wanted = torch.diag(wanted.diagonal()) if structure == "diag" else wanted
    close(estimate(problem, structure=structure, parameters=patterns).mean().dense(), wanted)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_last_layer_is_the_module_that_runs_last(structure: str) -> None:
    """Not the one registered last."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(3, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    model = build(Swapped)
    problem = Problem(model, normal(4, 2), labels(2, 4), CATEGORICAL)
    names = ["head.weight", "head.bias"]
    if structure == "kron":
        wanted = oracles.assemble(oracles.kron_blocks(model, problem.x, problem.y, CATEGORICAL.curvature, names), 8)
    else:
        wanted = oracles.dense_ggn(model, problem.x, problem.y, CATEGORICAL.nll, names)
        wanted = torch.diag(wanted.diagonal()) if structure == "diag" else wanted
    close(estimate(problem, structure=structure, parameters="last_layer").mean().dense(), wanted)


# ------------------------------------------------------------------------------------------------ sums over data


@pytest.mark.meets(case=[c for c in CASES if c.make().n > 1], structure=["full", "diag", "kron"])
def test_split_into_minibatches(case: Case, structure: str) -> None:
    """As the whole data as one batch, whose matrix is looked at above where the contract says what it is."""
    problem = case.make()
    split = estimate(problem, problem.uneven(), structure=structure)
    if structure == "kron" and problem.kron != "blocks":
        wanted = estimate(problem, structure=structure).mean().dense()
    else:
        wanted = expected(case, structure)
    close(split.mean().dense(), wanted)
    assert float(split.n_data) == problem.n


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("case", tagged("core"), ids=by_id)
def test_addition_scaling_and_totals(case: Case, structure: str) -> None:
    problem = case.make()
    first, second = (estimate(problem, [batch], structure=structure) for batch in problem.uneven())
    whole = estimate(problem, structure=structure)
    mean = whole.mean().dense()
    close((first + second).mean().dense(), mean)
    close((second + first).mean().dense(), mean)
    assert float((first + second).n_data) == problem.n
    close(whole.total().dense(), problem.n * mean)
    scaled = whole.scale(2.5)
    close(scaled.mean().dense(), mean)
    assert float(scaled.n_data) == pytest.approx(2.5 * problem.n)
    close(scaled.total().dense(), 2.5 * problem.n * mean)
    close(whole.mean().dense(), mean)  # operands are left as they were
    assert float(first.n_data) == problem.n - 1

    # A weighted sum (moving average): every mean - of a matrix, or of each factor - is the weighted one.
    weights = torch.tensor([0.9 * (problem.n - 1), 0.3], dtype=torch.float64)
    blend = (first.scale(0.9) + second.scale(0.3)).mean().dense()
    parts = [problem.at(slice(0, problem.n - 1)), problem.at(slice(problem.n - 1, problem.n))]
    if structure == "kron":
        pairs = [oracles.kron_blocks(p.model, p.x, p.y, p.likelihood.curvature) for p in parts]

        def average(one: Tensor | None, two: Tensor | None, by: Tensor = weights) -> Tensor | None:
            return None if one is None or two is None else (by[0] * one + by[1] * two) / by.sum()

        def rows(a: oracles.Block, b: oracles.Block) -> Tensor:
            return torch.tensor([0.9 * a.positions, 0.3 * b.positions], dtype=torch.float64)

        blocks = [
            oracles.Block(
                a.names, a.index, average(a.A, b.A), average(a.G, b.G, rows(a, b)), average(a.values, b.values)
            )
            for a, b in zip(*pairs, strict=True)
        ]
        close(blend, oracles.assemble(blocks, problem.size))
    else:
        dense = [oracles.dense_ggn(p.model, p.x, p.y, p.likelihood.nll, None, p.likelihood.curvature) for p in parts]
        wanted = (weights[0] * dense[0] + weights[1] * dense[1]) / weights.sum()
        close(blend, torch.diag(wanted.diagonal()) if structure == "diag" else wanted)


def test_kinds_of_data() -> None:
    """A pair of tensors, a list of batches, a generator and a DataLoader are the same data."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    dataset = torch.utils.data.TensorDataset(problem.x, problem.y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=False)
    kinds: dict[str, Any] = {
        "pair": (problem.x, problem.y),
        "list": problem.uneven(),
        "list of lists": [list(batch) for batch in problem.uneven()],
        "generator": (batch for batch in problem.uneven()),
        "loader": loader,
    }
    for kind, data in kinds.items():
        stats = estimate(problem, data, structure="full")
        assert float(stats.n_data) == problem.n, kind
        close(stats.mean().dense(), truth(case).ggn)


def test_defaults_are_kron_and_exact() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    stats = lk.curvature.estimate(problem.model, "categorical", [problem.batch()])
    close(stats.mean().dense(), truth(case).kron)


# ------------------------------------------------------------------------------------------------ ekfac, low rank


@pytest.mark.parametrize("case", [*tagged("core"), BY_NAME["conv2d-circular"]], ids=by_id)
def test_ekfac_has_the_exact_trace_and_the_smaller_error(case: Case) -> None:
    """Per block: the eigenbasis diagonal keeps the trace and is the best diagonal in that basis."""
    problem, t = case.make(), truth(case)
    dense = estimate(problem, structure="ekfac").mean().dense()
    for block in t.kron_blocks:
        index = block.index.reshape(-1)
        where = (index[:, None], index[None, :])
        exact, mine, kron = t.ggn[where], dense[where], block.dense()
        close(mine.trace(), exact.trace(), 1e-9)
        if block.values is None:
            assert float((mine - exact).norm()) <= float((kron - exact).norm()) * (1 + 1e-9) + 1e-12


# circular padding makes eigenvalues of A come in pairs, whose eigenvectors are not unique
PAIRS = [(c, s) for c in STRICT for s in MORE if (c.name, s) != ("conv2d-circular", "ekfac")]


@pytest.mark.share(2)
@pytest.mark.parametrize(("case", "structure"), PAIRS, ids=str)
def test_exact_in_the_other_structures(case: Case, structure: str) -> None:
    """Against rotated squares one example at a time, the layers' blocks of the dense matrix, and its eigenvectors."""
    problem = case.make()
    matrix = estimate(problem, structure=structure).mean()
    close(matrix.dense(), expected(case, structure), 1e-8)
    close(matrix.diag(), expected(case, structure).diagonal(), 1e-8)
    close(matrix.diag().sum(), truth(case).ggn.trace(), 1e-8)


OTHERS = [(c, s) for c in CASES for s in MORE if (c, s) not in PAIRS]


@pytest.mark.parametrize(("case", "structure"), OTHERS, ids=str)
def test_the_trace_is_exact(case: Case, structure: str) -> None:
    """Where the matrix is not fixed, too, however often and whichever way round a weight is used."""
    close(estimate(case.make(), structure=structure).mean().diag().sum(), truth(case).ggn.trace(), 1e-8)


# ------------------------------------------------------------------------------------------------ randomised estimators

RANDOM = ["sampled", "projection", "importance"]


def _tiny(name: str) -> Problem:
    return {
        "categorical": lambda: Problem(build(lambda: mlp(1, 2, 3)), normal(3, 1), labels(3, 3), CATEGORICAL),
        "bernoulli": lambda: Problem(build(lambda: mlp(1, 2, 2)), normal(3, 1), binary(3, 2), BERNOULLI),
        "gaussian": lambda: Problem(build(lambda: mlp(1, 2, 2)), normal(3, 1), normal(3, 2, seed=1), gaussian(0.7)),
        "heteroscedastic": lambda: BY_NAME["tanh-mlp-heteroscedastic"].make(),
        "poisson": lambda: BY_NAME["tanh-mlp-poisson"].make(),
        "mixture": lambda: Problem(build(lambda: mlp(1, 2, 3)), normal(3, 1), binary(3, 1), mixture("clip")),
        "sequence": lambda: BY_NAME["sequence-outputs-ignored"].make(),
        "batchnorm": lambda: BY_NAME["batchnorm1d"].make(),
        "conv": lambda: BY_NAME["conv2d-groups"].make(),
    }[name]()


def _reference(problem: Problem, structure: str, estimator: str) -> Tensor:
    t = truth(Case("", lambda: problem))
    if estimator == "sampled":  # always the Fisher
        if structure == "kron":
            return oracles.assemble(t.blocks(problem.likelihood.fisher), problem.size)
        return t.fisher if structure == "full" else torch.diag(t.fisher.diagonal())
    return t.structured(structure)


def _z_scores(draws: Tensor, mean: Tensor) -> Tensor:
    """Standardised deviation of the mean of the draws (R, ...) from ``mean``; 0 where nothing varies and all agree."""
    spread = draws.std(0) / draws.shape[0] ** 0.5
    gap = draws.mean(0) - mean
    floor = 1e-9 * float(mean.abs().max())
    assert float(gap[spread <= floor].abs().max() if bool((spread <= floor).any()) else 0.0) <= 10 * floor
    return torch.where(spread > floor, gap / spread.clamp(min=1e-300), torch.zeros_like(gap))


@pytest.mark.pairs(
    name=["categorical", "bernoulli", "gaussian", "mixture", "sequence", "batchnorm", "conv"],
    estimator=RANDOM,
    structure=["full", "diag", "kron"],
)
def test_random_estimators_are_unbiased(name: str, estimator: str, structure: str) -> None:
    problem = _tiny(name)
    generator = rng(3)
    runs = 12
    options: dict[str, Any] = {"columns": 1.0} if estimator == "importance" else {"samples": 2}
    # Every repetition of an example is a fresh draw: 12 runs of a few draws each give mean and standard error.
    data = [problem.batch(torch.arange(problem.n).repeat(20))]
    draws = torch.stack(
        [
            estimate(problem, data, structure=structure, estimator=estimator, generator=generator, **options)
            .mean()
            .dense()
            for _ in range(runs)
        ]
    )
    wanted = _reference(problem, structure, estimator)
    assert draws.dtype == torch.float64
    assert float(_z_scores(draws, wanted).abs().max()) < 6.5


@pytest.mark.parametrize("name", ["poisson", "heteroscedastic"])
@pytest.mark.parametrize("estimator", RANDOM)
def test_random_estimators_of_other_likelihoods(name: str, estimator: str) -> None:
    problem = _tiny(name)
    generator = rng(4)
    options: dict[str, Any] = {"columns": 1.0} if estimator == "importance" else {"samples": 5}
    data = [problem.batch(torch.arange(problem.n).repeat(20))]
    draws = torch.stack(
        [
            estimate(problem, data, structure="full", estimator=estimator, generator=generator, **options)
            .mean()
            .dense()
            for _ in range(20)
        ]
    )
    assert float(_z_scores(draws, _reference(problem, "full", estimator)).abs().max()) < 6.5


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("estimator", ["sampled", "projection"])
def test_many_samples_converge(estimator: str, structure: str) -> None:
    """2000 draws of every example in one call come within a few per cent."""
    problem = _tiny("categorical")
    wanted = _reference(problem, structure, estimator)
    options = {"structure": structure, "estimator": estimator, "generator": rng(0)}
    data = [problem.batch(torch.arange(problem.n).repeat(10))]
    many = estimate(problem, data, samples=200, **options).mean().dense()
    assert float((many - wanted).norm() / wanted.norm()) < 0.1


def test_sampled_targets_come_from_the_model_not_from_the_data() -> None:
    """Labels of the data have no influence."""
    problem = _tiny("categorical")
    other = Problem(problem.model, problem.x, (problem.y + 1) % 3, problem.likelihood)
    one, two = (
        estimate(p, structure="full", estimator="sampled", samples=5, generator=rng(1)).mean().dense()
        for p in (problem, other)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("estimator", RANDOM)
def test_generators(estimator: str, structure: str, same_rng: None) -> None:
    """Reproducible with one, different with another, fresh without."""
    problem = _tiny("categorical")

    def draw(generator: torch.Generator | None) -> Tensor:
        data = problem.uneven()
        return estimate(problem, data, structure=structure, estimator=estimator, generator=generator).mean().dense()

    assert torch.equal(draw(rng(5)), draw(rng(5)))
    # Draws of few columns may be the same by chance; looked at until one differs, which is soon.
    first, fresh, shared = draw(rng(5)), draw(None), rng(11)
    assert any(not torch.equal(first, draw(rng(seed))) for seed in range(6, 10))
    assert any(not torch.equal(fresh, draw(None)) for _ in range(100))
    one = draw(shared)
    assert any(not torch.equal(one, draw(shared)) for _ in range(3))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("estimator", RANDOM)
def test_minibatches_get_different_draws(estimator: str, structure: str) -> None:
    """The same batch many times averages towards the truth; one re-used seed would repeat the first draw for ever."""
    problem = _tiny("categorical")
    wanted = _reference(problem, structure, estimator)

    def error(repeats: int, seed: int) -> float:
        data = [problem.batch()] * repeats
        stats = estimate(problem, data, structure=structure, estimator=estimator, generator=rng(seed))
        return float((stats.mean().dense() - wanted).norm() / wanted.norm())

    single = sum(error(1, seed) for seed in range(8)) / 8
    many = sum(error(32, seed) for seed in range(2)) / 2
    assert many < 0.35 * single  # 1/5.7 expected


def test_importance_columns_is_the_budget() -> None:
    """More columns, less error; as many as there are: (nearly) exact."""
    problem = _tiny("categorical")
    wanted = truth(Case("", lambda: problem)).ggn

    def error(columns: float) -> float:
        errors = []
        for seed in range(12):
            stats = estimate(problem, structure="full", estimator="importance", columns=columns, generator=rng(seed))
            errors.append(float((stats.mean().dense() - wanted).norm() / wanted.norm()))
        return sum(errors) / len(errors)

    few, one, more = error(0.5), error(1.0), error(1.8)
    assert few > one > more


# ------------------------------------------------------------------------------------------------ recursive (KFRA)


@pytest.mark.parametrize("case", tagged("chain"), ids=by_id)
def test_recursive_is_kfra(case: Case) -> None:
    problem = case.make()
    blocks = oracles.kfra_factors(problem.model, problem.x, problem.y, problem.likelihood.curvature)
    wanted = oracles.assemble(blocks, problem.size)
    close(estimate(problem, structure="kron", estimator="recursive").mean().dense(), wanted)


@pytest.mark.parametrize("case", tagged("chain"), ids=by_id)
def test_recursive_with_batches_of_one_is_exact(case: Case) -> None:
    problem = case.make()
    stats = estimate(problem, problem.batches([1] * problem.n), structure="kron", estimator="recursive")
    close(stats.mean().dense(), truth(case).kron)


@pytest.mark.parametrize("case", tagged("linear"), ids=by_id)
def test_recursive_is_exact_for_linear_nets(case: Case) -> None:
    problem = case.make()
    close(estimate(problem, structure="kron", estimator="recursive").mean().dense(), truth(case).kron)


def test_recursive_refuses_convolutions_by_name() -> None:
    layers = OrderedDict(
        body=nn.Linear(4, 4),
        fold=nn.Unflatten(1, (1, 4)),
        conv=nn.Conv1d(1, 2, 2),
        flat=nn.Flatten(),
        head=nn.Linear(6, 2),
    )
    model = build(lambda: nn.Sequential(layers))
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"\bconv\b"):
        lk.curvature.estimate(
            model, "categorical", [(normal(3, 4), labels(2, 3))], structure="kron", estimator="recursive"
        )


@pytest.mark.parametrize(
    "name", ["conv2d", "small-cnn", "embedding", "gru", "bilinear", "residual", "reused-module", "tuple-inputs"]
)
def test_recursive_refuses_what_is_not_a_chain(name: str) -> None:
    problem = BY_NAME[name].make()
    with pytest.raises(lk.errors.LaplaceKFError):
        estimate(problem, structure="kron", estimator="recursive")


# ------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_ggn_vector_product(case: Case) -> None:
    problem = case.make()
    v = normal(problem.size, seed=21)
    if case.name == "embedding-padding":
        v[oracles.flat_index(problem.model)["embed.weight"][1]] = 0.0  # that row is a constant, not a parameter
    product = lk.curvature.ggn_vector_product(problem.model, problem.likelihood.build(lk), problem.uneven(), v)
    close(product, truth(case).ggn @ v)


@pytest.mark.parametrize("case", [*tagged("hessian"), BY_NAME["one-example"]], ids=by_id)
def test_hessian_vector_product(case: Case) -> None:
    problem = case.make()
    v = normal(problem.size, seed=22)
    data = problem.uneven() if problem.n > 1 else [problem.batch()]
    product = lk.curvature.hessian_vector_product(problem.model, problem.likelihood.build(lk), data, v)
    hessian = oracles.dense_hessian(problem.model, problem.x, problem.y, problem.likelihood.nll)
    close(product, hessian @ v)


@pytest.mark.parametrize("product", ["ggn_vector_product", "hessian_vector_product"])
def test_products_refuse_a_vector_of_another_length(product: str) -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    call: Callable[..., Tensor] = getattr(lk.curvature, product)
    with pytest.raises((lk.errors.ShapeMismatch, ValueError)):
        call(problem.model, "categorical", [problem.batch()], torch.zeros(problem.size + 1, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ identities


def test_relu_net_block_hessian_is_the_kron_of_one_example() -> None:
    """T7 with the package's Hessian product: piecewise linear nets, block diagonal of Hessian = block of the GGN."""
    case = BY_NAME["relu-mlp-bernoulli"]
    problem = case.make()
    eye = torch.eye(problem.size, dtype=torch.float64)
    hessian = torch.stack(
        [lk.curvature.hessian_vector_product(problem.model, "bernoulli", [problem.batch()], e) for e in eye]
    )
    for block in truth(case).kron_blocks:
        index = block.index.reshape(-1)
        where = (index[:, None], index[None, :])
        close(hessian[where], truth(case).ggn[where])


def test_softmax_rank() -> None:
    """Rank per example is C - 1 for a softmax (2.5)."""
    problem = BY_NAME["tanh-mlp-categorical"].make().at(slice(0, 1))
    dense = estimate(problem, structure="full").mean().dense()
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-9)) == 2


def test_empirical_fisher_is_not_the_fisher() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    empirical = estimate(problem, structure="full", estimator="empirical").mean().dense()
    assert float((empirical - truth(case).ggn).norm() / truth(case).ggn.norm()) > 0.05
    assert int(torch.linalg.matrix_rank(empirical, rtol=1e-9)) <= problem.n


def test_mixture_curvature_modes_differ() -> None:
    """GGN ≠ Fisher for the mixture: four readings, four matrices."""
    matrices = []
    for mode in ("clip", "abs", "fisher", "em"):
        case = BY_NAME[f"tanh-mlp-mixture-{mode}"]
        matrices.append(estimate(case.make(), structure="full").mean().dense())
    for i, one in enumerate(matrices):
        for two in matrices[:i]:
            assert float((one - two).norm() / one.norm()) > 1e-3
