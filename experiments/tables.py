"""The tables that README.md and ``docs/`` hold, from result files and registries: no number is typed by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import laplace_kf as lk
from experiments import runner
from experiments.autoencoders import report as autoencoders_report
from experiments.calibration import report
from experiments.recurrent import report as recurrent_report
from experiments.verdicts import VIEWS, counts, entries

__all__ = ["ROOT", "STREAMS", "TABLES", "load", "machine_of", "markdown", "quoted"]

ROOT = Path(__file__).parent.parent


def load(path: str) -> dict[str, Any] | None:
    file = ROOT / path
    if not file.is_file():
        return None
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine_of(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"


def ood_mnist(name: str = "ood_mnist") -> str:
    """Methods and verdicts of E20, of one run."""
    result = load(f"docs/results/{name}.json")
    if result is None:
        return "*Not run yet.*"
    config = result["config"]
    columns = {"accuracy %": "accuracy", "NLL": "nll", "ECE %": "ece", "entropy MNIST": "entropy_in",
               "entropy notMNIST": "entropy_out", "AUROC": "auroc"}  # fmt: skip
    rows = [
        [method, *(_spread(found[key]["values"], *((100, 2) if "%" in title else (1, 3)))
                   for title, key in columns.items())]
        for method, found in result["metrics"].items()
    ]  # fmt: skip
    many = f"mean ± standard deviation over {config['repeats']} seeds (first {result['seed']})"
    head = (
        f"784-{config['hidden']}-{config['hidden']}-10, {config['epochs']} epochs on binarised MNIST, "
        f"{many if config['repeats'] > 1 else 'one seed'}; {machine_of(result)}, "
        f"{result['wall_time_s'] / 60:.0f} minutes. `{runner.command(name, config)}`"
    )
    return "\n\n".join([head, markdown(["method", *columns], rows), _verdicts(result)])


def _verdicts(result: dict[str, Any]) -> str:
    return "\n".join(
        f"* {v['claim']}: **{v['verdict']}** ({v['value']['mean']:.4f} against {v['reference']['mean']:.4f}; "
        f"difference {v['difference']['mean']:+.4f}"
        + (f" ± {v['difference']['std']:.4f})" if len(v["value"].get("values", "many")) > 1 else ")")
        for v in result["verdicts"]
    ) + "".join(f"\n\n{text}" for text in result.get("sentences", []))


def ood_pairs() -> str:
    """AUROC of every score on pairs of image sets, and the verdicts."""
    return quoted("ood_pairs")


def uci() -> str:
    """Test log likelihoods and conformal intervals on regression tables, and the verdicts."""
    return quoted("uci")


def quoted(name: str) -> str:
    """The tables that an experiment left in its result."""
    result = load(f"docs/results/{name}.json")
    if result is None:
        return "*Not run yet.*"
    parts = [f"{result['summary']} {machine_of(result)}. `{runner.command(name, result['config'])}`"]
    for table in result["tables"]:
        parts += [markdown(table["columns"], table["rows"])] + ([table["note"]] if table["note"] else [])
    missing = [f"Not run: {', '.join(result['not_run'])}."] if result.get("not_run") else []
    return "\n\n".join([*parts, *missing])


def calibration() -> str:
    """Differences in test NLL to MAP, set by set, and how many sets each verdict holds on."""
    result = load("docs/results/calibration.json")
    if result is None:
        return "*Not run yet.*"
    config, metrics = result["config"], result["metrics"]
    means = {name: metrics[name][report.MAP]["nll"]["mean"] for name in metrics}
    head, rows = report.difference_rows(means, result["comparisons"])
    text = (
        f"One hidden layer of {config['hidden']} units, {config['splits']} splits, {config['val_share']:.0%} of the "
        f"training rows (at most {config['val_most']}) held out for every method's settings; {machine_of(result)}. "
        f"`{runner.command('calibration', config)}`"
    )
    verdicts = [
        f"* {v['claim']}: **{v['verdict']}** ("
        + ", ".join(f"{kind} on {len(sets)}" for kind, sets in v["sets"].items())
        + ")"
        for v in result["verdicts"]
    ]
    missing = [f"Not run: {', '.join(result['not_run'])}."] if result["not_run"] else []
    return "\n\n".join([text, markdown(head, rows), "\n".join(verdicts), *missing])


def calibration_short() -> str:
    """On how many sets every method is better, not worse or worse than MAP."""
    result = load("docs/results/calibration.json")
    if result is None:
        return "*Not run yet.*"
    rows = []
    for method in report.NAMES[1:]:
        found = [by_method[method] for by_method in result["comparisons"].values() if by_method.get(method)]
        if not found:
            continue  # not run on any set
        counts = [sum(each["verdict"] == kind for each in found) for kind in ("better", "not worse", "worse")]
        lower = sum(each["mean"] < 0 for each in found)
        rows.append([method, *map(str, counts), f"{lower} of {len(found)}"])
    return markdown(["test NLL against MAP's", "sets: better", "not worse", "worse", "mean is lower"], rows)


def shakespeare() -> str:
    """Quality on held-out text, uncertainty by text, and the verdicts of the tutorial."""
    result = load("docs/results/shakespeare.json")
    if result is None:
        return "*Not run yet.*"
    config = result["config"]
    columns = {
        "bits per character": ("bits", 1, 4),
        "ECE %": ("ece", 100, 2),
        "MI Shakespeare": ("information_Shakespeare", 1, 4),
        "MI shuffled": ("information_shuffled", 1, 4),
        "MI foreign": ("information_foreign", 1, 4),
        "AUROC foreign windows, entropy": ("auroc_window_entropy_foreign", 1, 3),
        "AUROC foreign windows, MI": ("auroc_window_information_foreign", 1, 3),
    }
    rows = []
    for method, found in result["metrics"].items():
        cells = [f"{s * found[key]['mean']:.{d}f}" if key in found else "" for key, s, d in columns.values()]
        rows.append([method, *cells])
    head = (
        f"{result['parameters']} parameters, {config['epochs']} epochs, {config['repeats']} seed(s) from "
        f"{result['seed']}; MI is the mutual information in nats per character; {machine_of(result)}, "
        f"{result['wall_time_s'] / 60:.0f} minutes. `python -m experiments run shakespeare`"
    )
    return "\n\n".join([head, markdown(["method", *columns], rows), _verdicts(result)])


def fit_cost() -> str:
    """Costs of fits."""
    result = load("benchmarks/results/fit_cost.json")
    if result is None:
        return "*Not run yet.*"
    rows = [[name, f"{cost['ratio']:.2f}", f"{cost['ratio_min']:.2f} to {cost['ratio_max']:.2f}"]
            for name, cost in result["costs"].items()]  # fmt: skip
    peer = result["laplace-torch"]
    if "ratio" in peer:
        rows.append(["laplace-torch, Kronecker (decomposition included)", f"{peer['ratio']:.2f}",
                     f"{peer['ratio_min']:.2f} to {peer['ratio_max']:.2f}"])  # fmt: skip
    return f"{result['workload']}; {machine_of(result)}.\n\n" + markdown(["job", "epochs", "range"], rows)


def plans() -> str:
    """Plans beside what happened."""
    result = load("benchmarks/results/plans.json")
    if result is None:
        return "*Not run yet.*"
    rows, met = [], result["met"].values()
    for name, case in result["cases"].items():
        for job in ("fit", "predict", "tune"):
            for what, scale, unit in (("seconds", 1.0, "s"), ("bytes", 1e-6, "MB")):
                if what in case.get(job, {}):
                    planned, taken = case[job][f"planned_{what}"], case[job][what]
                    beside = f" ({usual * scale:.3g})" if (usual := case[job].get(f"{what}_with_defaults")) else ""
                    rows.append([name, job, f"{planned * scale:.3g} {unit}", f"{taken * scale:.3g}{beside} {unit}",
                                 f"{100 * (planned / taken - 1):+.0f} %"])  # fmt: skip
    head = f"{result['workload']}; {machine_of(result)}. {sum(met)} of {len(met)} that are long or large enough to be "
    return head + "measured are within 25 %.\n\n" + markdown(["case", "job", "planned", "taken", ""], rows)


def auto_estimator() -> str:
    """``estimator="auto"`` beside sampling."""
    result = load("benchmarks/results/auto_estimator.json")
    if result is None:
        return "*Not run yet.*"
    rows = [
        [name, *(cell for state in ("trained", "untrained")
                 for cell in (f"{result[state][name]['epochs']:.2f}", f"{max(result[state][name]['errors']):.2%}"))]
        for name in result["trained"]
    ]  # fmt: skip
    head = ["estimator", "trained: training epochs", "largest error of a block", "untrained: training epochs",
            "largest error of a block"]  # fmt: skip
    text = f"{result['workload']}, {100 * result['training_accuracy']:.1f} % of them right; {machine_of(result)}."
    return text + "\n\n" + markdown(head, rows)


def importance() -> str:
    """Error against cost of the estimators."""
    result = load("benchmarks/results/importance.json")
    if result is None:
        return "*Not run yet.*"
    rows = []
    for name in result["trained"]:
        cells = [name]
        for state in ("trained", "untrained"):
            row = result[state][name]
            cells += [f"{row['cost']:.2f}", f"{row['error_G1']:.2%}", f"{row['error_G2']:.2%}"]
        rows.append(cells)
    head = ["estimator", "trained: cost / exact", "error G₁", "error G₂",
            "untrained: cost / exact", "error G₁", "error G₂"]  # fmt: skip
    text = f"{result['workload']}, {100 * result['training_accuracy']:.2f} % training accuracy; {machine_of(result)}."
    return text + "\n\n" + markdown(head, rows)


def predictions() -> str:
    """Costs of predictions beside laplace-torch."""
    linearized, sampled = (load(f"benchmarks/results/{name}.json") for name in ("linearized", "montecarlo"))
    if linearized is None or sampled is None:
        return "*Not run yet.*"
    costs, peer = linearized["costs"], linearized["laplace-torch"]
    theirs = f"{peer['milliseconds_per_input']:,.0f} ms" if "milliseconds_per_input" in peer else ""
    inputs = linearized["workload"].split(", ")[2]
    rows = [
        [f"linearised, {inputs}, per input", f"{linearized['milliseconds_per_input']:.2f} ms",
         f"{theirs} ({peer.get('inputs', 0)} inputs)"],
        ["the same, in training examples (forward and backward)", f"{costs['functional_covariance']['ratio']:.1f}",
         f"{peer.get('in_training_examples', float('nan')):,.0f}"],
        ["linearised at 20 values of (N, λ), in passes", f"{linearized['grid_in_linearised_passes']['ratio']:.2f}", ""],
        ["linearised, growth of peak memory", f"{linearized['peak_growth_bytes'] / 1e6:.0f} MB", ""],
    ]  # fmt: skip
    found = sampled["costs"]
    for name, cost in found.items():
        space, count = name.split(", ")
        other = found.get(f"laplace-torch, {count}")
        if space == "laplace-torch" or other is None:
            continue
        rows.append([f"30 draws, {space}, {count}", f"{1000 * cost['seconds']:.1f} ms",
                     f"{1000 * other['seconds']:.0f} ms ({1 / cost['ratio']:.1f} times)"])  # fmt: skip
    text = f"{sampled['workload']}; {machine_of(sampled)}."
    return text + "\n\n" + markdown(["prediction", "laplace_kf", "laplace-torch"], rows)


def penalty() -> str:
    """Cost and memory of the penalty by the number of tasks."""
    result = load("benchmarks/results/penalty.json")
    if result is None:
        return "*Not run yet.*"
    tasks = list(next(iter(result["extra"].values())))
    ends = [tasks[0], tasks[-1]]
    rows = [
        [name, *(f"{extra[count]:.2f}" for count in tasks),
         " / ".join(f"{result['bytes'][name][count] / 1e6:.1f}" for count in ends),
         " / ".join(f"{result['update_epochs'][name][count]:.1f}" for count in ends)]
        for name, extra in result["extra"].items()
    ]  # fmt: skip
    text = (
        f"{result['workload']}; a step takes {1000 * result['step_seconds']:.2f} ms, the two products of one term "
        f"alone {result['two_products']:.2f} steps; an update goes over {result['update_examples']} examples with the "
        f"exact estimator; {machine_of(result)}. `python -m benchmarks penalty`"
    )
    span = " / ".join(ends)
    head = ["terms", *(f"{n} task{'s' * (n != '1')}" for n in tasks), f"MB, {span}", f"update in epochs, {span}"]
    return text + "\n\n" + markdown(head, rows)


def many_outputs() -> str:
    """Fits and predictions with thousands of classes."""
    result = load("benchmarks/results/many_outputs.json")
    if result is None:
        return "*Not run yet.*"
    rows = [
        [name, f"{cost['fit_seconds']:.2f}", f"{cost['decomposition_seconds']:.2f}",
         f"{1000 * cost['predict_seconds']:.1f}", f"{cost['predict_bytes'] / 1e6:.0f}", f"{cost['bytes'] / 1e6:.0f}"]
        for name, cost in result["costs"].items()
    ]  # fmt: skip
    head = ["classes, structure, estimator", "fit, s", "decomposition, s", "one input, ms", "one input, MB", "all, MB"]
    return f"{result['workload']}; {machine_of(result)}.\n\n" + markdown(head, rows)


def wide_factors() -> str:
    """Errors of output factors by rank."""
    result = load("benchmarks/results/wide_factors.json")
    if result is None:
        return "*Not run yet.*"
    rows = [
        [name, f"{cost['error']:.4f}", "" if cost["told"] is None else f"{cost['told']:.4f}", f"{cost['seconds']:.2f}"]
        for name, cost in result["costs"].items()
    ]
    head = ["estimator, largest rank", "relative error", "as `summary()` tells", "fit, s"]
    return f"{result['workload']}; {machine_of(result)}.\n\n" + markdown(head, rows)


def optimizers() -> str:
    """Costs of the optimisers' steps."""
    result = load("benchmarks/results/optimizers.json")
    if result is None:
        return "*Not run yet.*"
    held = result["memory_bytes"]
    rows = []
    for name, cost in result["costs"].items():
        bytes_ = held.get(name.split(", 20 CG")[0])
        memory = "" if bytes_ is None else f"{bytes_ / 1e6:.0f}"
        rows.append([name, f"{cost['mean']:.2f}", f"{cost['median']:.2f}", f"{cost['largest']:.1f}", memory])
    head = ["optimiser", "SGD steps, mean", "median", "largest", "MB more than SGD"]
    return f"{result['workload']}; {machine_of(result)}.\n\n" + markdown(head, rows)


