"""Arrays of other libraries, and tensors with notes: what becomes of them at the door."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["is_annotated", "is_array", "tensor_of"]


def is_array(value: Any) -> bool:
    """Whether something is an array of numbers that is no tensor (numpy, pandas, jax, ...)."""
    return not isinstance(value, Tensor) and hasattr(value, "__array__") and not isinstance(value, type)


def is_annotated(leaf: Any) -> bool:
    """Whether something is a tensor of a subclass that only carries notes along."""
    plain = type(leaf) in (Tensor, nn.Parameter) or not isinstance(leaf, Tensor)
    return not plain and type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__


def tensor_of(dtype: torch.dtype | None, leaf: Any) -> Any:
    """A tensor of the same shape for an array of numbers, of ``dtype`` where it is floating; else what it is."""
    if not is_array(leaf):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufc":
        return leaf
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(
        array.dtype.newbyteorder("="), copy=not array.flags.writeable or min(array.strides, default=0) < 0
    )
    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
