"""What users bring from other libraries: refused by name with the line to paste, or handled; never a foreign error."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.checks import of_every

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


# -- optimisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac", "hessian_free"])
@pytest.mark.parametrize("call", ["unscale_", "step"])
def test_a_grad_scaler_does_not_divide_what_it_never_multiplied(name: str, call: str) -> None:
    """``unscale_`` before a plain step, too: it would have been 1024 times too short."""
    model, twin = net(), net()
    optimizer, plain = (
        getattr(lk.optim, name)(m, "categorical", generator=torch.Generator().manual_seed(1)) for m in (model, twin)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for each in (optimizer, plain):
        loss = each.backward(X, Y)
    scaler.scale(loss)
    gradients = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(lk.errors.IncompatiblePair, match=r"GradScaler.*step\(\) in place.*scaler\.unscale_"):
            getattr(scaler, call)(optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    for each in (optimizer, plain):
        each.step()  # the line of the message
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5  # a scheduler's way
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
    own: dict[str, Any] = {"__name__": "mine.grad_scaler"}  # somebody else's file of that name reads them as anybody
    exec("def rate(optimizer): return optimizer.param_groups[0]['lr']", own)
    assert own["rate"](optimizer) == 0.5


def test_a_disabled_grad_scaler_is_none() -> None:
    model, twin = net(), net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for network in (model, twin):
        optimizer = lk.optim.kfac(network, "categorical", generator=torch.Generator().manual_seed(1))
        optimizer.backward(X, Y)
        scaler.step(optimizer) if network is model else optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_closures_are_refused_with_the_line() -> None:
    optimizer = lk.optim.kfac(net(), "categorical")
    with pytest.raises(lk.errors.IncompatiblePair, match=r"no closure.*optimizer\.step\(x, y\)"):
        optimizer.step(lambda: torch.zeros(()))


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"weight_decay": 0.1}, "taken by no group.*l2= of the optimiser"),
        ({"betas": (0.9, 0.99)}, "taken by no group.*keys: params, lr"),
        ({"momentum": 0.9}, "first_order=True.*momentum=True of the optimiser"),
    ],
)
def test_what_groups_of_other_optimisers_have(group: dict[str, Any], says: str) -> None:
    with pytest.raises(lk.errors.LaplaceKFError, match=says):
        lk.optim.kfac(net(), "categorical", groups=[{"params": "0.*", **group}])


def test_groups_are_made_with_the_optimiser_and_copies_by_state() -> None:
    model = net()
    optimizer = lk.optim.kfac(model, "categorical", parameters=["2.*"])
    with pytest.raises(lk.errors.IncompatiblePair, match="made with the optimiser"):
        optimizer.add_param_group({"params": list(model[0].named_parameters())})
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(lk.errors.IncompatiblePair, match=r"neither copied nor pickled.*load_state_dict\(deepcopy"):
            copied(optimizer)


@pytest.mark.parametrize("name", ["kfac", "natural_gradient"])
def test_parameters_that_are_frozen_while_they_are_trained(name: str) -> None:
    model = net()
    optimizer = getattr(lk.optim, name)(model, "categorical")
    optimizer.step(X, Y)
    model[0].weight.requires_grad_(False)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"'0\.weight' was frozen.*\"first_order\": True, \"lr\": 0\.0"):
        optimizer.step(X, Y)
    model[0].weight.requires_grad_()
    optimizer = getattr(lk.optim, name)(
        model, "categorical", groups=[{"params": "0.weight", "first_order": True, "lr": 0.0}]
    )
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(X, Y)  # the line of the message
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)] == [True, False, False, False]


def test_hooks_that_mask_gradients_do_not_hold_weights() -> None:
    """A hook that only looks is nobody's business."""
    model, seen = net(), []
    model[0].weight.register_hook(lambda gradient: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lk.optim.kflr(model, "categorical").step(X, Y)
    model[2].weight.register_hook(lambda gradient: gradient * 0)
    with pytest.warns(UserWarning, match=r"changes the gradient of parameter '2\.weight'.*parameters=\[patterns\]"):
        lk.optim.kflr(model, "categorical").step(X, Y)
    assert len(seen) == 2 and len(model[2].weight._backward_hooks) == 1


# -- models ------------------------------------------------------------------------------------------------------------


class Complex(nn.Module):
    """Complex outputs of real weights."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.layer, self.real = nn.Linear(3, 3, dtype=torch.float64), real

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.layer(x), x)
        return torch.view_as_real(z).flatten(1) if self.real else z


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "fit": lambda m: lk.LaplacePosterior(m, "gaussian").fit((X, torch.zeros(8, 6, dtype=torch.float64))),
    "step": lambda m: lk.optim.kfac(m, "gaussian").step(X, torch.zeros(8, 6, dtype=torch.float64)),
    "product": lambda m: lk.curvature.ggn_vector_product(
        m, "gaussian", (X, torch.zeros(8, 6, dtype=torch.float64)), torch.ones(12, dtype=torch.float64)
    ),
    "jacobian": lambda m: lk.diagnostics.jacobian(m, X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_complex_outputs(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match=r"outputs \(8, 3\) are complex.*view_as_real"):
        call(Complex(False))
    call(Complex(True))  # the line of the message


class ByName(nn.Module):
    """Takes its input by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale


def test_arguments_by_keyword_only() -> None:
    model = ByName()
    with pytest.raises(lk.errors.ShapeMismatch, match=r"\['x'\] by keyword only.*inputs=lambda batch: \{\"x\": batch"):
        lk.LaplacePosterior(model, "categorical", structure="full").fit((X, Y))
    posterior = lk.LaplacePosterior(
        model, "categorical", structure="full", inputs=lambda batch: {"x": batch[0]}, targets=lambda batch: batch[1]
    ).fit((X, Y))
    expected = oracles.dense_ggn(model.layer, X, Y, oracles.categorical_nll)
    torch.testing.assert_close(posterior.curvature.dense(), expected)
    assert posterior.predict({"x": X}).probs.shape == (8, 3)


def test_exported_programs_of_one_batch_size() -> None:
    def fitted(**settings: Any) -> lk.LaplacePosterior:
        program = torch.export.export(net(), (X,), **settings).module()
        return lk.LaplacePosterior(program, "categorical", "diag").fit((X, Y))

    with pytest.raises(lk.errors.UnsupportedLayer, match=r"torch\.export program.*dynamic_shapes=\(\{0: torch"):
        fitted()
    found = fitted(dynamic_shapes=({0: torch.export.Dim("batch")},)).curvature.dense()
    torch.testing.assert_close(found, lk.LaplacePosterior(net(), "categorical", "diag").fit((X, Y)).curvature.dense())


def test_backward_hooks_have_no_part_in_curvature() -> None:
    """Masks and clipping of gradients and hooks that only look, of parameters and modules: they stay and fire later."""

    def case(hook: str, structure: str) -> None:
        model, twin = net(), net()
        fired: list[int] = []
        if hook == "parameter":
            model[0].weight.register_hook(lambda g: fired.append(1) or g * 0.5)
        elif hook == "module":
            model[0].register_full_backward_hook(lambda m, given, found: fired.append(1))
            model[1].register_full_backward_hook(lambda m, given, found: (given[0] * 0.5,))
        else:
            model[1].register_full_backward_pre_hook(lambda m, found: fired.append(1) or (found[0] * 0.5,))
        vector = torch.linspace(-1, 1, 31).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, expected = (lk.LaplacePosterior(m, "categorical", structure).fit((X, Y)) for m in (model, twin))
        torch.testing.assert_close(found.curvature.dense(), expected.curvature.dense())
        for product in (lk.curvature.ggn_vector_product, lk.curvature.hessian_vector_product):
            one, other = (product(m, "categorical", (X, Y), vector) for m in (model, twin))
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(found.functional_covariance(X), expected.functional_covariance(X))
        assert not fired
        model(X).sum().backward()
        assert fired

    hooks = ("parameter", "module", "before a module")
    of_every(case, [(hook, structure) for hook in hooks for structure in ("diag", "kron", "full")])


# -- no examples, labels of calibration --------------------------------------------------------------------------------

KINDS: dict[str, tuple[int, Tensor]] = {
    "categorical": (3, Y),
    "bernoulli": (2, (X[:, :2] > 0).double()),
    "gaussian": (2, X[:, :2]),
    "poisson": (2, (X[:, :2].abs() * 3).round()),
    "heteroscedastic_gaussian": (2, X[:, :1]),
}


@pytest.mark.parametrize("name", KINDS)
def test_predictions_of_no_example(name: str) -> None:
    outputs, targets = KINDS[name]
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(lk.LaplacePosterior(nn.Linear(3, outputs).double(), name).fit((X, targets)))
    for subject in (made[0], lk.Mixture(made)):
        for method in ("mc", "linearized", "map"):
            found = subject.predict(X[:0], method, samples=3)
            some = subject.predict(X[:2], method, samples=3)
            assert found.distribution.batch_shape == (0, *some.distribution.batch_shape[1:])
            assert found.distribution.event_shape == some.distribution.event_shape
            assert found.entropy.shape == (0,)


def test_calibration_takes_one_hot_labels() -> None:
    posterior = lk.LaplacePosterior(net(), "categorical").fit((X, Y))
    expected = posterior.calibrate((X, Y)).predict(X).prediction_set(0.7)
    for rows in (torch.eye(3)[Y], torch.eye(3)[Y].double(), torch.eye(3)[Y].long(), torch.eye(3)[Y].bool()):
        assert torch.equal(posterior.calibrate((X, rows)).predict(X).prediction_set(0.7), expected)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"probabilities of several.*targets\.argmax\(-1\)"):
        posterior.calibrate((X, torch.full((8, 3), 1 / 3, dtype=torch.float64)))


