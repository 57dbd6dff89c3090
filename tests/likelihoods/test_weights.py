"""Weights of examples through fit, tune, predictions, chains, files, evidence and optimisers, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, NonFinite, ShapeMismatch
from laplace_kf.likelihoods import Categorical, FromLoss, Gaussian
from laplace_kf.outputs.weighted import WeightedTargets
from tests.checks import close

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def data(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and weights, one of them 0."""
    x = torch.randn(n, 2, dtype=F64, generator=rng(1))
    w = torch.rand(n, dtype=F64, generator=rng(2)) * 3
    w[3] = 0.0
    return x, torch.arange(n) % 3, w


def dense(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over examples of ``w Jᵀ (diag(p) - p pᵀ) J``, and of ``w log p``, one example at a time."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    total: Any = 0.0
    fit = torch.zeros((), dtype=F64)
    for one, label, weight in zip(x, y, w, strict=True):

        def outputs(v: dict[str, Tensor], one: Tensor = one) -> Tensor:
            return torch.func.functional_call(model, v, (one[None],))[0]

        rows = torch.func.jacrev(outputs)(named)
        jacobian = torch.cat([rows[name].flatten(1) for name in named], 1)
        p = outputs(named).softmax(0)
        total = total + weight * jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        fit = fit + weight * p[label].log()
    return total, fit


def forms(x: Tensor, y: Tensor, w: Tensor) -> dict[str, tuple[Any, Any]]:
    """The same data in every form: ``data, forward``."""

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["in"]), batch["out"], batch["importance"]

    return {
        "tensors": ((x, y, w), None),
        "loader": (DataLoader(TensorDataset(x, y, w), batch_size=3), None),
        "list": ([(x[:5], y[:5], w[:5]), [x[5:], y[5:], w[5:]]], None),
        "forward": ([{"in": x, "out": y, "importance": w}], forward),
    }


@pytest.mark.parametrize("form", ["tensors", "loader", "list", "forward"])
def test_fit_is_the_sum_of_weighted_examples(form: str) -> None:
    model, (x, y, w) = network(), data()
    total, fit = dense(model, x, y, w)
    given, forward = forms(x, y, w)[form]
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=True, forward=forward).fit(given)
    eye = torch.eye(len(total), dtype=F64)
    assert posterior.n_data == 7  # the example of weight 0 is none
    close(posterior.precision.dense(), total + eye)
    evidence = posterior.evidence()
    close(evidence.fit.detach().double(), fit)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    wanted = fit - 0.5 * torch.logdet(total + eye) - 0.5 * flat.square().sum()
    close(posterior.log_evidence().detach().double(), wanted)
    x_new = {"in": x, "out": y, "importance": w} if forward is not None else x
    mean = posterior.predict(x_new, method="map").probs
    close(mean, model(x).detach().softmax(1))
    for method in ("linearized", "probit", "mc"):
        prediction = posterior.predict(x_new, method=method, samples=8, generator=rng())
        assert prediction.probs.shape == (8, 3)
    covariance = posterior.functional_covariance(x_new)
    assert covariance.shape == (8, 3, 3)


@pytest.mark.parametrize("estimator", ["exact", "projection", "importance", "sampled", "empirical", "recursive"])
@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "full", "lowrank"])
def test_whole_numbers_are_repetitions(structure: str, estimator: str) -> None:
    """Weights 0, 1, 2, 3 give the sums of data in which the examples stand so many times."""
    if estimator == "recursive" and structure != "kron":
        pytest.skip("recursive factors are those of Kronecker pairs")
    model, (x, y, _) = network(), data()
    w = torch.tensor([0, 1, 2, 3, 1, 0, 2, 1])
    options: dict[str, Any] = {"rank": 4} if structure == "lowrank" else {}
    noisy = estimator in ("projection", "importance", "sampled")
    many = 300 if noisy else 1
    if noisy and structure in ("ekfac", "lowrank"):
        pytest.skip("eigenvectors of noisy sums are compared elsewhere")

    def sums(weights: Tensor | None, index: Tensor) -> Tensor:
        parts = (x[index].repeat(many, 1), y[index].repeat(many))
        given = [parts if weights is None else (*parts, weights.repeat(many))]
        found = lk.curvature.estimate(
            model, "categorical", given, structure, estimator, weights=weights is not None, generator=rng(), **options
        )
        return found.mean().dense() * found.n_data / many

    kept = torch.arange(8)[w > 0]
    weighted, repeated = sums(w, torch.arange(8)), sums(None, torch.repeat_interleave(torch.arange(8), w))
    if structure in ("kron", "ekfac") or estimator == "recursive":
        # the factor of the inputs is their mean over the examples that count; it is compared below
        twice, ones = (sums(k * torch.ones(8, dtype=F64), torch.arange(8)) for k in (2, 1))
        close(twice, 2 * ones, 1e-9)
        if not noisy:
            close(ones, sums(None, torch.arange(8)), 1e-9)
            close(weighted, sums(w[kept], kept), 1e-9)
        if structure == "ekfac":  # exact second moments: in any basis they have the exact trace
            close(weighted.trace(), repeated.trace(), 1e-9)
    elif noisy:
        assert float((weighted - repeated).norm() / repeated.norm()) < 0.2
    else:
        close(weighted, repeated, 1e-9)


