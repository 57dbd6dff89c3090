"""Draws of weights and of pre-activations against dense Gaussians in float64, and the choice between the two."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import laplace_kf as lk
from laplace_kf.predictive import activations, cost, weights
from tests.cases import binary, build, labels, mlp, normal, rng

KINDS = [("diag", "exact"), ("kron", "exact"), ("kron", "factored"), ("kron", "balanced"), ("ekfac", "exact")]
IDS = ["diag", "exact", "factored", "balanced", "ekfac"]
over_kinds = pytest.mark.parametrize(("structure", "damping"), KINDS, ids=IDS)
DRAWS = 4000


def posterior(model: nn.Module, inputs: int = 3, likelihood: str = "categorical", **options: Any) -> Any:
    """A posterior fitted to random data; the first layer of ``model`` takes ``inputs``, its last gives 3."""
    x = normal(9, inputs, seed=5)
    y = labels(3, 9, seed=6) if likelihood == "categorical" else normal(9, 3, seed=6)
    options = {"prior_precision": 2.0, **options}
    return lk.LaplacePosterior(model, likelihood, **options).fit([(x, y)])


def outputs(post: Any, x: Tensor, space: str, samples: int = DRAWS, seed: int = 1, **options: Any) -> Tensor:
    """Outputs ``(S, N, C)`` of ``predict`` by weight or pre-activation draws."""
    options.setdefault("method", "mc")
    return post.predict(x, samples=samples, space=space, generator=rng(seed), keep_samples=True, **options).samples


def by_hand(post: Any, x: Tensor, samples: int = DRAWS, seed: int = 2) -> Tensor:
    """Outputs ``(S, N, C)`` at weights drawn through a dense Cholesky factor of the precision."""
    factor = torch.linalg.cholesky(post.precision.dense())
    noise = torch.randn(factor.shape[0], samples, generator=rng(seed), dtype=torch.float64)
    flat = torch.linalg.solve_triangular(factor.T, noise, upper=True).T
    drawn, start = {}, 0
    for name, value in post.mean.items():
        drawn[name] = value + flat[:, start : start + value.numel()].reshape(samples, *value.shape)
        start += value.numel()
    model = copy.deepcopy(post.model).eval()
    with torch.no_grad():
        return torch.vmap(lambda w: functional_call(model, w, (x,)))(drawn)


def same_distribution(found: Tensor, wanted: Tensor) -> None:
    """Means and covariances of every example's outputs ``(S, N, C)`` agree within five standard errors."""
    assert found.shape == wanted.shape
    gap = (found.mean(0) - wanted.mean(0)) / ((found.var(0) + wanted.var(0)) / len(found)).sqrt()
    assert float(gap.abs().max()) < 5
    products = [(z - z.mean(0)).unsqueeze(-1) * (z - z.mean(0)).unsqueeze(-2) for z in (found, wanted)]
    spread = ((products[0].var(0) + products[1].var(0)) / len(found)).sqrt()
    assert float(((products[0].mean(0) - products[1].mean(0)) / spread).abs().max()) < 5


def covariance_of(draws: Tensor) -> Tensor:
    """Covariance of ``(S, d)``."""
    return torch.cov(draws.T)


# ------------------------------------------------------------------------------------------------ both spaces


@over_kinds
@pytest.mark.parametrize("space", ["weights", "activations"])
def test_both_spaces_have_the_distribution_of_dense_draws(structure: str, damping: str, space: str) -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)), structure=structure, damping=damping)
    x = normal(4, 3, seed=50)
    same_distribution(outputs(post, x, space), by_hand(post, x))


@over_kinds
@pytest.mark.parametrize("bias", [True, False])
def test_the_covariance_of_a_linear_model_is_the_closed_form(structure: str, damping: str, bias: bool) -> None:
    """``Cov(W [a; 1]) = (I ⊗ [a; 1]ᵀ) Λ⁻¹ (I ⊗ [a; 1])``; draws at different examples are independent."""
    post = posterior(build(lambda: nn.Linear(4, 3, bias=bias)), 4, structure=structure, damping=damping)
    x = normal(2, 4, seed=50)
    jacobian = torch.cat([torch.kron(torch.eye(3, dtype=torch.float64), row[None]) for row in x])
    if bias:
        jacobian = torch.cat([jacobian, torch.eye(3, dtype=torch.float64).repeat(2, 1)], 1)
    joint = jacobian @ torch.linalg.inv(post.precision.dense()) @ jacobian.T
    apart = torch.block_diag(joint[:3, :3], joint[3:, 3:])
    with torch.no_grad():
        mean = post.model(x).reshape(-1)
    for space, wanted in (("weights", joint), ("activations", apart)):
        draws = outputs(post, x, space, 8_000).reshape(-1, 6)
        sigma = wanted.diagonal().sqrt()
        assert float(((draws.mean(0) - mean) / sigma).abs().max()) < 5 / 8_000**0.5
        error = (covariance_of(draws) - wanted) / (sigma[:, None] * sigma)
        assert float(error.abs().max()) < 5 * (2 / 8_000) ** 0.5


