"""Padding changes nothing: no factor, count, evidence, prediction, chained posterior or optimiser step.

Padded positions have any content; their targets are ignored, or a mask hides them. The factors themselves are checked
against sums over the real positions, written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.structures.base import pairs
from laplace_kf.tape import observation as passes
from tests.padding.networks import (
    CLASSES,
    IGNORE,
    LARGE,
    SMALL,
    Masked,
    Padded,
    pixels,
    rng,
    rows,
    seeded,
    steps,
    tokens,
)

TOLERANCE = 1e-10
ESTIMATORS = ["exact", "sampled", "importance", "projection", "empirical"]
STRUCTURES = ["kron", "ekfac", "diag", "full", "layer", "lowrank", "isotropic"]


def same(one: Tensor, two: Tensor, scale: Tensor | None = None, tolerance: float = TOLERANCE) -> None:
    size = (one if scale is None else scale).detach().abs().max().clamp_min(1e-30)
    assert float((one - two).detach().abs().max() / size) < tolerance


def estimated(case: Padded, extra: int, structure: str, estimator: str = "exact", **options: Any) -> Any:
    return lk.curvature.estimate(
        case.model, case.likelihood, [case.batch(extra)], structure, estimator, forward=case.forward,
        generator=rng(3), **options,
    )  # fmt: skip


def unchanged(case: Padded, structure: str, estimator: str, **options: Any) -> None:
    plain, padded = (estimated(case, extra, structure, estimator, **options) for extra in (0, 3))
    same(plain.mean().dense(), padded.mean().dense())
    assert plain.n_data == padded.n_data
    assert plain.terms == padded.terms
    same(plain.log_likelihood, padded.log_likelihood)


@pytest.mark.pairs(name=SMALL, structure=STRUCTURES, estimator=ESTIMATORS)
def test_no_structure_sees_padding(name: str, structure: str, estimator: str) -> None:
    unchanged(SMALL[name](), structure, estimator)


@pytest.mark.meets(name=SMALL, estimator=ESTIMATORS)
def test_reduce_does_not_see_padding(name: str, estimator: str) -> None:
    unchanged(SMALL[name](), "kron", estimator, sharing="reduce")


@pytest.mark.meets(name=LARGE, estimator=ESTIMATORS)
def test_transformers_do_not_see_padding(name: str, estimator: str) -> None:
    case = LARGE[name]()
    plain, padded = (estimated(case, extra, "kron", estimator) for extra in (0, 3))
    for block, parts in plain.sums.items():
        for one, two in zip(parts, padded.sums[block], strict=True):
            same(one, two)
    assert plain.n_data == padded.n_data


@pytest.mark.parametrize("name", LARGE)
def test_ekfac_of_transformers_does_not_see_padding(name: str) -> None:
    unchanged(LARGE[name](), "ekfac", "empirical")


# ------------------------------------------------------------------------------------------------ factors, written out


def ragged(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Sequences of different lengths, padded."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    x = torch.randn(6, 5, 3, generator=rng(seed)).double()
    y = torch.randint(0, CLASSES, (6, 5), generator=rng(seed))
    for n, length in enumerate((5, 1, 3, 0, 4, 2)):
        y[n, length:] = IGNORE
    return model, x, y


def by_hand(model: nn.Module, x: Tensor, y: Tensor, reduce: bool = False) -> list[tuple[Tensor, Tensor]]:
    """``(A, G)`` of both layers as sums over real positions, one at a time; examples without any are none."""
    one, two = (layer for layer in model if isinstance(layer, nn.Linear))
    found = []
    examples = [n for n in range(len(x)) if (y[n] != IGNORE).any()]
    positions = [(n, t) for n in examples for t in range(x.shape[1]) if y[n, t] != IGNORE]
    for layer in (one, two):
        a_sum, g_sum = (
            torch.zeros(layer.in_features + 1, layer.in_features + 1).double(),
            torch.zeros(layer.out_features, layer.out_features).double(),
        )
        inputs: dict[int, list[Tensor]] = {n: [] for n in examples}
        for n, t in positions:
            hidden = one(x[n, t])
            z = two(torch.tanh(hidden))
            at = hidden if layer is one else z
            a = x[n, t] if layer is one else torch.tanh(hidden)
            inputs[n].append(torch.cat([a.detach(), torch.ones(1).double()]))
            p = z.detach().softmax(-1)
            jacobian = torch.stack([torch.autograd.grad(z[c], at, retain_graph=True)[0] for c in range(CLASSES)])
            g_sum += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        for n in examples:
            rows_of = [torch.stack(inputs[n]).mean(0)] if reduce else inputs[n]
            a_sum += sum(torch.outer(row, row) for row in rows_of)
        count = len(examples) if reduce else len(positions)
        found.append((a_sum / len(examples), g_sum / count))
    return found


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_factors_are_sums_over_real_positions(reduce: bool, separate: bool) -> None:
    """Sum over positions in A, mean over all positions of the data in G, whatever is put into one minibatch."""
    model, x, y = ragged()
    data = [(x[n : n + 1], y[n : n + 1]) for n in range(6)] if separate else [(x, y)]
    stats = lk.curvature.estimate(model, "categorical", data, "kron", sharing="reduce" if reduce else "expand")
    assert stats.n_data == 5  # one example has no target that counts
    for (_, block), (a, g) in zip(stats.mean().entries, by_hand(model, x, y, reduce), strict=True):
        same(a, block.inputs[0], tolerance=1e-13)
        same(g, block.outputs[0], tolerance=1e-13)


def test_an_example_without_a_target_is_none() -> None:
    """For a plain network, too: as if it were not among the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    x, y = torch.randn(8, 3, generator=rng(0)).double(), torch.randint(0, CLASSES, (8,), generator=rng(0))
    more_x, more_y = torch.cat([x, torch.randn(3, 3).double()]), torch.cat([y, torch.full((3,), IGNORE)])
    for structure, estimator in [
        *((s, "exact") for s in STRUCTURES),
        *(("kron", e) for e in [*ESTIMATORS, "recursive"]),
    ]:
        one, two = (
            lk.curvature.estimate(model, "categorical", [batch], structure, estimator, generator=rng(1))
            for batch in ((x, y), (more_x, more_y))
        )
        same(one.mean().dense(), two.mean().dense())
        assert two.n_data == 8
    v = torch.randn(one.layout.size, generator=rng(2)).double()
    for product in (lk.curvature.ggn_vector_product, lk.curvature.hessian_vector_product):
        same(product(model, "categorical", (x, y), v), product(model, "categorical", (more_x, more_y), v))
    with pytest.raises(lk.errors.ShapeMismatch, match="all targets of the data are ignored"):
        lk.curvature.estimate(model, "categorical", (x, torch.full_like(y, IGNORE)), "kron")


