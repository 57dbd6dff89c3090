"""Training many small networks of one shape at once: members of ensembles, splits, strengths of weight decay.

Their parameters are stacked, ``(M, ...)``, and every step is one batched step of all of them, each on its own minibatch
of its own data. A thread that spends most of a small step on overhead trains a hundred of them in the time of a few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.common.training import generator

__all__ = ["outputs", "train_stacked"]

Loss = Callable[[Tensor, Tensor], Tensor]


def outputs(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs ``(M, B, C)`` of M ReLU networks at inputs ``(M, B, D)``.

    Args:
        parameters: weights ``(M, O, I)`` and biases ``(M, O)`` of every linear layer, in order.
        x: inputs, flat.
    """
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    for number, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
        x = x.relu() if number < len(layers) - 1 else x
    return x


def train_stacked(
    models: Sequence[nn.Sequential],
    data: Sequence[tuple[Tensor, Tensor]],
    owners: Sequence[int],
    *,
    loss: Loss,
    epochs: int,
    batch: int,
    lr: float,
    decays: Sequence[float],
    seed: int,
) -> None:
    """Train ``M`` networks in place, by Adam with a step size that falls to zero as a cosine; left in eval mode.

    Args:
        models: M fully connected ReLU networks of one shape (:func:`experiments.common.training.mlp`, no dropout).
        data: inputs ``(N, ...)`` and targets ``(N, ...)`` of every data set, all of the same N.
        owners: M numbers of data sets.
        loss: ``(outputs (M, B, C), targets (M, B, ...)) -> (M,)``, the means over the minibatches.
        epochs: passes over the data.
        batch: examples per minibatch; the last ones of a pass that do not fill one are left to the next pass.
        lr: largest step size.
        decays: M strengths δ of the penalty ``½ δ ‖θ‖²`` beside the mean loss.
        seed: decides the order of the examples.

    Raises:
        FloatingPointError: if a network's parameters are not finite at the end; names the first.
        ValueError: if the data sets differ in length, or a network has other layers.
    """
    count = len(data[0][0])
    if any(len(x) != count or len(y) != count for x, y in data):
        raise ValueError(f"data sets of different lengths: {[len(x) for x, _ in data]}")
    for module in models[0]:
        if not isinstance(module, nn.Flatten | nn.Linear | nn.ReLU):
            raise ValueError(f"only linear layers and ReLU can be stacked, not {type(module).__name__}")
    inputs = torch.stack([x.flatten(1) for x, _ in data])
    targets = torch.stack([y for _, y in data])
    own = torch.tensor(owners)[:, None]
    each = zip(*(model.parameters() for model in models), strict=True)
    weights = [torch.stack([value.detach() for value in values]).requires_grad_() for values in each]
    strength = [torch.tensor(decays).reshape(-1, *[1] * (value.dim() - 1)) for value in weights]
    size = min(batch, count)
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * (count // size)))
    rng = generator(seed)
    for _ in range(epochs):
        order = torch.rand(len(models), count, generator=rng).argsort(1)
        for start in range(0, size * (count // size), size):
            rows = order[:, start : start + size]
            total = loss(outputs(weights, inputs[own, rows]), targets[own, rows]).sum()
            for value, gradient, decay in zip(weights, torch.autograd.grad(total, weights), strength, strict=True):
                # the fused step reads gradients as if they were laid out like their parameters
                value.grad = (gradient + decay * value.detach()).contiguous()
            optimizer.step()
            schedule.step()
    for number, model in enumerate(models):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                if not bool(value[number].isfinite().all()):
                    raise FloatingPointError(f"network {number} of {len(models)} diverged")
                parameter.copy_(value[number])
        model.eval()