@over_kinds
def test_the_noise_of_a_block_is_exact(structure: str, damping: str) -> None:
    """Without Monte Carlo: the linear map from ε to one example's pre-activation, times its transpose."""
    post = posterior(build(lambda: nn.Linear(4, 3)), 4, structure=structure, damping=damping)
    ((block, matrix),) = post.precision.entries
    layer = activations._Linear(block, matrix, 1 / matrix.grid[0])
    a = normal(1, 4, seed=3)
    columns = layer.noise(a.expand(3, 4), torch.eye(3, dtype=torch.float64))  # row k: the image of the k-th unit ε
    eye = torch.eye(3, dtype=torch.float64)
    jacobian = torch.cat([torch.kron(eye, a), eye], 1)
    wanted = jacobian @ torch.linalg.inv(post.precision.dense()) @ jacobian.T
    torch.testing.assert_close(columns.T @ columns, wanted, rtol=1e-10, atol=1e-12)


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Elementwise(nn.Module):
    """A shift and a scale of its own, and a product from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.b, self.s = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.s * torch.tanh(x @ self.w + self.b))


class Residual(nn.Module):
    """An input that is used after a drawn layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + torch.tanh(self.first(x)))


class Branching(nn.Module):
    """Control flow that depends on values: no batching rule can exist."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h) if float(h.sum()) < 1e9 else h)


class WithoutBranch(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.pairs(
    make=[norms, Elementwise, Residual, WithoutBranch], structure=["kron", "diag"], space=["weights", "activations"]
)
def test_other_layers(make: Any, structure: str, space: str) -> None:
    post = posterior(build(make), structure=structure)
    x = normal(3, 3, seed=50)
    same_distribution(outputs(post, x, space), by_hand(post, x))


@pytest.mark.parametrize("space", ["weights", "activations"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_a_branch_changes_no_draw(structure: str, space: str) -> None:
    """Draws that are run one by one are those that run together, whose distribution is tested above."""
    x = normal(3, 3, seed=50)
    apart, together = (
        outputs(posterior(build(m), structure=structure), x, space, 50) for m in (Branching, WithoutBranch)
    )
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prior", [{"*weight": 2.0, "*bias": 5.0}, {"0.*": 1.0, "*": 4.0}])
def test_unequal_priors(prior: dict[str, float]) -> None:
    """A prior that differs within a layer gives a basis that is not orthogonal, or none."""
    post = posterior(build(lambda: mlp(3, 5, 3)), prior_precision=prior)
    x = normal(4, 3, seed=50)
    same_distribution(outputs(post, x, "auto"), by_hand(post, x))


def test_a_selection_of_parameters() -> None:
    for patterns in (["2.weight"], ["*.bias"], ["0.*"]):
        post = posterior(build(lambda: mlp(3, 5, 3)), parameters=patterns)
        x = normal(4, 3, seed=50)
        for space in ("weights", "activations"):
            same_distribution(outputs(post, x, space), by_hand(post, x))


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_what_comes_before_the_last_layer_runs_once(space: str) -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)))
    post = posterior(model, parameters="last_layer")
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda m, i, o: calls.append(1))
    outputs(post, normal(4, 3, seed=50), space, 50)  # looks whether a model with a hook is a function, too
    first = len(calls)
    outputs(post, normal(4, 3, seed=50), space, 50)
    handle.remove()
    assert first <= 3 and len(calls) == first + 1
    same_distribution(outputs(post, normal(4, 3, seed=50), space), by_hand(post, normal(4, 3, seed=50)))


def test_draws_are_differentiable_in_the_input() -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    for space in ("weights", "activations"):
        x = normal(2, 3, seed=50).requires_grad_()
        post.predict(x, method="mc", samples=4, space=space, generator=rng(0)).probs[:, 0].sum().backward()
        shifted = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved[0, 0] += sign * 1e-5
            shifted.append(
                float(post.predict(moved, method="mc", samples=4, space=space, generator=rng(0)).probs[0, 0])
            )
        assert float(x.grad[0, 0]) == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-5)


def test_a_dead_input_without_a_bias_has_no_noise() -> None:
    post = posterior(build(lambda: nn.Linear(3, 3, bias=False)))
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    drawn = outputs(post, x, "activations", 5)
    drawn.sum().backward()
    assert float(drawn.detach().abs().max()) < 1e-100 and bool(torch.isfinite(x.grad).all())


# ------------------------------------------------------------------------------------------------ weights


@over_kinds
@pytest.mark.parametrize("count", [1, 3, 40])
def test_weight_draws_are_those_of_their_seeds(structure: str, damping: str, count: int) -> None:
    """Whatever the order of the products and the number of inputs, draw s uses the weights of seed s."""
    post = posterior(build(lambda: mlp(3, 5, 3)), structure=structure, damping=damping)
    x = normal(count, 3, seed=50)
    found = outputs(post, x, "weights", 6)
    seeds = lk.predictive.draw_seeds(6, rng(1))
    wanted = lk.predictive.sampled_outputs(post.model, None, post.mean, post.precision, seeds, x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs(post, x, "weights", 3), wanted[:3], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_the_memory_bound_changes_nothing(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    x = normal(4, 3, seed=50)
    together = outputs(post, x, space, 11)
    sizes: list[int] = []
    module = weights if space == "weights" else activations
    original = module.over_draws

    def counted(model: nn.Module, run: Any, stacked: dict[str, Tensor]) -> Tensor:
        sizes.append(next(iter(stacked.values())).shape[0])
        return original(model, run, stacked)

    monkeypatch.setattr(module, "over_draws", counted)
    each = 4 * 12 * 8 if space == "activations" else 2 * 38 * 8
    monkeypatch.setattr(module, "MEMORY_BYTES", 8 * each)
    torch.testing.assert_close(outputs(post, x, space, 11), together, rtol=1e-10, atol=1e-12)
    assert sum(sizes) == 11 and len(sizes) > 1


def test_few_inputs_make_no_weight() -> None:
    """The order of the products is the cheaper one, counted in multiply-adds."""
    eye = lk.operators.Basis.orthogonal(torch.eye(30)[None])
    square = lk.operators.Spectral(eye, eye, torch.ones(1, 30, 30), "square")
    assert weights.chain_is_cheaper(29, square) and not weights.chain_is_cheaper(30, square)
    assert weights.chain_is_cheaper(50, square, shared=10)
    plain = lk.operators.Basis.identity()
    assert not weights.chain_is_cheaper(1, lk.operators.Spectral(plain, plain, torch.ones(1, 30, 30), "diagonal"))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


def attention() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.unflatten(1, (-1, 2)))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.w(torch.tanh(self.w(x))))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.b, self.last = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.add_(self.b)
        return self.last(torch.tanh(h))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.unflatten(1, (-1, 2)))).sum(1))


REFUSED = [
    pytest.param(convolutional, 9, {}, "convolution", id="convolution"),
    pytest.param(attention, 12, {}, "packed|positions|reads", id="attention"),
    pytest.param(Recurrent, 4, {}, "", id="recurrent"),
    pytest.param(Tied, 4, {}, "several times", id="tied"),
    pytest.param(InPlace, 3, {}, "add_", id="in-place"),
    pytest.param(Sequence, 6, {}, "'first.weight' is used at 3 positions per example", id="sequence"),
    pytest.param(lambda: mlp(3, 4, 3), 3, {"structure": "full"}, "couples|factorises", id="full"),
    pytest.param(lambda: mlp(3, 4, 3), 3, {"structure": "layer"}, "couples|factorises", id="layer"),
    pytest.param(lambda: mlp(3, 4, 3), 3, {"structure": "lowrank", "rank": 5}, "factorises", id="lowrank"),
]


@pytest.mark.parametrize(("make", "inputs", "options", "shown"), REFUSED)
def test_what_pre_activations_cannot_do(make: Any, inputs: int, options: Any, shown: str) -> None:
    """Refused with a reason; the other two spaces still have the right distribution, or the seeds' weights."""
    post = posterior(build(make), inputs, **options)
    x = normal(1, inputs, seed=50)
    with pytest.raises(lk.errors.IncompatiblePair, match=shown) as caught:
        outputs(post, x, "activations", 3)
    assert 'space="weights"' in str(caught.value)
    seeds = lk.predictive.draw_seeds(5, rng(1))
    for n in (1, 4):
        x = normal(n, inputs, seed=51)
        wanted = lk.predictive.sampled_outputs(post.model, None, post.mean, post.precision, seeds, x)
        for space in ("weights", "auto"):
            torch.testing.assert_close(outputs(post, x, space, 5), wanted, rtol=1e-9, atol=1e-11)