def toy_regression() -> str:
    """Verdicts of E19."""
    result = load("docs/results/toy_regression.json")
    if result is None:
        return "*Not run yet.*"
    return f"{machine_of(result)}. `python -m experiments run E19`\n\n" + _verdicts(result)


def recurrent() -> str:
    """Outcomes and verdicts of E4."""
    result = load("docs/results/recurrent.json")
    if result is None:
        return "*Not run yet.*"
    config, runs = result["config"], result["runs"]
    head = (
        f"{config['hidden']} tanh units, input weights from N(0, {config['input_scale']:g}²), "
        f"{config['gradient_size']} fresh sequences an iteration, {config['curvature_size']} of them for curvature "
        f"(memorisation: all 32), at most {config['cg_steps']} CG steps. Structural: μ = {config['structural']:.3f}, "
        f"first λ = {config['tau_structural']:g}; Tikhonov: first λ = {config['tau_tikhonov']:g}. Cells are iterations "
        f"(processor seconds) until less than {config['target']:.0%} of {config['test_size']} test sequences are "
        f"answered wrongly; a run fails after {config['seconds_per_step']:g} processor seconds per step of T, or "
        f"{config['iterations']} iterations. {len(runs)} runs, "
        f"{sum(one['seconds'] for one in runs) / 60:.0f} minutes of one thread; {machine_of(result)}. "
        "`python -m experiments run E4`"
    )
    return "\n\n".join([head, markdown(*recurrent_report.outcome_rows(runs)), _verdicts(result)])


