"""scikit-learn: estimators with calibrated uncertainty, for pipelines, grid search and everything else that takes one::

    model = make_pipeline(StandardScaler(), lk.bridges.sklearn.LaplaceClassifier()).fit(X, y)
    model.predict_proba(X)
    mean, std = lk.bridges.sklearn.LaplaceRegressor().fit(X, y).predict(X, return_std=True)

Without ``module=`` a small network with standardised inputs is trained; with it, the module that is given, or a network
of skorch is fitted by its own training. The posterior's prior precision and noise scale come from the evidence, which
needs no validation data; ``posterior_`` is a :class:`~laplace_kf.LaplacePosterior` like any other.

Needs scikit-learn: ``pip install scikit-learn``.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laplace_kf.errors import (
    IncompatiblePair,
    InvalidArgument,
    InvalidTarget,
    InvalidType,
    MissingPackage,
    ShapeMismatch,
)
from laplace_kf.likelihoods import Bernoulli, Gaussian, Likelihood, get_likelihood
from laplace_kf.posterior import LaplacePosterior, TuningResult

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingPackage(
        "The bridge to scikit-learn needs the package 'scikit-learn' (1.6 or newer): pip install -U scikit-learn",
        name=error.name,
    ) from error

__all__ = ["LaplaceClassifier", "LaplaceRegressor"]

SMALLEST = 1e-3  # noise scale to start from, over the targets' own deviation


class _Network(nn.Module):
    """One hidden layer between inputs ``(N, d)`` that are standardised and outputs that are put on their scale."""

    centre: Tensor
    deviation: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, x: Tensor, hidden: int, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        deviation = x.std(0, correction=0)
        self.register_buffer("centre", x.mean(0))
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.ones_like(deviation)))
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.hidden = nn.Linear(x.shape[1], hidden, dtype=x.dtype)
        self.output = nn.Linear(hidden, len(shift), dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.hidden((x - self.centre) / self.deviation))
        out: Tensor = self.shift + self.scale * self.output(inner)
        return out


class _Logarithms(nn.Module):
    """Log-probabilities of a module that gives probabilities, as networks of skorch do by default."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()


