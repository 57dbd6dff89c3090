"""Functions that pick or order rows by numbers that the data hold: sorting by length, experts, packed sequences.

After one of them, how the examples lie in the rows of a layer can differ from minibatch to minibatch, even where the
number of rows is the same, so that it has to be measured each time (:mod:`laplace_kf.tape.rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.layers.base import functions_of

__all__ = ["NUMBERS", "picks_rows"]

_BOTH = (
    "index_select gather take take_along_dim masked_select index_add index_add_ index_copy index_copy_ index_put "
    "index_put_ scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ masked_scatter "
    "masked_scatter_ sort topk _pack_padded_sequence"
)
_PICKS = set(functions_of(*((owner, name) for name in _BOTH.split() for owner in (torch, Tensor))))
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
# numbers that leave the tensors may steer plain Python
NUMBERS = set(functions_of(*((Tensor, name) for name in ("item", "tolist", "numpy", "__int__", "__index__"))))


def picks_rows(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a call picks rows of a tensor (of any shape) by numbers of another, or hands such numbers to Python."""
    if function in _INDEXING:
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(p, list) or (isinstance(p, Tensor) and p.dim() > 0) for p in parts)
    return function in _PICKS or function in NUMBERS
