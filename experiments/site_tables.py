"""Tables of the pages on options, benchmarks and migration: choices beside what was measured, losses marked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.tables import ROOT

__all__ = ["RESULTS", "SITE_TABLES"]

RESULTS = ROOT / "benchmarks" / "results"
LOST = "**missed**"


def _result(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return loaded


def _benchmark(name: str) -> dict[str, Any]:
    return _result(f"benchmarks/results/{name}.json")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _on(result: Mapping[str, Any]) -> str:
    return f"{result['machine']['cpu']}, {result['machine']['cores']} cores, torch {result['versions']['torch']}"


# -- which options -----------------------------------------------------------------------------------------------------


def estimators() -> str:
    """Cost of a fit, and the error of the factor of the first layer, by estimator."""
    cost, error = _benchmark("fit_cost"), _benchmark("importance")
    rows = []
    for name, row in (("exact", "exact"), ("importance", "importance, 1"), ("sampled", "sampled, 1"),
                      ("projection", "projection, 1"), ("recursive", None)):  # fmt: skip
        errors = (
            ["", ""] if row is None else [f"{error[state][row]['error_G1']:.2%}" for state in ("trained", "untrained")]
        )
        rows.append([f"`{name}`", f"{cost['costs'][f'kron {name}']['ratio']:.2f}", *errors])
    text = f"Fit: {cost['workload']}. Error: {error['workload']}. {_on(cost)}."
    return f"{text}\n\n" + _table(
        ["`estimator=`", "fit, training epochs", "error of G₁, trained network", "untrained network"], rows
    )


def structures() -> str:
    """Cost of a fit, and quality on MNIST and notMNIST, by structure and by whether it was tuned."""
    cost, quality = _benchmark("fit_cost")["costs"], _result("docs/results/ood_mnist.json")
    rows = []
    for name, title, job in (("MAP", "none: the trained weights", None), ("diagonal", "`diag`", "diag exact"),
                             ("Kronecker", "`kron`", "kron exact")):  # fmt: skip
        for state in ("",) if job is None else (", untuned", ", tuned"):
            found = quality["metrics"][f"{name}{state}"]
            rows.append([title + state, "" if job is None else f"{cost[job]['ratio']:.2f}",
                         *(f"{scale * found[key]['mean']:.{digits}f}" for key, scale, digits in
                           (("accuracy", 100, 2), ("nll", 1, 4), ("auroc", 1, 3)))])  # fmt: skip
    found = quality["metrics"]["MC dropout"]
    rows.append(["MC dropout, for comparison", "", f"{100 * found['accuracy']['mean']:.2f}",
                 f"{found['nll']['mean']:.4f}", f"{found['auroc']['mean']:.3f}"])  # fmt: skip
    config = quality["config"]
    text = (
        f"784-{config['hidden']}-{config['hidden']}-10 on MNIST, {config['epochs']} epochs, {config['repeats']} seeds; "
        f"AUROC: entropy of letters of notMNIST against digits. {_on(quality)}."
    )
    head = ["posterior", "fit, training epochs", "accuracy %", "NLL", "AUROC"]
    return f"{text}\n\n" + _table(head, rows)


def methods() -> str:
    """Seconds of a prediction by method, and on how many data sets the choice of ``tune`` was better than MAP."""
    linear, drawn, quality = (
        _benchmark("linearized"),
        _benchmark("montecarlo"),
        _result("docs/results/calibration.json"),
    )
    costs = drawn["costs"]

    def counts(name: str) -> str:
        found = [each[name]["verdict"] for each in quality["comparisons"].values() if each.get(name)]
        return f"{found.count('better')} / {found.count('not worse')} / {found.count('worse')}"

    rows = [
        ["`auto`: what `tune` chose", "that of the method chosen", counts("laplace_kf")],
        ["`linearized`", f"{linear['milliseconds_per_input']:.2f} ms an input, covariances (1000 inputs)",
         counts("laplace_kf, linearized")],
        ["`mc`, 30 draws", f"{1e3 * costs['auto, 1 inputs']['seconds']:.0f} ms for 1 input, "
         f"{1e3 * costs['auto, 1000 inputs']['seconds']:,.0f} ms for 1000", ""],
        ["`mc`, draws kept (`predictor`)", f"{1e3 * costs['kept draws, 1 inputs']['seconds']:.0f} ms for 1 input, "
         f"{1e3 * costs['kept draws, 1000 inputs']['seconds']:,.0f} ms for 1000", ""],
        ["`temperature` (MAP, scaled)", "one forward pass", counts("MAP, temperature")],
    ]  # fmt: skip
    text = (
        f"Cost: {drawn['workload']}, {_on(drawn)}. Quality: test NLL against the network itself on "
        "nine regression tables and three image sets (`temperature`: tables only, where it can do nothing)."
    )
    return f"{text}\n\n" + _table(["`method=`", "cost", "sets: better / not worse / worse than MAP"], rows)


def scores() -> str:
    """AUROC of the scores for strange inputs, by pair of image sets; the best of a row in bold."""
    result = _result("docs/results/ood_pairs.json")
    table = result["tables"][0]
    kept = {"MAP: entropy": "entropy of MAP", "default: entropy": "`entropy`", "default: information":
            "`mutual_information`", "leverage, last layer": "`leverage`", "leverage, all layers":
            '`leverage`, `layers="all"`', "auto": "`auto`", "auto, all layers": '`auto`, `layers="all"`'}  # fmt: skip
    places = [table["columns"].index(name) for name in kept]
    rows = []
    for row in table["rows"]:
        best = max((row[k] for k in places), key=float)
        rows.append([row[0], *(f"**{row[k]}**" if row[k] == best else row[k] for k in places)])
    return f"{result['summary']} {_on(result)}.\n\n" + _table(["pair", *kept.values()], rows)


def chains() -> str:
    """Accuracy after ten tasks, and the cost of the penalty at the tenth, by what is kept of the earlier tasks."""
    quality, cost = _result("docs/results/continual_permuted.json"), _benchmark("penalty")
    rows = []
    for title, name, terms in (("`OnlineLaplace`, `terms=\"keep\"`", "Kronecker online", "keep"),
                               ("`terms=\"project\"`", "Kronecker online, projected", "project"),
                               ("`terms=\"sum\"`", "Kronecker online, summed", "sum"),
                               ("`structure=\"diag\"`", "diagonal online", "diagonal"),
                               ("`EWC`, Kronecker", "Kronecker EWC", None),
                               ("`SynapticIntelligence`", "Synaptic Intelligence", None),
                               ("fine-tuning", "fine-tuning", None),
                               ("all data at once", "joint training", None)):  # fmt: skip
        accuracy = quality["metrics"][name]["average"]
        extra = "" if terms is None else f"{cost['extra'][terms]['10']:.2f}"
        rows.append([title, f"{100 * sum(accuracy) / len(accuracy):.1f}", extra])
    text = f"Accuracy: permuted MNIST, {len(quality['tasks'])} tasks. Cost: {cost['workload']}. {_on(cost)}."
    return f"{text}\n\n" + _table(
        ["learner", "accuracy % after the last task", "penalty at the tenth task, training steps"], rows
    )


def tuning() -> str:
    """What ``tune`` took, by method."""
    result = _benchmark("tuning")
    rows = [[f"`{name}`", f"{cost['epochs']:.1f}", f"{cost['counted']:.1f}", f"{cost['seconds']:.1f}"]
            for name, cost in result["costs"].items()]  # fmt: skip
    head = ["`method=`", "training epochs, measured", "by its own count (budget: 10)", "s"]
    text = f"{result['workload']}. {_on(result)}. `python -m benchmarks tuning`"
    if found := result.get("transformer"):
        whole, last = found["all"], found["last_layer"]
        text += (
            f". A ViT-tiny of four blocks, 100 images: {whole['epochs']:.1f} training epochs; its last layer alone: "
            f"{last['passes_counted']:.0f} forward passes of the network, {last['passes']:.1f} by processor time"
        )
    return f"{text}\n\n" + _table(head, rows)


# -- benchmarks --------------------------------------------------------------------------------------------------------


def _aims(result: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Every aim of a result file: what, the limit where the file has one, and whether it was reached."""
    limits = {**result.get("targets", {}), **result.get("limits", {})}
    met = result.get("met", {})
    for name, reached in met.items() if isinstance(met, Mapping) else [("the whole benchmark", met)]:
        limit = limits.get(name)
        yield name, "" if limit is None else f"{limit:,.10g}", bool(reached)


