"""The methods for task sequences, each against a plain reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import continual
from tests import oracles
from tests.cases import build, labels, normal
from tests.checks import close
from tests.continual.problems import DENSE, LAM, N, moved, network, task

LAPLACE = [continual.OnlineLaplace, continual.NonOnlineLaplace, continual.EWC]
METHODS: dict[str, Callable[[nn.Module], continual.Learner]] = {
    "online": lambda m: continual.OnlineLaplace(m, "categorical", multiplier=2.0, prior_precision=LAM),
    "online-projected": lambda m: continual.OnlineLaplace(m, "categorical", terms="project", prior_precision=LAM),
    "online-diag": lambda m: continual.OnlineLaplace(m, "categorical", structure="diag", forgetting=0.9),
    "non-online": lambda m: continual.NonOnlineLaplace(m, "categorical", prior_precision=LAM),
    "ewc": lambda m: continual.EWC(m, "categorical", structure="kron", prior_precision=LAM),
    "si": lambda m: continual.SynapticIntelligence(m, "categorical", c=0.5, prior_precision=LAM),
    "si-last": lambda m: continual.SynapticIntelligence(m, "categorical", c=0.5, centres="last"),
    "fine-tuning": lambda m: continual.FineTuning(m, "categorical", prior_precision=LAM),
    "joint": lambda m: continual.JointTraining(m, "categorical", prior_precision=LAM),
}


def flat(model: nn.Module) -> Tensor:
    return oracles.flat_parameters(model)


def batches(k: int) -> list[tuple[Tensor, Tensor]]:
    x, y = task(k)
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def steps(model: nn.Module, learner: continual.Learner, k: int, optimizer: Any, epochs: int = 2) -> None:
    for _ in range(epochs):
        for x, y in learner.training_data(batches(k)):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + learner.penalty() / N).backward()
            optimizer.step()
            learner.after_step()


# ------------------------------------------------------------------------------------------------ the Laplace methods


@pytest.mark.parametrize("method", LAPLACE)
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_two_tasks_give_the_same_penalty(method: Any, structure: str) -> None:
    """For two tasks the three variants coincide: prior, first curvature, first mean (methods 11.3)."""
    model = network()
    learner = method(model, "categorical", structure=structure, multiplier=3.0, prior_precision=LAM)
    close(learner.penalty(), LAM / 2 * flat(model).square().sum())  # the first task has the prior only
    learner.after_task(batches(0))
    assert learner.tasks == 1
    centre, curvature = flat(model).clone(), 3 * N * DENSE[structure](model, *task(0))
    precision = curvature + LAM * torch.eye(31, dtype=torch.float64)
    assert abs(float(learner.penalty().detach())) <= 1e-12
    moved(model, 1)
    theta = flat(model).requires_grad_()
    wanted = oracles.penalty(precision, theta, centre)
    (gradient,) = torch.autograd.grad(wanted, theta)
    found = learner.penalty()
    found.backward()
    close(found, wanted)
    close(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]), gradient)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_variants_differ_at_the_third_task_as_they_should(structure: str) -> None:
    model = network()
    settings: dict[str, Any] = {"structure": structure, "multiplier": 2.0, "prior_precision": LAM}
    learners = [method(model, "categorical", **settings) for method in LAPLACE]
    eye = LAM * torch.eye(31, dtype=torch.float64)
    means, own = [], []
    for k in range(2):
        moved(model, k)
        for learner in learners:
            learner.after_task(batches(k))
        means.append(flat(model).clone())
        own.append(2 * N * DENSE[structure](model, *task(k)))
    at_last = 2 * N * DENSE[structure](model, *task(0)) + own[1]
    moved(model, 8)
    theta = flat(model)
    online, oracle, ewc = (learner.penalty() for learner in learners)
    close(online, oracles.penalty(own[0] + own[1] + eye, theta, means[1]))
    close(oracle, oracles.penalty(at_last + eye, theta, means[1]))
    each = oracles.penalty(own[0] + eye, theta, means[0]) + oracles.penalty(own[1], theta, means[1])
    close(ewc, each)


def test_ewc_counts_early_data_again() -> None:
    """Of a linear Gaussian model the exact posterior is known: Online is it, EWC has the first task's data doubly.

    One weight, unit noise and inputs, ``n_i`` targets of mean ``m_i``: Online gives the mean of all targets. EWC's
    third task is trained with ``½ n_1 (w − μ_1)² + ½ n_2 (w − μ_2)²``, and μ_2 already holds the first task's pull.
    """
    sizes, targets = [4, 2, 3], [1.0, -2.0, 0.5]
    results = {}
    for method in (continual.OnlineLaplace, continual.EWC):
        model = build(lambda: nn.Linear(1, 1, bias=False))
        learner = method(model, "gaussian", structure="full", prior_precision=0.0)
        for n, target in zip(sizes, targets, strict=True):
            # the penalty is a parabola in one weight: read off its three coefficients, then minimise with the data
            values = []
            for w in (-1.0, 0.0, 1.0):
                model.weight.data.fill_(w)
                values.append(float(learner.penalty()))
            curve = values[0] - 2 * values[1] + values[2]
            slope = (values[2] - values[0]) / 2
            model.weight.data.fill_((n * target - slope) / (n + curve))
            ones = torch.ones(n, 1, dtype=torch.float64)
            learner.after_task([(ones, target * ones)])
        results[method] = float(model.weight)
    n1, n2, n3 = sizes
    m1, m2, m3 = targets
    assert abs(results[continual.OnlineLaplace] - (n1 * m1 + n2 * m2 + n3 * m3) / (n1 + n2 + n3)) < 1e-10
    mu2 = (n1 * m1 + n2 * m2) / (n1 + n2)
    counted = (n1 * m1 + n2 * mu2 + n3 * m3) / (n1 + n2 + n3)  # n2 pulls towards μ_2, a mixture of both tasks
    assert abs(results[continual.EWC] - counted) < 1e-10
    weight_of_first = (n1 + n2 * n1 / (n1 + n2)) / (n1 + n2 + n3)
    assert weight_of_first > n1 / (n1 + n2 + n3) + 0.1


def test_ewc_does_not_depend_on_the_batch_size() -> None:
    model = network()
    found = []
    for data in (batches(0), [task(0)], [(x[None], y[None]) for x, y in zip(*task(0), strict=True)]):
        learner = continual.EWC(model, "categorical", prior_precision=LAM)
        learner.after_task(data)
        found.append(learner.posteriors[0].precision.dense())
    for other in found[1:]:
        close(other, found[0])


# ------------------------------------------------------------------------------------------------ Synaptic Intelligence


@pytest.mark.parametrize("centres", ["each", "last"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.5), lambda p: torch.optim.Adam(p, 0.02)])
def test_synaptic_intelligence_is_the_plain_loop(centres: str, make: Any) -> None:
    c, epsilon = 0.7, 1e-3
    model, twin = network(), network()
    learner = continual.SynapticIntelligence(model, "categorical", c=c, epsilon=epsilon, centres=centres)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    anchors: list[tuple[list[Tensor], list[Tensor]]] = []
    weights = list(twin.parameters())
    for k in range(3):
        steps(model, learner, k, optimizer)
        learner.after_task(batches(k))
        start = [w.detach().clone() for w in weights]
        path = [torch.zeros_like(w) for w in weights]
        for _ in range(2):
            for x, y in batches(k):
                gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
                penalties: Any = sum(
                    ((o * (w - m) ** 2).sum() / 2 for omega, mean in anchors for o, w, m in
                     zip(omega, weights, mean, strict=True)),
                    torch.zeros(()),
                )  # fmt: skip
                before = [w.detach().clone() for w in weights]
                other.zero_grad()
                (F.cross_entropy(twin(x), y) + penalties / N).backward()
                other.step()
                for p, g, w, b in zip(path, gradients, weights, before, strict=True):
                    p -= g * (w.detach() - b)
        omega = [
            c * (p / ((w.detach() - s) ** 2 + epsilon)).clamp(min=0)
            for p, w, s in zip(path, weights, start, strict=True)
        ]
        mean = [w.detach().clone() for w in weights]
        if centres == "last" and anchors:
            omega = [o + old for o, old in zip(omega, anchors[0][0], strict=True)]
            anchors = []
        anchors.append((omega, mean))
    close(flat(model), flat(twin))
    moved(model, 5)
    theta = oracles.flat_parameters(model)
    wanted = sum(
        (torch.cat([o.reshape(-1) for o in omega]) * (theta - torch.cat([m.reshape(-1) for m in mean])) ** 2).sum() / 2
        for omega, mean in anchors
    )
    close(learner.penalty(), torch.as_tensor(wanted))
    assert len(learner.anchors) == (3 if centres == "each" else 1)
    assert float(learner.penalty()) > 0


def test_synaptic_intelligence_refuses() -> None:
    model = network()
    with pytest.raises(lk.errors.IncompatiblePair, match="diagonal"):
        continual.SynapticIntelligence(model, "categorical", structure="kron")
    with pytest.raises(lk.errors.UnknownName):
        continual.SynapticIntelligence(model, "categorical", centres="first")
    with pytest.raises(lk.errors.IncompatiblePair, match="zero_grad"):
        continual.SynapticIntelligence(model, "categorical").after_step()


# ------------------------------------------------------------------------------------------------ the interface


@pytest.mark.parametrize("centres", ["each", "last"])
def test_synaptic_intelligence_of_a_layer_that_is_trained_later(centres: str) -> None:
    """What was frozen in a task has no importance from it; what is frozen later keeps what it had."""
    model = build(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[0].requires_grad_(False)
    learner = continual.SynapticIntelligence(model, "categorical", centres=centres, prior_precision=1e-9)
    x, y = normal(6, 3), labels(3, 6)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)

    def work() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        learner.after_step()
        learner.after_task([(x, y)])

    def penalty_of(k: int) -> float:
        with torch.no_grad():
            model[k].weight += 1.0
            learner.after_step({n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad})
            value = float(learner.penalty())
            model[k].weight -= 1.0
        return value

    work()
    model[0].requires_grad_(True)
    assert penalty_of(0) < 1e-6 < penalty_of(2)
    work()
    assert penalty_of(0) > 1e-6
    model[2].requires_grad_(False)
    work()
    model[2].requires_grad_(True)
    assert penalty_of(2) > 1e-6
    model[2].weight = model[0].weight  # tied: a weight that is not there any more
    learner.after_task([(x, y)])
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(lk.errors.ShapeMismatch, match="were one tensor when the task began"):
        learner.penalty()
    model[2] = nn.Linear(3, 4).double()
    with pytest.raises(lk.errors.ShapeMismatch):
        learner.penalty()


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_network_changes(name: str) -> None:
    model = network().train()
    learner = METHODS[name](model)
    before = flat(model).clone()
    state = torch.get_rng_state()
    learner.penalty()
    learner.after_task(batches(0))
    learner.penalty()
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_failed_task_leaves_the_learner_as_it_was() -> None:
    model = network()
    for name in ("online", "non-online", "ewc", "joint"):
        learner = METHODS[name](model)
        learner.after_task(batches(0))
        before = learner.penalty()
        if name != "joint":
            with pytest.raises(lk.errors.NonFinite):
                learner.after_task([(torch.full((2, 3), float("nan"), dtype=torch.float64), labels(3, 2))])
        assert learner.tasks == 1
        assert torch.equal(learner.penalty(), before)


def test_references() -> None:
    model = network()
    joint, alone = METHODS["joint"](model), METHODS["fine-tuning"](model)
    for k in range(2):
        assert len(list(joint.training_data(batches(k)))) == 2 * (k + 1)
        data = batches(k)
        assert alone.training_data(data) is data
        for learner in (joint, alone):
            learner.after_task(data)
            close(learner.penalty(), LAM / 2 * flat(model).square().sum())
    seen = torch.cat([x for x, _ in joint.training_data(batches(2))])
    close(seen, torch.cat([task(k)[0] for k in range(3)]))


def test_data_that_are_needed_again_have_to_be_there() -> None:
    for name in ("joint", "non-online"):
        learner = METHODS[name](network())
        with pytest.raises(lk.errors.ShapeMismatch, match=r"needed again, but a generator.*only once"):
            learner.after_task(batch for batch in batches(0))
        assert learner.tasks == 0
    joint = continual.JointTraining(network(), "categorical")
    with pytest.raises(lk.errors.ShapeMismatch, match="only once"):
        joint.training_data(iter(batches(0)))

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __init__(self) -> None:
            self.left = iter(batches(0))

        def __iter__(self) -> Iterator[Any]:
            return self.left

    joined = joint.training_data(torch.utils.data.DataLoader(Stream(), batch_size=None))
    assert len(list(joined)) == 2
    with pytest.raises(lk.errors.ShapeMismatch, match="task 1 of 1 brought no batch"):
        list(joined)


def test_plugging_into_a_plain_loop_keeps_more_of_the_first_task() -> None:
    """The example of the documentation: with the penalty the first task's loss grows less."""
    x0, y0 = normal(60, 2, seed=1), labels(2, 60, seed=1)
    x0 = x0 + 2 * F.one_hot(y0, 2)
    x1, y1 = x0.flip(1), 1 - y0
    x1 = x1 + torch.tensor([3.0, -3.0], dtype=torch.float64)
    losses = {}
    for method in (continual.OnlineLaplace, continual.FineTuning):
        model = build(lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)))
        learner = method(model, "categorical", prior_precision=0.1)
        for x, y in ((x0, y0), (x1, 1 - y1)):
            optimizer = torch.optim.Adam(model.parameters(), 0.02)
            for _ in range(100):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + learner.penalty() / len(x)).backward()
                optimizer.step()
                learner.after_step()
            learner.after_task([(x, y)])
        losses[method] = float(F.cross_entropy(model(x0), y0))
    assert losses[continual.OnlineLaplace] < 0.7 * losses[continual.FineTuning]


