"""Which positions count: what no counted output depends on changes no factor, count, evidence, prediction or step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.structures.base import pairs
from laplace_kf.tape import observation
from tests.cases import build, labels, normal, rng
from tests.checks import close

T, EXTRA, C = 4, 3, 3
STRUCTURES: list[tuple[str, dict[str, Any]]] = [
    ("kron", {}),
    ("kron", {"sharing": "reduce"}),
    ("ekfac", {}),
    ("diag", {}),
    ("full", {}),
]
ESTIMATORS = ["exact", "sampled", "importance", "projection", "empirical"]


class Attention(nn.Module):
    """Self-attention that does not look at masked positions; a head at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.head(torch.tanh(self.attend(x, x, x, key_padding_mask=hidden, need_weights=False)[0]))


def pointwise(padded: bool) -> tuple[nn.Module, Any, Tensor]:
    """Every position alone, with an activation that can be off."""
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)))
    return (model, *_sequences(padded))


def attention(padded: bool) -> tuple[nn.Module, Any, Tensor]:
    """Keys and values of the padding have a weight of 0."""
    x, y = _sequences(padded)
    return build(Attention), (x, torch.arange(x.shape[1]).expand(len(x), -1) >= T), y


def pixels(padded: bool) -> tuple[nn.Module, Any, Tensor]:
    """Rows of an image below the others, with nothing that looks across."""
    model = build(lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, C, 1)))
    x, y = normal(5, 2, 2, 3), labels(C, 5, 2, 3)
    if padded:
        x = torch.cat([x, 3 + normal(5, 2, 2, 3, seed=8)], 2)
        y = torch.cat([y, torch.full((5, 2, 3), -100)], 1)
    return model, x, y


def _sequences(padded: bool) -> tuple[Tensor, Tensor]:
    x, y = normal(5, T, 4), labels(C, 5, T)
    if padded:
        x = torch.cat([x, 3 + normal(5, EXTRA, 4, seed=9)], 1)
        y = torch.cat([y, torch.full((5, EXTRA), -100)], 1)
    return x, y


NETWORKS = {"pointwise": pointwise, "attention": attention, "pixels": pixels}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("structure", "options"), STRUCTURES, ids=lambda v: v if isinstance(v, str) else "".join(v))
@pytest.mark.parametrize("network", NETWORKS)
def test_padding_changes_no_curvature_count_or_evidence(
    network: str, structure: str, options: dict[str, Any], estimator: str
) -> None:
    found = []
    for padded in (False, True):
        model, x, y = NETWORKS[network](padded)
        found.append(
            lk.curvature.estimate(
                model, "categorical", [(x, y)], structure=structure, estimator=estimator, generator=rng(4), **options
            )
        )
    plain, padding = found
    assert plain.n_data == padding.n_data == 5
    assert plain.terms == padding.terms
    close(padding.mean().dense(), plain.mean().dense())
    close(padding.log_likelihood, plain.log_likelihood)


@pytest.mark.parametrize("preset", ["kfac", "ekfac", "kflr", "diagonal"])
def test_padding_changes_no_step(preset: str) -> None:
    weights = []
    for padded in (False, True):
        model, x, y = pointwise(padded)
        optimizer = getattr(lk.optim, preset)(model, "categorical", tau=0.1, zeta=0.1, generator=rng(6))
        for _ in range(3):
            optimizer.step(x, y)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    close(weights[1], weights[0], 1e-9)


def test_padding_changes_no_chain() -> None:
    found = []
    for padded in (False, True):
        model, x, y = pointwise(padded)
        found.append(lk.LaplacePosterior(model, "categorical").fit((x, y)).update([(x, y)]).precision.dense())
    close(found[1], found[0])


def test_a_unit_that_is_off_does_not_hide_its_position() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x, y = _sequences(False)
    statistics = lk.curvature.estimate(model, "categorical", [(x, y)], structure="kron")
    assert float(statistics.sums["0.weight"][2] if "0.weight" in statistics.sums else _first(statistics)[2]) == 5 * T


def _first(statistics: Any) -> tuple[Tensor, ...]:
    return next(iter(statistics.sums.values()))


def test_plain_networks_pay_no_pass_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = observation.reached
    monkeypatch.setattr(observation, "reached", lambda *args: asked.append(1) or plain(*args))
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)))
    lk.curvature.estimate(model, "categorical", [(normal(5, 4), labels(C, 5))], structure="kron")
    assert not asked, "one position an example: nothing to find out"
    x, y = _sequences(False)
    lk.curvature.estimate(model, "categorical", [(x, y)], structure="diag")
    assert not asked, "a diagonal needs no positions"
    lk.curvature.estimate(model, "categorical", [(x, y)], structure="kron")
    assert len(asked) == 1


def test_factors_of_older_files_are_means_already() -> None:
    a, g = normal(1, 3, 3), normal(1, 2, 2)
    assert pairs((a, g)) == [(a, g)]
    ((inputs, outputs),) = pairs((a, 8 * g, torch.tensor(8.0)))
    assert inputs is a
    close(outputs, g)
    ((_, nothing),) = pairs((a, 0 * g, torch.tensor(0.0)))
    assert not bool(nothing.any())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
def test_activations_in_place_on_sequences_keep_the_pair(activation: type[nn.Module]) -> None:
    class InPlace(nn.Module):
        def __init__(self, write: bool) -> None:
            super().__init__()
            self.one, self.two, self.write = nn.Linear(4, 5), nn.Linear(5, C), write
            self.act = activation()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.one(x)
            if self.write:
                hidden = hidden.relu_() if activation is nn.ReLU else hidden.tanh_()
            else:
                hidden = self.act(hidden)
            return self.two(hidden)

    x, y = _sequences(False)
    out, inside = (
        lk.curvature.estimate(build(lambda w=w: InPlace(w)), "categorical", [(x, y)], structure="kron").mean().dense()
        for w in (False, True)
    )
    close(inside, out)
    block = slice(0, 20)
    assert float((inside[block, block] - torch.diag(inside[block, block].diagonal())).abs().max()) > 0
