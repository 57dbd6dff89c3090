"""The nearest single Kronecker product to a sum of Kronecker products, from the factors alone.

``Σ_k G_k ⊗ A_k`` rearranged is ``Σ_k vec(G_k) vec(A_k)ᵀ`` (Van Loan and Pitsianis 1993), of rank ``K``. With
``[vec G_k] = Q_G R_G`` and ``[vec A_k] = Q_A R_A`` its singular values are those of the ``(K, K)`` matrix
``R_G R_Aᵀ``: what the power method converges to is read off a decomposition of that size, without any dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.operators.kronecker import KroneckerBlock

__all__ = ["factor_sum", "nearest_in_divergence", "nearest_product", "pair_errors", "relative_error"]

STEPS = 200
RIDGE = 1e-6


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors in float64, all as diagonals ``(R, d)`` or all as matrices ``(R, d, d)``."""
    wide = [factor.double() for factor in factors]
    if all(factor.dim() == 2 for factor in wide):
        return wide
    return [torch.diag_embed(factor) if factor.dim() == 2 else factor for factor in wide]


def _columns(factors: Sequence[Tensor]) -> Tensor:
    """Vectorised factors as columns, ``(R, d or d², K)``."""
    return torch.stack([factor.flatten(1) for factor in factors], -1)


def _outputs(terms: Sequence[KroneckerBlock]) -> list[Tensor]:
    return _alike([term.scale * term.outputs for term in terms])


def _block(inputs: Tensor, outputs: Tensor, like: KroneckerBlock) -> KroneckerBlock:
    def kept(factor: Tensor) -> Tensor:
        symmetric = (factor + factor.mT) / 2 if factor.dim() == 3 else factor
        return symmetric.to(like.inputs.dtype)

    return KroneckerBlock(kept(inputs), kept(outputs), like.label)


