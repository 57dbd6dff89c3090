"""What a run ran on, and what it needs: versions, machine, processor threads, and the error for a missing extra."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch

from laplace_kf.version import __version__

__all__ = ["machine", "missing_extra", "processor_threads", "versions"]


def missing_extra(package: str | None) -> ImportError:
    """The error for a package of the ``experiments`` extra that is not installed (``ImportError.name`` is its name)."""
    return ImportError(
        f"Experiments and reports need the package {package!r}, which is not installed. "
        "It comes with the 'experiments' extra: pip install 'laplace_kf[experiments]'",
        name=package,
    )


@contextlib.contextmanager
def processor_threads(count: int) -> Iterator[None]:
    """Use ``count`` processor threads inside the ``with`` block, then as many as before; 0 changes nothing."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Versions of everything that decides a number: Python, this package, torch, numpy and the experiment extras."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "laplace_kf": __version__,
    }
    for name in ("torchmetrics", "scikit-learn", "matplotlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str = "cpu") -> dict[str, str | int | float]:
    """What the run ran on: processor, cores, threads, memory in GiB, and the accelerator if ``device`` is one.

    No host name, user name or path is recorded.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    found: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return found


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")  # platform.processor() is empty or just the architecture on Linux
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # no sysconf on this system
        return float("nan")
