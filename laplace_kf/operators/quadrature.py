"""Sums of smooth functions over a spectrum from few nodes, so that their cost does not grow with the spectrum.

``log(1 + c s)`` and ``c s / (1 + c s)`` are analytic in ``log s`` in the strip ``|Im log s| < π`` for every ``c > 0``:
local interpolation of order 12 between points that are 0.1 apart in ``log s`` reproduces them to rounding error. What
the interpolation gives every point, added over the eigenvalues, is a weight, and those weights do not depend on ``c``.
The eigenvalues of a Kronecker product are sums in ``log s``, so its weights are the convolution of the factors' ones:
``O(I + O)`` work instead of ``O(I · O)``, done once for all ``(N, λ)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["nodes_of_products"]

SPACING = 0.1
ORDER = 12
DIRECT = 4096
CHUNK = 2**14  # entries at once: what is kept of them (2 · ORDER numbers each) stays in the cache


def nodes_of_products(*factors: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes ``t (M,)`` and weights ``w (M,)`` with ``Σ_i f(s_i) = Σ_j w_j f(t_j)``, on the CPU in float64.

    ``s`` runs over the products of one entry of every factor, group by group. ``f`` has to vanish at 0 (zero entries
    are left out) and to be smooth in ``log s`` as in the module's text; then the error is of the order of rounding.

    Args:
        factors: one or two tensors ``(R, d)`` of entries ≥ 0.
    """
    given = [factor.detach().double().cpu() for factor in factors]
    if math.prod(factor.shape[1] for factor in given) * given[0].shape[0] <= DIRECT:
        values = given[0] if len(given) == 1 else given[0][:, :, None] * given[1][:, None, :]
        values = values[values > 0]
        return values, torch.ones_like(values)
    starts, weights = zip(*(_weights(factor) for factor in given), strict=True)
    total = weights[0].sum(0)
    if len(weights) == 2:
        length = weights[0].shape[1] + weights[1].shape[1] - 1
        spectra = [torch.fft.rfft(each, length) for each in weights]
        total = torch.fft.irfft((spectra[0] * spectra[1]).sum(0), length)
    nodes = (SPACING * (sum(starts) + torch.arange(len(total), dtype=torch.float64))).exp()
    return nodes, total


def _weights(values: Tensor) -> tuple[int, Tensor]:
    """Number of the first point and weights ``(R, M)`` of the points ``SPACING · k`` for entries ``(R, d)``."""
    positive = values > 0
    if not bool(positive.any()):
        return 0, values.new_zeros(values.shape[0], 1)
    extremes = values[positive].aminmax()
    first = math.floor(math.log(float(extremes.min)) / SPACING) - ORDER // 2 + 1
    last = math.floor(math.log(float(extremes.max)) / SPACING) + ORDER // 2
    weights = values.new_zeros(values.shape[0], last - first + 1)
    for part in values.split(CHUNK, 1):
        kept = part > 0
        place = part.where(kept, extremes.max).log() / SPACING
        base = place.floor() - (ORDER // 2 - 1)
        for k, share in enumerate(_lagrange(place - base)):
            index = (base.long() - first + k).clamp_(0, last - first)
            weights.scatter_add_(1, index, share.where(kept, 0.0))
    return first, weights


def _lagrange(x: Tensor) -> list[Tensor]:
    """The ``ORDER`` Lagrange polynomials of the points 0, 1, ... at ``x``."""
    before = [torch.ones_like(x)]
    after = [torch.ones_like(x)]
    for k in range(ORDER - 1):
        before.append(before[-1] * (x - k))
        after.append(after[-1] * (x - (ORDER - 1 - k)))
    scale = [(-1) ** (ORDER - 1 - k) * math.factorial(k) * math.factorial(ORDER - 1 - k) for k in range(ORDER)]
    return [before[k] * after[ORDER - 1 - k] / scale[k] for k in range(ORDER)]
