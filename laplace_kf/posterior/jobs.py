"""What a fitted posterior is asked for by other jobs than predicting: conditioning on weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.models import lasting
from laplace_kf.operators import Blockwise
from laplace_kf.posterior.conditioning import Conditional, Constraints, conditioned
from laplace_kf.posterior.fitted import Fitted

__all__ = ["Jobs"]


class Jobs:
    """Jobs of :class:`laplace_kf.LaplacePosterior`; nothing here changes it or its model."""

    def _in_model(self, what: str) -> Fitted:
        raise NotImplementedError

    @property
    def precision(self) -> Blockwise:
        """Λ, of size P."""
        raise NotImplementedError

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
