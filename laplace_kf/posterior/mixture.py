"""Posteriors of several trained networks as one predictive: a Laplace posterior around each mode, mixed.

Each component is a :class:`LaplacePosterior` around its own weights; the predictive is the mixture of theirs, position
by position: classes have the mean of the probabilities, real targets the mixture of the densities (Eschenhagen et al.
2021, "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning", section 3). A deep
ensemble is the same with ``method="map"``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.batches import Forward
from laplace_kf.engine import lasting
from laplace_kf.errors import CorruptFile, IncompatiblePair, NotFitted, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import Likelihood, Prediction, mixed
from laplace_kf.ood import References, score
from laplace_kf.posterior import store
from laplace_kf.posterior.calibration import Calibration, Seen, calibrate
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.joint import Joint, JointValidation
from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.objectives import Objective
from laplace_kf.posterior.prior import PriorPrecision, plain
from laplace_kf.posterior.tuning import Options, Settings, TuningResult, tune
from laplace_kf.predictive import METHODS, Predictor, draw_seeds, labelled
from laplace_kf.predictive.loaders import batch_after_batch, is_loader
from laplace_kf.predictive.padding import without_padding
from laplace_kf.reading import Part, one_argument, reading
from laplace_kf.registry import AUTO
from laplace_kf.replica import stage
from laplace_kf.weighting import Weights

__all__ = ["Mixture", "MixturePredictor"]

RULES = ("equal", "evidence")


class Mixture:
    """Several fitted posteriors, one for each trained network, as one predictive.

    It keeps copies of the posteriors (of their settings; what was fitted is shared), so that tuning it leaves the ones
    that were handed over as they are.

    Args:
        posteriors: fitted, of one kind of likelihood, the same outputs and device; structures and architectures may
            differ.
        weights: of the components: ``"equal"``, or ``"evidence"``: the softmax of their log evidences (0-dim each), as
            they are now; taken anew by ``tune(objective="evidence")``.

    Raises:
        NotFitted: for a posterior that was not fitted; names it.
        IncompatiblePair: for components that do not go together, and for ``weights="evidence"`` where they were not
            fitted on the same number of examples.
        UnknownName: for other weights.
    """

    def __init__(self, posteriors: Sequence[LaplacePosterior], weights: str = "equal") -> None:
        given = list(posteriors) if isinstance(posteriors, Iterable) else [posteriors]
        if not given:
            raise ValueError("a mixture needs at least one posterior: lk.Mixture([posterior_1, posterior_2, ...])")
        for k, each in enumerate(given):
            if not isinstance(each, LaplacePosterior):
                raise TypeError(f"component {k} is a {type(each).__name__}; a mixture is of fitted LaplacePosterior s")
            if each._state is None:
                raise NotFitted(f"component {k} is not fitted: call its fit(train_loader) first")
        if weights not in RULES:
            raise UnknownName("weights of a mixture", weights, RULES)
        for k, each in enumerate(given[1:], 1):
            _require_same(given[0], each, k)
        _require_own_models(given)
        self.rule = weights
        self.posteriors: tuple[LaplacePosterior, ...] = tuple(map(_copied, given))
        self._shares = _shares(self.posteriors, weights)
        self._calibration: Calibration | None = None

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.3g}" for share in self._shares)
        return f"Mixture of {len(self)} posteriors, weights={self.rule!r} ({shares}), first {self.posteriors[0]!r}"

    def __len__(self) -> int:
        return len(self.posteriors)

    # -- settings ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Tensor:
        """Weights of the components ``(M,)`` in float64, adding up to 1."""
        return torch.tensor(self._shares, dtype=torch.float64)

    @property
    def likelihood(self) -> Likelihood:
        """That of the first component; noise scales may differ between components."""
        return self.posteriors[0].likelihood

    @property
    def method(self) -> str:
        """What ``"auto"`` stands for in :meth:`predict`, set for all components; ``"auto"`` where they differ."""
        found = {member.method for member in self.posteriors}
        return found.pop() if len(found) == 1 else AUTO

    @method.setter
    def method(self, value: str) -> None:
        if value != AUTO:
            _ = METHODS[value]
        for member in self.posteriors:
            member.method = value
        self._calibration = None

    @property
    def temperature(self) -> float | None:
        """As of a posterior, the same for all components; ``None`` where it is not chosen or differs."""
        found = {member.temperature for member in self.posteriors}
        return found.pop() if len(found) == 1 else None

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        for member in self.posteriors:
            member.temperature = value
        self._calibration = None

    @property
    def n_data(self) -> float:
        """N of all components; settable.

        Raises:
            IncompatiblePair: where they have several.
        """
        return float(self._common("n_data", [member.n_data for member in self.posteriors]))

    @n_data.setter
    def n_data(self, value: float) -> None:
        for member in self.posteriors:
            member.n_data = value
        self._calibration = None

    @property
    def prior_precision(self) -> PriorPrecision:
        """λ of all components; settable.

        Raises:
            IncompatiblePair: where they have several.
        """
        found: PriorPrecision = self._common("prior_precision", [plain(m.prior_precision) for m in self.posteriors])
        return found

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        before = [member.prior_precision for member in self.posteriors]
        try:
            for member in self.posteriors:
                member.prior_precision = value
        except Exception:
            for member, old in zip(self.posteriors, before, strict=True):
                member.prior_precision = old
            raise
        self._calibration = None

    @staticmethod
    def _common(name: str, values: Sequence[Any]) -> Any:
        if any(value != values[0] for value in values):
            raise IncompatiblePair(
                f"the components have several values of {name}: {', '.join(map(str, values))}; ask "
                f"mixture.posteriors[k].{name}, or set mixture.{name} = ... for all"
            )
        return values[0]

    # -- prediction ----------------------------------------------------------------------------------------------------

    @lasting()
    def predict(
        self,
        x: Any,
        method: str = "auto",
        samples: int = 100,
        space: str = "auto",
        generator: torch.Generator | None = None,
        *,
        link: str | None = None,
        draws: str = "independent",
        keep_samples: bool = False,
        progress: bool = False,
    ) -> Prediction:
        """The mixture of the components' predictive distributions; arguments and errors as of a posterior's.

        Args:
            x: inputs that every component takes, or a loader of batches.
            method: as of a posterior; ``"auto"`` is what each component's ``predict`` does by itself.
            samples: draws in all, shared out among the components in proportion to their weights (one each at least).
            space, generator, link, draws, keep_samples, progress: as of a posterior. A sample is one function of one
                component; they stand in the order of the components.

        Raises:
            ShapeMismatch: if the components' outputs differ in shape.
        """
        methods = [self._method_of(member, method, link, space, draws) for member in self.posteriors]
        settings: dict[str, Any] = {"samples": samples, "link": link, "draws": draws, "keep_samples": keep_samples}
        if is_loader(x):
            first = self.posteriors[0]
            one = partial(self._predict, methods=methods, **settings)
            found = batch_after_batch(one, x, first.model, first.forward, space, generator, progress)
        else:
            found = self._predict(x, methods=methods, space=space, generator=generator, **settings)
        kept = None if self._calibration is None else self._calibration.conformal
        named = methods[0] if len(set(methods)) == 1 else AUTO
        return replace(found, calibration=kept) if kept is not None and kept.method == named else found

    @staticmethod
    def _method_of(member: LaplacePosterior, method: str, link: str | None, space: str, draws: str) -> str:
        if method != AUTO:
            _ = METHODS[method]
            return method
        drawn = space != AUTO or draws != "independent"
        return "linearized" if link is not None else "mc" if drawn else member.method

    def _predict(
        self,
        x: Any,
        methods: Sequence[str],
        samples: int,
        space: str,
        generator: torch.Generator | None,
        link: str | None,
        draws: str,
        keep_samples: bool,
    ) -> Prediction:
        counts = _shared_out(samples, self._shares)
        seeds = draw_seeds(len(self), generator)
        parts = []
        for member, method, count, seed in zip(self.posteriors, methods, counts, seeds, strict=True):
            found = member.predict(
                x, method, max(1, count), space, torch.Generator(member_device(generator)).manual_seed(seed),
                link=link, draws=draws, keep_samples=keep_samples,
            )  # fmt: skip
            parts.append(_with_samples(found, count))
        return self._mixed(x, parts)

    def _mixed(self, x: Any, parts: Sequence[Prediction]) -> Prediction:
        first = self.posteriors[0]

        def relabelled(found: Prediction) -> Prediction:
            return without_padding(labelled(first.model, first.forward, x, found), x, first.forward)

        return mixed(first.likelihood, parts, self._shares, relabelled)

    def predict_interval(
        self, x: Any, level: float = 0.9, of: str = "observation", **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper ends ``(N, C)`` of intervals at inputs: ``predict(x, **settings).interval(level, of)``."""
        return self.predict(x, **settings).interval(level, of)

    @lasting()
    def predictor(
        self, samples: int = 100, generator: torch.Generator | None = None, *, draws: str = "independent"
    ) -> MixturePredictor:
        """S weight draws made once, shared out among the components, for predictions batch after batch.

        Arguments and errors as of :meth:`LaplacePosterior.predictor`.
        """
        counts = _shared_out(samples, self._shares)
        made = [
            member.predictor(max(1, count), torch.Generator(member_device(generator)).manual_seed(seed), draws=draws)
            for member, count, seed in zip(self.posteriors, counts, draw_seeds(len(self), generator), strict=True)
        ]
        return MixturePredictor(self._mixed, made, counts)

    @lasting()
    def functional_covariance(self, x: Any, diagonal_only: bool = False) -> Tensor:
        """Covariance of the outputs of the linearised networks, that between the components included.

        Args:
            x: inputs as for :meth:`predict`, N examples.
            diagonal_only: the variances alone.

        Returns:
            ``(N, C, C)``, C counting all outputs of an example; with ``diagonal_only`` the layout of the outputs.
        """
        found = [member.functional_covariance(x, diagonal_only) for member in self.posteriors]
        outputs = [member.predict(x, "map", keep_samples=True).samples[0] for member in self.posteriors]
        share = self.weights.to(outputs[0])
        stacked = torch.stack(outputs)
        gaps = stacked - torch.einsum("m,m...->...", share, stacked)
        within = torch.einsum("m,m...->...", share.to(found[0]), torch.stack(found))
        if diagonal_only:
            return within + torch.einsum("m,m...->...", share, gaps.square())
        flat = gaps.flatten(2)
        return within + torch.einsum("m,mni,mnj->nij", share, flat, flat).to(within)

    @lasting()
    def ood_score(
        self,
        x: Any,
        kind: str = "auto",
        *,
        layers: str | Sequence[str] = "last",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How strange inputs are, larger is stranger: ``(N,)``.

        Entropy, mutual information, variance and the largest probability are those of the mixture; ``"leverage"`` and
        ``"auto"`` are means over the components of theirs, by weight. Arguments and errors as of
        :meth:`LaplacePosterior.ood_score`.
        """
        if kind in ("leverage", AUTO):
            if self._calibration is not None and kind == AUTO:
                self._pass_references()
            found = [m.ood_score(x, kind, layers=layers, samples=samples, generator=generator) for m in self.posteriors]
            return torch.einsum("m,mn->n", self.weights.to(found[0]), torch.stack(found))
        return score(self._subject(), x, kind, layers, samples, generator)

    def _pass_references(self) -> None:
        assert self._calibration is not None
        for member in self.posteriors:
            if member._calibration is None:
                member._calibration = Calibration(pending=self._calibration.pending)

    def _subject(self) -> _Subject:
        first = self.posteriors[0]
        return _Subject(self, first.model, first.forward, first.weights, self.likelihood, first.mean)

    # -- tuning --------------------------------------------------------------------------------------------------------

    def tune(
        self,
        val: Iterable[Any] | tuple[Any, Tensor] | None = None,
        objective: str | Objective = "nll",
        method: str = "auto",
        n_data: Sequence[float] | None = None,
        prior_precision: Sequence[float] | None = None,
        samples: int = 20,
        generator: torch.Generator | None = None,
        *,
        budget: float | None = 10.0,
        extend: int = 0,
        progress: bool = False,
        noise: bool | None = None,
        per_block: bool = False,
        ood: Iterable[Any] | None = None,
        max_examples: int | None = None,
    ) -> TuningResult:
        """Chooses the method, (N, λ), noise scale and temperature, one for all components, by the mixture's scores.

        With ``objective="evidence"`` and no grids every component is tuned by its own evidence, and the weights are
        taken anew.

        Args:
            val, objective, method, n_data, prior_precision: as of :meth:`LaplacePosterior.tune`.
            samples: weight draws per point of every component.
            generator: random numbers.
            budget: training epochs, of all components, of the validation examples.
            extend, progress, noise, per_block, ood, max_examples: as of :meth:`LaplacePosterior.tune`.

        Returns:
            As of a posterior, of the mixture; by the evidence, the result of the first component.

        Raises:
            IncompatiblePair: as of a posterior; for ``noise=True`` where the components have several noise scales.
        """
        one_argument("tune", objective)
        options = Options(
            objective, method, samples, generator, extend, progress, noise, per_block, ood, max_examples, budget
        )
        if objective == "evidence" and n_data is None and prior_precision is None:
            return self._tune_by_evidence(options)
        first = self.posteriors[0]
        seen = None if val is None else Seen(weighting.batches(val, first.weights, first.model), first.forward)
        with lasting(), ExitStack() as stack:
            joint: Any = Joint([self._on_stage(stack, member) for member in self.posteriors], self._shares)
            how = self.method if self.method != AUTO else first.method
            now = Settings(first.n_data, first.prior_precision, None, how, self.temperature)
            found, settings = tune(joint, now, seen, n_data, prior_precision, options, JointValidation)
        found.warn()  # first: where warnings are errors, the call fails and nothing is set
        for member in self.posteriors:
            member.n_data, member.prior_precision = settings.n_data, settings.prior_precision
            if settings.noise is not None:
                member.likelihood = member.likelihood.with_noise_scale(settings.noise)
            if settings.method is not None:
                member.method = settings.method
            if settings.temperature is not None:
                member.temperature = settings.temperature
            member._calibration = None if seen is None else Calibration(pending=tuple(seen.taken))
        self._calibration = None
        return found

    @staticmethod
    def _on_stage(stack: ExitStack, member: LaplacePosterior) -> Fitted:
        model, forward = stack.enter_context(stage(member.model, member.forward))
        return replace(member._fitted("tune"), model=model, forward=forward)

    def _tune_by_evidence(self, options: Options) -> TuningResult:
        tuned = [_copied(member) for member in self.posteriors]
        results = [
            member.tune(
                objective="evidence", noise=options.noise, per_block=options.per_block, progress=options.progress
            )
            for member in tuned
        ]
        shares = _shares(tuned, self.rule)
        self.posteriors, self._shares, self._calibration = tuple(tuned), shares, None
        return results[0]

    @lasting()
    def calibrate(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        method: str = "auto",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Mixture:
        """Split-conformal calibration of the mixture; arguments and errors as of :meth:`LaplacePosterior.calibrate`.

        Returns:
            The mixture itself.
        """
        first = self.posteriors[0]
        seen = Seen(weighting.batches(data, first.weights, first.model), first.forward)
        chosen = self.method if method == AUTO else method
        found = calibrate(self._subject(), seen, chosen, samples, generator)
        for member in self.posteriors:
            member._calibration = Calibration(pending=tuple(seen.taken))
        self._calibration = Calibration(found.conformal)
        return self

    # -- keeping it ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (no pickle) with a checksum that holds all components."""
        tensors: dict[str, Tensor] = {}
        headers = []
        for k, member in enumerate(self.posteriors):
            own, header = member.packed()
            tensors.update({f"{k}/{name}": value for name, value in own.items()})
            headers.append(header)
        kept = None
        if self._calibration is not None:
            own, kept = self._calibration.packed()
            tensors.update({f"mixture/{name}": value for name, value in own.items()})
        header = {"members": headers, "rule": self.rule, "shares": list(self._shares), "calibration": kept}
        store.write(path, tensors, header, store.MIXTURE)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        models: Sequence[nn.Module],
        *,
        likelihood: str | Likelihood | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        weights: Weights | None = None,
    ) -> Mixture:
        """Reads a mixture for models of the same architectures, one for each component and in their order.

        Args:
            path: file written by :meth:`save`.
            models: M modules, each an object of its own; the means are the file's, not the models' weights.
            likelihood, forward, inputs, targets, weights: as of :meth:`LaplacePosterior.load`, for all components.

        Raises:
            CorruptFile: if the file is truncated, altered or not one of a mixture.
            ShapeMismatch: for another number of models, or a model that does not fit; nothing is changed.
        """
        tensors, header = store.read(path, store.MIXTURE)
        given = [models] if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList) else list(models)
        if len(given) != len(header["members"]):
            raise ShapeMismatch(
                f"{path} holds a mixture of {len(header['members'])} posteriors and {len(given)} models were given: "
                "Mixture.load(path, [model_1, ..., model_M])"
            )
        members = [
            LaplacePosterior.unpacked(
                _own(tensors, f"{k}/"), own, model, likelihood=likelihood, weights=weights,
                forward=reading(forward, inputs, targets),
            )
            for k, (own, model) in enumerate(zip(header["members"], given, strict=True))
        ]  # fmt: skip
        made = cls(members)
        shares = [float(share) for share in header["shares"]]
        if len(shares) != len(members) or header["rule"] not in RULES:
            raise CorruptFile(f"{path} has {len(shares)} weights for {len(members)} components")
        made.rule, made._shares = header["rule"], shares
        made._calibration = Calibration.unpacked(_own(tensors, "mixture/"), header["calibration"])
        return made


