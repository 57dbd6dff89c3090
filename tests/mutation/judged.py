# ruff: noqa: E501 (keys are as long as they are)
"""Survivors of ``python -m tests.mutation`` that were looked at: by the mutant's key, what they are.

The first word counts: ``equivalent`` and ``killed`` are explained, all else is open.
"""

JUDGED: dict[str, str] = {
    "laplace_kf/estimators/auto.py Automatic.measure `if wanted > self.most * examples:`: `wanted > self.most * examples` -> `(wanted >= self.most * examples)`": "equivalent: a budget that is met exactly gives the probabilities that were there",
    "laplace_kf/layers/base.py as_tuple `return values * length if len(values) == 1 and length > 1 else values`: `length > 1` -> `(length >= 1)`": "equivalent: one value times a length of one is itself",
    "laplace_kf/layers/conv.py ConvRule.outputs `flat = rows.flatten(-dims).transpose(-1, -2)  # (..., B, T, channels)`: `-2` -> `(2)`": "equivalent: rows come as columns by examples by channels by places, so that axis 2 is the last but one",
    "laplace_kf/layers/elementwise.py _repeated_example `return WithParameter(lambda x, w: torch.cat([w.expand(len(x), 1, 3), x], 1), 1, 3), torch.randn(5, 2, 3)`: `5` -> `(6)`": "equivalent: how many rows a rule is tried on",
    'laplace_kf/layers/embedding.py EmbeddingRule.inputs `return torch.where(tokens == padding % call["weight"].shape[0], -1, tokens)`: `0` -> `(1)`': "killed by tests/test_details.py (the row of padding beyond the width) since",
    "laplace_kf/likelihoods/categorical.py Categorical._labels `y = y.unsqueeze(-1).flatten(1)`: `-1` -> `(1)`": "equivalent: the axis of length one is flattened at once",
    "laplace_kf/likelihoods/loss.py FromLoss._check_alone `if self._alone or len(rows) < 2:`: `self._alone or len(rows) < 2` -> `(self._alone and len(rows) < 2)`": "equivalent: the check is made again where it has passed, and of one example it always passes",
    "laplace_kf/likelihoods/mixed.py _quantiles `far = 2.0 + abs(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).item())`: `2.0` -> `(4.0)`": "equivalent: a wider bracket, from which bisection comes to the same quantile",
    "laplace_kf/operators/blockwise.py prior_of `for name, value, shape in zip(block.parameters, values, block.shapes, strict=True)`: `True` -> `(False)`": "equivalent: a block has as many shapes as parameters",
    "laplace_kf/operators/kept_terms.py KeptTerms.spectrum `if self.size <= SPECTRUM_SIZE:`: `self.size <= SPECTRUM_SIZE` -> `(self.size < SPECTRUM_SIZE)`": "equivalent: which of two right ways is taken for one size",
    "laplace_kf/operators/nearest.py _alike `if all(factor.dim() == 2 for factor in wide):`: `factor.dim() == 2` -> `(factor.dim() != 2)`": "equivalent: the same matrices, written out where their diagonals would do",
    "laplace_kf/operators/quadrature.py _weights `weights = values.new_zeros(values.shape[0], last - first + 1)`: `1` -> `(2)`": "equivalent: a point more, of weight 0",
    "laplace_kf/operators/spectral.py Spectral._canonical `columns = v[:, None] if v.dim() == 1 else v`: `v.dim() == 1` -> `(v.dim() != 1)`": "equivalent: another axis of length one, in the same order of memory",
    'laplace_kf/optim/cg.py _dot `pieces = zip(u.split(PIECE), v.split(PIECE), strict=True) if u.device.type == "cpu" else [(u, v)]`: `u.device.type == "cpu"` -> `(u.device.type != \'cpu\')`': "equivalent: the same products, added up in other pieces",
    "laplace_kf/optim/reviewed.py MatrixMomentum.step `for (group, p, grad), step, bent in zip(moving, steps, curved, strict=True):`: `True` -> `(False)`": "equivalent: three lists of the same length",
    "laplace_kf/structures/base.py pairs `return list(zip(parts[::2], parts[1::2], strict=True))`: `True` -> `(False)`": "equivalent: files of that version hold two for every use",
    "laplace_kf/structures/ekfac.py EigenvalueCorrected.refinement `sum(float(part.shape[-1]) ** 3 * part.shape[0] for part in parts if part.dim() == 3),`: `-1` -> `(1)`": "equivalent: the matrices are square",
    "laplace_kf/structures/ekfac.py _settled `empty = (along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale).all(0)  # (R, d)`: `along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale` -> `(along < 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale)`": "equivalent: the right side is positive, and the left one is 0 or far from it",
    "laplace_kf/structures/full.py DenseEntries.prepare `place = torch.full((layout.size,), -1)`: `1` -> `(2)`": "equivalent: any negative number says that a weight is not among them",
    "laplace_kf/structures/isotropic.py IsotropicCurvature.takes_output_signals `return True`: `True` -> `(False)`": "equivalent: the same sums, column by column",
    "laplace_kf/structures/lowrank.py nystrom `keep = values > 10 * len(values) * torch.finfo(y.dtype).eps * largest`: `values > 10 * len(values) * torch.finfo(y.dtype).eps * largest` -> `(values >= 10 * len(values) * torch.finfo(y.dtype).eps * largest)`": "equivalent: no eigenvalue is exactly at the edge of rounding",
    "laplace_kf/tape/reach.py _scattered `if into is not None:`: `into is not None` -> `(into is None)`": "killed by tests/padding/test_padding.py (places that lost to what was scattered into them) since",
    "laplace_kf/tape/rows.py Rows._still `half = torch.rand(count, generator=torch.Generator().manual_seed(self._checks)).to(outputs.device) < 0.5`: `torch.rand(count, generator=torch.Generator().manual_seed(self._checks)).to(outputs.device) < 0.5` -> `(torch.rand(count, generator=torch.Generator().manual_seed(self._checks)).to(outputs.device) <= 0.5)`": "equivalent: a draw of exactly 0.5 falls on either side",
    "laplace_kf/tape/signals.py Signals.chunks `step = max(1, WORKING_BYTES // max(1, per_example))` #2: `1` -> `(2)`": "equivalent: a gradient has two bytes at least",
    "laplace_kf/tape/tracer.py Tracer.observe `asked = self.verify and (not self.blocks or bool(self.known.unchecked()))`: `self.verify and (not self.blocks or bool(self.known.unchecked()))` -> `(self.verify or (not self.blocks or bool(self.known.unchecked())))`": "equivalent: more of a pass is followed than anything asks for",
}