def test_callback() -> None:
    """The hooks of a loop that is not ours give the same training as the penalty in the loss."""
    model, twin = network(), network()
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin))
    learner, same = METHODS["si"](model), METHODS["si"](twin)
    for k in range(2):
        steps(model, learner, k, optimizer)
        learner.after_task(batches(k))
        hooks = continual.Callback(same, batches(k), N)
        for _ in range(2):
            for x, y in batches(k):
                other.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                hooks.on_after_backward("trainer", "module")
                other.step()
                hooks.on_train_batch_end("trainer", "module", outputs=None)
        hooks.on_train_end("trainer", "module")
    close(flat(model), flat(twin))
    assert same.tasks == 2
    close(learner.penalty(), same.penalty(), 1e-8)


# ------------------------------------------------------------------------------------------------ numbers


def test_metrics() -> None:
    nan = float("nan")
    matrix = torch.tensor([[0.9, 0.3, nan], [0.7, 0.8, 0.4], [0.5, 0.85, 0.95]])
    close(continual.average_accuracy(matrix), torch.tensor([0.9, 0.75, (0.5 + 0.85 + 0.95) / 3]), 1e-6)
    close(continual.forgetting(matrix), torch.tensor(((0.9 - 0.5) + (0.8 - 0.85)) / 2), 1e-6)
    baseline = torch.tensor([0.1, 0.2, 0.1])
    close(continual.forward_transfer(matrix, baseline), torch.tensor(((0.3 - 0.2) + (0.4 - 0.1)) / 2), 1e-6)
    one = torch.tensor([[0.5]])
    assert float(continual.forgetting(one)) == float(continual.forward_transfer(one, baseline[:1])) == 0.0
    for wrong in (torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(3)):
        with pytest.raises(lk.errors.ShapeMismatch):
            continual.average_accuracy(wrong)
    with pytest.raises(lk.errors.ShapeMismatch):
        continual.forward_transfer(matrix, baseline[:2])


