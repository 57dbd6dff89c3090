"""Segments of a forward pass that ``torch.utils.checkpoint`` would run again in the backward pass: run once, here.

A segment that runs again finds the model as it is then: with its own weights where draws or a loaded mean were in it,
in another mode, outside of what watches the pass. With ``use_reentrant=True`` its layers are hidden from autograd, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from laplace_kf.replica import Shared

__all__ = ["run_once"]

MODULE = "torch.utils.checkpoint"


class _Function:
    """Stands for the autograd function of segments that are hidden."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for what is done before and after the other ones."""
    yield


INSTEAD = {"CheckpointFunction": _Function, "_checkpoint_without_reentrant_generator": _around}


@contextmanager
def _plainly() -> Iterator[None]:
    module = sys.modules[MODULE]
    kept = {name: getattr(module, name) for name in INSTEAD}
    try:
        for name, value in INSTEAD.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


_PLAINLY = Shared(_plainly)  # of the whole process: other threads keep their activations for as long


@contextmanager
def run_once() -> Iterator[None]:
    """Inside, segments are the plain code that they are."""
    if MODULE not in sys.modules:  # nobody calls it
        yield
        return
    with _PLAINLY():
        yield
