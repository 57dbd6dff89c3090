"""Losses that were divided by the number of minibatches of a step before they were recorded (methods 11.4)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_kf.continual import SynapticIntelligence
from laplace_kf.errors import IncompatiblePair
from tests.continual.test_path_gradients import network, task

DIVIDED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "divided": lambda loss, k: loss / k,
    "multiplied": lambda loss, k: (1 / k) * loss,
    "by a tensor, copied": lambda loss, k: (loss / torch.tensor(float(k))).clone(),
    "in place": lambda loss, k: loss.div_(k),
}


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("kind", DIVIDED)
def test_losses_divided_before_they_are_recorded_are_refused(kind: str, scale: float | None) -> None:
    """Their seeds are those of losses whose gradients are divided later; the sum would be divided twice."""
    model = network()
    learner, opt = SynapticIntelligence(model, "categorical"), torch.optim.SGD(model.parameters(), 0.1)
    scaler, (x, y) = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None), task(0)
    for pieces in (3, 2):  # the last step of an epoch may have fewer
        for xs, ys in zip(x[: 4 * pieces].chunk(pieces), y[: 4 * pieces].chunk(pieces), strict=True):
            scaler.scale(learner.record(DIVIDED[kind](F.cross_entropy(model(xs), ys), 3))).backward()
        scaler.step(opt)
        scaler.update()
        with pytest.raises(IncompatiblePair, match=r"learner.record\(task_loss\) / 3 \+ learner.penalty\(\)"):
            learner.after_step()
        assert not any(bool(path.any()) for path in learner._path.values())
        opt.zero_grad()
        learner._gradients.begin(learner._weights())


def test_factors_of_a_loss_that_are_no_number_of_minibatches() -> None:
    """A weighted loss, and a sum divided by the number of its examples, are losses of their own."""
    model = network()
    learner, opt = SynapticIntelligence(model, "categorical"), torch.optim.SGD(model.parameters(), 0.1)
    x, y = task(0)
    for pieces, loss in ((1, lambda z, t: F.cross_entropy(z, t) / 2), (3, lambda z, t: 0.5 * F.cross_entropy(z, t)),
                         (3, lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(t))):  # fmt: skip
        twin, before = copy.deepcopy(model), {n: w.clone() for n, w in learner._path.items()}
        losses = [loss(twin(xs), ys) for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True)]
        gradients = torch.autograd.grad(sum(losses) / pieces, list(twin.parameters()))  # type: ignore[arg-type]
        opt.zero_grad()
        for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (learner.record(loss(model(xs), ys)) / pieces).backward()
        opt.step()
        learner.after_step()
        for (name, w), gradient in zip(model.named_parameters(), gradients, strict=True):
            step = w.detach() - dict(twin.named_parameters())[name].detach()
            torch.testing.assert_close(learner._path[name] - before[name], -gradient * step)
