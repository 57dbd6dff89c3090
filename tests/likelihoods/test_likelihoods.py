"""Likelihoods against float64 references: autograd, enumeration, loops and torch.distributions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td

from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    BernoulliMixture,
    Categorical,
    FromDistribution,
    FromLoss,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    from_positions,
    get_likelihood,
    to_positions,
)

F64 = torch.float64
SHAPES = [(4, 3), (3, 5, 3), (2, 3, 2, 3), (2, 3, 2, 1, 2)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=generator(seed))


def with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (shape[0], channels, *shape[2:]) if len(shape) > 3 else (*shape[:-1], channels)


def normal_rows(z: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(z, 0.7), 1)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


NATURAL = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(scale=0.7),
    "poisson": Poisson(),
}
#: every likelihood with the number of channels it is tried with
ALL: dict[str, tuple[Likelihood, int]] = {
    **{name: (likelihood, 3) for name, likelihood in NATURAL.items()},
    "heteroscedastic": (HeteroscedasticGaussian(), 2),
    "mixture-clip": (BernoulliMixture(), 3),
    "mixture-abs": (BernoulliMixture("abs"), 3),
    "mixture-em": (BernoulliMixture("em"), 3),
    "mixture-fisher": (BernoulliMixture("fisher"), 3),
    "from-normal": (FromDistribution(normal_rows), 3),
    "from-categorical": (FromDistribution(lambda z: td.Categorical(logits=z), "hessian"), 3),
    "from-bernoulli": (FromDistribution(lambda z: td.Bernoulli(logits=z), "fisher"), 3),
    "from-loss": (FromLoss(cross_entropy, support=torch.arange(3)), 3),
    "categorical-weighted": (Categorical(class_weights=[0.5, 2.0, 1.25], label_smoothing=0.1), 3),
    "gaussian-by-output": (Gaussian(scale=[0.5, 1.5, 0.8]), 3),
}


def case(name: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Likelihood, Tensor, Tensor]:
    likelihood, channels = ALL[name]
    outputs = randn(*with_channels(shape, channels), seed=seed)
    return likelihood, outputs, likelihood.sample(outputs, generator(seed + 1))


def dense(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """(N, P, P): Hessian of -log p of every example over its flattened outputs."""

    def loss(one: Tensor, y: Tensor) -> Tensor:
        return -likelihood.log_prob(one[None], y[None])[0]

    size = outputs[0].numel()
    return torch.stack(
        [torch.func.hessian(loss)(o, y).reshape(size, size) for o, y in zip(outputs, targets, strict=True)]
    )


def block_diagonal(matrices: Tensor, like: Tensor) -> Tensor:
    """(N, C, C) or (N, T, C, C) to (N, P, P) in the row-major order of the flattened outputs."""
    if matrices.ndim == 3:
        return matrices
    _, t, c, _ = matrices.shape
    index = from_positions(torch.arange(t * c).reshape(1, t, c), like[:1]).reshape(-1)
    full = torch.stack([torch.block_diag(*m) for m in matrices])
    return full[:, index][:, :, index]


def outer(root: Tensor) -> Tensor:
    """(V, N, ...) to (N, P, P)."""
    flat = root.flatten(2)
    return torch.einsum("vni,vnj->nij", flat, flat)


# ----------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_round_trip(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    positions = to_positions(x)
    assert positions.shape[0] == shape[0] and positions.shape[-1] == 3
    assert torch.equal(from_positions(positions, x), x)
    stacked = torch.stack([positions, 2 * positions])
    assert torch.equal(from_positions(stacked, x), torch.stack([x, 2 * x]))
    if len(shape) > 3:
        assert torch.equal(positions[1, -2], x.flatten(2)[1, :, -2])


@pytest.mark.parametrize("shape", [(3,), ()])
def test_other_layouts_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="channel"):
        to_positions(torch.zeros(shape))


# -------------------------------------------------------------------------------------- densities and derivatives


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ALL))
def test_log_prob_score_hessian_and_root(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = case(name, shape)
    likelihood.check(outputs, targets)
    leaf = outputs.clone().requires_grad_()
    value = likelihood.log_prob(leaf, targets)
    assert value.shape == (shape[0],) and value.dtype == F64
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    score = likelihood.score(outputs, targets)
    assert score.shape == outputs.shape
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-12)

    hessian = likelihood.hessian(outputs, targets)
    channels = ALL[name][1]
    positions = to_positions(outputs).shape[1]
    lead = (shape[0],) if len(shape) == 2 else (shape[0], positions)
    assert hessian.shape == (*lead, channels, channels)
    if name != "from-bernoulli":  # its elementwise log_prob is the built-in one; the oracle for it is below
        torch.testing.assert_close(
            block_diagonal(hessian, outputs), dense(likelihood, outputs, targets), rtol=1e-9, atol=1e-11
        )

    curvature = likelihood.curvature(outputs, targets)
    root = likelihood.hessian_root(outputs, targets)
    assert root.shape[1:] == outputs.shape
    torch.testing.assert_close(outer(root), block_diagonal(curvature, outputs), rtol=1e-10, atol=1e-12)
    if likelihood.natural:
        torch.testing.assert_close(curvature, hessian, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(likelihood.curvature(outputs), curvature)
    position_root = likelihood.position_root(outputs, targets)
    k = position_root.shape[0]
    assert position_root.shape == (k, shape[0], positions, channels)
    assert root.shape[0] == (k if len(shape) == 2 else k * positions)
    if len(shape) > 2:
        column = to_positions(root[2 * k + k - 1])  # the last root column of position 2, and nothing elsewhere
        torch.testing.assert_close(column[:, 2], position_root[-1, :, 2])
        assert not column[:, :2].any() and not column[:, 3:].any()


def test_constants_of_the_densities() -> None:
    z, sigma = randn(4, 3), 0.7
    y = randn(4, 3, seed=5)
    counts = torch.tensor([0.0, 2.0, 7.0], dtype=F64).expand(4, 3)
    expected = {
        Gaussian(sigma): (td.Normal(z, sigma).log_prob(y).sum(1), y),
        Poisson(): (td.Poisson(z.exp()).log_prob(counts).sum(1), counts),
        Bernoulli(): (td.Bernoulli(logits=z).log_prob((y > 0).to(F64)).sum(1), (y > 0)),
        Categorical(): (td.Categorical(logits=z).log_prob(torch.tensor([0, 1, 2, 1])), torch.tensor([0, 1, 2, 1])),
    }
    for likelihood, (reference, targets) in expected.items():
        torch.testing.assert_close(likelihood.log_prob(z, targets), reference)
    z2 = randn(4, 2)
    reference = td.Normal(z2[:, :1], (0.5 * z2[:, 1:]).exp()).log_prob(y[:, :1]).sum(1)
    torch.testing.assert_close(HeteroscedasticGaussian().log_prob(z2, y[:, :1]), reference)


def test_soft_bernoulli_targets() -> None:
    z, y = randn(4, 3), torch.rand(4, 3, dtype=F64, generator=generator())
    reference = -torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(z, y), reference)
    torch.testing.assert_close(Bernoulli().score(z, y), y - torch.sigmoid(z))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*NATURAL, "heteroscedastic", "mixture-clip", "mixture-fisher"])
def test_ignored_targets_contribute_nothing(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = case(name, shape)
    if likelihood.ignore_index is None:
        likelihood = copy.copy(likelihood)
        likelihood.ignore_index = -100
    drop = torch.rand(targets.shape, generator=generator(3)) < 0.4
    drop[0], drop[-1] = True, False  # a whole example is ignored, another kept
    holes = targets.masked_fill(drop, -100)
    leaf = outputs.clone().requires_grad_()
    value = likelihood.log_prob(leaf, holes)
    assert value[0] == 0
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(likelihood.score(outputs, holes), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        block_diagonal(likelihood.hessian(outputs, holes), outputs),
        dense(likelihood, outputs, holes),
        rtol=1e-9,
        atol=1e-11,
    )
    curvature = block_diagonal(likelihood.curvature(outputs, holes), outputs)
    torch.testing.assert_close(outer(likelihood.hessian_root(outputs, holes)), curvature, rtol=1e-10, atol=1e-12)
    assert not curvature[0].any() and curvature.any()
    noise = torch.ones(2, shape[0], to_positions(outputs).shape[1], likelihood.root_width(outputs), dtype=F64)
    product = likelihood.root_product(outputs, noise, holes)
    assert not product[:, 0].any() and product.any()
    # what is kept has the values of a batch without holes
    full = block_diagonal(likelihood.curvature(outputs, targets), outputs)
    kept = curvature.diagonal(dim1=1, dim2=2) != 0
    torch.testing.assert_close(curvature.diagonal(dim1=1, dim2=2)[kept], full.diagonal(dim1=1, dim2=2)[kept])


@pytest.mark.parametrize("name", ["heteroscedastic", "mixture-fisher", "from-normal", "from-bernoulli"])
def test_fisher_without_targets(name: str) -> None:
    likelihood, outputs, targets = case(name, (3, 2, 3))
    torch.testing.assert_close(likelihood.curvature(outputs), likelihood.curvature(outputs, targets))


def test_heteroscedastic_fisher_is_the_mean_hessian() -> None:
    # The Hessian is quadratic in the standardised residual, so three-point Gauss-Hermite quadrature is exact.
    z = randn(5, 2)
    likelihood = HeteroscedasticGaussian()
    total = torch.zeros(5, 2, 2, dtype=F64)
    for node, weight in [(0.0, 2 / 3), (math.sqrt(3.0), 1 / 6), (-math.sqrt(3.0), 1 / 6)]:
        total += weight * likelihood.hessian(z, z[:, :1] + node * (0.5 * z[:, 1:]).exp())
    torch.testing.assert_close(likelihood.curvature(z), total)
    torch.testing.assert_close(
        likelihood.curvature(z), torch.diag_embed(torch.stack([(-z[:, 1]).exp(), torch.full((5,), 0.5, dtype=F64)], 1))
    )
    with pytest.raises(IncompatiblePair, match="targets"):
        likelihood.hessian(z)


def enumerated_fisher(likelihood: Likelihood, z: Tensor, labels: list[Tensor]) -> Tensor:
    total = torch.zeros(z.shape[0], z.shape[1], z.shape[1], dtype=z.dtype)
    for y in labels:
        score = likelihood.score(z, y)
        total += likelihood.log_prob(z, y).exp()[:, None, None] * score[:, :, None] * score[:, None, :]
    return total


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "mixture-fisher"])
def test_fisher_by_enumeration(name: str) -> None:
    n, c = 3, 2 if name == "poisson" else 3
    likelihood, z = ALL[name][0], 0.7 * randn(n, c)
    if name in ("categorical", "mixture-fisher"):
        labels = [torch.full((n,), k) for k in range(3 if name == "categorical" else 2)]
    else:
        values = range(40 if name == "poisson" else 2)
        labels = [torch.tensor(y).to(F64).expand(n, c) for y in itertools.product(values, repeat=c)]
    torch.testing.assert_close(likelihood.curvature(z), enumerated_fisher(likelihood, z, labels), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- mixture of classifiers


@pytest.mark.parametrize("y", [0, 1])
def test_mixture_of_bernoulli_classifiers(y: int) -> None:
    z = 2.0 * randn(6, 3)
    targets = torch.full((6,), y)

    def loss(one: Tensor) -> Tensor:
        gate, second, third = torch.sigmoid(one)
        p = gate * second + (1 - gate) * third
        return -torch.log(p if y else 1 - p)

    exact = torch.stack([torch.func.hessian(loss)(one) for one in z])
    hessian = BernoulliMixture().hessian(z, targets)
    torch.testing.assert_close(hessian, exact, rtol=1e-9, atol=1e-12)
    values, vectors = torch.linalg.eigh(exact)
    assert values.min() < 0 < values.max()
    rebuilt = {
        "clip": vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT,
        "abs": vectors @ torch.diag_embed(values.abs()) @ vectors.mT,
    }
    gate, second, third = torch.sigmoid(z).unbind(1)
    q2, q3 = (second, third) if y else (1 - second, 1 - third)
    r = gate * q2 / (gate * q2 + (1 - gate) * q3)
    rebuilt["em"] = torch.diag_embed(
        torch.stack([gate * (1 - gate), r * second * (1 - second), (1 - r) * third * (1 - third)], 1)
    )
    gradients = torch.stack([torch.func.grad(loss)(one) for one in z])
    p_y = torch.stack([(-loss(one)).exp() for one in z])
    other = -gradients * (p_y / (1 - p_y))[:, None]  # scores have mean zero under the model
    rebuilt["fisher"] = (
        p_y[:, None, None] * gradients[:, :, None] * gradients[:, None, :]
        + (1 - p_y)[:, None, None] * other[:, :, None] * other[:, None, :]
    )
    for treatment, expected in rebuilt.items():
        likelihood = BernoulliMixture(curvature=treatment)
        torch.testing.assert_close(likelihood.curvature(z, targets), expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(outer(likelihood.hessian_root(z, targets)), expected, rtol=1e-8, atol=1e-12)
        assert likelihood.needs_targets == (treatment != "fisher")
    assert BernoulliMixture("fisher").position_root(z).shape[0] == 1 == BernoulliMixture("fisher").root_width(z)
    torch.testing.assert_close(
        BernoulliMixture().log_prob(z, targets[:, None]), BernoulliMixture().log_prob(z, targets)
    )
    image, pixels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.ones(2, 4, 5)
    torch.testing.assert_close(
        BernoulliMixture().log_prob(image, pixels[:, None]), BernoulliMixture().log_prob(image, pixels)
    )
    with pytest.raises(IncompatiblePair, match="targets"):
        BernoulliMixture().hessian_root(z)
    with pytest.raises(UnknownName, match="'clip'"):
        BernoulliMixture(curvature="clipp")


# --------------------------------------------------------------------------------------------------- categorical root


def loop_root(p: list[float]) -> list[list[float]]:
    """Tanabe & Sagae, entry by entry with exactly rounded tail sums."""
    c = len(p)
    q = [math.fsum(p[k + 1 :]) for k in range(c)]
    root = [[0.0] * (c - 1) for _ in range(c)]
    for k in range(c - 1):
        before = 1.0 if k == 0 else q[k - 1]
        root[k][k] = math.sqrt(p[k]) * math.sqrt(q[k] / before) if before else 0.0
        for j in range(k + 1, c):
            root[j][k] = -(p[j] / q[k]) * root[k][k] if q[k] else 0.0
    return root


def exact_curvature(p: list[float]) -> Tensor:
    c = len(p)
    rows = [[-p[i] * p[j] for j in range(c)] for i in range(c)]
    for i in range(c):
        rows[i][i] = p[i] * math.fsum(p[:i] + p[i + 1 :])
    return torch.tensor(rows, dtype=F64)


def check_categorical(z: Tensor) -> None:
    likelihood = Categorical()
    p = torch.softmax(z, 0).tolist()
    root = likelihood.position_root(z[None])[:, 0, 0].mT
    expected = torch.tensor(loop_root(p), dtype=F64)
    assert root.shape == expected.shape and torch.isfinite(root).all()
    torch.testing.assert_close(root, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))
    curvature = exact_curvature(p)
    tolerance = 1e-12 * float(curvature.abs().max()) + 1e-300
    torch.testing.assert_close(root @ root.mT, curvature, rtol=0, atol=tolerance)
    torch.testing.assert_close(likelihood.hessian(z[None])[0], curvature, rtol=0, atol=tolerance)
    noise = torch.eye(len(p), dtype=F64).reshape(len(p), 1, 1, len(p))
    square = likelihood.root_product(z[None], noise)[:, 0]
    torch.testing.assert_close(square.mT @ square, curvature, rtol=0, atol=tolerance)


@pytest.mark.parametrize("classes", [2, 3, 10, 200])
def test_categorical_root_against_loops(classes: int) -> None:
    check_categorical(randn(classes, seed=classes))
    check_categorical(8.0 * randn(classes, seed=classes))
    for hot in (0, classes // 2, classes - 1):
        z = torch.full((classes,), -50.0, dtype=F64)
        z[hot] = 50.0
        check_categorical(z)
        check_categorical(-z)
        check_categorical(1e4 * z)  # probabilities underflow to exact zeros


def test_categorical_root_with_a_thousand_classes() -> None:
    z = 3.0 * randn(1, 1000)
    root = Categorical().position_root(z)[:, 0, 0]
    p = torch.softmax(z[0], 0)
    torch.testing.assert_close(root.mT @ root, torch.diag(p) - torch.outer(p, p), rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=12))
def test_categorical_root_property(logits: list[float]) -> None:
    check_categorical(torch.tensor(logits, dtype=F64))


def test_nearly_one_hot_in_float32() -> None:
    z = torch.tensor([[0.0, 25.0, 3.0]])
    for result, reference in [
        (Categorical().curvature(z), Categorical().curvature(z.double())),
        (outer(Categorical().hessian_root(z)), Categorical().curvature(z.double())),
        (Categorical().score(z, torch.tensor([1])), Categorical().score(z.double(), torch.tensor([1]))),
    ]:
        torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------- noise and sampling


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ALL))
def test_root_product_with_identity_noise(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = case(name, shape)
    positions, width = to_positions(outputs).shape[1], likelihood.root_width(outputs)
    noise = torch.eye(width, dtype=F64)[:, None, None, :].expand(width, shape[0], positions, width)
    seeds = likelihood.root_product(outputs, noise, targets)
    assert seeds.shape == (width, *outputs.shape)
    columns = to_positions(seeds.flatten(0, 1)).reshape(width, shape[0], positions, -1)
    matrices = torch.einsum("kntc,kntd->ntcd", columns, columns)
    matrices = matrices[:, 0] if len(shape) == 2 else matrices
    torch.testing.assert_close(matrices, likelihood.curvature(outputs, targets), rtol=1e-9, atol=1e-12)


def test_root_product_covariance() -> None:
    z = randn(2, 2, 4)
    noise = torch.randn(40_000, 2, 2, 4, dtype=F64, generator=generator(8))
    seeds = Categorical().root_product(z, noise).flatten(2)
    covariance = torch.einsum("sni,snj->nij", seeds, seeds) / 40_000
    torch.testing.assert_close(covariance, block_diagonal(Categorical().curvature(z), z), rtol=0, atol=6e-3)
    with pytest.raises(ShapeMismatch, match=r"\(samples, 2, 2, 4\)"):
        Categorical().root_product(z, noise[..., :3])


def test_sampled_frequencies() -> None:
    n = 40_000
    z = torch.tensor([[0.5, -1.0, 1.5]], dtype=F64)
    rows = z.expand(n, 3)
    labels = Categorical().sample(rows, generator(1))
    assert labels.dtype == torch.long and labels.shape == (n,)
    torch.testing.assert_close(
        torch.bincount(labels, minlength=3) / n, torch.softmax(z[0], 0).float(), rtol=0, atol=0.01
    )
    torch.testing.assert_close(Bernoulli().sample(rows, generator(1)).mean(0), torch.sigmoid(z[0]), rtol=0, atol=0.01)
    counts = Poisson().sample(rows, generator(1))
    torch.testing.assert_close(counts.mean(0), z[0].exp(), rtol=0.02, atol=0)
    torch.testing.assert_close(counts.var(0), z[0].exp(), rtol=0.05, atol=0)
    draws = Gaussian(0.5).sample(rows, generator(1))
    torch.testing.assert_close(draws.mean(0), z[0], rtol=0, atol=0.015)
    torch.testing.assert_close(draws.std(0), torch.full((3,), 0.5, dtype=F64), rtol=0.02, atol=0)
    draws = HeteroscedasticGaussian().sample(rows[:, :2], generator(1))
    assert draws.shape == (n, 1)
    torch.testing.assert_close(draws.std(), torch.tensor(math.exp(-0.5), dtype=F64), rtol=0.02, atol=0)
    s = torch.sigmoid(z[0])
    p = s[0] * s[1] + (1 - s[0]) * s[2]
    torch.testing.assert_close(BernoulliMixture().sample(rows, generator(1)).mean(), p, rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ALL))
def test_sampling_is_reproducible_and_private(name: str, shape: tuple[int, ...]) -> None:
    likelihood, channels = ALL[name]
    outputs = randn(*with_channels(shape, channels))
    before = torch.get_rng_state()
    first, again = likelihood.sample(outputs, generator(4)), likelihood.sample(outputs, generator(4))
    fresh = [likelihood.sample(outputs) for _ in range(8)]
    assert torch.equal(first, again)
    assert any(not torch.equal(first, other) for other in fresh)
    assert torch.equal(torch.get_rng_state(), before)
    likelihood.check(outputs, first)
    moving = generator(4)
    draws = [likelihood.sample(outputs, moving) for _ in range(8)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])


def test_mean_outer_score_of_samples_is_the_fisher() -> None:
    z = randn(1, 2, seed=3)
    for likelihood in (
        HeteroscedasticGaussian(),
        FromDistribution(lambda o: td.Normal(o[:, :1], (0.5 * o[:, 1:]).exp())),
    ):
        rows = z.expand(60_000, 2)
        score = likelihood.score(rows, likelihood.sample(rows, generator(2)))
        torch.testing.assert_close(score.mT @ score / 60_000, likelihood.curvature(z)[0], rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------- extreme outputs


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "name", ["categorical", "bernoulli", "mixture-clip", "mixture-abs", "mixture-em", "mixture-fisher"]
)
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    likelihood = ALL[name][0]
    z = torch.tensor(list(itertools.product([-1000.0, -50.0, 0.0, 50.0, 1000.0], repeat=3)), dtype=dtype)
    targets = likelihood.sample(z, generator())
    leaf = z.clone().requires_grad_()
    value = likelihood.log_prob(leaf, targets)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    results = [value, gradient, likelihood.score(z, targets), likelihood.hessian(z, targets)]
    results += [likelihood.curvature(z, targets), likelihood.hessian_root(z, targets)]
    batch = torch.stack([z, -z, z.flip(0)]).requires_grad_()
    prediction = likelihood.predict(batch)
    results += [prediction.probs, prediction.entropy, prediction.mutual_information, prediction.log_prob(targets)]
    results += torch.autograd.grad(prediction.entropy.sum() + prediction.log_prob(targets).sum(), batch)
    for result in results:
        assert torch.isfinite(result).all()


def test_masked_classes_give_no_nan() -> None:
    z = torch.tensor([[0.3, -math.inf, 1.0]], dtype=F64)
    assert torch.isfinite(Categorical().hessian_root(z)).all()
    batch = torch.stack([z, z]).requires_grad_()
    prediction = Categorical().predict(batch)
    (gradient,) = torch.autograd.grad(prediction.entropy.sum(), batch)
    assert prediction.probs[0, 1] == 0 and torch.isfinite(prediction.entropy).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*NATURAL, "heteroscedastic", "mixture-clip", "from-normal"])
def test_low_precision_outputs_compute_in_float32(name: str, dtype: torch.dtype) -> None:
    likelihood, outputs, _ = case(name, (4, 3))
    outputs = outputs.to(dtype)
    targets = likelihood.sample(outputs, generator())
    reference = outputs.double()
    value = likelihood.log_prob(outputs, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(),
        likelihood.log_prob(reference, targets.double() if targets.is_floating_point() else targets),
        rtol=1e-4,
        atol=1e-5,
    )
    assert likelihood.hessian_root(outputs, targets).dtype == torch.float32
    assert likelihood.score(outputs, targets).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("gaussian", (6, 2), (6,)),
        ("gaussian", (6, 1), (6,)),
        ("bernoulli", (6, 1), (6,)),
        ("poisson", (6, 1), (6,)),
        ("gaussian", (6, 2), (6, 1)),
        ("heteroscedastic", (6, 2), (6,)),
        ("heteroscedastic", (6, 2), (6, 2)),
        ("heteroscedastic", (6, 3), (6, 1)),
        ("categorical", (6, 3), (6, 1)),
        ("categorical", (6, 3), (5,)),
        ("categorical", (6, 4, 3), (6,)),
        ("categorical", (6, 1), (6,)),
        ("mixture-clip", (6, 3), (6, 3)),
        ("mixture-clip", (6, 2), (6,)),
        ("from-normal", (6, 3), (6,)),
        ("gaussian", (6,), (6,)),
    ],
)
def test_shapes_that_do_not_fit(name: str, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    likelihood = ALL[name][0]
    y = torch.zeros(targets, dtype=torch.long if name == "categorical" else F64)
    for method in (
        likelihood.check,
        likelihood.log_prob,
        likelihood.score,
        likelihood.hessian,
        likelihood.position_root,
    ):
        with pytest.raises(ShapeMismatch) as error:
            method(torch.zeros(outputs, dtype=F64), y)
        assert str(outputs) in str(error.value)
    if len(outputs) > 1 and name not in ("heteroscedastic", "mixture-clip") and outputs != (6, 1):
        assert str(targets) in str(error.value)


def test_missing_channel_has_a_hint() -> None:
    for likelihood in (Gaussian(), Bernoulli(), Poisson(), HeteroscedasticGaussian()):
        outputs = torch.zeros(6, 2 if isinstance(likelihood, HeteroscedasticGaussian) else 1)
        with pytest.raises(ShapeMismatch, match=r"\(6,\).*\(6, [12]\).*targets\[:, None\]"):
            likelihood.log_prob(outputs, torch.zeros(6))


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("categorical", torch.tensor([0, 3]), r"target 3 at index \(1,\) is outside 0\.\.2"),
        ("categorical", torch.tensor([-1, 0]), r"target -1 .* 0\.\.2"),
        ("categorical", torch.tensor([0.5, 1.0]), r"0\.\.2.*float32.*0\.5"),
        ("bernoulli", torch.tensor([[0.0, 1.0, 1.5], [0.0, 0.0, 0.0]]), r"1\.5.*\[0, 1\]"),
        ("poisson", torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]), r"-1\.0.*counts"),
        ("poisson", torch.tensor([[0.0, 1.5, 1.0], [0.0, 0.0, 0.0]]), r"1\.5.*counts"),
        ("mixture-clip", torch.tensor([0.0, 0.5]), r"0\.5.*\{0, 1\}"),
        ("from-bernoulli", torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), r"2\.0.*[Bb]oolean"),
    ],
)
def test_values_out_of_range(name: str, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALL[name][0].log_prob(torch.zeros(2, 3), targets)
    with pytest.raises(ValueError, match=message):
        ALL[name][0].predict(torch.zeros(2, 2, 3)).log_prob(targets)


@pytest.mark.parametrize("name", list(ALL))
def test_nan_targets(name: str) -> None:
    likelihood, outputs, targets = case(name, (4, 3))
    targets = targets.to(F64)
    targets[1] = math.inf if likelihood.nan_is_missing else math.nan
    with pytest.raises(NonFinite):
        likelihood.log_prob(outputs, targets)
    with pytest.raises(ValueError, match="inf" if likelihood.nan_is_missing else "nan"):
        likelihood.check(outputs, targets)


def test_other_bad_arguments() -> None:
    z = torch.zeros(2, 3)
    for scale in (0.0, -1.0, math.nan, math.inf, torch.tensor(-2.0)):
        with pytest.raises(ValueError, match="scale"):
            Gaussian(scale=scale)
    with pytest.raises(ShapeMismatch, match="0-dim"):
        Gaussian(scale=torch.ones(3, 3))
    with pytest.raises(ValueError, match="floating point"):
        Gaussian().log_prob(z.long(), z)
    with pytest.raises(IncompatiblePair, match="targets"):
        Gaussian().log_prob(z, None)  # type: ignore[arg-type]
    with pytest.raises(NonFinite):
        Categorical().sample(z + math.nan)
    with pytest.raises(NonFinite, match="outputs"):
        BernoulliMixture().hessian_root(z + math.nan, torch.zeros(2))
    with pytest.raises(ShapeMismatch, match="outputs"):
        Categorical().predict(z)
    with pytest.raises(ShapeMismatch, match="S >= 1"):
        Categorical().predict(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match="ignore_index"):
        Categorical(ignore_index=1.5)  # type: ignore[arg-type]


def test_integer_and_bool_targets_are_taken() -> None:
    z = randn(2, 3)
    bits = torch.tensor([[0, 1, -100], [1, 0, 1]])
    torch.testing.assert_close(Bernoulli().log_prob(z, bits), Bernoulli().log_prob(z, bits.to(F64)))
    torch.testing.assert_close(Bernoulli().log_prob(z, bits > 0), Bernoulli().log_prob(z, (bits > 0).to(F64)))
    labels = torch.tensor([1, 2], dtype=torch.uint8)
    torch.testing.assert_close(Categorical().log_prob(z, labels), Categorical().log_prob(z, labels.long()))
    # -100 in eight unsigned bits is 156, a class and not an ignored position
    wide = randn(1, 200)
    assert Categorical().log_prob(wide, torch.tensor([156], dtype=torch.uint8)) != 0


@pytest.mark.parametrize("name", [*NATURAL, "heteroscedastic", "mixture-clip"])
def test_empty_batches(name: str) -> None:
    likelihood, channels = ALL[name]
    z = torch.zeros(0, channels, dtype=F64)
    targets = likelihood.sample(z)
    assert likelihood.log_prob(z, targets).shape == (0,)
    assert likelihood.hessian_root(z, targets).shape[1:] == (0, channels)


def test_function_transforms() -> None:
    z, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    per_example = torch.func.vmap(lambda one, label: Categorical().log_prob(one[None], label[None])[0])
    torch.testing.assert_close(per_example(z, y), Categorical().log_prob(z, y))
    with torch.inference_mode():
        frozen = randn(4, 3)
        for name in ("from-categorical", "from-normal", "mixture-clip", "categorical"):
            likelihood = ALL[name][0]
            targets = likelihood.sample(frozen, generator())
            likelihood.score(frozen, targets)
            likelihood.hessian_root(frozen, targets)


# ------------------------------------------------------------------------------------------------- names and saving


def test_registered_names() -> None:
    assert set(LIKELIHOODS) == {
        "categorical", "bernoulli", "gaussian", "heteroscedastic_gaussian", "poisson", "bernoulli_mixture",
    }  # fmt: skip
    assert isinstance(get_likelihood("gaussian"), Gaussian)
    likelihood = Gaussian(2.0)
    assert get_likelihood(likelihood) is likelihood
    for bad in ("gausian", Gaussian, None):
        with pytest.raises(UnknownName, match="'gaussian'"):
            get_likelihood(bad)  # type: ignore[arg-type]


def test_configurations_round_trip() -> None:
    for likelihood in (
        Categorical(ignore_index=None),
        Bernoulli(),
        Gaussian(scale=torch.tensor(0.25)),
        HeteroscedasticGaussian(),
        Poisson(ignore_index=-1),
        BernoulliMixture("em"),
    ):
        config = json.loads(json.dumps(likelihood.to_config()))
        rebuilt = Likelihood.from_config(config)
        assert type(rebuilt) is type(likelihood) and rebuilt.to_config() == config
        assert repr(rebuilt) == repr(likelihood)
        assert pickle.loads(pickle.dumps(likelihood)).to_config() == config
        assert copy.deepcopy(likelihood).to_config() == config
    assert Gaussian(0.5).parameters() == {"scale": 0.5} and Categorical().parameters() == {}
    with pytest.raises(IncompatiblePair, match="load"):
        FromDistribution(normal_rows).to_config()
    with pytest.raises(UnknownName):
        Likelihood.from_config({"name": "nothing"})
    with pytest.raises(UnknownName):
        Likelihood.from_config({})
    with pytest.raises(ValueError, match="sigma"):
        Likelihood.from_config({"name": "gaussian", "sigma": 1.0})


def test_gaussian_scale_is_differentiable_and_settable() -> None:
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    likelihood = Gaussian(scale)
    z, y = randn(3, 2), randn(3, 2, seed=1)
    torch.autograd.gradcheck(lambda s: Gaussian(s).log_prob(z, y), (scale,))
    torch.autograd.gradcheck(lambda s: Gaussian(s).curvature(z), (scale,))
    torch.autograd.gradcheck(lambda s: Gaussian(s).hessian_root(z), (scale,))
    torch.autograd.gradcheck(lambda s: Gaussian(s).predict(torch.stack([z, -z])).log_prob(y), (scale,))
    assert likelihood.parameters() == {"scale": 0.7} and "0.7" in repr(likelihood)
    likelihood.scale = 2.0
    torch.testing.assert_close(likelihood.curvature(z), 0.25 * torch.eye(2, dtype=F64).expand(3, 2, 2))


# ------------------------------------------------------------------------------------------ any torch distribution


def test_from_distribution_agrees_with_the_built_in_ones() -> None:
    z = randn(4, 3)
    pairs = [
        (Categorical(), lambda o: td.Categorical(logits=o)),
        (Bernoulli(), lambda o: td.Independent(td.Bernoulli(logits=o), 1)),
        (Bernoulli(), lambda o: td.Bernoulli(logits=o)),
        (Gaussian(0.7), normal_rows),
        (Gaussian(0.7), lambda o: td.MultivariateNormal(o, 0.49 * torch.eye(3, dtype=o.dtype))),
        (Poisson(), lambda o: td.Independent(td.Poisson(o.exp()), 1)),
    ]
    for built_in, fn in pairs:
        y = built_in.sample(z, generator())
        for curvature in ("auto", "fisher", "hessian"):
            other = FromDistribution(fn, curvature)
            torch.testing.assert_close(other.log_prob(z, y), built_in.log_prob(z, y))
            torch.testing.assert_close(other.score(z, y), built_in.score(z, y))
            torch.testing.assert_close(other.hessian(z, y), built_in.hessian(z), rtol=1e-9, atol=1e-11)
            given_targets = (z, y) if curvature == "hessian" else (z,)
            torch.testing.assert_close(other.curvature(*given_targets), built_in.curvature(z), rtol=1e-9, atol=1e-11)
    z2 = randn(4, 2)
    fn = lambda o: td.Normal(o[:, 0], (0.5 * o[:, 1]).exp())  # noqa: E731
    heteroscedastic = HeteroscedasticGaussian()
    y = heteroscedastic.sample(z2, generator())
    torch.testing.assert_close(FromDistribution(fn).curvature(z2), heteroscedastic.curvature(z2))
    torch.testing.assert_close(FromDistribution(fn).hessian(z2, y[:, 0]), heteroscedastic.hessian(z2, y))


def test_from_distribution_fisher_by_quadrature() -> None:
    # Gamma(shape, rate) with log links: Fisher in (log a, log b) is [[a² ψ'(a), -a], [-a, a]].
    z = 0.5 * randn(5, 2)
    a = z[:, 0].exp()
    expected = torch.stack([a**2 * torch.special.polygamma(1, a), -a, -a, a], 1).reshape(-1, 2, 2)
    likelihood = FromDistribution(lambda o: td.Gamma(o[:, 0].exp(), o[:, 1].exp()), "fisher")
    torch.testing.assert_close(likelihood.curvature(z), expected, rtol=1e-8, atol=1e-10)


def test_from_distribution_without_an_exact_fisher() -> None:
    z = randn(4, 2)
    hidden_parameters = lambda o: td.TransformedDistribution(  # noqa: E731
        td.Normal(torch.zeros_like(o[:, 0]), 1.0), [td.AffineTransform(o[:, 0], o[:, 1].exp())]
    )
    for fn in (
        lambda o: td.StudentT(4.0, o[:, 0], o[:, 1].exp()),
        lambda o: td.Laplace(o[:, 0], o[:, 1].exp()),  # its divergence has a kink where it is needed
        hidden_parameters,  # its divergence ignores the parameters of the transform
    ):
        with pytest.raises(IncompatiblePair, match="curvature='hessian'"):
            FromDistribution(fn, "fisher").curvature(z)
        with pytest.raises(IncompatiblePair, match="targets"):
            FromDistribution(fn).curvature(z)
        y = randn(4, seed=2)
        hessian = FromDistribution(fn).hessian(z, y)
        torch.testing.assert_close(hessian, dense(FromDistribution(fn), z, y))
        values, vectors = torch.linalg.eigh(hessian)
        clipped = vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT
        for curvature in ("auto", "hessian"):
            likelihood = FromDistribution(fn, curvature)
            torch.testing.assert_close(likelihood.curvature(z, y), clipped)
            torch.testing.assert_close(outer(likelihood.hessian_root(z, y)), clipped)


def test_from_distribution_refuses_what_it_cannot_use() -> None:
    z = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(IncompatiblePair, match="Tensor"):
        FromDistribution(lambda o: o).log_prob(z, z)  # type: ignore[arg-type,return-value]
    with pytest.raises(ShapeMismatch, match="batch shape"):
        FromDistribution(lambda o: td.Normal(o.sum(), 1.0)).log_prob(z, z)
    with pytest.raises(ValueError, match="differentiably"):
        FromDistribution(lambda o: td.Normal(o.detach(), 1.0)).hessian(z, z)
    with pytest.raises(UnknownName, match="'fisher'"):
        FromDistribution(normal_rows, curvature="ggn")


# ------------------------------------------------------------------------------------------------------ predictions


def stack(name: str, shape: tuple[int, ...], samples: int = 5) -> tuple[Likelihood, Tensor, Tensor]:
    likelihood, channels = ALL[name]
    outputs = randn(samples, *with_channels(shape, channels), seed=7)
    return likelihood, outputs, likelihood.sample(outputs[0], generator(8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ALL))
def test_predictions_have_the_documented_shapes(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = stack(name, shape)
    outputs.requires_grad_()
    prediction = likelihood.predict(outputs, keep_samples=True)
    assert torch.equal(prediction.samples, outputs)
    n = shape[0]
    positions = {2: (n, 1), 3: shape[:2]}.get(len(shape), (n, *shape[2:]))
    assert prediction.position_entropy.shape == positions
    assert prediction.entropy.shape == prediction.mutual_information.shape == prediction.log_prob(targets).shape == (n,)
    assert (prediction.mutual_information >= 0).all() and (prediction.mutual_information > 0).any()
    channels = 1 if name.startswith("mixture") or name == "heteroscedastic" else 3
    for attribute in ("probs", "mean", "variance", "epistemic_variance"):
        if hasattr(prediction, attribute):
            assert getattr(prediction, attribute).shape == with_channels(shape, channels)
    distribution = prediction.distribution
    assert isinstance(distribution, td.Distribution) and distribution.batch_shape[0] == n
    distribution.sample()
    total = prediction.log_prob(targets).sum() + prediction.entropy.sum() + prediction.mutual_information.sum()
    (gradient,) = torch.autograd.grad(total, outputs)
    assert torch.isfinite(gradient).all() and gradient.any()
    assert "entropy" not in repr(prediction) and "samples=(5" in repr(prediction)

    bare = likelihood.predict(outputs)
    with pytest.raises(AttributeError, match="keep_samples"):
        _ = bare.samples
    # one sample: no epistemic part, the density of the outputs themselves
    single = likelihood.predict(outputs[:1])
    torch.testing.assert_close(single.log_prob(targets), likelihood.log_prob(outputs[0], targets))
    torch.testing.assert_close(single.mutual_information, torch.zeros(n, dtype=F64), rtol=0, atol=1e-12)
    if hasattr(single, "epistemic_variance"):
        assert not single.epistemic_variance.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ALL))
def test_prediction_agrees_with_its_distribution(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = stack(name, shape)
    prediction = likelihood.predict(outputs)
    distribution = prediction.distribution
    event = len(distribution.event_shape)
    y = targets.to(F64) if targets.is_floating_point() else targets
    if name.startswith("mixture"):
        y = y.reshape(with_channels(shape, 1))
    elif len(shape) > 3 and y.ndim == len(shape) and event < 3:
        y = y.movedim(1, -1)
    elements = distribution.log_prob(y).reshape(shape[0], -1)
    if name == "categorical-weighted":  # the distribution of labels knows neither weights nor smoothing
        every = distribution.logits.log_softmax(-1).reshape(shape[0], -1, 3)  # type: ignore[attr-defined]
        weights = torch.tensor([0.5, 2.0, 1.25], dtype=F64)
        elements = 0.9 * weights[y].reshape(shape[0], -1) * elements + 0.1 / 3 * (weights * every).sum(-1)
    torch.testing.assert_close(elements.sum(1), prediction.log_prob(targets))
    if hasattr(prediction, "variance"):
        layout = (lambda x: x.movedim(-1, 1)) if len(shape) > 3 else (lambda x: x)
        torch.testing.assert_close(layout(distribution.mean), prediction.mean)
        torch.testing.assert_close(layout(distribution.variance), prediction.variance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*NATURAL, "heteroscedastic", "mixture-clip"])
def test_predictive_density_leaves_out_ignored_targets(name: str, shape: tuple[int, ...]) -> None:
    likelihood, outputs, targets = stack(name, shape)
    if likelihood.ignore_index is None:
        likelihood = copy.copy(likelihood)
        likelihood.ignore_index = -100
    holes = targets.clone(memory_format=torch.contiguous_format)
    holes[0] = -100
    holes[1].view(-1)[0] = -100
    full, partial = (likelihood.predict(outputs).log_prob(y) for y in (targets, holes))
    assert partial[0] == 0 and partial[1] != full[1]
    torch.testing.assert_close(partial[2:], full[2:])
    single = likelihood.predict(outputs[:1]).log_prob(holes)
    torch.testing.assert_close(single, likelihood.log_prob(outputs[0], holes))


def test_categorical_prediction() -> None:
    outputs, y = randn(6, 4, 3), torch.tensor([0, 1, 2, -100])
    p = torch.softmax(outputs, -1)
    prediction = Categorical().predict(outputs)
    torch.testing.assert_close(prediction.probs, p.mean(0))
    torch.testing.assert_close(prediction.log_prob(y)[:3], p.mean(0)[range(3), range(3)].log())
    assert prediction.log_prob(y)[3] == 0
    entropy = td.Categorical(probs=p.mean(0)).entropy()
    torch.testing.assert_close(prediction.entropy, entropy)
    torch.testing.assert_close(prediction.mutual_information, entropy - td.Categorical(probs=p).entropy().mean(0))
    for missing in ("mean", "variance", "epistemic_variance"):
        with pytest.raises(AttributeError, match="it has probs"):
            getattr(prediction, missing)
    sure = torch.tensor([[[500.0, 0.0]], [[0.0, 500.0]]], dtype=F64)
    torch.testing.assert_close(Categorical().predict(sure).mutual_information, torch.tensor([math.log(2.0)], dtype=F64))
    torch.testing.assert_close(
        Categorical().predict(sure[:1]).log_prob(torch.tensor([1])), torch.tensor([-500.0], dtype=F64)
    )


def test_binary_predictions() -> None:
    outputs, y = randn(6, 4, 3), torch.tensor([[0.0, 1.0, -100.0]], dtype=F64).expand(4, 3)
    p = torch.sigmoid(outputs)
    prediction = Bernoulli().predict(outputs)
    mean = p.mean(0)
    torch.testing.assert_close(prediction.probs, mean)
    torch.testing.assert_close(prediction.entropy, td.Bernoulli(mean).entropy().sum(1))
    torch.testing.assert_close(prediction.log_prob(y), (1 - mean[:, 0]).log() + mean[:, 1].log())
    assert isinstance(prediction.distribution, td.Independent)

    gate, second, third = p.unbind(-1)
    mixed = (gate * second + (1 - gate) * third).mean(0)
    prediction = BernoulliMixture().predict(outputs)
    torch.testing.assert_close(prediction.probs, mixed[:, None])
    torch.testing.assert_close(prediction.log_prob(torch.ones(4)), mixed.log())
    torch.testing.assert_close(prediction.log_prob(torch.zeros(4, 1)), (1 - mixed).log())


def test_gaussian_predictions_are_mixtures() -> None:
    outputs, y = randn(6, 4, 3), randn(4, 3, seed=1)
    prediction = Gaussian(0.3).predict(outputs)
    joint = td.Normal(outputs, 0.3).log_prob(y).sum(-1).exp().mean(0).log()
    torch.testing.assert_close(prediction.log_prob(y), joint)
    torch.testing.assert_close(prediction.mean, outputs.mean(0))
    torch.testing.assert_close(prediction.epistemic_variance, outputs.var(0, correction=0))
    torch.testing.assert_close(prediction.variance, outputs.var(0, correction=0) + 0.09)
    torch.testing.assert_close(
        prediction.entropy, td.Normal(outputs.mean(0), prediction.variance.sqrt()).entropy().sum(1)
    )
    assert isinstance(prediction.distribution, td.MixtureSameFamily)
    with pytest.raises(AttributeError, match="no 'probs'; it has epistemic_variance, mean, variance"):
        _ = prediction.probs
    far = Gaussian(1e-3).predict(outputs)
    assert torch.isfinite(far.log_prob(y + 1e3)).all()

    two = randn(6, 4, 2)
    prediction = HeteroscedasticGaussian().predict(two)
    noise = two[..., 1:].exp()
    torch.testing.assert_close(prediction.variance, two[..., :1].var(0, correction=0) + noise.mean(0))
    torch.testing.assert_close(
        prediction.log_prob(y[:, :1]),
        td.Normal(two[..., 0], noise[..., 0].sqrt()).log_prob(y[:, 0]).exp().mean(0).log(),
    )


def test_poisson_prediction() -> None:
    outputs = torch.tensor([[[-2.0, 1.0], [3.0, 12.0]], [[-1.0, 2.5], [4.0, 12.5]]], dtype=F64)
    prediction = Poisson().predict(outputs)
    rate = outputs.exp()
    torch.testing.assert_close(prediction.variance, rate.mean(0) + rate.var(0, correction=0))
    k = torch.arange(400, dtype=F64).reshape(-1, 1, 1, 1)
    p = td.Poisson(rate).log_prob(k).exp()
    total = -torch.xlogy(p.mean(1), p.mean(1)).sum(0)
    single = -torch.xlogy(p, p).sum(0).mean(0)
    torch.testing.assert_close(prediction.position_entropy[0], total[:1].sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(prediction.mutual_information[0], (total - single)[0].sum(), rtol=1e-9, atol=1e-11)
    large = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * prediction.variance[1, 1].log()
    torch.testing.assert_close(prediction.entropy[1], total[1, 0] + large)
    same = Poisson().predict(torch.full((3, 1, 1), math.log(100.0), dtype=F64))
    assert abs(float(same.entropy) - 0.5 * math.log(2 * math.pi * math.e * 100.0)) < 1e-2


def test_from_distribution_predictions() -> None:
    outputs, labels = randn(6, 4, 3), torch.tensor([0, 1, 2, 1])
    reference = Categorical().predict(outputs)
    prediction = FromDistribution(lambda o: td.Categorical(logits=o)).predict(outputs)
    for attribute in ("probs", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(prediction, attribute), getattr(reference, attribute))
    torch.testing.assert_close(prediction.log_prob(labels), reference.log_prob(labels))
    with pytest.raises(AttributeError, match="probs"):
        _ = prediction.mean

    y = randn(4, 3, seed=1)
    reference = Gaussian(0.7).predict(outputs)
    prediction = FromDistribution(normal_rows).predict(outputs)
    for attribute in ("mean", "variance", "epistemic_variance", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(prediction, attribute), getattr(reference, attribute))
    torch.testing.assert_close(prediction.log_prob(y), reference.log_prob(y))
    draws = prediction.distribution.sample((4000,))
    assert draws.shape == (4000, 4, 3)
    torch.testing.assert_close(draws.var(0), prediction.variance, rtol=0.15, atol=0)

    cauchy = FromDistribution(lambda o: td.Cauchy(o[:, 0], 1.0)).predict(outputs)
    assert not hasattr(cauchy, "mean")
    assert torch.isfinite(cauchy.log_prob(y[:, 0])).all()


def test_predictions_can_be_pickled() -> None:
    outputs = randn(3, 4, 3)
    for likelihood in NATURAL.values():
        prediction = likelihood.predict(outputs)
        again = pickle.loads(pickle.dumps(prediction))
        torch.testing.assert_close(again.entropy, prediction.entropy)
