"""What all minibatches so far have shown of a model: its blocks, in one of three states, and uses of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from torch import Tensor

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.tape.blocks import Block
from laplace_kf.tape.tape import Call, Portion

__all__ = ["Known", "State"]


Ranges = dict[str, tuple[int, int]]  # by parameter, a range of its entries


class State(Enum):
    """How far a block has been checked against autograd; see :class:`Known`."""

    FRESH = "fresh"
    TRIED = "tried"
    PASSED = "passed"


class Known:
    """The blocks met so far, and what is known of their parameters.

    ========== ================================================== ======= ==========================================
    state      a block is in it                                   checked if it fails
    ========== ================================================== ======= ==========================================
    ``FRESH``  when it is met (:meth:`take`)                      now     it is forgotten, its parameters go through
                                                                          single examples' gradients (:meth:`hide`)
    ``TRIED``  after a check on one example, which cannot show    now     the data are refused: an earlier minibatch
               what all examples share (:meth:`checked`), or              went into its sums
               when autograd counts another number of uses of
               its parameters than before (:meth:`count`)
    ``PASSED`` after a check on several examples                  no more
    ========== ================================================== ======= ==========================================

    Blocks of gradients of single examples have a state like all others, and nothing that could be checked.

    Attributes:
        blocks: blocks by name, in the order they were met.
        example_wise: names of the vector blocks that need per-example gradients (no rule for their use).
        hidden: parameters that act where no recorded call shows it.
        refuted: for some of them, the layer rules that failed the check.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Block] = {}
        self.example_wise: set[str] = set()
        self.hidden: set[str] = set()
        self.refuted: dict[str, str] = {}
        self._states: dict[str, State] = {}
        self._members: dict[str, list[str]] = {}  # by parameter, its blocks
        self._uses: dict[str, int] = {}  # by parameter, how often it last stood in the autograd graph
        self._constants: dict[str, int | None] = {}  # by parameter, the row that all its uses take for a constant

    def block_of(self, portion: Portion) -> Block:
        """The block that a portion of a parameter belongs to."""
        found = [self.blocks[name] for name in self._members[portion.name]]
        return next(block for block in found if len(found) == 1 or block.covers(*portion.place))

    def unmet(self, names: Sequence[str]) -> list[str]:
        """Those of some parameters that have no block yet."""
        return [name for name in names if name not in self._members]

    def take(self, planned: Sequence[Block], example_wise: Collection[str]) -> None:
        """Takes in the blocks of one forward pass.

        Args:
            planned: the blocks of all its parameters.
            example_wise: names of those that need per-example gradients.

        Raises:
            UnsupportedLayer: if parameters that have blocks already are used in another way now.
        """
        parameters = {name for block in planned for name in block.parameters}
        earlier = {name for found in map(self._members.get, parameters) for name in found or ()}
        fresh = [block for block in planned if all(name not in self._members for name in block.parameters)]
        if {b.name: b for b in planned if b not in fresh} != {name: self.blocks[name] for name in earlier}:
            raise changed(parameters & set(self._members))
        # what was elementwise so far may be used in another way now: then per-example gradients from here on
        self.example_wise |= set(example_wise) & earlier
        for block in fresh:
            rules = sorted({self.refuted[name] for name in block.parameters if name in self.refuted})
            self.blocks[block.name] = replace(block, failed=", ".join(rules)) if rules else block
            self._states[block.name] = State.FRESH
            for name in block.parameters:
                self._members.setdefault(name, []).append(block.name)
            self.example_wise |= {block.name} & set(example_wise)

    def count(self, uses: Mapping[str, int]) -> None:
        """Takes in how often each parameter stands in the autograd graph; other numbers ask for another check."""
        for name, number in uses.items():
            if self._uses.setdefault(name, number) != number:
                self._uses[name] = number
                again = [block for block in self._members.get(name, ()) if self._states[block] is State.PASSED]
                self._states.update(dict.fromkeys(again, State.TRIED))

    def unchecked(self) -> dict[str, State]:
        """The blocks that the present minibatch checks."""
        return {name: state for name, state in self._states.items() if state is not State.PASSED}

    def checked(self, examples: int) -> None:
        """All blocks have been met by the check, on a minibatch of so many examples."""
        self._states.update(dict.fromkeys(self.unchecked(), State.PASSED if examples > 1 else State.TRIED))

    def hide(self, parameters: Collection[str], fresh: Collection[str] = ()) -> None:
        """From now on these are parameters that act where no call shows it; their blocks are forgotten.

        Args:
            parameters: their names.
            fresh: blocks that no minibatch went into, which may be planned anew together with them.
        """
        self.hidden.update(parameters)
        # a bias or other rows of such a weight are planned anew together with it
        for block in [b for b in self.blocks.values() if self.hidden & set(b.parameters) or b.name in fresh]:
            del self.blocks[block.name], self._states[block.name]
            self.example_wise.discard(block.name)
            for name in block.parameters:
                self._members.pop(name, None)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, for :meth:`take_json`."""
        return {
            "blocks": [block.to_json() for block in self.blocks.values()],
            "example_wise": sorted(self.example_wise),
            "hidden": sorted(self.hidden),
            "refuted": dict(self.refuted),
            "states": {name: state.value for name, state in self._states.items()},
            "members": {name: list(blocks) for name, blocks in self._members.items()},
            "uses": dict(self._uses),
            "constants": dict(self._constants),
        }

    def take_json(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`to_json` gave in place of what is known."""
        self.blocks = {data["name"]: Block.from_json(data) for data in values["blocks"]}
        self.example_wise, self.hidden = set(values["example_wise"]), set(values["hidden"])
        self.refuted = dict(values["refuted"])
        self._states = {name: State(value) for name, value in values["states"].items()}
        self._members = {name: list(blocks) for name, blocks in values["members"].items()}
        self._uses, self._constants = dict(values["uses"]), dict(values["constants"])

    def constants(self, calls: Sequence[Call], opaque: Collection[str], named: Mapping[str, Tensor]) -> Ranges:
        """Rows of tables that are constants: every use of the table so far has to take them for that.

        Args:
            calls: the recorded uses of one forward pass.
            opaque: parameters that it (also) used without a rule.
            named: parameters by name; the first axis of their shape is that of the rows.

        Returns:
            For each such table the range of its entries.
        """
        for call in calls:
            for role, portion in call.portions.items():
                plain = role == "weight" and portion.whole and not portion.transposed
                row = call.rule.constant_row(call.bound) if plain else None
                if self._constants.setdefault(portion.name, row) != row:
                    self._constants[portion.name] = None
        self._constants.update(dict.fromkeys((*opaque, *self.hidden)))
        rows = {name: (row, named[name][0].numel()) for name, row in self._constants.items() if row is not None}
        return {name: (row * width, (row + 1) * width) for name, (row, width) in rows.items()}


def changed(names: Collection[str]) -> UnsupportedLayer:
    """The refusal of data in which some parameters are used one way, then another."""
    return UnsupportedLayer(
        f"parameters {', '.join(sorted(names))} are used one way in one minibatch and in another way in the next (if "
        "one of them has a single example, or rows are ordered by the data, others can show more: put the largest "
        "minibatch first, or take all of one size); otherwise leave them out with parameters=[patterns]"
    )
