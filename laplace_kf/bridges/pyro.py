"""Pyro: a posterior as a guide or a prior, and any module as a Pyro model with the same likelihood and prior.

Two functions. :func:`lift` turns a trained (or untrained) module into a Pyro model whose sample sites are named after
the module's parameters, and whose joint density is the one that a Laplace posterior approximates (methods 9.1):
``log p(θ) + Σ_n log p(y_n | f(x_n, θ))``. Pyro's samplers and variational guides then run on it. :func:`guide` turns
a fitted :class:`~laplace_kf.LaplacePosterior` into a guide over the same sites::

    bnn = lk.bridges.pyro.lift(model, "categorical", prior_precision=1.0)
    Predictive(bnn, guide=lk.bridges.pyro.guide(posterior), num_samples=100)(x)["obs"]
    MCMC(NUTS(bnn, init_strategy=init_to_value(values=posterior.mean)), num_samples=500).run(x, y)
    SVI(bnn, AutoDiagonalNormal(bnn), Adam({"lr": 0.01}), Trace_ELBO()).step(x, y)

Neither changes the module, the posterior, Pyro's parameter store or a random state. What Pyro draws while it runs a
model or a guide comes from torch's global generator, as everything in Pyro does: ``pyro.set_rng_seed`` makes it
reproducible.

Needs the ``pyro`` extra: ``pip install 'laplace_kf[pyro]'``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, model_outputs, private, run, to_device
from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidType, MissingPackage, ShapeMismatch
from laplace_kf.gaussian import WeightGaussian
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision, by_parameter, checked_prior
from laplace_kf.reading import Part, reading
from laplace_kf.substitution import substituted
from laplace_kf.tape import FlatLayout, Tracer, select

try:
    import pyro
    from pyro import poutine
    from pyro.distributions import Delta, ImproperUniform, Normal, TorchDistribution, constraints
except ImportError as error:
    raise MissingPackage(
        "The bridge to Pyro needs the package 'pyro-ppl', which is not installed. "
        "It comes with the 'pyro' extra: pip install 'laplace_kf[pyro]'",
        name=error.name,
    ) from error

__all__ = ["JointGaussian", "LiftedModel", "Observed", "PosteriorGuide", "guide", "lift"]

OBSERVED = "obs"
"""Site of the targets."""
JOINT = "_laplace_weights"
"""Auxiliary site of a guide: all weights as one flat vector."""
PRIOR = "_laplace_prior"
"""Factor of a prior that is a posterior."""


def _seed() -> torch.Generator:
    """A generator seeded by torch's global one, the source of all of Pyro's random numbers."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


