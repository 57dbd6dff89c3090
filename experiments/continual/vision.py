"""Five data sets of pictures one after another: one trunk, and a last layer for each (methods 11.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiments.common import data
from experiments.common.claims import Claim
from experiments.continual.settings import Config
from experiments.continual.tasks import ABOVE, KRON, Pair, Stream, Task, Tasks
from laplace_kf.batches import Forward
from laplace_kf.demo import private_rng

__all__ = ["HeadTask", "LeNet", "Vision"]


@dataclass(frozen=True)
class HeadTask(Task):
    """A task with its own last layer; its targets are ``10 · head`` plus the class, and so known in mixed batches."""

    head: int = field(default=0, kw_only=True)

    @property
    def forward(self) -> Forward:
        """Through the task's own head, with targets in 0 to 9."""
        return lambda model, batch: (model(batch[0], self.head), batch[1] - 10 * self.head)


class LeNet(nn.Module):
    """conv20-5x5, pool2, conv50-5x5, pool2, FC500, all ReLU, and a last layer for each task (experiments E28).

    Args:
        seed: decides the weights, those of later heads too.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.heads = nn.ModuleList()
        with private_rng(seed):
            self.trunk = nn.Sequential(
                nn.Conv2d(3, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(1250, 500), nn.ReLU(),
            )  # fmt: skip

    def add_head(self) -> None:
        """One more last layer, of ten classes."""
        with private_rng(self.seed + len(self.heads)):
            head = nn.Linear(500, 10)
        self.heads.append(head.to(next(self.trunk.parameters()).device))

    def forward(self, x: Tensor, head: int | None = None) -> Tensor:
        """Outputs ``(N, 10)`` of one head, or ``(N, 10 · heads)`` of all, for images ``(N, 3, 32, 32)``."""
        features = self.trunk(x)
        chosen = list(self.heads) if head is None else [self.heads[head]]
        return torch.cat([layer(features) for layer in chosen], 1)


SETS = ("mnist", "notmnist", "fashion-mnist", "svhn", "cifar10")
PUBLISHED = {
    method: dict(zip(SETS, row, strict=True))
    for method, row in {
        KRON: (97.17, 94.78, 90.36, 85.59, 59.11),
        "diagonal online": (96.48, 93.41, 88.09, 81.79, 53.80),
        "Kronecker EWC": (97.85, 94.92, 89.31, 85.75, 58.78),
        "diagonal EWC": (97.83, 94.73, 89.13, 79.80, 53.29),
        "Synaptic Intelligence": (87.27, 79.12, 84.61, 77.44, 57.61),
    }.items()
}
"""Table 5.3 of the thesis, test accuracies in per cent: 50,000 images a task, longer training, tuned."""


class Vision(Stream):
    """Five data sets one after another; those whose files are not there are left out."""

    title = "the vision data sets"
    parameters = ("trunk.*",)
    claims = (*ABOVE, Claim("projected keeps 99 % of kept", "average", f"{KRON}, projected", KRON, least=-0.01))
    published = PUBLISHED

    def tasks(self, config: Config, seed: int) -> Tasks:
        tasks: list[Task] = []
        absent, remarks = {}, {}
        for name in SETS:
            try:
                parts, remark = _pictures(name, config)
            except data.MissingData as error:
                absent[name] = f"{data.DATA_SETS[name].title}: {type(error).__name__}"
                continue
            head = len(tasks)
            train, val, test = ((x.to(config.device), (y + 10 * head).to(config.device)) for x, y in parts)
            tasks.append(HeadTask(name, train, val, test, head=head))
            remarks.update({name: remark} if remark else {})
        return Tasks(tasks, absent, remarks)

    def network(self, config: Config, tasks: Sequence[Task], seed: int) -> nn.Module:
        return LeNet(seed)

    def begin(self, model: nn.Module, number: int, revisits: bool) -> None:
        """Adds the task's head; the earlier ones stay as they are unless their data is seen again (methods 11.5)."""
        assert isinstance(model, LeNet)
        while len(model.heads) <= number:
            model.add_head()
        for head in model.heads[:number]:
            head.requires_grad_(revisits)

    def loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        def of_own_heads(outputs: Tensor, targets: Tensor) -> Tensor:
            own = outputs.view(len(outputs), -1, 10)[torch.arange(len(outputs), device=outputs.device), targets // 10]
            return nn.functional.cross_entropy(own, targets % 10)

        return of_own_heads

    def quality(self, config: Config, model: nn.Module, task: Task, part: Pair) -> float:
        """NaN for a task that has no head yet."""
        assert isinstance(model, LeNet) and isinstance(task, HeadTask)
        if task.head >= len(model.heads):
            return float("nan")
        return super().quality(config, model, task, part)


def _pictures(name: str, config: Config) -> tuple[list[Pair], str]:
    """The training, validation and test parts of a set as colour images ``(N, 3, 32, 32)``, and a remark on them."""
    test, remark = data.images(name, "test"), data.DATA_SETS[name].remark
    sizes = [config.train_size, config.val_size, config.test_size]
    if "train" in data.splits(name):
        whole = data.images(name, "train")
        train, val = _cut(whole, 0, len(whole[1]) - config.val_size), _cut(whole, -config.val_size, None)
    else:  # one file for everything
        count = len(test[1])
        tenth = count // 10
        remark = f"{remark}; its {count - 2 * tenth:,} first images train, {tenth:,} validate, {tenth:,} test"
        train, val, test = _cut(test, 0, count - 2 * tenth), _cut(test, -2 * tenth, -tenth), _cut(test, -tenth, None)
    kept = [_cut(part, 0, size) for part, size in zip((train, val, test), sizes, strict=True)]
    return [(_coloured(x), y) for x, y in kept], remark


def _cut(pair: Pair, start: int, stop: int | None) -> Pair:
    return pair[0][start:stop], pair[1][start:stop]


def _coloured(images: Tensor) -> Tensor:
    """Zeros around up to 32x32, and grey in all three colours."""
    rim = (32 - images.shape[-1]) // 2
    return nn.functional.pad(images, (rim, rim, rim, rim)).expand(-1, 3, -1, -1).contiguous()
