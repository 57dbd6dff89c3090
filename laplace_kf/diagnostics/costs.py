"""Operations of the estimators by formula, beside what a fit really does (methods 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laplace_kf.batches import Forward
from laplace_kf.curvature import estimate
from laplace_kf.diagnostics.base import observed
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.posterior.work import Counter
from laplace_kf.tape import Observation, Tracer

__all__ = ["Costs", "costs"]


@dataclass(frozen=True)
class Costs:
    """Floating-point operations (a multiplication and an addition are two) of the output factors of one minibatch.

    Attributes:
        formula: by estimator, of the products that make ``G_l`` and send columns back (methods 4.2).
        measured: by estimator, all products that a fit of these factors made, its forward pass, the inputs' factors
            and the engine's checks of a new model included.
    """

    formula: dict[str, int]
    measured: dict[str, int]


@lasting()
def costs(
    model: nn.Module,
    likelihood: str | Likelihood,
    batch: Any,
    samples: int = 1,
    *,
    forward: Forward | None = None,
) -> Costs:
    """What KFRA, KFAC and KFLR cost on a chain of linear layers (Botev et al. 2017, App. C.4).

    For a layer of ``O`` outputs and ``I`` inputs, N examples and V columns each: with columns ``2 N V O²`` for the
    factor and ``2 N V O I`` to send them back; KFRA ``2 (O² I + O I²)`` to send the matrix back and ``2 N I²`` for the
    derivatives of the activation, whatever the number of outputs.

    Args:
        model, likelihood, forward: as for :func:`laplace_kf.curvature.estimate`; a chain.
        batch: one batch.
        samples: S of KFAC.

    Raises:
        UnsupportedLayer: if the network is no chain of linear maps and elementwise activations.
    """
    sizes: list[tuple[int, int]] = []
    counts: dict[str, int] = {}

    def visit(seen: Observation, rule: Likelihood, tracer: Tracer) -> None:
        chain = seen.chain or seen.require_chain()
        sizes[:] = [
            (int(link.weight.shape[0]), int(link.weight.shape[1])) for link in chain.links if link.weight is not None
        ]
        root = rule.root(seen.outputs.detach(), seen.targets)
        counts.update(examples=seen.count, columns=root.count * root.shape[1])

    observed(model, likelihood, [batch], visit, forward)
    if not sizes:
        raise UnsupportedLayer(
            "the network has no linear map; costs are counted for nn.Linear and convolutions, add one"
        )
    n = counts["examples"]

    def by_columns(columns: int) -> int:
        factors = sum(2 * n * columns * o * o for o, _ in sizes)
        return factors + sum(2 * n * columns * o * i for o, i in sizes[1:])

    recursive = sum(2 * (o * o * i + o * i * i) + 2 * n * i * i for o, i in sizes[1:])
    formula = {"recursive": recursive, "sampled": by_columns(samples), "exact": by_columns(counts["columns"])}
    options: dict[str, dict[str, Any]] = {"sampled": {"samples": samples}}
    measured = {}
    for name in formula:
        with Counter({torch.ops.aten.addmm_: _in_place}) as counter:
            estimate(model, likelihood, [batch], "kron", name, forward=forward, **options.get(name, {}))
        measured[name] = int(counter.get_total_flops())
    return Costs(formula, measured)


def _in_place(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of ``total += left @ right`` by shapes, which torch's counter leaves out."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])
