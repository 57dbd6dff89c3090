"""``LaplacePosterior``: three lines from a trained network to uncertainty. A thin façade over the engine.

The posterior is ``N(θ*, Λ⁻¹)`` with ``Λ = N C̄ + λ I``, where ``C̄`` is the mean Gauss-Newton curvature of the
negative log-likelihood at the trained weights ``θ*`` (methods 9.1).
"""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.batches import Forward, check_finite
from laplace_kf.curvature import make_pair
from laplace_kf.engine import Statistics, collect, lasting
from laplace_kf.errors import IncompatiblePair, NotFitted, ShapeMismatch
from laplace_kf.estimators import Estimator
from laplace_kf.gaussian import Gaussian
from laplace_kf.likelihoods import Likelihood, Prediction, get_likelihood
from laplace_kf.models import parameters_of, usable
from laplace_kf.ood import Leverage, References, score
from laplace_kf.operators import DAMPINGS, Blockwise, fresh_generator
from laplace_kf.posterior import store
from laplace_kf.posterior.calibration import Calibration, Seen, calibrate
from laplace_kf.posterior.chain import Chain, ChainedEvidence
from laplace_kf.posterior.evidence import Evidence, EvidenceModel, squares_by_block
from laplace_kf.posterior.implicit import ImplicitPenalty
from laplace_kf.posterior.objectives import Objective
from laplace_kf.posterior.penalty import Penalty
from laplace_kf.posterior.prior import (
    PriorPrecision,
    by_parameter,
    checked_prior,
    plain,
    positive,
    prior_tensors,
)
from laplace_kf.posterior.summary import Summary, summarise
from laplace_kf.posterior.tuning import Options, TuningResult, tune
from laplace_kf.predictive import DRAWS, METHODS, SPACES, Linearization, Predictor, Request, asked, labelled
from laplace_kf.predictive.loaders import batch_after_batch, is_loader
from laplace_kf.predictive.padding import without_padding
from laplace_kf.reading import Part, one_argument, paired, reading
from laplace_kf.registry import AUTO
from laplace_kf.replica import stage
from laplace_kf.structures import Structure
from laplace_kf.subnetwork import Selection, Subnetwork, covered
from laplace_kf.tape import UNUSED, EntryLayout, FlatLayout, select
from laplace_kf.weighting import Weights

