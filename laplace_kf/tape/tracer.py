"""From a minibatch to signals: runs the model on a tape, plans the blocks, back-propagates columns.

Rows and examples: a layer's output has leading axes of rows (examples, positions, or a mix of both if the model
reshapes). Which rows belong to which example is *measured*, not assumed: on the first minibatches, the gradient of
one example's outputs is non-zero exactly in that example's rows. A parameter whose rows cannot be told apart goes
through per-example gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, as_tensor, map_examples, run, tensors_of, to_device
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.layers.base import AffineRule, MatrixRule, MatrixView, flatten_rows
from laplace_kf.tape.blocks import Block, FlatLayout, flat_layout
from laplace_kf.tape.chain import Chain, derivative
from laplace_kf.tape.select import owner, select
from laplace_kf.tape.signals import GradientSignals, LookupSignals, OuterSignals, Signals
from laplace_kf.tape.tape import Call, Tape

__all__ = ["Observation", "Tracer"]

FIRST, LAST = -1, -2  # how examples lie in the rows: outermost, innermost, or on leading axis k >= 1


class Tracer:
    """Runs one model on a tape, minibatch after minibatch.

    Args:
        model: the module, in eval mode while it is traced.
        forward: ``(model, batch) -> (outputs, targets)`` or ``None`` for the default batch forms.
        parameters: selection as in :func:`laplace_kf.tape.select.select`.

    Attributes:
        layout: flat layout of the selected parameters (after the first observation).
        blocks: blocks by name, in the order they were met (their order inside a dense matrix).
        example_wise: names of the vector blocks that need per-example gradients (no rule for their use).
    """

    def __init__(self, model: nn.Module, forward: Forward | None, parameters: str | Sequence[str]) -> None:
        self.model = model
        self.forward = forward
        self.parameters = parameters
        self.named: dict[str, Tensor] = dict(model.named_parameters())
        self.blocks: dict[str, Block] = {}
        self.layout: FlatLayout
        self._selected: list[str] | None = None if parameters == "last_layer" else select(model, parameters)
        self.example_wise: set[str] = set()
        self._block_of: dict[str, str] = {}
        self._rows: dict[tuple[tuple[str, ...], int], int] = {}
        self._tied_rows: set[str] = set()
        self._may_be_chain = True
        self._vmap_works: bool | None = None
        self._checked_examples = False
        if self._selected is not None:
            self.layout = flat_layout(self.named, self._selected)

    @property
    def device(self) -> torch.device:
        """Device of the first selected parameter."""
        return next(iter(self.named.values())).device

    def unseen(self) -> list[str]:
        """Selected parameters that no observation has met yet."""
        return [name for name in self.layout.names if name not in self._block_of]

    def require_all_seen(self) -> None:
        """Raises :class:`UnsupportedLayer` for selected parameters that never took part in the forward pass."""
        unseen = self.unseen()
        if not unseen:
            return
        modules = sorted({owner(name) or "(root)" for name in unseen})
        raise UnsupportedLayer(
            f"selected parameters that never took part in the forward pass: {', '.join(unseen)} (modules: "
            f"{', '.join(modules)}). Freeze them (requires_grad_(False)), leave them out with parameters=[patterns], "
            "or make the model use them (scripted or compiled code is not visible: pass the plain module)."
        )

    def observe(self, batch: Any, index: int = 0) -> Observation:
        """One forward pass on the tape.

        Args:
            batch: one minibatch, moved to the model's device.
            index: its number, for messages.

        Raises:
            ShapeMismatch: if the outputs do not have a leading example axis.
            NonFinite: if the outputs are not finite.
            UnsupportedLayer: if a parameter is used in a way that cannot be handled; names it.
        """
        batch = to_device(batch, self.device)
        tracked = {id(p): name for name, p in self.named.items() if p.requires_grad}
        if self._selected is not None:
            tracked = {key: name for key, name in tracked.items() if name in self._selected}
        tape = Tape(tracked, record_steps=self._may_be_chain, on_step=derivative if self._may_be_chain else None)
        with torch.enable_grad(), tape:
            outputs, targets = run(self.model, batch, self.forward)
        _check_outputs(outputs, index)
        if self._selected is None:
            self._selected = select(self.model, self.parameters, tape.order)
            self.layout = flat_layout(self.named, self._selected)
        keep = set(self._selected)
        tape.opaque = {name: why for name, why in tape.opaque.items() if name in keep}
        for call in tape.calls:
            call.names = {role: name for role, name in call.names.items() if name in keep}
        tape.calls = [call for call in tape.calls if call.names]
        for step in tape.steps:
            step.call = step.call if step.call is not None and step.call.names else None
        if not outputs.requires_grad:
            self.require_all_seen()
        chain = self._chain(tape, outputs)
        if chain is None:
            self._locate_rows(tape.calls, outputs)
        self._plan(tape)
        return Observation(self, batch, outputs, targets, tape.calls, chain)

    def _chain(self, tape: Tape, outputs: Tensor) -> Chain | None:
        """The chain of this forward pass, if the network is one; asked once, then remembered."""
        if not self._may_be_chain:
            return None
        try:
            return Chain(tape, outputs)
        except UnsupportedLayer:
            self._may_be_chain = False
            tape.steps.clear()
            return None

    def chain_or_refusal(self, batch: Any) -> Chain:
        """The chain of one batch; raises :class:`UnsupportedLayer` with the reason if the network is not one."""
        tracked = {id(self.named[name]): name for name in self.layout.names}
        tape = Tape(tracked, record_steps=True, on_step=derivative)
        with torch.enable_grad(), tape:
            outputs, _ = run(self.model, to_device(batch, self.device), self.forward)
        return Chain(tape, outputs)

    # -- which rows belong to which example ------------------------------------------------------------------------

    def _locate_rows(self, calls: Sequence[Call], outputs: Tensor) -> None:
        count = outputs.shape[0]
        keys = _occurrences(calls)
        unknown = [(call, key) for call, key in zip(calls, keys, strict=True) if key not in self._rows]
        if count < 2 or not unknown or not outputs.requires_grad:
            return
        generator = torch.Generator().manual_seed(0)
        touched: list[list[tuple[int, Tensor]]] = [[] for _ in unknown]
        for probe in (0, count - 1):
            seed = torch.zeros_like(outputs)
            noise = torch.randn(outputs.shape[1:], generator=generator, dtype=torch.float64)
            seed[probe] = noise.to(outputs.dtype).to(outputs.device)
            edges = [call.edge for call, _ in unknown]
            grads = torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True)
            for found, (call, _), grad in zip(touched, unknown, grads, strict=True):
                if grad is not None:
                    rows = flatten_rows(grad, call.leading)
                    found.append((probe, (rows.flatten(1) != 0).any(1) if rows.dim() > 1 else rows != 0))
        for found, (call, key) in zip(touched, unknown, strict=True):
            mode = _example_axis(call.shape[: call.leading], count, found)
            if mode is None:
                self._tied_rows.update(call.names.values())
            else:
                self._rows[key] = mode

    def rows_of(self, key: tuple[tuple[str, ...], int]) -> int:
        """How the examples lie in the rows of a call."""
        return self._rows.get(key, FIRST)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _plan(self, tape: Tape) -> None:
        opaque = {name for name in self.layout.names if name in tape.opaque or name in self._tied_rows}
        views: dict[str, set[tuple[MatrixView, bool]]] = {}
        partners: dict[str, set[str | None]] = {}
        affine: dict[str, str] = {}
        for call in tape.calls:
            weight, bias = call.names.get("weight"), call.names.get("bias")
            if isinstance(call.rule, MatrixRule):
                if weight is not None:
                    view = call.rule.view(self.named[weight], call.bound)
                    views.setdefault(weight, set()).add((view, call.rule.one_hot))
                    partners.setdefault(weight, set()).add(bias)
                if bias is not None:
                    partners.setdefault(bias, set()).add(weight)
            else:
                affine.update({name: owner(name) for name in (weight, bias) if name is not None})
        # one parameter read in two different ways has no single matrix form
        opaque |= {name for name, seen in views.items() if len(seen) > 1 or name in affine}
        opaque |= {name for name in affine if name in partners}

        planned: list[Block] = []
        done: set[str] = set()
        for name in self.layout.names:
            if name in done or (name not in partners and name not in affine and name not in opaque):
                continue
            if name in opaque:
                members = [n for n in self.layout.names if n in opaque and owner(n) == owner(name)]
                planned.append(self._vector_block(members))
            elif name in affine:
                members = [n for n in self.layout.names if affine.get(n) == owner(name) and n not in opaque]
                planned.append(self._vector_block(members))
            elif name in views:
                (view, one_hot), *_ = views[name]
                (bias, *others) = partners[name]
                joint = not others and bias is not None and bias not in opaque and partners[bias] == {name}
                members = [name, bias] if joint and bias is not None else [name]
                shape = (*view.shape[:2], view.shape[2] + len(members) - 1)
                planned.append(self._block(members, shape, view, True, one_hot))
            else:  # a bias: with its weight if that one will claim it, otherwise on its own
                (weight, *others) = partners[name]
                if not others and weight is not None and weight not in opaque and partners[weight] == {name}:
                    continue
                members = [name]
                planned.append(self._block(members, (1, math.prod(self.named[name].shape), 1), None, True, False))
            done.update(members)
        for block in planned:
            known = self._block_of.get(block.parameters[0])
            if known is None:
                self.blocks[block.name] = block
                self._block_of.update(dict.fromkeys(block.parameters, block.name))
                if block.parameters[0] in opaque:
                    self.example_wise.add(block.name)
            elif self.blocks[known] != block:
                raise UnsupportedLayer(
                    f"parameters {', '.join(block.parameters)} are used in one way in one minibatch and in another way "
                    "in the next; leave them out with parameters=[patterns]"
                )

    def _block(
        self,
        members: Sequence[str],
        shape: tuple[int, int, int],
        view: MatrixView | None,
        factorises: bool,
        one_hot: bool,
    ) -> Block:
        path = owner(members[0])
        alone = all(n in members for n in self.layout.names if owner(n) == path)
        return Block(
            name=path if path and alone else members[0],
            parameters=tuple(members),
            shapes=tuple(tuple(self.named[n].shape) for n in members),
            shape=shape,
            view=view,
            factorises=factorises,
            one_hot=one_hot,
        )

    def _vector_block(self, members: Sequence[str]) -> Block:
        size = sum(self.named[n].numel() for n in members)
        return self._block(members, (1, size, 1), None, False, False)

    # -- per-example gradients of parameters without a rule ------------------------------------------------------

    def example_gradients(self, batch: Any, outputs: Tensor, names: Sequence[str], columns: Tensor) -> Tensor:
        """Per-example gradients of the named parameters, ``(V, N, Σ sizes)``.

        One example at a time, vectorised by ``torch.func.vmap`` where the model allows it.

        Args:
            batch: the minibatch.
            outputs: the network outputs on it, ``(N, ...)``.
            names: parameter names.
            columns: ``(V, N, ...)`` gradients with respect to the outputs.

        Raises:
            UnsupportedLayer: if the outputs of an example depend on the other examples of the minibatch.
        """
        count = outputs.shape[0]
        if not self._checked_examples:
            self._check_independence(batch, outputs)
        if self._vmap_works is not False:
            try:
                gradients = self._vmapped_gradients(batch, count, names, columns)
                if self._vmap_works is None:  # batching rules can be missing or wrong: check one example by hand
                    alone = self._gradients_of(batch, count, 0, names, columns[:, 0])
                    scale = alone.abs().max().clamp_min(torch.finfo(alone.dtype).tiny)
                    self._vmap_works = bool(((gradients[:, 0] - alone).abs().max() <= 1e-2 * scale).item())
                if self._vmap_works:
                    return gradients
            except (RuntimeError, ValueError, TypeError):
                self._vmap_works = False  # data-dependent control flow, fused recurrent kernels, ...
        return torch.stack([self._gradients_of(batch, count, n, names, columns[:, n]) for n in range(count)], 1)

    def _gradients_of(self, batch: Any, count: int, n: int, names: Sequence[str], columns: Tensor) -> Tensor:
        """Gradients ``(V, Σ sizes)`` of example ``n`` for columns ``(V, ...)``, by one ordinary backward pass each."""
        parameters = [self.named[name] for name in names]
        example = map_examples(batch, count, lambda t: t[n : n + 1])
        with torch.enable_grad():
            output, _ = run(self.model, example, self.forward)
        rows = []
        for column in columns:
            grads = torch.autograd.grad(output, parameters, column[None], retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows)

    def _check_independence(self, batch: Any, outputs: Tensor) -> None:
        with torch.no_grad():
            alone, _ = run(self.model, map_examples(batch, outputs.shape[0], lambda t: t[:1]), self.forward)
        scale = outputs[:1].abs().max().clamp_min(1e-6)
        tolerance = 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if alone.shape != outputs[:1].shape or bool((alone - outputs[:1]).abs().max() > tolerance * scale):
            raise UnsupportedLayer(
                "the output of an example changes with the other examples of its minibatch (batch statistics?), so "
                "per-example curvature is not defined; use running statistics or leave those modules out of the path"
            )
        self._checked_examples = True

    def _vmapped_gradients(self, batch: Any, count: int, names: Sequence[str], columns: Tensor) -> Tensor:
        wrapper = _Forward(self.model, self.forward)
        prefixed = {f"model.{name}": self.named[name].detach() for name in names}
        sliced = [t for t in tensors_of(batch) if t.dim() and t.shape[0] == count]

        def single(parts: list[Tensor], column: Tensor) -> Tensor:
            queue = iter(parts)
            example = map_examples(batch, count, lambda _: next(queue).unsqueeze(0))

            def outputs(parameters: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(wrapper, parameters, (example,))[0]

            pull = torch.func.vjp(outputs, prefixed)[1]
            (grads,) = torch.func.vmap(pull)(column)
            parts = [grads[f"model.{name}"] for name in names]
            for part, name in zip(parts, names, strict=True):
                if part.shape[1:] != self.named[name].shape:
                    raise RuntimeError(f"vmap returned a gradient of shape {tuple(part.shape[1:])} for {name}")
            return torch.cat([part.reshape(column.shape[0], -1) for part in parts], 1)

        size = sum(self.named[name].numel() for name in names)
        chunk = max(1, 2**26 // max(1, size * columns.shape[0]))
        stacked = torch.func.vmap(single, in_dims=(0, 1), chunk_size=chunk)(sliced, columns)
        return stacked.transpose(0, 1)


class _Forward(nn.Module):
    """Makes ``forward(model, batch)`` callable through ``functional_call`` (which wants a module)."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._run: Callable[[nn.Module, Any], tuple[Tensor, Any]] = lambda m, b: run(m, b, forward)

    def forward(self, batch: Any) -> Tensor:
        return as_tensor(self._run(self.model, batch)[0])


