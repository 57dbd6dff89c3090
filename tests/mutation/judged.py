# ruff: noqa: E501 (keys are as long as they are)
"""Survivors of ``python -m tests.mutation`` that were looked at: by the mutant's key, what they are.

The first word counts: ``equivalent`` and ``killed`` are explained, all else is open.
"""

JUDGED: dict[str, str] = {
    "laplace_kf/layers/base.py as_tuple `return values * length if len(values) == 1 and length > 1 else values`: `length > 1` -> `(length >= 1)`": "equivalent: one value times a length of one is itself",
    'laplace_kf/layers/embedding.py EmbeddingRule.inputs `return torch.where(tokens == padding % call["weight"].shape[0], -1, tokens)`: `0` -> `(1)`': "killed by tests/test_details.py (the row of padding beyond the width) since",
    'laplace_kf/layers/shared.py _matmul `a, b = args if getattr(function, "__name__", "") != "__rmatmul__" else args[::-1]`: `1` -> `(2)`': "not judged: reached only by a NumPy array to the left of `@`",
    "laplace_kf/likelihoods/loss.py FromLoss._check_alone `if self._alone or len(rows) < 2:`: `self._alone or len(rows) < 2` -> `(self._alone and len(rows) < 2)`": "equivalent: the check is made again where it has passed, and of one example it always passes",
    "laplace_kf/likelihoods/mixed.py _quantiles `far = 2.0 + abs(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).item())`: `2.0` -> `(4.0)`": "equivalent: a wider bracket, from which bisection comes to the same quantile",
    "laplace_kf/likelihoods/prediction.py Prediction.channel_last `return x.movedim(1, -1) if first else x` #2: `1` -> `(2)`": "killed by tests/test_details.py (channels of predictions go last) since",
    "laplace_kf/operators/blockwise.py prior_of `for name, value, shape in zip(block.parameters, values, block.shapes, strict=True)`: `True` -> `(False)`": "equivalent: a block has as many shapes as parameters",
    "laplace_kf/operators/conjugate.py conjugate_gradients `reached = float((residual.norm(dim=0) / right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny)).max())`: `residual.norm(dim=0) / right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny)` -> `(residual.norm(dim=0) * right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny))`": "not judged: a number in the text of a warning",
    "laplace_kf/operators/kept_terms.py KeptTerms.spectrum `if self.size <= SPECTRUM_SIZE:`: `self.size <= SPECTRUM_SIZE` -> `(self.size < SPECTRUM_SIZE)`": "equivalent: which of two right ways is taken for one size",
    "laplace_kf/operators/nearest.py _alike `if all(factor.dim() == 2 for factor in wide):`: `factor.dim() == 2` -> `(factor.dim() != 2)`": "equivalent: the same matrices, written out where their diagonals would do",
    "laplace_kf/operators/spectral.py Spectral._canonical `columns = v[:, None] if v.dim() == 1 else v`: `v.dim() == 1` -> `(v.dim() != 1)`": "equivalent: another axis of length one, in the same order of memory",
    "laplace_kf/optim/reviewed.py Range.has `return above and (value < self.most or (self.most_too and value == self.most))`: `value < self.most` -> `(value <= self.most)`": "killed by tests/test_details.py (ends of ranges) since",
    "laplace_kf/structures/auto.py Automatic.settled `if needed <= budget or name is PREFERENCE[-1]:`: `-1` -> `(1)`": "killed by tests/test_details.py (the last preference is taken) since",
    "laplace_kf/structures/ekfac.py EigenvalueCorrected.memory `return self.kron.memory(blocks, layout, itemsize) + grids * itemsize`: `self.kron.memory(blocks, layout, itemsize) + grids * itemsize` -> `(self.kron.memory(blocks, layout, itemsize) - grids * itemsize)`": "killed by tests/test_details.py (corrected eigenvalues need memory) since",
    "laplace_kf/structures/ekfac.py EigenvalueCorrected.refinement `sum(float(part.shape[-1]) ** 3 * part.shape[0] for part in parts if part.dim() == 3),`: `-1` -> `(1)`": "equivalent: the matrices are square",
    "laplace_kf/structures/ekfac.py _settled `empty = (along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale).all(0)  # (R, d)`: `along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale` -> `(along < 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale)`": "equivalent: the right side is positive, and the left one is 0 or far from it",
    "laplace_kf/structures/lowrank.py LowRankPlusDiagonal.__init__ `if rank < 1 or iterations < 1 or oversample < 0:`: `0` -> `(1)`": "killed by tests/test_details.py (no oversampling is allowed) since",
    "laplace_kf/tape/signals.py Signals.chunks `step = max(1, WORKING_BYTES // max(1, per_example))` #2: `1` -> `(2)`": "equivalent: a gradient has two bytes at least",
}
