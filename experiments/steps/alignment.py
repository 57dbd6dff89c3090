"""What E16 and E17 share: cosines of approximate updates with exact Gauss-Newton steps along a KFRA trajectory.

Every few steps of KFRA, updates by KFAC and KFRA factors, each with the exact and the factored damped inverse, are
compared with the steps of ``G + λ I`` by conjugate gradients: for the block of every layer, and for the full matrix.

Source: Botev 2020, 4.5.2, figures 4.2 and 4.3; Botev et al. 2017, appendix F.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.steps.problem import LIKELIHOOD, AutoencoderConfig, inverse, load, slope
from laplace_kf.diagnostics.base import cosine

__all__ = ["UPDATES", "AlignmentConfig", "cosines"]

UPDATES = {
    "KFRA, exact inverse": ("recursive", "exact"),
    "KFRA, factored": ("recursive", "balanced"),
    "KFAC, exact inverse": ("sampled", "exact"),
    "KFAC, factored": ("sampled", "balanced"),
}


@dataclass
class AlignmentConfig(AutoencoderConfig):
    """Settings of E16 and E17.

    Args:
        steps: of KFRA.
        every: steps between two comparisons.
        batch: images of a step and of a comparison; published: 1000.
        cg_steps: of conjugate gradients at most.
    """

    steps: int = 30
    every: int = 10
    batch: int = 500
    cg_steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        require("every", self.every, 1 <= self.every <= self.steps, "from 1 to steps")
        require("batch", self.batch, 1 <= self.batch <= self.count, "from 1 to count")
        require("cg_steps", self.cg_steps, self.cg_steps >= 1, "at least 1")


def cosines(config: AlignmentConfig, seed: int) -> list[dict[str, dict[str, float]]]:
    """By comparison: cosines by update (``block Gauss-Newton`` is one), and by ``full, blocks`` and layer."""
    model, images = load(config, seed)
    rng = training.generator(seed)
    optimizer = lk.optim.kfra(model, LIKELIHOOD, l2=config.l2, search_start=True, generator=rng)
    batches = training.Batches(images, images, config.batch, rng)
    found: list[dict[str, dict[str, float]]] = []
    step = 0
    while step < config.steps:
        for batch in batches:
            if len(batch[0]) < config.batch or step == config.steps:
                continue
            optimizer.step(*batch)
            step += 1
            if step % config.every == 0:
                found.append(_compared(config, model, batch[0], optimizer, rng))
    return found


def _compared(
    config: AlignmentConfig, model: nn.Module, x: Tensor, optimizer: lk.optim.GaussNewton, rng: torch.Generator
) -> dict[str, dict[str, float]]:
    damping = optimizer.diagnostics
    gradient = slope(model, x, config.l2)
    exact = lk.diagnostics.gauss_newton_steps(
        model, LIKELIHOOD, (x, x), float(damping["tau"]) + config.l2, steps=config.cg_steps
    )
    rows = {"block Gauss-Newton": {"full": cosine(exact.blocks, exact.full)}}
    for name, (estimator, kind) in UPDATES.items():
        statistics = lk.curvature.estimate(model, LIKELIHOOD, (x, x), "kron", estimator, generator=rng)
        update = -inverse(statistics, float(damping["zeta"]) + config.l2, kind).solve(gradient)
        layers = {m: cosine(update[at], exact.blocks[at]) for m, at in exact.modules.items()}
        rows[name] = {"full": cosine(update, exact.full), "blocks": cosine(update, exact.blocks), **layers}
    return rows
