"""Out-of-distribution scores against plain loops in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.ood import References, combined
from tests.graphs.problems import Library, Pooled, several
from tests.graphs.problems import net as graph_net

N, I, H, C = 40, 3, 5, 4
STRUCTURES = ["kron", "diag", "ekfac", "full", "layer", "lowrank"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.LayerNorm(H), nn.Linear(H, C)).double().eval()


def data(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, I, seed=seed), torch.arange(n) % C


def fitted(structure: str = "kron", **settings: Any) -> lk.LaplacePosterior:
    settings = {"prior_precision": 0.7, **({"rank": 3} if structure == "lowrank" else {}), **settings}
    return lk.LaplacePosterior(net(), "categorical", structure=structure, **settings).fit(data())


def with_one(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)


def inputs(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    return {"0": with_one(x), "3": with_one(model[:3](x).detach())}


def leverage_by_hand(x: Tensor, layer: str) -> Tensor:
    """``aᵀ (A + 10⁻³ tr A / I)⁻¹ a`` one example after another."""
    model = net()
    train = inputs(model, data()[0])[layer]
    factor = sum(torch.outer(a, a) for a in train) / N
    damped = factor + 1e-3 * factor.trace() / len(factor) * torch.eye(len(factor), dtype=factor.dtype)
    return torch.stack([a @ torch.linalg.inv(damped) @ a for a in inputs(model, x)[layer]])


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def test_leverage_of_input_factors() -> None:
    posterior, x = fitted(), randn(7, I, seed=5) * 3
    last, first = leverage_by_hand(x, "3"), leverage_by_hand(x, "0")
    close(posterior.ood_score(x, "leverage"), last.log())
    close(posterior.ood_score(x, "leverage", layers="all"), last.log() + first.log())
    close(posterior.ood_score(x, "leverage", layers=["0*"]), first.log())
    close(posterior.ood_score(x, "leverage", layers=["3.weight"]), last.log())
    assert posterior.ood_score(x, "leverage").shape == (7,)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "kron"])
def test_leverage_without_input_factors_is_the_variance_of_what_the_layer_gives(structure: str) -> None:
    posterior, x = fitted(structure), randn(6, I, seed=5) * 3
    covariance = torch.linalg.inv(posterior.precision.dense())
    start, places = 0, {}
    for name, value in posterior.mean.items():
        places[name] = torch.arange(start, start + value.numel()).reshape(value.shape)
        start += value.numel()
    total = torch.zeros(6, dtype=torch.float64)
    for layer, out in (("0", H), ("3", C)):
        found = []
        for a in inputs(net(), x)[layer]:
            each = 0.0
            for o in range(out):
                where = torch.cat([places[f"{layer}.weight"][o], places[f"{layer}.bias"][o : o + 1]])
                each = each + a @ covariance[where][:, where] @ a
            found.append(N * each)
        wanted = torch.stack(found)
        close(posterior.ood_score(x, "leverage", layers=[layer]), wanted.log(), 1e-8)
        total = total + wanted.log()
    close(posterior.ood_score(x, "leverage", layers="all"), total, 1e-8)


def test_leverage_of_an_input_factor_does_not_depend_on_the_prior_and_that_of_a_posterior_does() -> None:
    x = randn(4, I, seed=5)
    for structure, depends in (("kron", False), ("diag", True)):
        posterior = fitted(structure)
        before = posterior.ood_score(x, "leverage")
        posterior.prior_precision = {"3*": 0.7, "*": 9.0}
        close(posterior.ood_score(x, "leverage"), before)
        posterior.prior_precision = 70.0
        assert bool((posterior.ood_score(x, "leverage") < before - 1e-3).all()) == depends
        posterior.n_data = 100 * N
        close(posterior.ood_score(x, "leverage"), before)  # λ/N as before


def test_leverage_of_a_last_layer_posterior() -> None:
    x = randn(5, I, seed=5)
    close(fitted(parameters="last_layer").ood_score(x, "leverage"), leverage_by_hand(x, "3").log())


def test_leverage_after_chaining_is_that_of_the_chained_posterior() -> None:
    posterior = fitted()
    chained = posterior.update(data(12, seed=3))
    x = randn(5, I, seed=5)
    covariance = torch.linalg.inv(chained.precision.dense())
    weight = torch.arange(I * H + H + 2 * H, I * H + H + 2 * H + H * C).reshape(C, H)
    bias = I * H + H + 2 * H + H * C + torch.arange(C)
    wanted = []
    for a in inputs(net(), x)["3"]:
        wheres = [torch.cat([weight[o], bias[o : o + 1]]) for o in range(C)]
        wanted.append(chained.n_data * sum(a @ covariance[w][:, w] @ a for w in wheres))
    close(chained.ood_score(x, "leverage"), torch.stack(wanted).log(), 1e-8)


def test_leverage_of_positions_sums_over_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 9, C)).double().eval()
    images, y = randn(N, 1, 5, 5), torch.arange(N) % C
    posterior = lk.LaplacePosterior(model, "categorical").fit((images, y))
    unfold = nn.functional.unfold
    patches = torch.stack([with_one(p.T) for p in unfold(images, 3)])
    factor = torch.einsum("nti,ntj->ij", patches, patches) / N
    inverse = torch.linalg.inv(factor + 1e-4 * factor.trace() * torch.eye(10, dtype=torch.float64))
    x = randn(3, 1, 5, 5, seed=4)
    wanted = torch.stack([sum(a @ inverse @ a for a in with_one(p.T)) for p in unfold(x, 3)])
    close(posterior.ood_score(x, "leverage", layers=["0"]), wanted.log())
    reduced = lk.LaplacePosterior(model, "categorical", sharing="reduce").fit((images, y))
    mean = patches.mean(1)
    factor = mean.T @ mean / N
    inverse = torch.linalg.inv(factor + 1e-4 * factor.trace() * torch.eye(10, dtype=torch.float64))
    wanted = torch.stack([a @ inverse @ a for a in (with_one(p.T).mean(0) for p in unfold(x, 3))])
    close(reduced.ood_score(x, "leverage", layers=["0"]), wanted.log())


def test_leverage_of_rare_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, C)).double().eval()
    tokens = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    posterior = lk.LaplacePosterior(model, "categorical").fit((tokens, torch.arange(4)))
    counts = torch.tensor([4.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64) / 4
    wanted = (1 / (counts + 1e-3 * counts.mean()))[torch.tensor([[0, 3], [1, 1]])].sum(1)
    found = posterior.ood_score(torch.tensor([[0, 3], [1, 1]]), "leverage", layers=["0"])
    close(found, wanted.log())
    assert found[0] > found[1]


def test_leverage_of_graphs_does_not_depend_on_the_batch() -> None:
    kind = Library("double")
    graphs, model = several(kind), graph_net(Pooled)
    posterior = lk.LaplacePosterior(model, "categorical").fit(kind.loader(graphs, 5))
    whole = posterior.ood_score(kind.batch.from_data_list(graphs), "leverage", layers="all")
    alone = [posterior.ood_score(kind.batch.from_data_list([g]), "leverage", layers="all") for g in graphs]
    close(whole, torch.cat(alone))


def test_leverage_takes_one_forward_pass() -> None:
    runs = [0]

    class Counted(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            runs[0] += 1
            return super().forward(input)

    model = Counted(*net())
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    posterior.calibrate(data(), method="map")
    posterior.ood_score(randn(8, I, seed=1))
    for kind in ("leverage", "auto"):
        runs[0] = 0
        posterior.ood_score(randn(8, I, seed=2), kind, layers="all")
        assert runs[0] == 1, kind


def test_other_kinds() -> None:
    posterior, x = fitted(), randn(6, I, seed=5)
    entropy = posterior.ood_score(x, "entropy", samples=20, generator=rng(1))
    drawn = posterior.predict(x, samples=20, generator=rng(1))
    close(entropy, drawn.entropy)
    p = posterior.predict(x, method="mc", samples=20, generator=rng(1), keep_samples=True)
    each = p.samples.softmax(-1)
    mean = each.mean(0)
    wanted = -(mean * mean.log()).sum(-1) + (each * each.log()).sum(-1).mean(0)
    close(posterior.ood_score(x, "mutual_information", samples=20, generator=rng(1)), wanted)
    inverse = torch.linalg.inv(posterior.precision.dense())
    model, variances = net(), []
    for k in range(6):
        z = model(x[k : k + 1])[0]
        total = 0.0
        for c in range(C):
            j = torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(z[c], list(model.parameters()), retain_graph=True)]
            )
            total = total + j @ inverse @ j
        variances.append(total)
    close(posterior.ood_score(x, "variance"), torch.stack(variances))
    variance = posterior.functional_covariance(x, diagonal_only=True)
    scaled = (model(x) / (1 + math.pi / 8 * variance).sqrt()).softmax(-1).detach()
    close(posterior.ood_score(x, "max_prob"), 1 - scaled.amax(-1))


def test_p_values_and_their_harmonic_mean() -> None:
    known = {"entropy": torch.tensor([0.3, 0.1, 0.2, 0.2]), "last": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    references = References.of(known)
    new = torch.tensor([0.0, 0.2, 0.25, 9.0])
    wanted = [(1 + sum(float(r) >= float(s) - 1e-9 for r in known["entropy"])) / 5 for s in new]
    close(references.p_value("entropy", new), torch.tensor(wanted, dtype=torch.float64), 1e-6)
    p = [references.p_value("entropy", new), references.p_value("last", torch.tensor([5.0, 1.0, 3.5, 2.0]))]
    close(combined(p), -(2 / (1 / p[0] + 1 / p[1])).log())


@pytest.mark.parametrize("source", ["calibrate", "tune", "tune on a generator"])
@pytest.mark.parametrize("layers", [None, "last", "all"])
def test_auto_against_references_by_hand(source: str, layers: str | None, tmp_path: Path) -> None:
    posterior, val, x = fitted(), data(30, seed=7), randn(9, I, seed=5) * 2
    if source == "calibrate":
        posterior.calibrate(val, method="map")
    else:
        batches: Any = [(val[0][:20], val[1][:20]), (val[0][20:], val[1][20:])]
        posterior.tune(
            (b for b in batches) if "generator" in source else batches, n_data=[N], prior_precision=[0.7], samples=2
        )
    model = net()

    def scores(at: Tensor) -> dict[str, Tensor]:
        p = model(at).softmax(-1).detach()
        logs = {layer: leverage_by_hand(at, layer).log() for layer in ("0", "3")}
        turned = {layer: logs[layer] - a.square().sum(1).log() for layer, a in inputs(model, at).items()}
        return {
            "entropy": -(p * p.log()).sum(-1), "last": logs["3"], "last direction": turned["3"],
            "all": logs["0"] + logs["3"], "all directions": turned["0"] + turned["3"],
        }  # fmt: skip

    known, new, wanted = scores(val[0]), scores(x), torch.zeros(9, dtype=torch.float64)
    names = list(known)
    taken = {"last": names[:3], "all": names}.get(layers or "", [*names[:3], "all directions"])
    for name in taken:
        for k in range(9):
            wanted[k] += 31 / (1 + int((known[name] >= new[name][k]).sum()))
    wanted = (wanted / len(taken)).log()
    close(posterior.ood_score(x, layers=layers), wanted)
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", net())
    close(again.ood_score(x, layers=layers), wanted)


def test_references_go_when_the_posterior_changes() -> None:
    for change in (
        lambda p: setattr(p, "n_data", 50.0),
        lambda p: setattr(p, "prior_precision", 2.0),
        lambda p: p.fit(data()),
    ):
        posterior = fitted().calibrate(data(30, seed=7), method="map")
        assert posterior.references is not None and posterior.references.count == 30
        change(posterior)
        with pytest.raises(lk.errors.NotFitted, match=r"tune\(val_loader\) or posterior.calibrate"):
            posterior.ood_score(randn(2, I))


def test_auto_sees_what_is_far_away() -> None:
    posterior = fitted().calibrate(data(200, seed=7), method="map")
    near, far = (posterior.ood_score(x, layers="all") for x in (randn(50, I, seed=8), randn(50, I, seed=9) * 20))
    assert float(near.exp().mean()) < 2 * math.log(200)  # the mean of 1 / p is Σ_k 1 / k for p = k / 201
    assert float((far[:, None] > near[None]).double().mean()) > 0.9


def test_direction_is_the_leverage_per_squared_length() -> None:
    posterior, x = fitted(), randn(6, I, seed=3)
    for layer, a in inputs(net(), x).items():
        close(posterior.ood_score(x, "direction", layers=[layer]),
              (leverage_by_hand(x, layer) / a.square().sum(1)).log())  # fmt: skip
    both = sum(posterior.ood_score(x, "direction", layers=[layer]) for layer in ("0", "3"))
    close(posterior.ood_score(x, "direction", layers="all"), both)
    still = torch.cat([x[:1] * 0, x[:1] * 1e-3])  # weak inputs are not far out, but the constant alone is a direction
    assert bool(posterior.ood_score(still, "leverage", layers=["0"]).isfinite().all())
    assert bool(posterior.ood_score(still, "direction", layers=["0"]).isfinite().all())


def test_direction_of_tokens_is_per_token() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, I), nn.Flatten(), nn.Linear(2 * I, C)).double().eval()
    tokens = torch.randint(6, (N, 2), generator=rng())
    posterior = lk.LaplacePosterior(model, "categorical").fit((tokens, data()[1]))
    whole = posterior.ood_score(tokens, "leverage", layers=["0"])
    close(posterior.ood_score(tokens, "direction", layers=["0"]), whole - math.log(2))


def test_auto_refuses_references_of_an_older_version() -> None:
    posterior = fitted().calibrate(data(30, seed=7), method="map")
    assert posterior.references is not None
    scores = {name: value for name, value in posterior.references.scores.items() if "direction" not in name}
    posterior._calibration = dataclasses.replace(posterior._calibration, references=References(scores))
    with pytest.raises(lk.errors.NotFitted, match="older version"):
        posterior.ood_score(randn(2, I))


def test_refusals() -> None:
    posterior = fitted()
    x = randn(3, I)
    with pytest.raises(lk.errors.UnknownName, match=r"'leverages'.*Did you mean 'leverage'"):
        posterior.ood_score(x, "leverages")
    with pytest.raises(lk.errors.UnknownName, match=r"layer.*'0'.*'3'"):
        posterior.ood_score(x, "leverage", layers=["7*"])
    with pytest.raises(lk.errors.UnknownName, match=r"'first'.*'last'"):
        posterior.ood_score(x, "leverage", layers="first")
    with pytest.raises(lk.errors.NonFinite):
        posterior.ood_score(x / 0, "leverage")
    with pytest.raises(lk.errors.NotFitted):
        lk.LaplacePosterior(net(), "categorical").ood_score(x, "leverage")
    norm = lk.LaplacePosterior(net(), "categorical", parameters=["2.*"]).fit(data())
    with pytest.raises(lk.errors.IncompatiblePair, match="no layer with inputs"):
        norm.ood_score(x, "leverage")
    with pytest.raises(lk.errors.NotFitted):
        norm.calibrate(data(), method="map").ood_score(x)
    single = lk.LaplacePosterior(net(), "categorical", parameters=lk.Subnetwork(5, by="magnitude"))
    with pytest.raises(lk.errors.IncompatiblePair, match="single weights"):
        single.fit(data()).ood_score(x, "leverage")
    line = lk.LaplacePosterior(nn.Linear(I, 2).double(), "gaussian").fit((data()[0], randn(N, 2)))
    with pytest.raises(lk.errors.IncompatiblePair, match=r"max_prob.*class probabilities"):
        line.ood_score(x, "max_prob")
    assert line.calibrate((data()[0], randn(N, 2)), method="map").ood_score(x).shape == (3,)


def test_nothing_is_changed_by_scores() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.calibrate(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 7, shuffle=True))
        for kind in ("auto", "entropy", "mutual_information", "variance", "max_prob", "leverage"):
            posterior.ood_score(randn(3, I), kind, samples=2)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_leverages_do_not_hang_on_what_was_asked_first(structure: str) -> None:
    """A single example cannot tell the axis of examples from another one; the next batch can have any size."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.l = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(self.r(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Recurrent().double(), randn(5, 4, 2)
    made = [lk.LaplacePosterior(model, "categorical", structure).fit((x, torch.arange(5) % 3)) for _ in range(2)]
    for layers in ("last", "all"):
        whole = made[0].ood_score(x, kind="leverage", layers=layers)
        ones = torch.cat([made[1].ood_score(row[None], kind="leverage", layers=layers) for row in x])
        torch.testing.assert_close(ones, whole)
        torch.testing.assert_close(made[1].ood_score(x, kind="leverage", layers=layers), whole)
        with pytest.raises(lk.errors.LaplaceKFError):
            made[1].ood_score(x[:, :, :1], kind="leverage", layers=layers)
        torch.testing.assert_close(made[1].ood_score(x, kind="leverage", layers=layers), whole)
