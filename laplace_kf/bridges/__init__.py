"""Bridges to other libraries, each imported only when it is asked for.

Avalanche, BoTorch, Lightning, Mammoth, Optuna, Pyro, scikit-learn, torch-uncertainty, transformers.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")
