"""Where the channel of the outputs stands: shown by the targets or said, never guessed; any number of spatial axes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import laplace_kf as lk

FIRST, LAST = "channels_first", "channels_last"
C = 3


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Moved(nn.Module):
    """The same network with its channel as the last axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(1, -1)


def conv(dims: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(kind(2, 4, 3, padding=1), nn.Tanh(), kind(4, C, 1)).double()


def data(*sizes: int, count: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, *sizes, generator=rng(1)).double()
    return x, torch.randint(0, C, (count, *sizes), generator=rng(2))


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """Mean Gauss-Newton matrix of torch's own ``cross_entropy`` on outputs ``(N, C, ...)``, by dense Jacobians."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda w: functional_call(model, w, (x,)).flatten(2).movedim(1, -1).flatten(0, 1))(weights)
    rows = torch.cat([jacobian[name].flatten(2) for name in weights], 2)
    p = model(x).detach().flatten(2).movedim(1, -1).flatten(0, 1).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("mcp,mcd,mdq->pq", rows, h, rows) / len(x)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-11) -> None:
    assert one.shape == two.shape
    assert float((one - two).detach().abs().max()) <= tolerance * float(two.detach().abs().max())


@pytest.mark.parametrize("sizes", [(5,), (1,), (2,), (2, 3), (C, C), (2, 2, 3), (2, 1, 2, 2)])
def test_torchs_own_layout_is_read_from_the_targets(sizes: tuple[int, ...]) -> None:
    model: nn.Module = conv(len(sizes)) if len(sizes) < 4 else Wide(conv(3))
    x, y = data(*sizes)
    stats = lk.curvature.estimate(model, "categorical", (x, y), "full")
    close(stats.mean().dense(), dense(model, x))
    expected = -nn.functional.cross_entropy(model(x), y, reduction="sum")
    close(stats.log_likelihood, expected.detach())


class Wide(nn.Module):
    """A volume with one more spatial axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2, 3)).reshape(x.shape[0], C, *x.shape[2:])


def test_an_ambiguous_batch_is_refused_with_the_line_to_paste() -> None:
    model, (x, y) = conv(1), data(C)
    for attempt in (
        lambda: lk.LaplacePosterior(model, "categorical").fit((x, y)),
        lambda: lk.curvature.estimate(model, "categorical", (x, y)),
        lambda: lk.optim.kfac(model, "categorical").step(x, y),
        lambda: lk.curvature.ggn_vector_product(model, "categorical", (x, y), torch.ones(43).double()),
    ):
        with pytest.raises(lk.errors.ShapeMismatch, match=r'Categorical\(ignore_index=-100\)\.with_layout\("channels'):
            attempt()


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_a_layout_that_is_said_decides(layout: str) -> None:
    model, (x, y) = conv(1), data(C)
    said = lk.LaplacePosterior(model, "categorical", structure="full", layout=layout).fit((x, y))
    expected = dense(model, x) if layout == FIRST else dense(Moved(model), x)
    close(said.curvature.dense(), expected)
    object_ = lk.likelihoods.Categorical().with_layout(layout)
    close(lk.LaplacePosterior(model, object_, structure="full").fit((x, y)).curvature.dense(), expected)
    close(lk.curvature.estimate(model, "categorical", (x, y), "full", layout=layout).mean().dense(), expected)


def test_what_one_minibatch_shows_holds_for_the_others() -> None:
    """A sequence as long as there are classes does not change how it is read."""
    model = conv(1)
    batches = [data(5), data(C), data(4)]
    stats = lk.curvature.estimate(model, "categorical", batches, "ekfac")  # goes over the data twice
    full = lk.curvature.estimate(model, "categorical", batches, "full")
    close(full.mean().dense(), sum(dense(model, x) for x, _ in batches) / 3)
    assert stats.outputs == FIRST
    with pytest.raises(lk.errors.ShapeMismatch):  # the other layout
        lk.curvature.estimate(model, "categorical", [batches[0], (batches[2][0], batches[2][1][:, :3])], "full")


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "importance", "projection", "empirical"])
def test_both_layouts_give_the_same(structure: str, estimator: str) -> None:
    model, (x, y) = conv(1), data(5)
    y[0, 2:] = -100
    one, two = (
        lk.curvature.estimate(m, "categorical", (x, y), structure, estimator, generator=rng(3))
        for m in (model, Moved(model))
    )
    close(one.mean().dense(), two.mean().dense(), 1e-6 if structure == "lowrank" else 1e-11)  # that one iterates
    assert one.terms == two.terms == 17
    close(one.log_likelihood, two.log_likelihood)


