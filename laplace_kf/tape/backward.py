"""Several columns sent back through one recorded forward pass: one after another, or all of them at once.

A small network's backward pass is mostly the cost of starting its functions, so that many columns at once (a vectorised
backward pass) cost little more than one; a large one's is arithmetic, and gains nothing but memory to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from laplace_kf.errors import UnsupportedLayer

__all__ = ["AT_ONCE", "SMALL", "backward", "large", "origin", "significant"]

SMALL = 2**17  # entries of a gradient, on average, up to which columns go back together
AT_ONCE = 4  # columns below which one after another is as fast


def backward(outputs: Tensor, edges: Sequence[Any], sizes: Sequence[int], columns: Tensor) -> list[Tensor | None]:
    """Gradients at places of the autograd graph for columns, which are kept apart.

    Args:
        outputs: of the network, ``(N, ...)``; the graph is kept.
        edges: the places.
        sizes: how many entries a gradient there has.
        columns: ``(V, N, ...)``.

    Returns:
        For every place the gradients ``(V, ...)``, or ``None`` where none arrived for any column.

    Raises:
        UnsupportedLayer: if torch itself cannot differentiate the network.
    """
    if len(columns) >= AT_ONCE and not large(sizes):
        together = _together(outputs, edges, columns)
        if together is not None:
            return together
    rows = [_alone(outputs, edges, column) for column in columns]
    stacked: list[Tensor | None] = []
    for k in range(len(edges)):
        parts = [row[k] for row in rows]
        like = next((part for part in parts if part is not None), None)
        zero = None if like is None or len(parts) == 1 else torch.zeros_like(like)
        if len(parts) == 1:
            stacked.append(None if like is None else like[None])  # no copy of what nobody writes to
        else:
            stacked.append(None if zero is None else torch.stack([zero if part is None else part for part in parts]))
    return stacked


def _alone(outputs: Tensor, edges: Sequence[Any], column: Tensor) -> Sequence[Tensor | None]:
    """As :func:`backward`, for one column ``(N, ...)``."""
    try:
        return torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
    except RuntimeError as error:  # a tensor that was changed after it was used, an own function that fails
        if type(error) is not RuntimeError:  # torch's own are plain; others say more by themselves (no memory, ours)
            raise
        said = str(error).partition(" Hint:")[0]
        raise UnsupportedLayer(
            f"torch cannot differentiate the network's outputs ({said}); model(x).sum().backward() fails in the same "
            "way. Change what it names, for example h = h + f(h) in place of h.add_(f(h)), or leave parameters out "
            "with parameters=[patterns]"
        ) from error


def large(sizes: Sequence[int]) -> bool:
    """Whether gradients of these sizes are arithmetic, for which columns go back one after another."""
    return sum(sizes) > SMALL * len(sizes)


def _together(outputs: Tensor, edges: Sequence[Any], columns: Tensor) -> list[Tensor | None] | None:
    """As :func:`backward`, for all columns ``(V, N, ...)`` at once; ``None`` where a function has no rule for that."""
    try:
        found = torch.autograd.grad(
            outputs, edges, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, NotImplementedError):  # an own autograd function, a hook that reads numbers
        return None
    return list(found)


def significant(columns: Tensor) -> Tensor:
    """Columns ``(V, N, ...)`` without the entries whose squares would be denormal numbers.

    A confident classifier has class probabilities of 1e-30; their columns carry no curvature in any floating type,
    but arithmetic on denormal numbers is many times slower.
    """
    if not columns.numel():
        return columns
    size = columns.abs()
    limit = size.max() * torch.finfo(columns.dtype).tiny ** (1 / 3)
    return torch.where(size < limit, torch.zeros((), dtype=columns.dtype, device=columns.device), columns)


_CASTS = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0", "ViewBackward0")  # the identity, up to rounding


def origin(outputs: Tensor) -> tuple[Any, int]:
    """The autograd node and output number that made the outputs ``(N, ...)``; casts, copies and views left out.

    A view keeps the order of the entries; :meth:`Observation._has_layout` looks at the shapes.
    """
    edge = get_gradient_edge(outputs)
    node: Any = edge.node
    number = edge.output_nr
    while node.name() in _CASTS:
        node, number = node.next_functions[0]
    return node, number
