"""The processes of a group, as far as the package needs them: agree, add up, hand round; and fail together.

All words between processes are those of ``torch.distributed``. Every exchange carries either a value or the error of
the process that speaks: a process that fails says so at the next exchange, whichever that is, and all others raise
:class:`~laplace_kf.errors.DistributedFailure` there instead of waiting for it. One that dies is missed by the group
itself: its sockets close, or the group's timeout passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laplace_kf.errors import DistributedFailure, IncompatiblePair

__all__ = ["Ranks"]

BUCKET = 2**28  # bytes that travel at once


class Ranks:
    """This process among those of a group.

    Args:
        group: a ``torch.distributed`` process group that this process is in.

    Attributes:
        rank: number of this process in the group.
        size: number of processes.

    Raises:
        IncompatiblePair: for anything that is no process group, or one that this process is not in.
    """

    def __init__(self, group: Any) -> None:
        paste = 'torch.distributed.init_process_group("gloo"), then process_group=torch.distributed.group.WORLD'
        if not dist.is_available() or not dist.is_initialized():
            raise IncompatiblePair(f"process_group= needs torch.distributed to be initialised: {paste}")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise IncompatiblePair("this process is not in the group that it was given; call it on its members only")
        if not isinstance(group, dist.ProcessGroup):
            raise IncompatiblePair(f"process_group= must be a process group, got {type(group).__name__}: {paste}")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._cuda = "nccl" in str(dist.get_backend(group))
        self._broken = ""
        self._told: BaseException | None = None  # what the others were told of last

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """The processes of a group; ``None`` for none, and where this process is alone in it."""
        if group is None:
            return None
        found = cls(group)
        return found if found.size > 1 else None

    # -- words ---------------------------------------------------------------------------------------------------------

    def exchange(self, where: str, value: Any = None) -> list[Any]:
        """The values of all processes, in the order of their ranks.

        Args:
            where: what the process is at, for messages; the same for all.
            value: anything that can be pickled.

        Raises:
            DistributedFailure: if another process failed, died, did not come, or is at something else.
        """
        return self._said(where, None, value)

    @contextmanager
    def together(self, where: str) -> Iterator[None]:
        """What runs inside fails in all processes if it fails in one; ends with an exchange.

        Raises:
            DistributedFailure: in those where it did not fail.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, DistributedFailure) or error is self._told:
                raise  # all know
            self._told = error
            with suppress(DistributedFailure):
                self._said(where, f"{type(error).__name__}: {error}", None)
            raise
        self._said(where, None, None)

    def _said(self, where: str, error: str | None, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._guarded(where):
            dist.all_gather_object(found, (where, error, value), group=self.group)
        failed = {rank: told for rank, (_, told, _) in enumerate(found) if told is not None}
        if failed:
            rank, told = next(iter(failed.items()))
            others = f" (and on {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise DistributedFailure(
                f"process {rank} of {self.size}{others} failed during {found[rank][0]}, and all stop here. Nothing was "
                f"changed. It said: {told}"
            )
        places = [place for place, _, _ in found]
        if len(set(places)) > 1:
            raise DistributedFailure(
                f"the processes are at different things ({', '.join(f'{k}: {p}' for k, p in enumerate(places))}), and "
                "all stop here: each of them has to make the same calls in the same order, with the same settings"
            )
        return [said for _, _, said in found]

    @contextmanager
    def _guarded(self, where: str) -> Iterator[None]:
        """A failure of the group comes out typed."""
        if self._broken:
            raise DistributedFailure(self._broken)
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # torch's own are RuntimeErrors
            said = str(error).strip().partition("\n")[0] or repr(error)
            self._broken = (
                f"process {self.rank} of {self.size} lost the others during {where}: one of them died, left, or did "
                "not come within the group's timeout (init_process_group(timeout=...)). Nothing was changed here; the "
                f"group cannot be used again. torch said: {said}"
            )
            raise DistributedFailure(self._broken) from error

    # -- numbers -------------------------------------------------------------------------------------------------------

    def carrier(self, device: torch.device) -> torch.device:
        """Where tensors of a device have to lie to travel: NCCL takes those of GPUs only."""
        return torch.device("cuda", torch.cuda.current_device()) if self._cuda and device.type != "cuda" else device

    def add_up(self, tensors: Sequence[Tensor], where: str) -> list[Tensor]:
        """The sums over all processes of tensors of any shapes, which are the same in all of them.

        They travel in buckets of one type, in their order.

        Raises:
            DistributedFailure: if a process is lost.
        """
        out: list[Tensor | None] = [None] * len(tensors)
        for bucket in _buckets(tensors):
            buffer = self._packed([tensors[k] for k in bucket])
            with self._guarded(where):
                dist.all_reduce(buffer, group=self.group)
            for k, part in zip(bucket, _unpacked(buffer, [tensors[k] for k in bucket]), strict=True):
                out[k] = part
        return [part for part in out if part is not None]

    def hand_round(self, tensors: Sequence[Tensor], owners: Sequence[int], where: str) -> list[Tensor]:
        """Every tensor as its owner has it; elsewhere what is given tells shapes, types and devices only.

        Raises:
            DistributedFailure: if a process is lost.
        """
        out = list(tensors)
        for owner in range(self.size):
            own = [k for k, of in enumerate(owners) if of == owner]
            for bucket in _buckets([tensors[k] for k in own]):
                places = [own[k] for k in bucket]
                buffer = self._packed([tensors[k] for k in places])
                with self._guarded(where):
                    dist.broadcast(buffer, group=self.group, group_src=owner)
                for k, part in zip(places, _unpacked(buffer, [tensors[k] for k in places]), strict=True):
                    out[k] = part
        return out

    def _packed(self, tensors: Sequence[Tensor]) -> Tensor:
        first = tensors[0]
        size = sum(tensor.numel() for tensor in tensors)
        buffer = torch.empty(size, dtype=first.dtype, device=self.carrier(first.device))
        start = 0
        for tensor in tensors:
            buffer[start : start + tensor.numel()].copy_(tensor.detach().reshape(-1))
            start += tensor.numel()
        return buffer


def _unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = buffer.split([tensor.numel() for tensor in like])
    alone = len(like) == 1  # nothing else keeps the buffer
    return [
        (part if alone else part.clone()).reshape(tensor.shape).to(tensor.device)
        for part, tensor in zip(parts, like, strict=True)
    ]


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors that travel together: of one type, and ``BUCKET`` bytes at most unless one alone has more."""
    found: list[list[int]] = []
    room: dict[torch.dtype, tuple[int, int]] = {}  # by type: the open bucket and its bytes
    for k, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        place, filled = room.get(tensor.dtype, (-1, 0))
        if place < 0 or filled + size > BUCKET:
            place, filled = len(found), 0
            found.append([])
        found[place].append(k)
        room[tensor.dtype] = place, filled + size
    return found
