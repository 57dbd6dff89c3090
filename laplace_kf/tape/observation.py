"""One minibatch after its forward pass: back-propagates columns and assembles every block's signals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from laplace_kf.batches import map_examples
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.layers.base import AffineRule, MatrixRule, flatten_rows
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.ragged import Ragged
from laplace_kf.tape.backward import backward, large, origin, significant
from laplace_kf.tape.blocks import Block
from laplace_kf.tape.chain import Chain
from laplace_kf.tape.examples import ExampleGradients
from laplace_kf.tape.output_signals import OutputCurvature, OutputSignals
from laplace_kf.tape.owners import copies
from laplace_kf.tape.plan import view_of
from laplace_kf.tape.reach import reached
from laplace_kf.tape.rows import FIRST, Places, Rows, occurrences
from laplace_kf.tape.sharing import pulled_back
from laplace_kf.tape.signals import GradientSignals, LookupSignals, OuterSignals, Signals
from laplace_kf.tape.tape import Call, Portion, Tape
from laplace_kf.tape.tied import MatrixSignals, TiedSignals

__all__ = ["Observation", "Patterns", "Source"]

#: Which positions ``(N, T)`` of every use of a block are reached (``None`` for all), by the wiring of a pass.
Patterns = dict[Hashable, dict[str, list["Tensor | None"]]]
Columns = Sequence[Tensor] | Mapping[int, Tensor]  # of calls, by their numbers
MANY_PATTERNS = 64  # kept at a time; data of more different sizes are asked about


class Source(Protocol):
    """What an observation needs of the tracer that made it."""

    rows: Rows
    gradients: ExampleGradients
    named: dict[str, Tensor]

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by name."""

    @property
    def example_wise(self) -> set[str]:
        """Names of those that need per-example gradients."""

    def block_of(self, portion: Portion) -> Block:
        """The block a portion of a parameter belongs to."""

    def observe(self, batch: Any, index: int = 0) -> Observation:
        """Another forward pass."""

    def chain_or_refusal(self, batch: Any) -> Chain:
        """The chain of a batch."""


