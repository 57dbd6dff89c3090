"""The caller's random states (torch on the CPU, numpy, Python), put back after whatever ran in between.

Loaders shuffle and augment from all three. Reading and writing numpy's state takes longer than a small network's
forward pass, so that inside a guard another one only looks whether the state has moved.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "same_foreign_states", "same_random_states", "set_random_states", "torch_states"]

_WORDS = 624  # of the Mersenne twister, 32 bits each; then its position, an int
_inside = threading.local()


@contextmanager
def same_random_states() -> Iterator[None]:
    """Afterwards the random states are what they were."""
    with same_foreign_states():
        cpu = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(cpu)


@contextmanager
def same_foreign_states() -> Iterator[None]:
    """Afterwards the random states of numpy and Python are; torch's moves, as it does for who draws from it."""
    depth = getattr(_inside, "depth", 0)
    python, raw = random.getstate(), _raw() if depth else None
    whole: Any = np.random.get_state() if raw is None else None  # noqa: NPY002 (the caller's)
    _inside.depth = depth + 1
    try:
        yield
    finally:
        _inside.depth = depth
        random.setstate(python)
        if whole is not None:
            np.random.set_state(whole)  # noqa: NPY002
        elif raw != _raw():
            np.random.set_state(_read(raw))  # type: ignore[arg-type]  # noqa: NPY002


def _raw() -> bytes | None:
    """The memory of numpy's generator; ``None`` if it is not the kind whose layout is known."""
    generator = getattr(np.random, "get_bit_generator", lambda: None)()
    if not isinstance(generator, np.random.MT19937):
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS + 4)


def _read(raw: bytes) -> tuple[str, Any, int, int, float]:
    """The state in numpy's own form (its half-used normal number is left to the outer guard)."""
    key, position = np.frombuffer(raw, np.uint32, _WORDS), np.frombuffer(raw, np.int32, 1, 4 * _WORDS)
    return "MT19937", key, int(position[0]), 0, 0.0


def torch_states(devices: Collection[torch.device] = ()) -> list[Tensor]:
    """The states of torch's own generators, bytes ``(B,)`` each, that of the CPU first: to see whether something draws.

    Args:
        devices: accelerators that are looked at, too; one that is the CPU counts once.
    """
    others = (device for device in devices if device.type != "cpu")
    return [torch.get_rng_state(), *(getattr(torch, device.type).get_rng_state(device) for device in others)]


def random_states(devices: Collection[torch.device] = ()) -> dict[str, Tensor]:
    """The global random states as tensors of any shapes, for :func:`set_random_states`: Python's, numpy's, torch's.

    Args:
        devices: accelerators whose states are wanted, too.
    """
    version, words, gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    state: Any = np.random.get_state()  # noqa: NPY002 (the caller's)
    if state[0] == "MT19937":
        _, key, position, has_gauss, cached = state
        found["numpy"] = torch.tensor([*key.tolist(), position, has_gauss])
        found["numpy gauss"] = torch.tensor([cached], dtype=torch.float64)
    for device in devices:
        found[str(device)] = getattr(torch, device.type).get_rng_state(device)
    return found


def set_random_states(states: Mapping[str, Tensor], devices: Collection[torch.device] = ()) -> None:
    """Puts back what :func:`random_states` gave, tensors of any shapes by name."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python gauss"].tolist()), None)))
    if "numpy" in states:
        *key, position, has_gauss = states["numpy"].tolist()
        state = ("MT19937", np.array(key, np.uint32), position, has_gauss, float(states["numpy gauss"]))
        np.random.set_state(state)  # noqa: NPY002
    for device in devices:
        if str(device) in states:
            getattr(torch, device.type).set_rng_state(states[str(device)], device)
