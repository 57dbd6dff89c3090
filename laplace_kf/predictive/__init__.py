"""Predictive distributions from a posterior over weights."""

from laplace_kf.predictive.montecarlo import draw_seeds, outputs_at, sampled_outputs, shifted, weight_noise

__all__ = ["draw_seeds", "outputs_at", "sampled_outputs", "shifted", "weight_noise"]
