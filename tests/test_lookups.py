"""Embeddings: constant rows, scaled and sparse gradients, norms that are held down, bags."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.lookups import plain
from tests import oracles
from tests.cases import labels, normal, rng
from tests.checks import close

STRUCTURES = ["diag", "kron", "full", "ekfac", "lowrank", "isotropic", "layer"]
ROW = 2  # the padding row


class Words(nn.Module):
    def __init__(self, table: Callable[[], nn.Module], bag: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.e, self.l = table(), nn.Linear(3, 2)
        self.bag = bag
        self.double()
        with torch.no_grad():
            self.e.weight[ROW] = 0.7  # pretrained tables have such rows  # type: ignore[operator, index]

    def forward(self, ids: Tensor) -> Tensor:
        h = self.e(ids)
        return self.l(torch.tanh(h if self.bag else h.mean(1)))


def embedding(**options: Any) -> Words:
    return Words(lambda: nn.Embedding(5, 3, **options), False)


def bag(**options: Any) -> Words:
    return Words(lambda: nn.EmbeddingBag(5, 3, **options), True)


def data() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 5, (8, 4), generator=rng(3)), labels(2, 8, seed=4)


def by_hand(model: Words) -> nn.Module:
    """The same function of plain operations, with the padding row (if there is one) as a constant."""

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.l = nn.Module(), copy.deepcopy(model.l)
            self.e.weight = nn.Parameter(model.e.weight.detach().clone())  # type: ignore[union-attr, operator]

        def forward(self, ids: Tensor) -> Tensor:
            keep = torch.ones(5, 1, dtype=torch.float64)
            if model.e.padding_idx is not None:
                keep[model.e.padding_idx] = 0
            w = self.e.weight
            w = w * keep + w.detach() * (1 - keep)
            h = F.one_hot(ids, 5).to(w) @ w
            if not model.bag:
                return self.l(torch.tanh(h.mean(1)))
            there = torch.ones_like(ids) if model.e.padding_idx is None else (ids != model.e.padding_idx).long()
            mode = model.e.mode
            if mode == "max":
                least = h.masked_fill(there[..., None] == 0, -torch.inf)
                return self.l(torch.tanh(least.max(1).values.masked_fill(there.sum(1, keepdim=True) == 0, 0.0)))
            h = (h * there[..., None]).sum(1)
            return self.l(torch.tanh(h if mode == "sum" else h / there.sum(1, keepdim=True).clamp_min(1)))

    return Hand()


TABLES: dict[str, Callable[[], Words]] = {
    "plain": embedding,
    "padding": lambda: embedding(padding_idx=ROW),
    "negative-padding": lambda: embedding(padding_idx=ROW - 5),
    "by-frequency": lambda: embedding(scale_grad_by_freq=True),
    "sparse": lambda: embedding(sparse=True),
    "all": lambda: embedding(padding_idx=ROW, scale_grad_by_freq=True),
    **{f"bag-{mode}": (lambda mode=mode: bag(mode=mode)) for mode in ("sum", "mean", "max")},
    **{f"bag-{mode}-padding": (lambda mode=mode: bag(mode=mode, padding_idx=ROW)) for mode in ("sum", "mean", "max")},
    "bag-by-frequency": lambda: bag(scale_grad_by_freq=True, mode="sum"),
}
PADDED = [kind for kind, make in TABLES.items() if make().e.padding_idx is not None]


@pytest.mark.parametrize("kind", TABLES)
def test_curvature_and_predictions_are_those_of_the_function(kind: str) -> None:
    model, (x, y) = TABLES[kind](), data()
    hand = by_hand(model)
    close(model(x), hand(x))
    wanted = oracles.dense_ggn(hand, x, y, oracles.categorical_nll)
    state = copy.deepcopy(model.state_dict())
    posterior = lk.LaplacePosterior(model, "categorical", structure="full").fit((x, y))
    close(posterior.curvature.dense(), wanted)
    close(lk.curvature.estimate(model, "categorical", (x, y), "diag").mean().diag(), wanted.diagonal())
    v = normal(len(wanted), seed=5)
    close(lk.curvature.ggn_vector_product(model, "categorical", (x, y), v), wanted @ v)
    hessian = oracles.dense_hessian(hand, x, y, oracles.categorical_nll)
    close(lk.curvature.hessian_vector_product(model, "categorical", (x, y), v), hessian @ v, 1e-9)
    rows = oracles.jacobian(hand, x, 8)
    covariance = rows @ torch.linalg.inv(posterior.precision.dense()) @ rows.mT
    close(posterior.functional_covariance(x), covariance, 1e-9)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", PADDED)
def test_no_draw_moves_a_padding_row(kind: str, structure: str) -> None:
    model, (x, y) = TABLES[kind](), data()
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=0.5).fit((x, y))
    draws = posterior.sample(50, generator=rng())["e.weight"]
    assert torch.equal(draws[:, ROW], model.e.weight.detach()[ROW].expand(50, -1))  # type: ignore[index, operator]
    others = [k for k in range(5) if k != ROW]
    assert float(draws[:, others].std(0).min()) > 0
    # inputs of nothing but padding have outputs that the table's spread does not reach
    only = torch.full((1, 4), ROW)
    table = lk.LaplacePosterior(model, "categorical", structure=structure, parameters=["e.*"]).fit((x, y))
    samples = table.predict(only, "mc", samples=20, space="weights", keep_samples=True, generator=rng()).samples
    assert samples is not None and float(samples.std(0).max()) < 1e-12
    predicted = table.predictor(20, generator=rng())(only)
    close(predicted.probs, model(only).softmax(-1).detach())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_knows_no_prior_of_a_constant(structure: str) -> None:
    model, (x, y) = TABLES["padding"](), data()
    found = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=2.0).fit((x, y))
    with torch.no_grad():
        model.e.weight[ROW] = 0.0  # type: ignore[index, operator]
    x = x.clamp_max(1)  # the row is met nowhere, so that the curvature is the same with any value of it
    one = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=2.0).fit((x, y))
    with torch.no_grad():
        model.e.weight[ROW] = 9.0  # type: ignore[index, operator]
    two = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=2.0).fit((x, y))
    close(two.log_evidence(), one.log_evidence())
    dense, where = found.precision.dense(), oracles.flat_index(model)["e.weight"][ROW]
    kept = torch.ones(len(dense), dtype=torch.bool)
    kept[where] = False
    theta = torch.cat([value.flatten() for value in found.mean.values()])[kept]
    prior = torch.full_like(theta, 2.0)
    fit = oracles.log_likelihood(TABLES["padding"](), *data(), oracles.categorical_nll)
    wanted = oracles.log_evidence(dense[kept][:, kept], prior, theta, fit)
    assert float(found.log_evidence()) == pytest.approx(wanted, rel=1e-9)


def test_a_row_that_another_layer_uses_is_no_constant() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = embedding(padding_idx=ROW).e

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.e(ids).mean(1), self.e.weight)

    x, _ = data()
    for structure in ("diag", "kron", "full"):
        posterior = lk.LaplacePosterior(Tied(), "categorical", structure=structure).fit((x, labels(5, 8, seed=4)))
        assert float(posterior.sample(50, generator=rng())["e.weight"][:, ROW].std(0).min()) > 0


def test_files_remember_the_row(tmp_path: Any) -> None:
    model = TABLES["padding"]()
    lk.LaplacePosterior(model, "categorical").fit(data()).save(tmp_path / "file")
    draws = lk.LaplacePosterior.load(tmp_path / "file", model).sample(9, generator=rng())["e.weight"]
    assert float(draws[:, ROW].std(0).max()) == 0 < float(draws[:, 0].std(0).min())


@pytest.mark.parametrize("kind", ["padding", "bag-mean-padding"])
def test_steps_leave_the_row_where_it_is(kind: str) -> None:
    model = TABLES[kind]()
    opt = lk.optim.kfac(model, "categorical", l2=0.1, generator=rng())
    for _ in range(3):
        opt.step(*data())
    assert torch.equal(model.e.weight[ROW], torch.full((3,), 0.7, dtype=torch.float64))  # type: ignore[index, operator]


@pytest.mark.parametrize("functional", [False, True])
def test_rows_whose_norm_is_held_down(functional: bool) -> None:
    """``max_norm=`` is a function of the row, and no pass of ours writes into the weight."""

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.l = nn.Parameter(3 * normal(5, 3, seed=1)), nn.Linear(3, 2).double()

        def forward(self, ids: Tensor) -> Tensor:
            return self.l(F.embedding(ids, self.w, max_norm=1.0).mean(1))

    class Hand(nn.Module):
        def __init__(self, source: nn.Module, weight: Tensor) -> None:
            super().__init__()
            self.w, self.l = nn.Parameter(weight.detach().clone()), copy.deepcopy(source.l)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.w[ids]
            norm = h.norm(dim=-1, keepdim=True)
            return self.l(torch.where(norm > 1, h / (norm + 1e-7), h).mean(1))

    x, y = data()
    model: nn.Module = Call() if functional else nn.Module()
    if not functional:
        source = embedding(max_norm=1.0)
        source.e.weight.data = 3 * normal(5, 3, seed=1)
        hand = Hand(source, source.e.weight)
        source.forward = lambda ids: source.l(source.e(ids).mean(1))  # type: ignore[method-assign]
        model = source
    else:
        hand = Hand(model, model.w)  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    posterior = lk.LaplacePosterior(model, "categorical", structure="full", prior_precision=3.0).fit((x, y))
    close(posterior.curvature.dense(), oracles.dense_ggn(hand, x, y, oracles.categorical_nll), 1e-9)
    posterior.predict(x, "mc", samples=5, generator=rng())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("form", ["rows", "offsets", "closed"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_what_torch_gives(mode: str, form: str) -> None:
    for padding in (None, 0, -1):
        w = normal(6, 3, seed=1).requires_grad_()
        ids = torch.randint(0, 6, (4, 5) if form == "rows" else (11,), generator=rng(2))
        offsets = None if form == "rows" else torch.tensor([0, 3, 3, 7] + ([11] if form == "closed" else []))
        shares = torch.rand(ids.shape, generator=rng(3), dtype=torch.float64) if mode == "sum" else None
        options = {
            "mode": mode, "padding_idx": padding, "per_sample_weights": shares, "include_last_offset": form == "closed",
        }  # fmt: skip
        instead = plain(F.embedding_bag, (ids, w, offsets), options)
        assert instead is not None
        found, wanted = instead(), F.embedding_bag(ids, w, offsets, **options)  # type: ignore[arg-type]
        close(found, wanted)
        seeds = torch.ones_like(wanted)
        close(torch.autograd.grad(found, w, seeds)[0], torch.autograd.grad(wanted, w, seeds)[0])
