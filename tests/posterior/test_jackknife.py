"""Scores of few weight draws against those of 100,000: the bias that is taken off, and the error over draws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior.jackknife import CAP, GROUPS, PREDICTED, draw_error, extrapolated, groups
from laplace_kf.posterior.joint import Joint, JointValidation
from laplace_kf.posterior.objectives import OBJECTIVES, OODContrast, WithinTolerance
from laplace_kf.posterior.search import compared
from laplace_kf.posterior.validation import MAP, Score, Validation
from tests.cases import rng
from tests.posterior.test_tuning import classification, regression

SAMPLES, TRUTH = 20, 100_000


def densities(kind: str, spread: float) -> Tensor:
    """Log densities ``(100,000, 12)`` of targets by a linear network at weights drawn in pairs, float64."""
    x = torch.randn(12, 3, generator=rng(0), dtype=torch.float64)
    half = torch.randn(TRUTH // 2, 3, 3, generator=rng(1), dtype=torch.float64)
    certain = 3.0 if kind == "categorical" else 1.0
    weights = certain * torch.eye(3, dtype=torch.float64) + spread * torch.stack([half, -half], 1).flatten(0, 1)
    outputs = torch.einsum("sij,nj->sni", weights, x)
    if kind == "categorical":
        return outputs.log_softmax(-1)[:, range(12), torch.arange(12) % 3]
    y = x[:, 0] + 0.3 * torch.randn(12, generator=rng(2), dtype=torch.float64)
    return torch.distributions.Normal(outputs[..., 0], 0.3).log_prob(y)


def mean_score(logs: Tensor) -> Tensor:
    """Negative log of the mean density over draws, the last but one axis."""
    return math.log(logs.shape[-2]) - logs.logsumexp(-2)


@pytest.mark.parametrize(("kind", "spread"), [("categorical", 0.5), ("categorical", 1.0), ("gaussian", 0.3),
                                              ("gaussian", 0.4)])  # fmt: skip
def test_few_draws_are_less_biased_than_they_were(kind: str, spread: float) -> None:
    """Sets of 20 of 100,000 draws against sets of 100 of the same: a quarter of the bias is left at most."""
    logs = densities(kind, spread)
    wanted = mean_score(logs.reshape(-1, PREDICTED, 12)).mean()
    sets = logs.reshape(-1, SAMPLES, 12)
    plain = mean_score(sets)
    left = torch.stack([mean_score(sets[:, k]) for k in groups(SAMPLES, pairs=True)])
    found = extrapolated(plain.flatten(), left.flatten(1), SAMPLES).reshape(-1, 12)
    before, after = plain.mean() - wanted, found.mean() - wanted
    assert float(before) > 0.01
    assert abs(float(after)) < 0.25 * float(before)
    assert float(found.mean(1).std()) < 1.1 * float(plain.mean(1).std())
    # and how much the mean over the examples moves from one set of draws to another
    error = torch.tensor([draw_error(without, None) for without in left.mean(2).T])
    assert float(error.square().mean().sqrt()) == pytest.approx(float(plain.mean(1).std()), rel=0.15)


def test_groups_keep_pairs_together() -> None:
    for samples, pairs, wanted in ((20, True, 5), (20, False, 5), (6, True, 3), (7, True, 4), (3, False, 3),
                                   (2, True, 0), (1, False, 0)):  # fmt: skip
        keep = groups(samples, pairs)
        assert len(keep) == wanted <= GROUPS
        missing = [sorted(set(range(samples)) - set(each.tolist())) for each in keep]
        assert sorted(itertools.chain(*missing)) == (list(range(samples)) if wanted else [])
        if pairs:
            assert all({k ^ 1 for k in each} & set(range(samples)) <= set(each) for each in missing)


def test_one_draw_that_has_all_of_a_density_is_no_reason_to_hope() -> None:
    """Without it the score is thousands of nats; the correction stays at half a nat, and at none of many draws."""
    scores, left = torch.tensor([1.0, 1.0]), torch.tensor([[5000.0, 1.1]] + [[1.0, 1.0]] * 4)
    share = 1.0 - SAMPLES / PREDICTED
    assert extrapolated(scores, left, SAMPLES).tolist() == pytest.approx([1.0 - share * CAP, 1.0 - share * 0.08])
    assert extrapolated(scores, left, PREDICTED) is scores


def test_draws_in_common_cancel() -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, 3.5])
    assert draw_error(one, other) == 0.0 == draw_error(None, None)
    assert draw_error(one, None) == draw_error(None, one) == pytest.approx(math.sqrt(2 / 3 * 2.0))
    assert draw_error(one, other[:2]) == pytest.approx(math.hypot(draw_error(one, None), draw_error(other[:2], None)))
    parts = torch.tensor([0.0, 0.0, 0.0, 0.0])
    gain, error = compared(Score(1.0, parts + 1.0), Score(0.0, parts, folds=one))
    assert (gain, error) == (1.0, pytest.approx(math.sqrt(2 / 3 * 2.0)))


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("objective", ["nll", "brier", "ece"])
def test_a_search_is_told_of_the_error_of_its_draws(objective: str, noise: bool) -> None:
    """Scores by draws have it, MAP's has not, nor an objective that is one number for all examples."""
    if noise and objective != "nll":
        return
    model, train, val = regression() if noise else classification()
    posterior = lk.LaplacePosterior(model, "gaussian" if noise else "categorical").fit(train)
    of = posterior._fitted("a test")
    validation = Validation(of, val, OBJECTIVES[objective], 20, rng(0), pairs=True, noise=noise)
    scores = validation.scorer("mc")([MAP, (40.0, 4.0)])
    folds = scores[40.0, 4.0].folds
    assert scores[MAP].folds is None
    if objective == "ece":
        assert folds is None
    else:
        assert folds is not None and folds.shape == (GROUPS,) and float(folds.std()) > 0


