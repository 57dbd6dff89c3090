"""What the rows of a model's outputs for a graph are, and the targets that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.conventions import IGNORED
from laplace_kf.errors import ShapeMismatch
from laplace_kf.graphs.form import batch_vector, count, is_graph, is_heterogeneous, keys_of
from laplace_kf.graphs.masks import checked_mask, kept_only
from laplace_kf.ragged import Ragged

__all__ = ["outputs", "padded", "padding", "targets", "unpadded"]


@dataclass(frozen=True)
class _Rows:
    """What the rows of a model's outputs are.

    Attributes:
        level: ``"graph"``, ``"node"``, ``"pair"`` or ``"edge"``.
        total: rows of the targets.
        counted: first rows that count.
        ragged: of the nodes of several graphs, how they are padded.
    """

    level: str
    total: int
    counted: int
    ragged: Ragged | None = None


def _rows(graph: Any, rows: int) -> _Rows:
    graphs, keys = count(graph), set(keys_of(graph))
    nodes, edges, pairs = _sizes(graph)
    sampled = int(graph["batch_size"]) if "batch_size" in keys and graphs == 1 else None
    if sampled is not None and rows in (nodes, sampled):
        return _Rows("node", nodes, sampled)
    if rows == graphs:
        return _Rows("graph", graphs, graphs)
    if pairs is not None and pairs in (nodes, edges) and rows == pairs:
        raise ShapeMismatch(
            f"the model gives {rows} rows, and the graph has as many labelled pairs (edge_label) as nodes or edges: "
            "say which are meant with forward=lambda model, batch: (model(...)[None], batch.edge_label[None])"
        )
    found = "pair" if rows == pairs else "node" if rows == nodes else "edge" if rows == edges else None
    if found is None:
        raise ShapeMismatch(
            f"the model gives {rows} rows for {graphs} graph{'s' * (graphs > 1)} with {nodes} nodes"
            f"{'' if edges is None else f' and {edges} edges'}; it must give one row a graph, a node, an edge or an "
            "edge_label, or pass forward=lambda model, batch: (outputs, targets) with one example a graph"
        )
    if graphs == 1:
        return _Rows(found, rows, rows)
    vector = batch_vector(graph)
    if found != "node" or vector is None:
        raise ShapeMismatch(
            f"the model gives one row {'an edge' if found == 'edge' else f'a {found}'} for a batch of {graphs} graphs; "
            "pass one graph at a time (batch_size=1)"
        )
    return _Rows(found, rows, rows, Ragged.of(vector, graphs))


def _sizes(graph: Any) -> tuple[int, int | None, int | None]:
    """Numbers of nodes, edges and labelled pairs."""
    keys = keys_of(graph)
    edges = graph["edge_index"].shape[1] if "edge_index" in keys else None
    return int(graph.num_nodes), edges, graph["edge_label"].shape[0] if "edge_label" in keys else None


def outputs(graph: Any, raw: Tensor) -> Tensor:
    """The model's outputs ``(rows, C)`` for a graph with the examples first: ``(N, C)`` or ``(N, T, C)``.

    Raises:
        ShapeMismatch: if the rows are neither graphs nor nodes nor pairs nor edges.
    """
    if raw.dim() < 2:
        raise ShapeMismatch(
            f"the model's outputs for a graph have shape {tuple(raw.shape)}; they must be (rows, C). Keep the output "
            "axis (no squeeze), or reshape in forward="
        )
    found = _rows(graph, raw.shape[0])
    if found.level == "graph":
        return raw
    if raw.dim() != 2:
        raise ShapeMismatch(
            f"the model's outputs for the {found.level}s of a graph have shape {tuple(raw.shape)}; they must be "
            "(rows, C): flatten the rest in forward="
        )
    return raw[: found.counted][None] if found.ragged is None else found.ragged.padded(raw)


def targets(graph: Any, raw: Tensor, given: Any = None) -> Any:
    """The targets that belong to a model's outputs ``raw (rows, C)``: ``(N, ...)``, or ``(N, T, ...)``.

    Args:
        graph: with its targets under ``y`` (of labelled pairs, ``edge_label``).
        raw: the outputs as the model gives them.
        given: targets, where they are not in the graph.

    Raises:
        ShapeMismatch: if there are none, or they do not fit.
    """
    found = _rows(graph, raw.shape[0])
    name = "edge_label" if found.level == "pair" else "y"
    y = given if given is not None else graph[name] if name in keys_of(graph) else None
    if not isinstance(y, Tensor):
        raise ShapeMismatch(
            f"the graph has no targets {name!r} (its entries: {keys_of(graph)}); set graph.{name}, or pass "
            "forward=lambda model, batch: (outputs, targets)"
        )
    if y.dim() == 0 or (found.level == "graph" and found.total == 1 and y.shape[0] != 1):
        y = y[None]
    integer = not (y.is_floating_point() or y.is_complex())
    if integer and y.dim() == 2 and y.shape[1] == 1 and raw.shape[-1] > 1:
        y = y[:, 0]
    if y.shape[0] != found.total:
        raise ShapeMismatch(
            f"the model gives {raw.shape[0]} rows, one a {found.level}, and the targets have shape {tuple(y.shape)}; "
            f"{found.total} rows are needed. Where the targets belong to something else, pass "
            "forward=lambda model, batch: (outputs, targets)"
        )
    if found.level == "graph":
        return y
    y = kept_only(y, _mask_of(graph, found))
    return y[: found.counted][None] if found.ragged is None else found.ragged.padded(y, fill=IGNORED)


def _mask_of(graph: Any, rows: _Rows) -> Tensor | None:
    """``train_mask``, where the targets have one.

    Raises:
        ShapeMismatch: if it is of another shape, or contradicts the nodes that a loader sampled for.
    """
    if "train_mask" not in keys_of(graph):
        return None
    mask = graph["train_mask"]
    if rows.counted != rows.total:  # the loader has chosen the nodes
        seeds = mask[: rows.counted]
        if mask.dim() == 1 and bool(seeds.any()) and not bool(seeds.all()):
            raise ShapeMismatch(
                "of the nodes for which the loader sampled neighbours, some are in train_mask and some are not; pass "
                "input_nodes=data.train_mask to the loader, or delete train_mask from the data"
            )
        return None
    return checked_mask(mask, rows.total) if mask.shape[:1] == (rows.total,) or rows.level == "node" else None


def padded(values: Tensor, batch: Any, fill: float = 0) -> Tensor:
    """One row a node ``(nodes, ...)`` as predictions have them: ``(N, T, ...)``, T nodes of the largest graph.

    Raises:
        ShapeMismatch: if there is not one row a node.
    """
    found = _rows(batch, values.shape[0])
    if found.level != "node":
        raise ShapeMismatch(f"expected one row for each of the {batch.num_nodes} nodes, got {tuple(values.shape)}")
    return values[: found.counted][None] if found.ragged is None else found.ragged.padded(values, fill=fill)


def unpadded(values: Tensor, batch: Any) -> Tensor:
    """The inverse of :func:`padded`, for what a prediction has by node: ``(N, T, ...)`` to ``(nodes, ...)``.

    Of a sampled subgraph, the nodes that were sampled for.

    Raises:
        ShapeMismatch: if the values are no such.
    """
    graphs = count(batch)
    vector = batch_vector(batch)
    if graphs == 1 or vector is None:
        return values.flatten(0, 1)
    ragged = Ragged.of(vector, graphs)
    if tuple(values.shape[:2]) != (graphs, ragged.longest):
        raise ShapeMismatch(f"expected ({graphs}, {ragged.longest}, ...), one row a node, got {tuple(values.shape)}")
    return ragged.flat(values)


def padding(batch: Any, shape: torch.Size) -> Tensor | None:
    """Which positions of outputs ``(N, T, C)`` of several graphs are nodes, bool ``(N, T)``; ``None`` if all are."""
    if not is_graph(batch) or is_heterogeneous(batch) or len(shape) < 2:
        return None
    graphs, vector = count(batch), batch_vector(batch)
    if graphs == 1 or vector is None or shape[0] != graphs:
        return None
    ragged = Ragged.of(vector, graphs)
    return None if ragged.longest != shape[1] or bool(ragged.kept.all()) else ragged.kept
