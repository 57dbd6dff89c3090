"""Pruning by conditioning a posterior."""

from laplace_kf.pruning.masks import PATTERNS, gradually, heads, masks, prune
from laplace_kf.pruning.saliency import SCORES

__all__ = ["PATTERNS", "SCORES", "gradually", "heads", "masks", "prune"]
