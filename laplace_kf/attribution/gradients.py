"""Per-example gradients at the posterior mean, as signals, batch after batch; never as one tensor over all data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.attribution.values import Value, columns_of, spread
from laplace_kf.batches import Forward, default_forward, inputs_of, map_examples, run, to_device
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.estimators.base import widened
from laplace_kf.missing import check_batch
from laplace_kf.models import parameters_of, preserved
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.predictive.covariance_shares import Piece
from laplace_kf.reading import paired
from laplace_kf.replica import stage
from laplace_kf.shards import random_order
from laplace_kf.substitution import reached, substituted
from laplace_kf.tape import Observation, Tracer
from laplace_kf.tape.chance import require_a_function

__all__ = ["Gradients", "at_mean", "batches_of"]


class _AtMean:
    """A ``forward=`` that puts the posterior mean into the model for the call, and keeps the targets."""

    def __init__(self, model: nn.Module, forward: Forward | None, weights: Mapping[str, Tensor]) -> None:
        self.own = dict(model.named_parameters())
        self.forward, self.weights = forward, weights

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        now = dict(model.named_parameters())
        # per-example gradients put others there already
        replaced = {name: value for name, value in self.weights.items() if now[name] is self.own[name]}
        forward = default_forward if self.forward is None else self.forward
        return substituted(model, replaced, lambda: forward(model, batch))


class Gradients:
    """Signals of a posterior's network at its mean.

    Args:
        posterior: fitted; the network runs in the place of its model.
        model, forward: the double of its model, and what reads its batches.
    """

    def __init__(self, posterior: LaplacePosterior, model: nn.Module, forward: Forward | None) -> None:
        mean = posterior.mean
        parameters_of(model, list(mean), [tuple(value.shape) for value in mean.values()], "the posterior")
        leaves = {name: value.detach().clone().requires_grad_() for name, value in mean.items()}
        self.model, self.likelihood, self._look = model, posterior.likelihood, posterior.require_as_fitted
        self._read, self._original = forward, posterior.forward
        self.forward = _AtMean(model, forward, leaves)
        self.tracer = Tracer(model, self.forward, weights=leaves, unused=posterior.unused)

    def observe(self, batch: Any, index: int, what: str) -> Observation:
        """One forward pass, checked as ``fit`` checks it.

        Raises:
            NonFinite, ShapeMismatch, UnsupportedLayer: as ``fit``.
        """
        batch = to_device(batch, self.tracer.device)
        check_batch(batch, index, what, self._read, self.likelihood.nan_is_missing)
        if index == 0:
            self._look(self.model, self._read, inputs_of(batch, self._read))
        names = list(self.forward.weights)
        if not reached(self.model, self._original, names):
            again = lambda other: run(self.model, other, self._read)[0]  # noqa: E731
            require_a_function(self.model, self._original, names, again, batch)
        observation = self.tracer.observe(batch, index)
        self.likelihood.check(observation.outputs.detach(), observation.targets)
        return observation

    def piece(self, observation: Observation, columns: Tensor) -> Piece:
        """The signals of columns ``(V, N, ...)``."""
        with torch.no_grad():
            signals = observation.signals(columns)
        whole, seeds = slice(0, observation.count), slice(0, columns.shape[0])
        return Piece(whole, seeds, signals, self.tracer.blocks, observation.outputs.detach())

    def columns(self, observation: Observation, of: str | Value, tokens: bool) -> Tensor:
        """What is sent back: one column ``(1, N, ...)``, or one for every position ``(T, N, ...)``."""
        outputs = widened(observation.outputs)
        found = columns_of(of, self.likelihood, outputs, observation.targets)
        return spread(self.likelihood, found, outputs) if tokens else found[None]

    def pieces(
        self, batches: Iterable[Any], of: str | Value, tokens: bool, rows: int | None, what: str
    ) -> Iterator[Piece]:
        """The pieces of data, in order, each of at most ``rows`` columns times examples.

        Args:
            batches: the data.
            of: of which value.
            tokens: a column for every position.
            rows: most rows; ``None`` for whole batches.
            what: the batches are called in messages.

        Raises:
            ShapeMismatch: if there are no data; if a batch cannot be cut although ``rows`` demands it.
        """
        empty = True
        for index, batch in enumerate(batches):
            empty = False
            observation = self.observe(batch, index, what)
            columns = self.columns(observation, of, tokens)
            if rows is None or columns.shape[0] * columns.shape[1] <= rows:
                yield self.piece(observation, columns)
                continue
            count, width = columns.shape[1], columns.shape[0]
            examples = max(1, rows // width)
            for start in range(0, count, examples):
                part = slice(start, min(start + examples, count))
                own = observation if examples >= count else self._cut(observation, part, index, what)
                yield self.piece(own, columns[:, part])
        if empty:
            raise ShapeMismatch(
                f"the {what.removeprefix('the ').removesuffix(' batch')} data are empty: no batch came; a generator "
                "that was read before is empty: give a list or a DataLoader"
            )

    def _cut(self, observation: Observation, part: slice, index: int, what: str) -> Observation:
        whole = observation.outputs.detach()
        own = self.observe(map_examples(observation.batch, observation.count, lambda t: t[part]), index, what)
        if not same_outputs(own.outputs.detach(), whole[part]):
            raise ShapeMismatch(
                f"{what} {index} of {observation.count} examples has to be cut to fit into the memory, and the model's "
                "outputs for some of them alone are others; give smaller batches"
            )
        return own


@contextmanager
def at_mean(posterior: LaplacePosterior) -> Iterator[Gradients]:
    """Gradients at the mean of a fitted posterior; its model is left as it was.

    Raises:
        NotFitted: before ``fit``.
    """
    _ = posterior.precision  # refuses
    with stage(posterior.model, posterior.forward) as (model, forward), preserved(model):
        yield Gradients(posterior, model, weighting.reader(forward, posterior.weights))


def batches_of(data: Any, posterior: LaplacePosterior, what: str) -> Iterable[Any]:
    """Batches in the order of their examples.

    Raises:
        IncompatiblePair: for a loader that shuffles: row i would not be example i.
        ShapeMismatch: for data that ``fit`` would not take.
    """
    if (sampler := random_order(data)) is not None:
        raise IncompatiblePair(
            f"the {what} loader draws its examples in a random order ({sampler}), so that no "
            "score could be told to its example; give one in order: "
            "torch.utils.data.DataLoader(loader.dataset, batch_size=256)"
        )
    return weighting.batches(paired(data, None), posterior.weights, posterior.model)
