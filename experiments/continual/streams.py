"""Streams of tasks for continual learning: the data of every task, and the network that learns them one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import data, training
from experiments.common.claims import Claim
from experiments.continual.settings import Config
from experiments.continual.tasks import ABOVE, KRON, BadStream, Derived, Measure, Pair, Stream, Task, Tasks, joined
from experiments.continual.vision import Vision
from laplace_kf import continual
from laplace_kf.likelihoods import Gaussian, Likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.registry import Registry

__all__ = ["STREAMS", "rotated"]

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
        pixels = base.train[0].shape[1]
        orders = [torch.randperm(pixels, generator=rng).to(base.train[0].device) for _ in range(1, config.tasks)]

        def task(number: int, order: Tensor) -> Task:
            return Derived(f"order {number}", base, lambda pair: (pair[0][:, order], pair[1]))

        return Tasks([base, *(task(number, order) for number, order in enumerate(orders, 2))])


class _Disjoint(Stream):
    """Digits 0 to 4, then 5 to 9, both as a ten-way problem."""

    title = "disjoint MNIST"
    claims = (
        *ABOVE,
        Claim("implicit above explicit steps", "average", KRON, f"{KRON}, explicit steps", least=0.0),
    )

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
        side = math.isqrt(base.train[0].shape[1])

        def task(degrees: float) -> Task:
            def part(pair: Pair) -> Pair:
                turned = [rotated(x.view(-1, 1, side, side), degrees).flatten(1) for x in pair[0].split(5000)]
                return torch.cat(turned), pair[1]

            return base.changed(f"{degrees:g}°", part)

        step = config.degrees / max(config.tasks - 1, 1)
        return Tasks([task(number * step) for number in range(config.tasks)])


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

        That of joint training is the batch posterior: the full curvature of all rows at once, P × P, for the small
        networks of tables.
        """
        inputs, targets = joined([task.test for task in tasks])
        posterior: LaplacePosterior | None = getattr(learner, "posterior", None)
        if isinstance(learner, continual.JointTraining):
            posterior = LaplacePosterior(
                model, self.likelihood(config), "full", prior_precision=config.prior_precision
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


STREAMS: Registry[Stream] = Registry("task stream")
STREAMS.register("permuted")(_Permuted())
STREAMS.register("disjoint")(_Disjoint())
STREAMS.register("rotated")(_Rotated())
STREAMS.register("vision")(Vision())
STREAMS.register("regression")(_Regression())