def test_positions_of_dead_units_and_of_maxima_that_lost_count() -> None:
    """What the weights of the moment switch off is not padding: A is the sum over all positions."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[0].bias[0] = -3.0
    x, y = torch.randn(3, 1, 4, 4, generator=rng(0)).double(), torch.tensor([0, 1, 2])
    stats = lk.curvature.estimate(model, "categorical", (x, y), "kron")
    patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
    inputs = torch.cat([patches, torch.ones(3, 16, 1).double()], 2).flatten(0, 1)
    same(inputs.T @ inputs / 3, stats.mean().entries[0][1].inputs[0], tolerance=1e-13)
    assert [float(parts[2]) for parts in stats.sums.values()] == [48, 12, 3]


class Scattered(nn.Module):
    """The largest of what stands somewhere and of what is put there, which always wins."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.put, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])[None, :, None].expand(len(x), -1, 4)
        return self.head(self.there(x).scatter_reduce(1, index, self.put(x) + 100, "amax"))


def test_places_that_lost_to_what_was_scattered_into_them_count() -> None:
    x, y = torch.randn(5, 4, 3, generator=rng(0)).double(), torch.randint(0, CLASSES, (5, 4), generator=rng(1))
    found = lk.curvature.estimate(seeded(Scattered).double(), "categorical", [(x, y)], "kron")
    assert [float(found.sums[name][2]) for name in ("there", "put", "head")] == [20.0] * 3
    assert not found.sums["there"][1].any()


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, out) for out in (4, 4, 4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))  # (N, heads, T, d)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def test_the_first_token_of_causal_attention_counts_as_a_query() -> None:
    """It has one key alone, so that its query changes nothing, here as in any other data: counted, with a zero."""
    x, y = torch.randn(6, 5, 4, generator=rng(0)).double(), torch.randint(0, CLASSES, (6, 5), generator=rng(1))
    found = lk.curvature.estimate(seeded(Causal).double(), "categorical", [(x, y)], "kron")
    assert {name: float(found.sums[name][2]) for name in ("q", "k", "v", "head")} == dict.fromkeys("qkv", 30.0) | {
        "head": 30.0
    }


