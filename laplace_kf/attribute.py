"""``python -m laplace_kf attribute``: the most helpful and harmful training examples of every query.

Files and networks are given as to ``python -m laplace_kf evaluate``; both files need labels ``y``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from laplace_kf.attribution import OF, Attribution
from laplace_kf.errors import ShapeMismatch, UnusableFile
from laplace_kf.evaluate import batches, network, read_file
from laplace_kf.files import require_folder, usable_path
from laplace_kf.posterior import LaplacePosterior

__all__ = ["arguments", "main"]

DRAWN = 10  # queries of a picture at most


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("posterior", nargs="+", type=Path, help="files written by posterior.save; several are averaged")
    parser.add_argument("--model", required=True, metavar="MODULE:FUNCTION", help="makes the network")
    parser.add_argument("--train", required=True, type=Path, metavar="FILE", help="training inputs x and labels y")
    parser.add_argument("--queries", required=True, type=Path, metavar="FILE", help="inputs x and labels y asked about")
    parser.add_argument("--of", default="loss", choices=sorted(OF), help="influence on what (default: %(default)s)")
    parser.add_argument("--damping", type=float, help="λ in place of the posterior's")
    parser.add_argument("--top", type=int, default=5, help="examples shown of every query (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--accuracy", type=float, help="relative error that scores may have for speed, such as 0.01")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draws them (images x; PNG)")
    parser.add_argument("--out", type=Path, default=Path("scores.safetensors"), help="default: %(default)s")


def main(chosen: argparse.Namespace) -> Tensor:
    """Runs the command, prints a table, writes the scores; returns them, ``(Q, N)``.

    Raises:
        LaplaceKFError, OSError, ImportError: for a file, a network or a name that is not to be had; says which.
    """
    if chosen.top < 1 or chosen.batch_size < 1:
        raise ShapeMismatch("--top and --batch-size must be at least 1")
    if chosen.picture is not None and read_file(chosen.queries)["x"].dim() not in (3, 4):
        raise ShapeMismatch(f"--picture needs images x (N, H, W) or (N, C, H, W), and {chosen.queries} has none")
    read = {path.resolve() for path in (*chosen.posterior, chosen.train, chosen.queries)}
    for written in filter(None, (chosen.out, chosen.picture)):
        if written.resolve() in read:
            raise UnusableFile(
                f"{written} is read from, and would be written over; give --out and --picture other names"
            )
        require_folder(written)  # before the work, not after it
    posteriors = [LaplacePosterior.load(path, network(chosen.model)) for path in chosen.posterior]
    like = next(iter(posteriors[0].mean.values()))

    def data(path: Path) -> Any:
        found = read_file(path)
        if "y" not in found:
            raise ShapeMismatch(f"{path} has no labels under 'y', and an influence is one of losses")
        return batches(found, chosen.batch_size, like)

    attribution = Attribution(posteriors)
    scores = attribution.influence(
        data(chosen.train), data(chosen.queries), chosen.of, damping=chosen.damping, accuracy=chosen.accuracy
    )
    attribution.save(chosen.out)
    print("query  most helpful (training example: score)  |  most harmful")
    for query, row in enumerate(scores):
        shown = min(chosen.top, len(row))
        listed = []
        for sign in (1, -1):
            found = (sign * row).topk(shown)
            listed.append("  ".join(f"{int(i)}: {sign * float(v):+.3g}" for v, i in zip(*found, strict=True)))
        print(f"{query:5d}  {listed[0]}  |  {listed[1]}")
    if chosen.picture is not None:
        _drawn(scores, chosen)
        print(f"\npicture written to {chosen.picture}")
    print(f"\n{scores.shape[0]} x {scores.shape[1]} scores written to {chosen.out}")
    return scores


def _drawn(scores: Tensor, chosen: argparse.Namespace) -> None:
    from laplace_kf.reports.influence_plots import influential  # needs the experiments extra

    train, queries = (read_file(path)["x"] for path in (chosen.train, chosen.queries))
    figure = influential(scores[:DRAWN], train, queries[:DRAWN], chosen.top)
    with usable_path(chosen.picture, "written"):
        figure.savefig(chosen.picture, dpi=150)
