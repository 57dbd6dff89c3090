"""What a graph offers, what it holds, and how a batch of graphs is cut into examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import UnsupportedLayer

__all__ = ["batch_vector", "count", "cut", "is_graph", "is_heterogeneous", "keys_of", "mapped", "take", "values"]


def is_graph(value: Any) -> bool:
    """Whether a value is a graph, or several in one, in torch-geometric's form (heterogeneous ones included)."""
    kind = type(value)
    if isinstance(value, (Tensor, Mapping, tuple, list, str, nn.Module)):
        return False
    return all(hasattr(kind, name) for name in ("num_nodes", "keys", "__getitem__", "__setitem__"))


def read_by_rows(batch: Any, forward: Any) -> bool:
    """Whether the outputs of a batch are ``(N, T, C)`` because it is a graph that no user's ``forward`` read."""
    graph = is_graph(batch) or (isinstance(batch, (tuple, list)) and len(batch) == 2 and is_graph(batch[0]))
    return graph and forward is None


def is_heterogeneous(graph: Any) -> bool:
    """Whether a graph has nodes of several types, each with its own tensors."""
    return hasattr(type(graph), "node_types") or hasattr(type(graph), "edge_types")


def keys_of(graph: Any) -> list[str]:
    """Names of what a graph holds."""
    keys = graph.keys
    return sorted(map(str, keys() if callable(keys) else keys))


def _stores(graph: Any) -> list[Any]:
    """The mappings that hold a graph's tensors: itself, or one for every type of node and edge."""
    return list(graph.stores) if is_heterogeneous(graph) else [graph]


def values(graph: Any) -> Iterator[Any]:
    """What a graph holds, in order."""
    for store in _stores(graph):
        keys = store.keys() if callable(store.keys) else store.keys
        for key in list(keys):
            yield store[key]


def mapped(graph: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a graph with everything it holds changed."""
    copied = copy.copy(graph)
    for store in _stores(copied):
        keys = store.keys() if callable(store.keys) else store.keys
        for key in list(keys):
            store[key] = change(store[key])
    return copied


def count(graph: Any) -> int:
    """Number of examples: of graphs in a batch of them, otherwise 1."""
    vector = batch_vector(graph)
    if hasattr(graph, "get_example") or vector is not None:
        with_number = getattr(graph, "num_graphs", None)
        if with_number is not None:
            return int(with_number)
        return int(vector.max()) + 1 if vector is not None and vector.numel() else 1
    return 1


def batch_vector(graph: Any) -> Tensor | None:
    """The graph of every node ``(N,)``, where there are several in one."""
    if is_heterogeneous(graph) or "batch" not in keys_of(graph):
        return None
    vector = graph["batch"]
    return vector if isinstance(vector, Tensor) and vector.dim() == 1 else None


def cut(graph: Any, examples: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The part of a batch that belongs to some of its ``examples``.

    Args:
        graph: several graphs in one, or one graph.
        examples: their number ``N``.
        change: picks the rows of those that are wanted: ``(N, ...)`` to ``(M, ...)``.

    Raises:
        UnsupportedLayer: if the graphs are not the examples; says what to do.
    """
    graphs = count(graph)
    if examples == graphs and not is_heterogeneous(graph):
        return take(graph, change(torch.arange(examples)))
    if examples == 1:
        if change(torch.arange(1)).tolist() == [0]:
            return graph
        raise UnsupportedLayer("a graph that is the only example of its minibatch cannot be cut into others")
    what = f"a batch of {graphs} graphs" if graphs > 1 else "one graph"
    raise UnsupportedLayer(
        f"forward= gives outputs with {examples} rows for {what}, and some parameters need the outputs of one example "
        "alone. A node's output depends on its neighbours, so nodes are no examples: make the graph the example and "
        "its nodes positions, by leaving forward= out, or with "
        "forward=lambda model, batch: (model(batch.x, batch.edge_index)[None], batch.y[None])"
    )


def take(graph: Any, chosen: Tensor) -> Any:
    """A batch of some of the graphs ``chosen (M,)`` of a batch, in that order.

    Raises:
        UnsupportedLayer: if single graphs cannot be cut out; says why.
    """
    numbers = [int(n) for n in chosen.tolist()]
    if numbers == list(range(count(graph))):
        return graph
    kind = type(graph)
    single, join = getattr(graph, "get_example", None), getattr(kind, "from_data_list", None)
    if single is None or join is None:
        raise UnsupportedLayer(
            f"some parameters need single graphs, and this {kind.__name__} cannot give them: it has no get_example; "
            "make batches with torch_geometric.loader.DataLoader (Batch.from_data_list), or pass one graph at a time"
        )
    try:
        return join([single(n) for n in numbers])
    except (RuntimeError, KeyError) as error:
        raise UnsupportedLayer(
            f"some parameters need single graphs, and get_example of this {kind.__name__} fails: {error}. Make batches "
            "with torch_geometric.loader.DataLoader (Batch.from_data_list), add attributes before that, or pass one "
            "graph at a time (batch_size=1)"
        ) from error
