"""Bridges to other libraries, each imported only when it is asked for.

BoTorch, Lightning, Pyro, scikit-learn, transformers.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["botorch", "lightning", "pyro", "sklearn", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")
