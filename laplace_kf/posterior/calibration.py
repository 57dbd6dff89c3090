"""What a posterior keeps of in-distribution data: conformal scores, and references of out-of-distribution scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.batches import Forward, inputs_of, run, tensors_of, to_device
from laplace_kf.errors import LaplaceKFError, ShapeMismatch
from laplace_kf.graphs import check_ignored, of_role
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved
from laplace_kf.ood.references import References
from laplace_kf.ood.scores import Subject, reference_scores
from laplace_kf.outputs import conformal
from laplace_kf.outputs.conformal import Conformal
from laplace_kf.predictive import draw_seeds
from laplace_kf.predictive.calls import require_movable
from laplace_kf.replica import stage

__all__ = ["Calibration", "Seen", "calibrate", "references_of"]

KEPT_BYTES = 256 * 2**20  # inputs of tune's data that may be kept for references


class Fitted(Subject, Protocol):
    """What calibration needs of a posterior."""

    model: nn.Module
    forward: Forward | None
    weights: weighting.Weights

    @property
    def mean(self) -> dict[str, Tensor]:
        """Posterior mean by parameter name, each of its parameter's shape."""


@dataclass(frozen=True)
class Calibration:
    """What in-distribution data said: conformal scores, and references of out-of-distribution scores.

    Attributes:
        conformal: scores of the calibration data, from ``calibrate``.
        references: of the calibration data, or of those of ``tune``.
        reason: why there are no references.
        pending: batches of inputs of which the references are still to be made, at the first need of them.
    """

    conformal: Conformal | None = None
    references: References | None = None
    reason: str = ""
    pending: tuple[Any, ...] = ()

    def with_references(self, posterior: Fitted) -> Calibration:
        """The same with references made."""
        if not self.pending:
            return self
        references, reason = references_of(posterior, self.pending)
        return Calibration(self.conformal, references, reason)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors ``(n, ...)`` by name and JSON-able values to save."""
        tensors, header = conformal.packed(self.conformal)
        known = self.references.scores if self.references is not None else {}
        tensors.update({f"reference/{name}": value for name, value in known.items()})
        return tensors, {"conformal": header, "references": list(known), "reason": self.reason}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None) -> Calibration | None:
        """The inverse of :meth:`packed` (tensors of any shapes); ``None`` for a file that holds none."""
        if header is None:
            return None
        known = {name: tensors[f"reference/{name}"] for name in header["references"]}
        found = conformal.unpacked(tensors, header["conformal"])
        return cls(found, References(known) if known else None, header.get("reason", ""))


class Seen:
    """An iterable of batches that remembers the inputs of those that were taken, up to ``KEPT_BYTES``.

    Args:
        batches, forward: as they are gone through, and the user's ``forward=``.
        look: is shown the inputs ``(N, ...)`` of the first batch of a pass.
    """

    def __init__(
        self, batches: Iterable[Any], forward: Forward | None, look: Callable[[Any], Any] | None = None
    ) -> None:
        self.batches, self.forward, self.look = batches, forward, look
        self.taken: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        self.taken, room = [], KEPT_BYTES
        for batch in self.batches:
            inputs = inputs_of(batch, self.forward)
            if self.forward is None:
                inputs = weighting.inputs_without_weights(inputs)
            if self.look is not None and not self.taken:
                self.look(inputs)
            room -= sum(t.numel() * t.element_size() for t in tensors_of(inputs))
            if room >= 0 or not self.taken:
                self.taken.append(inputs)
            yield batch


def calibrate(
    posterior: Fitted, data: Any, method: str, samples: int, generator: torch.Generator | None
) -> Calibration:
    """Conformal scores and references of data, batch by batch; the posterior is read, never changed.

    Args:
        posterior: fitted.
        data: loader, iterable of batches, or a pair ``(x (n, ...), y (n, ...))``.
        method: how to predict, a name.
        samples: of methods that draw.
        generator: of their random numbers; every batch sees the same draws.

    Raises:
        ShapeMismatch: if the data are empty or do not fit.
        IncompatiblePair: for several positions an example, or predictions with neither a variance nor classes.
        NonFinite: for NaN or infinity.
    """
    seed = draw_seeds(1, generator)[0]
    scores: list[Tensor] = []
    taken: list[Any] = []
    device = next(iter(posterior.mean.values())).device
    with stage(posterior.model, posterior.forward) as (model, forward), preserved(model):
        for index, batch in enumerate(weighting.batches(data, posterior.weights, posterior.model)):
            weighted = weighting.has_weights(batch, forward, posterior.weights)
            read = weighting.reader(forward, posterior.weights if weighted else False)
            check_batch(batch, index, "the calibration batch", read, posterior.likelihood.nan_is_missing)
            batch = of_role(to_device(batch, device), "val_mask")
            plain = weighting.inputs_without_weights(batch) if weighted and posterior.forward is None else batch
            inputs = inputs_of(plain, posterior.forward)
            if index == 0:  # before anything is kept from a pass
                require_movable(model, forward, posterior.mean, inputs)
            with torch.no_grad():
                outputs, targets = run(model, batch, read)
            posterior.likelihood.check(outputs, targets)
            targets = weighting.counted_alike(targets)
            check_ignored(plain, targets, posterior.likelihood, posterior.forward)
            found = posterior.predict(inputs, method, samples, generator=torch.Generator().manual_seed(seed))
            scores.append(conformal.scores(found, targets).detach())
            taken.append(inputs)
    if not sum(len(part) for part in scores):
        raise ShapeMismatch(
            "the calibration data are empty: no batch was yielded; a generator that was read before is empty: give "
            "a list or a DataLoader"
        )
    references, reason = references_of(posterior, taken)
    return Calibration(Conformal.of(torch.cat(scores), method), references, reason)


def references_of(posterior: Fitted, inputs: Iterable[Any]) -> tuple[References | None, str]:
    """References from batches of inputs ``(N, ...)``; or ``None`` and why this posterior cannot have any."""
    parts: dict[str, list[Tensor]] = {}
    try:
        for x in inputs:
            for name, value in reference_scores(posterior, x).items():
                parts.setdefault(name, []).append(value.detach().double().cpu())
    except LaplaceKFError as error:
        return None, str(error)
    return (References.of({name: torch.cat(found) for name, found in parts.items()}), "") if parts else (None, "")
