"""The calibration benchmark: its verdicts, its problems, and small runs."""

import json
import math
import os

import pytest
import torch

from experiments.__main__ import main
from experiments.calibration import peers
from experiments.calibration import report as calibration_report
from experiments.calibration import run as calibration
from experiments.calibration.problems import ClassificationTask, Forecast, Problem, RegressionTask, problem
from experiments.common import data
from laplace_kf.errors import UnknownName

MAP, SCALED, OURS, LINEAR, PROBIT, MIXTURE, ENSEMBLE, DROPOUT, MARGLIK, GRID = calibration_report.NAMES
TINY = "members=1 dropout=[] steps=150 hidden=8 train_most=200 test_most=60 peer_grid=3 progress=false"
NEEDS_FILES = pytest.mark.skipif(
    "LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA does not name a folder of data files"
)


def splits(**methods):
    """Splits with the given NLLs by method; None where the method failed."""
    rows = [dict(zip(methods, values, strict=True)) for values in zip(*methods.values(), strict=True)]
    return [{"metrics": {m: {"nll": value} for m, value in row.items() if value is not None}} for row in rows]


def test_a_difference_is_paired_and_has_its_standard_error():
    found = splits(a=[1.0, 2.0, 6.0], b=[0.5, 2.0, 5.0])
    difference = calibration_report.paired(found, "a", "b")
    assert difference["values"] == [0.5, 0.0, 1.0]
    assert difference["mean"] == pytest.approx(0.5)
    assert difference["se"] == pytest.approx(0.5 / math.sqrt(3))
    assert difference["verdict"] == "worse"
    assert calibration_report.paired(found, "b", "a")["verdict"] == "better"


def test_within_one_standard_error_is_not_worse():
    assert [calibration_report.verdict(mean, 0.1) for mean in (-0.11, -0.1, 0.0, 0.1, 0.11)] == [
        "better", "not worse", "not worse", "not worse", "worse"
    ]  # fmt: skip
    assert calibration_report.verdict(-1.0, None) == "one split only"


def test_splits_on_which_a_method_failed_are_left_out():
    found = splits(a=[1.0, None, 3.0], b=[2.0, 0.0, 4.0])
    assert calibration_report.paired(found, "a", "b")["values"] == [-1.0, -1.0]
    assert calibration_report.paired(splits(a=[None], b=[1.0]), "a", "b") is None


def test_nowhere_worse_needs_a_result_on_every_set():
    good, bad = [0.9, 0.9], [1.2, 1.3]
    found = {
        "one": splits(**{MAP: [1.0, 1.1], OURS: good, MARGLIK: bad}),
        "two": splits(**{MAP: [1.0, 1.1], OURS: good}),
    }
    verdicts = {(c["method"], c["other"]): c for c in calibration_report.claims(found)}
    assert verdicts[OURS, MAP]["verdict"] == "confirmed"
    assert verdicts[OURS, MARGLIK]["verdict"] == "undecided"
    assert verdicts[OURS, MARGLIK]["sets"] == {"better": ["one"], "no result": ["two"]}
    assert verdicts[MARGLIK, MAP]["verdict"] == "refuted"
    assert all(claim["verdict"] == "undecided" for claim in calibration_report.claims({}))


def test_regression_scores_are_in_original_units():
    """A target in units of 10: the density of y is a tenth of that of y / 10."""
    torch.manual_seed(0)
    y, mean = torch.randn(50, 1, dtype=torch.float64), torch.zeros(50, 1, dtype=torch.float64)
    forecast = Forecast(torch.distributions.Normal(mean, 0.7).log_prob(y)[:, 0], mean)
    scores = RegressionTask().scores(forecast, y, 10.0)
    truth = -torch.distributions.Normal(10 * mean, 7.0).log_prob(10 * y).mean()
    assert scores["nll"] == pytest.approx(float(truth), rel=1e-6)
    assert scores["rmse"] == pytest.approx(float((10 * y).square().mean().sqrt()))


def test_the_noise_of_map_is_the_best_one_on_validation_data():
    torch.manual_seed(1)
    outputs, targets = torch.randn(40, 1), torch.randn(40, 1)
    make = RegressionTask().plain(outputs, (outputs, targets))
    best = -make(outputs).log_prob(targets).mean()
    for noise in torch.linspace(0.2, 4, 60):
        assert best <= -torch.distributions.Normal(outputs, noise).log_prob(targets).mean() + 1e-6


def test_the_temperature_is_the_best_one_on_validation_data():
    torch.manual_seed(1)
    labels = torch.arange(60) % 3
    outputs = 8 * (torch.nn.functional.one_hot(labels, 3) + 0.7 * torch.randn(60, 3))
    task = ClassificationTask()
    found = task.temperature(outputs, labels)
    best = float(torch.nn.functional.cross_entropy(outputs / found, labels))
    assert 0.1 < found < 19
    for other in torch.linspace(0.1, 19, 100).tolist():
        assert best <= float(torch.nn.functional.cross_entropy(outputs / other, labels)) + 1e-6
    assert RegressionTask().temperature(outputs[:, :1], outputs[:, 1:2]) == 1.0


