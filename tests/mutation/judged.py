# ruff: noqa: E501 (keys are as long as they are)
"""Survivors of ``python -m tests.mutation`` that were looked at: by the mutant's key, what they are.

The first word counts: ``equivalent`` and ``killed`` are explained, all else is open.
"""

JUDGED: dict[str, str] = {
    "laplace_kf/estimators/importance.py:103:74 `1` -> `(2)`": "equivalent: how many columns go back at once changes memory, no number",
    "laplace_kf/estimators/importance.py:33:41 `True` -> `(False)`": "killed by tests/test_details.py (inclusions add up to the budget) since",
    "laplace_kf/estimators/importance.py:38:12 `scale * ordered <= 1` -> `(scale * ordered < 1)`": "equivalent: where a scaled weight is exactly 1, being certain or having the probability 1 is the same",
    "laplace_kf/estimators/importance.py:38:37 `budget - certain > 0` -> `(budget - certain >= 0)`": "equivalent: the entry before always fits first, as no weight is more than the sum of itself and what is smaller",
    "laplace_kf/estimators/importance.py:38:37 `budget - certain` -> `(budget + certain)`": "equivalent: the entry before always fits first, as no weight is more than the sum of itself and what is smaller",
    "laplace_kf/layers/base.py:200:51 `length > 1` -> `(length >= 1)`": "equivalent: one value times a length of one is itself",
    "laplace_kf/layers/embedding.py:36:68 `0` -> `(1)`": "killed by tests/test_details.py (the row of padding beyond the width) since",
    "laplace_kf/layers/shared.py:233:83 `1` -> `(2)`": "not judged: reached only by a NumPy array to the left of `@`",
    "laplace_kf/likelihoods/loss.py:183:11 `self._alone or len(rows) < 2` -> `(self._alone and len(rows) < 2)`": "equivalent: the check is made again where it has passed, and of one example it always passes",
    "laplace_kf/likelihoods/mixed.py:276:10 `2.0` -> `(4.0)`": "equivalent: a wider bracket, from which bisection comes to the same quantile",
    "laplace_kf/likelihoods/prediction.py:89:29 `1` -> `(2)`": "killed by tests/test_details.py (channels of predictions go last) since",
    "laplace_kf/operators/blockwise.py:149:85 `True` -> `(False)`": "equivalent: a block has as many shapes as parameters",
    "laplace_kf/operators/conjugate.py:55:21 `residual.norm(dim=0) / right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny)` -> `(residual.norm(dim=0) * right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny))`": "not judged: a number in the text of a warning",
    "laplace_kf/operators/kept_terms.py:66:11 `self.size <= SPECTRUM_SIZE` -> `(self.size < SPECTRUM_SIZE)`": "equivalent: which of two right ways is taken for one size",
    "laplace_kf/operators/nearest.py:26:11 `factor.dim() == 2` -> `(factor.dim() != 2)`": "equivalent: the same matrices, written out where their diagonals would do",
    "laplace_kf/operators/spectral.py:143:32 `v.dim() == 1` -> `(v.dim() != 1)`": "equivalent: another axis of length one, in the same order of memory",
    "laplace_kf/optim/reviewed.py:45:26 `value < self.most` -> `(value <= self.most)`": "killed by tests/test_details.py (ends of ranges) since",
    "laplace_kf/structures/auto.py:61:54 `-1` -> `(1)`": "killed by tests/test_details.py (the last preference is taken) since",
    "laplace_kf/structures/ekfac.py:239:13 `along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale` -> `(along < 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale)`": "equivalent: the right side is positive, and the left one is 0 or far from it",
    "laplace_kf/structures/ekfac.py:53:15 `self.kron.memory(blocks, layout, itemsize) + grids * itemsize` -> `(self.kron.memory(blocks, layout, itemsize) - grids * itemsize)`": "killed by tests/test_details.py (corrected eigenvalues need memory) since",
    "laplace_kf/structures/ekfac.py:80:37 `-1` -> `(1)`": "equivalent: the matrices are square",
    "laplace_kf/structures/lowrank.py:44:54 `0` -> `(1)`": "killed by tests/test_details.py (no oversampling is allowed) since",
    "laplace_kf/tape/signals.py:99:43 `1` -> `(2)`": "equivalent: a gradient has two bytes at least",
}
