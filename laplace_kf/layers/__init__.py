"""Layer rules: which torch functions consume parameters, and how each one's inputs and outputs read as matrices."""

from laplace_kf.layers import conv, elementwise, embedding, linear, norm
from laplace_kf.layers.base import RULES, AffineRule, BoundCall, LayerRule, MatrixRule, MatrixView, register, rule_names

__all__ = [
    "RULES",
    "AffineRule",
    "BoundCall",
    "LayerRule",
    "MatrixRule",
    "MatrixView",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "register",
    "rule_names",
]
