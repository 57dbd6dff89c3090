"""The engine: minibatch → tape → signals → sums. Knows likelihoods, estimators and structures by interface only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from laplace_kf.agreement import as_read, require_same_loss
from laplace_kf.batches import Forward, to_device
from laplace_kf.callers import warn_user
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch
from laplace_kf.estimators.base import Estimator
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.noise import no_moments
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved, require_memory, usable
from laplace_kf.structures.base import Statistics, Structure, Sums
from laplace_kf.tape import Block, Observation, Patterns, Signals, Tracer

__all__ = ["Accumulator", "collect"]

MEMORY_BYTES = 128 * 2**20  # back-propagated columns of one minibatch that may exist at once
MANY_BLOCKS = 5  # named in one warning
MANY_COLUMNS = 2000  # backward passes per minibatch from which a fit is announced as slow
INSTEAD = (
    'Use structure="diag" or "kron", fewer parameters (parameters="last_layer" or patterns), estimator="sampled", '
    '"projection" or "importance" (a few columns per example), or smaller batches.'
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
        structure: Structure,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tracer, self.likelihood, self.estimator, self.structure = tracer, likelihood, estimator, structure
        self.generator = generator
        self.dtype = dtype
        self.sums: Sums = {}
        self.count = 0
        self.terms = 0.0
        self.moments = no_moments()
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
        check_batch(batch, index, "the batch", self.tracer.forward, self.likelihood.nan_is_missing)
        self.take(self.tracer.observe(batch, index), index)

    def take(self, observation: Observation, index: int = 0) -> None:
        """Takes in a forward pass made already (by the same tracer); errors as :meth:`add`."""
        if observation.count == 0:
            raise ShapeMismatch(f"batch {index} has no examples (outputs {tuple(observation.outputs.shape)})")
        seen = (self.tracer.model, observation.batch, self.tracer.forward, observation.outputs, observation.targets)
        self.likelihood = as_read(self.likelihood, *seen)
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
        moments = self.likelihood.moments(wide, observation.targets).cpu()
        self.moments = self.moments + moments if len(self.moments) else moments
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
        known = (float(self.count), self.log_likelihood, self.terms, shown, self.moments)
        return Statistics(self.structure, layout, blocks, sums, *known)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: Likelihood,
    estimator: Estimator,
    structure: Structure,
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
        following: Structure | None = structure
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


def _reason(structure: Structure, passes: int) -> str:
    return f"passes={passes}" if passes > 1 else f"structure {structure.name!r} goes over the data more than once"
