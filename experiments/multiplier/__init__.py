"""Forgetting against rigidity by the strength of the prior: E26."""