def kron_reference(model: nn.Module, x: Tensor, w: Tensor) -> list[Tensor]:
    """Sums ``Σ a aᵀ`` over the counted examples / count ⊗ ``Σ w g gᵀ`` of the last linear layer's weight and bias."""
    kept = w > 0
    with torch.no_grad():
        hidden = torch.tanh(model[0](x[kept]))  # type: ignore[index,operator]
        a = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=F64)], 1)
        p = model(x[kept]).softmax(1)
    g = torch.einsum("n,nij->ij", w[kept], torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    return [a.T @ a / len(a), g]


def test_kronecker_factors_of_weighted_examples() -> None:
    """``A`` is the mean over the examples that count, ``G`` the weighted one: methods 17.11."""
    model, (x, y, w) = network(), data()
    posterior = lk.LaplacePosterior(model, "categorical", "kron", weights=True).fit((x, y, w))
    a, g = kron_reference(model, x, w)
    last = dict(zip([b.name for b, _ in posterior.curvature.entries], posterior.curvature.entries, strict=True))
    (matrix,) = [m for name, (_, m) in last.items() if "2" in name]
    found = matrix.dense() * posterior.n_data
    wanted = [torch.kron(g, a), torch.kron(a, g)]
    assert sorted(found.diagonal().tolist()) == pytest.approx(sorted(wanted[0].diagonal().tolist()), rel=1e-9)
    close(torch.linalg.eigvalsh(found)[-6:], torch.linalg.eigvalsh(wanted[0])[-6:], 1e-9)


def test_saved_chained_and_tuned(tmp_path: Any) -> None:
    model, (x, y, w) = network(), data()
    total, _ = dense(model, x, y, w)
    eye = torch.eye(len(total), dtype=F64)
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=True).fit((x, y, w))
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    assert again.weights and again.n_data == 7
    close(again.precision.dense(), posterior.precision.dense())
    for first in (posterior, again):
        chained = first.update((x, y, 0.5 * w))
        close(chained.precision.dense(), 1.5 * total + eye)
        assert chained.n_data == 14
    v = torch.randn(len(total), dtype=F64, generator=rng(5))
    close(lk.curvature.ggn_vector_product(model, "categorical", (x, y, w), v, weights=True), total @ v / 7, 1e-9)

    grid = {"n_data": [7.0], "prior_precision": [0.5, 2.0, 8.0]}
    counts = torch.tensor([1, 0, 3, 2, 1, 1, 2, 1])
    index = torch.repeat_interleave(torch.arange(8), counts)
    scores = []
    for given, weighted in (((x, y, counts), True), ((x[index], y[index]), False)):
        one = lk.LaplacePosterior(model, "categorical", "full", weights=weighted)
        one.fit((x, y, torch.ones(8, dtype=F64)) if weighted else (x, y))
        result = one.tune(given, method="linearized", samples=2, generator=rng(), **grid)
        scores.append(result.best["objective"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)  # the weighted mean of the nll
    with pytest.raises(IncompatiblePair, match="one score an example"):
        posterior.tune((x, y, w), objective="ece", generator=rng(), samples=2, **grid)


def weighted_mean(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w * F.cross_entropy(model(x), y, reduction="none")).sum() / (w > 0).sum()


@pytest.mark.parametrize("maker", [lk.optim.GaussNewton, lk.optim.HessianFree])
def test_optimisers_descend_the_weighted_loss(maker: Any) -> None:
    model, (x, y, w) = network(), data()
    optimiser = maker(model, "categorical", weights=True)
    before = weighted_mean(model, x, y, w).detach()
    close(torch.as_tensor(optimiser.step((x, y, w))).detach().double(), before)
    for _ in range(3):
        optimiser.step((x, y, w))
    assert float(weighted_mean(model, x, y, w).detach()) < float(before)


@pytest.mark.parametrize("name", ["kfac", "kflr", "kfra"])
def test_a_step_of_whole_weights_is_that_of_the_loss(name: str) -> None:
    preset = getattr(lk.optim, name, None)
    if preset is None:
        pytest.skip("no such preset")
    (x, y, _) = data()
    ones, none = network(), network()
    preset(ones, "categorical", weights=True, generator=rng()).step((x, y, torch.ones(8)))
    preset(none, "categorical", generator=rng()).step(x, y)
    for a, b in zip(ones.parameters(), none.parameters(), strict=True):
        close(a.detach(), b.detach(), 1e-9)


def test_weights_of_regressions_and_losses() -> None:
    """Weight ``1/s²`` at σ = 1 is known noise ``s``, but for the constants in the density."""
    model, (x, _, w) = network(2), data()
    y = torch.randn(8, 2, dtype=F64, generator=rng(7))
    y[2, 1] = math.nan
    w = w + 0.1
    weighted = lk.LaplacePosterior(model, "gaussian", "full", weights=True).fit((x, y, w))
    known = lk.LaplacePosterior(model, "gaussian", "full").fit((x, (y, w.rsqrt())))
    close(weighted.precision.dense(), known.precision.dense(), 1e-9)

    def squares(z: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (z - t).square().sum(-1)

    y = torch.nan_to_num(y)
    loss = lk.LaplacePosterior(model, FromLoss(squares), "full", weights=True).fit((x, y, w))
    direct = lk.LaplacePosterior(model, "gaussian", "full", weights=True).fit((x, y, w))
    close(loss.precision.dense(), direct.precision.dense(), 1e-9)
    both = lk.LaplacePosterior(model, Gaussian([0.5, 1.5]), "full", weights=True).fit((x, (y, torch.ones(8, 2)), w))
    close(both.precision.dense(), direct.precision.dense(), 1e-9)
    one = lk.LaplacePosterior(model, Gaussian(0.7), "full", weights=True).fit((x, y, w))
    one.likelihood = Gaussian(1.3)
    fresh = lk.LaplacePosterior(model, Gaussian(1.3), "full", weights=True).fit((x, y, w))
    close(one.precision.dense(), fresh.precision.dense(), 1e-9)
    close(one.log_evidence().detach(), fresh.log_evidence().detach(), 1e-9)


def test_weights_of_examples_and_classes_multiply() -> None:
    model, (x, y, w) = network(), data()
    classes = torch.tensor([0.5, 2.0, 1.25], dtype=F64)
    posterior = lk.LaplacePosterior(model, Categorical(class_weights=classes), "full", weights=True).fit((x, y, w))
    total, _ = dense(model, x, y, w * classes[y])
    close(posterior.precision.dense(), total + torch.eye(len(total), dtype=F64))


def test_mappings_with_weights() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    (x, y, w), model = data(), Named()
    batch = {"x": x, "labels": y, "weights": w}
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=True).fit([batch])
    total, _ = dense(model, x, y, w)
    close(posterior.precision.dense(), total + torch.eye(len(total), dtype=F64))
    posterior.tune([batch], samples=2, n_data=[7.0], prior_precision=[0.5, 2.0], generator=rng())
    close(posterior.predict({"x": x}, method="map").probs, model(x).detach().softmax(1))
    with pytest.raises(ShapeMismatch, match="'weights'"):
        lk.LaplacePosterior(model, "categorical", weights=True).fit([{"x": x, "labels": y}])


def test_refusals_name_the_way_out() -> None:
    model, (x, y, w) = network(), data()

    def fit(batch: Any, weights: bool = True, **options: Any) -> None:
        lk.LaplacePosterior(model, "categorical", weights=weights, **options).fit([batch])

    with pytest.raises(ShapeMismatch, match=r"\(x, y, w\)"):
        fit((x, y))
    with pytest.raises(LaplaceKFError):
        fit((x, y, w), weights=False)
    with pytest.raises(ShapeMismatch, match="squeeze"):
        fit((x, y, w[:, None]))
    with pytest.raises(ShapeMismatch, match="do not fit 8 examples"):
        fit((x, y, w[:5]))
    with pytest.raises((ValueError, LaplaceKFError), match="negative"):
        fit((x, y, -w))
    with pytest.raises(NonFinite):
        fit((x, y, w.masked_fill(w == 0, math.nan)))
    with pytest.raises(ShapeMismatch, match="outputs, targets, weights"):
        fit((x, y, w), forward=lambda m, b: (m(b[0]), b[1]))
    with pytest.raises(ShapeMismatch, match="ignored"):
        fit((x, y, torch.zeros(8)))


@pytest.mark.parametrize("weighted", [False, True])
def test_empirical_estimator_takes_a_weight_once(weighted: bool) -> None:
    model, (x, y, w) = network(), data()
    classes = torch.tensor([0.5, 0.0, 1.25], dtype=F64)
    named = {name: p.detach() for name, p in model.named_parameters()}
    wanted: Any = 0.0
    for one, label, weight in zip(x, y, w, strict=True):

        def loss(v: dict[str, Tensor], one: Tensor = one, label: Tensor = label) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, v, (one[None],)), label[None])

        gradient = torch.cat([g.flatten() for g in torch.func.grad(loss)(named).values()])
        wanted = wanted + classes[label] * (weight if weighted else 1.0) * torch.outer(gradient, gradient)
    given = [(x, y, w) if weighted else (x, y)]
    found = lk.curvature.estimate(
        model, Categorical(class_weights=classes), given, "full", "empirical", weights=weighted
    )
    close(found.mean().dense() * found.n_data, wanted)
    assert found.n_data == int(((classes[y] > 0) & ((w > 0) | (not weighted))).sum())


