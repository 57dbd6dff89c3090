"""What is reported of a task sequence, from one matrix: accuracy on task ``i`` after training on task ``t``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, as_batches, run, to_device
from laplace_kf.conventions import IGNORED
from laplace_kf.errors import ShapeMismatch
from laplace_kf.graphs import of_role
from laplace_kf.models import preserved
from laplace_kf.reading import Part, reading

__all__ = ["accuracy", "average_accuracy", "forgetting", "forward_transfer"]


def accuracy(
    model: nn.Module,
    loader: Iterable[Any] | tuple[Any, Tensor],
    *,
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
) -> float:
    """Share of examples whose largest output ``(N, C)`` is the target ``(N,)``, in eval mode; the model stays as it is.

    Targets of -100 are left out; of a graph, those outside ``test_mask``.

    Raises:
        ShapeMismatch: if there are no examples.
    """
    read = reading(forward, inputs, targets)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = count = 0
    with preserved(model), torch.no_grad():
        for batch in as_batches(loader, model):
            outputs, wanted = run(model, of_role(to_device(batch, device), "test_mask"), read)
            right += int((outputs.argmax(-1) == wanted.to(outputs.device)).sum())
            count += int((wanted != IGNORED).sum())
    if not count:
        raise ShapeMismatch("accuracy needs at least one example")
    return right / count


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy over the tasks seen so far after each task: ``(T, T) -> (T,)`` (methods 11.7).

    Args:
        matrix: ``[t, i]`` is the accuracy on task ``i`` after training on task ``t``; entries above the diagonal may be
            NaN.

    Raises:
        ShapeMismatch: if it is not square.
    """
    size = _checked(matrix)
    return torch.stack([matrix[t, : t + 1].mean() for t in range(size)])


def forgetting(matrix: Tensor) -> Tensor:
    """Mean over all tasks but the last of the best earlier accuracy minus the final one, 0-dim (Chaudhry et al. 2018).

    Negative if earlier tasks became better; 0 for a single task. ``matrix (T, T)`` as of :func:`average_accuracy`.

    Raises:
        ShapeMismatch: if it is not square.
    """
    size = _checked(matrix)
    drops = [matrix[i : size - 1, i].max() - matrix[size - 1, i] for i in range(size - 1)]
    return torch.stack(drops).mean() if drops else matrix.new_zeros(())


def forward_transfer(matrix: Tensor, baseline: Tensor) -> Tensor:
    """Mean over all tasks but the first of the accuracy just before training on it minus that of an untrained network.

    0-dim (Lopez-Paz and Ranzato 2017); 0 for a single task.

    Args:
        matrix: ``(T, T)`` as of :func:`average_accuracy`, with the entries right above the diagonal.
        baseline: accuracies ``(T,)`` at the random initialisation.

    Raises:
        ShapeMismatch: if the shapes do not fit.
    """
    size = _checked(matrix)
    if baseline.shape != (size,):
        raise ShapeMismatch(f"the baseline must be ({size},), got {tuple(baseline.shape)}")
    gains = [matrix[i - 1, i] - baseline[i] for i in range(1, size)]
    return torch.stack(gains).mean() if gains else matrix.new_zeros(())


def _checked(matrix: Tensor) -> int:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ShapeMismatch(f"the accuracies must be (T, T), got {tuple(matrix.shape)}")
    return int(matrix.shape[0])
