"""Segmentation: segmentation-models-pytorch (images) and MONAI (volumes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]

LABELLED = 4  # positions of an example that have a target, at most; an exact fit sends a column back for each


def _dense(make: Callable[[], nn.Module], *size: int) -> Callable[[], Problem]:
    """Two classes for every pixel (or voxel), for two examples of which few positions are labelled."""

    def logits(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten(2).transpose(1, 2)

    def build() -> Problem:
        channels, *space = size
        y = torch.full((2, *space), -100)
        some = y.view(2, -1)[:, :: y[0].numel() // LABELLED + 1]
        some[:] = torch.randint(2, some.shape)
        batch = (torch.randn(2, channels, *space), y)
        return Problem(make().eval(), batch, logits=logits, counted=y.flatten(1) != -100)

    return build


def _smp(kind: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    sizes: dict[str, Any] = {"encoder_weights": None, "classes": 2, "encoder_depth": 3}
    if kind in ("Unet", "UnetPlusPlus"):
        sizes["decoder_channels"] = (8, 8, 4)
    found: nn.Module = getattr(smp, kind)("timm-mobilenetv3_small_minimal_100", **sizes)
    return found


def _monai(kind: str) -> nn.Module:
    from monai.networks import nets

    if kind == "UNet":
        return nets.UNet(3, 1, 2, channels=(4, 6), strides=(2,), num_res_units=1)
    if kind == "BasicUNet":
        return nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4), norm="batch")
    return nets.SegResNet(
        3, init_filters=4, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,), norm="batch"
    )


ROWS = [
    *(
        Row("segmentation_models_pytorch", kind, _dense(lambda kind=kind: _smp(kind), 3, 32, 32))  # type: ignore[misc]
        for kind in ("Unet", "Linknet")
    ),
    *(
        Row("monai", f"{kind}, volumes", _dense(lambda kind=kind: _monai(kind), 1, *space))  # type: ignore[misc]
        for kind, space in (("UNet", (8, 8, 8)), ("BasicUNet", (16, 16, 16)), ("SegResNet", (8, 8, 8)))
    ),
]
