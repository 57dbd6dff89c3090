"""What a Kronecker product of expectations loses against the expectation of Kronecker products (methods 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.curvature import estimate
from laplace_kf.diagnostics.base import Parameters, observed, repeatable, require_dense
from laplace_kf.diagnostics.record import Record
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.tape import Block, Observation, OuterSignals, Tracer
from laplace_kf.tape.blocks import flat_layout

__all__ = ["kronecker_error", "moments"]


@lasting()
def kronecker_error(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    parameters: Parameters = "all",
    *,
    forward: Forward | None = None,
) -> Record:
    """How good Kronecker factors are for this network, block by block (methods 4.1; Martens 2016, 6.3.1 and B.1).

    The error of one entry is ``κ(a, a', g, g') + E[a] κ(a', g, g') + E[a'] κ(a, g, g')`` in the cumulants of inputs and
    back-propagated columns of the output curvature's root; the bound is the sum of absolute values.

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`; small networks,
            data are gone over several times.

    Returns:
        For every block, by its name: ``relative`` (Frobenius norm of the difference by that of the exact block),
        ``error`` (sum of the absolute entries of the difference) and ``bound`` (of the cumulants). ``summary`` has the
        same over all diagonal blocks (``relative, error, bound``), ``worst`` (the block with the largest ``relative``),
        and ``total_error`` and ``total_bound`` over all pairs of layers, with ``E[a aᵀ] ⊗ E[g gᵀ]`` between layers too.
        Bounds and totals are NaN where weights are shared by positions, or blocks are not Kronecker products.

    Raises:
        IncompatiblePair: if the dense blocks do not fit into the memory.
        ShapeMismatch: if the data are empty.
    """
    data = repeatable(data)
    kron = estimate(model, likelihood, data, "kron", "exact", parameters, forward=forward).mean()
    named = dict(model.named_parameters())
    pairs, _ = moments(model, likelihood, data, parameters, forward)
    found, squares, size = Record(), 0.0, 0.0
    for block, matrix in kron.entries:
        patterns = [name.replace("[", "[[]") for name in block.parameters]
        require_dense(block.size, named[block.parameters[0]], f"block {block.name!r}")
        exact = estimate(model, likelihood, data, "full", "exact", patterns, forward=forward).mean().dense()
        layout = flat_layout(named, [name for name in kron.layout.names if name in block.parameters])
        places = layout.positions(block)
        exact = exact[places][:, places]
        difference = matrix.dense().to(exact) - exact
        norm = float(exact.norm())
        squares, size = squares + float(difference.square().sum()), size + norm**2
        pair = pairs.get((block.name, block.name))
        found[block.name] = Record(
            relative=float(difference.norm()) / norm if norm else 0.0,
            error=float(difference.abs().sum()),
            bound=math.nan if pair is None else pair.bound(),
        )
    every = {(b.name, c.name) for b, _ in kron.entries for c, _ in kron.entries}
    whole = every == set(pairs)
    found["summary"] = Record(
        relative=math.sqrt(squares / size) if size else 0.0,
        error=sum(entry.error for entry in found.values()),
        bound=sum(entry.bound for entry in found.values()),
        worst=max(found, key=lambda name: found[name].relative),
        total_error=sum(pair.error() for pair in pairs.values()) if whole else math.nan,
        total_bound=sum(pair.bound() for pair in pairs.values()) if whole else math.nan,
    )
    return found


@dataclass
class _Pair:
    """Sums over N examples of the moments of two layers: inputs ``a (I,)``, ``b (J,)`` and ``E[g hᵀ] (O, Q)``."""

    count: int = 0
    sums: dict[str, Tensor] | None = None

    def add(self, a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> None:
        """Takes in inputs ``(N, I)``, ``(N, J)`` and columns ``(V, N, O)``, ``(V, N, Q)``."""
        outer = torch.einsum("vno,vnq->noq", g, h)
        both = torch.einsum("ni,nj->nij", a, b)
        found = {
            "a": a.sum(0),
            "b": b.sum(0),
            "ab": both.sum(0),
            "g": outer.sum(0),
            "ag": torch.einsum("ni,noq->ioq", a, outer),
            "bg": torch.einsum("nj,noq->joq", b, outer),
            "abg": (both.flatten(1).T @ outer.flatten(1)).reshape(*both.shape[1:], *outer.shape[1:]),
        }
        self.count += len(a)
        self.sums = found if self.sums is None else {name: self.sums[name] + part for name, part in found.items()}

    def _means(self) -> dict[str, Tensor]:
        assert self.sums is not None
        return {name: part / self.count for name, part in self.sums.items()}

    def exact(self) -> Tensor:
        """``E[g hᵀ ⊗ a bᵀ]`` with both layers' weights by rows, ``(P_a, P_b)``."""
        joint = self._means()["abg"]  # (I, J, O, Q)
        return joint.permute(2, 0, 3, 1).reshape(joint.shape[2] * joint.shape[0], -1)

    def product(self) -> Tensor:
        """``E[a bᵀ] ⊗ E[g hᵀ]`` with both layers' weights by rows, ``(P_a, P_b)``."""
        m = self._means()
        return torch.kron(m["g"], m["ab"])

    def error(self) -> float:
        """Sum of ``|E[a b g h] − E[a b] E[g h]|`` over all entries."""
        m = self._means()
        return float((m["abg"] - m["ab"][:, :, None, None] * m["g"]).abs().sum())

    def bound(self) -> float:
        """Sum of ``|κ(a, b, g, h)| + |E a| |κ(b, g, h)| + |E b| |κ(a, g, h)|`` over all entries."""
        m = self._means()
        a, b, g = m["a"], m["b"], m["g"]
        third_a, third_b = m["ag"] - a[:, None, None] * g, m["bg"] - b[:, None, None] * g
        fourth = (
            m["abg"]
            - m["ab"][:, :, None, None] * g
            - a[:, None, None, None] * third_b[None]
            - b[None, :, None, None] * third_a[:, None]
        )
        mixed = a.abs().sum() * third_b.abs().sum() + b.abs().sum() * third_a.abs().sum()
        return float(fourth.abs().sum() + mixed)


def moments(
    model: nn.Module, likelihood: str | Likelihood, data: Any, parameters: Parameters, forward: Forward | None
) -> tuple[dict[tuple[str, str], _Pair], dict[str, Block]]:
    """Moments by pairs of layers whose weights are used once an example, and all blocks by name."""
    blocks: dict[str, Block] = {}
    found: dict[tuple[str, str], _Pair] = {}
    left_out: set[str] = set()

    def visit(seen: Observation, rule: Likelihood, tracer: Tracer) -> None:
        outputs = seen.outputs.detach()
        with torch.no_grad():
            root = rule.hessian_root(outputs, seen.targets)
            rows: dict[str, tuple[Tensor, Tensor]] = {}
            for name, signal in seen.signals(root).items():
                if not isinstance(signal, OuterSignals) or signal.a.shape[1] != 1 or signal.block.shape[0] != 1:
                    left_out.add(name)
                    continue
                a = signal.a[:, 0, 0]
                rows[name] = (
                    torch.cat([a, a.new_ones(len(a), 1)], 1) if signal.has_constant else a,
                    signal.g[:, :, 0, 0],
                )
            size = sum(tracer.blocks[name].size for name in rows)
            require_dense(size, outputs, "the moments of all layers")
            blocks.update(tracer.blocks)
            for first, (a, g) in rows.items():
                for second, (b, h) in rows.items():
                    found.setdefault((first, second), _Pair()).add(a, b, g, h)

    observed(model, likelihood, data, visit, forward, parameters)
    return {pair: sums for pair, sums in found.items() if not left_out & set(pair)}, blocks
