"""Selected parameters that take no part: refused by name, or with their prior and no curvature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import UnknownName, UnsupportedLayer
from tests import oracles
from tests.cases import labels, normal, rng
from tests.checks import close, of_every

STRUCTURES = ["diag", "kron", "full", "ekfac", "lowrank", "isotropic", "layer"]


class Experts(nn.Module):
    """Three experts, each for the examples whose first input says so; the second gets none of the first half."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
            self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            index = torch.where(x[:, 0].long() == k)[0]
            if len(index):
                out = out.index_add(0, index, torch.tanh(expert(x[index])))
        return self.head(out)


def data(second: bool = False) -> tuple[Tensor, Tensor]:
    x = normal(12, 3, seed=3)
    x[:, 0] = torch.arange(12) % 3 if second else 2 * (torch.arange(12) % 2)
    return x, labels(2, 12, seed=4)


def fitted(structure: str, second: bool = False, **options: object) -> lk.LaplacePosterior:
    posterior = lk.LaplacePosterior(
        Experts(), "categorical", structure=structure, unused="prior", prior_precision=2.0, **options
    )  # type: ignore[arg-type]
    return posterior.fit(data(second))


def test_the_default_names_them_and_the_way_out() -> None:
    with pytest.raises(UnsupportedLayer, match=r"2 of 8 selected parameters .*experts.1.weight, experts.1.bias") as one:
        lk.LaplacePosterior(Experts(), "categorical").fit(data())
    assert 'unused="prior"' in str(one.value)
    with pytest.raises(UnsupportedLayer, match=r"80 of 86 .* and 70 more") as many:
        lk.LaplacePosterior(Experts(42), "categorical").fit(data())
    assert len(str(many.value)) < 1000
    with pytest.raises(UnknownName, match="'error', 'prior'"):
        lk.LaplacePosterior(Experts(), "categorical", unused="keep")
    with pytest.raises(UnsupportedLayer, match="None of them did"):
        lk.LaplacePosterior(Experts(), "categorical", parameters=["experts.1.*"], unused="prior").fit(data())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_they_keep_their_prior(structure: str) -> None:
    posterior = fitted(structure)
    model = Experts()
    names = [name for name, _ in model.named_parameters() if not name.startswith("experts.1.")]
    rest = lk.LaplacePosterior(model, "categorical", structure=structure, parameters=names, prior_precision=2.0)
    rest.fit(data())
    where = oracles.flat_index(model)
    used = torch.cat([where[name].flatten() for name in names])
    unused = torch.cat([where[f"experts.1.{name}"].flatten() for name in ("weight", "bias")])
    dense = posterior.precision.dense()
    close(dense[used[:, None], used], rest.precision.dense())
    close(dense[unused[:, None], unused], 2.0 * torch.eye(12, dtype=dense.dtype))
    assert float(dense[used[:, None], unused].abs().max()) < 1e-12
    # they take part in the evidence by their squares alone
    square = sum(float(p.detach().square().sum()) for p in model.experts[1].parameters())
    close(posterior.log_evidence() + square, rest.log_evidence(), 1e-9)
    spread = posterior.sample(4000, generator=rng())["experts.1.weight"].var(0)
    assert float((spread * 2.0).log().abs().max()) < 0.2
    for method in ("mc", "linearized", "probit", "map"):
        assert torch.isfinite(posterior.predict(data()[0], method, samples=5, generator=rng()).probs).all()
    close(posterior.functional_covariance(data()[0]), rest.functional_covariance(data()[0]))