__all__ = ["LaplacePosterior"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Fitted:
    """What ``fit`` produces; replaced as a whole, so that a failed fit changes nothing."""

    statistics: Statistics
    curvature: Blockwise
    mean: Tensor
    noise: dict[str, float]
    rest: dict[str, Tensor] = field(default_factory=dict)  # of a subnetwork: parameters, zero at the chosen weights
    newest: float | None = None  # of a chained posterior: the N of the newest task
    reference: float | None = None  # and of all tasks together
    errors: tuple[dict[str, float], ...] = ()

    @property
    def like(self) -> Tensor:
        """A tensor in the type and on the device of the curvature."""
        return next(iter(self.statistics.sums.values()))[0]

    @cached_property
    def squares(self) -> dict[str, dict[str, Tensor]]:
        """``‖θ*‖²`` by block and parameter name, 0-dim in float64."""
        return squares_by_block(self.curvature, self.mean)


class LaplacePosterior:
    """A Gaussian posterior over the weights of a trained network.

    Args:
        model: trained module; never changed.
        likelihood: registered name or likelihood object.
        structure: ``"kron"``, ``"diag"``, ``"ekfac"``, ``"lowrank"`` (``rank=``), ``"layer"``, ``"full"``,
            ``"isotropic"``, ``"auto"`` (``memory=``; :attr:`structure` is the chosen one after ``fit``), or a structure
            object. ``"ekfac"`` and ``"lowrank"`` go over the data twice.
        estimator: ``"exact"``, ``"importance"`` (``columns=``), ``"sampled"`` or ``"projection"`` (``samples=``),
            ``"recursive"``, ``"empirical"`` (not the Gauss-Newton matrix), or an estimator object.
        parameters: ``"all"`` trainable parameters, ``"last_layer"``, a list of ``fnmatch`` patterns over names, or a
            :class:`Subnetwork` of single weights, whose posterior is dense (structure ``"full"``).
        prior_precision: λ ≥ 0: a number, a 0-dim tensor, or ``{name pattern: number}`` (the first match counts).
        damping: how Kronecker blocks take λ: ``"exact"`` (eigenbasis), ``"factored"`` or ``"balanced"``
            (methods 5.2, 5.3, 9.2).
        inputs, targets: for batches that are neither ``(x, y)`` nor a mapping with ``"labels"``: two functions of a
            batch, with ``outputs = model(*inputs(batch))`` (``inputs=lambda batch: batch[0], targets=lambda batch:
            batch[1]`` for batches of three); ``predict`` takes what the model takes, or a whole batch.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``, for outputs that have to be picked or put
            together; ``predict`` calls it with what it was given, a whole batch, and uses the outputs.
        dtype: floating type of the curvature; default: the model's, float32 at least.
        weights: batches of ``fit`` and ``tune`` are ``(x, y, w)``, or mappings with ``"weights"`` (``forward=`` then
            returns ``(outputs, targets, weights)``; beside ``inputs=`` and ``targets=`` it is a function of a batch,
            too): ``w (N,)`` ≥ 0 multiplies each example's ``-log p`` and curvature. N counts the examples, of weight 0
            excepted; ``tune`` minimises the weighted mean of its objective (methods 17.11).
        layout: where the channel of the outputs stands (``likelihood.with_layout``): ``"channels_first"`` or
            ``"channels_last"``; default: as the targets show at ``fit``.
        unused: what becomes of selected parameters that take no part in any forward pass of ``fit`` (an expert that no
            example reached): ``"error"`` refuses and names them, ``"prior"`` keeps their prior: their curvature is 0.
        prior: a fitted posterior over the same parameters instead of the isotropic Gaussian at 0: ``fit`` then gives
            what :meth:`update` of it would. λ is the prior's and stays settable; ``prior_precision`` must be left out.
        multiplier, terms, forgetting: with ``prior``, as in :meth:`update`.
        **options: options of the estimator and of the structure (``samples``, ``columns``, ``noise``,
            ``vector_blocks``).

    Raises:
        UnknownName: for a name that is not registered.
        UnsupportedLayer: if no selected parameter requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        structure: str | Structure = "kron",
        estimator: str | Estimator = "exact",
        parameters: Selection = "all",
        prior_precision: PriorPrecision = 1.0,
        damping: str = "exact",
        forward: Forward | None = None,
        *,
        inputs: Part | None = None,
        targets: Part | None = None,
        dtype: torch.dtype | None = None,
        weights: Weights = False,
        layout: str | None = None,
        unused: str = "error",
        prior: LaplacePosterior | None = None,
        multiplier: float = 1.0,
        terms: str = "keep",
        forgetting: float = 1.0,
        **options: Any,
    ) -> None:
        self.model = model = usable(model)
        self.likelihood = get_likelihood(likelihood)
        if layout is not None:
            self.likelihood = self.likelihood.with_layout(layout)
        self.structure, self.estimator = make_pair(structure, estimator, dict(options))
        self._asked = self.structure
        self.parameters = parameters if isinstance(parameters, (str, Subnetwork)) else tuple(parameters)
        single = isinstance(self.parameters, Subnetwork)
        within = self.parameters.within if isinstance(self.parameters, Subnetwork) else self.parameters
        if single:
            self.structure.of_entries(EntryLayout((), (), ()))  # refuses early what fit would refuse
        if within != "last_layer":
            select(model, within)  # as well
        _ = DAMPINGS[damping]
        if damping != "exact" and (single or not self.structure.takes_damping):
            what = "a subnetwork" if single else f"structure {self.structure.name!r}"
            raise IncompatiblePair(
                f"{what} has no Kronecker blocks, so damping={damping!r} would have no effect; leave damping out, or "
                'use structure="kron" over whole parameters'
            )
        self.damping = damping
        self.forward = reading(forward, inputs, targets)
        self.weights: Weights = weights if callable(weights) else bool(weights)
        _ = weighting.reader(self.forward, self.weights)  # refuses
        self.dtype = dtype
        self._method: str | None = None
        self._temperature: float | None = None
        _ = UNUSED[unused]
        self.unused = unused
        self._n_data: float | None = None
        self._prior: PriorPrecision = 1.0
        self._state: _Fitted | None = None
        self._cache: dict[str, tuple[tuple[Any, ...], Any]] = {}
        self._implicit: tuple[tuple[Any, ...], ImplicitPenalty] | None = None
        self._calibration: Calibration | None = None
        self.prior_precision = prior_precision
        self._chain: Chain | None = None
        if prior is not None:
            self._chain = prior._left_to(self, multiplier, terms, forgetting)
            self._prior = prior._prior
        elif (multiplier, terms, forgetting) != (1.0, "keep", 1.0):
            raise TypeError("multiplier, terms and forgetting go with prior=, a fitted posterior")

    def __repr__(self) -> str:
        state = "not fitted" if self._state is None else f"n_data={self.n_data:g}, P={self._state.mean.shape[0]}"
        return (
            f"LaplacePosterior({type(self.model).__name__}, {self.likelihood!r}, structure={self.structure.name!r}, "
            f"estimator={self.estimator.name!r}, damping={self.damping!r}, prior_precision={self._prior!r}; {state})"
        )

    # -- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_loader: Iterable[Any] | tuple[Any, Tensor],
        y: Any = None,
        *,
        progress: bool = False,
        n_data: float | None = None,
        passes: int = 1,
        generator: torch.Generator | None = None,
    ) -> LaplacePosterior:
        """Estimates the curvature at the model's current weights.

        Args:
            train_loader: loader, iterable of batches, or a pair of tensors or arrays ``(x (N, ...), y (N, ...))``.
            y: targets ``(N, ...)``, where the first argument is the inputs alone.
            progress: show a bar.
            n_data: N; default: the number of examples seen in one pass. With ``prior=``, that of this task.
            passes: how often to go through the data (for random augmentation); the curvature is the mean over all.
            generator: random numbers of the estimator; a fresh private one by default.

        Returns:
            The posterior itself.

        Raises:
            ShapeMismatch: for an empty loader, a batch of another form, or targets that do not fit the outputs.
            NonFinite: for NaN or infinity, with the number of the batch.
            UnsupportedLayer: for a parameter that cannot be handled; names module and way out.
        """
        if passes < 1 or int(passes) != passes:
            raise ValueError(f"passes must be a positive integer, got {passes}")
        if n_data is not None:
            n_data = positive("n_data", n_data)
        generator = generator if generator is not None else fresh_generator()
        data = weighting.batches(paired(train_loader, y), self.weights, self.model)
        job = (self.model, data, self.likelihood, self.estimator)
        settings: dict[str, Any] = {
            "forward": weighting.reader(self.forward, self.weights), "generator": generator, "dtype": self.dtype,
            "unused": self.unused,
        }  # fmt: skip
        names, structure = (
            covered(
                self.parameters,
                self._asked,
                *job,
                prior=lambda layout: by_parameter(self._prior, layout),
                n_data=n_data,
                **settings,
            )
            if self._chain is None
            else self._covered_by_chain(self._chain)
        )
        statistics = collect(*job, structure, parameters=names, passes=passes, progress=progress, **settings)
        if passes > 1:
            statistics = statistics.scale(1 / passes)
        return self.adopt(statistics, n_data)

    def refit(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        *,
        train: Callable[[nn.Module, Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> LaplacePosterior:
        """After :meth:`tune`: the curvature of all rows, with the settings kept (N, λ, noise scale, method).

        Args:
            data: as :meth:`fit` takes them: a loader or a pair ``(x (N, ...), y (N, ...))``.
            train: ``(model, data)``, trains the model on them first; without it the weights stay as they are.
            generator, progress: as of :meth:`fit`.

        Returns:
            The posterior itself, at the model's current weights.

        Raises:
            NotFitted: before ``fit``.
            IncompatiblePair: for a chained posterior, whose N is that of all its tasks.
        """
        self._fitted("refit")
        if self._chain is not None:
            raise IncompatiblePair("a chained posterior has no data of its own to refit; use update for another task")
        n = self.n_data
        if train is not None:
            train(self.model, data)
        return self.fit(data, n_data=n, generator=generator, progress=progress)

    @lasting()
    def adopt(self, statistics: Statistics, n_data: float | None = None) -> LaplacePosterior:
        """Takes curvature that was measured elsewhere, at the model's current weights, in place of :meth:`fit`.

        Args:
            statistics: of this posterior's parameters (from ``lk.curvature.estimate`` or an optimiser); its structure
                becomes theirs.
            n_data: N; default: the statistics' count.
        """
        layout = statistics.layout
        mean = self._flat_weights(layout).detach().clone()
        rest: dict[str, Tensor] = {}
        if isinstance(self.parameters, Subnetwork):
            named = dict(self.model.named_parameters())
            parts = layout.split(mean[None])
            rest = {name: named[name].detach() - part[0].to(named[name]) for name, part in parts.items()}
        state = _Fitted(statistics, statistics.mean(), mean, self.likelihood.parameters(), rest)
        self._accept(self._chained(state, n_data), n_data)
        if statistics.outputs is not None:
            self.likelihood = self.likelihood.with_layout(statistics.outputs)
        return self

    def _chained(self, state: _Fitted, n_data: float | None) -> _Fitted:
        """The state with the curvature of earlier tasks, if there is a prior that brings it."""
        if self._chain is None:
            return state
        n = n_data if n_data is not None else state.statistics.count
        curvature, reference, errors = self._chain.extended(state.curvature, n)
        return replace(state, curvature=curvature, newest=n, reference=reference, errors=errors)

    def _accept(self, state: _Fitted, n_data: float | None) -> None:
        by_parameter(self._prior, state.statistics.layout)  # has to cover every parameter
        self._state = state
        self.structure = state.statistics.structure.first()
        if state.reference is not None:
            n_data = state.reference
        self._n_data = float(n_data) if n_data is not None else state.statistics.count
        self._cache, self._implicit, self._calibration = {}, None, None

    def _covered_by_chain(self, chain: Chain) -> tuple[str | Sequence[str], Structure]:
        """What a chained posterior covers: of a subnetwork, the weights that were chosen for the first task."""
        layout = chain.curvature.layout
        if not isinstance(self.parameters, Subnetwork) or not isinstance(layout, EntryLayout):
            return self.parameters, self._asked  # type: ignore[return-value]
        return [glob.escape(name) for name in layout.names], self._asked.of_entries(layout)

    def _left_to(self, following: LaplacePosterior, multiplier: float, terms: str, forgetting: float) -> Chain:
        """What this posterior leaves to the one of the next task, which is already constructed."""
        state = self._fitted("a chained posterior")
        if DAMPINGS[self.damping] is not DAMPINGS["exact"] or following.damping != self.damping:
            raise IncompatiblePair(
                f"damping={self.damping!r} folds λ into the Kronecker factors, but a chain keeps it apart (methods "
                '11.2); use damping="exact" for every task'
            )
        default = following._prior == 1.0 or following._prior == self._prior
        if not default:
            raise IncompatiblePair(
                "prior= brings its own prior_precision; leave prior_precision out, and set it afterwards to change it"
            )
        factor, _ = self._rescaled()
        kept = positive("forgetting", forgetting)
        if kept > 1:
            raise ValueError(f"forgetting scales the previous curvature and is at most 1, got {forgetting}")
        total = state.curvature.scaled(
            kept * self.n_data * (float(factor.detach()) if isinstance(factor, Tensor) else factor)
        )
        return Chain(terms, positive("multiplier", multiplier), total, state.mean, kept * self.n_data, state.errors)

    def _fitted(self, what: str) -> _Fitted:
        if self._state is None:
            raise NotFitted(f"{what} needs a fitted posterior: call posterior.fit(train_loader) first")
        return self._state

    def _in_model(self, what: str) -> _Fitted:
        """The fitted state, for what needs the model's own parameters.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: if the model no longer has the posterior's parameters: a layer was replaced or removed.
        """
        state = self._fitted(what)
        self._parameters(state.statistics.layout)
        return state

    def _parameters(self, layout: FlatLayout) -> dict[str, Tensor]:
        """The model's parameters of a layout by name, each of its shape.

        Raises:
            ShapeMismatch: if the model has not all of them in these shapes any more.
        """
        return parameters_of(self.model, layout.names, layout.shapes, "the posterior")

    # -- settings ----------------------------------------------------------------------------------------------------

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
    def method(self) -> str:
        """What ``"auto"`` stands for in :meth:`predict`: what :meth:`tune` chose, or what was set here.

        Before that ``"probit"`` for likelihoods with logits (categorical, Bernoulli) and ``"linearized"`` for others.
        """
        return self._method or ("probit" if self.likelihood.has_logits else "linearized")

    @method.setter
    def method(self, value: str) -> None:
        if value != AUTO:
            _ = METHODS[value]
        self._method, self._calibration = None if value == AUTO else value, None

    @property
    def temperature(self) -> float | None:
        """What ``method="temperature"`` divides the logits of the mean weights by; ``None`` until :meth:`tune`."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        self._temperature, self._calibration = None if value is None else positive("temperature", value), None

    @property
    def fitted_noise(self) -> dict[str, float]:
        """Numeric parameters of the likelihood (a noise scale) when ``fit`` saw the data, by name."""
        return dict(self._fitted("fitted_noise").noise)

    @property
    def counted_data(self) -> float:
        """Number of examples that one pass of ``fit`` saw; of a chained posterior, the N of all tasks together."""
        state = self._fitted("counted_data")
        return state.statistics.count if state.reference is None else state.reference

    @property
    def chain_errors(self) -> tuple[dict[str, float], ...]:
        """Of a chained posterior: for every update so far, the relative Frobenius error of each block by name.

        It is that of the one update (``‖joined − (previous + new)‖ / ‖previous + new‖`` over curvature terms, λ apart);
        0 for terms that are kept and for blocks that add exactly. Empty without a prior posterior.
        """
        return self._fitted("chain_errors").errors

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

    # -- the Gaussian --------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> dict[str, Tensor]:
        """Mean of the selected parameters by name, each with its parameter's shape (a copy of the trained weights)."""
        state = self._fitted("mean")
        parts = state.statistics.layout.split(state.mean[None])
        whole = {
            name: part[0] + state.rest[name].to(part) if name in state.rest else part[0] for name, part in parts.items()
        }
        # of each parameter's own type and device, which the flat vector cannot keep
        named = self._parameters(state.statistics.layout)
        return {name: part.to(named[name], copy=True).detach() for name, part in whole.items()}

    def _flat_weights(self, layout: FlatLayout) -> Tensor:
        """The model's selected parameters ``(P,)``, on the device of the first and in the widest of their types."""
        named = self._parameters(layout)
        device = named[layout.names[0]].device
        return layout.join({name: named[name][None].to(device) for name in layout.names})[0]

    @property
    def curvature(self) -> Blockwise:
        """The mean curvature ``C̄`` as a Matrix of size ``P``."""
        return self._fitted("curvature").curvature

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
        return self._made("precision", n_data, prior, lambda c, given: c.precision(n_data, given, self.damping))

    def _made(
        self,
        what: str,
        n_data: float,
        prior: PriorPrecision,
        make: Callable[[Blockwise, Tensor | dict[str, Tensor]], T],
    ) -> T:
        """What ``make`` gives for the curvature and λ, kept as ``what`` until it is asked for at other (N, λ)."""
        state = self._fitted(what)
        factor, _ = self._rescaled()
        reusable = not any(isinstance(value, Tensor) for value in (factor, *_values(prior)))
        key = (n_data, factor, tuple(prior.items()) if isinstance(prior, Mapping) else prior) if reusable else None
        held = self._cache.get(what)
        if key is not None and held is not None and held[0] == key:
            found: T = held[1]
            return found
        curvature = state.curvature if isinstance(factor, float) and factor == 1.0 else state.curvature.scaled(factor)
        made = make(curvature, prior_tensors(prior, state.statistics.layout, state.like))
        if key is not None:
            self._cache[what] = (key, made)  # one entry: a grid search must not fill the memory
        return made

    @property
    def precision_factor(self) -> float:
        """Factor on the mean curvature since the fit: 1, unless a noise scale was changed."""
        return float(torch.as_tensor(self._rescaled()[0]).detach())

    def _rescaled(self) -> tuple[float | Tensor, Tensor]:
        """Factor on the curvature and log likelihood, if the likelihood's noise was changed since the fit."""
        state = self._fitted("precision")
        statistics = state.statistics
        known = (statistics.log_likelihood, statistics.terms, statistics.moments)
        factor, fit = self.likelihood.rescaled(state.noise, *known)
        if isinstance(factor, Tensor):
            factor = factor.to(state.like) if factor.requires_grad else float(factor)
        return factor, fit

    @property
    def gaussian(self) -> Gaussian:
        """The posterior as a Gaussian over flat weights ``(P,)``."""
        return Gaussian(self._fitted("gaussian").mean, self.precision)

    @lasting()
    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weight draws by parameter name, each ``(n, *shape)``; usable with ``torch.func.functional_call``.

        Raises:
            NotFitted: before ``fit``.
            NotPositiveDefinite: if the precision is singular (λ = 0 with too little data).
        """
        self._fitted("sample")
        if n < 1:
            raise ValueError(f"the number of samples must be at least 1, got {n}")
        drawn = self.precision.draw(n, generator)
        return {name: value + drawn[name].to(value) for name, value in self.mean.items()}

    def log_evidence(self) -> Tensor:
        """Laplace approximation of the log marginal likelihood, 0-dim: ``evidence().total`` (methods 9.4)."""
        return self.evidence().total

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
        layout = self._fitted("evidence").statistics.layout
        prior = prior_tensors(given, layout, torch.zeros((), dtype=torch.float64))
        return self.evidence_model().terms(n, prior, self.likelihood)

    def evidence_model(self) -> EvidenceModel:
        """The evidence as a function of N, λ and the noise scale, for those who maximise it.

        Raises:
            NotFitted: before ``fit``.
        """
        state = self._fitted("evidence")
        made = EvidenceModel(state.statistics, state.curvature, state.squares, state.noise, self.damping)
        if self._chain is None or state.reference is None:
            return made
        return ChainedEvidence.of(made, self._chain, state.reference, state.mean)

    @lasting()
    def penalty(self) -> Tensor:
        """``½ (θ−μ)ᵀ Λ (θ−μ)`` at the model's current parameters ``θ``, 0-dim and differentiable.

        Its gradient ``Λ (θ−μ)`` is the product that gives its value: two matrix products for each layer and Kronecker
        term, and nothing is decomposed. With λ or a noise scale that requires a gradient, it is differentiable in them.
        """
        state = self._fitted("penalty")
        centre = state.statistics.layout.split(state.mean[None])
        settings = (self._rescaled()[0], *_values(self._prior))
        constant = not any(isinstance(value, Tensor) and value.requires_grad for value in settings)
        quadratic = self._made(
            "penalty",
            self.n_data,
            self._prior,
            lambda c, given: Penalty(c.products(self.n_data, given, self.damping), centre, state.like, constant),
        )
        return quadratic(self._parameters(state.statistics.layout))

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
        self._in_model("precondition_gradients")
        key = (self.n_data, self.precision_factor, plain(self._prior))
        if self._implicit is None or self._implicit[0] != key:
            self._implicit = key, ImplicitPenalty([self.summed_curvature()])
        self._implicit[1].apply(self.model, rate)

    def summed_curvature(self) -> tuple[Blockwise, Tensor | dict[str, Tensor]]:
        """The two parts of ``Λ``: ``N C̄``, and λ as a 0-dim tensor or one for every parameter name.

        Raises:
            NotFitted: before ``fit``.
        """
        state = self._fitted("summed_curvature")
        factor = self.n_data * self.precision_factor
        return state.curvature.scaled(factor), prior_tensors(self._prior, state.statistics.layout, state.like)

    @lasting()
    def update(
        self,
        task_loader: Iterable[Any] | tuple[Any, Tensor],
        multiplier: float = 1.0,
        terms: str = "keep",
        *,
        forgetting: float = 1.0,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        n_data: float | None = None,
        passes: int = 1,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> LaplacePosterior:
        """The posterior after another task, with this one as its prior (methods 11.1): a new object, this one stays.

        Train the model with :meth:`penalty` first. The mean of the new posterior is the model's current weights, its
        precision ``forgetting · (Λ_prev − λ I) + multiplier · N_t C̄_t + λ I``. Its ``n_data`` is ``forgetting ·
        N_prev + multiplier · N_t`` and its ``curvature`` the mean over all of that, so that ``Λ = n_data · C̄ + λ I``
        holds as for any posterior: setting ``n_data`` afterwards rescales the curvature of all tasks alike, and setting
        ``prior_precision`` replaces the one λ. :meth:`log_evidence` is that of the newest task given the earlier ones.

        Args:
            task_loader: the new task's data, as for :meth:`fit`: a loader or a pair ``(x (N, ...), y (N, ...))``.
            multiplier: λ_c, on the new task's curvature.
            terms: what becomes of the curvature terms of Kronecker and eigenvalue-corrected blocks. ``"keep"``: all
                kept, exact, growing. ``"sum"``: factors added (methods 11.2; over-estimates). ``"project"``: the
                nearest single product in Frobenius norm. ``"project_kl"``: the nearest in Kullback-Leibler divergence.
                Diagonal and dense blocks add exactly under every name; low-rank ones are cut back to their rank under
                all but ``"keep"``.
                :attr:`chain_errors` reports the error by block.
            forgetting: factor in (0, 1] on the previous curvature.
            forward, inputs, targets: as in the constructor, if the task needs others (its own head, for instance).
            n_data, passes, generator, progress: as for :meth:`fit`; ``n_data`` is the N of the new task.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for any other ``terms``.
            IncompatiblePair: if the task covers other parameters, for a damping other than ``"exact"``, or for a
                structure whose blocks cannot be chained in that way.
            ValueError: for a multiplier that is not positive, or ``forgetting`` outside (0, 1].
        """
        self._in_model("update")
        one_argument("update", multiplier)
        own = reading(forward, inputs, targets)
        following = LaplacePosterior(
            self.model,
            self.likelihood,
            self.structure,
            self.estimator,
            self.parameters,
            damping=self.damping,
            forward=own if own is not None else self.forward,
            dtype=self.dtype,
            weights=self.weights,
            unused=self.unused,
            prior=self,
            multiplier=multiplier,
            terms=terms,
            forgetting=forgetting,
        )
        return following.fit(task_loader, n_data=n_data, passes=passes, generator=generator, progress=progress)

    # -- prediction ----------------------------------------------------------------------------------------------------

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
                ``"temperature"`` with logits divided by :attr:`temperature`; ``"linearized"`` takes the network as
                linear in its weights around their mean, so that its outputs are normal, ``N(f, J Λ⁻¹ Jᵀ)``;
                ``"probit"`` is that with the probit approximation of the link. ``"auto"`` is :attr:`method`, what
                :meth:`tune` chose; but ``"linearized"`` where a ``link`` is given, and ``"mc"`` where ``space`` or
                ``draws`` are.
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
        self._fitted("predict")
        if method == AUTO:
            drawn = space != AUTO or draws != "independent"
            method = "linearized" if link is not None else "mc" if drawn else self.method
        rule = METHODS[method]
        _ = SPACES[space], DRAWS[draws]  # unknown names are refused for every method
        if is_loader(x):
            one = partial(
                self.predict, method=method, samples=samples, link=link, draws=draws, keep_samples=keep_samples
            )
            return batch_after_batch(one, x, self.model, self.forward, space, generator, progress)
        with stage(self.model, self.forward) as (model, forward):
            x = asked(model, forward, x)
            check_finite(x, 0, "the input")
            found = rule(
                Request(
                    model, forward, self.likelihood, self.mean, lambda: self.precision, x, samples=samples,
                    generator=generator, space=space, draws=draws, link=link, keep_samples=keep_samples,
                    temperature=self._temperature,
                )
            )  # fmt: skip
        found = without_padding(labelled(self.model, self.forward, x, found), x, self.forward)
        kept = None if self._calibration is None else self._calibration.conformal
        return replace(found, calibration=kept) if kept is not None and kept.method == method else found

    def predict_interval(
        self, x: Any, level: float = 0.9, of: str = "observation", **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper ends ``(N, C)`` of intervals at inputs: ``predict(x, **settings).interval(level, of)``.

        Arguments and errors as of :meth:`predict` and :meth:`laplace_kf.Prediction.interval`.
        """
        return self.predict(x, **settings).interval(level, of)

    @lasting()
    def calibrate(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        method: str = "auto",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> LaplacePosterior:
        """Split-conformal calibration on data that were not trained on; saved with the posterior.

        From then on ``interval`` and ``prediction_set`` of predictions by the same method cover new examples that are
        exchangeable with these with the probability asked for (:mod:`laplace_kf.outputs.conformal`), and
        :meth:`ood_score` has its references. Setting N or λ, ``fit`` and ``tune`` drop it: tune first, on other data.
        The guarantee is exact for the methods in closed form; with drawn weights it holds up to their noise.

        Args:
            data: loader, iterable of batches, or a pair ``(x (n, ...), y (n, ...))``.
            method: how to predict; ``"auto"`` for what :meth:`predict` does by itself.
            samples, generator: as in :meth:`predict`.

        Returns:
            The posterior itself.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: if the data are empty or do not fit.
            IncompatiblePair: for outputs with several positions, whose coverage is not defined.
            NonFinite: for NaN or infinity.
        """
        self._fitted("calibrate")
        chosen = self.method if method == AUTO else method
        self._calibration = calibrate(self, data, chosen, samples, generator)
        return self

    # -- how strange an input is ---------------------------------------------------------------------------------------

    @lasting()
    def ood_score(
        self,
        x: Any,
        kind: str = "auto",
        *,
        layers: str | Sequence[str] = "last",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How strange inputs are, larger is stranger: ``(N,)``.

        Args:
            x: inputs as for :meth:`predict`.
            kind: ``"entropy"`` of the predictive; ``"mutual_information"``; ``"variance"``, the epistemic variance of
                the outputs, summed; ``"max_prob"``, one minus the largest probability by the probit approximation;
                ``"leverage"`` of layers' inputs, one forward pass (:mod:`laplace_kf.ood.leverage`); ``"auto"``,
                Fisher's sum over p-values of entropy and leverage among the in-distribution data of ``tune`` or
                :meth:`calibrate`, one forward pass.
            layers: of ``"leverage"``: ``"last"``, ``"all"``, or patterns over names; of ``"auto"``: ``"last"``, or
                ``"all"`` for those of all layers besides.
            samples, generator: for kinds that draw weights.

        Raises:
            NotFitted: before ``fit``; for ``"auto"`` before ``tune`` or ``calibrate``.
            UnknownName: for another kind, or layers that do not exist.
            IncompatiblePair: for a kind that this posterior does not have.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        self._fitted("ood_score")
        with stage(self.model, self.forward) as (model, forward):
            x = asked(model, forward, x)
        return score(self, x, kind, layers, samples, generator)

    def leverage(self) -> Leverage:
        """Leverages of the layers' inputs, at this N and λ.

        Raises:
            NotFitted: before ``fit``.
        """
        sharing = getattr(self.structure, "shared_rows", None)
        return self._made(
            "leverage",
            self.n_data,
            self._prior,
            lambda c, prior: Leverage(
                self.model, self.forward, self.mean, c, self.n_data, prior, self.damping, sharing
            ),
        )

    @property
    def references(self) -> References | None:
        """Scores of the in-distribution data of ``tune`` or :meth:`calibrate`, if there are any.

        Those of ``tune`` are made at the first need of them, from at most 256 MB of its inputs.
        """
        if self._calibration is None:
            return None
        self._calibration = self._calibration.with_references(self)
        return self._calibration.references

    @lasting()
    def functional_covariance(self, x: Any, diagonal_only: bool = False, joint: bool = False) -> Tensor:
        """Covariance ``J Λ⁻¹ Jᵀ`` of the outputs of the network linearised at the mean; no Jacobian is formed.

        Args:
            x: inputs as for :meth:`predict`, N examples.
            diagonal_only: the variances alone.
            joint: covariances of different inputs too.

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
        self._fitted("functional_covariance")
        if diagonal_only and joint:
            raise ValueError("diagonal_only and joint exclude each other")
        with stage(self.model, self.forward) as (model, forward):
            x = asked(model, forward, x)
            check_finite(x, 0, "the input")
            network = Linearization(model, forward, self.mean, x, keep=False)
            if diagonal_only:
                return network.variance(self.precision)
            return network.covariance(self.precision, joint=joint)

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
        self._fitted("predictor")
        noise = DRAWS[draws](samples, generator)
        return Predictor(self.model, self.forward, self.likelihood, self.mean, self.precision, noise)

    def tune(
        self,
        val: Iterable[Any] | tuple[Any, Tensor] | None = None,
        objective: str | Objective = "nll",
        method: str = "auto",
        n_data: Sequence[float] | None = None,
        prior_precision: Sequence[float] | None = None,
        samples: int = 20,
        generator: torch.Generator | None = None,
        *,
        budget: float | None = 10.0,
        extend: int = 0,
        progress: bool = False,
        noise: bool | None = None,
        per_block: bool = False,
        ood: Iterable[Any] | None = None,
        max_examples: int | None = None,
    ) -> TuningResult:
        """Finds how to predict, (N, λ), and the noise scale of a regression, on validation data; sets them.

        Without grids the predictives compete: the trained weights alone (MAP), those with a temperature on their
        logits, the linearised network through the probit approximation or in full, and Monte Carlo, each at its own
        best setting and within a ``budget`` (:mod:`laplace_kf.posterior.candidates`). The winner, which has to beat the
        others beyond the noise of the validation data, becomes :attr:`method`. Settings are searched from coarse to
        fine in coordinates that do not trade off (:mod:`laplace_kf.posterior.search`), and the result is never worse
        than MAP on the validation data: if no posterior beats the trained weights by more than one standard error of
        the paired difference, (N, λ) is set to a finite point that is MAP in effect, and the result says so
        (``map_wins``). With a grid for N or λ every pair is measured with one method and the smallest objective wins
        (methods 9.3).

        Args:
            val: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``; ``objective="evidence"`` needs
                none.
            objective: ``"nll"``, ``"brier"``, ``"ece"``, ``"ood"`` (with ``ood=``), ``"evidence"``, an ``OODContrast``
                or a callable ``(prediction, targets) -> mean score or (N,) scores``; lower is better.
            method: ``"auto"`` for a competition; a name of :meth:`predict`'s methods to tune that one alone (beside
                MAP and the temperature, as references) and to set :attr:`method` to it. With grids ``"auto"`` is the
                method that the posterior has.
            n_data: grid for N; if only the other is given ``N · 10^{-1 … 4}`` in half decades.
            prior_precision: grid for λ; if only the other is given ``10^{-4 … 4}`` in half decades.
            samples: weight draws per point, the same for all of them.
            generator: random numbers; with one, the search is reproducible.
            budget: training epochs of the validation examples that the search may take, all work included, by count of
                multiply-adds; None for no limit. A grid is measured in full whatever it takes.
            extend: how often to extend the grid where the best value lies on its edge.
            progress: show a bar.
            noise: whether to tune the noise scale σ of a Gaussian likelihood too, by the same objective. Default: if
                there are no grids and σ was left at its default 1.0 when the curvature was fitted. The posterior gets
                a likelihood of its own with the new σ; the one that was handed over keeps its scale. With grids σ is
                first set to MAP's best.
            per_block: with the evidence, one λ for each block; ``prior_precision`` becomes ``{name: λ}``.
            ood: loader or tensor of out-of-distribution inputs for ``objective="ood"``.
            max_examples: look at the first batches of ``val`` only, until there are so many examples; default all.

        Returns:
            Everything measured, every candidate with its gain over MAP and standard error, the best, what the search
            cost, and whether the best lies on the edge (which is also warned about, as is a win of MAP). Prints as a
            few lines.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for an unknown objective or method.
            IncompatiblePair: for options that do not go together; for one method that the budget is too small for.
            NonFinite: if the objective is finite at no point, or the data are not finite.
        """
        self._fitted("tune")
        one_argument("tune", objective)
        options = Options(
            objective, method, samples, generator, extend, progress, noise, per_block, ood, max_examples, budget
        )
        seen = None if val is None else Seen(weighting.batches(val, self.weights, self.model), self.forward)
        with lasting(), stage(self.model, self.forward) as (model, forward):
            working = copy.copy(self)
            working.model, working.forward = model, forward
            found, settings = tune(working, seen, n_data, prior_precision, options)
        found.warn()  # first: where warnings are errors, the call fails and nothing is set
        self._n_data, self._prior = settings.n_data, settings.prior_precision
        if settings.noise is not None:
            self.likelihood = self.likelihood.with_noise_scale(settings.noise)
        if settings.method is not None:
            self._method = settings.method
        if settings.temperature is not None:
            self._temperature = settings.temperature
        self._calibration = None if seen is None else Calibration(pending=tuple(seen.taken))
        return found

    # -- looking at it, keeping it -------------------------------------------------------------------------------------

    @lasting()
    def summary(self) -> Summary:
        """One row per block (shape, structure, condition numbers, effective parameters); prints as a table."""
        state = self._fitted("summary")
        prior = prior_tensors(self._prior, state.statistics.layout, state.like)
        note = "" if self.estimator.is_ggn else " (empirical Fisher: not the Gauss-Newton matrix)"
        chosen = f" (chosen: {self.structure.reason})" if self.structure.reason else ""
        title = (
            f"LaplacePosterior over {state.mean.shape[0]} parameters: structure {self.structure.name}{chosen}, "
            f"estimator {self.estimator.name}{note}, damping {self.damping}, N = {self.n_data:g}, "
            f"λ = {plain(self._prior)}"
        )
        failed = sorted({block.failed for block in state.statistics.blocks.values() if block.failed})
        title += f", layer rule {', '.join(failed)} failed its check (per-example gradients instead)" if failed else ""
        factor, _ = self._rescaled()  # a noise scale that was set since the fit counts here as in the precision
        blocks = state.statistics.blocks
        notes = {name: block.note for name, block in blocks.items() if block.note}
        notes |= state.statistics.structure.poorer(blocks)
        return summarise(state.curvature.scaled(factor), self.n_data, prior, title, notes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (no pickle) with a checksum; :meth:`load` needs the same architecture.

        Raises:
            NotFitted: before ``fit``.
        """
        self._fitted("save")
        store.write(path, *self.packed())

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`save` writes: tensors (any shapes, by name) and JSON-able values; for checkpoints.

        Raises:
            NotFitted: before ``fit``.
        """
        state = self._fitted("packed")
        try:
            likelihood: dict[str, Any] | None = self.likelihood.to_config()
        except IncompatiblePair:
            likelihood = None  # it cannot be written down; load(likelihood=) has to bring it
        header = {
            "likelihood": likelihood,
            "structure": self.structure.name,
            "estimator": self.estimator.name,
            "options": {**self.structure.options(), **self.estimator.options()},
            "reason": self.structure.reason,
            "parameters": chosen.to_json() if isinstance(chosen := self.parameters, Subnetwork) else chosen,
            "damping": self.damping,
            "prior_precision": plain(self._prior),
            "n_data": self._n_data,
            "weights": self.weights is not False,
            "method": self._method,
            "temperature": self._temperature,
            "noise": state.noise,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "unused": self.unused,
        }
        tensors, described = store.packed(state.statistics)
        tensors.update({f"rest/{name}": value for name, value in state.rest.items()})
        if self._chain is not None:
            chained, header["chain"] = self._chain.packed()
            tensors.update(chained)
            header["n_newest"] = state.newest
        if self._calibration is not None:
            self._calibration = self._calibration.with_references(self)
            kept, header["calibration"] = self._calibration.packed()
            tensors.update(kept)
        return {**tensors, "mean": state.mean}, {**header, "statistics": described}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        weights: Weights | None = None,
    ) -> LaplacePosterior:
        """Reads a posterior for a model of the same architecture; its mean is the file's, not the model's weights.

        Args:
            path: file written by :meth:`save`.
            model: module whose parameters have the file's names and shapes.
            likelihood: needed only if the file's one was an object that cannot be written down (``FromDistribution``).
            forward, inputs, targets, weights: as in the constructor (functions are not saved).

        Raises:
            CorruptFile: if the file is truncated, altered or not one of ours.
            ShapeMismatch: if the model's parameters do not have the file's names and shapes, or the selection covers
                others in this model.
            IncompatiblePair: if the likelihood is needed and missing.
        """
        own = reading(forward, inputs, targets)
        return cls.unpacked(*store.read(path), model, likelihood=likelihood, forward=own, weights=weights)

    @classmethod
    def unpacked(
        cls,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        weights: Weights | None = None,
    ) -> LaplacePosterior:
        """The inverse of :meth:`packed` (tensors of any shapes, by name); arguments and errors as of :meth:`load`."""
        model = usable(model)
        layout = store.layout_of(header["statistics"])
        named = parameters_of(model, layout.names, layout.shapes, "the file")
        chosen = header["parameters"]
        single = isinstance(chosen, Mapping)
        if chosen != "last_layer" and not single and select(model, chosen) != list(layout.names):
            raise ShapeMismatch(
                f"the file covers {len(layout.names)} parameters, but parameters={chosen!r} selects "
                f"{len(select(model, chosen))} of this model: it is not the architecture the file was saved for"
            )
        if likelihood is None and header["likelihood"] is None:
            raise IncompatiblePair("the file's likelihood could not be written down; pass it as load(likelihood=...)")
        own = reading(forward, inputs, targets)
        posterior = cls(
            model,
            likelihood if likelihood is not None else Likelihood.from_config(header["likelihood"]),
            structure=header["structure"],
            estimator=header["estimator"],
            parameters=Subnetwork(**chosen) if single else chosen,
            prior_precision=header["prior_precision"],
            damping=header["damping"],
            forward=own,
            weights=weights if weights is not None else header.get("weights", False),
            dtype=getattr(torch, header["dtype"]) if header.get("dtype") else None,
            unused=header.get("unused", "error"),
            **header["options"],
        )
        first = named[layout.names[0]]
        statistics = store.unpacked(tensors, header["statistics"], posterior.structure, first.device)
        mean = tensors["mean"].to(first.device)
        rest = {name: tensors[f"rest/{name}"].to(first.device) for name in layout.names if f"rest/{name}" in tensors}
        state = _Fitted(statistics, statistics.mean(), mean, header["noise"], rest)
        if header.get("chain") is not None:
            posterior._chain = Chain.unpacked(tensors, header["chain"], layout, first.device)
        posterior._accept(posterior._chained(state, header.get("n_newest")), header["n_data"])
        posterior._n_data = header["n_data"]
        posterior._method, posterior._temperature = header.get("method"), header.get("temperature")
        posterior._calibration = Calibration.unpacked(tensors, header.get("calibration"))
        posterior.structure.reason = header.get("reason", "")
        return posterior


def _values(prior: PriorPrecision) -> list[float | Tensor]:
    return list(prior.values()) if isinstance(prior, Mapping) else [prior]
