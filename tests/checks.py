"""What many tests look at in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Largest", "close", "of_every"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Same type, same shape, equal relative to the largest entry of the reference."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach() - expected.detach()).abs().max()
    error = float(difference) / max(float(expected.detach().abs().max()), 1e-300)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:g}"


def of_every(case: Callable[..., None], cases: Iterable[Any]) -> None:
    """Looks at every case, and names all that fail: for hundreds that take less than what a test of its own costs.

    Args:
        case: the test of one; of a tuple, its entries are the arguments.
        cases: at least one.
    """
    failed: list[str] = []
    count = 0
    for each in cases:
        count += 1
        try:
            case(*each) if isinstance(each, tuple) else case(each)
        except Exception as error:  # whatever it is, the others are looked at too
            failed.append(f"{each}: {type(error).__name__}: {error}")
        except pytest.fail.Exception as error:
            failed.append(f"{each}: {error}")
    assert count, "no case"
    assert not failed, f"{len(failed)} of {count} fail:\n" + "\n".join(failed)


class Largest(TorchDispatchMode):
    """Remembers the size ``numel`` of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and not value.is_meta:
                self.numel = max(self.numel, value.numel())
        return out