STREAMS = {
    "continual_permuted": "E25",
    "continual_permuted_50": "continual_permuted_50 --out results/E25_50",
    **{f"continual_permuted_50_{x}": f"continual_permuted_50 --out results/E25_50_{x}" for x in ("stiff", "five")},
    "continual_permuted_50_wide": "continual_permuted_50_wide --out results/E25_50_wide",
    **{f"continual_si{end}": f"continual_si{end} --out results/E25_si{end}" for end in ("", "_wide", "_2000", "_long")},
    "continual_disjoint": "E27",
    "continual_vision": "E28",
    "rotated_mnist": "rotated_mnist",
    "streaming_regression": "streaming_regression",
    "continual_multiplier": "E26",
    "continual_terms": "E35",
    "multiplier_toy": "E24",
}
"""Of the page on continual learning: tables, by the experiments that they come from."""


def stream(name: str) -> str:
    """The tables and verdicts that an experiment on a stream of tasks has left in its result file."""
    result = load(f"docs/results/{name}.json")
    if result is None:
        return "*Not run yet.*"
    word, _, rest = STREAMS[name].partition(" ")
    text = (
        f"{result['summary']} {machine_of(result)}, {result['wall_time_s'] / 60:.1f} minutes for what was not there "
        f"yet. `{runner.command(word, result['config'])}{' ' * bool(rest)}{rest}`"
    )
    parts = [text]
    for table in result["tables"]:
        parts += [f"{table['title']}:", markdown(table["columns"], table["rows"])]
        parts += [table["note"]] if table["note"] else []
    return "\n\n".join([*parts, _verdicts(result)])


