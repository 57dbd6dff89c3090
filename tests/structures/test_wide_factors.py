"""The Kronecker structure with output factors wider than ``max_side``: fits, sums, chains, files, optimisers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.operators import KroneckerBlock, WideBlock
from laplace_kf.optim import GaussNewton
from laplace_kf.structures.kron import Kronecker

CLASSES = 40

pytestmark = pytest.mark.filterwarnings("ignore:structure")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def data(seed: int = 1, count: int = 30) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, 3, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (count,), generator=rng)


def wide(rank: int = 8) -> Kronecker:
    return Kronecker(max_side=10, wide_rank=rank)


def head(posterior: Any) -> Any:
    return {block.name: matrix for block, matrix in posterior.curvature.entries}["2"]


def fitted(structure: Any, estimator: str = "exact", **options: Any) -> Any:
    return lk.LaplacePosterior(model(), "categorical", structure, estimator, **options).fit(
        data(), generator=torch.Generator().manual_seed(2)
    )


@pytest.mark.parametrize("estimator", ["exact", "sampled", "projection", "recursive"])
@pytest.mark.parametrize("parameters", ["all", "last_layer"])
def test_the_factor_is_near_the_whole_one(estimator: str, parameters: str) -> None:
    """By columns, by the closed forms of the last layer, and by output factors that are passed back."""
    whole = head(fitted(Kronecker(), estimator, parameters=parameters))
    found = head(fitted(wide(), estimator, parameters=parameters))
    assert isinstance(whole, KroneckerBlock) and isinstance(found, WideBlock)
    torch.testing.assert_close(found.inputs, whole.inputs)
    torch.testing.assert_close(found.outputs.diagonal(), whole.outputs.diagonal(dim1=1, dim2=2))
    g, near = whole.outputs[0], found.outputs.dense()[0]
    alone = float((g - torch.diag(g.diagonal())).norm() / g.norm())
    error = float((g - near).norm() / g.norm())
    assert error < 0.7 * alone
    assert 0.4 * error < found.outputs.error < 2.5 * error


def test_without_a_low_rank_the_diagonal_is_kept() -> None:
    found, whole = head(fitted(wide(0))), head(fitted(Kronecker()))
    assert isinstance(found, KroneckerBlock)
    torch.testing.assert_close(found.outputs, whole.outputs.diagonal(dim1=1, dim2=2))


def test_a_low_rank_that_says_nothing_leaves_the_fast_paths() -> None:
    """Outputs that have no curvature in common: rank 0, and the precision is the spectral one."""
    x, _ = data()
    network = nn.Linear(3, CLASSES).double()
    posterior = lk.LaplacePosterior(network, "bernoulli", wide()).fit((x, torch.zeros(len(x), CLASSES).double()))
    block = posterior.curvature.entries[0][1]
    assert isinstance(block, WideBlock) and block.outputs.rank == 0
    plain = lk.LaplacePosterior(network, "bernoulli", wide(0)).fit((x, torch.zeros(len(x), CLASSES).double()))
    assert type(posterior.precision.entries[0][1]) is type(plain.precision.entries[0][1])
    torch.testing.assert_close(posterior.log_evidence(), plain.log_evidence())


def test_the_error_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"output factor of 40 rows, more than max_side=10, with a low rank of at most 8"
    ):
        posterior = fitted(wide())
    factor = head(posterior).outputs
    row = next(row for row in posterior.summary() if row.name == "2")
    assert (
        f"relative Frobenius error of the output factor {factor.error:.2g} with a low rank of {factor.rank}" in row.note
    )
    assert f"{factor.of_diagonal:.2g} without (estimated along 8 directions)" in row.note
    assert row.structure == f"kron, G: rank {factor.rank} + diag"


def test_sums_of_two_data_sets_are_those_of_both() -> None:
    network = model()
    x, y = data()
    parts = [(x[:10], y[:10]), (x[10:], y[10:])]
    one, two, both = (
        lk.curvature.estimate(network, "categorical", batches, wide()) for batches in (parts[:1], parts[1:], parts)
    )
    torch.testing.assert_close((one + two).mean().dense(), both.mean().dense())
    # a file of a release without the sketch: what both know is the diagonal
    old = lk.curvature.estimate(network, "categorical", parts[1:], wide(0))
    plain = lk.curvature.estimate(network, "categorical", parts, wide(0))
    torch.testing.assert_close((one + old).mean().dense(), plain.mean().dense())
    torch.testing.assert_close((old + one).mean().dense(), plain.mean().dense())
    # and of another rank
    other = lk.curvature.estimate(network, "categorical", parts[1:], wide(3))
    torch.testing.assert_close((one + other).mean().dense(), plain.mean().dense())


def test_files(tmp_path: Path) -> None:
    posterior = fitted(wide(), parameters="last_layer")
    posterior.save(tmp_path / "file")
    again = lk.LaplacePosterior.load(tmp_path / "file", posterior.model)
    torch.testing.assert_close(again.precision.dense(), posterior.precision.dense())
    assert str(again.summary()) == str(posterior.summary())


def test_chains_keep_the_terms_and_refuse_to_make_one_of_them(tmp_path: Path) -> None:
    posterior = fitted(wide(), parameters="last_layer")
    first = posterior.precision.dense()
    chained = posterior.update(data(5), generator=torch.Generator().manual_seed(0))
    fresh = lk.LaplacePosterior(copy.deepcopy(posterior.model), "categorical", wide(), parameters="last_layer")
    newest = fresh.fit(data(5)).curvature.dense()
    torch.testing.assert_close(chained.precision.dense(), first + 30 * newest)
    draws = chained.sample(4000, generator=torch.Generator().manual_seed(1))
    flat = torch.cat([draws[name].flatten(1) for name in chained.mean], 1)
    white = flat - torch.cat([part.flatten() for part in chained.mean.values()])
    white = white @ torch.linalg.cholesky(first + 30 * newest)
    assert abs(float(white.square().mean()) - 1) < 0.02
    chained.save(tmp_path / "chain")
    again = lk.LaplacePosterior.load(tmp_path / "chain", chained.model)
    torch.testing.assert_close(again.precision.dense(), chained.precision.dense())
    with pytest.raises(IncompatiblePair, match="no single product"):
        posterior.update(data(5), terms="project")


def test_what_needs_eigenbases_keeps_the_diagonal() -> None:
    """Optimisers invert their factors every few steps; eigenvalue-corrected factors have no basis for a low rank."""
    optimizer = GaussNewton(model(), "categorical", structure="kron", max_side=10)
    assert optimizer.structure.options()["wide_rank"] == 0
    optimizer.step(*data())
    ekfac = fitted("ekfac", max_side=10)
    assert "wide_rank" not in ekfac.structure.options()
    assert "low rank" not in str(ekfac.summary())


def test_bad_ranks() -> None:
    with pytest.raises(InvalidArgument, match="wide_rank"):
        Kronecker(wide_rank=-1)


@pytest.mark.parametrize("method", ["linearized", "mc", "probit"])
def test_predictions_of_the_whole_network(method: str) -> None:
    """Not only of a last layer: through per-example gradients and draws of weights."""
    posterior = fitted(wide())
    x, _ = data()
    found = posterior.predict(x[:3], method=method, samples=2000, generator=torch.Generator().manual_seed(0))
    dense = posterior.functional_covariance(x[:3])
    jacobian = torch.func.vmap(
        lambda one: torch.cat(
            [
                part.flatten(1)
                for part in torch.func.jacrev(
                    lambda w: torch.func.functional_call(posterior.model, w, (one[None],))[0]
                )(dict(posterior.mean)).values()
            ],
            1,
        )
    )(x[:3])
    wanted = jacobian @ torch.linalg.inv(posterior.precision.dense()) @ jacobian.mT
    torch.testing.assert_close(dense, wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.probs.sum(1), torch.ones(3).double())
