"""Conditional Gaussians beside dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NonFinite, NotFitted, NotPositiveDefinite, ShapeMismatch, UnknownName
from laplace_kf.operators import Spectral, conditional
from laplace_kf.operators.spectral import Basis


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(40, 5, generator=rng, dtype=torch.float64), torch.randint(3, (40,), generator=rng)


def fitted(structure: str = "kron", **settings: object) -> lk.LaplacePosterior:
    return lk.LaplacePosterior(mlp(), "categorical", structure=structure, **{"prior_precision": 0.5, **settings}).fit(
        data()
    )


def scattered(posterior: lk.LaplacePosterior, share: float = 0.5) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {name: torch.rand(value.shape, generator=rng) < share for name, value in posterior.mean.items()}


def joined(posterior: lk.LaplacePosterior, parts: dict[str, Tensor]) -> Tensor:
    return posterior.precision.layout.join({name: part[None] for name, part in parts.items()})[0]


def dense(posterior: lk.LaplacePosterior, held: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(P,)`` and covariance ``(P, P)`` from the covariance of everything."""
    covariance, mean = torch.linalg.inv(posterior.precision.dense()), posterior.gaussian.mean
    gain = covariance[:, held] @ torch.linalg.inv(covariance[held][:, held])
    return mean + gain @ (wanted - mean)[held], covariance - gain @ covariance[held]


def check(posterior: lk.LaplacePosterior, masks: dict[str, Tensor], way: str = "") -> None:
    rng = torch.Generator().manual_seed(3)
    values = {n: torch.randn(m.shape, generator=rng, dtype=torch.float64) for n, m in masks.items()}
    found = posterior.condition(values, masks)
    held, wanted = joined(posterior, masks), joined(posterior, values)
    mean, covariance = dense(posterior, held, wanted)
    torch.testing.assert_close(joined(posterior, dict(found)), mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        joined(posterior, found.variances()), covariance.diagonal().clamp_min(0), atol=1e-9, rtol=1e-7
    )
    for name, mask in masks.items():
        assert torch.equal(found[name][mask], values[name][mask])
    if way:
        assert way in found.free.ways.values(), found.free.ways


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "lowrank", "full", "isotropic"])
def test_scattered_weights_of_every_structure(structure: str) -> None:
    posterior = fitted(structure)
    check(posterior, scattered(posterior))


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("settings", [{}, {"damping": "factored"}, {"structure": "ekfac"}], ids=str)
def test_large_blocks_by_conjugate_gradients(
    share: float, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "DENSE", 0)
    posterior = fitted(**settings)
    check(posterior, scattered(posterior, share), "iterated, by the inverse" if share < 0.2 else "iterated, by rows")


def test_sums_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "DENSE", 0)
    x, y = data()
    for posterior in (
        fitted().update((x + 1, y)),
        fitted("ekfac", prior_precision={"*.weight": 0.5, "*.bias": 2.0}),
    ):
        check(posterior, scattered(posterior), "iterated, by the diagonal")


def test_conjugate_gradients_that_do_not_end_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "DENSE", 0)
    monkeypatch.setattr(conditional, "ITERATIONS", 1)
    posterior = fitted()
    with pytest.warns(RuntimeWarning, match="stopped after 1 steps"):
        posterior.condition(0.0, scattered(posterior))


@pytest.mark.parametrize("damping", ["exact", "factored", "balanced"])
def test_whole_rows_and_columns_cut_the_factors(damping: str) -> None:
    posterior = fitted(damping=damping)
    row, column = torch.zeros(7, 5, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
    row[[1, 4]] = True
    column[:, 2] = True
    bias = torch.zeros(3, dtype=torch.bool)
    masks = {"0.weight": row, "0.bias": row[:, 0].clone(), "2.weight": column, "2.bias": bias}
    check(posterior, masks, "factors")


def tokens() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    return model, torch.randint(6, (30, 3), generator=torch.Generator().manual_seed(5))


def convolutions() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).double()
    return model, torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("make", [tokens, convolutions])
