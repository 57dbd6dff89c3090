"""A step is made whole or not at all: what an exception would leave half done is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from laplace_kf.errors import NotPositiveDefinite

__all__ = ["KNOBS", "unless_it_fails"]

KNOBS = "Raise zeta (damping of the approximate curvature) or l2; a unit that no example reaches has no curvature."


@contextmanager
def unless_it_fails(optimizer: Any, drop: bool = False) -> Iterator[None]:
    """Everything that a step may change is as before when an exception leaves the block.

    Weights, ``.grad``, buffers, attributes, first-order velocities, the optimiser's own and the global random numbers.
    Tensors that a step replaces are kept by reference, those that it writes into (weights only once all is known,
    buffers, velocities) by value.

    Args:
        optimizer: the :class:`laplace_kf.optim.base.SecondOrder` whose step it is.
        drop: forget the minibatches taken in.

    Raises:
        NotPositiveDefinite: for a factorisation that fails inside torch, and with what to change for one of ours.
    """
    held = [optimizer, *optimizer._mutable()]
    attributes = [dict(vars(one)) for one in held]
    grads = {name: p.grad for name, p in optimizer.named.items()}
    buffers = {name: b.detach().clone() for name, b in optimizer.model.named_buffers()}
    velocities = {p: dict(entry) for p, entry in optimizer.state.items()}
    own, everywhere = optimizer.generator.get_state(), optimizer.objective.random_state()
    try:
        yield
    except BaseException as error:
        pending = optimizer.pending.batches
        for one, values in zip(held, attributes, strict=True):
            vars(one).clear()
            vars(one).update(values)
        for name, p in optimizer.named.items():
            p.grad = grads[name]
        with torch.no_grad():
            for name, b in optimizer.model.named_buffers():
                if name in buffers:
                    b.copy_(buffers[name])
        optimizer.state.clear()
        optimizer.state.update(velocities)
        optimizer.generator.set_state(own)
        optimizer.objective._set_random(everywhere)
        if drop or not pending:
            optimizer._clear()
        if isinstance(error, NotPositiveDefinite) and KNOBS not in str(error):
            raise NotPositiveDefinite(error.block, error.smallest, KNOBS) from error
        if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            what = f"A factorisation failed: {error} {KNOBS}"
            raise NotPositiveDefinite("of this step", float("nan"), what) from error
        raise
