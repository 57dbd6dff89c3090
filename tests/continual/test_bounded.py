"""Chains of at most r kept terms: which two become one, what is lost by it, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import continual
from laplace_kf.operators import (
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    in_common_bases,
    merged_to,
    nearest_product,
)
from laplace_kf.operators.nearest import pair_errors
from tests.cases import normal
from tests.checks import close
from tests.continual.problems import LAM, N, dense_diag, moved, network, task

Nearest = Callable[[Tensor, tuple[int, ...]], Tensor]


def van_loan(dense: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The nearest Kronecker product, by the singular value decomposition of the rearranged dense matrix."""
    _, out, inp = shape
    rearranged = dense.reshape(out, inp, out, inp).permute(0, 2, 1, 3).reshape(out**2, inp**2)
    left, values, right = torch.linalg.svd(rearranged)
    return torch.kron(left[:, 0].reshape(out, out), right[0].reshape(inp, inp)) * values[0]


def in_marginal_bases(dense: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The diagonal in the eigenbases of the two partial traces."""
    _, out, inp = shape
    parts = dense.reshape(out, inp, out, inp)
    left = torch.linalg.eigh(parts.diagonal(dim1=1, dim2=3).sum(-1))[1]
    right = torch.linalg.eigh(parts.diagonal(dim1=0, dim2=2).sum(-1))[1]
    both = torch.kron(left, right)
    return both @ torch.diag((both.T @ dense @ both).diagonal()) @ both.T


def bounded(terms: list[Tensor], most: int, shape: tuple[int, ...], nearest: Nearest) -> list[Tensor]:
    """The plain loop over all pairs of dense terms."""
    terms = list(terms)
    while len(terms) > most:
        found = []
        for i, j in itertools.combinations(range(len(terms)), 2):
            both = nearest(terms[i] + terms[j], shape)
            found.append((float((terms[i] + terms[j] - both).norm()), i, j, both))
        _, i, j, both = min(found, key=lambda each: each[0])
        terms[i] = both
        del terms[j]
    return terms


def alone(model: nn.Module, k: int, structure: str, **options: Any) -> lk.LaplacePosterior:
    return lk.LaplacePosterior(model, "categorical", structure, prior_precision=LAM, **options).fit(task(k))


def chained(
    count: int, structure: str = "kron", most: int | None = 2, **options: Any
) -> tuple[lk.LaplacePosterior, list[list[Tensor]]]:
    """After ``count`` tasks with multiplier 2; and the dense terms of all tasks, by block."""
    model, posterior, terms = network(), None, []
    for k in range(count):
        moved(model, k)
        own = alone(model, k, structure, **options)
        scale = N if posterior is None else 2.0 * N
        terms.append([scale * matrix.dense() for _, matrix in own.curvature.entries])
        posterior = own if posterior is None else posterior.update(task(k), 2.0, max_terms=most)
    assert posterior is not None
    return posterior, [list(each) for each in zip(*terms, strict=True)]


def numbers(posterior: lk.LaplacePosterior) -> int:
    return sum(tensor.numel() for tensor in posterior.packed()[0].values())


# ------------------------------------------------------------------------------------------------ against plain loops


@pytest.mark.parametrize(("structure", "nearest"), [("kron", van_loan), ("ekfac", in_marginal_bases)])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_pair_that_loses_least_becomes_one(structure: str, nearest: Nearest, most: int) -> None:
    posterior, terms = chained(5, structure, most)
    assert any(max(step.values()) > 1e-3 for step in posterior.chain_errors)
    for (block, matrix), each in zip(posterior.curvature.entries, terms, strict=True):
        held: list[Tensor] = []
        for step, term in enumerate(each):
            exact = [*held, term]
            held = bounded(exact, most, block.shape, nearest)
            if step:
                whole = torch.stack(exact).sum(0)
                error = float((torch.stack(held).sum(0) - whole).norm() / whole.norm())
                assert abs(posterior.chain_errors[step - 1][block.name] - error) <= 1e-7
        close(posterior.n_data * matrix.dense(), torch.stack(held).sum(0), 1e-8)
        assert len(matrix.terms) == most
        for term, wanted in zip(matrix.terms, held, strict=True):
            close(posterior.n_data * term.dense(), wanted, 1e-8)


def test_errors_of_all_pairs_group_by_group() -> None:
    def definite(size: int, seed: int) -> Tensor:
        root = normal(2, size, size, seed=seed)
        return root @ root.mT

    for inputs in (lambda k: definite(3, k), lambda k: normal(2, 5, seed=k).square()):  # matrices, and diagonals
        terms = [KroneckerBlock(inputs(k), definite(4, 9 + k), "b", 0.5 + k) for k in range(4)]
        found = pair_errors(terms)
        assert torch.equal(found, found.T) and not bool(found.diagonal().any())
        for i, j in itertools.combinations(range(4), 2):
            both = nearest_product([terms[i], terms[j]]).dense()
            close(found[i, j], (terms[i].dense() + terms[j].dense() - both).norm(), 1e-10)
    assert not bool(pair_errors([KroneckerBlock(normal(1, 1, 1) ** 2, definite(2, 0)[:1], "b")] * 3).any())


def test_a_product_of_the_same_factor_is_found_without_loss() -> None:
    """Two of three tasks are the same: they are the ones that become one, and nothing is lost."""
    model = network()
    first = alone(model, 0, "kron")
    exact = first.update(task(1)).update(task(0))
    held = first.update(task(1), max_terms=2).update(task(0), max_terms=2)
    close(held.precision.dense(), exact.precision.dense(), 1e-12)
    assert max(max(step.values()) for step in held.chain_errors) <= 1e-12
    assert [len(matrix.terms) for _, matrix in held.curvature.entries] == [2, 2]


def test_terms_of_several_kinds() -> None:
    """A pair of which one is no Kronecker product goes on in eigenbases; a dense one has no pair."""
    definite = [(root := normal(1, size, size, seed=size)) @ root.mT for size in (3, 4)]
    product = KroneckerBlock(definite[0], definite[1], "b")
    diagonal = DiagonalBlock(normal(1, 4, 3, seed=1).square(), "b")
    held, error = merged_to([product, diagonal], 1, "b")
    wanted = in_common_bases([product, diagonal], "b").dense()
    close(held[0].dense(), wanted, 1e-12)
    exact = product.dense() + diagonal.dense()
    assert abs(error - float((wanted - exact).norm() / exact.norm())) <= 1e-7 and error > 1e-3
    dense = DenseBlock(exact, "b")
    assert merged_to([product, dense], 2, "b") == ([product, dense], 0.0)
    with pytest.raises(lk.errors.IncompatiblePair, match=r"'b'.*max_terms=1; leave max_terms out"):
        merged_to([product, dense], 1, "b")


# ------------------------------------------------------------------------------------------------ what follows


@pytest.mark.parametrize("structure", ["kron", "ekfac", "lowrank"])
def test_one_term_is_the_projection_and_enough_terms_are_all_of_them(structure: str) -> None:
    options = {"rank": 3} if structure == "lowrank" else {}
    for most, terms in ((1, "project"), (9, "keep")):
        model, found, wanted = network(), None, None
        for k in range(4):
            moved(model, k)
            if found is None or wanted is None:
                found = wanted = alone(model, k, structure, **options)
            else:
                found, wanted = found.update(task(k), max_terms=most), wanted.update(task(k), terms=terms)
        assert found is not None and wanted is not None
        close(found.precision.dense(), wanted.precision.dense(), 1e-12)
        for mine, theirs in zip(found.chain_errors, wanted.chain_errors, strict=True):
            assert all(abs(mine[name] - theirs[name]) <= 1e-7 for name in theirs)
    assert all(step == dict.fromkeys(step, 0.0) for step in found.chain_errors)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "lowrank"])
def test_memory_does_not_grow_from_there_on(structure: str) -> None:
    options = {"rank": 3} if structure == "lowrank" else {}
    sizes = [numbers(chained(count, structure, 2, **options)[0]) for count in (2, 3, 4, 5)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]  # the newest task's own numbers are beside the chain's


def test_diagonals_add_exactly() -> None:
    posterior, _ = chained(4, "diag", 1)
    model, wanted = network(), LAM * torch.eye(31, dtype=torch.float64)
    for k in range(4):
        moved(model, k)
        wanted = wanted + (2 * N if k else N) * dense_diag(model, *task(k))
    close(posterior.precision.dense(), wanted)
    assert posterior.chain_errors == ({"0": 0.0, "2": 0.0},) * 3


def test_a_chain_that_kept_all_its_terms_can_be_bounded_later() -> None:
    posterior, terms = chained(4, most=None)
    moved(posterior.model, 9)
    new = alone(posterior.model, 4, "kron")
    following = posterior.update(task(4), 2.0, max_terms=2)
    for (block, matrix), each, (_, own) in zip(following.curvature.entries, terms, new.curvature.entries, strict=True):
        wanted = bounded([*each, 2.0 * N * own.dense()], 2, block.shape, van_loan)
        close(following.n_data * matrix.dense(), torch.stack(wanted).sum(0), 1e-8)


def test_penalty_solves_and_draws_are_those_of_the_dense_sum() -> None:
    posterior, _ = chained(5, most=3)
    dense, v = posterior.precision.dense(), normal(31, 2)
    close(posterior.precision.solve(v), torch.linalg.solve(dense, v), 1e-9)
    close(posterior.precision.logdet(), torch.logdet(dense))
    shift = normal(31, seed=4)
    with torch.no_grad():
        at = 0
        for parameter in posterior.model.parameters():
            parameter += shift[at : (at := at + parameter.numel())].reshape(parameter.shape)
    close(posterior.penalty(), shift @ dense @ shift / 2, 1e-9)
    white = posterior.precision.sample(8000, torch.Generator().manual_seed(0)) @ torch.linalg.cholesky(dense)
    assert float((white.T @ white / 8000 - torch.eye(31, dtype=torch.float64)).abs().max()) < 0.09


def test_forgetting_comes_before_the_bound() -> None:
    first, _ = chained(3, most=2)
    moved(first.model, 7)
    second = first.update(task(3), 2.0, forgetting=0.25, max_terms=2)
    new = alone(first.model, 3, "kron")
    for (block, matrix), (_, old), (_, own) in zip(
        second.curvature.entries, first.curvature.entries, new.curvature.entries, strict=True
    ):
        held = [0.25 * first.n_data * term.dense() for term in old.terms]
        wanted = bounded([*held, 2.0 * N * own.dense()], 2, block.shape, van_loan)
        close(second.n_data * matrix.dense(), torch.stack(wanted).sum(0), 1e-8)


# ------------------------------------------------------------------------------------------------ the façade


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_saving_and_loading(structure: str, tmp_path: Path) -> None:
    posterior, _ = chained(4, structure, 2)
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", posterior.model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())
    assert loaded.chain_errors == posterior.chain_errors
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    following = [p.update(task(4), max_terms=2).precision.dense() for p in (posterior, loaded)]
    assert torch.equal(*following)


def test_a_release_without_bounds_refuses_the_file() -> None:
    """It would keep a term too many; the name of the rule in the file is one that it does not know."""
    header = chained(3, most=2)[0].packed()[1]
    assert header["chain"]["terms"] == "keep, at most 2"
    assert chained(3, most=None)[0].packed()[1]["chain"]["terms"] == "keep"


def test_the_summary_says_what_was_lost() -> None:
    posterior, _ = chained(4, most=2)
    rows = {row.name: row for row in posterior.summary()}
    assert {row.structure for row in rows.values()} == {"2 x kron"}
    for name, row in rows.items():
        lost = [step[name] for step in posterior.chain_errors]
        assert row.note == (
            f"2 of 3 updates approximated the sum of the terms; relative Frobenius error at most {max(lost):.2g}, of "
            f"the last one {lost[-1]:.2g}"
        )
        assert f"{name}: {row.note}" in str(posterior.summary())
    assert not any(row.note for row in chained(4, most=None)[0].summary())


def test_in_the_constructor_and_in_the_learner() -> None:
    first, _ = chained(3, most=2)
    wanted = first.update(task(3), 2.0, max_terms=2).precision.dense()
    found = lk.LaplacePosterior(first.model, "categorical", prior=first, multiplier=2.0, max_terms=2).fit(task(3))
    assert torch.equal(found.precision.dense(), wanted)

    model = network()
    learner = continual.OnlineLaplace(model, "categorical", multiplier=2.0, prior_precision=LAM, max_terms=2)
    for k in range(4):
        learner.after_task(task(k))
        moved(model, k)
    assert learner.posterior is not None
    assert [len(matrix.terms) for _, matrix in learner.posterior.curvature.entries] == [2, 2]
    again = continual.OnlineLaplace(model, "categorical", multiplier=2.0, prior_precision=LAM, max_terms=2)
    again.load_state_dict(learner.state_dict())
    for each in (learner, again):
        each.after_task(task(4))
    assert again.posterior is not None
    assert torch.equal(again.posterior.precision.dense(), learner.posterior.precision.dense())
    assert again.posterior.chain_errors == learner.posterior.chain_errors


def test_what_is_refused() -> None:
    model = network()
    first = alone(model, 0, "kron")
    before = first.precision.dense()

    def learner(**options: Any) -> continual.OnlineLaplace:
        return continual.OnlineLaplace(model, "categorical", **options)

    def posterior(**options: Any) -> lk.LaplacePosterior:
        return lk.LaplacePosterior(model, "categorical", prior=first, **options)

    for make in (lambda **options: first.update(task(1), **options), learner, posterior):
        for wrong in (0, -3):
            with pytest.raises(ValueError, match=f"max_terms must be at least 1, got {wrong}"):
                make(max_terms=wrong)
        for kind in (2.0, True, "3"):
            with pytest.raises(lk.errors.InvalidType, match="max_terms must be an integer"):
                make(max_terms=kind)
        for terms in ("sum", "project", "project_kl"):
            with pytest.raises(lk.errors.IncompatiblePair, match=f"'{terms}' holds a single.*max_terms=3.*'keep'"):
                make(terms=terms, max_terms=3)
        with pytest.raises(lk.errors.UnknownName):
            make(terms="bounded", max_terms=3)
    with pytest.raises(TypeError, match="max_terms go with prior="):
        lk.LaplacePosterior(model, "categorical", max_terms=3)
    assert torch.equal(first.precision.dense(), before)
