"""Running curvature of which every process has a part: the parts are added up once a refresh, when an inverse is made.

The average over steps is linear, so each process can average what its own minibatches say, counted as a part of all
examples of the step; what the processes have is then summed where the whole is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from laplace_kf.distributed import Ranks, Seen, added_up, merged
from laplace_kf.errors import IncompatiblePair
from laplace_kf.optim.running import Running
from laplace_kf.optim.schedules import averaging_weight
from laplace_kf.structures.base import Statistics, Sums
from laplace_kf.tape.blocks import unused_blocks

__all__ = ["SharedRunning"]


class SharedRunning(Running):
    """As :class:`Running`, over the minibatches of all processes.

    Args:
        ranks: the processes.
        others: as of :class:`Running`.

    Attributes:
        statistics: the average, of all processes, when an inverse was made last.
    """

    def __init__(self, ranks: Ranks, *others: Any) -> None:
        super().__init__(*others)
        self.ranks = ranks
        self._mine: Statistics | None = None  # what this process adds to the average since then
        self._kept = 1.0  # what is left of the average of then
        self._count = 0.0  # examples behind all of it

    def update(self, step: int) -> None:
        if self._accumulator is None:
            return
        self._tracer = self._accumulator.tracer
        new, self._accumulator = self._accumulator.here(), None
        count = float(self.ranks.add_up([torch.tensor(new.count, dtype=torch.float64)], "the examples of a step")[0])
        self._seen += 1
        weight = averaging_weight(self._seen, self.ema) if self._count else 0.0
        share = weight / (1 - weight) * count / self._count if weight else 0.0
        self._kept *= share
        self._count = count + share * self._count
        self._mine = new if self._mine is None or not share else _added(new, self._mine, share)

    def wants_fresh(self, step: int) -> bool:
        return self.due(step)

    @property
    def latest(self) -> Statistics:
        """The average over all processes; they all come here together."""
        self.fold()
        assert self.statistics is not None
        return self.statistics

    def fold(self) -> None:
        """Adds up what the processes have; all of them call this.

        Raises:
            IncompatiblePair: if they keep parameters in different forms.
            UnsupportedLayer: if a selected parameter took part in none of them.
            DistributedFailure: if another process failed.
        """
        mine = self._mine
        if mine is None:
            return
        tracer = self._tracer
        known = (mine.count, True, float(mine.log_likelihood), mine.terms, mine.moments.tolist())
        everyone = self.ranks.exchange("the factors", Seen(mine.blocks, mine.layout, tracer.unseen(), *known))
        seen = merged(everyone)
        tracer.require_all_seen(seen.unseen)
        blocks = {**seen.blocks, **unused_blocks(seen.layout, seen.unseen)}
        absent = {name: block for name, block in blocks.items() if name not in mine.blocks}
        zero: Sums = {}
        like = next(iter(mine.sums.values()))[0].new_zeros(())
        mine.structure.prepare(zero, absent, seen.layout, like)
        sums = {**mine.structure.finished(zero, absent, seen.layout), **mine.sums} if absent else dict(mine.sums)
        sums = added_up(self.ranks, mine.structure, sums, list(blocks))
        older = self.statistics if self.statistics is not None and self._kept else None
        left = 0.0 if older is None else self._kept * older.count
        found = Statistics(
            mine.structure, seen.layout, blocks, sums, self._count - left,
            torch.tensor(seen.log_likelihood, dtype=torch.float64), seen.terms, mine.outputs,
            torch.tensor(seen.moments, dtype=torch.float64),
        )  # fmt: skip
        self.statistics = found if older is None else older.scale(self._kept) + found
        self._mine, self._kept = None, 1.0

    def require_whole(self) -> None:
        if self._mine is not None:
            raise IncompatiblePair(
                "since the last refresh every process has a part of the running factors, and they are whole only when "
                "added up: call optimizer.synchronize() in all processes first"
            )

    def export(self) -> dict[str, Any]:
        self.require_whole()
        return super().export()

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load(state, device)
        self._mine, self._kept = None, 1.0
        self._count = 0.0 if self.statistics is None else self.statistics.count


def _added(new: Statistics, old: Statistics, share: float) -> Statistics:
    """``new + share · old``, in the place of the sums of ``new``, which is given up."""
    sums = dict(new.sums)
    for name, parts in old.sums.items():
        if name not in sums:
            sums[name] = tuple(share * part for part in parts)
            continue
        for mine, theirs in zip(sums[name], parts, strict=True):
            mine.add_(theirs, alpha=share)
    return replace(
        new,
        blocks={**old.blocks, **new.blocks},
        sums=sums,
        count=new.count + share * old.count,
        log_likelihood=new.log_likelihood + share * old.log_likelihood,
        terms=new.terms + share * old.terms,
        moments=new.moments + share * old.moments,
    )
