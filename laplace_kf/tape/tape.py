"""The tape: which function consumed which parameter, with which input and output.

``torch.overrides.TorchFunctionMode`` shows every torch function call, so the tape needs no hooks on the user's
modules and sees parameters wherever they are used: in ``nn.Linear``, in a custom layer that calls ``F.linear``, in a
re-used or tied module, in an elementwise scale. An output is remembered by its *gradient edge* (its place in the
autograd graph), not as a tensor, so an in-place activation after a layer cannot falsify what is read later.

A function may read a *view* of a parameter: its transpose, or some of its rows (the three projections packed into one
weight of an attention layer). Views are recognised by where they lie in the parameter's memory (:class:`Portion`), so
it does not matter by which calls they were made. Functions that are fused for speed but made of functions with rules
(attention, recurrent layers) are replaced by their parts: :data:`laplace_kf.layers.parts.PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.layers.base import RULES, BoundCall, LayerRule
from laplace_kf.layers.elementwise import ADDITIONS
from laplace_kf.layers.parts import PARTS
from laplace_kf.layers.shared import EXPANSIONS, SHARED, Meeting, is_broadcast, meeting
from laplace_kf.lookups import NoHook
from laplace_kf.returned import nested
from laplace_kf.tape.edges import activates_view, edge_of
from laplace_kf.tape.made import Made, MadeTensors, writes
from laplace_kf.tape.row_picks import NUMBERS, picks_rows
from laplace_kf.tape.wiring import Wiring

__all__ = ["Call", "Portion", "Step", "Tape"]


@dataclass(frozen=True)
class Portion:
    """Which entries of a parameter a function read.

    Attributes:
        name: the parameter.
        start: first entry in the parameter's row-major order.
        stop: one past the last.
        transposed: a matrix that was read with rows and columns exchanged.
        whole: all entries.
    """

    name: str
    start: int
    stop: int
    transposed: bool = False
    whole: bool = True

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def place(self) -> tuple[str, int, int]:
        """Name and range: equal for two readings of the same entries."""
        return self.name, self.start, self.stop


@dataclass
class Call:
    """One use of parameters by a function that has a rule.

    Attributes:
        rule: the layer rule.
        bound: the call's arguments by name.
        portions: role (``"weight"``, ``"bias"``) to what was read, tracked parameters only.
        edge: where the output stands in the autograd graph. Where it is a view of all of another tensor (a linear map
            of sequences), that tensor: an activation in place takes the view, not the tensor, out of the graph.
        shape: shape of the output.
        leading: how many leading output axes enumerate rows.
        version: version counter of the input when it was consumed.
        repeated: for a lookup made once for all examples, the shape to which its tokens were repeated.
        occurrence: how many calls that read the same stood before it in the pass.
        source: for copies of a tensor made of parameters (:mod:`laplace_kf.layers.shared`), that tensor, of any shape.
        aligned: its shape among ``shape``, 1 where copies differ.
        covers: calls with a rule that read the parameters on the way to ``source``.
        covered: whether these say all about how ``source`` depends on the parameters.
        kept: something else than copies used what this call made.
        derivative: of ``source`` by some of its parameters, by its identity and their names, kept while the pass is
            used.
    """

    rule: LayerRule
    bound: BoundCall
    portions: dict[str, Portion]
    edge: GradientEdge
    shape: torch.Size
    leading: int
    version: int
    repeated: torch.Size | None = None
    occurrence: int = 0
    source: Tensor | None = None
    aligned: tuple[int, ...] = ()
    covers: tuple[Call, ...] = ()
    covered: bool = False
    kept: bool = False
    derivative: dict[tuple[int, tuple[str, ...]], list[Tensor]] = field(default_factory=dict)

    def gradient(self, found: Tensor | None) -> Tensor | None:
        """What autograd found at :attr:`edge`, in the shape of the output."""
        return None if found is None else found.reshape(self.shape)

    def part(self, rows: Tensor) -> Call:
        """The call as the rows ``(M,)`` of its input ``(N, I)`` alone would have made it."""
        bound = replace(self.bound, values={**self.bound.values, "input": self.input().index_select(0, rows)})
        return replace(self, bound=bound, shape=torch.Size((len(rows), *self.shape[1:])), version=0)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The names and what was read of them (each of the shape that it was read in), in role order."""
        return [(portion.name, self.bound[role]) for role, portion in self.portions.items()]

    @property
    def names(self) -> list[str]:
        """The parameter names, in role order."""
        return [portion.name for portion in self.portions.values()]

    @property
    def key(self) -> tuple[str, ...]:
        """What was read, in role order."""
        return tuple(str(portion) for portion in self.portions.values())

    @property
    def place(self) -> tuple[tuple[str, ...], int]:
        """A key that stays the same from batch to batch: what was read, as what, and how often before."""
        return (*self.key, self.rule.name), self.occurrence

    def input(self) -> Tensor:
        """The input as it was consumed, in its own shape; dense, if it was sparse.

        Raises:
            UnsupportedLayer: if it was changed in place since.
        """
        value: Tensor = self.bound["input"]
        if _version(value) != self.version:
            raise UnsupportedLayer(
                f"the input of the layer with parameters {', '.join(self.key)} was changed in place after the layer "
                "read it; make that operation out of place"
            )
        value = value.detach()
        if value.layout is not torch.strided:
            value = value.to_dense()
        return value if self.repeated is None else value.expand(self.repeated)


