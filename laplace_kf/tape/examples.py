"""Per-example gradients of parameters that no rule covers: exact for any use, one example at a time.

Vectorised by ``torch.func.vmap`` where the model allows it (checked against one ordinary backward pass), otherwise a
loop over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, graphs_of, map_examples, run, tensors_of
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.returned import as_tensor
from laplace_kf.substitution import substituted

__all__ = ["ExampleGradients"]


class ExampleGradients:
    """Gradients of single examples' outputs with respect to some parameters.

    Args:
        model: the module, in eval mode.
        forward: ``(model, batch) -> (outputs, targets)`` or ``None``.
        named: the model's parameters by name, each in its own shape.
    """

    def __init__(self, model: nn.Module, forward: Forward | None, named: Mapping[str, Tensor]) -> None:
        self.model, self.forward, self.named = model, forward, named
        self.vmap_works: bool | None = None  # unknown until tried
        self.checked = False
        self._shared: set[int] = set()  # numbers of the batch's tensors that belong to no example (an attention mask)

    def to_json(self) -> dict[str, Any]:
        """What was found out of the batches as plain values, for :meth:`take_json`."""
        return {"vmap_works": self.vmap_works, "checked": self.checked, "shared": sorted(self._shared)}

    def take_json(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`to_json` gave in place of what was found out."""
        self.vmap_works, self.checked, self._shared = values["vmap_works"], values["checked"], set(values["shared"])

    def __call__(self, batch: Any, outputs: Tensor, names: Sequence[str], columns: Tensor) -> Tensor:
        """Per-example gradients of the named parameters, ``(V, N, Σ sizes)``.

        One example at a time, vectorised by ``torch.func.vmap`` where the model allows it.

        Args:
            batch: the minibatch.
            outputs: the network outputs on it, ``(N, ...)``.
            names: parameter names.
            columns: ``(V, N, ...)`` gradients with respect to the outputs.

        Raises:
            UnsupportedLayer: if the outputs of an example depend on the other examples of the minibatch.
        """
        count = outputs.shape[0]
        if next(graphs_of(batch), None) is not None:
            self.vmap_works = False  # single graphs have different sizes
        # what was once of another length than the minibatch is not cut where it happens to be as long
        self._shared |= {k for k, t in enumerate(tensors_of(batch)) if t.dim() and t.shape[0] != count}
        if not self.checked:
            self._find_examples(batch, outputs)
        found = self._gradients(batch, outputs, names, columns)
        if found is None:  # this minibatch may be as long as a tensor that is shared by all
            self._find_examples(batch, outputs)
            found = self._gradients(batch, outputs, names, columns)
        if found is None:
            raise _dependent()
        return found

    def _gradients(self, batch: Any, outputs: Tensor, names: Sequence[str], columns: Tensor) -> Tensor | None:
        """Gradients ``(V, N, Σ sizes)``; ``None`` if single examples do not give the outputs ``(N, ...)``."""
        count = outputs.shape[0]
        if self.vmap_works is not False:
            try:
                gradients, alone = self._vectorised(batch, count, names, columns)
                if not _agree(alone, outputs):
                    return None if self.vmap_works else self._one_by_one(batch, outputs, names, columns)
                if self.vmap_works is None:  # batching rules can be missing or wrong, for some examples only
                    by_hand = self._one(batch, count, 0, names, columns[:, 0])[0]
                    self.vmap_works = _near(gradients[:, 0], by_hand, by_hand.abs().max()) and self._add_up(
                        batch, gradients, names, columns
                    )
                if self.vmap_works:
                    return gradients
            except (RuntimeError, ValueError, TypeError):
                self.vmap_works = False  # data-dependent control flow, fused recurrent kernels, ...
        return self._one_by_one(batch, outputs, names, columns)

    def _one_by_one(self, batch: Any, outputs: Tensor, names: Sequence[str], columns: Tensor) -> Tensor | None:
        """As :meth:`_gradients`, by a loop."""
        rows = []
        for n in range(outputs.shape[0]):
            row, alone = self._one(batch, outputs.shape[0], n, names, columns[:, n])
            if not _agree(alone, outputs[n : n + 1]):
                return None
            rows.append(row)
        return torch.stack(rows, 1)

    def _add_up(self, batch: Any, gradients: Tensor, names: Sequence[str], columns: Tensor) -> bool:
        """Whether gradients ``(V, N, Σ sizes)`` are those of one ordinary pass, added up with signs of their own."""
        signs = torch.empty(columns.shape[:2]).bernoulli_(generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
        signs = signs.to(columns)
        column = torch.einsum("vn,vn...->n...", signs, columns)
        with torch.enable_grad():
            outputs = run(self.model, batch, self.forward)[0]
        parameters = [self.named[name] for name in names]
        grads = torch.autograd.grad(outputs, parameters, column, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads, strict=True)]
        ordinary = torch.cat([part.reshape(-1) for part in parts])
        added = torch.einsum("vn,vnp->p", signs.to(gradients), gradients)
        return _near(added, ordinary, gradients.abs().max(), columns[..., 0].numel())

    def _cut(self, batch: Any, count: int, change: Callable[[Tensor], Tensor], shared: set[int]) -> Any:
        """The batch with ``change`` applied to every tensor that has a row for each of ``count`` examples."""
        kept = {id(t) for k, t in enumerate(tensors_of(batch)) if k in shared}
        return map_examples(batch, count, lambda t: t if id(t) in kept else change(t))

    def _one(self, batch: Any, count: int, n: int, names: Sequence[str], columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(V, Σ sizes)`` of example ``n`` for columns ``(V, ...)``, one backward pass each; its outputs."""
        parameters = [self.named[name] for name in names]
        example = self._cut(batch, count, lambda t: t[n : n + 1], self._shared)
        with torch.enable_grad():
            output = _as_long(run(self.model, example, self.forward)[0], columns.shape[1:])
        if output.shape[1:] != columns.shape[1:] or output.shape[0] != 1:
            return columns.new_zeros(len(columns), 0), output.detach()
        rows = []
        for column in columns:
            grads = torch.autograd.grad(output, parameters, column[None], retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows), output.detach()

    def _find_examples(self, batch: Any, outputs: Tensor) -> None:
        """Finds which tensors of a batch are cut into examples: all as long as it, without up to two others."""
        count = outputs.shape[0]
        tensors = enumerate(tensors_of(batch))
        long = [k for k, t in tensors if t.dim() and t.shape[0] == count and k not in self._shared]
        for some in (some for size in range(3) for some in combinations(long, size)):
            if all(self._stands_alone(batch, outputs, n, self._shared | set(some)) for n in {0, count // 2, count - 1}):
                self._shared |= set(some)
                self.checked = True
                return
        raise _dependent()

    def _stands_alone(self, batch: Any, outputs: Tensor, n: int, shared: set[int]) -> bool:
        """Whether example ``n`` alone gives its outputs among ``(N, ...)``."""
        example = self._cut(batch, outputs.shape[0], lambda t: t[n : n + 1], shared)
        try:
            with torch.no_grad():
                alone = _as_long(run(self.model, example, self.forward)[0], outputs.shape[1:])
        except (RuntimeError, ValueError, IndexError):
            return False
        return _agree(alone, outputs[n : n + 1])

    def _vectorised(self, batch: Any, count: int, names: Sequence[str], columns: Tensor) -> tuple[Tensor, Tensor]:
        values = {name: self.named[name].detach() for name in names}
        leaves = enumerate(tensors_of(batch))
        sliced = [t for k, t in leaves if t.dim() and t.shape[0] == count and k not in self._shared]
        others: dict[str, Tensor] = {}
        if not torch.is_grad_enabled():  # they are, below: nothing is to get a graph for all that
            others = {name: p.detach() for name, p in self.named.items() if p.requires_grad and name not in values}
            sliced, columns = [t.detach() for t in sliced], columns.detach()

        def single(parts: list[Tensor], column: Tensor) -> tuple[Tensor, Tensor]:
            queue = iter(parts)
            example = self._cut(batch, count, lambda _: next(queue).unsqueeze(0), self._shared)

            def outputs(parameters: dict[str, Tensor]) -> Tensor:
                return as_tensor(substituted(self.model, {**others, **parameters}, call)[0])[0]

            def call() -> Any:
                return run(self.model, example, self.forward)

            found = torch.func.vjp(outputs, values)
            alone, pull = found[0], found[1]
            (grads,) = torch.func.vmap(pull)(column)
            parts = [grads[name] for name in names]
            for part, name in zip(parts, names, strict=True):
                if part.shape[1:] != self.named[name].shape:
                    raise RuntimeError(f"vmap returned a gradient of shape {tuple(part.shape[1:])} for {name}")
            return torch.cat([part.reshape(column.shape[0], -1) for part in parts], 1), alone

        size = sum(self.named[name].numel() for name in names)
        chunk = max(1, 2**26 // max(1, size * columns.shape[0]))
        # with gradients on: under vmap, torch's derivative of linalg.solve is wrong where it could not keep its factors
        with (
            warnings.catch_warnings(),
            torch.enable_grad(),
        ):  # an operation without a batching rule is slower, not wrong
            warnings.filterwarnings("ignore", message=".*batching rule.*", category=UserWarning)
            stacked, alone = torch.func.vmap(single, in_dims=(0, 1), chunk_size=chunk)(sliced, columns)
        return stacked.transpose(0, 1), alone


def _near(found: Tensor, wanted: Tensor, scale: Tensor, count: int = 1) -> bool:
    """Whether gradients of one shape agree, of which ``count`` of at most ``scale`` (0-dim) were added up."""
    info = torch.finfo(found.dtype)
    tolerance = 1e-2 + 8 * info.eps * count**0.5
    return bool((found - wanted).abs().max() <= tolerance * scale.clamp_min(info.tiny))


def _agree(alone: Tensor, outputs: Tensor) -> bool:
    """Whether outputs of single examples are those of the minibatch, both ``(N, ...)``."""
    tolerance = 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-3
    gap = tolerance * outputs.abs().max().clamp_min(1e-6)
    return alone.shape == outputs.shape and bool((alone - outputs).abs().max() <= gap)


def _as_long(output: Tensor, shape: Sequence[int]) -> Tensor:
    """Outputs ``(1, t, C)`` of one example with 0 after its positions, where a batch's have ``shape (T, C)``.

    So a batch of graphs has them; whether the batch at hand has, :func:`_agree` tells.
    """
    if output.dim() != 3 or len(shape) != 2 or output.shape[2] != shape[1] or output.shape[1] >= shape[0]:
        return output
    return torch.nn.functional.pad(output, (0, 0, 0, shape[0] - output.shape[1]))


def _dependent() -> UnsupportedLayer:
    return UnsupportedLayer(
        "the output of an example changes with the other examples of its minibatch (batch statistics? neighbours in a "
        "graph? a tensor in the batch that belongs to no example, yet is as long as the batch?), so per-example "
        "curvature is not defined; use running statistics, another batch size, or leave those modules out of the path; "
        "of a graph make the nodes positions of one example: "
        "forward=lambda model, batch: (model(*batch[0])[None], batch[1][None])"
    )
