"""Sums over blocks where a parameter is in several of them, and where a block is a part of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import labels, normal, rng
from tests.checks import close

STRUCTURES = ["diag", "kron", "full", "ekfac", "layer", "lowrank"]


def head() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Linear(4, 2).double()


class Reader(nn.Module):
    """Attention over a memory: the packed projection is two blocks."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 2)
        self.double()
        with torch.no_grad():
            self.attention.in_proj_bias.add_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        memory = x[:, -3:]
        return self.head(self.attention(x, memory, memory)[0].mean(1))


class Bilinear(nn.Module):
    """``addmm`` whose weight and summand are one parameter, so that it is in no single matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(normal(4, 4, seed=1)), head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.addmm(self.w[0], x, self.w)))


class OneVector(nn.Module):
    """``addmm`` of a weight ``(1, O)`` that is its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(normal(1, 4, seed=1)), head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.addmm(self.w, x[:, :1], self.w)))


class SelfTied(nn.Module):
    """A weight used as it is and transposed, and by an elementwise product as well."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(normal(4, 4, seed=1)), nn.Parameter(normal(4, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.w.T + self.s) @ self.w)[:, :2] * self.s[:2]


NETS = {"packed": Reader, "addmm": Bilinear, "own-bias": OneVector, "turned": SelfTied}


def data(kind: str) -> tuple[Tensor, Tensor]:
    x = normal(12, 7, 6, seed=3) if kind == "packed" else normal(12, 4, seed=3)
    return x, labels(2, 12, seed=4)


def fitted(kind: str, structure: str, prior: object = 1.5, **options: object) -> lk.LaplacePosterior:
    posterior = lk.LaplacePosterior(NETS[kind](), "categorical", structure=structure, prior_precision=prior, **options)  # type: ignore[arg-type]
    return posterior.fit(data(kind))


def formula(posterior: lk.LaplacePosterior, kind: str, prior: Tensor) -> float:
    theta = torch.cat([value.flatten() for value in posterior.mean.values()])
    fit = oracles.log_likelihood(NETS[kind](), *data(kind), oracles.categorical_nll)
    return oracles.log_evidence(posterior.precision.dense(), prior, theta, fit)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", NETS)
def test_the_evidence_counts_every_entry_once(kind: str, structure: str) -> None:
    posterior = fitted(kind, structure)
    size = sum(value.numel() for value in posterior.mean.values())
    wanted = formula(posterior, kind, torch.full((size,), 1.5, dtype=torch.float64))
    assert float(posterior.log_evidence()) == pytest.approx(wanted, rel=1e-10)
    # and with a prior of its own for every parameter
    names = list(posterior.mean)
    own = {name: 0.5 + k for k, name in enumerate(names)}
    posterior = fitted(kind, structure, own)
    prior = torch.cat([torch.full((posterior.mean[n].numel(),), own[n], dtype=torch.float64) for n in names])
    assert float(posterior.log_evidence()) == pytest.approx(formula(posterior, kind, prior), rel=1e-10)


@pytest.mark.parametrize("structure", ["diag", "kron", "layer"])
@pytest.mark.parametrize("per_block", [False, True])
def test_tuning_finds_the_maximum_of_the_formula(structure: str, per_block: bool) -> None:
    posterior = fitted("packed", structure)
    posterior.tune(objective="evidence", per_block=per_block)
    found = posterior.prior_precision
    names = list(posterior.mean)
    priors = {n: found[n] for n in names} if isinstance(found, dict) else dict.fromkeys(names, found)

    def at(scale: dict[str, float]) -> float:
        other = fitted("packed", structure, {n: priors[n] * scale.get(n, 1.0) for n in names})
        prior = torch.cat(
            [torch.full((other.mean[n].numel(),), priors[n] * scale.get(n, 1.0), dtype=torch.float64) for n in names]
        )
        return formula(other, "packed", prior)

    best = at({})
    assert float(posterior.log_evidence()) == pytest.approx(best, rel=1e-9)
    together = [set(names)]
    if per_block:
        blocks = [set(row.parameters) for row in posterior.summary()]
        together = []
        for block in blocks:  # blocks with a parameter in common have one λ
            joined = [group for group in together if group & block]
            together = [group for group in together if not group & block] + [block.union(*joined)]
    for group in together:
        for factor in (0.8, 1.25):
            assert at(dict.fromkeys(group, factor)) < best


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", NETS)
def test_penalty_and_effective_number_of_parameters(kind: str, structure: str) -> None:
    posterior = fitted(kind, structure)
    dense = posterior.precision.dense()
    shift = normal(len(dense), seed=8)
    start = 0
    with torch.no_grad():
        for name, value in posterior.mean.items():
            part = shift[start : start + value.numel()].view(value.shape)
            posterior.model.get_parameter(name).add_(part)
            start += value.numel()
    close(posterior.penalty().detach(), shift @ dense @ shift / 2, 1e-10)
    curved = dense - 1.5 * torch.eye(len(dense), dtype=torch.float64)
    effective = float(torch.linalg.solve(dense, curved).diagonal().sum())
    rows = posterior.summary()
    assert sum(row.effective for row in rows) == pytest.approx(effective, rel=1e-9, abs=1e-9)
    assert sum(row.size for row in rows) == len(dense)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "layer"])
@pytest.mark.parametrize("kind", NETS)
def test_chains_and_sums(kind: str, structure: str) -> None:
    posterior = fitted(kind, structure)
    following = posterior.update(data(kind), multiplier=2.0)
    eye = torch.eye(posterior.precision.size, dtype=torch.float64)
    curved = posterior.precision.dense() - 1.5 * eye
    close(following.precision.matvec(eye), 3 * curved + 1.5 * eye)
    part = lk.curvature.estimate(NETS[kind](), "categorical", data(kind), structure)
    close((part + part).total().dense(), 2 * curved)
    draws = posterior.sample(3000, generator=rng())
    flat = torch.cat([draws[name].flatten(1) - posterior.mean[name].flatten() for name in draws], 1)
    variance = torch.linalg.inv(posterior.precision.dense()).diagonal()
    assert float((flat.var(0) / variance).log().abs().max()) < 0.25


def moved(posterior: lk.LaplacePosterior, seed: int) -> Tensor:
    """The posterior's model a little further on, and the flat change."""
    model, shift = posterior.model, []
    with torch.no_grad():
        for k, name in enumerate(posterior.mean):
            step = 0.1 * normal(*posterior.mean[name].shape, seed=seed + k)
            model.get_parameter(name).add_(step)
            shift.append(step.flatten())
    return torch.cat(shift)


