"""Sequences of torch's own modules need no tape: what that leaves out, what it gives, and what is no such sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import sequences
from laplace_kf.tape import chain, tracer
from tests.checks import close


class Wrapped(nn.Module):
    """The same network as a class of its own, of which nothing is known before it runs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()


def long_net() -> nn.Sequential:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(6, 4, bias=False), nn.GELU(), nn.Dropout(0.5), nn.Identity())
    return nn.Sequential(nn.Flatten(), inner, nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 3)).double().eval()


def data(shape: tuple[int, ...] = (3,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(7, *shape, generator=generator).double(), torch.randint(3, (7,), generator=generator)


@pytest.fixture
def no_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape, or a pass that watches over parameters, would be an error."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tape")

    for name in ("Tape", "require_reached", "disagreeing"):
        monkeypatch.setattr(tracer, name, refused)


def dense(model: nn.Module, x: Tensor, y: Tensor, structure: str = "kron", **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    found = lk.curvature.estimate(model, "categorical", [(x[:4], y[:4]), (x[4:], y[4:])], structure,
                                  generator=generator, **options)  # fmt: skip
    return found.mean().dense()


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "ekfac"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "importance", "empirical"])
def test_sums_are_those_of_the_tape(structure: str, estimator: str) -> None:
    for made, shape in ((net, (3,)), (long_net, (2, 3))):
        x, y = data(shape)
        close(dense(made(), x, y, structure, estimator=estimator),
              dense(Wrapped(made()), x, y, structure, estimator=estimator), 1e-11)  # fmt: skip


def test_columns_that_are_handed_in_stay_what_they_are() -> None:
    """Where the last layer is an activation, too: its slope meets the columns themselves."""
    model = nn.Sequential(*net(), nn.Tanh())
    x, y = data()
    observation = tracer.Tracer(model, None).observe((x, y))
    columns = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(5)).double()
    before = columns.clone()
    (last, g), *_ = observation.require_chain().backward(columns)
    assert torch.equal(columns, before)
    close(g, before * (1 - model(x).detach().square()))
    assert last.key[0] == "4.weight"


@pytest.mark.parametrize("activation", list(sequences._ACTIVATIONS), ids=lambda kind: kind.__name__)
def test_every_activation_has_the_slope_of_autograd(activation: type[nn.Module], no_tape: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3)).double()
    x, y = data()
    found = dense(model, x, y, "full")
    weights = list(model.parameters())
    total = torch.zeros_like(found)
    for row in x:
        out = model(row[None])[0]
        jac = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(o, weights, retain_graph=True)]) for o in out
        ])  # fmt: skip
        p = out.softmax(0).detach()
        total += jac.T @ (torch.diag(p) - p[:, None] * p) @ jac
    close(found, total / len(x), 1e-11)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_slopes_are_made_of_the_rows_that_go_back(
    activation: type[nn.Module], no_tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen columns need those of their examples, single columns all, once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3)).double()
    made: list[int] = []
    for function, real in list(chain._AT_RESULT.items()):
        watched = lambda y, real=real: (made.append(len(y)), real(y))[1]  # noqa: E731
        monkeypatch.setitem(chain._AT_RESULT, function, watched)
    x, y = data()
    observation = tracer.Tracer(model, None).observe((x, y))
    assert observation.chain is not None and not made
    rows, some = torch.tensor([6, 1, 6]), torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(4)).double()
    spread = torch.zeros(3, 7, 3).double()
    spread[torch.arange(3), rows] = some[0]
    for _ in range(2):
        _, (_, few) = observation.chain.backward(some, rows)
    assert made == [3, 3]
    for _ in range(2):
        _, (_, whole) = observation.chain.backward(spread)
        _, (_, again) = observation.chain.backward(some, rows)
    assert made == [3, 3, 7]
    assert torch.equal(again, few)
    close(few[0], whole[torch.arange(3), rows])


