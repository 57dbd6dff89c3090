"""Graphs in torch-geometric's form: a graph is an example, its nodes (edges, labelled pairs) are positions.

``Data`` and ``Batch`` are known by what they offer, so torch-geometric need not be installed: attributes by name
(``keys()``, ``graph["x"]``), ``num_nodes``, and of several graphs in one (``Batch``) ``num_graphs``, ``batch`` (the
graph of every node) and ``get_example(n)``.

What the model's outputs are is read from their number of rows:

* one row a graph (after a pooling): outputs ``(N, C)``, targets ``y (N,)`` or ``(N, C)``;
* one row a node: ``(N, T, C)`` with the targets ``(N, T)``; shorter graphs of a batch are padded, with ignored targets.
  Nodes outside ``train_mask`` have ignored targets, too;
* a sampled subgraph (``NeighborLoader``): its first ``batch_size`` nodes, ``(1, batch_size, C)``;
* one row a labelled pair (``edge_label``) or an edge: ``(1, T, C)``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.conventions import IGNORED
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnsupportedLayer
from laplace_kf.ragged import Ragged

__all__ = ["call", "is_graph", "masked", "padded", "unpadded"]

MASKS = ("train_mask", "val_mask", "test_mask")
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


def _keys(graph: Any) -> list[str]:
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
    vector = _batch_vector(graph)
    if hasattr(graph, "get_example") or vector is not None:
        with_number = getattr(graph, "num_graphs", None)
        if with_number is not None:
            return int(with_number)
        return int(vector.max()) + 1 if vector is not None and vector.numel() else 1
    return 1


def _batch_vector(graph: Any) -> Tensor | None:
    """The graph of every node ``(nodes,)``, where there are several in one."""
    if is_heterogeneous(graph) or "batch" not in _keys(graph):
        return None
    vector = graph["batch"]
    return vector if isinstance(vector, Tensor) and vector.dim() == 1 else None


def cut(graph: Any, examples: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The part of a batch that belongs to some of its ``examples``, those that ``change`` picks of a tensor's rows.

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


# ------------------------------------------------------------------------------------------------ calling the model


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
    keys = set(_keys(graph)) - set(NO_ARGUMENTS)
    parameters = _parameters(model)
    if not parameters:
        raise _uncallable(model, graph, "takes *args")
    first, *rest = parameters
    whole = (_entry(first.name, keys) is None or first.name == "batch") and all(p.default is not p.empty for p in rest)
    given = {"batch": None} if _batch_vector(graph) is None else {}  # of one graph, all nodes belong together
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
        f"{type(model).__name__}.forward {takes}, and the graph has {_keys(graph)}: arguments get the entries of the "
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


# ------------------------------------------------------------------------------------------------ outputs and targets


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
    graphs, keys = count(graph), set(_keys(graph))
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
    vector = _batch_vector(graph)
    if found != "node" or vector is None:
        raise ShapeMismatch(
            f"the model gives one row {'an edge' if found == 'edge' else f'a {found}'} for a batch of {graphs} graphs; "
            "pass one graph at a time (batch_size=1)"
        )
    return _Rows(found, rows, rows, Ragged.of(vector, graphs))


def _sizes(graph: Any) -> tuple[int, int | None, int | None]:
    """Numbers of nodes, edges and labelled pairs."""
    keys = _keys(graph)
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
    y = given if given is not None else graph[name] if name in _keys(graph) else None
    if not isinstance(y, Tensor):
        raise ShapeMismatch(
            f"the graph has no targets {name!r} (its entries: {_keys(graph)}); set graph.{name}, or pass "
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
    y = _kept_only(y, _mask_of(graph, found))
    return y[: found.counted][None] if found.ragged is None else found.ragged.padded(y, fill=IGNORED)


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


def _kept_only(y: Tensor, mask: Tensor | None) -> Tensor:
    """Targets ``(rows, ...)`` that are ignored outside of ``mask (rows,)``."""
    y = y.long() if y.dtype == torch.bool else y
    if mask is None:
        return y
    kept = mask.to(y.device).reshape(-1, *[1] * (y.dim() - 1))
    return torch.where(kept, y, torch.full((), IGNORED, dtype=y.dtype, device=y.device))


def _mask_of(graph: Any, rows: _Rows) -> Tensor | None:
    """``train_mask``, where the targets have one.

    Raises:
        ShapeMismatch: if it is of another shape, or contradicts the nodes that a loader sampled for.
    """
    if "train_mask" not in _keys(graph):
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
    return _checked(mask, rows.total) if mask.shape[:1] == (rows.total,) or rows.level == "node" else None


def _checked(mask: Tensor, total: int) -> Tensor:
    if mask.dtype != torch.bool or tuple(mask.shape) != (total,):
        splits = "; it holds several splits, keep one: data.train_mask = data.train_mask[:, 0]" * (mask.dim() == 2)
        raise ShapeMismatch(
            f"a mask must be bool of shape ({total},), one entry for each target, got {mask.dtype} "
            f"{tuple(mask.shape)}{splits}"
        )
    return mask


# ------------------------------------------------------------------------------------------------ for users


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
    keys = _keys(graph)
    if "y" not in keys or (isinstance(mask, str) and mask not in keys):
        raise ShapeMismatch(f"the graph has no {'y' if 'y' not in keys else mask!r}; its entries: {keys}")
    chosen = graph[mask] if isinstance(mask, str) else mask
    y = graph["y"]
    copied = copy.copy(graph)
    copied["y"] = _kept_only(y, _checked(chosen, y.shape[0]))
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
    keys = _keys(batch)
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
    vector = _batch_vector(batch)
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
    graphs, vector = count(batch), _batch_vector(batch)
    if graphs == 1 or vector is None or shape[0] != graphs:
        return None
    ragged = Ragged.of(vector, graphs)
    return None if ragged.longest != shape[1] or bool(ragged.kept.all()) else ragged.kept
