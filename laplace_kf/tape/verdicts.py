"""What was measured of a model's passes and need not be measured again: layer rules, and how examples lie in rows.

A rule's gradient is a statement about functions, not about numbers: what passed for one forward pass passes for every
other one in which the same functions were called on the same parameters, shapes and plain arguments, wired in the same
way (the form of a pass, :mod:`laplace_kf.tape.wiring`). So the answer is remembered by just that. It cannot become
stale: a replaced layer, another forward, mode, attribute or shape is another key, and a pass with anything in it that
has no key (an own autograd function, a gradient taken in the forward pass) is checked every time.

Which rows of a layer belong to which example is such a statement too, where no rows are picked or ordered by the data.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from laplace_kf.replica import original
from laplace_kf.tape.tape import Call

__all__ = ["note", "remembered", "verdict_key"]

KEPT = 64  # verdicts that are remembered for a model
_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def verdict_key(
    what: str, form: Hashable | None, calls: Sequence[Call], outputs: Tensor, selected: Hashable
) -> Hashable | None:
    """What a verdict on a pass depends on; ``None`` if that is not known.

    Args:
        what: the question.
        form: of the pass.
        calls: its recorded uses of selected parameters.
        outputs: ``(N, ...)``.
        selected: which parameters are selected, in order.
    """
    if form is None:
        return None
    return what, form, selected, tuple((call.rule, call.place) for call in calls), outputs.dtype, str(outputs.device)


def remembered(model: nn.Module, key: Hashable | None) -> Any:
    """The verdict on passes with this key, ``None`` if there is none."""
    if key is None:
        return None
    with _LOCK:
        return _KNOWN.get(original(model), {}).get(key)


def note(model: nn.Module, key: Hashable | None, verdict: Any) -> None:
    """Remembers the verdict (anything but ``None``) on all passes with this key."""
    if key is None:
        return
    with _LOCK:
        known = _KNOWN.setdefault(original(model), {})
        known[key] = verdict
        while len(known) > KEPT:
            del known[next(iter(known))]
