"""Matrices: immutable symmetric operators with products, solves, determinants and draws."""

from laplace_kf.operators.base import Isotropic, Matrix, Sum, fresh_generator, standard_normal
from laplace_kf.operators.blockwise import Blockwise
from laplace_kf.operators.conditional import FreePart, by_rows, free_block, row_block
from laplace_kf.operators.curvature import CurvatureBlock, DenseBlock, DiagonalBlock
from laplace_kf.operators.eigenbasis import SpectralBlock
from laplace_kf.operators.kept_terms import KeptTerms, TermSum, in_common_bases
from laplace_kf.operators.kronecker import DAMPINGS, Damping, KroneckerBlock
from laplace_kf.operators.lowrank import LowRank, LowRankBlock
from laplace_kf.operators.merging import merged_to, overlap
from laplace_kf.operators.nearest import factor_sum, nearest_in_divergence, nearest_product, relative_error
from laplace_kf.operators.poles import Poles
from laplace_kf.operators.product import KroneckerProduct
from laplace_kf.operators.products import (
    khatri_rao,
    kron_logdet,
    kron_matvec,
    kron_rank,
    mixed_product,
    unvec,
    vec,
)
from laplace_kf.operators.spectral import Basis, Ridge, Spectral
from laplace_kf.operators.tridiagonal import BlockTridiagonal, CrossFactors
from laplace_kf.operators.wide import WideBlock, WideSpectral, inner_products
from laplace_kf.operators.wide_factor import HELD_OUT, WideFactor, directions, sketch_width, wide_factor

__all__ = [
    "DAMPINGS",
    "HELD_OUT",
    "Basis",
    "BlockTridiagonal",
    "Blockwise",
    "CrossFactors",
    "CurvatureBlock",
    "Damping",
    "DenseBlock",
    "DiagonalBlock",
    "FreePart",
    "Isotropic",
    "KeptTerms",
    "KroneckerBlock",
    "KroneckerProduct",
    "LowRank",
    "LowRankBlock",
    "Matrix",
    "Poles",
    "Ridge",
    "Spectral",
    "SpectralBlock",
    "Sum",
    "TermSum",
    "WideBlock",
    "WideFactor",
    "WideSpectral",
    "by_rows",
    "directions",
    "factor_sum",
    "free_block",
    "fresh_generator",
    "in_common_bases",
    "inner_products",
    "khatri_rao",
    "kron_logdet",
    "kron_matvec",
    "kron_rank",
    "merged_to",
    "mixed_product",
    "nearest_in_divergence",
    "nearest_product",
    "overlap",
    "relative_error",
    "row_block",
    "sketch_width",
    "standard_normal",
    "unvec",
    "vec",
    "wide_factor",
]
