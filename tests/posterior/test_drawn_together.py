"""Weight draws of a search: made and run together, and what a draw by itself gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import laplace_kf as lk
from laplace_kf.posterior import predictors
from laplace_kf.posterior.objectives import OBJECTIVES
from laplace_kf.posterior.predictors import Sampled
from laplace_kf.posterior.validation import Validation
from laplace_kf.predictive import at_once
from tests.cases import BY_NAME, build, labels, mlp, normal, rng
from tests.checks import close
from tests.fits import fitted_once


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "layer", "lowrank", "isotropic"])
def test_draws_of_seeds_are_those_of_their_generators(structure: str) -> None:
    problem, posterior = fitted_once(BY_NAME["layernorm"], structure, split=False, prior_precision=0.7)
    together = posterior.precision.draws([3, 8, 2])
    assert {name: tuple(value.shape) for name, value in together.items()} == {
        name: (3, *p.shape) for name, p in problem.model.named_parameters()
    }
    for k, seed in enumerate((3, 8, 2)):
        alone = posterior.precision.draw(1, torch.Generator().manual_seed(seed))
        for name, value in alone.items():
            close(together[name][k], value[0])


CALLS: list[int] = []


class Net(nn.Sequential):
    """Counts its calls; on request what it does depends on a value, which cannot be vectorised."""

    def __init__(self, decides: bool) -> None:
        super().__init__(*mlp(3, 5, 2))
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        z = super().forward(x)
        return z if not self.decides or float(z.detach().sum()) > -1e9 else -z


def sampled(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, seeds: int, pairs: bool, points: Any
) -> dict[tuple[float, float], list[Tensor]]:
    """Outputs ``(S, N, C)`` of the two batches at every point."""
    x, y = normal(9, 3), labels(2, 9)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    validation = Validation(posterior._fitted("a test"), data, OBJECTIVES["nll"], seeds, rng(0), pairs=pairs)
    with monkeypatch.context() as patch:
        patch.setattr(Sampled, "from_samples", lambda self, outputs: outputs[0])
        found = dict(Sampled(validation.shared, validation.part(math.inf))(points))  # type: ignore[call-overload]
        CALLS.clear()
        again = dict(Sampled(validation.shared, validation.part(math.inf))(points))  # type: ignore[call-overload]
    for (n, p), parts in found.items():
        for one, two in zip(parts, again[n, p], strict=True):
            assert torch.equal(one, two)
        precision, wanted = posterior.precision_at(n, p), []
        for k, seed in enumerate(validation.seeds):
            if pairs:
                seed = validation.seeds[k - k % 2]
            noise = precision.draw(1, torch.Generator().manual_seed(seed))
            sign = -1 if pairs and k % 2 else 1
            weights = {name: value + sign * noise[name][0] for name, value in posterior.mean.items()}
            wanted.append(functional_call(model, weights, (x,)).detach())
        close(torch.cat(parts, 1), torch.stack(wanted))
    return found


POINTS = [(9.0, 1.0), (90.0, 10.0), (4.0, 8.0)]  # two of one ratio


@pytest.mark.share(3)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize(("seeds", "pairs"), [(5, False), (5, True), (8, True)])
@pytest.mark.parametrize("kept", [True, False])
def test_outputs_are_those_of_single_draws(
    size: int, seeds: int, pairs: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are run together, in whatever pairs, and whether draws are kept or made anew."""
    monkeypatch.setattr(predictors, "at_once", lambda *args: min(size, seeds))
    monkeypatch.setattr(predictors, "KEPT_NOISE", 2**26 if kept else 1)
    sampled(monkeypatch, build(lambda: Net(False)), seeds, pairs, POINTS)


def test_a_search_calls_the_network_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(monkeypatch, build(lambda: Net(False)), 20, True, POINTS)
    assert CALLS[: 2 * len(POINTS)] == [4, 5] * len(POINTS)
    assert len(CALLS) == 2 * len(POINTS) + len(POINTS) * 20  # and the plain loop


def test_a_network_that_cannot_be_vectorised_goes_draw_by_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(monkeypatch, build(lambda: Net(True)), 6, True, POINTS)
    assert len(CALLS) == 2 * len(POINTS) * 6 + len(POINTS) * 6


def test_how_many_draws_run_together() -> None:
    """As many as fit into 128 MiB beside their activations; few where images meet weights of their own."""
    blocks = {
        name: [block for block, _ in fitted_once(BY_NAME[name], "kron", split=False)[1].precision.entries]
        for name in ("tanh-mlp-categorical", "conv2d-groups")
    }
    assert at_once(blocks["tanh-mlp-categorical"], 100, 10, 8) == 100
    assert at_once(blocks["tanh-mlp-categorical"], 100, 10**6, 8) < 10
    assert at_once(blocks["tanh-mlp-categorical"], 100, 10**9, 8) == 1
    assert at_once(blocks["conv2d-groups"], 100, 16, 8) == 16
    assert at_once(blocks["conv2d-groups"], 100, 1000, 8) == 1
