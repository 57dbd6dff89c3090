"""A process's share of the data: no example twice, and every example with a number that other processes agree on.

Each process reads its own share. Where a loader's sampler pads (torch's ``DistributedSampler`` repeats the first
examples until all shares are equally long), the repeats are left out, so that every example counts once. Numbers of
examples are what random draws hang on (:mod:`laplace_kf.draws`): of a data set with an index, the index; else the place
in all the shares one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler, Subset

from laplace_kf.batches import tensors_of
from laplace_kf.callers import warn_user
from laplace_kf.draws import mixed
from laplace_kf.errors import IncompatiblePair

__all__ = ["Shard", "random_order"]

FAR = 2**40  # between the numbers of two processes whose shares have no known length


class Shard:
    """What a process was given to read.

    Args:
        given: what the user passed: a loader, or anything else that brings data.
        numbered: whether numbers of examples are needed.

    Attributes:
        data: to be read in its place.
        sampler: what its distributed sampler says, if it has one.
        place: examples of this pass whose numbers were asked for.

    Raises:
        IncompatiblePair: for a sampler that repeats examples by a rule that is not known.
    """

    def __init__(self, given: Any, numbered: bool = False) -> None:
        self.data, self.sampler = given, None
        self.base: int | None = None  # length of the data set that numbers are an index of
        self.shared_index = False  # whether other processes have the same data set
        self._offset = 0
        self._latest: list[Any] | None = None
        self.place = 0
        loader = given if _plain(given) else None
        if loader is None:
            if isinstance(given, DataLoader):
                _refuse_padding(given)
            return
        sampler = _sampler(loader)
        _refuse_padding(loader)
        if isinstance(sampler, DistributedSampler):
            self.sampler = _described(sampler)
            extra = _repeated(sampler)
            if extra:
                self.data = loader = _with_sampler(loader, extra)
        if isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1:
            self.data = _Streamed(loader)
        if numbered and _indexed(loader):
            self.base, self.shared_index = len(_base(loader.dataset)), isinstance(loader.dataset, Subset)
            self.shared_index |= self.sampler is not None
            self.data = _Numbered(_with_index(loader), self)

    def warn_alone(self) -> None:
        """Warns where a process that works alone has a share only."""
        if self.sampler is not None and self.sampler["replicas"] > 1:
            warn_user(
                f"the loader's DistributedSampler gives this process 1 of {self.sampler['replicas']} shares of the "
                "data, and what is made of it here knows nothing of the others: pass "
                "process_group=torch.distributed.group.WORLD, or a loader over all of the data"
            )

    # -- what processes tell each other --------------------------------------------------------------------------------

    def description(self, batches: Any) -> dict[str, Any]:
        """What the others have to know; ``batches`` is what the data became."""
        return {
            "sampler": self.sampler,
            "base": self.base,
            "shared": self.shared_index,
            "length": self.base if self.base is not None else _examples(batches),
        }

    def settle(self, everyone: Sequence[dict[str, Any]], rank: int) -> None:
        """Fixes the numbers of the examples, given the descriptions of all processes.

        Raises:
            IncompatiblePair: if distributed samplers contradict each other, or the group.
        """
        _require_one_sampling([each["sampler"] for each in everyone])
        if all(each["shared"] for each in everyone) and len({each["base"] for each in everyone}) == 1:
            self._offset = 0
            return
        lengths = [each["length"] for each in everyone]
        known = [length for length in lengths if length is not None]
        self._offset = [0, *accumulate(known)][rank] if len(known) == len(lengths) else rank * FAR

    # -- numbers -------------------------------------------------------------------------------------------------------

    def start(self, place: int = 0) -> None:
        """A pass over the data begins, or goes on after so many examples."""
        self.place, self._latest = place, None

    def numbers(self, count: int) -> Tensor:
        """Numbers of the ``count`` examples of the minibatch that was read last, int64 ``(N,)``."""
        latest, start = self._latest, self._offset + self.place
        self.place += count
        self._latest = None
        if latest is None or not all(isinstance(i, int) for i in latest):
            return torch.arange(start, start + count)
        index = torch.tensor(latest, dtype=torch.int64) + self._offset
        if len(index) == count:
            return index
        return mixed(index, 0).sum() + torch.arange(count)  # the collate function made other rows of the items

    def note(self, index: Sequence[Any]) -> None:
        """Called by the loader: the index of every item of the minibatch that comes next."""
        self._latest = list(index)


def _plain(data: Any) -> bool:
    """Whether the data are a loader of torch that reads as torch's does."""
    return isinstance(data, DataLoader) and type(data).__iter__ is DataLoader.__iter__


def _indexed(loader: DataLoader[Any]) -> bool:
    """Whether minibatches are made of items of a data set with an index."""
    return (
        loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(_base(loader.dataset), "__len__")
    )