def test_a_reason_is_not_given_for_what_can_be_done() -> None:
    post = posterior(build(norms))
    assert all(activations.refusal(block, matrix) is None for block, matrix in post.precision.entries)


# ------------------------------------------------------------------------------------------------ the choice


def big(inputs: int, width: int, outs: int, structure: str = "kron") -> Any:
    """The precision of an MLP with two hidden layers, without a fit: only shapes matter here."""
    view = lambda o, i: lk.layers.base.MatrixView((1, o, i), (0, 1, 2), (1, o, i))  # noqa: E731
    entries, names, shapes = [], [], []
    for k, (i, o) in enumerate([(inputs, width), (width, width), (width, outs)]):
        block = lk.tape.Block(f"{k}", (f"{k}.w", f"{k}.b"), ((o, i), (o,)), (1, o, i + 1), view(o, i), True)
        a = lk.operators.Basis.orthogonal(torch.empty(1, 1, 1).expand(1, i + 1, i + 1))
        g = lk.operators.Basis.orthogonal(torch.empty(1, 1, 1).expand(1, o, o))
        plain = lk.operators.Basis.identity()
        bases = (a, g) if structure == "kron" else (plain, plain)
        entries.append((block, lk.operators.Spectral(*bases, torch.ones(1, 1, 1).expand(1, o, i + 1), block.name)))
        names += block.parameters
        shapes += block.shapes
    return lk.operators.Blockwise(lk.tape.FlatLayout(tuple(names), tuple(shapes)), entries)


