"""E19 with tiny settings: what it writes, and that its parts are what they say."""

import json

import pytest
import torch

from experiments.__main__ import main
from experiments.toy_regression import problem, report
from experiments.toy_regression import run as toy_regression
from laplace_kf.likelihoods import Gaussian


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
    tuned = [f"{name}, {state}" for name in ("full", "diagonal", "Kronecker") for state in ("untuned", "tuned")]
    assert list(result["metrics"]) == ["MAP", *tuned, "mean field", "HMC"]
    assert result["metrics"]["HMC"]["sd_rmse"]["values"] == [0.0, 0.0]
    assert result["metrics"]["MAP"]["sd_inside"]["mean"] == 0
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
