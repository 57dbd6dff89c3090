"""The command line: what it lists, refuses and writes."""

import importlib
import json
import runpy
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from experiments import registry, runner
from experiments.__main__ import main
from laplace_kf.__main__ import main as package_main
from laplace_kf.reports.html import Report, Table


@dataclass
class Config:
    seed: int = 0
    rate: float = 0.1
    kind: Literal["slow", "quick"] = "quick"
    device: str = "cpu"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate} is not allowed; it must be above 0")


def fake_run(config):
    return Report(
        "a fake", "nothing", config.seed, vars(config), {"m": {"rate": config.rate}}, [Table("t", ["a"], [["b"]])]
    )


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """E5 stands for an experiment that is ready, and takes no time."""
    ready = registry.Experiment("E5", "a fake", "fake_module", "fake")
    monkeypatch.setitem(registry.EXPERIMENTS._entries, "E5", ready)
    monkeypatch.setattr(registry.importlib, "import_module", lambda _: SimpleNamespace(Config=Config, run=fake_run))
    monkeypatch.setattr(runner, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/fake.yaml").write_text("experiment: E5\nrate: 0.5\n")
    (tmp_path / "configs/big.yaml").write_text("base: fake\nkind: slow\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path):
    return json.loads((path / "result.json").read_text())


def test_list_shows_every_experiment_and_its_state(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *(f"E{i}" for i in range(1, 36)),
        "rotated_mnist",
        "streaming_regression",
        "calibration",
        "ood_pairs",
        "uci",
        "attribution",
        "attribution_text",
        "characters",
        "labels",
        "shakespeare",
        "demo",
    ]
    assert "ready" in lines[18] and "[toy_regression]" in lines[18]
    assert "ready" in lines[19]
    assert "[ood_mnist, ood_mnist_gpu, ood_mnist_published]" in lines[19]
    assert not any("not yet" in line for line in lines)


@pytest.fixture
def unwritten(monkeypatch):
    """E23 stands for an experiment that is only on the list."""
    monkeypatch.setitem(registry.EXPERIMENTS._entries, "E23", registry.Experiment("E23", "a title"))


def test_list_says_which_experiments_are_not_written(unwritten, capsys):
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "not yet" in line] == ["E23"]


def test_every_room_has_its_entry():
    """``run.py``, and where several experiments share a room, its ``PARTS`` are those of the list."""
    rooms = [path for path in (runner.CONFIGS.parent / "experiments").iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) > 10
    for room in rooms:
        if room.name == "common":
            continue
        assert (room / "run.py").is_file(), room
        module = importlib.import_module(f"experiments.{room.name}.run")
        entries = [entry for entry in registry.EXPERIMENTS.values() if entry.module == module.__name__]
        if hasattr(module, "PARTS"):
            assert {entry.id for entry in entries} == set(module.PARTS)
        for entry in entries:
            assert hasattr(entry.load(), "Config") and hasattr(entry.load(), "run"), entry.id


def test_an_experiment_that_is_not_written_says_so(unwritten, capsys):
    assert main(["run", "E23"]) == 1
    told = capsys.readouterr().err
    assert "has not been written yet" in told
    assert "E20" in told


@pytest.mark.parametrize("name", ["E36", "ood_mnits", "missing.yaml"])
def test_an_unknown_experiment_lists_the_known_ones(name, capsys):
    assert main(["run", name]) == 1
    assert "ood_mnist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("epoch=3", ["'epochs'", "'passes'"]),
        ("epochs=many", ["epochs", "int"]),
        ("epochs=0", ["epochs=0", "at least 1"]),
        ("network=convolutional", ["'dropout'", "'plain'"]),
        ("device=abacus", ["device=abacus", "cpu"]),
        ("prior_precisions=[-1]", ["prior_precisions", "above 0"]),
        ("train_size=60000", ["train_size", "50000"]),
        ("epochs", ["key=value", "epochs (int)"]),
        ("epochs.more=3", ["epochs.more", "'epochs'"]),
    ],
)
def test_a_bad_setting_says_what_is_allowed(word, told, capsys, tmp_path):
    assert main(["run", "E20", word, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in told), error
    assert not (tmp_path / "out").exists()


def test_a_run_writes_only_under_out(fake, capsys):
    assert main(["run", "E5", "seed=4", "--out", "here", "rate=2"]) == 0
    assert {path.name for path in fake.iterdir()} == {"configs", "here"}
    result = read(fake / "here")
    assert result["config"] == {"seed": 4, "rate": 2.0, "kind": "quick", "device": "cpu"}
    assert result["seed"] == 4
    assert result["experiment"] == "E5"
    assert result["wall_time_s"] >= 0
    assert "report.html" in capsys.readouterr().out


def test_a_resumable_experiment_is_given_a_folder_for_its_parts(fake, monkeypatch):
    def run(config, folder):
        folder.mkdir(parents=True)
        (folder / "one.json").write_text("{}")
        return fake_run(config)

    monkeypatch.setitem(registry.EXPERIMENTS._entries, "E5", replace(registry.EXPERIMENTS["E5"], resumable=True))
    monkeypatch.setattr(registry.importlib, "import_module", lambda _: SimpleNamespace(Config=Config, run=run))
    assert main(["run", "E5", "--out", "here"]) == 0
    assert (fake / "here/parts/one.json").is_file()


def test_the_default_folder_is_named_after_the_id(fake):
    assert main(["run", "fake"]) == 0
    assert read(fake / "results/E5")["config"]["rate"] == 0.5


def test_a_file_may_build_on_another(fake):
    assert main(["run", "configs/big.yaml", "--out", "here"]) == 0
    assert read(fake / "here")["config"] == {"seed": 0, "rate": 0.5, "kind": "slow", "device": "cpu"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("experiment: E5\nrates: 1\n", "'rate'"),
        ("experiment: E5\nkind: fast\n", "'slow'"),
        ("experiment: E99\n", "'E20'"),
        ("rate: 1\n", "'E20'"),
        ("experiment: [E5\n", "not readable"),
        ("- 1\n", "no settings"),
    ],
)
def test_a_bad_file_says_what_is_wrong(fake, content, told, capsys):
    (fake / "mine.yaml").write_text(content)
    assert main(["run", "mine.yaml"]) == 1
    assert told in capsys.readouterr().err