def test_fits_and_predictions_need_no_tape(no_tape: None) -> None:
    x, y = data()
    posterior = lk.LaplacePosterior(net(), "categorical", "kron").fit((x, y))
    found = posterior.predict(x[:2], method="linearized", link="probit").probs
    posterior = lk.LaplacePosterior(net().train(), "categorical", "kron", parameters="last_layer").fit((x, y))
    assert posterior.model.training and found.shape == (2, 3)


def test_predictions_are_those_of_the_tape() -> None:
    x, y = data()
    first, second = (lk.LaplacePosterior(m, "categorical", "kron").fit((x, y)) for m in (net(), Wrapped(net())))
    close(first.functional_covariance(x), second.functional_covariance(x), 1e-11)
    with torch.no_grad():
        first.model[0].weight.mul_(2.0)  # predictions are at the posterior's mean all the same
    close(first.functional_covariance(x), second.functional_covariance(x), 1e-11)


def test_frozen_layers_and_selections_are_those_of_the_tape() -> None:
    x, y = data()
    for change in (lambda m: m[0].requires_grad_(False), lambda m: m[2].bias.requires_grad_(False),
                   lambda m: m[2].weight.requires_grad_(False)):  # fmt: skip
        models = net(), net()
        for model in models:
            change(model)
        close(dense(models[0], x, y), dense(Wrapped(models[1]), x, y), 1e-11)
    close(dense(net(), x, y, parameters=["2.*"]), dense(Wrapped(net()), x, y, parameters=["net.2.*"]), 1e-11)
    close(dense(net(), x, y, parameters="last_layer"), dense(Wrapped(net()), x, y, parameters="last_layer"), 1e-11)


class Sub(nn.Sequential):
    """Not torch's own class."""


def _shared(model: nn.Sequential) -> nn.Module:
    torch.manual_seed(5)
    twice = nn.Linear(3, 3).double()
    return nn.Sequential(twice, nn.Tanh(), twice)


def _tied(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(5, 5).double()
    model.insert(3, nn.Linear(5, 4).double())
    model[3].weight = nn.Parameter(model[2].weight.detach()[:4])  # in its memory
    return model


def _with(change: Callable[[Any], Any]) -> Callable[[nn.Sequential], nn.Module]:
    def changed(model: nn.Sequential) -> nn.Module:
        change(model)
        return model

    return changed


# what makes a sequence something else; those marked have an answer, which must be that of the tape
CHANGES: dict[str, tuple[Callable[[nn.Sequential], nn.Module], bool]] = {
    "subclass": (lambda m: Sub(*m), True),
    "forward of the instance": (
        _with(lambda m: setattr(m, "forward", lambda x: m[4](m[3](m[2](torch.sin(m[0](x))))))), True),
    "forward of a module": (_with(lambda m: setattr(m[1], "forward", torch.sin)), True),
    "attribute": (_with(lambda m: setattr(m[0], "scale", 2.0)), True),
    "hook": (_with(lambda m: m[1].register_forward_hook(lambda mod, args, out: 2 * out)), True),
    "hook before": (_with(lambda m: m[2].register_forward_pre_hook(lambda mod, args: (3 * args[0],))), True),
    "hook on gradients": (_with(lambda m: m[2].register_full_backward_hook(lambda *a: None)), True),
    "buffer": (_with(lambda m: m[0].register_buffer("mask", torch.ones(3))), True),
    "parametrisation": (
        _with(lambda m: nn.utils.parametrizations.weight_norm(m[2])), False),
    "no parameter": (_with(lambda m: (delattr(m[0], "bias"), setattr(m[0], "bias", torch.ones(5).double()))), True),
    "two in one memory": (_tied, False),
    "one module twice": (_shared, True),
    "in place": (_with(lambda m: m.__setitem__(3, nn.ReLU(inplace=True))), True),
    "another layer": (_with(lambda m: m.__setitem__(1, nn.LayerNorm(5).double())), True),
    "not contiguous": (_with(lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(5, 4).double().T))), True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_such_sequence_goes_on_the_tape(name: str) -> None:
    x, y = data()
    change, answered = CHANGES[name]
    torch.manual_seed(9)
    model = net()
    assert sequences.read(model) is not None
    before = dense(model, x, y)
    model = change(model)
    assert sequences.read(model) is None
    if answered:
        found = dense(model, x, y)
        close(found, dense(Wrapped(model), x, y), 1e-11)
        silent = ("subclass", "attribute", "hook on gradients", "buffer", "in place")
        assert (found.shape == before.shape and torch.allclose(found, before)) == (name in silent)


def test_modes_functions_and_hooks_of_torch_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_net()
    assert sequences.read(model) is not None
    assert sequences.read(model.train()) is None, "dropout"
    model.eval()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert sequences.read(model) is None
    handle.remove()
    for owner, attribute in ((nn.Linear, "forward"), (nn.GELU, "forward"), (nn.Module, "__call__"), (F, "linear")):
        with monkeypatch.context() as patch:
            plain = getattr(owner, attribute)
            patch.setattr(owner, attribute, lambda *a, plain=plain, **k: plain(*a, **k))
            assert sequences.read(model) is None, attribute
    model[2].weight.register_hook(lambda grad: 2 * grad)
    assert sequences.read(model) is None
    assert sequences.read(net()) is not None


SAME = {
    "numbers": lambda m: m[2].weight.data.mul_(3.0),
    "a parameter": lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(4, 5).double())),
    "a layer": lambda m: m.__setitem__(2, nn.Linear(5, 4).double()),
    "a wider layer": lambda m: (m.__setitem__(2, nn.Linear(5, 6).double()), m.__setitem__(4, nn.Linear(6, 3).double())),
    "an activation": lambda m: m.__setitem__(1, nn.Sigmoid()),
    "a setting": lambda m: m.__setitem__(1, nn.LeakyReLU(0.3)),
    "what is frozen": lambda m: m[0].requires_grad_(False),
}


