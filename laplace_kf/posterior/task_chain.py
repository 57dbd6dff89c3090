"""Yesterday's posterior as today's prior: what is kept of it, and how a new task's curvature is added (methods 11).

The curvature of a chain is one :class:`Blockwise` like any other, so that products, solves, draws, predictions and the
search over (N, λ) need to know nothing of tasks; the isotropic prior λ is kept apart from it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, singledispatch
from typing import Any

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidType
from laplace_kf.likelihoods import Likelihood
from laplace_kf.operators import (
    Basis,
    Blockwise,
    CurvatureBlock,
    DenseBlock,
    DiagonalBlock,
    KeptTerms,
    KroneckerBlock,
    LowRankBlock,
    Matrix,
    SpectralBlock,
    WideBlock,
    WideFactor,
    factor_sum,
    in_common_bases,
    merged_to,
    nearest_in_divergence,
    nearest_product,
    overlap,
    relative_error,
)
from laplace_kf.operators.base import DENSE_WARNING
from laplace_kf.operators.blockwise import prior_of
from laplace_kf.posterior.evidence import Evidence, EvidenceModel, squares_by_block
from laplace_kf.registry import Registry
from laplace_kf.tape import Block, FlatLayout

__all__ = ["TERMS", "ChainedEvidence", "TaskChain", "TermsRule", "in_one_form", "require_terms"]

Joined = tuple[CurvatureBlock, float]  # and its relative Frobenius error against the exact sum


class TermsRule(ABC):
    """How the curvature of another task is added to a block.

    Attributes:
        grows: whether several terms are held, so that there may be too many of them.
    """

    grows = False

    def joined(self, previous: CurvatureBlock, newest: CurvatureBlock, most: int | None = None) -> Joined:
        """The block of both together, of ``most`` terms if that is given, and its relative error.

        Exact for diagonal and dense blocks.
        """
        terms: list[CurvatureBlock] = []
        for term in map(_known, (*previous.terms, *newest.terms)):
            if terms and _is_zero(term):
                continue
            if len(terms) == 1 and _is_zero(terms[0]):
                terms = []
            for k, have in enumerate(terms):
                both = have.absorbed(term)
                if both is not None:
                    terms[k] = both
                    break
            else:
                terms.append(term)
        return self.of_terms(terms, newest, most)

    @abstractmethod
    def of_terms(self, terms: Sequence[CurvatureBlock], newest: CurvatureBlock, most: int | None) -> Joined:
        """One block from terms that have no sum of their kind (or from one that has grown)."""


def _is_zero(term: CurvatureBlock) -> bool:
    """Whether a term is that of parameters that took no part."""
    return isinstance(term, DiagonalBlock) and not bool(term.values.any())


def in_one_form(curvatures: Sequence[Blockwise]) -> list[Blockwise]:
    """The same curvatures; parameters that only some of them have used stand as zeros in the blocks of those."""
    used: dict[str, list[Block]] = {}
    for one in curvatures:
        for block, _ in one.entries:
            for name in () if block.unused else block.parameters:
                known = used.setdefault(name, [])
                known += [block] if block not in known else []
    found: list[Blockwise] = []
    for one in curvatures:
        kept = [(block, matrix) for block, matrix in one.entries if not (block.unused and block.name in used)]
        have = {block.name for block, _ in kept}
        missing = {b.name: b for block, _ in one.entries if block.unused for b in used.get(block.name, ())}
        like = one.entries[0][1].diag()
        for name, block in missing.items():
            if name not in have:
                zeros = torch.zeros(block.shape, dtype=like.dtype, device=like.device)
                kept.append((block, DiagonalBlock(zeros, name)))
        order = {b.name: k for k, (b, _) in enumerate(found[0].entries)} if found else {}
        kept.sort(key=lambda entry: order.get(entry[0].name, len(order)))
        found.append(Blockwise(one.layout, kept))
    return found


TERMS: Registry[TermsRule] = Registry("way to chain curvature terms")


class _Keep(TermsRule):
    """All terms are kept: exact, and memory and the cost of a product grow with the number of tasks.

    With a bound the two that lose least become one, as often as needed; low-rank blocks hold the vectors of so many.
    """

    grows = True

    def of_terms(self, terms: Sequence[CurvatureBlock], newest: CurvatureBlock, most: int | None) -> Joined:
        error = 0.0
        if most is not None:
            if len(terms) == 1 and isinstance(terms[0], LowRankBlock) and isinstance(newest, LowRankBlock):
                return terms[0].truncated(most * len(newest.values))
            terms, error = merged_to(terms, most, newest.label)
        return (terms[0] if len(terms) == 1 else KeptTerms(terms, newest.label)), error


class _Collapse(TermsRule):
    """Kronecker terms become one Kronecker product by ``rule``; the memory stays constant."""

    def __init__(self, rule: Callable[[Sequence[KroneckerBlock]], KroneckerBlock], spectral: bool) -> None:
        self.rule, self.spectral = rule, spectral

    def of_terms(self, terms: Sequence[CurvatureBlock], newest: CurvatureBlock, most: int | None) -> Joined:
        return _collapsed(terms[0], terms, newest, self)


BOUNDED = ", at most "  # in files, between the name of a rule and the number of its terms
TERMS.register("keep")(_Keep())
TERMS.register("sum")(_Collapse(factor_sum, spectral=False))
TERMS.register("project")(_Collapse(nearest_product, spectral=True))
TERMS.register("project_kl")(_Collapse(nearest_in_divergence, spectral=False))


def require_terms(terms: str, max_terms: int | None) -> None:
    """Refuses what no chain can be made by.

    Args:
        terms: name of the rule.
        max_terms: bound on the terms of a block, None for none.

    Raises:
        UnknownName: for another rule.
        InvalidType: for a bound that is no integer; InvalidArgument: for one below 1.
        IncompatiblePair: for a bound where one term is held anyway.
    """
    rule = TERMS[terms]
    if max_terms is None:
        return
    if isinstance(max_terms, bool) or not isinstance(max_terms, int):
        raise InvalidType(
            f"max_terms must be an integer, the most terms that a block keeps, or None; got {max_terms!r}"
        )
    if max_terms < 1:
        raise InvalidArgument(f"max_terms must be at least 1, got {max_terms}")
    if not rule.grows:
        growing = ", ".join(f"terms={name!r}" for name in TERMS if TERMS[name].grows)
        raise IncompatiblePair(
            f"terms={terms!r} holds a single term of every block, so max_terms={max_terms} has no effect; leave it "
            f"out, or bound {growing}"
        )


@singledispatch
def _collapsed(first: Any, terms: Sequence[Any], newest: Any, how: _Collapse) -> Joined:
    """One block of constant size, by the kind of the terms; one exact sum is that already."""
    if len(terms) == 1:
        return terms[0], 0.0
    raise IncompatiblePair(
        f"block {newest.label!r} is kept as {newest.kind!r}, for which there is no single product; chain it with "
        'terms="keep"'
    )


@_collapsed.register
def _(first: KroneckerBlock, terms: Sequence[Any], newest: Any, how: _Collapse) -> Joined:
    pairs = [term for term in terms if isinstance(term, KroneckerBlock)]
    if len(terms) == 1:
        return first, 0.0
    if len(pairs) < len(terms):
        raise IncompatiblePair(
            f"block {newest.label!r} mixes Kronecker products and others; chain it with terms='keep'"
        )
    found = how.rule(pairs)
    return found, relative_error(pairs, found)


@_collapsed.register
def _(first: SpectralBlock, terms: Sequence[Any], newest: Any, how: _Collapse) -> Joined:
    if len(terms) == 1:
        return first, 0.0
    if not how.spectral:
        raise IncompatiblePair(
            f"block {newest.label!r} is known in an eigenbasis and has no Kronecker factors; chain it with "
            'terms="project" (its diagonal in the eigenbases of both tasks together) or terms="keep"'
        )
    found = in_common_bases(terms, newest.label)
    norm = sum(overlap(one, other) for one in terms for other in terms)
    left = max(norm - float(found.grid.double().square().sum()), 0.0)  # an orthogonal projection
    return found, (left / norm) ** 0.5 if norm > 0 else 0.0


@_collapsed.register
def _(first: LowRankBlock, terms: Sequence[Any], newest: LowRankBlock, how: _Collapse) -> Joined:
    return first.truncated(len(newest.values))


@dataclass(frozen=True)
class TaskChain:
    """What a posterior leaves to the next one.

    Attributes:
        terms: registered name of the rule.
        multiplier: λ_c, on the curvature of the new task (methods 11.1).
        curvature: ``Λ_prev − λ I``: sums over the data of all earlier tasks, not means.
        centre: the previous mean ``(P,)``.
        n_data: N behind the curvature.
        errors: the relative error by block of every update so far.
        max_terms: of a rule that keeps terms, at most how many of a block; None for all.
    """

    terms: str
    multiplier: float
    curvature: Blockwise
    centre: Tensor
    n_data: float
    errors: tuple[dict[str, float], ...]
    max_terms: int | None = None

    def __post_init__(self) -> None:
        require_terms(self.terms, self.max_terms)

    def extended(self, newest: Blockwise, n: float) -> tuple[Blockwise, float, tuple[dict[str, float], ...]]:
        """With a task of mean curvature ``newest`` over ``n`` examples: mean curvature, its N, and all errors.

        Raises:
            IncompatiblePair: if the task covers other parameters, or its blocks have another form.
        """
        mine, theirs = (
            {block.name: (block, matrix) for block, matrix in one.entries}
            for one in in_one_form([self.curvature, newest])
        )
        differing = [n for n in {**mine, **theirs} if n not in mine or n not in theirs or mine[n][0] != theirs[n][0]]
        layout = self.curvature.layout.common(newest.layout)
        if layout is None or differing:
            raise IncompatiblePair(
                f"the prior and the new task do not cover the same parameters in the same form (prior: "
                f"{self.curvature.size} in {len(mine)} blocks, task: {newest.size} in {len(theirs)}; differing: "
                f"{', '.join(differing) or 'order'}); leave new heads out with parameters=[patterns]"
            )
        weight = n * self.multiplier
        total = self.n_data + weight
        entries: list[tuple[Block, Matrix]] = []
        errors: dict[str, float] = {}
        for name, (block, previous) in mine.items():
            old, new = previous, theirs[name][1].scaled(weight)
            assert isinstance(old, CurvatureBlock) and isinstance(new, CurvatureBlock)
            both, errors[name] = TERMS[self.terms].joined(old, new, self.max_terms)
            entries.append((block, both.scaled(1 / total)))
        return Blockwise(layout, entries), total, (*self.errors, errors)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (any shapes, by name; a few for every term of a block) and JSON-able values."""
        tensors, kinds = {"chain/centre": self.centre}, {}
        for block, matrix in self.curvature.entries:
            assert isinstance(matrix, CurvatureBlock)
            terms = [_known(term) for term in matrix.terms]
            kinds[block.name] = [_form_of(term) for term in terms]
            for k, term in enumerate(terms):
                for j, part in enumerate(STORED[kinds[block.name][k]].parts(term)):
                    tensors[f"chain/{block.name}/{k}/{j}"] = part
        described = {
            # a release that knows no bound has to refuse the file: it would keep all terms
            "terms": self.terms if self.max_terms is None else f"{self.terms}{BOUNDED}{self.max_terms}",
            "multiplier": self.multiplier,
            "n_data": self.n_data,
            "errors": list(self.errors),
            "blocks": [block.to_json() for block, _ in self.curvature.entries],
            "kinds": kinds,
        }
        return tensors, described

    @classmethod
    def unpacked(
        cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any], layout: FlatLayout, device: torch.device
    ) -> TaskChain:
        """The inverse of :meth:`packed`, with the tensors (any shapes) on ``device``."""
        entries: list[tuple[Block, Matrix]] = []
        for data in described["blocks"]:
            block = Block.from_json(data)
            terms = []
            for k, kind in enumerate(described["kinds"][block.name]):
                form = STORED[kind]
                parts = [tensors[f"chain/{block.name}/{k}/{j}"].to(device) for j in range(form.count)]
                terms.append(form.build(parts, block.name))
            entries.append((block, terms[0] if len(terms) == 1 else KeptTerms(terms, block.name)))
        terms, bounded, most = described["terms"].partition(BOUNDED)
        return cls(
            terms,
            float(described["multiplier"]),
            Blockwise(layout, entries),
            tensors["chain/centre"].to(device),
            float(described["n_data"]),
            tuple(dict(step) for step in described["errors"]),
            int(most) if bounded else None,
        )