def test_auto_takes_pre_activations_for_one_input_and_weights_for_many() -> None:
    for structure in ("kron", "diag"):
        precision = big(784, 1024, 10, structure)
        assert cost.activations_are_cheaper(precision, 1, 30)
        assert cost.activations_are_cheaper(precision, 10, 30)
        assert not cost.activations_are_cheaper(precision, 1000, 30)
    one = [f(big(784, 1024, 10), 1, 30) for f in (cost.activation_cost, cost.weight_cost)]
    assert 20 * one[0] < one[1] * 5  # a single input does not cost a draw of the network's weights
    assert one[0] < 30 * 1_863_690 * cost.NOISE / 20


def test_the_cost_model_counts_products() -> None:
    precision = big(2, 3, 1)
    per_layer = [(3, 3), (3, 4), (1, 4)]  # (O, I)
    rows = [(i * i + 2 * o * i) * (4 if k else 1) * 5 + o * i + 4 * 5 * (o * o + cost.NOISE * o)
            for k, (o, i) in enumerate(per_layer)]  # fmt: skip
    assert cost.activation_cost(precision, 5, 4) == sum(rows)
    many = sum(4 * (cost.NOISE * o * i + o * i * i + o * o * i + 50 * o * i) for o, i in per_layer)
    assert cost.weight_cost(precision, 50, 4) == many


def test_auto_does_what_the_cost_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from laplace_kf.predictive import montecarlo

    post = posterior(build(lambda: mlp(3, 5, 3)))
    x = normal(4, 3, seed=50)
    for cheaper, space in ((True, "activations"), (False, "weights")):
        monkeypatch.setattr(montecarlo, "activations_are_cheaper", lambda *_, answer=cheaper: answer)
        found, wanted = (post.predict(x, "mc", samples=5, space=s, generator=rng(1)).probs for s in ("auto", space))
        assert torch.equal(found, wanted)
        assert torch.equal(outputs(post, x, "auto", 5), outputs(post, x, "weights", 5))  # kept samples are functions


# ------------------------------------------------------------------------------------------------ kinds of draws


@pytest.mark.parametrize("draws", ["antithetic", "sobol"])
@pytest.mark.parametrize("space", ["weights", "activations"])
def test_other_draws_have_the_same_mean_and_less_spread(draws: str, space: str) -> None:
    """Of the mean output of a nearly linear model, over repetitions; every single draw keeps its variance."""
    post = posterior(build(lambda: mlp(3, 5, 3)), prior_precision=200.0)
    x = normal(2, 3, seed=50)

    def means(kind: str) -> tuple[Tensor, Tensor]:
        runs = torch.stack([outputs(post, x, space, 16, seed, draws=kind) for seed in range(60)])
        return runs.mean(1), runs.reshape(-1, 2, 3)

    plain, plain_draws = means("independent")
    other, other_draws = means(draws)
    error = ((plain.var(0) + other.var(0)) / 60).sqrt()
    assert float(((plain.mean(0) - other.mean(0)) / error).abs().max()) < 5
    assert float((other_draws.var(0) / plain_draws.var(0) - 1).abs().max()) < 0.25
    assert float((other.var(0) / plain.var(0)).max()) < 0.5


