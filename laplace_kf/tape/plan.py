"""From recorded calls to blocks: which parameters share one curvature block, and in which form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from laplace_kf.layers.base import MatrixRule, MatrixView
from laplace_kf.tape.blocks import Block, FlatLayout
from laplace_kf.tape.select import owner
from laplace_kf.tape.tape import Call

__all__ = ["plan"]


def plan(
    calls: Sequence[Call], unruled: Collection[str], layout: FlatLayout, named: Mapping[str, Tensor]
) -> tuple[list[Block], set[str]]:
    """The blocks of the parameters seen in one forward pass.

    A weight and a bias that are always used together become ``[W|b]``. A parameter that is read in two different ways,
    or that ``unruled`` names, has no matrix form; all such parameters of a module share one vector block.

    Args:
        calls: the recorded uses that have a rule.
        unruled: parameters that were (also) used otherwise.
        layout: flat order of the selected parameters.
        named: parameters by name, each in its own shape.

    Returns:
        The blocks, and the names of those that need per-example gradients.
    """
    opaque = {name for name in layout.names if name in unruled}
    views: dict[str, set[tuple[MatrixView, bool]]] = {}
    partners: dict[str, set[str | None]] = {}
    affine: set[str] = set()
    for call in calls:
        weight, bias = call.names.get("weight"), call.names.get("bias")
        if isinstance(call.rule, MatrixRule):
            if weight is not None:
                views.setdefault(weight, set()).add((call.rule.view(named[weight], call.bound), call.rule.one_hot))
                partners.setdefault(weight, set()).add(bias)
            if bias is not None:
                partners.setdefault(bias, set()).add(weight)
        else:
            affine.update(name for name in (weight, bias) if name is not None)
    opaque |= {name for name, seen in views.items() if len(seen) > 1 or name in affine}
    opaque |= affine & set(partners)

    def block(members: Sequence[str], view: MatrixView | None, factorises: bool, one_hot: bool = False) -> Block:
        size = sum(named[n].numel() for n in members)
        shape = (1, size, 1)
        if view is not None:
            shape = (view.shape[0], view.shape[1], view.shape[2] + len(members) - 1)
        path = owner(members[0])
        alone = all(n in members for n in layout.names if owner(n) == path)
        return Block(
            name=path if path and alone else members[0],
            parameters=tuple(members),
            shapes=tuple(tuple(named[n].shape) for n in members),
            shape=shape,
            view=view,
            factorises=factorises,
            one_hot=one_hot,
        )

    def together(weight: str, bias: str) -> bool:
        return not {weight, bias} & opaque and partners[weight] == {bias} and partners[bias] == {weight}

    blocks: list[Block] = []
    example_wise: set[str] = set()
    done: set[str] = set()
    for name in layout.names:
        if name in done or not (name in partners or name in affine or name in opaque):
            continue
        (partner, *others) = partners.get(name, {None})
        joint = (
            partner is not None and not others and together(*((name, partner) if name in views else (partner, name)))
        )
        if name in opaque:
            members = [n for n in layout.names if n in opaque and owner(n) == owner(name)]
            made = block(members, None, False)
            example_wise.add(made.name)
        elif name in affine:
            made = block([n for n in layout.names if n in affine - opaque and owner(n) == owner(name)], None, False)
        elif name in views:
            ((view, one_hot),) = views[name]
            made = block([name, partner] if joint and partner is not None else [name], view, True, one_hot)
        elif joint:
            continue  # its weight will claim it
        else:
            made = block([name], None, True)
        blocks.append(made)
        done.update(made.parameters)
    return blocks, example_wise