def test_a_pixel_that_is_never_read_does_not_count() -> None:
    """Pooling 5 rows by two leaves the last one out: no output is a function of it."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(1, 2, 1), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, CLASSES))
    ).double()
    x, y = torch.randn(3, 1, 5, generator=rng(0)).double(), torch.tensor([0, 1, 2])
    stats = lk.curvature.estimate(model, "categorical", (x, y), "kron")
    assert float(stats.sums["0"][2]) == 12


def test_an_ignored_class_can_be_drawn() -> None:
    """``ignore_index`` is a class here: drawing it is no reason to leave the position out."""
    torch.manual_seed(0)
    model = nn.Linear(2, CLASSES).double()
    with torch.no_grad():
        model.bias[0] = 16.0  # class 0 is as good as certain
    x, y = torch.randn(50, 2, generator=rng(0)).double(), torch.randint(1, CLASSES, (50,), generator=rng(0))
    rule = lk.likelihoods.Categorical(ignore_index=0)
    score = rule.drawn_score(model(x).detach(), y, rng(1))
    p = model(x).detach().softmax(-1)
    assert float((score - (torch.eye(CLASSES).double()[0] - p)).abs().max()) < 1e-14
    assert bool((score != 0).all())


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it was asked which positions are reached."""
    calls: list[int] = []
    original = passes.reached

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(passes, "reached", counted)
    return calls


def test_networks_without_positions_are_not_asked(asked: list[int]) -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 3), torch.arange(8) % 3
    lk.curvature.estimate(model, "categorical", [(x, y)] * 3, "kron")
    assert not asked


def test_masks_are_asked_about_every_time(asked: list[int]) -> None:
    case = SMALL["first token"]()
    lk.curvature.estimate(case.model, "categorical", [case.batch(0), case.batch(2), case.batch(2)], "kron")
    assert len(asked) == 3


# ------------------------------------------------------------------------------- posteriors, chains, optimisers, files


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("name", ["rows", "attention", "pixels", "steps"])
def test_posteriors_do_not_see_padding(name: str, structure: str) -> None:
    case = SMALL[name]()
    one, two = (
        lk.LaplacePosterior(case.model, "categorical", structure=structure).fit([case.batch(e)]) for e in (0, 3)
    )
    assert one.n_data == two.n_data
    same(one.log_evidence(), two.log_evidence())
    x = case.batch(0)[0]
    for method in ("linearized", "probit", "mc"):
        found = [p.predict(x, method=method, samples=10, generator=rng(1)).probs for p in (one, two)]
        same(found[0], found[1])
    draws = [p.sample(2, generator=rng(1)) for p in (one, two)]
    for key in draws[0]:
        same(draws[0][key], draws[1][key], tolerance=1e-7)  # square roots of eigenvalues that are zero
    chained = [p.update([case.batch(e)]) for p, e in ((one, 0), (two, 3))]
    v = torch.randn(one.precision.size, generator=rng(2)).double()
    same(chained[0].precision.matvec(v), chained[1].precision.matvec(v))


OPTIMISERS: dict[str, Callable[[nn.Module], Any]] = {
    "kfac": lambda m: lk.optim.kfac(m, "categorical", generator=rng(4)),
    "kflr": lambda m: lk.optim.kflr(m, "categorical"),
    "ekfac": lambda m: lk.optim.GaussNewton(m, "categorical", structure="ekfac", estimator="exact"),
    "diag": lambda m: lk.optim.GaussNewton(m, "categorical", structure="diag", estimator="sampled", generator=rng(4)),
    "part": lambda m: lk.optim.kflr(m, "categorical", curvature_fraction=0.5, generator=rng(4)),
    "hessian_free": lambda m: lk.optim.hessian_free(m, "categorical", generator=rng(4)),
}


