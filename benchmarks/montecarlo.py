"""Monte Carlo predictions: 30 draws of 784-1024-1024-10 at 1 to 1000 inputs, in every sampling space, one thread.

laplace-torch's Monte Carlo predictive (``pred_type="nn", link_approx="mc"``) is measured beside it, in turn in one
process, on the same curvature; the eigendecompositions of both are made before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import in_turn, ratios
from benchmarks.workload import wide_mlp

EXAMPLES, BATCH, DRAWS = 2000, 250, 30
INPUTS = (1, 10, 100, 1000)
SPACES = ("weights", "activations", "auto")
LIMITS = {"auto, 1 inputs": 1 / 20, "weights, 1000 inputs": 1 / 1.5, "auto, 1000 inputs": 1 / 1.5}


def run(rounds: int = 5) -> dict[str, Any]:
    """Processor seconds of every space and number of inputs, and their ratio to laplace-torch's."""
    torch.set_num_threads(1)
    model, x, y, batches = wide_mlp(EXAMPLES, BATCH)
    posterior = lk.LaplacePosterior(model, "categorical").fit(batches)
    posterior.precision.logdet()
    peer = _peer(model, x, y)
    result: dict[str, Any] = {
        "workload": f"784-1024-1024-10, Kronecker posterior, {DRAWS} draws, one thread, float32",
        "unit": "processor seconds of one prediction",
        "costs": {},
    }
    for count in INPUTS:
        inputs = x[:count]
        jobs: dict[str, Callable[[], Any]] = {
            space: partial(posterior.predict, inputs, method="mc", samples=DRAWS, space=space) for space in SPACES
        }
        predictor = posterior.predictor(samples=DRAWS)
        jobs["kept draws"] = partial(predictor, inputs)
        if not isinstance(peer, str):
            jobs["laplace-torch"] = partial(peer, inputs)
        costs = ratios(in_turn(jobs, rounds), "laplace-torch" if "laplace-torch" in jobs else "weights")
        result["costs"].update({f"{name}, {count} inputs": cost for name, cost in costs.items()})
    result["ratio"] = "to laplace-torch" if not isinstance(peer, str) else f'to "weights": {peer}'
    if not isinstance(peer, str):
        result["met"] = {name: result["costs"][name]["ratio"] <= limit for name, limit in LIMITS.items()}
    return result


def _peer(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Any] | str:
    """laplace-torch's Monte Carlo predictive, or why there is none."""
    try:
        from laplace import Laplace
    except ImportError as error:
        return f"laplace-torch cannot be imported: {error}"
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
        peer.fit(loader)
    return partial(peer, pred_type="nn", link_approx="mc", n_samples=DRAWS)


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'job':32} {'ms':>9} {'ratio':>8}   ({result['ratio']})"]
    for name, cost in result["costs"].items():
        lines.append(f"{name:32} {1000 * cost['seconds']:9.1f} {cost['ratio']:8.4f}")
    for name, met in result.get("met", {}).items():
        lines.append(f"{name}: at most {LIMITS[name]:.3f} of laplace-torch: {'met' if met else 'NOT met'}")
    return "\n".join(lines)
