"""Bridges to other libraries, each imported only when it is asked for.

Avalanche, BoTorch, Lightning, Mammoth, Optuna, Pyro, scikit-learn, torch-uncertainty, transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from laplace_kf.errors import UnknownAttribute

__all__ = [
    "avalanche",
    "botorch",
    "lightning",
    "mammoth",
    "optuna",
    "pyro",
    "sklearn",
    "torch_uncertainty",
    "transformers",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        why = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        raise UnknownAttribute(sys.modules[__name__], name, why=why)
    return importlib.import_module(f"{__name__}.{name}")
