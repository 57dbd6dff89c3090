"""E19 with tiny settings: what it writes, and that its parts are what they say."""

import json

import pytest
import torch

from experiments.__main__ import main
from experiments.toy_regression import family, problem, report
from experiments.toy_regression import run as toy_regression
from laplace_kf.likelihoods import Gaussian
from laplace_kf.posterior import LaplacePosterior


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    state = torch.get_rng_state()
    words = (
        "repeats=2 points=8 width=3 restarts=1 samples=20 n_data_factors=[1,10] prior_precisions=[1,10] "
        "tune_samples=5 hmc_samples=10 hmc_warmup=4 hmc_steps=3 vi_steps=5 grid=13"
    )
    assert main(["run", "E19", *words.split(), "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    result = json.loads((tmp_path / "result.json").read_text())
    states = ("untuned", "tuned", *report.SCANNED)
    tuned = [f"{name}, {state}" for name in ("full", "diagonal", "Kronecker") for state in states]
    assert list(result["metrics"]) == ["MAP", *tuned, "mean field", "HMC"]
    assert result["metrics"]["HMC"]["sd_rmse"]["values"] == [0.0, 0.0]
    assert result["metrics"]["MAP"]["sd_inside"]["mean"] == 0
    assert result["metrics"]["HMC"]["grid_over_hmc"]["values"] == [1.0, 1.0]
    assert len(result["verdicts"]) == len(report.CLAIMS)
    assert {v["verdict"] for v in result["verdicts"]} <= {"confirmed", "refuted"}
    assert len(result["tuning"]["1"]["full"]["table"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"bands.png", "report.html", "result.json"}


def test_data_are_the_published_ones():
    x, y = problem.draw_points(4000, torch.Generator().manual_seed(0))
    x, y = x * problem.INPUT_SCALE, y * problem.TARGET_SCALE
    assert -4 <= float(x.min()) < -3.9 and 3.9 < float(x.max()) <= 4
    noise = y - x**3
    assert float(noise.std()) == pytest.approx(3.0, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.2)


def test_training_finds_an_optimum_of_the_log_joint():
    config = toy_regression.Config(restarts=1, width=3)
    train = problem.draw_points(20, torch.Generator().manual_seed(0))
    likelihood = Gaussian(scale=problem.NOISE / problem.TARGET_SCALE)
    model = toy_regression.fit_network(config, likelihood, train, 0)
    model.zero_grad()
    squares = sum(p.square().sum() for p in model.parameters())
    (likelihood.log_prob(model(train[0]), train[1]).sum() - squares / 2).backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-3


@pytest.mark.parametrize("word", ["points=0", "prior_precision=0", "grid=3", "vi_steps=-1", "n_data_factors=[]"])
def test_bad_settings_say_what_is_allowed(word, capsys, tmp_path):
    assert main(["run", "E19", word, "--out", str(tmp_path / "out")]) == 1
    assert "must" in capsys.readouterr().err


def test_the_scan_sees_every_setting_and_leaves_the_posterior_as_it_was():
    (x, y), (x_val, y_val) = (problem.draw_points(6, torch.Generator().manual_seed(k)) for k in range(2))
    likelihood = Gaussian(0.1)
    posterior = LaplacePosterior(torch.nn.Linear(1, 1).double(), likelihood, prior_precision=0.5).fit((x, y))
    seen = []

    def predict():
        seen.append((posterior.n_data, posterior.prior_precision))
        return posterior.predict(torch.cat([x_val, x]), method="linearized")

    targets = torch.cat([y_val, y])
    found = family.settings(posterior, [1.0, 60.0], [0.1, 10.0], predict, targets, 6)
    assert seen == [(n, prior) for n in (1.0, 60.0) for prior in (0.1, 10.0)]
    assert [(one.n_data, one.prior_precision) for one in found] == seen
    assert (posterior.n_data, posterior.prior_precision) == (6, 0.5)
    posterior.n_data, posterior.prior_precision = seen[2]
    lost = -predict().log_prob(targets)
    assert torch.equal(found[2].val, lost[:6]) and found[2].grid == float(lost[6:].mean())
    with pytest.raises(ZeroDivisionError):
        family.settings(posterior, [1.0], [1.0], lambda: 1 / 0, targets, 6)
    assert (posterior.n_data, posterior.prior_precision) == seen[2]


def test_validation_rules_out_what_is_worse_by_more_than_its_noise():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    noise = torch.tensor([0.5, -0.5, 0.5, -0.5])  # standard error of its mean: sqrt(1/3) / 2
    chosen = family.Setting(1.0, 1.0, base, 9.0)
    near, far = (family.Setting(2.0, 1.0, base + noise + shift, 3.0 - shift) for shift in (0.57, 0.58))
    worse = family.Setting(3.0, 1.0, base + 1e-3, 1.0)  # by little, but at every point
    assert family.allowed([far, near, chosen, worse]) == [near, chosen]
    assert family.best([far, near, chosen, worse]) is worse
    assert family.best(family.allowed([far, near, chosen, worse])) is near
