"""The input of a prediction, looked at before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from laplace_kf import conventions
from laplace_kf.batches import Forward, graphs_of, leaves_of, map_examples, predicted, tensors_of, to_tensors
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Prediction
from laplace_kf.models import preserved
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.predictive.loaders import refuse_loader
from laplace_kf.replica import stage

__all__ = ["asked", "examples_of", "labelled"]

LOOKED_AT = 64  # examples by which the order of rows is found out


def asked(model: nn.Module, forward: Forward | None, x: Any, axes: int | None = None) -> Any:
    """The input with tensors for arrays, refused where it cannot be what it has to be.

    A tensor ``(N, ...)`` that goes through the user's ``forward=`` is tried with another number of rows first, two at
    most three: a forward that reads it as a batch (``batch[0]`` is its first example) gives as many rows as before,
    which shows also where that number is N by chance. Of a whole batch some examples are tried in both directions: a
    forward that leaves out, repeats or sorts them is refused.

    Args:
        model: the network; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        x: what ``predict`` was given.
        axes: how many a tensor of inputs had in the fit, where that is known.

    Raises:
        ShapeMismatch: if a tensor has one axis less than in the fit (an example, not a batch), if one is read as a
            batch, if rows and examples do not go together, if it holds no tensor, or for a data set without a loader.
    """
    if isinstance(x, Dataset):
        raise ShapeMismatch(
            f"predict was given {type(x).__name__}; wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)"
        )
    refuse_loader(x)
    if isinstance(x, (list, tuple)) and len(x) and all(isinstance(leaf, (int, float, bool)) for leaf in leaves_of(x)):
        raise ShapeMismatch(
            f"predict was given a {type(x).__name__} of numbers; make it a tensor or an array: torch.tensor(x)"
        )
    x = to_tensors(x, model)
    if isinstance(x, Tensor) and axes is not None and 0 < x.dim() == axes - 1:
        or_else = ", or x[:, None] for examples with one entry along their first axis" if axes > 2 else ""
        raise ShapeMismatch(
            f"the input has shape {tuple(x.shape)}, and the inputs of the fit had {axes} axes, the first for examples: "
            f"one example is a batch of one, x[None]{or_else}"
        )
    by_user = forward is not None and not hasattr(forward, "outputs_at")
    if by_user and isinstance(x, Tensor) and x.dim() and x.shape[0]:
        rows = torch.zeros(2 if x.shape[0] != 2 else 3, dtype=torch.long, device=x.device)
        with stage(model, forward) as (standing, own), preserved(standing), torch.no_grad():
            predicted(standing, x.detach()[rows], own)  # checks its rows
    if by_user or (forward is not None and not isinstance(x, Tensor)):
        _require_rows_of_examples(model, forward, x)
    return x


def _require_rows_of_examples(model: nn.Module, forward: Forward | None, x: Any) -> None:
    """Refuses a ``forward`` that leaves out, repeats or moves examples: a prediction is read by its rows.

    Shown by some of the examples together, and half of these in reverse order; if that gives other rows, one by one.
    """
    count = examples_of(x)
    if count is None or count < 2:
        return
    picked = torch.linspace(0, count - 1, min(count, LOOKED_AT)).round().long()
    half = picked[: (len(picked) + 1) // 2].flip(0)

    def outputs(rows: Tensor) -> Tensor:
        return predicted(standing, map_examples(x, count, lambda t: t.detach()[rows.to(t.device)]), own)

    with stage(model, forward) as (standing, own), preserved(standing), torch.no_grad():
        try:
            together, some = outputs(picked), outputs(half)
        except Exception:  # what is wrong with the input is said by the prediction itself
            return
        if together.dim() < 1 or len(together) != len(picked) or len(some) != len(half):
            raise ShapeMismatch(
                f"forward= makes outputs of shape {tuple(together.shape)} of {len(picked)} of the {count} examples "
                "that predict was given, and a prediction has a row for every example. Leave examples out before "
                "predict, or keep their rows and set their targets to -100; of several views of an example take the "
                "mean in forward="
            )
        if same_outputs(some, together[: len(half)].flip(0)):
            return
        for place in range(len(picked)):
            alone = outputs(picked[place : place + 1])[0]
            if same_outputs(alone, together[place]):
                continue
            if any(same_outputs(alone, row) for row in together):
                raise ShapeMismatch(
                    f"forward= puts the examples into another order (example {int(picked[place])} of {count} is not in "
                    "its row of the outputs), and a prediction is read by its rows. Undo it in forward=, "
                    "outputs[order.argsort()] after inputs[order], and leave the targets in their order"
                )
            return  # outputs that depend on other examples, or on random numbers


def examples_of(x: Any) -> int | None:
    """How many examples all tensors of an input have; ``None`` where that is not to be seen."""
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else None
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    if any(isinstance(part, list) for part in parts) or next(graphs_of(x), None) is not None:
        return None  # a list may hold examples, or what is to be known of each
    if any(isinstance(leaf, (int, float, str, PackedSequence)) for leaf in leaves_of(x)):
        return None
    sizes = {leaf.shape[0] for leaf in tensors_of(x) if leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def labelled(model: nn.Module, forward: Forward | None, x: Any, prediction: Prediction) -> Prediction:
    """The prediction, whose ``log_prob`` takes labels as a batch of the form of ``x`` has them.

    For a mapping given to a causal language model of transformers these are the batch's ``labels (N, T)``, of which
    label t + 1 belongs to position t, and ``(N,)`` for one of a single real output; else they stand beside the outputs.
    """
    if forward is not None or not isinstance(x, Mapping):
        return prediction
    return replace(prediction, density=partial(_density_of_labels, model, prediction.density))


def _density_of_labels(model: nn.Module, density: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    return density(conventions.targets(model, labels))
