"""Checks of layer rules against autograd that need not be made again.

A rule's gradient is a statement about functions, not about numbers: what passed for one forward pass passes for every
other one in which the same functions were called on the same parameters, shapes and plain arguments, wired in the same
way (:mod:`laplace_kf.tape.wiring`). So the answer is remembered by just that. It cannot become stale: a replaced layer,
another forward, mode, attribute or shape is another key, and a pass with anything in it that has no key (an own
autograd function, a hook, a gradient taken in the forward pass) is checked every time.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from weakref import WeakKeyDictionary

from torch import nn

from laplace_kf.replica import original
from laplace_kf.tape.observation import Observation

__all__ = ["has_passed", "note_passed", "verdict_key"]

KEPT = 32  # kinds of passes that are remembered for a model
_PASSED: WeakKeyDictionary[nn.Module, dict[Hashable, None]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def verdict_key(observation: Observation, selected: Hashable) -> Hashable | None:
    """What the verdict on a pass depends on; ``None`` if that is not known.

    Args:
        observation: the pass.
        selected: which parameters are selected, in order.
    """
    if observation.wiring is None:
        return None
    rules = tuple((call.rule, call.place) for call in observation.calls)
    return observation.wiring, selected, rules, observation.outputs.dtype, str(observation.outputs.device)


def has_passed(model: nn.Module, key: Hashable | None) -> bool:
    """Whether all rules of a pass with this key have passed."""
    if key is None:
        return False
    with _LOCK:
        return key in _PASSED.get(original(model), {})


def note_passed(model: nn.Module, key: Hashable | None) -> None:
    """Remembers that all rules of a pass with this key have passed."""
    if key is None:
        return
    with _LOCK:
        passed = _PASSED.setdefault(original(model), {})
        passed[key] = None
        while len(passed) > KEPT:
            del passed[next(iter(passed))]
