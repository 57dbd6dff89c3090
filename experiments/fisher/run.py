"""Pictures of the Fisher matrix and of its approximations; an experiment is a file with ``Config`` and ``run``."""

from __future__ import annotations

__all__ = ["PARTS"]

PARTS = {
    "E7": "experiments.fisher.exact",
    "E8": "experiments.fisher.inverse",
    "E9": "experiments.fisher.approximations",
}
"""Id of an experiment → its module, which is imported when the experiment is asked for."""