def test_accuracy() -> None:
    model = network().train()
    x, y = task(0)
    wanted = float((model(x).argmax(1) == y).double().mean())
    assert continual.accuracy(model, batches(0)) == continual.accuracy(model, (x, y)) == pytest.approx(wanted)
    assert model.training

    def nothing() -> Iterator[Any]:
        return iter(())

    with pytest.raises(lk.errors.ShapeMismatch):
        continual.accuracy(model, nothing())


def test_early_stopping_waits_for_patience_and_for_the_least_epochs():
    early = lk.continual.EarlyStopping(patience=2, least=4)
    answers = [early.over(loss) for loss in (3.0, 2.0, 2.5, 2.5, 1.0, math.nan, 1.0)]
    assert answers == [False, False, False, True, False, False, True]  # an equal loss is no improvement
    assert (early.best, early.best_epoch, early.epoch) == (1.0, 5, 7)
    for wrong in ({"patience": 0}, {"least": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lk.continual.EarlyStopping(**wrong)


def test_decayed_rate() -> None:
    assert [continual.decayed_rate(0.1, t, 0.5) for t in range(3)] == pytest.approx([0.1, 0.1 / 1.5, 0.05])
    with pytest.raises(ValueError, match="negative"):
        continual.decayed_rate(0.1, -1, 0.5)