def test_problems_hold_out_validation_rows_and_are_standardised_by_training_rows(monkeypatch):
    torch.manual_seed(2)
    features = 3 + 5 * torch.randn(60, 3, dtype=torch.float64)
    features[:, 1] = 7.0
    table = data.Regression(features, features[:, :1] * 2, ((torch.arange(50), torch.arange(50, 60)),))
    monkeypatch.setattr(data, "regression", lambda name: table)
    limits = {"seed": 0, "val_share": 0.2, "val_most": 8, "train_most": 1, "test_most": 1}
    given = problem("yacht", 0, **limits)
    assert [len(part[0]) for part in (given.train, given.val, given.test)] == [42, 8, 10]
    torch.testing.assert_close(given.train[0].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(given.train[0].std(0), torch.tensor([1.0, 0.0, 1.0]))
    rows = torch.cat([given.train[1], given.val[1], given.test[1]]).double() * given.scale
    assert len(rows.unique()) == 60  # no row twice
    torch.testing.assert_close(
        (rows - rows.mean()).sort(0).values, (table.target - table.target.mean()).sort(0).values, atol=1e-4, rtol=0
    )
    with pytest.raises(UnknownName, match="split"):
        problem("yacht", 1, **limits)
    with pytest.raises(UnknownName, match="'yacht'"):
        problem("yatch", 0, **limits)


def test_digits_for_testing_are_not_trained_on():
    limits = {"seed": 0, "val_share": 0.25, "val_most": 1000, "train_most": 400, "test_most": 100}
    first, second = (problem("digits", split, **limits) for split in (0, 1))
    assert [len(part[0]) for part in (first.train, first.val, first.test)] == [300, 100, 100]
    everything = torch.cat([first.train[0], first.val[0], first.test[0]])
    assert len(everything.unique(dim=0)) == 500
    assert not torch.equal(first.test[0], second.test[0])


def test_a_run_keeps_its_splits_and_uses_them_again(tmp_path, monkeypatch):
    for name in (OURS, LINEAR, PROBIT):  # the posteriors play no part here, and take time
        monkeypatch.setitem(calibration.COMPARED, name, calibration.COMPARED[MAP])
    words = ["run", "calibration", *TINY.split(), "sets=[digits]", "peers=false", "--out", str(tmp_path)]
    assert main([*words, "splits=1"]) == 0
    part = tmp_path / "parts/digits.json"
    first = json.loads(part.read_text())["splits"]["0"]
    assert {MAP, OURS} <= set(first["metrics"])
    assert first["metrics"][MAP]["accuracy"] > 0.5
    assert first["failures"][MARGLIK] == "left out"

    done = []
    split = calibration._split
    monkeypatch.setattr(calibration, "_split", lambda *given: done.append(given[1:]) or split(*given))
    assert main([*words, "splits=2"]) == 0
    assert done == [("digits", 1, None)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["digits"][MAP]["nll"]["values"][0] == first["metrics"][MAP]["nll"]
    assert result["comparisons"]["digits"][OURS]["verdict"] in {"better", "not worse", "worse"}
    assert "yacht" in result["not_run"]
    assert (tmp_path / "differences.png").is_file()

    assert main([*words, "splits=1", "hidden=9"]) == 0  # other settings: nothing is used again
    assert done[1:] == [("digits", 0, None)]
    part.write_text(part.read_text()[:-40])  # cut short: run again
    assert main([*words, "splits=1", "hidden=9"]) == 0
    assert done[2:] == [("digits", 0, None)]


def test_some_methods_are_measured_anew_on_the_same_networks(tmp_path, monkeypatch):
    calls = []

    def counted(title):
        method = calibration.COMPARED[MAP]
        monkeypatch.setitem(calibration.COMPARED, title, lambda *given: calls.append(title) or method(*given))

    for name in (OURS, LINEAR, PROBIT, SCALED):
        counted(name)
    words = ["run", "calibration", *TINY.split(), "sets=[digits]", "peers=false", "splits=1", "--out", str(tmp_path)]
    assert main(words) == 0
    part = tmp_path / "parts/digits.json"
    kept = json.loads(part.read_text())
    kept["splits"]["0"]["metrics"][SCALED]["nll"] = kept["splits"]["0"]["metrics"][OURS]["nll"] = 17.0
    part.write_text(json.dumps(kept))
    calls.clear()
    assert main([*words, f"anew=[{OURS}]"]) == 0
    assert calls == [OURS]
    found = json.loads(part.read_text())["splits"]["0"]
    assert found["metrics"][SCALED]["nll"] == 17.0 and found["metrics"][OURS]["nll"] == found["metrics"][MAP]["nll"]
    assert found["failures"] == kept["splits"]["0"]["failures"] and MARGLIK in found["failures"]
    kept["splits"]["0"]["metrics"][MAP]["nll"] += 1e-3
    part.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"digits, split 0: .*different networks"):
        main([*words, f"anew=[{OURS}]"])
    assert main([*words, "anew=[ours]"]) != 0


def test_a_failing_peer_is_recorded_and_a_failing_method_of_ours_is_not_hidden(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of luck\nmore")

    monkeypatch.setattr(peers, "laplace_torch", fail)
    words = ["run", "calibration", *TINY.split(), "sets=[digits]", "splits=1", "--out", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "result.json").read_text())["splits"]["digits"][0]
    assert found["failures"][MARGLIK] == "RuntimeError: out of luck"
    monkeypatch.setitem(calibration.COMPARED, OURS, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        main([*words, "seed=1"])


@pytest.mark.parametrize("name", ["yacht", "digits"])
def test_ensemble_and_dropout_are_mixtures_of_their_networks(name):
    """The ensemble's density is the mean of its networks' densities; no other noise suits validation data better."""
    torch.manual_seed(6)
    x = torch.randn(90, 4)
    regression = name == "yacht"
    y = x[:, :1] + 0.2 * torch.randn(90, 1) if regression else (x[:, 0] > 0).long()
    task = RegressionTask() if regression else ClassificationTask()
    given = Problem(task, (x[:50], y[:50]), (x[50:70], y[50:70]), (x[70:], y[70:]), 1 if regression else 2)
    config = calibration.Config(hidden=6, steps=60, members=3, dropout=[0.2, 0.5][regression:])
    nets = calibration._trained(config, given, 0)
    assert len(nets) == 3
    forecast, settings = calibration.COMPARED[ENSEMBLE](nets, given, config, 0)

    def density(part, noise):
        found = [net(part[0]).detach() for net in nets]
        if regression:
            each = [torch.distributions.Normal(mean, noise).log_prob(part[1])[:, 0].exp() for mean in found]
        else:
            each = [one.softmax(1).gather(1, part[1][:, None])[:, 0] for one in found]
        return torch.stack(each).mean(0).log()

    noise = settings.get("scale")
    torch.testing.assert_close(forecast.log_prob, density(given.test, noise), atol=1e-5, rtol=1e-4)
    for factor in (0.7, 0.9, 1.1, 1.3) if regression else ():
        assert density(given.val, noise).mean() >= density(given.val, factor * noise).mean() - 1e-3
    forecast, settings = calibration.COMPARED[DROPOUT](nets, given, config, 0)
    assert settings["chosen"] in {f"{rate:g}" for rate in config.dropout}
    assert forecast.log_prob.isfinite().all()


def test_a_mixture_of_one_network_is_left_out():
    config = calibration.Config(members=1, dropout=[], peers=False)
    why = {title: calibration._left_out(title, config, 10) for title in calibration_report.NAMES}
    assert [title for title, said in why.items() if said] == [MIXTURE, ENSEMBLE, DROPOUT, MARGLIK, GRID]
    assert not any(calibration._left_out(title, calibration.Config(), 10) for title in calibration_report.NAMES)


@pytest.mark.parametrize("how", ["marglik", "gridsearch"])
@pytest.mark.parametrize("task", [RegressionTask(), ClassificationTask()], ids=["regression", "classification"])
def test_laplace_torch_gives_a_proper_forecast(task, how):
    pytest.importorskip("laplace")
    torch.manual_seed(3)
    x = torch.randn(60, 3)
    y = x[:, :1] + 0.1 * torch.randn(60, 1) if task.peer == "regression" else (x[:, 0] > 0).long()
    outputs = 1 if task.peer == "regression" else 2
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, outputs)).eval()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    given = Problem(task, (x[:30], y[:30]), (x[30:40], y[30:40]), (x[40:], y[40:]), outputs)
    forecast, settings = peers.laplace_torch(model, given, how, grid=3, seed=0)
    assert forecast.log_prob.shape == (20,)
    assert torch.isfinite(forecast.log_prob).all()
    assert settings["prior_precision"] > 0
    if task.peer == "classification":
        torch.testing.assert_close(forecast.point.sum(1), torch.ones(20))
        torch.testing.assert_close(forecast.log_prob.exp(), forecast.point.gather(1, y[40:, None])[:, 0])
    else:
        with torch.no_grad():
            torch.testing.assert_close(forecast.point, model(x[40:]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.data
@NEEDS_FILES
def test_a_small_run_on_real_tables(tmp_path):
    words = f"sets=[yacht,mnist] splits=2 peers=false {TINY}".split()
    assert main(["run", "calibration", *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["metrics"]) == ["yacht", "mnist"]
    assert result["metrics"]["yacht"][MAP]["rmse"]["mean"] < 10  # the targets' own deviation is about 15
    assert result["stand_ins"] == []