def nearest_product(terms: Sequence[KroneckerBlock]) -> KroneckerBlock:
    """The single Kronecker product nearest to the terms' sum in Frobenius norm, group by group.

    Both factors are positive semi-definite; an exact product is found exactly.
    """
    outputs, inputs = _outputs(terms), _alike([term.inputs for term in terms])
    q_g, r_g = torch.linalg.qr(_columns(outputs))
    q_a, r_a = torch.linalg.qr(_columns(inputs))
    left, values, right = torch.linalg.svd(r_g @ r_a.mT)
    root = values[:, :1].sqrt()
    g = (q_g @ left[:, :, :1])[..., 0] * root
    a = (q_a @ right[:, :1, :].mT)[..., 0] * root
    # a singular pair is known up to a common sign: the one that makes the traces positive
    sign = torch.where((g * _columns(outputs).sum(-1)).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return _block((sign * a).reshape(inputs[0].shape), (sign * g).reshape(outputs[0].shape), terms[0])


def nearest_in_divergence(terms: Sequence[KroneckerBlock]) -> KroneckerBlock:
    """The Kronecker product ``X ⊗ Y`` for which ``KL(N(0, (X ⊗ Y)⁻¹) ‖ N(0, (Σ_k G_k ⊗ A_k)⁻¹))`` is smallest.

    Stationarity gives ``X = Σ_k G_k tr(A_k Y⁻¹)/I`` and ``Y = Σ_k A_k tr(G_k X⁻¹)/O``, iterated in turn. Densities need
    an inverse: where the sum is singular, every factor gets 1e-6 of its mean diagonal (so that a product stays one).
    """
    outputs, inputs = _outputs(terms), _alike([term.inputs for term in terms])
    _, out, inp = terms[0].shape
    if not KroneckerBlock(_total(inputs), _total(outputs), terms[0].label).is_definite():
        outputs, inputs = [_ridged(g) for g in outputs], [_ridged(a) for a in inputs]
    y = _total(inputs)
    x = _total(outputs)
    for _ in range(STEPS):
        inverse = _inverse(y)
        following = _total([_weighted(_inner(a, inverse) / inp, g) for g, a in zip(outputs, inputs, strict=True)])
        inverse = _inverse(following)
        y_next = _total([_weighted(_inner(g, inverse) / out, a) for g, a in zip(outputs, inputs, strict=True)])
        change = (following - x).norm() / x.norm() + (y_next - y).norm() / y.norm()
        x, y = following, y_next
        if float(change) < 1e-13:
            break
    return _block(y, x, terms[0])


def factor_sum(terms: Sequence[KroneckerBlock]) -> KroneckerBlock:
    """``(Σ_k √s_k G_k) ⊗ (Σ_k √s_k A_k)`` for terms ``s_k (G_k ⊗ A_k)`` (methods 11.2): at least the true sum."""
    roots = [torch.as_tensor(t.scale, dtype=torch.float64, device=t.inputs.device).sqrt() for t in terms]
    outputs, inputs = _alike([term.outputs for term in terms]), _alike([term.inputs for term in terms])
    return _block(
        _total([r * a for r, a in zip(roots, inputs, strict=True)]),
        _total([r * g for r, g in zip(roots, outputs, strict=True)]),
        terms[0],
    )


def pair_errors(terms: Sequence[KroneckerBlock]) -> Tensor:
    """``‖C_i + C_j − nearest_product([C_i, C_j])‖`` in Frobenius norm for every pair: ``(K, K)``, 0 on the diagonal.

    The second singular value of the rearranged sum, over all groups; one decomposition of the ``K`` vectorised factors
    serves all pairs.
    """
    r_g = torch.linalg.qr(_columns(_outputs(terms)))[1]
    r_a = torch.linalg.qr(_columns(_alike([term.inputs for term in terms])))[1]
    first, second = torch.triu_indices(len(terms), len(terms), 1, device=r_g.device)
    found = r_g.new_zeros(len(terms), len(terms))
    left, right = (torch.stack([r[..., first], r[..., second]], -1).movedim(-2, 0) for r in (r_g, r_a))
    core = torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].mT  # (pairs, R, 2, 2)
    values = torch.linalg.svdvals(core)
    lost = values[..., 1].square().sum(-1).sqrt() if values.shape[-1] > 1 else values.new_zeros(len(first))
    found[first, second] = found[second, first] = lost
    return found


def relative_error(terms: Sequence[KroneckerBlock], found: KroneckerBlock | Sequence[KroneckerBlock]) -> float:
    """``‖Σ_k C_k − Σ_j found_j‖ / ‖Σ_k C_k‖`` in Frobenius norm; 0 where the first sum is 0."""
    others = [found] if isinstance(found, KroneckerBlock) else list(found)
    r_g = torch.linalg.qr(_columns(_outputs([*terms, *others])))[1]
    r_a = torch.linalg.qr(_columns(_alike([t.inputs for t in (*terms, *others)])))[1]
    signs = r_g.new_tensor([1.0] * len(terms) + [0.0] * len(others))
    norm = (r_g * signs @ r_a.mT).norm()
    signs[len(terms) :] = -1.0
    return float((r_g * signs @ r_a.mT).norm() / norm) if float(norm) > 0 else 0.0


def _total(factors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(factors)).sum(0)


def _weighted(weights: Tensor, factor: Tensor) -> Tensor:
    """One weight a group, ``(R,)``, on a factor."""
    return weights.reshape(-1, *(1,) * (factor.dim() - 1)) * factor


def _ridged(factor: Tensor) -> Tensor:
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    ridge = RIDGE * torch.where(mean > 0, mean, torch.ones_like(mean)).expand_as(diagonal)
    return factor + (ridge if factor.dim() == 2 else torch.diag_embed(ridge))


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(1).sum(-1)


def _inverse(factor: Tensor) -> Tensor:
    return 1 / factor if factor.dim() == 2 else torch.linalg.inv(factor)
