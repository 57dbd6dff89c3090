"""Likelihoods made of a loss: against dense float64 references, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as td

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import BernoulliMixture, Categorical, FromDistribution, FromLoss, Gaussian
from tests.checks import close

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=rng(seed))


def test_a_loss_that_does_not_look_at_the_outputs_has_no_score() -> None:
    level = nn.Parameter(torch.ones((), dtype=F64))
    likelihood = FromLoss(lambda z, y: level * y)
    z, y = randn(4, 3), randn(4, seed=1)
    assert torch.equal(likelihood.score(z, y), torch.zeros_like(z))
    with pytest.warns(UserWarning, match="the second derivatives of the loss are 0"):
        assert torch.equal(likelihood.hessian(z, y), torch.zeros(4, 3, 3, dtype=F64))


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def mixture(z: Tensor, y: Tensor) -> Tensor:
    """Two Bernoulli classifiers and a gate: indefinite Hessians."""
    gate, second, third = torch.sigmoid(z).unbind(-1)
    p = gate * second + (1 - gate) * third
    return -torch.log(torch.where(y > 0.5, p, 1 - p))


def weibull(z: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    """Survival times with right censoring: log scale and log shape are outputs."""
    time, seen = y
    scale, shape = z[:, 0].exp(), z[:, 1].exp()
    log_hazard = shape.log() - scale.log() + (shape - 1) * (time.log() - scale.log())
    return (time / scale) ** shape - seen * log_hazard


def mixture_density(z: Tensor, y: Tensor) -> Tensor:
    """Mixture-density head: K log weights, K means, K log scales."""
    weight, mean, scale = z.chunk(3, -1)
    parts = torch.log_softmax(weight, -1) + td.Normal(mean, scale.exp()).log_prob(y)
    return -torch.logsumexp(parts, -1)


def times(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, dtype=F64, generator=rng(4)) + 0.2, (torch.arange(n) % 3 > 0).to(F64)


HEADS: dict[str, tuple[Any, int, Any]] = {
    "cross_entropy": (cross_entropy, 3, lambda n: torch.randint(3, (n,), generator=rng(1))),
    "mixture": (mixture, 3, lambda n: torch.randint(2, (n,), generator=rng(1)).to(F64)),
    "weibull": (weibull, 2, times),
    "mixture_density": (mixture_density, 6, lambda n: randn(n, 1, seed=3)),
}


def dense_hessian(loss: Any, z: Tensor, y: Any) -> Tensor:
    found = []
    for k in range(len(z)):
        one = tuple(t[k : k + 1] for t in y) if isinstance(y, tuple) else y[k : k + 1]
        found.append(torch.func.hessian(lambda v, one=one: loss(v[None], one)[0])(z[k]))
    return torch.stack(found)


def treated(hessian: Tensor, curvature: str) -> Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    values = {
        "clip": values.clamp_min(0),
        "abs": values.abs(),
        "shift": values + (-values[..., :1]).clamp_min(0),
    }[curvature]
    return vectors @ torch.diag_embed(values) @ vectors.mT


@pytest.mark.parametrize("curvature", ["clip", "abs", "shift"])
@pytest.mark.parametrize("name", HEADS)
def test_derivatives_and_treatments(name: str, curvature: str) -> None:
    loss, channels, targets = HEADS[name]
    z, y = randn(7, channels), targets(7)
    likelihood = FromLoss(loss, curvature)
    close(likelihood.log_prob(z, y), -loss(z, y))
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-loss(leaf, y).sum(), leaf)
    close(likelihood.score(z, y), gradient)
    hessian = dense_hessian(loss, z, y)
    close(likelihood.hessian(z, y), hessian)
    expected = treated(hessian, curvature)
    close(likelihood.curvature(z, y), expected, 1e-9)
    root = likelihood.hessian_root(z, y)
    close(torch.einsum("vni,vnj->nij", root, root), expected, 1e-9)
    close(likelihood.summed_curvature(z, y), expected.sum(0), 1e-9)
    close(likelihood.curvature_diagonal(z, y)[:, 0], expected.diagonal(dim1=1, dim2=2), 1e-9)
    v = randn(2, 7, channels, seed=9)
    close(likelihood.curvature_product(z, v, y), torch.einsum("nij,knj->kni", expected, v), 1e-9)
    noise = torch.eye(channels, dtype=F64)[:, None, None].expand(channels, 7, 1, channels)
    seeds = likelihood.root_product(z, noise, y)
    close(torch.einsum("vni,vnj->nij", seeds, seeds), expected, 1e-9)
    assert likelihood.needs_targets and not likelihood.natural and not likelihood.psd
    if name != "cross_entropy":
        assert float(torch.linalg.eigvalsh(hessian).min()) < -1e-6  # the treatments differ


def test_treatments_of_a_convex_loss_are_its_hessian() -> None:
    z, y = randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    for curvature in ("clip", "abs", "shift"):
        close(FromLoss(cross_entropy, curvature).curvature(z, y), Categorical().hessian(z), 1e-7)


def test_mixture_loss_is_the_registered_mixture() -> None:
    z, y = randn(6, 3), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=F64)
    for curvature in ("clip", "abs"):
        close(FromLoss(mixture, curvature).curvature(z, y), BernoulliMixture(curvature).curvature(z, y), 1e-8)
    fisher = FromLoss(mixture, "fisher", support=torch.tensor([0.0, 1.0]))
    assert not fisher.needs_targets
    close(fisher.curvature(z), BernoulliMixture("fisher").curvature(z), 1e-8)
    close(fisher.log_prob(z, y), BernoulliMixture().log_prob(z, y))


def test_fisher_of_an_unnormalised_loss() -> None:
    """r(y|z) ∝ exp(-loss): the support's normaliser depends on the outputs and enters the scores."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] - y) ** 2 * (1 + z[:, 1] ** 2)

    support, z = torch.tensor([-1.0, 0.0, 2.0], dtype=F64), randn(4, 2)
    expected = torch.zeros(4, 2, 2, dtype=F64)
    for n in range(4):

        def log_p(v: Tensor) -> Tensor:
            return torch.log_softmax(torch.stack([-loss(v[None], y[None])[0] for y in support]), 0)

        scores = torch.func.jacrev(log_p)(z[n])
        expected[n] = torch.einsum("k,ki,kj->ij", log_p(z[n]).exp(), scores, scores)
    likelihood = FromLoss(loss, "fisher", support=support)
    close(likelihood.curvature(z), expected, 1e-9)
    drawn = likelihood.sample(z[:1].expand(20_000, 2), rng())
    p = torch.stack([-loss(z[:1], y[None])[0] for y in support]).softmax(0)
    for value, share in zip(support, p, strict=True):
        assert abs(float((drawn == value).to(F64).mean() - share)) < 0.02
    prediction = likelihood.predict(z[None])
    close(prediction.probs[0], p)
    close(prediction.entropy[0], -(p * p.log()).sum())


