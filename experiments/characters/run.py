"""Iterations and seconds to a validation loss: a character model of the size that nanoGPT trains on a laptop.

Tiny Shakespeare, 4 layers of width 128, windows of 64 characters, 12 of them a minibatch, no dropout: after 2,000
iterations of AdamW its README has a validation loss of 1.88 (nats a character). AdamW runs by that recipe (rate 1e-3
with 100 steps of warm-up and a cosine to a tenth, betas 0.9 and 0.99, weight decay 0.1 on matrices, gradients clipped
at 1).
Second-order methods see the same minibatches from the same weights, and get one and a half times AdamW's processor
seconds at most. The table shows AdamW at the iterations and at the seconds at which each of them ended, too.

Traces and states are kept in ``parts`` of the results folder, so that a run can be cut short and taken up again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import data, training
from experiments.common.checks import require
from experiments.shakespeare.transformer import Transformer, encode, windows
from laplace_kf import optim
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Report, Table

__all__ = ["METHODS", "Config", "rows", "run"]

FIRST = "AdamW"
LIMIT = 1.5  # of AdamW's processor seconds


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/characters.yaml``.

    Args:
        seed: of weights and minibatches.
        threads: processor threads, 0 for torch's default.
        methods: names of :data:`METHODS`.
        context: characters of a window.
        width: of the embeddings.
        heads: of each layer.
        layers: of the network.
        batch: windows of a minibatch.
        steps: iterations of AdamW, and at most of the others.
        aim: validation loss at which a method has arrived, nats a character.
        every: iterations between looks at the validation loss.
        validation: windows that it is the mean over, spread over the last tenth of the text.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    context: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 4
    batch: int = 12
    steps: int = 2000
    aim: float = 1.88
    every: int = 50
    validation: int = 200
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "width", "heads", "layers", "batch", "steps", "every", "validation"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        known = set(self.methods) <= set(METHODS) and FIRST in self.methods
        require("methods", self.methods, known, f"{FIRST!r} and some of {list(METHODS)}")


Step = Callable[[Tensor, Tensor], None]


class _First:
    """AdamW by nanoGPT's recipe."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.config, self.step_number = model, config, 0
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.99))

    def rate(self) -> float:
        warm = max(1, self.config.steps // 20)
        if self.step_number < warm:
            return 1e-3 * (self.step_number + 1) / (warm + 1)
        share = (self.step_number - warm) / max(1, self.config.steps - warm)
        return 1e-4 + 0.9e-3 * (1 + math.cos(math.pi * share)) / 2

    def step(self, x: Tensor, y: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step_number += 1

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "step": self.step_number}

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]


class _Second:
    """A preset of this package with its own defaults but for the start of the damping."""

    def __init__(self, model: nn.Module, config: Config, make: Callable[..., Any], **settings: Any) -> None:
        rng = training.generator(config.seed + 1)
        self.optimizer = make(model, "categorical", search_start=True, generator=rng, **settings)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.step(x, y)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


METHODS: dict[str, Callable[[nn.Module, Config], Any]] = {
    FIRST: _First,
    "K-FAC": lambda model, config: _Second(model, config, optim.kfac),
    "K-FAC, factors every 20": lambda model, config: _Second(model, config, optim.kfac, factors_every=20),
    "EK-FAC": lambda model, config: _Second(model, config, optim.ekfac),
}


