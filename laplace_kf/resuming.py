"""Passes over data that can be stopped at any point and gone on with: what was gathered is kept in a file.

A checkpoint holds everything that the rest of the pass depends on: the sums, what the tape has learnt of the model, the
estimator's random numbers, and the global random states (Python's, numpy's, torch's, those of the loader's own
generators) at the start of the pass and where it stopped. A later call with the same model, data and settings goes
through the data from the start of that pass, leaves out the minibatches that are in already, and ends with the same
numbers, bit for bit, as one that was never stopped.

What that needs of the data: gone through with the same random states, they give the same minibatches in the same order.
Loaders that shuffle or augment from torch's, numpy's or Python's global numbers, or from a ``torch.Generator`` of the
loader or its sampler, do. Others (an order drawn from the clock, files in the order of a directory) do not; minibatches
that differ from those of before are noticed and refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace_kf import files
from laplace_kf.batches import tensors_of
from laplace_kf.errors import CorruptFile, IncompatiblePair, InvalidArgument, LaplaceKFError, ShapeMismatch
from laplace_kf.randomness import random_states, same_random_states, set_random_states

__all__ = ["Checkpoint", "Gathering", "Journal", "described", "digest", "journal", "length", "require_same"]

log = logging.getLogger(__name__)

SAMPLED = 1024  # numbers of every tensor of a minibatch by which it is recognised
Packed = tuple[dict[str, Tensor], dict[str, Any]]


class Gathering(Protocol):
    """What gathers sums over minibatches, as far as its state is kept here (the engine's ``Accumulator``)."""

    def packed(self) -> Packed:
        """Tensors (any shapes) by name, and JSON-able values."""

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes what :meth:`packed` gave (tensors of any shapes)."""


class Journal:
    """Is told how a pass over data goes on; this one only counts.

    Attributes:
        position: minibatches of this pass so far.
    """

    position = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all passes."""
        yield

    def begin(self, gathering: Gathering) -> tuple[int, int]:
        """Before the first pass for one kind of sums: pass and minibatch to go on with, ``(0, 0)`` at first."""
        return 0, 0

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """The minibatches of one pass that are still to be taken in."""
        self.position = 0
        for batch in data:
            self.position += 1
            yield batch

    def taken(self, gathering: Gathering, number: int, index: int) -> None:
        """After every minibatch: in pass ``number``, ``index`` of all passes for these sums."""
        return

    def finished(self, gathering: Gathering, passes: int, index: int) -> None:
        """The sums are complete, and others will be gathered after them."""
        return


@dataclass
class _Stage:
    """The state of one kind of sums: complete, but for the last one of a file."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    number: int
    index: int


class Checkpoint(Journal):
    """A journal in a file, written every so many minibatches and removed at the end.

    Args:
        path: of the file; what is there is gone on with.
        every: minibatches between two writings.
        made_for: names and JSON-able values that have to be the same when it is gone on with.
        generator: of the estimator. If the call fails it is what it was before, so that the same call can be made.
        data: the loader, whose generators are looked for.
        devices: accelerators whose random states belong to it.

    Raises:
        MissingFile: if there is no such folder.
        CorruptFile: if what is there is damaged, or no checkpoint of a fit.
        ShapeMismatch: if it was made for something else; says for what.
        ValueError: if ``every`` is no positive integer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int,
        made_for: Mapping[str, Any],
        generator: torch.Generator,
        data: Any,
        devices: Collection[torch.device] = (),
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidArgument(f"every must be a positive integer, a number of minibatches, got {every!r}")
        self.path, self.every, self.made_for = files.require_folder(path), every, dict(made_for)
        self.generator, self.devices = generator, devices
        self._sources = list(_generators(data))
        self._ended: list[_Stage] = []
        self._tensors: dict[str, Tensor] = {}
        self._header: dict[str, Any] | None = None
        self._to_come: list[_Stage] = []
        self._stopped: dict[str, Any] | None = None  # where in its pass the file stopped
        self._crc = 0
        if self.path.exists():
            self._tensors, self._header = files.read(self.path, files.FIT)
            require_same(self.path, "fit", self._header, self.made_for)
            self._to_come = list(self._stages())

    def _stages(self) -> Iterator[_Stage]:
        assert self._header is not None
        for k, stage in enumerate(self._header["stages"]):
            yield _Stage(_under(f"stage {k}/", self._tensors), stage["values"], stage["number"], stage["index"])

    @contextmanager
    def running(self) -> Iterator[None]:
        with same_random_states():
            before = self.generator.get_state()
            try:
                if self._header is not None:
                    self._rewind("start")
                self._start = self._states()
                yield
            except BaseException:
                self.generator.set_state(before)
                raise
            self.path.unlink(missing_ok=True)

    def _states(self) -> dict[str, Tensor]:
        own = {f"source {k}": source.get_state() for k, source in enumerate(self._sources)}
        return {**random_states(self.devices), **own, "estimator": self.generator.get_state()}

    def _rewind(self, to: str, *, sources: bool = True) -> None:
        """Sets the random states that the file has for a moment."""
        states = _under(f"random {to}/", self._tensors)
        set_random_states(states, self.devices)
        self.generator.set_state(states["estimator"])
        for k, source in enumerate(self._sources if sources else ()):
            if f"source {k}" not in states:
                raise ShapeMismatch(
                    f"{self.path} was made for data with fewer generators of their own; give the same data, or "
                    "another path to start anew"
                )
            source.set_state(states[f"source {k}"])

    def begin(self, gathering: Gathering) -> tuple[int, int]:
        if not self._to_come:
            return 0, 0
        stage = self._to_come.pop(0)
        try:
            gathering.restore(stage.tensors, stage.values)
        except LaplaceKFError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CorruptFile(f"{self.path} contradicts itself: {type(error).__name__}: {error}") from error
        if self._to_come:
            self._ended.append(stage)
        else:
            self._stopped = self._header
            log.info("%s: goes on after %d minibatches", self.path, stage.index)
        return stage.number, stage.index

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            self._rewind("pass")
        self._at_pass = self._states()
        self.position, self._crc = 0, 0
        skipped = 0 if stopped is None else stopped["position"]
        for batch in data:
            self.position += 1
            self._crc = _recognised(batch, self._crc)
            if self.position > skipped:
                yield batch
            elif self.position == skipped:
                assert stopped is not None
                if self._crc != stopped["crc"]:
                    raise self._other_data(f"one of the first {skipped} minibatches is another one")
                self._rewind("now", sources=False)
        if self.position < skipped:
            raise self._other_data(f"there are {self.position} minibatches, and {skipped} were taken in")

    def _other_data(self, what: str) -> ShapeMismatch:
        return ShapeMismatch(
            f"the data are not those that {self.path} was made with: {what}. They have to come in the same order with "
            "the same random states (shuffling from torch's global numbers or a torch.Generator does); to start anew, "
            "remove the file or give another path"
        )

    def taken(self, gathering: Gathering, number: int, index: int) -> None:
        if index % self.every == 0:
            tensors, values = gathering.packed()
            self._write([*self._ended, _Stage(tensors, values, number, index)])

    def finished(self, gathering: Gathering, passes: int, index: int) -> None:
        tensors, values = gathering.packed()
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._ended.append(_Stage(kept, values, passes, index))

    def _write(self, stages: list[_Stage]) -> None:
        tensors = {f"stage {k}/{name}": part for k, stage in enumerate(stages) for name, part in stage.tensors.items()}
        for moment, states in (("start", self._start), ("pass", self._at_pass), ("now", self._states())):
            tensors.update({f"random {moment}/{name}": state for name, state in states.items()})
        header = {
            "made_for": self.made_for, "position": self.position, "crc": self._crc,
            "stages": [{"values": stage.values, "number": stage.number, "index": stage.index} for stage in stages],
        }  # fmt: skip
        files.write(self.path, tensors, header, files.FIT)


def journal(
    path: str | os.PathLike[str] | None,
    every: int,
    model: nn.Module,
    data: Any,
    generator: torch.Generator,
    seeded: bool,
    rules: Iterable[Any],
    **settings: Any,
) -> Journal:
    """The journal of a fit: one in a file if there is a path.

    Args:
        path, every, generator, data: as of :class:`Checkpoint`, whose errors it raises.
        model: whose weights have to be the same when a fit is gone on with.
        seeded: whether the generator is the caller's (then its state has to be the same).
        rules: likelihood, estimator and structure, or other parts that a fit is made of.
        **settings: all else that has to be the same.
    """
    if path is None:
        return Journal()
    made_for: dict[str, Any] = {"model": digest({**dict(model.named_parameters()), **dict(model.named_buffers())})}
    made_for["number of minibatches"] = length(data)
    made_for["generator"] = digest({"": generator.get_state()}) if seeded else None
    made_for.update({type_of: described(rule) for type_of, rule in zip(RULES, rules, strict=True)})
    made_for.update({name: described(value) for name, value in settings.items()})
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    return Checkpoint(path, every, made_for, generator, data, devices)


RULES = ("likelihood", "estimator", "structure")


def length(data: Any) -> int | None:
    """The number of minibatches, where it is known."""
    try:
        return len(data)
    except TypeError:
        return None


def described(value: Any) -> Any:
    """A setting as plain values by which it can be told from others."""
    if hasattr(value, "to_config"):
        try:
            return value.to_config()
        except IncompatiblePair:
            return repr(type(value))
    if hasattr(value, "options") and hasattr(value, "name"):
        return [value.name, value.options()]
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen digits that stand for tensors (any shapes) with their names and types."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name}{tuple(plain.shape)}{plain.dtype}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def require_same(path: object, what: str, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares what a checkpoint was made for with what is wanted now.

    Raises:
        ShapeMismatch: for the first that differs, with both values.
        CorruptFile: if the file does not say what it was made for.
    """
    made_for = header.get("made_for")
    if not isinstance(made_for, Mapping):
        raise CorruptFile(f"{path} does not say what it was made for")
    for name in dict.fromkeys([*wanted, *made_for]):
        then, now = made_for.get(name), wanted.get(name)
        if then != _plain(now):
            raise ShapeMismatch(
                f"{path} is the checkpoint of another {what}: its {name} was {then!r}, and is {now!r} now. Make the "
                "call that it was made by, give another path, or remove the file to start anew"
            )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {str(k): _plain(one) for k, one in value.items()} if isinstance(value, Mapping) else value


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _recognised(batch: Any, before: int) -> int:
    """A number that stands for a minibatch and those before it."""
    for tensor in tensors_of(batch):
        before = zlib.crc32(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), before)
        if tensor.layout == torch.strided and not tensor.is_nested and tensor.numel():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
            before = zlib.crc32(some.view(torch.uint8).numpy().data, before)
    return before


def _generators(data: Any, depth: int = 4) -> Iterator[torch.Generator]:
    """The generators that a loader, its samplers and what it wraps draw from, each once."""
    seen: set[int] = set()

    def walk(one: Any, left: int) -> Iterator[torch.Generator]:
        if one is None or id(one) in seen:
            return
        seen.add(id(one))
        if isinstance(one, torch.Generator):
            yield one
        elif left:
            for name in ("generator", "sampler", "batch_sampler", "data", "loader", "dataset"):
                inner = getattr(one, name, None)
                if not isinstance(inner, Tensor):
                    yield from walk(inner, left - 1)

    yield from walk(data, depth)
