"""What a fit, a tuning run and predictions will take, before they start: seconds, bytes, traffic between processes.

One minibatch is fitted and predicted for real, on a copy; everything else follows:

* a fit takes what the first minibatch takes beyond the others (reading how the network is built), and the time of one
  for each; of very many columns (an exact fit of thousands of outputs) only the first are sent back, and the rest is
  extrapolated. Memory is that of the tensors, however much more the C library keeps for itself, and does not grow with
  the number of minibatches;
* eigendecompositions are not made for a plan. Their sides are known from the factors, and what a side takes is measured
  once in a process (:mod:`laplace_kf.rates`). In their place the copy gets unit matrices as bases, which are as dear to
  multiply with;
* a prediction takes what one of this minibatch takes, or of as many of its examples as are soon done;
* ``tune`` counts multiply-adds against its budget (:mod:`laplace_kf.posterior.work`), or those of a search that looks
  at all it wants to, whichever are fewer; seconds are those of the forward pass for each of them. For networks whose
  search is a matter of seconds, where Python's own time rules, this is right to a factor of two at best.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from laplace_kf import weighting
from laplace_kf.batches import inputs_of, map_examples, run, tensors_of, to_device
from laplace_kf.errors import InvalidArgument, LaplaceKFError, ShapeMismatch, UnsupportedLayer
from laplace_kf.estimators.base import Estimator, Sink
from laplace_kf.forecast import Progress, duration, size
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.models import preserved
from laplace_kf.peaks import Peak
from laplace_kf.posterior.candidates import SETTINGS
from laplace_kf.posterior.jackknife import PREDICTED
from laplace_kf.posterior.prior import positive
from laplace_kf.posterior.work import DECOMPOSITION, ELEMENT, EPOCH, FIXED, LEAST, OVERHEAD, multiply_adds
from laplace_kf.randomness import same_random_states
from laplace_kf.rates import Clock, decomposition_seconds
from laplace_kf.reading import paired
from laplace_kf.resuming import length
from laplace_kf.tape import Observation

__all__ = ["Plan", "Probe", "Stage", "planned"]

PATIENCE = 2.0  # seconds that columns of one minibatch, or predictions of some examples, are tried for
STEADY = 0.25  # seconds of minibatches after which their median is taken
MOST = 24  # minibatches for that
SEARCH = 2.0  # times a short search on one minibatch: what a search takes beside the products of its budget


@dataclass(frozen=True)
class Stage:
    """What one job takes.

    Attributes:
        seconds: of this machine, or of every process where there are several.
        bytes: of tensors at the peak, above the model, its batch and what was there before.
        traffic: bytes that each process sends to the others.
    """

    seconds: float
    bytes: float
    traffic: float = 0.0

    def __str__(self) -> str:
        sent = f", {size(self.traffic)} sent" if self.traffic else ""
        return f"{duration(self.seconds)}, {size(self.bytes)}{sent}"


@dataclass(frozen=True)
class Plan:
    """What :meth:`laplace_kf.LaplacePosterior.plan` found. Prints as a few lines.

    Attributes:
        fit: the pass over the data, or passes.
        decompositions: of the factors, on first need: part of ``tune`` and of ``predict``, whichever is the first. A
            large dense matrix is decomposed by ``tune`` alone, and counted there; ``predict`` has its Cholesky factor.
        tune: the default search on the same data, within its budget.
        predict: a prediction of all examples of the data, minibatch by minibatch.
        examples: how many the data have.
        minibatches: of how many (a last one that is smaller counts in part).
        columns: sent back through the network for every minibatch by an exact fit; 0 where the estimator says nothing.
        probe: seconds that the plan itself took.
    """

    fit: Stage
    decompositions: Stage
    tune: Stage
    predict: Stage
    examples: float
    minibatches: float
    columns: int
    probe: float

    def __str__(self) -> str:
        lines = [f"{self.examples:g} examples in {self.minibatches:.4g} minibatches:"]
        lines += [f"  {f.name:14} {getattr(self, f.name)}" for f in fields(self) if f.name in STAGES]
        if self.columns:
            lines.append(f"  {self.columns:,} columns go back through the network for every minibatch")
        return "\n".join(lines)


STAGES = ("fit", "decompositions", "tune", "predict")


def planned(
    posterior: Any,
    data: Any,
    y: Any = None,
    *,
    budget: float | None = 10.0,
    method: str = "auto",
    samples: int = 100,
    minibatches: float | None = None,
    processes: int = 1,
    bandwidth: float = 1e9,
    clock: Clock = time.perf_counter,
) -> Plan:
    """The plan of a posterior, fitted or not, which stays as it is; arguments of :meth:`LaplacePosterior.plan`.

    ``data`` is a loader or a pair ``(x (N, ...), y (N, ...))``.
    """
    if budget is not None:
        positive("budget", budget)
    positive("bandwidth", bandwidth)
    if processes < 1 or int(processes) != processes:
        raise InvalidArgument(f"processes must be a positive integer, got {processes}")
    started = clock()
    with same_random_states(), warnings.catch_warnings(), _loaders_generator(data):
        warnings.simplefilter("ignore")  # what the real calls will say
        batch, reading, count = _first(posterior, paired(data, y), minibatches, clock)
        rows = _rows(batch)
        probe = Probe(posterior, batch, rows, clock)
        fit, stages, fixed = probe.fit()
        once = [side for side, many in probe.with_unit_bases() if not many]
        decomposing, searching = (
            decomposition_seconds(sides, probe.device, probe.dtype, clock) for sides in (once, probe.sides)
        )
        each, first = probe.predicted(method, samples)
        probe.search()
    sums, bases = probe.sum_bytes, sum(side**2 for side in once) * probe.dtype.itemsize
    share = (processes - 1) / processes
    sent = 2 * share * sums, share * bases  # all-reduce in rings; every basis goes from its owner to all others
    seconds = fixed + stages * count + reading * count * max(1, probe.passes)
    fitting = Stage(seconds + sent[0] / bandwidth, fit, sent[0])
    decomposed = Stage(decomposing / processes + sent[1] / bandwidth, probe.decomposed_bytes, sent[1])
    searched = _search_seconds(budget, count, probe)
    return Plan(
        fit=fitting,
        decompositions=decomposed,
        tune=Stage(searching / processes + sent[1] / bandwidth + searched + reading * count, probe.tuning_bytes),
        predict=Stage(decomposed.seconds + first + (each + reading) * count, probe.predicted_bytes),
        examples=rows * count,
        minibatches=count,
        columns=probe.estimator.columns,
        probe=clock() - started,
    )


def _search_seconds(budget: float | None, count: float, probe: Probe) -> float:
    """Seconds of a search over so many minibatches, by counts; decompositions are timed apart."""
    decomposition = DECOMPOSITION * float(sum(side**3 for side in probe.sides))
    wanted = count * OVERHEAD * SETTINGS[0] * PREDICTED * (probe.forward + ELEMENT * probe.outputs)
    limit = math.inf if budget is None else budget * max(EPOCH * count * probe.forward, LEAST, decomposition / FIXED)
    return SEARCH * probe.searched + max(0.0, min(limit - decomposition, wanted)) * probe.rate


@contextmanager
def _loaders_generator(data: Any) -> Iterator[None]:
    """A loader's own generator is afterwards where it was."""
    generators = {
        id(g): g
        for source in (data, getattr(data, "sampler", None))
        if isinstance(g := getattr(source, "generator", None), torch.Generator)
    }
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


