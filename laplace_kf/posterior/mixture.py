"""Posteriors of several trained networks as one predictive: a Laplace posterior around each mode, mixed.

Each component is a :class:`LaplacePosterior` around its own weights; the predictive is the mixture of theirs, position
by position: classes have the mean of the probabilities, real targets the mixture of the densities (Eschenhagen et al.
2021, "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning", section 3). A deep
ensemble is the same with ``method="map"``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import files, weighting
from laplace_kf.batches import Forward
from laplace_kf.errors import CorruptFile, InvalidArgument, InvalidType, NotFitted, ShapeMismatch, UnknownName
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, Prediction, joined, mixed
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.ood import BY_LAYERS, score
from laplace_kf.posterior import store
from laplace_kf.posterior.calibration import Calibration, Seen, calibrate
from laplace_kf.posterior.common_settings import CommonSettings
from laplace_kf.posterior.components import (
    MixturePredictor,
    MixtureSubject,
    copied,
    member_device,
    method_of,
    own_part,
    require_own_models,
    require_same,
    shared_out,
    shares_of,
    with_samples,
)
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.joint import Joint, JointValidation
from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.objectives import Objective
from laplace_kf.posterior.shorthands import Shorthands
from laplace_kf.posterior.tuning import Options, Settings, TuningResult, tune
from laplace_kf.predictive import draw_seeds, labelled
from laplace_kf.predictive.loaders import batch_after_batch, is_loader
from laplace_kf.predictive.padding import without_padding
from laplace_kf.reading import Part, one_argument, reading
from laplace_kf.registry import AUTO
from laplace_kf.replica import stage
from laplace_kf.weighting import Weights

__all__ = ["Mixture"]

RULES = ("equal", "evidence")


@explained
class Mixture(CommonSettings, Shorthands):
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
            raise InvalidArgument("a mixture needs at least one posterior: lk.Mixture([posterior_1, posterior_2, ...])")
        for k, each in enumerate(given):
            if not isinstance(each, LaplacePosterior):
                raise InvalidType(
                    f"component {k} is a {type(each).__name__}; a mixture is of fitted LaplacePosterior s"
                )
            if each._state is None:
                raise NotFitted(f"component {k} is not fitted: call its fit(train_loader) first")
        if weights not in RULES:
            raise UnknownName("weights of a mixture", weights, RULES)
        for k, each in enumerate(given[1:], 1):
            require_same(given[0], each, k)
        require_own_models(given)
        self.rule = weights
        self.posteriors = tuple(map(copied, given))
        self._shares = shares_of(self.posteriors, weights)
        self._calibration = None

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.3g}" for share in self._shares)
        return f"Mixture of {len(self)} posteriors, weights={self.rule!r} ({shares}), first {self.posteriors[0]!r}"

    def __len__(self) -> int:
        return len(self.posteriors)

    # -- prediction ----------------------------------------------------------------------------------------------------

    @typed
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
        methods = [method_of(member, method, link, space, draws) for member in self.posteriors]
        settings: dict[str, Any] = {"samples": samples, "link": link, "draws": draws, "keep_samples": keep_samples}
        if is_loader(x):
            one = partial(self._predict, methods=methods, **settings)
            found = batch_after_batch(one, x, *self._site(), space, generator, progress, joined)
        else:
            found = self._predict(x, methods=methods, space=space, generator=generator, **settings)
        kept = None if self._calibration is None else self._calibration.conformal
        named = methods[0] if len(set(methods)) == 1 else AUTO
        return replace(found, calibration=kept) if kept is not None and kept.method == named else found

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
        counts = shared_out(samples, self._shares)
        seeds = draw_seeds(len(self), generator)
        parts = []
        for member, method, count, seed in zip(self.posteriors, methods, counts, seeds, strict=True):
            found = member.predict(
                x, method, max(1, count), space, torch.Generator(member_device(generator)).manual_seed(seed),
                link=link, draws=draws, keep_samples=keep_samples,
            )  # fmt: skip
            parts.append(with_samples(found, count))
        return self._mixed(x, parts)

    def _site(self) -> tuple[nn.Module, Forward | None, Weights]:
        return self.posteriors[0]._site()

    def _mixed(self, x: Any, parts: Sequence[Prediction]) -> Prediction:
        first = self.posteriors[0]

        def relabelled(found: Prediction) -> Prediction:
            return without_padding(labelled(first.model, first.forward, x, found), x, first.forward)

        return mixed(first.likelihood, parts, self._shares, relabelled)

    @typed
    @lasting()
    def predictor(
        self, samples: int = 100, generator: torch.Generator | None = None, *, draws: str = "independent"
    ) -> MixturePredictor:
        """S weight draws made once, shared out among the components, for predictions batch after batch.

        Arguments and errors as of :meth:`LaplacePosterior.predictor`.
        """
        counts = shared_out(samples, self._shares)
        made = [
            member.predictor(max(1, count), torch.Generator(member_device(generator)).manual_seed(seed), draws=draws)
            for member, count, seed in zip(self.posteriors, counts, draw_seeds(len(self), generator), strict=True)
        ]
        return MixturePredictor(self._mixed, made, counts)

    @typed
    @lasting()
    def functional_covariance(self, x: Any, diagonal_only: bool = False) -> Tensor:
        """Covariance of the outputs of the linearised networks, that between the components included.

        Args:
            x: inputs as for :meth:`predict`, N examples, or a loader.
            diagonal_only: the variances alone.

        Returns:
            ``(N, C, C)``, C counting all outputs of an example; with ``diagonal_only`` the layout of the outputs.
        """
        if is_loader(x):
            return self._rows(lambda inputs, generator: self.functional_covariance(inputs, diagonal_only), x)
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

    @typed
    @lasting()
    def ood_score(
        self,
        x: Any,
        kind: str = "auto",
        *,
        layers: str | Sequence[str] | None = None,
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How strange inputs are, larger is stranger: ``(N,)``.

        Entropy, mutual information, variance and the largest probability are those of the mixture; ``"leverage"``,
        ``"direction"`` and ``"auto"`` are means over the components of theirs, by weight. Arguments and errors as of
        :meth:`LaplacePosterior.ood_score`.
        """
        if is_loader(x):
            return self._rows(partial(self.ood_score, kind=kind, layers=layers, samples=samples), x, generator)
        if kind in BY_LAYERS:
            found = [m.ood_score(x, kind, layers=layers, samples=samples, generator=generator) for m in self.posteriors]
            return torch.einsum("m,mn->n", self.weights.to(found[0]), torch.stack(found))
        return score(self._subject(), x, kind, layers, samples, generator)

    def _subject(self) -> MixtureSubject:
        first = self.posteriors[0]
        asked = self.predict, self.functional_covariance
        return MixtureSubject(*asked, first.model, first.forward, first.weights, self.likelihood, first.mean)

    # -- tuning --------------------------------------------------------------------------------------------------------

    @typed
    def tune(
        self,
        val: Iterable[Any] | tuple[Any, Tensor] | None = None,
        objective: str | Objective = "nll",
        method: str = "auto",
        n_data: Sequence[float] | None = None,
        prior_precision: Sequence[float] | None = None,
        samples: int | None = None,
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
            val: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``.
            objective, method, n_data, prior_precision: as of :meth:`LaplacePosterior.tune`.
            samples: weight draws per point of every component; default as of :meth:`LaplacePosterior.tune`.
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
        tuned = [copied(member) for member in self.posteriors]
        results = [
            member.tune(
                objective="evidence", noise=options.noise, per_block=options.per_block, progress=options.progress
            )
            for member in tuned
        ]
        shares = shares_of(tuned, self.rule)
        self.posteriors, self._shares, self._calibration = tuple(tuned), shares, None
        return results[0]

    @typed
    @lasting()
    def calibrate(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        method: str = "auto",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Mixture:
        """Split-conformal calibration of the mixture; arguments and errors as of :meth:`LaplacePosterior.calibrate`.

        Args:
            data: loader, iterable of batches, or a pair ``(x (n, ...), y (n, ...))`` that was not trained on.
            method, samples, generator: as of :meth:`predict`.

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
        files.write(path, tensors, header, files.MIXTURE)

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
        tensors, header = files.read(path, files.MIXTURE)
        given = [models] if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList) else list(models)
        if len(given) != len(header["members"]):
            raise ShapeMismatch(
                f"{path} holds a mixture of {len(header['members'])} posteriors and {len(given)} models were given: "
                "Mixture.load(path, [model_1, ..., model_M])"
            )
        read = reading(forward, inputs, targets)
        with store.consistent(path):
            members = [
                LaplacePosterior.unpacked(
                    own_part(tensors, f"{k}/"), own, model, likelihood=likelihood, weights=weights, forward=read
                )
                for k, (own, model) in enumerate(zip(header["members"], given, strict=True))
            ]
        made = cls(members)
        shares = [float(share) for share in header["shares"]]
        if len(shares) != len(members) or header["rule"] not in RULES:
            raise CorruptFile(f"{path} has {len(shares)} weights for {len(members)} components")
        made.rule, made._shares = header["rule"], shares
        made._calibration = Calibration.unpacked(own_part(tensors, "mixture/"), header["calibration"])
        return made