def test_calibration_with_noise_of_every_example_is_of_their_observations() -> None:
    y, noise = X[:, :2], X[:, :1].abs() + 0.1
    torch.manual_seed(0)
    posterior = lk.LaplacePosterior(nn.Linear(3, 2).double(), "gaussian").fit((X, (y, noise)))
    expected = posterior.calibrate((X, y)).predict(X).interval(0.7)
    found = posterior.calibrate([(X[:5], (y[:5], noise[:5])), (X[5:], (y[5:], noise[5:]))]).predict(X).interval(0.7)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_one_example_without_the_batch_axis(tmp_path: Path) -> None:
    """A convolution takes ``x[0]``, and its channels were read as examples."""
    torch.manual_seed(0)
    images = torch.randn(6, 2, 4, 4).double()
    model = nn.Conv2d(2, 3, 3, padding=1).double()
    fitted = lk.LaplacePosterior(model, "categorical").fit((images, images.argmax(1) + 1))
    fitted.save(tmp_path / "p.safetensors")
    loaded = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)

    def case(name: str, posterior: lk.LaplacePosterior) -> None:
        call: dict[str, Callable[[Any], Any]] = {
            "predict": lambda x: posterior.predict(x, samples=2),
            "functional_covariance": lambda x: posterior.functional_covariance(x, diagonal_only=True),
            "ood_score": lambda x: posterior.ood_score(x, kind="entropy"),
            "predictor": posterior.predictor(2),
        }
        message = r"shape \(2, 4, 4\).*fit had 4 axes.*x\[None\]"
        for x in (images[0], images[0].numpy()):
            with pytest.raises(lk.errors.ShapeMismatch, match=message):
                call[name](x)
        call[name](images[0][None])  # the line of the message

    names = ("predict", "functional_covariance", "ood_score", "predictor")
    of_every(case, [(name, posterior) for name in names for posterior in (fitted, loaded)])
    mixed = lk.LaplacePosterior(nn.Linear(3, 3).double(), "categorical").fit([(X, Y), (X[:, None], Y[:, None])])
    assert mixed.predict(X).probs.shape == (8, 3)  # a network of any number of axes, shown both
    with pytest.raises(lk.errors.ShapeMismatch, match=r"x\[None\]"):
        mixed.predict(X[0])


