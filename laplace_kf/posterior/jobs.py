"""What a posterior is asked for by other jobs than predicting: plans, conditioning, derivatives, export."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.operators import Blockwise
from laplace_kf.posterior.conditioning import Conditional, Constraints, conditioned
from laplace_kf.posterior.derivatives import Derivatives, Operator, derivatives
from laplace_kf.posterior.exporting import exported
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.planning import Plan, planned
from laplace_kf.posterior.surroundings import Surroundings
from laplace_kf.predictive.asked import asked
from laplace_kf.replica import stage

__all__ = ["Jobs"]


class Jobs(ABC):
    """Jobs of :class:`laplace_kf.LaplacePosterior`; nothing here changes it or its model."""

    model: nn.Module
    _around: Surroundings

    @abstractmethod
    def _in_model(self, what: str) -> Fitted:
        """What ``fit`` found, with the model at the posterior's mean."""

    @abstractmethod
    def _fitted(self, what: str) -> Fitted:
        """What ``fit`` found."""

    def _in_place(self, fitted: Fitted) -> Fitted:
        """What ``fit`` found, after a look at the model: it has to have the parameters, where it had them."""
        fitted.parameters()
        self._around.ties.require(self.model)
        return fitted

    def _as_fitted(self, what: str) -> Fitted:
        """The same, for what runs the model: warns where it is not the network of the fit any more."""
        fitted = self._fitted(what)
        self._around.warn(self.model)
        return fitted

    def checked_input(self, model: nn.Module, forward: Forward | None, x: Any) -> Any:
        """The input ``(N, ...)`` of what runs a model in place of the posterior's (:func:`laplace_kf.replica.stage`).

        Raises:
            ShapeMismatch: if it is none.
            UnsupportedLayer: if the posterior's parameters have no influence on the outputs any more.
        """
        x = asked(model, forward, x, self._fitted("a prediction").statistics.axes)
        self.require_as_fitted(model, forward, x)
        return x

    def require_as_fitted(self, model: nn.Module, forward: Forward | None, x: Any) -> None:
        """Before a model runs on an input ``(N, ...)`` in place of the posterior's: whether it is the one of the fit.

        Raises:
            UnsupportedLayer: if the posterior's parameters have no influence on the outputs any more.
        """
        mean = self._fitted("a prediction").mean_by_name
        self._around.conduct.require_same(self.model, model, forward, mean, x)

    @property
    @abstractmethod
    def precision(self) -> Blockwise:
        """Λ, of size P."""

    @typed
    @lasting()
    def condition(
        self,
        values: Mapping[str, Tensor | float] | float | None = None,
        masks: Mapping[str, Tensor] | None = None,
        *,
        constraints: Constraints | None = None,
    ) -> Conditional:
        """The exact conditional Gaussian given the values of some weights (zero: pruning; a grid: quantisation).

        Args:
            values: by parameter name, tensors of the parameters' shapes or numbers; or one number for all.
            masks: by parameter name, bool tensors of the parameters' shapes, True where the weight is held at its
                value. A parameter with values and no mask is held whole; one with a mask and no values is held at its
                mean.
            constraints: linear ones besides, ``K θ = t``: ``(K, t)`` with ``t (K,)`` and ``K`` as ``(K, P)`` in flat
                order, or ``(K, *shape)`` by parameter name.

        Returns:
            The conditional means by parameter name, each of its parameter's shape, with ``.model()``, a copy of the
            network with them, ``.sample(n)`` and ``.variances()``.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for a parameter that the posterior does not cover.
            ShapeMismatch: for masks, values or constraints of other shapes, or a mask that is not bool.
            IncompatiblePair: without values or constraints; for constraints that follow from each other; for weights
                outside of a subnetwork.
            NonFinite: for NaN or infinity.
            NotPositiveDefinite: if the precision of the free weights is singular.
        """
        fitted = self._in_model("condition")
        return conditioned(fitted, self.precision, values, masks, constraints)

    @typed
    @lasting()
    def derivatives(self, x: Any, operator: Operator | None = None, *, joint: bool = False) -> Derivatives:
        """Means and variances of the network's derivatives to its inputs, or of other values made of it.

        Args:
            x: inputs ``(N, ...)``, one tensor of floating type.
            operator: ``(f, x) -> values``, any shape, made of the network ``f`` (a function of inputs) at ``x``, which
                requires a gradient: a force ``-grad(f(x).sum(), x, create_graph=True)[0]``, an energy over atoms
                ``f(x).sum()``, the residual of a differential equation. Default: ``∂f/∂x (N, C, *x.shape[1:])``. Exact
                for linear operators, first order for others.
            joint: the covariance ``(K, K)`` of all values, too.

        Returns:
            ``.mean`` and ``.epistemic_variance`` of the values, and ``.covariance``. One backward pass a value.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: for inputs that are not one tensor of floating type.
            UnsupportedLayer: for values without a graph to the weights.
            NonFinite: for NaN or infinity in inputs or values.
            NotPositiveDefinite: if the precision is singular.
        """
        fitted = self._in_model("derivatives")
        with stage(fitted.model, fitted.forward) as (model, forward):
            x = self.checked_input(model, forward, x)
            check_finite(x, 0, "the input")
            return derivatives(model, forward, fitted.mean_by_name(), self.precision, x, operator, joint)

    @typed
    @lasting()
    def export(self, x: Any, *, dynamic: bool = True) -> nn.Module:
        """The linearised predictions as a module of torch's own operations: ``x -> (mean, epistemic_variance)``.

        It holds the weights and the precision of now and needs neither data nor this package: ``torch.export.export(
        module, (x,))`` takes it further. What is exported is ``f(x; μ)`` and ``diag(J Λ⁻¹ Jᵀ)`` of the parameters that
        the posterior covers, which for ``parameters="last_layer"`` costs little more than the network.

        Args:
            x: example inputs ``(N, ...)``, a tensor or a tuple of tensors, N at least 2.
            dynamic: let the number of examples vary.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: for inputs of another kind.
            UnsupportedLayer: for a network whose per-example derivatives cannot be traced.
            IncompatiblePair: for a precision without a closed form.
            NotPositiveDefinite: if the precision is singular.
        """
        fitted = self._in_model("export")
        with stage(fitted.model, fitted.forward) as (model, forward):
            x = self.checked_input(model, forward, x)
            return exported(model, forward, fitted.mean_by_name(), self.precision, x, dynamic)

    @typed
    def plan(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        y: Any = None,
        *,
        budget: float | None = 10.0,
        method: str = "auto",
        samples: int = 100,
        minibatches: float | None = None,
        processes: int = 1,
        bandwidth: float = 1e9,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Plan:
        """What a fit, a tuning run and a prediction of these data will take: seconds, memory and traffic of each.

        One minibatch is tried for real, on a copy (:mod:`laplace_kf.posterior.planning`); eigendecompositions are not.

        Args:
            data: as :meth:`fit` takes them: a loader or a pair ``(x (N, ...), y (N, ...))``. Their first minibatch is
                read; random states, and those of the loader, are afterwards what they were.
            y: targets ``(N, ...)``, where the first argument is the inputs alone.
            budget: of :meth:`tune`, in training epochs.
            method, samples: of :meth:`predict`.
            minibatches: how many there are, of data that do not know it.
            processes: of a ``process_group`` that share the data; ``data`` is the share of one of them.
            bandwidth: bytes a second between them.
            clock: what seconds are read from; ``time.process_time`` counts those of all threads.

        Returns:
            A plan with ``fit``, ``tune``, ``predict`` and ``decompositions``, each with ``seconds``, ``bytes`` and
            ``traffic``; prints as a few lines.

        Raises:
            ShapeMismatch: for empty data, a generator (whose first minibatch would be gone), or targets that do not
                fit the outputs.
            ValueError: if the number of minibatches is not known, or an argument is not positive.
            IncompatiblePair: as :meth:`fit` does, for what cannot fit into the memory.
        """
        return planned(
            self, data, y, budget=budget, method=method, samples=samples, minibatches=minibatches,
            processes=processes, bandwidth=bandwidth, clock=clock,
        )  # fmt: skip
