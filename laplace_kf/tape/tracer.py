"""Runs a model on the tape, minibatch after minibatch, and keeps what was learned about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, run, to_device
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.tape.blocks import Block, FlatLayout, flat_layout
from laplace_kf.tape.chain import Chain, derivative
from laplace_kf.tape.examples import ExampleGradients
from laplace_kf.tape.observation import Observation
from laplace_kf.tape.plan import plan
from laplace_kf.tape.rows import Rows
from laplace_kf.tape.select import owner, select
from laplace_kf.tape.tape import Tape

__all__ = ["Tracer"]


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
        rows: which rows belong to which example.
        gradients: per-example gradients.
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
        self.rows = Rows()
        self.gradients = ExampleGradients(model, forward, self.named)
        self._may_be_chain = True
        if self._selected is not None:
            self.layout = flat_layout(self.named, self._selected)

    @property
    def device(self) -> torch.device:
        """Device of the first selected parameter."""
        return next(iter(self.named.values())).device

    def block_of(self, parameter: str) -> Block:
        """The block that a parameter belongs to."""
        return self.blocks[self._block_of[parameter]]

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
            self.rows.locate(tape.calls, outputs)
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

    def _plan(self, tape: Tape) -> None:
        """Blocks of parameters met for the first time; those known already must be used as before."""
        planned, example_wise = plan(tape.calls, set(tape.opaque) | self.rows.shared, self.layout, self.named)
        for block in planned:
            known = self._block_of.get(block.parameters[0])
            if known is None:
                self.blocks[block.name] = block
                self._block_of.update(dict.fromkeys(block.parameters, block.name))
                self.example_wise |= {block.name} & example_wise
            elif self.blocks[known] != block:
                raise UnsupportedLayer(
                    f"parameters {', '.join(block.parameters)} are used in one way in one minibatch and in another way "
                    "in the next; leave them out with parameters=[patterns]"
                )


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