def test_antithetic_pairs_cancel_in_a_linear_model() -> None:
    post = posterior(build(lambda: nn.Linear(3, 3)))
    x = normal(4, 3, seed=50)
    with torch.no_grad():
        wanted = post.model(x)
    for space in ("weights", "activations"):
        found = outputs(post, x, space, 10, draws="antithetic")
        torch.testing.assert_close(found.mean(0), wanted, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(found[0], wanted)


def test_sobol_points_end_at_21201_directions() -> None:
    draws = lk.predictive.DRAWS["sobol"](4, rng(0))
    like = torch.zeros((), dtype=torch.float64)
    with pytest.raises(lk.errors.IncompatiblePair, match="21201"):
        draws.normal(0, [(1, 21202)], like)
    found = torch.stack([draws.normal(k, [(3, 5), (3, 2)], like)[1] for k in range(4)])
    assert found.shape == (4, 3, 2) and bool(torch.isfinite(found).all())
    assert not torch.equal(found[:, 0], found[:, 1])  # examples are independent


def test_draws_do_not_depend_on_how_many_are_made() -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    x = normal(4, 3, seed=50)
    for kind in ("independent", "antithetic", "sobol"):
        for space in ("weights", "activations"):
            more, fewer = (outputs(post, x, space, s, draws=kind) for s in (9, 4))
            torch.testing.assert_close(more[:4], fewer, rtol=1e-10, atol=1e-12)


def test_unknown_draws() -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    with pytest.raises(lk.errors.UnknownName, match="antithetic"):
        post.predict(normal(1, 3), draws="antithetical")
    with pytest.raises(ValueError, match="at least 1"):
        post.predict(normal(1, 3), method="mc", samples=0)


# ------------------------------------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("space", ["weights", "activations", "auto"])
@pytest.mark.parametrize("draws", ["independent", "antithetic", "sobol"])
def test_reproducible_and_private(space: str, draws: str) -> None:
    post = posterior(build(norms))
    x = normal(4, 3, seed=50)
    before = torch.get_rng_state()
    first, again, other = (outputs(post, x, space, 5, seed, draws=draws) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    unseeded = post.predict(x, method="mc", samples=5, space=space, draws=draws, keep_samples=True).samples
    assert not torch.equal(unseeded, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_generators_give_equal_weights_over_a_loader() -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    x = normal(10, 3, seed=50)
    parts = torch.cat([outputs(post, part, "weights", 5) for part in x.split(4)], 1)
    torch.testing.assert_close(parts, outputs(post, x, "weights", 5), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [2**30, 0])
def test_a_predictor_draws_once(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "KEEP_BYTES", keep)
    post = posterior(build(lambda: mlp(3, 5, 3)))
    x = normal(10, 3, seed=50)
    made: list[int] = []
    original = weights.WeightDraws.make
    monkeypatch.setattr(
        weights.WeightDraws, "make", lambda self, k, *more: (made.extend(k), original(self, k, *more))[1]
    )
    predictor = post.predictor(samples=5, generator=rng(1))
    parts = [predictor(part, keep_samples=True) for part in x.split(4)]
    assert len(made) == (5 if keep else 15)
    found = torch.cat([part.samples for part in parts], 1)
    torch.testing.assert_close(found, outputs(post, x, "weights", 5), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        parts[0].probs, post.predict(x[:4], method="mc", samples=5, space="weights", generator=rng(1)).probs
    )
    post.prior_precision = 50.0
    assert torch.equal(predictor.outputs(x[:4]), parts[0].samples)
    with pytest.raises(lk.errors.NonFinite):
        predictor(x * float("nan"))


def test_a_predictor_needs_a_fit() -> None:
    with pytest.raises(lk.errors.NotFitted):
        lk.LaplacePosterior(build(lambda: mlp(3, 5, 3)), "categorical").predictor()


def test_a_model_without_batching_rules_is_asked_once() -> None:
    from laplace_kf.predictive import calls

    post = posterior(build(Branching))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs(post, normal(4, 3, seed=50), "weights", 3)
    assert calls._VECTORISES[post.model] == {"outputs": False}
    assert torch.equal(outputs(post, normal(4, 3), "weights", 3), outputs(post, normal(4, 3), "weights", 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batching_rules_that_are_wrong_for_later_draws(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from laplace_kf.predictive import calls

    model, x, vmap = build(lambda: mlp(3, 5, 3)).to(dtype), normal(4, 3).to(dtype), torch.func.vmap
    post = lk.LaplacePosterior(model, "categorical", structure="diag", prior_precision=9.0).fit((x, labels(3, 4)))
    wanted = outputs(post, x, "weights", 3)

    def wrong(call: Any, **options: Any) -> Any:
        return lambda values: vmap(call, **options)(values) * torch.tensor([1.0, 1.0, 1.5], dtype=dtype)[:, None, None]

    monkeypatch.setattr(torch.func, "vmap", wrong)
    calls._VECTORISES.clear()
    assert (
        float((outputs(post, x, "weights", 3) - wanted).abs().max() / wanted.abs().max()) < 4 * torch.finfo(dtype).eps
    )
    assert calls._VECTORISES[post.model] == {"outputs": False}
    calls._VECTORISES.clear()


def test_one_input_of_a_wide_last_layer_takes_little_memory() -> None:
    """512 features, 1000 classes, 100 draws: counted in bytes of the tensors that are made, not by a clock."""
    block = lk.tape.Block(
        "last", ("w", "b"), ((1000, 512), (1000,)), (1, 1000, 513),
        lk.layers.base.MatrixView((1, 1000, 512), (0, 1, 2), (1, 1000, 512)), True,
    )  # fmt: skip
    a, g = (
        lk.operators.Basis.orthogonal(torch.linalg.qr(torch.randn(1, d, d, generator=rng(0)))[0]) for d in (513, 1000)
    )
    matrix = lk.operators.Spectral(a, g, torch.rand(1, 1000, 513, generator=rng(1)) + 1, "last")
    layout = lk.tape.FlatLayout(("w", "b"), ((1000, 512), (1000,)))
    precision = lk.operators.Blockwise(layout, [(block, matrix)])
    assert cost.activations_are_cheaper(precision, 1, 100)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(1000, 512)), nn.Parameter(torch.zeros(1000))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w, self.b)

    model = Last()
    mean = {name: value.detach() for name, value in model.named_parameters()}
    made: dict[int, int] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in old:
                made[len(made)] = out.untyped_storage().nbytes()
            return out

    x = torch.randn(1, 512, generator=rng(2))
    with Watch():
        drawn = lk.predictive.monte_carlo(model, None, mean, precision, x, 100, generator=rng(3))
    assert drawn.shape == (100, 1, 1000)
    assert sum(made.values()) < 25e6  # a draw of the weights alone takes 2 MB, 100 of them 205 MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_floating_types(dtype: torch.dtype) -> None:
    model = build(lambda: mlp(3, 5, 3)).to(dtype)
    x, y = normal(9, 3, seed=5).to(dtype), labels(3, 9, seed=6)
    post = lk.LaplacePosterior(model, "categorical").fit([(x, y)])
    for space in ("weights", "activations"):
        found = outputs(post, x, space, 200)
        assert bool(torch.isfinite(found).all())
        assert float((found.double().mean(0) - model(x).double()).abs().max()) < 1


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_autocast_reaches_the_model_and_not_the_draws(space: str) -> None:
    post = posterior(build(lambda: mlp(3, 5, 3)))
    post.model.float()
    post.fit([(normal(9, 3, seed=5).float(), labels(3, 9, seed=6))])
    x, seen = normal(4, 3, seed=50).float(), []
    plain = outputs(post, x, space, 20)
    handle = post.model[-1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(post, x, space, 20)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert float((found.float() - plain).abs().max()) < 0.05 * float(plain.abs().max())


def test_bernoulli_in_activation_space() -> None:
    x, y = normal(9, 3, seed=5), binary(9, 3, seed=6)
    post = lk.LaplacePosterior(build(lambda: mlp(3, 5, 3)), "bernoulli").fit([(x, y)])
    probs = torch.sigmoid(by_hand(post, x[:4]))
    found = post.predict(x[:4], method="mc", samples=DRAWS, space="activations", generator=rng(1)).probs
    assert float(((found - probs.mean(0)) / (2 * probs.var(0) / DRAWS).sqrt()).abs().max()) < 5
