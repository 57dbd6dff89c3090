"""Implicit steps of the penalty against dense matrices, and what they are for: stiff penalties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laplace_kf import LaplacePosterior, continual
from laplace_kf.errors import NotFitted

RATE = 0.05


def data(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(40, 3, generator=rng, dtype=torch.float64), torch.randint(0, 3, (40,), generator=rng)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def random_gradients(model: nn.Module, seed: int = 5) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
    return gradients(model)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([w.grad.reshape(-1) for w in model.parameters() if w.grad is not None])


def stepped(precision: Tensor, gradient: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(len(gradient), dtype=gradient.dtype) + RATE * precision, gradient)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "ekfac", "lowrank", "layer"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_step_is_that_of_the_dense_matrix(structure: str, tasks: int) -> None:
    model = network()
    posterior = LaplacePosterior(model, "categorical", structure, prior_precision=0.7).fit(data(0))
    for task in range(1, tasks):
        posterior = posterior.update(data(task), 3.0, terms="project")
    given = random_gradients(model)
    posterior.precondition_gradients(RATE)
    torch.testing.assert_close(gradients(model), stepped(posterior.precision.dense(), given), rtol=1e-9, atol=1e-12)


def test_the_precision_that_counts_is_the_present_one() -> None:
    model = network()
    posterior = LaplacePosterior(model, "categorical", "kron").fit(data(0))
    random_gradients(model)
    posterior.precondition_gradients(RATE)
    posterior.prior_precision, posterior.n_data = 9.0, 70.0
    given = random_gradients(model)
    posterior.precondition_gradients(RATE)
    torch.testing.assert_close(gradients(model), stepped(posterior.precision.dense(), given), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_kept_terms_are_close_and_symmetric_positive(structure: str) -> None:
    """Only the exact diagonal in common eigenbases is used, so the step is close to the dense one, and a descent."""
    model = network()
    posterior = LaplacePosterior(model, "categorical", structure, prior_precision=0.7).fit(data(0))
    for task in (1, 2):
        posterior = posterior.update(data(task), 3.0)
    given = random_gradients(model)
    wanted = stepped(posterior.precision.dense(), given)
    posterior.precondition_gradients(RATE)
    found = gradients(model)
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    assert float(found @ given) > 0


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_elastic_weights_use_the_sum_of_all_penalties(structure: str) -> None:
    model = network()
    learner = continual.EWC(model, "categorical", structure, multiplier=2.0, prior_precision=0.7)
    learner.after_task(data(0))
    learner.after_task(data(1))
    dense = torch.stack([posterior.precision.dense() for posterior in learner.posteriors]).sum(0)
    given = random_gradients(model)
    learner.precondition_gradients(RATE)
    wanted = stepped(dense, given)
    # two Kronecker terms have no common eigenbasis: close only
    assert float((gradients(model) - wanted).norm() / wanted.norm()) < (1e-10 if structure == "diag" else 0.2)


def test_parameters_without_gradients_and_outside_stay_as_they_are() -> None:
    model = network()
    posterior = LaplacePosterior(model, "categorical", "kron", parameters=["0.*"]).fit(data(0))
    random_gradients(model)
    head = model[2].weight.grad.clone()
    model[0].bias.grad = None
    weight = model[0].weight.grad.clone()
    posterior.precondition_gradients(RATE)
    assert model[0].bias.grad is None
    assert torch.equal(model[2].weight.grad, head)
    padded = torch.cat([weight.reshape(-1), torch.zeros(4, dtype=torch.float64)])
    wanted = stepped(posterior.precision.dense(), padded)[:12].view(4, 3)
    torch.testing.assert_close(model[0].weight.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("terms", ["keep", "project", "sum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_stiff_penalty_is_trained_to_its_optimum_where_plain_steps_diverge(terms: str, momentum: float) -> None:
    def linear() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(3, 2).double()

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return (
            torch.randn(30, 3, generator=rng, dtype=torch.float64),
            torch.randn(30, 2, generator=rng, dtype=torch.float64),
        )

    model = linear()
    posterior = LaplacePosterior(model, "gaussian", "kron", prior_precision=1.0).fit(batch(0))
    for task in (1, 2):
        posterior = posterior.update(batch(task), 1e4, terms=terms)
    x, y = batch(3)
    mean = torch.cat([value.reshape(-1) for value in posterior.mean.values()])

    def trained(implicit: bool, steps: int) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, nesterov=momentum > 0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().sum() / (2 * len(x)) + posterior.penalty() / len(x)
            loss.backward()
            if implicit:
                posterior.precondition_gradients(0.1 / len(x))
            optimizer.step()
        return torch.cat([w.detach().reshape(-1) for w in model.parameters()])

    def inputs() -> Tensor:
        """Jacobian of all outputs ``(30, 2)`` in the flat weights."""
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        eye = torch.eye(2, dtype=torch.float64)
        weight = torch.einsum("ni,oc->ncoi", x, eye).reshape(len(x) * 2, -1)
        return torch.cat([weight, torch.einsum("nk,oc->nco", ones, eye).reshape(len(x) * 2, -1)], 1)

    j, dense = inputs(), posterior.precision.dense()
    optimum = torch.linalg.solve(j.T @ j + dense, j.T @ y.reshape(-1) + dense @ mean)
    torch.testing.assert_close(trained(True, 300), optimum, rtol=1e-6, atol=1e-8)
    model.load_state_dict(linear().state_dict())
    assert float(trained(False, 60).abs().max()) > 1e20 * float(optimum.abs().max())


def test_synaptic_intelligence_divides_and_follows_the_loss_alone() -> None:
    def learned(precondition: bool) -> tuple[continual.SynapticIntelligence, nn.Module]:
        model = network()
        learner = continual.SynapticIntelligence(model, "categorical", c=3.0)
        x, y = data(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x), y) + learner.penalty() / len(x)).backward()
                if precondition:
                    learner.precondition_gradients(1e-300)  # nothing moves, but the gradients were seen
                optimizer.step()
                learner.after_step()
            learner.after_task((x, y))
        return learner, model

    (plain, _), (seen, model) = learned(False), learned(True)
    for (omega, _), (other, _) in zip(plain.anchors, seen.anchors, strict=True):
        for name, value in omega.items():
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=0)
    random_gradients(model)
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    seen.precondition_gradients(RATE)
    for name, weight in model.named_parameters():
        total = sum(omega[name] for omega, _ in seen.anchors)
        torch.testing.assert_close(weight.grad, before[name] / (1 + RATE * total), rtol=1e-12, atol=0)


def test_methods_without_a_penalty_leave_gradients_alone() -> None:
    for kind in (continual.OnlineLaplace, continual.EWC, continual.FineTuning, continual.JointTraining):
        model = network()
        learner = kind(model, "categorical")
        given = random_gradients(model)
        learner.precondition_gradients(RATE)
        assert torch.equal(gradients(model), given)


def test_refused() -> None:
    posterior = LaplacePosterior(network(), "categorical", "kron")
    with pytest.raises(NotFitted):
        posterior.precondition_gradients(RATE)
    posterior.fit(data(0))
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate"):
            posterior.precondition_gradients(rate)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_the_metric_of_kept_terms_is_not_below_them(structure: str) -> None:
    model = network()
    posterior = LaplacePosterior(model, "categorical", structure, prior_precision=0.01).fit(data(0))
    for task in range(1, 5):
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight)
        posterior = posterior.update(data(task), 10.0)
    size = sum(weight.numel() for weight in model.parameters())
    rows = []
    for k in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[k] = 1.0
        start = 0
        for weight in model.parameters():
            weight.grad = unit[start : start + weight.numel()].view_as(weight).clone()
            start += weight.numel()
        posterior.precondition_gradients(RATE)
        rows.append(gradients(model))
    step = torch.stack(rows)
    metric = (torch.linalg.inv(step) - torch.eye(size, dtype=torch.float64)) / RATE
    ratio = torch.linalg.eigvals(torch.linalg.solve(metric, posterior.precision.dense())).real
    assert 0.8 < float(ratio.max()) < 1.1  # steps with momentum are stable up to 4/3


@pytest.mark.parametrize("implicit", [False, True])
def test_the_callback_steps_implicitly_if_told_to(implicit: bool) -> None:
    model = network()
    learner = continual.OnlineLaplace(model, "categorical", multiplier=50.0)
    learner.after_task(data(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hooks = continual.Callback(learner, data(1), 40, implicit=implicit)
    given = random_gradients(model)
    hooks.on_before_optimizer_step(None, model, optimizer)
    assert torch.equal(gradients(model), given) is not implicit
    learner.posterior.precondition_gradients(0.1 / 40)  # type: ignore[union-attr]
    twice = gradients(model)
    random_gradients(model)
    for _ in range(1 + implicit):
        learner.precondition_gradients(0.1 / 40)
    torch.testing.assert_close(gradients(model), twice, rtol=1e-12, atol=0)
