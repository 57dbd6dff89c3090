"""Task streams against plain loops, sets that are not there, heads, and very small runs of every stream."""

import contextlib
import gzip
import io
import json
import math
import os
import struct
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch

from experiments import tables
from experiments.__main__ import main
from experiments.common import data, files
from experiments.continual import run as continual
from experiments.continual import streams
from experiments.continual.methods import LEARNERS, Averaged
from experiments.continual.report import numbers, task_table
from experiments.continual.settings import STANDARD
from experiments.continual.tasks import joined
from experiments.theory import multiplier_toy
from laplace_kf.continual import OnlineLaplace
from tests.continual import problems

FILES = pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA names no folder of data files")
Config = partial(continual.Config, progress=False)


def write_pictures(folder, rng, count, side=28):
    """Training and test files of grey pictures in the IDX format; returns both pairs of arrays."""
    found = []
    folder.mkdir(parents=True)
    for prefix, size in (("train", count), ("t10k", count)):
        pixels = rng.integers(0, 256, (size, side, side), dtype=np.uint8)
        classes = (np.arange(size) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", classes)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
        found.append((pixels, classes))
    return found


def stored(folder, monkeypatch, side=28):
    """A data folder with 40 random pictures of digits and of clothes, and of letters in one file; nothing else."""
    root = folder / "data"
    monkeypatch.setenv("LAPLACE_KF_DATA", str(root))
    monkeypatch.setattr(files, "_cache", lambda: folder / "cache")
    rng = np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist", "notmnist"):
        write_pictures(root / name, rng, 40, side)
    for path in (root / "notmnist").glob("train-*"):
        path.unlink()
    return root


@pytest.fixture
def root(tmp_path, monkeypatch):
    return stored(tmp_path, monkeypatch)


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Of 7x7 pixels, for whole runs: the factors of a first layer are then of 50 rows, not of 785."""
    return stored(tmp_path, monkeypatch, 7)


SMALL = {"train_size": 30, "val_size": 10, "test_size": 20, "hidden": 5, "epochs": 1, "batch": 10}


def test_permuted_pixels_are_the_same_ones_in_every_image_of_a_task(root):
    given = streams.STREAMS["permuted"].tasks(Config(tasks=3, **SMALL), seed=1)
    first, *others = given.tasks
    images, labels = data.images("mnist", "train")
    assert torch.equal(first.train[0], images[:30].flatten(1)) and torch.equal(first.val[0], images[-10:].flatten(1))
    for task in others:
        assert not torch.equal(task.train[0], first.train[0])
        assert torch.equal(task.train[1], labels[:30])
        # where each pixel went, from the training images alone (random pixels: no two columns are equal)
        source = (task.train[0][:, :, None] == first.train[0][:, None, :]).all(0).int().argmax(1).tolist()
        assert sorted(source) == list(range(784))
        assert torch.equal(task.test[0], first.test[0][:, source])
    assert not torch.equal(others[0].train[0], others[1].train[0])
    again = streams.STREAMS["permuted"].tasks(Config(tasks=3, **SMALL), seed=1).tasks
    assert all(torch.equal(a.train[0], b.train[0]) for a, b in zip(again, given.tasks, strict=True))


def test_disjoint_tasks_hold_their_digits_in_the_original_order(root):
    low, high = streams.STREAMS["disjoint"].tasks(Config(tasks=2, **SMALL), seed=0).tasks
    images, labels = data.images("mnist", "train")
    for task, digits in ((low, range(5)), (high, range(5, 10))):
        chosen = [n for n in range(30) if int(labels[n]) in digits]
        assert torch.equal(task.train[0], torch.stack([images[n].flatten() for n in chosen]))
        assert task.train[1].tolist() == [int(labels[n]) for n in chosen]


def turned_by_hand(image, degrees):
    """Where every pixel comes from, one by one, by bilinear interpolation; 0 outside."""
    size = len(image)
    middle = (size - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    found = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            x, y = column - middle, middle - row  # y upwards
            x, y = cos * x + sin * y, -sin * x + cos * y  # back by the angle
            r, c = middle - y, x + middle
            for i in (math.floor(r), math.floor(r) + 1):
                for j in (math.floor(c), math.floor(c) + 1):
                    if 0 <= i < size and 0 <= j < size:
                        found[row, column] += (1 - abs(r - i)) * (1 - abs(c - j)) * image[i, j]
    return found


@pytest.mark.parametrize("degrees", [0.0, 25.0, 90.0, -130.0])
def test_turning_agrees_with_a_plain_loop(degrees):
    images = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = streams.rotated(images, degrees)
    for image, found in zip(images, turned, strict=True):
        wanted = torch.from_numpy(turned_by_hand(image[0].numpy(), degrees))
        torch.testing.assert_close(found[0], wanted, atol=1e-12, rtol=0)
    if degrees == 90:
        torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-12, rtol=0)


def test_rotated_tasks_go_from_upright_to_the_last_angle(root):
    given = streams.STREAMS["rotated"].tasks(Config(tasks=4, degrees=60, **SMALL), seed=0).tasks
    assert [task.name for task in given] == ["0°", "20°", "40°", "60°"]
    images, labels = data.images("mnist", "test")
    torch.testing.assert_close(given[0].test[0], images[:20].flatten(1), atol=1e-5, rtol=0)
    wanted = torch.from_numpy(turned_by_hand(images[3, 0].double().numpy(), 40)).float()
    torch.testing.assert_close(given[2].test[0][3].view(28, 28), wanted, atol=1e-5, rtol=0)
    assert torch.equal(given[2].test[1], labels[:20])


def test_pictures_are_padded_coloured_and_known_by_head(root):
    given = streams.STREAMS["vision"].tasks(Config(**SMALL), seed=0)
    assert [task.name for task in given.tasks] == ["mnist", "notmnist", "fashion-mnist"]
    images, labels = data.images("fashion-mnist", "train")
    task = given.tasks[2]
    assert task.train[0].shape == (30, 3, 32, 32)
    for colour in range(3):
        assert torch.equal(task.train[0][:, colour, 2:30, 2:30], images[:30, 0])
    assert float(task.train[0].sum()) == pytest.approx(3 * float(images[:30].sum()), rel=1e-5)  # nothing in the rim
    assert torch.equal(task.train[1], labels[:30] + 20)
    assert torch.equal(task.val[1], labels[-10:] + 20)


def test_letters_are_cut_from_their_one_file_without_overlap(root):
    given = streams.STREAMS["vision"].tasks(Config(**SMALL), seed=0)
    images, _ = data.images("notmnist", "test")
    letters = given.tasks[1]
    parts = [part[0][:, 0, 2:30, 2:30] for part in (letters.train, letters.val, letters.test)]
    assert [len(part) for part in parts] == [30, 4, 4]  # 80, 10 and 10 per cent of 40, at most what was asked for
    assert torch.equal(torch.cat(parts), torch.cat([images[:30, 0], images[32:, 0]]))
    assert "validate" in given.remarks["notmnist"]


def test_sets_that_are_not_there_are_named_and_left_out(root):
    given = streams.STREAMS["vision"].tasks(Config(**SMALL), seed=0)
    assert sorted(given.absent) == ["cifar10", "svhn"]
    assert not any(str(root) in reason for reason in given.absent.values())  # results travel, folders do not


def test_house_numbers_are_read_when_they_are_there(root):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    labels = (1 + np.arange(12) % 10).astype(np.uint8)[:, None]
    (root / "svhn").mkdir()
    for split in ("train", "test"):
        scipy.io.savemat(root / f"svhn/{split}_32x32.mat", {"X": pixels, "y": labels})
    images, classes = data.images("svhn", "train")
    assert images.shape == (12, 3, 32, 32)
    assert float(images[5, 2, 7, 9]) == pytest.approx(pixels[7, 9, 2, 5] / 255)
    assert classes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    given = streams.STREAMS["vision"].tasks(Config(**{**SMALL, "val_size": 2}), seed=0)
    assert [task.name for task in given.tasks] == ["mnist", "notmnist", "fashion-mnist", "svhn"]


def test_a_broken_file_of_house_numbers_is_said_to_be_broken(root):
    (root / "svhn").mkdir()
    (root / "svhn/train_32x32.mat").write_bytes(b"nothing")
    with pytest.raises(data.CorruptFile, match=r"train_32x32\.mat"):
        data.images("svhn", "train")


@FILES
@pytest.mark.data
def test_slices_of_a_table_share_out_its_rows_by_the_feature():
    config = Config(stream="regression", table="yacht", sort_by=5, tasks=3)
    tasks = streams.STREAMS["regression"].tasks(config, seed=0).tasks
    table = data.regression("yacht")
    rows, test = table.splits[0]
    parts = [sum(len(part[1]) for part in split) for split in zip(*((t.train, t.val, t.test) for t in tasks))]  # noqa: B905
    assert parts == [len(rows) - len(rows) // 10, len(rows) // 10, len(test)]
    largest = -math.inf
    for task in tasks:
        values = torch.cat([part[0][:, 5] for part in (task.train, task.val, task.test)])
        assert float(values.min()) >= largest
        largest = float(values.max())
    inputs, targets = joined([task.train for task in tasks])
    torch.testing.assert_close(inputs.mean(0), torch.zeros(inputs.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.std(0), torch.ones(1), atol=1e-4, rtol=0)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"full online"}))  # P × P is too large for this net
def test_penalties_hold_the_trunk_and_pull_only_the_heads_in_use(root, name):
    config = Config(stream="vision", prior_precision=0.5, estimator="sampled", **SMALL)
    stream, method = streams.STREAMS["vision"], LEARNERS[name]
    tasks = stream.tasks(config, 0).tasks
    model = stream.network(config, tasks, 0)
    learner = method.make(
        1.0, 10, model=model, likelihood=stream.likelihood(config), parameters=stream.parameters, prior_precision=0.5,
        head_precision=0.5,
    )  # fmt: skip
    stream.begin(model, 0, method.revisits)
    learner.penalty()
    tasks[0].forward(model, tasks[0].train)[0].square().sum().backward()
    learner.after_step()
    x, y = tasks[0].train
    learner.after_task([(x[:6], y[:6])], forward=tasks[0].forward)
    stream.begin(model, 1, method.revisits)
    model.zero_grad()
    learner.penalty().backward()
    used = [0, 1] if method.revisits else [1]
    for k, head in enumerate(model.heads):
        if k in used:  # the prior around 0 and nothing else
            torch.testing.assert_close(head.weight.grad, 0.5 * head.weight.detach())
        else:
            assert head.weight.grad is None
    moved = [p.grad for p in model.trunk.parameters()]
    assert all(gradient is not None for gradient in moved)


def test_mixed_batches_train_every_row_through_its_own_head(root):
    stream = streams.STREAMS["vision"]
    config = Config(stream="vision", **SMALL)
    tasks = stream.tasks(config, 0).tasks
    model = stream.network(config, tasks, 0)
    stream.begin(model, 2, True)
    assert len(model.heads) == 3
    x, y = joined([(task.train[0][:4], task.train[1][:4]) for task in tasks])
    found = stream.loss(config)(model(x), y)
    total = 0.0
    for n in range(len(x)):
        logits = model(x[n : n + 1], int(y[n]) // 10)[0]
        total -= float(logits.log_softmax(0)[int(y[n]) % 10])
    assert float(found) == pytest.approx(total / len(x), rel=1e-5)


def test_a_task_without_a_head_has_no_accuracy_yet(root):
    stream = streams.STREAMS["vision"]
    config = Config(stream="vision", **SMALL)
    tasks = stream.tasks(config, 0).tasks
    model = stream.network(config, tasks, 0)
    stream.begin(model, 0, False)
    assert 0 <= stream.quality(config, model, tasks[0], tasks[0].test) <= 1
    assert math.isnan(stream.quality(config, model, tasks[1], tasks[1].test))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_single_task_networks_know_nothing_of_each_other(root):
    config = Config(stream="vision", adam_lr=1e-3, optimizer="adam", **SMALL)
    stream = streams.STREAMS["vision"]
    tasks = stream.tasks(config, 0).tasks
    found = continual.sequence(config, LEARNERS["single-task networks"], 1.0, tasks, 0)
    matrix = torch.tensor(found["test"])
    for t in range(3):
        assert torch.equal(matrix[t, : t + 1], matrix.diagonal()[: t + 1])
        assert matrix[t, t + 1 :].isnan().all()
    assert numbers(found)["forgetting"] == 0
    alone = continual.sequence(config, LEARNERS["fine-tuning"], 1.0, tasks[:1], 0)
    assert alone["test"][0][0] == found["test"][0][0]


@pytest.mark.parametrize(
    ("stream", "name"),
    [
        ("permuted", "Kronecker online, bounded"),
        ("permuted", "Kronecker online, summed over T"),
        ("permuted", "Synaptic Intelligence"),
        ("vision", "joint training"),
        ("vision", "single-task networks"),
    ],
)
def test_a_sequence_goes_on_after_the_last_finished_task(request, tmp_path, monkeypatch, stream, name):
    request.getfixturevalue("little" if stream == "permuted" else "root")
    config = Config(stream=stream, tasks=3, max_terms=1, estimator="sampled", **SMALL)
    tasks, method = streams.STREAMS[stream].tasks(config, 0).tasks, LEARNERS[name]
    path, train, asked = tmp_path / "part.pt", continual._train, []

    def stopped(*args):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        train(*args)

    torch.manual_seed(0)
    monkeypatch.setattr(continual, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        continual.sequence(config, method, 1.0, tasks, 0, path)
    held = path.read_bytes()
    found = continual.sequence(config, method, 1.0, tasks, 0, path)
    assert len(asked) == 4 and not path.exists()  # the third task alone
    wanted = continual.sequence(config, method, 1.0, tasks, 0)
    assert len(asked) == 7
    for split in ("val", "test"):
        assert np.array_equal(found[split], wanted[split], equal_nan=True)
    assert len(found["errors"]) == len(wanted["errors"])
    path.write_bytes(held)
    continual.sequence(config, method, 2.0, tasks, 0, path)  # another strength: from the start
    assert len(asked) == 10


def test_bounded_chains_and_synaptic_intelligence_are_what_they_are_called(little, monkeypatch):
    config = Config(tasks=4, max_terms=2, **SMALL)
    tasks, seen = streams.STREAMS["permuted"].tasks(config, 0).tasks, []
    closing = streams.STREAMS["permuted"].closing
    monkeypatch.setattr(
        streams.STREAMS["permuted"],
        "closing",
        lambda c, m, learner, t: (seen.append(learner), closing(c, m, learner, t))[1],
    )
    found = continual.sequence(config, LEARNERS["Kronecker online, bounded"], 1.0, tasks, 0)
    assert {len(matrix.terms) for _, matrix in seen[0].posterior.curvature.entries} == {2}
    assert [max(step.values()) > 0 for step in found["errors"]] == [False, True, True]
    for name in ("Synaptic Intelligence, as published", "Synaptic Intelligence"):
        continual.sequence(config, LEARNERS[name], 0.5, tasks, 0)
    assert [(x.c, x.epsilon, x.centres, len(x.anchors)) for x in seen[1:]] == [
        (15, 0.1, "last", 1),
        (15, 1e-3, "each", 4),
    ]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """The folder of one small run over sets of which two are missing, and what it printed."""
    folder, said = tmp_path_factory.mktemp("vision"), io.StringIO()
    words = [f"{key}={value}" for key, value in SMALL.items()]
    words += ["methods=[Kronecker online,fine-tuning,Synaptic Intelligence,joint training,single-task networks]"]
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(said):
        stored(folder, monkeypatch)
        assert main(["run", "E28", *words, "progress=false", "--out", str(folder / "run")]) == 0
    return folder / "run", said.getvalue()


def test_a_run_says_what_was_left_out(vision):
    out, said = vision
    result = json.loads((out / "result.json").read_text())
    assert sorted(result["absent"]) == ["cifar10", "svhn"]
    assert "Left out: svhn" in (out / "report.html").read_text()
    assert result["tasks"] == ["mnist", "notmnist", "fashion-mnist"]
    assert (out / "accuracy.png").is_file() and (out / "matrix.png").is_file()
    assert "(97.17)" in said


def test_published_numbers_stand_beside_the_tasks_that_there_are(root):
    stream = streams.STREAMS["vision"]
    tasks = stream.tasks(Config(**SMALL), 0).tasks
    table = task_table(stream.measure, tasks, {"Kronecker online": [[0.5, 0.25, 0.75]]}, stream.published)
    average = (97.17 + 94.78 + 90.36) / 3
    assert list(table.rows[0]) == [
        "Kronecker online", "50.00 (97.17)", "25.00 (94.78)", "75.00 (90.36)", f"50.00 ({average:.2f})"
    ]  # fmt: skip


RUN = ["tasks=3", "hidden=10", "epochs=1", "multipliers=[1]", "strengths=[0.1]", "progress=false"]


@pytest.mark.parametrize("name", ["rotated_mnist", "E35", "E26"])
def test_small_runs_of_the_other_streams(little, name, tmp_path):
    """On pictures of a few pixels; runs on the real digits are in test_continual.py."""
    words = [*RUN, "train_size=30", "val_size=10", "test_size=20", "batch=10"]
    assert main(["run", name, *words, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"] and (name != "rotated_mnist" or set(result["metrics"]) == set(STANDARD))
    for found in result["metrics"].values():
        assert all(math.isfinite(value) for value in found["average"])


@FILES
@pytest.mark.data
def test_a_small_run_over_a_table(tmp_path):
    words = [*RUN, "train_size=200", "val_size=100", "test_size=100", "batch=50", "table=yacht", "sort_by=5"]
    assert main(["run", "streaming_regression", *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    for found in result["metrics"].values():
        assert all(math.isfinite(value) for value in found["average"])
    assert max(result["metrics"]["Kronecker online"]["average"]) < 0  # minus an error
    assert result["metrics"]["joint training"]["log_likelihood"][0] < 0
    assert (tmp_path / "error.png").is_file()


@FILES
@pytest.mark.data
def test_a_feature_with_too_few_values_is_refused(tmp_path, capsys):
    words = ["table=yacht", "sort_by=0", "tasks=9", "progress=false"]
    assert main(["run", "streaming_regression", *words, "--out", str(tmp_path)]) != 0
    assert "too few values" in capsys.readouterr().err


def test_results_from_before_a_setting_was_added_are_still_used(little, tmp_path):
    tmp_path = tmp_path / "run"
    words = ["tasks=2", "train_size=30", "val_size=10", "test_size=30", "hidden=5", "epochs=1", "progress=false",
             "methods=[fine-tuning]"]  # fmt: skip
    assert main(["run", "E25", *words, "--out", str(tmp_path)]) == 0
    (part,) = (tmp_path / "parts").iterdir()
    held = json.loads(part.read_text())
    del held["config"]["degrees"]
    held["test"] = [[0.125, 0.125], [0.125, 0.125]]
    part.write_text(json.dumps(held))
    assert main(["run", "E25", *words, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["fine-tuning"]["average"] == [0.125]
    assert main(["run", "E25", *words, "momentum=0.5", "--out", str(tmp_path)]) == 0  # another setting: done again
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["fine-tuning"]["average"] != [0.125]


def test_the_average_over_tasks_divides_the_curvature_and_not_the_prior():
    shared = {"likelihood": "categorical", "prior_precision": 0.3}
    found = {}
    for divided in (True, False):
        model = problems.network()
        learner = Averaged(model=model, multiplier=2.0, **shared)
        if not divided:
            learner = OnlineLaplace(model, structure="kron", multiplier=2.0, terms="sum", **shared)
        for k in range(3):
            learner.after_task(problems.task(k))
            problems.moved(model, k)
        found[divided] = float(learner.penalty())
        pull = 0.3 / 2 * sum(float((w - learner.posterior.mean[n]).square().sum()) for n, w in model.named_parameters())
    assert found[True] == pytest.approx(pull + (found[False] - pull) / 3, rel=1e-10)
    assert found[True] < 0.5 * found[False]


def test_pages_quote_the_tables_of_a_result(vision, tmp_path, monkeypatch):
    out = tmp_path / "docs"
    (out / "results").mkdir(parents=True)
    (out / "results/continual_vision.json").write_text((vision[0] / "result.json").read_text())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = tables.stream("continual_vision")
    result = json.loads((out / "results/continual_vision.json").read_text())
    average = 100 * result["metrics"]["fine-tuning"]["average"][0]
    assert f"| fine-tuning | {average:.2f} |" in text
    assert "Left out: svhn" in text and "Kronecker above Synaptic Intelligence" in text
    assert tables.stream("continual_terms") == "*Not run yet.*"


# -- the toy -----------------------------------------------------------------------------------------------------------


def test_the_toys_mode_is_a_weighted_mean_of_precisions():
    config = multiplier_toy.Config(count=15, noise=0.7, prior_precision=0.3)
    (x, y), (u, v) = multiplier_toy.problem(config)
    for multiplier in (0.05, 1.0, 20.0):
        old = multiplier * x.T @ x / 0.49 + 0.3 * torch.eye(2, dtype=torch.float64)
        start = torch.linalg.solve(x.T @ x / 0.49 + 0.3 * torch.eye(2, dtype=torch.float64), x.T @ y / 0.49)
        wanted = torch.linalg.solve(old + u.T @ u / 0.49, old @ start + u.T @ v / 0.49)
        torch.testing.assert_close(
            multiplier_toy.mode(config, [(x, y), (u, v)], multiplier), wanted[:, 0], atol=1e-9, rtol=0
        )


def test_the_toy_confirms_its_claims(tmp_path):
    assert main(["run", "E24", "points=5", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [v["verdict"] for v in result["verdicts"]] == ["confirmed"] * 3
    assert result["multipliers"][2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "word", "says"),
    [
        ("E28", "stream=nothing", "'permuted'"),
        ("E28", "optimizer=newton", "'adam'"),
        ("streaming_regression", "noise=0", "noise"),
        ("E24", "points=4", "odd"),
        ("E24", "least=2", "least"),
        ("E24", "noise=0", "noise"),
        ("E26", "methods=[fine-tuning]", "no strength"),
    ],
)
def test_settings_are_refused(name, word, says, tmp_path, capsys):
    assert main(["run", name, word, "--out", str(tmp_path)]) != 0
    assert says in capsys.readouterr().err
