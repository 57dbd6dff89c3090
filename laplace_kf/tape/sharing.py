"""Copies of tensors made of parameters: whose gradient they carry, and which of two readings of a use holds.

Where a tensor that is made of parameters alone (:mod:`laplace_kf.tape.made`) meets data, every example gets a copy of
its own (:mod:`laplace_kf.layers.shared`), whose gradients are pulled back to the parameters here.

On the way a layer with a rule may have read the parameters already: a relative position bias is looked up in an
embedding, a continuous one runs through two linear layers. If what it made is the same for all examples, the layer's
rows belong to no example, and the copies are the right reading; if it has a row for every example (an initial state of
zeros that went through a linear layer), the layer is. Both are recorded, and :func:`settle` decides once it has been
measured which rows belong to which example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.layers.base import MatrixRule
from laplace_kf.tape.tape import Call

__all__ = ["Readings", "pulled_back"]

ROWS = 2**22  # entries of the derivative of a shared tensor that are kept; more are pulled back anew each time
WORKING = 2**24  # entries of gradients that are pulled back at once

Key = tuple[tuple[str, ...], int]


class Readings:
    """Which of the two readings held so far, by the keys of the layers' calls."""

    def __init__(self) -> None:
        self._copies: dict[Key, bool] = {}

    def to_json(self) -> list[list[Any]]:
        """All of it as plain values, for :meth:`take_json`."""
        return [[list(names), k, held] for (names, k), held in self._copies.items()]

    def take_json(self, values: Iterable[Sequence[Any]]) -> None:
        """Takes what :meth:`to_json` gave in place of what is known."""
        self._copies = {(tuple(names), k): held for names, k, held in values}

    def known(self, calls: Sequence[Call]) -> list[Call]:
        """The calls without those whose other reading held in an earlier minibatch."""
        gone: set[int] = set()
        for copies, layers in _groups(calls):
            said = {self._copies.get(call.place) for call in layers}
            if said == {True} and not any(call.kept for call in layers):
                gone.update(map(id, layers))
            elif said == {False}:
                gone.update(map(id, copies))
        return [call for call in calls if id(call) not in gone]

    def settle(self, calls: Sequence[Call], failed: Sequence[Call]) -> tuple[list[Call], set[str]]:
        """The calls that say what single examples do, and the names of parameters for which none does.

        Args:
            calls: all that were recorded and are not known to be read otherwise.
            failed: those among them whose rows belong to no example.
        """
        bad = {id(call) for call in failed}
        gone: set[int] = set()
        for copies, layers in _groups(calls):
            if not layers:
                continue
            by_copies = not any(id(c) in bad for c in copies) and not any(c.kept for c in layers)
            by_layers = not any(id(c) in bad for c in layers) and all(c.covered for c in copies)
            if by_copies and by_layers:  # one example: as before, else by where a matrix was read
                said = [self._copies[c.place] for c in layers if c.place in self._copies]
                same = all(tuple(c.shape) == tuple(c.aligned) for c in copies)
                by_copies = said[0] if said else not same or any(isinstance(c.rule, MatrixRule) for c in layers)
            elif by_copies or by_layers:
                self._copies.update((c.place, by_copies) for c in layers)
            else:
                bad.update(map(id, (*copies, *layers)))
            if by_copies or by_layers:
                gone.update(map(id, layers if by_copies else copies))
        names = {name for call in calls if id(call) in bad - gone for name in call.names}
        return [call for call in calls if id(call) not in gone], names


def _groups(calls: Sequence[Call]) -> Iterator[tuple[list[Call], list[Call]]]:
    """Copies and the layers on their way that have to be read alike: lists of both."""
    here = {id(call) for call in calls}
    groups: list[tuple[list[Call], list[Call]]] = []
    for call in calls:
        if call.source is None:
            continue
        copies, layers = [call], [layer for layer in call.covers if id(layer) in here]
        mine = set(map(id, layers))
        rest = []
        for other in groups:
            if mine & set(map(id, other[1])):
                copies, mine = [*other[0], *copies], mine | set(map(id, other[1]))
                layers = [*other[1], *(c for c in layers if all(c is not o for o in other[1]))]
            else:
                rest.append(other)
        groups = [*rest, (copies, layers)]
    yield from groups


def pulled_back(call: Call, gradients: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of single examples with respect to the parameters that a shared tensor is made of.

    Args:
        call: a meeting of that tensor with data.
        gradients: those of the copies, added up over each example: ``(V, N, entries of the tensor)``.
        weights: parameters by name, each in its own shape.

    Returns:
        ``(V, N, size)`` by name.
    """
    source = call.source
    assert source is not None
    columns, count = gradients.shape[:2]
    flat = gradients.reshape(columns * count, source.numel())
    sizes = [w.numel() for w in weights.values()]
    asked = id(source), tuple(weights)  # the parameters of one tensor may be of several blocks
    if source.numel() * sum(sizes) <= ROWS and (source.numel() <= len(flat) or asked in call.derivative):
        if asked not in call.derivative:
            unit = torch.eye(source.numel(), dtype=source.dtype, device=source.device)
            for other in [key for key in call.derivative if key[0] != id(source)]:
                del call.derivative[other]
            call.derivative[asked] = _vjp(source, weights, unit)
        parts = [flat.to(d.dtype) @ d for d in call.derivative[asked]]
    else:
        step = max(1, WORKING // max(1, source.numel(), *sizes))
        runs = [_vjp(source, weights, flat[k : k + step]) for k in range(0, len(flat), step)]
        parts = [torch.cat(each) for each in zip(*runs, strict=True)]
    return {name: part.reshape(columns, count, -1) for name, part in zip(weights, parts, strict=True)}


def _vjp(source: Tensor, weights: Mapping[str, Tensor], rows: Tensor) -> list[Tensor]:
    """``rows (K, size of source)`` pulled back to every weight, ``(K, size)``."""
    named = list(weights.values())
    if len(named) == 1 and source is named[0]:
        return [rows]
    seeds = rows.to(source.dtype).reshape(-1, *source.shape)
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(source, named, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation on the way that cannot be vectorised
        each = [torch.autograd.grad(source, named, one, retain_graph=True, allow_unused=True) for one in seeds]
        columns = ([g.to_dense() for g in column if g is not None] for column in zip(*each, strict=True))
        found = [torch.stack(column) if column else None for column in columns]
    return [
        rows.new_zeros(len(rows), w.numel()) if g is None else g.to_dense().reshape(len(rows), -1)
        for g, w in zip(found, named, strict=True)
    ]
