"""What torch-geometric's ``Data`` and ``Batch`` offer, in a few lines, so that the tests need not install it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COUNTED = ("edge_index", "edge_label_index")  # entries that hold numbers of nodes, with the pairs along axis 1


class Graph:
    """One graph: entries by name, as attributes and as items."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__["entries"] = dict(entries)

    def keys(self) -> list[str]:
        return list(self.entries)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "entries" or name not in self.entries:
            raise AttributeError(name)
        return self.entries[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.entries[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Any:
        return iter(self.entries.items())

    def __copy__(self) -> Graph:
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        other.__dict__["entries"] = dict(self.entries)
        return other

    @property
    def num_nodes(self) -> int:
        return int(self.entries["x"].shape[0])


class Graphs(Graph):
    """Several graphs in one, with the graph of every node under ``batch``."""

    cuts = 0  # how often a graph was cut out, over all objects

    @classmethod
    def from_data_list(cls, graphs: Sequence[Graph]) -> Graphs:
        starts = torch.tensor([0, *(g.num_nodes for g in graphs)]).cumsum(0)
        entries: dict[str, Any] = {}
        for name in graphs[0].entries:
            parts = [g[name] + starts[k] if name in COUNTED else g[name] for k, g in enumerate(graphs)]
            entries[name] = torch.cat(parts, 1 if name in COUNTED else 0)
        sizes = torch.tensor([g.num_nodes for g in graphs])
        entries.update(batch=torch.arange(len(graphs)).repeat_interleave(sizes), ptr=starts)
        made = cls(**entries)
        made.__dict__["lengths"] = {
            name: [g[name].shape[1 if name in COUNTED else 0] for g in graphs] for name in graphs[0].entries
        }
        return made

    @property
    def num_graphs(self) -> int:
        return int(self.entries["ptr"].shape[0]) - 1

    def get_example(self, n: int) -> Graph:
        Graphs.cuts += 1
        found: dict[str, Tensor] = {}
        for name, lengths in self.__dict__["lengths"].items():
            axis = 1 if name in COUNTED else 0
            found[name] = self[name].narrow(axis, sum(lengths[:n]), lengths[n])
            if name in COUNTED:
                found[name] = found[name] - self["ptr"][n]
        return Graph(**found)


class Loader:
    """Batches of graphs, in order; can be gone through any number of times."""

    def __init__(self, graphs: Sequence[Graph], batch_size: int) -> None:
        self.graphs, self.batch_size = list(graphs), batch_size

    def __iter__(self) -> Any:
        for start in range(0, len(self.graphs), self.batch_size):
            yield Graphs.from_data_list(self.graphs[start : start + self.batch_size])


class Heterogeneous(Graph):
    """Nodes of two types; only as much as a refusal looks at."""

    node_types = ("author", "paper")
    edge_types = ()

    @property
    def stores(self) -> list[dict[str, Any]]:
        return list(self.entries.values())
