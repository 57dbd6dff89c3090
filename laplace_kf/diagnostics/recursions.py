"""Second derivatives in the pre-activations, layer by layer and example by example (methods 2.2-2.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.diagnostics.base import observed, require_dense, walked
from laplace_kf.diagnostics.record import Record
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.passes import Pass
from laplace_kf.tape import Block, Chain, FlatLayout, Observation, Tracer
from laplace_kf.tape.chain import ChainLink, second_derivative

__all__ = ["blocks"]


@lasting()
def blocks(model: nn.Module, likelihood: str | Likelihood, batch: Any, *, forward: Forward | None = None) -> Record:
    """Hessians and Gauss-Newton matrices of every layer's pre-activations, case by case (methods 2.3, 2.5).

    ``H_l = B_l W̄ᵀ H_{l+1} W̄ B_l + D_l`` with ``B_l = diag φ'(h_l)`` and ``D_l = diag(∂L/∂a_l ∘ φ''(h_l))``, one
    backward recursion an example; the Gauss-Newton matrices are the same without ``D_l`` (Botev 2020, Lemmas 3.15 to
    3.22). With piecewise linear activations ``D_l = 0``: every block is then positive semi-definite if the output
    Hessian is, no block trace is negative, and the objective has no smooth local maximum.

    Args:
        model: a chain of linear maps and elementwise activations on rows, small.
        likelihood: registered name or object; outputs ``(N, C)``.
        batch: one batch, as of a loader.
        forward: ``(model, batch) -> (outputs, targets)``.

    Returns:
        For every layer, by its name: ``hessian (N, O, O)``, ``ggn (N, O, O)``, ``trace`` (of the layer's diagonal block
        of the mean Hessian in the weights), ``smallest`` (least eigenvalue of the ``hessian`` of all examples) and
        ``psd`` (whether that is not negative beyond rounding). Besides: ``first_order (P, P)``, the mean of
        ``Σ_j ∂L/∂z_j ∇²z_j`` (Hessian = Gauss-Newton + this); ``cross (P, P)``, its part between different layers that
        is left when the Hessians in the pre-activations take the place of the Gauss-Newton ones (``H^FO`` of Lemma
        3.15, zero on the diagonal blocks); ``piecewise_linear``; ``no_maxima``: whether all block traces are not
        negative (beyond rounding), so that this point is no strict local maximum.

    Raises:
        UnsupportedLayer: if the network is not such a chain; names the layer.
        IncompatiblePair: if the (P, P) matrices do not fit into the memory.
        ShapeMismatch: for outputs that are not ``(N, C)``.
    """
    found = Record()

    def visit(seen: Observation, rule: Likelihood, tracer: Tracer) -> None:
        if seen.outputs.dim() != 2:
            raise ShapeMismatch(f"the recursion is for outputs (N, C), the model's are {tuple(seen.outputs.shape)}")
        chain = seen.chain or seen.require_chain()
        bends = tracer.chain_or_refusal(batch, second_derivative)
        with torch.no_grad():
            found.update(_recursion(seen, rule, chain, bends, tracer.layout))

    observed(model, likelihood, [batch], visit, forward)
    layers = list(found.values())

    def first_order(seen: Pass) -> None:
        size, like = seen.layout.size, seen.weights[0]
        require_dense(size, like, "the first-order part of the Hessian")
        gradient = -seen.likelihood.score(seen.outputs.detach(), seen.targets)
        rows = seen.hessian_rows(torch.eye(size, dtype=like.dtype, device=like.device), gradient)
        found["first_order"] = (rows + rows.T) / (2 * seen.count)

    walked(model, likelihood, [batch], first_order, forward)
    cross = found["first_order"].new_zeros(found["first_order"].shape)
    for rows, columns, part in layers[0].pop("_cross"):
        cross[rows[:, None], columns] = part
        cross[columns[:, None], rows] = part.T
    found["cross"] = cross
    found["piecewise_linear"] = layers[0].pop("_straight")
    found["no_maxima"] = all(layer.trace >= -1e-9 * layer.pop("_size") for layer in layers)
    return found


def _recursion(seen: Observation, rule: Likelihood, chain: Chain, bends: Chain, layout: FlatLayout) -> Record:
    outputs = seen.outputs.detach()
    hessian = rule.hessian(outputs, seen.targets)
    ggn = rule.curvature(outputs, seen.targets)
    g = -rule.score(outputs, seen.targets)
    count = rule.counted_examples(outputs, seen.targets)
    found = Record()
    later: list[tuple[Block, Tensor, Tensor]] = []  # block, inputs with the 1, and ∂L/∂h
    lower: list[tuple[int, Tensor]] = []  # of a later layer, the derivative of its inputs by what is at hand (N, I, d)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    straight = True
    for link, bend in zip(reversed(chain.links), reversed(bends.links), strict=True):
        if link.weight is None:
            assert link.slope is not None and bend.slope is not None
            slope, bent = link.slope.whole(), bend.slope.whole()
            straight = straight and not bool(bent.any())
            hessian = slope[:, :, None] * hessian * slope[:, None, :] + torch.diag_embed(g * bent)
            ggn = slope[:, :, None] * ggn * slope[:, None, :]
            g = g * slope
            lower = [(k, through * slope[:, None, :]) for k, through in lower]
            continue
        weight = link.weight.to(hessian.dtype)
        if link.call is not None:
            (block,) = seen.blocks_of(link.call)
            inputs = _inputs(link, block)
            squares = inputs.square().sum(1)
            trace = (squares * hessian.diagonal(dim1=1, dim2=2).sum(1)).sum() / count
            size = (squares * hessian.diagonal(dim1=1, dim2=2).abs().sum(1)).sum() / count
            values = torch.linalg.eigvalsh(hessian)
            rounding = 1e3 * torch.finfo(values.dtype).eps * float(values.abs().max())
            found[block.name] = Record(
                hessian=hessian,
                ggn=ggn,
                trace=float(trace),
                smallest=float(values.min()),
                psd=float(values.min()) >= -rounding,
                _size=float(size),
            )
            mine = layout.positions(block)
            for k, through in lower:
                other, their_inputs, their_g = later[k]
                # ∂²L / ∂W_k[o,i] ∂W_l[p,q] = g_k[o] · ∂a_k[i]/∂h_l[p] · a_l[q]
                part = torch.einsum("no,nip,nq->oipq", their_g, through, inputs) / count
                extra = their_inputs.shape[1] - part.shape[1]  # the constant 1 depends on nothing
                part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, extra))
                rows = layout.positions(other)
                pairs.append((rows, mine, part.reshape(len(rows), len(mine))))
            later.append((block, inputs, g))
            fresh = torch.eye(weight.shape[1], dtype=g.dtype, device=g.device).expand(len(g), -1, -1)
            lower = [(k, through @ weight) for k, through in lower] + [(len(later) - 1, fresh)]
        else:
            lower = [(k, through @ weight) for k, through in lower]
        hessian, ggn, g = weight.T @ hessian @ weight, weight.T @ ggn @ weight, g @ weight
    ordered = Record(reversed(found.items()))
    first = next(iter(ordered.values()))
    first.update(_cross=pairs, _straight=straight)
    return ordered


def _inputs(link: ChainLink, block: Block) -> Tensor:
    """Inputs ``(N, I)`` of a layer with the 1 of its bias; ``(N, 1)`` ones for a bias alone."""
    assert link.call is not None
    inputs = link.call.input()
    if block.view is None:
        return inputs.new_ones(len(inputs), 1)
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if block.has_bias_column else inputs
