"""Masks and pruned networks beside plain loops over dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import pruning
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.operators import conditional
from laplace_kf.pruning import saliency


def network(*, inputs: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4)).double()


def data(inputs: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(60, inputs, generator=rng, dtype=torch.float64), torch.randint(4, (60,), generator=rng)


def fitted(structure: str = "kron", inputs: int = 8) -> lk.LaplacePosterior:
    return lk.LaplacePosterior(network(inputs=inputs), "categorical", structure=structure, prior_precision=0.1).fit(
        data(inputs)
    )


def greedy(posterior: lk.LaplacePosterior, count: int, prunable: list[str], rounds: int) -> Tensor:
    """Which flat entries are held after some rounds, from dense inverses alone."""
    precision, mean = posterior.precision.dense(), posterior.gaussian.mean
    layout = posterior.precision.layout
    named = {
        name: torch.full((1, *shape), name in prunable) for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    allowed = layout.join(named)[0]
    held = torch.zeros(len(mean), dtype=torch.bool)
    total = int(allowed.sum())
    for step in range(1, rounds + 1):
        free = ~held
        covariance = torch.linalg.inv(precision[free][:, free])
        now = mean[free] + covariance @ precision[free][:, held] @ mean[held]
        score = torch.full_like(mean, torch.inf)
        score[free] = now.square() / covariance.diagonal()
        score[~allowed] = torch.inf
        wanted = count if step == rounds else round(total * (1 - (1 - count / total) ** (step / rounds)))
        held[score.argsort()[: wanted - int(held.sum())]] = True
    return held


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "lowrank", "full"])
def test_masks_are_those_of_optimal_brain_surgery(structure: str) -> None:
    posterior = fitted(structure)
    names = ["0.weight", "3.weight"]
    found = pruning.masks(posterior, 0.75, rounds=4)
    assert list(found) == names  # neither biases nor normalisation
    every = {n: found.get(n, torch.zeros(v.shape, dtype=torch.bool))[None] for n, v in posterior.mean.items()}
    wanted = greedy(posterior, 108, names, 4)
    assert torch.equal(posterior.precision.layout.join(every)[0], wanted)


@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.9, 1.0])
@pytest.mark.parametrize("per_layer", [True, False])
def test_exactly_so_many_weights_are_zero(sparsity: float, per_layer: bool) -> None:
    posterior = fitted()
    before = copy.deepcopy(posterior.model.state_dict())
    made = pruning.prune(posterior, sparsity, per_layer=per_layer)
    zeros = {name: int((p == 0).sum()) for name, p in made.named_parameters()}
    if per_layer:
        assert (zeros["0.weight"], zeros["3.weight"]) == (round(sparsity * 96), round(sparsity * 48))
    else:
        assert zeros["0.weight"] + zeros["3.weight"] == round(sparsity * 144)
    assert not any(zeros[name] for name in ("0.bias", "1.weight", "3.bias"))
    for name, value in posterior.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_weights_are_the_conditional_mean() -> None:
    posterior = fitted()
    made = dict(pruning.prune(posterior, 0.5).named_parameters())
    for name, value in posterior.condition(0.0, pruning.masks(posterior, 0.5)).items():
        assert torch.equal(made[name], value)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_large_blocks_go_row_by_row(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted(structure)
    monkeypatch.setattr(saliency, "SMALL", 0)
    held = {"0.weight": torch.rand(12, 8, generator=torch.Generator().manual_seed(3)) < 0.5}
    called = []
    original = saliency._given_other_rows
    monkeypatch.setattr(saliency, "_given_other_rows", lambda *given: called.append(1) or original(*given))
    (_, matrix, free, weights), *_ = saliency._blocks(posterior, held)
    mean, variances = saliency._conditional(matrix, free, weights)
    assert called
    whole = matrix.dense().reshape(12, 9, 12, 9)
    for row in range(12):
        kept = free[0, row]
        part = whole[row, :, row]
        covariance = torch.linalg.inv(part[kept][:, kept])
        torch.testing.assert_close(variances[0, row, kept], covariance.diagonal())
        moved = weights[0, row, kept] + covariance @ part[kept][:, ~kept] @ weights[0, row, ~kept]
        torch.testing.assert_close(mean[0, row, kept], moved)


def test_tokens_go_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randint(6, (30, 3), generator=torch.Generator().manual_seed(5))
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, x.sum(1) % 3))
    exact = pruning.masks(posterior, 0.5, layers=["0.weight"])
    monkeypatch.setattr(saliency, "SMALL", 0)
    assert torch.equal(pruning.masks(posterior, 0.5, layers=["0.weight"])["0.weight"], exact["0.weight"])


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_rows_by_their_joint_saliency(structure: str) -> None:
    posterior = fitted(structure)
    precision, mean = posterior.precision.dense(), posterior.gaussian.mean
    covariance = torch.linalg.inv(precision)
    energies = {}
    for row in range(12):
        index = torch.arange(8 * row, 8 * row + 8)
        energies[row] = float(mean[index] @ torch.linalg.solve(covariance[index][:, index], mean[index]))
    best = sorted(energies, key=energies.__getitem__)[:6]
    found = pruning.masks(posterior, 0.5, "rows", layers=["0.weight"], rounds=1)["0.weight"]
    assert sorted(found.all(1).nonzero()[:, 0].tolist()) == sorted(best)
    assert int(found.sum()) == 48
    again = pruning.masks(posterior, 0.5, "rows", layers=["0.weight"])["0.weight"]
    assert int(again.all(1).sum()) == 6 and int(again.sum()) == 48
    made = pruning.prune(posterior, 0.5, "rows", layers=["0.weight"])
    assert int((made[0].weight == 0).all(1).sum()) == 6


def test_rows_of_transposed_convolutions_are_outputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose1d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    x = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, torch.arange(20) % 3))
    found = pruning.masks(posterior, 0.5, "rows", layers=["0.weight"])["0.weight"]
    assert int(found.all(2).all(0).sum()) == 3 and int(found.sum()) == 18


class Attention(nn.Module):
    """Self-attention and a linear layer over the mean position."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


