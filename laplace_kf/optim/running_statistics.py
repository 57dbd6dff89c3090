"""Running curvature of an optimiser: the engine's statistics, averaged over steps (methods 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from laplace_kf.optim.schedules import averaging_weight
from laplace_kf.posterior.store import packed, unpacked
from laplace_kf.structures.base import Statistics, Structure

__all__ = ["averaged", "dumped", "loaded", "shapes_in"]


def averaged(running: Statistics | None, new: Statistics, step: int, limit: float) -> Statistics:
    """Statistics whose mean is ``ε · running + (1 − ε) · new`` of the means, with ``ε = min(1 − 1/step, limit)``.

    Both sides weigh by the step, not by the number of examples: a larger minibatch counts no more. The sums of ``new``
    enter as they are, and those of ``running`` are added to them in place: one pass over the factors.

    Args:
        running: what there is so far, ``None`` at first.
        new: statistics of one step; given up to the result.
        step: 1, 2, ...
        limit: largest ε; 0 keeps the new one only.
    """
    weight = averaging_weight(step, limit) if running is not None else 0.0
    if running is None or weight == 0.0:
        return new
    share = weight / (1 - weight) * new.count / running.count
    if not _in_common(running.structure, new.structure) or running.used != new.used:
        return running.scale(share) + new
    sums = dict(new.sums)
    for name, parts in running.sums.items():
        if name not in sums:
            sums[name] = tuple(share * part for part in parts)
            continue
        for mine, old in zip(sums[name], parts, strict=True):
            mine.add_(old, alpha=share)
    return replace(
        new,
        blocks={**running.blocks, **new.blocks},
        sums=sums,
        count=new.count + share * running.count,
        log_likelihood=new.log_likelihood + share * running.log_likelihood,
        terms=new.terms + share * running.terms,
        moments=new.moments + share * running.moments,
    )


def _in_common(one: Structure, other: Structure) -> bool:
    """Whether sums refer to the very same bases, or to none."""
    mine, theirs = one.fixed, other.fixed
    return mine.keys() == theirs.keys() and all(
        a is b for name, parts in mine.items() for a, b in zip(parts, theirs[name], strict=True)
    )


def dumped(statistics: Statistics | None) -> dict[str, Any] | None:
    """Statistics as plain values and tensors."""
    if statistics is None:
        return None
    tensors, described = packed(statistics)
    return {"tensors": tensors, "described": described}


def loaded(state: Mapping[str, Any] | None, structure: Structure, device: torch.device) -> Statistics | None:
    """The inverse of :func:`dumped`."""
    return None if state is None else unpacked(state["tensors"], state["described"], structure, device)


def shapes_in(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a state speaks of, by name."""
    found = {name: tuple(value.shape) for name, value in state["average"].items()}
    for key in ("factors", "inverted"):
        if state.get(key) is not None:
            described = state[key]["described"]
            found.update(zip(described["names"], map(tuple, described["shapes"]), strict=True))
    return found
