"""``estimator="auto"``: unbiased, within the error that is asked for, exact where choosing is not worth it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import columns
from laplace_kf.estimators import auto
from laplace_kf.likelihoods.roots import DenseRoot, DiagonalRoot, Root, ScaledRoot, SoftmaxRoot
from laplace_kf.tape import Tracer


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def linear_net(classes: int = 6, confident: float = 4.0) -> tuple[nn.Module, Tensor, Tensor]:
    """Two layers without an activation: the first one's output factor is the curvature after the last product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, classes)).double()
    with torch.no_grad():
        model[1].weight.mul_(confident)
    return model, normal(80, 5, seed=1), torch.arange(80) % classes


class Head(nn.Module):
    """Every position of a sequence gets logits over some words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, words)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def factors(found: Any) -> list[Tensor]:
    return [matrix.outputs[0] for _, matrix in found.mean().entries]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way every minibatch went."""
    ways: list[str] = []
    for name in ("send_all", "send_chosen"):
        real = getattr(auto, name)
        monkeypatch.setattr(auto, name, lambda *a, real=real, name=name: (ways.append(name), real(*a))[1])
    return ways


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("error", [0.0, 1e-4, 0.3, 20.0, 1e6])
def test_the_smallest_scale_that_keeps_the_error(error: float) -> None:
    weights = torch.cat([normal(40).exp(), torch.zeros(3, dtype=torch.float64)])
    found = columns.error_probabilities(weights, error)

    def squared(scale: float) -> float:
        total = 0.0
        for weight in weights.tolist():
            if weight > 0:
                total += (1 / min(1.0, scale * weight) - 1) * weight**2
        return total

    low, high = 1e-9, 1 / float(weights[weights > 0].min())
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if squared(middle) <= error else (middle, high)
    torch.testing.assert_close(found, (high * weights).clamp(max=1), rtol=1e-6, atol=1e-9)
    assert not bool(found[weights == 0].any())


def roots() -> dict[str, Root]:
    p = torch.softmax(3 * normal(4, 2, 5), -1)
    p[0, 0] = torch.tensor([1.0, 0, 0, 0, 0])
    return {
        "softmax": SoftmaxRoot(p),
        "diagonal": DiagonalRoot(normal(4, 2, 5)),
        "dense": DenseRoot(normal(3, 4, 2, 5)),
        "scaled": ScaledRoot(SoftmaxRoot(p), normal(4, 2, 1, seed=3)),
    }


@pytest.mark.parametrize("name", roots())
def test_norms_after_the_last_layer_are_those_of_the_columns(name: str) -> None:
    root, weight = roots()[name], normal(5, 6, seed=2)
    count, positions, _ = root.shape
    wanted = torch.zeros(count, positions, root.count, dtype=torch.float64)
    for n in range(count):
        for t in range(positions):
            for k in range(root.count):
                index = (torch.tensor([each]) for each in (k, n, t))
                wanted[n, t, k] = (root.entries(*index)[0] @ weight).square().sum()
    torch.testing.assert_close(root.norms_through(weight @ weight.T), wanted, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the error


@pytest.mark.parametrize("tolerance", [0.03, 0.15])
def test_the_error_is_within_the_tolerance_and_its_mean_is_exact(tolerance: float, sent: list[str]) -> None:
    model, x, y = linear_net()
    exact, _ = factors(lk.curvature.estimate(model, "categorical", [(x, y)]))
    draws = [
        factors(
            lk.curvature.estimate(model, "categorical", [(x, y)], "kron", "auto", tolerance=tolerance, generator=rng(s))
        )
        for s in range(60)
    ]
    found = torch.stack([first for first, _ in draws])
    relative = (found - exact).flatten(1).norm(dim=1) / exact.norm()
    assert set(sent) == {"send_chosen"}
    assert 0.05 * tolerance < float(relative.square().mean().sqrt()) <= tolerance
    spread = found.std(0) / len(draws) ** 0.5
    assert float(((found.mean(0) - exact).abs() / spread.clamp_min(1e-12)).max()) < 5


def test_it_takes_fewer_columns_for_a_larger_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = linear_net()
    rows: list[int] = []
    real = auto.send_chosen
    monkeypatch.setattr(auto, "send_chosen", lambda *a: (rows.append(len(a[4])), real(*a))[1])
    for tolerance in (0.02, 0.1, 0.3):
        lk.curvature.estimate(model, "categorical", [(x, y)], "kron", "auto", tolerance=tolerance, generator=rng())
    assert 80 * 5 > rows[0] > rows[1] > rows[2] > 0


def test_the_layer_at_the_output_is_exact() -> None:
    model, x, y = linear_net()
    (_, last), (first, exact) = (
        factors(lk.curvature.estimate(model, "categorical", [(x, y)], "kron", how, generator=rng(), **options))
        for how, options in (("auto", {"tolerance": 0.2}), ("exact", {}))
    )
    torch.testing.assert_close(last, exact, rtol=1e-12, atol=1e-14)
    chosen = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", "auto", tolerance=0.2, generator=rng())
    assert not torch.allclose(factors(chosen)[0], first, rtol=1e-3)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_where_most_columns_are_needed_it_is_exact(structure: str, sent: list[str]) -> None:
    model, x, y = linear_net(confident=0.1)
    found, exact = (
        lk.curvature.estimate(model, "categorical", [(x, y)], structure, how, generator=rng()).mean().dense()
        for how in ("auto", "exact")
    )
    assert sent == ["send_all"]
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["multi-label", "words", "last layer frozen"])
def test_other_heads_are_within_the_tolerance_too(kind: str, sent: list[str]) -> None:
    model, x, y = linear_net(8)
    likelihood: Any = "categorical"
    if kind == "multi-label":
        likelihood, y = "bernoulli", (normal(80, 8, seed=4) > 0).double()
    elif kind == "words":
        torch.manual_seed(0)
        model, x = Head(9).double(), normal(30, 5, 4, seed=1)
        with torch.no_grad():
            model.head.weight.mul_(8)
        y = torch.arange(150).reshape(30, 5) % 9
        y[::3, 2:] = -100
    else:
        model[1].requires_grad_(False)
    exact = factors(lk.curvature.estimate(model, likelihood, [(x, y)]))[0]
    errors = []
    for seed in range(25):
        drawn = lk.curvature.estimate(model, likelihood, [(x, y)], "kron", "auto", tolerance=0.1, generator=rng(seed))
        errors.append(float((factors(drawn)[0] - exact).norm() / exact.norm()))
    assert "send_chosen" in sent
    assert 0 < (sum(e**2 for e in errors) / len(errors)) ** 0.5 <= 0.1 * 1.5  # norms without W_L, where it is frozen


