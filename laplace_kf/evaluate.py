"""``python -m laplace_kf evaluate``: a saved posterior, files of inputs, a table and a page.

Files are ``.npz``, ``.safetensors`` or ``.pt`` (tensors only) with the inputs under ``x`` and, where there are labels,
``y``; or ``.npy`` with inputs alone. The network comes from a function of the user's, named ``module:function``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from laplace_kf.errors import CorruptFile, ShapeMismatch, UnknownName, UnusableFile
from laplace_kf.files import require_file, require_room, usable_path
from laplace_kf.likelihoods import Categorical
from laplace_kf.posterior import LaplacePosterior

if TYPE_CHECKING:
    from laplace_kf.reports.html import Report

__all__ = ["arguments", "batches", "main", "network", "read_file"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("posterior", type=Path, help="file written by posterior.save")
    parser.add_argument("--model", required=True, metavar="MODULE:FUNCTION", help="makes the network")
    parser.add_argument("--inside", required=True, type=Path, metavar="FILE", help="in-distribution inputs x, labels y")
    parser.add_argument(
        "--outside", action="append", default=[], metavar="NAME=FILE", help="out-of-distribution inputs; several times"
    )
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="in-distribution x, y to compare with ('auto')")
    parser.add_argument("--kinds", metavar="KIND,KIND", help="kinds of scores (default: all that the posterior has)")
    parser.add_argument("--layers", choices=("last", "all"), help="of leverages (default: the last)")
    parser.add_argument("--samples", type=int, default=100, help="weight draws (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/evaluation"), help="default: %(default)s")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors ``x (N, ...)`` and, if there are any, ``y (N, ...)`` of a file.

    Raises:
        MissingFile: if there is no such file.
        UnusableFile: if it is a folder, or may not be read.
        CorruptFile: if it cannot be read.
        UnknownName: for another ending.
        ShapeMismatch: if it has no ``x``, no examples, or ``x`` and ``y`` are not equally long.
    """
    require_file(path)
    if path.suffix not in READERS:
        raise UnknownName("file ending", path.suffix, READERS)
    try:
        with usable_path(path, "read"):
            path.open("rb").close()  # what the system refuses is not the file's fault
        found = READERS[path.suffix](path)
    except UnusableFile:
        raise
    except (ValueError, TypeError, OSError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    odd = {name: found[name] for name in ("x", "y") if name in found and not isinstance(found[name], Tensor)}
    for name, value in odd.items():
        raise ShapeMismatch(f"{path}: {name} is a {type(value).__name__}; it must be a tensor, torch.tensor({name})")
    kept = {name: found[name] for name in ("x", "y") if isinstance(found.get(name), Tensor)}
    if "x" not in kept:
        raise ShapeMismatch(f"{path} has no inputs under 'x' (it has {sorted(map(str, found))})")
    if not kept["x"].dim() or not len(kept["x"]):
        raise ShapeMismatch(f"{path}: x of shape {tuple(kept['x'].shape)} has no examples; it must have a row for each")
    if len({value.shape[:1] for value in kept.values()}) > 1:
        raise ShapeMismatch(
            f"{path}: x {tuple(kept['x'].shape)} and y {tuple(kept['y'].shape)} differ in length; they must have a "
            "row for every example"
        )
    return kept


def _npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _npy(path: Path) -> dict[str, Tensor]:
    return {"x": torch.from_numpy(np.load(path, allow_pickle=False))}


def _pt(path: Path) -> dict[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Tensor):
        return {"x": found}
    return dict(found) if isinstance(found, Mapping) else dict(zip("xy", found, strict=False))


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".pt": _pt,
    ".pth": _pt,
    ".safetensors": lambda path: dict(load_file(path)),
}


def network(name: str) -> nn.Module:
    """The network that the function ``module:function`` makes.

    Raises:
        ShapeMismatch: for another form of name, if it takes arguments, or if it makes something else.
        UnknownName: if the module has no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ShapeMismatch(f"--model takes MODULE:FUNCTION, for example my_networks:resnet, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = importlib.import_module(module)
    if not hasattr(found, function):
        names = [known for known, value in vars(found).items() if callable(value)]
        raise UnknownName(f"function of {module}", function, names)
    make = getattr(found, function)
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ShapeMismatch(
            f"--model {name} takes arguments ({error}); name a function without any, def make(): return {function}(...)"
        ) from error
    made = make()
    if not isinstance(made, nn.Module):
        raise ShapeMismatch(f"--model {name} made a {type(made).__name__}; it must be a torch.nn.Module")
    return made


def batches(data: Mapping[str, Tensor], size: int, like: Tensor) -> Any:
    """Batches ``(x, y)`` of at most ``size`` examples; without labels, inputs ``(N, ...)`` and zeros."""
    x = data["x"].to(like) if data["x"].is_floating_point() else data["x"]
    parts = x.split(size)
    labels = data["y"].split(size) if "y" in data else [torch.zeros(len(part)) for part in parts]
    return list(zip(parts, labels, strict=True))


def _is_one_float(labels: Tensor | None) -> bool:
    return labels is not None and labels.dim() == 1 and labels.is_floating_point()


def main(chosen: argparse.Namespace) -> Report:
    """Runs the command and prints its tables.

    Raises:
        LaplaceKFError, OSError, ImportError: for a file, a network or a name that is not to be had; says which.
    """
    from laplace_kf.reports.evaluation import evaluate  # needs an extra

    if chosen.samples < 1 or chosen.batch_size < 1:
        raise ShapeMismatch("--samples and --batch-size must be at least 1")
    require_room(chosen.out)
    outside = {}
    for item in chosen.outside:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ShapeMismatch(f"--outside takes NAME=FILE, got {item!r}")
        outside[name] = read_file(Path(path))
    inside = read_file(chosen.inside)
    calibration = None if chosen.calibrate is None else read_file(chosen.calibrate)
    model = network(chosen.model)
    posterior = LaplacePosterior.load(chosen.posterior, model)
    like = next(iter(posterior.mean.values()))
    for path, data in ((chosen.inside, inside), (chosen.calibrate, calibration)):
        if data is not None and isinstance(posterior.likelihood, Categorical) and _is_one_float(data.get("y")):
            raise ShapeMismatch(
                f"{path}: the labels y are {data['y'].dtype}, and those of classes are whole numbers; save y.long() "
                "(or y.astype(int)), or leave y out"
            )
    if calibration is not None:
        posterior.calibrate(batches(calibration, chosen.batch_size, like), samples=chosen.samples)
    kinds = None if chosen.kinds is None else [kind.strip() for kind in chosen.kinds.split(",") if kind.strip()]
    report = evaluate(
        posterior,
        batches(inside, chosen.batch_size, like),
        {name: batches(data, chosen.batch_size, like) for name, data in outside.items()},
        chosen.out,
        kinds=kinds,
        layers=chosen.layers,
        samples=chosen.samples,
        seed=chosen.seed,
    )
    print("\n\n".join(table.text() for table in report.tables))
    print(f"\nwritten to {chosen.out}")
    return report
