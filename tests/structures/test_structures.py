"""The structures beyond diagonal, Kronecker and full: what is theirs alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.operators import Blockwise, Isotropic, LowRank, SpectralBlock
from laplace_kf.structures import STRUCTURES, base, ekfac, full
from tests import oracles
from tests.cases import BY_NAME, Case, Experts, Problem, normal, rng, tagged, truth
from tests.checks import close

MORE = ["ekfac", "layer", "lowrank"]
TWICE = ["ekfac", "lowrank"]


def estimate(problem: Problem, data: Any = None, **options: Any) -> Any:
    data = [problem.batch()] if data is None else data
    return lk.curvature.estimate(problem.model, problem.likelihood.build(lk), data, **options)


# ------------------------------------------------------------------------------------------------ low rank: the matrix


def low_rank(prior: Tensor) -> tuple[LowRank, Tensor]:
    vectors = torch.linalg.qr(normal(7, 3))[0]
    values = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)
    dense = vectors @ torch.diag(values) @ vectors.T + torch.diag(prior.expand(7))
    return LowRank(vectors, values, prior), dense


@pytest.mark.parametrize("prior", [torch.tensor(0.7).double(), torch.linspace(0.2, 3, 7).double()], ids=["one", "each"])
def test_low_rank_matrix(prior: Tensor) -> None:
    matrix, dense = low_rank(prior)
    inverse, v, many = torch.linalg.inv(dense), normal(7, seed=1), normal(7, 2, seed=2)
    close(matrix.dense(), dense)
    close(matrix.diag(), dense.diagonal())
    close(matrix.matvec(v), dense @ v)
    close(matrix.matvec(many), dense @ many)
    close(matrix.solve(v), inverse @ v)
    close(matrix.solve(many), inverse @ many)
    close(matrix.quadratic(many), many.T @ inverse @ many)
    close(matrix.logdet(), torch.logdet(dense))
    close(matrix.variances(), inverse.diagonal())
    close(matrix.scaled(2.5).dense(), 2.5 * dense)
    close(matrix.plus(Isotropic(7, torch.tensor(1.5).double())).dense(), dense + 1.5 * torch.eye(7))
    draws = matrix.sample(40_000, rng(3))
    spread = ((inverse.diagonal()[:, None] * inverse.diagonal() + inverse**2) / 40_000).sqrt()
    assert float(((draws.T @ draws / 40_000 - inverse) / spread).abs().max()) < 5
    with pytest.raises(lk.errors.NotPositiveDefinite):
        LowRank(matrix.vectors, matrix.values, prior * 0).solve(v)
    with pytest.raises(lk.errors.ShapeMismatch):
        LowRank(matrix.vectors, matrix.values[:2], prior)


@pytest.mark.parametrize("each", [False, True])
def test_low_rank_is_differentiable_in_the_prior(each: bool) -> None:
    prior = (torch.linspace(0.2, 3, 7) if each else torch.tensor(0.7)).double().requires_grad_()
    v = normal(7, seed=1)

    def results(dense: bool) -> Tensor:
        matrix, plain = low_rank(prior)
        if dense:
            return torch.logdet(plain) + v @ torch.linalg.solve(plain, v)
        return matrix.logdet() + matrix.quadratic(v)

    (mine,), (wanted,) = (torch.autograd.grad(results(dense), prior) for dense in (False, True))
    close(mine, wanted)


# ------------------------------------------------------------------------------------------------ low rank: the sums


@pytest.mark.parametrize("name", ["tanh-mlp-categorical", "conv2d-groups", "layernorm", "deep-tanh-mlp-gaussian"])
def test_truncation_is_near_the_best_one(name: str) -> None:
    """The error of the low rank alone is that of the truncated eigendecomposition, after enough iterations."""
    case = BY_NAME[name]
    ggn = truth(case).ggn
    values, vectors = torch.linalg.eigh(ggn)
    for rank in (2, 4):
        options: dict[str, Any] = {"structure": "lowrank", "rank": rank}
        best = vectors[:, -rank:] @ torch.diag(values[-rank:]) @ vectors[:, -rank:].T
        plain = estimate(case.make(), iterations=8, diagonal=False, **options).mean().dense()
        close(plain, best, 1e-5)
        full = estimate(case.make(), iterations=8, **options).mean().dense()
        close(full, oracles.low_rank_plus_diagonal(ggn, rank), 1e-5)
        close(full.diagonal(), ggn.diagonal())
        once = estimate(case.make(), iterations=1, oversample=2, diagonal=False, **options).mean().dense()
        assert float(torch.linalg.eigvalsh(ggn - once).min()) > -1e-9 * float(values.max())  # never more than C̄


@pytest.mark.parametrize("estimator", ["sampled", "importance", "empirical", "projection"])
@pytest.mark.parametrize("structure", MORE)
def test_other_estimators(structure: str, estimator: str) -> None:
    """Whatever the columns are: positive, of the right trace, and the same for the same generator."""
    problem = BY_NAME["tanh-mlp-categorical"].make()
    full = estimate(problem, structure="full", estimator="empirical").mean().dense()
    found = []
    for _ in range(2):
        matrix = estimate(problem, structure=structure, estimator=estimator, generator=rng(3)).mean()
        found.append(matrix.dense())
        assert float(torch.linalg.eigvalsh(found[-1]).min()) > -1e-12
    assert torch.equal(*found)
    if estimator == "empirical":
        close(found[0].diagonal().sum(), full.trace())


@pytest.mark.parametrize("structure", TWICE)
def test_expectation_of_sampled_columns(structure: str) -> None:
    """The trace of the second pass is that of the Fisher on average."""
    problem = BY_NAME["tanh-mlp-categorical"].make()
    options: dict[str, Any] = {"structure": structure, "estimator": "sampled", "generator": rng(1)}
    data = [problem.batch(torch.arange(problem.n).repeat(20))]  # every repetition of an example is a fresh draw
    traces = torch.stack([estimate(problem, data, **options).mean().diag().sum() for _ in range(20)])
    exact = truth(BY_NAME["tanh-mlp-categorical"]).ggn.trace()
    assert float((traces.mean() - exact).abs() / (traces.std() / 20**0.5)) < 4.5


@pytest.mark.parametrize("structure", MORE)
def test_recursive_columns_do_not_exist(structure: str) -> None:
    problem = BY_NAME["deep-tanh-mlp-gaussian"].make()
    with pytest.raises(lk.errors.IncompatiblePair, match="kron"):
        estimate(problem, structure=structure, estimator="recursive")


@pytest.mark.parametrize("bad", [{"rank": 0}, {"iterations": 0}, {"oversample": -1}])
def test_bad_low_rank_options(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        STRUCTURES["lowrank"](**bad)


# ------------------------------------------------------------------------------------------------ sums over data


@pytest.mark.share(2)
@pytest.mark.parametrize("structure", MORE)
@pytest.mark.parametrize("case", tagged("core"), ids=str)
def test_split_scale_and_totals(case: Case, structure: str) -> None:
    problem = case.make()
    whole, split = estimate(problem, structure=structure), estimate(problem, problem.uneven(), structure=structure)
    mean = whole.mean().dense()
    close(split.mean().dense(), mean, 1e-7)
    assert float(split.n_data) == problem.n
    close(whole.scale(2.5).mean().dense(), mean)
    close(whole.scale(2.5).total().dense(), 2.5 * problem.n * mean)
    double = whole + whole
    close(double.mean().dense(), mean)
    assert float(double.n_data) == 2 * problem.n


@pytest.mark.parametrize("case", tagged("core"), ids=str)
def test_adding_ekfac_statistics_of_different_bases(case: Case) -> None:
    """Both go into the eigenbases of the summed factors; the sum's trace is the traces' sum, in either order."""
    problem = case.make()
    one, two = (estimate(problem, [batch], structure="ekfac") for batch in problem.uneven())
    before = one.mean().dense()
    both, swapped = one + two, two + one
    close(both.mean().dense(), swapped.mean().dense(), 1e-7)
    close(both.total().dense().trace(), one.total().dense().trace() + two.total().dense().trace())
    joint = estimate(problem, structure="ekfac").mean()
    for (block, mine), (_, wanted) in zip(both.mean().entries, joint.entries, strict=True):
        if isinstance(mine, SpectralBlock):
            assert block.size == wanted.size
            close(mine.outputs.matrix.abs().sum(), wanted.outputs.matrix.abs().sum(), 1e-5)
    assert torch.equal(one.mean().dense(), before)


@pytest.mark.parametrize("case", tagged("core"), ids=str)
def test_adding_low_rank_statistics_of_different_directions(case: Case) -> None:
    problem = case.make()
    options: dict[str, Any] = {"structure": "lowrank", "rank": problem.size}
    one, two = (estimate(problem, [batch], **options) for batch in problem.uneven())
    both = one + two
    close(both.total().dense(), one.total().dense() + two.total().dense(), 1e-7)
    close((two + one).mean().dense(), both.mean().dense(), 1e-7)
    close(both.mean().dense(), truth(case).ggn, 1e-7)


@pytest.mark.parametrize("structure", TWICE)
def test_data_that_can_be_gone_through_only_once(structure: str) -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    with pytest.raises(lk.errors.ShapeMismatch, match=f"{structure}.*only once.*list"):
        estimate(problem, iter(problem.uneven()), structure=structure)

    class Once:
        """Empty the second time, and no iterator."""

        def __init__(self) -> None:
            self.batches = iter(problem.uneven())

        def __iter__(self) -> Any:
            return self.batches

    with pytest.raises(lk.errors.ShapeMismatch, match="only once"):
        estimate(problem, Once(), structure=structure)
    estimate(problem, iter(problem.uneven()), structure="lowrank", iterations=1)


@pytest.mark.parametrize("structure", MORE)
def test_augmentation_passes(structure: str) -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    posterior = lk.LaplacePosterior(problem.model, "categorical", structure)
    once = posterior.fit(problem.uneven()).precision.dense()
    close(posterior.fit(problem.uneven(), passes=3).precision.dense(), once, 1e-7)
    assert posterior.n_data == problem.n


@pytest.mark.parametrize("structure", MORE)
def test_a_module_first_used_in_a_later_batch(structure: str) -> None:
    model, y = Experts(), torch.tensor([0, 1, 2])
    up, down = torch.ones(3, 2).double(), -torch.ones(3, 2).double()
    both = lk.curvature.estimate(model, "categorical", [(up, y), (down, y)], structure).mean().dense()
    swapped = lk.curvature.estimate(model, "categorical", [(down, y), (up, y)], structure).mean().dense()
    full = lk.curvature.estimate(model, "categorical", [(up, y), (down, y)], "full").mean().dense()
    close(both, swapped, 1e-7)
    close(both.trace(), full.trace())


# ------------------------------------------------------------------------------------------------ priors, damping


@pytest.mark.parametrize("structure", MORE)
def test_prior_precision_by_parameter(structure: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    values = {"*.weight": 0.5, "*.bias": 7.0}
    prior = torch.zeros(problem.size).double()
    for name, index in oracles.flat_index(problem.model).items():
        prior[index] = values["*." + name.split(".")[1]]
    posterior = lk.LaplacePosterior(problem.model, "categorical", structure, prior_precision=values)
    posterior.fit(problem.uneven())
    dense = truth(case).precision(structure, problem.n, prior)
    v = normal(problem.size, seed=5)
    close(posterior.precision.dense(), dense, 1e-8)
    close(posterior.precision.solve(v), torch.linalg.solve(dense, v), 1e-8)
    close(posterior.precision.logdet(), torch.logdet(dense), 1e-8)
    assert posterior.precision.sample(3, rng(0)).shape == (3, problem.size)


@pytest.mark.parametrize("structure", [*MORE, "auto"])
def test_damping_has_no_choice(structure: str) -> None:
    with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
        lk.LaplacePosterior(nn.Linear(2, 2), "gaussian", structure, damping="factored")


# ------------------------------------------------------------------------------------------------ auto


def net(*widths: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1])


def blobs(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return normal(6, inputs).float(), torch.arange(6) % outputs


@pytest.mark.parametrize(
    ("widths", "memory", "chosen"),
    [
        ((3, 4, 3), 2**30, "full"),
        ((3, 4, 3), 4096, "kron"),
        ((3, 4, 3), 300, "diag"),
        ((3, 4, 3), 1, "isotropic"),
        ((40, 60, 3), 2**30, "kron"),
        ((1500, 1), 2**30, "full"),
        ((2, 500), 2**30, "kron"),
    ],
)
def test_auto_chooses(widths: tuple[int, ...], memory: int, chosen: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (x, y) = net(*widths), blobs(widths[0], widths[-1])
    likelihood, y = ("categorical", y) if widths[-1] > 1 else ("gaussian", y[:, None].float())
    posterior = lk.LaplacePosterior(model, likelihood, "auto", memory=memory).fit((x, y))
    assert posterior.structure.name == chosen
    assert str(sum(p.numel() for p in model.parameters())) in posterior.structure.reason
    assert posterior.structure.reason in str(posterior.summary())
    plain = lk.LaplacePosterior(model, likelihood, chosen).fit((x, y))
    assert torch.equal(posterior.precision.diag(), plain.precision.diag())
    assert lk.curvature.estimate(model, likelihood, (x, y), "auto", memory=memory).structure.name == chosen
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert (loaded.structure.name, loaded.structure.reason) == (chosen, posterior.structure.reason)
    assert not plain.structure.reason


def test_auto_chooses_anew_at_every_fit() -> None:
    torch.manual_seed(0)
    model = net(40, 60, 3)
    posterior = lk.LaplacePosterior(model, "categorical", "auto").fit(blobs(40, 3))
    assert posterior.structure.name == "kron"
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert posterior.fit(blobs(40, 3)).structure.name == "full"


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("structure", ["full", "layer", "kron", "ekfac", "lowrank", "diag"])
def test_what_does_not_fit_is_refused_with_what_does(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, (x, y) = net(8, 300, 3), blobs(8, 3)
    monkeypatch.setattr(base, "LITTLE", 0)
    monkeypatch.setattr(base, "memory_limit", lambda device: 2**10)
    posterior = lk.LaplacePosterior(model, "categorical", structure)
    with pytest.raises(lk.errors.IncompatiblePair, match=rf"{structure}.*3603 parameters.*iB.*Subnetwork\(size=9\)"):
        posterior.fit((x, y))
    with pytest.raises(lk.errors.NotFitted):
        posterior.sample(1)
    monkeypatch.setattr(base, "memory_limit", lambda device: 20 * 2**20)
    if structure == "full":
        with pytest.raises(lk.errors.IncompatiblePair, match=r"diag.*kron.*parameters=.*2\.weight"):
            posterior.fit((x, y))
    elif structure != "layer":
        posterior.fit((x, y))


def test_memory_of_a_machine() -> None:
    assert base.memory_limit(torch.device("cpu")) > 2**20


def test_bytes_are_counted_of_what_is_kept() -> None:
    """The estimate is at least the sums themselves, and not out of proportion."""
    problem = BY_NAME["conv2d-groups"].make()
    for name in ("full", "layer", "kron", "ekfac", "lowrank", "diag"):
        stats = estimate(problem, structure=name)
        kept = sum(part.numel() * 8 for parts in stats.sums.values() for part in parts)
        needed = STRUCTURES[name]().memory(stats.blocks, stats.layout, 8)
        assert kept <= needed <= 8 * kept + 4096, name


def test_blockwise_of_low_rank_is_one_block() -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    posterior = lk.LaplacePosterior(problem.model, "categorical", "lowrank", rank=3).fit(problem.uneven())
    precision = posterior.precision
    assert isinstance(precision, Blockwise)
    ((_, matrix),) = precision.entries
    assert isinstance(matrix, LowRank) and matrix.vectors.shape == (problem.size, 3)
    eye = torch.eye(3).double()
    close(matrix.vectors.T @ matrix.vectors, eye)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("structure", [*MORE, "auto", "subnetwork"])
def test_device_follows_the_model(structure: str) -> None:
    problem = BY_NAME["conv2d-groups"].make()
    options: dict[str, Any] = {"structure": structure}
    if structure == "subnetwork":
        options = {"parameters": lk.Subnetwork(7)}
    cpu = lk.LaplacePosterior(problem.model, "categorical", **options).fit(problem.uneven())
    problem.model.cuda()
    data = [tuple(t.cuda() for t in batch) for batch in problem.uneven()]
    gpu = lk.LaplacePosterior(problem.model, "categorical", **options).fit(data)
    dense = gpu.precision.dense()
    assert dense.is_cuda
    close(dense.cpu(), cpu.precision.dense(), 1e-7)
    assert all(value.is_cuda for value in gpu.sample(2).values())
    gpu.predict(data[0][0], method="mc", samples=2)
    float(gpu.log_evidence())


def test_bases_of_one_pair_of_factors_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the sum of one product, by a decomposition each and no further product; null spaces are settled."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2, 6, generator=rng, dtype=torch.float64)  # of rank 4: two directions of nothing
    a, g = torch.einsum("nri,nrj->rij", rows, rows), torch.rand(2, 3, generator=rng, dtype=torch.float64)
    parts = (a, g, torch.ones((), dtype=torch.float64))
    slow = ekfac.SpectralBlock.of_sum([(g, a)], "b").inputs.matrix
    assert slow is not None
    slow = ekfac._settled(slow, ekfac._along(slow, a)[None])
    monkeypatch.setattr(ekfac.SpectralBlock, "of_sum", lambda *given: pytest.fail("as a sum"))
    inputs, outputs = ekfac._bases("b", parts)
    assert outputs.numel() == 0
    torch.testing.assert_close(inputs.mT @ inputs, torch.eye(6).double().expand(2, 6, 6), rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs.mT @ a @ inputs, torch.diag_embed(torch.linalg.eigvalsh(a)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inputs[..., :2].abs(), slow[..., :2].abs(), rtol=1e-7, atol=1e-9)


def test_a_whole_matrix_is_put_in_order_by_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    data = torch.randn(6, 3).double(), torch.arange(6) % 2
    whole = lk.LaplacePosterior(model, "categorical", "full").fit(data).curvature.dense()
    monkeypatch.setattr(full, "ROWS", 3)
    again = lk.LaplacePosterior(model, "categorical", "full").fit(data).curvature.dense()
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    torch.testing.assert_close(again, oracles.dense_ggn(model, *data, oracles.categorical_nll), rtol=1e-9, atol=1e-12)
