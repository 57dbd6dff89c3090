"""One small rule of every kind, with only the methods that are abstract: each is one file, as CONTRIBUTING.md shows it.

They are registered only inside :func:`registered`, so that no other test meets them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from laplace_kf.estimators import ESTIMATORS
from laplace_kf.layers import RULES
from laplace_kf.likelihoods import LIKELIHOODS
from laplace_kf.structures import STRUCTURES

__all__ = ["TOYS", "registered", "unregistered"]

FOLDER = Path(__file__).parent
# What each file adds: the kind of rule, and its registered name.
TOYS = {
    "layer": "per_head",
    "likelihood": "increments",
    "estimator": "written_out",
    "structure": "plain_blocks",
}
REGISTRIES = (LIKELIHOODS, ESTIMATORS, STRUCTURES)


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """Everything that is registered inside is forgotten afterwards."""
    before = [dict(registry._entries) for registry in REGISTRIES]
    rules = dict(RULES)
    try:
        yield
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry._entries.clear()
            registry._entries.update(entries)
        RULES.clear()
        RULES.update(rules)


@contextlib.contextmanager
def registered(*kinds: str) -> Iterator[dict[str, ModuleType]]:
    """The toys of these kinds (all of them without any) are there inside, freshly made; their modules by kind."""
    with unregistered():
        yield {kind: _loaded(kind) for kind in kinds or TOYS}


def _loaded(kind: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tests.contracts.toys.{kind}", FOLDER / f"{kind}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