class Observation:
    """One minibatch after its forward pass.

    Attributes:
        outputs: network outputs ``(N, ...)``, part of the autograd graph.
        targets: the batch's targets.
        calls: uses of selected parameters that have a rule.
        chain: the chain of links if the network is one, else ``None``.
        whole: outputs of the pass that this is a part of.
        watches: whether columns that are sent back are looked at for which positions they reach; then inputs need
            mostly no pass of their own for that.
        flat: of the tape that recorded the pass.
        wiring, form: what :class:`laplace_kf.tape.wiring.Wiring` says of it, by its ``key`` and its ``form``.
    """

    def __init__(
        self,
        tracer: Source,
        batch: Any,
        outputs: Tensor,
        targets: Any,
        calls: Sequence[Call],
        chain: Chain | None,
        whole: Tensor | None = None,
        made: Tape | None = None,
    ) -> None:
        self.tracer, self.batch, self.outputs, self.targets = tracer, batch, outputs, targets
        self.whole = outputs if whole is None else whole
        self.calls, self.chain = list(calls), chain
        self.flat = [] if made is None else made.flat
        traced = None if made is None else made.wiring
        self.wiring = None if traced is None else traced.key(outputs)
        self.form = None if traced is None else traced.form(outputs)
        self.keys = occurrences(calls)
        self._places: Places = {} if chain is not None else tracer.rows.now
        self.count = int(outputs.shape[0])
        self._inputs: dict[str, Tensor] = {}
        self._members: dict[str, list[Call]] | None = None
        self.watches = False
        self._live: set[str] = set()  # names of readings of blocks all of whose positions were reached by some column

    def part(self, rows: Tensor) -> Observation:
        """The examples ``rows (M,)`` of a chain, without another forward pass."""
        assert self.chain is not None
        chain = self.chain.part(rows)
        calls = [link.call for link in chain.links if link.call is not None]
        batch, outputs, targets = map_examples(
            (self.batch, self.outputs, self.targets), self.count, lambda t: t[rows.to(t.device)]
        )
        return Observation(self.tracer, batch, outputs, targets, calls, chain, self.whole)

    @property
    def sends_singly(self) -> bool:
        """Whether columns go back one after another, however many there are."""
        return self.chain is None and large([call.shape.numel() for call in self.calls])

    def column_bytes(self) -> int:
        """Bytes that one back-propagated column of this minibatch takes over all blocks."""
        rows = sum(math.prod(call.shape) for call in self.calls)
        vectors = sum(b.size for b in self.tracer.blocks.values() if not b.factorises) * self.count
        return (rows + vectors) * self.outputs.element_size()

    def input_signals(
        self, counted: Tensor | None = None, patterns: Patterns | None = None
    ) -> dict[str, MatrixSignals]:
        """Signals of the matrix blocks with inputs only (no columns), and which of their positions count.

        Args:
            counted: which outputs count, bool of the shape of the outputs; ``None`` for all of them.
            patterns: what was found with the same weights, to be used and filled; ``None`` to ask.
        """
        members = self._of_matrices()
        found = {name: self._matrix_signals(self.tracer.blocks[name], calls, None) for name, calls in members.items()}
        several = any(_positions(signal) > 1 and not self._is_live(signal) for signal in found.values())
        if counted is None and not several:
            return found
        examples = None if counted is None else counted.flatten(1).any(1)
        if examples is not None and bool(examples.all()):
            examples = None
        several = several and self.outputs.requires_grad
        reach = self._pattern(found, members, counted, patterns) if several else {}
        return {name: _marked(signal, reach.get(name), examples) for name, signal in found.items()}

    def remembered(self, patterns: Patterns) -> bool:
        """Whether it is known of a pass that was wired in the same way which positions it reaches."""
        return self.wiring is not None and (self.wiring, tuple(self._of_matrices())) in patterns

    def _of_matrices(self) -> dict[str, list[Call]]:
        """The calls of every matrix block."""
        return {n: m for n, m in self._by_block().items() if self.tracer.blocks[n].factorises}

    def _is_live(self, signal: MatrixSignals) -> bool:
        uses = [signal.straight, signal.turned] if isinstance(signal, TiedSignals) else [signal]
        return all(use.block.name in self._live for use in uses)

    def _pattern(
        self,
        found: Mapping[str, MatrixSignals],
        members: Mapping[str, Sequence[Call]],
        counted: Tensor | None,
        patterns: Patterns | None,
    ) -> dict[str, list[Tensor | None]]:
        """Which positions ``(N, T)`` of every use of a block are reached, ``None`` for all.

        Without ignored targets, passes that are wired in the same way have the same answer: then it is asked once.
        """
        key = (self.wiring, tuple(found))
        lasting = patterns is not None and counted is None and self.wiring is not None
        if patterns is not None and lasting and key in patterns:
            return patterns[key]
        reach = self._reach(counted)
        masks = {n: _reached_positions(self._matrix_signals(self.tracer.blocks[n], members[n], reach)) for n in found}
        if patterns is not None and lasting and len(patterns) < MANY_PATTERNS:
            patterns[key] = masks
        return masks

    def _reach(self, counted: Tensor | None) -> list[Tensor]:
        """As :meth:`_backward` for one column, which is zero exactly where no counted output is reached."""
        found = reached(self.outputs, [call.edge for call in self.calls], counted, self.flat)
        zero = self.outputs.new_zeros(())
        return [
            (zero.expand(call.shape) if part is None else part)[None]
            for call, part in ((call, call.gradient(part)) for call, part in zip(self.calls, found, strict=True))
        ]

    def output_signals(
        self, to_positions: Callable[[Tensor], Tensor], curvature: OutputCurvature
    ) -> dict[str, OutputSignals]:
        """Signals of the blocks whose layer's output is the network's output, in closed form.

        Args:
            to_positions: the likelihood's reading of outputs as ``(N, T, C)``.
            curvature: the output curvature.
        """
        return {n: OutputSignals(signals, curvature) for n, signals in self.output_inputs(to_positions).items()}

    def output_inputs(self, to_positions: Callable[[Tensor], Tensor]) -> dict[str, OuterSignals]:
        """Inputs ``(N, T, R, I)``, without columns, of the blocks whose layer's output is the network's output."""
        if not self.outputs.requires_grad:
            return {}
        node, number = origin(self.whole)
        found: dict[str, OuterSignals] = {}
        for name, members in self._by_block().items():
            block, call = self.tracer.blocks[name], members[0]
            plain = len(members) == 1 and block.factorises and not block.one_hot and block.turned is None
            if not plain or block.shape[:2] != (1, self._width(to_positions)):
                continue
            if call.edge.node is node and call.edge.output_nr == number and self._has_layout(call, to_positions):
                signals = self._matrix_signals(block, members, None)
                assert isinstance(signals, OuterSignals)
                found[name] = signals
        return found

    def output_weight(self, to_positions: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The weight ``(C, I)`` of the layer whose output is the network's, where it is known; arguments as above."""
        names = set(self.output_inputs(to_positions))
        for name, members in self._by_block().items():
            weight = members[0].bound["weight"] if name in names and self.tracer.blocks[name].view is not None else None
            if isinstance(weight, Tensor) and weight.shape[0] == self._width(to_positions):
                return weight.detach().flatten(1)
        return None

    def plain_blocks(self) -> dict[str, tuple[Block, GradientEdge]]:
        """The matrix blocks whose weight is read once, as it is, with dense inputs, at one position an example.

        With the place in the autograd graph of what the call gave.
        """
        found = {}
        for name, members in self._by_block().items():
            block = self.tracer.blocks[name]
            plain = len(members) == 1 and block.factorises and not block.one_hot and block.turned is None
            if plain and (self.chain is not None or self._block_inputs(block, members).shape[1] == 1):
                found[name] = block, members[0].edge
        return found

    def plain_signals(self, block: Block, grad: Tensor) -> OuterSignals:
        """Signals of one of :meth:`plain_blocks` from a gradient at its place, of that shape, as the only column."""
        members = self._by_block()[block.name]
        if self.chain is not None:
            return OuterSignals(block, self._block_inputs(block, members), grad[None, :, None, None])
        mine = self._index(members[0])
        signals = self._matrix_signals(block, members, {mine: grad[None]})
        assert isinstance(signals, OuterSignals)
        return signals

    def _width(self, to_positions: Callable[[Tensor], Tensor]) -> int:
        if self.outputs.dim() == 2:  # (N, C) in every layout
            return int(self.outputs.shape[-1])
        return int(to_positions(torch.empty(self.outputs.shape, device="meta")).shape[-1])

    def _has_layout(self, call: Call, to_positions: Callable[[Tensor], Tensor]) -> bool:
        """Whether the layer's rows and features are the likelihood's positions and outputs, in the same order."""
        if call.shape != self.outputs.shape or isinstance(self._place(call), Ragged):
            return False
        if self.chain is not None:  # rows are examples, and features are outputs
            return True
        probe = torch.empty(call.shape, device="meta")  # an arrangement is a view: its strides say where entries go
        assert isinstance(call.rule, MatrixRule)
        rows = call.rule.outputs(_flatten_output(probe[None], call.leading), call.bound, 1)
        mine, theirs = self._arrange(rows, call, 1)[0, :, :, 0], to_positions(probe)
        if mine.shape != theirs.shape or (mine._base is not probe and mine is not probe):
            return False
        strides = zip(mine.shape, mine.stride(), theirs.stride(), strict=True)
        return all(one == other for size, one, other in strides if size > 1)

    def block_names(self) -> set[str]:
        """Names of the blocks that have signals in this minibatch."""
        blocks = self.tracer.blocks
        return {name for name, block in blocks.items() if not block.factorises} | set(self._by_block())

    def signals(self, columns: Tensor) -> dict[str, Signals]:
        """Back-propagates columns ``(V, N, ...)`` and returns every block's signals."""
        if self.chain is not None:
            return self.row_signals(columns, None)
        columns = significant(columns).to(self.outputs.dtype)
        found = self.ruled_signals(columns)
        rest = [b for b in self.tracer.blocks.values() if not b.factorises and b.name not in found]
        if rest:
            names = [parameter for block in rest for parameter in block.parameters]
            gradients = self.tracer.gradients(self.batch, self.outputs, names, columns)
            for block, part in zip(rest, gradients.split([b.size for b in rest], -1), strict=True):
                found[block.name] = GradientSignals(block, part)
        return found

    def ruled_signals(self, columns: Tensor) -> dict[str, Signals]:
        """As :meth:`signals` for columns ``(V, N, ...)``, but only of blocks that need no per-example gradients."""
        if self.chain is not None:
            return self.row_signals(columns, None)
        blocks = self.tracer.blocks
        found: dict[str, Signals] = {}
        grads = self._backward(columns)
        for name, members in self._by_block().items():
            block = blocks[name]
            if block.factorises:
                found[name] = self._matrix_signals(block, members, grads)
            elif name not in self.tracer.example_wise:
                found[name] = GradientSignals(block, self._affine_gradients(block, members, grads))
        return found

    def gathered(self, example: Tensor) -> Observation | None:
        """A new forward pass on copies of the examples ``(M,)``; ``None`` if they do not give the same outputs.

        They do not if the minibatch holds a tensor that only happens to be as long as there are examples.
        """
        try:
            again = self.tracer.observe(map_examples(self.batch, self.count, lambda t: t[example.to(t.device)]))
        except (RuntimeError, ValueError, IndexError, UnsupportedLayer):
            return None
        return again if same_outputs(again.outputs.detach(), self.outputs.detach()[example]) else None

    def require_chain(self) -> Chain:
        """The chain of this minibatch; raises :class:`UnsupportedLayer` with the reason if there is none."""
        return self.tracer.chain_or_refusal(self.batch)

    def row_signals(self, columns: Tensor, example: Tensor | None) -> dict[str, Signals]:
        """As :meth:`signals` along the chain; ``columns (1, M, C)`` may be rows of the examples ``example (M,)``."""
        assert self.chain is not None
        columns = significant(columns).to(self.outputs.dtype)
        found: dict[str, Signals] = {}
        for call, g in self.chain.backward(columns, example):
            for block in self.blocks_of(call):
                found[block.name] = OuterSignals(
                    block, self._block_inputs(block, [call]), g[:, :, None, None, :], example
                )
        return found

    # -- assembling ------------------------------------------------------------------------------------------------

    def blocks_of(self, call: Call) -> list[Block]:
        """The blocks that a call's parameters belong to."""
        blocks = {block.name: block for block in map(self.tracer.block_of, call.portions.values())}
        return list(blocks.values())

    def _by_block(self) -> dict[str, list[Call]]:
        if self._members is None:
            self._members = {}
            for call in self.calls:
                for block in self.blocks_of(call):
                    self._members.setdefault(block.name, []).append(call)
        return self._members

    def _backward(self, columns: Tensor) -> list[Tensor]:
        """Gradients ``(V, *output shape)`` of every call."""
        if not self.calls:
            return []
        edges, sizes = [call.edge for call in self.calls], [call.shape.numel() for call in self.calls]
        stacked = []
        for call, found in zip(self.calls, backward(self.outputs, edges, sizes, columns), strict=True):
            shape = (len(columns), *call.shape)
            stacked.append(columns.new_zeros(shape) if found is None else found.reshape(shape))
        return stacked

    def _arrange(self, rows: Tensor, call: Call, axis: int) -> Tensor:
        """Rows ``(..., B, T, *rest)`` with ``B`` on ``axis`` to ``(..., N, T', *rest)``."""
        return self.tracer.rows.arrange(rows, call, self._place(call), self.count, axis)

    def _place(self, call: Call) -> int | Ragged:
        """How the rows of a call lie, as this pass showed: a later pass of the tracer has its own."""
        return self._places.get(self.keys[self._index(call)], FIRST)

    def _block_inputs(self, block: Block, members: Sequence[Call]) -> Tensor:
        """Inputs of a block over all its calls: ``(N, T, R, I)``, or tokens ``(N, T)``; computed once."""
        if block.name not in self._inputs:
            parts = []
            for call in members:
                if block.view is None:  # a bias on its own: its input is the constant 1 alone
                    number = math.prod(call.shape[: call.leading])
                    positions = math.prod(call.shape[call.leading :]) // math.prod(block.shape[:2])
                    empty = self.outputs.new_zeros(number, positions, block.shape[0], 0)
                    parts.append(self._arrange(empty, call, 0))
                    continue
                rule, bound = call.rule, call.bound
                assert isinstance(rule, MatrixRule)
                rows = flatten_rows(call.input(), call.leading)
                kernel = tuple(bound["weight"].shape[2:])
                parts.append(self._arrange(rule.inputs(rows, bound, kernel), call, 0))
            self._inputs[block.name] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return self._inputs[block.name]

    def _matrix_signals(self, block: Block, members: Sequence[Call], grads: Columns | None) -> MatrixSignals:
        if block.turned is None:
            return self._one_reading(block, members, grads)
        straight = [call for call in members if view_of(call) == block.view]
        turned = [call for call in members if view_of(call) != block.view]
        first = self._one_reading(dataclasses.replace(block, turned=None), straight, grads)
        assert isinstance(first, OuterSignals)
        return TiedSignals(block, first, self._one_reading(block.as_turned(), turned, grads))

    def _one_reading(
        self, block: Block, members: Sequence[Call], grads: Columns | None
    ) -> OuterSignals | LookupSignals:
        inputs = self._block_inputs(block, members)
        if grads is None:
            g = self.outputs.new_zeros(0, self.count, 1, *block.shape[:2])
        else:
            parts = []
            for call in members:
                rule = call.rule
                assert isinstance(rule, MatrixRule)
                rows = _flatten_output(grads[self._index(call)], call.leading)
                parts.append(self._arrange(rule.outputs(rows, call.bound, block.shape[0]), call, 1))
            g = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
            if self.watches and g.shape[2] > 1 and block.name not in self._live and _reaches_all(g):
                self._live.add(block.name)
        if block.one_hot:
            return LookupSignals(block, inputs, g)
        return OuterSignals(block, inputs, g)

    def _index(self, call: Call) -> int:
        return next(k for k, other in enumerate(self.calls) if other is call)

    def _affine_gradients(self, block: Block, members: Sequence[Call], grads: Sequence[Tensor]) -> Tensor:
        total: dict[str, Tensor] = {}
        for call in members:
            rule, bound = call.rule, call.bound
            if call.source is not None:
                weights = {name: self.tracer.named[name] for name in block.parameters if name in call.names}
                rows = copies(grads[self._index(call)], call)
                summed = self._arrange(rows[:, :, None], call, 1).sum(2)
                for name, part in pulled_back(call, summed, weights).items():
                    total[name] = total[name] + part if name in total else part
                continue
            assert isinstance(rule, AffineRule)
            g = rule.outputs(_flatten_output(grads[self._index(call)], call.leading), bound)  # (V, B, F, T)
            for role, portion in call.portions.items():
                name = portion.name
                if role == "weight":
                    normal = rule.normalised(flatten_rows(call.input(), call.leading), bound)
                    rows = (g * normal).sum(-1)
                else:
                    rows = g.sum(-1)
                part = self._arrange(rows[:, :, None], call, 1).sum(2)  # (V, N, F)
                if not portion.whole:
                    after = math.prod(block.shapes[block.parameters.index(name)]) - portion.stop
                    part = torch.nn.functional.pad(part, (portion.start, after))
                total[name] = total[name] + part if name in total else part
        return torch.cat([total[name] for name in block.parameters], -1)


def _positions(signal: MatrixSignals) -> int:
    """Positions per example ``T`` of a block."""
    if isinstance(signal, TiedSignals):
        return max(_positions(signal.straight), _positions(signal.turned))
    return int((signal.tokens if isinstance(signal, LookupSignals) else signal.a).shape[1])


PROBES = 4  # outputs of a layer that are looked at first


def _reaches_all(g: Tensor) -> bool:
    """Whether columns ``(V, N, T, R, O)`` are seen to be not zero at any position: some outputs of all, all of some."""
    some = g[..., :: max(1, g.shape[-1] // PROBES)]
    left = ~(some != 0).any(-1).any(-1).any(0)
    return not bool(left.any()) or bool((g[:, left] != 0).flatten(2).any(2).any(0).all())


def _reached_positions(signal: MatrixSignals) -> list[Tensor | None]:
    """Where the only column of every use is not zero, ``(N, T)``; ``None`` for everywhere."""
    uses = [signal.straight, signal.turned] if isinstance(signal, TiedSignals) else [signal]
    found = [None if _reaches_all(use.g[:1]) else (use.g[0] != 0).flatten(2).any(2) for use in uses]
    return [None if mask is None or bool(mask.all()) else mask for mask in found]


def _marked(signal: MatrixSignals, reach: Sequence[Tensor | None] | None, examples: Tensor | None) -> MatrixSignals:
    """Signals that know which of their positions count.

    Args:
        signal: inputs.
        reach: which positions are reached by use; ``None`` where it was not asked.
        examples: which examples have a counted target, ``(N,)``; ``None`` for all of them.
    """
    if isinstance(signal, TiedSignals):
        straight, turned = (
            _marked(use, None if reach is None else reach[k : k + 1], examples)
            for k, use in enumerate((signal.straight, signal.turned))
        )
        assert isinstance(straight, OuterSignals) and not isinstance(turned, TiedSignals)
        return TiedSignals(signal.block, straight, turned)
    counted: Tensor | None
    if _positions(signal) == 1:  # the position is the example
        counted = None if examples is None else examples[:, None]
    else:
        counted = None if reach is None else reach[0]
    if counted is None:
        return signal
    if isinstance(signal, LookupSignals):
        return dataclasses.replace(signal, tokens=torch.where(counted.to(signal.tokens.device), signal.tokens, -1))
    return dataclasses.replace(signal, counted=counted.to(signal.a.device))


def _flatten_output(grads: Tensor, leading: int) -> Tensor:
    """``(V, d0, ..., dk, *features)`` to ``(V, B, *features)``."""
    return grads.reshape(grads.shape[0], math.prod(grads.shape[1 : 1 + leading]), *grads.shape[1 + leading :])
