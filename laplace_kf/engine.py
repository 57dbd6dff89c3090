"""The engine: minibatch → tape → signals → sums. Knows likelihoods, estimators and structures by interface only."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from laplace_kf.agreement import as_read, require_same_loss, warn_of_links
from laplace_kf.batches import Forward, inputs_of, to_device
from laplace_kf.callers import warn_user
from laplace_kf.distributed import First, Ranks, Seen, added_up, merged, refined
from laplace_kf.draws import ExampleDraws
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch
from laplace_kf.estimators.base import Estimator
from laplace_kf.forecast import Progress, duration, size
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.noise import no_moments
from laplace_kf.likelihoods.reading import read_once
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved, require_memory, usable
from laplace_kf.rates import decomposition_seconds
from laplace_kf.resuming import Journal, length
from laplace_kf.shards import Shard
from laplace_kf.structures.base import STRUCTURES, Statistics, Structure, Sums
from laplace_kf.tape import Block, FlatLayout, Observation, Patterns, Signals, Tracer
from laplace_kf.tape.blocks import unused_blocks

__all__ = ["Accumulator", "collect"]

log = logging.getLogger(__name__)

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
        shard: knows the numbers of the examples of the minibatch at hand: estimators then draw by example.
        ranks: processes that each take in a share of the data; :meth:`freeze` is then of all shares together.
    """

    def __init__(
        self,
        tracer: Tracer,
        likelihood: Likelihood,
        estimator: Estimator,
        structure: Structure,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
        shard: Shard | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.tracer, self.likelihood, self.estimator, self.structure = tracer, likelihood, estimator, structure
        self.generator, self.dtype = generator, dtype
        self.sums: Sums = {}
        self.count: float = 0
        self.terms = 0.0
        self.moments = no_moments()
        self.log_likelihood = torch.zeros((), dtype=torch.float64)
        self.shard, self.ranks = (shard if estimator.draws else None), ranks
        self.seed = 0, 0  # of the draws, and which pass over the data it is
        self.place = 0  # of the next example in the data, where it was restored
        self._announced = False
        self._many: tuple[Progress, tuple[int, ...], int] | None = None  # columns that are to be announced
        self._met = False  # whether a minibatch came
        self._axes: set[int | None] = set()  # of its inputs
        self._agreed = ranks is None  # whether the processes spoke about the first one
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
            raise ShapeMismatch(
                f"batch {index} has no examples (outputs {tuple(observation.outputs.shape)}); leave empty "
                "minibatches out"
            )
        seen = (self.tracer.model, observation.batch, self.tracer.forward, observation.outputs, observation.targets)
        self.likelihood = as_read(self.likelihood, *seen)
        inputs = inputs_of(observation.batch, self.tracer.forward)
        self._axes.add(inputs.dim() if isinstance(inputs, Tensor) else None)
        with read_once():
            self._take(observation)

    def _take(self, observation: Observation) -> None:
        self.likelihood.check(observation.outputs.detach(), observation.targets)
        numbers = None if self.shard is None else self.shard.numbers(observation.count)
        counted = self.likelihood.counted(observation.outputs.detach(), observation.targets)
        examples = None if counted is None else counted.flatten(1).any(1)
        if examples is not None and observation.chain is not None and not bool(examples.all()):
            observation = observation.part(examples.nonzero()[:, 0])
            numbers = None if numbers is None else numbers[examples.cpu()]
            counted = self.likelihood.counted(observation.outputs.detach(), observation.targets)
        number = observation.count if examples is None else int(examples.sum())
        if self.dtype is None:
            kind = observation.outputs.dtype
            self.dtype = kind if kind in (torch.float32, torch.float64) else torch.float32
        like = torch.zeros((), dtype=self.dtype, device=observation.outputs.device)
        if not self._met:
            self._met = True
            warn_of_links(self.likelihood, self.tracer.model, observation.outputs)
            self.structure = self.structure.settled(self.tracer.blocks, self.tracer.layout, observation.outputs, like)
            self._agree(observation)
        self.structure.require_memory(self.tracer.blocks, self.tracer.layout, like)
        self._prepare(self.tracer.blocks)
        if number == 0:  # not one target counts
            return
        with torch.no_grad():
            if observation.outputs.requires_grad:  # else no selected parameter took part: no curvature
                counting, early = self.structure.counts_positions, self.structure.inputs_first
                asks = counted is not None or not observation.remembered(self._patterns)
                observation.watches = counting and not early and asks
                if counting and early:
                    self.structure.add_inputs(self.sums, observation.input_signals(counted, self._patterns))
                self.estimator.measure(observation, self.likelihood, self, self._source(numbers))
                if counting and not early:  # last: the columns have mostly shown which positions count
                    self.structure.add_inputs(self.sums, observation.input_signals(counted, self._patterns))
            wide = observation.outputs.detach()
            wide = wide if wide.dtype in (torch.float32, torch.float64) else wide.float()
            log_prob = self.likelihood.log_prob(wide, observation.targets)
        if bool(log_prob.isnan().any()):
            raise NonFinite(
                f"log p of example {int(log_prob.isnan().nonzero()[0, 0])} of a minibatch is NaN under "
                f"{self.likelihood!r}, although outputs and targets are finite: its loss is not defined there (the "
                "logarithm or root of a negative number?); make outputs positive first, such as with softplus"
            )
        self.log_likelihood += log_prob.sum(dtype=torch.float64).cpu()
        self.terms += self.likelihood.terms(observation.targets)
        moments = self.likelihood.moments(wide, observation.targets).cpu()
        self.moments = self.moments + moments if len(self.moments) else moments
        self.count += number

    def _source(self, numbers: Tensor | None) -> torch.Generator | ExampleDraws:
        """Random numbers for the estimator: those of the examples, where these have numbers ``(N,)``."""
        if numbers is None:
            return self.generator
        draws = ExampleDraws(self.seed[0], numbers, self.seed[1])
        return draws if self.estimator.by_example else draws.generator()

    # -- among other processes -----------------------------------------------------------------------------------------

    def _agree(self, observation: Observation | None) -> None:
        """Once a pass, at the first minibatch, or at its end if none came: what all processes have to do alike.

        Raises:
            IncompatiblePair: if they see models of different parameters, or read outputs in different layouts.
            DistributedFailure: if another process failed.
        """
        if self._agreed or self.ranks is None:
            return
        self._agreed = True
        mine = None
        if observation is not None:
            assert self.dtype is not None
            needs = self.structure.memory(self.tracer.blocks, self.tracer.layout, self.dtype.itemsize)
            seen = (self.tracer.layout, self.likelihood, self.dtype, observation.outputs)
            mine = First.of(self.structure, needs, *seen)
        chosen = First.common(self.ranks.exchange("the first minibatch", mine))
        if chosen is None:
            return
        if observation is None:
            self.dtype = chosen.dtype
            self.tracer.take_layout(chosen.layout)
            self.likelihood = chosen.read_by(self.likelihood)
        like = torch.zeros((), dtype=self.dtype, device=self.tracer.device)
        self.structure = chosen.settled(self.structure, observation is not None, like)

    def agree_on_nothing(self) -> None:
        """At the end of a pass: what :meth:`_agree` would have done at a minibatch, if none came."""
        self._agree(None)

    def _everyones(self) -> Statistics:
        """The statistics of all processes together: one exchange of what was seen, one sum.

        Raises:
            IncompatiblePair: if processes keep parameters in different forms.
            DistributedFailure: if another process failed.
        """
        assert self.ranks is not None
        tracer, ranks = self.tracer, self.ranks
        mine, layout = None, getattr(tracer, "layout", None)
        if layout is not None:
            known = (float(self.count), self._met, float(self.log_likelihood), self.terms, self.moments.tolist())
            mine = Seen(dict(tracer.blocks), layout, tracer.unseen(), *known)
        everyone = [seen for seen in ranks.exchange("the end of the data", mine) if seen is not None]
        if not everyone:
            raise ShapeMismatch(EMPTY)
        seen = merged(everyone)
        self._met, self.count = seen.met, seen.count
        self.log_likelihood = torch.tensor(seen.log_likelihood, dtype=torch.float64)
        self.terms, self.moments = seen.terms, torch.tensor(seen.moments, dtype=torch.float64)
        self._refuse_nothing()
        tracer.require_all_seen(seen.unseen)
        with ranks.together("the sums of one process"):
            own = dict(tracer.blocks)
            blocks = {**seen.blocks, **unused_blocks(seen.layout, seen.unseen)}
            mine_first = {**own, **{name: block for name, block in blocks.items() if name not in own}}
            self._prepare(mine_first)
            finished = self.structure.finished(self.sums, mine_first, seen.layout)
            self._require_finite(finished)
        sums = added_up(ranks, self.structure, finished, list(blocks))
        return self._statistics(blocks, seen.layout, sums)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def _prepare(self, blocks: Mapping[str, Block]) -> None:
        """Zero sums for new blocks, each on the device of its parameters (a model may lie on several)."""
        for name, block in blocks.items():
            like = torch.zeros((), dtype=self.dtype, device=self.tracer.named[block.parameters[0]].device)
            self.structure.prepare(self.sums, {name: block}, self.tracer.layout, like)

    def takes_output_signals(self) -> bool:
        """Whether the structure takes the closed forms of the layer at the output (asked by the estimator)."""
        return self.structure.takes_output_signals(self.tracer.blocks, self.tracer.layout)

    def expect_columns(self, count: int, observation: Observation) -> None:
        """Is told before columns are sent back, so that very many of them are announced (called by the estimator)."""
        if count > MANY_COLUMNS and not self._announced:
            self._many = Progress(count), tuple(observation.outputs.shape), self.columns_at_once(observation)

    def add_columns(self, signals: Mapping[str, Signals]) -> None:
        """Takes in the signals of some columns (called by the estimator)."""
        self.structure.add_columns(self.sums, signals, self.tracer.blocks)
        if self._many is not None:
            self._announce(*self._many)

    def _announce(self, progress: Progress, outputs: tuple[int, ...], taken: int) -> None:
        """Warns, once, of very many columns, as soon as the first are done: what all will take is known then."""
        self._many, self._announced = None, True
        progress.done(taken)
        warn_user(
            f"estimator {self.estimator.name!r} sends {progress.pieces} columns back through the network for every "
            f"minibatch (outputs {outputs}), which takes about {progress.pieces} backward passes each, here about "
            f"{progress.elapsed + progress.left:.2g} s a minibatch. "
            'estimator="sampled", "projection" or "importance" take a few; parameters="last_layer" needs none.'
        )

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
        singly = self.structure.column_by_column and observation.sends_singly  # to hold them costs memory and a copy
        return 1 if singly else max(1, MEMORY_BYTES // max(1, each))

    def outlook(self) -> str:
        """What else the fit takes, after a minibatch: shown beside the bar."""
        assert self.dtype is not None
        made = self.tracer.blocks, self.tracer.layout
        held, sides = self.structure.memory(*made, self.dtype.itemsize), self.structure.sides(*made)
        then = decomposition_seconds(sides, self.tracer.device, self.dtype)
        return f"{size(held)} held" + (f", then {duration(then)} of decompositions" if sides else "")

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

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was taken in so far, and what was learnt on the way: tensors (any shapes) by name, JSON-able values."""
        tensors = {f"of {name}/{k}": part for name, parts in self.sums.items() for k, part in enumerate(parts)}
        values = {
            "tracer": self.tracer.learnt(),
            "parts": {name: len(parts) for name, parts in self.sums.items()},
            "structure": [self.structure.name, self.structure.options(), self.structure.reason],
            "layout": getattr(self.likelihood, "layout", None),
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "place": 0 if self.shard is None else self.shard.place, "seed": self.seed[0],
            "base": None if self.shard is None else self.shard.base,
            "count": self.count, "terms": float(self.terms), "announced": self._announced, "met": self._met,
            "axes": list(self._axes),
        }  # fmt: skip
        return {"sum": self.log_likelihood, "moments": self.moments, **tensors}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes what :meth:`packed` gave (tensors of any shapes, by name), in an accumulator made in the same way."""
        if values["base"] != (None if self.shard is None else self.shard.base):
            raise ShapeMismatch(
                "the fit was begun with data of another kind (a DataLoader over a data set, and a list or an iterable "
                "of one's own), whose examples have other random numbers; go on with the kind that it was begun with"
            )
        self.tracer.learn(values["tracer"])
        self.count, self.terms, self.place = values["count"], values["terms"], values["place"]
        self.seed = values["seed"], self.seed[1]
        self._announced, self._met = values["announced"], values["met"]
        self._axes = set(values.get("axes", ()))
        self.log_likelihood, self.moments = tensors["sum"].clone(), tensors["moments"].clone()
        if values["layout"] is not None:
            self.likelihood = self.likelihood.with_layout(values["layout"])
        if values["dtype"] is not None:
            self.dtype = getattr(torch, values["dtype"])
        if not self._met:
            return
        name, options, reason = values["structure"]
        if name != self.structure.name:  # it was chosen at the first minibatch
            self.structure = STRUCTURES[name](**options)
            self.structure.reason = reason
        like = torch.zeros((), dtype=self.dtype, device=self.tracer.device)
        nothing = torch.empty(0, device="meta")
        self.structure = self.structure.settled(self.tracer.blocks, self.tracer.layout, nothing, like)
        self._prepare(self.tracer.blocks)
        for name, number in values["parts"].items():
            for k, part in zip(range(number), self.sums[name], strict=True):
                if part.shape != tensors[f"of {name}/{k}"].shape:
                    raise ValueError(f"a sum of block {name!r} has another shape")
                part.copy_(tensors[f"of {name}/{k}"])
        self.sums = {name: self.sums[name] for name in values["parts"]}

    def freeze(self) -> Statistics:
        """The statistics of everything taken in.

        Raises:
            ShapeMismatch: if no example came.
            UnsupportedLayer: if a selected parameter never took part.
            NonFinite: if a sum is not finite.
        """
        if self.ranks is not None:
            return self._everyones()
        self._refuse_nothing()
        self.tracer.require_all_seen()
        blocks = self.tracer.all_blocks()
        self._prepare(blocks)
        sums = self.structure.finished(self.sums, blocks, self.tracer.layout)
        return self._statistics(blocks, self.tracer.layout, sums)

    def here(self) -> Statistics:
        """What was taken in here alone, of the blocks that were met: a part of what several processes have together."""
        blocks = dict(self.tracer.blocks)
        unused = unused_blocks(self.tracer.layout, self.tracer.unseen())
        whole = {**blocks, **unused}
        self._prepare(whole)
        finished = self.structure.finished(self.sums, whole, self.tracer.layout)
        sums = {name: parts for name, parts in finished.items() if name not in unused}
        return self._statistics(blocks, self.tracer.layout, sums)

    def _refuse_nothing(self) -> None:
        if self.count == 0 and self._met:
            raise ShapeMismatch(
                f"all targets of the data are ignored ({self.likelihood!r}), so there is nothing to fit; check the "
                "targets, or the ignore_index of the likelihood"
            )
        if self.count == 0:
            raise ShapeMismatch(EMPTY)

    @staticmethod
    def _require_finite(sums: Sums) -> None:
        for name, parts in sums.items():
            for part in parts:
                if not math.isfinite(part.detach().sum()) and not torch.isfinite(part).all():
                    raise NonFinite(
                        f"the curvature of block {name!r} is not finite, although all batches and outputs were; the "
                        "weights or activations are too large for this floating-point type"
                    )

    def _statistics(self, blocks: dict[str, Block], seen: FlatLayout, sums: Sums) -> Statistics:
        self._require_finite(sums)
        self._warn_of_poorer(blocks)
        layout = self.structure.kept_layout(seen)
        shown = getattr(self.likelihood, "layout", None)
        axes = next(iter(self._axes)) if len(self._axes) == 1 else None
        known = (float(self.count), self.log_likelihood, self.terms, shown, self.moments, axes)
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
    journal: Journal | None = None,
    shard: Shard | None = None,
    ranks: Ranks | None = None,
) -> Statistics:
    """Statistics of the data; the model is in eval mode meanwhile and left exactly as it was.

    Args:
        model, likelihood, estimator, structure, parameters, forward, generator, dtype: see :class:`Accumulator` and
            :class:`laplace_kf.tape.Tracer`.
        batches: one pass over the data, or more if the structure or ``passes`` asks for it.
        passes: how often to go through the data for one sum (random augmentation).
        progress: show a bar.
        unused: ``"error"`` or ``"prior"``, see :class:`laplace_kf.tape.Tracer`.
        journal: keeps what was gathered, and knows where to go on.
        shard: knows the numbers of the examples; without it they are their places in the data.
        ranks: processes whose shares of the data are taken together; all of them call this.

    Raises:
        DistributedFailure: if another process failed or was lost.
        ShapeMismatch: if the data have to be seen again and cannot be.
        UnsupportedLayer: for a kind of model that cannot be handled (:func:`laplace_kf.models.usable`).
    """
    if (structure.several_passes or passes > 1) and isinstance(batches, Iterator):
        raise ShapeMismatch(_ONCE.format(reason=_reason(structure, passes)))
    model, kept = usable(model), journal if journal is not None else Journal()
    seed = _seed(estimator, generator, ranks)
    shard = Shard(None) if shard is None else shard
    begun = time.monotonic()
    with preserved(model):
        tracer = Tracer(model, forward, parameters, unused=unused, shared=ranks is not None)
        following: Structure | None = structure
        stage, came = 0, ranks is None
        while following is not None:
            accumulator = Accumulator(tracer, likelihood, estimator, following, generator, dtype, shard, ranks)
            stage += 1
            accumulator.seed = seed, 0
            first, index = kept.begin(accumulator)
            seed = accumulator.seed[0]  # that of the interrupted call, where this one goes on with it
            with nullcontext() if ranks is None else ranks.together("the pass over its data"):
                for number in range(first, passes):
                    accumulator.seed = seed, (stage - 1) * passes + number
                    shard.start(accumulator.place if number == first else 0)
                    label = f"fit {number + 1}/{passes}" + (f", stage {stage}" if structure.several_passes else "")
                    shown = progress and (ranks is None or ranks.rank == 0)
                    taken = kept.batches(batches)
                    bar = tqdm(taken, label, length(batches)) if shown else None
                    for batch in taken if bar is None else bar:
                        accumulator.add(batch, index)
                        if bar is not None and number == first and bar.n == 0:
                            bar.set_postfix_str(accumulator.outlook())
                        if index == 0 and stage == 1:
                            require_same_loss(model, to_device(batch, tracer.device), forward, likelihood)
                        index += 1
                        kept.taken(accumulator, number, index)
                    if (number or stage > 1) and came and kept.position == 0:
                        raise ShapeMismatch(_ONCE.format(reason=_reason(structure, passes)))
                    came = came or kept.position > 0
                accumulator.agree_on_nothing()
            if structure.several_passes and first < passes:
                kept.finished(accumulator, passes, index)
            statistics, likelihood = accumulator.freeze(), accumulator.likelihood
            took = time.monotonic() - begun
            log.info("%s, %s: %d minibatches, %.1f s", structure.name, estimator.name, index, took)
            kind = statistics.structure
            following = kind.refined(statistics) if ranks is None else refined(ranks, kind, statistics)
        return statistics


EMPTY = "the data are empty: no batch was yielded, so there is nothing to fit"


def _seed(estimator: Estimator, generator: torch.Generator, ranks: Ranks | None) -> int:
    """What the draws of all examples hang on: one number of the generator, in every process the first one's."""
    if not estimator.draws:
        return 0
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return seed if ranks is None else int(ranks.exchange("the seed", seed)[0])


_ONCE = (
    "{reason}, but these data can be gone through only once: pass a DataLoader, a list of batches or a pair of tensors "
    "(a generator can be made into a list: list(batches))"
)


def _reason(structure: Structure, passes: int) -> str:
    return f"passes={passes}" if passes > 1 else f"structure {structure.name!r} goes over the data more than once"
