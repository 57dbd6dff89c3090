"""What users bring: arrays, two arguments, loaders to predict on, other libraries' names, changed models."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk
from tests.cases import labels, normal, rng

N, C = 12, 3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ arrays


class Foreign:
    """An array of another library."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("kind", [np.asarray, Foreign], ids=["numpy", "other"])
@pytest.mark.parametrize("form", ["pair", "two", "list", "loader", "mapping"])
def test_arrays_in_every_form_of_data(kind: Any, form: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, x, y = Named(), normal(N, 4), labels(C, N)
    a, b = kind(x.numpy()), kind(y.numpy())  # float64, which the float32 model gets as float32
    data: Any = {"pair": (a, b), "list": [(a, b)], "mapping": {"x": a, "labels": b}}.get(form)
    if form == "loader":
        rows = [(kind(x[k : k + 5].numpy()), kind(y[k : k + 5].numpy())) for k in (0, 5, 10)]
        data = DataLoader(rows, batch_size=None, collate_fn=lambda row: row)  # type: ignore[arg-type]
    posterior = lk.LaplacePosterior(model, "categorical")
    posterior = posterior.fit(a, b) if form == "two" else posterior.fit(data)
    wanted = lk.LaplacePosterior(model, "categorical").fit([(x.float(), y)])
    torch.testing.assert_close(posterior.precision.dense(), wanted.precision.dense())
    tuned = posterior.tune((a, b) if form == "two" else data, n_data=[3.0], prior_precision=[1.0], generator=rng(0))
    expected = wanted.tune((x.float(), y), n_data=[3.0], prior_precision=[1.0], generator=rng(0))
    assert tuned.best["objective"] == pytest.approx(expected.best["objective"], rel=1e-4)
    for method in ("map", "probit", "mc"):
        found = posterior.predict(a, method=method, samples=2, generator=rng(1)).probs
        reference = wanted.predict(x.float(), method=method, samples=2, generator=rng(1)).probs
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    covariance = wanted.functional_covariance(x.float())
    torch.testing.assert_close(posterior.functional_covariance(a), covariance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda a: a[::-1], lambda a: a.astype(">f8"), lambda a: np.asfortranarray(a), lambda a: a.astype("f2")]
)
def test_arrays_of_any_memory_layout(change: Any) -> None:
    a = change(np.random.default_rng(0).normal(size=(N, 4)))
    a.flags.writeable = False
    found = lk.batches.to_tensors({"x": [a, "text", 3]}, network())["x"]
    assert found[0].dtype == torch.float64 and found[1:] == ["text", 3]
    np.testing.assert_array_equal(found[0].numpy(), a)


def test_labels_and_texts_keep_their_kinds() -> None:
    given = (np.arange(3, dtype="u2"), np.array(["a"]), np.array([True]), np.int32(3))
    number, text, flag, scalar = lk.batches.to_tensors(given, network())
    assert (number.dtype, flag.dtype, scalar.dtype) == (torch.int64, torch.bool, torch.int32)
    assert text is given[1]


def test_nan_in_an_array_is_found() -> None:
    x = normal(N, 4).numpy()
    x[3, 1] = np.nan
    with pytest.raises(lk.errors.NonFinite, match="batch 0"):
        lk.LaplacePosterior(network(), "categorical").fit(x, labels(C, N).numpy())


def test_optimisers_take_arrays() -> None:
    x, y = normal(N, 4), labels(C, N)
    losses = [
        float(lk.optim.kfac(network(), "categorical", generator=rng(0)).step(*given))
        for given in ((x, y), (x.numpy(), y.numpy()))
    ]
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------ arguments


