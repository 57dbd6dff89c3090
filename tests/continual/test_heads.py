"""Several heads on one trunk: what is penalised around which value, and what stays as it is (methods 11.5)."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import continual
from tests import oracles
from tests.cases import CATEGORICAL, build
from tests.checks import close
from tests.continual.problems import LAM, N, moved, task

LAPLACE = [continual.OnlineLaplace, continual.NonOnlineLaplace, continual.EWC]
ALL = [*LAPLACE, continual.SynapticIntelligence, continual.FineTuning]


class Heads(nn.Module):
    """A trunk and one head a task, added as tasks come."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.heads = nn.ModuleList()

    def add(self) -> nn.Linear:
        head = build(lambda: nn.Linear(4, 3))
        self.heads.append(head)
        return head

    def forward(self, x: Tensor, head: int = -1) -> Tensor:
        return self.heads[head](self.trunk(x))


def network() -> Any:
    return build(Heads)


def learner_of(method: Any, model: nn.Module, **options: Any) -> Any:
    structure = "diag" if method is continual.SynapticIntelligence else "kron"
    options = {"prior_precision": LAM, **options}
    return method(model, "categorical", structure, parameters=["trunk.*"], **options)


def data(k: int) -> list[tuple[Tensor, Tensor]]:
    return [task(k)]


def squares(module: nn.Module) -> Tensor:
    return torch.stack([p.detach().square().sum() for p in module.parameters()]).sum()


@pytest.mark.parametrize("method", LAPLACE)
def test_heads_are_added_on_the_fly(method: Any) -> None:
    model = network()
    learner = method(
        model, "categorical", structure="diag", prior_precision=LAM, parameters=["trunk.*"], head_precision=2.0
    )
    names = [name for name, _ in model.trunk.named_parameters(prefix="trunk")]
    curvature = torch.zeros(16, 16, dtype=torch.float64)
    for k in range(2):
        model.add()

        def forward(m: nn.Module, batch: Any, k: int = k) -> Any:
            return m(batch[0], k), batch[1]

        learner.after_task(data(k), forward=forward)
        curvature = curvature + N * torch.diag(oracles.diag_ggn(model, *task(k), CATEGORICAL.nll, names))
    assert learner.tasks == 2
    centre = oracles.flat_parameters(model, names).clone()
    moved(model.trunk, 1)
    new = model.add()
    theta = oracles.flat_parameters(model, names)
    wanted = oracles.penalty(curvature + LAM * torch.eye(16, dtype=torch.float64), theta, centre) + squares(new)
    close(learner.penalty(), wanted)  # the curvature of the first task did not change: the trunk stood still


@pytest.mark.parametrize("method", ALL)
def test_a_new_head_has_the_prior_of_the_rest(method: Any) -> None:
    model = network()
    learner = learner_of(method, model)
    head = model.add()
    close(learner.penalty(), LAM / 2 * squares(model))
    for _ in range(2):  # the second one is new after a finished task
        learner.penalty().backward()
        assert head.weight.grad is not None
        close(head.weight.grad, LAM * head.weight)
        learner.after_task(data(0))
        head = model.add()


@pytest.mark.parametrize("method", ALL)
def test_a_finished_head_stays_and_is_held_where_it_was(method: Any) -> None:
    model = network()
    learner = learner_of(method, model)
    head = model.add()
    learner.after_task(data(0))
    model.add()
    learner.penalty().backward()
    assert head.weight.grad is None  # not zeros, which an optimiser with momentum would still act on
    before = [p.detach().clone() for p in head.parameters()]
    moved(head, 4)
    head.zero_grad()
    learner.penalty().backward()
    for p, centre in zip(head.parameters(), before, strict=True):
        assert p.grad is not None
        close(p.grad, LAM * (p - centre))


@pytest.mark.parametrize("frozen", [False, True])
def test_old_heads_do_not_drift_while_a_new_task_is_learned(frozen: bool) -> None:
    model = network()
    learner = learner_of(continual.OnlineLaplace, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    left: list[Tensor] = []
    for k in range(3):
        head = model.add()
        optimizer.add_param_group({"params": list(head.parameters())})
        if k and frozen:
            model.heads[k - 1].requires_grad_(False)
        for old in model.heads[:k]:
            for p in old.parameters():
                optimizer.state.pop(p, None)
        for _ in range(3):
            x, y = task(k)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + learner.penalty() / N).backward()
            optimizer.step()
        learner.after_task(data(k))
        left.append(head.weight.detach().clone())
    for head, weight in zip(model.heads, left, strict=True):
        assert torch.equal(head.weight, weight)


def test_joint_training_keeps_all_heads_around_zero() -> None:
    model = network()
    learner = learner_of(continual.JointTraining, model)
    model.add()
    learner.after_task(data(0))
    model.add()
    close(learner.penalty(), LAM / 2 * squares(model))


def test_what_head_precision_may_be() -> None:
    model = network()
    head = model.add()
    none = learner_of(continual.FineTuning, model, head_precision=0)
    close(none.penalty(), LAM / 2 * squares(model.trunk))
    by_pattern = learner_of(continual.FineTuning, model, prior_precision={"*weight": 2.0, "*bias": 4.0})
    rest = sum(c * p.detach().square().sum() / 2 for c, part in ((2.0, "weight"), (4.0, "bias"))
               for n, p in model.named_parameters() if n.endswith(part))  # fmt: skip
    close(by_pattern.penalty(), torch.as_tensor(rest))
    own = learner_of(continual.FineTuning, model, head_precision={"heads.0.*": 3.0})
    close(own.penalty(), LAM / 2 * squares(model.trunk) + 1.5 * squares(head))
    model.add()
    with pytest.raises(ValueError, match=r"heads\.1"):
        own.penalty()
    trunk_only = learner_of(continual.FineTuning, model, prior_precision={"trunk.*": 1.0})
    with pytest.raises(ValueError, match="head_precision"):
        trunk_only.penalty()
    with pytest.raises(ValueError, match="negative"):
        learner_of(continual.FineTuning, model, head_precision=-1.0)


@pytest.mark.parametrize("method", ALL)
def test_heads_come_back_from_a_state(method: Any) -> None:
    model = network()
    learner = learner_of(method, model)
    model.add()
    learner.after_task(data(0))
    model.add()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "learner": learner.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = network()
    for _ in range(2):
        again.add()
    again.load_state_dict(state["model"])
    resumed = learner_of(method, again)
    resumed.load_state_dict(state["learner"])
    for one in (model, again):
        moved(one, 2)
    assert torch.equal(resumed.penalty(), learner.penalty())
    older = {key: value for key, value in state["learner"].items() if key != "heads"}
    resumed.load_state_dict(older)  # a state of a version that knew no heads
    assert float(resumed.penalty()) != float(learner.penalty())


def test_a_learner_without_heads_is_not_changed_by_the_default() -> None:
    model = build(lambda: nn.Linear(3, 3))
    learner = continual.OnlineLaplace(model, "categorical", prior_precision=LAM)
    close(learner.penalty(), LAM / 2 * squares(model))
    learner.after_task(data(0))
    assert isinstance(learner.posterior, lk.LaplacePosterior)
    assert abs(float(learner.penalty().detach())) <= 1e-12
