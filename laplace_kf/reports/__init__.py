"""What experiments and the demo report: metrics, pictures, one self-contained page, and what the run ran on.

``report(posterior, test_loader, ood_loader, out=folder)`` is the one call that makes the page for a fitted posterior,
and ``evaluate(posterior, inside, {name: outside}, out=folder)`` the one for out-of-distribution scores. They,
``metrics`` and ``plots`` need the ``experiments`` extra; asking for them without it says so.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from laplace_kf.errors import UnknownAttribute
from laplace_kf.reports.environment import machine, missing_extra, private_rng, processor_threads, versions

__all__ = [
    "evaluate",
    "machine",
    "metrics",
    "missing_extra",
    "plots",
    "private_rng",
    "processor_threads",
    "report",
    "versions",
]


def __getattr__(name: str) -> Any:
    """What needs the ``experiments`` extra is imported when it is first asked for."""
    if name == "report":
        return importlib.import_module("laplace_kf.reports.overview").report
    if name == "evaluate":
        return importlib.import_module("laplace_kf.reports.evaluation").evaluate
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    why = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    raise UnknownAttribute(sys.modules[__name__], name, why=why)
