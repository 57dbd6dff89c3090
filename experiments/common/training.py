"""Networks, batches and the one training loop of the experiments.

Everything is driven by seeds through private generators; the few torch parts that only know the global generator
(initialisation, ``nn.Dropout`` in training) run inside :func:`private_rng`, which puts it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from laplace_kf.reports import private_rng

__all__ = ["Batches", "binarise", "generator", "mlp", "outputs", "train"]

Transform = Callable[[Tensor, torch.Generator], Tensor]


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator on ``device`` that starts at ``seed``."""
    return torch.Generator(device).manual_seed(seed)


def mlp(widths: Sequence[int], *, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """A fully connected ReLU net, inputs flattened; ``dropout`` follows each hidden activation.

    Args:
        widths: input, hidden and output widths.
        dropout: probability of dropping a hidden unit; 0 leaves the dropout modules out.
        seed: decides the initial weights (torch's default initialisation).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    with private_rng(seed):
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Linear(widths[-2], widths[-1]))
    return nn.Sequential(*layers)


def binarise(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each pixel drawn from a Bernoulli with its grey level in [0, 1] as probability; same shape and dtype."""
    return torch.bernoulli(images, generator=rng)


class Batches:
    """Shuffled minibatches of tensors held in memory; every pass draws a new order and new augmentations.

    Args:
        inputs: ``(N, ...)``.
        targets: ``(N, ...)``.
        size: examples per batch; the last one of a pass may be smaller.
        rng: drawn from on each pass; decides order and augmentation. On the device of ``inputs``.
        transform: ``(inputs, rng) -> inputs`` applied to each batch, for example :func:`binarise`.
        shuffle: whether to visit the examples in a random order.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        rng: torch.Generator,
        *,
        transform: Transform | None = None,
        shuffle: bool = True,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        self.inputs, self.targets, self.size = inputs, targets, size
        self.rng, self.transform, self.shuffle = rng, transform, shuffle

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        total, device = len(self.inputs), self.inputs.device
        order = torch.arange(total, device=device)
        if self.shuffle:
            order = torch.randperm(total, generator=self.rng, device=device)
        for index in order.split(self.size):
            inputs = self.inputs[index]
            yield (self.transform(inputs, self.rng) if self.transform else inputs), self.targets[index]


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    penalty: Callable[[], Tensor] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    over: Callable[[], bool] | None = None,
    seed: int = 0,
    progress: str | None = None,
    kept: Path | None = None,
) -> list[float]:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: the network.
        batches: iterated once per epoch.
        optimizer: over the model's parameters.
        epochs: passes over the data.
        loss: ``(outputs, targets) -> ()``, the mean over the batch.
        penalty: added to every batch's loss, on the scale of a per-example mean (``½θᵀΛθ/N``, ``KL/N``).
        before_step: called between ``backward()`` and each update (implicit steps of a penalty, for instance).
        after_step: called after each update (Synaptic Intelligence's running sums, for instance).
        scheduler: stepped once per epoch.
        over: asked after each epoch, with the model in eval mode, whether that was the last one.
        seed: for the network's own randomness (dropout masks).
        progress: text of a progress bar, None for no bar.
        kept: a file that has everything after each finished epoch; if it is there, training goes on from it. The name
            has to say what the weights depend on. Not for hooks (``before_step``, ``after_step``, ``over``) with a
            state of their own; on a GPU the masks of dropout go on with other numbers than without the break.

    Returns:
        The mean loss, penalty included, of each epoch.

    Raises:
        FloatingPointError: as soon as an epoch's loss is not finite.
    """
    history: list[float] = []
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, **({"scheduler": scheduler} if scheduler else {})}
    model.train()
    steps = epochs * len(batches)
    with private_rng(seed), tqdm(total=steps, desc=progress, disable=progress is None, leave=False) as bar:
        if kept is not None and kept.is_file():
            history = _go_on(kept, parts, batches.rng)
            bar.update(len(history) * len(batches))
        for epoch in range(len(history), epochs):
            total = torch.zeros((), device=batches.inputs.device)
            for inputs, targets in batches:
                optimizer.zero_grad(set_to_none=True)
                objective = loss(model(inputs), targets)
                if penalty is not None:
                    objective = objective + penalty()
                objective.backward()
                if before_step is not None:
                    before_step()
                optimizer.step()
                if after_step is not None:
                    after_step()
                total += objective.detach()
                bar.update()
            history.append(float(total) / len(batches))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(f"The training loss of epoch {epoch + 1} is {history[-1]}.")
            if scheduler is not None:
                scheduler.step()
            bar.set_postfix(loss=f"{history[-1]:.3f}")
            if kept is not None:
                _keep(kept, parts, batches.rng, history)
            if over is not None:
                model.eval()
                if over():
                    break
                model.train()
    model.eval()
    return history


def _keep(path: Path, parts: dict[str, Any], rng: torch.Generator, history: list[float]) -> None:
    """Writes the states of ``parts`` and of both generators, under the name only when all of it is there."""
    state = {name: part.state_dict() for name, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    generators = {"order": rng.get_state(), "masks": torch.get_rng_state()}
    torch.save({**state, "generators": generators, "history": history}, unfinished)
    unfinished.replace(path)


def _go_on(path: Path, parts: dict[str, Any], rng: torch.Generator) -> list[float]:
    """Puts everything back as :func:`_keep` found it; returns the losses until then."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    rng.set_state(state["generators"]["order"])
    torch.set_rng_state(state["generators"]["masks"])
    history: list[float] = state["history"]
    return history


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor, *, size: int = 5000) -> Tensor:
    """The model's outputs ``(N, C)`` for ``inputs``, ``size`` examples at a time, in the mode that it is in."""
    return torch.cat([model(part) for part in inputs.split(size)])
