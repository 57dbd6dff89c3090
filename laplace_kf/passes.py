"""Plain passes of a model over data, with the autograd graph and what a product with its curvature needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_kf import weighting
from laplace_kf.agreement import as_read, require_same_loss
from laplace_kf.batches import Forward, run, to_device
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.lookups import Plainly
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved, usable
from laplace_kf.outputs.derivatives import pushed_twice, require_twice, twice, usable_by_autograd
from laplace_kf.sequences import read
from laplace_kf.tape import FlatLayout, Tracer
from laplace_kf.tape.chance import FirstPass, require_derivatives
from laplace_kf.tape.verdicts import note, remembered

__all__ = ["Pass", "columns_of", "walk"]


@dataclass(frozen=True)
class Pass:
    """One minibatch after its forward pass.

    Attributes:
        index: its number.
        batch: what was given, on the model's device.
        likelihood: in the layout that the targets show.
        outputs: ``(N, ...)``, part of the autograd graph.
        targets: of the batch.
        weights: the selected parameters in flat order.
        layout: that order.
        count: examples that count.
    """

    index: int
    batch: Any
    likelihood: Likelihood
    outputs: Tensor
    targets: Any
    weights: list[Tensor]
    layout: FlatLayout
    count: int

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Parameter-shaped tensors, or ``None`` for zeros, as ``(P,)``."""
        filled = [
            torch.zeros_like(w) if part is None else part.detach() for w, part in zip(self.weights, parts, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in filled])

    def pulled(self, columns: Tensor) -> Tensor:
        """``Jᵀ w`` of columns ``(K, N, ...)``, summed over examples: ``(K, P)``."""
        if not self.outputs.requires_grad:
            return columns.new_zeros(len(columns), self.layout.size)
        columns = columns.to(self.outputs.dtype)
        rows = [
            torch.autograd.grad(self.outputs, self.weights, column, retain_graph=True, allow_unused=True)
            for column in columns
        ]
        return torch.stack([self.flat(row) for row in rows])

    def pushed(self, directions: Tensor) -> Tensor:
        """``J v`` of directions ``(K, P)``, by double backward: ``(K, N, ...)``.

        Raises:
            UnsupportedLayer: where a function cannot be differentiated twice.
        """
        parts = [[part[0] for part in self.layout.split(direction[None]).values()] for direction in directions]
        return torch.stack([row for (row,) in pushed_twice([self.outputs], self.weights, parts)])

    def gradient(self) -> Tensor:
        """Gradient of the summed negative log-likelihood, ``(P,)``."""
        score = self.likelihood.score(self.outputs.detach(), self.targets)
        return self.pulled(-score[None])[0]

    def ggn_rows(self, directions: Tensor) -> Tensor:
        """Products of the summed Gauss-Newton matrix with directions ``(K, P)``, ``(K, P)`` (methods 2.7)."""
        return self.pulled(self.curved(self.pushed(directions)))

    def hessian_rows(self, directions: Tensor, along: Tensor | None = None) -> Tensor:
        """Products of the Hessian of the summed negative log-likelihood with directions ``(K, P)``, ``(K, P)``.

        Args:
            directions: ``(K, P)``.
            along: instead of the negative log-likelihood, the sum of the outputs times this, of their shape.

        Raises:
            UnsupportedLayer: where a function cannot be differentiated twice.
        """
        if along is None:
            loss = -self.likelihood.log_prob(self.outputs, self.targets).sum()
        else:
            loss = (self.outputs * along).sum()
        if not loss.requires_grad:
            return torch.zeros_like(directions)
        require_twice([self.outputs], self.weights)
        grads = torch.autograd.grad(loss, self.weights, create_graph=True, allow_unused=True)
        rows = []
        for direction in directions:
            parts = [part[0] for part in self.layout.split(direction[None]).values()]
            used = [(g, d.to(g)) for g, d in zip(grads, parts, strict=True) if g is not None and g.requires_grad]
            if not used:
                rows.append(torch.zeros_like(direction))
                continue
            slope = torch.stack([(g * d).sum() for g, d in used]).sum()
            with twice():
                second = torch.autograd.grad(slope, self.weights, retain_graph=True, allow_unused=True)
            rows.append(self.flat(second))
        return torch.stack(rows)

    def curved(self, columns: Tensor) -> Tensor:
        """``H w`` with the output curvature, of columns ``(K, N, ...)``; of their shape and type."""
        with torch.no_grad():
            found: Tensor = self.likelihood.curvature_product(self.outputs.detach(), columns, self.targets)
        return found.to(columns.dtype)