def test_densities_take_arrays_and_lists() -> None:
    prediction = lk.LaplacePosterior(net(), "categorical").fit((X, Y)).predict(X)
    for labels in (Y.numpy(), Y.tolist(), Y.numpy().astype("int32")):
        assert torch.equal(prediction.log_prob(labels), prediction.log_prob(Y))


# -- choices -----------------------------------------------------------------------------------------------------------


def test_parameters_that_are_no_names() -> None:
    model = net()
    given: list[tuple[Any, str]] = [
        (model[2], r'a module, Linear.*parameters=\["2\.\*"\]'),
        (model[2].parameters(), r'parameters=\["2\.weight", "2\.bias"\]'),
        (list(model.named_parameters()), "entries of type tuple"),
        (model[2].weight, r'parameters=\["2\.weight"\]'),
        (3, "a int was given"),
        ("2.*", r'Use parameters=\["2\.\*"\]'),
        ("2", r'Use parameters=\["2\.\*"\]'),
        (["2"], r'Use parameters=\["2\.\*"\]'),
    ]
    for parameters, message in given:
        with pytest.raises(lk.errors.LaplaceKFError, match=message):
            lk.LaplacePosterior(model, "categorical", parameters=parameters).fit((X, Y))
    names = lk.LaplacePosterior(model, "categorical", parameters=["2.*"]).fit((X, Y)).mean.keys()
    assert list(names) == ["2.weight", "2.bias"]


