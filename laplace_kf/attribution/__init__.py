"""Which training examples made the network say what it says: influence, self-influence, mislabelled examples."""

from laplace_kf.attribution.ensemble import Attribution
from laplace_kf.attribution.rankings import SUSPICIONS, Ranking, mislabelled
from laplace_kf.attribution.scoring import group_influence, influence, self_influence
from laplace_kf.attribution.values import OF

__all__ = [
    "OF",
    "SUSPICIONS",
    "Attribution",
    "Ranking",
    "group_influence",
    "influence",
    "mislabelled",
    "self_influence",
]
