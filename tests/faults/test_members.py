"""Attributes that are called otherwise here: a typed AttributeError with a line that can be pasted, and that works."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.neighbour_members import MEMBERS
from tests.cases import rng


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What a user has at hand."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 2), torch.randn(12, 1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    posterior = lk.LaplacePosterior(model, "gaussian").fit(loader)
    return {
        "weights": torch.zeros(posterior.precision.size), "lk": lk, "torch": torch, "posterior": posterior,
        "LaplacePosterior": lk.LaplacePosterior, "model": model,
        "x": x, "y": y, "val": loader, "loader": loader, "train_loader": loader, "calibration_loader": loader,
        "device": "cpu", "matrix": posterior.precision, "v": torch.ones(posterior.precision.size), "queries": loader,
        "prediction": posterior.predict(x), "likelihood": "gaussian", "loss": lambda f, y: (f - y).square().sum(-1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def classes(names: dict[str, object]) -> dict[str, object]:
    x, y = names["x"], torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    posterior = lk.LaplacePosterior(model, "categorical").fit(x, y)
    return {**names, "posterior": posterior, "y": y, "prediction": posterior.predict(x), "likelihood": "categorical",
            "model": model, **dict.fromkeys(("val", "loader", "train_loader", "queries", "calibration_loader"), (x, y)),
            }  # fmt: skip


LINES = sorted({(kind, line) for kind, table in MEMBERS.items() for line in table.values()})
# Lines for optional packages; tests/bridges has them.
OPTIONAL = ("lk.bridges.",)


@pytest.mark.parametrize(("kind", "line"), LINES)
def test_every_line_works(kind: str, line: str, names: dict[str, object], classes: dict[str, object], tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if line.startswith(OPTIONAL):
        compile(line, "", "exec")
        return
    for place, name in ((lk.LaplacePosterior, "tune"), (lk, "evidence_training")):  # seconds each: arguments only
        monkeypatch.setattr(place, name, inspect.signature(getattr(place, name)).bind)
    monkeypatch.chdir(tmp_path)
    names["posterior"].save("posterior.safetensors")  # type: ignore[attr-defined]
    given = classes if any(word in line for word in (".probs", "top_k", "temperature")) else names
    if "model.to(torch.float64)" in line or "LaplacePosterior.load" in line:
        given = {**names, "model": copy.deepcopy(names["model"])}
    exec(line, dict(given))


def test_names_that_are_ours_are_not_in_the_tables(names: dict[str, object], classes: dict[str, object]) -> None:
    """A line for a name that exists would never be seen."""
    owners = {"posterior": "posterior", "prediction": "prediction", "matrix": "matrix", "package": "lk"}
    for kind, table in MEMBERS.items():
        for name in table:
            assert not hasattr(type(names[owners[kind]]), name), (kind, name)
    assert not [name for name in MEMBERS["package"] if name in lk.__all__]


def test_the_lines_that_people_look_for(names: dict[str, object]) -> None:
    posterior, prediction = names["posterior"], names["prediction"]
    for owner, name, line in [
        (posterior, "predict_proba", "Use posterior.predict(x).probs"),
        (posterior, "optimize_prior_precision", "Use posterior.tune(val)"),
        (posterior, "log_marginal_likelihood", "Use posterior.log_evidence()"),
        (posterior, "functional_variance", "Use posterior.functional_covariance(x)"),
        (posterior, "log_prob", "Use posterior.predict(x).log_prob(y)"),
        (posterior, "predictt", "Did you mean .predict?"),
        (prediction, "std", "Use prediction.variance.sqrt()"),
        (prediction, "probs", "This prediction has no 'probs'; it has"),
        (prediction, "samples", "Ask for it with keep_samples=True"),
        (posterior.precision, "trace", "Use matrix.diag().sum()"),  # type: ignore[attr-defined]
        (lk.Mixture([posterior]), "predict_proba", "Use posterior.predict(x).probs"),  # type: ignore[list-item]
        (lk, "Laplace", "Use lk.LaplacePosterior(model, likelihood)"),
        (lk, "KronLLLaplace", 'structure="kron", parameters="last_layer"'),
        (lk, "LaplacePosteriors", "Did you mean .LaplacePosterior?"),
    ]:
        assert not hasattr(owner, name)
        with pytest.raises(lk.errors.UnknownAttribute) as caught:
            getattr(owner, name)
        assert line in str(caught.value), (name, str(caught.value))
        assert isinstance(caught.value, lk.errors.LaplaceKFError) and isinstance(caught.value, AttributeError)
    assert getattr(posterior, "predict_proba", 3) == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "posterior.predict(x)"),
        ({"link_approx": "probit"}, 'posterior.predict(x, method="probit")'),
        ({"pred_type": "glm", "link_approx": "mc", "n_samples": 7},
         'posterior.predict(x, method="linearized", samples=7)'),
        ({"link_approx": "bridge_norm"}, 'posterior.predict(x, method="linearized", link="bridge")'),
        ({"pred_type": "nn", "link_approx": "mc", "n_samples": 9}, 'posterior.predict(x, method="mc", samples=9)'),
        ({"joint": True}, "posterior.functional_covariance(x, joint=True)"),
    ],
)  # fmt: skip
def test_posteriors_are_not_called(settings: dict[str, object], line: str, classes: dict[str, object]) -> None:
    with pytest.raises(lk.errors.InvalidType) as caught:
        classes["posterior"](classes["x"], **settings)  # type: ignore[operator]
    assert str(caught.value) == f"a LaplacePosterior is not called; use {line}"
    exec(line, dict(classes))


def test_copies_and_pickles_are_as_before(names: dict[str, object]) -> None:
    """They look for special methods on instances, some before there is any state."""
    posterior, x = names["posterior"], names["x"]
    again = pickle.loads(pickle.dumps(posterior))
    for other in (copy.copy(posterior), copy.deepcopy(posterior), again):
        found = other.predict(x, generator=rng(0))  # type: ignore[attr-defined]
        assert torch.equal(found.mean, posterior.predict(x, generator=rng(0)).mean)  # type: ignore[attr-defined]
    matrix = copy.deepcopy(posterior.precision)  # type: ignore[attr-defined]
    assert torch.equal(matrix.dense(), posterior.precision.dense())  # type: ignore[attr-defined]
    empty = object.__new__(lk.LaplacePosterior)
    with pytest.raises(AttributeError, match="_state"):
        _ = empty._state


def test_a_property_that_fails_says_its_own(names: dict[str, object]) -> None:
    class Broken(lk.LaplacePosterior):
        @property
        def broken(self) -> int:
            return self._nothing.there  # type: ignore[attr-defined,no-any-return]

    with pytest.raises(AttributeError, match="_nothing") as caught:
        _ = Broken(names["model"], "gaussian").broken  # type: ignore[arg-type]
    assert not isinstance(caught.value, lk.errors.LaplaceKFError)


def test_errors_come_back_from_other_processes_whole(names: dict[str, object]) -> None:
    made = [
        lk.errors.UnknownName("structure", "krn", ["kron"]),
        lk.errors.UnknownName("structure", object(), ["kron"]),
        lk.errors.UnknownOption("a", "is not taken", ["b"], lambda: 0),
        lk.errors.UnknownAttribute(lk.Mixture, "predict_proba", "posterior"),
        lk.errors.NotPositiveDefinite("block", 0.1, "advice"),
        lk.errors.CorruptFile("file"),
        lk.errors.MissingFile("file"),
        lk.errors.DistributedFailure("process"),
    ]
    for error in made:
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(other) is type(error) and str(other) == str(error) and other.args == error.args
    assert pickle.loads(pickle.dumps(made[4])).block == "block"
