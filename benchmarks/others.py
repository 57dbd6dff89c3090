"""The same jobs by other libraries, each imported only here; one that is not installed is said to be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.networks import Problem

__all__ = ["FITS", "asdl_steps"]

Job = Callable[[], Any]
LOSSES = {"categorical": nn.CrossEntropyLoss, "gaussian": nn.MSELoss, "bernoulli": nn.BCEWithLogitsLoss}


def curvlinops(problem: Problem, structure: str, sampled: bool) -> Job | None:
    """Kronecker factors by curvlinops."""
    if structure != "kron":
        return None
    from curvlinops import KFACLinearOperator

    weights = [p for p in problem.model.parameters() if p.requires_grad]
    loss = LOSSES[problem.likelihood](reduction="sum")
    count = sum(len(x) for x, _ in problem.batches)

    def job() -> None:
        KFACLinearOperator(
            problem.model, loss, weights, problem.batches, fisher_type="mc" if sampled else "type-2",
            check_deterministic=False, num_data=count, num_per_example_loss_terms=1,
        ).compute_kronecker_factors()  # fmt: skip

    return job


def backpack(problem: Problem, structure: str, sampled: bool) -> Job | None:
    """Diagonals and factors by BackPACK, of networks whose layers it has rules for."""
    if not isinstance(problem.model, nn.Sequential):
        return None
    from backpack import backpack as within
    from backpack import extend
    from backpack.extensions import KFAC, KFLR, DiagGGNExact, DiagGGNMC

    kinds = {("diag", False): DiagGGNExact, ("diag", True): DiagGGNMC, ("kron", False): KFLR, ("kron", True): KFAC}
    model, loss = extend(problem.model), extend(LOSSES[problem.likelihood](reduction="sum"))

    def job() -> None:
        for x, y in problem.batches:
            model.zero_grad()
            with within(kinds[structure, sampled]()):
                loss(model(x), y).backward()

    return job


def nngeometry(problem: Problem, structure: str, sampled: bool) -> Job | None:
    """Diagonals and factors by nngeometry, exact, of dense networks."""
    if sampled or problem.likelihood == "bernoulli":
        return None
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatDiag, PMatKFAC

    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(problem.batches[0][0]))
    variant = "classif_logits" if problem.likelihood == "categorical" else "regression"
    kind = PMatDiag if structure == "diag" else PMatKFAC
    return lambda: FIM(problem.model, loader, kind, variant=variant)


FITS: dict[str, Callable[[Problem, str, bool], Job | None]] = {
    "curvlinops": curvlinops, "BackPACK": backpack, "nngeometry": nngeometry,
}  # fmt: skip


def asdl_steps(problem: Problem, refresh: int) -> Callable[[int], Any]:
    """asdfghjkl's K-FAC steps with empirical factors, without momentum or step length."""
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    torch.cuda.nvtx.range_push = lambda *given, **more: 0  # asdl calls it without CUDA, which a CPU build refuses
    torch.cuda.nvtx.range_pop = lambda: 0
    loss = F.cross_entropy if problem.likelihood == "categorical" else F.binary_cross_entropy_with_logits
    optimizer = torch.optim.SGD(problem.model.parameters(), 1e-4)
    settings = PreconditioningConfig(
        data_size=len(problem.batches[0][0]), damping=1e-2, ema_decay=0.95, preconditioner_upd_interval=refresh,
        curvature_upd_interval=refresh,
    )  # fmt: skip
    more = {} if problem.likelihood == "categorical" else {"loss_type": "mse"}
    maker = KfacGradientMaker(problem.model, settings, fisher_type=FISHER_EMP, **more)

    def step(number: int) -> None:
        x, y = problem.batches[number % len(problem.batches)]
        optimizer.zero_grad()
        dummy = maker.setup_model_call(problem.model, x)
        maker.setup_loss_call(loss, dummy, y)
        maker.forward_and_backward()
        optimizer.step()

    return step
