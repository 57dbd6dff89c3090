"""Runs a model on the tape, minibatch after minibatch, and keeps what was learned about it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, run, to_device
from laplace_kf.callers import users_line
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.linalg import all_finite
from laplace_kf.models import coarsest
from laplace_kf.registry import Registry
from laplace_kf.returned import as_tensor
from laplace_kf.substitution import leaves_of, require_reached
from laplace_kf.tape.blocks import Block, FlatLayout, flat_layout, unused_blocks
from laplace_kf.tape.chain import Chain, OnStep, derivative
from laplace_kf.tape.examples import ExampleGradients
from laplace_kf.tape.observation import Observation
from laplace_kf.tape.plan import plan
from laplace_kf.tape.rows import Rows, number
from laplace_kf.tape.select import owner, select
from laplace_kf.tape.sharing import Readings
from laplace_kf.tape.tape import Portion, Tape
from laplace_kf.tape.verdicts import known, note, verdict_key
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

    Attributes:
        layout: flat layout of the selected parameters (after the first observation).
        blocks: blocks by name, in the order they were met (their order inside a dense matrix).
        example_wise: names of the vector blocks that need per-example gradients (no rule for their use).
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
    ) -> None:
        self.model = model
        self.verify = verify
        self.forward = forward
        self.parameters = parameters
        self.unused = UNUSED[unused]
        self.named: dict[str, Tensor] = dict(model.named_parameters())
        self.blocks: dict[str, Block] = {}
        self.layout: FlatLayout
        self._selected: list[str] | None
        if weights is not None:
            self.named.update(weights)
            self._selected = [name for name in self.named if name in weights]
        else:
            self._selected = None if parameters == "last_layer" else select(model, parameters)
        self._guarded = weights is not None  # who puts weights in watches over them
        self.example_wise: set[str] = set()
        self._hidden: set[str] = set()
        self._constant: dict[str, int | None] = {}  # by parameter, the row that all its uses take for a constant
        self._failed: dict[str, str] = {}  # parameter to the layer rules that failed the check
        self._counts: dict[str, int] = {}
        self._verified: set[str] = set()
        self._tried: set[str] = set()  # blocks checked so far, perhaps with a single example only
        self._blocks_of: dict[str, list[str]] = {}
        self.rows = Rows()
        self.warned: set[str] = set()
        self._readings = Readings()
        self.gradients = ExampleGradients(model, forward, self.named)
        self._may_be_chain = True
        if self._selected is not None:
            self.layout = flat_layout(self.named, self._selected)

    @property
    def device(self) -> torch.device:
        """Device of the first selected parameter."""
        return next(iter(self.named.values())).device

    @property
    def may_be_chain(self) -> bool:
        """Whether every observation so far was a chain (:class:`laplace_kf.tape.chain.Chain`)."""
        return self._may_be_chain

    def block_of(self, portion: Portion) -> Block:
        """The block that a portion of a parameter belongs to."""
        found = [self.blocks[name] for name in self._blocks_of[portion.name]]
        return next(block for block in found if len(found) == 1 or block.covers(*portion.place))

    def unseen(self) -> list[str]:
        """Selected parameters that no observation has met yet."""
        return [name for name in self.layout.names if name not in self._blocks_of]

    def require_all_seen(self) -> None:
        """Raises :class:`UnsupportedLayer` for selected parameters that never took part in the forward pass.

        Not with ``unused="prior"``, as long as one of them did.
        """
        unseen = self.unseen()
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
            f"{_some(unseen)} (modules: {_some(modules)}). {way} (scripted or compiled code is not visible: pass the "
            "plain module)."
        )

    def all_blocks(self) -> dict[str, Block]:
        """The blocks of all selected parameters by name; last, one for each that never took part."""
        return {**self.blocks, **unused_blocks(self.layout, self.unseen())}

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
        # to find the last layer, frozen parameters have to be seen as well
        names = self.named if self._selected is None else self._selected
        tracked = {id(self.named[name]): name for name in names}
        wiring = Wiring(self.named.values(), self.model.buffers())
        tape = Tape(
            tracked,
            record_steps=self._may_be_chain,
            on_step=derivative if self._may_be_chain else None,
            wiring=wiring,
            constants=self._constants(tracked),
        )
        with torch.enable_grad(), tape:
            outputs, targets = run(self.model, batch, self.forward)
        _check_outputs(outputs, index)
        if self._selected is None:
            self._selected = select(self.model, self.parameters, self._reached(outputs, tape.order))
            self.layout = flat_layout(self.named, self._selected)
        if not self._guarded:
            require_reached(
                self.model, self.forward, self._selected, lambda: as_tensor(run(self.model, batch, self.forward)[0])
            )
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
        if not outputs.requires_grad and not self.unused:
            self.require_all_seen()
        try:
            return self._observation(batch, tape, outputs, targets)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedLayer(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which hides its layers from autograd; "
                "pass use_reentrant=False to checkpoint, or turn gradient checkpointing off for the fit"
            ) from error

    def _note_constants(self, tape: Tape) -> None:
        """Rows of tables that are constants: every use of the table so far has to take them for that."""
        for call in tape.calls:
            for role, portion in call.portions.items():
                plain = role == "weight" and portion.whole and not portion.transposed
                row = call.rule.constant_row(call.bound) if plain else None
                if self._constant.setdefault(portion.name, row) != row:
                    self._constant[portion.name] = None
        self._constant.update(dict.fromkeys((*tape.opaque, *self._hidden)))
        held = []
        for name in self.layout.names:
            row = self._constant.get(name)
            if row is not None:
                width = self.named[name][0].numel()
                held.append((name, row * width, (row + 1) * width))
        if tuple(held) != self.layout.held:
            self.layout = replace(self.layout, held=tuple(held))

    def _observation(self, batch: Any, tape: Tape, outputs: Tensor, targets: Any) -> Observation:
        """What was recorded, with rows located and blocks planned and checked."""
        chain = self._chain(tape, outputs)
        if chain is None:
            tape.calls = self._readings.known(tape.calls)
            failed = self.rows.locate(tape.calls, outputs, tape.picked, tape.flat)
            tape.calls, shared = self._readings.settle(tape.calls, failed)
            self.rows.shared |= shared
        observation = Observation(self, batch, outputs, targets, tape.calls, chain, made=tape)
        self._plan(tape)
        if not self.verify or self._verify(observation):
            return observation
        self._plan(tape)
        return Observation(self, batch, outputs, targets, tape.calls, None, made=tape)

    def _constants(self, tracked: Collection[int]) -> list[Tensor]:
        """What is the same for all examples: buffers, and parameters that are not tracked."""
        return [*self.model.buffers(), *(p for p in self.model.parameters() if id(p) not in tracked)]

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
                self._hidden, "also used where its calls do not tell its gradient (an own autograd function?)"
            ),
            **dict.fromkeys(self.rows.shared, "rows that belong to several examples, or to examples in no order"),
            **{name: f"no rule for: {why}" for name, why in tape.opaque.items()},
        }
        planned, example_wise = plan(tape.calls, unruled, self.layout, self.named)
        parameters = {name for block in planned for name in block.parameters}
        known = {name for found in map(self._blocks_of.get, parameters) for name in found or ()}
        fresh = [block for block in planned if all(name not in self._blocks_of for name in block.parameters)]
        if {b.name: b for b in planned if b not in fresh} != {name: self.blocks[name] for name in known}:
            raise _changed(parameters & set(self._blocks_of))
        # what was elementwise so far may be used in another way now: then per-example gradients from here on
        self.example_wise |= example_wise & known
        for found in fresh:
            rules = sorted({self._failed[name] for name in found.parameters if name in self._failed})
            block = replace(found, failed=", ".join(rules)) if rules else found
            self.blocks[block.name] = block
            for name in block.parameters:
                self._blocks_of.setdefault(name, []).append(block.name)
            self.example_wise |= {block.name} & example_wise

    def _verify(self, observation: Observation) -> bool:
        """Checks the blocks met for the first time against one ordinary backward pass.

        The gradients that their signals imply must add up to what autograd gives for the parameters themselves. They
        do not if a parameter also acts where no tape sees it: inside a custom ``autograd.Function``, or through a
        gradient taken in the forward pass. Such parameters go through per-example gradients.

        A single example cannot tell everything (what is shared by all examples), so the next minibatch is checked, too;
        and a block is checked again whenever autograd counts another number of uses of its parameters. A pass that is
        wired like one that passed is not checked (:mod:`laplace_kf.tape.verdicts`).

        Returns:
            Whether all blocks passed; if not, the failed ones are forgotten, to be planned anew.

        Raises:
            UnsupportedLayer: if a block fails that an earlier minibatch went into.
        """
        counts = _uses(observation.outputs, {id(self.named[name]): name for name in self.layout.names})
        changed = {name for name, uses in counts.items() if self._counts.get(name, uses) != uses}
        self._counts.update(counts)
        self._verified -= {block for name in changed for block in self._blocks_of.get(name, ())}
        fresh = {n: b for n, b in self.blocks.items() if n not in self._verified}
        earlier = self._tried & set(fresh)
        self._tried.update(fresh)
        if observation.count > 1:
            self._verified.update(fresh)
        whole = len(fresh) == len(self.blocks) and not self._hidden
        fresh = {n: b for n, b in fresh.items() if n not in self.example_wise}
        unseen = [name for name in self.unseen() if name not in self._hidden]
        outputs = observation.outputs
        if not (fresh or unseen) or not outputs.requires_grad:
            return True
        key = verdict_key(observation, (tuple(self.layout.names), tuple(sorted(self.example_wise)))) if whole else None
        if known(self.model, key):
            return True
        generator = torch.Generator().manual_seed(1)
        seed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        names = [*(name for block in fresh.values() for name in block.parameters), *unseen]
        weights = [self.named[name] for name in names]
        grads = torch.autograd.grad(outputs, weights, seed, retain_graph=True, allow_unused=True)
        true = {
            name: (torch.zeros_like(weight) if grad is None else grad.to_dense())[None]
            for name, weight, grad in zip(names, weights, grads, strict=True)
        }
        with torch.no_grad():
            implied = {n: s.total() for n, s in observation.ruled_signals(seed[None]).items() if n in fresh}
        failed = []
        telling = True  # gradients that are all zero show nothing
        met = {name for name, grad in zip(names, grads, strict=True) if name in unseen and grad is not None}
        self._hidden |= met
        for name, block in fresh.items():
            expected = block.pack(true)[0]
            found = implied.get(name, torch.zeros_like(expected))
            scale = torch.maximum(expected.abs().max(), found.abs().max())
            rounding = torch.finfo(coarsest(expected.dtype)).eps
            telling = telling and bool(scale > 0)
            if bool((found - expected).abs().max() > 10 * rounding**0.5 * scale):
                failed.append(block)
        if any(block.name in earlier for block in failed):
            raise _changed({name for block in failed for name in block.parameters})
        for block in failed:
            self._hidden.update(block.parameters)
            self._note_failure(block, observation, counts)
        # a bias or other rows of a failed weight are planned anew together with it
        for block in [b for b in self.blocks.values() if self._hidden & set(b.parameters)]:
            del self.blocks[block.name]
            for name in block.parameters:
                self._blocks_of.pop(name, None)
        passed = not failed and not met
        if passed and telling:
            note(self.model, key)
        self._may_be_chain = self._may_be_chain and passed
        return passed

    def _note_failure(self, block: Block, observation: Observation, uses: Mapping[str, int]) -> None:
        """Names the rule of a block that failed, where its parameters are used by nothing but calls with a rule."""
        calls = [call for call in observation.calls if set(call.names) & set(block.parameters)]
        recorded = {name: sum(name in call.names for call in calls) for name in block.parameters}
        if any(uses.get(name, 0) > recorded[name] for name in block.parameters):
            return
        rules = ", ".join(sorted({call.rule.name for call in calls}))
        self._failed.update(dict.fromkeys(block.parameters, rules))
        warnings.warn(
            f"layer rule {rules!r} failed its check against autograd in block {block.name!r}: its gradient for "
            f"{', '.join(block.parameters)} is another one. Per-example gradients take its place: all numbers are "
            "right, but slower, and without Kronecker factors. If the rule is yours, mend it; if it is not, the "
            "parameters act where no rule sees them (a gradient taken in the forward pass, an own autograd function)",
            RuntimeWarning,
            stacklevel=users_line(),
        )


def _uses(outputs: Tensor, names: Mapping[int, str]) -> dict[str, int]:
    """How often each parameter (name by id) enters the autograd graph of ``outputs (N, ...)``."""
    found: dict[str, int] = {}
    for leaf in leaves_of(outputs):
        name = names.get(id(leaf))
        if name is not None:
            found[name] = found.get(name, 0) + 1
    return found


def _some(names: Sequence[str], most: int = 10) -> str:
    """The first ten names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _changed(names: Collection[str]) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"parameters {', '.join(sorted(names))} are used one way in one minibatch and in another way in the next (if "
        "one of them has a single example, or rows are ordered by the data, others can show more: put the largest "
        "minibatch first, or take all of one size); otherwise leave them out with parameters=[patterns]"
    )


def _check_outputs(outputs: Tensor, index: int) -> None:
    if outputs.dim() < 2:
        raise ShapeMismatch(
            f"batch {index}: the model's outputs have shape {tuple(outputs.shape)}; they must be (N, C), (N, T, C) or "
            "(N, C, H, W). Keep the output axis (no squeeze), or reshape in forward="
        )
    if not len(outputs):
        raise ShapeMismatch(f"batch {index} has no examples (outputs {tuple(outputs.shape)})")
    if not all_finite(outputs.detach()):
        raise NonFinite(
            f"batch {index}: the model's outputs {tuple(outputs.shape)} have NaN or infinite entries; check the "
            "inputs and the trained weights"
        )
