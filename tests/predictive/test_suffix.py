"""What does not depend on a weight draw is computed once: backbone passes are counted, numbers are those without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.predictive import montecarlo, suffix

CALLS: list[int] = []


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return self.inner(x)


class Head(nn.Module):
    """A suffix with something in it that a cut has to respect."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.back, self.one, self.two = Backbone(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.back(x)
        z = self.one(h)
        if self.kind == "branch" and float(z.sum()) > -1e9:
            z = z + 1
        if self.kind == "write":
            room = torch.zeros_like(h)
            room[:, :] = z
            z = room
        if self.kind == "no_grad":
            with torch.no_grad():
                z = z * 2
        if self.kind == "random":
            z = z + 0 * torch.rand(())
        if self.kind == "residual":
            z = h + z.relu()
        if self.kind == "reshape":
            z = z.reshape(x.shape[0], 2, 3).flatten(1)
        if self.kind == "reused":
            z = self.one(z)
        return self.two(z)


KINDS = ("plain", "residual", "reshape", "reused")
REFUSED = {"branch": "reads", "write": "in place", "no_grad": "settings", "random": "random"}


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def fitted(kind: str, parameters: Any, structure: str = "kron", **options: Any) -> lk.LaplacePosterior:
    torch.manual_seed(0)
    posterior = lk.LaplacePosterior(
        Head(kind).double(), "categorical", structure=structure, parameters=parameters, **options
    )
    batch = data() if "forward" not in options else [data()]
    posterior.fit(batch)
    CALLS.clear()
    return posterior


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is cut."""
    for module in ("montecarlo", "weights", "linearized"):
        monkeypatch.setattr(f"laplace_kf.predictive.{module}.cut", lambda m, f, names, x: (m, f, x))
    monkeypatch.setattr("laplace_kf.posterior.validation.cut", lambda m, f, names, x: (m, f, x))


@pytest.mark.pairs(
    kind=KINDS,
    parameters=["last_layer", ["one.*", "two.*"], ["one.weight", "two.bias"]],
    structure=["kron", "diag", "full"],
)
def test_one_backbone_pass_and_the_same_numbers(
    kind: str, parameters: Any, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = fitted(kind, parameters, structure)
    x, _ = data()

    def everything() -> list[Tensor]:
        found = [posterior.predict(x, method="mc", space="weights", samples=5, generator=seeded()).probs]
        found.append(posterior.predictor(samples=5, generator=seeded())(x).probs)
        found.append(posterior.predict(x, method="linearized", generator=seeded()).probs)
        found.append(posterior.functional_covariance(x))
        return found

    with_cut, passes = everything(), len(CALLS)
    assert set(suffix.verdicts(posterior.model).values()) == {"cut"}
    # a reshape to the number of examples is not divided into examples: linearised networks run whole
    assert passes == 4 or (kind == "reshape" and passes < 30 and parameters != "last_layer")
    uncut(monkeypatch)
    for found, wanted in zip(with_cut, everything(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["map", "mc", "linearized", "probit"])
def test_tune_runs_the_backbone_twice(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fitted("residual", "last_layer"), fitted("residual", "last_layer")
    options: dict[str, Any] = {"samples": 6, "n_data": [10.0, 40.0], "prior_precision": [0.1, 1.0]}
    found = first.tune(data(), method=method, generator=seeded(), **options)
    assert len(CALLS) == 2
    uncut(monkeypatch)
    wanted = second.tune(data(), method=method, generator=seeded(), **options)
    for row, other in zip(found.table, wanted.table, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


def test_beyond_the_limit_the_whole_network_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("plain", "last_layer")
    monkeypatch.setattr("laplace_kf.posterior.validation.FEATURE_BYTES", 1)
    posterior.tune(data(), method="mc", samples=4, n_data=[10.0], prior_precision=[1.0], generator=seeded())
    assert len(CALLS) > 2  # as many as where it is cut


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_replayed_runs_whole_and_says_why(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("plain", ["one.*", "two.*"])
    posterior.model.kind = kind  # type: ignore[assignment]
    x, _ = data()
    found = posterior.predict(x, method="mc", space="weights", samples=3, generator=seeded()).probs
    (verdict,) = suffix.verdicts(posterior.model).values()
    assert REFUSED[kind] in verdict
    uncut(monkeypatch)
    wanted = posterior.predict(x, method="mc", space="weights", samples=3, generator=seeded()).probs
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_custom_autograd_function_is_not_cut() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(self.b(self.a(x).tanh()))

    model = Model().double()
    found = suffix.cut(model, None, ["b.weight", "b.bias"], data()[0])
    assert found[0] is model
    assert suffix.verdicts(model)["b.weight", "b.bias"] != "cut"


def test_all_parameters_cost_no_extra_pass() -> None:
    posterior = fitted("plain", "all")
    posterior.predict(data()[0], method="mc", space="weights", samples=1, generator=seeded())
    assert len(CALLS) == 1
    assert not suffix.verdicts(posterior.model)


def test_mapping_inputs_and_forward() -> None:
    posterior = fitted("plain", "last_layer", forward=lambda model, batch: (model(batch[0]), batch[1]))
    found = posterior.predict(data(), method="mc", space="weights", samples=9, generator=seeded())
    assert found.probs.shape == (12, 3)
    assert CALLS == [12, 6, 12]  # some together and half of these reversed show that rows are examples; then once


def test_gradients_with_respect_to_inputs_go_through_the_backbone() -> None:
    posterior = fitted("plain", "last_layer")
    x = data()[0].requires_grad_()
    posterior.predict(x, method="mc", space="weights", samples=3, generator=seeded()).probs[:, 0].sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0


def test_the_model_is_left_as_it_was() -> None:
    posterior = fitted("residual", "last_layer")
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in posterior.model.named_parameters()}
    mode, state = posterior.model.training, torch.get_rng_state()
    montecarlo.sampled_outputs(posterior.model, None, posterior.mean, posterior.precision, [1, 2], data()[0])
    assert posterior.model.training == mode
    assert torch.equal(state, torch.get_rng_state())
    for name, p in posterior.model.named_parameters():
        assert (id(p), p.requires_grad) == before[name][:2]
        assert torch.equal(p, before[name][2])


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(
    "parameters",
    [
        lk.Subnetwork(7, within="last_layer"),
        lk.Subnetwork(9, by="magnitude", within=["one.*", "two.*"]),
        lk.Subnetwork(5, within=["two.weight"]),
    ],
    ids=["last layer", "two layers", "one weight"],
)
def test_subnetworks_are_cut_as_well(kind: str, parameters: lk.Subnetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone runs once a prediction where single weights of the last layers are drawn; same numbers, same λ."""
    posterior = fitted(kind, parameters, "full")
    x, y = data()

    def everything() -> list[Tensor]:
        found = [posterior.predict(x, method="mc", space="weights", samples=5, generator=seeded()).probs]
        found.append(posterior.predictor(samples=5, generator=seeded())(x).probs)
        found.append(posterior.predict(x, method="linearized", generator=seeded()).probs)
        found.append(posterior.functional_covariance(x))
        return found

    def tuned() -> Tensor:
        grids: dict[str, Any] = {"n_data": [3.0, 12.0], "prior_precision": [0.5, 2.0]}
        found = posterior.tune((x, y), method="mc", samples=4, generator=seeded(), **grids)
        return torch.tensor([row["objective"] for row in found.table])

    with_cut, passes = everything(), len(CALLS)
    assert set(suffix.verdicts(posterior.model).values()) == {"cut"} and passes == 4
    CALLS.clear()
    table = tuned()
    assert len(CALLS) <= 3
    posterior.n_data, posterior.prior_precision = 12.0, 1.0
    uncut(monkeypatch)
    for found, wanted in zip(with_cut, everything(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(table, tuned(), rtol=1e-9, atol=1e-12)
