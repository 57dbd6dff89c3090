"""Puts the tables that result files and registries hold into README.md, so that no number there is typed by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import laplace_kf as lk

__all__ = ["TABLES", "render", "write"]

ROOT = Path(__file__).parent.parent


def _load(path: str) -> dict[str, Any] | None:
    file = ROOT / path
    if not file.is_file():
        return None
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _machine(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"


def ood_mnist() -> str:
    """Methods and verdicts of E20."""
    result = _load("docs/results/ood_mnist.json")
    if result is None:
        return "*Not run yet.*"
    config = result["config"]
    columns = {"accuracy %": "accuracy", "NLL": "nll", "ECE %": "ece", "entropy MNIST": "entropy_in",
               "entropy notMNIST": "entropy_out", "AUROC": "auroc"}  # fmt: skip
    rows = []
    for method, values in result["metrics"].items():
        cells = [method]
        for title, key in columns.items():
            scale, digits = (100, 2) if title.endswith("%") else (1, 3)
            cells.append(f"{scale * values[key]['mean']:.{digits}f} ± {scale * values[key]['std']:.{digits}f}")
        rows.append(cells)
    verdicts = [
        f"* {v['claim']}: **{v['verdict']}** ({v['value']['mean']:.4f} against {v['reference']['mean']:.4f}; "
        f"difference {v['difference']['mean']:+.4f} ± {v['difference']['std']:.4f})"
        for v in result["verdicts"]
    ]
    head = (
        f"784-{config['hidden']}-{config['hidden']}-10, {config['epochs']} epochs on binarised MNIST, mean ± standard "
        f"deviation over {config['repeats']} seeds (first {result['seed']}); {_machine(result)}, "
        f"{result['wall_time_s'] / 60:.0f} minutes. `python -m experiments run ood_mnist`"
    )
    return "\n\n".join([head, _markdown(["method", *columns], rows), "\n".join(verdicts)])


def fit_cost() -> str:
    """Costs of fits."""
    result = _load("benchmarks/results/fit_cost.json")
    if result is None:
        return "*Not run yet.*"
    rows = [[name, f"{cost['ratio']:.2f}", f"{cost['ratio_min']:.2f} to {cost['ratio_max']:.2f}"]
            for name, cost in result["costs"].items()]  # fmt: skip
    peer = result["laplace-torch"]
    if "ratio" in peer:
        rows.append(["laplace-torch, Kronecker (decomposition included)", f"{peer['ratio']:.2f}",
                     f"{peer['ratio_min']:.2f} to {peer['ratio_max']:.2f}"])  # fmt: skip
    return f"{result['workload']}; {_machine(result)}.\n\n" + _markdown(["job", "epochs", "range"], rows)


def importance() -> str:
    """Error against cost of the estimators."""
    result = _load("benchmarks/results/importance.json")
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
    text = f"{result['workload']}, {100 * result['training_accuracy']:.2f} % training accuracy; {_machine(result)}."
    return text + "\n\n" + _markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "ood_mnist": ood_mnist,
    "fit_cost": fit_cost,
    "importance": importance,
    "support": lk.support_table,
}


def render(text: str) -> str:
    """README text with every marked table replaced by what the files say now."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no place for table {name!r}")
        content = table()
        text = pattern.sub(partial(_filled, content), text)
    return text


COLLECTED = {
    "results/E20/result.json": "docs/results/ood_mnist.json",
    "results/E20/entropy.png": "docs/pictures/ood_mnist.png",
    "results/demo/entropy.png": "docs/pictures/demo.png",
}


def _filled(content: str, place: re.Match[str]) -> str:
    return f"{place[1]}{content}\n{place[2]}"


def write() -> None:
    """Copies what runs of the experiments left under ``results/`` into ``docs/``, then rewrites README.md."""
    for source, target in COLLECTED.items():
        if (ROOT / source).is_file():
            (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, ROOT / target)
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