@pytest.mark.parametrize("shape", [(4, 3), (3, 5, 3), (2, 3, 2, 3)])
def test_positions(shape: tuple[int, ...]) -> None:
    z = randn(*shape)
    y = Categorical().sample(z, rng())
    likelihood = FromLoss(cross_entropy, ignore_index=-100, support=torch.arange(3))
    for targets in (y, y.masked_fill(torch.rand(y.shape, generator=rng(2)) < 0.4, -100)):
        close(likelihood.log_prob(z, targets), Categorical().log_prob(z, targets))
        close(likelihood.score(z, targets), Categorical().score(z, targets))
        close(likelihood.curvature(z, targets), Categorical().curvature(z, targets), 1e-7)
        close(likelihood.predict(z[None]).log_prob(targets), Categorical().log_prob(z, targets))
    drawn = likelihood.sample(z, rng())
    assert drawn.shape == y.shape
    close(likelihood.predict(torch.stack([z, -z])).probs, Categorical().predict(torch.stack([z, -z])).probs)
    assert likelihood.predict(z[None]).mutual_information.abs().max() < 1e-12


class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def network(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(outputs).double()


def dense_ggn(model: nn.Module, x: Tensor, curvature: Tensor) -> Tensor:
    named = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(w: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, w, (one[None],))[0]

    rows = [torch.func.jacrev(outputs)(named, one) for one in x]
    jacobian = torch.stack([torch.cat([row[name].flatten(1) for name in named], 1) for row in rows])
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(x)


@pytest.mark.parametrize("name", HEADS)
def test_posterior_of_a_loss(name: str) -> None:
    """Exact, projected and importance-sampled estimators against the dense matrix; fit, predict, tune, save."""
    loss, channels, targets = HEADS[name]
    model, x, y = network(channels), randn(6, 2), targets(6)
    likelihood = FromLoss(loss)
    with torch.no_grad():
        expected = dense_ggn(model, x, treated(dense_hessian(loss, model(x), y), "clip"))
    data = [(x, y)]
    close(lk.curvature.estimate(model, likelihood, data, "full").mean().dense(), expected, 1e-9)
    close(lk.curvature.estimate(model, likelihood, data, "diag").mean().diag(), expected.diagonal(), 1e-9)
    repeated = [(torch.cat([x] * 300), _repeated(y, 300))]
    for estimator in ("projection", "importance"):
        options = {"samples": 4} if estimator == "projection" else {"columns": 2.0}
        found = lk.curvature.estimate(
            model, likelihood, repeated, "full", estimator, generator=rng(), **options
        )  # fmt: skip
        assert float((found.mean().dense() - expected).norm() / expected.norm()) < 0.1, estimator
    empirical = lk.curvature.estimate(model, likelihood, data, "full", "empirical").mean().dense()
    assert float(torch.linalg.eigvalsh(empirical).min()) > -1e-10
    posterior = lk.LaplacePosterior(model, likelihood, "kron").fit(data)
    for method in ("map", "mc", "linearized"):
        prediction = posterior.predict(x, method=method, samples=5, generator=rng())
        assert bool(torch.isfinite(prediction.log_prob(y)).all())
    assert math.isfinite(float(posterior.log_evidence()))
    posterior.tune(data, samples=2, prior_precision=[1.0, 10.0], generator=rng())


def _repeated(y: Any, count: int) -> Any:
    return tuple(torch.cat([t] * count) for t in y) if isinstance(y, tuple) else torch.cat([y] * count)


def test_recursive_estimator_and_optimisers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = randn(8, 2), torch.arange(8) % 3
    theirs = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", "recursive").mean().dense()
    mine = lk.curvature.estimate(model, FromLoss(cross_entropy), [(x, y)], "kron", "recursive").mean().dense()
    close(mine, theirs, 1e-7)
    optimiser = lk.optim.GaussNewton(model, FromLoss(cross_entropy), structure="kron", estimator="exact")
    before = float(optimiser.step(x, y))
    for _ in range(5):
        optimiser.step(x, y)
    assert float(cross_entropy(model(x), y).mean()) < before


def test_survival_optimiser_takes_tuples() -> None:
    model, (time, seen) = network(2), times(9)
    optimiser = lk.optim.GaussNewton(model, FromLoss(weibull), structure="kron", estimator="exact")
    x = randn(9, 2)
    close(optimiser.step(x, (time, seen)), weibull(network(2)(x), (time, seen)).mean().detach())


def test_saving_needs_the_object(tmp_path: Any) -> None:
    model, x, y = network(3), randn(6, 2), torch.arange(6) % 3
    likelihood = FromLoss(cross_entropy)
    posterior = lk.LaplacePosterior(model, likelihood, "kron").fit([(x, y)])
    posterior.save(tmp_path / "p.safetensors")
    with pytest.raises(IncompatiblePair, match="likelihood="):
        lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model, likelihood=likelihood)
    close(again.precision.dense(), posterior.precision.dense())
    with pytest.raises(IncompatiblePair, match="load"):
        likelihood.to_config()


