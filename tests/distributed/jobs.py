"""What the processes of the tests run. Each gives plain values: tensors travel as lists of numbers."""

from __future__ import annotations

import hashlib
import warnings
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
        network(kind),
        "categorical",
        given,
        structure,
        estimator,
        generator=generator(),
        process_group=group(),
        **options,
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


# -- failures --------------------------------------------------------------------------------------------------------


def state(found: lk.LaplacePosterior) -> Any:
    return digest(found), found.n_data, [float(p.detach().double().sum()) for p in found.model.parameters()]


class Mishap:
    """Counts what one process does of a fit, every minibatch and every word to the others, until its time has come."""

    def __init__(self, victim: int, at: int, act: Any) -> None:
        self.left = at if dist.get_rank() == victim else 10**9
        self.act, self.undo = act, []

    def __enter__(self) -> Mishap:
        for name in ("all_gather_object", "all_reduce", "broadcast"):
            real = getattr(dist, name)
            self.undo.append((name, real))
            setattr(dist, name, self._counting(real))
        return self

    def __exit__(self, *error: object) -> None:
        for name, real in self.undo:
            setattr(dist, name, real)

    def _counting(self, real: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            self.event()
            return real(*arguments, **settings)

        return call

    def event(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def hurt() -> None:
    raise lk.errors.NonFinite("a number of this process is not finite")


def interrupted(victim: int, at: int, act: Any, structure: str = "ekfac") -> Any:
    """A second fit in which one process meets a mishap: the error, and whether everything is as before."""
    found = posterior("net", structure=structure).fit(share("net", "sampled"), process_group=group())
    before = state(found)
    with Mishap(victim, at, act) as mishap:
        handle = found.model.register_forward_pre_hook(mishap.event)
        try:
            found.fit(share("net", "batches"), process_group=group())
        except BaseException as error:
            return type(error).__name__, str(error), state(found) == before
        finally:
            handle.remove()
    return "none", "", state(found) == before


def stayed_away(victim: int) -> Any:
    """One process never comes to the fit."""
    if dist.get_rank() == victim:
        return "away", "", True
    found = posterior("net")
    try:
        found.fit(share("net", "sampled"), process_group=group())
    except lk.errors.LaplaceKFError as error:
        return type(error).__name__, str(error), found._state is None
    return "none", "", True


def refused(which: str) -> Any:
    """What a call with a mistake in one process, or in all, raises: type and message."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        MISTAKES[which](rank, size)
    except lk.errors.LaplaceKFError as error:
        return type(error).__name__, str(error)
    return "none", ""


def _other_structure(rank: int, size: int) -> None:
    posterior("net", structure="kron" if rank else "diag").fit(share("net", "sampled"), process_group=group())


def _other_weights(rank: int, size: int) -> None:
    found = posterior("net")
    with torch.no_grad():
        found.model.last.bias[0] += 1e-12 * rank
    found.fit(share("net", "sampled"), process_group=group())


def _other_buffers(rank: int, size: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double()
    model[1].running_mean += rank
    lk.LaplacePosterior(model, "categorical").fit(share("net", "sampled"), process_group=group())


def _one_sampler(rank: int, size: int) -> None:
    x, y = data("net")
    posterior("net").fit(SHARES["sampled"](x, y, 0, size), process_group=group())


def _nothing(rank: int, size: int) -> None:
    posterior("net").fit([], process_group=group())


def _ignored(rank: int, size: int) -> None:
    x, y = data("tokens")
    posterior("tokens").fit((x[rank::size], torch.full_like(y, -100)[rank::size]), process_group=group())


def _dead(rank: int, size: int) -> None:
    x, y = data("experts")
    x[:, 0] = x[:, 0].abs()
    posterior("experts").fit((x[rank::size], y[rank::size]), process_group=group())


def _nan_here(rank: int, size: int) -> None:
    x, y = data("net")
    if rank == 1:
        x[-1] = float("nan")
    posterior("net").fit((x[rank::size], y[rank::size]), process_group=group())


def _no_validation(rank: int, size: int) -> None:
    found = posterior("net").fit(share("net", "sampled"), process_group=group())
    found.tune([] if rank else data("net", 8), process_group=group())


def _by_one_number(rank: int, size: int) -> None:
    found = posterior("net").fit(share("net", "sampled"), process_group=group())
    found.tune(share("net", "sampled"), objective="ece", n_data=[10.0], process_group=group())


def _hessian_free(rank: int, size: int) -> None:
    lk.optim.hessian_free(network("net"), "categorical", process_group=group())


def _two_passes(rank: int, size: int) -> None:
    lk.optim.GaussNewton(network("net"), "categorical", "exact", "ekfac", damping="exact", process_group=group())


def _wrapped(rank: int, size: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(network("net"))
    lk.optim.kfac(model, "categorical")


def _state_between(rank: int, size: int) -> None:
    optimizer = lk.optim.kfac(network("net"), "categorical", refresh=10, process_group=group())
    for batch in minibatches(5, rank, size):
        optimizer.step(*batch)
    optimizer.state_dict()


def _no_minibatch(rank: int, size: int) -> None:
    optimizer = lk.optim.kfac(network("net"), "categorical", process_group=group())
    (batch,) = minibatches(1, rank, size)
    before = [p.detach().clone() for p in optimizer.model.parameters()]
    try:
        optimizer.step(*batch) if rank == 0 else optimizer.step()
    finally:
        assert all(torch.equal(p, q) for p, q in zip(optimizer.model.parameters(), before, strict=True))


MISTAKES = {name[1:]: mistake for name, mistake in list(globals().items()) if name.startswith("_") and name[1:] in (
    "other_structure", "other_weights", "other_buffers", "one_sampler", "nothing", "ignored", "dead", "nan_here",
    "no_validation", "by_one_number", "hessian_free", "two_passes", "wrapped", "state_between", "no_minibatch",
)}  # fmt: skip


def wrapped() -> Any:
    """A model in DistributedDataParallel, with per-process predictions of its own part."""
    inner = network("net")
    model = torch.nn.parallel.DistributedDataParallel(inner)
    found = lk.LaplacePosterior(model, "categorical").fit(share("net", "sampled"), process_group=group())
    rank, size = dist.get_rank(), dist.get_world_size()
    probs = found.predict(SHARES["subset"](*data("net"), rank, size)).probs
    return {"names": list(found.mean), "evidence": float(found.log_evidence()), "probs": probs.tolist()}


def same_data_everywhere() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior("net").fit(data("net"), process_group=group())
    return [str(each.message) for each in caught]


def work_done() -> dict[str, int]:
    """How many eigenbases of a fit each process makes, and how many words are spoken."""
    counts = {"eigh": 0, "all_gather_object": 0, "all_reduce": 0, "broadcast": 0}

    def counting(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **settings)

        setattr(owner, name, call)
        return owner, name, real

    places = [(torch.linalg, "eigh"), *((dist, name) for name in list(counts)[1:])]
    undo = [counting(*place) for place in places]
    try:
        found = posterior("net").fit(share("net", "sampled"), process_group=group())
        found.log_evidence()
    finally:
        for owner, name, real in undo:
            setattr(owner, name, real)
    return counts
