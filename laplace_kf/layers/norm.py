"""Normalisation layers: an elementwise scale and shift of a parameter-free normalised input (methods 4.6).

Per-example gradients are ``Σ_t g_t ∘ x̂_t`` for the scale and ``Σ_t g_t`` for the shift.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.layers.base import AffineRule, BoundCall, functions_of, register


class LayerNormRule(AffineRule):
    """``F.layer_norm`` and ``F.rms_norm``: every entry of the normalised shape has its own scale and shift."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - len(call["normalized_shape"])

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        return F.layer_norm(rows, call["normalized_shape"], eps=call["eps"]).flatten(1)[:, :, None]

    def outputs(self, rows: Tensor, call: BoundCall) -> Tensor:
        return rows.flatten(-len(call["normalized_shape"]))[..., None]


class RMSNormRule(LayerNormRule):
    """Root-mean-square normalisation: as layer normalisation without centring and shift."""

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        return F.rms_norm(rows, call["normalized_shape"], eps=call["eps"]).flatten(1)[:, :, None]


class ChannelNormRule(AffineRule):
    """Shared by batch and group normalisation: one scale and shift per channel (axis 1)."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return 1

    def outputs(self, rows: Tensor, call: BoundCall) -> Tensor:
        channels = rows.shape[-(call["input"].dim() - 1) :][0]
        return rows.reshape(*rows.shape[: rows.dim() - call["input"].dim() + 1], channels, -1)


class BatchNormRule(ChannelNormRule):
    """``F.batch_norm`` in eval mode: running statistics, so that examples stay independent."""

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        if call["training"] or call["running_mean"] is None:
            return "batch normalisation over the minibatch, which ties examples together (use running statistics)"
        return None

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        shape = (1, -1) + (1,) * (rows.dim() - 2)
        centred = rows - call["running_mean"].view(shape)
        scaled = centred / torch.sqrt(call["running_var"].view(shape) + call["eps"])
        return scaled.flatten(2) if scaled.dim() > 2 else scaled[:, :, None]


class GroupNormRule(ChannelNormRule):
    """``F.group_norm``."""

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        normal = F.group_norm(rows, call["num_groups"], eps=call["eps"])
        return normal.reshape(*normal.shape[:2], math.prod(normal.shape[2:]))


LAYER_NORM = register(
    LayerNormRule(
        "layer_norm",
        (F.layer_norm,),
        ("nn.LayerNorm",),
        {"input": None, "normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5},
        (lambda: (nn.LayerNorm(3), torch.randn(5, 2, 3)),),
    )
)
if hasattr(F, "rms_norm"):
    RMS_NORM = register(
        RMSNormRule(
            "rms_norm",
            functions_of((F, "rms_norm"), (torch, "rms_norm")),
            ("nn.RMSNorm",),
            {"input": None, "normalized_shape": None, "weight": None, "eps": None},
            (lambda: (nn.RMSNorm(3), torch.randn(5, 3)),),
        )
    )
BATCH_NORM = register(
    BatchNormRule(
        "batch_norm",
        (F.batch_norm,),
        ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"),
        {
            "input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None,
            "training": False, "momentum": 0.1, "eps": 1e-5,
        },
        (lambda: (nn.BatchNorm1d(3), torch.randn(5, 3)), lambda: (nn.BatchNorm2d(2), torch.randn(5, 2, 3, 2))),
    )
)  # fmt: skip
GROUP_NORM = register(
    GroupNormRule(
        "group_norm",
        (F.group_norm,),
        ("nn.GroupNorm",),
        {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5},
        (lambda: (nn.GroupNorm(2, 4), torch.randn(5, 4, 2)),),
    )
)
