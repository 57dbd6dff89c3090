"""Runs a model on the tape, minibatch after minibatch, and keeps what was learned about it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import conventions
from laplace_kf.batches import Forward, run, to_device, to_tensors
from laplace_kf.callers import users_line
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.linalg import all_finite
from laplace_kf.models import named_parameters
from laplace_kf.registry import Registry
from laplace_kf.returned import as_tensor
from laplace_kf.substitution import require_reached
from laplace_kf.tape.blocks import Block, FlatLayout, flat_layout, unused_blocks
from laplace_kf.tape.chain import Chain, OnStep, derivative
from laplace_kf.tape.chance import FirstPass, require_derivatives
from laplace_kf.tape.checked import count_uses, disagreeing
from laplace_kf.tape.examples import ExampleGradients
from laplace_kf.tape.known import Known, State, changed
from laplace_kf.tape.observation import Observation
from laplace_kf.tape.plan import plan
from laplace_kf.tape.rows import Rows, number
from laplace_kf.tape.select import owner, select
from laplace_kf.tape.sequence import blocks_along, run_along
from laplace_kf.tape.sharing import Readings
from laplace_kf.tape.tape import Call, Portion, Tape
from laplace_kf.tape.verdicts import note, remembered, verdict_key
from laplace_kf.tape.wiring import Wiring

__all__ = ["UNUSED", "Tracer"]

UNUSED: Registry[bool] = Registry("treatment of unused parameters")  # whether they are let be
UNUSED.register("error")(False)
UNUSED.register("prior")(True)


class Tracer:
    """Runs one model on a tape, minibatch after minibatch.

    Args:
        model: the module, in eval mode while it is traced.
        forward: ``(model, batch) -> (outputs, targets)`` or ``None`` for the default batch forms.
        parameters: selection as in :func:`laplace_kf.tape.select.select`.
        weights: differentiable stand-ins for some parameters by name, each of its parameter's shape, which ``forward``
            puts into the model; they are then what is selected.
        unused: what becomes of selected parameters that never take part: ``"error"``, or ``"prior"``: curvature 0.
        verify: whether layer rules are checked against autograd; without, a wrong one is used as it is.
        shared: whether other processes see other parts of the data, so that what no minibatch here meets is no mistake.

    Attributes:
        layout: flat layout of the selected parameters (after the first observation).
        known: the blocks, and how far each is checked.
        may_be_chain: whether every observation so far was a chain (:class:`laplace_kf.tape.chain.Chain`).
        rows: which rows belong to which example.
        gradients: per-example gradients.
        warned: names of blocks whose poorer form was warned of.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        parameters: str | Sequence[str] = "all",
        weights: Mapping[str, Tensor] | None = None,
        unused: str = "error",
        verify: bool = True,
        shared: bool = False,
    ) -> None:
        self.model = model
        self.verify = verify
        self.forward = forward
        self.parameters = parameters
        self.unused, self.shared = UNUSED[unused], shared
        self.named = named_parameters(model)
        self.layout: FlatLayout
        self._selected: list[str] | None
        if weights is not None:
            self.named.update(weights)
            self._selected = [name for name in self.named if name in weights]
        else:
            self._selected = None if parameters == "last_layer" else select(model, parameters, None, self.named)
        self._guarded = weights is not None  # who puts weights in watches over them
        self._weights = weights
        self.known = Known()
        self.rows = Rows()
        self.warned: set[str] = set()
        self._readings = Readings()
        self.gradients = ExampleGradients(model, forward, self.named)
        self.may_be_chain = True
        if self._selected is not None:
            self.layout = flat_layout(self.named, self._selected)

    @property
    def device(self) -> torch.device:
        """Device of the first selected parameter."""
        return next(iter(self.named.values())).device

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by name, in the order they were met (their order inside a dense matrix)."""
        return self.known.blocks

    @property
    def example_wise(self) -> set[str]:
        """Names of the vector blocks that need per-example gradients (no rule for their use)."""
        return self.known.example_wise

    def block_of(self, portion: Portion) -> Block:
        """The block that a portion of a parameter belongs to."""
        return self.known.block_of(portion)

    def unseen(self) -> list[str]:
        """Selected parameters that no observation has met yet."""
        return self.known.unmet(self.layout.names)

    def take_layout(self, layout: FlatLayout) -> None:
        """Where no minibatch came: what another process found out about the selection."""
        self._selected, self.layout = list(layout.names), layout

    def require_all_seen(self, unseen: Sequence[str] | None = None) -> None:
        """Raises :class:`UnsupportedLayer` for selected parameters that never took part in the forward pass.

        Not with ``unused="prior"``, as long as one of them did.

        Args:
            unseen: their names; default: those that no observation has met.
        """
        unseen = self.unseen() if unseen is None else unseen
        if not unseen or (self.unused and len(unseen) < len(self.layout.names)):
            return
        modules = sorted({owner(name) or "(root)" for name in unseen})
        way = (
            "None of them did: leave out unused=, and make the model use them"
            if self.unused
            else 'Pass unused="prior" to keep their prior (their curvature on these data is 0), freeze them '
            "(requires_grad_(False)), leave them out with parameters=[patterns], or make the model use them"
        )
        raise UnsupportedLayer(
            f"{len(unseen)} of {len(self.layout.names)} selected parameters never took part in the forward pass: "
            f"{_some(unseen)} (modules: {_some(modules)}). {way}{conventions.adapter_lines(self.model, unseen)} "
            "(scripted or compiled code is not visible: pass the plain module)."
        )

    def all_blocks(self) -> dict[str, Block]:
        """The blocks of all selected parameters by name; last, one for each that never took part."""
        return {**self.blocks, **unused_blocks(self.layout, self.unseen())}

    def learnt(self) -> dict[str, Any]:
        """What the minibatches so far have shown of the model, as plain values, for :meth:`learn`."""
        return {
            "selected": self._selected,
            "held": [] if self._selected is None else [list(place) for place in self.layout.held],
            "may_be_chain": self.may_be_chain,
            "warned": sorted(self.warned),
            "known": self.known.to_json(),
            "rows": self.rows.to_json(),
            "readings": self._readings.to_json(),
            "examples": self.gradients.to_json(),
        }

    def learn(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`learnt` gave in place of having seen those minibatches; for the same model."""
        if values["selected"] is not None:
            self._selected = list(values["selected"])
            held = tuple((name, start, stop) for name, start, stop in values["held"])
            self.layout = replace(flat_layout(self.named, self._selected), held=held)
        self.may_be_chain, self.warned = values["may_be_chain"], set(values["warned"])
        self.known.take_json(values["known"])
        self.rows.take_json(values["rows"])
        self._readings.take_json(values["readings"])
        self.gradients.take_json(values["examples"])

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
        along = self._along(batch, index)
        if along is not None:
            return along
        # to find the last layer, frozen parameters have to be seen as well
        names = self.named if self._selected is None else self._selected
        tracked = {id(self.named[name]): name for name in names}
        asked = self.verify and (not self.blocks or bool(self.known.unchecked()))
        wiring = Wiring(self.named.values(), self.model.buffers(), forms=asked)
        tape = Tape(
            tracked,
            record_steps=self.may_be_chain,
            on_step=derivative if self.may_be_chain else None,
            wiring=wiring,
            constants=self._constants(tracked),
        )
        again = lambda other: as_tensor(run(self.model, other, self.forward)[0])  # noqa: E731
        first = None if self._guarded else FirstPass(self.model, again, batch)
        with nullcontext() if first is None else first, torch.enable_grad(), tape:
            outputs, targets = run(self.model, batch, self.forward)
        _check_outputs(outputs, index)
        if self._selected is None:
            self._selected = select(self.model, self.parameters, self._reached(outputs, tape.order))
            self.layout = flat_layout(self.named, self._selected)
        if first is not None:
            second = require_reached(self.model, self.forward, self._selected, lambda: again(batch))
            first.require_a_function(outputs, second, self._selected)
            self._guarded = True
        keep = set(self._selected)
        tape.opaque = {name: why for name, why in tape.opaque.items() if name in keep}
        for call in tape.calls:
            call.portions = {role: portion for role, portion in call.portions.items() if portion.name in keep}
        tape.calls = [call for call in tape.calls if call.portions]
        number(tape.calls)
        for step in tape.steps:
            step.call = step.call if step.call is not None and step.call.portions else None
        self._note_constants(tape)
        if first is not None:
            require_derivatives(self.model, self.layout.names, again, batch, outputs)
        if not outputs.requires_grad and not self.unused and not self.shared:
            self.require_all_seen()
        return self._observation(batch, tape, outputs, targets)

    def _along(self, batch: Any, index: int) -> Observation | None:
        """As :meth:`observe`, without a tape, of a model whose types say what it does; ``None`` for any other."""
        if not self.may_be_chain or not self.verify:
            return None
        if self._weights is not None:  # put in by ``forward``, which says whether that is all it does
            if not getattr(self.forward, "plain", False):
                return None
            inputs, given = batch, None
        elif self.forward is None and isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, given = batch
        else:
            return None
        with torch.enable_grad():
            found = run_along(self.model, inputs, self._weights or {})
        if found is None:
            return None
        outputs = found.outputs
        _check_outputs(outputs, index)
        if self._selected is None:
            self._selected = select(self.model, self.parameters, found.order)
            self.layout = flat_layout(self.named, self._selected)
        calls = found.calls(self._selected)
        if any(self.named.get(n) is not p for call in calls for n, p in call.parameters()):
            return None  # replaced since the tracer was made
        self.known.take(blocks_along(calls, self.layout), ())
        self.known.count({name: 1 for call in calls for name in call.names})
        self.known.checked(len(outputs))
        targets = to_device(to_tensors(given, self.model), outputs.device)
        return Observation(self, batch, outputs, targets, calls, Chain.along(found.links))

    def _note_constants(self, tape: Tape) -> None:
        """Tells the layout of the rows of tables that are constants."""
        ranges = self.known.constants(tape.calls, tape.opaque, self.named)
        held = tuple((name, *ranges[name]) for name in self.layout.names if name in ranges)
        if held != self.layout.held:
            self.layout = replace(self.layout, held=held)

    def _observation(self, batch: Any, tape: Tape, outputs: Tensor, targets: Any) -> Observation:
        """What was recorded, with rows located and blocks planned and checked."""
        chain = self._chain(tape, outputs)
        if chain is None:
            tape.calls = self._readings.known(tape.calls)
            failed = self._locate(tape, outputs)
            tape.calls, shared = self._readings.settle(tape.calls, failed)
            self.rows.shared |= shared
        observation = Observation(self, batch, outputs, targets, tape.calls, chain, made=tape)
        self._plan(tape)
        if not self.verify or self._verify(observation):
            return observation
        self._plan(tape)
        self.known.checked(1)  # what is left of the blocks was: this minibatch goes into their sums
        return Observation(self, batch, outputs, targets, tape.calls, None, made=tape)

    def _locate(self, tape: Tape, outputs: Tensor) -> list[Call]:
        """:meth:`Rows.locate`, with what is known of passes of this form."""
        form = None if tape.picked or tape.wiring is None else tape.wiring.form(outputs)
        key = verdict_key("rows", form, tape.calls, outputs, tuple(self.layout.names))
        self.rows.remember(remembered(self.model, key) or {})
        failed = self.rows.locate(tape.calls, outputs, tape.picked, tape.flat)
        modes = self.rows.settled(tape.calls, len(outputs))
        if modes and not failed:
            note(self.model, key, modes)
        return failed

    def _constants(self, tracked: Collection[int]) -> list[Tensor]:
        """What is the same for all examples: buffers, and parameters that are not tracked."""
        return [*self.model.buffers(), *(p for p in self.model.parameters() if id(p) not in tracked)]

    def _chain(self, tape: Tape, outputs: Tensor) -> Chain | None:
        """The chain of this forward pass, if the network is one; asked once, then remembered."""
        if not self.may_be_chain:
            return None
        try:
            return Chain(tape, outputs)
        except UnsupportedLayer:
            self.may_be_chain = False
            tape.steps.clear()
            return None

    def _reached(self, outputs: Tensor, order: Sequence[str]) -> list[str]:
        """``order`` without the uses at its end on which the outputs ``(N, ...)`` do not depend (another head)."""
        order = list(order)
        while order and outputs.requires_grad and (weight := self.named[order[-1]]).requires_grad:
            ones = torch.ones_like(outputs)
            if torch.autograd.grad(outputs, weight, ones, retain_graph=True, allow_unused=True)[0] is not None:
                break
            order = [name for name in order if name != order[-1]]
        return order

    def chain_or_refusal(self, batch: Any, on_step: OnStep = derivative) -> Chain:
        """The chain of one batch; raises :class:`UnsupportedLayer` with the reason if the network is not one.

        ``on_step`` says what stands in the slopes ``(N, d)`` of its activations.
        """
        tracked = {id(self.named[name]): name for name in self.layout.names}
        tape = Tape(tracked, record_steps=True, on_step=on_step)
        with torch.enable_grad(), tape:
            outputs, _ = run(self.model, to_device(batch, self.device), self.forward)
        return Chain(tape, outputs)

    def _plan(self, tape: Tape) -> None:
        """Blocks of parameters met for the first time; those known already must be used as before."""
        unruled = {
            **dict.fromkeys(
                self.known.hidden, "also used where its calls do not tell its gradient (an own autograd function?)"
            ),
            **dict.fromkeys(self.rows.shared, "rows that belong to several examples, or to examples in no order"),
            **{name: f"no rule for: {why}" for name, why in tape.opaque.items()},
        }
        self.known.take(*plan(tape.calls, unruled, self.layout, self.named))

    def _verify(self, observation: Observation) -> bool:
        """Checks the blocks whose :class:`~laplace_kf.tape.known.State` asks for it; those that fail are forgotten.

        Returns:
            Whether all passed; if not, their parameters are to be planned anew.

        Raises:
            UnsupportedLayer: if a block fails that an earlier minibatch went into.
        """
        known, outputs = self.known, observation.outputs
        uses = count_uses(outputs, {id(self.named[name]): name for name in self.layout.names})
        known.count(uses)
        states = known.unchecked()
        known.checked(observation.count)
        blocks = [known.blocks[name] for name in states if name not in known.example_wise]
        unseen = [name for name in self.unseen() if name not in known.hidden]
        if not (blocks or unseen) or not outputs.requires_grad:
            return True
        whole = len(states) == len(known.blocks) and not known.hidden
        selected = tuple(self.layout.names), tuple(sorted(known.example_wise))
        key = verdict_key("rules", observation.form, observation.calls, outputs, selected) if whole else None
        if remembered(self.model, key):
            return True
        failed, met, shown = disagreeing(observation, blocks, unseen, self.named)
        if earlier := [block for block in failed if states[block.name] is State.TRIED]:
            raise changed({name for block in earlier for name in block.parameters})
        for block in failed:
            self._note_failure(block, observation, uses)
        passed = not failed and not met
        if not passed:
            fresh = [n for n, state in states.items() if state is State.FRESH and n in known.example_wise]
            known.hide({*met, *(name for block in failed for name in block.parameters)}, fresh)
        if passed and shown:
            note(self.model, key, True)
        self.may_be_chain = self.may_be_chain and passed
        return passed

    def _note_failure(self, block: Block, observation: Observation, uses: Mapping[str, int]) -> None:
        """Names the rule of a block that failed, where its parameters are used by nothing but calls with a rule."""
        calls = [call for call in observation.calls if set(call.names) & set(block.parameters)]
        recorded = {name: sum(name in call.names for call in calls) for name in block.parameters}
        if any(uses.get(name, 0) > recorded[name] for name in block.parameters):
            return
        rules = ", ".join(sorted({call.rule.name for call in calls}))
        self.known.refuted.update(dict.fromkeys(block.parameters, rules))
        warnings.warn(
            f"layer rule {rules!r} failed its check against autograd in block {block.name!r}: its gradient for "
            f"{', '.join(block.parameters)} is another one. Per-example gradients take its place: all numbers are "
            "right, but slower, and without Kronecker factors. If the rule is yours, mend it; if it is not, the "
            "parameters act where no rule sees them (a gradient taken in the forward pass, an own autograd function)",
            RuntimeWarning,
            stacklevel=users_line(),
        )


def _some(names: Sequence[str], most: int = 10) -> str:
    """The first ten names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _check_outputs(outputs: Tensor, index: int) -> None:
    if outputs.dim() < 2:
        raise ShapeMismatch(
            f"batch {index}: the model's outputs have shape {tuple(outputs.shape)}; they must be (N, C), (N, T, C) or "
            "(N, C, H, W). Keep the output axis (no squeeze), or reshape in forward=; single examples become batches "
            "with DataLoader(dataset, batch_size=64)"
        )
    if not len(outputs):
        raise ShapeMismatch(
            f"batch {index} has no examples (outputs {tuple(outputs.shape)}); leave empty minibatches out"
        )
    values = outputs.detach()
    if not all_finite(values):
        masked = bool((values.isfinite() | values.isneginf()).all())  # classes that are shut out
        raise NonFinite(
            f"batch {index}: the model's outputs {tuple(outputs.shape)} have NaN or infinite entries; check the "
            "inputs and the trained weights"
            + (". If -inf masks classes, give logits.masked_fill(mask, -1e4), whose probability is 0, too" * masked)
        )
