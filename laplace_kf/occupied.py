"""One thread at a time on a model that is used as it is: fits, updates and passes over data set its modes and buffers.

Predictions run on a double (:mod:`laplace_kf.replica`) and never wait. What changes the user's own modules for the
length of a call would otherwise be undone by another such call in the middle: the one that ends first puts the modules
back in training mode.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["alone"]

_CHANGED = threading.Condition()
_TAKEN: dict[int, tuple[int, int]] = {}  # id of a module → the thread that has it, and how deep


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside, no other thread is in here with any of the model's modules; calls may be nested."""
    own, places = threading.get_ident(), [id(module) for module in model.modules()]
    with _CHANGED:
        while any(_TAKEN.get(place, (own, 0))[0] != own for place in places):
            _CHANGED.wait()
        for place in places:
            _TAKEN[place] = own, _TAKEN.get(place, (own, 0))[1] + 1
    try:
        yield
    finally:
        with _CHANGED:
            for place in places:
                holder, depth = _TAKEN.pop(place)
                if depth > 1:
                    _TAKEN[place] = holder, depth - 1
            _CHANGED.notify_all()