def aims() -> str:
    """Every aim that a benchmark set itself, lost ones first."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        for name, limit, reached in _aims(_benchmark(path.stem)):
            rows.append([f"`{path.stem}`", name, limit, "reached" if reached else LOST])
    lost = [row for row in rows if row[3] == LOST]
    counted = f"{len(rows) - len(lost)} of {len(rows)} aims are reached; the others come first."
    return f"{counted}\n\n" + _table(
        ["`python -m benchmarks`", "aim", "at most", ""], lost + [row for row in rows if row[3] != LOST]
    )


def _factor(ours: float, theirs: float) -> str:
    return f"{theirs / ours:,.1f} times faster" if ours <= theirs else f"**{ours / theirs:,.2f} times slower**"


def peers() -> str:
    """Seconds beside other implementations, whichever is faster."""
    fits, linear, drawn, many = (_benchmark(n) for n in ("fit_cost", "linearized", "montecarlo", "many_predictions"))
    rows = []
    if "ratio" in fits["laplace-torch"]:
        ours, theirs = fits["costs"]["kron exact + eigendecomposition"]["ratio"], fits["laplace-torch"]["ratio"]
        rows.append(["Kronecker fit with decomposition, training epochs", "laplace-torch", f"{ours:.2f}",
                     f"{theirs:.2f}", _factor(ours, theirs)])  # fmt: skip
    if "milliseconds_per_input" in linear["laplace-torch"]:
        ours, theirs = linear["milliseconds_per_input"], linear["laplace-torch"]["milliseconds_per_input"]
        rows.append(["linearised covariance, ms an input", "laplace-torch", f"{ours:.2f}", f"{theirs:,.0f}",
                     _factor(ours, theirs)])  # fmt: skip
    for name, cost in drawn["costs"].items():
        way, _, inputs = name.partition(", ")
        peer = drawn["costs"].get(f"laplace-torch, {inputs}")
        if way == "auto" and peer is not None:
            ours, theirs = 1e3 * cost["seconds"], 1e3 * peer["seconds"]
            rows.append([f"30 draws of the weights, {inputs}, ms", "laplace-torch", f"{ours:,.1f}", f"{theirs:,.0f}",
                         _factor(ours, theirs)])  # fmt: skip
    for name, cost in many["costs"].items():
        ours, theirs = 1e3 * cost["seconds"], 1e3 * cost["hand_written_seconds"]
        rows.append([f"one prediction, {name}, ms", "hand-written for this case", f"{ours:.1f}", f"{theirs:.1f}",
                     _factor(ours, theirs)])  # fmt: skip
    text = f"One thread, float32. {_on(fits)}. Where this package is the slower one, the cell is bold."
    return f"{text}\n\n" + _table(["job", "beside", "laplace_kf", "the other", "laplace_kf is"], rows)


LIMIT, MORE = 1.15, 1.3  # times the hand-written cost, and memory
LITTLE = 30e6  # bytes that resident memory says nothing about


def cells() -> str:
    """Fits and steps beside hand-written code and other libraries, cell by cell; whatever is behind is marked."""
    result = _benchmark("cells")
    others = ("curvlinops", "BackPACK", "nngeometry", "asdl")
    rows, notes = [], []
    for name, cell in result["cells"].items():
        if "costs" not in cell:
            continue
        costs, ours = cell["costs"], cell["costs"]["laplace_kf"]
        marks = [peer for peer in others if costs.get(peer, float("inf")) < ours]
        behind = ours > LIMIT * costs["by hand"]
        grown = cell.get("bytes", {})
        held = [f"{grown[who] / 1e6:.0f}" if who in grown else "" for who in ("laplace_kf", "by hand")]
        larger = bool(grown) and grown["laplace_kf"] > MORE * grown["by hand"] + LITTLE
        marked = [f"**behind {peer}**" for peer in marks] + (["**beyond the bound**"] if behind else [])
        verdict = ", ".join(marked + (["**more memory**"] if larger else []))
        rows.append([name, f"{ours:.2f}", f"{costs['by hand']:.2f}",
                     *(f"{costs[peer]:.2f}" if peer in costs else "" for peer in others), *held, verdict])  # fmt: skip
        alike = costs.get("laplace_kf, as the others")
        if alike is not None:
            what = f"{name}, without momentum, step length and adaptation, factors where inverses are made"
            asdl = f"{costs['asdl']:.2f}" if "asdl" in costs else ""
            rows.append([what, f"{alike:.2f}", f"{costs['by hand']:.2f}", "", "", "", asdl, "", "", ""])
        if verdict:
            notes.append(f"* *{name}*: {result['reasons'].get(name, 'no reason is known')}.")
        notes += [f"* *{name}*, {peer} is not measured: {why}" for peer, why in cell.get("missing", {}).items()]
    small = result["cells"].get("tiny, small jobs", {}).get("milliseconds", {})
    text = (
        f"{result['workload']}. {_on(result)}. Unit: {result['unit']}. Beyond the bound: more than "
        f"{LIMIT} times the hand-written cost; more memory: more than {MORE} times what the hand-written code takes "
        f"and {LITTLE / 1e6:.0f} MB. `python -m benchmarks cells`"
    )
    parts = [text, _table(["cell", "laplace_kf", "by hand", *others, "MB", "by hand", ""], rows), "\n".join(notes)]
    if small:
        parts.append("1-7-7-1 on 20 points, milliseconds:")
        parts.append(_table(["job", "ms"], [[name, f"{value:.1f}"] for name, value in small.items()]))
        parts.append(f"* *small jobs*: {result['reasons']['tiny, small jobs']}.")
    return "\n\n".join(part for part in parts if part)


def per_example() -> str:
    """Diagonal curvature of weights that no rule covers."""
    result = _benchmark("per_example")
    rows = [[name, f"{cost['ratio']:.1f}", f"{1e3 * cost['seconds']:.1f}"] for name, cost in result["costs"].items()]
    return f"{result['workload']}. {_on(result)}.\n\n" + _table(["job", "training epochs", "ms"], rows)


def quality() -> str:
    """Test NLL against laplace-torch's, set by set, losses marked."""
    result = _result("docs/results/calibration.json")
    rows = []
    for name, found in result["comparisons"].items():
        ours = found["laplace_kf"]
        row = [name, f"{ours['mean']:+.4f}"]
        for peer in ("laplace-torch, marglik", "laplace-torch, gridsearch"):
            lower = ours["mean"] <= found[peer]["mean"]
            row.append(f"{found[peer]['mean']:+.4f}" + ("" if lower else " **lower**"))
        rows.append(row)
    text = (
        "Test NLL less that of the network itself, nats; negative is better. **lower**: laplace-torch's mean is below "
        f"ours. {_on(result)}"
    )
    return f"{text}.\n\n" + _table(["set", "laplace_kf", "laplace-torch, marglik", "laplace-torch, gridsearch"], rows)


