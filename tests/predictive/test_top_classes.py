"""The most probable classes of a prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk

CLASSES = 6


def fitted(shape: tuple[int, ...] = ()) -> tuple[Any, Tensor]:
    """A classifier of examples, or of the positions of sequences or images."""
    torch.manual_seed(0)
    head: nn.Module = nn.Conv2d(3, CLASSES, 1) if len(shape) == 2 else nn.Linear(3, CLASSES)
    x = torch.randn(7, 3, *shape) if len(shape) == 2 else torch.randn(7, *shape, 3)
    y = torch.randint(0, CLASSES, (7, *shape))
    return lk.LaplacePosterior(nn.Sequential(head).double(), "categorical").fit((x.double(), y)), x.double()


@pytest.mark.parametrize(("shape", "axis"), [((), 1), ((4,), 2), ((2, 3), 1)])
def test_they_are_the_first_of_the_sorted_classes(shape: tuple[int, ...], axis: int) -> None:
    posterior, x = fitted(shape)
    prediction = posterior.predict(x, method="probit")
    found = prediction.top_k(2)
    ordered = prediction.probs.sort(axis, descending=True)
    torch.testing.assert_close(found.probs, ordered.values.narrow(axis, 0, 2))
    assert torch.equal(found.classes, ordered.indices.narrow(axis, 0, 2))
    torch.testing.assert_close(found.rest, ordered.values.narrow(axis, 2, CLASSES - 2).sum(axis))
    everything = prediction.top_k(CLASSES)
    assert not everything.rest.any()


def test_the_rest_is_no_rounding_error() -> None:
    posterior, x = fitted()
    with torch.no_grad():
        posterior.model[0].bias[0] = 60.0
    posterior.fit((x, torch.zeros(7, dtype=torch.long)))
    found = posterior.predict(x, method="map").top_k(1)
    assert bool((found.rest > 0).all())
    assert float(found.rest.max()) < 1e-18


@pytest.mark.parametrize("method", ["map", "probit", "linearized", "mc"])
def test_a_loader_gives_what_its_batches_give(method: str) -> None:
    posterior, x = fitted()
    settings: dict[str, Any] = {"method": method, "samples": 5, "space": "weights"}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    loader = DataLoader(TensorDataset(x, torch.zeros(7, dtype=torch.long)), 3)
    for asked in (posterior, lk.Mixture([posterior])):
        once = asked.predict_top_k(x, 2, generator=generator(), **settings)
        parts = asked.predict_top_k(loader, 2, generator=generator(), **settings)
        wanted = asked.predict(x, generator=generator(), **settings).top_k(2)
        for name in ("classes", "probs", "rest"):
            torch.testing.assert_close(getattr(once, name), getattr(wanted, name))
            torch.testing.assert_close(getattr(parts, name), getattr(wanted, name))


def test_a_predictor_has_them_too() -> None:
    posterior, x = fitted()
    prediction = posterior.predictor(3, torch.Generator().manual_seed(0))(x)
    torch.testing.assert_close(prediction.top_k(1).probs[:, 0], prediction.probs.amax(1))


@pytest.mark.parametrize("k", [0, -1, CLASSES + 1, 1.0, True, "2"])
def test_other_numbers_are_refused(k: Any) -> None:
    posterior, x = fitted()
    with pytest.raises(ValueError, match=f"whole number from 1 to {CLASSES}"):
        posterior.predict_top_k(x, k)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_predictions_without_classes_are_refused(likelihood: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randint(0, 2, (7, 4)).float()
    posterior = lk.LaplacePosterior(nn.Linear(3, 4), likelihood).fit((x, y))
    with pytest.raises(lk.errors.IncompatiblePair, match="exclude each other"):
        posterior.predict_top_k(x, 2)


def test_batches_of_several_lengths_are_refused() -> None:
    posterior, x = fitted((4,))
    batches = [x[:3], x[3:, :2]]
    with pytest.raises(lk.errors.ShapeMismatch, match="several shapes"):
        posterior.predict_top_k(iter(batches), 2, method="map")