def test_heads_are_held_whole() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attention().double()
    x = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, torch.arange(20) % 3))
    made = pruning.prune(posterior, 0.5, "heads")
    gone = (made.attention.out_proj.weight == 0).all(0).reshape(4, 2).all(1)
    assert int(gone.sum()) == 2
    rows = (made.attention.in_proj_weight == 0).all(1).reshape(3, 4, 2).all(-1)
    assert torch.equal(rows, gone.expand(3, 4))
    with pytest.raises(IncompatiblePair, match="groups="):
        pruning.prune(fitted(), 0.5, "heads")


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("1:2", 1, 2)])
def test_neighbours(pattern: str, n: int, m: int) -> None:
    made = pruning.prune(fitted(), None, pattern)
    for name in ("0.weight", "3.weight"):
        weight = dict(made.named_parameters())[name]
        assert bool(((weight.reshape(-1, m) != 0).sum(1) == n).all())


def test_neighbours_of_a_kernel_are_input_channels() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    x = torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, torch.arange(20) % 3))
    found = pruning.masks(posterior, 0.5, "2:4", layers=["0.*"])["0.weight"]
    assert bool((found.sum(1) == 2).all())
    with pytest.raises(IncompatiblePair, match=r"3\.weight"):
        pruning.masks(posterior, 0.5, "2:4")


def test_gradual_pruning_measures_the_curvature_again() -> None:
    posterior = fitted()
    trained = []

    def train(model: nn.Module, given: object) -> None:
        trained.append(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)

    made = pruning.gradually(posterior, data(), 0.75, 3, train=train)
    assert len(trained) == 2 and trained[0] is not posterior.model
    kept = [1 - round((1 - (1 - 0.75) ** (k / 3)) * 144) / 144 for k in (1, 2, 3)]
    assert sum(int((dict(made.named_parameters())[n] == 0).sum()) for n in ("0.weight", "3.weight")) == 108
    first = pruning.masks(posterior, 1 - kept[0])
    for name, mask in first.items():  # what was held in the first step still is
        assert not dict(made.named_parameters())[name][mask].any()
    one = pruning.gradually(posterior, data(), 0.75, 1)
    for mine, other in zip(one.parameters(), pruning.prune(posterior, 0.75).parameters(), strict=True):
        assert torch.equal(mine, other)


def test_it_loses_less_than_magnitude() -> None:
    x, _ = data()
    labels = (x @ torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).argmax(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision=0.1).fit((x, labels))
    losses = {}
    for score in ("posterior", "magnitude"):
        made = pruning.prune(posterior, 0.5, score=score)
        losses[score] = float(nn.functional.cross_entropy(made(x), labels).detach())
    held = pruning.masks(posterior, 0.5, score="magnitude")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in held:
                parameter.masked_fill_(held[name], 0)
                smallest = posterior.mean[name].abs()
                assert float(smallest[held[name]].max()) <= float(smallest[~held[name]].max())
    assert losses["posterior"] < losses["magnitude"] < float(nn.functional.cross_entropy(plain(x), labels).detach())


def test_refusals() -> None:
    posterior = fitted()
    with pytest.raises(UnknownName, match="unstructured"):
        pruning.prune(posterior, 0.5, "blocks")
    with pytest.raises(UnknownName, match="magnitude"):
        pruning.prune(posterior, 0.5, score="random")
    with pytest.raises(TypeError, match="sparsity"):
        pruning.prune(posterior)
    with pytest.raises(ValueError, match="between 0 and 1"):
        pruning.prune(posterior, 95)
    with pytest.raises(IncompatiblePair, match="leave sparsity out"):
        pruning.prune(posterior, 0.75, "2:4")
    with pytest.raises(ValueError, match="0 < n < m"):
        pruning.prune(posterior, None, "4:4")
    with pytest.raises(UnknownName):
        pruning.prune(posterior, 0.5, layers=["5.*"])
    with pytest.raises(ShapeMismatch, match="integer"):
        pruning.prune(posterior, 0.5, groups={"0.weight": torch.zeros(12, 8)})
    with pytest.raises(UnknownName):
        pruning.prune(posterior, 0.5, groups={"weight": torch.zeros(12, 8, dtype=torch.long)})
    with pytest.raises(IncompatiblePair, match="negative"):
        pruning.prune(posterior, 0.5, groups={"0.weight": torch.full((12, 8), -1)})
    biases = lk.LaplacePosterior(network(), "categorical", parameters=["*bias"]).fit(data())
    with pytest.raises(IncompatiblePair, match="no matrix or kernel"):
        pruning.prune(biases, 0.5)
    with pytest.raises(IncompatiblePair, match="chained"):
        pruning.gradually(posterior.update(data()), data(), 0.5)


def test_a_last_layer_posterior_prunes_the_last_layer() -> None:
    posterior = lk.LaplacePosterior(network(), "categorical", parameters="last_layer").fit(data())
    made = pruning.prune(posterior, 0.5)
    assert int((made[3].weight == 0).sum()) == 24
    assert torch.equal(made[0].weight, posterior.model[0].weight)


def test_whole_rows_stay_kronecker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "DENSE", 0)
    posterior = fitted()
    held = pruning.masks(posterior, 0.5, "rows", layers=["0.weight"])
    both = {**held, "0.bias": held["0.weight"][:, 0].clone()}
    assert posterior.condition(0.0, both).free.ways["0"] == "factors"