@pytest.mark.meets(optimiser=OPTIMISERS, name=["rows", "attention", "pixels"])
def test_steps_do_not_see_padding(name: str, optimiser: str) -> None:
    found = []
    for extra in (0, 3):
        case = SMALL[name]()
        opt = OPTIMISERS[optimiser](case.model)
        losses = [float(opt.step(*case.batch(extra))) for _ in range(3)]
        found.append((losses, nn.utils.parameters_to_vector(case.model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    same(found[0][1], found[1][1], tolerance=1e-8)  # three steps


@pytest.mark.parametrize("optimiser", [*OPTIMISERS, "kfra"])
def test_examples_without_targets_change_no_step(optimiser: str) -> None:
    make = {**OPTIMISERS, "kfra": lambda m: lk.optim.kfra(m, "categorical")}[optimiser]
    x, y = torch.randn(8, 3, generator=rng(0)).double(), torch.randint(0, CLASSES, (8,), generator=rng(0))
    found = []
    for data in ((x, y), (torch.cat([x, x[:3] + 1]), torch.cat([y, torch.full((3,), IGNORE)]))):
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))).double()
        opt = make(model)
        losses = [float(opt.step(*data)) for _ in range(2)]
        found.append((losses, nn.utils.parameters_to_vector(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    same(found[0][1], found[1][1], tolerance=1e-8)
    with pytest.raises(lk.errors.ShapeMismatch, match="all targets of the minibatch are ignored"):
        opt.step(x, torch.full_like(y, IGNORE))


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_structural_damping_does_not_see_padding(kind: type[nn.RNNBase]) -> None:
    found = []
    for extra in (0, 3):
        case = steps(kind)
        opt = lk.optim.hessian_free(case.model, "categorical", structural_damping=0.1, hidden=["rnn"], generator=rng(4))
        losses = [float(opt.step(*case.batch(extra))) for _ in range(2)]
        found.append((losses, nn.utils.parameters_to_vector(case.model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-8)
    same(found[0][1], found[1][1], tolerance=1e-7)


# ------------------------------------------------------------------------------------------------ activations in place


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.ELU, nn.LeakyReLU, nn.SiLU])
@pytest.mark.parametrize("shape", [(9, 3), (9, 5, 3), (2, 4, 5, 3)])
def test_activations_in_place_keep_the_pair(activation: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    found = []
    for inplace in (False, True):
        model = seeded(
            lambda inplace=inplace: nn.Sequential(nn.Linear(3, 6), activation(inplace=inplace), nn.Linear(6, CLASSES))
        ).double()
        x, y = torch.randn(*shape, generator=rng(0)).double(), torch.randint(0, CLASSES, shape[:-1], generator=rng(0))
        forward = (lambda m, b: (m(b[0]).flatten(1, -2), b[1].flatten(1))) if len(shape) > 2 else None
        found.append(lk.curvature.estimate(model, "categorical", [(x, y)], "kron", forward=forward))
    assert [matrix.kind for _, matrix in found[1].mean().entries] == ["kron", "kron"]
    same(found[0].mean().dense(), found[1].mean().dense(), tolerance=1e-13)


class Writing(nn.Module):
    """Activations as tensors' own methods, in place or not."""

    def __init__(self, name: str, write: bool) -> None:
        super().__init__()
        self.one, self.two, self.name = nn.Linear(3, 5), nn.Linear(5, CLASSES), name + "_" * write

    def forward(self, x: Tensor) -> Tensor:
        return self.two(getattr(self.one(x), self.name)())


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_methods_in_place_keep_the_pair(name: str) -> None:
    x, y = torch.randn(5, 4, 3, generator=rng(0)).double(), torch.randint(0, CLASSES, (5, 4), generator=rng(0))
    found = [
        lk.curvature.estimate(seeded(lambda w=w: Writing(name, w)).double(), "categorical", [(x, y)], "kron").mean()
        for w in (False, True)
    ]
    assert [matrix.kind for _, matrix in found[1].entries] == ["kron", "kron"]
    same(found[0].dense(), found[1].dense(), tolerance=1e-13)


def test_factors_of_older_files_are_means_already() -> None:
    a, g = torch.randn(1, 3, 3), torch.randn(1, 2, 2)
    assert pairs((a, g)) == [(a, g)]
    ((inputs, outputs),) = pairs((a, 8 * g, torch.tensor(8.0)))
    assert inputs is a
    same(outputs, g, tolerance=1e-6)
    ((_, nothing),) = pairs((a, 0 * g, torch.tensor(0.0)))
    assert not bool(nothing.any())


# ------------------------------------------------------------------------------------------------ random networks


@st.composite
def random_cases(draw: st.DrawFn) -> Padded:
    """Layers by position, masked attention, convolutions and recurrent networks of random sizes."""
    case = draw(_networks())
    if case.batch(0)[1].dim() == 2:  # as many steps as classes are no reason to ask for the layout
        case.likelihood = lk.likelihoods.Categorical().with_layout("channels_last")
    return case


@st.composite
def _networks(draw: st.DrawFn) -> Padded:
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["rows", "tokens", "pixels", "steps"]))
    if kind == "rows":
        width, depth = draw(st.integers(2, 5)), draw(st.integers(1, 2))
        activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, lambda: nn.ReLU(inplace=True)]))

        def layers() -> nn.Module:
            inner: list[nn.Module] = []
            for k in range(depth):
                inner += [nn.Linear(3 if k == 0 else width, width), activation()]
            return nn.Sequential(*inner, nn.LayerNorm(width), nn.Linear(width, CLASSES))

        return rows(layers, seed, steps=draw(st.integers(1, 4)))
    if kind == "tokens":
        pooled, causal = draw(st.booleans()), draw(st.booleans())
        depth = draw(st.integers(1, 2))
        model = seeded(lambda: Masked(pooled, causal, 2 * draw(st.integers(1, 3)), depth), seed)
        return tokens(model, pooled, seed, steps=draw(st.integers(1, 4)))
    if kind == "pixels":
        depth, kernel, dilation = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
        return pixels(
            seed, depth=depth, width=2 * draw(st.integers(1, 2)), kernel=kernel, dilation=dilation,
            groups=draw(st.integers(1, 2)),
        )  # fmt: skip
    kind = draw(st.sampled_from([nn.GRU, nn.LSTM, nn.RNN]))
    return steps(kind, seed, width=draw(st.integers(1, 4)), layers=draw(st.integers(1, 2)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(random_cases(), st.integers(1, 5), st.sampled_from(ESTIMATORS), st.sampled_from(["expand", "reduce"]))
def test_padding_changes_no_factor_of_random_networks(case: Padded, extra: int, estimator: str, sharing: str) -> None:
    plain, padded = (estimated(case, e, "kron", estimator, sharing=sharing) for e in (0, extra))
    for block, parts in plain.sums.items():
        for one, two in zip(parts, padded.sums[block], strict=True):
            same(one, two)
    assert plain.n_data == padded.n_data
    same(plain.log_likelihood, padded.log_likelihood)


class Volumes(nn.Module):
    """A class per point of an image or a volume, each point alone; the channel is where torch has it."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.one, self.two = kind(2, 4, 1), kind(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


@st.composite
def segmentations(draw: st.DrawFn) -> Padded:
    """Ignored points anywhere, other content there and further ignored points at the end of the last axis."""
    axes, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    sizes = [draw(st.integers(1, 2)) for _ in range(axes - 1)] + [draw(st.integers(4, 5))]
    model = seeded(lambda: Volumes(axes), seed).double()
    x = torch.randn(4, 2, *sizes, generator=rng(seed)).double()
    y = torch.randint(0, CLASSES, (4, *sizes), generator=rng(seed))
    gone = torch.rand(y.shape, generator=rng(seed + 1)) < draw(st.sampled_from([0.0, 0.3, 0.6]))
    gone.flatten()[0] = False
    y[gone] = IGNORE

    def batch(extra: int) -> Any:
        if not extra:
            return x, y
        other = torch.where(gone[:, None], torch.randn(x.shape, generator=rng(8)).double(), x)
        more = torch.randn(*x.shape[:-1], extra, generator=rng(9)).double()
        return torch.cat([other, more], -1), torch.cat([y, torch.full((*y.shape[:-1], extra), IGNORE)], -1)

    return Padded(model, batch)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.one_of(random_cases(), segmentations()),
    st.integers(1, 4),
    st.sampled_from(STRUCTURES),
    st.sampled_from(ESTIMATORS),
)
def test_padding_changes_no_structure_of_random_networks(
    case: Padded, extra: int, structure: str, estimator: str
) -> None:
    plain, padded = (estimated(case, e, structure, estimator) for e in (0, extra))
    same(plain.mean().dense(), padded.mean().dense(), tolerance=1e-6 if structure == "lowrank" else TOLERANCE)
    assert plain.n_data == padded.n_data and plain.terms == padded.terms
    same(plain.log_likelihood, padded.log_likelihood)