def network(config: Config, classes: int) -> Transformer:
    """The network with GPT-2's initial weights."""
    with private_rng(config.seed):
        model = Transformer(classes, config.context, config.width, config.heads, config.layers)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                last = name.endswith(("out_proj.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
    return model


def _one(config: Config, method: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The trace of one method, from its files as far as it goes; ends at the aim, at ``seconds`` or with the steps."""
    text = data.text()
    alphabet = "".join(sorted(set(text)))
    codes = encode(text, alphabet)
    train, val = codes[: 9 * len(codes) // 10], codes[9 * len(codes) // 10 :]
    x_val, y_val = windows(val, config.context, config.validation)
    model = network(config, len(alphabet))
    way = METHODS[method](model, config)
    decisive = {k: v for k, v in asdict(config).items() if k not in ("threads", "methods", "progress")}
    found: dict[str, Any] = {"settings": decisive, "trace": [], "seconds": 0.0, "steps": 0, "done": False}
    folder.mkdir(parents=True, exist_ok=True)
    path, state = folder / f"{method}.json", folder / f"{method}.pt"
    if path.is_file() and state.is_file() and (before := json.loads(path.read_text()))["settings"] == decisive:
        found = before
        kept = torch.load(state, weights_only=False)  # of our own making
        model.load_state_dict(kept["model"])
        way.load(kept["way"])

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            parts = [
                float(nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
                for x, y in zip(x_val.split(50), y_val.split(50), strict=True)
            ]
        model.train()
        return sum(parts) / y_val.numel()

    while not found["done"]:
        rng = training.generator(1_000_003 * config.seed + found["steps"])
        start = torch.randint(len(train) - config.context, (config.batch,), generator=rng)
        places = start[:, None] + torch.arange(config.context)
        before_step = time.process_time()
        way.step(train[places], train[places + 1])
        found["seconds"] += time.process_time() - before_step
        found["steps"] += 1
        if found["steps"] % config.every and found["steps"] < config.steps:
            continue
        found["trace"].append([found["steps"], found["seconds"], loss()])
        found["done"] = found["steps"] >= config.steps or (
            method != FIRST and (found["trace"][-1][2] <= config.aim or found["seconds"] > seconds)
        )
        torch.save({"model": model.state_dict(), "way": way.state()}, state.with_suffix(".part"))
        state.with_suffix(".part").replace(state)
        path.write_text(json.dumps(found))
        if config.progress:
            tqdm.write(f"{method}: {found['trace'][-1]}", file=sys.stderr)
    return found


def arrived(trace: list[list[float]], aim: float) -> list[float] | None:
    """The first entry ``[iterations, seconds, loss]`` with a loss of at most ``aim``."""
    return next((entry for entry in trace if entry[2] <= aim), None)


def at(trace: list[list[float]], place: int, value: float) -> list[float] | None:
    """The last entry ``[iterations, seconds, loss]`` up to a number of iterations (place 0) or of seconds (1)."""
    return next((entry for entry in reversed(trace) if entry[place] <= value), None)


def rows(result: dict[str, Any], aim: float) -> tuple[list[str], list[list[str]]]:
    """Head and rows: when the aim was reached, where each method ended, and where the first one was there."""
    body = []
    first = result["runs"][FIRST]["trace"]
    for method, found in result["runs"].items():
        there = arrived(found["trace"], aim)
        end = found["trace"][-1]
        cells = ["not reached", ""] if there is None else [f"{there[0]:.0f}", f"{there[1]:.0f}"]
        per = found["seconds"] / found["steps"]
        beside = [None if method == FIRST else at(first, place, end[place]) for place in (0, 1)]
        others = ["" if entry is None else f"{entry[2]:.3f}" for entry in beside]
        body.append([method, *cells, f"{end[0]:.0f}", f"{end[1]:.0f}", f"{end[2]:.3f}", *others, f"{1000 * per:.0f}"])
    head = ["method", f"iterations to {aim:g}", "s", "iterations in all", "s", "loss at the end",
            f"{FIRST} after these iterations", "after these s", "ms an iteration"]  # fmt: skip
    return head, body


def run(config: Config, folder: Path) -> Report:
    """Trains what is missing and reports; traces are kept in ``folder``."""
    runs: dict[str, Any] = {}
    for method in sorted(config.methods, key=lambda name: name != FIRST):
        seconds = LIMIT * runs[FIRST]["seconds"] if runs else math.inf
        runs[method] = _one(config, method, folder, seconds)
    there = {method: arrived(found["trace"], config.aim) for method, found in runs.items()}
    first = there[FIRST]
    verdicts = [
        {"what": f"{method}: fewer than half of {config.steps} iterations, at no more seconds than {FIRST}",
         "met": entry is not None and entry[0] < config.steps / 2 and (first is None or entry[1] <= first[1])}
        for method, entry in there.items() if method != FIRST
    ]  # fmt: skip
    found = {"runs": runs, "verdicts": verdicts}
    summary = (
        f"Tiny Shakespeare, {config.layers} layers of width {config.width}, minibatches of {config.batch} windows "
        f"of {config.context} characters; validation loss over {config.validation} windows every {config.every} "
        "iterations; processor seconds of one thread, validation not counted."
    )
    table = Table(f"To a validation loss of {config.aim:g}", *rows(found, config.aim))
    quoted = {
        "title": table.title,
        "columns": list(table.columns),
        "rows": [list(row) for row in table.rows],
        "note": table.note,
    }
    return Report(
        title="A character model to one validation loss",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={method: each["trace"][-1] for method, each in runs.items()},
        tables=[table],
        details={**found, "summary": summary, "tables": [quoted], "stand_ins": []},
    )