def _first(posterior: Any, data: Any, minibatches: float | None, clock: Clock) -> tuple[Any, float, float]:
    """The first minibatch, the seconds of reading a later one, and how many there are."""
    if isinstance(data, Iterator):
        raise ShapeMismatch(
            "a plan reads the first minibatch, and from these data it would be gone for the fit: pass a DataLoader, a "
            "list of batches or a pair of tensors (a generator can be made into a list: list(batches))"
        )
    batches: Iterable[Any] = weighting.batches(data, posterior.weights, posterior.model)
    reader = iter(batches)
    batch = next(reader, None)
    if batch is None:
        raise ShapeMismatch("the data are empty: no batch was yielded, so there is nothing to plan")
    start = clock()
    second = next(reader, None)
    reading = clock() - start if second is not None else 0.0
    del reader, second
    if minibatches is not None:
        return batch, reading, positive("minibatches", minibatches)
    if (number := length(batches)) is None:
        raise InvalidArgument(
            "how many minibatches these data have is not known before they are read; say it with minibatches="
        )
    examples = _examples(batches, data)
    return batch, reading, float(number) if examples is None else examples / max(1, _rows(batch))


def _examples(batches: Any, data: Any) -> float | None:
    """How many examples the data have, where that is known without reading them."""
    total = getattr(batches, "total", None)
    if isinstance(total, int):
        return float(total)
    inner = getattr(batches, "data", batches)
    if isinstance(inner, (list, tuple)):
        return float(sum(_rows(batch) for batch in inner))
    size, sampler = getattr(data, "batch_size", None), getattr(data, "sampler", None)
    if size and sampler is not None and (length(sampler) is not None):
        return float(len(data) * size if getattr(data, "drop_last", False) else len(sampler))
    return None


