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

from laplace_kf.graphs.calling import call
from laplace_kf.graphs.form import count, cut, is_graph, mapped, read_by_rows, take, values
from laplace_kf.graphs.masks import check_ignored, masked, of_role
from laplace_kf.graphs.rows import outputs, padded, padding, targets, unpadded

__all__ = [
    "call",
    "check_ignored",
    "count",
    "cut",
    "is_graph",
    "mapped",
    "masked",
    "of_role",
    "outputs",
    "padded",
    "padding",
    "read_by_rows",
    "take",
    "targets",
    "unpadded",
    "values",
]
