"""Half Grams: each width against whole products, in the memory that sums are kept in, and who keeps them there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.structures import full
from laplace_kf.structures.base import STRUCTURES
from laplace_kf.tape import EntryLayout, grams
from laplace_kf.tape.blocks import flat_layout
from tests import oracles
from tests.cases import labels, normal
from tests.checks import close

WIDTHS = (1, 5, 127, 128, 129, 136, 257, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_every_width(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        total = grams.triangles(torch.zeros((), dtype=dtype), 2, width, width)
        assert total.shape == (2, width, width) and total.dtype == dtype and not bool(total.any())
        rows = [normal(9, width, seed=width + k).to(dtype) for k in range(3)]
        for part in rows:
            grams.add_gram(total[1], part, alpha=0.5)
        wanted = 0.5 * sum(torch.einsum("ki,kj->ij", part.double(), part.double()) for part in rows)
        found = grams.symmetrised(total)
        close(found[1].double(), wanted, 1e-5 if dtype == torch.float32 else 1e-13)
        assert not bool(found[0].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_sums_begin_at_whole_lines(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        total = grams.triangles(torch.zeros((), dtype=dtype), 3, width, width)
        size = dtype.itemsize
        assert total.stride() == (width * total.stride(1), grams.row_length(width, size), 1)
        if width <= grams.LEAF:  # they are multiplied as a whole, and there is nothing to win
            assert total.is_contiguous()
        else:
            assert total.stride(1) * size % grams.LINE == 0
            assert total.stride(1) * size < width * size + grams.LINE


def wide(inputs: int = 130, hidden: int = 140) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double().eval()


X, Y = normal(5, 130, seed=1), labels(3, 5, seed=2)
BATCHES = [(X[:3], Y[:3]), (X[3:], Y[3:])]


def strides(statistics: Any) -> dict[tuple[str, int], int]:
    """Of the rows of every square sum wider than a strip."""
    return {
        (name, k): part.stride(-2)
        for name, parts in statistics.sums.items()
        for k, part in enumerate(parts)
        if part.dim() >= 2 and part.shape[-1] == part.shape[-2] > grams.LEAF
    }


def test_factors_are_summed_there_and_are_the_oracles() -> None:
    model = wide()
    found = lk.curvature.estimate(model, "categorical", BATCHES, "kron")
    assert strides(found) == {("0", 0): 136, ("0", 1): 144, ("2", 0): 144}  # 131, 140 and 141 wide
    blocks = oracles.kron_blocks(model, X, Y, oracles.output_hessian(oracles.categorical_nll))
    mine = {block.name: matrix for block, matrix in found.mean().entries}
    for block, name in zip(blocks, ("0", "2"), strict=True):
        close(mine[name].inputs[0], block.A, 1e-12)
        close(mine[name].outputs[0], block.G, 1e-12)


@pytest.mark.parametrize("parameters", ["all", lk.Subnetwork(133)], ids=["whole", "entries"])
def test_dense_matrices_are_summed_there(parameters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are put into another order afterwards."""
    seen: list[int] = []
    add = grams.add_gram
    monkeypatch.setattr(full, "add_gram", lambda total, rows: (seen.append(total.stride(0)), add(total, rows)))
    model = wide(30, 5)  # 173 parameters
    data = [(x[:, :30], y) for x, y in BATCHES]
    posterior = lk.LaplacePosterior(model, "categorical", "full", parameters=parameters).fit(data)
    assert set(seen) == {176 if parameters == "all" else 136}
    whole = oracles.dense_ggn(model, X[:, :30], Y, oracles.categorical_nll)
    layout = posterior.curvature.layout
    named = dict(model.named_parameters())
    kept = layout.within(flat_layout(named, list(named))) if isinstance(layout, EntryLayout) else torch.arange(173)
    close(posterior.curvature.dense(), whole[kept][:, kept], 1e-12)


def test_dense_blocks_of_vectors_are_summed_there() -> None:
    model = nn.Sequential(wide(), nn.Linear(3, 150), nn.LayerNorm(150), nn.Linear(150, 3)).double()
    found = lk.curvature.estimate(model, "categorical", BATCHES, STRUCTURES["kron"](vector_blocks="full"))
    assert strides(found)["2", 0] == 304  # gain and shift: 300


def test_bytes_of_whole_lines_are_counted() -> None:
    """Factors, and their eigenvectors in rows of their own length; and the grid of a precision."""
    model = wide()
    found = lk.curvature.estimate(model, "categorical", BATCHES, "kron")
    held = sum(part.untyped_storage().nbytes() for parts in found.sums.values() for part in parts if part.dim())
    vectors = sum(side**2 for side in STRUCTURES["kron"]().sides(found.blocks, found.layout))
    grids = sum(block.size for block in found.blocks.values())
    needed = STRUCTURES["kron"]().memory(found.blocks, found.layout, 8)
    assert needed == held + 8 * (vectors + grids)


def factors(curvature: Any) -> list[Tensor]:
    return [factor for _, matrix in curvature.entries for factor in (matrix.inputs, matrix.outputs)]


def test_they_are_copied_saved_and_merged_as_others_are(tmp_path: Path) -> None:
    posterior = lk.LaplacePosterior(wide(), "categorical").fit(BATCHES)
    wanted = factors(posterior.curvature)
    posterior.save(tmp_path / "kept")
    again = lk.LaplacePosterior.load(tmp_path / "kept", wide())
    for other in (copy.deepcopy(posterior), again):
        for mine, theirs in zip(factors(other.curvature), wanted, strict=True):
            assert torch.equal(mine, theirs)
    one, two = (lk.curvature.estimate(wide(), "categorical", [batch]) for batch in BATCHES)
    for mine, theirs in zip(factors((one + two).mean()), wanted, strict=True):
        close(mine, theirs, 1e-12)
