"""What a forward pass connected with what, where its numbers have no say in that.

Which positions are reached (:mod:`laplace_kf.tape.reach`) need not be asked again for a pass that is known to have the
answer of an earlier one. That is known if, in both passes,

* the same functions were called on the outputs of the same earlier calls, on the same parameters and with the same
  plain arguments, in the same order, and the network's outputs came from the same call; and
* every one of these functions hands gradients on by weights that the data do not touch: linear maps by parameters,
  arrangements, sums, and what ``reach`` keeps open (elementwise activations, maxima), see :data:`ALONE`,
  :data:`ARRANGED`, :data:`JOINED`.

A product of two activities, a mask, an attention weight, an index from the data, a buffer (it may hold a mask), a
normalisation over units (it can cancel a gradient up to rounding), a hook, an own autograd function, a half precision
(small numbers become 0): anything that is not listed here leaves the pass without a key, and it is asked every time.

Whether a layer rule gives the gradients that autograd gives is a statement about functions alone, so that less is
enough: the first of the two conditions, for functions that hide nothing (:data:`OPEN` and those above). This is the
*form* of a pass. It stands for normalisations, attention and lookups, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_kf.layers.base import functions_of

__all__ = ["Wiring"]

_ALONE = (
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm addmm __matmul__ "
    "__rmatmul__ mul mul_ multiply div true_divide divide __mul__ __rmul__ __truediv__ __imul__ "
    "relu relu_ relu6 leaky_relu leaky_relu_ hardtanh hardtanh_ hardswish hardsigmoid tanh tanh_ sigmoid sigmoid_ gelu "
    "silu mish elu elu_ selu selu_ celu celu_ softplus threshold threshold_ prelu logsigmoid abs batch_norm"
)
_ARRANGED = (
    "view reshape flatten unflatten permute transpose swapaxes movedim contiguous squeeze unsqueeze expand chunk split "
    "unbind narrow select __getitem__ pad roll flip clone to float double half bfloat16 repeat pixel_shuffle unfold "
    "pixel_unshuffle interpolate upsample neg __neg__ mean sum cumsum "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_dropout"
)
_OPEN = (
    "layer_norm group_norm instance_norm rms_norm normalize softmax log_softmax logsumexp bmm baddbmm einsum outer "
    "scaled_dot_product_attention exp log sqrt rsqrt pow __pow__ square reciprocal erf sin cos clamp clamp_min "
    "clamp_max maximum minimum amax amin norm var std where masked_fill masked_fill_ __rsub__ rsub tril triu glu "
    "index_select gather view_as expand_as broadcast_to to type t tile repeat_interleave addcmul embedding"
)
_JOINED = "add add_ sub sub_ __add__ __radd__ __sub__ __iadd__ __isub__ cat concat concatenate stack"


def _listed(names: str) -> frozenset[Callable[..., Any]]:
    return frozenset(functions_of(*((owner, name) for name in names.split() for owner in (F, torch, Tensor))))


#: One activity; all other tensors are parameters (running statistics, too, in a batch normalisation).
ALONE = _listed(_ALONE)
#: One activity and no other tensor.
ARRANGED = _listed(_ARRANGED) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
#: Any number of activities, parameters and data: a sum hands its gradient on whatever it adds up.
JOINED = _listed(_JOINED)
#: Any number of activities, parameters and data; which gradient arrives may depend on the data.
OPEN = _listed(_OPEN) | ALONE | ARRANGED | JOINED
_LOOKUPS = _listed("embedding")
_NORMALISED = _listed("batch_norm")
_RANDOM = _listed("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout")
_PLAIN = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


class _Unknown(Exception):
    """Something that is not known to be the same in the next pass."""


class _Unsteady(Exception):
    """A call that hands gradients on by weights that the data may touch."""


class Wiring:
    """Follows one forward pass; :meth:`key` and :meth:`form` are the same for passes that are wired in the same way.

    Args:
        parameters: the model's parameters, of any shape, in a fixed order.
        buffers: its buffers.
        forms: whether :meth:`form` is wanted; without, only what :meth:`key` needs is followed.
    """

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor], forms: bool = True) -> None:
        self._forms = forms
        self._kept = (*parameters,), (*buffers,)  # so that their ids stay theirs
        self._parameters, self._buffers = ({id(tensor): k for k, tensor in enumerate(kept)} for kept in self._kept)
        self._made: dict[Any, int] = {}  # autograd node to the call that made it; kept alive so that it stays itself
        self._calls: list[Hashable] = []
        self._lost = False
        self._steady = True

    def before(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Hashable, bool] | None:
        """Describes a call that is about to be made, and whether it is steady; hand the result to :meth:`after`."""
        if self._lost:
            return None
        tensors = list(_tensors((args, kwargs)))
        hidden = sum(t.requires_grad and self._constant(t) is None for t in tensors)
        if not hidden and not any(t.requires_grad for t in tensors):
            return None  # data only
        steady = True
        try:
            if hidden:
                try:
                    self._require_steady(func, tensors, hidden, args, kwargs)
                except _Unsteady:
                    steady = False
                    if not self._forms:
                        raise _Unknown from None
                    _require_open(func, args, kwargs)
            return (func, self._described(args), self._described(kwargs)), steady
        except _Unknown:
            # what it returns decides: a shape or a type wires nothing
            return _Unknown, False

    def after(self, before: tuple[Hashable, bool] | None, output: Any) -> None:
        """Takes note of what a call returned."""
        if self._lost or before is None:
            return
        call, steady = before
        made = list(_tensors(output))
        if not made and _is_plain(output) and output is not None:
            return
        if call is _Unknown or not made:
            self._lose()
            return
        self._steady = self._steady and steady
        for tensor in made:
            if tensor.grad_fn is not None:
                self._made[tensor.grad_fn] = len(self._calls)
        self._calls.append(call)

    def key(self, outputs: Tensor) -> Hashable | None:
        """What a pass with these outputs ``(N, ...)`` did; ``None`` if that does not tell what is reached."""
        return self.form(outputs) if self._steady else None

    def form(self, outputs: Tensor) -> Hashable | None:
        """What a pass with these outputs ``(N, ...)`` did; ``None`` if something in it may hide what it does."""
        if self._lost:
            return None
        try:
            return tuple(self._calls), self._described(outputs)
        except _Unknown:
            return None

    def _lose(self) -> None:
        self._lost = True
        self._made.clear()
        self._calls.clear()

    def _constant(self, tensor: Tensor) -> tuple[str, int] | None:
        """Which parameter or buffer a tensor is, or is a view of."""
        for found in (tensor, tensor._base):
            if found is not None and id(found) in self._parameters:
                return "parameter", self._parameters[id(found)]
            if found is not None and id(found) in self._buffers:
                return "buffer", self._buffers[id(found)]
        return None

    def _require_steady(
        self,
        func: Callable[..., Any],
        tensors: Sequence[Tensor],
        hidden: int,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        if func in JOINED:
            return
        if func in _RANDOM and (kwargs.get("training", args[2] if len(args) > 2 else None) is not False):
            raise _Unknown
        if func not in ALONE and func not in ARRANGED:
            raise _Unsteady
        statistics = _statistics(args, kwargs) if func in _NORMALISED else ()
        kinds = [self._constant(t) for t in tensors if all(t is not other for other in statistics)]
        weights = sum(kind is not None and kind[0] == "parameter" for kind in kinds)
        if hidden != 1 or (weights if func in ALONE else 0) != len(kinds) - 1:
            raise _Unsteady

    def _described(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (tuple, list, torch.Size):
            return tuple(map(self._described, value))
        if isinstance(value, Mapping):
            return tuple((key, self._described(entry)) for key, entry in value.items())
        if isinstance(value, slice):
            return "slice", tuple(map(self._described, (value.start, value.stop, value.step)))
        if value is Ellipsis or isinstance(value, _PLAIN):
            return type(value).__name__, value  # 1, True and 1.0 are equal, but not the same index
        raise _Unknown

    def _tensor(self, tensor: Tensor) -> Hashable:
        if tensor.layout is not torch.strided or (tensor.is_floating_point() and tensor.element_size() < 4):
            raise _Unknown
        form = tuple(tensor.shape), tensor.stride(), tensor.dtype
        constant = self._constant(tensor)
        if constant is not None:
            return constant, form, tensor.storage_offset()
        if not tensor.requires_grad:
            return "data", form
        if tensor.grad_fn not in self._made:
            raise _Unknown
        return "call", self._made[tensor.grad_fn], tensor.output_nr, form


def _require_open(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises :class:`_Unknown` for a function that may do other things than its arguments say."""
    if func not in OPEN:
        raise _Unknown
    if func in _LOOKUPS and (
        kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None
        or kwargs.get("scale_grad_by_freq", args[5] if len(args) > 5 else False) is not False
    ):  # one writes into the table, the other one tells autograd what depends on the tokens
        raise _Unknown


def _statistics(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The running mean and variance that a batch normalisation was given."""
    return [*args[1:3], *(kwargs.get(name) for name in ("running_mean", "running_var"))]


def _is_plain(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return all(map(_is_plain, output))
    return isinstance(output, _PLAIN)


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from _tensors(value)
    elif isinstance(structure, slice):
        yield from _tensors((structure.start, structure.stop, structure.step))
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from _tensors(value)
