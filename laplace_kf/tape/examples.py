"""Per-example gradients of parameters that no rule covers: exact for any use, one example at a time.

Vectorised by ``torch.func.vmap`` where the model allows it (checked against one ordinary backward pass), otherwise a
loop over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, as_tensor, map_examples, run, tensors_of
from laplace_kf.errors import UnsupportedLayer

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
        if not self.checked:
            self._check_independence(batch, outputs)
        if self.vmap_works is not False:
            try:
                gradients = self._vectorised(batch, count, names, columns)
                if self.vmap_works is None:  # batching rules can be missing or wrong: check one example by hand
                    alone = self._one(batch, count, 0, names, columns[:, 0])
                    scale = alone.abs().max().clamp_min(torch.finfo(alone.dtype).tiny)
                    self.vmap_works = bool(((gradients[:, 0] - alone).abs().max() <= 1e-2 * scale).item())
                if self.vmap_works:
                    return gradients
            except (RuntimeError, ValueError, TypeError):
                self.vmap_works = False  # data-dependent control flow, fused recurrent kernels, ...
        return torch.stack([self._one(batch, count, n, names, columns[:, n]) for n in range(count)], 1)

    def _one(self, batch: Any, count: int, n: int, names: Sequence[str], columns: Tensor) -> Tensor:
        """Gradients ``(V, Σ sizes)`` of example ``n`` for columns ``(V, ...)``, by one ordinary backward pass each."""
        parameters = [self.named[name] for name in names]
        example = map_examples(batch, count, lambda t: t[n : n + 1])
        with torch.enable_grad():
            output, _ = run(self.model, example, self.forward)
        rows = []
        for column in columns:
            grads = torch.autograd.grad(output, parameters, column[None], retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows)

    def _check_independence(self, batch: Any, outputs: Tensor) -> None:
        with torch.no_grad():
            alone, _ = run(self.model, map_examples(batch, outputs.shape[0], lambda t: t[:1]), self.forward)
        scale = outputs[:1].abs().max().clamp_min(1e-6)
        tolerance = 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if alone.shape != outputs[:1].shape or bool((alone - outputs[:1]).abs().max() > tolerance * scale):
            raise UnsupportedLayer(
                "the output of an example changes with the other examples of its minibatch (batch statistics?), so "
                "per-example curvature is not defined; use running statistics or leave those modules out of the path"
            )
        self.checked = True

    def _vectorised(self, batch: Any, count: int, names: Sequence[str], columns: Tensor) -> Tensor:
        wrapper = _Forward(self.model, self.forward)
        prefixed = {f"model.{name}": self.named[name].detach() for name in names}
        sliced = [t for t in tensors_of(batch) if t.dim() and t.shape[0] == count]

        def single(parts: list[Tensor], column: Tensor) -> Tensor:
            queue = iter(parts)
            example = map_examples(batch, count, lambda _: next(queue).unsqueeze(0))

            def outputs(parameters: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(wrapper, parameters, (example,))[0]

            pull = torch.func.vjp(outputs, prefixed)[1]
            (grads,) = torch.func.vmap(pull)(column)
            parts = [grads[f"model.{name}"] for name in names]
            for part, name in zip(parts, names, strict=True):
                if part.shape[1:] != self.named[name].shape:
                    raise RuntimeError(f"vmap returned a gradient of shape {tuple(part.shape[1:])} for {name}")
            return torch.cat([part.reshape(column.shape[0], -1) for part in parts], 1)

        size = sum(self.named[name].numel() for name in names)
        chunk = max(1, 2**26 // max(1, size * columns.shape[0]))
        with warnings.catch_warnings():  # an operation without a batching rule is slower, not wrong
            warnings.filterwarnings("ignore", message=".*batching rule.*", category=UserWarning)
            stacked = torch.func.vmap(single, in_dims=(0, 1), chunk_size=chunk)(sliced, columns)
        return stacked.transpose(0, 1)


class _Forward(nn.Module):
    """Makes ``forward(model, batch)`` callable through ``functional_call`` (which wants a module)."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._run: Callable[[nn.Module, Any], tuple[Tensor, Any]] = lambda m, b: run(m, b, forward)

    def forward(self, batch: Any) -> Tensor:
        return as_tensor(self._run(self.model, batch)[0])
