"""Details that the change of one character takes away, each looked at by itself; found by ``make mutate``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laplace_kf as lk
from laplace_kf.estimators.importance import inclusion_probabilities
from laplace_kf.optim.reviewed import Range
from laplace_kf.structures import STRUCTURES
from laplace_kf.structures.auto import PREFERENCE
from tests import oracles
from tests.cases import CATEGORICAL
from tests.checks import close


def test_inclusions_add_up_to_the_budget_with_the_large_ones_certain() -> None:
    found = inclusion_probabilities(torch.tensor([1.0, 10.0, 1.0, 1.0]), 2.0)
    close(found, torch.tensor([1 / 3, 1.0, 1 / 3, 1 / 3]))
    found = inclusion_probabilities(torch.tensor([5.0, 4.0, 0.5, 0.25, 0.25, 0.0]), 3.0)
    close(found, torch.tensor([1.0, 1.0, 0.5, 0.25, 0.25, 0.0]))


def test_the_row_of_padding_may_be_beyond_the_width() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=5), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.tensor([[5, 1], [2, 5], [0, 3], [4, 2]]), torch.tensor([0, 1, 1, 0])
    found = lk.curvature.estimate(model, "categorical", [(x, y)], structure="full", estimator="exact").mean().dense()
    close(found, oracles.dense_ggn(model, x, y, CATEGORICAL.nll, curvature=CATEGORICAL.curvature))
    kron = lk.curvature.estimate(model, "categorical", [(x, y)], structure="kron", estimator="exact").mean()
    held = oracles.flat_index(model)["0.weight"][5]
    assert not kron.diag()[held].any() and bool(kron.diag()[oracles.flat_index(model)["0.weight"][2]].all())


def test_a_table_that_only_pads_has_no_curvature_and_no_nan() -> None:
    model = nn.Sequential(nn.Embedding(1, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.zeros(4, 2, dtype=torch.long), torch.tensor([0, 1, 1, 0])
    for structure in ("isotropic", "diag", "full"):
        found = lk.curvature.estimate(model, "categorical", [(x, y)], structure, parameters=["0.weight"]).mean()
        assert torch.equal(found.dense(), torch.zeros(3, 3, dtype=torch.float64))


def test_ends_of_ranges() -> None:
    assert Range(0.0, True, 1.0).has(0.0) and not Range(0.0, False, 1.0).has(0.0)
    assert Range(0.0, True, 1.0, True).has(1.0) and not Range(0.0, True, 1.0, False).has(1.0)
    assert not Range(0.0, True).has(True) and not Range(0.0, True).has("1")


def test_no_oversampling_is_allowed_and_less_is_not() -> None:
    assert STRUCTURES["lowrank"](oversample=0).options()["oversample"] == 0  # type: ignore[call-arg]
    assert STRUCTURES["lowrank"](rank=1, iterations=1).options()["rank"] == 1  # type: ignore[call-arg]
    for refused in ({"rank": 0}, {"iterations": 0}):
        with pytest.raises(lk.errors.InvalidArgument, match="rank and iterations must be at least 1"):
            STRUCTURES["lowrank"](**refused)  # type: ignore[arg-type]
    with pytest.raises(lk.errors.InvalidArgument, match="oversample not negative"):
        STRUCTURES["lowrank"](oversample=-1)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def statistics() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return lk.curvature.estimate(model, "categorical", [(torch.randn(4, 3).double(), torch.arange(4) % 2)])


def test_corrected_eigenvalues_need_memory_on_top_of_factors(statistics: Any) -> None:
    kron, ekfac = (STRUCTURES[name]().memory(statistics.blocks, statistics.layout, 8) for name in ("kron", "ekfac"))
    assert ekfac - kron == 8 * 26  # a number for every weight and bias


def test_what_bases_cost_is_the_cube_of_their_sides(statistics: Any) -> None:
    """Of every group: processes share the work by it."""
    work = STRUCTURES["ekfac"]().refinement(statistics)
    assert {name: each.cost for name, each in work.items()} == {"0": 4**3 + 4**3, "2": 5**3 + 2**3}
    model = nn.Sequential(nn.Conv1d(4, 6, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(6, 2)).double()
    groups = lk.curvature.estimate(model, "categorical", [(torch.randn(4, 4, 1).double(), torch.arange(4) % 2)], "kron")
    assert STRUCTURES["ekfac"]().refinement(groups)["0"].cost == 2 * 2**3 + 2 * 3**3


def test_a_low_rank_of_no_curvature_keeps_no_vectors() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[2].weight.mul_(1e6)  # certain of everything
    found = lk.curvature.estimate(model, "categorical", [(torch.randn(8, 3).double(), torch.arange(8) % 2)], "lowrank")
    ((_, matrix),) = found.mean().entries
    assert tuple(matrix.vectors.shape) == (26, 0)


def test_pieces_of_a_parameter_know_their_ends() -> None:
    """Queries, keys and values of attention may be thirds of one weight, read apart."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(12, 4)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (F.linear(x, self.w[start : start + 4]) for start in (0, 4, 8))
            return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))

    x, y = torch.randn(4, 3, 4).double(), torch.arange(4) % 2
    blocks = lk.curvature.estimate(Attention().double(), "categorical", [(x, y)], "kron").blocks.values()
    pieces = [(block, block.pieces[0]) for block in blocks if block.pieces and block.pieces[0] is not None]
    assert sorted(piece for _, piece in pieces) == [(0, 16), (16, 32), (32, 48)]
    for block, (start, stop) in pieces:
        name = block.parameters[0]
        assert block.covers(name, start, stop) and block.covers(name, start + 1, stop - 1)
        assert not block.covers(name, start, stop + 1) and not block.covers(name, start - 1, stop)
        assert not block.covers("head.weight", start, stop)


def test_the_last_preference_is_taken_however_little_memory_there_is(statistics: Any) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    chosen = STRUCTURES["auto"](memory=1).settled(statistics.blocks, statistics.layout, torch.zeros(4, 2), like)  # type: ignore[call-arg,attr-defined]
    assert chosen.name == PREFERENCE[-1] == "isotropic" and "MiB" in chosen.reason


@pytest.mark.parametrize(("channel", "moved"), [(1, True), (2, False), (None, False)])
def test_channels_of_predictions_go_last_from_where_they_are(channel: int | None, moved: bool) -> None:
    x = torch.zeros(2, 3, 4)
    shape = lk.Prediction.channel_last(SimpleNamespace(channel=channel), x).shape  # type: ignore[arg-type]
    assert tuple(shape) == ((2, 4, 3) if moved else (2, 3, 4))
