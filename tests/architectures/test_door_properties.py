"""Properties at the door over random models: whose loss is meant, and how many rows a prediction has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import laplace_kf as lk
from laplace_kf import agreement
from laplace_kf.predictive import asked

SIZES = st.integers(2, 5)
BODIES = ["linear", "deep", "gelu", "attention", "convolution", "recurrent"]
quick = settings(max_examples=40, deadline=None, derandomize=True)


class Mixing(nn.Module):
    """Positions that see each other; whatever axes lie between examples and features are positions."""

    def __init__(self, kind: str, inside: int, outputs: int, width: int = 4) -> None:
        super().__init__()
        self.kind, self.into, self.head = kind, nn.Linear(inside, width), nn.Linear(width, outputs)
        self.mix: nn.Module
        if kind == "attention":
            self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        elif kind == "convolution":
            self.mix = nn.Conv1d(width, width, 3, padding=1)
        else:
            self.mix = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x).reshape(x.shape[0], -1, self.into.out_features)
        if self.kind == "attention":
            h = h + self.mix(h, h, h, need_weights=False)[0]
        elif self.kind == "convolution":
            h = torch.tanh(self.mix(h.mT)).mT
        else:
            h = self.mix(h)[0]
        return self.head(h).reshape(*x.shape[:-1], self.head.out_features)


def body(kind: str, inside: int, outputs: int) -> nn.Module:
    if kind in ("attention", "convolution", "recurrent"):
        return Mixing(kind, inside, outputs).double()
    if kind == "linear":
        return nn.Linear(inside, outputs).double()
    if kind == "deep":
        return nn.Sequential(nn.Linear(inside, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, outputs)).double()
    return nn.Sequential(nn.Linear(inside, 3), nn.GELU(), nn.Linear(3, outputs, bias=False)).double()


class Owner(nn.Module):
    """A model that returns its own loss, made of weighted log-densities of the labels ``shift`` positions later."""

    def __init__(self, inner: nn.Module, reduction: str, smoothing: float, shift: int, extra: float) -> None:
        super().__init__()
        self.inner, self.reduction, self.smoothing, self.shift, self.extra = inner, reduction, smoothing, shift, extra

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        z = self.inner(x)
        if labels is None:
            return {"logits": z}
        end = z.shape[1] - self.shift
        a, b = z[:, :end].flatten(0, 1), labels[:, self.shift :].flatten()
        loss = F.cross_entropy(a, b, reduction="sum", label_smoothing=self.smoothing)
        count = {"mean": float((b != -100).sum()), "examples": float(len(x)), "sum": 1.0, "items": 7.3}[self.reduction]
        return {"loss": loss / count + self.extra, "logits": z}


@quick
@given(
    kind=st.sampled_from(BODIES),
    reduction=st.sampled_from(["mean", "examples", "sum", "items"]),
    smoothing=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    shift=st.sampled_from([0, 0, 1]),
    extra=st.sampled_from([0.0, 0.0, 0.01]),
    sizes=st.tuples(SIZES, SIZES, SIZES, SIZES),
    ignored=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_losses_agree_if_and_only_if_they_are_one_function(
    kind: str, reduction: str, smoothing: float, shift: int, extra: float, sizes: Any, ignored: bool, seed: int
) -> None:
    n, t, d, c = sizes
    torch.manual_seed(seed)
    x, y = torch.randn(n, t, d, dtype=torch.float64), torch.randint(c, (n, t))
    if ignored:
        y[0, 0] = -100
    model = Owner(body(kind, d, c), reduction, smoothing, shift, extra).eval()
    batch, rule = {"x": x, "labels": y}, lk.likelihoods.Categorical()
    if smoothing or shift or extra:
        with pytest.raises(lk.errors.ShapeMismatch, match="own loss of the first minibatch"):
            agreement.require_same_loss(model, batch, None, rule)
    else:
        agreement.require_same_loss(model, batch, None, rule)


@quick
@given(
    kind=st.sampled_from(BODIES),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    inside=st.integers(1, 4),
    outputs=st.integers(1, 4),
    how=st.sampled_from(["inputs", "both", "first", "unpacked", "iterated"]),
    seed=st.integers(0, 10**6),
)
def test_predictions_have_a_row_for_every_example_or_are_refused(
    kind: str, shape: list[int], inside: int, outputs: int, how: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = body(kind, inside, outputs), torch.randn(*shape, inside, dtype=torch.float64)

    def unpacked(m: nn.Module, batch: Any) -> Any:
        a, b = batch
        return m(a), b

    forward = {
        "inputs": lk.reading.Reading(lambda b: b[0], lambda b: b[1]),
        "both": lambda m, b: (m(b if isinstance(b, Tensor) else b[0]), None),
        "first": lambda m, b: (m(b[0]), b[1] if len(b) > 1 else None),
        "unpacked": unpacked,
        "iterated": lambda m, b: (m(next(iter(b))), None),
    }[how]
    if how in ("inputs", "both"):
        found = lk.predictive.outputs_at(model, forward, None, asked(model, forward, x))
        torch.testing.assert_close(found, model(x).detach())
    else:
        with pytest.raises(lk.errors.ShapeMismatch):  # before anything is computed, or at the first pass
            lk.predictive.outputs_at(model, forward, None, asked(model, forward, x))
        found = lk.predictive.outputs_at(model, forward, None, (x, None))
        torch.testing.assert_close(found, model(x).detach())


def _sorted(m: nn.Module, batch: Any) -> Any:
    order = batch[0].flatten(1).sum(1).argsort()
    return m(batch[0][order]), batch[1][order]


MOVED: dict[str, Any] = {
    "sorted": _sorted,
    "reversed": lambda m, b: (m(b[0].flip(0)), b[1].flip(0)),
    "sorted outputs": lambda m, b: ((z := m(b[0]))[z.flatten(1)[:, 0].argsort()], b[1]),
}
OTHER: dict[str, Any] = {
    "left out": lambda m, b: (m(b[0][b[2] > 0.5]), b[1][b[2] > 0.5]),
    "halved": lambda m, b: (m(b[0][: len(b[0]) // 2]), b[1][: len(b[0]) // 2]),
    "repeated": lambda m, b: (m(b[0].repeat(2, *[1] * (b[0].dim() - 1))), b[1].repeat(2)),
}


@pytest.mark.parametrize("how", [*MOVED, *OTHER, "inputs="])
@pytest.mark.parametrize("count", [2, 9, 200])
def test_a_whole_batch_has_its_rows_in_their_order_or_is_refused(how: str, count: int) -> None:
    torch.manual_seed(1)
    model, x, y = body("deep", 4, 3), torch.randn(count, 4).double(), torch.arange(count) % 3
    batch = (x, y, (torch.arange(count) % 2).double())
    said: dict[str, Any]
    if how == "inputs=":
        said = {"inputs": lambda b: b[0][1:], "targets": lambda b: b[1][1:]}
    else:
        said = {"forward": {**MOVED, **OTHER}[how]}
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", **said).fit([batch])
    match = "another order" if how in MOVED else "a row for every example"
    if how in ("sorted", "sorted outputs") and count == 2:  # two may be in order already
        z = (x if how == "sorted" else model(x)).flatten(1)
        key = z.sum(1) if how == "sorted" else z[:, 0]
        if bool(key[0] < key[1]):
            return
    calls = [
        lambda: posterior.predict(batch, method="map"),
        lambda: posterior.predict(batch, method="mc", samples=3),
        lambda: posterior.functional_covariance(batch),
        lambda: posterior.predictor(3)(batch),
        lambda: posterior.ood_score(batch, kind="entropy"),
    ]
    for call in calls:
        with pytest.raises(lk.errors.ShapeMismatch, match=match):
            call()


def test_sorting_what_is_sorted_and_other_sums_over_rows_pass() -> None:
    torch.manual_seed(1)
    model, x, y = body("deep", 4, 3), torch.randn(30, 4).double(), torch.arange(30) % 3
    x = x[x.sum(1).argsort()]
    for forward in (_sorted, lambda m, b: (m(b[0]) + 0.0 * torch.rand(()), b[1])):
        posterior = lk.LaplacePosterior(model, "categorical", structure="diag", forward=forward).fit([(x, y)])
        torch.testing.assert_close(posterior.predict((x, y), method="map").probs, model(x).softmax(-1).detach())


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda m, b: m(b[0]), "Tensor"),
        (lambda m, b: (m(b[0]), b[1], b[0]), "tuple of 3"),
        (lambda m, b: None, "NoneType"),
    ],
)
def test_a_forward_returns_two_things(forward: Any, what: str) -> None:
    model, batch = body("linear", 4, 2), (torch.randn(2, 4).double(), torch.arange(2))
    with pytest.raises(lk.errors.ShapeMismatch, match=rf"must return \(outputs, targets\), it returned {what}"):
        lk.LaplacePosterior(model, "categorical", forward=forward).fit([batch])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"must return \(outputs, targets\)"):
        lk.optim.kfac(model, "categorical", forward=forward).step(batch)
    fitted = lk.LaplacePosterior(model, "categorical", forward=lambda m, b: (m(b[0]), b[1])).fit([batch])
    fitted.forward = forward
    with pytest.raises(lk.errors.ShapeMismatch, match=r"must return \(outputs, targets\)"):
        fitted.predict(batch, method="map")
