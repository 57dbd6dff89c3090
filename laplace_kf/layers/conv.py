"""Convolutions and transposed convolutions in one, two and three dimensions, as matrices over patches.

A convolution is ``W (R, O, I)`` applied to the patch ``a_t (R, I)`` of every output position ``t``; ``R`` is the
number of groups and ``I`` runs over (input channel of the group, kernel offsets) in the order of
``weight[o].reshape(-1)``. Padding modes other than zeros reach the function as an already padded input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, as_tuple, functions_of, register

CHANNELS_LAST = 32  # channels from which patches are gathered pixel by pixel, and turned afterwards


def patches(padded: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Patches of an already padded image.

    Args:
        padded: ``(B, channels, *size)``.
        kernel: kernel size per spatial axis; likewise ``stride`` and ``dilation``.

    Returns:
        ``(B, T, channels, prod(kernel))``, a copy; ``T`` counts output positions in row-major order.
    """
    size, channels = padded.shape[2:], padded.shape[1]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)]
    last = channels >= CHANNELS_LAST
    image = padded.movedim(1, -1).contiguous() if last else padded
    step = image.stride()
    along = step[1:-1] if last else step[2:]
    places = [s * n for s, n in zip(stride, along, strict=True)]
    offsets = [d * n for d, n in zip(dilation, along, strict=True)]
    whole = math.prod(out), math.prod(kernel)
    if last:
        shape = (len(image), *out, *kernel, channels)
        window = image.as_strided(shape, (step[0], *places, *offsets, step[-1]), image.storage_offset())
        return window.reshape(len(image), *whole, channels).transpose(-1, -2).contiguous()
    shape = (len(image), *out, channels, *kernel)
    window = image.as_strided(shape, (step[0], *places, step[1], *offsets), image.storage_offset())
    return window.reshape(len(image), whole[0], channels, whole[1])


class ConvRule(MatrixRule):
    """``F.conv1d``, ``F.conv2d``, ``F.conv3d`` with any stride, padding, dilation and groups."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - call["weight"].dim() + 1

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        if call["input"].dim() != call["weight"].dim():
            return "a convolution of one image without its batch axis"
        return None

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        groups = int(call["groups"])
        shape = (groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
        return MatrixView(shape, (0, 1, 2), shape)

    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        dims, groups = len(kernel), int(call["groups"])
        stride, dilation = as_tuple(call["stride"], dims), as_tuple(call["dilation"], dims)
        pad: list[int] = []
        for axis in reversed(range(dims)):  # F.pad lists the last axis first
            if call["padding"] == "same":
                total = dilation[axis] * (kernel[axis] - 1)
                pad += [total // 2, total - total // 2]
            else:
                width = 0 if call["padding"] == "valid" else as_tuple(call["padding"], dims)[axis]
                pad += [width, width]
        window = patches(F.pad(rows, pad).contiguous(), kernel, stride, dilation)
        return window.reshape(window.shape[0], window.shape[1], groups, -1)

    def outputs(self, rows: Tensor, call: BoundCall, groups: int) -> Tensor:
        dims = call["weight"].dim() - 2
        flat = rows.flatten(-dims).transpose(-1, -2)  # (..., B, T, channels)
        return flat.reshape(*flat.shape[:-1], groups, flat.shape[-1] // groups)


class ConvTransposeRule(ConvRule):
    """``F.conv_transpose1d`` to ``3d`` in gather form: every output position is a product with one (sparse) patch.

    The input is spread out by the stride, padded by ``dilation · (kernel − 1) − padding``, and read by a flipped
    kernel, which turns the scatter of a transposed convolution into an ordinary one.
    """

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        groups = int(call["groups"])
        split = (groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
        return MatrixView(split, (0, 2, 1, 3), (groups, split[2], split[1] * split[3]))

    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        dims, groups = len(kernel), int(call["groups"])
        stride, dilation = as_tuple(call["stride"], dims), as_tuple(call["dilation"], dims)
        padding, extra = as_tuple(call["padding"], dims), as_tuple(call["output_padding"], dims)
        size = rows.shape[2:]
        spread = rows.new_zeros(*rows.shape[:2], *((n - 1) * s + 1 for n, s in zip(size, stride, strict=True)))
        strided = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
        spread[strided] = rows
        pad: list[int] = []
        for axis in reversed(range(dims)):
            reach = dilation[axis] * (kernel[axis] - 1) - padding[axis]
            pad += [reach, reach + extra[axis]]
        window = patches(F.pad(spread, pad).contiguous(), kernel, (1,) * dims, dilation)
        window = window.unflatten(-1, tuple(kernel)).flip(*range(-dims, 0))
        return window.reshape(window.shape[0], window.shape[1], groups, -1)


_CONV: dict[str, Any] = {
    "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
}  # fmt: skip
_TRANSPOSE: dict[str, Any] = {
    "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1,
    "dilation": 1,
}  # fmt: skip

CONV = register(
    ConvRule(
        "conv",
        functions_of(*((owner, f"conv{d}d") for d in (1, 2, 3) for owner in (F, torch))),
        ("nn.Conv1d", "nn.Conv2d", "nn.Conv3d"),
        _CONV,
        (
            lambda: (nn.Conv1d(2, 3, 2, padding=1), torch.randn(4, 2, 4)),
            lambda: (nn.Conv2d(4, 4, 3, stride=2, groups=2), torch.randn(4, 4, 5, 4)),
            lambda: (nn.Conv3d(1, 2, 2, bias=False), torch.randn(4, 1, 3, 3, 2)),
        ),
    )
)
CONV_TRANSPOSE = register(
    ConvTransposeRule(
        "conv_transpose",
        functions_of(*((owner, f"conv_transpose{d}d") for d in (1, 2, 3) for owner in (F, torch))),
        ("nn.ConvTranspose1d", "nn.ConvTranspose2d", "nn.ConvTranspose3d"),
        _TRANSPOSE,
        (
            lambda: (nn.ConvTranspose1d(2, 3, 2, stride=2), torch.randn(4, 2, 3)),
            lambda: (nn.ConvTranspose2d(4, 2, 2, groups=2), torch.randn(4, 4, 2, 3)),
        ),
    )
)