def test_calibration_counts_examples_alike() -> None:
    model, (x, _, w) = network(2), data(40)
    y = torch.randn(40, 2, dtype=F64, generator=rng(7))
    y[3, 1] = math.nan
    posterior = lk.LaplacePosterior(model, "gaussian", "full", weights=True).fit((x, y, w))
    plain = lk.LaplacePosterior(model, "gaussian", "full", weights=True).fit((x, y, w)).calibrate((x, y))
    ones = posterior.calibrate((x, y, torch.ones(40, dtype=F64)))
    for a, b in zip(ones.predict(x).interval(0.5), plain.predict(x).interval(0.5), strict=True):
        assert a.shape == b.shape and bool(torch.isfinite(a).all())
    known = torch.stack(plain.predict(x, method="linearized").interval(0.5))
    close(torch.stack(ones.predict(x, method="linearized").interval(0.5)), known)
    with pytest.raises(IncompatiblePair, match="count alike"):
        posterior.calibrate((x, y, w))


def test_a_function_of_the_batch_reads_the_weights(tmp_path: Any) -> None:
    model, (x, y, w) = network(), data()
    total, _ = dense(model, x, y, w)
    expected = total + torch.eye(len(total), dtype=F64)
    batch = {"in": x, "out": y, "importance": w}
    read = {"inputs": lambda b: b["in"], "targets": lambda b: b["out"]}
    weights = lambda b: b["importance"]  # noqa: E731
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=weights, **read).fit([batch])
    close(posterior.precision.dense(), expected)
    posterior.tune([batch], samples=2, n_data=[7.0], prior_precision=[0.5, 2.0], generator=rng())
    assert posterior.predict(x, method="map").probs.shape == (8, 3)
    forward = lambda m, b: (m(b["in"]), b["out"])  # noqa: E731
    other = lk.LaplacePosterior(model, "categorical", "full", weights=weights, forward=forward).fit([batch])
    close(other.precision.dense(), expected)
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model, weights=weights, **read)
    assert again.update([batch]).n_data == 14
    optimiser = lk.optim.GaussNewton(network(), "categorical", weights=weights, **read)
    close(torch.as_tensor(optimiser.step(batch)).detach(), weighted_mean(network(), x, y, w).detach())
    with pytest.raises(IncompatiblePair, match="weights=lambda batch"):
        lk.LaplacePosterior(model, "categorical", weights=True, **read)
    with pytest.raises(ShapeMismatch, match="weights= does not work"):
        lk.LaplacePosterior(model, "categorical", weights=lambda b: b["none"], **read).fit([batch])