class _Laplace(BaseEstimator, ABC):
    """What both estimators share: training, the posterior, its tuning."""

    def __init__(
        self,
        module: nn.Module | Callable[[int, int], nn.Module] | Any = None,
        *,
        hidden: int = 32,
        epochs: int = 100,
        lr: float = 0.03,
        batch_size: int = 128,
        weight_decay: float = 1e-3,
        tune: bool = True,
        random_state: Any = None,
        likelihood: str | Likelihood | None = None,
        structure: Any = "kron",
        estimator: Any = "exact",
        parameters: Any = "all",
        prior_precision: float | Mapping[str, float] = 1.0,
        damping: str = "exact",
        forward: Any = None,
        inputs: Any = None,
        targets: Any = None,
        dtype: torch.dtype | None = None,
        layout: str | None = None,
        unused: str = "error",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = module
        self.hidden = hidden
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.tune = tune
        self.random_state = random_state
        self.likelihood = likelihood
        self.structure = structure
        self.estimator = estimator
        self.parameters = parameters
        self.prior_precision = prior_precision
        self.damping = damping
        self.forward = forward
        self.inputs = inputs
        self.targets = targets
        self.dtype = dtype
        self.layout = layout
        self.unused = unused
        self.options = options

    posterior_: LaplacePosterior
    module_: nn.Module
    tuning_: TuningResult | None
    n_features_in_: int

    @abstractmethod
    def _loss(self, outputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        """Mean loss of a minibatch, 0-dim."""

    @abstractmethod
    def _start(self, model: nn.Module, x: Tensor, y: Tensor) -> str | Likelihood:
        """The likelihood that the search for (λ, σ) starts from."""

    def _fit(self, x: np.ndarray[Any, Any], y: Tensor, outputs: int, shift: Tensor, scale: Tensor) -> None:
        self._check_settings()
        if self._own_loss() is not None:  # what its outputs are (log rates, for instance) has no scale of the targets
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            model = self._trained(x, y, outputs, shift, scale)
            inputs = self._inputs(model, x)
            like = next(iter(model.parameters()))
            targets = y.to(like.device, like.dtype) if y.is_floating_point() else y.to(like.device)
            data = list(zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True))
            posterior = LaplacePosterior(
                model, self._start(model, inputs, targets), self.structure, self.estimator, self.parameters,
                self.prior_precision, self.damping, self.forward, inputs=self.inputs, targets=self.targets,
                dtype=self.dtype, layout=self.layout, unused=self.unused, **dict(self.options or {}),
            )  # fmt: skip
            posterior.fit(data, generator=torch.Generator().manual_seed(seed))
            found = None
            if self.tune:
                warnings.filterwarnings("ignore", message="the best .* lies on the edge")  # tuning_ has it
                found = posterior.tune(objective="evidence", generator=torch.Generator().manual_seed(seed))
        self.module_, self.posterior_, self.tuning_ = model, posterior, found

    def _check_settings(self) -> None:
        """Raises :class:`InvalidArgument` for settings of the training out of their range."""
        for name, least in (("epochs", 0), ("batch_size", 1), ("hidden", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise InvalidArgument(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not 0 <= float(value) < float("inf"):
                raise InvalidArgument(f"{name} must be a number of at least 0, got {value!r}")

    def _own_loss(self) -> Likelihood | None:
        """The likelihood whose loss is trained on, where it is neither normal noise nor that of the default classes."""
        if self.likelihood is None or self._single:
            return None
        found = get_likelihood(self.likelihood)
        return None if isinstance(found, Gaussian) else found

    @property
    def _single(self) -> bool:
        """Whether one output stands for two classes."""
        return False

    def _trained(self, x: np.ndarray[Any, Any], y: Tensor, outputs: int, shift: Tensor, scale: Tensor) -> nn.Module:
        given = self.module
        if given is not None and not isinstance(given, nn.Module) and hasattr(given, "get_params"):
            return self._by_skorch(given, x, y, outputs)
        if given is None:
            model: nn.Module = _Network(torch.tensor(x, dtype=torch.float64), self.hidden, shift, scale)
        elif isinstance(given, nn.Module):
            model = copy.deepcopy(given)
        elif callable(given):
            model = given(int(np.prod(x.shape[1:])), outputs)
        else:
            raise InvalidType(
                f"module must be an nn.Module, a function (features, outputs) -> nn.Module or a network of skorch, got "
                f"{given!r}"
            )
        inputs = self._inputs(model, x)
        targets = y.to(inputs.device, inputs.dtype) if y.is_floating_point() else y.to(inputs.device)
        spread = scale.to(inputs)
        own = self._own_loss()
        self._require_outputs(model, inputs, targets, outputs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.epochs))
        model.train()
        for _ in range(self.epochs):
            for some in torch.randperm(len(inputs)).split(self.batch_size):
                optimizer.zero_grad()
                found = self._outputs(model, inputs[some], targets[some])
                loss = (
                    self._loss(found, targets[some], spread)
                    if own is None
                    else -own.log_prob(found, targets[some]).mean()
                )
                loss.backward()
                optimizer.step()
            schedule.step()
        return model.eval()

    def _require_outputs(self, model: nn.Module, x: Tensor, y: Tensor, outputs: int) -> None:
        """Raises :class:`ShapeMismatch` where a network cannot be right for this number of outputs."""

    def _outputs(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.forward is not None:
            found: Tensor = self.forward(model, (x, y))[0]
        else:
            found = model(*self.inputs((x, y))) if self.inputs is not None else model(x)
        return found

    def _by_skorch(self, given: Any, x: np.ndarray[Any, Any], y: Tensor, outputs: int) -> nn.Module:
        """A network of skorch, trained by itself; its outputs become what the likelihood takes."""
        net = clone(given)
        wide = x.astype(np.float32) if x.dtype.kind == "f" else x
        target = y.float() if y.is_floating_point() else y
        net.fit(wide, target.numpy())
        made = getattr(net, "module_", None)
        if not isinstance(made, nn.Module):
            raise IncompatiblePair(
                f"module={type(given).__name__} is an estimator without a torch module after its fit; pass an "
                "nn.Module, a function (features, outputs) -> nn.Module, or a network of skorch"
            )
        made = copy.deepcopy(made).eval()
        self._require_outputs(made, self._inputs(made, wide), target, outputs)
        return _Logarithms(made) if isinstance(getattr(net, "criterion_", None), nn.NLLLoss) else made

    @staticmethod
    def _inputs(model: nn.Module, x: np.ndarray[Any, Any]) -> Tensor:
        like = next(iter(model.parameters()))
        found = torch.tensor(x)
        return found.to(like.device, like.dtype) if found.is_floating_point() else found.to(like.device)

    def _predictions(self, X: Any) -> Iterator[Any]:
        check_is_fitted(self, "posterior_")
        x = validate_data(self, X, reset=False, allow_nd=self.module is not None, dtype=_number_type(self.module))
        for part in self._inputs(self.module_, x).split(1024):
            yield self.posterior_.predict(part, generator=torch.Generator().manual_seed(0))


class LaplaceClassifier(ClassifierMixin, _Laplace):
    """A classifier with the predictive probabilities of a Laplace posterior.

    Args:
        module: an ``nn.Module`` (copied before it is trained), a function ``(features, classes) -> nn.Module``, a
            network of skorch, or nothing for one hidden layer.
        hidden: width of the hidden layer of the default network.
        epochs, lr, batch_size, weight_decay: training by Adam with a cosine schedule; ``epochs=0`` takes the module as
            it is. The loss is that of the likelihood.
        tune: choose the prior precision (and the noise scale) by the evidence.
        random_state: seed or ``RandomState`` of the weights, batches and draws.
        likelihood: default ``"categorical"``; ``"bernoulli"`` for a module with one output and two classes.
        structure, estimator, parameters, prior_precision, damping, forward, inputs, targets, dtype, layout, unused: of
            :class:`~laplace_kf.LaplacePosterior`.
        options: further options of its structure and estimator (``{"rank": 10}``).

    Attributes:
        classes_: labels, ``(C,)``.
        posterior_, module_: the fitted posterior and its network.
        tuning_: what the search found.
    """

    classes_: np.ndarray[Any, Any]

    def fit(self, X: Any, y: Any) -> LaplaceClassifier:
        """Trains the network and fits the posterior.

        Args:
            X: inputs ``(N, d)``; with ``module=`` of any shape ``(N, ...)``.
            y: labels ``(N,)``.

        Raises:
            ValueError: for data that scikit-learn refuses, or labels of one class.
        """
        x, y = validate_data(self, X, y, allow_nd=self.module is not None, dtype=_number_type(self.module))
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InvalidTarget(
                f"a classifier needs at least two classes, and y has one class only: {self.classes_[0]}"
            )
        count = len(self.classes_)
        zeros = torch.zeros(count, dtype=torch.float64)
        targets = torch.as_tensor(codes, dtype=torch.float64)[:, None] if self._single else torch.as_tensor(codes)
        if self._single and count != 2:
            raise InvalidTarget(f'likelihood="bernoulli" takes two classes, y has {count}; leave likelihood out')
        self._fit(
            x, targets, 1 if self._single else count, zeros[:1] if self._single else zeros, torch.ones_like(zeros[:1])
        )
        return self

    @property
    def _single(self) -> bool:
        return isinstance(self.likelihood, str) and isinstance(get_likelihood(self.likelihood), Bernoulli)

    def _require_outputs(self, model: nn.Module, x: Tensor, y: Tensor, outputs: int) -> None:
        training = model.training
        with torch.no_grad():
            found = self._outputs(model.eval(), x[:1], y[:1])
        model.train(training)
        if tuple(found.shape) != (1, outputs):
            raise ShapeMismatch(
                f"module gives outputs {tuple(found.shape)} of one example, and y has {len(self.classes_)} classes, "
                f"for which there must be (1, {outputs}): give it {outputs} outputs, or a function for module, "
                "lambda features, outputs: ..., which is told how many"
            )

    def _loss(self, outputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        if self._single:
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)

    def _start(self, model: nn.Module, x: Tensor, y: Tensor) -> str | Likelihood:
        return self.likelihood if self.likelihood is not None else "categorical"

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:
        """Probabilities ``(N, C)`` of the classes in the order of ``classes_``.

        Raises:
            NotFittedError: before ``fit``.
        """
        found = torch.cat([prediction.probs for prediction in self._predictions(X)]).detach().cpu().double()
        if self._single:
            found = torch.cat([1 - found, found], 1)
        made: np.ndarray[Any, Any] = (found / found.sum(1, keepdim=True)).numpy()
        return made

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """The most probable labels ``(N,)``.

        Raises:
            NotFittedError: before ``fit``.
        """
        check_is_fitted(self, "posterior_")
        labels: np.ndarray[Any, Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return labels


class LaplaceRegressor(RegressorMixin, _Laplace):
    """A regressor with the predictive means and deviations of a Laplace posterior.

    Args:
        module: an ``nn.Module`` (copied before it is trained), a function ``(features, outputs) -> nn.Module``, a
            network of skorch, or nothing for one hidden layer.
        hidden: width of the hidden layer of the default network.
        epochs, lr, batch_size, weight_decay: training by Adam with a cosine schedule; ``epochs=0`` takes the module as
            it is. The loss is that of the likelihood.
        tune: choose the prior precision and the noise scale by the evidence.
        random_state: seed or ``RandomState`` of the weights, batches and draws.
        likelihood: default a Gaussian one whose scale starts at the residuals' deviation.
        structure, estimator, parameters, prior_precision, damping, forward, inputs, targets, dtype, layout, unused: of
            :class:`~laplace_kf.LaplacePosterior`.
        options: further options of its structure and estimator (``{"rank": 10}``).

    Attributes:
        posterior_, module_: the fitted posterior and its network.
        tuning_: what the search found.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> LaplaceRegressor:
        """Trains the network and fits the posterior.

        Args:
            X: inputs ``(N, d)``; with ``module=`` of any shape ``(N, ...)``.
            y: targets ``(N,)`` or ``(N, k)``.

        Raises:
            ValueError: for data that scikit-learn refuses.
        """
        x, y = validate_data(
            self,
            X,
            y,
            allow_nd=self.module is not None,
            dtype=_number_type(self.module),
            multi_output=True,
            y_numeric=True,
        )
        self._flat = y.ndim == 1
        targets = torch.tensor(np.asarray(y, dtype=np.float64)).reshape(len(y), -1)
        deviation = targets.std(0, correction=0)
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        self._fit(x, targets, targets.shape[1], targets.mean(0), deviation)
        return self

    def _loss(self, outputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        return ((outputs.reshape(targets.shape) - targets) / scale).square().sum(1).mean() / 2

    def _start(self, model: nn.Module, x: Tensor, y: Tensor) -> str | Likelihood:
        if self.likelihood is not None:
            return self.likelihood
        with torch.no_grad():
            residuals = torch.cat(
                [self._outputs(model, a, b) - b for a, b in zip(x.split(1024), y.split(1024), strict=True)]
            )
            own = y.std(0, correction=0).mean()
            least = SMALLEST * float(own) if float(own) > 0 else SMALLEST
            return Gaussian(max(float(residuals.square().mean().sqrt()), least))

    def predict(
        self, X: Any, return_std: bool = False
    ) -> np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Means ``(N,)`` or ``(N, k)``, as ``y`` was; with ``return_std`` the deviations of new observations, too.

        Raises:
            NotFittedError: before ``fit``.
        """
        found = list(self._predictions(X))
        mean = self._as_given([prediction.mean for prediction in found])
        if not return_std:
            return mean
        return mean, np.sqrt(self._as_given([prediction.variance for prediction in found]))

    def _as_given(self, parts: Sequence[Tensor]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = torch.cat(list(parts)).detach().cpu().double().numpy()
        return found[:, 0] if self._flat and found.ndim == 2 and found.shape[1] == 1 else found


def _number_type(module: Any) -> Any:
    """What scikit-learn converts inputs to: a module of the user's may take whole numbers (tokens)."""
    return np.float64 if module is None else "numeric"
