"""Likelihoods with one independent variable, or at least a diagonal curvature, per output."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.reading import times
from laplace_kf.likelihoods.roots import DiagonalRoot, Root
from laplace_kf.outputs.checks import refuse_shape
from laplace_kf.outputs.layout import masked, to_positions

__all__ = ["DiagonalLikelihood", "ElementwiseLikelihood"]


class DiagonalLikelihood(Likelihood):
    """A likelihood whose PSD output curvature is diagonal and does not depend on the targets."""

    @abc.abstractmethod
    def _root_diagonal(self, z: Tensor) -> Tensor:
        """``(N, T, C)``: square root of the curvature's diagonal."""

    def _diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        """As :meth:`_root_diagonal`, for likelihoods whose targets bring a noise scale of their own."""
        return self._root_diagonal(z)

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """C, for outputs of any layout."""
        self._check_outputs(outputs.shape)
        return int(to_positions(outputs).shape[-1])

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return torch.diag_embed(self._diagonal(z, y)).movedim(-1, 0)

    def _position_curvature(self, z: Tensor, y: Tensor | None) -> Tensor:
        return torch.diag_embed(self._diagonal(z, y).square())

    def _position_product(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return v * self._diagonal(z, y)  # never anything of size C by C

    def _lazy_root(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Root:
        return DiagonalRoot(masked(self._diagonal(z, y), keep))

    def _curvature_diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._diagonal(z, y).square()

    def _curvature_rows(self, z: Tensor, y: Tensor | None, output: int) -> Tensor:
        row = torch.zeros_like(z)
        row[..., output] = self._diagonal(z, y)[..., output].square()
        return row

    def _position_curved(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return v * self._diagonal(z, y).square()

    def _position_summed(
        self, z: Tensor, y: Tensor | None, keep: Tensor | None, weight: Tensor | None, directions: Tensor | None
    ) -> Tensor:
        total = masked(times(self._diagonal(z, y).square(), weight), keep).sum((0, 1))
        return torch.diag(total) if directions is None else total[:, None] * directions


class ElementwiseLikelihood(DiagonalLikelihood):
    """One independent natural exponential-family variable per output; targets have the shape of the outputs.

    Targets equal to ``ignore_index`` are left out one by one.
    """

    natural = True

    @abc.abstractmethod
    def _check_values(self, y: Tensor) -> None:
        """Raises ``ValueError`` for values outside the support; ignored entries are already 0."""

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        who = type(self).__name__
        refuse_shape(who, shape, targets, shape)
        y, keep = self._ignore_missing(targets if targets.is_floating_point() else targets.double())
        self._check_values(y)
        return to_positions(y), None if keep is None else to_positions(keep)

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._position_curvature(z, y)
