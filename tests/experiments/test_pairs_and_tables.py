"""Stacked training, pairs of image sets and regression tables: oracles and small runs."""

import json
import math

import pytest
import torch
from torch import nn

from experiments.__main__ import main
from experiments.common import data, training
from experiments.common.stacked import train_stacked
from experiments.ood_pairs import report as pairs
from experiments.uci import report as tables
from experiments.uci import run as uci
from experiments.uci.methods import SIZES, Chosen, Member, choose, log_density


def cross_entropy(outputs, labels):
    return nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").mean(1)


def test_stacked_networks_take_the_steps_of_a_plain_loop():
    """Minibatches as large as the data: no order to share. Two data sets, two strengths of decay."""
    torch.manual_seed(0)
    sets = [(torch.randn(30, 4), torch.randint(0, 3, (30,))) for _ in range(2)]
    owners, decays = [0, 1, 1], [0.0, 0.1, 0.3]
    stacked, plain = ([training.mlp([4, 5, 6, 3], seed=k) for k in range(3)] for _ in range(2))
    train_stacked(stacked, sets, owners, loss=cross_entropy, epochs=7, batch=99, lr=0.05, decays=decays, seed=0)
    for model, owner, decay in zip(plain, owners, decays, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        for _ in range(7):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(sets[owner][0]), sets[owner][1]).backward()
            optimizer.step()
            schedule.step()
    for one, other in zip(stacked, plain, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_stacked_training_refuses_what_it_cannot_stack():
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    settings = {"loss": cross_entropy, "epochs": 1, "batch": 3, "lr": 0.1, "decays": [0.0], "seed": 0}
    with pytest.raises(ValueError, match="different lengths"):
        train_stacked([training.mlp([4, 2])], [(x, y), (x[:5], y[:5])], [0], **settings)
    with pytest.raises(ValueError, match="Dropout"):
        train_stacked([training.mlp([4, 3, 2], dropout=0.5)], [(x, y)], [0], **settings)


def test_the_density_of_a_mixture_is_that_of_its_normal_variables():
    torch.manual_seed(1)
    targets = torch.randn(8, 1)
    members = [Member(torch.randn(8), noise, torch.rand(5, 8, 2)) for noise in (torch.randn(8), torch.randn(8))]
    chosen = Chosen(2, 0.5, 0.7)
    parts = []
    for one in members:
        spread = 0.5 * one.variances[2]
        deviation = (spread[:, 0] + 0.49 * (one.noise + spread[:, 1] / 2).exp()).sqrt()
        parts.append(torch.distributions.Normal(one.mean, deviation).log_prob(targets[:, 0]).exp())
    torch.testing.assert_close(log_density(members, chosen, targets), torch.stack(parts).mean(0).log())


def test_the_chosen_settings_are_the_best_of_all():
    torch.manual_seed(2)
    targets = 2 * torch.randn(40, 1)
    members = [Member(torch.zeros(40), None, torch.rand(5, 40, 1)) for _ in range(2)]
    best = choose(members, targets, 10)
    value = log_density(members, best, targets).mean()
    for ratio in range(5):
        for size in SIZES:
            for noise in (0.1, 0.5, 1.0, 1.5):
                other = log_density(members, Chosen(ratio, size / 10, noise), targets).mean()
                assert value >= other - 0.05 or not torch.isfinite(other)


def test_verdicts_on_tables_need_all_of_them():
    split = {"log likelihood": dict.fromkeys(tables.METHODS, 9.0), "head": "constant",
             "conformal": {"coverage": 0.9, "width": 1.0, "MAP coverage": 0.9, "MAP width": 2.0}}  # fmt: skip
    everything = {name: [split, split] for name in data.tables()}
    assert {v["verdict"] for v in tables.judged(everything)} == {"confirmed", "refuted"}  # a tie is not "above"
    assert {v["verdict"] for v in tables.judged({"yacht": [split]})} == {"undecided"}
    assert "9.000 ± 0.000" in tables.rows({"yacht": [split, split]})[1][0]
    assert "9.000" in tables.rows({"yacht": [split]})[1][0]  # one split has no standard error
    never = {**split, "log likelihood": {**split["log likelihood"], "mixture": -math.inf}}  # a density of zero
    assert "-inf (1 of 2)" in tables.rows({"yacht": [split, never]})[1][0]
    assert tables.judged({"yacht": [split, never]})[0]["lost"] == ["yacht"]
    assert tables.conformal_rows({"yacht": [split]})[1][0][:4] == ["yacht", "1", "90.00", "90.00"]


def test_pairs_for_development_are_not_judged():
    scores = {name: {"auroc": value} for name, value in
              {"MAP: entropy": 0.9, "ensemble: information": 0.999, "auto": 0.996, "ensemble: entropy": 0.95,
               "mixture: auto": 0.9991}.items()}  # fmt: skip
    found = {"mnist": {"pairs": {"notmnist": scores}}, "letters A-E": {"pairs": {"mnist": scores}}}
    assert [v["verdict"] for v in pairs.judged(found)] == ["confirmed", "confirmed", "refuted", "confirmed"]
    assert "development" in pairs.pairs_table(found).rows[1][0]


def random_images(name, split):
    rng = torch.Generator().manual_seed(len(name) + 10 * len(split))
    shape = (160, 3, 32, 32) if name == "cifar10" else (160, 1, 28, 28)
    return torch.rand(shape, generator=rng), torch.randint(0, 10, (160,), generator=rng)


def test_a_small_run_over_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "images", random_images)
    words = ["hidden=4", "members=2", "epochs=1", "batch=20", "test_most=30", "samples=2", "progress=false"]
    words = ["run", "ood_pairs", *words, "--out", str(tmp_path)]
    assert main([*words, 'sources=["mnist"]']) == 0
    assert main([*words, 'sources=["letters A-E"]']) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {source: list(found) for source, found in result["metrics"].items()} == {
        "mnist": ["notmnist", "fashion-mnist", "cifar10"], "letters A-E": ["rest", "mnist", "fashion-mnist"]
    }  # fmt: skip
    assert all(0 <= each["auroc"] <= 1 for each in result["metrics"]["mnist"]["cifar10"].values())
    assert result["not_run"] == ["fashion-mnist", "digits 0-4", "fashion 0-4", "cifar10"]


