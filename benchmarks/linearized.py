"""Cost of the linearised predictive for one input, in training examples: 784-1024-1024-10, one thread, float32.

The unit is forward, loss and backward of one training example (batches of 250), measured in turn in the same process.
laplace-torch's ``J Λ⁻¹ Jᵀ`` is measured beside it, for as few inputs as it finishes in reasonable time and memory.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from benchmarks.workload import peak_bytes, wide_mlp
from laplace_kf.predictive import Linearization

INPUTS, BATCH, PEER_INPUTS = 1000, 250, 2
GRID = [(n, p) for n in (1e3, 1e4, 1e5, 1e6) for p in (0.1, 1.0, 10.0, 100.0, 1000.0)]
TARGETS = {"covariance of an input, in training examples": 12.0, "20 precisions, in linearised passes": 1.5}
MEMORY_TARGET = 2**30


def run(rounds: int = 5) -> dict[str, Any]:
    """Costs as ratios to training examples and to one linearised pass, and the growth of the peak memory."""
    torch.set_num_threads(1)
    model, x, y, batches = wide_mlp(INPUTS, BATCH)
    posterior = lk.LaplacePosterior(model, "categorical").fit(batches)
    posterior.n_data = 10 * INPUTS
    posterior.precision.logdet()  # the decompositions belong to the fit

    def grid() -> None:
        network = Linearization(model, None, posterior.mean, x)
        network.covariances([posterior.precision_at(n, p) for n, p in GRID])

    before = peak_bytes()
    posterior.functional_covariance(x)
    growth = peak_bytes() - before
    seconds = in_turn(
        {
            "training epoch": lambda: epoch(model, batches),
            "functional_covariance": lambda: posterior.functional_covariance(x),
            "diagonal only": lambda: posterior.functional_covariance(x, diagonal_only=True),
            f"{len(GRID)} precisions": grid,
        },
        rounds,
    )
    costs = ratios(seconds, "training epoch")
    passes = ratios(seconds, "functional_covariance")[f"{len(GRID)} precisions"]
    found = {
        "covariance of an input, in training examples": costs["functional_covariance"]["ratio"],
        "20 precisions, in linearised passes": passes["ratio"],
    }
    return {
        "workload": f"784-1024-1024-10, Kronecker posterior, {INPUTS} inputs, one thread, float32",
        "unit": "processor seconds of as many training examples (forward, loss, backward; batch 250)",
        "costs": costs,
        "grid_in_linearised_passes": passes,
        "peak_growth_bytes": growth,
        "milliseconds_per_input": 1000 * costs["functional_covariance"]["seconds"] / INPUTS,
        "targets": {**TARGETS, "peak_growth_bytes": MEMORY_TARGET},
        "met": {
            **{name: found[name] <= limit for name, limit in TARGETS.items()},
            "peak_growth_bytes": growth <= MEMORY_TARGET,
        },
        "laplace-torch": _peer(model, x, y, costs["training epoch"]["seconds"] / INPUTS),
    }


def _peer(model: nn.Module, x: torch.Tensor, y: torch.Tensor, unit: float) -> dict[str, Any]:
    """laplace-torch's linearised predictive for a few inputs, per input in training examples."""
    try:
        from laplace import Laplace
    except ImportError as error:
        return {"not measured": f"laplace-torch cannot be imported: {error}"}
    data = torch.utils.data.TensorDataset(x[:BATCH], y[:BATCH])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
        peer.fit(torch.utils.data.DataLoader(data, batch_size=BATCH))
        seconds = in_turn({"glm": lambda: peer(x[:PEER_INPUTS], pred_type="glm", link_approx="probit")}, 2)["glm"]
    each = sorted(seconds)[0] / PEER_INPUTS
    return {"inputs": PEER_INPUTS, "milliseconds_per_input": 1000 * each, "in_training_examples": each / unit}


def text(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [result["workload"], f"{'job':34} {'units':>7} {'min':>7} {'max':>7} {'seconds':>8}"]
    for name, cost in result["costs"].items():
        lines.append(
            f"{name:34} {cost['ratio']:7.2f} {cost['ratio_min']:7.2f} {cost['ratio_max']:7.2f} {cost['seconds']:8.2f}"
        )
    lines.append(f"{len(GRID)} precisions: {result['grid_in_linearised_passes']['ratio']:.2f} linearised passes")
    lines.append(f"{result['milliseconds_per_input']:.2f} ms an input")
    lines.append(f"peak memory grows by {result['peak_growth_bytes'] / 2**20:.0f} MiB")
    lines.append(f"laplace-torch: {result['laplace-torch']}")
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
