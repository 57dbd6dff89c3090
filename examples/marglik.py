"""Training by the marginal likelihood: weight decay of every layer and the noise level learned without validation data.

While a network trains, a Laplace posterior is fitted every few epochs and its log evidence is climbed in the logarithms
of the prior precisions ``λ_l`` (one for every layer) and of the noise scale ``σ`` (methods 9.4; MacKay 1992). Nothing
is held out. Against that, the same network is trained with fixed ``λ`` and the true ``σ``: the evidence should end near
the ``λ`` that is best on test data, which it never sees. (It is no magic: with a third of these data it can settle for
a simpler function and more noise.)

The gradient in ``log σ`` is autograd's, through ``posterior.log_evidence()``. That in ``log λ_l`` is
``½ (γ_l - λ_l ‖θ_l‖²)``, where ``γ_l`` is the layer's effective number of parameters, which ``posterior.summary()``
gives: what differentiating ``log_evidence`` comes to for a block-diagonal posterior.

Run it with ``python -m examples.marglik [--out DIR]`` (a minute). Needs the ``experiments`` extra.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.reports import plots, private_rng
from laplace_kf.reports.style import colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trained", "data", "evidence_gradient", "held_out_nll", "linearized", "main", "network", "run", "train"]

NOISE = 0.3
"""Standard deviation of the noise in the data."""
GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Fixed prior precisions that the learned ones are compared with."""

Pair = tuple[Tensor, Tensor]


@dataclass
class Trained:
    """A trained network with its posterior, and what was recorded on the way (one entry for every posterior fit)."""

    posterior: lk.LaplacePosterior
    epochs: list[int] = field(default_factory=list)
    log_evidence: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    prior_precision: list[dict[str, float]] = field(default_factory=list)


def data(count: int, seed: int) -> Pair:
    """``y = sin 2x + ε`` at ``x`` uniform on [-3, 3] without its middle third: inputs and targets ``(N, 1)``."""
    rng = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.rand(count, 1, generator=rng, dtype=torch.float64)
    x = x * (1 - 2 * torch.randint(2, (count, 1), generator=rng))
    return x, torch.sin(2 * x) + NOISE * torch.randn(count, 1, generator=rng, dtype=torch.float64)


def network(hidden: int, seed: int) -> nn.Sequential:
    """A 1-H-H-1 tanh network in float64."""
    with private_rng(seed):
        return nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        ).double()  # fmt: skip


def evidence_gradient(posterior: lk.LaplacePosterior, log_noise: Tensor) -> tuple[dict[str, float], float]:
    """Gradient of the log evidence in ``log λ_l`` by layer name, and in ``log σ``.

    Args:
        posterior: fitted, with ``prior_precision = {"<layer>.*": λ_l}`` and a Gaussian likelihood.
        log_noise: 0-dim ``log σ``.
    """
    mean = posterior.mean
    slopes = {}
    for row in posterior.summary():
        lam = posterior.prior_precision[f"{row.name}.*"]  # type: ignore[index]
        squares = sum(float(mean[name].square().sum()) for name in row.parameters)
        slopes[row.name] = (row.effective - float(lam) * squares) / 2
    leaf = log_noise.detach().clone().requires_grad_()
    posterior.likelihood.scale = leaf.exp()  # type: ignore[attr-defined]
    (slope,) = torch.autograd.grad(posterior.log_evidence(), leaf)
    posterior.likelihood.scale = math.exp(float(log_noise))  # type: ignore[attr-defined]
    return slopes, float(slope)


def train(
    train_data: Pair,
    *,
    hidden: int = 30,
    epochs: int = 2000,
    every: int = 100,
    burn_in: int = 500,
    hyper_steps: int = 20,
    rate: float = 0.1,
    prior_precision: float = 1.0,
    noise: float = 1.0,
    learn: bool = True,
    seed: int = 0,
) -> Trained:
    """Full-batch training; with ``learn``, prior precisions and noise follow the evidence.

    Args:
        train_data: inputs and targets ``(N, 1)``.
        hidden: width H.
        epochs: steps of Adam on the weights.
        every: epochs between posterior fits.
        burn_in: epochs before the first one. A network that fits nothing yet looks like noise to the evidence, and
            large ``σ`` and ``λ`` would keep it so.
        hyper_steps: steps up the evidence after each fit.
        rate: size of the first of these steps, in the logarithms.
        prior_precision: the first ``λ_l`` of every layer, or the fixed one.
        noise: the first ``σ``, or the fixed one.
        learn: whether to learn them.
        seed: of the initial weights.
    """
    x, y = train_data
    model = network(hidden, seed)
    likelihood = lk.likelihoods.Gaussian(scale=noise)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    precisions = dict.fromkeys(layers, prior_precision)
    log_noise = torch.tensor(math.log(noise), dtype=torch.float64)
    posterior = lk.LaplacePosterior(model, likelihood, structure="kron", prior_precision=_patterns(precisions))
    result = Trained(posterior)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        decay = sum(
            precisions[name] * p.square().sum() for name in layers for p in model.get_submodule(name).parameters()
        )
        loss = (decay / 2 - likelihood.log_prob(model(x), y).sum()) / len(x)
        loss.backward()
        optimizer.step()
        cosine.step()
        if epoch != epochs and (epoch < burn_in or epoch % every):
            continue
        posterior.fit((x, y))
        # resilient steps look at signs only: the evidence is a hundred times more curved in σ than in λ
        logs = torch.tensor([*map(math.log, precisions.values()), float(log_noise)], dtype=torch.float64)
        climber = torch.optim.Rprop([logs], lr=rate, step_sizes=(1e-6, 0.5), maximize=True)
        for _ in range(hyper_steps if learn else 0):
            slopes, slope = evidence_gradient(posterior, log_noise)
            logs.grad = torch.tensor([*(slopes[name] for name in layers), slope], dtype=torch.float64)
            climber.step()
            precisions = dict(zip(layers, logs[:-1].exp().tolist(), strict=True))
            log_noise = logs[-1].clone()
            likelihood.scale = math.exp(float(log_noise))
            posterior.prior_precision = _patterns(precisions)
        result.epochs.append(epoch)
        result.log_evidence.append(float(posterior.log_evidence()))
        result.noise.append(math.exp(float(log_noise)))
        result.prior_precision.append(dict(precisions))
    return result


