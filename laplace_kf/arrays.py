"""Arrays of other libraries, and tensors with notes: what becomes of them at the door."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laplace_kf.errors import InvalidArgument, InvalidType

__all__ = ["is_annotated", "is_array", "own_copy", "require_numbers", "tensor_of"]

NUMBERS = "biufc"  # kinds of numpy types


def is_array(value: Any) -> bool:
    """Whether something is an array of numbers that is no tensor (numpy, pandas, jax, ...)."""
    return not isinstance(value, Tensor) and hasattr(value, "__array__") and not isinstance(value, type)


def require_numbers(what: str, value: Any) -> None:
    """Refuses an array of text, of dates or of Python objects, of any shape.

    Raises:
        InvalidType: for those; says how they become numbers.
    """
    if not is_array(value) or (kind := np.asarray(value).dtype).kind in NUMBERS:
        return
    raise InvalidType(
        f"{what} are an array of {kind}, and numbers are needed: labels become indices with "
        "np.unique(y, return_inverse=True)[1], and columns of mixed types numbers with x.astype(float)"
    )


def is_annotated(leaf: Any) -> bool:
    """Whether something is a tensor of a subclass that only carries notes along."""
    plain = type(leaf) in (Tensor, nn.Parameter) or not isinstance(leaf, Tensor)
    return not plain and type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__


def tensor_of(dtype: torch.dtype | None, leaf: Any) -> Any:
    """A tensor of the same shape for an array of numbers, of ``dtype`` where it is floating; else what it is."""
    if not is_array(leaf):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.count_masked(leaf):
        raise InvalidArgument(
            f"a masked array of shape {leaf.shape} has {np.ma.count_masked(leaf)} masked entries, whose numbers mean "
            "nothing; fill them: array.filled(0.0), or array.filled(float('nan')) for missing targets of a regression"
        )
    array = np.asarray(leaf)
    if array.dtype.kind not in NUMBERS:
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


def own_copy(leaf: Any) -> Any:
    """A copy of an object in a batch that a model may write into (a cache); itself, of what it may not."""
    if leaf is None or isinstance(leaf, (str, bytes, int, float, complex, nn.Module)) or callable(leaf):
        return leaf
    with suppress(Exception):  # of what cannot be copied there is only one
        return copy.deepcopy(leaf)
    return leaf
