"""Whether a model draws random numbers where it should not: in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from laplace_kf.callers import warn_user
from laplace_kf.randomness import torch_states

__all__ = ["noticed"]


class _Who(TorchFunctionMode):
    """Finds the first function that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = None if self.found is not None else torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            self.found = getattr(func, "__name__", None)
        return result


@contextmanager
def noticed(devices: set[torch.device], again: Callable[[], Any]) -> Iterator[None]:
    """Around a forward pass in eval mode: warns if torch's random numbers have moved.

    Args:
        devices: of the model's parameters.
        again: the same pass; it is run once more only to name the function that draws.
    """
    before = torch_states(devices)
    yield
    if all(map(torch.equal, before, torch_states(devices))):
        return
    with _Who() as who:
        again()
    by = f" (by {who.found})" if who.found else ""
    warn_user(
        f"the forward pass draws random numbers in eval mode{by}, so that curvature and predictions are each of "
        "another network. Dropout by a function is told the mode: F.dropout(x, p, training=self.training), and "
        "attention dropout_p=p if self.training else 0.0; noise that is meant goes into the batch, as an input"
    )