_transforming = torch._C._functorch.peek_interpreter_stack


@dataclass
class Step:
    """One function call of the forward pass, for analyses that need the whole chain of functions.

    A tensor (of any shape) at one moment is known by ``(id, version)``, which tells in-place activations apart.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    source: Tensor | None
    source_key: tuple[int, int]
    output: Tensor
    output_key: tuple[int, int]
    call: Call | None
    before: Tensor | None


class Tape(TorchFunctionMode):
    """Records the calls that consume tracked parameters, whatever the shapes; surround one forward pass with it.

    Args:
        tracked: ``id(parameter)`` to parameter name.
        on_step: called before every function with (function, args, kwargs); its return value is kept in the step.
        record_steps: also keep every call on tensors (:attr:`steps`).
        wiring: follows the pass.
        constants: tensors of any shape that are the same for all examples (buffers, parameters that are not tracked).

    After the pass, :attr:`calls` lists the uses that have a rule, in order; :attr:`opaque` the names consumed by
    anything else (with the name of the function); :attr:`order` all uses in order; :attr:`picked` whether rows were
    picked or ordered by the data; :attr:`flat` the autograd nodes of activations that changed a view in place.
    """

    def __init__(
        self,
        tracked: Mapping[int, str],
        record_steps: bool = False,
        on_step: Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Tensor | None] | None = None,
        wiring: Wiring | None = None,
        constants: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.tracked = tracked
        self.record_steps = record_steps
        self.on_step = on_step
        self.calls: list[Call] = []
        self.opaque: dict[str, str] = {}
        self.order: list[str] = []
        self.steps: list[Step] = []
        self.picked = False
        self.flat: list[Any] = []
        self.wiring = wiring
        self._results: dict[int, Tensor] = {}
        self._lookups: dict[int, tuple[Tensor, Call]] = {}
        self._made = MadeTensors(constants)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook:
            return NoHook()
        if _transforming() is not None:  # torch.func in the forward pass: its tensors are gone afterwards
            return func(*args, **kwargs)
        parts = PARTS.get(func)
        if parts is not None and any(self._root(t) is not None for t in _tensors((args, kwargs))):
            replacement = parts(func, args, kwargs)
            if replacement is not None:
                with self:
                    return replacement(*args, **kwargs)
        if not self.picked and picks_rows(func, args):
            hidden = [
                t for t in _tensors((args, kwargs)) if t.requires_grad and not (self._root(t) or self._made.get(t))
            ]
            self.picked = bool(hidden) or func in NUMBERS
        direct: set[int] = set()
        if func in ADDITIONS and self._lookups:
            args, direct = self._repeated_lookups(args)
        tensors = list(_tensors((args, kwargs)))
        used = {id(t): self._root(t) for t in tensors}
        used = {key: root for key, root in used.items() if root is not None}
        if used and any(t.is_nested for t in tensors):
            raise nested(f"parameter {next(root[1] for root in used.values() if root is not None)!r} is applied to")
        known = ((id(t), self._made.get(t)) for t in tensors if id(t) not in used)
        made = {key: found for key, found in known if found is not None}
        data = any(
            id(t) in direct or not (id(t) in used or id(t) in made or self._made.is_constant(t)) for t in tensors
        )
        source, source_key, before = None, (0, 0), None
        if self.record_steps:
            source = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
            if isinstance(source, Tensor):
                source_key = (id(source), _version(source))
                before = self.on_step(func, args, kwargs) if self.on_step is not None else None
        rule = RULES.get(func) if used else None
        bound = rule.bind(args, kwargs, used) if rule is not None else None
        version = _version(bound["input"]) if bound is not None and bound["input"] is not None else 0
        ruled = self._ruled(func, rule, bound, args, kwargs) if used else set()
        met = None
        if data and (used or made):
            mine = [key for key in (*used, *made) if key not in ruled and key not in direct]
            met = meeting(func, args, kwargs, mine) if mine else None
        wired = self.wiring.before(func, args, kwargs) if self.wiring is not None else None
        output = func(*args, **kwargs) if met is None else met.run()
        if self.wiring is not None:
            self.wiring.after(wired, output)
        done = set() if met is None else {id(copy.source) for copy in met.copies}
        if data and writes(func) and isinstance(args[0], Tensor):
            self._made.wrote(args[0])
        if activates_view(func, args, kwargs, output):
            self.flat.append(output._base.grad_fn)
        call = None
        if used and self._consumed(output, rule):
            self.order.extend(root[1] for root in used.values() if root is not None)
            call = self._record(func, rule, bound, args, kwargs, output, version, done, data)
        if met is not None:
            self._meet(met, used, made)
        if used or made:
            self._follow(func, output, used, made, ruled, done | direct, data, call)
        elif not data:
            self._made.add_constants(_tensors(output))
        if self.record_steps and isinstance(output, Tensor):
            # the tensors are kept alive so that their ids stay theirs
            key = (id(output), _version(output))
            self.steps.append(Step(func, args, kwargs, source, source_key, output, key, call, before))
        return output

    def _root(self, tensor: Tensor) -> tuple[Tensor, str] | None:
        """The tracked parameter that a tensor is, or is a view of, with its name."""
        name = self.tracked.get(id(tensor))
        if name is not None:
            return tensor, name
        if id(tensor) in self._results:
            return None
        base = tensor._base
        name = self.tracked.get(id(base)) if base is not None else None
        return None if base is None or name is None else (base, name)

    def _consumed(self, output: Any, rule: LayerRule | None) -> bool:
        """Whether a call did something with a parameter, rather than only look at it (``weight.T``, ``weight[:4]``)."""
        made = [t for t in _tensors(output) if t.requires_grad]
        if rule is not None and rule.keeps_memory:
            return bool(made)
        return any(self._root(t) is None for t in made)

    def _portion(self, tensor: Any) -> Portion | None:
        """What a function read of a tracked parameter; ``None`` for no parameter, or entries that are no range."""
        root = self._root(tensor) if isinstance(tensor, Tensor) else None
        if root is None:
            return None
        parameter, name = root
        size = parameter.numel()
        if tensor is parameter:
            return Portion(name, 0, size)
        if not parameter.is_contiguous():
            return None
        start = int(tensor.storage_offset() - parameter.storage_offset())
        stop = start + tensor.numel()
        whole = (start, stop) == (0, size)
        if tensor.is_contiguous():
            return Portion(name, start, stop, False, whole)
        if tensor.dim() == 2 and tensor.T.is_contiguous():
            return Portion(name, start, stop, True, whole)
        return None

    def _repeated_lookups(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], set[int]]:
        """Repeats what was looked up once for all examples (a position table): each example has its own rows then.

        Returns:
            The arguments, and the ids of the lookups among them, which their own rule reads.
        """
        operands = [a for a in args if isinstance(a, Tensor)]
        lookups = [a for a in operands if id(a) in self._lookups]
        others = [a for a in operands if id(a) not in self._lookups]
        if len(operands) != 2 or not lookups or any(self._root(a) is not None for a in others):
            return tuple(args), set()
        try:
            shape = torch.broadcast_shapes(*(a.shape for a in operands))
        except RuntimeError:
            return tuple(args), set()
        if any(self._made.is_constant(a) or self._made.get(a) is not None for a in others):
            return tuple(args), set()  # nothing here is of one example
        if not others and all(a.shape != shape for a in operands):
            return tuple(args), set()  # a table of rows and one of columns
        changed = list(args)
        direct: set[int] = set()
        for k, value in enumerate(args):
            found = self._lookups.pop(id(value), None) if isinstance(value, Tensor) else None
            if found is None:
                continue
            call = found[1]
            call.kept = True
            if shape != value.shape and shape[-1:] == value.shape[-1:] and value.requires_grad:
                changed[k] = value.expand(shape)
                call.edge, call.shape, call.leading = get_gradient_edge(changed[k]), shape, len(shape) - 1
                call.repeated = shape[:-1]
            direct.add(id(changed[k]))
        return tuple(changed), direct

    def _ruled(
        self,
        func: Callable[..., Any],
        rule: LayerRule | None,
        bound: BoundCall | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> set[int]:
        """Ids of the arguments that the function's own rule reads."""
        if rule is None or bound is None:
            return set()
        shape: Sequence[int] = ()
        if is_broadcast(func):
            try:
                shape = torch.broadcast_shapes(*(t.shape for t in _tensors((args, kwargs))))
            except RuntimeError:
                return set()
        elif func in EXPANSIONS:
            shape = func(*args, **kwargs).shape
        if rule.refuses(bound, torch.empty(shape, device="meta")) is not None:
            return set()
        return {id(t) for t in map(bound.values.get, rule.roles) if self._portion(t) is not None}

    def _meet(self, met: Meeting, used: Mapping[int, Any], made: Mapping[int, Made]) -> None:
        """Records the copies that were made."""
        for copy in met.copies:
            key = id(copy.source)
            found = made.get(key)
            sizes = {used[key][1]: used[key][0].numel()} if found is None else found.sizes
            self.order.extend(sizes)
            self.calls.append(
                Call(
                    SHARED,
                    BoundCall({"input": None}),
                    {str(k): Portion(name, 0, size) for k, (name, size) in enumerate(sizes.items())},
                    get_gradient_edge(copy.copies),
                    copy.copies.shape,
                    copy.copies.dim(),
                    0,
                    source=copy.source,
                    aligned=copy.aligned,
                    covers=() if found is None else found.calls,
                    covered=found is not None and found.covered,
                )
            )

    def _follow(
        self,
        func: Callable[..., Any],
        output: Any,
        used: Mapping[int, Any],
        made: Mapping[int, Made],
        ruled: Collection[int],
        done: Collection[int],
        data: bool,
        call: Call | None,
    ) -> None:
        """Follows tensors made of parameters: on to what is made of them alone, or to where data use them."""
        outputs = list(_tensors(output))
        if data:
            if any(t.requires_grad for t in outputs) or writes(func):
                for found in (m for key, m in made.items() if key not in done):
                    if not found.covered:
                        self.opaque.update({n: _name(func) for n in found.sizes if n not in self.opaque})
                    for earlier in found.calls:
                        earlier.kept = True
            return
        sizes = {root[1]: root[0].numel() for root in used.values()}
        for found in made.values():
            sizes.update(found.sizes)
        calls = {id(c): c for m in made.values() for c in m.calls}
        calls.update({} if call is None else {id(call): call})
        covered = all(m.covered for m in made.values()) and (not used or (call is not None and set(used) <= set(ruled)))
        for tensor in outputs:
            if not tensor.requires_grad:
                self._made.add_constants([tensor])
            elif self._root(tensor) is None or id(tensor) in self._results:
                self._made.add(tensor, sizes, list(calls.values()), covered)

    def _record(
        self,
        func: Callable[..., Any],
        rule: LayerRule | None,
        bound: BoundCall | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        version: int,
        done: Collection[int],
        data: bool,
    ) -> Call | None:
        reason = _name(func)
        portions: dict[str, Portion] = {}
        if rule is not None and bound is not None:
            refusal = rule.refuses(bound, output)
            if refusal is not None:
                reason = refusal
            else:
                read = {role: self._portion(bound.values.get(role)) for role in rule.roles}
                portions = {role: portion for role, portion in read.items() if portion is not None}
        covered = [bound[role] for role in portions] if bound is not None else []
        for tensor in _tensors((args, kwargs)):
            root = self._root(tensor)
            if data and root is not None and id(tensor) not in done and all(tensor is not known for known in covered):
                self.opaque.setdefault(root[1], reason)
        if not portions or rule is None or bound is None:
            return None
        call = Call(rule, bound, portions, edge_of(output, func), output.shape, rule.leading(bound, output), version)
        self.calls.append(call)
        if rule.keeps_memory:
            self._results[id(output)] = output
        if rule.one_hot:
            self._lookups[id(output)] = (output, call)  # kept alive so that the id stays its own
        return call


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)  # inference tensors do not count


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from _tensors(value)
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _tensors(value)
