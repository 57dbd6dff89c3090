"""What a low rank beside the diagonal is worth: the output factor of a trained language model's head, of every rank.

A network that predicts the next word of Shakespeare from two words is trained; its output factor is kept whole, and by
its diagonal with low ranks. Errors are relative Frobenius norms: true ones against the whole factor, and what
``summary()`` says. Seconds are processor seconds of one fit of the last layer.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

RANKS = (0, 4, 8, 16, 32)
WORDS, EXAMPLES, EPOCHS, WIDTH, BATCH = 2000, 4096, 3, 128, 512
LIMIT = 1.0  # of the error of the default rank over that of the diagonal alone


def words() -> Any:
    """Triples of word numbers, ``(M, 3)``; rare words are number 0."""
    import torch

    folder = Path(os.environ.get("LAPLACE_KF_DATA", "data")) / "tinyshakespeare"
    text = next(path for path in sorted(folder.rglob("*.txt")) if path.stat().st_size > 100_000).read_text()
    tokens = re.findall(r"[a-z']+|[.,;:?!]", text.lower())
    number = {word: k + 1 for k, (word, _) in enumerate(Counter(tokens).most_common(WORDS - 1))}
    found = torch.tensor([number.get(token, 0) for token in tokens])
    return torch.stack([found[:-2], found[1:-1], found[2:]], 1)


def trained(triples: Any) -> Any:
    """The network, trained, in float64."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(WORDS, 32), nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WORDS)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(triples)).split(BATCH):
            loss = nn.functional.cross_entropy(model(triples[rows, :2]), triples[rows, 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.double()


def run(rounds: int = 1) -> dict[str, Any]:
    """Errors and seconds by estimator and rank."""
    import warnings

    import torch

    import laplace_kf as lk
    from laplace_kf.structures.kron import WIDE_RANK, Kronecker

    torch.set_num_threads(1)
    triples = words()
    model = trained(triples)
    chosen = triples[torch.randperm(len(triples), generator=torch.Generator().manual_seed(1))[:EXAMPLES]]
    batches = [(part[:, :2], part[:, 2]) for part in chosen.split(BATCH)]
    with torch.no_grad():
        loss = float(torch.stack([torch.nn.functional.cross_entropy(model(x), y) for x, y in batches]).mean())
    costs: dict[str, Any] = {}
    met: dict[str, bool] = {}
    for estimator in ("exact", "sampled"):

        def factor(structure: Any, name: str = estimator) -> tuple[Any, float]:
            start = time.process_time()
            statistics = lk.curvature.estimate(
                model, "categorical", batches, structure, name, parameters="last_layer",
                generator=torch.Generator().manual_seed(2),
            )  # fmt: skip
            matrix: Any = statistics.mean().entries[0][1]
            return matrix.outputs, time.process_time() - start

        whole = factor(Kronecker())[0][0]
        for rank in RANKS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [factor(Kronecker(max_side=WORDS // 4, wide_rank=rank)) for _ in range(rounds)]
            outputs = found[0][0]
            near = torch.diag(outputs[0]) if rank == 0 else outputs.dense()[0]
            costs[f"{estimator}, rank {rank}"] = {
                "error": float((whole - near).norm() / whole.norm()),
                "told": None if rank == 0 else outputs.error,
                "rank": 0 if rank == 0 else outputs.rank,
                "seconds": sorted(seconds for _, seconds in found)[len(found) // 2],
            }
        alone, default = (costs[f"{estimator}, rank {rank}"]["error"] for rank in (0, WIDE_RANK))
        met[f"{estimator}: error of rank {WIDE_RANK} over that of the diagonal"] = default / alone <= LIMIT
    return {
        "workload": f"head of {WORDS} words, {EXAMPLES} examples, training loss {loss:.2f}, one thread, float64",
        "costs": costs,
        "met": met,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'job':20} {'error':>8} {'told':>8} {'rank':>5} {'fit s':>7}"]
    for name, cost in result["costs"].items():
        told = "" if cost["told"] is None else f"{cost['told']:.4f}"
        lines.append(f"{name:20} {cost['error']:8.4f} {told:>8} {cost['rank']:5} {cost['seconds']:7.2f}")
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