def test_two_arguments() -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    same(
        lk.LaplacePosterior(model, "categorical").fit(x, y).precision.dense(),
        lk.LaplacePosterior(model, "categorical").fit((x, y)).precision.dense(),
    )
    posterior = lk.LaplacePosterior(model, "categorical").fit(x, y)
    loader = DataLoader(TensorDataset(x, y), 5)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"loader alone, fit\(loader\), or .*fit\(x, y\)"):
        posterior.fit(loader, y)
    for second in (y, y.numpy()):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"tune\(\(x, y\)\)"):
            posterior.tune(x, second)
        with pytest.raises(lk.errors.ShapeMismatch, match=r"update\(\(x, y\)\)"):
            posterior.update(x, second)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"hessian_structure": "kron"}, 'Use structure="kron"'),
        ({"subset_of_weights": "last_layer"}, 'Use parameters="last_layer"'),
        ({"prior_prec": 1.0}, "Use prior_precision=1.0"),
        ({"sigma_noise": 1.0}, r"Use lk.likelihoods.Gaussian\(scale=1.0\)"),
        ({"prior_precison": 1.0}, "Did you mean prior_precision="),
        ({"temperature": 2.0}, "Use posterior.n_data = posterior.n_data / 2.0"),
        ({"subnetwork_indices": [0]}, r"Use parameters=lk.Subnetwork\(size\)"),
    ],
)
def test_arguments_of_neighbours_are_named(given: dict[str, Any], hint: str) -> None:
    with pytest.raises(lk.errors.UnknownOption, match=f"option.*{hint}") as caught:
        lk.LaplacePosterior(network(), "categorical", **given)
    assert isinstance(caught.value, (lk.errors.LaplaceKFError, TypeError))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("classification", "categorical"), ("regression", "gaussian"), ("bce", "bernoulli"), ("categorial", "categorical"),
     (nn.CrossEntropyLoss(), "categorical"), (nn.MSELoss, "gaussian"), ("cross-entropy", "categorical"),
     ("crossentropy", "categorical"), (nn.MSELoss(), "gaussian"), (nn.BCEWithLogitsLoss(), "bernoulli")],
)  # fmt: skip
def test_likelihoods_of_neighbours_are_named(name: Any, hint: str) -> None:
    with pytest.raises(lk.errors.UnknownName, match=f"Did you mean '{hint}'"):
        lk.LaplacePosterior(network(), name)


def test_words_of_neighbours_for_structures_and_methods() -> None:
    with pytest.raises(lk.errors.UnknownName, match="Did you mean 'kron'"):
        lk.LaplacePosterior(network(), "categorical", structure="kfac")
    posterior = lk.LaplacePosterior(network(), "categorical").fit(normal(N, 4), labels(C, N))
    with pytest.raises(lk.errors.UnknownName, match="Did you mean 'linearized'"):
        posterior.predict(normal(2, 4), method="glm")
    with pytest.raises(lk.errors.UnknownName, match="Did you mean 'mc'"):
        posterior.predict(normal(2, 4), method="sample")
    with pytest.raises(lk.errors.UnknownName, match='method="linearized", link="bridge"'):
        posterior.predict(normal(2, 4), method="bridge")
    with pytest.raises(lk.errors.UnknownName, match="Did you mean 'sampled'"):
        lk.LaplacePosterior(network(), "categorical", estimator="mc")
    for name, hint in (("last_layer", 'parameters="last_layer"'), ("subnetwork", r"parameters=lk.Subnetwork\(size\)")):
        with pytest.raises(lk.errors.UnknownName, match=hint):
            lk.LaplacePosterior(network(), "categorical", structure=name)
    with pytest.raises(ValueError, match=r"prior_precision must be a number.*got None"):
        lk.LaplacePosterior(network(), "categorical", prior_precision=None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ loaders


@pytest.mark.parametrize("method", ["map", "mc", "linearized", "probit"])
@pytest.mark.parametrize("targets", [True, False])
def test_a_loader_is_predicted_batch_after_batch(method: str, targets: bool, capsys: Any) -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    loader = DataLoader(TensorDataset(x, y) if targets else TensorDataset(x), 5)
    asked: dict[str, Any] = {"method": method, "samples": 4, "keep_samples": method == "mc"}
    found = posterior.predict(loader, generator=rng(2), progress=True, **asked)
    assert "predict" in capsys.readouterr().err
    space = {"space": "weights"} if method == "mc" else {}
    whole = posterior.predict(x, generator=rng(2), **space, **asked)
    same(found.probs, whole.probs)
    same(found.entropy, whole.entropy)
    same(found.log_prob(y), whole.log_prob(y))
    same(found.distribution.log_prob(y), whole.distribution.log_prob(y))
    if method == "mc":
        same(found.mutual_information, whole.mutual_information)
        same(found.samples, whole.samples)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"\(3,\).*12 examples"):
        found.log_prob(y[:3])


