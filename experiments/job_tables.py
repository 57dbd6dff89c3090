"""The tables of what the curvature engine is used for: attribution, acquisition, search, pruning, training."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from experiments.attribution import report as attribution_report
from experiments.tables import load, machine_of, markdown, quoted

__all__ = ["JOB_TABLES"]


def attribution() -> str:
    """Datamodelling scores, wrong labels found, and aims."""
    result = load("docs/results/attribution.json")
    if result is None:
        return "*Not run yet.*"
    config = result["config"]
    parts = [
        f"784-128-64-10 on halves of {config['train']} digits; {config['subsets']} networks of the truth, trained for "
        f"{config['epochs']} epochs; {config['queries']} queries; λ = {config['damping']:g}; {machine_of(result)}. "
        "`python -m experiments run attribution`"
    ]
    for head, rows in (attribution_report.score_rows(result), attribution_report.wrong_rows(result)):
        parts.append(markdown(head, rows))
    if result.get("tried"):
        parts += [markdown(*attribution_report.tried_rows(result)), attribution_report.tried_note(result)]
    table = attribution_report.targets_table(result["verdicts"])
    return "\n\n".join([*parts, markdown(list(table.columns), [list(row) for row in table.rows])])


def attribution_text() -> str:
    """Datamodelling scores of a language model."""
    return quoted("attribution_text")


def attribution_cost() -> str:
    """Scores of 5,000 x 500 pairs in training epochs."""
    result = load("benchmarks/results/attribution.json")
    if result is None:
        return "*Not run yet.*"
    rows = [[name, f"{cost['ratio']:.1f}", f"{cost['seconds']:.2f}"] for name, cost in result["costs"].items()]
    met = [f"{claim}: {'met' if held else 'missed'}" for claim, held in result["met"].items()]
    head = f"{result['workload']}; {machine_of(result)}. {'; '.join(met)}. `python -m benchmarks attribution`"
    return f"{head}\n\n" + markdown(["job", "epochs", "s"], rows)


def attribution_peers() -> str:
    """Scores of one network by this package, dattri and kronfluence."""
    result = load("benchmarks/results/attribution_peers.json")
    if result is None:
        return "*Not run yet.*"
    rows = [
        [name, *((each["not_run"], "") if "not_run" in each else (f"{each['score']:.3f}", f"{each['seconds']:.1f}"))]
        for name, each in result["methods"].items()
    ]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items() if version)
    head = f"{result['workload']}; {peers}; {machine_of(result)}. `python -m benchmarks attribution_peers`"
    return f"{head}\n\n" + markdown(["method", "datamodelling score", "processor s"], rows)


def bayesian_optimisation() -> str:
    """Regrets of the search with a network as the surrogate, and of random points."""
    result = load("benchmarks/results/bayesian_optimisation.json")
    if result is None:
        return "*Not run yet.*"
    rows = []
    for name, found in result["functions"].items():
        mine, other = found["laplace_kf"], found["random"]
        half = len(mine["median"]) // 2
        medians = [f"{way['median'][k]:.3f}" for k in (half, -1) for way in (mine, other)]
        rows.append(
            [name, f"{mine['median'][0]:.3f}", *medians,
             f"{found['wins']} of {len(mine['regret'])}", f"{found['seconds']:.0f}"]
        )  # fmt: skip
    head = ["function", "at the start", "half way", "random", "at the end", "random", "better than random", "s a run"]
    text = f"{result['workload']}; {machine_of(result)}. `python -m benchmarks bayesian_optimisation`"
    return f"{text}\n\n" + markdown(head, rows)


def characters() -> str:
    """When each optimiser reaches one validation loss of a character model."""
    return quoted("characters")


def labels() -> str:
    """Labels needed by the way they are chosen."""
    return quoted("labels")


def pruning() -> str:
    """Accuracies after pruning by conditioning and by magnitude, averaged over the networks of a kind."""
    result = load("benchmarks/results/pruning.json")
    if result is None:
        return "*Not run yet.*"
    rows = []
    for kind, found in result["networks"].items():
        for share in found[0]["pruned"]:
            cut = [[one["pruned"][share][way] for one in found] for way in ("posterior", "magnitude")]
            dense = statistics.fmean(one["dense"] for one in found)
            means = [f"{statistics.fmean(one):.1f} (lowest {min(one):.1f})" for one in cut]
            rows.append([kind, str(len(found)), f"{dense:.1f}", f"{float(share):.0%}", *means])
    met = [f"{claim}: {'met' if held else 'missed'}" for claim, held in result["met"].items()]
    head = f"{result['workload']}; {machine_of(result)}. {'; '.join(met)}. `python -m benchmarks pruning`"
    return f"{head}\n\n" + markdown(["network", "seeds", "dense", "pruned", "by conditioning", "by magnitude"], rows)


JOB_TABLES: dict[str, Callable[[], str]] = {
    "attribution": attribution,
    "attribution_cost": attribution_cost,
    "attribution_text": attribution_text,
    "attribution_peers": attribution_peers,
    "bayesian_optimisation": bayesian_optimisation,
    "characters": characters,
    "labels": labels,
    "pruning": pruning,
}
