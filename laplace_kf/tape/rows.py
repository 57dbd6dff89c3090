"""Which rows of a layer's output belong to which example: measured, not assumed.

A layer's output has leading axes of rows: examples, positions, or a mix of both if the model reshapes. The gradient of
one example's outputs is non-zero exactly in that example's rows, so one backward pass tells. Rows that cannot be told
apart (a position table shared by the minibatch) are reported, and their parameters go through per-example gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.layers.base import flatten_rows
from laplace_kf.tape.tape import Call

__all__ = ["Rows", "occurrences"]

FIRST, LAST = -1, -2  # how examples lie in the rows: outermost, innermost, or on leading axis k >= 1

Key = tuple[tuple[str, ...], int]


class Rows:
    """How the examples lie in the rows of every call; learned from the first minibatch of at least two examples.

    Attributes:
        shared: names of parameters with rows that belong to several examples at once.
    """

    def __init__(self) -> None:
        self.shared: set[str] = set()
        self._modes: dict[Key, int] = {}

    def locate(self, calls: Sequence[Call], outputs: Tensor) -> None:
        """Probes calls that are not known yet with gradients of the first and last of ``outputs (N, ...)``."""
        count = outputs.shape[0]
        pairs = zip(calls, occurrences(calls), strict=True)
        unknown = [(call, key) for call, key in pairs if key not in self._modes]
        if count < 2 or not unknown or not outputs.requires_grad:
            return
        generator = torch.Generator().manual_seed(0)
        touched: list[list[tuple[int, Tensor]]] = [[] for _ in unknown]
        edges = [call.edge for call, _ in unknown]
        for probe in (0, count - 1):
            seed = torch.zeros_like(outputs)
            noise = torch.randn(outputs.shape[1:], generator=generator, dtype=torch.float64)
            seed[probe] = noise.to(outputs.dtype).to(outputs.device)
            grads = torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True)
            for found, (call, _), grad in zip(touched, unknown, grads, strict=True):
                if grad is not None:
                    rows = flatten_rows(grad, call.leading)
                    found.append((probe, (rows.flatten(1) != 0).any(1) if rows.dim() > 1 else rows != 0))
        for found, (call, key) in zip(touched, unknown, strict=True):
            mode = _example_axis(call.shape[: call.leading], count, found)
            if mode is None:
                self.shared.update(call.names.values())
            else:
                self._modes[key] = mode

    def arrange(self, rows: Tensor, call: Call, key: Key, count: int, axis: int) -> Tensor:
        """Rows ``(..., B, T, *rest)`` with ``B`` on ``axis`` to ``(..., N, T', *rest)`` for ``N = count`` examples.

        Raises:
            ShapeMismatch: if the number of rows is no multiple of the number of examples.
        """
        total = rows.shape[axis]
        if total == count and call.leading == 1:
            return rows
        if total % count:
            raise ShapeMismatch(
                f"the layer with parameters {', '.join(call.key)} has {total} rows for {count} examples; keep the "
                "example axis first in the model's outputs"
            )
        mode = self._modes.get(key, FIRST)
        outer = {FIRST: 1, LAST: total // count}.get(mode) or math.prod(call.shape[:mode])
        inner = total // count // outer
        before, rest = rows.shape[:axis], rows.shape[axis + 1 :]
        split = rows.reshape(*before, outer, count, inner, *rest)
        moved = split.movedim(axis + 1, axis)  # (..., N, outer, inner, T, *rest)
        return moved.reshape(*before, count, outer * inner * rest[0], *rest[1:])


def occurrences(calls: Sequence[Call]) -> list[Key]:
    """A key for every call that stays the same from batch to batch: parameter names and how often seen before."""
    seen: dict[tuple[str, ...], int] = {}
    keys = []
    for call in calls:
        keys.append((call.key, seen.get(call.key, 0)))
        seen[call.key] = seen.get(call.key, 0) + 1
    return keys


def _example_axis(lead: Sequence[int], count: int, touched: Sequence[tuple[int, Tensor]]) -> int | None:
    """The first reading of the rows in which each probed example touched no other example's rows."""
    total = math.prod(lead)
    if total % count:
        return None
    candidates = [(FIRST, 1), (LAST, total // count)]
    candidates += [(k, math.prod(lead[:k])) for k in range(1, len(lead)) if lead[k] == count]
    for mode, outer in candidates:
        fits = True
        for probe, rows in touched:
            of_example = rows.reshape(outer, count, total // count // outer).any(0).any(-1)
            of_example[probe] = False
            fits = fits and not bool(of_example.any())
        if fits:
            return mode
    return None