@pytest.mark.parametrize("name", SAME)
def test_what_was_replaced_is_seen(name: str, no_tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    model = net()
    posterior = lk.LaplacePosterior(model, "categorical", "full").fit((x, y))
    before = posterior.curvature.dense()
    torch.manual_seed(4)
    SAME[name](model)
    after = lk.LaplacePosterior(model, "categorical", "full").fit((x, y)).curvature.dense()
    monkeypatch.undo()
    close(after, dense(Wrapped(model), x, y, "full"), 1e-11)
    assert after.shape != before.shape or not torch.allclose(after, before)


def test_a_forward_that_is_patched_after_the_fit_is_watched() -> None:
    x, y = data()
    model = net()
    posterior = lk.LaplacePosterior(model, "categorical", "kron").fit((x, y))
    posterior.predict(x)
    hidden = [model[2].weight]
    model[2].forward = lambda h: F.linear(h, hidden[0])  # type: ignore[method-assign]
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"'2\.weight' in another way"):
        posterior.predict(x, method="mc", samples=2)


def test_inputs_that_do_not_fit_are_refused_as_on_the_tape() -> None:
    x, y = data()
    for wrong in (x[:, :2], x.float(), x[:, None, None]):
        with pytest.raises(lk.errors.LaplaceKFError) as first:
            lk.LaplacePosterior(net(), "categorical").fit((wrong, y))
        with pytest.raises(lk.errors.LaplaceKFError) as second:
            lk.LaplacePosterior(Wrapped(net()), "categorical").fit((wrong, y))
        assert type(first.value) is type(second.value)


def test_the_model_and_random_states_are_left_alone() -> None:
    model = long_net().train()
    before = torch.get_rng_state()

    class Loader:
        def __iter__(self) -> Any:
            torch.rand(3)
            yield data((2, 3))

    lk.LaplacePosterior(model, "categorical").fit(Loader())
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_sequences_of_rows_go_on_the_tape() -> None:
    x, _ = data((2, 3))
    y = torch.zeros(7, 2, dtype=torch.long)
    close(dense(net(), x, y), dense(Wrapped(net()), x, y), 1e-11)
