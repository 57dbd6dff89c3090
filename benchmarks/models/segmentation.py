"""Segmentation: segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]


def _dense(make: Callable[[], nn.Module], *size: int) -> Callable[[], Problem]:
    """Two classes for every pixel, for two examples of which few positions are labelled."""

    def logits(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten(2).transpose(1, 2)

    def build() -> Problem:
        channels, *space = size
        y = torch.full((2, *space), -100)
        y.view(2, -1)[:, ::37] = torch.randint(2, y.view(2, -1)[:, ::37].shape)
        batch = (torch.randn(2, channels, *space), y)
        return Problem(make().eval(), batch, logits=logits, counted=y.flatten(1) != -100)

    return build


def _unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    sizes: dict[str, Any] = {"encoder_weights": None, "classes": 2, "encoder_depth": 3, "decoder_channels": (8, 8, 4)}
    found: nn.Module = smp.Unet("timm-mobilenetv3_small_minimal_100", **sizes)
    return found


ROWS = [Row("segmentation_models_pytorch", "Unet", _dense(_unet, 3, 32, 32))]
