"""Lightning's trainers: callbacks that are callbacks of every Lightning in use, which is never imported before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

__all__ = ["TRAINERS", "TrainerCallback", "is_trainer"]

TRAINERS = ("lightning.pytorch", "pytorch_lightning")


class TrainerCallback:
    """A class whose instances are Lightning callbacks too, where a Lightning is installed.

    The base classes are found when an instance is made, so that no import of this package imports a trainer.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(_with_bases(cls))

    def __reduce__(self) -> Any:
        plain = next(c for c in type(self).__mro__ if "_made_by_laplace_kf" not in vars(c))
        return _revived, (plain, dict(self.__dict__))


def is_trainer(trainer: Any) -> bool:
    """Whether hooks were called by a Lightning trainer, which calls them in a known order."""
    return any(
        kind.__name__ == "Trainer" and kind.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        for kind in type(trainer).__mro__
    )


def _bases() -> list[type]:
    """The ``Callback`` of every Lightning that is in use, or else of every one that is installed."""
    names = [name for name in TRAINERS if name in sys.modules]
    if not names:
        names = [name for name in TRAINERS if importlib.util.find_spec(name.split(".")[0]) is not None]
    found: list[type] = []
    for name in names:
        try:
            found.append(importlib.import_module(name).Callback)
        except (ImportError, AttributeError, RuntimeError, OSError):  # a broken installation is none
            continue
    return found


def _with_bases(cls: type) -> Any:
    """The class, with the base classes that trainers ask for."""
    missing = tuple(base for base in _bases() if not issubclass(cls, base))
    if not missing:
        return cls
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_made_by_laplace_kf": True}
    return type(cls.__name__, (cls, *missing), body)


def _revived(cls: type[TrainerCallback], state: dict[str, Any]) -> Any:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made