def continual_short() -> str:
    """Average accuracy after the last task, on three streams."""
    streams = {"permuted": "permuted MNIST", "disjoint": "disjoint MNIST", "vision": "vision data sets"}
    found = {name: result for name in streams if (result := load(f"docs/results/continual_{name}.json")) is not None}
    if not found:
        return "*Not run yet.*"
    methods = list(dict.fromkeys(method for result in found.values() for method in result["metrics"]))
    rows = [
        [method, *(_spread(result["metrics"].get(method, {}).get("average")) for result in found.values())]
        for method in methods
    ]
    heads = (f"{streams[name]}, {len(result['tasks'])} tasks" for name, result in found.items())
    return markdown(["accuracy % after the last task, all tasks", *heads], rows)


def _spread(values: Sequence[float] | None, scale: float = 100, digits: int = 1) -> str:
    """Mean, and over several seeds the standard deviation, in per cent; empty for a method that was not run."""
    if not values:
        return ""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def autoencoders() -> str:
    """Methods and verdicts of E14, data set by data set."""
    result = load("docs/results/autoencoders.json")
    if result is None:
        return "*Not run yet.*"
    parts = [
        f"One thread of {machine_of(result)}; every method in a group had the same processor time. "
        "`python -m experiments run E14`"
    ]
    for name, found in result["metrics"].items():
        parts.append(f"**{name.upper()}**, {result['config']['budgets'][name]:.0f} s of processor time a method")
        parts.append(markdown(autoencoders_report.HEAD, autoencoders_report.rows(found)))
        parts.append(autoencoders_report.note(name, found))
        missing = result["not_run"][name]
        parts += [f"Not run: {', '.join(missing)}."] if missing else []
    parts += [f"Stand-in: {remark}." for remark in result["stand_ins"]]
    return "\n\n".join([*parts, markdown(*autoencoders_report.claims_rows(result["verdicts"]))])


