"""Random numbers that belong to examples: those of one do not depend on what else is in its minibatch, or its process.

They are a hash of (seed, number of the example, number of the draw): a counter-based generator with the mixing function
of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 4), computed for all
rows at once. So the curvature drawn for an example is the same however the data are cut into minibatches and shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ExampleDraws", "RowDraws", "Source", "bernoulli", "categorical", "mixed", "normal", "signs"]

_INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio, as torch's signed numbers have it
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_BITS = 53  # of a float64's fraction
_SIGNS = 32  # signs that one number gives


def mixed(keys: Tensor | int, more: Tensor | int) -> Tensor:
    """Keys (int64, any shape) hashed together with other numbers that broadcast to them; one of both is a tensor."""
    z = keys + (_signed((more + 1) * _INCREMENT) if isinstance(more, int) else (more + 1) * _INCREMENT)
    assert isinstance(z, Tensor)
    z = (z ^ _shifted(z, 30)).mul_(_FIRST)
    z = (z ^ _shifted(z, 27)).mul_(_SECOND)
    return z ^ _shifted(z, 31)


def _signed(number: int) -> int:
    """What 64 bits hold of it, as torch's signed numbers have it."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(z: Tensor, by: int) -> Tensor:
    """Without the sign, which torch's shift to the right would keep."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


class RowDraws:
    """Random numbers of rows ``(B, ...)``, each from a key of its own; takes the place of a ``torch.Generator``.

    Args:
        keys: one for each row, int64 ``(B,)``.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self._calls = keys, 0

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.keys.device

    def bits(self, *width: int) -> Tensor:
        """Fresh 64-bit numbers ``(B, *width)``."""
        self._calls += 1
        place = torch.arange(math.prod(width), device=self.device).reshape(1, *width)
        return mixed(mixed(self.keys, self._calls).reshape(-1, *[1] * len(width)), place)

    def uniform(self, *width: int) -> Tensor:
        """Fresh numbers in [0, 1), float64 ``(B, *width)``."""
        return _shifted(self.bits(*width), 64 - _BITS).double() * 2.0**-_BITS

    def generators(self) -> list[torch.Generator]:
        """A generator for every row, for draws that only a ``torch.Generator`` can make."""
        self._calls += 1
        seeds = mixed(self.keys, self._calls).tolist()
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]


class ExampleDraws:
    """Random numbers of the examples of a minibatch.

    Args:
        seed: of everything.
        index: numbers of the examples in all the data, int64 ``(N,)``.
        turn: which pass over the data this is; other passes draw other numbers.
    """

    def __init__(self, seed: int, index: Tensor, turn: int = 0) -> None:
        self.seed, self.index = seed, index
        self._keys = mixed(mixed(seed, index), turn)
        self._sample = 0

    def rows(self, kept: Tensor) -> RowDraws:
        """Fresh numbers for the positions ``kept (N, T)`` in their order: those left out do not shift the others'."""
        self._sample += 1
        keys = mixed(self._keys, self._sample).to(kept.device)
        rank = kept.cumsum(1)[kept]
        return RowDraws(mixed(keys[kept.nonzero()[:, 0]], rank))

    def generator(self) -> torch.Generator:
        """One generator for the whole minibatch: the same wherever the same examples are together."""
        total = int(mixed(self._keys, 2**20).sum())
        return torch.Generator().manual_seed(total)


Source = torch.Generator | RowDraws
"""Where the numbers of rows come from."""


def normal(shape: Sequence[int], source: Source, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of a shape ``(B, ...)``."""
    if isinstance(source, torch.Generator):
        return torch.randn(tuple(shape), generator=source, device=source.device, dtype=dtype)
    radius = (-2 * torch.log1p(-source.uniform(*shape[1:]))).sqrt()  # Box and Muller 1958
    return (radius * torch.cos(2 * math.pi * source.uniform(*shape[1:]))).to(dtype)


def bernoulli(p: Tensor, source: Source) -> Tensor:
    """0 or 1 with probability ``p (B, ...)`` of 1, in the type of ``p``."""
    if isinstance(source, torch.Generator):
        return torch.bernoulli(p, generator=source)
    return (source.uniform(*p.shape[1:]) < p.double()).to(p.dtype)


def categorical(p: Tensor, source: Source) -> Tensor:
    """One class ``(B,)`` for every row of probabilities ``p (B, C)``."""
    if isinstance(source, torch.Generator):
        return torch.multinomial(p, 1, generator=source)[:, 0]
    edges = p.double().cumsum(1)
    place = source.uniform(1) * edges[:, -1:]
    # the first class whose edge lies above: one of probability 0 has none of its own
    return (edges <= place).sum(1).clamp_max(p.shape[1] - 1)


def signs(shape: Sequence[int], source: Source, dtype: torch.dtype) -> Tensor:
    """±1 with equal chances, of a shape ``(B, K)``."""
    if isinstance(source, torch.Generator):
        return torch.randint(0, 2, tuple(shape), generator=source, device=source.device).to(dtype) * 2 - 1
    words = source.bits(-(-shape[1] // _SIGNS))
    drawn = (words[:, :, None] >> torch.arange(_SIGNS, 2 * _SIGNS, device=words.device)) & 1
    return drawn.flatten(1)[:, : shape[1]].to(dtype) * 2 - 1
