"""Subnetworks: a dense posterior over ``k`` single weights, the rest of the network fixed (Daxberger et al. 2021).

The weights are those of largest magnitude, or of largest marginal posterior variance under a diagonal posterior that
is fitted first. A flat vector then has ``k`` entries, in model order.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.distributed import Ranks
from laplace_kf.engine import collect
from laplace_kf.errors import InvalidArgument, ShapeMismatch
from laplace_kf.estimators import Estimator
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood
from laplace_kf.lookups import padding_rows
from laplace_kf.models import preserved
from laplace_kf.registry import Registry
from laplace_kf.structures import STRUCTURES, Structure
from laplace_kf.tape import EntryLayout, FlatLayout, Tracer, select
from laplace_kf.tape.blocks import flat_layout

__all__ = ["CRITERIA", "Selection", "Subnetwork", "covered"]


@explained
@dataclass(frozen=True)
class Subnetwork:
    """``parameters=Subnetwork(size)``: the ``size`` most important single weights.

    Attributes:
        size: number of weights ``k``; all of them if there are fewer.
        by: ``"variance"`` (largest marginal posterior variance of a diagonal fit, one more pass over the data; weights
            without any curvature come first) or ``"magnitude"`` (largest absolute value). Ties go to the first in model
            order.
        within: where they are looked for: ``"all"``, ``"last_layer"`` or name patterns.

    Raises:
        ValueError: for a size below 1.
        UnknownName: for any other criterion.
    """

    size: int
    by: str = "variance"
    within: str | Sequence[str] = "all"

    def __post_init__(self) -> None:
        if self.size < 1 or int(self.size) != self.size:
            raise InvalidArgument(f"the size of a subnetwork must be a positive integer, got {self.size}")
        _ = CRITERIA[self.by]
        if not isinstance(self.within, str):
            object.__setattr__(self, "within", tuple(self.within))

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``Subnetwork(**values)`` is the inverse."""
        return {
            "size": self.size,
            "by": self.by,
            "within": self.within if isinstance(self.within, str) else list(self.within),
        }


Selection = str | Sequence[str] | Subnetwork
# the layout of what is looked through, and scores (P,) of which the largest are taken
Scores = Callable[["_Job"], tuple[FlatLayout, Tensor]]
CRITERIA: Registry[Scores] = Registry("subnetwork criterion")


@dataclass(frozen=True)
class _Job:
    """A fit, as far as a criterion needs it; ``prior`` gives λ by parameter name where it differs."""

    within: str | Sequence[str]
    model: nn.Module
    batches: Iterable[Any]
    likelihood: Likelihood
    estimator: Estimator
    settings: Mapping[str, Any]
    prior: Callable[[FlatLayout], Mapping[str, float | Tensor] | None]
    n_data: float | None


@CRITERIA.register("magnitude")
def _magnitude(job: _Job) -> tuple[FlatLayout, Tensor]:
    named = dict(job.model.named_parameters())
    if job.within == "last_layer":  # which one that is shows at a forward pass
        _require_again(job, "in the last layer")
    if isinstance(job.batches, Iterator):
        layout = flat_layout(named, select(job.model, job.within))
    else:  # which entries are constants shows there, too
        with preserved(job.model):
            tracer = Tracer(job.model, job.settings["forward"], job.within, unused="prior")
            for batch in itertools.islice(job.batches, 1):
                tracer.observe(batch)
        layout = _layout(tracer, job.settings.get("ranks"))
    return layout, torch.cat([named[name].detach().reshape(-1).abs() for name in layout.names])


@CRITERIA.register("variance")
def _variance(job: _Job) -> tuple[FlatLayout, Tensor]:
    _require_again(job, "by variance")
    diagonal = STRUCTURES["diag"]()
    statistics = collect(
        job.model, job.batches, job.likelihood, job.estimator, diagonal, parameters=job.within, **job.settings
    )
    layout, n = statistics.layout, job.n_data if job.n_data is not None else statistics.count
    precision = n * statistics.mean().diag()
    prior = job.prior(layout)
    if prior is not None:
        parts = zip(layout.names, layout.sizes, strict=True)
        precision = precision + torch.cat([precision.new_full((size,), float(prior[name])) for name, size in parts])
    return layout, -precision


def _layout(tracer: Tracer, ranks: Ranks | None) -> FlatLayout:
    """What a tracer found out; where no minibatch came to it, what another process did."""
    found: FlatLayout | None = getattr(tracer, "layout", None)
    if ranks is not None:
        known = [each for each in ranks.exchange("the last layer", found) if each is not None]
        found = found if found is not None or not known else known[0]
    if found is None:
        raise ShapeMismatch("the data are empty: no batch was yielded, so there is no last layer to choose from")
    return found


def _require_again(job: _Job, how: str) -> None:
    if isinstance(job.batches, Iterator):
        raise ShapeMismatch(
            f"choosing a subnetwork {how} needs the data before the fit, but these data can be gone through only once: "
            'pass a DataLoader, a list of batches or a pair of tensors, or choose by="magnitude" within name patterns'
        )


def covered(
    parameters: Selection,
    structure: Structure,
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: Likelihood,
    estimator: Estimator,
    *,
    prior: Callable[[FlatLayout], Mapping[str, float | Tensor] | None] = lambda layout: None,
    n_data: float | None = None,
    **settings: Any,
) -> tuple[str | Sequence[str], Structure]:
    """What a selection means for :func:`laplace_kf.engine.collect`: parameters, and the structure over them.

    Args:
        parameters, structure, model, batches, likelihood, estimator: as of a fit.
        prior: λ by parameter name for a layout, or ``None`` if it is the same for all.
        n_data: N, if it is not the number of examples.
        **settings: ``forward``, ``generator``, ``dtype``, ``unused``, ``shard`` and ``ranks`` of the fit.

    Raises:
        IncompatiblePair: for a structure that single weights do not have.
        ShapeMismatch: if choosing them needs a pass over data that can be gone through only once.
    """
    if not isinstance(parameters, Subnetwork):
        return parameters, structure
    job = _Job(parameters.within, model, batches, likelihood, estimator, settings, prior, n_data)
    layout, scores = CRITERIA[parameters.by](job)
    ranks: Ranks | None = settings.get("ranks")
    constant = torch.zeros(layout.size, dtype=torch.bool)
    constant[layout.held_positions()] = True
    for name, row in padding_rows(model).items():
        if name in layout.names:
            start = sum(layout.sizes[: layout.names.index(name)])
            width = layout.sizes[layout.names.index(name)] // layout.shapes[layout.names.index(name)][0]
            constant[start + row * width : start + (row + 1) * width] |= isinstance(batches, Iterator)
    scores = scores.masked_fill(constant.to(scores.device), -torch.inf)  # no weights
    best = scores.sort(descending=True, stable=True).indices[: min(parameters.size, int((~constant).sum()))]
    entries = EntryLayout.of(layout, best)
    if ranks is not None:  # by magnitude, only those with data know which entries are constants
        everyone = ranks.exchange("the choice of a subnetwork", (len(layout.held), entries))
        entries = max(everyone, key=lambda found: found[0])[1]
    return [glob.escape(name) for name in entries.names], structure.of_entries(entries)