def test_targets_need_not_be_drawable() -> None:
    model, x, y = network(3), randn(6, 2), torch.arange(6) % 3
    with pytest.raises(IncompatiblePair, match="sample="):
        lk.curvature.estimate(model, FromLoss(cross_entropy), [(x, y)], "kron", "sampled")
    able = FromLoss(cross_entropy, sample=lambda z, generator: Categorical().sample(z, generator))
    mine = lk.curvature.estimate(model, able, [(x, y)], "full", "sampled", generator=rng()).mean().dense()

    class RowByRow(Categorical):
        """Draws as a function does that knows nothing of rows with numbers of their own."""

        def _draw(self, z: torch.Tensor, shape: Any, generator: Any) -> torch.Tensor:
            return super()._draw(z, shape, generator)

    theirs = lk.curvature.estimate(model, RowByRow(), [(x, y)], "full", "sampled", generator=rng()).mean().dense()
    close(mine, theirs)
    with pytest.raises(IncompatiblePair, match="probit"):
        lk.LaplacePosterior(model, able, "kron").fit([(x, y)]).predict(x, method="probit")


def cox(z: Tensor, y: Tensor) -> Tensor:
    """Partial likelihood: every example's term holds the whole batch."""
    order = y.argsort(descending=True)
    return -(z[order, 0] - torch.logcumsumexp(z[order, 0], 0))


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (3.0, IncompatiblePair, r"reduction=.none"),
        ("mse", IncompatiblePair, r"reduction=.none"),
        (nn.CrossEntropyLoss, IncompatiblePair, r"CrossEntropyLoss\(reduction=.none.\)"),
        (nn.CrossEntropyLoss(), IncompatiblePair, r"CrossEntropyLoss\(reduction=.none.\)"),
    ],
)
def test_what_is_no_loss_is_refused_at_once(loss: Any, error: type[LaplaceKFError], says: str) -> None:
    with pytest.raises(error, match=says):
        FromLoss(loss)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (F.cross_entropy, r"shape \(\).*\(4,\).*reduction=.none"),
        (lambda z, y: F.one_hot(y, 3) * z, r"\(4, 3\).*sum\(1\)"),
        (lambda z, y: 1.0, "float"),
        (lambda z, y: cross_entropy(z, y)[:2], r"\(2,\)"),
    ],
)
def test_losses_of_other_shapes_are_refused(loss: Any, says: str) -> None:
    z, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    for method in ("check", "log_prob", "score", "hessian", "position_root"):
        with pytest.raises(ShapeMismatch, match=says):
            getattr(FromLoss(loss), method)(z, y)
    model = network(3)
    with pytest.raises(ShapeMismatch, match="one loss for every example"):
        lk.LaplacePosterior(model, FromLoss(loss)).fit([(randn(4, 2), y)])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: (z - y).abs().sum(1),
        lambda z, y: torch.maximum(0.9 * (y - z), -0.1 * (y - z)).sum(1),
        lambda z, y: torch.relu(1 - y * z).sum(1),
        lambda z, y: (z * y).sum(1),
    ],
    ids=["absolute", "quantile", "hinge", "linear"],
)
def test_a_loss_without_curvature_says_so_once(loss: Any) -> None:
    x, y = randn(9, 2), randn(9, 3, seed=5).sign()
    with pytest.warns(UserWarning, match=r"piecewise linear .*huber_loss") as caught:
        posterior = lk.LaplacePosterior(network(3), FromLoss(loss), structure="diag").fit([(x[:4], y[:4]), (x, y)])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert bool((posterior.precision.diag() == 1.0).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = FromLoss(lambda z, y: F.huber_loss(z, y, reduction="none").sum(1))
        lk.LaplacePosterior(network(3), rule, structure="diag").fit([(x, y)])


def test_a_loss_of_detached_outputs_is_refused() -> None:
    with pytest.raises(IncompatiblePair, match=r"depend differentiably.*without detach"):
        FromLoss(lambda z, y: (z.detach() - y).square().sum(1)).hessian(randn(4, 3), randn(4, 3))


def test_more_refusals() -> None:
    z, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises(UnknownName, match="'clip'"):
        FromLoss(cross_entropy, "clipped")
    with pytest.raises(IncompatiblePair, match="support="):
        FromLoss(cross_entropy, "fisher")
    with pytest.raises(ShapeMismatch, match="support"):
        FromLoss(cross_entropy, "fisher", support=torch.tensor(1))
    with pytest.raises(IncompatiblePair, match="other examples"):
        FromLoss(cox).check(z, torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=F64))
    with pytest.raises(ShapeMismatch, match=r"\(4, \.\.\.\)"):
        FromLoss(cross_entropy).check(z, y[:3])
    with pytest.raises(ShapeMismatch, match="return outputs"):
        FromLoss(cross_entropy).check(randn(4, 5, 3), y)
    with pytest.raises(NonFinite):
        FromLoss(mixture).check(z, torch.tensor([0.0, math.nan, 1.0, 1.0]))
    with pytest.raises(IncompatiblePair, match="targets"):
        FromLoss(cross_entropy).curvature(z)
    with pytest.raises(AttributeError, match="support="):
        _ = FromLoss(cross_entropy).predict(z[None]).entropy
    with pytest.raises(AttributeError, match="FromDistribution"):
        _ = FromLoss(cross_entropy).predict(z[None]).distribution


