"""Likelihoods with one independent variable, or at least a diagonal curvature, per output."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.roots import DiagonalRoot, Root
from laplace_kf.outputs.checks import refuse_nonfinite, refuse_shape
from laplace_kf.outputs.layout import masked, to_positions

__all__ = ["DiagonalLikelihood", "ElementwiseLikelihood"]


class DiagonalLikelihood(Likelihood):
    """A likelihood whose PSD output curvature is diagonal and does not depend on the targets."""

    @abc.abstractmethod
    def _root_diagonal(self, z: Tensor) -> Tensor:
        """``(N, T, C)``: square root of the curvature's diagonal."""

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """C, for outputs of any layout."""
        self._check_outputs(outputs.shape)
        return int(to_positions(outputs).shape[-1])

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return torch.diag_embed(self._root_diagonal(z)).movedim(-1, 0)

    def _position_curvature(self, z: Tensor, y: Tensor | None) -> Tensor:
        return torch.diag_embed(self._root_diagonal(z).square())

    def _position_product(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return v * self._root_diagonal(z)  # never anything of size C by C

    def _lazy_root(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Root:
        return DiagonalRoot(masked(self._root_diagonal(z), keep))

    def _curvature_diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._root_diagonal(z).square()

    def _curvature_rows(self, z: Tensor, y: Tensor | None, output: int) -> Tensor:
        row = torch.zeros_like(z)
        row[..., output] = self._root_diagonal(z)[..., output].square()
        return row

    def _position_curved(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return v * self._root_diagonal(z).square()

    def _position_summed(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Tensor:
        return torch.diag(masked(self._root_diagonal(z).square(), keep).sum((0, 1)))


class ElementwiseLikelihood(DiagonalLikelihood):
    """One independent natural exponential-family variable per output; targets have the shape of the outputs.

    Targets equal to ``ignore_index`` are left out one by one.
    """

    natural: ClassVar[bool] = True

    @abc.abstractmethod
    def _check_values(self, y: Tensor) -> None:
        """Raises ``ValueError`` for values outside the support; ignored entries are already 0."""

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        who = type(self).__name__
        refuse_shape(who, shape, targets, shape)
        refuse_nonfinite(who, targets)
        y, keep = self._ignore(targets if targets.is_floating_point() else targets.double())
        self._check_values(y)
        return to_positions(y), None if keep is None else to_positions(keep)

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._position_curvature(z, y)
