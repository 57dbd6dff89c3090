"""A learner as a model of Mammoth, whose training loop and base class stand here in small: it is no package."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.bridges.mammoth import METHODS, LaplaceModel
from laplace_kf.errors import IncompatiblePair, UnknownName

N, RATE = 12, 0.1


class ContinualModel(nn.Module):
    """What a model of Mammoth is given, and the wrappers that its loop calls."""

    def __init__(self, backbone: nn.Module, loss: nn.Module, args: Namespace, transform: Any, dataset: Any = None):
        super().__init__()
        self.net, self.loss, self.args, self.device = backbone, loss, args, torch.device("cpu")
        self.opt = torch.optim.SGD(backbone.parameters(), RATE)

    def meta_begin_task(self, dataset: Any) -> None:
        self.begin_task(dataset)

    def meta_observe(self, *args: Any, **kwargs: Any) -> float:
        return self.observe(*args, **kwargs)

    def meta_end_task(self, dataset: Any) -> None:
        with torch.no_grad():
            self.end_task(dataset)


class LaplaceKF(LaplaceModel, ContinualModel):
    NAME, COMPATIBILITY = "laplace_kf", ["class-il", "domain-il", "task-il"]


class Loader:
    """Batches of (image, label, image before augmentation)."""

    def __init__(self, k: int) -> None:
        rng = torch.Generator().manual_seed(k)
        self.dataset = list(zip(torch.randn(N, 4, generator=rng), (torch.arange(N) % 3).int(), strict=True))

    def __iter__(self) -> Any:
        x, y = (torch.stack(list(part)) for part in zip(*self.dataset, strict=True))
        for rows in torch.arange(N).split(6):
            yield x[rows], y[rows], x[rows]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(words: list[str], loss: nn.Module | None = None, parser: ArgumentParser | None = None) -> LaplaceKF:
    args = LaplaceKF.get_parser(*([] if parser is None else [parser])).parse_args(words)
    model = LaplaceKF(network(), loss or nn.CrossEntropyLoss(), args, None)
    for k in range(3):
        dataset = Namespace(train_loader=Loader(k))
        model.meta_begin_task(dataset)
        for epoch in range(3):
            for x, y, plain in dataset.train_loader:
                model.meta_observe(x, y.long(), plain, epoch=epoch)
        model.meta_end_task(dataset)
    return model


@pytest.mark.parametrize("method", list(METHODS))
def test_the_program_trains_as_the_loop_does(method: str) -> None:
    words = ["--multiplier", "3", "--structure", "diag", "--prior_precision", "0.5", "--method", method]
    model = trained(words, parser=ArgumentParser())
    learner = METHODS[method](network(), "categorical", "diag", 3.0, 0.5)
    optimizer = torch.optim.SGD(learner.model.parameters(), RATE)
    for k in range(3):
        batches: list[tuple[Tensor, Tensor]] = [(x, y.long()) for x, y, _ in Loader(k)]
        for x, y in batches * 3:
            optimizer.zero_grad()
            (learner.record(nn.functional.cross_entropy(learner.model(x), y)) + learner.penalty() / N).backward()
            optimizer.step()
            learner.after_step()
        learner.after_task(batches)
    assert model.learner is not None and model.learner.tasks == 3
    for found, wanted in zip(model.net.parameters(), learner.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    plain = trained(["--multiplier", "1e-9", "--prior_precision", "1e-9"])
    assert not torch.allclose(model.net[0].weight, plain.net[0].weight, rtol=1e-2)  # the penalty was there


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="online"):
        trained(["--method", "onlin"])
    with pytest.raises(IncompatiblePair, match="reduction='sum'"):
        trained([], nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(lk.errors.UnknownName, match="kron"):
        trained(["--structure", "krn"])
