"""Streams of tasks for continual learning: the data of every task, and the network that learns them one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments import data, training
from experiments.claims import Claim
from laplace_kf import continual
from laplace_kf.batches import Forward
from laplace_kf.demo import private_rng
from laplace_kf.errors import LaplaceKFError
from laplace_kf.likelihoods import Gaussian, Likelihood, get_likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.registry import Registry

if TYPE_CHECKING:
    from experiments.continual import Config

__all__ = ["STREAMS", "BadStream", "LeNet", "Measure", "Stream", "Task", "Tasks", "joined", "rotated"]

Pair = tuple[Tensor, Tensor]
KRON = "Kronecker online"
ABOVE = (
    Claim("Kronecker above diagonal", "average", KRON, "diagonal online", least=0.0),
    Claim("Kronecker above Synaptic Intelligence", "average", KRON, "Synaptic Intelligence", least=0.0),
)


class BadStream(LaplaceKFError, ValueError):
    """Settings for which a stream has no tasks; says which to change."""


@dataclass(frozen=True)
class Task:
    """One task: inputs ``(N, ...)`` with targets ``(N,)`` or ``(N, C)``, in three parts.

    Args:
        name: what it is about.
        train, val, test: its data.
    """

    name: str
    train: Pair
    val: Pair
    test: Pair

    @property
    def forward(self) -> Forward | None:
        """``(model, batch) -> (outputs (N, C), targets)`` as learners ask for it; None: the plain call."""
        return None

    def changed(self, name: str, change: Callable[[Pair], Pair]) -> Task:
        """Another task, with ``change`` done to every part."""
        return Task(name, change(self.train), change(self.val), change(self.test))


class Derived(Task):
    """A task made from another one whenever it is asked for, so that many tasks take the memory of one.

    Args:
        name: what it is about.
        base: the other one.
        change: done to a part of it; cheap.
    """

    def __init__(self, name: str, base: Task, change: Callable[[Pair], Pair]) -> None:
        vars(self).update(name=name, base=base, change=change)

    train = property(lambda self: self.change(self.base.train))
    val = property(lambda self: self.change(self.base.val))
    test = property(lambda self: self.change(self.base.test))


@dataclass(frozen=True)
class Tasks:
    """The tasks in their order, and what a reader of the results must know of the data.

    Args:
        tasks: those that there is data for.
        absent: why others are left out, by name.
        remarks: of the data that was used, by name.
    """

    tasks: Sequence[Task]
    absent: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """What a stream is judged by; the matrices hold ``sign`` times it, of which more is better.

    Args:
        name: for headings.
        scale: from the stored number to the printed one.
        sign: 1, or −1 where less is better.
        digits: behind the point, when printed.
    """

    name: str
    scale: float = 1.0
    sign: int = 1
    digits: int = 2


class Stream(ABC):
    """A sequence of tasks for one network.

    Attributes:
        title: what the tasks are, for headings.
        measure: what the network is judged by.
        parameters: patterns of the weights that the methods protect.
        claims: what is expected of the methods; those on methods that were run are judged.
        published: per cent after the last task, by method and task.
        picture: file name of the picture of the progress.
    """

    title: str
    measure = Measure("accuracy (%)", scale=100)
    parameters: str | tuple[str, ...] = "all"
    claims: tuple[Claim, ...] = (
        *ABOVE,
        Claim("within 2 points of joint training", "average", KRON, "joint training", least=-0.02),
        Claim("projected keeps 99 % of kept", "average", f"{KRON}, projected", KRON, least=-0.01),
        Claim("summed factors are not above kept ones", "average", f"{KRON}, summed", KRON, most=0.0),
    )
    published: Mapping[str, Mapping[str, float]] = {}
    picture = "accuracy"

    @abstractmethod
    def tasks(self, config: Config, seed: int) -> Tasks:
        """The tasks in their order."""

    def network(self, config: Config, tasks: Sequence[Task], seed: int) -> nn.Module:
        """The untrained network: 784-hidden-hidden-10."""
        return training.mlp([784, config.hidden, config.hidden, 10], seed=seed)

    def begin(self, model: nn.Module, number: int, revisits: bool) -> None:
        """Called before task ``number`` (from 0) is learned; ``revisits``: with the data of the earlier tasks."""
        return

    def likelihood(self, config: Config) -> Likelihood:
        """That of a task's targets."""
        return get_likelihood("categorical")

    def loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        """Mean negative log-likelihood, 0-dim, of outputs ``(N, C)`` of the network and targets of any tasks."""
        return nn.functional.cross_entropy

    def quality(self, config: Config, model: nn.Module, task: Task, part: Pair) -> float:
        """How good the network is on a part of a task; more is better."""
        return continual.accuracy(model, part, forward=task.forward)

    def closing(
        self, config: Config, model: nn.Module, learner: continual.Learner, tasks: Sequence[Task]
    ) -> dict[str, Any]:
        """JSON-able results that are found once, after the last task."""
        return {}


