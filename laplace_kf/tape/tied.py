"""Signals of a weight that is used as itself and as its transpose, as a tied embedding and output matrix is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.tape.blocks import Block
from laplace_kf.tape.signals import LookupSignals, OuterSignals, Signals

__all__ = ["MatrixSignals", "TiedSignals"]


@dataclass
class TiedSignals(Signals):
    """Signals of a weight that is used as itself and as its transpose (a tied embedding and output matrix).

    Attributes:
        straight: signals of the uses as ``W``, in canonical order.
        turned: signals of the uses as ``Wᵀ``, whose own canonical order is ``(1, I, O)``.
    """

    block: Block
    straight: OuterSignals
    turned: OuterSignals | LookupSignals

    @property
    def count(self) -> tuple[int, int]:
        return self.straight.count

    def gradients(self, part: slice, dtype: torch.dtype) -> Tensor:
        return self.straight.gradients(part, dtype) + self.turned.gradients(part, dtype).transpose(-1, -2)

    def jacobian(self) -> Tensor:
        return self.gradients(slice(None), self.straight.g.dtype).reshape(-1, self.block.size)

    def project(self, directions: Tensor) -> Tensor:
        return self.straight.project(directions) + self.turned.project(directions.transpose(-1, -2))

    def total(self) -> Tensor:
        return self.straight.total() + self.turned.total().transpose(-1, -2)


MatrixSignals = OuterSignals | LookupSignals | TiedSignals
