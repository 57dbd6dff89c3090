"""Tabular networks: rtdl, with embeddings of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]


def _regression(make: Callable[[], nn.Module]) -> Callable[[], Problem]:
    return lambda: Problem(make().eval(), (torch.randn(16, 5), torch.randn(16, 1)), "gaussian")


def _revisited(kind: str) -> nn.Module:
    import rtdl_revisiting_models as rtdl

    if kind == "MLP":
        return rtdl.MLP(d_in=5, d_out=1, n_blocks=2, d_block=8, dropout=0.1)
    if kind == "ResNet":
        sizes: dict[str, Any] = {"d_block": 8, "d_hidden": None, "d_hidden_multiplier": 2.0}
        return rtdl.ResNet(d_in=5, d_out=1, n_blocks=2, dropout1=0.1, dropout2=0.0, **sizes)
    return _Tokens()


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import rtdl_revisiting_models as rtdl

        options = {**rtdl.FTTransformer.get_default_kwargs(n_blocks=1), "d_block": 8, "attention_n_heads": 2}
        self.net = rtdl.FTTransformer(n_cont_features=5, cat_cardinalities=[], d_out=1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x, None)
        return out


def _embedded(kind: str) -> nn.Module:
    import rtdl_num_embeddings as numbers

    if kind == "periodic":
        first: nn.Module = numbers.PeriodicEmbeddings(5, 4, lite=False)
    elif kind == "periodic, lite":
        first = numbers.PeriodicEmbeddings(5, 4, lite=True)
    elif kind == "linear and ReLU":
        first = numbers.LinearReLUEmbeddings(5, 4)
    else:
        bins = numbers.compute_bins(torch.randn(50, 5), n_bins=4)
        first = numbers.PiecewiseLinearEmbeddings(bins, 4, activation=False, version="B")
    return nn.Sequential(first, nn.Flatten(), nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 1))


_KINDS = ("periodic", "periodic, lite", "linear and ReLU", "piecewise linear")
ROWS = [
    *(
        Row("rtdl_revisiting_models", name, _regression(lambda name=name: _revisited(name)))  # type: ignore[misc]
        for name in ("MLP", "ResNet", "FT-Transformer")
    ),
    *(
        Row("rtdl_num_embeddings", f"numbers embedded: {kind}", _regression(lambda kind=kind: _embedded(kind)))  # type: ignore[misc]
        for kind in _KINDS
    ),
]
