"""Which targets of a graph count: masks, and what becomes of the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from laplace_kf.conventions import IGNORED
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.graphs.form import is_graph, is_heterogeneous, keys_of

__all__ = ["MASKS", "check_ignored", "checked_mask", "kept_only", "masked", "of_role"]

MASKS = ("train_mask", "val_mask", "test_mask")


def masked(graph: Any, mask: Tensor | str) -> Any:
    """A copy of a graph in which only some targets count, whatever it is given to.

    ``fit``, chaining and optimisers look at ``train_mask``, ``tune`` at ``val_mask``; for anything else, say which
    nodes count: ``lk.graphs.masked(data, "test_mask")``.

    Args:
        graph: with targets ``y``, one row for each entry of the mask.
        mask: bool ``(rows,)``, or the name of such an entry of the graph.

    Returns:
        A copy whose other targets are ignored (-100), without the three masks.

    Raises:
        ShapeMismatch: if the graph has no targets or no such mask, or the mask is of another shape.
    """
    keys = keys_of(graph)
    if "y" not in keys or (isinstance(mask, str) and mask not in keys):
        raise ShapeMismatch(
            f"the graph has no {'y' if 'y' not in keys else mask!r}; its entries: {keys}. Set it, or name another one"
        )
    chosen = graph[mask] if isinstance(mask, str) else mask
    y = graph["y"]
    copied = copy.copy(graph)
    copied["y"] = kept_only(y, checked_mask(chosen, y.shape[0]))
    for name in MASKS:
        if name in keys:
            del copied[name]
    return copied


def of_role(batch: Any, role: str) -> Any:
    """A batch whose graphs have the mask of a role, ``"val_mask"`` or ``"test_mask"``, in the place of ``train_mask``.

    Sampled subgraphs stay as they are: their loader has chosen the nodes.

    Raises:
        ShapeMismatch: if a graph has a ``train_mask``, but not that one.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and is_graph(batch[0]):
        return of_role(batch[0], role), batch[1]
    if not is_graph(batch) or is_heterogeneous(batch):
        return batch
    keys = keys_of(batch)
    if "batch_size" in keys or not set(MASKS) & set(keys):
        return batch
    copied = copy.copy(batch)
    if role in keys:
        copied["train_mask"] = batch[role]
    elif "train_mask" in keys:
        raise ShapeMismatch(
            f"the graph has a train_mask and no {role}, so it does not say which nodes are meant here; pass "
            "lk.graphs.masked(data, mask)"
        )
    return copied


def check_ignored(batch: Any, targets: Any, likelihood: Any, forward: Any) -> None:
    """Raises where a likelihood would take the ignored targets of a graph ``(N, ...)`` for real ones.

    With a user's ``forward``, which marks targets by itself, nothing is looked at.

    Raises:
        IncompatiblePair: says which ``ignore_index`` to give to it.
    """
    ignores = getattr(likelihood, "ignore_index", IGNORED) == IGNORED
    if forward is not None or ignores or not isinstance(targets, Tensor):
        return
    graph = is_graph(batch) or (isinstance(batch, (tuple, list)) and len(batch) == 2 and is_graph(batch[0]))
    if graph and bool((targets == IGNORED).any()):
        raise IncompatiblePair(
            f"targets of nodes that do not count (train_mask, or the padding of smaller graphs) are {IGNORED}, and "
            f"{likelihood!r} would take them for real ones; use lk.likelihoods.{type(likelihood).__name__}"
            f"(ignore_index={IGNORED})"
        )


def kept_only(y: Tensor, mask: Tensor | None) -> Tensor:
    """Targets ``(N, ...)`` that are ignored outside of ``mask (N,)``."""
    y = y.long() if y.dtype == torch.bool else y
    if mask is None:
        return y
    kept = mask.to(y.device).reshape(-1, *[1] * (y.dim() - 1))
    return torch.where(kept, y, torch.full((), IGNORED, dtype=y.dtype, device=y.device))


def checked_mask(mask: Tensor, total: int) -> Tensor:
    """A mask ``(N,)`` of ``total`` rows as it is; raises :class:`ShapeMismatch` if it is none."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (total,):
        splits = "; it holds several splits, keep one: data.train_mask = data.train_mask[:, 0]" * (mask.dim() == 2)
        raise ShapeMismatch(
            f"a mask must be bool of shape ({total},), one entry for each target, got {mask.dtype} "
            f"{tuple(mask.shape)}{splits}"
        )
    return mask