@dataclass(frozen=True)
class ChainedEvidence(EvidenceModel):
    """``log p(D_t | D_1 … D_{t−1})``: of the newest task, with the previous posterior as its prior.

    ``log|Λ_prev|`` takes the place of ``log|Λ₀|`` and ``(μ_t − μ_{t−1})ᵀ Λ_prev (μ_t − μ_{t−1})`` that of the scatter.
    N scales the curvature of all tasks and the fit alike.

    Args:
        statistics, curvature, squares, noise, damping: as of :class:`EvidenceModel`; the count is that of all tasks,
            the squares those of ``μ_t − μ_{t−1}``.
        previous: ``Λ_prev − λ I``.
        energy: ``(μ_t − μ_{t−1})ᵀ (Λ_prev − λ I) (μ_t − μ_{t−1})``, 0-dim in float64.
    """

    previous: Blockwise
    energy: Tensor

    @classmethod
    def of(cls, made: EvidenceModel, chain: TaskChain, reference: float, mean: Tensor) -> ChainedEvidence:
        """From the model without a chain, and the newest mean ``(P,)``; ``reference`` is the N of all tasks."""
        shift = mean - chain.centre.to(mean)
        squares = squares_by_block(made.curvature, shift)
        like = next(iter(made.statistics.sums.values()))[0]
        energy = chain.curvature.energy(shift.to(like)).double().cpu()
        counted = replace(made.statistics, count=reference)
        return cls(counted, made.curvature, squares, made.noise, made.damping, chain.curvature, energy)

    def terms(self, n: float, prior: Tensor | dict[str, Tensor], likelihood: Likelihood) -> Evidence:
        found = super().terms(n, prior, likelihood)
        shared = self._rescaled(likelihood)[0] * (n / self.statistics.count) * self.energy
        return Evidence(found.fit, found.log_det_ratio - shared, found.scatter + shared)

    @cached_property
    def _joint(self) -> None:
        """The previous posterior's part is no sum over nodes."""
        return None

    def _ratios(self, n: float, factor: float | Tensor, prior: Tensor | dict[str, Tensor]) -> list[Tensor]:
        """With the part of the scatter that moves with the noise, so that its maximiser sees it."""
        scale = n / self.statistics.count
        found = super()._ratios(n, factor, prior)
        number = {block.name: k for k, (block, _) in enumerate(self.curvature.entries)}
        for block, matrix in self.previous.entries:
            assert isinstance(matrix, CurvatureBlock)
            if block.unused and block.name not in number:
                continue  # no curvature
            k = number[block.name]
            found[k] = found[k] - matrix.log_det_ratio(scale, factor, prior_of(block, prior), self.damping)
        return [found[0] + factor * scale * self.energy, *found[1:]]


