"""Defaults against the network itself and against laplace-torch, on real data."""
