"""Inputs from outside the training distribution: E20."""
