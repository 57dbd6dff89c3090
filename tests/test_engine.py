"""The engine's two routes, its column selection, and how it finds the rows of an example."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import engine
from laplace_kf.columns import inclusion_probabilities, systematic
from laplace_kf.errors import IncompatiblePair, UnsupportedLayer
from laplace_kf.tape import signals
from laplace_kf.tape.tracer import Tracer
from tests.cases import CASES, Experts
from tests.contracts.test_curvature import estimate

STRUCTURES = ("diag", "kron", "full", "ekfac", "layer", "lowrank")


def net(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def data(n: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, inputs, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=rng)


class Unchained(nn.Module):
    """The same network with a step that is no chain link."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x)]).sum(0)


ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.Softplus]


@pytest.mark.pairs(
    activation=ACTIVATIONS,
    structure=STRUCTURES,
    estimator=["exact", "sampled", "projection", "importance", "empirical"],
)
def test_chain_and_autograd_routes_agree(structure: str, estimator: str, activation: type[nn.Module]) -> None:
    model = net(4, 5, 6, 3, activation=activation)
    x, y = data(7, 4, 3)
    found = []
    for wrapped in (model, Unchained(model)):
        rng = torch.Generator().manual_seed(3)
        stats = lk.curvature.estimate(wrapped, "categorical", (x, y), structure, estimator, generator=rng)
        found.append(stats.mean().dense())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_routes_ran(activation: type[nn.Module]) -> None:
    """The ones that are compared above."""
    model, (x, y) = net(4, 5, 6, 3, activation=activation), data(7, 4, 3)
    assert Tracer(model, None, "all").observe((x, y)).chain is not None
    assert Tracer(Unchained(model), None, "all").observe((x, y)).chain is None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_memory_budget_does_not_change_the_result(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and examples are cut into chunks of one; the sums stay the same."""
    for case in CASES:
        if case.name not in ("tanh-mlp-categorical", "conv2d", "sequence-outputs-ignored", "embedding", "layernorm"):
            continue
        problem = case.make()
        whole = estimate(problem, structure=structure, estimator="exact").mean().dense()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "MEMORY_BYTES", 1)
            patch.setattr(signals, "WORKING_BYTES", 1)
            parts = estimate(problem, structure=structure, estimator="exact").mean().dense()
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.just(0.0) | st.floats(1e-100, 1e6), min_size=1, max_size=40), st.floats(0.1, 50))
def test_inclusion_probabilities(weights: list[float], budget: float) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    p = inclusion_probabilities(w, budget)
    positive = int((w > 0).sum())
    assert ((p >= 0) & (p <= 1)).all() and (p[w == 0] == 0).all()
    assert float(p.sum()) == pytest.approx(min(budget, positive), rel=1e-9)
    free = (p < 1) & (w > 0)
    if int(free.sum()) > 1:  # proportional wherever they are not certain
        ratio = p[free] / w[free]
        assert float(ratio.max()) == pytest.approx(float(ratio.min()), rel=1e-6)


def test_systematic_sampling_has_the_right_frequencies() -> None:
    p = torch.tensor([1.0, 0.3, 0.0, 0.45, 0.05, 1.0, 0.2], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    counts, draws = torch.zeros(7), 4000
    for _ in range(draws):
        chosen = systematic(p, rng)
        assert len(chosen) == 3
        counts[chosen] += 1
    assert (counts / draws - p).abs().max() < 4 * 0.5 / draws**0.5
    assert counts[0] == counts[5] == draws and counts[2] == 0


def test_systematic_sampling_does_not_alias_with_the_order_of_the_columns() -> None:
    """Equal probabilities of 1/9 over (example, column) must not pick one column kind for all examples."""
    p = torch.full((90 * 9,), 1 / 9, dtype=torch.float64)
    kinds = systematic(p, torch.Generator().manual_seed(0)) % 9
    assert len(kinds.unique()) == 9


def test_importance_with_a_large_budget_is_exact() -> None:
    model, (x, y) = net(4, 5, 3), data(6, 4, 3)
    exact = lk.curvature.estimate(model, "categorical", (x, y), "kron").mean().dense()
    found = lk.curvature.estimate(model, "categorical", (x, y), "kron", "importance", columns=5.0).mean().dense()
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-15)


class TimeFirst(nn.Module):
    """Works on ``(T, N, I)`` inside, flattened in either order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.layer = nn.Linear(2, 2, dtype=torch.float64)
        self.head = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        n, t, i = x.shape
        if self.order == "examples first":
            h = self.layer(x.reshape(n * t, i)).reshape(n, t, 2)
        elif self.order == "time first":
            h = self.layer(x.transpose(0, 1)).transpose(0, 1)
        else:
            h = self.layer(x.transpose(0, 1).reshape(t * n, i)).reshape(t, n, 2).transpose(0, 1)
        return self.head(torch.tanh(h).sum(1))


@pytest.mark.parametrize(("n", "t"), [(3, 3), (4, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_are_found_wherever_the_examples_lie(structure: str, n: int, t: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, t, 2, generator=rng, dtype=torch.float64), torch.arange(n) % 3
    found = []
    for order in ("examples first", "time first", "time first, flattened"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TimeFirst(order)
        found.append(lk.curvature.estimate(model, "categorical", (x, y), structure).mean().dense())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-15)


class Positions(nn.Module):
    """A learned position table, shared by all examples of a batch."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2, dtype=torch.float64)
        self.head = nn.Linear(2, 3, dtype=torch.float64)
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(torch.arange(x.shape[1]))
        return self.head(torch.tanh(x + rows if self.added else x * rows).sum(1))


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("n", [2, 4])  # 4: as many examples as positions, so shapes alone cannot tell
def test_a_row_shared_by_all_examples(n: int, added: bool) -> None:
    """What is added is repeated for every example; any other use goes through per-example gradients."""
    model = Positions(added)
    x, y = torch.randn(n, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(n) % 3
    stats = lk.curvature.estimate(model, "categorical", (x, y), "diag")
    single = [lk.curvature.estimate(model, "categorical", (x[i : i + 1], y[i : i + 1]), "diag") for i in range(n)]
    mean = torch.stack([s.mean().diag() for s in single]).mean(0)
    torch.testing.assert_close(stats.mean().diag(), mean, rtol=1e-10, atol=1e-14)
    assert stats.blocks["table"].factorises == added


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        return scaled - scaled.mean(0)


def test_examples_that_depend_on_each_other_are_refused() -> None:
    x, y = data(4, 3, 3)
    with pytest.raises(UnsupportedLayer, match="other examples"):
        lk.curvature.estimate(BatchMean(), "categorical", (x, y), "diag")


def test_statistics_of_other_parameters_do_not_add() -> None:
    model, (x, y) = net(4, 5, 3), data(6, 4, 3)
    one = lk.curvature.estimate(model, "categorical", (x, y), "kron")
    for other in (
        lk.curvature.estimate(model, "categorical", (x, y), "diag"),
        lk.curvature.estimate(model, "categorical", (x, y), "kron", parameters=["0.*"]),
    ):
        with pytest.raises(IncompatiblePair):
            one + other


def test_recursive_needs_kron() -> None:
    model, (x, y) = net(4, 5, 3), data(6, 4, 3)
    with pytest.raises(IncompatiblePair, match="kron"):
        lk.curvature.estimate(model, "categorical", (x, y), "diag", "recursive")


@pytest.mark.parametrize("option", [{"samples": 3}, {"no_such": 1}])
def test_an_option_that_nothing_takes_is_refused(option: dict[str, Any]) -> None:
    model, (x, y) = net(4, 5, 3), data(6, 4, 3)
    with pytest.raises(TypeError, match=next(iter(option))):
        lk.curvature.estimate(model, "categorical", (x, y), "kron", "exact", **option)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_module_first_used_in_a_later_batch(structure: str) -> None:
    model = Experts()
    up, down, y = torch.ones(3, 2).double(), -torch.ones(3, 2).double(), torch.tensor([0, 1, 2])
    both = lk.curvature.estimate(model, "categorical", [(up, y), (down, y)], structure).mean().dense()
    swapped = lk.curvature.estimate(model, "categorical", [(down, y), (up, y)], structure).mean().dense()
    torch.testing.assert_close(both, swapped, rtol=1e-12, atol=1e-15)
    with pytest.raises(UnsupportedLayer, match=r"two\.weight.*two"):
        lk.curvature.estimate(model, "categorical", [(up, y)], structure)


class Pairs(nn.Module):
    """A layer that is always read, ``left`` or ``right``, and its own bias together with its weight or apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.left, self.right, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor, left: bool, apart: bool) -> Tensor:
        one = F.linear(x, self.one.weight) + self.one.bias if apart else self.one(x)
        return self.head((self.left if left else self.right)(one.tanh()).tanh())


def parts_of(structure: str, *ways: tuple[bool, bool]) -> list[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pairs().double()
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(4) % 3

    def forward(model: nn.Module, batch: Any, way: tuple[bool, bool]) -> Any:
        return model(batch[0], *way), batch[1]

    return [
        lk.curvature.estimate(
            model, "categorical", [(x, y)], structure, unused="prior", forward=partial(forward, way=way)
        )
        for way in ways
    ]


@pytest.mark.parametrize("structure", ["kron", "diag", "isotropic"])
def test_parts_that_read_other_layers_add_up(structure: str) -> None:
    """What one of them has not read has no sums beside those of the other, whichever comes first."""
    left, right = parts_of(structure, (True, False), (False, False))
    for total in (left + right, right + left):
        assert total.used == set(total.layout.names)
        assert set(total.sums) == set(total.blocks)
        if structure == "diag":  # factors add up to more
            together = left.total().dense() + right.total().dense()
            torch.testing.assert_close(total.total().dense(), together, rtol=1e-10, atol=1e-14)


def test_parts_that_read_one_layer_in_two_ways_do_not_add_up() -> None:
    together, apart = parts_of("kron", (True, False), (False, True))
    for one, two in ((together, apart), (apart, together)):
        with pytest.raises(IncompatiblePair, match=r"parameters one\.bias.* belong to other blocks|different form"):
            one + two