STREAMS: Registry[Stream] = Registry("task stream")


def joined(parts: Sequence[Pair]) -> Pair:
    """Several parts ``(N, ...)`` as one."""
    inputs, targets = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# -- digits, flattened, in one network with one head -------------------------------------------------------------------


def _digits(config: Config) -> Task:
    (x, y), (x_test, y_test) = data.images("mnist", "train"), data.images("mnist", "test")
    device = torch.device(config.device)
    parts = [(x, y), (x_test, y_test)]
    (x, y), (x_test, y_test) = [(images.flatten(1).to(device), labels.to(device)) for images, labels in parts]
    size, val, test = config.train_size, config.val_size, config.test_size
    return Task("digits", (x[:size], y[:size]), (x[-val:], y[-val:]), (x_test[:test], y_test[:test]))


class _Permuted(Stream):
    """The digits with their pixels in another fixed order for every task; the first task's is as written."""

    title = "permuted MNIST"

    def tasks(self, config: Config, seed: int) -> Tasks:
        base, rng = _digits(config), training.generator(seed)
        orders = [torch.randperm(784, generator=rng).to(base.train[0].device) for _ in range(1, config.tasks)]

        def task(number: int, order: Tensor) -> Task:
            return Derived(f"order {number}", base, lambda pair: (pair[0][:, order], pair[1]))

        return Tasks([base, *(task(number, order) for number, order in enumerate(orders, 2))])