def test_losses_with_settings_are_not_named_without_them() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    losses: list[tuple[Any, str]] = [
        (nn.CrossEntropyLoss(weight=weights), r"Use lk\.likelihoods\.Categorical\(class_weights=loss\.weight\)"),
        (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0), r"\(label_smoothing=0\.1, ignore_index=0\)"),
        (nn.NLLLoss(weights), r"Categorical\(class_weights=loss\.weight\)"),
        (nn.BCEWithLogitsLoss(pos_weight=weights), r"FromLoss\(lambda z, y: F\.binary.*pos_weight=loss\.pos_weight"),
        (nn.CrossEntropyLoss(), "Did you mean 'categorical'"),
        (nn.BCEWithLogitsLoss(), "Did you mean 'bernoulli'"),
        (nn.BCELoss(), "outputs are logits: leave the sigmoid out"),
        (nn.GaussianNLLLoss(), r"a mean and a log-variance: torch\.cat"),
        (nn.PoissonNLLLoss(log_input=False), "outputs are log rates"),
        (nn.PoissonNLLLoss(), "Did you mean 'poisson'"),
        (nn.functional.mse_loss, "Did you mean 'gaussian'"),
        (nn.functional.binary_cross_entropy_with_logits, "Did you mean 'bernoulli'"),
        ("nll", "Did you mean 'categorical'"),
        (nn.HuberLoss(), r"FromLoss\(f\), where f\(outputs, targets\) is the loss of every example"),
        (nn.CTCLoss, r"FromLoss\(f\)"),
        (lambda z, y: (z - y).abs().sum(), r"FromLoss\(f\)"),
        (lk.likelihoods.Gaussian, "Did you mean 'gaussian'"),
    ]
    for loss, message in losses:
        with pytest.raises(lk.errors.UnknownName, match=message):
            lk.LaplacePosterior(net(), loss)


def test_generators_that_are_seeds() -> None:
    posterior = lk.LaplacePosterior(net(), "categorical").fit((X, Y))
    line = r"generator=torch\.Generator\(\)\.manual_seed\(7\)"
    calls: tuple[Callable[..., Any], ...] = (
        lambda **g: posterior.predict(X, "mc", **g),
        lambda **g: posterior.tune((X, Y), **g),
        lambda **g: posterior.sample(2, **g),
        lambda **g: lk.LaplacePosterior(net(), "categorical").fit((X, Y), **g),
    )
    for call in calls:
        for name in ("generator", "seed"):
            with pytest.raises(lk.errors.LaplaceKFError, match=line):
                call(**{name: 7})


def test_priors_that_would_have_no_effect() -> None:
    with pytest.raises(lk.errors.InvalidArgument, match=r"\['0\.\*'\] would have no effect.*widest pattern last"):
        lk.LaplacePosterior(net(), "categorical", prior_precision={"*": 1.0, "0.*": 2.0}).fit((X, Y))
    posterior = lk.LaplacePosterior(net(), "categorical", prior_precision={"0.*": 2.0, "*": 1.0}).fit((X, Y))
    with pytest.raises(lk.errors.InvalidArgument, match="no effect"):
        posterior.prior_precision = {"*": 1.0, "2.bias": 2.0}
    assert posterior.prior_precision == {"0.*": 2.0, "*": 1.0}
    posterior.prior_precision = {"0.*": 2.0, "2.*": 3.0, "*": 1.0}  # "and all others", of which there are none


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "dtype"), [(-1, torch.int64), (-1, torch.int8), (255, torch.uint8)])
def test_marks_of_what_has_no_label(mark: int, dtype: torch.dtype) -> None:
    marked = torch.where(Y == 1, mark, Y).to(dtype)
    with pytest.raises(lk.errors.InvalidTarget, match=rf"Categorical\(ignore_index={mark}\)"):
        lk.LaplacePosterior(net(), "categorical").fit((X, marked))
    likelihood = lk.likelihoods.Categorical(ignore_index=mark)  # the line of the message
    found = lk.LaplacePosterior(net(), likelihood).fit((X, marked))
    expected = lk.LaplacePosterior(net(), "categorical").fit((X, torch.where(Y == 1, -100, Y)))
    torch.testing.assert_close(found.precision.dense(), expected.precision.dense())


def test_other_targets_out_of_range_are_no_marks() -> None:
    for odd in (7, 3):
        with pytest.raises(lk.errors.InvalidTarget) as caught:
            lk.LaplacePosterior(net(), "categorical").fit((X, torch.where(Y == 1, odd, Y)))
        assert "marks" not in str(caught.value)