@pytest.mark.parametrize("method", ["map", "mc", "linearized"])
def test_a_loader_of_regression_inputs(method: str) -> None:
    model, x, y = network(), normal(N, 4), normal(N, C, seed=4)
    posterior = lk.LaplacePosterior(model, lk.likelihoods.Gaussian(0.5)).fit((x, y))
    asked: dict[str, Any] = {"method": method, "samples": 4}
    found = posterior.predict((batch for batch in x.split(5)), generator=rng(2), **asked)
    space = {"space": "weights"} if method == "mc" else {}
    whole = posterior.predict(x, generator=rng(2), **space, **asked)
    for name in ("mean", "variance", "epistemic_variance", "entropy"):
        same(getattr(found, name), getattr(whole, name))
    same(found.log_prob(y), whole.log_prob(y))
    same(found.distribution.log_prob(y), whole.distribution.log_prob(y))


def test_draws_of_a_loader_leave_the_generator_where_one_call_does() -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    one, two = rng(3), rng(3)
    posterior.predict(x, method="mc", samples=3, space="weights", generator=one)
    posterior.predict(DataLoader(TensorDataset(x, y), 5), method="mc", samples=3, generator=two)
    assert torch.equal(one.get_state(), two.get_state())


def test_loaders_and_inputs_that_cannot_be_predicted() -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    for given, message in [
        (DataLoader(TensorDataset(x, y, y), 5), r"of 3; .*inputs=lambda batch: batch\[0\]"),
        (TensorDataset(x, y), r"TensorDataset; wrap it: .*DataLoader"),
        (x.tolist(), r"list of numbers; make it a tensor"),
        (iter([]), "empty"),
        (iter([x, x[:, None]]), "several shapes"),
    ]:
        with pytest.raises(lk.errors.ShapeMismatch, match=message):
            posterior.predict(given, method="map")
    posterior = lk.LaplacePosterior(model, "categorical", inputs=lambda b: b[0], targets=lambda b: b[1])
    posterior.fit([(x, y, y)])
    same(posterior.predict(DataLoader(TensorDataset(x, y, y), 5), method="map").probs, model(x).softmax(-1).detach())


# ------------------------------------------------------------------------------------------------ changed models


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank", "ekfac"])
@pytest.mark.parametrize("change", ["grown", "removed", "turned"])
def test_a_layer_that_was_replaced_after_the_fit(structure: str, change: str) -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit((x, y))
    evidence = posterior.log_evidence()
    assert isinstance(model, nn.Sequential)
    if change == "grown":
        model[2] = nn.Linear(6, 5).double()
    elif change == "removed":
        del model[2]
    else:  # as many numbers as before
        model[2] = nn.Linear(20, 1).double()
    predictor = None
    for call in (
        posterior.penalty, lambda: posterior.mean, lambda: posterior.sample(2), lambda: posterior.predict(x),
        lambda: posterior.predict(x, method="linearized"), lambda: posterior.predictor(2),
        lambda: posterior.update((x, y)), lambda: posterior.tune((x, y)), lambda: posterior.functional_covariance(x),
        lambda: posterior.precondition_gradients(0.1),
    ):  # fmt: skip
        with pytest.raises(lk.errors.ShapeMismatch, match=r"'2\.weight'.*replaced or removed.*module '2'"):
            predictor = call()
    assert predictor is None
    assert torch.equal(posterior.log_evidence(), evidence)


# ------------------------------------------------------------------------------------------------ outputs, dictionaries


