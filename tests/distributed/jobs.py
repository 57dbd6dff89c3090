"""What the processes of the tests run. Each gives plain values: tensors travel as lists of numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

import laplace_kf as lk
from tests.distributed.problems import SHARES, data, network


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def group() -> Any:
    return dist.group.WORLD


def numbers(statistics: lk.curvature.Statistics) -> dict[str, Any]:
    """What statistics say, whatever the blocks' order and bases."""
    return {
        "dense": statistics.mean().dense().tolist(),
        "count": statistics.count,
        "log_likelihood": float(statistics.log_likelihood),
        "terms": statistics.terms,
    }


def digest(posterior: lk.LaplacePosterior) -> str:
    """Of everything a posterior holds, bit by bit."""
    tensors, _ = posterior.packed()
    text = b"".join(name.encode() + tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
    draw = posterior.sample(1, torch.Generator().manual_seed(0))
    text += b"".join(part.contiguous().numpy().tobytes() for part in draw.values())
    return hashlib.sha256(text).hexdigest()


def estimated(kind: str, share: str, structure: str, estimator: str, options: dict[str, Any]) -> Any:
    """Statistics over all shares."""
    rank, size = dist.get_rank(), dist.get_world_size()
    given = SHARES[share](*data(kind), rank, size)
    found = lk.curvature.estimate(
        network(kind), "categorical", given, structure, estimator, generator=generator(), process_group=group(), **options
    )
    return numbers(found)


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two statistics, relative to the largest number."""
    mine, theirs = (torch.tensor(each["dense"], dtype=torch.float64) for each in (one, other))
    scalars = max(abs(one[key] - other[key]) for key in ("count", "log_likelihood", "terms"))
    return max(float((mine - theirs).abs().max() / theirs.abs().max()), scalars)


def swept(cases: list[tuple[str, str, str, str, dict[str, Any]]]) -> list[Any]:
    return [estimated(*case) for case in cases]


def posterior(kind: str, **settings: Any) -> lk.LaplacePosterior:
    return lk.LaplacePosterior(network(kind), "categorical", **settings)


def share(kind: str, how: str) -> Any:
    return SHARES[how](*data(kind), dist.get_rank(), dist.get_world_size())


def fitted(kind: str, how: str, settings: dict[str, Any], fit: dict[str, Any]) -> Any:
    """A fit over all shares: everything it holds, and what it says."""
    found = posterior(kind, **settings).fit(share(kind, how), generator=generator(), process_group=group(), **fit)
    return {
        "digest": digest(found),
        "n_data": found.n_data,
        "evidence": float(found.log_evidence()),
        "names": list(found.mean),
        "blocks": [block.name for block, _ in found.curvature.entries],
    }


def tuned(how: str, options: dict[str, Any]) -> Any:
    found = posterior("net").fit(share("net", "sampled"), process_group=group())
    x, y = data("net", 30)
    result = found.tune(SHARES[how](x, y, dist.get_rank(), dist.get_world_size()), generator=generator(),
                        process_group=group(), **options)  # fmt: skip
    return {
        "best": result.best, "table": result.table, "method": found.method, "n_data": found.n_data,
        "prior": found.prior_precision, "candidates": result.candidates, "digest": digest(found),
    }  # fmt: skip


def minibatches(count: int, rank: int, size: int) -> list[Any]:
    """Steps' minibatches of this process: uneven parts of the same ones."""
    x, y = data("net", 20 * count)
    found = []
    for k in range(count):
        part = slice(20 * k, 20 * (k + 1))
        edges = [0, 13, 20] if size == 2 else [0, 20]
        own = slice(edges[rank], edges[rank + 1])
        found.append((x[part][own], y[part][own]))
    return found


def steps(rank: int, size: int, make: Any, settings: dict[str, Any], count: int = 6) -> Any:
    model = network("norm" if settings.get("structure") == "diag" else "net")
    optimizer = make(model, "categorical", **settings)
    losses = [float(optimizer.step(*batch)) for batch in minibatches(count, rank, size)]
    optimizer.synchronize()
    return {
        "losses": losses,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "tau": optimizer.tau, "zeta": optimizer.zeta, "state": optimizer.state_dict()["second_order"]["steps"],
        "posterior": optimizer.posterior(n_data=100).precision.dense().tolist(),
    }  # fmt: skip


def trained(name: str, settings: dict[str, Any]) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    return steps(rank, size, getattr(lk.optim, name), {**settings, "process_group": group()})
