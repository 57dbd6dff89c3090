"""Before a job over several processes begins: whether all of them mean the same one, of the same network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.distributed.ranks import Ranks
from laplace_kf.errors import IncompatiblePair

__all__ = ["refuse_checkpoint", "require_one_job", "require_one_network"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of functions, which differ
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_checkpoint(path: Any) -> None:
    """Refuses a file to go on with, which knows of one process only.

    Raises:
        IncompatiblePair: if there is one.
    """
    if path is not None:
        raise IncompatiblePair(
            "checkpoint= keeps what one process has gathered, and with process_group= there are several that would "
            "stop at different places: leave checkpoint out, or fit in one process"
        )


def require_one_job(ranks: Ranks, what: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings (plain values by argument name) that differ between processes.

    Raises:
        IncompatiblePair: naming the first one, and what two processes have.
        DistributedFailure: if another process failed.
    """
    shown = {name: _ADDRESS.sub("", repr(value)) for name, value in settings.items()}
    everyone = ranks.exchange(f"the start of {what}", shown)
    for name in everyone[0]:
        for rank, each in enumerate(everyone):
            if each.get(name) != everyone[0][name]:
                raise IncompatiblePair(
                    f"the processes call {what} with different arguments: {name} is {everyone[0][name]} in process 0 "
                    f"and {each.get(name)} in process {rank}; give all of them the same"
                )


def require_one_network(ranks: Ranks, model: nn.Module) -> None:
    """Refuses networks whose parameters or buffers differ between processes, by exact checksums.

    Raises:
        IncompatiblePair: naming the first that differs, with the lines that make them equal.
        DistributedFailure: if another process failed.
    """
    kinds: dict[str, dict[str, Tensor]] = {
        "parameter": dict(model.named_parameters()),
        "buffer": dict(model.named_buffers()),
    }
    own = {(kind, name): _sum(tensor) for kind, named in kinds.items() for name, tensor in named.items()}
    everyone = ranks.exchange("the comparison of the networks", own)
    for rank, theirs in enumerate(everyone):
        different = [key for key in {**everyone[0], **theirs} if everyone[0].get(key) != theirs.get(key)]
        if different:
            kind, name = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise IncompatiblePair(
                f"{kind} {name!r}{more} of the network is another one in process {rank} than in process 0, and a "
                "posterior has one network. Buffers of batch normalisation differ after training with "
                "DistributedDataParallel; make all equal with\n"
                "    with torch.no_grad():\n"
                "        for tensor in (*model.parameters(), *model.buffers()):\n"
                "            torch.distributed.broadcast(tensor, 0)"
            )


def _sum(tensor: Tensor) -> tuple[tuple[int, ...], str, int]:
    """Shape, type, and the sum of the numbers' bits: in no order, so that it is exact everywhere."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.int8)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    words = flat.contiguous().view(_WORDS[flat.element_size()])
    places = torch.arange(1, len(words) + 1, device=words.device)
    return tuple(tensor.shape), str(tensor.dtype), int((words.to(torch.int64) * places).sum())