class MixturePredictor:
    """Predictions of many batches from one set of weight draws of every component, made once.

    Args:
        mix: inputs and one prediction a component → the mixture's.
        members: the components' predictors.
        counts: how many of each component's draws count as samples.
    """

    def __init__(
        self,
        mix: Callable[[Any, Sequence[Prediction]], Prediction],
        members: Sequence[Predictor],
        counts: Sequence[int],
    ) -> None:
        self.mix, self.members, self.counts = mix, members, counts

    def __call__(self, x: Any, *, keep_samples: bool = False) -> Prediction:
        """Predictive distribution at inputs."""
        parts = [
            _with_samples(member(x, keep_samples=keep_samples), count)
            for member, count in zip(self.members, self.counts, strict=True)
        ]
        return self.mix(x, parts)


@dataclass
class _Subject:
    """A mixture as calibration and scores see it."""

    mixture: Mixture
    model: nn.Module
    forward: Forward | None
    weights: Weights
    likelihood: Likelihood
    mean: dict[str, Tensor]

    def predict(self, x: Any, method: str = AUTO, samples: int = 100, **settings: Any) -> Prediction:
        return self.mixture.predict(x, method, samples, **settings)

    def functional_covariance(self, x: Any, diagonal_only: bool = False) -> Tensor:
        return self.mixture.functional_covariance(x, diagonal_only)

    def leverage(self) -> Any:
        raise IncompatiblePair("the components of a mixture have leverages, each its own")

    @property
    def references(self) -> References | None:
        return None


