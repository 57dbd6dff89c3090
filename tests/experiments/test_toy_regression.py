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
        "tune_samples=5 search=6 hmc_samples=10 hmc_warmup=4 hmc_steps=3 vi_steps=5 grid=13"
    )
    assert main(["run", "E19", *words.split(), "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    result = json.loads((tmp_path / "result.json").read_text())
    states = ("untuned", "tuned", *report.SCANNED)
    states = (*states, *(f"{state}, linearised" for state in (*report.SCANNED, "tuned")))
    tuned = [f"{name}, {state}" for name in ("full", "diagonal", "Kronecker") for state in states]
    assert list(result["metrics"]) == ["MAP", *tuned, "mean field", "HMC"]
    assert result["metrics"]["HMC"]["sd_rmse"]["values"] == [0.0, 0.0]
    assert result["metrics"]["MAP"]["sd_inside"]["mean"] == 0
    assert result["metrics"]["HMC"]["grid_over_hmc"]["values"] == [1.0, 1.0]
    for name in ("full", "diagonal", "Kronecker"):  # of all settings, not of those of the grids alone
        grid_best, _, at_level = (result["metrics"][f"{name}, {label}, linearised"] for label in report.SCANNED)
        tuned = result["metrics"][f"{name}, tuned, linearised"]
        for seed in range(2):
            assert grid_best["test_nll_grid"]["values"][seed] <= tuned["test_nll_grid"]["values"][seed] + 1e-9
            near = at_level["grid_over_hmc"]["values"][seed] <= report.LEVEL + 1e-9
            assert near == (grid_best["grid_over_hmc"]["values"][seed] <= report.LEVEL + 1e-9)
        assert tuned["val_behind"]["values"] == [0.0, 0.0]
    halves = [result["hmc"]["0"][f"test_nll_grid_{half}_half"] for half in ("first", "second")]
    whole = result["metrics"]["HMC"]["test_nll_grid"]["values"][0]
    assert whole <= sum(halves) / 2 + 1e-9 and halves[0] != halves[1]  # a mixture is no worse than its parts are
    assert [text.count("of 2 seeds") for text in result["sentences"]] in ([2, 2], [2, 3], [3, 2], [3, 3])
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
    found = family.Family(posterior, predict, targets, 6).scan([1.0, 60.0], [0.1, 10.0])
    assert seen == [(n, prior) for n in (1.0, 60.0) for prior in (0.1, 10.0)]
    assert [(one.n_data, one.prior_precision) for one in found] == seen
    assert (posterior.n_data, posterior.prior_precision) == (6, 0.5)
    posterior.n_data, posterior.prior_precision = seen[2]
    lost = -predict().log_prob(targets)
    assert torch.equal(found[2].val, lost[:6]) and found[2].grid == float(lost[6:].mean())
    with pytest.raises(ZeroDivisionError):
        family.Family(posterior, lambda: 1 / 0, targets, 6).at(1.0, 1.0)
    assert (posterior.n_data, posterior.prior_precision) == seen[2]


def test_no_setting_of_a_finer_grid_is_better_than_the_bounds():
    """The least loss on the grid, and the least validation loss of those that reach a level there."""
    (x, y), (x_val, y_val) = (problem.draw_points(8, torch.Generator().manual_seed(k)) for k in range(2))
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p)
    posterior = LaplacePosterior(model, Gaussian(0.1), structure="kron").fit((x, y))
    far = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    targets = torch.cat([y_val, far**3 / 2])
    kin = family.Family(
        posterior, lambda: posterior.predict(torch.cat([x_val, far]), method="linearized"), targets, 8
    )  # fmt: skip
    coarse, fine = ([10 ** (k / step) for k in range(-4 * step, 3 * step)] for step in (1, 2))
    scan, finer = kin.scan(coarse, coarse), kin.scan(fine, fine)
    least = kin.refined(family.best(scan), lambda one: one.grid, 60)
    assert least.grid <= family.best(scan).grid and least.grid <= family.best(finer).grid + 1e-3
    free = kin.refined(family.chosen(scan), lambda one: float(one.val.mean()), 60)
    level = 0.75 * least.grid + 0.25 * free.grid
    near = family.reaching(level)
    cheapest = kin.refined(min(scan, key=near), near, 60)
    assert cheapest.grid <= level < free.grid, "the level is one that tuning misses"
    assert float(cheapest.val.mean()) > float(free.val.mean())
    assert near(cheapest) <= min(map(near, finer)) + 0.01
    assert family.reaching(least.grid - 1)(least) > 1e6
    again = kin.at(least.n_data, least.prior_precision)
    assert again.grid == least.grid
    assert family.behind(again, least) == (0.0, 0.0)


def test_validation_rules_out_what_is_worse_by_more_than_its_noise():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    noise = torch.tensor([0.5, -0.5, 0.5, -0.5])  # standard error of its mean: sqrt(1/3) / 2
    chosen = family.Setting(1.0, 1.0, base, 9.0)
    near, far = (family.Setting(2.0, 1.0, base + noise + shift, 3.0 - shift) for shift in (0.57, 0.58))
    worse = family.Setting(3.0, 1.0, base + 1e-3, 1.0)  # by little, but at every point
    assert family.allowed([far, near, chosen, worse]) == [near, chosen]
    assert family.best([far, near, chosen, worse]) is worse
    assert family.best(family.allowed([far, near, chosen, worse])) is near


def test_sentences_say_whether_any_tuning_gets_there():
    def row(ratio, behind=0.0):
        return {"grid_over_hmc": ratio, "val_behind": behind, "val_behind_se": 4 * behind}

    def runs(*pairs):
        rows = [("tuned", row(9.0)), ("tuned, linearised", row(1.1)), ("at HMC's level, linearised", row(1.1))]
        rows += [("best on the grid, linearised", row(0.4))]
        return [
            {
                f"Kronecker, {name}": of
                for name, of in (*rows, ("best on the grid", row(best)), ("at HMC's level", row(*at)))
            }
            for best, *at in pairs
        ]

    drawn, linear = report.sentences(runs((0.5, 1.2, 1.0), (0.4, 1.1, 0.75)))
    assert "9.00, 9.00 times HMC's" in drawn and "0 of 2 seeds are at most at 1.2" in drawn
    assert "1.00 (4.0), 0.75 (3.0) nats" in drawn and drawn.endswith("no tuning on them gets there.")
    assert "2 of 2 seeds are at most at 1.2" in linear and linear.endswith("for 0 of 2 seeds.")
    one_is_allowed, _ = report.sentences(runs((0.5, 1.2, 1.0), (0.4, 1.1, 0.5)))
    assert one_is_allowed.endswith("for 1 of 2 seeds.")
    none, _ = report.sentences(runs((1.3, 1.3, 0.0), (1.3, 1.3, 0.1)))
    assert "No setting does." in none and none.endswith("for 2 of 2 seeds: no tuning on them gets there.")
    redrawn, _ = report.sentences(runs((0.5, 1.21, 1.0), (0.4, 1.1, 0.75)))
    assert redrawn == drawn
    got_there = runs((0.5, 1.2, 1.0), (0.4, 1.1, 0.75))
    got_there[0]["Kronecker, tuned"] = row(1.0)  # by luck: a search that draws otherwise
    drawn, _ = report.sentences(got_there)
    assert "1 of 2 seeds are at most at 1.2" in drawn and drawn.endswith("for 1 of 2 seeds.")
