"""Outputs of networks, before any likelihood: one layout, refusals, derivatives."""
