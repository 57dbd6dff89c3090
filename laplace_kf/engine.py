"""The engine: minibatch → tape → signals → sums. Knows likelihoods, estimators and structures by interface only.

``Statistics`` are sums over data that carry their counts; ``+`` and ``scale`` are their only operations, and minibatch
accumulation, moving averages, merging workers and discounting old data are all made of these two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from random import getstate, setstate
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from laplace_kf.agreement import require_same_loss
from laplace_kf.batches import Forward, check_finite, to_device
from laplace_kf.callers import warn_user
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch
from laplace_kf.estimators.base import Estimator
from laplace_kf.graphs import check_ignored
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.models import require_memory, undisturbed, usable
from laplace_kf.operators import Blockwise, Matrix
from laplace_kf.outputs.arranged import decided
from laplace_kf.tape import Block, FlatLayout, MatrixSignals, Observation, Patterns, Signals, Tracer

__all__ = ["Accumulator", "Statistics", "StructureRule", "collect", "lasting", "preserved"]

Sums = dict[str, tuple[Tensor, ...]]
MEMORY_BYTES = 128 * 2**20  # back-propagated columns of one minibatch that may exist at once
MANY_BLOCKS = 5  # named in one warning
MANY_COLUMNS = 2000  # backward passes per minibatch from which a fit is announced as slow
INSTEAD = (
    'Use structure="diag" or "kron", fewer parameters (parameters="last_layer" or patterns), estimator="sampled", '
    '"projection" or "importance" (a few columns per example), or smaller batches.'
)


class StructureRule(Protocol):
    """What the engine needs of a structure (see :class:`laplace_kf.structures.base.Structure`)."""

    name: ClassVar[str]
    several_passes: bool

    @property
    def counts_positions(self) -> bool:
        """Whether the sums depend on which positions of an input count."""

    @property
    def fixed(self) -> Sums:
        """What earlier passes found and the sums refer to."""

    def first(self) -> Any:
        """The structure as a user asks for it."""

    def with_fixed(self, fixed: Sums) -> StructureRule:
        """The structure that reads saved sums."""

    def settled(self, blocks: Mapping[str, Block], layout: FlatLayout, outputs: Tensor, like: Tensor) -> StructureRule:
        """The structure to gather, decided at the first minibatch (outputs ``(N, ...)``)."""

    def require_memory(self, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        """Refuses what does not fit, in the type and on the device of ``like`` (any shape)."""

    def refined(self, statistics: Statistics) -> StructureRule | None:
        """What to gather in a further pass over the data."""

    def again(self, statistics: Statistics) -> StructureRule | None:
        """What to gather after another first pass, along the bases of this structure."""

    def turned(self, statistics: Statistics) -> Statistics:
        """Statistics of this structure along the bases that fit their own factors best."""

    def merged(self, mine: Sums, other: Any, theirs: Sums) -> tuple[StructureRule, Sums]:
        """The sums of two data sets together."""

    def kept_layout(self, layout: FlatLayout) -> FlatLayout:
        """The part of a layout that the sums cover."""

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        """Whether the closed forms of the layer at the output are taken."""

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        """Blocks that are kept as less than the structure's own form, and why."""

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        """Bytes per column of ``count`` examples."""

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        """Makes zero sums for new blocks, in the type and on the device of ``like`` (any shape)."""

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        """Takes in inputs."""

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        """Takes in columns."""

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        """Takes in an output factor ``(O, O)``."""

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        """The sums as they are kept."""

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        """The mean curvature."""


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
    """

    structure: StructureRule
    layout: FlatLayout
    blocks: Mapping[str, Block]
    sums: Sums
    count: float
    log_likelihood: Tensor
    terms: float
    outputs: str | None = None

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
                raise IncompatiblePair(f"block {name!r} has a different form in the two statistics")
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
            raise ValueError(f"the factor must be positive and finite, got {factor}")
        sums = {name: tuple(part * factor for part in parts) for name, parts in self.sums.items()}
        return replace(
            self,
            sums=sums,
            count=self.count * factor,
            log_likelihood=self.log_likelihood * factor,
            terms=self.terms * factor,
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


class Accumulator:
    """Mutable sums while the data go by; :meth:`freeze` makes them :class:`Statistics`.

    Args:
        tracer: runs the model.
        likelihood: output curvature.
        estimator: which columns.
        structure: which sums.
        generator: random numbers of the estimator.
        dtype: type of the sums; default: the model's, float32 at least.
    """

    def __init__(
        self,
        tracer: Tracer,
        likelihood: Likelihood,
        estimator: Estimator,
        structure: StructureRule,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tracer, self.likelihood, self.estimator, self.structure = tracer, likelihood, estimator, structure
        self.generator = generator
        self.dtype = dtype
        self.sums: Sums = {}
        self.count = 0
        self.terms = 0.0
        self.log_likelihood = torch.zeros((), dtype=torch.float64)
        self._announced = False
        self._met = False  # whether a minibatch came
        self._patterns: Patterns = {}  # kept no longer than the weights

    def add(self, batch: Any, index: int) -> None:
        """Takes in one minibatch.

        Raises:
            NonFinite: for NaN or infinity in inputs or outputs, with the number of the batch.
            ShapeMismatch: if targets do not fit the outputs.
            IncompatiblePair: if what is asked for cannot fit into the memory; says how much it needs.
        """
        check_finite(batch, index, "the batch")
        self.take(self.tracer.observe(batch, index), index)

    def take(self, observation: Observation, index: int = 0) -> None:
        """Takes in a forward pass made already (by the same tracer); errors as :meth:`add`."""
        if observation.count == 0:
            raise ShapeMismatch(f"batch {index} has no examples (outputs {tuple(observation.outputs.shape)})")
        check_ignored(observation.batch, observation.targets, self.likelihood, self.tracer.forward)
        self.likelihood = decided(self.likelihood, observation.outputs, observation.targets)
        self.likelihood.check(observation.outputs.detach(), observation.targets)
        counted = self.likelihood.counted(observation.outputs.detach(), observation.targets)
        examples = None if counted is None else counted.flatten(1).any(1)
        if examples is not None and observation.chain is not None and not bool(examples.all()):
            observation = observation.part(examples.nonzero()[:, 0])
            counted = self.likelihood.counted(observation.outputs.detach(), observation.targets)
        number = observation.count if examples is None else int(examples.sum())
        if self.dtype is None:
            kind = observation.outputs.dtype
            self.dtype = kind if kind in (torch.float32, torch.float64) else torch.float32
        like = torch.zeros((), dtype=self.dtype, device=observation.outputs.device)
        if not self._met:
            self._met = True
            self.structure = self.structure.settled(self.tracer.blocks, self.tracer.layout, observation.outputs, like)
        self.structure.require_memory(self.tracer.blocks, self.tracer.layout, like)
        self._prepare(self.tracer.blocks)
        if number == 0:  # not one target counts
            return
        with torch.no_grad():
            if observation.outputs.requires_grad:  # else no selected parameter took part: no curvature
                if self.structure.counts_positions:
                    self.structure.add_inputs(self.sums, observation.input_signals(counted, self._patterns))
                self.estimator.measure(observation, self.likelihood, self, self.generator)
            wide = observation.outputs.detach()
            wide = wide if wide.dtype in (torch.float32, torch.float64) else wide.float()
            log_prob = self.likelihood.log_prob(wide, observation.targets)
        self.log_likelihood += log_prob.sum(dtype=torch.float64).cpu()
        self.terms += self.likelihood.terms(observation.targets)
        self.count += number

    def _prepare(self, blocks: Mapping[str, Block]) -> None:
        """Zero sums for new blocks, each on the device of its parameters (a model may lie on several)."""
        for name, block in blocks.items():
            like = torch.zeros((), dtype=self.dtype, device=self.tracer.named[block.parameters[0]].device)
            self.structure.prepare(self.sums, {name: block}, self.tracer.layout, like)

    def takes_output_signals(self) -> bool:
        """Whether the structure takes the closed forms of the layer at the output (asked by the estimator)."""
        return self.structure.takes_output_signals(self.tracer.blocks, self.tracer.layout)

    def expect_columns(self, count: int, observation: Observation) -> None:
        """Warns, once, before very many columns are sent back (called by the estimator)."""
        if count > MANY_COLUMNS and not self._announced:
            self._announced = True
            warn_user(
                f"estimator {self.estimator.name!r} sends {count} columns back through the network for every minibatch "
                f"(outputs {tuple(observation.outputs.shape)}), which takes about {count} backward passes each. "
                'estimator="sampled", "projection" or "importance" take a few; parameters="last_layer" needs none.'
            )

    def add_columns(self, signals: Mapping[str, Signals]) -> None:
        """Takes in the signals of some columns (called by the estimator)."""
        self.structure.add_columns(self.sums, signals, self.tracer.blocks)

    def add_output_factor(self, name: str, factor: Tensor) -> None:
        """Takes in an output factor ``(O, O)`` (called by the estimator)."""
        if not self.structure.add_output_factor(self.sums, name, factor):
            raise IncompatiblePair(
                f"estimator {self.estimator.name!r} gives Kronecker output factors, which structure "
                f'{self.structure.name!r} does not have; use structure="kron", or another estimator'
            )

    def columns_at_once(self, observation: Observation) -> int:
        """How many columns of a minibatch fit into the memory budget.

        Raises:
            IncompatiblePair: if not even one fits into the memory of the device; says how much it needs.
        """
        itemsize = observation.outputs.element_size()
        each = observation.column_bytes() + self.structure.column_bytes(self.tracer.blocks, observation.count, itemsize)
        what = f"one column of a minibatch with outputs {tuple(observation.outputs.shape)}"
        require_memory(each, observation.outputs.device, what, INSTEAD)
        return max(1, MEMORY_BYTES // max(1, each))

    def _warn_of_poorer(self, blocks: Mapping[str, Block]) -> None:
        """Warns, once a block, where less is kept than the structure promises."""
        found = {n: why for n, why in self.structure.poorer(blocks).items() if n not in self.tracer.warned}
        self.tracer.warned.update(found)
        if found:
            listed = "; ".join(f"{name!r}: {why}" for name, why in list(found.items())[:MANY_BLOCKS])
            more = f"; and {len(found) - MANY_BLOCKS} more" if len(found) > MANY_BLOCKS else ""
            warn_user(
                f"structure {self.structure.name!r} keeps less than a pair of factors for {len(found)} block(s): "
                f'{listed}{more}. It is in summary(), too; vector_blocks="full" keeps dense blocks, max_side= allows '
                "wider factors, parameters=[patterns] leaves parameters out."
            )

    def freeze(self) -> Statistics:
        """The statistics of everything taken in.

        Raises:
            ShapeMismatch: if no example came.
            UnsupportedLayer: if a selected parameter never took part.
            NonFinite: if a sum is not finite.
        """
        if self.count == 0 and self._met:
            raise ShapeMismatch(
                f"all targets of the data are ignored ({self.likelihood!r}), so there is nothing to fit; check the "
                "targets, or the ignore_index of the likelihood"
            )
        if self.count == 0:
            raise ShapeMismatch("the data are empty: no batch was yielded, so there is nothing to fit")
        self.tracer.require_all_seen()
        blocks = self.tracer.all_blocks()
        self._warn_of_poorer(blocks)
        self._prepare(blocks)
        sums = self.structure.finished(self.sums, blocks, self.tracer.layout)
        for name, parts in sums.items():
            for part in parts:
                if not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                    raise NonFinite(
                        f"the curvature of block {name!r} is not finite, although all batches and outputs were; the "
                        "weights or activations are too large for this floating-point type"
                    )
        layout = self.structure.kept_layout(self.tracer.layout)
        shown = getattr(self.likelihood, "layout", None)
        log_likelihood, terms = self.log_likelihood, self.terms
        return Statistics(self.structure, layout, blocks, sums, float(self.count), log_likelihood, terms, shown)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: Likelihood,
    estimator: Estimator,
    structure: StructureRule,
    *,
    parameters: str | Sequence[str] = "all",
    forward: Forward | None = None,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    passes: int = 1,
    progress: bool = False,
    unused: str = "error",
) -> Statistics:
    """Statistics of the data; the model is in eval mode meanwhile and left exactly as it was.

    Args:
        model, likelihood, estimator, structure, parameters, forward, generator, dtype: see :class:`Accumulator` and
            :class:`laplace_kf.tape.Tracer`.
        batches: one pass over the data, or more if the structure or ``passes`` asks for it.
        passes: how often to go through the data for one sum (random augmentation).
        progress: show a bar.
        unused: ``"error"`` or ``"prior"``, see :class:`laplace_kf.tape.Tracer`.

    Raises:
        ShapeMismatch: if the data have to be seen again and cannot be.
        UnsupportedLayer: for a kind of model that cannot be handled (:func:`laplace_kf.models.usable`).
    """
    if (structure.several_passes or passes > 1) and isinstance(batches, Iterator):
        raise ShapeMismatch(_ONCE.format(reason=_reason(structure, passes)))
    model = usable(model)
    with preserved(model):
        tracer = Tracer(model, forward, parameters, unused=unused)
        following: StructureRule | None = structure
        stage = 0
        while following is not None:
            accumulator = Accumulator(tracer, likelihood, estimator, following, generator, dtype)
            index, stage = 0, stage + 1
            for number in range(passes):
                seen = accumulator.count
                label = f"fit {number + 1}/{passes}" + (f", stage {stage}" if structure.several_passes else "")
                for batch in tqdm(batches, desc=label, disable=not progress):
                    accumulator.add(batch, index)
                    if index == 0 and stage == 1:
                        require_same_loss(model, to_device(batch, tracer.device), forward, likelihood)
                    index += 1
                if (number or stage > 1) and accumulator.count == seen:
                    raise ShapeMismatch(_ONCE.format(reason=_reason(structure, passes)))
            statistics, likelihood = accumulator.freeze(), accumulator.likelihood
            following = statistics.structure.refined(statistics)
        return statistics


_ONCE = (
    "{reason}, but these data can be gone through only once: pass a DataLoader, a list of batches or a pair of tensors "
    "(a generator can be made into a list: list(batches))"
)


def _reason(structure: StructureRule, passes: int) -> str:
    return f"passes={passes}" if passes > 1 else f"structure {structure.name!r} goes over the data more than once"


class _Snapshot:
    """What one module must look like afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.containers = {
            name: value.copy() for name, value in self.attributes.items() if isinstance(value, (dict, list, set))
        }
        kept = [b for b in module._buffers.values() if b is not None]
        if getattr(module, "max_norm", None) is not None:
            kept += list(module.parameters(recurse=False))
        self.tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in kept]

    def restore(self) -> None:
        """Puts attributes, containers and tensors back; tensors only if something wrote to them."""
        own = self.module.__dict__
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        for name, contents in self.containers.items():
            current = own[name]
            if _identities(current) != _identities(contents):
                current.clear()
                current.extend(contents) if isinstance(contents, list) else current.update(contents)
        for tensor, version, content in self.tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(content)


def _identities(container: dict[Any, Any] | list[Any] | set[Any]) -> list[Any]:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return [id(value) for value in container]


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside can be kept and used anywhere, also if the caller is in inference mode (then: no graph)."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the model and the caller's random states are what they were.

    Inside, compiled modules run as plain Python, and the caller's autocast is on for the model only
    (:mod:`laplace_kf.models`).

    Of the model: every module's mode and attributes, its buffers, and the weights of embeddings that renormalise
    themselves (``max_norm``). Random states are those of torch (CPU and the model's accelerators), numpy and Python:
    loaders shuffle and augment from them.
    """
    modules = [_Snapshot(module) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    states = [(device, getattr(torch, device.type).get_rng_state(device)) for device in devices]
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), getstate()  # noqa: NPY002 (the caller's)
    try:
        for snapshot in modules:
            snapshot.module.training = False
        with undisturbed(), torch.inference_mode(False):  # curvature needs a graph, also for a caller in inference mode
            yield
    finally:
        for snapshot in modules:
            snapshot.restore()
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)  # noqa: NPY002
        setstate(python_state)
        for device, state in states:
            with suppress(RuntimeError):
                getattr(torch, device.type).set_rng_state(state, device)
