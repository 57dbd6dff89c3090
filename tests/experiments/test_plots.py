"""What the pictures draw, read back from the figures."""

import math
from types import SimpleNamespace

import pytest
import torch

from laplace_kf.errors import ShapeMismatch
from laplace_kf.posterior import TuningResult
from laplace_kf.reports import plots


def test_risk_coverage_draws_the_curve_and_names_its_area():
    uncertainty = torch.linspace(0, 1, 100)
    loss = (torch.arange(100) >= 90).double()
    axis = plots.risk_coverage({"MAP": (uncertainty, loss), "Kronecker": (-uncertainty, loss)}).axes[0]
    x, y = (torch.tensor(values) for values in axis.lines[0].get_data())
    assert float(x[-1]) == 1.0 and float(y[-1]) == pytest.approx(0.1)
    assert float(y[(x - 0.9).abs().argmin()]) == 0.0
    area = 1000 * sum(max(0, k - 90) / k for k in range(1, 101)) / 100
    assert f"AURC {area:.3g} ‰" in axis.lines[0].get_label()
    assert axis.get_ylim()[1] > 0.9  # the poor curve starts with nothing but errors


def test_regression_band_has_the_stated_widths():
    x = torch.linspace(-1, 1, 5)
    mean, epistemic, total = x, torch.full((5,), 0.5), torch.full((5,), 0.7)
    for noise, wide, narrow in ((None, 1.0, 0.5), (total, 1.4, 1.0)):
        axis = plots.regression_band(x, mean, epistemic, noise, points=(x, x), truth=x, reference=x).axes[0]
        for band, half in zip(axis.collections[:2], (wide, narrow), strict=True):
            edges = [vertex for vertex in band.get_paths()[0].vertices.tolist() if abs(vertex[0] - 1) < 1e-6]
            assert max(v for _, v in edges) == pytest.approx(1 + half, abs=1e-5)
            assert min(v for _, v in edges) == pytest.approx(1 - half, abs=1e-5)
        assert {"predictive mean", "true function", "reference"} <= {line.get_label() for line in axis.lines}
        assert axis.get_xlabel() and axis.get_ylabel()
    with pytest.raises(ShapeMismatch, match="truth"):
        plots.regression_band(x, mean, epistemic, truth=x[:3])


def test_interval_calibration_of_a_calibrated_model_lies_on_the_diagonal():
    rng = torch.Generator().manual_seed(0)
    targets = 2 * torch.randn(20000, 1, generator=rng)
    zero = torch.zeros_like(targets)
    figure = plots.interval_calibration({"right": (zero, zero + 4, targets), "narrow": (zero, zero + 1, targets)})
    _, right, narrow = figure.axes[0].lines
    x, y = (torch.tensor(values) for values in right.get_data())
    assert (x - y).abs().max() < 0.02
    half = torch.tensor(narrow.get_data()[1])[49]  # 0.5 nominal: |z| < 0.674 / 2
    assert float(half) == pytest.approx(math.erf(0.6745 / 2 / math.sqrt(2)), abs=0.02)


def test_decision_map_paints_classes_and_entropy():
    def predict(x):
        p = torch.sigmoid(20 * x[:, 0])
        probs = torch.stack([1 - p, p], 1)
        return SimpleNamespace(probs=probs, entropy=torch.special.entr(probs).sum(1))

    points = (torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    figure = plots.decision_map(predict, ((-2, 2), (-1, 1)), points=points, resolution=21)
    decision, doubt = (torch.as_tensor(axis.images[0].get_array()) for axis in figure.axes[:2])
    assert decision.shape == (21, 21, 3)
    assert decision[0, 0, 2] > decision[0, 0, 0] and decision[0, -1, 0] > decision[0, -1, 2]  # blue left, orange right
    assert float(doubt[:, 10].min()) == pytest.approx(math.log(2), abs=1e-6)
    assert float(doubt[:, 0].max()) < 1e-6
    assert len(figure.legends[0].get_texts()) == 2
    with pytest.raises(ShapeMismatch, match="probabilities"):
        plots.decision_map(lambda x: SimpleNamespace(probs=torch.zeros(3, 2)), ((0, 1), (0, 1)))


def test_effective_parameters_are_shares_with_numbers():
    rows = [SimpleNamespace(name="first", effective=5.0, size=20), SimpleNamespace(name="", effective=3.0, size=3)]
    axis = plots.effective_parameters(rows).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1.0, 1.0, 0.25, 1.0]
    assert [text.get_text() for text in axis.texts] == ["5.0 of 20", "3.0 of 3"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["first", "(root)"]


def test_tuning_map_of_scattered_points():
    table = [{"n_data": 10.0**k, "prior_precision": 3.0 * k + 1, "objective": (k - 1.0) ** 2} for k in range(4)]
    axis = plots.tuning_map(TuningResult(table, table[1], False)).axes[0]
    dots, ring = axis.collections
    assert dots.get_offsets().tolist() == [[row["n_data"], row["prior_precision"]] for row in table]
    assert ring.get_offsets().tolist() == [[10.0, 4.0]]


def test_tuning_map_marks_the_best_point():
    table = [
        {"n_data": n, "prior_precision": p, "objective": abs(math.log10(n) - 2) + p}
        for n in (10.0, 100.0, 1000.0)
        for p in (0.1, 1.0)
    ]
    table[-1]["objective"] = math.inf
    best = min(table, key=lambda row: row["objective"])
    axis = plots.tuning_map(TuningResult(table, best, False)).axes[0]
    mesh, ring = axis.collections
    assert ring.get_offsets().tolist() == [[100.0, 0.1]]
    values = mesh.get_array()
    assert values.shape == (2, 3)
    assert float(values[0, 1]) == pytest.approx(0.1)


def test_variants_of_a_method_with_a_colour_of_its_own_can_be_told_apart():
    names = ["Kronecker", "Kronecker, factored", "Kronecker, balanced"]
    curves = {f"{name}, {state}": torch.rand(5) for name in names for state in ("untuned", "tuned")}
    drawn = plots.inverse_entropy_cdf(curves).axes[0].get_lines()
    looks = {(line.get_color(), str(line._unscaled_dash_pattern), line.get_linewidth()) for line in drawn}
    assert len(looks) == len(drawn) == 6


def test_curves_of_one_colour_have_dashes_of_their_own_and_legends_fit():
    names = ["in-distribution", "near", "in-distribution, right", "in-distribution, wrong", "a", "b", "c", "d", "e"]
    figure = plots.inverse_entropy_cdf({name: torch.rand(20) for name in names})
    drawn = [line for line in figure.axes[0].lines if line.get_label() in names]
    looks = {(line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern)) for line in drawn}
    assert len(drawn) == len(looks) == len(names)
    legend = figure.legends[0]
    figure.canvas.draw()
    assert legend.get_window_extent().width <= figure.bbox.width
    both = plots.inverse_entropy_cdf({"Kronecker, tuned": torch.rand(20), "Kronecker, untuned": torch.rand(20)})
    tuned, untuned = both.axes[0].lines[:2]
    assert tuned.get_linestyle() == "-" and untuned.get_linestyle() == "--"
