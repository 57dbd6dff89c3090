"""Intervals and sets: closed forms without calibration, coverage with it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk

C = 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two outputs whose noise grows with the input and is no normal one."""
    x = torch.rand(n, 1, generator=rng(seed), dtype=torch.float64) * 4 - 2
    noise = torch.rand(n, 2, generator=rng(seed + 1), dtype=torch.float64).log() + 1
    return x, torch.cat([x.sin(), x], 1) + 0.3 * (1 + x.abs()) * noise


def classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, generator=rng(seed), dtype=torch.float64)
    logits = x @ torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
    return x, torch.multinomial(logits.softmax(-1), 1, generator=rng(seed + 1))[:, 0]


def posterior(kind: str) -> lk.LaplacePosterior:
    torch.manual_seed(1)
    if kind == "gaussian":
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        return lk.LaplacePosterior(model, "gaussian", prior_precision=3.0).fit(regression(60, 100))
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, C)).double()
    with torch.no_grad():
        model[2].weight *= 4  # an overconfident network that knows little
    return lk.LaplacePosterior(model, "categorical", prior_precision=3.0).fit(classes(60, 100))


def test_intervals_without_calibration() -> None:
    p = posterior("gaussian")
    x = regression(5, 3)[0]
    found = p.predict(x, method="linearized")
    z = 1.6448536269514722
    lower, upper = found.interval(0.9)
    torch.testing.assert_close(lower, found.mean - z * found.variance.sqrt())
    torch.testing.assert_close(upper, found.mean + z * found.variance.sqrt())
    lower, upper = found.interval(0.9, of="mean")
    torch.testing.assert_close(upper - lower, 2 * z * found.epistemic_variance.sqrt())
    again = p.predict_interval(x, 0.9, of="mean", method="linearized")
    torch.testing.assert_close(again[0], lower)


def by_hand_set(probs: Tensor, threshold: float, inclusive: bool) -> Tensor:
    found = torch.zeros_like(probs, dtype=torch.bool)
    for n, row in enumerate(probs):
        for c in range(len(row)):
            above = sum(float(p) for p in row if p > row[c])
            found[n, c] = above <= threshold + 1e-12 if inclusive else above < threshold
    return found


def test_sets_without_calibration() -> None:
    found = posterior("categorical").predict(classes(30, 3)[0], method="map")
    sets = found.prediction_set(0.8)
    assert torch.equal(sets, by_hand_set(found.probs, 0.8, False))
    assert bool(((found.probs * sets).sum(-1) >= 0.8).all()) and bool(sets.any(-1).all())


