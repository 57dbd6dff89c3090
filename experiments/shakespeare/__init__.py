"""A character transformer, step by step."""
