"""Designs: few combinations that contain all pairs, or all triples, of the values of several factors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

__all__ = ["covering", "meeting"]

Row = dict[str, str]


def covering(factors: Mapping[str, Sequence[str]], strength: int) -> list[Row]:
    """Combinations of one value a factor such that every choice of values of ``strength`` factors occurs in one.

    Greedy: each row starts from a choice that is still missing and takes, factor by factor, the value that adds most.
    The order of the factors and values decides the result; nothing is random.
    """
    names = list(factors)
    groups = list(itertools.combinations(names, strength))
    missing = {
        tuple(zip(group, values, strict=True))
        for group in groups
        for values in itertools.product(*(factors[name] for name in group))
    }
    order = sorted(missing)
    rows: list[Row] = []
    while missing:
        seed = next(choice for choice in order if choice in missing)
        row: Row = dict(seed)
        for name in names:
            if name not in row:
                row[name] = max(factors[name], key=lambda value: _gain({**row, name: value}, groups, missing))
        rows.append({name: row[name] for name in names})
        missing -= {tuple((name, row[name]) for name in group) for group in groups}
        order = [choice for choice in order if choice in missing]
    return rows


def _gain(row: Row, groups: Sequence[tuple[str, ...]], missing: set[tuple[tuple[str, str], ...]]) -> int:
    """How many missing choices a row, perhaps unfinished, contains."""
    return sum(
        tuple((name, row[name]) for name in group) in missing for group in groups if all(name in row for name in group)
    )


def meeting(factors: Mapping[str, Sequence[str]], fixed: Mapping[str, str]) -> list[Row]:
    """Few combinations in which the ``fixed`` values meet every value of the other factors."""
    length = max((len(values) for name, values in factors.items() if name not in fixed), default=1)
    return [
        {name: fixed[name] if name in fixed else values[k % len(values)] for name, values in factors.items()}
        for k in range(length)
    ]