def test_above_most_columns_the_error_is_said_once() -> None:
    model, x, y = linear_net()
    with pytest.warns(
        UserWarning, match=r"tolerance=0.01 needs .* columns per example, and most=0.5 .* about 0\."
    ) as seen:
        lk.curvature.estimate(model, "categorical", [(x, y)] * 3, "kron", "auto", most=0.5, generator=rng())
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.curvature.estimate(model, "categorical", [(x, y)], "kron", "auto", tolerance=0.1, generator=rng())


def test_the_error_that_is_said_is_that_of_the_draw() -> None:
    """``Σ (1/p − 1) w²`` beside the curvature's own square, for those that can be drawn."""
    with pytest.warns(UserWarning, match=r"needs 3 columns per example, and most=128 .* about 0\.5\. Raise"):
        auto.Automatic()._tell(3.0, torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.5, 1.0, 0.0]), 4.0)


@pytest.mark.parametrize("many", [2, 6])
def test_the_size_of_the_curvature_is_its_diagonals_where_outputs_are_many(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "MANY", many)
    model, x, y = linear_net()
    likelihood = lk.likelihoods.get_likelihood("categorical")
    observation = Tracer(model, None).observe((x, y))
    outputs = observation.outputs.detach()
    root = likelihood.root(outputs, y)
    weights, size = auto._weighed(observation, columns.OutputCurvature(likelihood, outputs, observation.targets), root)
    hessian = likelihood.hessian(outputs, y).sum(0)
    if many < 6:
        assert size == pytest.approx(float(hessian.diagonal().square().sum()))
    else:
        last = model[1].weight.detach()
        assert size == pytest.approx(float((last.T @ hessian @ last).square().sum()))
    assert weights.shape == (80, 1, root.count)


@pytest.mark.parametrize(
    ("options", "said"), [({"tolerance": 0.0}, "tolerance"), ({"tolerance": 1.0}, "tolerance"), ({"most": 0}, "most")]
)
def test_other_values_are_refused(options: dict[str, float], said: str) -> None:
    model, _, _ = linear_net()
    with pytest.raises(lk.errors.LaplaceKFError, match=f"{said} must be"):
        lk.LaplacePosterior(model, "categorical", estimator="auto", **options)


def test_posteriors_and_optimisers_take_it(tmp_path: Any) -> None:
    model, x, y = linear_net()
    posterior = lk.LaplacePosterior(model, "categorical", estimator="auto", tolerance=0.05).fit((x, y), generator=rng())
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    assert again.estimator.options() == {"tolerance": 0.05, "most": 128.0}
    optimizer = lk.optim.GaussNewton(model, "categorical", estimator="auto", tolerance=0.05, generator=rng())
    losses = [float(optimizer.step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_minibatch_is_added_up_once(monkeypatch: pytest.MonkeyPatch, sent: list[str]) -> None:
    """The output's curvature is the last layer's factor, and what the error is measured by."""
    model, x, y = linear_net()
    wanted = lk.curvature.estimate(model, "categorical", [(x, y)], estimator="auto", generator=rng()).mean().dense()
    found: list[int] = []
    likelihood = lk.likelihoods.Categorical()
    real = likelihood.summed_curvature
    monkeypatch.setattr(likelihood, "summed_curvature", lambda z, *more: (found.append(len(z)), real(z, *more))[1])
    both = lk.curvature.estimate(model, likelihood, [(x[:50], y[:50]), (x[50:], y[50:])], estimator="auto")
    assert found == [50, 30] and both.count == 80
    again = lk.curvature.estimate(model, likelihood, [(x, y)], estimator="auto", generator=rng()).mean().dense()
    assert torch.equal(again, wanted) and sent