def test_other_layers(
    make: Callable[[], tuple[nn.Module, Tensor]], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(conditional, "DENSE", 0)
    model, x = make()
    y = torch.randint(3, (30,), generator=torch.Generator().manual_seed(6))
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    check(posterior, scattered(posterior, 0.6))


def test_single_weights_of_a_subnetwork() -> None:
    posterior = fitted("full", parameters=lk.Subnetwork(size=20))
    covered = posterior.precision.layout.split(torch.ones(1, 20))
    masks = {name: covered[name][0].bool() & mask for name, mask in scattered(posterior).items()}
    found = posterior.condition(0.0, masks)
    held = joined(posterior, masks)
    mean, _ = dense(posterior, held, torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(joined(posterior, dict(found)), mean)
    for name, value in posterior.mean.items():  # the constants stay
        outside = ~covered[name][0].bool()
        assert torch.equal(found[name][outside], value[outside])
    with pytest.raises(IncompatiblePair, match="subnetwork"):
        posterior.condition(0.0, {name: torch.ones_like(mask) for name, mask in masks.items()})


@pytest.mark.parametrize("structure", ["kron", "full", "diag"])
@pytest.mark.parametrize("by_name", [True, False])
def test_linear_constraints(structure: str, by_name: bool) -> None:
    posterior = fitted(structure)
    size = posterior.precision.size
    rng = torch.Generator().manual_seed(4)
    rows = torch.randn(3, size, generator=rng, dtype=torch.float64)
    targets = torch.randn(3, generator=rng, dtype=torch.float64)
    if by_name:
        rows[:, 35:] = 0  # of the first weight alone
    given = {"0.weight": rows[:, :35].reshape(3, 7, 5)} if by_name else rows
    masks = scattered(posterior, 0.3)
    held = joined(posterior, masks)
    found = posterior.condition(0.0, masks, constraints=(given, targets))
    mean, covariance = dense(posterior, held, torch.zeros(size, dtype=torch.float64))
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T)
    torch.testing.assert_close(joined(posterior, dict(found)), mean + gain @ (targets - rows @ mean))
    left = (covariance - gain @ rows @ covariance).diagonal().clamp_min(0)
    torch.testing.assert_close(joined(posterior, found.variances()), left, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(rows @ joined(posterior, dict(found)), targets)
    alone = posterior.condition(constraints=(given, targets))
    torch.testing.assert_close(rows @ joined(posterior, dict(alone)), targets)


def test_draws_are_conditioned_draws() -> None:
    posterior = fitted()
    masks = scattered(posterior)
    found = posterior.condition(0.0, masks)
    held = joined(posterior, masks)
    drawn = found.sample(3, torch.Generator().manual_seed(7))
    plain = posterior.sample(3, torch.Generator().manual_seed(7))
    precision = posterior.precision.dense()
    free = ~held
    for k in range(3):
        one, other = (joined(posterior, {n: v[k] for n, v in parts.items()}) for parts in (drawn, plain))
        wanted = torch.zeros_like(one)
        wanted[free] = other[free] + torch.linalg.solve(
            precision[free][:, free], precision[free][:, held] @ other[held]
        )
        torch.testing.assert_close(one, wanted)
    many = found.sample(4000, torch.Generator().manual_seed(8))
    flat = torch.cat([many[name].flatten(1) for name in found], 1)
    _, covariance = dense(posterior, held, torch.zeros(len(held), dtype=torch.float64))
    torch.testing.assert_close(flat.T.cov()[free][:, free], covariance[free][:, free], atol=0.2, rtol=0)


def test_the_model_is_a_copy_with_the_new_weights() -> None:
    posterior = fitted()
    before = {name: value.clone() for name, value in posterior.model.state_dict().items()}
    masks = scattered(posterior)
    found = posterior.condition(0.0, masks)
    made = found.model()
    assert made is not posterior.model
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, found[name])
        assert not parameter[masks[name]].any()
    for name, value in posterior.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_values_without_masks_hold_whole_parameters_and_masks_without_values_hold_the_mean() -> None:
    posterior = fitted("full")
    found = posterior.condition({"2.bias": 0.0}, {"0.bias": torch.ones(7, dtype=torch.bool)})
    assert not found["2.bias"].any()
    assert torch.equal(found["0.bias"], posterior.mean["0.bias"])
    held = torch.zeros(posterior.precision.size, dtype=torch.bool)
    held[35:42] = held[-3:] = True
    wanted = posterior.gaussian.mean.clone()
    wanted[-3:] = 0
    torch.testing.assert_close(joined(posterior, dict(found)), dense(posterior, held, wanted)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_values_are_exact_in_every_type(dtype: torch.dtype) -> None:
    x, y = data()
    posterior = lk.LaplacePosterior(mlp().to(dtype), "categorical").fit((x.to(dtype), y))
    masks = scattered(posterior)
    values = {name: (value * 8).round() / 8 for name, value in posterior.mean.items()}
    found = posterior.condition(values, masks)
    for name, mask in masks.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name][mask], values[name][mask])
    reference = fitted(prior_precision=1.0)
    if dtype == torch.float32:
        exact = reference.condition({n: v.double() for n, v in values.items()}, masks)
        for name in found:
            torch.testing.assert_close(found[name].double(), exact[name], atol=1e-3, rtol=1e-3)


