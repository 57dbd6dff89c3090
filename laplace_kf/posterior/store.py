"""What a fit found as tensors and plain values, and back; :mod:`laplace_kf.files` writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import CorruptFile, LaplaceKFError
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.task_chain import TaskChain
from laplace_kf.structures.base import Statistics, Structure
from laplace_kf.tape import Block, EntryLayout, FlatLayout
from laplace_kf.weighting import Weights

__all__ = ["consistent", "layout_of", "packed", "packed_fitted", "unpacked", "unpacked_fitted"]


@contextmanager
def consistent(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is put together inside comes from a file whose checksum is right; where it cannot be, the file is at fault.

    Raises:
        CorruptFile: in place of the error of whatever part did not fit the others.
    """
    try:
        yield
    except (LaplaceKFError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptFile(f"{path} contradicts itself: {type(error).__name__}: {error}") from error


def packed(statistics: Statistics) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Statistics as tensors (any shapes, by name) and JSON-able values."""
    tensors = {"log_likelihood": statistics.log_likelihood}
    for name, parts in statistics.sums.items():
        tensors.update({f"{name}/{k}": part for k, part in enumerate(parts)})
    fixed = statistics.structure.fixed
    for name, parts in fixed.items():
        tensors.update({f"fixed/{name}/{k}": part for k, part in enumerate(parts)})
    described = {
        "count": statistics.count,
        "terms": statistics.terms,
        "moments": statistics.moments.tolist(),
        "axes": statistics.axes,
        "names": list(statistics.layout.names),
        "shapes": [list(shape) for shape in statistics.layout.shapes],
        "blocks": [block.to_json() for block in statistics.blocks.values()],
        "parts": {name: len(parts) for name, parts in statistics.sums.items()},
        "fixed": {name: len(parts) for name, parts in fixed.items()},
        "entries": statistics.layout.to_json(),
        "held": [list(place) for place in statistics.layout.held],
    }
    described["sizes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return tensors, described


def layout_of(described: Mapping[str, Any]) -> FlatLayout:
    """The flat layout of packed statistics."""
    held = tuple((name, start, stop) for name, start, stop in described.get("held", ()))
    whole = FlatLayout(tuple(described["names"]), tuple(tuple(shape) for shape in described["shapes"]), held=held)
    chosen = described.get("entries")
    return whole if chosen is None else EntryLayout(whole.names, whole.shapes, tuple(map(tuple, chosen)))


def unpacked(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any], structure: Structure, device: torch.device
) -> Statistics:
    """The inverse of :func:`packed`, with the sums (any shapes) on ``device``."""
    for name, size in described.get("sizes", {}).items():
        if list(tensors[name].shape) != size:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, and was saved with {tuple(size)}")

    def parts(prefix: str, counts: Mapping[str, int]) -> dict[str, tuple[Tensor, ...]]:
        return {n: tuple(tensors[f"{prefix}{n}/{k}"].to(device) for k in range(c)) for n, c in counts.items()}

    return Statistics(
        structure=structure.with_fixed(parts("fixed/", described.get("fixed", {}))),
        layout=layout_of(described),
        blocks={data["name"]: Block.from_json(data) for data in described["blocks"]},
        sums=parts("", described["parts"]),
        count=float(described["count"]),
        log_likelihood=tensors["log_likelihood"],
        terms=float(described["terms"]),
        moments=torch.tensor(described.get("moments", []), dtype=torch.float64),
        axes=described.get("axes"),
    )


def packed_fitted(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a fit found, as tensors (any shapes, by name) and JSON-able values; settings and functions are not in it."""
    tensors, described = packed(fitted.statistics)
    tensors.update({f"rest/{name}": value for name, value in fitted.rest.items()})
    header: dict[str, Any] = {"noise": fitted.noise, "statistics": described}
    if fitted.chain is not None:
        chained, header["chain"] = fitted.chain.packed()
        tensors.update(chained)
        header["n_newest"] = fitted.newest
    return {**tensors, "mean": fitted.mean}, header


def unpacked_fitted(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    structure: Structure,
    *,
    model: nn.Module,
    forward: Forward | None,
    weights: Weights,
    likelihood: Likelihood,
    damping: str,
) -> Fitted:
    """The inverse of :func:`packed_fitted` (tensors of any shapes, by name), on the device of the model's parameters.

    Args:
        tensors, header: as packed.
        structure: as a user asks for it.
        model, forward, weights, likelihood, damping: what is not saved here, see :class:`Fitted`.
    """
    layout = layout_of(header["statistics"])
    device = dict(model.named_parameters(remove_duplicate=False))[layout.names[0]].device
    statistics = unpacked(tensors, header["statistics"], structure, device)
    rest = {name: tensors[f"rest/{name}"].to(device) for name in layout.names if f"rest/{name}" in tensors}
    chain = None if header.get("chain") is None else TaskChain.unpacked(tensors, header["chain"], layout, device)
    if tensors["mean"].shape != (layout.size,):
        raise ValueError(f"a mean of shape {tuple(tensors['mean'].shape)} for {layout.size} weights")
    found = Fitted(
        model, forward, weights, likelihood, damping, statistics, statistics.mean(), tensors["mean"].to(device),
        header["noise"], rest, chain,
    )  # fmt: skip
    return found.joined(header.get("n_newest"))
