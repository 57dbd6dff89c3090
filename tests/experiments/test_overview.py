"""The one-call report on a posterior: complete, self-contained, and right in its numbers."""

import json
import re

import pytest
import torch
from torch import nn

import laplace_kf as lk
from tests.cases import rng


def fitted(likelihood, outputs, targets, inputs=2, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))
    x = torch.randn(30, inputs, generator=rng())
    y = targets(x)
    return lk.LaplacePosterior(model, likelihood, prior_precision=5.0, **options).fit((x, y)), x, y


def classes(x):
    return (x[:, 0] > 0).long() + (x[:, -1] > 1).long()


def outside_of_pictures(page):
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)


def test_report_on_a_classifier(tmp_path):
    posterior, x, y = fitted("categorical", 3, classes)
    tuning = posterior.tune(
        (x, y), n_data=[10, 30, 90], prior_precision=[1.0, 5.0, 25.0], method="mc", samples=5, generator=rng()
    )
    modes, state = [m.training for m in posterior.model.modules()], torch.get_rng_state()
    loader = [(x[:7], y[:7]), (x[7:], y[7:])]
    result = lk.reports.report(
        posterior, loader, (x + 5, y), out=tmp_path, tuning=tuning, samples=20, title="A <b> title"
    )
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in posterior.model.modules()] == modes
    names = {"reliability", "risk_coverage", "entropy", "map", "effective", "tuning"}
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "result.json", *(f"{name}.png" for name in names)}
    for name, method in (("MAP", "map"), ("posterior", "mc")):
        prediction = posterior.predict(x, method=method, samples=20, generator=rng())
        expected = lk.reports.metrics.classification(prediction.probs, y)
        assert {key: result.metrics[name][key] for key in expected} == pytest.approx(expected, rel=1e-4)
        wrong = (prediction.probs.argmax(1) != y).double()
        selective = lk.reports.metrics.selective_prediction(prediction.entropy, wrong)
        assert result.metrics[name]["aurc"] == pytest.approx(selective["aurc"], abs=1e-3)
        far = posterior.predict(x + 5, method=method, samples=20, generator=rng())
        assert result.metrics[name]["entropy_out"] == pytest.approx(float(far.entropy.mean()), rel=1e-4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(names)
    text = outside_of_pictures(page)
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=\"(?!\")", text)
    assert "A &lt;b&gt; title" in text
    for needed in ("effective", "prior_precision", "torchmetrics", "E-AURC", "Tuning", "FPR95"):
        assert needed in text, needed
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["config"]["structure"] == "kron" and len(stored["tuning"]["table"]) == 9
    assert [block["name"] for block in stored["blocks"]] == ["0", "2"]


def test_report_on_a_regression():
    posterior, x, y = fitted(lk.likelihoods.Gaussian(0.5), 1, lambda x: x.sin(), inputs=1, structure="full")
    result = lk.reports.report(posterior, (x, y), samples=20)
    prediction = posterior.predict(x, method="mc", samples=20, generator=rng())
    found = result.metrics["posterior"]
    assert found["rmse"] == pytest.approx(float((prediction.mean - y).square().mean().sqrt()), rel=1e-4)
    assert found["nll"] == pytest.approx(-float(prediction.log_prob(y).mean()), rel=1e-4)
    assert result.metrics["MAP"]["epistemic_sd"] == 0
    assert [picture.name for picture in result.pictures] == ["intervals", "band", "effective"]


def test_report_on_binary_outputs_and_on_sequences():
    posterior, x, _ = fitted("bernoulli", 2, lambda x: (x > 0).float())
    result = lk.reports.report(posterior, (x, (x > 0).float()), samples=5)
    probs = posterior.predict(x, method="map").probs
    assert result.metrics["MAP"]["accuracy"] == pytest.approx(float(((probs > 0.5) == (x > 0)).double().mean()))
    model = nn.Linear(3, 4)
    x, y = torch.randn(6, 5, 3, generator=rng()), torch.randint(4, (6, 5), generator=rng())
    y[0, 2:] = -100
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    result = lk.reports.report(posterior, [{"input": x, "labels": y}], samples=5)
    guess, keep = model(x).argmax(-1), y >= 0
    assert result.metrics["MAP"]["accuracy"] == pytest.approx(float((guess == y)[keep].double().mean()))


def test_refusals():
    posterior, _, _ = fitted("categorical", 3, classes)
    with pytest.raises(lk.errors.ShapeMismatch, match="no batch"):
        lk.reports.report(posterior, [])
    with pytest.raises(lk.errors.NotFitted):
        lk.reports.report(lk.LaplacePosterior(nn.Linear(1, 1), "gaussian"), [])


def test_report_with_loaders_and_other_classes_outside():
    """Loaders shuffle from the caller's random numbers, which stay; labels of unknown classes are not looked at; and
    ignored targets have no label, whichever number stands for them."""
    posterior, x, y = fitted("categorical", 3, classes)
    data = torch.utils.data.TensorDataset(x, y)
    state = torch.get_rng_state()
    found = lk.reports.report(posterior, torch.utils.data.DataLoader(data, 7, shuffle=True), (x + 5, y + 100))
    assert torch.equal(torch.get_rng_state(), state)
    plain = lk.reports.report(posterior, (x, y), (x + 5, y))
    assert found.metrics["MAP"] == pytest.approx(plain.metrics["MAP"], rel=1e-4, abs=1e-6)
    assert found.metrics["posterior"]["entropy_out"] == pytest.approx(plain.metrics["posterior"]["entropy_out"])
    marked = lk.LaplacePosterior(posterior.model, lk.likelihoods.Categorical(ignore_index=255), prior_precision=5.0)
    keep = torch.arange(30) > 3
    result = lk.reports.report(marked.fit((x, y)), (x, y.where(keep, 255)), samples=20)
    expected = lk.reports.metrics.classification(marked.predict(x[keep], method="map").probs, y[keep])
    for key in ("accuracy", "brier", "ece"):
        assert result.metrics["MAP"][key] == pytest.approx(expected[key], rel=1e-4)
