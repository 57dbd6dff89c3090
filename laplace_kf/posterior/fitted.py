"""A fitted posterior as a value: what ``fit`` found, and what can be read from it at some (N, λ).

The posterior that users hold sets and delegates; whoever only reads (tuning, calibration, prediction) takes this value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.gaussian import WeightGaussian
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import parameters_of
from laplace_kf.ood import Leverage
from laplace_kf.operators import DAMPINGS, Blockwise
from laplace_kf.posterior.evidence import Evidence, EvidenceModel, squares_by_block
from laplace_kf.posterior.implicit import ImplicitPenalty
from laplace_kf.posterior.penalty import Penalty
from laplace_kf.posterior.prior import PriorPrecision, plain, positive, prior_tensors
from laplace_kf.posterior.task_chain import ChainedEvidence, TaskChain
from laplace_kf.structures.base import Statistics
from laplace_kf.tape import EntryLayout, FlatLayout
from laplace_kf.weighting import Weights

__all__ = ["Fitted", "flat_weights"]

T = TypeVar("T")


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` produces; replaced as a whole, so that a failed fit changes nothing.

    Attributes:
        model, forward, weights: the network and how its batches are read.
        likelihood: of the targets, with its noise scale of now.
        damping: how Kronecker blocks take λ.
        statistics: sums over the data of the (newest) task.
        curvature: the mean curvature ``C̄``, of all tasks together.
        mean: flat weights ``(P,)``.
        noise: the likelihood's parameters when the data were seen.
        rest: of a subnetwork: parameters by name, each of its own shape, zero at the chosen weights.
        chain: what earlier tasks left, if there were any.
        newest, reference: with a chain: N of the newest task, and of all tasks together.
        errors: with a chain: the relative error by block of every update so far.
    """

    model: nn.Module
    forward: Forward | None
    weights: Weights
    likelihood: Likelihood
    damping: str
    statistics: Statistics
    curvature: Blockwise
    mean: Tensor
    noise: dict[str, float]
    rest: dict[str, Tensor] = field(default_factory=dict)
    chain: TaskChain | None = None
    newest: float | None = None
    reference: float | None = None
    errors: tuple[dict[str, float], ...] = ()
    # by use: what was made last and for which settings; one entry a use, so that a search does not fill the memory
    _kept: dict[str, tuple[Hashable, Any]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is kept can be made again, and holds locks and a tracer of this very model."""
        return {**vars(self), "_kept": {}}

    # -- the weights ---------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> FlatLayout:
        """The flat order of the weights."""
        return self.statistics.layout

    @property
    def like(self) -> Tensor:
        """A tensor (any shape) in the type and on the device of the curvature."""
        return next(iter(self.statistics.sums.values()))[0]

    @property
    def count(self) -> float:
        """Number of examples that one pass of the fit saw; of a chain, the N of all tasks together."""
        return self.statistics.count if self.reference is None else self.reference

    def parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name, each of its shape.

        Raises:
            ShapeMismatch: if the model has not all of them in these shapes any more: a layer was replaced or removed.
        """
        return parameters_of(self.model, self.layout.names, self.layout.shapes, "the posterior")

    def mean_by_name(self, copy: bool = True) -> dict[str, Tensor]:
        """The mean by parameter name, each of its parameter's shape, type and device.

        A copy, or with ``copy=False`` for what only reads it: a head of 50,000 classes is copied slower than used. A
        model may write into its weights when it is called; what it is called with has to be a copy then.

        Raises:
            ShapeMismatch: as :meth:`parameters`.
        """
        parts = self.layout.split(self.mean[None])
        whole = {n: part[0] + self.rest[n].to(part) if n in self.rest else part[0] for n, part in parts.items()}
        named = self.parameters()  # of types and devices, which the flat vector cannot keep
        return {name: part.to(named[name], copy=copy).detach() for name, part in whole.items()}

    # -- the Gaussian --------------------------------------------------------------------------------------------------

    def rescaled(self) -> tuple[float | Tensor, Tensor]:
        """Factor on the curvature (1, or 0-dim) and log likelihood (0-dim), if the noise was changed since the fit."""
        statistics = self.statistics
        known = (statistics.log_likelihood, statistics.terms, statistics.moments)
        factor, fit = self.likelihood.rescaled(self.noise, *known)
        if isinstance(factor, Tensor):
            factor = factor.to(self.like) if factor.requires_grad else float(factor)
        return factor, fit

    @property
    def factor(self) -> float:
        """Factor on the mean curvature since the fit: 1, unless a noise scale was changed."""
        return float(torch.as_tensor(self.rescaled()[0]).detach())

    def precision(self, n: float, prior: PriorPrecision) -> Blockwise:
        """``Λ = N C̄ + λ I``, a Matrix of size ``P``; kept until it is asked for at other (N, λ)."""
        return self._made("precision", n, prior, lambda c, given: c.precision(n, given, self.damping))

    def one_of_many(self, n: float, prior: PriorPrecision) -> Blockwise:
        """The same at one of many (N, λ), in bases that they share; kept in the same way."""
        return self._made("one of many", n, prior, lambda c, given: c.precision(n, given, self.damping, many=True))

    def gaussian(self, n: float, prior: PriorPrecision) -> WeightGaussian:
        """The posterior as a Gaussian over flat weights ``(P,)``."""
        return WeightGaussian(self.mean, self.precision(n, prior))

    def summed(self, n: float, prior: PriorPrecision) -> tuple[Blockwise, Tensor | dict[str, Tensor]]:
        """The two parts of ``Λ``: ``N C̄``, and λ as a 0-dim tensor or one for every parameter name."""
        return self.curvature.scaled(n * self.factor), prior_tensors(prior, self.layout, self.like)

    def _made(
        self,
        use: str,
        n: float,
        prior: PriorPrecision,
        make: Callable[[Blockwise, Tensor | dict[str, Tensor]], T],
    ) -> T:
        """What ``make`` gives for the curvature and λ, kept unless it may carry a gradient."""

        def made() -> T:
            curvature = self.curvature if isinstance(factor, float) and factor == 1.0 else self.curvature.scaled(factor)
            return make(curvature, prior_tensors(prior, self.layout, self.like))

        factor, _ = self.rescaled()
        if any(isinstance(value, Tensor) for value in (factor, *_values(prior))):
            return made()
        return self._keep(use, (n, factor, self.damping, _hashable(prior)), made)

    def _keep(self, use: str, key: Hashable, make: Callable[[], T]) -> T:
        held = self._kept.get(use)
        if held is None or held[0] != key:
            held = self._kept[use] = (key, make())
        found: T = held[1]
        return found

    # -- evidence, penalties, leverages --------------------------------------------------------------------------------

    @property
    def squares(self) -> dict[str, dict[str, Tensor]]:
        """``‖θ*‖²`` by block and parameter name, 0-dim in float64."""
        return self._keep("squares", (), lambda: squares_by_block(self.curvature, self.mean))

    def evidence_model(self) -> EvidenceModel:
        """The evidence as a function of N, λ and the noise scale."""
        return self._keep("evidence", self.damping, self._evidence_model)

    def _evidence_model(self) -> EvidenceModel:
        made = EvidenceModel(self.statistics, self.curvature, self.squares, self.noise, self.damping)
        if self.chain is None or self.reference is None:
            return made
        return ChainedEvidence.of(made, self.chain, self.reference, self.mean)

    def evidence(self, n: float, prior: PriorPrecision) -> Evidence:
        """The terms of the log evidence at N and λ."""
        given = prior_tensors(prior, self.layout, torch.zeros((), dtype=torch.float64))
        model = self.evidence_model()
        found = model.terms(n, given, self.likelihood)
        factor = self.rescaled()[0]
        factor = factor.detach().double().cpu() if isinstance(factor, Tensor) else factor
        slope = partial(model.slope, n, factor, plain(prior), self.layout)
        return Evidence(found.fit, found.log_det_ratio, found.scatter, slope)

    def penalty(self, n: float, prior: PriorPrecision) -> Tensor:
        """``½ (θ−μ)ᵀ Λ (θ−μ)`` at the model's current parameters, 0-dim and differentiable."""
        centre = self.layout.split(self.mean[None])
        settings = (self.rescaled()[0], *_values(prior))
        constant = not any(isinstance(value, Tensor) and value.requires_grad for value in settings)
        quadratic = self._made(
            "penalty",
            n,
            prior,
            lambda c, given: Penalty(c.products(n, given, self.damping), centre, self.like, constant),
        )
        return quadratic(self.parameters())

    def implicit_penalty(self, n: float, prior: PriorPrecision) -> ImplicitPenalty:
        """``(I + r Λ)⁻¹`` for gradients."""
        numbers = plain(prior)
        key = (n, self.factor, _hashable(numbers))
        return self._keep("implicit", key, lambda: ImplicitPenalty([self.summed(n, prior)]))

    def leverage(self, n: float, prior: PriorPrecision) -> Leverage:
        """Leverages of the layers' inputs."""
        sharing = getattr(self.statistics.structure.first(), "shared_rows", None)
        return self._made(
            "leverage",
            n,
            prior,
            lambda c, given: Leverage(
                self.model, self.forward, self.mean_by_name(), c, n, given, self.damping, sharing
            ),
        )

    # -- chains --------------------------------------------------------------------------------------------------------

    def joined(self, n: float | None) -> Fitted:
        """With the curvature of earlier tasks, if there is a chain that brings it; ``n`` is this task's N."""
        if self.chain is None:
            return self
        newest = n if n is not None else self.statistics.count
        curvature, reference, errors = self.chain.extended(self.curvature, newest)
        return replace(self, curvature=curvature, newest=newest, reference=reference, errors=errors, _kept={})

    def left(
        self, n: float, damping: str, multiplier: float, terms: str, forgetting: float, max_terms: int | None
    ) -> TaskChain:
        """What this posterior at N leaves to the one of the next task, which has that damping.

        Raises:
            IncompatiblePair: for a damping other than the exact one, or ``max_terms`` where one term is held anyway.
            ValueError: for a multiplier that is not positive, ``max_terms`` below 1, or ``forgetting`` outside (0, 1].
        """
        if DAMPINGS[self.damping].is_product or damping != self.damping:
            raise IncompatiblePair(
                f"damping={self.damping!r} folds λ into the Kronecker factors, but a chain keeps it apart (methods "
                '11.2); use damping="exact" for every task'
            )
        kept = positive("forgetting", forgetting)
        if kept > 1:
            raise InvalidArgument(
                f"forgetting scales the previous curvature and is at most 1, got {forgetting}; take 1 to keep all of it"
            )
        total = self.curvature.scaled(kept * n * self.factor)
        scale = positive("multiplier", multiplier)
        return TaskChain(terms, scale, total, self.mean, kept * n, self.errors, max_terms)


def flat_weights(model: nn.Module, layout: FlatLayout) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's weights of a layout ``(P,)``, and of single weights the rest of their parameters by name.

    The flat vector lies on the device of the first parameter, in the widest of their types.

    Raises:
        ShapeMismatch: if the model has not all of the parameters in these shapes.
    """
    named = parameters_of(model, layout.names, layout.shapes, "the posterior")
    device = named[layout.names[0]].device
    with torch.no_grad():
        mean = layout.join({name: named[name][None].to(device) for name in layout.names})[0].clone()
    if not isinstance(layout, EntryLayout):
        return mean, {}
    parts = layout.split(mean[None])
    return mean, {name: named[name].detach() - part[0].to(named[name]) for name, part in parts.items()}


def _values(prior: PriorPrecision) -> list[float | Tensor]:
    return list(prior.values()) if isinstance(prior, Mapping) else [prior]


def _hashable(prior: PriorPrecision) -> Hashable:
    return tuple(prior.items()) if isinstance(prior, Mapping) else prior
