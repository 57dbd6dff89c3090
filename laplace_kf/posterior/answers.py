"""What a posterior answers once it is fitted, at its settings: N, λ and the way to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite
from laplace_kf.errors import InvalidArgument, NotFitted
from laplace_kf.estimators import Estimator
from laplace_kf.gaussian import WeightGaussian
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, Prediction, joined
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.ood import Leverage, References, score
from laplace_kf.operators import Blockwise
from laplace_kf.posterior.calibration import Calibration
from laplace_kf.posterior.evidence import Evidence, EvidenceModel
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jobs import Jobs
from laplace_kf.posterior.prior import PriorPrecision, by_parameter, checked_prior, positive
from laplace_kf.posterior.shorthands import Shorthands
from laplace_kf.posterior.summary import Summary, summary_of
from laplace_kf.predictive import DRAWS, PREDICTION_METHODS, SPACES, Linearization, Predictor, Request, labelled
from laplace_kf.predictive.loaders import batch_after_batch, is_loader
from laplace_kf.predictive.padding import without_padding
from laplace_kf.registry import AUTO
from laplace_kf.replica import stage
from laplace_kf.sequences import read
from laplace_kf.structures import Structure
from laplace_kf.structures.base import Statistics
from laplace_kf.subnetwork import Selection
from laplace_kf.weighting import Weights

__all__ = ["Answers"]


@explained
class Answers(Jobs, Shorthands):
    """What :class:`laplace_kf.LaplacePosterior` answers: nothing here changes more than a setting.

    Settings (:attr:`n_data`, :attr:`prior_precision`, :attr:`method`, :attr:`temperature`) can be set at any time;
    everything else reads the :class:`~laplace_kf.posterior.fitted.Fitted` at them.
    """

    model: nn.Module
    forward: Forward | None
    weights: Weights
    likelihood: Likelihood
    structure: Structure
    estimator: Estimator
    damping: str
    parameters: Selection
    dtype: torch.dtype | None
    unused: str
    _state: Fitted | None
    _n_data: float | None
    _prior: PriorPrecision
    _method: str | None
    _temperature: float | None
    _calibration: Calibration | None

    def _site(self) -> tuple[nn.Module, Forward | None, Weights]:
        return self.model, self.forward, self.weights

    def _fitted(self, what: str) -> Fitted:
        """What ``fit`` found, with the model, likelihood and damping of now.

        Raises:
            NotFitted: before ``fit``.
        """
        if self._state is None:
            raise NotFitted(f"{what} needs a fitted posterior: call posterior.fit(train_loader) first")
        state = self._state
        if (
            state.model is self.model
            and state.forward is self.forward
            and state.weights is self.weights
            and state.likelihood is self.likelihood
            and state.damping is self.damping
        ):
            return state
        return replace(
            state, model=self.model, forward=self.forward, weights=self.weights, likelihood=self.likelihood,
            damping=self.damping,
        )  # fmt: skip

    def _in_model(self, what: str) -> Fitted:
        """The same, for what needs the model's own parameters.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: if the model no longer has the posterior's parameters, or at other places: a layer was
                replaced or removed, or weights were tied or untied.
        """
        return self._in_place(self._fitted(what))

    # -- settings ------------------------------------------------------------------------------------------------------

    @property
    def n_data(self) -> float:
        """Data count N; can be set to any positive number without a refit."""
        if self._n_data is None:
            raise NotFitted("n_data is counted by fit: call posterior.fit(train_loader) first")
        return self._n_data

    @n_data.setter
    def n_data(self, value: float) -> None:
        self._fitted("n_data")
        self._n_data, self._calibration = positive("n_data", value), None

    @property
    def prior_precision(self) -> PriorPrecision:
        """Prior precision λ as it was given; can be set without a refit."""
        return self._prior

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        checked = checked_prior(value)
        if self._state is not None:
            by_parameter(checked, self._state.statistics.layout)  # has to cover every parameter
        self._prior, self._calibration = checked, None

    @property
    def method(self) -> str:
        """What ``"auto"`` stands for in :meth:`predict`: what :meth:`tune` chose, or what was set here.

        Before that ``"probit"`` for likelihoods with logits (categorical, Bernoulli) and ``"linearized"`` for others.
        """
        return self._method or ("probit" if self.likelihood.has_logits else "linearized")

    @method.setter
    def method(self, value: str) -> None:
        if value != AUTO:
            _ = PREDICTION_METHODS[value]
        self._method, self._calibration = None if value == AUTO else value, None

    @property
    def temperature(self) -> float | None:
        """What ``method="temperature"`` divides the logits at the mean weights by; ``None`` until :meth:`tune`.

        Where the network predicts its noise (heteroscedastic), the noise's standard deviation is multiplied by it.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        self._temperature, self._calibration = None if value is None else positive("temperature", value), None

    # -- what the fit found --------------------------------------------------------------------------------------------

    @property
    def fitted_noise(self) -> dict[str, float]:
        """Numeric parameters of the likelihood (a noise scale) when ``fit`` saw the data, by name."""
        return dict(self._fitted("fitted_noise").noise)

    @property
    def counted_data(self) -> float:
        """Number of examples that one pass of ``fit`` saw; of a chained posterior, the N of all tasks together."""
        return self._fitted("counted_data").count

    @property
    def chain_errors(self) -> tuple[dict[str, float], ...]:
        """Of a chained posterior: for every update so far, the relative Frobenius error of each block by name.

        It is that of the one update (``‖joined − (previous + new)‖ / ‖previous + new‖`` over curvature terms, λ apart);
        0 for terms that are kept and for blocks that add exactly. Empty without a prior posterior.
        """
        return self._fitted("chain_errors").errors

    @property
    def mean(self) -> dict[str, Tensor]:
        """Mean of the selected parameters by name, each with its parameter's shape (a copy of the trained weights)."""
        return self._fitted("mean").mean_by_name()

    @property
    def curvature(self) -> Blockwise:
        """The mean curvature ``C̄`` as a Matrix of size ``P``."""
        return self._fitted("curvature").curvature

    @lasting()
    def summary(self) -> Summary:
        """One row per block (shape, structure, condition numbers, effective parameters); prints as a table."""
        fitted = self._fitted("summary")
        return summary_of(fitted, self.n_data, self._prior, self.structure, self.estimator)

    # -- the Gaussian --------------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """The sums of the newest fit, as ``lk.curvature.estimate`` gives them."""
        return self._fitted("statistics").statistics

    @property
    def precision(self) -> Blockwise:
        """The precision ``Λ = N C̄ + λ I`` as a Matrix of size ``P`` (flat order)."""
        return self.precision_at(self.n_data, self._prior)

    @lasting()
    def precision_at(self, n_data: float, prior_precision: PriorPrecision | None = None) -> Blockwise:
        """The precision at another ``N`` and λ (a Matrix of size ``P``); the posterior keeps its own.

        Raises:
            NotFitted: before ``fit``.
        """
        prior = self._prior if prior_precision is None else prior_precision
        return self._fitted("precision").precision(n_data, prior)

    @property
    def precision_factor(self) -> float:
        """Factor on the mean curvature since the fit: 1, unless a noise scale was changed."""
        return self._fitted("precision").factor

    @property
    def gaussian(self) -> WeightGaussian:
        """The posterior as a Gaussian over flat weights ``(P,)``."""
        return self._fitted("gaussian").gaussian(self.n_data, self._prior)

    @typed
    @lasting()
    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weight draws by parameter name, each ``(n, *shape)``; usable with ``torch.func.functional_call``.

        A module registered at two places needs ``tie_weights=False`` there, or torch leaves the draw in it.

        Raises:
            NotFitted: before ``fit``.
            NotPositiveDefinite: if the precision is singular (λ = 0 with too little data).
        """
        self._fitted("sample")
        if n < 1:
            raise InvalidArgument(f"the number of samples must be at least 1, got {n}")
        drawn = self.precision.draw(n, generator)
        return {name: value + drawn[name].to(value) for name, value in self.mean.items()}

    @typed
    def log_evidence(self) -> Tensor:
        """Laplace approximation of the log marginal likelihood, 0-dim: ``evidence().total`` (methods 9.4)."""
        return self.evidence().total

    @typed
    @lasting()
    def evidence(self, n_data: float | None = None, prior_precision: PriorPrecision | None = None) -> Evidence:
        """The terms of ``log p(D|θ*) + ½ log|Λ₀| − ½ log|Λ| − ½ θ*ᵀ Λ₀ θ*`` with ``Λ₀ = λ I`` (methods 9.4).

        Differentiable in λ where it is a 0-dim tensor or ``{name pattern: 0-dim tensor}``, and in a tensor scale of
        Gaussian noise. After the first call nothing is decomposed: a value and its gradient are sums over eigenvalues.

        Args:
            n_data: N, default the posterior's. The data term is scaled by N over the number of examples seen.
            prior_precision: λ, default the posterior's.

        Raises:
            NotFitted: before ``fit``.
        """
        n = self.n_data if n_data is None else positive("n_data", n_data)
        given = self._prior if prior_precision is None else checked_prior(prior_precision)
        return self._fitted("evidence").evidence(n, given)

    def evidence_model(self) -> EvidenceModel:
        """The evidence as a function of N, λ and the noise scale, for those who maximise it.

        Raises:
            NotFitted: before ``fit``.
        """
        return self._fitted("evidence").evidence_model()

    # -- training with it ----------------------------------------------------------------------------------------------

    @lasting()
    def penalty(self) -> Tensor:
        """``½ (θ−μ)ᵀ Λ (θ−μ)`` at the model's current parameters ``θ``, 0-dim and differentiable.

        Its gradient ``Λ (θ−μ)`` is the product that gives its value: two matrix products for each layer and Kronecker
        term, and nothing is decomposed. With λ or a noise scale that requires a gradient, it is differentiable in them.
        """
        return self._in_model("penalty").penalty(self.n_data, self._prior)

    @lasting()
    def precondition_gradients(self, rate: float) -> None:
        """For training with :meth:`penalty`: the gradients ``g`` become ``(I + rate · Λ)⁻¹ g``, in place.

        With ``rate = lr / N``, N as in ``loss + penalty() / N``, and called between ``backward()`` and the step of
        ``torch.optim.SGD`` (with momentum or without), the penalty is stepped implicitly: training is stable however
        stiff the penalty is, with the learning rate of a training without it (:mod:`laplace_kf.posterior.implicit`).
        Optimisers that rescale gradients by themselves (Adam) undo it.

        Args:
            rate: ``lr / N``, positive.

        Raises:
            NotFitted: before ``fit``.
            ValueError: for another rate.
        """
        fitted = self._in_model("precondition_gradients")
        fitted.implicit_penalty(self.n_data, self._prior).apply(self.model, rate)

    def summed_curvature(self) -> tuple[Blockwise, Tensor | dict[str, Tensor]]:
        """The two parts of ``Λ``: ``N C̄``, and λ as a 0-dim tensor or one for every parameter name.

        Raises:
            NotFitted: before ``fit``.
        """
        return self._fitted("summed_curvature").summed(self.n_data, self._prior)

    # -- prediction ----------------------------------------------------------------------------------------------------

    @typed
    @lasting()
    def predict(
        self,
        x: Any,
        method: str = "auto",
        samples: int = 100,
        space: str = "auto",
        generator: torch.Generator | None = None,
        *,
        link: str | None = None,
        draws: str = "independent",
        keep_samples: bool = False,
        progress: bool = False,
    ) -> Prediction:
        """Predictive distribution at inputs.

        Args:
            x: what the model takes: a tensor ``(N, ...)``, a tuple of tensors, or a mapping of keyword arguments; or a
                loader of batches as in :meth:`fit` (or of inputs alone), for one prediction over all its examples.
            method: ``"mc"`` averages over ``samples`` draws (methods 10.1); ``"map"`` uses the mean weights, and
                ``"temperature"`` with logits divided by :attr:`temperature` (predicted noise: multiplied by it);
                ``"linearized"`` takes the network as linear in its weights around their mean, so that its outputs are
                normal, ``N(f, J Λ⁻¹ Jᵀ)``; ``"probit"`` is that with the probit approximation of the link. ``"auto"``
                is :attr:`method`, what :meth:`tune` chose; but ``"linearized"`` where a ``link`` is given, and ``"mc"``
                where ``space`` or ``draws`` are.
            samples: number of draws S (of weights, or of outputs).
            space: of ``"mc"``. ``"weights"``: one set of weight draws for the whole batch; ``"activations"``: exact
                draws of every example's pre-activations, independent between examples, with no weight drawn;
                ``"auto"``: the cheaper (:mod:`laplace_kf.predictive.cost`).
            generator: random numbers; with one, the call is reproducible, and calls with equal generators use the same
                weights (see also :meth:`predictor`).
            link: for ``"linearized"``, how normal outputs become a prediction: a name of ``likelihood.links()``
                (``"mc"``, ``"probit"``, ``"bridge"``, ``"exact"``); default: closed form where there is one, draws of
                the outputs otherwise.
            draws: of ``"mc"``. ``"independent"``, ``"antithetic"`` (pairs ``±ε``) or ``"sobol"`` (quasi-random, at
                most 21,201 directions).
            keep_samples: keep the outputs ``(S, N, C)`` of every draw in ``prediction.samples``.
            progress: of a loader: show a bar.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for an unknown method, space, kind of draws or link.
            IncompatiblePair: for ``space="activations"`` where it is not exact (structure ``"full"``; weights used at
                several positions of an example), naming block and reason; for a link the likelihood does not have.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        state = self._as_fitted("predict")
        # the posterior's own numbers only for models that are known to write nothing into their weights
        mean = state.mean_by_name(copy=read(self.model) is None)
        if method == AUTO:
            drawn = space != AUTO or draws != "independent"
            method = "linearized" if link is not None else "mc" if drawn else self.method
        rule = PREDICTION_METHODS[method]
        _ = SPACES[space], DRAWS[draws]  # unknown names are refused for every method
        if is_loader(x):
            one = partial(
                self.predict, method=method, samples=samples, link=link, draws=draws, keep_samples=keep_samples
            )
            return batch_after_batch(one, x, *self._site(), space, generator, progress, joined)
        with stage(self.model, self.forward) as (model, forward):
            x = self.checked_input(model, forward, x)
            check_finite(x, 0, "the input")
            found = rule(
                Request(
                    model, forward, self.likelihood, mean, lambda: self.precision, x, samples=samples,
                    generator=generator, space=space, draws=draws, link=link, keep_samples=keep_samples,
                    temperature=self._temperature,
                )
            )  # fmt: skip
        found = without_padding(labelled(self.model, self.forward, x, found), x, self.forward)
        kept = None if self._calibration is None else self._calibration.conformal
        return replace(found, calibration=kept) if kept is not None and kept.method == method else found

    @typed
    @lasting()
    def predictor(
        self, samples: int = 100, generator: torch.Generator | None = None, *, draws: str = "independent"
    ) -> Predictor:
        """S weight draws made once, for predictions batch after batch: ``predictor(x)`` is a :class:`Prediction`.

        It keeps the posterior of this moment; later changes of N, λ or the fit do not reach it.

        Args:
            samples: number of draws S.
            generator: random numbers; the draws are those of ``predict(..., space="weights")`` with an equal one.
            draws: as in :meth:`predict`.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for an unknown kind of draws.
        """
        self._as_fitted("predictor")
        of = (self.likelihood, self.mean, self.precision, DRAWS[draws](samples, generator), self.checked_input)
        return Predictor(self.model, self.forward, *of)

    @typed
    @lasting()
    def functional_covariance(self, x: Any, diagonal_only: bool = False, joint: bool = False) -> Tensor:
        """Covariance ``J Λ⁻¹ Jᵀ`` of the outputs of the network linearised at the mean; no Jacobian is formed.

        Args:
            x: inputs as for :meth:`predict`, N examples, or a loader.
            diagonal_only: the variances alone.
            joint: covariances of different inputs too; they have to be given together.

        Returns:
            ``(N, C, C)``; for sequences and images C counts all outputs of an example, flattened. With
            ``diagonal_only`` the layout of the outputs, with ``joint`` ``(N·C, N·C)``.

        Raises:
            NotFitted: before ``fit``.
            ValueError: if both ``diagonal_only`` and ``joint`` are asked for.
            IncompatiblePair: for a result of more than 4 GiB.
            NotPositiveDefinite: if the precision is singular (λ = 0 with too little data).
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        self._as_fitted("functional_covariance")
        if diagonal_only and joint:
            raise InvalidArgument("diagonal_only and joint exclude each other; pass one of them")
        if is_loader(x) and not joint:
            return self._rows(lambda inputs, generator: self.functional_covariance(inputs, diagonal_only), x)
        with stage(self.model, self.forward) as (model, forward):
            x = self.checked_input(model, forward, x)
            check_finite(x, 0, "the input")
            network = Linearization(model, forward, self.mean, x, keep=False)
            found = network.variance if diagonal_only else partial(network.covariance, joint=joint)
            return found(self.precision)

    # -- how strange an input is ---------------------------------------------------------------------------------------

    @typed
    @lasting()
    def ood_score(
        self,
        x: Any,
        kind: str = "auto",
        *,
        layers: str | Sequence[str] | None = None,
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How strange inputs are, larger is stranger: ``(N,)``.

        Args:
            x: inputs as for :meth:`predict`, or a loader.
            kind: ``"entropy"`` of the predictive; ``"mutual_information"``; ``"variance"``, the epistemic variance of
                the outputs, summed; ``"max_prob"``, one minus the largest probability by the probit approximation;
                ``"leverage"`` of layers' inputs, one forward pass (:mod:`laplace_kf.ood.leverage`); ``"direction"``,
                the same per squared length of the input; ``"auto"``, from the p-values of the entropy, of
                both in the last layer and of the direction in all layers among the in-distribution data of ``tune`` or
                :meth:`calibrate`, one forward pass.
            layers: of ``"leverage"`` and ``"direction"``: ``"last"`` (by default), ``"all"``, or patterns over names;
                of ``"auto"``: ``"last"`` for no other layer's direction, ``"all"`` for all layers' leverage too.
            samples, generator: for kinds that draw weights.

        Raises:
            NotFitted: before ``fit``; for ``"auto"`` before ``tune`` or ``calibrate``.
            UnknownName: for another kind, or layers that do not exist.
            IncompatiblePair: for a kind that this posterior does not have.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        self._as_fitted("ood_score")
        if is_loader(x):
            return self._rows(partial(self.ood_score, kind=kind, layers=layers, samples=samples), x, generator)
        with stage(self.model, self.forward) as (model, forward):
            x = self.checked_input(model, forward, x)
        return score(self, x, kind, layers, samples, generator)

    def leverage(self) -> Leverage:
        """Leverages of the layers' inputs, at this N and λ.

        Raises:
            NotFitted: before ``fit``.
        """
        return self._fitted("leverage").leverage(self.n_data, self._prior)

    @property
    def references(self) -> References | None:
        """Scores of the in-distribution data of ``tune`` or :meth:`calibrate`, if there are any.

        Those of ``tune`` are made at the first need of them, from at most 256 MB of its inputs.
        """
        if self._calibration is None:
            return None
        self._calibration = self._calibration.with_references(self)
        return self._calibration.references
