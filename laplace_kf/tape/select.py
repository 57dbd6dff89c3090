"""Which parameters a posterior covers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from laplace_kf.conventions import frozen_adapter_line
from laplace_kf.errors import InvalidArgument, InvalidType, UnknownName, UnsupportedLayer
from laplace_kf.models import named_parameters, plain_name

__all__ = ["owner", "patterns", "select"]


def owner(name: str) -> str:
    """The module path of a parameter name (``""`` for the root); a parametrised module owns its original tensors."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def patterns(model: nn.Module, parameters: object) -> tuple[str, ...]:
    """Name patterns as they were given; refused with the patterns to write where a module or its tensors were.

    Raises:
        InvalidType: for anything else than names; gives the line.
    """
    if isinstance(parameters, nn.Module):
        paths = [path for path, module in model.named_modules() if module is parameters]
        line = ['"*"' if not paths[0] else f'"{paths[0]}.*"'] if paths else ['"head.*"']
        what = f"a module, {type(parameters).__name__}"
    else:
        if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
            parameters = [parameters]
        given = list(parameters)
        odd = [entry for entry in given if not isinstance(entry, str)]
        if not odd:
            return tuple(given)
        own = {id(p): name for name, p in model.named_parameters()}
        line = [f'"{own[id(entry)]}"' for entry in odd if id(entry) in own][:5] or ['"head.*"']
        what = (
            f"a {type(odd[0]).__name__}" if len(given) == 1 else f"{len(odd)} entries of type {type(odd[0]).__name__}"
        )
    raise InvalidType(
        f'parameters are chosen by their names, and {what} was given: parameters=[{", ".join(line)}], or "all" or '
        '"last_layer"'
    )


def select(
    model: nn.Module,
    parameters: str | Sequence[str],
    order: Sequence[str] | None = None,
    named: Mapping[str, Tensor] | None = None,
    frozen: Collection[str] = (),
) -> list[str]:
    """Names of the selected trainable parameters, in ``model.named_parameters()`` order; of those that have entries.

    Args:
        model: the module.
        parameters: ``"all"``, ``"last_layer"`` or a list of ``fnmatch`` patterns over parameter names.
        order: parameter names in the order of use (from a tape); needed for ``"last_layer"``.
        named: the model's parameters by name, each of its shape, where they are known.
        frozen: names of parameters that may be selected though they require no gradient.

    Raises:
        UnknownName: for a selection word that does not exist, or a pattern that matches no parameter.
        UnsupportedLayer: if no selected parameter requires a gradient.
    """
    named = named_parameters(model) if named is None else named
    empty = {name for name, p in named.items() if not p.numel()}  # the weight of Linear(0, 3)
    trainable = [name for name, p in named.items() if (p.requires_grad or name in frozen) and name not in empty]
    if not named:
        raise UnsupportedLayer(
            f"{type(model).__name__} has no parameters; there is nothing that a posterior could be over, give a "
            "network that has some"
        )
    if not trainable:
        raise UnsupportedLayer(
            f"no parameter of {type(model).__name__} requires a gradient; call model.requires_grad_(True) or set "
            f"requires_grad on the parameters the posterior should cover{frozen_adapter_line(model)}"
        )
    if isinstance(parameters, str):
        if parameters == "all":
            return trainable
        if parameters == "last_layer":
            if not order:
                raise UnsupportedLayer("no parameter took part in the forward pass, so there is no last layer")
            last = owner(
                next((name for name in reversed(order) if name not in named or named[name].numel()), order[-1])
            )
            chosen = [name for name in trainable if owner(name) == last]
            if not chosen:
                raise UnsupportedLayer(
                    f"the last layer, module {last!r}, is frozen; set requires_grad on its parameters, or name another "
                    "selection with parameters=[patterns]"
                )
            return chosen
        some = any(fnmatchcase(name, parameters) or owner(name) == parameters for name in named)
        line = f'parameters=["{parameters if any(fnmatchcase(n, parameters) for n in named) else f"{parameters}.*"}"]'
        raise UnknownName(
            "parameter selection", parameters, ["all", "last_layer", "a list of name patterns"], line if some else ""
        )
    parameters = patterns(model, parameters)
    if not parameters:
        raise InvalidArgument("parameters is an empty list; give name patterns, 'all' or 'last_layer'")
    # a tied parameter carries several names; a pattern may use any of them
    first = {id(p): name for name, p in named.items()}
    matched: set[str] = set()
    for pattern in parameters:
        every = list(model.named_parameters(remove_duplicate=False))
        hits = {first[id(p)] for name, p in every if fnmatchcase(name, pattern)}
        # a compiled model's names carry a prefix; a pattern may have it or not
        hits = hits or {first[id(p)] for name, p in every if fnmatchcase(plain_name(name), plain_name(pattern))}
        if not hits:
            inside = any(name.startswith(f"{pattern}.") for name in named)
            raise UnknownName("parameter pattern", pattern, named, f'parameters=["{pattern}.*"]' if inside else "")
        matched |= hits
    chosen = [name for name in trainable if name in matched]
    if not chosen:
        raise UnsupportedLayer(
            f"the parameters matched by {list(parameters)} are all frozen or empty: {sorted(matched)}; "
            f"set requires_grad on those the posterior should cover{frozen_adapter_line(model)}"
        )
    return chosen
