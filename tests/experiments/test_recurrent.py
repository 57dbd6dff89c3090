"""E4: the sequences against plain loops, the network's start, the verdicts, and a very small run that is resumed."""

from __future__ import annotations

import itertools
import json
import math
import operator

import pytest
import torch

from experiments.__main__ import main
from experiments.recurrent import report as recurrent_report
from experiments.recurrent import run as recurrent
from experiments.recurrent.sequences import PROBLEMS

SIZES = "lengths=[10] hidden=12 repeats=1 iterations=3 gradient_size=60 curvature_size=30 test_size=50"


def drawn(name, length, count=300):
    return PROBLEMS[name]().draw(count, length, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [10, 20, 50])
def test_temporal_order(length):
    x, y = drawn("temporal order", length)
    places, classes = set(), set()
    for sequence, answer in zip(x.tolist(), y.tolist(), strict=True):
        assert len(sequence) == length
        special = []
        for step, row in enumerate(sequence):
            assert sorted(row) == [0, 0, 0, 0, 0, 1]
            if row.index(1) < 2:
                special.append((step, row.index(1)))
        (one, a), (two, b) = special
        assert length // 10 <= one < length // 5 and length // 2 <= two < 6 * length // 10
        assert answer == {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}[a, b]
        places |= {one, two}
        classes.add(answer)
    assert classes == {0, 1, 2, 3}
    assert len(places) == 2 * (length // 10)  # every place that is allowed comes up


@pytest.mark.parametrize("length", [10, 20, 50])
def test_addition(length):
    x, y = drawn("addition", length)
    firsts, seconds = set(), set()
    for sequence, answer in zip(x.tolist(), y.tolist(), strict=True):
        assert len(sequence) == length and all(-1 <= number <= 1 for number, _ in sequence)
        marked = [(step, number) for step, (number, mark) in enumerate(sequence) if mark]
        assert {mark for _, mark in sequence} == {0, 1}
        (one, u), (two, v) = marked
        assert answer == pytest.approx([0.5 + u / 4 + v / 4], abs=1e-6)
        firsts.add(one)
        seconds.add(two)
    assert firsts == set(range(length // 10)) and seconds == set(range(length // 10, length // 2))
    assert float(x[..., 0].min()) < -0.9 and float(x[..., 0].max()) > 0.9


@pytest.mark.parametrize("length", [10, 20, 50])
def test_three_bit_order(length):
    x, y = drawn("3-bit temporal order", length)
    for sequence, answer in zip(x.argmax(-1).tolist(), y.tolist(), strict=True):
        (one, a), (two, b), (three, c) = [(step, symbol) for step, symbol in enumerate(sequence) if symbol < 2]
        assert length // 10 <= one < max(length // 5, length // 10 + 1)
        assert 33 * length // 100 <= two <= 43 * length // 100 and 66 * length // 100 <= three <= 76 * length // 100
        assert answer == int(f"{a}{b}{c}", 2)
    assert set(y.tolist()) == set(range(8)) and x.shape[-1] == 6


@pytest.mark.parametrize(
    ("name", "rule"), [("multiplication", operator.mul), ("XOR", operator.ne)], ids=["product", "xor"]
)
def test_functions_of_two_marked_values(name, rule):
    x, y = drawn(name, 20)
    for sequence, (answer,) in zip(x.tolist(), y.tolist(), strict=True):
        (one, u), (two, v) = [(step, number) for step, (number, mark) in enumerate(sequence) if mark]
        assert one < 2 <= two < 10 and 0 <= u <= 1 and 0 <= v <= 1
        assert answer == pytest.approx(float(rule(u, v)), abs=1e-6)
    assert 0.1 < float(y.mean()) < 0.6
    if name == "XOR":
        assert set(x[..., 0].flatten().tolist()) == {0.0, 1.0}


def test_random_permutation():
    x, y = drawn("random permutation", 20)
    symbols = x.argmax(-1)
    assert x.shape[-1] == 100 and torch.equal(y, symbols[:, 1:])
    assert torch.equal(symbols[:, 0], symbols[:, -1]) and set(symbols[:, 0].tolist()) == {0, 1}
    assert int(symbols[:, 1:-1].min()) == 2 and int(symbols[:, 1:-1].max()) == 99
    problem = PROBLEMS["random permutation"]()
    assert problem.select(x).shape == (300, 19, 100)
    scores = torch.nn.functional.one_hot(y, 100).float()
    scores[:, :-1] = 0  # what cannot be known does not count
    scores[5, -1] = 0
    scores[5, -1, 50] = 1
    assert problem.wrong(scores, y).nonzero().tolist() == [[5]]


def test_twenty_bits():
    x, y = drawn("20-bit memorisation", 30)
    symbols = x.argmax(-1)
    assert x.shape == (300, 40, 6)
    assert torch.equal(symbols[:, :10], y[:, -10:]) and set(symbols[:, :10].flatten().tolist()) == {0, 1, 2, 3}
    assert (symbols[:, 10:30] == 4).all() and (symbols[:, 30] == 5).all() and (symbols[:, 31:] == 4).all()
    assert (y[:, :30] == 4).all()


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_hessian_free_takes_a_step_on_every_problem(name, monkeypatch):
    """A very small run each; the first damping of the problem with a target at every step grows with T."""
    seen = []
    made = recurrent.HessianFree

    def kept(*args, **kwargs):
        seen.append(kwargs["tau"])
        return made(*args, **kwargs)

    monkeypatch.setattr(recurrent, "HessianFree", kept)
    config = recurrent.Config(
        hidden=8, nonzero=4, gradient_size=20, curvature_size=10, cg_steps=5, test_size=20, iterations=1
    )
    found = recurrent._train(config, name, 10, recurrent.DAMPINGS["structural"], 0)
    assert len(found["errors"]) == 1 and math.isfinite(found["losses"][0])
    assert seen == [pytest.approx(1.0 if name == "random permutation" else 0.1)]


@pytest.mark.parametrize("length", [10, 20, 50])
def test_memorisation(length):
    x, y = drawn("memorisation", length)
    assert x.shape == (32, length + 5, 4) and y.shape == (32, length + 5)
    seen = []
    for sequence, answer in zip(x.tolist(), y.tolist(), strict=True):
        symbols = [row.index(1) for row in sequence]
        assert all(sum(row) == 1 for row in sequence)
        bits = symbols[:5]
        assert symbols[5:] == [2] * (length - 5) + [3] + [2] * 4
        assert answer == [2] * length + bits
        seen.append(tuple(bits))
    assert sorted(seen) == list(itertools.product([0, 1], repeat=5))


def test_what_counts_as_wrong():
    order, addition, memory = (PROBLEMS[name]() for name in ("temporal order", "addition", "memorisation"))
    logits = torch.tensor([[0.0, 1, 0, 0], [2, 1, 0, 0]])
    assert order.wrong(logits, torch.tensor([1, 1])).tolist() == [False, True]
    outputs, targets = torch.tensor([[0.5], [0.5], [0.5]]), torch.tensor([[0.539], [0.541], [0.459]])
    assert addition.wrong(outputs, targets).tolist() == [False, True, True]
    _, y = drawn("memorisation", 10)
    scores = torch.nn.functional.one_hot(y, 3).float()
    assert not memory.wrong(scores, y).any()
    scores[3, 0] = torch.tensor([1.0, 0, 0])  # one step of one sequence
    assert memory.wrong(scores, y).nonzero().tolist() == [[3]]


def test_the_start_is_sparse_and_of_the_published_scale():
    problem = PROBLEMS["temporal order"]()
    model = recurrent.network(problem, 200, 15, 0.5, torch.Generator().manual_seed(0))
    recurrent_weights, read_out = model.rnn.weight_hh_l0, model.out.weight
    for weights in (recurrent_weights, read_out):
        assert ((weights != 0).sum(1) == 15).all()
    assert float(recurrent_weights[recurrent_weights != 0].std()) == pytest.approx(15**-0.5, rel=0.05)
    assert float(model.rnn.weight_ih_l0.std()) == pytest.approx(0.5, rel=0.1)
    assert (model.rnn.weight_ih_l0 != 0).all()  # six inputs: a unit has them all
    assert float(model.rnn.bias_ih_l0.std()) == pytest.approx(15**-0.5, rel=0.2)
    assert not model.rnn.bias_hh_l0.any()
    x, _ = problem.draw(7, 12, torch.Generator().manual_seed(1))
    h = torch.zeros(7, 200)
    for step in range(12):
        h = torch.tanh(x[:, step] @ model.rnn.weight_ih_l0.T + h @ recurrent_weights.T + model.rnn.bias_ih_l0)
    torch.testing.assert_close(model(x), h @ read_out.T + model.out.bias, rtol=1e-4, atol=1e-5)


def outcome(seed, problem, damping, solved, iterations, sequences=1000, seconds=1.0):
    return {"seed": seed, "problem": problem, "length": 20, "damping": damping, "solved": solved,
            "iterations": iterations, "sequences": sequences, "seconds": [seconds / 2, seconds], "errors": [0.5, 0.3],
            "losses": [1.0], "taus": [0.1], "cg_steps": [3, 4], "rejected": 0}  # fmt: skip


def test_the_verdicts():
    found = [
        outcome(0, "addition", "structural", True, 4), outcome(0, "addition", "Tikhonov", True, 9, seconds=3.0),
        outcome(0, "memorisation", "structural", True, 2), outcome(0, "memorisation", "Tikhonov", False, 30),
        outcome(1, "addition", "structural", True, 8), outcome(1, "addition", "Tikhonov", True, 8),
        outcome(1, "memorisation", "structural", False, 2), outcome(1, "memorisation", "Tikhonov", False, 30),
    ]  # fmt: skip
    numbers = recurrent_report.metrics(found)
    assert numbers[0]["structural"]["solved"] == 1 and numbers[0]["Tikhonov"]["solved"] == 0.5
    assert numbers[0]["structural"]["iterations"] == pytest.approx(4)  # addition only: both solved it
    by_metric = {one["metric"]: one for one in recurrent_report.claims(numbers)}
    assert by_metric["solved"]["difference"]["mean"] == pytest.approx(0.25)
    assert by_metric["solved memorisation"]["verdict"] == "confirmed"
    assert by_metric["iterations"]["difference"]["mean"] == pytest.approx(-2.5)
    assert by_metric["seconds"]["verdict"] == "confirmed"
    slower = [{**one, "iterations": 50} if one["damping"] == "structural" else one for one in found]
    verdicts = {one["metric"]: one["verdict"] for one in recurrent_report.claims(recurrent_report.metrics(slower))}
    assert verdicts["iterations"] == "refuted" and verdicts["solved"] == "confirmed"
    nothing = [{**one, "solved": False} for one in found]
    assert recurrent_report.claims(recurrent_report.metrics(nothing)) == []  # nothing solved, nothing to claim
    _, rows = recurrent_report.outcome_rows(found)
    assert rows[0] == ["addition", "20", "structural", "4 (1 s)", "8 (1 s)", "2 of 2"]
    assert rows[3] == ["memorisation", "20", "Tikhonov", "fails (30 % wrong)", "fails (30 % wrong)", "0 of 2"]


def test_a_small_run_is_resumed(tmp_path, capsys):
    words = [*SIZES.split(), "target=0.9", "seconds_per_step=1000", "progress=false"]
    assert main(["run", "E4", *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {(one["problem"], one["damping"]) for one in result["runs"]} == set(
        itertools.product(recurrent.Config().problems, recurrent.DAMPINGS)
    )
    parts = {path: json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()}
    for part in parts.values():
        assert 1 <= part["iterations"] <= 3 and all(math.isfinite(loss) for loss in part["losses"])
        assert part["solved"] == (part["errors"][-1] < 0.9)
        batch = 32 if part["problem"] == "memorisation" else 60
        products = 32 if part["problem"] == "memorisation" else 30
        assert part["sequences"] == part["iterations"] * batch + sum(part["cg_steps"]) * products
    before = {path: path.stat().st_mtime_ns for path in parts}
    assert main(["run", "E4", *words, "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in parts} == before
    assert main(["run", "E4", *words, "hidden=11", "--out", str(tmp_path)]) == 0  # other settings: all again
    assert all(path.stat().st_mtime_ns != before[path] for path in parts)
    assert (tmp_path / "errors.png").is_file()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("problems=[nothing]", "'addition'"),
        ("dampings=[none]", "'Tikhonov'"),
        ("problems=[]", "problems"),
        ("lengths=[5]", "lengths"),
        ("curvature_size=100000", "gradient_size"),
        ("seconds_per_step=0", "seconds_per_step"),
        ("hidden=0", "hidden"),
        ("double=[nothing]", "'addition'"),
    ],
)
def test_settings_are_refused(word, says, tmp_path, capsys):
    assert main(["run", "E4", word, "--out", str(tmp_path)]) != 0
    assert says in capsys.readouterr().err
