"""Training steps that take a quadratic penalty implicitly, so that it may be as stiff as it likes.

With ``g = ∇(loss + penalty/N)`` and ``r = lr / N``, the step ``θ − lr (I + r Λ)⁻¹ g`` minimises the linearised loss
plus the whole penalty plus ``‖θ' − θ‖² / (2 lr)``: a proximal gradient step. Its fixed points are those of the plain
step.
Plain gradient descent needs ``lr < 2 N / λ_max(Λ)``, which for a chain of tasks with a large multiplier is next to
nothing (the published runs decay the rate from task to task, methods 11.6); this step is stable for every Λ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laplace_kf.models import parameters_of
from laplace_kf.operators import Blockwise, CurvatureBlock, Isotropic, Matrix, in_common_bases
from laplace_kf.operators.blockwise import prior_of
from laplace_kf.posterior.prior import positive
from laplace_kf.posterior.task_chain import TERMS, in_one_form
from laplace_kf.tape import Block

__all__ = ["ImplicitPenalty"]

POWER_STEPS = 50
MARGIN = 1.1  # the power method ends below the largest eigenvalue


class ImplicitPenalty:
    """``(I + r Λ)⁻¹`` for ``Λ = Σ_k (C_k + λ_k I)``.

    Exact where a block has a closed form. A block of several Kronecker terms goes by their diagonal in the eigenbases
    of both sides together, scaled up until it majorises them (or steps in it would not be stable), and one with a
    prior for each of its parameters by the mean of these: the step is then another one, with the same fixed points.

    Args:
        penalties: curvature ``C_k`` (sums over data, not means) with the prior ``λ_k`` as a 0-dim tensor or one by
            parameter name; all over the same parameters and blocks.
    """

    def __init__(self, penalties: Sequence[tuple[Blockwise, Tensor | dict[str, Tensor]]]) -> None:
        aligned = in_one_form([curvature for curvature, _ in penalties])
        penalties = [(curvature, own) for curvature, (_, own) in zip(aligned, penalties, strict=True)]
        self.layout = penalties[0][0].layout
        self._entries: list[tuple[Block, Matrix, Tensor]] = []  # and a 1 of the block's type, where the block is
        for k, (block, first) in enumerate(penalties[0][0].entries):
            assert isinstance(first, CurvatureBlock)
            total, prior = first, prior_of(block, penalties[0][1]).mean()
            for curvature, own in penalties[1:]:
                other = curvature.entries[k][1]
                assert isinstance(other, CurvatureBlock)
                total, prior = TERMS["keep"].joined(total, other)[0], prior + prior_of(block, own).mean()
            one = torch.ones_like(total.diag()[0])
            level = prior.to(one)
            metric = total
            if len(total.terms) > 1:
                common = in_common_bases(total.terms, block.name)
                metric = _scaled(common, _excess(total, common, level))
            self._entries.append((block, metric.precision(1.0, level, "exact"), one))

    @torch.no_grad()
    def apply(self, model: nn.Module, rate: float) -> None:
        """The gradients ``g`` of the covered parameters become ``(I + rate · Λ)⁻¹ g``, in place.

        Args:
            model: whose parameters have the gradients; one without a gradient counts as zero, and stays without.
            rate: ``lr / N``.

        Raises:
            ValueError: for a rate that is not positive and finite.
        """
        rate = positive("rate", rate)
        named = parameters_of(model, self.layout.names, self.layout.shapes, "the penalty")
        given = {name: named[name].grad for name in self.layout.names}
        like, device = self._entries[0][2], named[self.layout.names[0]].device
        parts = {
            name: (torch.zeros_like(named[name]) if gradient is None else gradient)[None].to(device, like.dtype)
            for name, gradient in given.items()
        }
        shifted = [(block, matrix.plus(Isotropic(matrix.size, one / rate))) for block, matrix, one in self._entries]
        found = Blockwise(self.layout, shifted).solve(self.layout.join(parts)[0]) / rate
        for name, part in self.layout.split(found[None]).items():
            gradient = given[name]
            if gradient is not None:
                gradient.copy_(part[0])


def _scaled(block: CurvatureBlock, factor: float) -> CurvatureBlock:
    found = block.scaled(factor)
    assert isinstance(found, CurvatureBlock)
    return found


def _excess(exact: CurvatureBlock, metric: CurvatureBlock, prior: Tensor) -> float:
    """The largest eigenvalue of ``exact + λ I`` relative to ``metric + λ I``, at least 1, by the power method."""
    upper, lower = (block.products(1.0, prior, "exact") for block in (exact, metric))
    inverse = metric.precision(1.0, prior, "exact")
    rng = torch.Generator(prior.device).manual_seed(0)
    v = torch.randn(exact.size, generator=rng, dtype=prior.dtype, device=prior.device)
    found = 1.0
    for _ in range(POWER_STEPS):
        v = inverse.solve(upper.matvec(v))
        v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        found = max(found, float((v @ upper.matvec(v)) / (v @ lower.matvec(v)).clamp_min(torch.finfo(v.dtype).tiny)))
    return MARGIN * found
