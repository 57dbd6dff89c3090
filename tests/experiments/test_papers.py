"""The experiments on single claims, each at a very small size: they run, judge what they found, write their files."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from experiments.__main__ import main
from experiments.common import data
from experiments.common.statements import Repeated, Statement, judged
from experiments.ood.targeted import steps_until
from experiments.photographs.network import wide_residual
from experiments.photographs.run import augmented, by_correctness
from experiments.registry import EXPERIMENTS
from experiments.steps.batches import exponent
from experiments.theory import damping_toy, empirical_fisher_toy
from experiments.theory.clusters import left
from experiments.theory.loss_slices import maxima

AUTOENCODER = "count=60 side=7 widths=[6,3]"
ATTACK = (
    "hidden=16 epochs=2 train_size=500 curvature_size=200 samples=3 count=20 tune_size=50 n_data_factors=[1] "
    "prior_precisions=[1]"
)
FISHER = "images=200 fisher_images=100 most=3 width=4"
SMOKE = {
    "E3": f"{AUTOENCODER} steps=2 limit=12 inner=3",
    "E5": "",
    "E6": "steps=20",
    "E7": FISHER,
    "E8": FISHER,
    "E9": FISHER,
    "E10": f"{AUTOENCODER} steps=3 points=4",
    "E11": f"{AUTOENCODER} sizes=[20,60] updates=5",
    "E13": "points=11 count=10",
    "E16": f"{AUTOENCODER} steps=2 every=2 batch=30 cg_steps=3",
    "E17": f"{AUTOENCODER} steps=2 every=2 batch=30 cg_steps=3",
    "E18": "count=60 side=7 widths=[6] batch=30 updates=3 adam_updates=6 rates=[0.01] treatments=[em]",
    "E21": f"{ATTACK} epsilons=[0.1]",
    "E22": f"{ATTACK} steps=4 every=2",
    "E23": "side=8 train_size=40 epochs=1 batch=20 curvature_size=20 curvature_batch=20 samples=2 tune_samples=2 "
    "tune_size=20 count=40 n_data_factors=[1] prior_precisions=[1]",
    "E29": "steps=40 repetitions=50",
    "E30": "steps=2 count=40",
    "E31": "count=20 draws=1 samples=[1,4] wide=[1,3]",
    "E32": "counts=[1,3] outputs=[2] samples=[2]",
    "E33": "size=5 steps=8",
    "E34": "points=8 width=3 restarts=1 samples=20 tune_samples=5 n_data_factors=[1,10] prior_precisions=[1] grid=13",
}


FILES = pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA names no folder of data files")
READ_FILES = {"E7", "E8", "E9", "E10", "E11", "E16", "E17", "E18", "E21", "E22"}


@pytest.fixture
def photographs(monkeypatch):
    """Noise in place of CIFAR-100, whose lossless files take seconds to decode; MNIST and the others stay."""
    read = data.images

    def images(name, split):
        if name != "cifar100":
            return read(name, split)
        rng = torch.Generator().manual_seed(len(split))
        return torch.rand(60, 3, 32, 32, generator=rng), torch.randint(0, 2, (60,), generator=rng)

    monkeypatch.setattr(data, "images", images)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.data, FILES] if name in READ_FILES else []) for name in SMOKE]
)
def test_a_small_run(name, tmp_path, photographs):
    """Files are written, numbers are finite or said to be none, and every verdict follows from its own number."""
    assert main(["run", name, *SMOKE[name].split(), "repeats=1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["experiment"] == name and result["seeds"] == [0] and result["size"]
    assert result["stand_ins"] == []
    module = EXPERIMENTS[name].load()
    assert [one["claim"] for one in result["verdicts"]] == [
        one.text for one in module.STATEMENTS if one.metric in result["metrics"]["found"]
    ]
    found = {key: entry["values"][0] for key, entry in result["metrics"]["found"].items()}
    for one, statement in zip(
        result["verdicts"], [s for s in module.STATEMENTS if s.metric in found], strict=True
    ):  # fmt: skip
        value = found[statement.metric]
        value = math.nan if value is None else value  # JSON has no infinity: judged below only where there is a number
        if not math.isnan(value) and one["verdict"] != "not comparable":
            assert one["verdict"] == ("confirmed" if statement.least <= value <= statement.most else "refuted")
        assert one["verdict"] != "not comparable" or one["why"]
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_two_runs_with_one_seed_are_the_same(tmp_path):
    for folder in ("one", "two"):
        assert main(["run", "E32", *SMOKE["E32"].split(), "repeats=1", "--out", str(tmp_path / folder)]) == 0
    one, two = (json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("one", "two"))
    assert one["metrics"] == two["metrics"]


def test_verdicts_follow_the_numbers():
    statement = Statement("a claim", "x", 1, 2, "1.5", "fair", "no reason to compare")
    fair = [{"x": 0.5, "fair": 1.0}, {"x": 2.0, "fair": 1.0}]
    assert statement.judge(fair)["verdict"] == "confirmed"  # the mean is 1.25
    assert statement.judge(fair)["seeds"] == "1 of 2"
    assert statement.judge([{"x": 3.0, "fair": 1.0}])["verdict"] == "refuted"
    assert statement.judge([{"x": math.nan, "fair": 1.0}])["verdict"] == "refuted"
    unfair = statement.judge([{"x": 1.5, "fair": 0.0}])
    assert unfair["verdict"] == "not comparable" and unfair["why"] == "no reason to compare"


def test_seeds_are_counted_up():
    seen = []
    report = judged("t", "s", Repeated(seed=4, repeats=3), lambda seed: seen.append(seed) or {"x": seed},
                    [Statement("five", "x", 5, 5)], size="small")  # fmt: skip
    assert seen == [4, 5, 6] and report.details["verdicts"][0]["verdict"] == "confirmed"


@pytest.mark.parametrize("word", ["repeats=0", "a=0.5", "share=2"])
def test_settings_are_refused(word, tmp_path, capsys):
    assert main(["run", "E5", word, "--out", str(tmp_path)]) != 0
    assert word.split("=")[0] in capsys.readouterr().err


def test_shares_of_the_damped_steps():
    found = damping_toy.shares(15.0, 0.5)  # curvatures 2 along u and 30 along v; diag B is 16 times the identity
    assert found["damped by diag B"] == pytest.approx(2 / (2 + 30))
    assert found["damped by B"] == pytest.approx(0.5)
    assert found["diagonal matrix"] == pytest.approx(2 / 16)


def test_walks_on_the_empirical_fisher():
    assert empirical_fisher_toy.path("exact", 1.0, 0.5, 3, 2.0, False) == pytest.approx([2, 1, 0.5, 0.25])
    walked = empirical_fisher_toy.path("empirical", 0.5, 0.5, 3, 2.1, False)  # θ − α sign θ
    assert walked == pytest.approx([2.1, 1.6, 1.1, 0.6])
    assert empirical_fisher_toy.path("empirical", 1.0, 1.0, 1, 2.0, True)[1] == pytest.approx(2 - 1 / 2)


def test_cg_errors_end_at_zero():
    curvature = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    errors = left(curvature, torch.ones(3, dtype=torch.float64), 3)
    assert errors[0].tolist() == [1, 1, 1] and float(errors[3].norm()) < 1e-12


def test_maxima_are_counted():
    surface = torch.zeros(5, 5, dtype=torch.float64)
    assert maxima(surface) == 0
    surface[2, 2] = 1.0
    surface[0, 0] = 9.0  # on the border
    assert maxima(surface) == 1


def test_exponents_and_steps():
    assert exponent([10, 100], [100, 10]) == pytest.approx(1)
    assert exponent([10, 100], [50, 50]) == pytest.approx(0)
    assert steps_until(0.5, [0, 5, 10], [0.0, 0.4, 0.6]) == pytest.approx(7.5)
    assert steps_until(0.5, [0, 5], [0.0, 0.4]) == math.inf


def test_photographs_are_moved_and_mirrored():
    images = torch.arange(1.0, 3 * 8 * 8 + 1).view(1, 3, 8, 8).expand(40, 3, 8, 8)
    moved = augmented(images, torch.Generator().manual_seed(0))
    padded = [torch.nn.functional.pad(image, (1, 1, 1, 1)) for image in (images[0], images[0].flip(-1))]
    allowed = [p[:, i : i + 8, j : j + 8] for p in padded for i in range(3) for j in range(3)]
    found = [[k for k, one in enumerate(allowed) if torch.equal(one, image)] for image in moved]
    assert all(len(match) == 1 for match in found) and len({match[0] for match in found}) > 9


def test_entropies_of_right_and_wrong_predictions():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    accuracy, right, wrong = by_correctness(probs, torch.tensor([0, 1, 0]))
    assert accuracy == pytest.approx(100 / 3) and right.tolist() == [0]
    assert wrong.tolist() == pytest.approx([math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)])


def test_skip_connections_that_halve_the_image_see_every_pixel():
    model = wide_residual(5, blocks=2, factor=1, dropout=0.3).eval()
    skips = [tuple(block.skip.weight.shape[2:]) if block.skip is not None else None for block in model[1:7]]
    assert skips == [None, None, (2, 2), None, (2, 2), None]
    skip = model[3].skip
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    skip(x).sum().backward()
    assert skip(x).shape == (1, 32, 4, 4) and (x.grad != 0).all()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_more_photographs_than_there_are_is_refused(tmp_path, photographs, capsys):
    assert main(["run", "E23", "train_size=61", "curvature_size=10", "--out", str(tmp_path)]) == 1
    assert "at most 60" in capsys.readouterr().err
