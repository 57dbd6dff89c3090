"""Scores of strange inputs on pairs of image sets: networks, posteriors and ensembles beside each other."""