def walk(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    visit: Callable[[Pass], None],
    *,
    parameters: str | Sequence[str] = "all",
    forward: Forward | None = None,
    weights: weighting.Weights = False,
) -> tuple[FlatLayout, int]:
    """Goes over data in eval mode and shows every minibatch; the model is left exactly as it was.

    Args:
        model: module.
        likelihood: of the targets.
        data: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``.
        visit: called with every pass.
        parameters: ``"all"``, ``"last_layer"`` or name patterns.
        forward: what reads a batch (:func:`laplace_kf.reading.reading`), or ``None``.
        weights: whether batches bring weights of their examples.

    Returns:
        Flat order of the selected parameters, and the number of examples that counted.

    Raises:
        ShapeMismatch: if the data are empty or all targets are ignored.
        NonFinite: for NaN or infinity in a batch or the outputs.
    """
    model = usable(model)
    total = 0
    # fused attention kernels have no second derivative
    with preserved(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        named: dict[str, Tensor] = dict(model.named_parameters())  # not before: another thread may hold others there
        tracer = Tracer(model, forward, parameters)
        for index, batch in enumerate(weighting.batches(data, weights, model)):
            check_batch(batch, index, "the batch", forward, likelihood.nan_is_missing)
            batch = to_device(batch, tracer.device)
            if index == 0:
                require_same_loss(model, batch, forward, likelihood)
                if not hasattr(tracer, "layout"):  # the last layer is found by running
                    tracer.observe(batch)
            selected = [named[name] for name in tracer.layout.names]
            again = lambda other: run(model, other, forward)[0]  # noqa: E731
            first = FirstPass(model, again, batch) if index == 0 and read(model) is None else None
            # its derivatives are those of the function
            with nullcontext() if first is None else first, Plainly():
                outputs, targets = run(model, batch, forward)
            if first is not None:
                key = "the same twice", id(forward), tuple(type(module) for module in model.modules())
                with torch.no_grad():  # a pass more, not for each product of conjugate gradients
                    known = (remembered(model, key) or ((),))[0] is forward
                    first.require_a_function(outputs, None if known else again(batch))
                    if not known:
                        require_derivatives(model, tracer.layout.names, again, batch, outputs)
                note(model, key, (forward,))  # kept, so that no other one gets its identity
            likelihood = as_read(likelihood, model, batch, forward, outputs, targets)
            likelihood.check(outputs.detach(), targets)
            count = likelihood.counted_examples(outputs.detach(), targets)
            visit(Pass(index, batch, likelihood, outputs, targets, selected, tracer.layout, count))
            total += count
    if total == 0:
        raise ShapeMismatch("the data are empty: no batch was yielded, or all targets are ignored")
    return tracer.layout, total


def columns_of(v: Tensor, layout: FlatLayout) -> Tensor:
    """``(P,)`` or ``(P, K)`` as rows ``(K, P)``.

    Raises:
        ShapeMismatch: for another shape.
    """
    if v.dim() not in (1, 2) or v.shape[0] != layout.size:
        raise ShapeMismatch(
            f"expected v of shape ({layout.size},) or ({layout.size}, K), got {tuple(v.shape)}: one entry (or row) for "
            "each selected parameter"
        )
    v = usable_by_autograd(v)
    return v[None] if v.dim() == 1 else v.T