def test_arrays_have_weights_too() -> None:
    model, (x, y, w) = network(), data()
    tensors = lk.LaplacePosterior(model, "categorical", "full", weights=True).fit((x, y, w))
    given = (x.numpy(), y.numpy(), w.numpy())
    arrays = lk.LaplacePosterior(model, "categorical", "full", weights=True).fit(given)
    close(arrays.precision.dense(), tensors.precision.dense())
    wide = torch.nan_to_num(torch.randn(8, 3, dtype=F64, generator=rng(4)))
    wide[1, 2] = math.nan
    pair = lk.LaplacePosterior(model, "gaussian", "full").fit(x.numpy(), wide.numpy())
    close(pair.precision.dense(), lk.LaplacePosterior(model, "gaussian", "full").fit(x, wide).precision.dense())


class OwnLoss(nn.Module):
    """A model that returns its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_models_own_loss_knows_no_weights() -> None:
    (x, y, w), model = data(), OwnLoss()
    batch = {"x": x, "labels": y, "weights": w}
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=True).fit([batch])
    total, _ = dense(model.net, x, y, w)
    close(posterior.precision.dense(), total + torch.eye(len(total), dtype=F64))
    with pytest.raises(ShapeMismatch, match="own loss"):
        lk.LaplacePosterior(model, Categorical(label_smoothing=0.3), "full", weights=True).fit([batch])


@pytest.mark.parametrize("soft", [False, True])
def test_channels_first_with_weights_and_soft_targets(soft: bool) -> None:
    """A Conv1d's (N, C, T): class probabilities show along which axis they add up to 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Conv1d(2, 3, 1).double()
    x = torch.randn(4, 2, 3, dtype=F64, generator=rng(1))  # as many positions as classes
    labels = torch.tensor([[0, 1, 1], [2, 0, 1], [1, 1, 1], [0, 2, 0]])
    w = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=F64)
    targets = F.one_hot(labels, 3).double().movedim(-1, 1) * 0.7 + 0.1 if soft else labels
    settings: dict[str, Any] = {} if soft else {"layout": "channels_first"}
    posterior = lk.LaplacePosterior(model, "categorical", "full", weights=True, **settings).fit([(x, targets, w)])
    plain = nn.Linear(2, 3).double()
    with torch.no_grad():
        plain.weight.copy_(model.weight[:, :, 0])
        plain.bias.copy_(model.bias)  # type: ignore[arg-type]
    rows = x.movedim(1, -1)
    total: Any = 0.0
    for n in range(4):
        total = total + dense(plain, rows[n], labels[n], w[n].expand(3))[0]
    close(posterior.precision.dense(), total + torch.eye(9, dtype=F64), 1e-9)
    assert posterior.n_data == 3
    likelihood = posterior.likelihood
    assert likelihood.terms(targets) == 12


