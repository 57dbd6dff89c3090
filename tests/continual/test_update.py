"""Chained posteriors: ``update`` and ``prior=`` against dense references."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.operators import (
    KeptTerms,
    KroneckerBlock,
    SpectralBlock,
    TermSum,
    nearest_in_divergence,
    nearest_product,
    relative_error,
)
from laplace_kf.operators.base import Sum
from tests import oracles
from tests.cases import CATEGORICAL, build, labels, normal
from tests.checks import close
from tests.continual.problems import DENSE, LAM, N, moved, network, task

# ------------------------------------------------------------------------------------------------ linear regression

SIGMA = 0.6
SIZES = (5, 9, 2)  # the last task alone does not determine the weights


def _regression() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 2, seed=k) + k, normal(n, 1, seed=50 + k)) for k, n in enumerate(SIZES)]


def _design(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _set(model: nn.Linear, weights: Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(weights[None, :2])
        model.bias.copy_(weights[2:])


@pytest.mark.parametrize("structure", ["full", "kron", "ekfac", "layer"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_chaining_equals_the_batch_posterior_in_any_order(structure: str, order: tuple[int, ...]) -> None:
    tasks = _regression()
    rows = torch.cat([_design(x) for x, _ in tasks]), torch.cat([y[:, 0] for _, y in tasks])
    wanted = oracles.linear_regression(*rows, SIGMA, LAM)
    model = build(lambda: nn.Linear(2, 1))
    posterior: lk.LaplacePosterior | None = None
    evidence = 0.0
    for k in order:
        x, y = tasks[k]
        precision, pull = LAM * torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        if posterior is not None:  # the minimum of the new task's loss with the penalty
            precision = posterior.precision.dense()
            pull = precision @ torch.cat([v.reshape(-1) for v in posterior.mean.values()])
        a = _design(x)
        _set(model, torch.linalg.solve(precision + a.T @ a / SIGMA**2, pull + a.T @ y[:, 0] / SIGMA**2))
        if posterior is None:
            likelihood = lk.likelihoods.Gaussian(scale=SIGMA)
            posterior = lk.LaplacePosterior(model, likelihood, structure=structure, prior_precision=LAM).fit([(x, y)])
        else:
            posterior = posterior.update([(x, y)])
        evidence += float(posterior.log_evidence())
    assert posterior is not None
    close(posterior.precision.dense(), wanted.precision, 1e-8)
    close(torch.cat([v.reshape(-1) for v in posterior.mean.values()]), wanted.mean, 1e-8)
    assert posterior.n_data == sum(SIZES)
    assert abs(evidence - wanted.log_evidence) <= 1e-8 * abs(wanted.log_evidence)


@pytest.mark.parametrize(
    ("structure", "terms", "options"),
    [
        *((structure, "keep", {}) for structure in ("kron", "ekfac", "diag", "layer", "full", "isotropic")),
        ("lowrank", "keep", {"rank": 8}),
        ("kron", "project", {}),
        ("kron", "project_kl", {}),
        ("ekfac", "project", {}),
        ("diag", "project", {}),
    ],
)
def test_with_two_outputs_every_structure_gives_what_it_gives_for_all_data_at_once(
    structure: str, terms: str, options: dict[str, Any]
) -> None:
    """Of a linear model the curvature of all tasks is one product, so that collapsing loses nothing either."""
    inputs = [*(x for x, _ in _regression()), normal(6, 2, seed=9)]
    tasks = [(x, normal(len(x), 2, seed=len(x))) for x in inputs]
    whole = (torch.cat([x for x, _ in tasks]), torch.cat([y for _, y in tasks]))
    model = build(lambda: nn.Linear(2, 2))

    def fresh() -> lk.LaplacePosterior:
        likelihood = lk.likelihoods.Gaussian(scale=SIGMA)
        return lk.LaplacePosterior(model, likelihood, structure, prior_precision=LAM, **options)

    wanted = fresh().fit(whole).precision.dense()
    shift = normal(6, seed=4)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        posterior = fresh().fit(tasks[order[0]])
        for k in order[1:]:
            posterior = posterior.update(tasks[k], terms=terms)
        close(posterior.precision.dense(), wanted, 1e-8)
        assert max(max(errors.values()) for errors in posterior.chain_errors) <= 1e-7
        with torch.no_grad():
            model.weight += shift[:4].reshape(2, 2)
            model.bias += shift[4:]
        close(posterior.penalty(), shift @ wanted @ shift / 2, 1e-8)
        with torch.no_grad():
            model.weight -= shift[:4].reshape(2, 2)
            model.bias -= shift[4:]


# ------------------------------------------------------------------------------------------------ against dense sums


def _chained(structure: str, terms: str, multiplier: float = 1.0, count: int = 3, **options: Any) -> Any:
    """The posterior after ``count`` tasks, the dense precision if nothing is approximated, and the model."""
    model = network()
    dense = LAM * torch.eye(31, dtype=torch.float64)
    posterior = None
    for k in range(count):
        x, y = task(k)
        moved(model, k)
        weight = N if posterior is None else multiplier * N
        dense = dense + weight * DENSE.get(structure, lambda *_: torch.zeros(()))(model, x, y)
        if posterior is None:
            posterior = lk.LaplacePosterior(
                model, "categorical", structure=structure, prior_precision=LAM, **options
            ).fit((x, y))
        else:
            posterior = posterior.update((x, y), multiplier, terms)
    return posterior, dense, model


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_kept_terms_equal_the_dense_sum(structure: str, multiplier: float) -> None:
    posterior, dense, model = _chained(structure, "keep", multiplier)
    precision = posterior.precision
    v = normal(31, 3)
    close(precision.dense(), dense)
    close(precision.diag(), dense.diagonal())
    close(precision.matvec(v), dense @ v)
    close(precision.solve(v), torch.linalg.solve(dense, v), 1e-9)
    close(precision.quadratic(v), v.T @ torch.linalg.solve(dense, v), 1e-9)
    close(precision.logdet(), torch.logdet(dense))
    assert posterior.n_data == N * (1 + 2 * multiplier)
    # the penalty, and its gradient by autograd of the dense form
    moved(model, 9)
    theta = oracles.flat_parameters(model).requires_grad_()
    mean = torch.cat([value.reshape(-1) for value in posterior.mean.values()])
    wanted = oracles.penalty(dense, theta, mean)
    (gradient,) = torch.autograd.grad(wanted, theta)
    found = posterior.penalty()
    found.backward()
    close(found, wanted)
    close(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), gradient)


def test_kept_terms_of_the_other_structures_add_up() -> None:
    for structure, options in (("ekfac", {}), ("lowrank", {"rank": 4}), ("layer", {}), ("isotropic", {})):
        model = network()
        dense = LAM * torch.eye(31, dtype=torch.float64)
        posterior = None
        for k in range(3):
            moved(model, k)
            alone = lk.LaplacePosterior(model, "categorical", structure=structure, prior_precision=LAM, **options).fit(
                task(k)
            )
            dense = dense + N * alone.curvature.dense()
            posterior = alone if posterior is None else posterior.update(task(k))
        assert posterior is not None
        v = normal(31, 2)
        close(posterior.precision.dense(), dense, 1e-9)
        close(posterior.precision.solve(v), torch.linalg.solve(dense, v), 1e-8)


def test_draws_of_kept_terms_have_the_covariance() -> None:
    posterior, dense, _ = _chained("kron", "keep")
    assert any(isinstance(matrix, TermSum) for _, matrix in posterior.precision.entries)
    draws = posterior.precision.sample(20000, torch.Generator().manual_seed(0))
    covariance = torch.linalg.inv(dense)
    root = torch.linalg.cholesky(dense)
    white = draws @ root  # ought to be standard normal
    assert float((white.T @ white / len(draws) - torch.eye(31, dtype=torch.float64)).abs().max()) < 0.06
    assert float(draws.mean(0).abs().max()) < 5 * float(covariance.diagonal().max().sqrt()) / 20000**0.5
    again = posterior.precision.sample(20, torch.Generator().manual_seed(0))
    assert torch.equal(again, posterior.precision.sample(20, torch.Generator().manual_seed(0)))


def test_two_terms_without_a_prior_are_solved_exactly() -> None:
    """Two generalised eigenproblems (methods 5.4): no conjugate gradients."""

    def definite(size: int, seed: int) -> Tensor:
        root = normal(2, size, size + 2, seed=seed)
        return root @ root.mT

    first = KroneckerBlock(definite(3, 0), definite(4, 1), "b", 2.0)
    second = KroneckerBlock(definite(3, 2), definite(4, 3), "b", 0.5)
    kept = KeptTerms([first, second], "b")
    exact = kept.precision(3.0, torch.zeros((), dtype=torch.float64), "exact")
    assert not isinstance(exact, (TermSum, Sum))
    v = normal(24, 2)
    dense = 3 * (first.dense() + second.dense())
    close(exact.dense(), dense)
    close(exact.solve(v), torch.linalg.solve(dense, v))
    close(exact.logdet(), torch.logdet(dense))


def test_different_priors_for_weight_and_bias() -> None:
    model = network()
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision={"*weight": 0.5, "*bias": 4.0})
    posterior = posterior.fit(task(0)).update(task(1))
    prior = torch.cat([torch.full((p.numel(),), 4.0 if "bias" in n else 0.5) for n, p in model.named_parameters()])
    wanted = N * (DENSE["kron"](model, *task(0)) + DENSE["kron"](model, *task(1))) + torch.diag(prior.double())
    v = normal(31, 2)
    close(posterior.precision.dense(), wanted)
    close(posterior.precision.solve(v), torch.linalg.solve(wanted, v), 1e-9)
    assert posterior.precision.sample(3, torch.Generator().manual_seed(1)).shape == (3, 31)


# ------------------------------------------------------------------------------------------------ one product


def _van_loan(dense: Tensor, out: int, inp: int) -> tuple[Tensor, float]:
    """The nearest Kronecker product by the singular value decomposition of the rearranged dense matrix."""
    rearranged = dense.reshape(out, inp, out, inp).permute(0, 2, 1, 3).reshape(out**2, inp**2)
    left, values, right = torch.linalg.svd(rearranged)
    product = torch.kron(left[:, 0].reshape(out, out), right[0].reshape(inp, inp)) * values[0]
    return product, float(values[1:].norm() / values.norm())


@pytest.mark.parametrize("count", [2, 3])
def test_projection_is_the_nearest_product_and_its_error_the_dense_one(count: int) -> None:
    posterior, _, _ = _chained("kron", "project", 2.0, count - 1)
    previous = {block.name: matrix.dense() * posterior.n_data for block, matrix in posterior.curvature.entries}
    model = posterior.model
    moved(model, count)
    new = lk.LaplacePosterior(model, "categorical").fit(task(count - 1))
    following = posterior.update(task(count - 1), 2.0, "project")
    assert len(following.chain_errors) == count - 1
    for (block, found), (_, alone) in zip(following.curvature.entries, new.curvature.entries, strict=True):
        exact = previous[block.name] + 2 * N * alone.dense()
        wanted, error = _van_loan(exact, *block.shape[1:])
        close(found.dense() * following.n_data, wanted, 1e-9)
        assert isinstance(found, KroneckerBlock)
        reported = following.chain_errors[-1][block.name]
        assert abs(reported - error) <= 1e-10
        assert error > 1e-4  # the two tasks do differ
        measured = float((found.dense() * following.n_data - exact).norm() / exact.norm())
        assert abs(reported - measured) <= 1e-10
        for factor in (found.inputs, found.outputs):
            assert float(torch.linalg.eigvalsh(factor).min()) >= -1e-12 * float(factor.norm())


@pytest.mark.parametrize("terms", ["project", "project_kl"])
def test_an_exact_product_is_found_exactly(terms: str) -> None:
    model = network()
    first = lk.LaplacePosterior(model, "categorical", prior_precision=LAM).fit(task(0))
    twice = first.update(task(0), 1.0, terms)
    wanted = 2 * first.precision.dense() - LAM * torch.eye(31, dtype=torch.float64)
    # where a factor is singular (softmax outputs), the divergence needs a jitter of 1e-6 of the mean curvature
    tolerance = 1e-12 if terms.endswith("project") else 1e-5
    close(twice.precision.dense(), wanted, tolerance)
    assert max(twice.chain_errors[0].values()) <= tolerance


def test_projection_of_groups_and_of_diagonal_factors() -> None:
    def definite(size: int, seed: int) -> Tensor:
        root = normal(2, size, size, seed=seed)
        return root @ root.mT

    diagonal = [normal(1, 5, seed=k).square() for k in range(2)]
    for inputs in ([definite(3, 0), definite(3, 1)], [d.expand(2, 5) for d in diagonal]):
        terms = [KroneckerBlock(a, definite(4, 7 + k), "b", 1.0 + k) for k, a in enumerate(inputs)]
        found = nearest_product(terms)
        dense = terms[0].dense() + terms[1].dense()
        size = dense.shape[0] // 2
        for group in range(2):
            part = slice(group * size, (group + 1) * size)
            wanted, _ = _van_loan(dense[part, part], 4, size // 4)
            close(found.dense()[part, part], wanted)
        measured = float((found.dense() - dense).norm() / dense.norm())
        assert abs(relative_error(terms, found) - measured) <= 1e-12


def test_the_divergence_is_stationary() -> None:
    """Small changes of either factor do not lower ``KL(N(0, Q⁻¹) ‖ N(0, Λ⁻¹))``; the Frobenius product is worse."""

    def definite(size: int, seed: int) -> Tensor:
        root = normal(1, size, size + 1, seed=seed)
        return root @ root.mT

    terms = [KroneckerBlock(definite(3, k), definite(2, 5 + k), "b") for k in range(2)]
    dense = terms[0].dense() + terms[1].dense()

    def divergence(block: KroneckerBlock, a: Any = 0.0, g: Any = 0.0) -> Tensor:
        product = torch.kron(block.outputs[0] + g, block.inputs[0] + a)
        return (torch.trace(torch.linalg.solve(product, dense)) + torch.logdet(product)) / 2

    found = nearest_in_divergence(terms)
    da = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    dg = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(divergence(found, da, dg), (da, dg))
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    assert float(divergence(found)) < float(divergence(nearest_product(terms))) - 1e-4


def test_factor_sum_is_the_published_one_and_at_least_the_truth() -> None:
    posterior, dense, _ = _chained("kron", "sum", 2.0)
    model = network()
    factors: dict[tuple[str, ...], list[Any]] = {}
    for k in range(3):
        moved(model, k)
        weight = (N if k == 0 else 2 * N) ** 0.5
        for block in oracles.kron_blocks(model, *task(k), CATEGORICAL.curvature):
            total = factors.setdefault(block.names, [block, 0.0, 0.0])
            total[1], total[2] = total[1] + weight * block.A, total[2] + weight * block.G
    blocks = [oracles.Block(block.names, block.index, A=a, G=g) for block, a, g in factors.values()]
    wanted = oracles.assemble(blocks, 31) + LAM * torch.eye(31, dtype=torch.float64)
    close(posterior.precision.dense(), wanted)
    assert float(torch.linalg.eigvalsh(posterior.precision.dense() - dense).min()) > -1e-9  # T26
    assert min(posterior.chain_errors[-1].values()) > 0.3  # over-counts


def test_memory_of_collapsed_terms_does_not_grow() -> None:
    for structure in ("kron", "ekfac", "lowrank"):
        options = {"rank": 3} if structure == "lowrank" else {}
        sizes, kept = [], []
        for terms, found in (("project", sizes), ("keep", kept)):
            for count in (2, 3, 4):
                posterior, _, _ = _chained(structure, terms, 1.0, count, **options)
                found.append(sum(tensor.numel() for tensor in posterior.packed()[0].values()))
        assert sizes[0] == sizes[1] == sizes[2]
        assert kept[0] < kept[1] < kept[2]


def test_an_eigenbasis_is_projected_onto_the_common_one() -> None:
    posterior, _, model = _chained("ekfac", "project", 1.0, 1)
    moved(model, 5)
    new = lk.LaplacePosterior(model, "categorical", structure="ekfac").fit(task(1))
    following = posterior.update(task(1), terms="project")
    for (block, old), (_, alone), (_, found) in zip(
        posterior.curvature.entries, new.curvature.entries, following.curvature.entries, strict=True
    ):
        exact, joined = N * (old.dense() + alone.dense()), following.n_data * found.dense()
        assert isinstance(found, SpectralBlock)
        error = float((exact - joined).norm() / exact.norm())
        assert abs(following.chain_errors[0][block.name] - error) <= 1e-7
        assert abs(float((joined - exact).trace())) <= 1e-9 * float(exact.trace())


# ------------------------------------------------------------------------------------------------ the façade


@pytest.mark.parametrize("terms", ["keep", "sum", "project", "project_kl"])
def test_saving_and_loading_a_chain(terms: str, tmp_path: Path) -> None:
    posterior, _, model = _chained("kron", terms)
    posterior.n_data = 40.0
    posterior.prior_precision = 0.3
    posterior.save(tmp_path / "p.safetensors")
    loaded = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())
    assert (loaded.n_data, loaded.prior_precision, loaded.chain_errors) == (40.0, 0.3, posterior.chain_errors)
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    moved(model, 7)
    following = [p.update(task(0), terms=terms).precision.dense() for p in (posterior, loaded)]
    assert torch.equal(*following)


def test_prior_in_the_constructor_is_the_same_as_update() -> None:
    model = network()
    first = lk.LaplacePosterior(model, "categorical", prior_precision=LAM).fit(task(0))
    before = first.precision.dense()
    moved(model, 3)
    second = lk.LaplacePosterior(model, "categorical", prior=first).fit(task(1))
    close(second.precision.dense(), first.update(task(1)).precision.dense(), 1e-14)
    close(second.precision.dense(), before + N * DENSE["kron"](model, *task(1)))
    assert torch.equal(first.precision.dense(), before)  # the earlier one stays
    assert second.prior_precision == LAM
    with pytest.raises(lk.errors.IncompatiblePair, match="prior_precision"):
        lk.LaplacePosterior(model, "categorical", prior_precision=3.0, prior=first)
    with pytest.raises(lk.errors.NotFitted):
        lk.LaplacePosterior(model, "categorical", prior=lk.LaplacePosterior(model, "categorical"))
    with pytest.raises(TypeError, match="prior="):
        lk.LaplacePosterior(model, "categorical", terms="project")


def test_forgetting_scales_the_previous_curvature_only() -> None:
    model = network()
    first = lk.LaplacePosterior(model, "categorical", prior_precision=LAM).fit(task(0))
    second = first.update(task(1), 2.0, forgetting=0.25)
    dense = 0.25 * N * DENSE["kron"](model, *task(0)) + 2 * N * DENSE["kron"](model, *task(1))
    close(second.precision.dense(), dense + LAM * torch.eye(31, dtype=torch.float64))
    assert second.n_data == 2.25 * N
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="forgetting"):
            first.update(task(1), forgetting=wrong)


def test_settings_after_chaining() -> None:
    """``Λ = n_data · C̄ + λ I`` holds, so N scales the curvature of all tasks and λ is replaced as a whole."""
    posterior, dense, _ = _chained("kron", "keep", 2.0)
    eye = torch.eye(31, dtype=torch.float64)
    close(posterior.n_data * posterior.curvature.dense() + LAM * eye, dense)
    posterior.n_data, posterior.prior_precision = 2 * posterior.n_data, 5.0
    close(posterior.precision.dense(), 2 * (dense - LAM * eye) + 5 * eye)
    x, y = task(0)
    with pytest.warns(UserWarning, match="edge"):
        posterior.tune((x, y), n_data=[10.0, 20.0], prior_precision=[0.1, 1.0], method="mc", samples=3)
    assert posterior.summary()[0].structure == "3 x kron"
    assert posterior.predict(x, method="mc", samples=3).probs.shape == (N, 3)


def test_evidence_of_kept_terms_is_differentiable_in_the_prior() -> None:
    posterior, _, _ = _chained("kron", "keep")
    lam = torch.tensor(LAM, dtype=torch.float64, requires_grad=True)
    posterior.prior_precision = lam
    (gradient,) = torch.autograd.grad(posterior.log_evidence(), lam)
    values = [float(posterior.evidence(prior_precision=LAM + s).total) for s in (1e-5, -1e-5)]
    assert abs(float(gradient) - (values[0] - values[1]) / 2e-5) <= 1e-5 * abs(float(gradient))


def test_what_is_refused() -> None:
    model = network()
    first = lk.LaplacePosterior(model, "categorical").fit(task(0))
    with pytest.raises(lk.errors.UnknownName, match="keep"):
        first.update(task(1), terms="all")
    with pytest.raises(ValueError, match="multiplier"):
        first.update(task(1), 0.0)
    with pytest.raises(lk.errors.IncompatiblePair, match="eigenbasis"):
        lk.LaplacePosterior(model, "categorical", structure="ekfac").fit(task(0)).update(task(1), terms="sum")
    with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
        lk.LaplacePosterior(model, "categorical", damping="factored").fit(task(0)).update(task(1))
    other = lk.LaplacePosterior(model, "categorical", parameters=["2.*"], prior=first)
    with pytest.raises(lk.errors.IncompatiblePair, match="parameters"):
        other.fit(task(1))
    with pytest.raises(lk.errors.ShapeMismatch):
        first.update([])
    big = build(lambda: nn.Linear(80, 60))
    chain = lk.LaplacePosterior(big, "categorical").fit((normal(4, 80), labels(60, 4)))
    chain = chain.update((normal(4, 80, seed=1), labels(60, 4, seed=1)))
    with pytest.raises(lk.errors.IncompatiblePair, match="project"):
        chain.log_evidence()


def test_a_subnetwork_keeps_its_weights() -> None:
    model = network()
    first = lk.LaplacePosterior(
        model, "categorical", structure="full", parameters=lk.Subnetwork(5), prior_precision=LAM
    ).fit(task(0))
    before = first.precision.dense()
    second = first.update(task(1))
    names = list(first.mean)
    index = first.curvature.layout.within(lk.LaplacePosterior(model, "categorical").fit(task(0)).curvature.layout)
    assert list(second.mean) == names
    close(second.precision.dense(), before + N * DENSE["full"](model, *task(1))[index][:, index])


def test_single_precision() -> None:
    model = network().float()
    data = [(x.float(), y) for x, y in map(task, range(3))]
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision=LAM).fit(data[0])
    posterior = posterior.update(data[1]).update(data[2])
    assert posterior.penalty().dtype == torch.float32
    v = normal(31, 2).float()
    close(posterior.precision.matvec(posterior.precision.solve(v)), v, 1e-4)
