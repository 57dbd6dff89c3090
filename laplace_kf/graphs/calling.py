"""A model called with a graph: with its entries by name, or with the graph as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.conventions import IGNORED
from laplace_kf.errors import ShapeMismatch
from laplace_kf.graphs.form import batch_vector, is_heterogeneous, keys_of, values
from laplace_kf.graphs.masks import MASKS

__all__ = ["call"]

# further names that models give to an argument; the names of torch-geometric come first
ALIASES = {
    "x": ("h", "feat", "feats", "feature", "features", "node_features", "node_feats", "nodes"),
    "edge_index": ("ei", "edges", "edge_indices", "edge_idx", "adj", "edge_list"),
    "edge_attr": ("edge_features", "edge_feats", "ea"),
    "edge_weight": ("edge_weights", "ew"),
    "batch": ("batch_index", "batch_idx", "batch_vector", "graph_index", "graph_ids"),
}
# entries that say how a batch was made and mean something else as an argument of a model
NO_ARGUMENTS = ("batch_size", "y", *MASKS)


def call(model: nn.Module, graph: Any) -> Any:
    """What the model returns for a graph: called with its entries by name, or with the graph as a whole.

    A model whose ``forward`` names its arguments as torch-geometric does (``x, edge_index, edge_attr, batch, ...``)
    gets those; one whose only required argument has no such name (``data``) gets the graph.

    Raises:
        ShapeMismatch: if a required argument is not in the graph; names it, and the line to paste. For heterogeneous
            graphs as well.
    """
    if is_heterogeneous(graph):
        raise _heterogeneous(graph)
    keys = set(keys_of(graph)) - set(NO_ARGUMENTS)
    parameters = _parameters(model)
    if not parameters:
        raise _uncallable(model, graph, "takes *args")
    first, *rest = parameters
    whole = (_entry(first.name, keys) is None or first.name == "batch") and all(p.default is not p.empty for p in rest)
    given = {"batch": None} if batch_vector(graph) is None else {}  # of one graph, all nodes belong together
    arguments: dict[str, Any] = {}
    missing = []
    for parameter in rest if whole else parameters:
        entry = _entry(parameter.name, keys)
        if entry is not None:
            arguments[parameter.name] = graph[entry]
        elif parameter.default is parameter.empty:
            if _entry(parameter.name, {"batch"}) is not None and given:
                arguments[parameter.name] = torch.zeros(graph.num_nodes, dtype=torch.long, device=_device(graph))
            else:
                missing.append(parameter.name)
    if missing:
        raise _uncallable(model, graph, f"takes {', '.join(p.name for p in parameters)}")
    return model(graph, **arguments) if whole else model(**arguments)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The named parameters of a model's ``forward``."""
    own = getattr(getattr(model, "signature", None), "param_dict", None)  # torch_geometric.nn.Sequential
    if isinstance(own, Mapping):
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in own]
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _entry(name: str, keys: set[str]) -> str | None:
    """The graph's entry that an argument of a model stands for."""
    if name in keys:
        return name
    return next((entry for entry, others in ALIASES.items() if entry in keys and name in others), None)


def _device(graph: Any) -> torch.device | None:
    return next((v.device for v in values(graph) if isinstance(v, Tensor)), None)


def _uncallable(model: nn.Module, graph: Any, takes: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"{type(model).__name__}.forward {takes}, and the graph has {keys_of(graph)}: arguments get the entries of the "
        "same name, an only one of another name the whole graph; rename them, or pass "
        "forward=lambda model, batch: (model(batch.x, batch.edge_index)[None], batch.y[None]) where the nodes have "
        "targets, and without [None] where the graphs have"
    )


def _heterogeneous(graph: Any) -> ShapeMismatch:
    types = [str(name) for name in getattr(graph, "node_types", [])]
    target = next((name for name in types if "y" in graph[name]), types[0] if types else "...")
    return ShapeMismatch(
        f"{type(graph).__name__} is a heterogeneous graph (node types {types}), and which of its outputs have targets "
        f"has to be said: forward=lambda model, batch: (model(batch.x_dict, batch.edge_index_dict)[{target!r}][None], "
        f"batch[{target!r}].y[None]); one graph is one example then, its nodes are positions, and a target of "
        f"{IGNORED} is left out"
    )
