"""Structures: diagonal, Kronecker, full, isotropic. Each is one file that registers itself."""

from laplace_kf.structures import diag, full, isotropic, kron
from laplace_kf.structures.base import STRUCTURES, Structure, Sums

__all__ = ["STRUCTURES", "Structure", "Sums", "diag", "full", "isotropic", "kron"]