def test_refusals_say_what_is_allowed() -> None:
    with pytest.raises(NotFitted):
        lk.LaplacePosterior(mlp(), "categorical").condition(0.0)
    posterior = fitted()
    mask = torch.zeros(7, 5, dtype=torch.bool)
    with pytest.raises(IncompatiblePair, match=r"condition\(values=0.0"):
        posterior.condition(masks={"0.weight": mask})
    with pytest.raises(UnknownName, match=r"0\.weight"):
        posterior.condition({"weight": 0.0})
    with pytest.raises(UnknownName):
        posterior.condition(0.0, {"0.weigth": mask})
    with pytest.raises(ShapeMismatch, match=r"\(7, 5\)"):
        posterior.condition(0.0, {"0.weight": mask.T})
    with pytest.raises(ShapeMismatch, match="bool"):
        posterior.condition(0.0, {"0.weight": mask.float()})
    with pytest.raises(ShapeMismatch, match=r"\(7, 5\)"):
        posterior.condition({"0.weight": torch.zeros(5)}, {"0.weight": mask})
    with pytest.raises(ShapeMismatch, match="by parameter name"):
        posterior.condition(torch.zeros(3))
    with pytest.raises(NonFinite, match=r"0\.weight"):
        posterior.condition({"0.weight": float("nan")})
    rows = torch.ones(2, posterior.precision.size, dtype=torch.float64)
    with pytest.raises(IncompatiblePair, match="not independent"):
        posterior.condition(constraints=(rows, torch.zeros(2)))
    with pytest.raises(IncompatiblePair, match="not independent"):
        posterior.condition(0.0, constraints=(rows[:1], torch.zeros(1)))  # everything is held
    with pytest.raises(ShapeMismatch, match=r"\(K, P\)"):
        posterior.condition(constraints=(rows[:, 1:], torch.zeros(2)))
    with pytest.raises(ShapeMismatch, match=r"\(2, 7, 5\)"):
        posterior.condition(constraints=({"0.weight": torch.zeros(2, 35)}, torch.zeros(2)))
    with pytest.raises(UnknownName):
        posterior.condition(constraints=({"weight": torch.zeros(2, 35)}, torch.zeros(2)))
    with pytest.raises(NonFinite):
        posterior.condition(constraints=(rows[:1] * float("inf"), torch.zeros(1)))


def test_a_singular_precision_is_refused_before_anything_is_iterated() -> None:
    """With nearly all weights free, where its inverse is what the iteration starts from."""
    free = torch.ones(1, 3, 4, dtype=torch.bool)
    free[0, 0, 0] = False
    singular = Spectral(Basis.identity(), Basis.identity(), torch.zeros(1, 3, 4, dtype=torch.float64), "block")
    with pytest.raises(NotPositiveDefinite, match="block"):
        conditional._Iterated(singular, free)
