"""Which rows of a layer's output belong to which example: measured, not assumed.

A layer's output has leading axes of rows: examples, positions, or a mix of both if the model reshapes. The gradient of
one example's outputs is non-zero exactly in that example's rows, so one backward pass tells. Examples may have
different numbers of rows, in any order (the nodes of graphs, the tokens of an expert). Rows that cannot be told apart
(a position table shared by the minibatch) are reported, and their parameters go through per-example gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.ragged import Ragged
from laplace_kf.tape.owners import Owners, asked, lead, measured, sizes
from laplace_kf.tape.reach import reached
from laplace_kf.tape.tape import Call

__all__ = ["FIRST", "Modes", "Places", "Rows", "number", "occurrences"]

FIRST, LAST = -1, -2  # how examples lie in the rows: outermost, innermost, or on leading axis k >= 1

FEW = 9  # examples below which a random half is no test of their order; finding it takes few passes then

Key = tuple[tuple[str, ...], int]

#: How examples lie in the rows of calls that have so many for each.
Modes = dict[tuple[Key, int], int]

#: How they lie in the rows of the calls of one pass.
Places = dict[Key, int | Ragged]


class Rows:
    """How the examples lie in the rows of every call.

    Attributes:
        shared: names of parameters with rows that belong to several examples.
        now: what :meth:`locate` found for the last pass; every pass has a dictionary of its own.
    """

    def __init__(self) -> None:
        self.shared: set[str] = set()
        self._modes: Modes = {}
        self.now: Places = {}
        self._checks = 0

    def locate(
        self, calls: Sequence[Call], outputs: Tensor, picked: bool = False, flat: Sequence[Any] = ()
    ) -> list[Call]:
        """Finds out about calls whose number of rows per example is new, from gradients of ``outputs (N, ...)``.

        Examples are told apart by their numbers' digits (:mod:`laplace_kf.tape.owners`).

        Args:
            calls: the recorded uses.
            outputs: the network outputs.
            picked: whether rows were picked or ordered by the data: then what is known is checked in every minibatch.
            flat: as for :func:`laplace_kf.tape.reach.reached`.

        Returns:
            The calls with rows that belong to several examples, or to examples in no regular order.
        """
        count = outputs.shape[0]
        self.now = {}
        unknown: list[tuple[Call, Key, int]] = []
        known_calls: list[tuple[Call, Key, int]] = []
        for call, key in zip(calls, occurrences(calls), strict=True):
            total = math.prod(lead(call))
            mode = self._modes.get((key, total // count)) if total % count == 0 else None
            if mode is None:
                unknown.append((call, key, total))
            else:
                self.now[key] = mode
                known_calls.append((call, key, total))
        if picked and known_calls and not self._still(known_calls, outputs):
            unknown += known_calls
        if count < 2 or not unknown or not outputs.requires_grad:
            return []

        def opened(calls: Sequence[Call], factors: Tensor) -> list[Tensor | None]:
            edges = [call.edge for call in calls]
            counted = (factors != 0).reshape(*factors.shape, *[1] * (outputs.dim() - 1))
            counted = counted.expand(len(factors), *outputs.shape)
            columns = zip(*(reached(outputs, edges, one, flat) for one in counted), strict=True)
            return [_stacked(column) for column in columns]

        failed: list[Call] = []
        irregular: list[tuple[Call, Key, Owners]] = []
        owners = measured([call for call, _, _ in unknown], outputs)
        for (call, key, total), found in zip(unknown, owners, strict=True):
            few = call.source is not None and total < count  # no copy for each, even if one example alone reached it
            if found.several or few:
                failed.append(call)
                continue
            readings = _readings(lead(call), count, found)
            if not readings:
                irregular.append((call, key, found))
                continue
            self.now[key] = readings[0]
            if len(readings) == 1:  # otherwise the rows that would decide had no gradient this time
                self._modes[key, total // count] = readings[0]
        # rows that are switched off at the present weights belong to an example all the same
        again = [k for k, (_, _, found) in enumerate(irregular) if not bool(found.known.all())]
        for k, found in zip(again, asked([irregular[k][0] for k in again], outputs, opened), strict=True):
            if not found.several:
                irregular[k] = (*irregular[k][:2], found)
        for _, key, found in irregular:
            self.now[key] = Ragged.of(found.example, count, least=2)
        return failed

    def remember(self, modes: Modes) -> None:
        """Takes over what was measured for passes of the same form."""
        self._modes.update(modes)

    def settled(self, calls: Sequence[Call], count: int) -> Modes:
        """What is known of all these calls of ``count`` examples; nothing if something had to be left open."""
        keys = [(key, math.prod(lead(call)) // count) for call, key in zip(calls, occurrences(calls), strict=True)]
        whole = all(math.prod(lead(call)) % count == 0 for call in calls) and all(key in self._modes for key in keys)
        return {key: self._modes[key] for key in keys} if whole else {}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, for :meth:`take_json`."""
        modes = [[list(names), k, per, mode] for ((names, k), per), mode in self._modes.items()]
        return {"shared": sorted(self.shared), "modes": modes, "checks": self._checks}

    def take_json(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`to_json` gave in place of what is known."""
        self.shared, self._checks = set(values["shared"]), values["checks"]
        self._modes = {((tuple(names), k), per): mode for names, k, per, mode in values["modes"]}

    def _still(self, calls: Sequence[tuple[Call, Key, int]], outputs: Tensor) -> bool:
        """Whether the rows lie as known, by one backward pass from a random half of the examples ``(N, ...)``."""
        count = outputs.shape[0]
        if count < FEW or not outputs.requires_grad:
            return False
        self._checks += 1
        half = torch.rand(count, generator=torch.Generator().manual_seed(self._checks)).to(outputs.device) < 0.5
        seed = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(self._checks)).to(outputs)
        seed[~half] = 0
        grads = torch.autograd.grad(
            outputs, [call.edge for call, _, _ in calls], seed, retain_graph=True, allow_unused=True
        )
        for grad, (call, key, total) in zip(grads, calls, strict=True):
            if grad is None:
                continue
            touched = sizes(grad, call, outputs.device) != 0
            mode = self.now[key]
            assert not isinstance(mode, Ragged)  # never kept
            outer = _outer(mode, call, total // count)
            example = torch.arange(total, device=outputs.device) // (total // count // outer) % count
            if bool((touched & ~half[example]).any()):
                return False
        return True

    @staticmethod
    def arrange(rows: Tensor, call: Call, mode: int | Ragged, count: int, axis: int) -> Tensor:
        """Rows ``(..., B, T, *rest)`` with ``B`` on ``axis`` to ``(..., N, T', *rest)`` for ``N = count`` examples.

        Examples with fewer rows than others are padded, with 0 (tokens with −1). No output is a function of what stands
        there, so that these positions do not count (:mod:`laplace_kf.tape.reach`).

        Raises:
            ShapeMismatch: if the number of rows is no multiple of the number of examples.
        """
        total = rows.shape[axis]
        if isinstance(mode, Ragged):
            padded = mode.padded(rows, axis, 0 if rows.is_floating_point() else -1)  # (..., N, L, T, *rest)
            return padded.flatten(axis + 1, axis + 2)
        if total == count and call.leading == 1:
            return rows
        if total % count:
            raise ShapeMismatch(
                f"the layer with parameters {', '.join(call.key)} has {total} rows for {count} examples; keep the "
                "example axis first in the model's outputs"
            )
        outer = _outer(mode, call, total // count)
        inner = total // count // outer
        before, rest = rows.shape[:axis], rows.shape[axis + 1 :]
        split = rows.reshape(*before, outer, count, inner, *rest)
        moved = split.movedim(axis + 1, axis)  # (..., N, outer, inner, T, *rest)
        return moved.reshape(*before, count, outer * inner * rest[0], *rest[1:])


def occurrences(calls: Sequence[Call]) -> list[Key]:
    """A key for every call that stays the same from batch to batch: what was read, and how often before."""
    return [call.place for call in calls]


def number(calls: Sequence[Call]) -> None:
    """Numbers the calls of one forward pass that read the same."""
    seen: dict[tuple[str, ...], int] = {}
    for call in calls:
        call.occurrence = 0
        what = call.place[0]
        call.occurrence = seen.get(what, 0)
        seen[what] = call.occurrence + 1


def _outer(mode: int, call: Call, positions: int) -> int:
    """How many rows there are for every example before its axis."""
    return {FIRST: 1, LAST: positions}.get(mode) or math.prod(lead(call)[:mode])


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Gradients (of one shape, or ``None``) as ``(V, ...)``; ``None`` if there is none."""
    like = next((part for part in parts if part is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if part is None else part for part in parts])


def _readings(lead: Sequence[int], count: int, owners: Owners) -> list[int]:
    """The regular readings of the rows that agree with every row whose example is known; equal ones count once."""
    example, known = owners.example, owners.known
    total = math.prod(lead)
    if total % count or not total:  # no row at all: rows are chosen by the data
        return []
    index = torch.arange(total, device=example.device)
    candidates = [(FIRST, 1), (LAST, total // count)]
    candidates += [(k, math.prod(lead[:k])) for k in range(1, len(lead)) if lead[k] == count]
    found: list[int] = []
    assigned: list[Tensor] = []
    for mode, outer in candidates:
        guess = index // (total // count // outer) % count
        if torch.equal(guess[known], example[known]) and not any(torch.equal(guess, other) for other in assigned):
            found.append(mode)
            assigned.append(guess)
    return found