@pytest.mark.parametrize("sizes", [(5,), (C,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("method", ["map", "mc", "linearized", "probit"])
def test_predictions_have_the_layout_of_the_outputs(sizes: tuple[int, ...], method: str) -> None:
    model, (x, y) = conv(len(sizes)), data(*sizes)
    one = lk.LaplacePosterior(model, "categorical", structure="diag", layout=FIRST).fit((x, y))
    two = lk.LaplacePosterior(Moved(model), "categorical", structure="diag", layout=LAST).fit((x, y))
    first, last = (p.predict(x, method=method, samples=5, generator=rng(3)) for p in (one, two))
    assert first.probs.shape == (4, C, *sizes) and last.probs.shape == (4, *sizes, C)
    close(first.probs.movedim(1, -1), last.probs, 1e-9)
    close(first.probs.sum(1), torch.ones(4, *sizes).double())
    close(first.log_prob(y), last.log_prob(y), 1e-9)
    close(first.position_entropy, last.position_entropy, 1e-9)
    assert first.position_entropy.shape == (4, *sizes)
    if method == "mc":
        drawn = one.predict(x, method="mc", samples=5, generator=rng(3), keep_samples=True).samples
        assert drawn.shape == (5, 4, C, *sizes)


def test_a_fitted_posterior_knows_its_layout(tmp_path: Path) -> None:
    """Also where what it predicts would be ambiguous, in its file, and as the prior of the next task."""
    model, (x, y) = conv(1), data(5)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    square, targets = data(C)
    probs = posterior.predict(square, generator=rng(3)).probs
    close(probs.sum(1), torch.ones(4, C).double())
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    close(again.predict(square, generator=rng(3)).probs, probs)
    result = posterior.tune((square, targets), n_data=[1.0, 4.0], prior_precision=[1.0, 10.0], method="probit")
    assert result.best["objective"] > 0
    chained = posterior.update((square, targets))
    close(chained.predict(square).probs.sum(1), torch.ones(4, C).double())


@pytest.mark.parametrize("objective", ["nll", "brier", "ece"])
def test_tuning_reads_the_layout(objective: str) -> None:
    model, (x, y) = conv(1), data(C)
    found = [
        lk.LaplacePosterior(m, "categorical", structure="diag", layout=layout)
        .fit((x, y))
        .tune((x, y), objective=objective, n_data=[1.0, 4.0], prior_precision=[1.0, 10.0], method="probit")
        .table
        for m, layout in ((model, FIRST), (Moved(model), LAST))
    ]
    for one, two in zip(*found, strict=True):
        assert one["objective"] == pytest.approx(two["objective"], rel=1e-9)


@pytest.mark.parametrize("preset", ["kfac", "kflr", "ekfac", "hessian_free"])
def test_optimisers_read_the_layout(preset: str) -> None:
    found = []
    for layout in (FIRST, LAST):
        inner, (x, y) = conv(1), data(C)
        model = inner if layout == FIRST else Moved(inner)
        rule = lk.likelihoods.Categorical().with_layout(layout)
        opt = getattr(lk.optim, preset)(model, rule, generator=rng(4))
        losses = [float(opt.step(x, y)) for _ in range(2)]
        found.append((losses, nn.utils.parameters_to_vector(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    close(found[0][1], found[1][1], 1e-8)


def normal_targets(x: Tensor, *shape: int) -> Tensor:
    return torch.randn(len(x), *shape, generator=rng(5)).double()


OTHERS: dict[str, tuple[Any, Any]] = {
    "gaussian": (lk.likelihoods.Gaussian(), lambda x, t: normal_targets(x, C, t)),
    "gaussian, ignored": (
        lk.likelihoods.Gaussian(ignore_index=-100),
        lambda x, t: normal_targets(x, C, t).index_fill(2, torch.tensor([t - 1]), -100.0),
    ),
    "bernoulli": (lk.likelihoods.Bernoulli(), lambda x, t: (normal_targets(x, C, t) > 0).double()),
    "poisson": (lk.likelihoods.Poisson(), lambda x, t: normal_targets(x, C, t).abs().floor()),
}


@pytest.mark.parametrize("steps", [C, 5])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("structure", ["kron", "full"])
def test_likelihoods_of_single_outputs(name: str, steps: int, structure: str) -> None:
    """Both layouts are the same variables; padded steps whose targets are ignored are not there in either."""
    rule, targets = OTHERS[name]
    model, x = conv(1), data(steps)[0]
    y = targets(x, steps)
    said = rule.with_layout(FIRST)
    one = lk.curvature.estimate(model, said, (x, y), structure)
    two = lk.curvature.estimate(Moved(model), rule.with_layout(LAST), (x, y.movedim(1, -1)), structure)
    unsaid = lk.curvature.estimate(model, rule, (x, y), structure)
    close(one.mean().dense(), two.mean().dense())
    close(unsaid.mean().dense(), one.mean().dense())
    assert one.terms == two.terms == unsaid.terms
    first, last = (
        lk.LaplacePosterior(m, r, structure="diag").fit((x, t)).predict(x, method="linearized", generator=rng(3))
        for m, r, t in ((model, said, y), (Moved(model), rule.with_layout(LAST), y.movedim(1, -1)))
    )
    close(first.log_prob(y), last.log_prob(y.movedim(1, -1)), 1e-9)
    for key, value in first.values.items():
        close(value.movedim(1, -1), last.values[key], 1e-9)


def test_two_outputs_a_position() -> None:
    """Mean and variance: the targets' own axis of length 1 tells."""
    torch.manual_seed(0)
    model = nn.Conv1d(2, 2, 1).double()
    for steps in (2, 5):
        x = data(steps)[0]
        y = normal_targets(x, 1, steps)
        rule = lk.likelihoods.HeteroscedasticGaussian()
        one = lk.curvature.estimate(model, rule, (x, y), "full")
        two = lk.curvature.estimate(Moved(model), rule, (x, y.movedim(1, -1)), "full")
        close(one.mean().dense(), two.mean().dense())


def test_images_with_the_channel_last() -> None:
    model, (x, y) = conv(2), data(2, 3)
    one = lk.curvature.estimate(Moved(model), "categorical", (x, y), "full", layout=LAST)
    close(one.mean().dense(), dense(model, x))
    with pytest.raises(lk.errors.ShapeMismatch):
        lk.curvature.estimate(Moved(model), "categorical", (x, y.mT), "full", layout=LAST)


def test_arranged_likelihoods_are_likelihoods() -> None:
    rule = lk.likelihoods.Categorical(ignore_index=7).with_layout(FIRST)
    assert isinstance(rule, lk.likelihoods.Categorical) and rule.ignore_index == 7 and rule.natural
    again = pickle.loads(pickle.dumps(rule))
    other = lk.likelihoods.Likelihood.from_config(rule.to_config())
    z, y = torch.randn(2, C, C, generator=rng(0)).double(), torch.randint(0, C, (2, C), generator=rng(1))
    for made in (rule, again, other, rule.with_layout(LAST).with_layout(FIRST)):
        close(made.log_prob(z, y), -nn.functional.cross_entropy(z, y, reduction="none").sum(1))
        close(made.score(z, y).sum(1).abs() + 1, torch.ones(2, C).double())
        root = made.hessian_root(z)
        close(torch.einsum("vnct,vndt->ntcd", root, root), lk.likelihoods.Categorical().hessian(z.mT))
        assert made.sample(z, rng(3)).shape == (2, C)
    assert "with_layout('channels_first')" in repr(rule)
    with pytest.raises(lk.errors.UnknownName, match="channels_last"):
        rule.with_layout("last")


@pytest.mark.parametrize("steps", [C, 5])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_noise_scale_for_every_channel_shows_the_layout(axes: int, steps: int) -> None:
    """Of targets in the shape of the outputs; as many steps as channels are refused, not read by chance."""
    scale = torch.tensor([0.5, 1.0, 2.0]).double()
    sizes = (steps,) if axes == 1 else (steps, steps)
    model = (nn.Conv1d, nn.Conv2d)[axes - 1](2, C, 1).double()
    x, y = torch.randn(4, 2, *sizes).double(), torch.randn(4, C, *sizes).double()
    likelihood = lk.likelihoods.Gaussian(scale=scale)
    if axes == 1 and steps == C:
        with pytest.raises(lk.errors.ShapeMismatch, match="fit two layouts"):
            lk.LaplacePosterior(model, likelihood).fit(x, y)
        with pytest.raises(lk.errors.ShapeMismatch, match="fit two layouts"):
            lk.optim.kfac(model, likelihood).step(x, y)
        likelihood = likelihood.with_layout("channels_first")
    found = lk.LaplacePosterior(model, likelihood, structure="full").fit(x, y)
    z = model(x)
    wanted = torch.zeros(found.precision.size, found.precision.size).double()
    for n in range(4):
        for c in range(C):
            for output in z[n, c].flatten():
                row = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)]
                )
                wanted += torch.outer(row, row) / scale[c] ** 2
    torch.testing.assert_close(found.curvature.dense(), wanted / 4)
    assert found.predict(x, "linearized").variance.shape == y.shape


def test_targets_of_other_sizes_name_the_line_to_paste() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"Use targets\[:, None\]"):
        lk.LaplacePosterior(nn.Conv2d(3, 1, 1), "bernoulli").fit(x, torch.zeros(2, 8, 8))
    coarse, y = nn.Conv2d(3, 3, 2, stride=2), torch.randint(3, (2, 8, 8))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"interpolate\(model\(batch\[0\]\), size=\(8, 8\)"):
        lk.LaplacePosterior(coarse, "categorical").fit(x, y)
    lk.LaplacePosterior(
        coarse, "categorical",
        forward=lambda model, batch: (
            torch.nn.functional.interpolate(model(batch[0]), size=(8, 8), mode="bilinear"), batch[1]
        ),
    ).fit([(x, y)])  # fmt: skip
    soft = torch.zeros(2, 4, 3)
    with pytest.raises(lk.errors.InvalidTarget, match="A position to be left out has -100 in all its entries"):
        lk.LaplacePosterior(nn.Linear(2, 3), "categorical").fit(torch.randn(2, 4, 2), soft)
    sized = lk.likelihoods.FromLoss(lambda o, t: ((o - t) * torch.ones(7)).sum(1))
    with pytest.raises(lk.errors.ShapeMismatch, match="the loss cannot be computed of outputs"):
        lk.LaplacePosterior(nn.Linear(2, 3), sized).fit(torch.randn(4, 2), torch.randn(4, 3))