class Unasked(Experts):
    """Calls every expert, also on no rows at all."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            index = torch.where(x[:, 0].long() == k)[0]
            out = out.index_add(0, index, torch.tanh(expert(x[index])))
        return self.head(out)


def test_an_expert_that_is_called_on_no_rows() -> None:
    """Its weights are drawn by the products of their factors, whose result has no rows either."""
    found = lk.LaplacePosterior(Unasked(), "categorical", unused="prior", prior_precision=2.0).fit(data())
    close(found.precision.dense(), fitted("kron").precision.dense())
    found.prior_precision = 1e6  # draws are linear in the weights
    x = data()[0]
    drawn = found.predict(x, "mc", samples=400, space="weights", generator=rng(), keep_samples=True).samples
    wanted = found.functional_covariance(x, diagonal_only=True)
    assert float((drawn.var(0) / wanted).log().abs().max()) < 0.4


@pytest.mark.parametrize("structure", STRUCTURES)
def test_files_keep_them(structure: str, tmp_path: Path) -> None:
    posterior = fitted(structure)
    posterior.save(tmp_path / "file")
    loaded = lk.LaplacePosterior.load(tmp_path / "file", Experts())
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense()) and loaded.unused == "prior"
    if structure not in ("full", "lowrank"):  # one block of everything
        assert "unused" in str(posterior.summary())


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "layer"])
def test_statistics_of_data_that_do_use_them_can_be_added(structure: str) -> None:
    first, second = data(), data(second=True)
    both = (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    parts = [
        lk.curvature.estimate(Experts(), "categorical", part, structure, unused="prior") for part in (first, second)
    ]
    whole = lk.curvature.estimate(Experts(), "categorical", [first, second], structure, unused="prior")
    wanted = oracles.dense_ggn(Experts(), *both, oracles.categorical_nll)
    for total in (parts[0] + parts[1], parts[1] + parts[0], whole):
        assert total.n_data == 24
        if structure == "full":
            close(total.mean().dense(), wanted)
        elif structure == "diag":
            close(total.mean().diag(), wanted.diagonal())
        close(total.mean().dense(), whole.mean().dense())


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_chains_over_tasks_that_use_them_or_not(structure: str, order: tuple[bool, bool]) -> None:
    posterior = fitted(structure, order[0]).update(data(order[1]))
    c = [lk.curvature.estimate(Experts(), "categorical", data(k), structure, unused="prior") for k in order]
    total = sum(one.total().dense() for one in c)
    where = torch.eye(len(total), dtype=total.dtype)
    close(posterior.precision.matvec(where), total + 2.0 * where)
    close(posterior.penalty().detach(), torch.zeros((), dtype=total.dtype))


def test_optimisers_train_the_rest() -> None:
    x, y = data()
    model = Experts()
    with pytest.raises(UnsupportedLayer, match=r"experts.1.weight, experts.1.bias"):
        lk.optim.kfac(Experts(), "categorical").step(x, y)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = lk.optim.kfac(model, "categorical", unused="prior", generator=rng(), l2=0.0)
    losses = [float(opt.step(x, y)) for _ in range(4)]
    opt.step(*data(second=True))
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)  # the last minibatch reached them


class Decoder(nn.Module):
    """A segmentation network whose encoder has more stages than its decoder takes: not run, or run for nothing."""

    def __init__(self, stages: int, used: int, run: bool = False) -> None:
        super().__init__()
        self.used, self.run = used, run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Conv2d(2, 3, 1)
            self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(stages))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for stage in self.stages if self.run else self.stages[: self.used]:
            x = stage(x)
            features.append(x)
        found: Tensor = self.head(torch.stack(features[: self.used]).sum(0))
        return found


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_stages_that_nothing_is_taken_from_are_as_if_they_were_not_there(structure: str, run: bool) -> None:
    """With their prior they add nothing to curvature and predictions, and the prior's part to the evidence."""
    x, y = normal(3, 2, 4, 4, seed=5), labels(3, 48, seed=6).reshape(3, 4, 4)
    if not run:
        with pytest.raises(UnsupportedLayer, match=r"12 of 18 selected parameters .* and 2 more") as refused:
            lk.LaplacePosterior(Decoder(8, 2), "categorical", structure=structure).fit((x, y))
        assert 'unused="prior"' in str(refused.value) and len(str(refused.value)) < 1000
    model = Decoder(8, 2, run)
    deep, short = (
        lk.LaplacePosterior(net, "categorical", structure=structure, unused="prior").fit((x, y))
        for net in (model, Decoder(2, 2))
    )
    left = torch.cat([p.detach().flatten() for stage in model.stages[2:] for p in stage.parameters()])
    close(deep.log_evidence(), short.log_evidence() - 0.5 * deep.prior_precision * left.square().sum())
    for method in ("linearized", "probit"):
        found, wanted = (each.predict(x, method=method, generator=rng(7)).probs for each in (deep, short))
        assert found is not None and wanted is not None and found.shape == (3, 3, 4, 4)
        close(found, wanted)


def under_no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(net.training):
        h = torch.tanh(net.body(x))
    return net.head(h)


def as_numbers(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(nn.functional.linear(x, net.body.weight.data, net.body.bias))
    return net.head(h)


def in_numpy(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(x @ torch.from_numpy(net.body.weight.detach().numpy()).T + net.body.bias))


def cut_off(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.body(x))).detach()


