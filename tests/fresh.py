"""What is seen in a process that has imported nothing yet: one for all tests that ask, as its start takes seconds.

A step that fails, or ends the process, leaves its own and all later words unsaid; their tests fail with its message.
"""

from __future__ import annotations

import functools
import subprocess
import sys

__all__ = ["said"]

_SCRIPT = """
import random, sys, warnings, torch, numpy

def say(name, *words):
    print(name, *words, sep="\\t", flush=True)

def loaded(*packages):
    return any(name.split(".")[0] in packages for name in sys.modules)

before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
filters = list(warnings.filters)
import laplace_kf as lk
after = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
say("generators", torch.equal(before[0], after[0]) and before[1:] == after[1:])
say("filters", filters == list(warnings.filters))
import laplace_kf.continual
say("lightning", loaded("lightning", "pytorch_lightning"))

say("pyro", loaded("pyro"))

from laplace_kf.reports import plots
plots.panels(1, 2)
say("pyplot", "matplotlib.pyplot" in sys.modules)

sys.modules["pyro"] = None
try:
    lk.bridges.pyro
except ImportError as error:
    say("without pyro", error)
del sys.modules["pyro"]
lk.bridges.pyro
say("pyro when asked for", loaded("pyro"))

torch.set_num_threads(1)
model = torch.nn.Linear(3, 2).double()
x = torch.randn(6, 3, dtype=torch.float64)
x[2, 1] = float("nan")
for structure in ("kron", "full", "diag"):
    try:
        lk.LaplacePosterior(model, "categorical", structure=structure).fit([(x, torch.zeros(6, dtype=torch.long))])
        say("not refused", structure)
    except lk.errors.NonFinite:
        say("refused", structure)
say("alive")
"""


@functools.cache
def _lines() -> tuple[list[list[str]], str]:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=240, check=False)
    return [line.split("\t") for line in done.stdout.splitlines()], f"exit status {done.returncode}: {done.stderr}"


def said(name: str) -> list[str]:
    """The words after ``name``, of each line that it begins."""
    lines, end = _lines()
    found = [" ".join(words[1:]) for words in lines if words[0] == name]
    assert found, f"nothing was said of {name!r}; {end}"
    return found