class JointGaussian(TorchDistribution):
    """A :class:`~laplace_kf.gaussian.WeightGaussian` over flat weights as a Pyro distribution.

    Args:
        gaussian: mean ``(P,)`` and precision. The event is a vector ``(P,)``, there are no batch dimensions.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the name and form that torch.distributions prescribes)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, gaussian: WeightGaussian) -> None:
        self.gaussian = gaussian
        super().__init__(torch.Size(), gaussian.mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean, ``(P,)``."""
        return self.gaussian.mean

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, P)``, seeded by torch's global generator."""
        drawn = self.gaussian.sample(math.prod(sample_shape), _seed())
        return drawn.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value (..., P)``, shape ``(...)``."""
        flat = (value - self.mean).reshape(-1, *self.event_shape).T
        energy = (flat * self.gaussian.precision.matvec(flat)).sum(0).reshape(value.shape[:-1])
        constant = self.gaussian.precision.logdet() - self.mean.shape[0] * math.log(2 * math.pi)
        return (constant - energy) / 2


class Observed(TorchDistribution):
    """The targets of a whole batch given the network's outputs, as one event.

    One event and not a plate: sites of weights keep their shapes in ``Predictive``, and a likelihood need not factorise
    over anything but examples.

    Args:
        likelihood: gives the log density and draws targets.
        outputs: network outputs ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
        shape: of the targets, ``(N, ...)``; found by drawing some (privately) if left out.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the name and form that torch.distributions prescribes)

    def __init__(self, likelihood: Likelihood, outputs: Tensor, shape: Sequence[int] | None = None) -> None:
        self.likelihood, self.outputs = likelihood, outputs
        if shape is None:
            drawn = likelihood.sample(outputs[:1].detach(), torch.Generator().manual_seed(0))
            shape = (outputs.shape[0], *drawn.shape[1:])
        super().__init__(torch.Size(), torch.Size(shape), validate_args=False)

    @property
    def support(self) -> Any:
        """What targets may be; a likelihood checks them itself."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Targets ``(*sample_shape, N, ...)`` drawn from the model, seeded by torch's global generator."""
        count = math.prod(sample_shape)
        generator = _seed()
        drawn = torch.stack([self.likelihood.sample(self.outputs, generator) for _ in range(count)])
        return drawn.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of targets ``(N, ...)``, summed over the examples: 0-dim."""
        return self.likelihood.log_prob(self.outputs, value).sum()


class _Part(ImproperUniform):
    """One parameter of a joint prior: draws are its part of a joint draw, the density is a factor of its own."""

    def __init__(self, part: Any, shape: Sequence[int]) -> None:
        self._part = part
        super().__init__(constraints.independent(constraints.real, len(shape)), (), tuple(shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if sample_shape:
            raise IncompatiblePair("a prior that is a posterior cannot be vectorised; use parallel=False")
        drawn: Tensor = self._part()
        return drawn


class _Network(nn.Module):
    """A private, frozen copy of a module in eval mode, called on one input structure."""

    def __init__(self, module: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._rule = forward

    def forward(self, inputs: Any) -> tuple[Tensor, Any]:
        if self._rule is not None:
            return run(self.module, inputs, self._rule)
        targets = inputs.get("labels") if isinstance(inputs, Mapping) else None
        return model_outputs(self.module, private(inputs)), targets


class LiftedModel:
    """A Pyro model ``(inputs, targets=None) -> outputs``; see :func:`lift`, which makes it.

    Calling it visits one sample site for every selected parameter, named after it, and the site ``"obs"`` of the
    targets: observed if targets are given, else drawn. It returns the network's outputs ``(N, ...)`` at the sampled
    weights, which ``Predictive`` offers as ``"_RETURN"``.
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: Likelihood,
        prior: PriorPrecision | LaplacePosterior,
        parameters: str | Sequence[str],
        forward: Forward | None,
        n_data: float | None,
    ) -> None:
        self.network = _Network(module, forward)
        self.likelihood, self.parameters, self.n_data = likelihood, parameters, n_data
        self.prior = prior
        self._device = next(self.network.parameters()).device
        self._names: list[str] | None = None
        # what is run is a frozen copy: which parameters are trainable is to be asked of the original
        self._trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        if parameters != "last_layer":
            self._choose(select(module, parameters))

    def _choose(self, names: Sequence[str]) -> None:
        named = dict(self.network.module.named_parameters())
        layout = FlatLayout(tuple(names), tuple(tuple(named[name].shape) for name in names))
        if isinstance(self.prior, LaplacePosterior):
            theirs = {name: tuple(value.shape) for name, value in self.prior.mean.items()}
            if theirs != dict(zip(layout.names, layout.shapes, strict=True)):
                raise ShapeMismatch(
                    f"the prior is a posterior over {', '.join(theirs)}, but the selected parameters are "
                    f"{', '.join(layout.names)}; select the same ones with parameters="
                )
        else:
            self._precisions: dict[str, float | Tensor] = (
                dict(by_parameter(self.prior, layout) or {})
                if isinstance(self.prior, Mapping)
                else dict.fromkeys(names, self.prior)
            )
            zero = [name for name, value in self._precisions.items() if not float(value) > 0]
            if zero:
                raise InvalidArgument(
                    f"prior_precision of {', '.join(zero)} is 0: an improper prior cannot be drawn from, "
                    "give a positive one"
                )
        self._names, self._layout = list(names), layout
        self._named = {name: named[name] for name in names}

    def _last_layer(self, inputs: Any) -> list[str]:
        """Found by running a copy of the network on the tape, once."""
        module = copy.deepcopy(self.network.module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self._trainable)

        def call(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
            caller = copy.copy(self.network)
            caller._modules = {"module": model}
            found: tuple[Tensor, Any] = caller(batch)
            return found

        tracer = Tracer(module, call, "last_layer")
        tracer.observe(inputs)
        return list(tracer.layout.names)

    def _weights(self) -> dict[str, Tensor]:
        """Visits the sites of the weights; what they hold, by parameter name."""
        assert self._names is not None
        if not isinstance(self.prior, LaplacePosterior):
            return {name: pyro.sample(name, self._independent(name)) for name in self._names}
        joint = JointGaussian(self.prior.gaussian)
        drawn: dict[str, Tensor] = {}

        def part(name: str) -> Tensor:
            if not drawn:
                drawn.update(_by_name(self._layout, joint.rsample(), self._named))
            return drawn[name]

        shapes = dict(zip(self._names, self._layout.shapes, strict=True))
        values = {name: pyro.sample(name, _Part(lambda name=name: part(name), shape)) for name, shape in shapes.items()}
        flat = torch.cat([values[name].reshape(-1) for name in self._names])
        pyro.factor(PRIOR, joint.log_prob(flat.to(joint.mean.dtype)))
        return values

    def _independent(self, name: str) -> TorchDistribution:
        like = self._named[name]
        scale = torch.as_tensor(self._precisions[name], dtype=like.dtype, device=like.device).rsqrt()
        return Normal(torch.zeros_like(like), scale.expand_as(like)).to_event(like.dim())

    def __call__(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """Visits the sites of weights and targets.

        Args:
            inputs: what the module takes: a tensor ``(N, ...)``, a tuple of tensors, or a mapping of keyword arguments
                (whose ``"labels"`` are the targets); with ``forward=``, the whole batch.
            targets: as the likelihood takes them, ``(N, ...)``; drawn from the model if there are none.

        Returns:
            Outputs ``(N, ...)`` at the sampled weights.

        Raises:
            ShapeMismatch: for a site that holds several draws at once, or targets that do not fit.
        """
        inputs = self._prepared(inputs)
        outputs, targets = self._run(self._weights(), inputs, targets)
        shape = None if targets is None else targets.shape
        with poutine.scale(scale=self._weight(outputs)):
            pyro.sample(OBSERVED, Observed(self.likelihood, outputs, shape), obs=targets)
        return outputs

    def log_joint(self, values: Mapping[str, Tensor], inputs: Any, targets: Tensor | None = None) -> Tensor:
        """``log p(θ) + log p(targets | inputs, θ)`` of given weights; no tracing, so twice as fast.

        Minus this is a ``potential_fn`` for ``pyro.infer.HMC`` and ``NUTS``, with ``initial_params=posterior.mean``.

        Args:
            values: ``{name: (*shape)}`` of all selected parameters.
            inputs: as for a call.
            targets: as for a call, but needed.

        Returns:
            A 0-dim tensor, differentiable in ``values``; equal to the log density of the model's trace.

        Raises:
            ShapeMismatch: for weights or targets that do not fit.
            IncompatiblePair: without targets.
        """
        inputs = self._prepared(inputs)
        outputs, targets = self._run(values, inputs, targets)
        if targets is None:
            raise IncompatiblePair("log_joint needs the targets: log_joint(values, inputs, targets)")
        assert self._names is not None
        if isinstance(self.prior, LaplacePosterior):
            flat = torch.cat([values[name].reshape(-1) for name in self._names])
            prior = JointGaussian(self.prior.gaussian).log_prob(flat.to(self.prior.gaussian.mean.dtype))
        else:
            prior = torch.stack([self._log_prior(name, values[name]) for name in self._names]).sum()
        return prior + self._weight(outputs) * self.likelihood.log_prob(outputs, targets).sum()

    def _log_prior(self, name: str, value: Tensor) -> Tensor:
        lam = self._precisions[name]
        log = lam.to(value).log() if isinstance(lam, Tensor) else math.log(lam)
        return (value.numel() * (log - math.log(2 * math.pi)) - lam * value.square().sum()) / 2

    def _weight(self, outputs: Tensor) -> float:
        """What the log-likelihood of this batch counts."""
        return 1.0 if self.n_data is None else self.n_data / outputs.shape[0]

    def _prepared(self, inputs: Any) -> Any:
        inputs = to_device(inputs, self._device)
        if self._names is None:
            self._choose(self._last_layer(inputs))
        return inputs

    def _run(self, values: Mapping[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Outputs at given weights, and the targets: those given, or those that came with the inputs."""
        for name, like in self._named.items():
            if name not in values or values[name].shape != like.shape:
                found = tuple(values[name].shape) if name in values else "nothing"
                raise ShapeMismatch(
                    f"{name!r} is {found}, the parameter is {tuple(like.shape)}: a lifted module runs one draw at a "
                    "time (parallel=False, no vectorised particles)"
                )
        outputs, own = substituted(self.network.module, values, lambda: self.network(inputs))
        return outputs, own if targets is None else to_device(targets, self._device)


class PosteriorGuide:
    """A Pyro guide that draws weights from a posterior; see :func:`guide`, which makes it.

    Its sites are those of the lifted model, and an auxiliary one for the joint draw, which carries the log density.
    """

    def __init__(self, posterior: LaplacePosterior) -> None:
        self.posterior = posterior
        shapes = {name: tuple(value.shape) for name, value in posterior.mean.items()}
        self._layout = FlatLayout(tuple(shapes), tuple(shapes.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws one set of weights, ``{name: (*shape)}``; the arguments are the model's and are ignored."""
        flat = pyro.sample(JOINT, JointGaussian(self.posterior.gaussian), infer={"is_auxiliary": True})
        parts = _by_name(self._layout, flat, self.posterior.mean)
        return {name: pyro.sample(name, Delta(part, event_dim=part.dim())) for name, part in parts.items()}


def _by_name(layout: FlatLayout, flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat draw ``(P,)`` as parameter-shaped tensors in the parameters' types."""
    if flat.dim() != 1:
        raise ShapeMismatch(f"expected one draw (P,), got {tuple(flat.shape)}: use parallel=False")
    return {name: part[0].to(like[name].dtype) for name, part in layout.split(flat[None]).items()}


def lift(
    module: nn.Module,
    likelihood: str | Likelihood,
    prior_precision: PriorPrecision = 1.0,
    parameters: str | Sequence[str] | None = None,
    *,
    prior: LaplacePosterior | None = None,
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
    n_data: float | None = None,
) -> LiftedModel:
    """Lifts a module into a Pyro model over its parameters.

    The joint log density is ``Σ log N(θ; 0, I/λ) + Σ_n log p(y_n | f(x_n, θ))`` in eval mode (dropout off, BatchNorm
    running statistics), all constants included: what the Laplace posterior with the same arguments approximates.
    Parameters that are not selected keep the values that they have now: a copy of the module is what is run.

    Args:
        module: any module; never changed.
        likelihood: registered name or likelihood object.
        prior_precision: λ > 0 of the prior ``N(0, I/λ)``: a number, a 0-dim tensor, or ``{name pattern: number}``.
        parameters: ``"all"`` trainable parameters (the default), ``"last_layer"``, or a list of ``fnmatch`` patterns
            over names; those of ``prior`` if there is one.
        prior: a fitted posterior that takes the place of the isotropic prior (chained inference).
        inputs, targets: functions of a batch of another form, with ``outputs = model(*inputs(batch))``; the Pyro model
            then takes the batch.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``.
        n_data: number of examples of the whole data set, if the model will see minibatches: their log-likelihood counts
            ``n_data`` over their size.

    Returns:
        A callable ``(inputs, targets=None)``; see :class:`LiftedModel`.

    Raises:
        UnknownName, UnsupportedLayer: for a selection that is empty or matches nothing.
        ShapeMismatch: if the prior covers other parameters than those selected.
        NotFitted: for a prior that was not fitted.
        ValueError: for a prior precision or ``n_data`` that is not positive.
    """
    if not isinstance(module, nn.Module):
        raise InvalidType(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if n_data is not None and not (math.isfinite(n_data) and n_data > 0):
        raise InvalidArgument(f"n_data must be positive and finite, got {n_data}")
    if parameters is None:
        parameters = "all" if prior is None else list(prior.mean)
    chosen = checked_prior(prior_precision) if prior is None else prior
    return LiftedModel(
        module, get_likelihood(likelihood), chosen, parameters, reading(forward, inputs, targets), n_data
    )


def guide(posterior: LaplacePosterior) -> PosteriorGuide:
    """A fitted posterior as a Pyro guide (or a sampler of weights) for the lifted model.

    Draws follow the posterior's current (N, λ): setting or tuning them later changes the guide.

    Args:
        posterior: fitted; never changed.

    Returns:
        A callable that takes the model's arguments; see :class:`PosteriorGuide`.

    Raises:
        InvalidType: for anything else than a posterior.
        NotFitted: before ``fit``.
    """
    if not isinstance(posterior, LaplacePosterior):
        raise InvalidType(
            f"guide takes a fitted posterior, got {type(posterior).__name__}: "
            "guide(LaplacePosterior(model, likelihood).fit(train_loader))"
        )
    return PosteriorGuide(posterior)
