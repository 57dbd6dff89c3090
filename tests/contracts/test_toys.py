"""A rule with only the abstract methods, added as one file, keeps the whole contract; one without cases is named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.estimators.exact import Exact
from laplace_kf.layers import RULES, BoundCall, LayerRule, MatrixView, register, rule_names
from laplace_kf.layers.base import WithParameter
from laplace_kf.layers.elementwise import SCALE, ScaleRule
from laplace_kf.layers.linear import LINEAR, MATMUL, LinearRule, MatmulRule
from laplace_kf.likelihoods import LIKELIHOODS, Gaussian
from laplace_kf.posterior.task_chain import TERMS
from laplace_kf.structures import STRUCTURES
from laplace_kf.structures.diag import Diagonal
from laplace_kf.tape.tracer import Tracer
from tests.checks import close
from tests.contracts.contract import FACTORS, choices, owes, plainest, problem
from tests.contracts.design import Row, covering, meeting
from tests.contracts.toys import TOYS, registered, unregistered

NAMES = {factor: list(found) for factor, found in FACTORS.items()}


def rows(triples: bool) -> list[Row]:
    """Every toy with all that is registered (``--triples``: with every pair of that), and all four at once."""
    found = []
    for kind, name in TOYS.items():
        found += covering({**NAMES, kind: [name]}, 2) if triples else meeting(NAMES, {kind: name})
    return [*found, dict(TOYS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        found = rows(metafunc.config.getoption("--triples"))
        metafunc.parametrize("row", found, ids=["-".join(row.values()) for row in found])


def test_contract(row: Row, tmp_path: Path) -> None:
    with registered():
        owes(problem(**row), tmp_path)


@pytest.mark.parametrize("kind", TOYS)
def test_the_toys_are_refused_nowhere_that_matters(kind: str, tmp_path: Path) -> None:
    plain = plainest(NAMES)
    with registered(kind):
        assert owes(problem(**{**plain, kind: TOYS[kind]}), tmp_path) == "kept"
        assert [name for name in choices()[kind] if name not in NAMES[kind]] == [TOYS[kind]]
    assert list(choices()[kind]) == NAMES[kind]


def test_the_layer_rule_ran() -> None:
    with registered("layer"):
        layer, x = rule_names()["per_head"].examples[0]()
        tracer = Tracer(layer.double(), None)
        observation = tracer.observe((x.double(), torch.zeros(len(x))))
        assert [call.rule.name for call in observation.calls] == ["per_head"]
        assert {name: block.shape for name, block in tracer.blocks.items()} == {"w": (2, 2, 3)}
        assert not tracer.example_wise


def test_a_likelihood_of_rank_below_the_outputs_is_projected() -> None:
    """Its root has C − 1 columns, and as many are the noise entries of a projection."""
    with registered("likelihood") as modules:
        likelihood = modules["likelihood"].Increments()
        outputs = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        targets = likelihood.sample(outputs, torch.Generator().manual_seed(1))
        assert likelihood.root_width(outputs) == 3
        found = likelihood.root_product(outputs, torch.eye(3).double()[:, None, None].expand(3, 5, 1, 3), targets)
        close(torch.einsum("snc,snd->ncd", found, found), likelihood.hessian(outputs, targets))


@pytest.mark.parametrize("terms", TERMS)
def test_a_block_of_abstract_methods_is_chained_by_every_rule(terms: str, tmp_path: Path) -> None:
    """Exactly: its dense matrix is added to the other one."""
    with registered("structure", "likelihood"):
        made = problem("linear.0", "increments", "exact", "plain_blocks")
        reference = problem("linear.0", "increments", "exact", "layer")
        chained = []
        for each in (made, reference):
            posterior = lk.LaplacePosterior(each.model, each.likelihood, structure=each.structure, prior_precision=0.3)
            posterior.fit([(each.x, each.y)])
            chained.append(posterior.update([(each.x, each.y)], terms=terms).update([(each.x[:2], each.y[:2])]))
        mine, theirs = chained
        close(mine.precision.dense(), theirs.precision.dense(), 1e-9)
        close(mine.functional_covariance(made.x), theirs.functional_covariance(made.x), 1e-8)
        assert float(mine.log_evidence()) == pytest.approx(float(theirs.log_evidence()), rel=1e-9)
        assert float(mine.evidence().total) == pytest.approx(float(theirs.evidence().total), rel=1e-9)
        mine.save(tmp_path / "chained.safetensors")
        again = lk.LaplacePosterior.load(tmp_path / "chained.safetensors", made.model, likelihood=made.likelihood)
        close(again.precision.dense(), mine.precision.dense(), 1e-12)
        tuned = again.tune(objective="evidence", n_data=[5.0, 50.0], prior_precision=[0.1, 1.0])
        assert float(tuned.best["prior_precision"]) in (0.1, 1.0)


# ------------------------------------------------------------------------------------------------ without cases


def _structure() -> None:
    @STRUCTURES.register("caseless")
    class Caseless(Diagonal):
        name = "caseless"

        def __init__(self, rank: int) -> None:
            self.rank = rank


def _estimator() -> None:
    @ESTIMATORS.register("caseless")
    class Caseless(Exact):
        name = "caseless"

        def __init__(self, budget: float) -> None:
            self.budget = budget


def _likelihood() -> None:
    @LIKELIHOODS.register("caseless")
    class Caseless(Gaussian):
        @classmethod
        def examples(cls) -> tuple[()]:
            return ()


def _layer() -> None:
    register(type(LINEAR)("caseless", (torch.chain_matmul,), ("none",), {"input": None, "weight": None}))


@pytest.mark.parametrize(
    ("kind", "add"),
    [("structure", _structure), ("estimator", _estimator), ("likelihood", _likelihood), ("layer", _layer)],
    ids=["structure", "estimator", "likelihood", "layer"],
)
def test_a_rule_without_cases_fails_under_its_name(kind: str, add: object) -> None:
    """It is in the design, so a test with its name is there, and it fails and says what to add."""
    with unregistered():
        add()  # type: ignore[operator]
        found = choices()
        assert "caseless" in found[kind]
        design = covering({factor: list(entries) for factor, entries in found.items()}, 2)
        mine = [row for row in design if row[kind] == "caseless"]
        assert len(mine) >= max(len(entries) for factor, entries in NAMES.items() if factor != kind)
        with pytest.raises(AssertionError, match=r"'caseless' has no examples.*examples"):
            problem(**mine[0])


# ------------------------------------------------------------------------------------------------ wrong rules


class Turned(MatmulRule):
    """Reads the weight with rows and columns exchanged."""

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        return LinearRule.view(self, weight, call)


class Halved(ScaleRule):
    """Gives half of the gradient."""

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        return super().normalised(rows, call) / 2


def replaced(rule: LayerRule) -> None:
    for function in rule.functions:
        RULES[function] = rule


WRONG = {
    "turned": lambda: (Turned("turned", MATMUL.functions, ("x @ W",), MATMUL.arguments), lambda x, w: x @ w, (3, 3)),
    "halved": lambda: (Halved("halved", SCALE.functions, ("w * x",)), lambda x, w: w * x, (3,)),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "layer"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_rule_is_named(name: str, structure: str, tmp_path: Path) -> None:
    """In a warning to its author and in the summary, also of a saved posterior; the numbers stay right."""
    with unregistered():
        rule, function, shape = WRONG[name]()
        model = nn.Sequential(WithParameter(function, *shape), nn.Tanh(), nn.Linear(3, 2)).double()
        data = (torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0]))
        for known in rule.functions:
            RULES.pop(known, None)
        reference = lk.LaplacePosterior(model, "categorical", structure).fit(data)
        assert "failed" not in str(reference.summary())
        replaced(rule)
        with pytest.warns(RuntimeWarning, match=rf"layer rule '{name}' failed its check.*'0'"):
            posterior = lk.LaplacePosterior(model, "categorical", structure).fit(data)
        close(posterior.precision.dense(), reference.precision.dense())
        posterior.save(tmp_path / "named.safetensors")
        for kept in (posterior, lk.LaplacePosterior.load(tmp_path / "named.safetensors", model)):
            assert f"layer rule {name} failed its check" in str(kept.summary())


def test_a_parameter_that_also_acts_elsewhere_is_no_fault_of_a_rule() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w.sum()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return g * w.sum(), (g * x).sum() * torch.ones_like(w)

    model = WithParameter(lambda x, w: Hidden.apply(x @ w, w), 3, 2).double()
    data = (torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        posterior = lk.LaplacePosterior(model, "categorical").fit(data)
    assert "failed" not in str(posterior.summary())