def _rows(batch: Any) -> int:
    first = next(tensors_of(batch), None)
    return 1 if first is None or not first.dim() else max(1, int(first.shape[0]))


# ------------------------------------------------------------------------------------------------ the probe


class _Enough(Exception):
    """Columns have been tried for long enough."""


class _FirstColumns(Sink):
    """Passes columns on until some seconds are over, and knows what the others would have taken."""

    def __init__(self, sink: Sink, clock: Clock) -> None:
        self.sink, self.clock = sink, clock
        self.progress: Progress | None = None
        self._step = 0
        self.missing = 0.0

    def add_columns(self, signals: Any) -> None:
        self.sink.add_columns(signals)
        if self.progress is None:
            return
        self.progress.done(self._step)
        if self.progress.elapsed > PATIENCE and self.progress.left > 0:
            self.missing = self.progress.left
            raise _Enough

    def add_output_factor(self, name: str, factor: Tensor) -> None:
        self.sink.add_output_factor(name, factor)

    def takes_output_signals(self) -> bool:
        return self.sink.takes_output_signals()

    def expect_columns(self, count: int, observation: Observation) -> None:
        self._step = self.sink.columns_at_once(observation)
        self.progress = Progress(count, self.clock)

    def columns_at_once(self, observation: Observation) -> int:
        return self.sink.columns_at_once(observation)


class _Bounded(Estimator):
    """An estimator of whose columns only the first are sent back; the clock runs on as if all had been.

    Attributes:
        missing: seconds that were left out so far.
        columns: of the last minibatch.
    """

    name = "bounded"

    def __init__(self, inner: Estimator, clock: Clock) -> None:
        self.inner, self.clock = inner, clock
        for each in ("name", "is_ggn", "draws", "averages", "by_example"):
            setattr(self, each, getattr(inner, each))
        self.missing, self.columns = 0.0, 0

    def options(self) -> dict[str, Any]:
        return self.inner.options()

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: Any) -> None:
        first = _FirstColumns(sink, self.clock)
        try:
            self.inner.measure(observation, likelihood, first, generator)
        except _Enough:
            self.missing += first.missing
        if first.progress is not None:
            self.columns = first.progress.pieces

    def now(self) -> float:
        """The clock, ahead by what was left out."""
        return self.clock() + self.missing


class _Repeated:
    """One minibatch again and again, with the times at which each was taken in."""

    def __init__(self, batch: Any, times: int, now: Callable[[], float]) -> None:
        self.batch, self.times, self.now = batch, times, now
        self.passes: list[list[float]] = []

    def __iter__(self) -> Iterator[Any]:
        marks = [self.now()]
        self.passes.append(marks)
        for number in range(self.times):
            if number >= 2 and marks[-1] - marks[1] > STEADY:
                break
            yield self.batch
            marks.append(self.now())


