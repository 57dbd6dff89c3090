"""A stand-in for torchvision where its compiled operators do not load (next to another build of torch).

timm and segmentation-models-pytorch import torchvision for transforms, data sets and one frozen layer; the models built
here use none of them. It stands in only where the real
package is missing or broken, and only while a model is built: no other code sees it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

__all__ = ["torchvision_or_standin"]


class _Anything(type):
    """A class whose attributes are classes of the same kind, so that ``Name.ATTRIBUTE`` can be read at import."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": _refuse})


def _refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"torchvision does not load here: {type(self).__name__} is a stand-in that cannot be used")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Anything(name, (), {"__init__": _refuse})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0.0.0+standin"  # type: ignore[attr-defined]


@contextmanager
def torchvision_or_standin() -> Iterator[bool]:
    """Makes ``import torchvision`` work meanwhile; yields whether it is the real package."""
    real = False
    with suppress(Exception):  # missing, or operators that do not load: any kind of error
        importlib.import_module("torchvision")
        real = True
    if real:
        yield True
        return
    _forget()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield False
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
