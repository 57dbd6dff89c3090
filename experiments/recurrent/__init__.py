"""Recurrent networks on long dependencies: E4."""