@dataclass(frozen=True)
class _Stored:
    """How one kind of block is written as tensors and made from them again."""

    kind: type[CurvatureBlock]
    count: int
    parts: Callable[[Any], Sequence[Tensor]]
    build: Callable[[Sequence[Tensor], str], CurvatureBlock]


STORED: Registry[_Stored] = Registry("stored block")


def _known(term: CurvatureBlock) -> CurvatureBlock:
    """The block, or its dense matrix where its kind can be neither added to its like nor written down."""
    if any(type(term) is form.kind for form in STORED.values()):
        return term
    if term.size > DENSE_WARNING:
        warnings.warn(
            f"block {term.label!r} is a {type(term).__name__}, a kind that chains do not know: it is kept as a dense "
            f"matrix over {term.size} parameters. Register it in laplace_kf.posterior.task_chain.STORED to keep its "
            "form",
            RuntimeWarning,
            stacklevel=users_line(),
        )
    return DenseBlock(term.dense(), term.label)


def _form_of(term: CurvatureBlock) -> str:
    return next(name for name, form in STORED.items() if type(term) is form.kind)


def _basis_part(basis: Basis, like: Tensor) -> Tensor:
    return like.new_zeros(0) if basis.matrix is None else basis.matrix


def _basis_of(part: Tensor) -> Basis:
    return Basis.orthogonal(part) if part.numel() else Basis.identity()