# -- migration ---------------------------------------------------------------------------------------------------------


def migrating() -> str:
    """Evidence and variances by laplace-torch and by this package."""
    result = _benchmark("migrating")
    rows = []
    for case in result["cases"]:
        what = f"{case['kind']}, `{case['parameters']}`, `{case['structure']}`{'' if case['bias'] else ', no biases'}"
        alike = "the same" if case["alike"] else f"**{case['difference']:.1%} apart**"
        rows.append([what, f"{case['their_evidence']:.4f}", f"{case['evidence']:.4f}",
                     f"{case['their_variance']:.6f}", f"{case['variance']:.6f}", alike])  # fmt: skip
    head = ["case", "log evidence: laplace-torch", "here", "first variance: laplace-torch", "here", "all covariances"]
    text = (
        f"{result['workload']}; {result['peer']}, torch {result['versions']['torch']}. `python -m benchmarks migrating`"
    )
    return f"{text}\n\n" + _table(head, rows)


SITE_TABLES: dict[str, Callable[[], str]] = {
    "option_estimators": estimators,
    "option_structures": structures,
    "option_methods": methods,
    "option_scores": scores,
    "option_chains": chains,
    "tuning": tuning,
    "aims": aims,
    "peers": peers,
    "cells": cells,
    "per_example": per_example,
    "quality": quality,
    "migrating": migrating,
}
"""By name, as they stand in the pages' ``<!-- table: name -->``."""
