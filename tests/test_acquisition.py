"""Acquisition beside enumeration and dense Gaussians on tiny problems."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import acquisition
from laplace_kf.errors import IncompatiblePair, NotFitted, ShapeMismatch

N = 6


def network(outputs: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def points(count: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(outputs: int = 3, likelihood: str = "categorical", seed: int = 0) -> lk.LaplacePosterior:
    x = points(20, 3)
    y = torch.arange(20) % outputs if likelihood == "categorical" else (x.repeat(1, outputs)[:, :outputs] > 0).double()
    model = network(outputs, seed)
    return lk.LaplacePosterior(model, likelihood, structure="full", prior_precision=0.3).fit((x, y))


def regression(outputs: int = 2) -> lk.LaplacePosterior:
    x = points(20, 3)
    likelihood = lk.likelihoods.Gaussian(torch.tensor([0.3, 0.7], dtype=torch.float64)[:outputs])
    return lk.LaplacePosterior(network(outputs), likelihood, structure="kron").fit((x, x[:, :outputs].sin()))


def functions(posterior: lk.LaplacePosterior, x: Tensor, samples: int) -> Tensor:
    """Probabilities ``(S, N, C)`` by dense Jacobians; their mean is the true joint distribution up to their number."""
    model = posterior.model
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(weights)
    j = torch.cat([rows[name].flatten(2) for name in weights], -1)
    root = torch.linalg.cholesky(torch.linalg.inv(posterior.precision.dense()))
    noise = torch.randn(samples, root.shape[0], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return model(x).detach() + torch.einsum("ncp,sp->snc", j, noise @ root.T)


def entropy(p: Tensor) -> float:
    return float(-(p[p > 0] * p[p > 0].log()).sum())


def information(p: Tensor, batch: list[int]) -> float:
    """``H(y) − E H(y | f)`` by listing every combination of labels."""
    joint = []
    for labels in itertools.product(range(p.shape[2]), repeat=len(batch)):
        each = torch.ones(p.shape[0], dtype=p.dtype)
        for point, label in zip(batch, labels, strict=True):
            each = each * p[:, point, label]
        joint.append(each.mean())
    conditional = sum(-(p[:, i] * p[:, i].log()).sum(1).mean() for i in batch)
    return entropy(torch.stack(joint)) - float(conditional)


def test_bald_of_classes() -> None:
    posterior, x = classifier(), points(N)
    exact = functions(posterior, x, 20_000).softmax(-1)
    found = acquisition.bald(posterior, x, samples=1500, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([information(exact, [i]) for i in range(N)], dtype=torch.float64)
    assert float(wanted.max()) > 0.05
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_batches_of_classes() -> None:
    posterior, x = classifier(), points(N)
    rng = torch.Generator().manual_seed(0)
    p = acquisition._functions(posterior, [x], 800, torch.Generator().manual_seed(0))[0]
    found = acquisition.batch_bald(posterior, x, 4, 800, rng)
    chosen = found.indices.tolist()
    assert len(set(chosen)) == 4
    scores = torch.tensor([information(p, chosen[: k + 1]) for k in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found.scores, scores, atol=1e-10, rtol=0)
    for k in range(4):  # greedy at every step
        rest = [i for i in range(N) if i not in chosen[:k]]
        assert max(rest, key=lambda i: information(p, [*chosen[:k], i])) == chosen[k]
    true = functions(posterior, x, 20_000).softmax(-1)
    assert abs(information(true, chosen[:2]) - float(found.scores[1])) < 0.06


@pytest.mark.parametrize("configurations", [5, 15])
def test_drawn_labels_are_unbiased(configurations: int) -> None:
    """Of 27 combinations that come before the fourth label, so many are drawn: the mean score is the exact one."""
    posterior, x = classifier(), points(N)
    p = acquisition._functions(posterior, [x], 300, torch.Generator().manual_seed(0))[0]
    errors = []
    for seed in range(100):
        found = acquisition._class_batch(p, 4, configurations, torch.Generator().manual_seed(seed))
        errors.append(float(found.scores[-1]) - information(p, found.indices.tolist()))
    mean, spread = torch.tensor(errors).mean(), torch.tensor(errors).std() / 10
    assert float(spread) > 1e-3  # drawn, not enumerated
    assert abs(float(mean)) < 4 * float(spread)


@pytest.mark.parametrize("outputs", [1, 2])
def test_bernoulli_labels_are_combinations(outputs: int) -> None:
    posterior, x = classifier(outputs, "bernoulli"), points(N)
    f = functions(posterior, x, 20_000).sigmoid()
    joint = torch.stack([1 - f[..., 0], f[..., 0]], -1)
    if outputs == 2:
        second = torch.stack([1 - f[..., 1], f[..., 1]], -1)
        joint = (joint[..., :, None] * second[..., None, :]).flatten(-2)
    wanted = torch.tensor([information(joint, [i]) for i in range(N)], dtype=torch.float64)
    found = acquisition.bald(posterior, x, 1500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_functions_of_a_mixture_are_those_of_its_components() -> None:
    members, x = [classifier(), classifier(seed=5)], points(N)
    mixture = lk.Mixture(members)
    exact = torch.cat([functions(member, x, 20_000).softmax(-1) for member in members])
    alone = torch.tensor([information(exact[:20_000], [i]) for i in range(N)], dtype=torch.float64)
    wanted = torch.tensor([information(exact, [i]) for i in range(N)], dtype=torch.float64)
    assert float((wanted - alone).abs().max()) > 0.06  # the networks disagree: twice what is tolerated below
    found = acquisition.bald(mixture, x, 3000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
    p = acquisition._functions(mixture, [x], 7, torch.Generator().manual_seed(0))[0]
    assert len(p) == 7
    batch = acquisition.batch_bald(mixture, x, 3, 500, torch.Generator().manual_seed(0))
    p = acquisition._functions(mixture, [x], 500, torch.Generator().manual_seed(0))[0]
    chosen = batch.indices.tolist()
    scores = torch.tensor([information(p, chosen[: k + 1]) for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(batch.scores, scores, atol=1e-10, rtol=0)


def test_functions_of_a_mixture_follow_its_weights() -> None:
    mixture = lk.Mixture([classifier(), classifier(seed=5)])
    mixture._shares = [0.0, 1.0]
    only = acquisition.bald(mixture.posteriors[1], points(N), 40, torch.Generator().manual_seed(0))
    found = acquisition.bald(mixture, points(N), 40, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, only)


def test_epig_of_classes() -> None:
    posterior, x, targets = classifier(), points(N), points(4, 7)
    true = functions(posterior, torch.cat([x, targets]), 20_000).softmax(-1)
    wanted = []
    for i in range(N):
        each = []
        for t in range(N, N + 4):
            joint = torch.einsum("sc,sk->ck", true[:, i], true[:, t]) / len(true)
            each.append(entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint))
        wanted.append(sum(each) / 4)
    found = acquisition.epig(posterior, x, targets, 1500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=0.03, rtol=0)


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_in_closed_form(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x, targets = regression(outputs), points(N), points(3, 7)
    monkeypatch.setattr(acquisition, "_functions", lambda *_: pytest.fail("drew functions"))
    c = outputs
    joint = posterior.functional_covariance(torch.cat([x, targets]), joint=True)
    noise = torch.tensor([0.09, 0.49], dtype=torch.float64)[:c]
    total = joint + torch.diag(noise.repeat(N + 3))

    def volume(of: list[int], matrix: Tensor = total) -> Tensor:
        rows = torch.tensor([i * c + k for i in of for k in range(c)])
        return torch.logdet(matrix[rows][:, rows])

    single = torch.stack([(volume([i]) - noise.log().sum()) / 2 for i in range(N)])
    torch.testing.assert_close(acquisition.bald(posterior, x), single)
    found = acquisition.batch_bald(posterior, x, 3)
    chosen = found.indices.tolist()
    for k in range(3):
        scores = {
            i: float((volume([*chosen[:k], i]) - (k + 1) * noise.log().sum()) / 2)
            for i in range(N)
            if i not in chosen[:k]
        }
        assert max(scores, key=scores.__getitem__) == chosen[k]
        assert abs(scores[chosen[k]] - float(found.scores[k])) < 1e-9
    pairs = torch.stack(
        [
            torch.stack([volume([i]) + volume([t]) - volume([i, t]) for t in range(N, N + 3)]).mean() / 2
            for i in range(N)
        ]
    )
    torch.testing.assert_close(acquisition.epig(posterior, x, targets), pairs)


def test_the_same_generator_gives_the_same_scores_and_nothing_changes() -> None:
    posterior, x = classifier(), points(N)
    before = torch.get_rng_state()
    first = acquisition.bald(posterior, x, 50, torch.Generator().manual_seed(4))
    assert torch.equal(first, acquisition.bald(posterior, x, 50, torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state())
    twice = acquisition.batch_bald(posterior, torch.cat([x[:1], x[:1], x[:1]]), 2, 500)
    assert sorted(twice.indices.tolist()) != [twice.indices[0]] * 2


def test_refusals() -> None:
    x = points(N)
    with pytest.raises(NotFitted):
        acquisition.bald(lk.LaplacePosterior(network(3), "categorical"), x)
    counts = lk.LaplacePosterior(network(1), "poisson").fit((x, torch.ones(N, 1, dtype=torch.float64)))
    with pytest.raises(IncompatiblePair, match="categorical"):
        acquisition.bald(counts, x)
    posterior = classifier()
    with pytest.raises(ValueError, match="between 1 and the 6"):
        acquisition.batch_bald(posterior, x, 7)
    with pytest.raises(ValueError, match="at least 2"):
        acquisition.bald(posterior, x, 1)
    with pytest.raises(IncompatiblePair, match="not for a mixture"):
        acquisition.bald(lk.Mixture([regression()]), x)
    with pytest.raises(ShapeMismatch, match="one shape"):
        acquisition.epig(posterior, x, points(4)[:, :1])
    with pytest.raises(ShapeMismatch, match="combinations"):
        acquisition.bald(classifier(7, "bernoulli"), x)