def member_device(generator: torch.Generator | None) -> torch.device | str:
    """The device on which random numbers are drawn."""
    return "cpu" if generator is None else generator.device


def _own(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _copied(posterior: LaplacePosterior) -> LaplacePosterior:
    """Another object with the same fit, whose settings are its own."""
    return copy.copy(posterior)


def _with_samples(found: Prediction, count: int) -> Prediction:
    """With the first ``count`` samples, where it has any."""
    if "samples" not in found.values:
        return found
    return replace(found, values={**found.values, "samples": found.values["samples"][:count]})


def _shared_out(samples: int, shares: Sequence[float]) -> list[int]:
    """How many of S samples each component gives, in proportion to the weights (largest remainders)."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    exact = [samples * share for share in shares]
    counts = [int(each + 1e-9) for each in exact]
    order = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in order[: samples - sum(counts)]:
        counts[k] += 1
    return counts


def _shares(members: Sequence[LaplacePosterior], rule: str) -> list[float]:
    """Weights of the components.

    Raises:
        IncompatiblePair: for evidences of different numbers of examples.
    """
    if rule == "equal":
        return [1.0 / len(members)] * len(members)
    for name in ("counted_data", "n_data"):
        found = [getattr(member, name) for member in members]
        if any(abs(value - found[0]) > 1e-9 * abs(found[0]) for value in found):
            what = "were fitted on different numbers of examples" if name == "counted_data" else "have different n_data"
            raise IncompatiblePair(
                f'weights="evidence" compares the evidence of the same data, but the components {what}: '
                f'{", ".join(f"{value:g}" for value in found)}; fit all on the same rows, or use weights="equal"'
            )
    logs = torch.stack([member.log_evidence().detach().double().cpu() for member in members])
    return logs.softmax(0).tolist()


def _kind(likelihood: Likelihood) -> tuple[Any, ...]:
    """What has to be the same of the components' likelihoods; noise scales and kinds of curvature may differ."""
    try:
        config = dict(likelihood.to_config())
    except IncompatiblePair:
        return type(likelihood), repr(likelihood)
    scale = config.pop("scale", None)
    config.pop("curvature", None)
    return type(likelihood), sorted(map(repr, config.items())), len(scale) if isinstance(scale, list) else 0


def _require_same(first: LaplacePosterior, other: LaplacePosterior, k: int) -> None:
    """Refuses a component that does not go with the first one."""
    if _kind(first.likelihood) != _kind(other.likelihood):
        raise IncompatiblePair(
            f"component {k} has the likelihood {other.likelihood!r} and component 0 {first.likelihood!r}: the "
            "densities of a mixture are of the same targets; fit all components with one kind of likelihood"
        )
    devices = [next(iter(each.mean.values())).device for each in (first, other)]
    if devices[0] != devices[1]:
        raise IncompatiblePair(
            f"component {k} is on {devices[1]} and component 0 on {devices[0]}; move the models to one device before "
            "fit (or load all with models on one device)"
        )
    shapes = [{name: tuple(p.shape) for name, p in each.model.named_parameters()} for each in (first, other)]
    if list(shapes[0]) != list(shapes[1]):
        return  # another architecture: its outputs are compared when it predicts
    different = [name for name in shapes[0] if shapes[0][name] != shapes[1][name]]
    last = list(shapes[0])[-1:]
    owner = last[0].rpartition(".")[0] if last else ""
    if (
        different
        and all(name.rpartition(".")[0] == owner for name in different)
        and all(shapes[0][name][1:] == shapes[1][name][1:] for name in different)
    ):
        name = different[-1]
        raise IncompatiblePair(
            f"component {k} has {shapes[1][name][0]} outputs and component 0 has {shapes[0][name][0]} ({name}); the "
            "components of a mixture predict the same targets"
        )


def _require_own_models(members: Sequence[LaplacePosterior]) -> None:
    """Refuses posteriors of one model object at different weights, where it keeps more than they do."""
    for k, other in enumerate(members):
        for first in members[:k]:
            if other.model is not first.model:
                continue
            mine, theirs = other.mean, first.mean
            if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
                continue
            kept = [name for name, _ in other.model.named_parameters() if name not in mine or name not in theirs]
            kept += [name for name, _ in other.model.named_buffers()]
            if kept:
                raise IncompatiblePair(
                    f"component {k} was fitted to the same model object as another one, at other weights; a posterior "
                    f"holds the weights it covers, but not {kept[0]!r}, which is now that of the last training: train "
                    "each network as an object of its own, copy.deepcopy(model)"
                )