def test_low_precision_outputs_compute_in_float32() -> None:
    z, y = randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 1])
    found = FromLoss(cross_entropy).log_prob(z, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), Categorical().log_prob(z.double(), y), rtol=1e-4, atol=1e-4)


def test_functions_of_another_mode() -> None:
    with torch.inference_mode():
        z, y = randn(4, 3), torch.tensor([0.0, 1, 1, 0], dtype=F64)
        likelihood = FromLoss(mixture)
        likelihood.score(z, y)
        likelihood.hessian_root(z, y)
    per_example = torch.func.vmap(lambda one, label: FromLoss(mixture).log_prob(one[None], label[None])[0])
    z, y = randn(4, 3), torch.tensor([0.0, 1, 1, 0], dtype=F64)
    close(per_example(z, y), -mixture(z, y))


def test_mixture_density_by_a_distribution_too() -> None:
    """The same head through FromDistribution: the same density and Hessian."""

    def head(z: Tensor) -> td.Distribution:
        weight, mean, scale = z.chunk(3, -1)
        return td.MixtureSameFamily(td.Categorical(logits=weight), td.Normal(mean, scale.exp()))

    z, y = randn(5, 6), randn(5, seed=3)
    other = FromDistribution(head)
    close(other.log_prob(z, y), -mixture_density(z, y[:, None]))
    close(other.hessian(z, y), dense_hessian(mixture_density, z, y[:, None]))
    close(other.curvature(z, y), FromLoss(mixture_density).curvature(z, y[:, None]), 1e-8)
    assert not other.natural and not other.psd


def test_squared_error_has_the_curvature_of_the_gaussian() -> None:
    z, y = randn(5, 2), randn(5, 2, seed=1)
    likelihood = FromLoss(lambda o, t: 0.5 * (o - t).square().sum(-1) / 0.49)
    close(likelihood.curvature(z, y), Gaussian(0.7).curvature(z, y))