def first_order_grid() -> str:
    """What first-order methods reach over the published grid, and second-order ones without any, in the same time."""
    result = load("docs/results/autoencoders_grid.json")
    if result is None:
        return "*Not run yet.*"
    config = result["config"]
    parts = []
    for name, found in result["metrics"].items():
        widths = "-".join(str(width) for width in result["widths"][name])
        parts += [
            f"{name.upper()} ({widths} and mirrored{'; hidden widths divided' * (config['shrink'] > 1)}), "
            f"{config['budgets'][name]:.0f} s of processor time for every one of the settings; one thread of "
            f"{machine_of(result)}. `python -m experiments run autoencoders_grid --out results/E14_grid`",
            markdown(*autoencoders_report.grids(result["pilots"][name])),
            markdown(autoencoders_report.HEAD, autoencoders_report.rows(found)),
            autoencoders_report.note(name, found),
        ]
    return "\n\n".join([*parts, markdown(*autoencoders_report.claims_rows(result["verdicts"]))])


def papers() -> str:
    """One line for each of the 35 experiments, then the claims of those on single claims."""
    head = ["id", "experiment", "claims", "size of the run", "seeds", "minutes"]
    rows, parts = [], []
    for entry in entries():
        result = entry.result
        if result is None:
            rows.append([entry.id, entry.title, "not run at a size worth keeping", "", "", ""])
            continue
        rows.append([entry.id, entry.title, counts(entry.verdicts), entry.size if entry.own else "see its page",
                     str(entry.seeds), f"{result['wall_time_s'] / 60:.1f}"])  # fmt: skip
        if entry.own:
            claims = [
                [v.claim, v.here, v.published or "-", v.verdict + (f": {v.why}" if v.why else ""), v.seeds]
                for v in entry.verdicts
            ]
            columns = ["claim", "here", "published", "verdict", "seeds"]
            parts.append(f"**{result['title']}.** {entry.size} {machine_of(dict(result))}. "
                         f"`{entry.command}`\n\n{markdown(columns, claims)}")  # fmt: skip
    return "\n\n".join([markdown(head, rows), *parts])


