"""Claims of theory, on toys or exactly; an experiment is a file with ``Config`` and ``run``."""

from __future__ import annotations

__all__ = ["PARTS"]

PARTS = {
    "E5": "experiments.theory.damping_toy",
    "E6": "experiments.theory.empirical_fisher_toy",
    "E13": "experiments.theory.loss_slices",
    "E24": "experiments.theory.multiplier_toy",
    "E29": "experiments.theory.asymptotics",
    "E30": "experiments.theory.coordinates",
    "E31": "experiments.theory.factors",
    "E32": "experiments.theory.rank_bounds",
    "E33": "experiments.theory.clusters",
}
"""Id of an experiment → its module, which is imported when the experiment is asked for."""
