"""Matrices: immutable symmetric operators with products, solves, determinants and draws."""

from laplace_kf.operators.base import Isotropic, Matrix, Sum, fresh_generator, standard_normal
from laplace_kf.operators.blockwise import Blockwise
from laplace_kf.operators.curvature import (
    DAMPINGS,
    CurvatureBlock,
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    SpectralBlock,
)
from laplace_kf.operators.lowrank import LowRank, LowRankBlock
from laplace_kf.operators.spectral import Basis, Ridge, Spectral

__all__ = [
    "DAMPINGS",
    "Basis",
    "Blockwise",
    "CurvatureBlock",
    "DenseBlock",
    "DiagonalBlock",
    "Isotropic",
    "KroneckerBlock",
    "LowRank",
    "LowRankBlock",
    "Matrix",
    "Ridge",
    "Spectral",
    "SpectralBlock",
    "Sum",
    "fresh_generator",
    "standard_normal",
]
