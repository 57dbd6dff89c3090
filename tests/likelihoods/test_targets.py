"""Targets of other forms: class probabilities, class weights, missing values, known noise; flags and root widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as td

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, InvalidTarget, NonFinite, ShapeMismatch
from laplace_kf.likelihoods import (
    LIKELIHOODS,
    Categorical,
    FromDistribution,
    Likelihood,
    Prediction,
    to_positions,
)
from laplace_kf.outputs.weighted import WeightedTargets
from tests.checks import close

F64 = torch.float64
SHAPES = [(5, 3), (3, 4, 3), (2, 3, 2, 3)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=rng(seed))


def channel_first(x: Tensor) -> Tensor:
    """Outputs or class probabilities as torch's cross-entropy takes them."""
    return x.movedim(-1, 1) if x.ndim == 3 else x


def hot(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = F.one_hot(y, 3)
    return found.movedim(-1, 1) if len(shape) == 4 else found


def probabilities(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    return randn(*shape, seed=seed).softmax(1 if len(shape) == 4 else -1)


def dense(likelihood: Likelihood, loss: Any, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian of every example by ``loss(outputs (1, ...), targets (1, ...))``, flattened."""
    size = outputs[0].numel()
    values, gradients, hessians = [], [], []
    for z, y in zip(outputs, targets, strict=True):

        def one(v: Tensor, z: Tensor = z, y: Tensor = y) -> Tensor:
            return loss(v.reshape(1, *z.shape), y[None])

        values.append(one(z.flatten()))
        gradients.append(torch.func.grad(one)(z.flatten()))
        hessians.append(torch.func.hessian(one)(z.flatten()).reshape(size, size))
    return torch.stack(values), torch.stack(gradients), torch.stack(hessians)


def check(likelihood: Likelihood, loss: Any, outputs: Tensor, targets: Any) -> None:
    """Everything a likelihood says about a convex loss, against automatic differentiation of that loss."""
    value, gradient, hessian = dense(likelihood, loss, outputs, targets)
    close(likelihood.log_prob(outputs, targets), -value)
    close(likelihood.score(outputs, targets).flatten(1), -gradient)
    root = likelihood.hessian_root(outputs, targets).flatten(2)
    close(torch.einsum("vni,vnj->nij", root, root), hessian, 1e-9)
    v = randn(2, *outputs.shape, seed=8)
    product = likelihood.curvature_product(outputs, v, targets).flatten(2)
    close(product, torch.einsum("nij,knj->kni", hessian, v.flatten(2)), 1e-9)
    n, t, c = to_positions(outputs).shape
    blocks = likelihood.curvature(outputs, targets).reshape(n, t, c, c)
    close(likelihood.summed_curvature(outputs, targets), blocks.sum((0, 1)), 1e-9)
    close(likelihood.curvature_diagonal(outputs, targets), blocks.diagonal(dim1=2, dim2=3), 1e-9)
    close(likelihood.curvature_rows(1, outputs, targets), blocks[..., 1, :], 1e-9)
    lazy = likelihood.root(outputs, targets)
    close(lazy.norms().sum(-1), blocks.diagonal(dim1=2, dim2=3).sum(-1), 1e-9)
    columns = to_positions_of(lazy.columns(0, lazy.count * t))
    close(columns, blocks.sum(1), 1e-9)
    noise = torch.eye(likelihood.root_width(outputs, targets), dtype=F64)[:, None, None, :].expand(-1, n, t, -1)
    seeds = torch.stack([to_positions(one) for one in likelihood.root_product(outputs, noise, targets)])
    close(torch.einsum("kntc,kntd->ntcd", seeds, seeds), blocks, 1e-9)


def to_positions_of(columns: Tensor) -> Tensor:
    """(V, N, T, C) columns that touch one position each: their outer products summed, (N, C, C)."""
    return torch.einsum("vntc,vntd->ncd", columns, columns)


# ----------------------------------------------------------------------------------------------- class probabilities


@pytest.mark.pairs(
    shape=SHAPES, form=["labels", "one-hot", "bool", "soft"], weights=[None, [0.5, 2.0, 1.25]], smoothing=[0.0, 0.2]
)
def test_the_loss_of_torch(shape: tuple[int, ...], form: str, weights: Any, smoothing: float) -> None:
    outputs = randn(*shape)
    labels = Categorical().sample(outputs, rng())
    targets = {
        "labels": labels,
        "one-hot": hot(labels, shape),
        "bool": hot(labels, shape).bool(),
        "soft": probabilities(shape),
    }[form]
    given = None if weights is None else torch.tensor(weights, dtype=F64)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        y = y if form == "labels" else channel_first(y).to(F64)
        return F.cross_entropy(channel_first(z), y, given, reduction="none", label_smoothing=smoothing).sum()

    check(Categorical(class_weights=weights, label_smoothing=smoothing), loss, outputs, targets)


@pytest.mark.parametrize("shape", SHAPES)
def test_hot_targets_are_labels(shape: tuple[int, ...]) -> None:
    outputs = randn(2, *shape)
    labels = Categorical().sample(outputs[0], rng())
    drop = torch.rand(labels.shape, generator=rng(3)) < 0.3
    drop.view(-1)[:2] = torch.tensor([True, False])
    rows = hot(labels, shape).double()
    holes = rows.masked_fill(drop.unsqueeze(1 if len(shape) == 4 else -1), -100.0)
    for likelihood in (Categorical(), Categorical(class_weights=[1.0, 0.5, 3.0])):
        for soft, hard in ((rows, labels), (holes, labels.masked_fill(drop, -100))):
            close(likelihood.log_prob(outputs[0], soft), likelihood.log_prob(outputs[0], hard))
            close(likelihood.score(outputs[0], soft), likelihood.score(outputs[0], hard))
            close(likelihood.curvature(outputs[0], soft), likelihood.curvature(outputs[0], hard))
            prediction = likelihood.predict(outputs)
            close(prediction.log_prob(soft), prediction.log_prob(hard))
            assert likelihood.terms(soft) == likelihood.terms(hard)
            kept = likelihood.counted_positions(outputs[0], soft)
            assert torch.equal(kept, likelihood.counted_positions(outputs[0], hard))


def test_a_class_of_weight_zero_is_ignored() -> None:
    z, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    likelihood = Categorical(class_weights=[1.0, 0.0, 2.0])
    kept = y.masked_fill(y == 1, -100)
    close(likelihood.curvature(z, y), likelihood.curvature(z, kept))
    assert likelihood.counted_examples(z, y) == 2


def test_metrics_of_soft_targets() -> None:
    from laplace_kf.posterior.objectives import OBJECTIVES

    z, y = randn(2, 4, 3), probabilities((4, 3))
    prediction = Categorical().predict(z)
    close(OBJECTIVES["brier"](prediction, y), (prediction.probs - y).square().sum(-1))
    close(OBJECTIVES["nll"](prediction, y), -(y * prediction.probs.log()).sum(-1))
    with pytest.raises(IncompatiblePair, match="class labels"):
        OBJECTIVES["ece"](prediction, y)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.tensor([[0.5, 0.2, 0.2], [0.0, 1.0, 0.0]]), "add up to 0.9"),
        (torch.tensor([[1.5, -0.5, 0.0], [0.0, 1.0, 0.0]]), r"1\.5.*\[0, 1\]"),
        (torch.tensor([[0, 2, 0], [0, 1, 0]]), "one-hot"),
        (torch.tensor([[0, 1, 1], [0, 1, 0]]), "add up to 2"),
        (torch.tensor([[-100.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), "all its entries"),
        (torch.tensor([[1, 2, 0], [2, 1, 0]]), "one-hot"),  # class indices of three positions
        (torch.zeros(2, 3), "add up to 0"),
        (torch.tensor([0.0, 1.0]), "probabilities have the shape of the outputs"),
    ],
)
def test_what_are_no_probabilities(targets: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Categorical().check(torch.zeros(2, 3), targets)


def test_other_refusals() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeMismatch, match="one number a class"):
        Categorical(class_weights=torch.ones(2, 2))
    for bad in ([1.0, -1.0], [math.nan, 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="class_weights"):
            Categorical(class_weights=bad)
    with pytest.raises(ShapeMismatch, match="2 class_weights"):
        Categorical(class_weights=[1.0, 2.0]).check(z, y)
    for smoothing in (-0.1, 1.0, math.nan, True):
        with pytest.raises(TypeError if smoothing is True else ValueError, match="label_smoothing"):
            Categorical(label_smoothing=smoothing)
    with pytest.raises(IncompatiblePair, match="targets"):
        Categorical(class_weights=[1.0, 2.0, 1.0]).curvature(z)
    with pytest.raises(NonFinite):
        Categorical().check(z, torch.tensor([[math.nan, 0.5, 0.5], [0.0, 1.0, 0.0]]))
    config = Categorical(class_weights=[1.0, 2.0, 1.0], label_smoothing=0.1).to_config()
    again = Likelihood.from_config(config)
    assert again.to_config() == config and "class_weights" in repr(again)
    assert "class_weights" not in Categorical().to_config()


class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical", "poisson", "heteroscedastic_gaussian"])
def test_complex_targets_are_not_cut_to_their_real_parts(name: str) -> None:
    outputs = randn(4, 2)
    targets = torch.ones(4, 1 if name == "heteroscedastic_gaussian" else 2, dtype=torch.complex128)
    with pytest.raises(InvalidTarget, match=r"complex.*torch\.view_as_real\(targets\)"):
        LIKELIHOODS[name]().log_prob(outputs, targets)


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(outputs).double()


def dense_ggn(model: nn.Module, x: Tensor, blocks: Tensor) -> Tensor:
    named = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (one[None],))[0]

    rows = [torch.func.jacrev(outputs)(named, one) for one in x]
    jacobian = torch.stack([torch.cat([row[name].flatten(1) for name in named], 1) for row in rows])
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, blocks, jacobian) / len(x)


def test_estimators_of_the_weighted_loss() -> None:
    """All of them, sampled included, estimate the GGN of torch's weighted loss."""
    model, x, y = network(), randn(6, 2), torch.arange(6) % 3
    weights = torch.tensor([0.5, 2.0, 1.25], dtype=F64)
    with torch.no_grad():
        outputs = model(x)
    blocks = torch.stack(
        [
            torch.func.hessian(lambda v, k=k: F.cross_entropy(v[None], k[None], weights, reduction="none")[0])(z)
            for z, k in zip(outputs, y, strict=True)
        ]
    )
    expected = dense_ggn(model, x, blocks)
    likelihood = Categorical(class_weights=weights)
    found = lk.curvature.estimate(model, likelihood, [(x, y)], "full")
    close(found.mean().dense(), expected, 1e-9)
    assert found.n_data == 6
    many = [(torch.cat([x] * 400), torch.cat([y] * 400))]
    for name, options in {
        "sampled": {"samples": 4},
        "projection": {"samples": 4},
        "importance": {"columns": 2},
    }.items():
        mean = lk.curvature.estimate(model, likelihood, many, "full", name, generator=rng(), **options).mean().dense()
        assert float((mean - expected).norm() / expected.norm()) < 0.08, name
    v = randn(expected.shape[0], seed=4)
    close(lk.curvature.ggn_vector_product(model, likelihood, [(x, y)], v), expected @ v, 1e-9)


def test_smoothing_does_not_move_the_curvature_and_fits() -> None:
    model, x, y = network(), randn(6, 2), torch.arange(6) % 3
    plain = lk.curvature.estimate(model, "categorical", [(x, y)], "kron").mean().dense()
    smooth = lk.curvature.estimate(model, Categorical(label_smoothing=0.1), [(x, y)], "kron").mean().dense()
    close(smooth, plain)
    mixed = 0.3 * F.one_hot(y, 3).to(F64) + 0.7 * F.one_hot(y.flip(0), 3).to(F64)
    posterior = lk.LaplacePosterior(model, "categorical", "kron").fit([(x, mixed)])
    close(posterior.curvature.dense(), plain)
    posterior.tune([(x, mixed)], samples=2, prior_precision=[1.0, 10.0], generator=rng())
    optimiser = lk.optim.GaussNewton(network(), Categorical(label_smoothing=0.1))
    wanted = F.cross_entropy(network()(x), mixed, label_smoothing=0.1)
    close(optimiser.step(x, mixed), wanted.detach())


# ------------------------------------------------------------------------------------------------------------- flags


def probes(likelihood: Likelihood, channels: int) -> list[Tensor]:
    """Hessians at random outputs and several drawn targets: a list over targets of (N, C, C)."""
    z = randn(40, channels, seed=2)
    draws = [likelihood.sample(z, rng(k)) for k in range(5)]
    return [likelihood.hessian(z, y) for y in draws]


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_flags(name: str) -> None:
    for likelihood, channels in LIKELIHOODS[name].examples():
        found = probes(likelihood, channels)
        same = all(torch.allclose(one, found[0], rtol=1e-9, atol=1e-12) for one in found)
        assert likelihood.natural == same
        lowest = min(float(torch.linalg.eigvalsh(one).min()) for one in found)
        assert likelihood.psd == (lowest > -1e-9)


NATURAL = {
    "categorical": lambda z: td.Categorical(logits=z),
    "bernoulli": lambda z: td.Bernoulli(logits=z),
    "independent": lambda z: td.Independent(td.Bernoulli(logits=z), 1),
    "normal": lambda z: td.Normal(z, 0.3),
    "first": lambda z: td.Normal(z[:, :1], 0.3),
    "multivariate": lambda z: td.MultivariateNormal(z, torch.eye(z.shape[1], dtype=z.dtype)),
    "poisson": lambda z: td.Poisson(z.exp()),
    "binomial": lambda z: td.Binomial(4, logits=z),
}
OTHERS = {
    "heteroscedastic": lambda z: td.Normal(z[:, 0], z[:, 1].exp()),
    "student": lambda z: td.StudentT(4.0, z),
    "laplace": lambda z: td.Laplace(z, 1.0),
    "gamma": lambda z: td.Gamma(z.exp(), 1.0),
    "exponential": lambda z: td.Exponential(z.exp()),
    "negative binomial": lambda z: td.NegativeBinomial(3.0, logits=z),
}


@pytest.mark.parametrize("curvature", ["auto", "hessian"])
@pytest.mark.parametrize("name", [*NATURAL, *OTHERS])
def test_natural_parameters_are_found(name: str, curvature: str) -> None:
    likelihood = FromDistribution({**NATURAL, **OTHERS}[name], curvature)
    assert likelihood.natural == (name in NATURAL) == likelihood.psd
    z = 0.5 * randn(6, 4)
    y = likelihood.sample(z, rng())
    if name in NATURAL:  # the Fisher, with or without targets, is the Hessian
        close(likelihood.curvature(z), likelihood.hessian(z, y), 1e-8)
        close(likelihood.curvature(z, y), likelihood.hessian(z, y), 1e-8)
    assert likelihood.natural == (name in NATURAL)


def test_natural_of_a_function_of_a_fixed_size() -> None:
    mixing = randn(7, 7)
    assert not FromDistribution(lambda z: td.Normal(z @ mixing, 0.3)).natural  # not known before the first call
    likelihood = FromDistribution(lambda z: td.Normal(z @ mixing, 0.3))
    likelihood.check(randn(3, 7), randn(3, 7, seed=1))
    assert likelihood.natural


# ------------------------------------------------------------------------------------------------------- root widths


class Toy(Likelihood):
    """The abstract methods alone: a softmax with a root of C - 1 columns, and a label each."""

    def _position_targets(self, shape: Any, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        y, keep = self._ignore(targets.long())
        y = y.unsqueeze(-1).flatten(1)
        return y, None if keep is None else keep.reshape(*y.shape, 1)

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.log_softmax(z, -1).gather(-1, y.unsqueeze(-1))

    def _draw(self, z: Tensor, shape: Any, generator: torch.Generator) -> Tensor:
        return Categorical()._draw(z, shape, generator)

    def _predict(self, z: Tensor, shape: Any) -> Prediction:
        return Categorical()._predict(z, shape)

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return Categorical()._position_root(z, None)


class NeedsTargets(Toy):
    """A root that cannot be had without targets."""

    @property
    def needs_targets(self) -> bool:
        return True

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        self._needed(y, "the root")
        return super()._position_root(z, y)


class RowByRow(Categorical):
    """Draws as the toys do, which know nothing of rows with numbers of their own."""

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Any) -> Tensor:
        return super()._draw(z, shape, generator)


@pytest.mark.parametrize("toy", [Toy, NeedsTargets])
@pytest.mark.parametrize("estimator", ["exact", "projection", "importance", "sampled", "empirical", "recursive"])
def test_a_likelihood_of_the_abstract_methods(toy: type[Toy], estimator: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = randn(6, 2), torch.arange(6) % 3
    many = [(torch.cat([x] * 300), torch.cat([y] * 300))] if estimator in ("projection", "importance") else [(x, y)]
    structure = "kron" if estimator == "recursive" else "full"
    theirs, mine = (
        lk.curvature.estimate(model, rule, many, structure, estimator, generator=rng()).mean().dense()
        for rule in (RowByRow(), toy())
    )
    if estimator == "projection":  # another root: the same mean
        exact = lk.curvature.estimate(model, "categorical", [(x, y)], "full").mean().dense()
        assert float((mine - exact).norm() / exact.norm()) < 0.15
    else:
        close(mine, theirs, 1e-9)
    z = randn(2, 4, 3)
    assert toy().root_width(z, torch.zeros(2, 4).long()) == 2


def test_probit_where_there_is_none() -> None:
    model, x, y = network(), randn(6, 2), torch.arange(6) % 3
    posterior = lk.LaplacePosterior(model, Toy(), "kron").fit([(x, y)])
    with pytest.raises(IncompatiblePair, match="no probit"):
        posterior.predict(x, method="probit")
    with pytest.raises(IncompatiblePair, match="no probit"):
        posterior.tune([(x, y)], method="probit")


# ------------------------------------------------------------------------------------------------ weights of examples


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@pytest.mark.parametrize("shape", [(5, 0), (3, 4, 0), (2, 0, 2, 3)])
def test_weights_multiply_everything(name: str, shape: tuple[int, ...]) -> None:
    for likelihood, channels in LIKELIHOODS[name].examples():
        outputs = randn(*[channels if size == 0 else size for size in shape])
        y = likelihood.sample(outputs, rng())
        w = torch.rand(shape[0], dtype=F64, generator=rng(1)) + 0.2
        w[0] = 0.0
        given = WeightedTargets(y, w)
        by = w.reshape(-1, *[1] * (outputs.ndim - 1))
        close(likelihood.log_prob(outputs, given), w * likelihood.log_prob(outputs, y))
        close(likelihood.score(outputs, given), by * likelihood.score(outputs, y))
        curvature = likelihood.curvature(outputs, y)
        factor = w.reshape(-1, *[1] * (curvature.ndim - 1))
        close(likelihood.curvature(outputs, given), factor * curvature)
        close(likelihood.hessian(outputs, given), factor * likelihood.hessian(outputs, y))
        close(likelihood.hessian_root(outputs, given), by.sqrt() * likelihood.hessian_root(outputs, y))
        n, t, c = to_positions(outputs).shape
        blocks = (factor * curvature).reshape(n, t, c, c)
        close(likelihood.summed_curvature(outputs, given), blocks.sum((0, 1)), 1e-9)
        close(likelihood.curvature_diagonal(outputs, given), blocks.diagonal(dim1=2, dim2=3), 1e-9)
        close(likelihood.curvature_rows(0, outputs, given), blocks[..., 0, :], 1e-9)
        close(likelihood.root(outputs, given).norms().sum(-1), blocks.diagonal(dim1=2, dim2=3).sum(-1), 1e-9)
        v = randn(2, *outputs.shape, seed=4)
        close(likelihood.curvature_product(outputs, v, given), by * likelihood.curvature_product(outputs, v, y), 1e-9)
        assert likelihood.counted_examples(outputs, given) == n - 1
        drawn = likelihood.drawn_score(outputs, given, rng(7))
        assert not drawn[0].any() and drawn[1:].any()