class Probe:
    """A copy of a posterior that is fitted to one minibatch and predicts it.

    Args:
        posterior: is only read.
        batch: as the data bring it.
        rows: its examples.
        clock: what is read.
    """

    def __init__(self, posterior: Any, batch: Any, rows: int, clock: Clock) -> None:
        self.posterior, self.batch, self.rows, self.clock = posterior, batch, rows, clock
        self.estimator = _Bounded(posterior.estimator, clock)
        self.peak = Peak()
        self.fitted: Any = None
        self.passes = 1
        self.sides: list[int] = []
        self.forward, self.outputs = 0.0, 0
        self.rate = self.searched = 0.0
        self.predicted_bytes = self.decomposed_bytes = self.tuning_bytes = 0.0

    def _copy(self) -> Any:
        other = copy.copy(self.posterior)
        other.estimator = self.estimator
        return other

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    # -- fit -----------------------------------------------------------------------------------------------------------

    def fit(self) -> tuple[float, float, float]:
        """Peak bytes; seconds of one more minibatch; seconds of the rest, whatever the number of minibatches."""
        with self.peak:  # first: what is learnt about a network once is then known
            self.fitted = self._copy().fit(_Repeated(self.batch, 1, self.clock), generator=self._generator())
        most = float(self.peak.most)
        data = _Repeated(self.batch, MOST, self.estimator.now)
        start = self.estimator.now()
        self._copy().fit(data, generator=self._generator())
        total = self.estimator.now() - start
        self.passes = len(data.passes)
        each = 0.0
        for marks in data.passes:
            gaps = sorted(b - a for a, b in pairwise(marks[1:])) or [marks[1] - marks[0]]
            middle = gaps[len(gaps) // 2]
            each += middle
            total -= middle * (len(marks) - 1)
        return most, each, max(0.0, total)

    def with_unit_bases(self) -> list[tuple[int, bool]]:
        """Sides of the matrices to be decomposed, and whether only a search needs it; they get unit matrices as bases.

        A prediction makes what it needs in place of the others, in the first of its calls.
        """
        found = []
        with self.peak:
            before = self.peak.live
            for _, matrix in self.fitted._state.curvature.entries:
                single = matrix.undecomposed(many=False)
                for key, factor in matrix.undecomposed().items():
                    number, side = factor.shape[:-2].numel(), int(factor.shape[-1])
                    found += [(side, key not in single)] * number
                    unit = torch.eye(side, dtype=factor.dtype, device=factor.device).expand_as(factor).contiguous()
                    matrix.take_eigenbasis(key, factor.diagonal(dim1=-2, dim2=-1).clamp_min(1e-6), unit)
            self.decomposed_bytes = float(self.peak.live - before)
        self.sides = [side for side, _ in found]
        return found

    @property
    def sum_bytes(self) -> float:
        """Bytes of the sums."""
        sums = self.fitted._state.statistics.sums
        return float(sum(part.numel() * part.element_size() for parts in sums.values() for part in parts))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the sums."""
        return next(part.dtype for parts in self.fitted._state.statistics.sums.values() for part in parts)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(p.device for p in self.posterior.model.parameters())

    # -- predictions ---------------------------------------------------------------------------------------------------

    def predicted(self, method: str, samples: int) -> tuple[float, float]:
        """Seconds of a prediction of one minibatch, and of the first beyond that."""

        def call(examples: int, how: str = method) -> float:
            part = self._some(examples)
            start = self.clock()
            self.fitted.predict(part, method=how, samples=samples, generator=self._generator())
            return self.clock() - start

        start = self.clock()
        call(1)
        taken = {1: call(1)}
        first = max(0.0, self.clock() - start - 2 * taken[1])
        tried = 1
        while tried < self.rows:
            following = min(self.rows, 4 * tried)
            if taken[tried] * following / tried > PATIENCE:
                break
            tried = following
            taken[tried] = call(tried)
        if tried == self.rows and taken[tried] < PATIENCE / 2:
            again = 2 if taken[tried] > PATIENCE / 16 else 6
            taken[tried] = sorted([taken[tried], *(call(tried) for _ in range(again))])[again // 2]
        self.peak.begin()
        before = self.peak.live
        with self.peak:
            call(tried)
        transient = self.peak.most - before
        self.predicted_bytes = before + transient * max(1.0, self.rows / tried)
        if tried == self.rows:
            return taken[tried], first
        sizes = sorted(taken)
        low = sizes[-2] if len(sizes) > 1 else tried
        slope = (taken[tried] - taken[low]) / (tried - low) if low < tried else taken[tried] / tried
        return taken[tried] + max(slope, 0.0) * (self.rows - tried), first

    def _some(self, examples: int) -> Any:
        """The inputs of the first examples, where a minibatch can be cut, else of all."""
        inputs = to_device(inputs_of(self.batch, self.posterior.forward), self.device)
        try:
            return map_examples(inputs, self.rows, lambda t: t[:examples]) if examples < self.rows else inputs
        except (UnsupportedLayer, RuntimeError):
            return inputs

    # -- tuning --------------------------------------------------------------------------------------------------------

    def search(self) -> None:
        """Measures what a multiply-add of the forward pass takes, and the memory of a search."""
        model, forward = self.posterior.model, self.posterior.forward
        read = weighting.reader(forward, self.posterior.weights)
        batch = to_device(self.batch, self.device)
        with preserved(model), torch.no_grad():
            with multiply_adds() as found:
                outputs, _ = run(model, batch, read)
            times: list[float] = []
            while sum(times) < STEADY / 4 and len(times) < MOST:
                start = self.clock()
                run(model, batch, read)
                times.append(self.clock() - start)
        self.forward, self.outputs = found[0], outputs.numel()
        self.rate = sorted(times)[len(times) // 2] / max(found[0], 1.0)
        counted = EPOCH * self.forward
        least = max(counted, LEAST, DECOMPOSITION * sum(side**3 for side in self.sides) / FIXED)
        self.peak.begin()
        start = self.clock()
        try:  # a search that looks at what the real one looks at, for some four passes over the minibatch
            with self.peak:  # watched, it takes a little longer
                self.fitted.tune([self.batch], budget=4 * max(counted, 1.0) / least, generator=self._generator())
        except (LaplaceKFError, ValueError, RuntimeError):  # a target that it refuses, a budget that is too small
            pass
        self.searched = self.clock() - start
        self.tuning_bytes = max(self.predicted_bytes, float(self.peak.most))