def papers_short() -> str:
    """All 35 experiments in one line each: how many claims held here."""
    found = [entry for entry in entries() if entry.result is not None]
    total = counts([verdict for entry in found for verdict in entry.verdicts if entry.id not in VIEWS])
    rows = [[entry.id, entry.title, counts(entry.verdicts)] for entry in found]
    return f"{total}.\n\n" + markdown(["id", "experiment", "claims here"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "continual_short": continual_short,
    "recurrent": recurrent,
    "ood_mnist": ood_mnist,
    "ood_mnist_published": partial(ood_mnist, "ood_mnist_published"),
    "ood_pairs": ood_pairs,
    "uci": uci,
    "predictions": predictions,
    "many_outputs": many_outputs,
    "toy_regression": toy_regression,
    "fit_cost": fit_cost,
    "optimizers": optimizers,
    "importance": importance,
    "wide_factors": wide_factors,
    "auto_estimator": auto_estimator,
    "plans": plans,
    "penalty": penalty,
    "support": lk.support_table,
    "calibration": calibration,
    "calibration_short": calibration_short,
    "shakespeare": shakespeare,
    **{name: partial(stream, name) for name in STREAMS},
    "autoencoders": autoencoders,
    "first_order_grid": first_order_grid,
    "papers": papers,
    "papers_short": papers_short,
}
