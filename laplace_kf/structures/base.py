"""A structure: which sums over the data it keeps, and which matrix they become; and those sums, with their counts.

``Statistics`` are sums over data that carry their counts; ``+`` and ``scale`` are their only operations, and minibatch
accumulation, moving averages, merging workers and discounting old data are all made of these two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.likelihoods.noise import no_moments
from laplace_kf.models import LITTLE, memory_bytes
from laplace_kf.notebooks import as_call
from laplace_kf.operators import Blockwise, Matrix
from laplace_kf.registry import Registry
from laplace_kf.tape import Block, EntryLayout, FlatLayout, MatrixSignals, Signals

__all__ = [
    "STRUCTURES",
    "Results",
    "Statistics",
    "Structure",
    "Sums",
    "Work",
    "added",
    "memory_limit",
    "pairs",
    "per_position",
    "zeros",
]

Sums = dict[str, tuple[Tensor, ...]]

STRUCTURES: Registry[type[Structure]] = Registry("structure")


@dataclass(frozen=True)
class Work:
    """A piece of work that can be done anywhere.

    Attributes:
        cost: multiply-adds, up to a factor common to all pieces.
        run: does it.
        like: tensors of the shapes, types and devices of the result.
    """

    cost: float
    run: Callable[[], tuple[Tensor, ...]]
    like: Callable[[], tuple[Tensor, ...]]


Results = Mapping[str, tuple[Tensor, ...]]
"""What pieces of :class:`Work` gave, by name."""


class Structure(ABC):
    """Statistics of one kind: additive sums by block name, and how to read their mean as a matrix.

    Every method is a function of its arguments; a structure holds no data. One that goes over the data several times
    holds what the earlier passes found (:attr:`fixed`), in a new object for every pass.

    Attributes:
        reason: why it was chosen, if it was chosen automatically.
    """

    name: ClassVar[str]
    counts_positions: bool = False  # whether the sums depend on which positions of an input count (:meth:`add_inputs`)
    inputs_first: bool = False  # whether :meth:`add_columns` needs what :meth:`add_inputs` did with the same minibatch
    takes_damping: ClassVar[bool] = False  # whether it has Kronecker blocks, which can be damped in several ways
    several_passes: bool = False  # whether the data have to be gone through more than once
    column_by_column: ClassVar[bool] = False  # whether several columns at once save :meth:`add_columns` nothing
    reason: str = ""

    @classmethod
    def examples(cls) -> tuple[Structure, ...]:
        """Objects to try the structure on (the contract tests do)."""
        return (cls(),)

    def __repr__(self) -> str:
        return as_call(self, self.options())

    @property
    def fixed(self) -> Sums:
        """What earlier passes found and the sums refer to (bases): tensors by block name, kept with the sums."""
        return {}

    def with_fixed(self, fixed: Sums) -> Structure:
        """The structure that reads saved sums, given their :attr:`fixed` tensors."""
        return self

    def first(self) -> Structure:
        """The structure as a user asks for it: what the first pass of another fit starts from."""
        return self

    def settled(self, blocks: Mapping[str, Block], layout: FlatLayout, outputs: Tensor, like: Tensor) -> Structure:
        """The structure to gather, decided at the first minibatch.

        Args:
            blocks, layout: what the tape found.
            outputs: the network's outputs ``(N, ...)`` for it.
            like: type and device of the sums (any shape).
        """
        return self

    def refinement(self, statistics: Statistics) -> dict[str, Work]:
        """What has to be computed before a further pass over the data, in pieces by name that can be done apart."""
        return {}

    def refined(self, statistics: Statistics, results: Results | None = None) -> Structure | None:
        """What to gather in a further pass over the data, given the finished one; ``None`` if this was the last.

        Args:
            statistics: of the finished pass.
            results: of every piece of :meth:`refinement`; computed here by default.
        """
        return None

    def known(self, name: str) -> int:
        """How many of a block's finished sums were there before the pass; the others are sums over its examples."""
        return 0

    def again(self, statistics: Statistics) -> Structure | None:
        """What to gather after another first pass (``statistics``), along the :attr:`fixed` bases of this structure.

        ``None`` where there is nothing to keep: then :meth:`refined` finds out anew.
        """
        return None

    def turned(self, statistics: Statistics) -> Statistics:
        """Statistics of this structure along the bases that fit their own factors best; as they are without bases."""
        return statistics

    def merged(self, mine: Sums, other: Structure, theirs: Sums) -> tuple[Structure, Sums]:
        """The sums of two data sets together, and the structure that reads them."""
        return self, added(mine, theirs)

    def kept_layout(self, layout: FlatLayout) -> FlatLayout:
        """The part of a layout that the sums cover: all of it, but for single weights."""
        return layout

    def of_entries(self, entries: EntryLayout) -> Structure:
        """The structure over single weights; raises :class:`IncompatiblePair` where there is none."""
        raise IncompatiblePair(
            f"a subnetwork of single weights has a dense posterior, structure {self.name!r} does not apply to it; use "
            'structure="full" (or leave structure out), or select whole parameters with parameters=[patterns]'
        )

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        """Bytes that the sums and their decompositions take, roughly, for numbers of ``itemsize`` bytes."""
        return 2 * layout.size * itemsize

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        """Sides of the symmetric matrices that are decomposed after the fit, or between its passes."""
        return []

    def require_memory(self, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        """Refuses sums that do not fit into the memory of the device of ``like`` (any shape).

        Raises:
            IncompatiblePair: with the bytes needed and what would fit.
        """
        itemsize = like.element_size()
        needed = self.memory(blocks, layout, itemsize)
        if needed <= LITTLE or needed <= (limit := memory_limit(like.device)):
            return
        fitting = [f"structure={n!r}" for n, s in STRUCTURES.items() if s().memory(blocks, layout, itemsize) <= limit]
        last = list(blocks.values())[-1]
        part = self.memory({last.name: last}, FlatLayout(last.parameters, last.shapes), itemsize)
        if part <= limit:
            fitting.append(f"parameters={list(last.parameters)} ({_size(part)})")
        fitting.append(f"parameters=Subnetwork(size={int((limit / (3 * itemsize)) ** 0.5)}) or fewer single weights")
        raise IncompatiblePair(
            f"structure={self.name!r} over {layout.size} parameters needs {_size(needed)} (its sums and their "
            f"decompositions), and the device has {_size(limit)}; what fits: {', '.join(fitting)}"
        )

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values that can be saved."""
        return {}

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        """Whether :meth:`add_columns` can take :class:`~laplace_kf.tape.OutputSignals` for one of these blocks alone.

        They are sums over all columns (``add_column_gram``, ``add_squares``, ``add_outer``),
        so a structure that needs single columns, or all blocks at once, cannot.
        """
        return False

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        """Bytes this structure adds per back-propagated column of ``count`` examples."""
        return 0

    @abstractmethod
    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        """Adds zero sums for blocks that have none yet, in the type and on the device of ``like`` (any shape)."""

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        """Takes in what one minibatch's inputs say: once a minibatch, after its columns unless ``inputs_first``."""
        return

    @abstractmethod
    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        """Takes in back-propagated columns (any number of times a minibatch)."""

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        """Takes in an output factor ``(O, O)`` computed otherwise (KFRA); ``False`` if this structure has none."""
        return False

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        """Names of blocks that are kept as less than the structure's own form, and why."""
        return {}

    def errors(self, curvature: Blockwise) -> dict[str, str]:
        """What is known of the error of what :meth:`poorer` names, by block name, from the finished curvature."""
        return {}

    def narrowed(self) -> Structure:
        """The structure with factors that are whole or diagonal: for what is done with eigenbases."""
        return self

    def with_diagonal(self, sums: Sums, values: Mapping[str, Tensor]) -> Sums:
        """Sums plus diagonal matrices ``(R, O, I)`` by block name; unchanged where there is no place for them."""
        return sums

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        """The sums as they are kept: symmetric, in flat order where they span blocks."""
        return dict(sums)

    @abstractmethod
    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        """The mean curvature from means (sums divided by the number of examples)."""


@dataclass(frozen=True)
class Statistics:
    """Sums over data with their counts.

    Attributes:
        structure: the structure that reads the sums.
        layout: flat order of the selected parameters.
        blocks: blocks by name.
        sums: sums by block name.
        count: number of examples behind the sums (a float once scaled); one whose targets are all ignored is none.
        log_likelihood: sum of ``log p(y | x)`` over them, 0-dim float64.
        terms: number of scalar densities in that sum.
        outputs: layout of the outputs that the targets showed (``likelihood.with_layout``), or ``None``.
        moments: sums of what the likelihood needs to change its noise scale later, ``(K,)`` float64, mostly empty.
        axes: of the inputs, where they were one tensor ``(N, ...)`` with as many in all minibatches; else ``None``.
    """

    structure: Structure
    layout: FlatLayout
    blocks: Mapping[str, Block]
    sums: Sums
    count: float
    log_likelihood: Tensor
    terms: float
    outputs: str | None = None
    moments: Tensor = field(default_factory=no_moments)
    axes: int | None = None

    @property
    def n_data(self) -> float:
        """Number of examples ``N``."""
        return self.count

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both data sets together.

        Raises:
            IncompatiblePair: if they cover other parameters, other blocks or another structure.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        common = self.layout.common(other.layout)
        if self.structure.name != other.structure.name or common is None:
            raise IncompatiblePair(
                "statistics can only be added if they have the same structure and cover the same parameters "
                f"({self.structure.name!r} over {self.layout.size} and {other.structure.name!r} over "
                f"{other.layout.size} parameters)"
            )
        mine, theirs = self.without(other.used), other.without(self.used)
        blocks = {**mine.blocks, **theirs.blocks}
        for name in set(mine.blocks) & set(theirs.blocks):
            if mine.blocks[name] != theirs.blocks[name]:
                raise IncompatiblePair(
                    f"block {name!r} has a different form in the two statistics; fit both with the same structure "
                    "and model"
                )
        covered = [name for block in blocks.values() for name in block.parameters]
        if len(blocks) > len(mine.blocks) and len(blocks) > len(theirs.blocks):
            _require_one_form(mine.blocks, theirs.blocks, covered)
        structure, sums = mine.structure.merged(mine.sums, theirs.structure, theirs.sums)
        return Statistics(
            structure,
            common,
            blocks,
            sums,
            self.count + other.count,
            self.log_likelihood + other.log_likelihood,
            self.terms + other.terms,
            self.outputs or other.outputs,
            self.moments + other.moments if len(self.moments) == len(other.moments) else no_moments(),
            self.axes if self.axes == other.axes else None,
        )

    @property
    def used(self) -> set[str]:
        """Names of the parameters that took part in a forward pass."""
        return {name for block in self.blocks.values() if not block.unused for name in block.parameters}

    def without(self, names: Collection[str]) -> Statistics:
        """Without the blocks of unused parameters among ``names``, which say nothing beside others' that are used."""
        gone = {n for n, block in self.blocks.items() if block.unused and block.parameters[0] in names}
        if not gone:
            return self
        fixed = {name: parts for name, parts in self.structure.fixed.items() if name not in gone}
        return replace(
            self,
            structure=self.structure.with_fixed(fixed) if fixed else self.structure,
            blocks={name: block for name, block in self.blocks.items() if name not in gone},
            sums={name: parts for name, parts in self.sums.items() if name not in gone},
        )

    def scale(self, factor: float) -> Statistics:
        """Sums and counts times ``factor``: the mean does not change.

        Raises:
            ValueError: if the factor is not positive and finite.
        """
        if not 0 < factor < float("inf"):
            raise InvalidArgument(f"the factor must be positive and finite, got {factor}")
        sums = {name: tuple(part * factor for part in parts) for name, parts in self.sums.items()}
        return replace(
            self,
            sums=sums,
            count=self.count * factor,
            log_likelihood=self.log_likelihood * factor,
            terms=self.terms * factor,
            moments=self.moments * factor,
        )

    def mean(self) -> Blockwise:
        """The mean curvature ``C̄`` as a Matrix of size ``P``."""
        means = {name: tuple(part / self.count for part in parts) for name, parts in self.sums.items()}
        return self.structure.matrix(means, self.blocks, self.layout)

    def total(self) -> Matrix:
        """``N · C̄``."""
        return self.mean().scaled(self.count)


def _require_one_form(mine: Mapping[str, Block], theirs: Mapping[str, Block], covered: Sequence[str]) -> None:
    """Refuses parameters that two statistics keep in blocks of different names."""
    twice = {
        name
        for name in set(covered)
        if {b for b, block in mine.items() if name in block.parameters}
        != {b for b, block in theirs.items() if name in block.parameters}
        and any(name in block.parameters for block in mine.values())
        and any(name in block.parameters for block in theirs.values())
    }
    if twice:
        raise IncompatiblePair(
            f"parameters {', '.join(sorted(twice))} belong to other blocks in one of the statistics than in the other"
        )


def memory_limit(device: torch.device) -> int:
    """Bytes of memory of a device (of this machine, for the CPU)."""
    return memory_bytes(device)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def added(mine: Sums, theirs: Sums) -> Sums:
    """Two sets of sums added part by part; a block that one of them lacks is taken from the other."""
    out = dict(mine)
    for name, parts in theirs.items():
        out[name] = tuple(a + b for a, b in zip(mine[name], parts, strict=True)) if name in mine else parts
    return out


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape in the type and on the device of ``like``."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def pairs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The factors ``(A, G)`` of every use of a weight, ``G`` as the mean over positions.

    Args:
        parts: sums, or sums divided by the number of examples: ``A``, ``Σ g gᵀ`` and the number of positions of each
            use, and after them a sketch of the first ``G`` if it is wide, which is of no concern here. Files of
            version 0.1.0 lack the number, and their ``G`` is the mean already.
    """
    if len(parts) == 2 or parts[2].dim():
        return list(zip(parts[::2], parts[1::2], strict=True))
    found = parts[: len(parts) // 3 * 3]
    return [(a, per_position(g, n)) for a, g, n in zip(found[::3], found[1::3], found[2::3], strict=True)]


def per_position(total: Tensor, count: Tensor) -> Tensor:
    """Sums of any shape over a 0-dim number of positions; no positions, no gradients: 0."""
    return total / count.clamp_min(torch.finfo(count.dtype).tiny)
