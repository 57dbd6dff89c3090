"""Where the numbers of a tensor lie, to tell tensors that share them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["storage_of"]


def storage_of(tensor: Tensor) -> int | None:
    """Address of the storage of a tensor (of any shape); ``None`` for one that is empty or has no memory of its own.

    Such are sparse tensors, those without data, and those inside ``torch.func.vmap``.
    """
    try:
        return int(tensor.untyped_storage().data_ptr()) or None if tensor.numel() else None
    except (RuntimeError, NotImplementedError):
        return None
