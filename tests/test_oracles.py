"""The oracles against each other and against textbook facts: nothing of the package is used here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests import oracles
from tests.cases import BY_NAME, CASES, HETEROSCEDASTIC, Case, binary, build, mixture, normal, tagged, truth
from tests.checks import close
from tests.classifiers import data, dense, net
from tests.oracles import jacobian


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_case_is_small_float64_and_runs(case: Case) -> None:
    problem = case.make()
    assert problem.size < 150
    assert all(p.dtype == torch.float64 for p in problem.model.parameters())
    before = torch.get_rng_state()
    z = oracles.call(problem.model, problem.x)
    assert torch.equal(torch.get_rng_state(), before)
    assert z.shape[0] == problem.n
    one_by_one = torch.cat(oracles.outputs(problem.model, problem.x, problem.n))
    close(z.detach(), one_by_one)  # examples are independent of each other in eval mode
    again = case.make()
    for (name, p), q in zip(problem.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert float(truth(case).ggn.abs().max()) > 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("embedding-padding")], ids=ids)
def test_jacobian_is_that_of_torch_func(case: Case) -> None:
    problem = case.make()
    model = copy.deepcopy(problem.model).eval()
    values = {k: v.detach() for k, v in model.named_parameters() if k in problem.names}

    def fn(parameters: dict[str, Tensor], i: int) -> Tensor:
        x = oracles.take(problem.x, slice(i, i + 1))
        args, kwargs = ((), x) if isinstance(x, dict) else ((x if isinstance(x, tuple) else (x,)), {})
        return functional_call(model, parameters, args, kwargs).reshape(-1)

    expected = oracles.jacobian(problem.model, problem.x, problem.n, problem.names)
    for i in range(problem.n):
        # chunk_size=1: fused calls (GRU) have no batching rule for their backward
        columns = jacrev(fn, chunk_size=1)(values, i)
        flat = torch.cat([columns[name].reshape(expected.shape[1], -1) for name in values], 1)
        close(flat, expected[i])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_trace_diagonal_and_sign(case: Case) -> None:
    t, p = truth(case), case.make()
    diag = oracles.diag_ggn(p.model, p.x, p.y, p.likelihood.nll, p.names, p.likelihood.curvature)
    close(diag, t.ggn.diagonal())
    close(t.ggn, t.ggn.T)
    assert float(torch.linalg.eigvalsh(t.ggn).min()) > -1e-10 * float(t.ggn.abs().max())
    for block in t.kron_blocks:
        assert float(torch.linalg.eigvalsh(block.dense()).min()) > -1e-10 * float(t.ggn.abs().max())
    covered = torch.cat([block.index.reshape(-1) for block in t.kron_blocks]).sort().values
    assert torch.equal(covered, torch.arange(p.size))  # every parameter in exactly one block


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_canonical_weight_times_patches_is_the_layer(case: Case) -> None:
    """[W|b] â_t = h_t for every call of every supported layer: fixes patch order, groups, padding, bias column."""
    problem = case.make()
    model, _ = oracles.private(problem.model, problem.names)
    checked = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal checked
        bias = getattr(module, "bias", None)
        parts = oracles.canonical(module, module.weight, bias)
        rows = oracles.layer_inputs(module, args[0], out, bias is not None)
        for w, a, h in zip(parts, rows, oracles.layer_outputs(module, out), strict=True):
            expected = h
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                keep = (args[0] != module.padding_idx).reshape(-1)
                a, expected = a[keep], h[keep]
            close((a @ w.T).detach(), expected.detach())
        checked += 1

    for members in oracles.kron_modules(model, problem.names).values():
        for module in members:
            module.register_forward_hook(hook)
    oracles.call(model, oracles.take(problem.x, slice(0, 1)))
    assert checked or case.name in {"raw-matmul"}


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_kron_is_exact_for_one_example_with_one_position(case: Case) -> None:
    t = truth(case)
    single = case.make().at(slice(0, 1))
    one = oracles.kron_blocks(single.model, single.x, single.y, single.likelihood.curvature)
    ggn = oracles.dense_ggn(
        *[single.model, single.x, single.y, single.likelihood.nll], None, single.likelihood.curvature
    )
    positions = position_counts(single)
    for block in one:
        index = block.index.reshape(-1)
        exact = ggn[index[:, None], index[None, :]]
        if block.values is not None:
            close(block.values, exact.diagonal())
        elif positions[block.names] == 1:
            close(block.dense(), exact)
    assert len(one) == len(t.kron_blocks)


def position_counts(problem: object) -> dict[tuple[str, ...], int]:
    model, _ = oracles.private(problem.model, problem.names)  # type: ignore[attr-defined]
    counts: dict[tuple[str, ...], int] = {}

    def listen(key: tuple[str, ...]) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            counts[key] = counts.get(key, 0) + oracles.layer_outputs(module, out)[0].shape[0]

        return hook

    for key, members in oracles.kron_modules(model, problem.names).items():  # type: ignore[attr-defined]
        for module in members:
            module.register_forward_hook(listen(key))
    oracles.call(model, oracles.take(problem.x, slice(0, 1)))  # type: ignore[attr-defined]
    return counts


def test_conv_patches_are_unfold() -> None:
    conv = nn.Conv2d(4, 4, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2).double()
    x = normal(1, 4, 5, 6)
    parts = oracles.layer_inputs(conv, x, conv(x), False)
    for group, part in enumerate(parts):
        unfolded = F.unfold(x[:, 2 * group : 2 * group + 2], (2, 3), (1, 2), (1, 2), (2, 1))[0].T
        assert torch.equal(part, unfolded)


def test_loop_over_positions_equals_sequence_input() -> None:
    """One Linear called per step and the same Linear on (N, T, I) have the same factors."""
    unrolled = BY_NAME["unrolled-loop"].make()
    pooled = BY_NAME["sequence-linear-pooled"].make()
    pooled.model.load_state_dict(unrolled.model.state_dict())

    def pooled_forward(m: object, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x)).mean(1))  # type: ignore[attr-defined]

    pooled.model.fn = pooled_forward  # type: ignore[assignment]
    first = oracles.kron_blocks(unrolled.model, unrolled.x, unrolled.y, unrolled.likelihood.curvature)
    second = oracles.kron_blocks(pooled.model, unrolled.x, unrolled.y, unrolled.likelihood.curvature)
    for a, b in zip(first, second, strict=True):
        close(a.dense(), b.dense())


@pytest.mark.parametrize("case", tagged("hessian"), ids=ids)
def test_hessian_is_that_of_finite_differences(case: Case) -> None:
    p, t = case.make(), truth(case)
    hessian = oracles.dense_hessian(p.model, p.x, p.y, p.likelihood.nll)
    theta, eps = t.theta, 1e-5
    index = oracles.flat_index(p.model)
    direction = normal(p.size, seed=8)

    def gradient(at: Tensor) -> Tensor:
        model = copy.deepcopy(p.model)
        with torch.no_grad():
            for name, q in model.named_parameters():
                q.copy_(at[index[name]])
        losses = [p.likelihood.nll(oracles.call(model, oracles.take(p.x, [i])), p.y[[i]]) for i in range(p.n)]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])

    numeric = (gradient(theta + eps * direction) - gradient(theta - eps * direction)) / (2 * eps)
    close(hessian @ direction, numeric, 1e-6)


@pytest.mark.parametrize("case", [BY_NAME["linear-gaussian"], *tagged("linear")], ids=ids)
def test_hessian_is_ggn_when_the_model_is_linear_in_each_block(case: Case) -> None:
    p, t = case.make(), truth(case)
    hessian = oracles.dense_hessian(p.model, p.x, p.y, p.likelihood.nll)
    for block in t.kron_blocks:  # block-diagonal part: no second derivative of the outputs (T7)
        index = block.index.reshape(-1)
        close(hessian[index[:, None], index[None, :]], t.ggn[index[:, None], index[None, :]])


def test_relu_net_block_hessian_is_block_ggn() -> None:
    """T7: piecewise linear nets have no first-order term on the block diagonal."""
    case = BY_NAME["relu-mlp-bernoulli"]
    p, t = case.make(), truth(case)
    hessian = oracles.dense_hessian(p.model, p.x, p.y, p.likelihood.nll)
    for block in t.kron_blocks:
        index = block.index.reshape(-1)
        close(hessian[index[:, None], index[None, :]], t.ggn[index[:, None], index[None, :]])


@pytest.mark.parametrize("case", tagged("chain"), ids=ids)
def test_kfra_facts(case: Case) -> None:
    """T8, T10: exact for one example and for linear nets; the mean of batch-one KFRA is KFLR."""
    p, t = case.make(), truth(case)
    curvature = p.likelihood.curvature
    exact = {block.names: block for block in t.kron_blocks}
    ones = [oracles.kfra_factors(q.model, q.x, q.y, curvature) for q in (p.at(slice(i, i + 1)) for i in range(p.n))]
    for same in zip(*ones, strict=True):
        close(torch.stack([block.G for block in same]).mean(0), exact[same[0].names].G)
        close(torch.stack([block.A for block in same]).mean(0), exact[same[0].names].A)
    together = oracles.kfra_factors(p.model, p.x, p.y, curvature)
    gaps = [float((b.G - exact[b.names].G).abs().max() / b.G.abs().max()) for b in together[1:]]
    constant = "gaussian" in p.likelihood.name  # then one hidden layer is exact as well
    expected = "linear" not in case.tags and p.n > 1 and len(together) > (2 if constant else 1)
    assert (max(gaps, default=0.0) > 1e-6) == expected
    close(together[0].G, exact[together[0].names].G)


def test_fisher_of_natural_likelihoods_by_enumeration() -> None:
    """T5: Σ_y p(y) score scoreᵀ equals the Hessian for softmax and sigmoid outputs."""
    z = normal(1, 3)
    for nll, targets in (
        (oracles.categorical_nll, [torch.tensor([c]) for c in range(3)]),
        (oracles.bernoulli_nll, [torch.tensor([[a, b, c]]).double() for a in (0, 1) for b in (0, 1) for c in (0, 1)]),
    ):
        weights = [torch.exp(-nll(z, y)) for y in targets]
        assert math.isclose(float(sum(weights)), 1.0, rel_tol=1e-12)
        fisher = sum(w * oracles.output_score(nll)(z, y) for w, y in zip(weights, targets, strict=True))
        close(fisher, oracles.output_hessian(nll)(z, targets[0]))


def test_heteroscedastic_fisher_by_quadrature() -> None:
    z = normal(1, 2)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64) * torch.exp(z[0, 1] / 2) + z[0, 0]
    weights = torch.exp(torch.stack([-oracles.heteroscedastic_nll(z, y.view(1, 1)) for y in grid]))
    step = grid[1] - grid[0]
    assert abs(float(weights.sum() * step) - 1) < 1e-6
    fisher = sum(
        w * step * oracles.output_score(oracles.heteroscedastic_nll)(z, y.view(1, 1))
        for w, y in zip(weights, grid, strict=True)
    )
    close(fisher, HETEROSCEDASTIC.fisher(z, grid[:1].view(1, 1)), 1e-6)


def test_mixture_formulas() -> None:
    """Methods 3.1: the closed-form Hessian, E_y[Hessian] = Fisher of rank 1, clip >= Hessian."""
    z = normal(1, 3, seed=4)
    gate, s2, s3 = torch.sigmoid(z[0])
    expectation = torch.zeros(3, 3, dtype=torch.float64)
    for label in (0.0, 1.0):
        y = torch.tensor([[label]], dtype=torch.float64)
        q2, q3 = (s2, s3) if label else (1 - s2, 1 - s3)
        r = gate * q2 / (gate * q2 + (1 - gate) * q3)
        u = torch.stack([torch.ones_like(r), label - s2, -(label - s3)])
        closed = torch.diag(torch.stack([gate * (1 - gate), r * s2 * (1 - s2), (1 - r) * s3 * (1 - s3)]))
        closed = closed - r * (1 - r) * torch.outer(u, u)
        hessian = oracles.output_hessian(oracles.mixture_nll)(z, y)
        close(closed, hessian)
        close(closed + r * (1 - r) * torch.outer(u, u), mixture("em").curvature(z, y))
        assert float(torch.linalg.eigvalsh(mixture("clip").curvature(z, y) - hessian).min()) > -1e-12
        expectation += torch.exp(-oracles.mixture_nll(z, y)) * hessian
    close(expectation, mixture("fisher").curvature(z, torch.zeros(1, 1, dtype=torch.float64)))
    assert int(torch.linalg.matrix_rank(expectation)) == 1


def test_dampings_and_balance() -> None:
    """5.2, T24: the factored forms exceed the exact one; ω attains the smallest trace of the excess."""
    case = BY_NAME["tanh-mlp-categorical"]
    t = truth(case)
    prior = torch.full((t.problem.size,), 0.8, dtype=torch.float64)
    exact = oracles.kron_precision(t.kron_blocks, 50.0, prior, "exact")
    close(exact, 50.0 * t.kron + 0.8 * torch.eye(t.problem.size, dtype=torch.float64))
    excess = {}
    for damping in ("factored", "balanced"):
        difference = oracles.kron_precision(t.kron_blocks, 50.0, prior, damping) - exact
        assert float(torch.linalg.eigvalsh(difference).min()) > -1e-10
        excess[damping] = float(difference.trace())
    assert excess["balanced"] < excess["factored"]
    block = t.kron_blocks[0]
    dims = block.A.shape[0], block.G.shape[0]

    def residual(omega: float) -> float:
        return omega * dims[0] * float(block.G.trace()) + dims[1] * float(block.A.trace()) / omega

    best = min((residual(w), w) for w in torch.logspace(-3, 3, 6001, dtype=torch.float64).tolist())[1]
    assert abs(best / oracles.balance(block) - 1) < 2e-3


def test_evidence_of_a_linear_model_is_the_marginal_density() -> None:
    """T25: for a linear-Gaussian model the Laplace evidence at the mode is exact, and so is the posterior."""
    x = torch.cat([normal(7, 2), torch.ones(7, 1, dtype=torch.float64)], 1)
    y = normal(7, seed=1)
    exact = oracles.linear_regression(x, y, 0.6, 1.4)
    nll = oracles.gaussian_nll(0.6)
    model = build(lambda: nn.Linear(2, 1))
    with torch.no_grad():
        model.weight.copy_(exact.mean[None, :2])
        model.bias.copy_(exact.mean[2:])
    ggn = oracles.dense_ggn(model, x[:, :2], y[:, None], nll)
    prior = torch.full((3,), 1.4, dtype=torch.float64)
    precision = oracles.dense_precision(ggn, 7, prior)
    close(precision, exact.precision)
    log_lik = oracles.log_likelihood(model, x[:, :2], y[:, None], nll)
    value = oracles.log_evidence(precision, prior, exact.mean, log_lik)
    assert math.isclose(value, exact.log_evidence, rel_tol=1e-10)
    blocks = oracles.kron_blocks(model, x[:, :2], y[:, None], oracles.output_hessian(nll))
    close(oracles.kron_precision(blocks, 7, prior), exact.precision)


def test_empirical_fisher_is_batch_size_free_and_differs_from_the_ggn() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    p, t = case.make(), truth(case)
    halves = [p.at(slice(0, 2)), p.at(slice(2, 5))]
    parts = [oracles.empirical_fisher(q.model, q.x, q.y, q.likelihood.nll) for q in halves]
    close((2 * parts[0] + 3 * parts[1]) / 5, t.empirical)
    assert float((t.empirical - t.ggn).abs().max()) > 0.1 * float(t.ggn.abs().max())
    single = Case("", lambda: p.at(slice(0, 1)))
    one = truth(single)
    scores = one.blocks(oracles.output_score(p.likelihood.nll))
    for block in scores:
        index = block.index.reshape(-1)
        close(block.dense(), one.empirical[index[:, None], index[None, :]])


def test_binary_targets_are_binary() -> None:
    assert set(binary(50).tolist()) == {0.0, 1.0}


def test_the_matrix_of_small_classifiers() -> None:
    """The plain loop of tests/classifiers.py equals the oracle that the contract tests use."""
    model, (x, _) = net(3, 4, 3), data()
    j = jacobian(model, x, len(x))
    p = model(x).detach().softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(dense(model, x), torch.einsum("ncp,ncd,ndq->pq", j, h, j) / len(x))
