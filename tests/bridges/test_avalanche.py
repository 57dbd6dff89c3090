"""A learner in a strategy of Avalanche beside the loop that the learner documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair

pytest.importorskip("avalanche", exc_type=ImportError)

from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import MultiTaskModule
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

N, RATE = 24, 0.1


def task(k: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(k)
    return torch.randn(N, 4, generator=rng), torch.arange(N) % 3


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def stream(labels: bool, tasks: int = 3) -> Any:
    """Experiences whose minibatch is the whole task, so that its order does not matter."""
    sets = [TensorDataset(*task(k)) for k in range(tasks)]
    for each in sets:
        each.targets = each.tensors[1].tolist()  # type: ignore[attr-defined]
    made = [as_classification_dataset(each) for each in sets]
    benchmark = benchmark_from_datasets(train=made, test=made)
    return (with_classes_timeline(task_incremental_benchmark(benchmark)) if labels else benchmark).train_stream


def trained(model: nn.Module, plugin: Any, criterion: nn.Module | None = None, epochs: int = 5) -> None:
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), train_mb_size=N, train_epochs=epochs,
        criterion=criterion or nn.CrossEntropyLoss(), plugins=[plugin], evaluator=EvaluationPlugin(),
    )  # fmt: skip
    for experience in stream(isinstance(model, MultiTaskModule)):
        strategy.train(experience)


def by_hand(learner: Any, implicit: bool, epochs: int = 5) -> nn.Module:
    model = learner.model
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for k in range(3):
        x, y = task(k)
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = learner.record(nn.functional.cross_entropy(model(x), y)) + learner.penalty() / N
            loss.backward()
            if implicit:
                learner.precondition_gradients(RATE / N)
            optimizer.step()
            learner.after_step()
        learner.after_task((x, y))
    return model


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("method", ["OnlineLaplace", "EWC", "SynapticIntelligence"])
def test_a_strategy_trains_as_the_loop_does(method: str, implicit: bool) -> None:
    kind = getattr(lk.continual, method)
    model = network()
    learner = kind(model, "categorical", multiplier=3.0)
    trained(model, lk.bridges.avalanche.LaplacePlugin(learner, implicit=implicit))
    wanted = by_hand(kind(network(), "categorical", multiplier=3.0), implicit)
    assert learner.tasks == 3
    for found, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)
    plain = by_hand(lk.continual.FineTuning(network(), "categorical"), False)
    assert not torch.allclose(model[0].weight, plain[0].weight, rtol=1e-2)  # the penalty was there


class Heads(MultiTaskModule):  # type: ignore[misc, unused-ignore]
    """A trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward_single_task(self, x: Tensor, task_label: int, return_features: bool = False) -> Tensor:
        return self.heads[task_label](self.trunk(x))


def test_multi_task_models_are_called_with_their_task() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Heads()
    learner = lk.continual.OnlineLaplace(model, "categorical", parameters=["trunk.*"])
    trained(model, lk.bridges.avalanche.LaplacePlugin(learner))
    assert learner.tasks == 3 and set(learner.posterior.mean) == {"trunk.0.weight", "trunk.0.bias"}


def test_refusals_come_before_training() -> None:
    model = network()
    learner = lk.continual.OnlineLaplace(copy.deepcopy(model), "categorical")
    before = model[0].weight.detach().clone()
    with pytest.raises(IncompatiblePair, match="another model"):
        trained(model, lk.bridges.avalanche.LaplacePlugin(learner))
    learner = lk.continual.OnlineLaplace(model, "categorical")
    with pytest.raises(IncompatiblePair, match=r"CrossEntropyLoss\(reduction=\"mean\"\)"):
        trained(model, lk.bridges.avalanche.LaplacePlugin(learner), nn.CrossEntropyLoss(reduction="sum"))
    assert model[0].weight.equal(before)
