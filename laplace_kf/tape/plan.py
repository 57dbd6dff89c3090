"""From recorded calls to blocks: which parameters share one curvature block, and in which form."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from laplace_kf.layers.base import MatrixRule, MatrixView
from laplace_kf.tape.blocks import Block, FlatLayout
from laplace_kf.tape.select import owner
from laplace_kf.tape.tape import Call, Portion

__all__ = ["plan", "view_of"]

Place = tuple[str, int, int]


def view_of(call: Call) -> MatrixView:
    """How the weight of a call with a matrix rule reads as ``(R, O, I)``, in the order of the parameter's memory."""
    assert isinstance(call.rule, MatrixRule)
    view = call.rule.view(call.bound["weight"], call.bound)
    return view.transposed() if call.portions["weight"].transposed else view


class _Uses:
    """How the parameters were used in one forward pass."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.views: dict[Place, dict[MatrixView, bool]] = {}
        self.partners: dict[Place, set[Place | None]] = {}
        self.affine: set[str] = set()
        self.refused: set[str] = set()
        self.copied: set[str] = set()
        for call in calls:
            if call.source is not None:
                self.copied.update(call.names)
            weight, bias = call.portions.get("weight"), call.portions.get("bias")
            if not isinstance(call.rule, MatrixRule):
                self.affine.update(call.names)
                self.refused.update(p.name for p in call.portions.values() if p.transposed)
                continue
            if weight is not None:
                view, one_hot = view_of(call), call.rule.one_hot
                known = self.views.setdefault(weight.place, {})
                if known.setdefault(view, one_hot) != one_hot:
                    self.refused.add(weight.name)
                self.partners.setdefault(weight.place, set()).add(bias.place if bias is not None else None)
            if bias is not None:
                self.partners.setdefault(bias.place, set()).add(weight.place if weight is not None else None)

    def reading(self, weight: Place) -> tuple[MatrixView, bool, bool | None] | None:
        """The one reading of a weight: view, one-hot, and whether its transpose reads tokens (``None``: unused)."""
        views = self.views[weight]
        if len(views) == 1:
            ((view, one_hot),) = views.items()
            return view, one_hot, None
        if len(views) > 2:
            return None
        # a lookup is the transposed use: its input factor is diagonal, and the other one's may be, too
        (first, hot), (second, other) = sorted(views.items(), key=lambda item: item[1])
        if first.shape[0] != 1 or first.turned() != second or hot:
            return None
        return first, hot, other

    def partner(self, place: Place, opaque: Collection[str]) -> Place | None:
        """The bias that a weight shares its block with, or the weight that a bias does.

        Those that are always used together do, unless one of them is ``opaque``.
        """
        (found, *others) = self.partners[place]
        # a block holds a parameter once: two ranges of one are two blocks
        if found is None or others or found[0] == place[0] or self.partners[found] != {place}:
            return None
        if {found[0], place[0]} & set(opaque):
            return None
        reading = self.reading(place if place in self.views else found)
        assert reading is not None  # it would be opaque
        return None if reading[2] is not None else found


def _scattered(places: Collection[Place], sizes: Mapping[str, int]) -> set[str]:
    """Parameters whose places overlap or leave entries out."""
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, start, stop in places:
        by_name.setdefault(name, []).append((start, stop))
    found = set()
    for name, ranges in by_name.items():
        end = 0
        for start, stop in sorted(ranges):
            if start != end:
                found.add(name)
            end = stop
        if end != sizes[name]:
            found.add(name)
    return found


def plan(
    calls: Sequence[Call], unruled: Mapping[str, str], layout: FlatLayout, named: Mapping[str, Tensor]
) -> tuple[list[Block], set[str]]:
    """The blocks of the parameters seen in one forward pass.

    A weight and a bias that are always used together become ``[W|b]``; rows of a weight that are used by themselves
    are blocks of their own. A weight that is also used as its transpose has one block for both uses. A parameter that
    is read in other several ways, or that ``unruled`` names, has no matrix form; all such parameters of a module share
    one vector block.

    Args:
        calls: the recorded uses that have a rule.
        unruled: parameters that were (also) used otherwise, and how.
        layout: flat order of the selected parameters.
        named: parameters by name, each in its own shape.

    Returns:
        The blocks, and the names of those that need per-example gradients.
    """
    uses = _Uses(calls)
    reasons = _reasons(uses, unruled, layout, named)
    forms = _Forms(uses, reasons, layout, named)
    opaque, affine = set(reasons), uses.affine - set(reasons)
    blocks: list[Block] = []
    example_wise: set[str] = set()
    done: set[str] = set()
    for name in layout.names:
        kind = opaque if name in opaque else affine
        if name in done:
            continue
        if name in kind:
            made = forms.vector([n for n in layout.names if n in kind and owner(n) == owner(name)])
            blocks.append(made)
            done.update(made.parameters)
            example_wise |= {made.name} if kind is opaque else set()
            continue
        for place in sorted(place for place in uses.partners if place[0] == name):
            partner = uses.partner(place, opaque)
            if partner is None or place in uses.views:  # else its weight claims it
                blocks.append(forms.matrix([place] if partner is None else [place, partner]))
    return blocks, example_wise


def _reasons(
    uses: _Uses, unruled: Mapping[str, str], layout: FlatLayout, named: Mapping[str, Tensor]
) -> dict[str, str]:
    """The parameters that have no matrix form, and why."""
    reasons = {name: unruled[name] for name in layout.names if name in unruled}
    sizes = {name: named[name].numel() for name in layout.names}
    for found, why in (
        (uses.refused, "read by a table lookup or transposed, and in other ways"),
        (_scattered(uses.partners, sizes), "read in parts that overlap or leave entries out"),
        ({place[0] for place in uses.views if uses.reading(place) is None}, "read as several different matrices"),
        (uses.affine & {place[0] for place in uses.partners}, "both a matrix and an elementwise factor or summand"),
    ):
        for name in sorted(found):
            reasons.setdefault(name, why)
    return reasons


class _Forms:
    """Makes blocks of parameters whose use is known.

    Args:
        uses: how they were used.
        reasons: why some have no matrix form.
        layout: flat order of the selected parameters.
        named: parameters by name, each in its own shape.
    """

    def __init__(
        self, uses: _Uses, reasons: Mapping[str, str], layout: FlatLayout, named: Mapping[str, Tensor]
    ) -> None:
        self.uses, self.reasons, self.layout = uses, reasons, layout
        self.shapes = {name: tuple(named[name].shape) for name in layout.names}

    def vector(self, members: Sequence[str]) -> Block:
        """The vector block of parameters without a matrix form."""
        sizes = [math.prod(self.shapes[name]) for name in members]
        notes = dict.fromkeys(
            f"by gradients of single examples: {self.reasons[n]}"
            if n in self.reasons
            else "by a copy for every example: no rule for the function that joins it to the data"
            for n in members
            if n in self.reasons or n in self.uses.copied
        )
        return Block(
            _title([Portion(n, 0, size) for n, size in zip(members, sizes, strict=True)], self.layout),
            tuple(members),
            tuple(self.shapes[n] for n in members),
            (1, sum(sizes), 1),
            None,
            False,
            note="; ".join(notes),
        )

    def matrix(self, places: Sequence[Place]) -> Block:
        """The block of a weight, of ``[W|b]``, or of a bias on its own."""
        names = [name for name, _, _ in places]
        whole = [(start, stop) == (0, math.prod(self.shapes[name])) for name, start, stop in places]
        reading = self.uses.reading(places[0]) if places[0] in self.uses.views else None
        view, one_hot, turned = reading if reading is not None else (None, False, None)
        shape = (1, places[0][2] - places[0][1], 1)
        if view is not None:
            shape = (view.shape[0], view.shape[1], view.shape[2] + len(places) - 1)
        portions = [Portion(*place, False, all_of_it) for place, all_of_it in zip(places, whole, strict=True)]
        pieces = tuple(None if all_of_it else place[1:] for place, all_of_it in zip(places, whole, strict=True))
        return Block(
            name=_title(portions, self.layout, self.shapes[names[0]]),
            parameters=tuple(names),
            shapes=tuple(self.shapes[n] for n in names),
            shape=shape,
            view=view,
            factorises=True,
            one_hot=one_hot,
            pieces=() if all(whole) else pieces,
            turned=turned,
        )


def _title(portions: Sequence[Portion], layout: FlatLayout, shape: tuple[int, ...] = ()) -> str:
    """A block's name: its module if it has all of the module's parameters, else its first parameter (and rows)."""
    first = portions[0]
    path = owner(first.name)
    names = [portion.name for portion in portions]
    if not first.whole:
        row = max(1, (first.stop - first.start) if len(shape) < 2 else math.prod(shape[1:]))
        return f"{first.name}[{first.start // row}:{first.stop // row}]" if len(shape) > 1 else str(first)
    alone = all(portion.whole for portion in portions) and all(n in names for n in layout.names if owner(n) == path)
    return path if path and alone else first.name
