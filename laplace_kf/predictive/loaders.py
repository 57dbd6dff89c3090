"""Predictions of a whole loader, batch after batch, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from laplace_kf.batches import Forward, as_batches, inputs_of
from laplace_kf.callers import warn_user
from laplace_kf.errors import ShapeMismatch
from laplace_kf.graphs import is_graph
from laplace_kf.operators import fresh_generator
from laplace_kf.randomness import same_random_states
from laplace_kf.registry import AUTO
from laplace_kf.shards import random_order

ACTIVATIONS = "activations"  # the space in which every batch draws for itself

__all__ = ["batch_after_batch", "is_loader", "refuse_loader"]


def is_loader(x: Any) -> bool:
    """Whether the input of ``predict`` brings batches: a loader, or an iterator."""
    if isinstance(x, (Tensor, Mapping, tuple, list)) or is_graph(x):
        return False
    return isinstance(x, (DataLoader, Iterator)) or (hasattr(x, "__iter__") and hasattr(x, "dataset"))


def refuse_loader(x: Any) -> None:
    """Raises :class:`ShapeMismatch` for a loader in the place of inputs that have to be given together."""
    if is_loader(x):
        raise ShapeMismatch(
            f"inputs were asked for, and a {type(x).__name__} was given, which brings batches; give all of its inputs "
            "together, torch.cat([batch[0] for batch in loader])"
        )


R = TypeVar("R")


def batch_after_batch(
    predict: Callable[..., R],
    loader: Any,
    model: nn.Module,
    forward: Forward | None,
    weights: Any,
    space: str,
    generator: torch.Generator | None,
    progress: bool,
    join: Callable[[Sequence[R]], R],
) -> R:
    """One prediction over all examples of a loader.

    Every batch sees the same random numbers, so that a sample is one function over all of them; drawn weights are
    preferred to drawn activations, which are independent between examples, for the same reason.

    Args:
        predict: of one batch's inputs, with ``generator=`` and ``space=``.
        loader: of batches as in ``fit``, whose targets are left out, or of inputs alone.
        model: the network.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        weights: of the posterior: unless ``False``, batches may be ``(x, y, w)``.
        space: as asked for.
        generator: random numbers; afterwards it is where one call would have left it.
        progress: show a bar.
        join: puts the answers of all batches together.

    Raises:
        ShapeMismatch: for an empty loader, batches that have to be told apart by ``inputs=``, or outputs of several
            shapes.
    """
    sampler = random_order(loader)
    if sampler is not None:
        warn_user(
            f"the loader reads its examples in a random order ({sampler}), and the rows of the answer are in that one: "
            "row i is not example i of the data set. Give a loader in order, "
            "torch.utils.data.DataLoader(loader.dataset, batch_size=256)"
        )
    generator = generator if generator is not None else fresh_generator()
    state = generator.get_state()
    parts = []
    with same_random_states():  # a loader shuffles and seeds itself from the global random numbers
        for batch in tqdm(as_batches(loader, model), desc="predict", disable=not progress):
            if forward is None and isinstance(batch, (tuple, list)) and len(batch) > (2 if weights is False else 3):
                raise ShapeMismatch(
                    f"a prediction was asked of a loader whose batches are {type(batch).__name__}s of {len(batch)}; "
                    "say which part is what with LaplacePosterior(..., inputs=lambda batch: batch[0], "
                    "targets=lambda batch: batch[1])"
                )
            if space != ACTIVATIONS:
                generator.set_state(state)
            inputs = inputs_of(batch, forward)
            parts.append(predict(inputs, space="weights" if space == AUTO else space, generator=generator))
        state = generator.get_state()
    generator.set_state(state)  # also where it is the global one
    if not parts:
        raise ShapeMismatch(
            "the loader is empty: no batch was yielded, so there is nothing to predict; a generator that was read "
            "before is empty: give a list or a DataLoader"
        )
    return join(parts)