class Joined(nn.Module):
    """Two layers, joined in a way that autograd does not see through."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head, self.how = nn.Linear(3, 4), nn.Linear(4, 3), how
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def test_parameters_without_a_derivative_are_no_unused_ones() -> None:
    """Their prior would be all that draws know of them, and outputs go wherever these are."""
    x, y = torch.randn(5, 3, generator=rng()).double(), torch.tensor([0, 1, 2, 0, 1])
    calls: dict[str, Callable[[nn.Module, str], Any]] = {
        "fit": lambda net, unused: lk.LaplacePosterior(net, "categorical", unused=unused).fit([(x, y)]),
        "kfac": lambda net, unused: lk.optim.kfac(net, "categorical", unused=unused).step(x, y),
        "natural_gradient": lambda net, unused: lk.optim.natural_gradient(net, "categorical", unused=unused).step(x, y),
        "product": lambda net, unused: lk.curvature.ggn_vector_product(
            net, "categorical", [(x, y)], torch.ones(31).double()
        ),
    }

    def case(how: Callable[..., Tensor], name: str, unused: str) -> None:
        with pytest.raises(lk.errors.UnsupportedLayer, match="hang on parameter 'weight' of module 'body', but have"):
            calls[name](Joined(how).eval(), unused)

    ways = (under_no_grad, as_numbers, in_numpy, cut_off)
    of_every(case, [(how, name, unused) for how in ways for name in calls for unused in ("error", "prior")])
    half = lk.LaplacePosterior(Joined(under_no_grad).eval().bfloat16(), "categorical", unused="prior")
    with pytest.raises(lk.errors.UnsupportedLayer, match="hang on parameter"):
        half.fit([(x.bfloat16(), y)])
    body = ["head.*"]  # the line of the message
    posterior = lk.LaplacePosterior(Joined(under_no_grad), "categorical", parameters=body).fit([(x, y)])
    assert list(posterior.mean) == ["head.weight", "head.bias"]


def test_stacked_modules_have_no_derivative() -> None:
    """``torch.func.stack_module_state`` detaches, and wants one ``requires_grad`` for all."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            values, _ = torch.func.stack_module_state(list(self.members))
            member = lambda one: torch.func.functional_call(self.members[0], one, (x,))  # noqa: E731
            return torch.vmap(member)(values).mean(0)

    with pytest.raises(
        lk.errors.UnsupportedLayer, match=r"hang on parameter 'weight' of module 'members\.0', but have"
    ):
        lk.LaplacePosterior(Ensemble(), "categorical").fit(torch.randn(5, 3, generator=rng()), torch.arange(5) % 3)


def test_parameters_without_entries_are_left_out() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rest = nn.Linear(3, 3), nn.utils.skip_init(nn.Linear, 0, 3)
            self.prompt, self.spare = nn.Parameter(torch.empty(1, 0, 3)), nn.Parameter(torch.empty(0))
            nn.init.zeros_(self.rest.bias)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.prompt.expand(len(x), -1, -1), x[:, None]], 1)
            return self.layer(tokens).sum(1) + self.rest(x[:, :0])

    model, x, y = Prompted().double(), torch.randn(5, 3, generator=rng()).double(), torch.arange(5) % 3
    wanted = oracles.dense_ggn(model, x, y, oracles.categorical_nll)
    for structure in ("full", "diag", "kron"):
        posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(x, y)
        assert list(posterior.mean) == ["layer.weight", "layer.bias", "rest.bias"]
        if structure == "full":
            torch.testing.assert_close(posterior.precision.dense(), 5 * wanted + torch.eye(15).double())
    assert posterior.predict(x, method="mc", samples=2, space="activations").probs.shape == (5, 3)
    lk.optim.kfac(model, "categorical").step(x, y)
    assert list(lk.LaplacePosterior(model, "categorical", parameters="last_layer").fit(x, y).mean) == ["rest.bias"]


def test_derivatives_that_are_zero_are_zero() -> None:
    net = Joined(lambda net, x: net.head(torch.sign(net.body(x))))
    x, y = torch.randn(5, 3, generator=rng()).double(), torch.tensor([0, 1, 2, 0, 1])
    v = torch.linspace(-1, 1, 31).double()
    product = lk.curvature.ggn_vector_product(net, "categorical", [(x, y)], v)
    dense = lk.curvature.estimate(net, "categorical", [(x, y)], "full").mean().dense()
    torch.testing.assert_close(product, dense @ v)
    assert not bool(product[:16].any()) and bool(product[16:].all())
    lk.optim.natural_gradient(net, "categorical").step(x, y)
