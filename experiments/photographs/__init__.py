"""A photograph classifier that is uncertain where it is wrong (E23)."""
