"""Networks over graphs in plain torch, and dense references by one graph and one output after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graphs.doubles import Graph, Graphs, Loader

I, C = 4, 3
SIZES = (4, 6, 3, 5, 3)


class Library:
    """One graph, a batch of graphs and a loader, of the double or of torch-geometric."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "double":
            self.graph: Any = Graph
            self.batch: Any = Graphs
        else:
            data = pytest.importorskip("torch_geometric.data")
            self.graph, self.batch = data.Data, data.Batch

    def loader(self, graphs: Sequence[Any], batch_size: int) -> Any:
        if self.name == "double":
            return Loader(graphs, batch_size)
        return pytest.importorskip("torch_geometric.loader").DataLoader(graphs, batch_size=batch_size)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(high: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randint(high, tuple(shape), generator=torch.Generator().manual_seed(seed))


def one(kind: Library, nodes: int = 7, seed: int = 0, **more: Any) -> Any:
    """A graph whose nodes have classes."""
    edges = randint(nodes, (2, 2 * nodes), seed)
    entries = {"x": randn(nodes, I, seed=seed), "edge_index": edges, "y": randint(C, (nodes,), seed + 1)}
    return kind.graph(**{**entries, **more})


def several(kind: Library, level: str = "graph") -> list[Any]:
    """Graphs of different sizes; they, or their nodes, have classes."""
    found = [one(kind, nodes, seed) for seed, nodes in enumerate(SIZES)]
    if level == "graph":
        for k, graph in enumerate(found):
            graph["y"] = torch.tensor([k % C])
    return found


class Nodes(nn.Module):
    """Two rounds of messages; an output for every node."""

    def __init__(self, act: Any = torch.tanh, out: int = C) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(I, 5), nn.Linear(5, out), act

    def messages(self, h: Tensor, edge_index: Tensor) -> Tensor:
        return h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]) / 2

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.act(self.messages(self.first(x), edge_index))
        return self.messages(self.second(h), edge_index)


class Pooled(Nodes):
    """An output for every graph: the mean over its nodes."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:  # type: ignore[override]
        h = self.messages(self.act(self.messages(self.first(x), edge_index)), edge_index)
        count = int(batch.max()) + 1
        total = h.new_zeros(count, h.shape[1]).index_add(0, batch, h)
        return self.second(total / torch.bincount(batch, minlength=count)[:, None])


def net(kind: Any = Nodes, **settings: Any) -> Any:
    torch.manual_seed(3)
    return kind(**settings).double().eval()


def arguments(model: nn.Module, graph: Any) -> tuple[Tensor, ...]:
    pooled = isinstance(model, Pooled)
    return (graph["x"], graph["edge_index"], *([torch.zeros(graph.num_nodes, dtype=torch.long)] if pooled else []))


def jacobian(model: nn.Module, graph: Any) -> tuple[Tensor, Tensor]:
    """Outputs ``(rows, C)`` of one graph and their Jacobian ``(rows, C, P)``."""
    weights = list(model.parameters())
    z = model(*arguments(model, graph))

    def gradients(entry: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(entry, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]

    rows = [torch.cat([part.reshape(-1) for part in gradients(entry)]) for entry in z.reshape(-1)]
    return z.detach(), torch.stack(rows).reshape(*z.shape, -1)


def softmax_hessian(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def ggn(model: nn.Module, graphs: Sequence[Any], kept: Sequence[Tensor] | None = None) -> Tensor:
    """``Σ_graphs Σ_rows Jᵀ H J`` over the rows that count, ``(P, P)``."""
    total: Tensor | float = 0.0
    for k, graph in enumerate(graphs):
        z, j = jacobian(model, graph)
        rows = torch.ones(len(z), dtype=torch.bool) if kept is None else kept[k]
        total = total + torch.einsum("nap,nab,nbq->pq", j[rows], softmax_hessian(z)[rows], j[rows])
    assert isinstance(total, Tensor)
    return total
