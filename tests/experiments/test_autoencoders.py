"""The autoencoder experiments: networks, runs that can be taken up again, failures, and the numbers behind verdicts."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments import runner
from experiments.autoencoders import report as autoencoders_report
from experiments.autoencoders import run as autoencoders
from experiments.autoencoders.methods import PUBLISHED_GRID, STANDARD
from experiments.autoencoders.run import Config, Problem
from experiments.registry import EXPERIMENTS
from laplace_kf.errors import UnknownName

SMALL = Problem(
    (12, 8, 3), lambda seed: tuple(torch.rand(90, 12, generator=torch.Generator().manual_seed(seed)).split(60))
)


@pytest.fixture
def small(monkeypatch):
    """A problem of 12 pixels in place of CURVES, with minibatches that fit it."""
    monkeypatch.setitem(autoencoders.PROBLEMS._entries, "curves", SMALL)
    for name, method in autoencoders.OPTIMISERS.items():
        smaller = replace(method, batch={"curves": 20, "mnist": 20}, grid=method.grid[:2])
        monkeypatch.setitem(autoencoders.OPTIMISERS._entries, name, smaller)


def settings(**others):
    return Config(**{"problems": ["curves"], "budgets": {"curves": 1e6}, "updates": 3, "progress": False, **others})


def test_the_network_mirrors_its_encoder_and_has_a_linear_code():
    model = autoencoders.network([784, 400, 200, 100, 50, 25, 6], 0)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400]
    assert linear[-1].out_features == 784
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Linear", "Sigmoid"] * 5 + ["Linear"] + ["Linear", "Sigmoid"] * 5 + ["Linear"]
    assert all(int((layer.weight != 0).sum(1).max()) == min(15, layer.in_features) for layer in linear)
    again = autoencoders.network([784, 400, 200, 100, 50, 25, 6], 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_errors_are_summed_over_pixels_and_averaged_over_cases():
    model = nn.Linear(3, 3)
    images = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    with torch.no_grad():
        outputs = torch.sigmoid(model(images)).double()
    x = images.double()
    loss = -(x * outputs.log() + (1 - x) * (1 - outputs).log()).sum() / 2
    found = autoencoders._errors(model, images)
    assert found == pytest.approx((float(loss), float(((outputs - x) ** 2).sum() / 2)), rel=1e-6)


def test_the_floor_is_the_loss_of_perfect_outputs():
    images = torch.tensor([[0.0, 0.5, 1.0], [0.25, 1.0, 0.5]])
    entropy = [math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75) + math.log(2)]
    assert autoencoders._floor(images) == pytest.approx(sum(entropy) / 2)


@pytest.mark.parametrize("name", autoencoders.OPTIMISERS)
def test_every_method_trains_from_the_same_weights(small, name):
    config = settings(updates=6)
    images = SMALL.load(0)
    method = autoencoders.OPTIMISERS[name]
    found = autoencoders._train(config, "curves", method, method.grid[0], images, 1.0)
    start = autoencoders._errors(autoencoders.network(SMALL.widths, 0), images[0])
    assert found["failure"] == ""
    assert found["checkpoints"][0]["loss"] == pytest.approx(start[0])
    assert found["final"]["loss"] < start[0]
    assert len(found["loss"]) == len(found["processor"]) == len(found["wall"]) == found["final"]["updates"] == 6
    assert found["final"]["cases"] == 120
    assert found["processor"] == sorted(found["processor"])
    assert {"averaged_loss", "averaged_squared", "averaged_test_squared"} <= set(found["final"])


def test_an_epoch_shows_every_image_once():
    images = torch.arange(7.0)[:, None]
    stream = autoencoders._stream(images, lambda number: 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(stream), next(stream)]).flatten().tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    growing = autoencoders._stream(images, lambda number: number + 1, torch.Generator().manual_seed(0))
    assert [len(next(growing)) for _ in range(8)] == [2, 3, 4, 5, 6, 7, 7, 7]


def test_minibatches_may_grow_to_all_images():
    method = autoencoders.OPTIMISERS["K-FAC, growing batches"]
    sizes = [method.size("curves", number, 20_000) for number in (1, 250, 500, 501)]
    assert sizes[0] == 1000 and 4000 < sizes[1] < 5000 and sizes[2:] == [20_000, 20_000]
    assert autoencoders.OPTIMISERS["K-FAC"].size("curves", 500, 20_000) == 1000
    assert autoencoders.OPTIMISERS["K-FAC"].size("curves", 1, 60) == 60


def test_the_published_grid_runs_on_small_images():
    _, config = runner.resolve("autoencoders_grid")
    assert config.problems == ["curves14"] and config.shrink == 1
    assert {name for name in config.methods if autoencoders.OPTIMISERS[name].whole} == {
        f"{name}, published grid" for name in ("Adam", "NAG", "heavy ball", "SGD")
    }
    assert all(len(autoencoders.OPTIMISERS[name].grid) in (1, 40) for name in config.methods)
    assert {autoencoders.OPTIMISERS[name].size("curves14", 1, 4000) for name in config.methods} == {250}
    claims = {(claim.method, claim.other) for claim in autoencoders_report.CLAIMS}
    assert {("K-FAC", "Adam, published grid"), ("KFRA", "SGD, published grid")} <= claims


def test_small_images_are_means_of_four_pixels(monkeypatch):
    images = torch.rand(5100, 784, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(autoencoders, "_curves", lambda seed: (images[:4050], images[4050:]))
    train, test = autoencoders.PROBLEMS["curves14"].load(0)
    assert train.shape == (4000, 196) and test.shape == (1000, 196)
    four = images[-1].reshape(28, 28)[2:4, 4:6]
    assert float(test[-1].reshape(14, 14)[1, 2]) == pytest.approx(float(four.mean()))


def test_the_average_is_the_mean_at_first_and_leaves_the_weights():
    model = nn.Linear(1, 1, bias=False)
    average = autoencoders._Average(model, 0.99)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    with average.swapped_in():
        assert float(model.weight) == pytest.approx(3.0)
    assert float(model.weight) == 6.0


def test_a_finished_run_is_used_again_and_another_setting_is_not(small, tmp_path, monkeypatch):
    report = autoencoders.run(settings(methods=["Adam", "K-FAC"]), tmp_path)
    assert set(report.metrics["curves"]) == {"Adam", "K-FAC"}
    assert report.details["not_run"]["mnist"] == STANDARD
    assert len(report.details["pilots"]["curves"]["Adam"]) == 2
    made = []
    monkeypatch.setattr(autoencoders, "_tuned", lambda *_: made.append(1))
    again = autoencoders.run(settings(methods=["Adam"]), tmp_path)
    assert not made and again.metrics == report.metrics
    with pytest.raises(TypeError):  # the replaced function makes nothing
        autoencoders.run(settings(methods=["Adam"], updates=4), tmp_path)
    assert made == [1]


def test_the_best_setting_of_a_grid_gets_the_whole_budget(small, tmp_path, monkeypatch):
    method = replace(autoencoders.OPTIMISERS["SGD"], grid=[{"lr": 1e-6}, {"lr": 0.02}, {"lr": 1e30}])
    monkeypatch.setitem(autoencoders.OPTIMISERS._entries, "SGD", method)
    autoencoders.run(settings(methods=["SGD"], updates=6), tmp_path)
    part = json.loads((tmp_path / "curves-sgd.json").read_text())
    assert part["setting"] == {"lr": 0.02}
    assert [pilot["loss"] is None for pilot in part["pilots"]] == [False, False, True]
    assert "FloatingPointError" in part["pilots"][2]["failure"]
    assert part["share"] == 1.0 and part["settings"]["budget"] == 1e6


def test_every_setting_of_the_published_grid_gets_the_whole_budget_and_is_halved_by_its_share(
    small, tmp_path, monkeypatch
):
    """8 rates times 5 schedules (methods 8.1); the run that is shown is the best of them."""
    method = autoencoders.OPTIMISERS["SGD, published grid"]
    assert {(point["lr"], point["halved"]) for point in PUBLISHED_GRID} == {
        (2.0**-k, share) for k in range(6, 14) for share in (1.0, 0.5, 0.25, 0.125, 0.0625)
    }
    assert method.whole and "SGD, published grid" not in STANDARD
    grid = [{"lr": 0.02, "halved": share} for share in (1.0, 0.25)]
    monkeypatch.setitem(autoencoders.OPTIMISERS._entries, "SGD, published grid", replace(method, grid=grid))
    rates, step = [], torch.optim.SGD.step

    def seen(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", seen)
    report = autoencoders.run(settings(methods=["SGD, published grid"], updates=8), tmp_path)
    assert rates == [0.02] * 8 + [0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    part = json.loads((tmp_path / "curves-sgd-published-grid.json").read_text())
    pilots = part["pilots"]
    assert [pilot["updates"] for pilot in pilots] == [8, 8] and part["share"] == 1.0
    best = min(pilots, key=lambda pilot: pilot["loss"])
    assert part["setting"] == {"lr": 0.02, "halved": best["halved"]}
    assert part["final"]["loss"] == pytest.approx(best["loss"]) or part["final"]["averaged_loss"] == best["loss"]
    (grids,) = [table for table in report.tables if "grids" in table.title]
    assert grids.rows[0][0] == "SGD, published grid" and grids.rows[0][1] == "2"


def test_the_table_of_a_grid_has_the_best_the_means_and_the_usual_setting():
    pilots = [{"lr": 2.0**-k, "halved": share, "loss": float(10 * k + i)} for k in range(6, 14)
              for i, share in enumerate((1.0, 0.5, 0.25, 0.125, 0.0625))]  # fmt: skip
    pilots[0]["loss"] = None
    head, ((name, count, lr, halved, best, ten, twenty, usual, failed),) = autoencoders_report.grids(
        {"Adam": pilots, "K-FAC": []}
    )
    assert len(head) == 9 and (name, count, lr, halved, failed) == ("Adam", "40", "2^-6", "50.00% of the run", "1")
    losses = sorted(p["loss"] for p in pilots[1:])
    assert (float(best), float(ten), float(twenty)) == pytest.approx((61, sum(losses[:10]) / 10, sum(losses[:20]) / 20))
    assert float(usual) == 100


def test_a_failure_is_reported(small, tmp_path, monkeypatch):
    method = replace(autoencoders.OPTIMISERS["SGD"], grid=[{"lr": 1e30}])
    monkeypatch.setitem(autoencoders.OPTIMISERS._entries, "SGD", method)
    report = autoencoders.run(settings(methods=["SGD"], updates=6), tmp_path)
    assert "FloatingPointError" in report.metrics["curves"]["SGD"]["failure"]
    assert any("failed: FloatingPointError" in row[0] for row in report.tables[0].rows)
    report.save(tmp_path / "out")
    json.loads((tmp_path / "out/result.json").read_text())


def test_bad_settings_say_what_is_allowed():
    for bad in ({"pilot": 0.0}, {"budgets": {"mnist": 5.0}}, {"spacing": 1.0}, {"methods": []}, {"shrink": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings(**bad)
    with pytest.raises(UnknownName, match="K-FAC"):
        settings(methods=["KFC"])


def test_the_other_ids_are_rows_of_the_same_table():
    for name in ("E1", "E2", "E12", "E14", "E15"):
        experiment, config = runner.resolve(name)
        assert experiment.id == "E14" and EXPERIMENTS[name].module == "experiments.autoencoders.run"
        assert set(config.methods) <= set(autoencoders.OPTIMISERS)
    assert runner.resolve("E1")[1].methods == ["Hessian-free", "Hessian-free, Kronecker", "NAG"]


def made(*losses, updates=None, seconds=1.0, averaged=None):
    """A run with the given training losses after 0, 1, ... updates of so many seconds."""
    numbers = updates or range(len(losses))
    rows = [{"updates": n, "processor": n * seconds, "wall": 2 * n * seconds, "loss": loss, "test_squared": 1.0}
            for n, loss in zip(numbers, losses, strict=True)]  # fmt: skip
    for row, value in zip(rows, averaged or [], strict=False):
        row["averaged_loss"] = value
    return {"checkpoints": rows}


def test_how_many_updates_a_loss_takes():
    run = made(10.0, 8.0, 4.0, 2.0, updates=[0, 2, 6, 7], seconds=3.0)
    assert autoencoders_report.reached(run, 6.0) == pytest.approx(4.0)
    assert autoencoders_report.reached(run, 6.0, "wall") == pytest.approx(24.0)
    assert autoencoders_report.reached(run, 8.0) == pytest.approx(2.0)
    assert autoencoders_report.reached(run, 20.0) == 0.0
    assert autoencoders_report.reached(run, 1.9) is None
    assert autoencoders_report.reached(made(10.0, 8.0, averaged=[12.0, 5.0]), 7.5) == pytest.approx(0.5)


def test_verdicts_follow_from_the_numbers():
    slow = made(10.0, 9.0, 6.0, 3.0, updates=[0, 10, 50, 100])
    fast = made(10.0, 3.0, 1.0, updates=[0, 8, 16], seconds=4.0)
    found = {"K-FAC": fast, "Adam": slow, "K-FAC tridiagonal": made(10.0, 1.0, updates=[0, 12], seconds=9.0)}
    verdicts = {(v["claim"], v["method"]): v for v in autoencoders_report.claims({"curves": found})}

    def verdict(start, method):
        (hit,) = [v for (claim, name), v in verdicts.items() if claim.startswith(start) and name == method]
        return hit["value"], hit["verdict"]

    value, said = verdict("K-FAC reaches Adam's final training loss in at most", "K-FAC")
    assert value == pytest.approx(0.08) and said == "confirmed"
    value, said = verdict("K-FAC reaches Adam's final training loss in less processor", "K-FAC")
    assert value == pytest.approx(0.32) and said == "confirmed"
    value, said = verdict("tridiagonal: 25", "K-FAC tridiagonal")  # both reach 1: after 16 and 12 updates
    assert value == pytest.approx(16 / 12 - 1) and said == "confirmed"
    assert not any("NAG" in claim for claim, _ in verdicts), "no verdict without both runs"
    behind = {"K-FAC": slow, "Adam": fast}
    (first, *_) = autoencoders_report.claims({"curves": behind})
    assert first["value"] is None and first["verdict"] == "refuted"
    head, rows = autoencoders_report.claims_rows([*verdicts.values(), {**first, "problem": "mnist"}])
    assert head[2:] == ["CURVES", "MNIST"]
    assert rows[0][2:] == ["confirmed: 8 %", "refuted: never reached"]
    assert rows[1][2:] == ["confirmed: 9 %", "not run"]


def test_a_grid_goes_on_at_the_end_where_its_best_point_is():
    method = replace(autoencoders.OPTIMISERS["SGD"], grid=[{"lr": 0.4}, {"lr": 0.2}, {"lr": 0.1}])
    tried, scores = list(method.grid), [3.0, 2.0, 1.0]
    assert method.beyond(tried, scores) == [{"lr": pytest.approx(0.05)}]
    assert method.beyond([*tried, {"lr": 0.05}], [*scores, 1.5]) == []
    assert method.beyond(tried, [1.0, 2.0, math.inf]) == [{"lr": pytest.approx(0.8)}]
    assert method.beyond(tried, [3.0, 1.0, 2.0]) == [] == method.beyond(tried, [math.inf] * 3)
    longer = [{"lr": 0.1 * 2.0**-k} for k in range(6)]
    assert method.beyond(longer, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == [], "it ends somewhere"
    assert replace(method, grid=method.grid[:2]).beyond(tried[:2], scores[:2]) == []


def test_after_the_same_updates():
    one, two = made(10.0, 4.0, 1.0, updates=[0, 10, 20]), made(10.0, 6.0, updates=[0, 15])
    assert autoencoders_report._ahead(one, two) == pytest.approx(2.5 - 6.0)
    assert autoencoders_report.at(one, 99) == 1.0


def test_a_method_is_described_by_text_that_lasts():
    for name, method in autoencoders.OPTIMISERS.items():
        text = json.dumps(method.described())
        assert " 0x" not in text, name
        assert json.loads(text) == method.described()
    described = autoencoders.OPTIMISERS["Hessian-free"].described()
    assert "limit=30" in described["settings"] and described["batch"]["curves"] == 2500