def _patterns(precisions: dict[str, float]) -> dict[str, float]:
    return {f"{name}.*": value for name, value in precisions.items()}


def linearized(posterior: lk.LaplacePosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and epistemic variance, ``(N,)`` each, of the linearised network at ``x (N, 1)``: ``f`` and ``J Λ⁻¹ Jᵀ``.

    The evidence of a Laplace posterior is that of this model, whose Gauss-Newton matrix is exact.
    """
    weights = posterior.mean

    def output(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(posterior.model, parameters, (inputs[None],))
        return value[0, 0]

    rows = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(weights, x)
    jacobian = torch.cat([rows[name].reshape(len(x), -1) for name in weights], 1)
    with torch.no_grad():
        mean = torch.func.functional_call(posterior.model, weights, (x,))[:, 0]
    return mean, (jacobian * posterior.precision.solve(jacobian.T).T).sum(1)


def held_out_nll(posterior: lk.LaplacePosterior, test_data: Pair) -> float:
    """Mean negative log density in nats of test data ``(N, 1)`` under the linearised prediction."""
    x, y = test_data
    mean, variance = linearized(posterior, x)
    total = variance + posterior.likelihood.scale**2  # type: ignore[attr-defined]
    return float(0.5 * ((y[:, 0] - mean).square() / total + total.log() + math.log(2 * math.pi)).mean())


def run(
    out: Path | None = None, *, count: int = 150, epochs: int = 2000, seed: int = 0, grid: Sequence[float] = GRID
) -> dict[str, object]:
    """Learned against fixed prior precisions; writes ``marglik.json`` and ``marglik.png`` into ``out``, if given."""
    train_data, test_data = data(count, seed), data(1000, seed + 1000)
    learned = train(train_data, epochs=epochs, seed=seed)
    fixed = {
        lam: train(train_data, epochs=epochs, burn_in=epochs, prior_precision=lam, noise=NOISE, learn=False, seed=seed)
        for lam in grid
    }
    result: dict[str, object] = {
        "noise": {"true": NOISE, "learned": learned.noise[-1]},
        "prior_precision": learned.prior_precision[-1],
        "log_evidence": {"first": learned.log_evidence[0], "last": learned.log_evidence[-1]},
        "test_nll": {"learned": held_out_nll(learned.posterior, test_data),
                     "fixed": {f"{lam:g}": held_out_nll(found.posterior, test_data) for lam, found in fixed.items()}},
        "fixed_log_evidence": {f"{lam:g}": found.log_evidence[-1] for lam, found in fixed.items()},
    }  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "marglik.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        _picture(learned, fixed, train_data, result).savefig(out / "marglik.png", dpi=150, metadata={"Software": None})
    return result


def _picture(learned: Trained, fixed: dict[float, Trained], train_data: Pair, result: dict[str, object]) -> Figure:
    figure, (left, middle, right) = plots.panels(1, 3, width=4.4, height=4.4)
    layers = [f"λ of layer {name}" for name in learned.prior_precision[0]]
    for name, label in zip(learned.prior_precision[0], layers, strict=True):
        values = [row[name] for row in learned.prior_precision]
        left.plot(learned.epochs, values, label=label, linewidth=2, color=colour(label, layers))
    left.plot(learned.epochs, learned.noise, label="noise σ", linewidth=2, color="#1c2430")
    left.axhline(NOISE, color="#1c2430", linewidth=1, linestyle=(0, (5, 2)), label="true σ")
    left.set_yscale("log")
    ticks = [0.1, 0.2, 0.3, 0.5, 1, 2, 5]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    highest = max(value for row in learned.prior_precision for value in row.values())
    left.set_ylim(0.2, max(2.0, 1.2 * highest))
    left.set_xlabel("epoch")
    left.set_ylabel("learned value")
    left.set_title("learned while training", loc="left", fontsize=11)
    scores = result["test_nll"]
    assert isinstance(scores, dict)
    middle.plot(
        list(fixed), list(scores["fixed"].values()), "o-", color="#e08e0b", linewidth=2, label="fixed λ, true σ"
    )
    middle.axhline(scores["learned"], color="#c8417a", linewidth=2, label="λ and σ from the evidence")
    middle.set_xscale("log")
    middle.margins(y=0.12)
    middle.set_xlabel("fixed prior precision λ")
    middle.set_ylabel("test NLL (nats per point)")
    middle.set_title("on test data", loc="left", fontsize=11)
    grid = torch.linspace(-4, 4, 161, dtype=torch.float64)
    mean, variance = linearized(learned.posterior, grid[:, None])
    plots.regression_band(
        grid, mean, variance.sqrt(), (variance + learned.noise[-1] ** 2).sqrt(), points=train_data,
        truth=torch.sin(2 * grid), axis=right, title="linearised prediction", labels=("x", "y"), limits=(-3, 3),
    )  # fmt: skip
    plots.legend_below(figure, columns=4)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m examples.marglik", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("results/marglik"), help="where to write (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(run(chosen.out), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
