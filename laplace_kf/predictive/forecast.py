"""How long exact variances of many outputs are going to take, measured while they are made, and said in time.

Exact variances take a backward pass for every output of an example: 3,072 for a small image to be segmented into three
classes. What one takes is known after the first few of them, on whatever machine this is.
"""

from __future__ import annotations

import time

from laplace_kf.callers import warn_user

__all__ = ["SLOW", "Forecast"]

SLOW = 20.0  # seconds from which on a prediction is announced
SURE = 1.0  # seconds after which what was done is worth a forecast


class Forecast:
    """Warns once if variances are going to take long.

    Args:
        examples: ``N``.
        outputs: ``C'``, of an example.
    """

    def __init__(self, examples: int, outputs: int) -> None:
        self.examples, self.outputs = examples, outputs
        self._done, self._said = 0, False
        self._start = time.perf_counter()

    def done(self, entries: int) -> None:
        """So many more of the ``N · C'`` variances are made."""
        self._done += entries
        elapsed = time.perf_counter() - self._start
        left = self.examples * self.outputs - self._done
        if self._said or elapsed < SURE or left <= 0:
            return
        total = elapsed * (1 + left / max(1, self._done))
        self._said = True
        if total > SLOW:
            warn_user(
                f"exact variances take a backward pass for each of the {self.outputs:,} outputs of an example; those "
                f"of these {self.examples:,} examples will take about {total:.0f} s. Draws take one forward pass each: "
                'posterior.predict(x, method="mc", samples=20), or posterior.method = "mc" for all predictions; '
                'method="map" takes one forward pass and knows of no uncertainty'
            )