STORED.register("diagonal")(_Stored(DiagonalBlock, 1, lambda b: (b.values,), lambda p, n: DiagonalBlock(p[0], n)))
STORED.register("dense")(_Stored(DenseBlock, 1, lambda b: (b.matrix,), lambda p, n: DenseBlock(p[0], n)))
STORED.register("kronecker")(
    _Stored(
        KroneckerBlock,
        3,
        lambda b: (b.inputs, b.outputs, torch.as_tensor(b.scale, dtype=torch.float64).detach()),
        lambda p, n: KroneckerBlock(p[0], p[1], n, float(p[2])),
    )
)
STORED.register("eigenbasis")(
    _Stored(
        SpectralBlock,
        3,
        lambda b: (_basis_part(b.inputs, b.grid), _basis_part(b.outputs, b.grid), b.grid),
        lambda p, n: SpectralBlock(_basis_of(p[0]), _basis_of(p[1]), p[2], n),
    )
)
STORED.register("lowrank")(
    _Stored(
        LowRankBlock,
        3,
        lambda b: (b.vectors, b.values, b.remainder),
        lambda p, n: LowRankBlock(p[0], p[1], p[2], n),
    )
)
STORED.register("wide")(
    _Stored(
        WideBlock,
        5,
        lambda b: (
            b.inputs,
            b.outputs.vectors,
            b.outputs.values,
            b.outputs.remainder,
            torch.tensor([float(b.scale), b.outputs.error, b.outputs.of_diagonal], dtype=torch.float64),
        ),
        lambda p, n: WideBlock(p[0], WideFactor(p[1], p[2], p[3], *p[4][1:].tolist()), n, float(p[4][0])),
    )
)