def test_a_small_run_in_colour(tmp_path, monkeypatch):
    """Images stay in colour for residual networks, and each member's training is kept."""
    monkeypatch.setattr(data, "images", lambda name, split: (random_images("cifar10", split)[0][..., ::4, ::4],
                                                             random_images(name, split)[1]))  # fmt: skip
    words = ["epochs=1", "members=2", "batch=40", "test_most=20", "samples=2", "mixture=false", "progress=false"]
    assert main(["run", "ood_pairs", *words, 'sources=["cifar10"]', "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["metrics"]["cifar10"]) == ["cifar100"]
    states = torch.load(tmp_path / "parts" / "cifar10.pt", weights_only=True)
    alone = [torch.load(tmp_path / "parts" / f"cifar10-{k}.pt", weights_only=True)["model"] for k in range(2)]
    for state, kept in zip(states, alone, strict=True):
        assert state["0.weight"].shape == (16, 3, 3, 3) and torch.equal(state["0.weight"], kept["0.weight"])
    assert not torch.equal(states[0]["0.weight"], states[1]["0.weight"])


def noisy_table(count=300):
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(count, 3, dtype=torch.float64, generator=rng)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=rng)
    rows = torch.arange(count)
    return data.Regression(x, x[:, :1] + 0.3 * noise, ((rows[:-30], rows[-30:]), (rows[30:], rows[:30])))


@pytest.mark.parametrize("name", [*data.tables(), None])
def test_the_rows_of_a_split_are_disjoint(name):
    """Of every table: rows that choose, that calibrate, that are trained on, and test rows share out all rows."""
    try:
        table = data.regression(name) if name else noisy_table()
    except data.MissingData:
        pytest.skip(f"{name} is not there")
    for number in {0, len(table.splits) - 1}:
        rows = uci._rows(uci.Config(), table, number)
        parts = [rows.choosing, rows.calibrating, rows.train, rows.test]
        assert all(len(part) for part in parts)
        assert len(torch.cat(parts).unique()) == sum(map(len, parts)) == len(table.target)
        assert len(rows.calibrating) % 10 == 9  # (n + 1) · 0.9 is whole: 90 % is what they cover, not more
        assert abs(len(rows.calibrating) - len(rows.choosing)) <= 12
        assert set(rows.test.tolist()) == set(table.splits[number][1].tolist())


def test_rows_that_calibrate_take_part_in_no_choice(monkeypatch):
    """With targets gone wild there, the conformal network, its units and the tuned posterior stay what they were."""
    table = noisy_table()
    settings = {"steps": 30, "members": 1, "trial_members": 1, "priors": [0.1, 30.0], "splits": 1}
    config = uci.Config(**settings)
    rows = uci._rows(config, table, 0).calibrating
    wild = table.target.clone()
    wild[rows] = 50 * torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(5)).double()
    splits = [uci._split(config, data.Regression(table.features, t, table.splits), 0) for t in (table.target, wild)]
    assert splits[0].scale == splits[1].scale
    assert not torch.equal(splits[0].calibrating[1], splits[1].calibrating[1])
    for part in ("train", "choosing", "test"):
        assert all(map(torch.equal, *(getattr(split, part) for split in splits)))
    plain, other = (uci._networks(config, [split])[0] for split in splits)
    assert (plain.conformal_head, plain.conformal_prior) == (other.conformal_head, other.conformal_prior)
    assert (plain.head, plain.prior) != (other.head, other.prior)  # those rows do choose the other columns' network
    for one, two in zip(plain.conformal[0].parameters(), other.conformal[0].parameters(), strict=True):
        assert torch.equal(one, two)
    seen, tune = [], uci._quiet_tune
    monkeypatch.setattr(uci, "_quiet_tune", lambda p, val, seed: (tune(p, val, seed), seen.append((p, val))))
    for split in splits:
        found = uci._conformal(split, plain.conformal_head, plain.conformal[0], 0)
        assert seen[-1][1] is split.choosing
    one, two = (posterior for posterior, _ in seen)
    assert (one.n_data, one.prior_precision, one.method) == (two.n_data, two.prior_precision, two.method)
    assert one.likelihood.parameters() == two.likelihood.parameters()
    assert found["coverage"] == 1.0  # and they do decide how wide the intervals are


def test_a_small_run_over_a_table_goes_on_where_it_stopped(tmp_path, monkeypatch):
    torch.manual_seed(3)
    x = torch.randn(120, 3, dtype=torch.float64)
    rows = torch.arange(120)
    table = data.Regression(x, x[:, :1] + 0.1 * torch.randn(120, 1), ((rows[:110], rows[110:]), (rows[10:], rows[:10])))
    monkeypatch.setattr(data, "regression", lambda name: table)
    words = ["steps=40", "members=2", "priors=[0.1]", "at_a_time=1", "progress=false", "--out", str(tmp_path)]
    assert main(["run", "uci", "sets=[yacht]", "splits=1", *words]) == 0
    first = json.loads((tmp_path / "parts/yacht.json").read_text())["splits"]["0"]
    assert main(["run", "uci", "sets=[yacht]", "splits=2", *words]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["yacht"][0] == first["log likelihood"]
    assert len(result["metrics"]["yacht"]) == 2
    assert set(result["metrics"]["yacht"][0]) == set(tables.METHODS)