def others(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = data(kind)[0]
    return normal(count, *x.shape[1:], seed=seed), labels(2, count, seed=seed + 1)


@pytest.mark.pairs(
    kind=NETS,
    chained=[("diag", "keep"), ("kron", "keep"), ("kron", "project"), ("full", "keep"), ("layer", "keep")],
    own=[False, True],
)
def test_the_evidence_of_a_chain(kind: str, chained: tuple[str, str], own: bool) -> None:
    """``log p(D_t|θ_t) + ½ log|Λ_prev| − ½ log|Λ_t| − ½ (μ_t − μ_prev)ᵀ Λ_prev (μ_t − μ_prev)`` of dense matrices."""
    structure, terms = chained
    model = NETS[kind]()
    prior = {name: 0.5 + k for k, (name, _) in enumerate(model.named_parameters())} if own else 1.5
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=prior)  # type: ignore[arg-type]
    posterior = posterior.fit(data(kind))
    eye = torch.eye(posterior.precision.size, dtype=torch.float64)
    for task, count in enumerate((9, 15)):
        before = posterior.precision.matvec(eye)
        shift, new = moved(posterior, 20 + 10 * task), others(kind, count, 40 + 10 * task)
        posterior = posterior.update(new, terms=terms)
        dense = posterior.precision.matvec(eye)
        fit = oracles.log_likelihood(model, *new, oracles.categorical_nll)
        wanted = fit + float(torch.logdet(before) - torch.logdet(dense) - shift @ before @ shift) / 2
        assert float(posterior.log_evidence()) == pytest.approx(wanted, rel=1e-9)
        assert sum(row.size for row in posterior.summary()) == len(eye)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "layer"])
@pytest.mark.parametrize("kind", NETS)
def test_the_evidence_of_merged_statistics(kind: str, structure: str) -> None:
    """Of two shards' sums, put together: every prior entry counts once, the data of both count."""
    model = NETS[kind]()
    shards = [data(kind), others(kind, 7, 60)]
    one, two = (lk.curvature.estimate(model, "categorical", shard, structure) for shard in shards)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=1.5).adopt(one + two)
    theta = torch.cat([value.flatten() for value in posterior.mean.values()])
    fit = sum(oracles.log_likelihood(model, *shard, oracles.categorical_nll) for shard in shards)
    dense = posterior.precision.dense()
    wanted = oracles.log_evidence(dense, torch.full((len(theta),), 1.5, dtype=torch.float64), theta, fit)
    assert posterior.n_data == 19
    assert float(posterior.log_evidence()) == pytest.approx(wanted, rel=1e-10)
    whole = [torch.cat([a, b]) for a, b in zip(*shards, strict=True)]
    if structure != "kron":  # sums of products are no products of sums
        again = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=1.5).fit(*whole)
        assert float(again.log_evidence()) == pytest.approx(wanted, rel=1e-10)