def sequences() -> tuple[nn.Module, Any, Any]:
    """Labels of sequences of two lengths, of which some are ignored, one example's all."""
    y = torch.arange(48).reshape(12, 4) % 3
    y[0], y[3, 2] = -100, -100
    x = torch.randn(12, 4, 5, generator=rng(3))
    return nn.Linear(5, 3), (x, y), [(x[:7], y[:7]), (x[7:, :3], y[7:, :3]), (x[7:, :2], y[7:, :2])]


def weighted() -> tuple[nn.Module, Any, Any]:
    model, (x, y), (far, other) = classification()
    return model, [(x, y, torch.ones(len(y)))], [(far, other, torch.arange(len(other)) % 4)]


@pytest.mark.parametrize(("case", "options", "objective"), [
    ("regression", {}, "nll"), ("classification", {}, "nll"), ("classification", {}, "brier"),
    ("classification", {}, WithinTolerance()), ("classification", {}, "ood"), ("sequences", {}, "nll"),
    ("sequences", {}, "brier"), ("weighted", {"weights": True}, "nll"), ("weighted", {"weights": True}, "brier"),
])  # fmt: skip
def test_all_groups_of_draws_are_scored_at_once(case: str, options: Any, objective: Any, monkeypatch: Any) -> None:
    """As one after the other, by two calls of the objective for each pool of data in place of six."""
    makers: Any = {"regression": regression, "classification": classification, "sequences": sequences,
                   "weighted": weighted}  # fmt: skip
    torch.manual_seed(0)
    model, train, val = makers[case]()
    posterior = lk.LaplacePosterior(model, "gaussian" if case == "regression" else "categorical", **options).fit(train)
    if objective == "ood":
        objective = OODContrast(5.0 * torch.randn(9, 2, generator=rng(1)))
    of = OBJECTIVES[objective] if isinstance(objective, str) else objective
    scored: list[int] = []
    monkeypatch.setattr(Prediction, "kept", lambda *a, own=Prediction.kept: scored.append(1) or own(*a))

    def score(samples: int) -> tuple[Score, int]:
        validation = Validation(posterior._fitted("a test"), val, of, samples, rng(0), pairs=True)
        scorer = validation.scorer("mc")
        scored.clear()
        found = scorer([(40.0, 4.0)])[40.0, 4.0]
        return found, len(scored) // len(scorer.part.inside.sizes)

    together, few = score(20)
    monkeypatch.setattr("laplace_kf.posterior.predictors.STACKED", 0)
    singly, many = score(20)
    assert many >= 3 * few
    assert together.folds is not None and singly.folds is not None
    assert together.parts is not None and singly.parts is not None
    torch.testing.assert_close(together.folds, singly.folds, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(together.parts, singly.parts, rtol=1e-5, atol=1e-6)
    assert float(singly.folds.std()) > 1e-4
    monkeypatch.undo()
    assert score(18)[0].folds is not None  # groups of different sizes


def test_an_objective_of_ones_own_sees_one_prediction_at_a_time() -> None:
    model, train, val = classification()
    seen: list[tuple[int, ...]] = []

    def own(prediction: Prediction, y: Tensor) -> Tensor:
        seen.append(tuple(prediction.probs.shape))
        return -prediction.log_prob(y) / float(prediction.entropy.sum())  # an example's depends on the others

    validation = Validation(
        lk.LaplacePosterior(model, "categorical").fit(train)._fitted("a test"), val, own, 20, rng(0)
    )
    validation.scorer("mc")([(40.0, 4.0)])
    assert seen == [(len(val[1]), 2)] * (1 + GROUPS)


def test_a_mixture_is_corrected_as_one_posterior_is() -> None:
    """Two components with the same weights are one network with twice the draws: the correction is that of both."""
    _, train, val = classification()
    members = []
    for _ in range(2):
        members.append(lk.LaplacePosterior(classification()[0], "categorical").fit(train))
    joint: Any = Joint([member._fitted("a test") for member in members], [0.5, 0.5])
    validation = JointValidation(joint, val, OBJECTIVES["nll"], 20, rng(0), pairs=True)
    found = validation.scorer("mc")([(40.0, 4.0)])[40.0, 4.0]
    assert found.folds is not None and found.parts is not None
    probs = []
    for part in validation.parts:
        for seed in part.seeds[::2]:
            noise = members[0].precision_at(40.0, 4.0).draw(1, torch.Generator().manual_seed(seed))
            for sign in (1, -1):
                weights = {n: v + sign * noise[n][0] for n, v in members[0].mean.items()}
                logits = torch.func.functional_call(members[0].model, weights, (val[0],)).detach()
                probs.append(nn.functional.softmax(logits, -1)[range(len(val[1])), val[1]])
    draws = torch.stack(probs).reshape(2, 20, -1).double()
    everything = -draws.mean((0, 1)).log()
    without = torch.stack([-draws[:, k].mean((0, 1)).log() for k in groups(20, pairs=True)])
    assert float(found.parts.mean()) == pytest.approx(float(extrapolated(everything, without, 20).mean()), rel=1e-5)
