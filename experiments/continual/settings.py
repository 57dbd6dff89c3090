"""Settings of the continual learning experiments: numbers and names. Names are checked where they are looked up."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.common.checks import require

__all__ = ["STANDARD", "Config"]

STANDARD = (
    "Kronecker online",
    "Kronecker online, projected",
    "Kronecker online, summed",
    "diagonal online",
    "Kronecker EWC",
    "diagonal EWC",
    "Synaptic Intelligence",
    "fine-tuning",
    "joint training",
)
"""The methods that are run unless a configuration says otherwise."""


@dataclass
class Config:
    """Settings of E25 and E27; the defaults are those of ``configs/continual_permuted.yaml``.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for weights, order and permutations.
        repeats: number of seeds.
        device: ``cpu`` or ``cuda``.
        threads: processor threads, 0 for torch's default.
        stream: the tasks, a registered stream.
        tasks: how many permuted tasks; disjoint MNIST has two.
        methods: which to run, from the registered ones.
        hidden: width of the two hidden layers.
        epochs: passes over each task.
        batch: examples per minibatch.
        curvature_batch: examples per minibatch of curvature passes.
        lr: step size of SGD with Nesterov momentum.
        rates: how it changes within each task: ``cosine`` (to zero) or ``tenths`` (a tenth after every five epochs).
        patience: a task is over after so many epochs without a lower validation loss; 0 for all epochs.
        least_epochs: epochs that are trained in any case where ``patience`` is set.
        momentum: its momentum.
        optimizer: ``sgd`` or ``adam``, for all methods but Synaptic Intelligence.
        si_optimizer: that of Synaptic Intelligence.
        adam_lr: step size of Adam.
        implicit: whether SGD steps the penalty implicitly, which needs no smaller steps for stiff penalties.
        decay: the step size of task t (from 0) is divided by ``1 + decay · t``.
        decay_kron: where it is not, the step size of task t is divided by ``1 + decay_kron · λ_c · t`` as well
            (Kronecker structures).
        decay_diag: likewise for diagonal ones.
        prior_precision: ``λ``.
        max_terms: of bounded chains: kept terms of a layer.
        multipliers: grid for ``λ_c``.
        multipliers_diag: that of diagonal structures; empty for the same.
        strengths: grid for ``c``.
        train_size: training images of a task.
        val_size: validation images of a task, the last of the training file.
        test_size: test images of a task.
        estimator: of the curvature, a registered one; empty for the default.
        degrees: rotated MNIST: the angle of the last task.
        table: streaming regression: a UCI set.
        sort_by: the feature whose slices are the tasks; −1 for random slices.
        noise: standard deviation of the observation noise, in those of the target.
        progress: whether to show progress bars.
    """

    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    threads: int = 0
    stream: str = "permuted"
    tasks: int = 10
    methods: list[str] = field(default_factory=lambda: list(STANDARD))
    hidden: int = 100
    epochs: int = 5
    batch: int = 250
    curvature_batch: int = 1000
    lr: float = 0.1
    rates: str = "cosine"
    patience: int = 0
    least_epochs: int = 10
    momentum: float = 0.9
    optimizer: str = "sgd"
    si_optimizer: str = "adam"
    adam_lr: float = 1e-3
    implicit: bool = True
    decay: float = 0.0
    decay_kron: float = 0.0
    decay_diag: float = 0.0
    prior_precision: float = 1.0
    max_terms: int = 5
    multipliers: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0])
    multipliers_diag: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    train_size: int = 55_000
    val_size: int = 5_000
    test_size: int = 10_000
    estimator: str = ""
    degrees: float = 90.0
    table: str = "power-plant"
    sort_by: int = 0
    noise: float = 0.25
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "tasks", "hidden", "epochs", "batch", "curvature_batch", "train_size", "val_size",
                     "test_size", "max_terms"):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "adam_lr", "prior_precision", "noise"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("patience", "least_epochs"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("multipliers", "strengths"):
            require(name, grid := getattr(self, name), grid and min(grid) > 0, "a list of numbers above 0")
        diagonal = self.multipliers_diag
        require("multipliers_diag", diagonal, not diagonal or min(diagonal) > 0, "empty or numbers above 0")
        images = self.train_size + self.val_size
        require("train_size + val_size", images, images <= 60_000, "at most 60000, the images of MNIST")
        require("methods", self.methods, self.methods, "one name or more; leave it out for all of them")