class Observation:
    """One minibatch after its forward pass.

    Attributes:
        outputs: network outputs ``(N, ...)``, part of the autograd graph.
        targets: the batch's targets.
        calls: uses of selected parameters that have a rule.
        chain: the chain of links if the network is one, else ``None``.
    """

    def __init__(
        self,
        tracer: Tracer,
        batch: Any,
        outputs: Tensor,
        targets: Any,
        calls: Sequence[Call],
        chain: Chain | None,
    ) -> None:
        self.tracer, self.batch, self.outputs, self.targets = tracer, batch, outputs, targets
        self.calls, self.chain = list(calls), chain
        self.keys = _occurrences(calls)
        self.count = int(outputs.shape[0])
        self._inputs: dict[str, Tensor] = {}

    def column_bytes(self) -> int:
        """Bytes that one back-propagated column of this minibatch takes over all blocks."""
        rows = sum(math.prod(call.shape) for call in self.calls)
        vectors = sum(b.size for b in self.tracer.blocks.values() if not b.factorises) * self.count
        return (rows + vectors) * self.outputs.element_size()

    def input_signals(self) -> dict[str, OuterSignals | LookupSignals]:
        """Signals of the matrix blocks with inputs only (no columns)."""
        found: dict[str, OuterSignals | LookupSignals] = {}
        for name, members in self._by_block().items():
            block = self.tracer.blocks[name]
            if block.factorises:
                found[name] = self._matrix_signals(block, members, None)
        return found

    def signals(self, columns: Tensor) -> dict[str, Signals]:
        """Back-propagates columns ``(V, N, ...)`` and returns every block's signals."""
        columns = _significant(columns).to(self.outputs.dtype)
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
        rest = [b for b in blocks.values() if not b.factorises and b.name not in found]
        if rest:
            names = [parameter for block in rest for parameter in block.parameters]
            gradients = self.tracer.example_gradients(self.batch, self.outputs, names, columns)
            for block, part in zip(rest, gradients.split([b.size for b in rest], -1), strict=True):
                found[block.name] = GradientSignals(block, part)
        return found

    def gathered(self, example: Tensor) -> Observation:
        """A new forward pass on copies of the examples ``(M,)`` of this minibatch."""
        return self.tracer.observe(map_examples(self.batch, self.count, lambda t: t[example.to(t.device)]))

    def require_chain(self) -> Chain:
        """The chain of this minibatch; raises :class:`UnsupportedLayer` with the reason if there is none."""
        return self.tracer.chain_or_refusal(self.batch)

    def row_signals(self, columns: Tensor, example: Tensor | None) -> dict[str, Signals]:
        """As :meth:`signals` along the chain; ``columns (1, M, C)`` may be rows of the examples ``example (M,)``."""
        assert self.chain is not None
        columns = _significant(columns).to(self.outputs.dtype)
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
        names = dict.fromkeys(self.tracer._block_of[name] for name in call.names.values())
        return [self.tracer.blocks[name] for name in names]

    def _by_block(self) -> dict[str, list[Call]]:
        members: dict[str, list[Call]] = {}
        for call in self.calls:
            for block in self.blocks_of(call):
                members.setdefault(block.name, []).append(call)
        return members

    def _backward(self, columns: Tensor) -> list[Tensor]:
        """Gradients ``(V, *output shape)`` of every call."""
        if not self.calls:
            return []
        edges = [call.edge for call in self.calls]
        rows = [
            torch.autograd.grad(self.outputs, edges, column, retain_graph=True, allow_unused=True) for column in columns
        ]
        stacked = []
        for k, call in enumerate(self.calls):
            parts = [row[k] for row in rows]
            zero = columns.new_zeros(call.shape)
            stacked.append(torch.stack([zero if part is None else part for part in parts]))
        return stacked

    def _arrange(self, rows: Tensor, call: Call, axis: int) -> Tensor:
        """Rows ``(..., B, T, *rest)`` with ``B`` on ``axis`` to ``(..., N, T', *rest)``."""
        key = next(k for c, k in zip(self.calls, self.keys, strict=True) if c is call)
        total = rows.shape[axis]
        mode = self.tracer.rows_of(key)
        if total == self.count and call.leading == 1:
            return rows
        if total % self.count:
            raise ShapeMismatch(
                f"the layer with parameters {', '.join(call.key)} has {total} rows for {self.count} examples"
            )
        lead = call.shape[: call.leading]
        outer = {FIRST: 1, LAST: total // self.count}.get(mode) or math.prod(lead[:mode])
        inner = total // self.count // outer
        before, rest = rows.shape[:axis], rows.shape[axis + 1 :]
        split = rows.reshape(*before, outer, self.count, inner, *rest)
        moved = split.movedim(axis + 1, axis)  # (..., N, outer, inner, T, *rest)
        return moved.reshape(*before, self.count, outer * inner * rest[0], *rest[1:])

    def _block_inputs(self, block: Block, members: Sequence[Call]) -> Tensor:
        """Inputs of a block over all its calls: ``(N, T, R, I)``, or tokens ``(N, T)``; computed once."""
        if block.name not in self._inputs:
            parts = []
            for call in members:
                if block.view is None:  # a bias on its own: its input is the constant 1 alone
                    positions = math.prod(call.shape) // math.prod(block.shape[:2]) // self.count
                    parts.append(self.outputs.new_zeros(self.count, positions, block.shape[0], 0))
                    continue
                rule, bound = call.rule, call.bound
                assert isinstance(rule, MatrixRule)
                rows = flatten_rows(call.input(), call.leading)
                kernel = tuple(bound["weight"].shape[2:])
                parts.append(self._arrange(rule.inputs(rows, bound, kernel), call, 0))
            self._inputs[block.name] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return self._inputs[block.name]

    def _matrix_signals(
        self, block: Block, members: Sequence[Call], grads: Sequence[Tensor] | None
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
        if block.one_hot:
            return LookupSignals(block, inputs, g)
        return OuterSignals(block, inputs, g)

    def _index(self, call: Call) -> int:
        return next(k for k, other in enumerate(self.calls) if other is call)

    def _affine_gradients(self, block: Block, members: Sequence[Call], grads: Sequence[Tensor]) -> Tensor:
        total: dict[str, Tensor] = {}
        for call in members:
            rule, bound = call.rule, call.bound
            assert isinstance(rule, AffineRule)
            g = rule.outputs(_flatten_output(grads[self._index(call)], call.leading), bound)  # (V, B, F, T)
            for role, name in call.names.items():
                if role == "weight":
                    normal = rule.normalised(flatten_rows(call.input(), call.leading), bound)
                    rows = (g * normal).sum(-1)
                else:
                    rows = g.sum(-1)
                part = self._arrange(rows[:, :, None], call, 1).sum(2)  # (V, N, F)
                total[name] = total[name] + part if name in total else part
        return torch.cat([total[name] for name in block.parameters], -1)


def _significant(columns: Tensor) -> Tensor:
    """Columns without the entries whose squares would be denormal numbers.

    A confident classifier has class probabilities of 1e-30; their columns carry no curvature in any floating type,
    but arithmetic on denormal numbers is many times slower.
    """
    if not columns.numel():
        return columns
    size = columns.abs()
    limit = size.max() * torch.finfo(columns.dtype).tiny ** (1 / 3)
    return torch.where(size < limit, torch.zeros((), dtype=columns.dtype, device=columns.device), columns)


def _flatten_output(grads: Tensor, leading: int) -> Tensor:
    """``(V, d0, ..., dk, *features)`` to ``(V, B, *features)``."""
    return grads.reshape(grads.shape[0], math.prod(grads.shape[1 : 1 + leading]), *grads.shape[1 + leading :])


def _occurrences(calls: Sequence[Call]) -> list[tuple[tuple[str, ...], int]]:
    """A key for every call that stays the same from batch to batch: parameter names and how often seen before."""
    seen: dict[tuple[str, ...], int] = {}
    keys = []
    for call in calls:
        keys.append((call.key, seen.get(call.key, 0)))
        seen[call.key] = seen.get(call.key, 0) + 1
    return keys


def _example_axis(lead: Sequence[int], count: int, touched: Sequence[tuple[int, Tensor]]) -> int | None:
    """The first reading of the rows in which each probed example touched no other example's rows."""
    total = math.prod(lead)
    if total % count:
        return None
    candidates = [(FIRST, 1), (LAST, total // count)]
    candidates += [(k, math.prod(lead[:k])) for k in range(1, len(lead)) if lead[k] == count]
    for mode, outer in candidates:
        fits = True
        for probe, rows in touched:
            of_example = rows.reshape(outer, count, total // count // outer).any(0).any(-1)
            of_example[probe] = False
            fits = fits and not bool(of_example.any())
        if fits:
            return mode
    return None


def _check_outputs(outputs: Tensor, index: int) -> None:
    if outputs.dim() < 2:
        raise ShapeMismatch(
            f"batch {index}: the model's outputs have shape {tuple(outputs.shape)}; they must be (N, C), (N, T, C) or "
            "(N, C, H, W). Keep the output axis (no squeeze), or reshape in forward="
        )
    if not torch.isfinite(outputs.detach()).all():
        raise NonFinite(
            f"batch {index}: the model's outputs {tuple(outputs.shape)} have NaN or infinite entries; check the "
            "inputs and the trained weights"
        )
