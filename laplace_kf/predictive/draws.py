"""The standard normal numbers behind S draws: independent, in antithetic pairs, or quasi-random.

A draw is known by its number: draw ``s`` does not depend on how many draws are made, or on how many at once. All kinds
of draws have the posterior as the distribution of every single draw, so a mean over draws is unbiased; they differ in
how the draws depend on each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.operators import fresh_generator, standard_normal
from laplace_kf.registry import Registry

__all__ = ["DRAWS", "Draws", "draw_seeds"]


def draw_seeds(samples: int, generator: torch.Generator | None) -> list[int]:
    """One seed per draw, so that a draw does not depend on how many are made at once.

    Raises:
        InvalidArgument: if ``samples`` is no whole number of at least 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InvalidArgument(f"samples must be a whole number of at least 1, got {samples!r}")
    generator = generator if generator is not None else fresh_generator()
    return torch.randint(2**62, (samples,), generator=generator, device=generator.device).tolist()


class Draws(ABC):
    """Noise of S draws.

    Args:
        samples: S.
        generator: random numbers; a fresh private one by default.
    """

    def __init__(self, samples: int, generator: torch.Generator | None) -> None:
        self.samples = samples
        self.seeds = draw_seeds(samples, generator)

    @abstractmethod
    def normal(self, index: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Standard normal tensors of one draw.

        Args:
            index: number of the draw.
            shapes: one ``(M, d)`` per tensor, with one ``M`` for all: ``M`` independent copies (examples; 1 for
                weights) of ``d`` directions.
            like: a tensor (of any shape) in the wanted type, on the wanted device.
        """


DRAWS: Registry[type[Draws]] = Registry("kind of draws")


@DRAWS.register("independent")
class Independent(Draws):
    """Every draw from a generator of its own."""

    def normal(self, index: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seeds[index])
        return [standard_normal(shape, like, generator) for shape in shapes]


@DRAWS.register("antithetic")
class Antithetic(Independent):
    """Pairs ``+ε, −ε``: what is odd in the noise cancels, so the mean of a nearly linear network is nearly exact."""

    def normal(self, index: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        noise = super().normal(index - index % 2, shapes, like)
        return [-part for part in noise] if index % 2 else noise


@DRAWS.register("sobol")
class Sobol(Draws):
    """Scrambled Sobol points through the normal quantile function, shifted at random for every example.

    The shift (modulo 1) keeps the points' evenness, makes every single draw exactly standard normal, and makes
    examples independent of each other. Even points pay in few directions and with many draws.

    Raises:
        IncompatiblePair: for more directions than Sobol points have (21,201).
    """

    LIMIT = torch.quasirandom.SobolEngine.MAXDIM

    def __init__(self, samples: int, generator: torch.Generator | None) -> None:
        super().__init__(samples, generator)
        self._made: tuple[Tensor, Tensor] | None = None  # replaced as a whole: several threads may draw

    def normal(self, index: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        widths = [width for _, width in shapes]
        total, copies = sum(widths), shapes[0][0]
        made = self._made
        if made is None or made[1].shape != (copies, total):
            if total > self.LIMIT:
                raise IncompatiblePair(
                    f'draws="sobol" has points in at most {self.LIMIT} directions, and {total} are drawn here; use '
                    'draws="antithetic" or "independent", parameters="last_layer", or space="activations"'
                )
            engine = torch.quasirandom.SobolEngine(total, scramble=True, seed=self.seeds[0])
            generator = torch.Generator().manual_seed(self.seeds[0])
            shift = torch.rand(copies, total, generator=generator, dtype=torch.float64)
            made = self._made = engine.draw(self.samples, dtype=torch.float64), shift
        tiny = math.ulp(1.0)
        uniform = ((made[0][index] + made[1]) % 1).clamp(tiny, 1 - tiny)
        return [part.to(like) for part in torch.special.ndtri(uniform).split(widths, 1)]