@pytest.mark.parametrize("wrap", [lambda z: {"out": z, "aux": z * 2}, lambda z: {"scores": z}, lambda z: (z,)])
def test_outputs_in_a_mapping(wrap: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    model, x, y = Wrapped(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    same(posterior.predict(x, method="map").probs, model.net(x).softmax(-1).detach())


def test_outputs_of_several_names_are_refused_with_the_one_to_pick() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Any:
            return {"mask": self.net(x), "boxes": self.net(x)}

    model, x, y = Wrapped(), normal(N, 4), labels(C, N)
    with pytest.raises(lk.errors.ShapeMismatch, match=r'\(model\(batch\[0\]\)\["mask"\], batch\[1\]\)'):
        lk.LaplacePosterior(model, "categorical").fit((x, y))
    lk.LaplacePosterior(model, "categorical", forward=lambda model, batch: (model(batch[0])["mask"], batch[1])).fit(
        (x, y)
    )


def test_dictionaries_of_image_and_label() -> None:
    class Noted(Tensor):
        pass

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, x, y = Volume(), normal(N, 4), labels(C, N)
    batch = {"image": x.as_subclass(Noted), "label": y, "image_meta_dict": {"name": ["a"] * N}}
    posterior = lk.LaplacePosterior(model, "categorical").fit([batch])
    same(posterior.precision.dense(), lk.LaplacePosterior(model, "categorical").fit([(x, y)]).precision.dense())
    same(posterior.predict({"image": x}, method="map").probs, posterior.predict(x, method="map").probs)
    assert type(posterior.predict(x.as_subclass(Noted), method="map").probs) is Tensor


# ------------------------------------------------------------------------------------------------ warnings


def test_warnings_name_the_line_of_the_user() -> None:
    model, x = network(), normal(N, 4)
    y = model(x).argmax(-1)
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    optimizer = lk.optim.kfac(model, "categorical", max_rise=0.0, tau=1e-12, zeta=1e-12)
    optimizer.max_rise = -1e9  # refuses everything
    wide = lk.LaplacePosterior(
        nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2001)).double(), "gaussian", structure="diag"
    )
    calls = {
        "tune": lambda: posterior.tune((x, y), n_data=[1.0, 2.0], prior_precision=[1.0], samples=2, generator=rng(0)),
        "step": lambda: optimizer.step(x, y),
        "fit": lambda: wide.fit([(x[:1], torch.zeros(1, 2001).double())]),
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        assert seen, name
        assert {entry.filename for entry in seen} == {__file__}, name
        lines = {entry.lineno for entry in seen}
        assert lines == {call.__code__.co_firstlineno}, (name, lines)


# ------------------------------------------------------------------------------------------------ small ones


def test_metrics_leave_ignored_labels_out() -> None:
    pytest.importorskip("torchmetrics")
    from laplace_kf.reports import metrics

    probs, y = torch.softmax(normal(N, C), 1), labels(C, N)
    some = torch.where(torch.arange(N) < 5, -100, y)
    assert metrics.classification(probs, some) == metrics.classification(probs[5:], y[5:])
    with pytest.raises(lk.errors.ShapeMismatch, match="all labels are ignored"):
        metrics.classification(probs, torch.full_like(y, -100))


def test_validation_data_without_a_target_are_named() -> None:
    fitted = lk.LaplacePosterior(nn.Linear(4, C).double(), "categorical", weights=True)
    x, y = normal(N, 4), labels(C, N)
    fitted.fit([(x, y, torch.ones(N))])
    for nothing in ((x, torch.full_like(y, -100), torch.ones(N)), (x, y, torch.zeros(N))):
        with pytest.raises(lk.errors.ShapeMismatch, match="all targets of the validation data are ignored"):
            fitted.tune([nothing], samples=2)
    assert fitted.n_data == N


def test_masks_of_minus_infinity_name_the_way_out() -> None:
    mask = torch.zeros(N, 4).double().masked_fill(torch.arange(4) == 2, -torch.inf)
    with pytest.raises(lk.errors.NonFinite, match=r"a boolean mask, or torch\.finfo\(mask\.dtype\)\.min"):
        lk.LaplacePosterior(network(), "categorical").fit([({"input": normal(N, 4), "mask": mask}, labels(C, N))])


@pytest.mark.parametrize("change", [lambda x: x.float(), lambda x: (10 * x).byte()])
def test_inputs_of_another_number_type_are_refused_by_name(change: Any) -> None:
    model, x, y = network(), normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(model, "categorical")
    for call in (lambda: posterior.fit(change(x), y), lambda: posterior.fit(x, y).predict(change(x), method="map")):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"parameters are torch.float64.*x\.to\(torch.float64\)"):
            call()


def test_entries_that_forward_looks_for_in_vain() -> None:
    for forward in (lambda m, b: (m(b["x"]), b["z"]), lambda m, b: (m(b["x"])["a"], b["y"])):
        with pytest.raises(
            (lk.errors.ShapeMismatch, TypeError, IndexError), match=r"forward= does not work|indices|str"
        ):
            lk.LaplacePosterior(network(), "categorical", forward=forward).fit([{"x": normal(N, 4), "y": labels(C, N)}])


def test_a_whole_pair_in_predict_is_refused_with_what_to_leave_out() -> None:
    x, y = normal(N, 4), labels(C, N)
    posterior = lk.LaplacePosterior(network(), "categorical").fit(x, y)
    for method in ("map", "mc", "linearized"):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"2 entries of the tuple.*predict\(x\)"):
            posterior.predict((x, y), method=method)
