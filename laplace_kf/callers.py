"""Where the user's own line is, for warnings."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import torch

__all__ = ["users_line", "warn_user"]

_INSIDE = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    contextlib.__file__,
    functools.__file__,
)


def users_line() -> int:
    """The ``stacklevel`` with which ``warnings.warn``, called beside this, names the line that called the package.

    That is the first one outside of it, whatever decorators, base classes or parts of torch lie between.
    """
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
        level += 1
    return level


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as from the innermost caller that is neither this package nor torch running it."""
    warnings.warn(message, category, stacklevel=users_line())
