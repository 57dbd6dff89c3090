"""Structures: which sums over the data are kept. Each is one file that registers itself."""

from laplace_kf.structures import auto, diag, ekfac, full, isotropic, kron, layer, lowrank
from laplace_kf.structures.base import STRUCTURES, Statistics, Structure, Sums

__all__ = [
    "STRUCTURES",
    "Statistics",
    "Structure",
    "Sums",
    "auto",
    "diag",
    "ekfac",
    "full",
    "isotropic",
    "kron",
    "layer",
    "lowrank",
]