def test_a_failing_experiment_fails_the_command(fake, monkeypatch, capsys):
    def fail(config):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(registry.importlib, "import_module", lambda _: SimpleNamespace(Config=Config, run=fail))
    assert main(["run", "E5"]) == 1
    assert "the loss is nan" in capsys.readouterr().err
    assert not (fake / "results").exists()


@pytest.mark.parametrize("words", [["fly"], ["run"], ["list", "rate=2"], ["run", "E20", "--rate", "2"], ["data"]])
def test_a_wrong_command_exits_with_an_error(words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code != 0


def test_an_unknown_data_set_lists_the_known_ones(capsys):
    assert main(["data", "fetch", "minst"]) == 1
    assert "'mnist'" in capsys.readouterr().err


def test_every_configuration_file_fits_its_experiment(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the values are what is checked here
    names = {path.stem for path in runner.CONFIGS.glob("*.yaml")}
    assert {"demo", "ood_mnist", "ood_mnist_gpu"} <= names
    for name in names:
        runner.resolve(name)


STATUSES = {("experiments", "list"): 0, ("experiments", "run", "E36"): 1, ("laplace_kf", "dmeo"): 2}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(("words", "status"), STATUSES.items(), ids=map(" ".join, STATUSES))
def test_exit_status_of_the_modules(words, status, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(words))
    # A process that ends here may flush denormal numbers to 0; the process of the other tests must not.
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: True)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert (caught.value.code or 0) == status


def test_the_package_command_reports_errors(monkeypatch, capsys, tmp_path):
    import laplace_kf.demo

    def fail(*_):
        raise ImportError("no torchmetrics")

    monkeypatch.setattr(laplace_kf.demo, "main", fail)
    assert package_main(["demo", "--out", str(tmp_path)]) == 1
    assert "no torchmetrics" in capsys.readouterr().err