def _base(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _sampler(loader: DataLoader[Any]) -> Any:
    """What decides which examples are read."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def random_order(data: Any) -> str | None:
    """The name of torch's sampler by which a loader reads its examples in an order that nobody knows, if it does.

    A sampler of the user's own is trusted, and a data set without an index brings its examples in its order.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    sampler = _sampler(data)
    ordered = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False
    return None if ordered or not type(sampler).__module__.startswith("torch.") else type(sampler).__name__


def _described(sampler: DistributedSampler[Any]) -> dict[str, Any]:
    return {
        "replicas": sampler.num_replicas,
        "rank": sampler.rank,
        "length": len(sampler.dataset),  # type: ignore[arg-type]
        "order": (sampler.seed, sampler.epoch) if sampler.shuffle else None,
        "drop_last": sampler.drop_last,
    }


def _repeated(sampler: DistributedSampler[Any]) -> frozenset[Any]:
    """The examples of this process that another one reads, too: places beyond the length are filled from the front.

    Raises:
        IncompatiblePair: for a subclass that deals examples out by a rule of its own, if some are repeated.
    """
    length, replicas = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
    if sampler.drop_last or sampler.total_size <= length:
        return frozenset()
    if type(sampler).__iter__ is not DistributedSampler.__iter__:
        raise IncompatiblePair(
            f"{type(sampler).__name__} makes {sampler.total_size} places of {length} examples, by a rule of its own, "
            "so that some count twice and it is not known which; use torch.utils.data.DistributedSampler(dataset), "
            "drop_last=True, or shares of your own: Subset(dataset, range(rank, len(dataset), world_size))"
        )
    own = list(sampler)
    return frozenset(index for place, index in enumerate(own) if sampler.rank + place * replicas >= length)


def _refuse_padding(loader: DataLoader[Any]) -> None:
    shard = loader.batch_sampler
    if type(shard).__name__ == "BatchSamplerShard" and getattr(shard, "even_batches", False):
        raise IncompatiblePair(
            "the loader's BatchSamplerShard repeats examples to make shares even (even_batches=True), so that they "
            "would count twice: Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)), or "
            "a loader with torch.utils.data.DistributedSampler(dataset)"
        )


def _require_one_sampling(samplers: Sequence[dict[str, Any] | None]) -> None:
    given = [each for each in samplers if each is not None]
    if not given:
        return
    paste = "DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=0), set_epoch(e) on all of them"
    if len(given) < len(samplers):
        raise IncompatiblePair(f"{len(given)} of {len(samplers)} processes have a DistributedSampler: {paste}")
    for what in ("replicas", "length", "order", "drop_last"):
        found = {each[what] for each in given}
        if len(found) > 1:
            raise IncompatiblePair(f"the processes' DistributedSamplers differ in {what} ({found}): {paste}")
    ranks = [each["rank"] for each in given]
    if given[0]["replicas"] != len(given) or len(set(ranks)) < len(ranks):
        raise IncompatiblePair(
            f"the DistributedSamplers deal out {given[0]['replicas']} shares, and the {len(given)} processes of the "
            f"group read numbers {ranks}, which is not each of them once: {paste}"
        )


class _Without:
    """A sampler, or batch sampler, without some indices."""

    def __init__(self, inner: Any, extra: Collection[Any]) -> None:
        self.inner, self.extra = inner, extra

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        for item in self.inner:
            kept = [index for index in (item if isinstance(item, (list, tuple)) else [item]) if index not in self.extra]
            if kept:
                yield kept if isinstance(item, (list, tuple)) else kept[0]


def _changed(loader: DataLoader[Any], **values: Any) -> DataLoader[Any]:
    """A loader of the same kind and settings with some attributes changed, which torch allows at construction only."""
    other = copy.copy(loader)
    vars(other).update(values, _iterator=None)
    return other


def _with_sampler(loader: DataLoader[Any], extra: Collection[Any]) -> DataLoader[Any]:
    which = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    return _changed(loader, **{which: _Without(getattr(loader, which), extra)})


def _with_index(loader: DataLoader[Any]) -> DataLoader[Any]:
    return _changed(loader, dataset=_Indexed(loader.dataset), collate_fn=_Collate(loader.collate_fn))


class _Indexed(Dataset[Any]):
    """A data set whose items come with their index in the data set that they are taken from."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return self._origin(index), self.dataset[index]

    def __getitems__(self, index: Sequence[Any]) -> list[tuple[Any, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        items = many(index) if many else [self.dataset[i] for i in index]
        return [(self._origin(i), item) for i, item in zip(index, items, strict=True)]

    def _origin(self, index: Any) -> Any:
        dataset = self.dataset
        while isinstance(dataset, Subset):
            index, dataset = dataset.indices[index], dataset.dataset
        return index.item() if isinstance(index, Tensor) or hasattr(index, "item") else index


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], Any]:
        return [index for index, _ in pairs], self.collate([item for _, item in pairs])


class _Streamed:
    """The minibatches of a stream that several workers read: each reads all of it, unless the data set deals it out."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        first: list[Tensor] = []
        for k, batch in enumerate(self.loader):
            held = list(tensors_of(batch)) if k < 2 else []  # the first two are of two workers
            if k == 0:
                first = held
            elif held and len(held) == len(first) and all(map(torch.equal, held, first)):
                warn_user(
                    f"the first minibatches of {self.loader.num_workers} workers are the same: each of them reads the "
                    "whole IterableDataset, so that every example counts several times. Deal it out by "
                    "torch.utils.data.get_worker_info(), or give a loader with num_workers=0"
                )
            yield batch


class _Numbered:
    """The minibatches of a loader with index; what they are made of is noted as they are read."""

    def __init__(self, loader: DataLoader[Any], shard: Shard) -> None:
        self.loader, self.shard = loader, shard

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in self.loader:
            self.shard.note(index)
            yield batch


def _examples(batches: Any) -> int | None:
    """How many examples the minibatches hold, where they lie in memory; ``None`` where that is not known."""
    total = getattr(batches, "total", None)
    if isinstance(total, int):
        return total
    inner = getattr(batches, "data", batches)
    if not isinstance(inner, (list, tuple)):
        return None
    return sum(_rows(batch) for batch in inner)


def _rows(batch: Any) -> int:
    first = next(tensors_of(batch), None)
    return 0 if first is None or not first.dim() else first.shape[0]
