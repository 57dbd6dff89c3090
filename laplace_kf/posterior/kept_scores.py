"""What a search over settings has measured, in a file: a search that was interrupted does not measure it again.

A search is a function of the posterior, the data, its arguments and the seeds of its draws, so it is simply run again:
what costs is looked up. That are the outputs of weight draws (the score of every point, with the scores by example) and
the variances of a linearised network; all else is computed anew, with the same numbers bit for bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laplace_kf import files
from laplace_kf.errors import ShapeMismatch
from laplace_kf.predictive import draw_seeds
from laplace_kf.resuming import require_same

__all__ = ["KeptScores"]

SECONDS = 1.0  # least time between two writings
LARGEST = 2**24  # numbers of variances that are kept
Kept = tuple[dict[str, Any], Tensor | None]  # values and scores by example


class KeptScores:
    """Scores and variances by what they are of, in a file that is removed at the end.

    Args:
        path: of the file; what is there is used.
        made_for: names and JSON-able values that have to be the same then.

    Raises:
        MissingFile: if there is no such folder.
        CorruptFile: if what is there is damaged, or no checkpoint of ``tune``.
        ShapeMismatch: if it was made for something else; says for what.
    """

    def __init__(self, path: str | os.PathLike[str], made_for: Mapping[str, Any]) -> None:
        self.path, self.made_for = files.require_folder(path), dict(made_for)
        self._seeds: list[int] | None = None
        self._data: str | None = None
        self._scores: dict[str, Kept] = {}
        self._variances: dict[str, list[Tensor]] = {}
        self._written = time.monotonic()
        if self.path.exists():
            tensors, header = files.read(self.path, files.TUNING)
            require_same(self.path, "search", header, self.made_for)
            self._seeds, self._data = header["seeds"], header["data"]
            for key, (number, values) in header["scores"].items():
                self._scores[key] = values, tensors.get(f"scores {number}")
            for number, (key, count) in enumerate(header["variances"]):
                self._variances[key] = [tensors[f"variances {number} {k}"] for k in range(count)]

    @contextmanager
    def running(self, generator: torch.Generator | None) -> Iterator[None]:
        """Around the search. If it fails the generator is what it was, so that the same call can be made."""
        before = None if generator is None else generator.get_state()
        try:
            yield
        except BaseException:
            if generator is not None and before is not None:
                generator.set_state(before)
            raise
        self.path.unlink(missing_ok=True)

    def seeds(self, samples: int, generator: torch.Generator | None) -> list[int]:
        """The seeds of the draws: those of the file, where there is one.

        Raises:
            ShapeMismatch: if the generator gives others.
        """
        fresh = draw_seeds(samples, generator)
        if self._seeds is None:
            self._seeds = fresh
        elif generator is not None and fresh != self._seeds:
            raise ShapeMismatch(
                f"{self.path} is the checkpoint of a search with a generator in another state; seed it as then, give "
                "another path, or remove the file to start anew"
            )
        return self._seeds

    def require_data(self, data: str) -> None:
        """Remembers by which digits the data are told apart.

        Raises:
            ShapeMismatch: if the file was made with others.
        """
        if self._data is not None and data != self._data:
            raise ShapeMismatch(
                f"the validation data are not those that {self.path} was made with (outputs or targets differ); they "
                "have to come in the same order; to start anew, remove the file or give another path"
            )
        self._data = data

    def score(self, key: Sequence[Any]) -> Kept | None:
        """Values and scores by example ``(N,)`` of a point, if it was measured."""
        return self._scores.get(json.dumps(key))

    def keep_score(self, key: Sequence[Any], values: dict[str, Any], parts: Tensor | None) -> None:
        """Keeps what was measured at a point: values, and scores by example ``(N,)``."""
        self._scores[json.dumps(key)] = values, parts

    def variances(self, key: Sequence[Any]) -> list[Tensor] | None:
        """What was found at some ratios, tensors of any shapes."""
        return self._variances.get(json.dumps(key))

    def keep_variances(self, key: Sequence[Any], found: Sequence[Any]) -> None:
        """Keeps what was found at some ratios, if it is tensors (of any shapes) and not too large."""
        tensors = [one for one in found if isinstance(one, Tensor)]
        if len(tensors) == len(found) and sum(one.numel() for one in tensors) <= LARGEST:
            self._variances[json.dumps(key)] = tensors
            self.write()

    def write(self) -> None:
        """Writes the file, unless it was written a moment ago."""
        if time.monotonic() - self._written < SECONDS:
            return
        tensors, scores = {}, {}
        for number, (key, (values, parts)) in enumerate(self._scores.items()):
            scores[key] = [number, values]
            if parts is not None:
                tensors[f"scores {number}"] = parts
        for number, found in enumerate(self._variances.values()):
            tensors.update({f"variances {number} {k}": one for k, one in enumerate(found)})
        header = {
            "made_for": self.made_for, "seeds": self._seeds, "data": self._data, "scores": scores,
            "variances": [[key, len(found)] for key, found in self._variances.items()],
        }  # fmt: skip
        files.write(self.path, tensors, header, files.TUNING)
        self._written = time.monotonic()
