"""The most memory that tensors made inside a region take at a time, whatever the device and the allocator."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak"]


class Peak(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside, until it is gone; can be entered again.

    Tensors that were there before cost nothing, nor do views of them. What an operation needs inside itself and hands
    back at its end (workspaces of decompositions) is not seen.

    Attributes:
        live: bytes of the tensors that were made inside and are still there.
        most: the largest value of that since :meth:`begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: dict[int, int] = {}  # address of the storage's record to bytes; 0 for those from outside

    def begin(self) -> None:
        """Forgets the peak so far: the next one starts from what is there now."""
        self.most = self.live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._meet(given, mine=False)
        found = func(*args, **kwargs)
        for made in tree_leaves(found):
            if isinstance(made, Tensor):
                self._meet(made, mine=True)
        return found

    def _meet(self, tensor: Tensor, mine: bool) -> None:
        try:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, int(storage.nbytes())
        except (RuntimeError, NotImplementedError):  # sparse tensors, and those without memory of their own
            return
        if tensor.device.type == "meta":
            return
        if key in self._known:
            return
        self._known[key] = size if mine else 0
        weakref.finalize(storage, self._gone, key)
        if mine:
            self.live += size
            self.most = max(self.most, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
