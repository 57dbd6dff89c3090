"""How long work is going to take of which some is done, measured while it is done, and said in time.

What a column takes is known after the first few of them, on whatever machine this is: exact variances take a backward
pass for every output of an example (3,072 for a small image to be segmented into three classes), exact factors take one
for every root column of a minibatch.
"""

from __future__ import annotations

import math
import time

from laplace_kf.callers import warn_user
from laplace_kf.rates import Clock

__all__ = ["SLOW", "SURE", "Forecast", "Progress", "duration", "size"]

SLOW = 20.0  # seconds from which on a prediction is announced
SURE = 1.0  # seconds after which what was done is worth a forecast


class Progress:
    """Extrapolates from the pieces that are done to all of them.

    Args:
        pieces: how many there are, all of a kind.
        clock: what is read.
    """

    def __init__(self, pieces: int, clock: Clock = time.perf_counter) -> None:
        self.pieces, self.clock = pieces, clock
        self.finished = 0
        self._start = clock()

    def done(self, pieces: int) -> None:
        """So many more are."""
        self.finished = min(self.pieces, self.finished + pieces)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that the rest will take, at the pace so far; 0 once all is done, and before anything is."""
        return self.elapsed * (self.pieces - self.finished) / self.finished if self.finished else 0.0


class Forecast(Progress):
    """Warns once if variances are going to take long.

    Args:
        examples: ``N``.
        outputs: ``C'``, of an example.
    """

    def __init__(self, examples: int, outputs: int) -> None:
        super().__init__(examples * outputs)
        self.examples, self.outputs = examples, outputs
        self._said = False

    def done(self, pieces: int) -> None:
        """So many more of the ``N · C'`` variances are made."""
        super().done(pieces)
        if self._said or self.elapsed < SURE or self.finished == self.pieces:
            return
        self._said = True
        total = self.elapsed + self.left
        if total > SLOW:
            warn_user(
                f"exact variances take a backward pass for each of the {self.outputs:,} outputs of an example; those "
                f"of these {self.examples:,} examples will take about {total:.0f} s. Draws take one forward pass each: "
                'posterior.predict(x, method="mc", samples=20), or posterior.method = "mc" for all predictions; '
                'method="map" takes one forward pass and knows of no uncertainty'
            )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if not math.isfinite(seconds):
        return "no limit"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} bytes"
