"""Likelihoods: densities of targets given network outputs, with their curvature, samples and predictions.

Registered names: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"heteroscedastic_gaussian"``, ``"poisson"``
and ``"bernoulli_mixture"``. :class:`FromDistribution` and :class:`FromLoss` are used as objects.
"""

from __future__ import annotations

from laplace_kf.likelihoods.base import LIKELIHOODS, Likelihood, get_likelihood
from laplace_kf.likelihoods.bernoulli import Bernoulli
from laplace_kf.likelihoods.categorical import Categorical
from laplace_kf.likelihoods.distribution import FromDistribution
from laplace_kf.likelihoods.elementwise import DiagonalLikelihood, ElementwiseLikelihood
from laplace_kf.likelihoods.gaussian import Gaussian
from laplace_kf.likelihoods.heteroscedastic import HeteroscedasticGaussian
from laplace_kf.likelihoods.joined import joined
from laplace_kf.likelihoods.loss import FromLoss
from laplace_kf.likelihoods.mixed import mixed
from laplace_kf.likelihoods.mixture import BernoulliMixture
from laplace_kf.likelihoods.poisson import Poisson
from laplace_kf.likelihoods.prediction import Prediction
from laplace_kf.outputs.layout import from_positions, to_positions

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "BernoulliMixture",
    "Categorical",
    "DiagonalLikelihood",
    "ElementwiseLikelihood",
    "FromDistribution",
    "FromLoss",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Poisson",
    "Prediction",
    "from_positions",
    "get_likelihood",
    "joined",
    "mixed",
    "to_positions",
]
