"""torch-geometric: nodes or whole graphs are classified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]


def _batch(pooled: bool) -> Any:
    from torch_geometric.data import Batch, Data

    found = []
    for nodes in (3, 4, 5):
        path = torch.arange(nodes)
        edges = torch.stack([path, path.roll(1)])
        y = torch.randint(3, (1,) if pooled else (nodes,))
        found.append(Data(x=torch.randn(nodes, 4), edge_index=torch.cat([edges, edges.flip(0)], 1), y=y))
    return Batch.from_data_list(found)


class _Net(nn.Module):
    def __init__(self, kind: str, pooled: bool) -> None:
        super().__init__()
        import torch_geometric.nn as gnn

        options: dict[str, Any] = {"heads": 2} if kind == "GAT" else {}
        self.net = getattr(gnn, kind)(4, 6, num_layers=2, out_channels=6 if pooled else 3, **options)
        self.head = nn.Linear(6, 3) if pooled else None

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.net(x, edge_index)
        return x if self.head is None else self.head(global_mean_pool(x, batch))


def _problem(kind: str, pooled: bool) -> Callable[[], Problem]:
    def make() -> Problem:
        def logits(model: nn.Module, batch: Any) -> Tensor:
            z: Tensor = model(batch.x, batch.edge_index, batch.batch)
            return z[None]

        model, batch = _Net(kind, pooled).eval(), _batch(pooled)
        return Problem(model, batch, logits=logits, cut=lambda b, n: type(b).from_data_list([b.get_example(n)]))

    return make


ROWS = [
    *(Row("torch_geometric", f"{kind}, nodes", _problem(kind, False)) for kind in ("GCN", "GAT", "GraphSAGE", "GIN")),
    *(Row("torch_geometric", f"{kind}, whole graphs", _problem(kind, True)) for kind in ("GCN", "GAT", "GIN")),
]
