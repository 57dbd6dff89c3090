"""Regression tables with their standard splits, beside published figures."""
