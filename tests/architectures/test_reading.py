"""``inputs=`` and ``targets=`` beside ``forward=``, at every entry point; rows of predictions."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.reading import Reading
from tests.cases import labels, normal, rng

N, C = 6, 3
FIRST = {"inputs": lambda batch: batch[0], "targets": lambda batch: batch[1]}
METHODS = ["map", "mc", "linearized", "probit"]


def plain(features: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, C)).double()


def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(*shape), labels(C, *shape[:-1]), torch.ones(shape[0])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ entry points


@pytest.mark.parametrize("shape", [(N, 4), (N, 5, 4), (N, N, 4)])
def test_a_posterior_takes_inputs_as_the_model_does_and_whole_batches(shape: tuple[int, ...]) -> None:
    model, (x, y, w) = plain(), triple(*shape)
    mine = lk.LaplacePosterior(model, "categorical", structure="diag", **FIRST).fit([(x, y, w)])
    wanted = lk.LaplacePosterior(model, "categorical", structure="diag").fit([(x, y)])
    same(mine.precision.diag(), wanted.precision.diag())
    for given in (x, (x, y, w), [x, None, None], x.numpy()):
        for method in METHODS:
            found = mine.predict(given, method=method, samples=3, generator=rng(1)).probs
            same(found, wanted.predict(x, method=method, samples=3, generator=rng(1)).probs)
        same(mine.functional_covariance(given), wanted.functional_covariance(x))
        same(mine.predictor(3, rng(1))(given).probs, wanted.predictor(3, rng(1))(x).probs)
    grid: dict[str, Any] = {"n_data": [5.0, 9.0], "prior_precision": [1.0], "samples": 3}
    found = mine.tune([(x, y, w)], generator=rng(1), **grid).table
    assert found == wanted.tune([(x, y)], generator=rng(1), **grid).table


def test_update_and_load_take_them(tmp_path: Any) -> None:
    model, (x, y, w) = plain(), triple(N, 4)
    first = lk.LaplacePosterior(model, "categorical").fit([(x, y)])
    second = first.update([(w, x, y)], inputs=lambda b: b[1], targets=lambda b: b[2])
    same(second.precision.dense(), first.update([(x, y)]).precision.dense())
    first.save(tmp_path / "p.st")
    loaded = lk.LaplacePosterior.load(tmp_path / "p.st", model, inputs=lambda b: b["x"], targets=lambda b: b["y"])
    same(loaded.predict({"x": x}, method="map").probs, first.predict(x, method="map").probs)


def test_curvature_and_products_take_them() -> None:
    model, (x, y, w) = plain(), triple(N, 4)
    same(
        lk.curvature.estimate(model, "categorical", [(x, y, w)], **FIRST).mean().dense(),
        lk.curvature.estimate(model, "categorical", [(x, y)]).mean().dense(),
    )
    v = normal(sum(p.numel() for p in model.parameters()))
    for product in (lk.curvature.ggn_vector_product, lk.curvature.hessian_vector_product):
        same(product(model, "categorical", [(x, y, w)], v, **FIRST), product(model, "categorical", [(x, y)], v))


@pytest.mark.parametrize(
    "make", [lk.optim.kfac, lk.optim.kflr, lk.optim.kfra, lk.optim.ekfac, lk.optim.diagonal, lk.optim.HessianFree,
             lk.optim.natural_gradient]
)  # fmt: skip
def test_optimisers_take_them(make: Any) -> None:
    (x, y, w), one = triple(N, 4), plain()
    two = copy.deepcopy(one)
    losses = [
        float(make(one, "categorical", generator=rng(0), **FIRST).step((x, y, w))),
        float(make(two, "categorical", generator=rng(0)).step(x, y)),
    ]
    assert losses[0] == losses[1]
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        same(a.detach(), b.detach())


@pytest.mark.parametrize("kind", ["OnlineLaplace", "NonOnlineLaplace", "EWC", "SynapticIntelligence"])
def test_continual_methods_take_them(kind: str) -> None:
    make = getattr(lk.continual, kind)
    (x, y, w), penalties = triple(N, 4), []
    swapped = {"inputs": lambda b: b[1], "targets": lambda b: b[2]}
    for settings, task, batch in [({}, {}, (x, y)), (FIRST, {}, (x, y, w)), ({}, swapped, (w, x, y))]:
        model = plain()
        learner = make(model, "categorical", **settings)
        learner.after_task([batch], **task)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        penalties.append(float(learner.penalty().detach()))
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-12) == pytest.approx(penalties[2], rel=1e-12)
    model = plain()
    assert lk.continual.accuracy(model, [(x, y, w)], **FIRST) == lk.continual.accuracy(model, [(x, y)])


# ------------------------------------------------------------------------------------------------ what predict takes


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, C), nn.Linear(2, C)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.left(first) + 2 * self.right(second)


def test_several_inputs() -> None:
    torch.manual_seed(0)
    model = Two().double()
    a, b, y = normal(N, 2), normal(N, 2, seed=3), labels(C, N)
    fitted = lk.LaplacePosterior(model, "categorical", inputs=lambda t: t[:2], targets=lambda t: t[2]).fit([(a, b, y)])
    wanted = model(a, b).softmax(-1).detach()
    for x in ((a, b), (a, b, None), (a, b, y)):
        same(fitted.predict(x, method="map").probs, wanted)
    turned = lk.LaplacePosterior(model, "categorical", inputs=lambda t: (t[1], t[0]), targets=lambda t: t[2])
    turned.fit([(b, a, y)])
    same(turned.predict((b, a, None), method="map").probs, wanted)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"in another way; give it a whole batch.*tuple of 3"):
        turned.predict((a, b), method="map")
    named = lk.LaplacePosterior(
        model, "categorical", inputs=lambda t: {"first": t["a"], "second": t["b"]}, targets=lambda t: t["y"]
    ).fit([{"a": a, "b": b, "y": y}])
    for given in ({"a": a, "b": b}, {"first": a, "second": b}):
        same(named.predict(given, method="map").probs, wanted)


def test_the_inner_tuple_of_a_batch_is_what_the_model_takes() -> None:
    torch.manual_seed(0)
    model = Two().double()
    a, b, y = normal(N, 2), normal(N, 2, seed=3), labels(C, N)
    fitted = lk.LaplacePosterior(model, "categorical", **FIRST).fit([((a, b), y, torch.ones(N))])
    same(fitted.predict((a, b), method="map").probs, model(a, b).softmax(-1).detach())
    with pytest.raises(lk.errors.ShapeMismatch, match=r"it takes what the model takes \(a tuple of 2\)"):
        fitted.predict([a, b, y, y], method="map")


def test_targets_inside_the_tensor_of_a_batch() -> None:
    model, (x, y, _) = plain(), triple(N, 4)
    table = torch.cat([x, y[:, None].double()], 1)
    cut: dict[str, Any] = {"inputs": lambda t: t[:, :-1], "targets": lambda t: t[:, -1].long()}
    fitted = lk.LaplacePosterior(model, "categorical", **cut).fit([table])
    wanted = lk.LaplacePosterior(model, "categorical").fit([(x, y)])
    same(fitted.predict(x, method="probit").probs, wanted.predict(x, method="probit").probs)
    fitted.tune([table], n_data=[6.0], prior_precision=[1.0], samples=2)


# ------------------------------------------------------------------------------------------------ refusals


def test_functions_that_do_not_fit_are_refused() -> None:
    model, (x, y, w) = plain(), triple(N, 4)
    for wrong, message in [
        ({**FIRST, "forward": lambda m, b: (m(b[0]), b[1])}, "one or the other"),
        ({"inputs": FIRST["inputs"]}, "targets= is missing; for instance inputs=lambda"),
        ({"targets": FIRST["targets"]}, "inputs= is missing; for instance inputs=lambda"),
        ({"inputs": 0, "targets": 1}, "inputs= must be a function, got int"),
        ({"forward": "x"}, "forward= must be a function, got str"),
    ]:
        for make in (lk.LaplacePosterior, lk.optim.kfac, lk.optim.HessianFree, lk.continual.EWC):
            with pytest.raises(lk.errors.IncompatiblePair, match=message):
                make(model, "categorical", **wrong)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"inputs= does not work on a batch that is a tuple of 3: TypeE"):
        lk.LaplacePosterior(model, "categorical", inputs=lambda b: b["x"], targets=lambda b: b["y"]).fit([(x, y, w)])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"targets= does not work on a batch that is a mapping with"):
        lk.LaplacePosterior(model, "categorical", inputs=lambda b: b["x"], targets=lambda b: b["y"]).fit([{"x": x}])


@pytest.mark.parametrize("shape", [(20, 7, 4), (N, N, 4), (2, 5, 4), (2, 2, 4), (3, 3, 4), (1, 1, 4), (1, 5, 4)])
@pytest.mark.parametrize("forward", [lambda m, b: (m(b[0]), b[1]), lambda m, b: (m(next(iter(b))), None)])
def test_a_tensor_that_forward_reads_as_a_batch_is_refused_whatever_its_shape(forward: Any, shape: Any) -> None:
    """Also where as many positions as examples hide it."""
    model, (x, y, w) = plain(), triple(*shape)
    fitted = lk.LaplacePosterior(model, "categorical", forward=lambda m, b: (m(b[0]), b[1])).fit([(x, y, w)])
    fitted.forward = forward
    predictor = fitted.predictor(2)
    for given in (x, x.numpy()):
        asked = [partial(fitted.predict, method=m) for m in METHODS]
        for ask in (*asked, fitted.functional_covariance, predictor):
            with pytest.raises(lk.errors.ShapeMismatch, match=r"predict\(\(x, None\)\).*inputs=lambda batch"):
                ask(given)
    assert fitted.predict((x, None), method="map").probs.shape == (*shape[:-1], C)


def test_a_forward_that_unpacks_or_reads_a_tensor_rightly() -> None:
    model, (x, y, w) = plain(), triple(2, 5, 4)

    def unpacked(m: nn.Module, batch: Any) -> Any:
        first, second = batch
        return m(first), second

    fitted = lk.LaplacePosterior(model, "categorical", forward=unpacked).fit([(x, y)])
    with pytest.raises(lk.errors.ShapeMismatch, match="inputs= and targets= in place of forward="):
        fitted.predict(x)
    either = lambda m, b: (m(b), None) if isinstance(b, Tensor) else (m(b[0]), b[1])  # noqa: E731
    fine = lk.LaplacePosterior(model, "categorical", forward=either).fit([(x, y, w)])
    same(fine.predict(x, method="map").probs, model(x).softmax(-1).detach())


def test_readings_remember_no_tensors() -> None:
    reading = Reading(**FIRST)
    reading(plain(), triple(N, 4))
    assert not any(isinstance(value, Tensor) for value in vars(reading).values())