class _Disjoint(Stream):
    """Digits 0 to 4, then 5 to 9, both as a ten-way problem."""

    title = "disjoint MNIST"

    def tasks(self, config: Config, seed: int) -> Tasks:
        base = _digits(config)

        def task(low: int) -> Task:
            def part(pair: Pair) -> Pair:
                chosen = (pair[1] >= low) & (pair[1] < low + 5)
                return pair[0][chosen], pair[1][chosen]

            return base.changed(f"{low} to {low + 4}", part)

        return Tasks([task(0), task(5)])


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images ``(N, 1, H, W)`` turned anticlockwise around their centre, by bilinear interpolation; black around."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = float(angle.cos()), float(angle.sin())
    # grid_sample asks where a pixel comes from, with y downwards: the turn by the opposite angle
    back = images.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(back, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


class _Rotated(Stream):
    """The digits turned by another fixed angle for every task, from 0 to ``config.degrees`` in equal steps."""

    title = "rotated MNIST"

    def tasks(self, config: Config, seed: int) -> Tasks:
        base = _digits(config)

        def task(degrees: float) -> Task:
            def part(pair: Pair) -> Pair:
                turned = [rotated(x.view(-1, 1, 28, 28), degrees).flatten(1) for x in pair[0].split(5000)]
                return torch.cat(turned), pair[1]

            return base.changed(f"{degrees:g}°", part)

        step = config.degrees / max(config.tasks - 1, 1)
        return Tasks([task(number * step) for number in range(config.tasks)])


# -- data sets of pictures, a head for each ----------------------------------------------------------------------------


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


class _Vision(Stream):
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


# -- regression --------------------------------------------------------------------------------------------------------


class _Regression(Stream):
    """A regression table that arrives in slices of one of its features (or, with ``sort_by`` −1, in random slices)."""

    title = "streaming regression"
    measure = Measure("root mean squared error", sign=-1, digits=3)
    claims = (
        *ABOVE,
        Claim("projected is within 0.01 of kept", "average", f"{KRON}, projected", KRON, least=-0.01),
        Claim(
            "log-likelihood within 0.1 of the batch posterior's", "log_likelihood", KRON, "joint training", -0.1, 0.1
        ),
    )
    picture = "error"

    def tasks(self, config: Config, seed: int) -> Tasks:
        table = data.regression(config.table)
        rows, test = table.splits[0]
        rows = rows[torch.randperm(len(rows), generator=training.generator(seed))]
        val, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
        x, y = ((part - part[rows].mean(0)) / part[rows].std(0) for part in (table.features, table.target))
        order = (
            torch.randperm(len(x), generator=training.generator(seed)) if config.sort_by < 0 else x[:, config.sort_by]
        )
        edges = torch.quantile(order[rows].double(), torch.linspace(0, 1, config.tasks + 1, dtype=torch.float64))
        slot = torch.bucketize(order.double().contiguous(), edges[1:-1].contiguous())

        def part(chosen: Tensor, number: int) -> Pair:
            mine = chosen[slot[chosen] == number]
            return x[mine].float().to(config.device), y[mine].float().to(config.device)

        if min(len(part(chosen, k)[1]) for chosen in (rows, val, test) for k in range(config.tasks)) == 0:
            raise BadStream(
                f"feature {config.sort_by} of {config.table!r} has too few values for {config.tasks} slices with "
                "training, validation and test rows each; take another feature (sort_by), or fewer tasks"
            )
        return Tasks([
            Task(f"slice {k + 1}", *(part(chosen, k) for chosen in (rows, val, test))) for k in range(config.tasks)
        ])  # fmt: skip

    def network(self, config: Config, tasks: Sequence[Task], seed: int) -> nn.Module:
        return training.mlp([tasks[0].train[0].shape[1], config.hidden, 1], seed=seed)

    def likelihood(self, config: Config) -> Likelihood:
        return Gaussian(config.noise)

    def loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda outputs, targets: (outputs - targets).square().mean() / (2 * config.noise**2)

    def quality(self, config: Config, model: nn.Module, task: Task, part: Pair) -> float:
        with torch.no_grad():
            return -float((model(part[0]) - part[1]).square().mean().sqrt())

    def closing(
        self, config: Config, model: nn.Module, learner: continual.Learner, tasks: Sequence[Task]
    ) -> dict[str, Any]:
        """Predictions for all test rows: mean and standard deviation of the function, by the posterior if there is one.

        That of joint training is the batch posterior: Kronecker factors of all rows at once.
        """
        inputs, targets = joined([task.test for task in tasks])
        posterior: LaplacePosterior | None = getattr(learner, "posterior", None)
        if isinstance(learner, continual.JointTraining):
            posterior = LaplacePosterior(
                model, self.likelihood(config), "kron", prior_precision=config.prior_precision
            ).fit(joined([task.train for task in tasks]))
        with torch.no_grad():
            mean = model(inputs)
        variance = torch.zeros_like(mean)
        if posterior is not None:
            variance = posterior.functional_covariance(inputs, diagonal_only=True).view_as(mean)
        density = torch.distributions.Normal(mean, (variance + config.noise**2).sqrt()).log_prob(targets)
        return {
            "log_likelihood": float(density.mean()),
            "error": float((mean - targets).square().mean().sqrt()),
            "mean": mean.flatten().tolist(),
            "std": variance.sqrt().flatten().tolist(),
        }


STREAMS.register("permuted")(_Permuted())
STREAMS.register("disjoint")(_Disjoint())
STREAMS.register("rotated")(_Rotated())
STREAMS.register("vision")(_Vision())
STREAMS.register("regression")(_Regression())