def test_terms_of_a_weighted_example_are_its_own_times_its_weight() -> None:
    w = torch.tensor([0.5, 2.0, 0.0], dtype=F64)
    y = torch.tensor([[1.0, 2.0], [1.0, math.nan], [3.0, 4.0]], dtype=F64)
    assert Gaussian().terms(WeightedTargets(y, w)) == 2 * 0.5 + 1 * 2.0
    labels = torch.tensor([[0, 1, -100], [2, 0, 1], [1, 1, 1]])
    assert Categorical().terms(WeightedTargets(labels, w)) == 2 * 0.5 + 3 * 2.0


def test_layouts_of_soft_targets_that_cannot_be_told() -> None:
    model = nn.Conv1d(2, 3, 1).double()
    x, even = torch.randn(4, 2, 3, dtype=F64), torch.full((4, 3, 3), 1 / 3, dtype=F64)
    with pytest.raises(ShapeMismatch, match="two layouts"):
        lk.LaplacePosterior(model, "categorical").fit([(x, even)])


@pytest.mark.parametrize("layout", [None, "channels_first"])
def test_volumes_and_conv1d_with_holes_and_known_noise(layout: str | None) -> None:
    shape = (3, 2, 4) if layout else (3, 2, 2, 2, 1)
    z = torch.randn(shape, dtype=F64, generator=rng(1))
    y = torch.randn(shape, dtype=F64, generator=rng(2))
    noise = torch.rand(shape, dtype=F64, generator=rng(3)) + 0.5
    y.view(-1)[3] = math.nan
    scale = torch.tensor([0.5, 1.5], dtype=F64)
    kept = ~y.isnan()
    by_channel = scale.reshape(1, 2, *[1] * (z.ndim - 2))
    for likelihood, targets, sigma in (
        (Gaussian(scale), y, by_channel.expand(shape)),
        (Gaussian(), (y, noise), noise),
        (Gaussian(), (y, noise[:, 0]), noise[:, :1].expand(shape)),
    ):
        rule = likelihood if layout is None else likelihood.with_layout(layout)
        elements = torch.distributions.Normal(z, sigma).log_prob(torch.nan_to_num(y)).where(kept, 0.0)
        close(rule.log_prob(z, targets), elements.flatten(1).sum(1))
        moved = rule.with_noise_scale(2.0 * float(rule.noise_scale or 1.0))
        assert getattr(moved, "layout", None) == layout
        assert torch.equal(rule.root_score(z, targets), rule.score(z, targets))
        prediction = rule.predict(z[None])
        close(prediction.log_prob(targets), elements.flatten(1).sum(1))