def test_equally_probable_classes_stand_together() -> None:
    from laplace_kf.outputs.conformal import _more_probable

    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    wanted = torch.tensor([[0, 0, 0, 0], [0.8, 0, 0.8, 0], [0, 0.7, 0.7, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(_more_probable(probs), wanted)


@pytest.mark.parametrize("method", ["linearized", "map", "mc"])
def test_calibrated_intervals_by_hand_and_saved(method: str, tmp_path: Path) -> None:
    p = posterior("gaussian")
    x, y = regression(49, 5)
    if method == "mc":
        p.calibrate((x, y), method=method, samples=10, generator=rng(2))
        lower, upper = p.predict(x, method=method, samples=10, generator=rng(3)).interval(0.8)
        assert 0.7 <= float(((lower <= y) & (y <= upper)).double().mean()) <= 0.95
        return
    p.calibrate([(x[:20], y[:20]), (x[20:], y[20:])], method=method)
    raw = p.predict(x, method=method)
    scores = ((y - raw.mean).abs() / raw.variance.sqrt()).sort(0).values
    q = scores[math.ceil(50 * 0.9) - 1]
    new = regression(5, 9)[0]
    found = p.predict(new, method=method)
    lower, upper = found.interval(0.9)
    torch.testing.assert_close(lower, found.mean - q * found.variance.sqrt())
    torch.testing.assert_close(upper, found.mean + q * found.variance.sqrt())
    p.save(tmp_path / "p.safetensors")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model).predict_interval(new, 0.9, method=method)
    torch.testing.assert_close(again[0], lower)
    # another method is on another scale: not calibrated
    other = "map" if method == "linearized" else "linearized"
    assert p.predict(new, method=other).calibration is None
    p.prior_precision = 2.0
    assert p.predict(new, method=method).calibration is None


def test_calibrated_sets_by_hand() -> None:
    p, (x, y) = posterior("categorical"), classes(39, 5)
    p.calibrate((x, y), method="probit")
    probs = p.predict(x, method="probit").probs
    scores = sorted(sum(float(v) for v in row if v > row[label]) for row, label in zip(probs, y.tolist(), strict=True))
    threshold = scores[math.ceil(40 * 0.8) - 1]
    found = p.predict(classes(30, 9)[0], method="probit")
    assert torch.equal(found.prediction_set(0.8), by_hand_set(found.probs, threshold, True))


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_coverage_of_exchangeable_data(kind: str) -> None:
    """Over many splits into calibration and new data the coverage is the level, where the raw one is far off."""
    p = posterior(kind)
    method = "linearized" if kind == "gaussian" else "probit"
    make: Any = regression if kind == "gaussian" else classes
    levels, repetitions, n = (0.8, 0.9), 60, 99
    covered, raw, size = (dict.fromkeys(levels, 0.0) for _ in range(3))
    for k in range(repetitions):
        x, y = make(n + 100, 1000 + 10 * k)
        new = p.predict(x[n:], method=method)
        p.calibrate((x[:n], y[:n]), method=method)
        found = p.predict(x[n:], method=method)
        for level, (prediction, shares) in itertools.product(levels, ((new, raw), (found, covered))):
            if kind == "gaussian":
                lower, upper = prediction.interval(level)
                shares[level] += float(((lower <= y[n:]) & (y[n:] <= upper)).double().mean()) / repetitions
            else:
                sets = prediction.prediction_set(level)
                shares[level] += float(sets.gather(1, y[n:, None]).double().mean()) / repetitions
                size[level] += float(sets.double().sum(-1).mean()) / repetitions if prediction is found else 0.0
        p.n_data = p.n_data  # drops the calibration
    for level in levels:
        # the standard error of the mean over 60 splits is about 0.006
        assert level - 0.02 <= covered[level] <= level + (0.03 if kind == "gaussian" else 0.08)
        assert abs(covered[level] - level) < abs(raw[level] - level) or kind == "categorical"
        assert kind == "gaussian" or size[level] < C


def test_too_few_examples_warn_and_cover_everything() -> None:
    p = posterior("gaussian").calibrate(regression(8, 5), method="map")
    with pytest.warns(UserWarning, match=r"8 calibration examples are too few for level 0.9 \(it takes 9\)"):
        lower, upper = p.predict(regression(3, 1)[0], method="map").interval(0.9)
    assert bool(torch.isinf(lower).all()) and bool(torch.isinf(upper).all())
    q = posterior("categorical").calibrate(classes(3, 5), method="map")
    with pytest.warns(UserWarning, match="too few"):
        assert bool(q.predict(classes(3, 1)[0], method="map").prediction_set(0.9).all())
    p.calibrate(regression(9, 5), method="map").predict(regression(3, 1)[0], method="map").interval(0.9)


def test_ignored_targets_are_no_examples() -> None:
    p, (x, y) = posterior("categorical"), classes(30, 5)
    p.calibrate((x, torch.where(torch.arange(30) < 20, y, -100)), method="map")
    few = posterior("categorical").calibrate((x[:20], y[:20]), method="map")
    new = classes(10, 6)[0]
    assert torch.equal(
        p.predict(new, method="map").prediction_set(0.8), few.predict(new, method="map").prediction_set(0.8)
    )


def test_refusals() -> None:
    p, q = posterior("gaussian"), posterior("categorical")
    x = regression(3, 1)[0]
    for level in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="between 0 and 1"):
            p.predict(x, method="map").interval(level)
    with pytest.raises(ValueError, match="'observation', 'mean'"):
        p.predict(x, method="map").interval(0.9, of="median")
    with pytest.raises(lk.errors.IncompatiblePair, match="prediction_set"):
        q.predict(classes(3, 1)[0], method="map").interval(0.9)
    with pytest.raises(lk.errors.IncompatiblePair, match="sets of classes"):
        p.predict(x, method="map").prediction_set(0.9)
    with pytest.raises(lk.errors.ShapeMismatch):
        p.calibrate([], method="map")
    with pytest.raises(lk.errors.NotFitted):
        lk.LaplacePosterior(nn.Linear(1, 2), "gaussian").calibrate(regression(9, 1))
    torch.manual_seed(0)
    steps = lk.LaplacePosterior(nn.Linear(2, C).double(), "categorical")
    z = torch.randn(6, 3, 2, dtype=torch.float64)
    steps.fit((z, torch.zeros(6, 3, dtype=torch.long)))
    with pytest.raises(lk.errors.IncompatiblePair, match=r"one position.*not exchangeable"):
        steps.calibrate((z, torch.zeros(6, 3, dtype=torch.long)), method="map")
