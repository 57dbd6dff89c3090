"""Layers whose rows are in another order or number than the examples, and inputs that belong to no example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import CATEGORICAL, labels, normal
from tests.classifiers import DOUBLE, agrees, data, seeded
from tests.oracles import jacobian


class TimeMajor(nn.Module):
    """Picks one time step of each sequence, in time-major layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, length: Tensor, gate: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x.transpose(0, 1)))
        return self.head(h[length - 1, torch.arange(len(length))] * gate[:, None])


@pytest.mark.parametrize("gate", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_rows_of_a_time_major_layer_whatever_the_gradients(gate: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 2, generator=rng, **DOUBLE)
    inputs = (x, torch.tensor([1, 2, 3, 4]), torch.tensor(gate, **DOUBLE))
    agrees(seeded(TimeMajor), inputs, torch.arange(4) % 3)


class Masked(nn.Module):
    """A head on the masked positions of all examples together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        out = h.new_zeros(*mask.shape, 3)
        out[mask] = self.head(h[mask])
        return out.sum(1)


def test_rows_in_no_regular_order_go_through_per_example_gradients() -> None:
    x = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0), **DOUBLE)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])  # as many rows as examples
    agrees(seeded(Masked), (x, mask), torch.arange(3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[first] = self.one(x[first])
        out[~first] = self.two(x[~first])
        return out


def test_experts_that_see_any_number_of_examples() -> None:
    x, y = data(8)
    for chosen in (x, x.abs(), torch.where(torch.arange(8)[:, None] % 2 == 0, x.abs(), -x.abs())):
        agrees(seeded(Experts), chosen, y)
        for structure in ("kron", "diag"):
            assert lk.curvature.estimate(seeded(Experts), "categorical", (chosen, y), structure).n_data == 8


class Sorted(nn.Module):
    """Puts the examples in an order that the data decide before a layer, and back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.first(x))[order])[order.argsort()]


class Mixture(nn.Module):
    """Two experts, each for some of an example's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).flatten(0, 1)
        choice, out = (x[..., 0] > 0).long().flatten(), h.new_zeros(len(h), 3)
        for k, expert in enumerate(self.experts):
            index = torch.where(choice == k)[0]
            out = out.index_add(0, index, expert(h[index]))
        return out.reshape(*x.shape[:2], 3).mean(1)


def _row_orders(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Three examples in regular order, then three in another, with equally many rows."""
    if kind == "sorted":
        x, y = data(6)
        x[:, 0] = torch.tensor([1, 2, 3, 3, 1, 2])
        return seeded(Sorted), x, y
    x = normal(6, 2, 3)
    x[..., 0] = torch.tensor([[1, -1], [1, -1], [1, -1], [1, 1], [-1, -1], [1, -1]])
    return seeded(Mixture), x, torch.arange(6) % 3


@pytest.mark.parametrize("kind", ["sorted", "experts"])
def test_rows_in_an_order_that_the_data_decide_are_never_taken_from_an_earlier_minibatch(kind: str) -> None:
    model, x, y = _row_orders(kind)
    expected = oracles.dense_ggn(model, x, y, CATEGORICAL.nll)
    regular, irregular = (x[:3], y[:3]), (x[3:], y[3:])
    for batches in ([(x, y)], [irregular, regular], [regular, irregular]):
        found = lk.curvature.estimate(model, "categorical", batches, "full").mean().dense()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class SharedMask(nn.Module):
    """Attention with an additive mask ``(T, T)`` in the batch, and a weight that needs per-example gradients."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.head, self.mask = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2), mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = torch.tensordot(x, self.weight * self.weight, 1) @ x.transpose(1, 2)
        return self.head((torch.softmax(scores + (self.mask if mask is None else mask), -1) @ x).mean(1))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (4, 4, 2)])
def test_a_mask_as_long_as_the_minibatch_is_not_cut_into_examples(sizes: tuple[int, ...]) -> None:
    x, y, mask = normal(10, 4, 3), labels(2, 10), torch.full((4, 4), -9.0, **DOUBLE).triu(1)
    model = seeded(SharedMask)
    expected = oracles.dense_ggn(seeded(SharedMask, mask), x, y, CATEGORICAL.nll)
    batches = [((a, mask), b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    found = lk.curvature.estimate(model, "categorical", batches, "full").mean().dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    posterior = lk.LaplacePosterior(model, "categorical", "full").fit(batches)
    jac = jacobian(seeded(SharedMask, mask), x[:4], 4)
    expected = jac @ torch.linalg.inv(10 * expected + torch.eye(len(expected), **DOUBLE)) @ jac.mT
    torch.testing.assert_close(posterior.functional_covariance((x[:4], mask)), expected, rtol=1e-8, atol=1e-10)


def test_outputs_that_depend_on_later_minibatches_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(0) if bool((x[:, 0] > 0).any()) else x
            return self.head(torch.tensordot(x, self.weight * self.weight, 1))

    x, y = data(6)
    x[:, 0] = torch.tensor([-1, -1, -1, 1, 1, 1])
    with pytest.raises(lk.errors.UnsupportedLayer, match="other examples"):
        lk.curvature.estimate(seeded(Net), "categorical", [(x[:3], y[:3]), (x[3:], y[3:])], "diag")


@pytest.mark.parametrize("count", [4, 20])
def test_covariances_with_a_mask_as_long_as_there_are_inputs(count: int) -> None:
    x, y, mask = normal(count, count, 3), labels(2, count), torch.full((count, count), -9.0, **DOUBLE).triu(1)
    model = seeded(SharedMask)
    posterior = lk.LaplacePosterior(model, "categorical", "full").fit([((x, mask), y)])
    jac = jacobian(seeded(SharedMask, mask), x, count)
    expected = jac @ torch.linalg.inv(posterior.precision.dense()) @ jac.mT
    torch.testing.assert_close(posterior.functional_covariance((x, mask)), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(lk.errors.ShapeMismatch, match="same length"):
        posterior.fit(((x, mask[:2]), y))
