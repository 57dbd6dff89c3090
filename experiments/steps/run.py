"""Single steps and short runs of optimisers; an experiment is a file with ``Config`` and ``run``."""

from __future__ import annotations

__all__ = ["PARTS"]

PARTS = {
    "E3": "experiments.steps.conjugate",
    "E10": "experiments.steps.damping",
    "E11": "experiments.steps.batches",
    "E16": "experiments.steps.layers",
    "E17": "experiments.steps.whole",
    "E18": "experiments.steps.mixture",
}
"""Id of an experiment → its module, which is imported when the experiment is asked for."""
